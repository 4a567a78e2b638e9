"""Runs of quantize.quantize that are cut short: what they leave, and that the next one makes the same file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support import checkpoints as make

import quantize
from quantize import Options, Progress

SMALL = {**make.V2, "num_hidden_layers": 3}
FLOATS = Options(type="f16", threads=1)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "hf"
    make.write_checkpoint(folder, SMALL, n_shards=3)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibration text of a few windows."""
    words = np.random.default_rng(5).choice(["the", "inner", "ether", "there", "tin", "nether"], 1200)
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(words))
    return path


def test_ctrl_c_leaves_what_was_there_and_the_next_run_goes_on(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "m.gguf"
    quantize.quantize(source, tmp_path / "whole.gguf", FLOATS)
    out.write_text("before")

    def stop(step: Progress) -> None:
        if step.layer == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize.quantize(source, out, FLOATS, stop)
    assert out.read_text() == "before" and (tmp_path / "m.gguf.work").is_dir()
    said: list[str] = []
    steps: list[Progress] = []
    quantize.quantize(source, out, FLOATS, steps.append, say=said.append)
    assert said == ["continuing at layer 2 of 3"]
    assert 0 not in {step.layer for step in steps}
    assert out.read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.gguf", "whole.gguf"]


def test_a_killed_run_goes_on(tmp_path: Path, source: Path, text: Path) -> None:
    out, options = tmp_path / "m.gguf", Options(type="q4_k_m", threads=1, calibration=(text,))
    code = (
        "import sys, time, quantize\nfrom pathlib import Path\n"
        "def slow(step):\n"
        "    if step.layer == 1 and step.stage == 'encode': print('there', flush=True); time.sleep(60)\n"
        "options = quantize.Options(type='q4_k_m', threads=1, calibration=(Path(sys.argv[3]),))\n"
        "quantize.quantize(sys.argv[1], sys.argv[2], options, slow)"
    )
    run = subprocess.Popen([sys.executable, "-P", "-c", code, str(source), str(out), str(text)], stdout=subprocess.PIPE)
    assert run.stdout is not None and run.stdout.readline() == b"there\n"
    with pytest.raises(quantize.OutputError, match="another run"):
        quantize.quantize(source, out, options)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    run.stdout.close()
    assert not out.exists()
    said: list[str] = []
    quantize.quantize(source, out, options, say=said.append)
    assert said == ["continuing at layer 2 of 3"]
    quantize.quantize(source, tmp_path / "whole.gguf", options)
    assert out.read_bytes() == (tmp_path / "whole.gguf").read_bytes()
