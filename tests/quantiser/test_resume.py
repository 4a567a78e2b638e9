"""Runs of quantize.quantize that are cut short: what they leave, and that the next one makes the same file."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import checkpoints as make
from support import forks

import cext
import quantize
from quantize import CheckpointError, Options, OutputError, Progress, identity
from quantize.write.journal import Journal

SMALL = {**make.V2, "num_hidden_layers": 3}
FLOATS = Options(type="f16", threads=1, evaluate=False)
# A run that kills itself at an event: anything that reaches the disk or the caller. Prints how many there were.
RUN = """
import os, signal, sys
from pathlib import Path
import quantize
limit, events = int(sys.argv[4]), 0
def event(*args):
    global events
    events += 1
    if events == limit:
        os.kill(os.getpid(), signal.SIGKILL)
def counted(function):
    def call(*args, **kwargs):
        event()
        value = function(*args, **kwargs)
        event()
        return value
    return call
for name in ("fsync", "pwrite", "replace", "unlink", "rmdir"):
    setattr(os, name, counted(getattr(os, name)))
plain = sys.argv[5] == "plain"
options = quantize.Options(type="q4_k_m", threads=1, calibration=(Path(sys.argv[3]),), plain_mix=plain)
quantize.quantize(sys.argv[1], sys.argv[2], options, event, say=print)
print(events)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "hf"
    make.write_checkpoint(folder, SMALL, n_shards=3)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibration text of some windows, of which one is held back."""
    return make.write_text(tmp_path_factory.mktemp("text") / "text.txt", 1300)


def start(source: Path, out: Path, text: Path, mix: str, kill_at: int = 0) -> subprocess.CompletedProcess[str]:
    """mix: "plain" types, or "surveyed"."""
    command = [sys.executable, "-P", "-c", RUN, str(source), str(out), str(text), str(kill_at), mix]
    done = forks.run(command, os.environ, 600, text=True)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done


Whole = tuple[bytes, dict[str, Any], int]


def undisturbed(out: Path, source: Path, text: Path, mix: str) -> Whole:
    """The file of a run that nobody cut short, its report, and how many events it had."""
    done = start(source, out, text, mix)
    report = json.loads((out.parent / "m.gguf.report.json").read_text())
    assert report["evaluation"]["n_windows"] >= 1
    return out.read_bytes(), report, int(done.stdout.split()[-1])


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, source: Path, text: Path) -> Whole:
    return undisturbed(tmp_path_factory.mktemp("plain") / "m.gguf", source, text, "plain")


@pytest.fixture(scope="module")
def surveyed(tmp_path_factory: pytest.TempPathFactory, source: Path, text: Path) -> Whole:
    return undisturbed(tmp_path_factory.mktemp("surveyed") / "m.gguf", source, text, "surveyed")


def assert_whole(out: Path, whole: Whole) -> None:
    assert out.read_bytes() == whole[0]
    report = json.loads((out.parent / "m.gguf.report.json").read_text())
    for name in report.keys() - {"path", "seconds", "weights_per_second"}:
        assert report[name] == whole[1][name], name
    assert sorted(p.name for p in out.parent.iterdir()) == ["m.gguf", "m.gguf.report.json"]


@pytest.mark.parametrize("seed", range(2))
def test_killed_again_and_again(tmp_path: Path, source: Path, text: Path, surveyed: Whole, seed: int) -> None:
    """At random points of all stages, the survey included."""
    out, rng = tmp_path / "m.gguf", random.Random(seed)
    for _ in range(2):
        if start(source, out, text, "surveyed", rng.randrange(2, surveyed[2] * 2 // 3)).returncode == 0:
            break
        assert not out.exists() and not (tmp_path / "m.gguf.report.json").exists()
    start(source, out, text, "surveyed")
    assert_whole(out, surveyed)


@pytest.mark.parametrize("before_end", [1, 4, 8])
def test_killed_in_the_last_instants(tmp_path: Path, source: Path, text: Path, plain: Whole, before_end: int) -> None:
    """Around the renames: whatever stands under the final name is whole."""
    out = tmp_path / "m.gguf"
    assert start(source, out, text, "plain", plain[2] - before_end).returncode == -signal.SIGKILL
    assert not out.exists() or out.read_bytes() == plain[0]
    start(source, out, text, "plain")
    assert_whole(out, plain)


def test_a_killed_run_loses_at_most_a_layer(tmp_path: Path, source: Path, text: Path, plain: Whole) -> None:
    out, options = tmp_path / "m.gguf", Options(type="q4_k_m", threads=1, calibration=(text,), plain_mix=True)

    class Stop(BaseException):
        pass

    def stop_at(il: int, stage: str) -> list[int]:
        layers: list[int] = []

        def progress(step: Progress) -> None:
            layers.append(step.layer)
            if (step.layer, step.stage) == (il, stage):
                raise Stop

        said: list[str] = []
        with pytest.raises(Stop):
            quantize.quantize(source, out, options, progress, say=said.append)
        return sorted({*layers} - {-1})

    assert stop_at(0, "encode") == [0]
    assert stop_at(1, "calibrate") == [0, 1]
    assert stop_at(2, "calibrate") == [1, 2]
    assert stop_at(2, "encode") == [2]
    assert stop_at(1, "evaluate") == [0, 1, 2]  # layer 2 is written again, then 0 measured
    assert stop_at(-1, "finish") == [1, 2]
    said: list[str] = []
    quantize.quantize(source, out, options, say=said.append)
    assert said == ["continuing: all layers are written"]
    assert_whole(out, plain)


def test_two_runs_at_once(tmp_path: Path, source: Path) -> None:
    def second(step: Progress) -> None:
        if step.layer == 1:
            with pytest.raises(OutputError, match="another run is writing it"):
                quantize.quantize(source, tmp_path / "m.gguf", FLOATS)
            seen.append(step.layer)

    seen: list[int] = []
    quantize.quantize(source, tmp_path / "m.gguf", FLOATS, second)
    assert seen and (tmp_path / "m.gguf").exists()


def interrupted(source: Path, out: Path, options: Options = FLOATS, il: int = 2) -> None:
    """A run that Ctrl-C stopped in layer il."""

    def stop(step: Progress) -> None:
        if step.layer == il:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize.quantize(source, out, options, stop)


def test_ctrl_c_leaves_what_was_there_and_the_next_run_goes_on(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "m.gguf"
    quantize.quantize(source, tmp_path / "whole.gguf", FLOATS)
    out.write_text("before")
    interrupted(source, out)
    assert out.read_text() == "before" and quantize.work_folder(out).is_dir()
    said: list[str] = []
    steps: list[Progress] = []
    quantize.quantize(source, out, FLOATS, steps.append, say=said.append)
    assert said == ["continuing at layer 3 of 3"]
    assert {step.layer for step in steps} == {-1, 2}
    # The first thing shown is how much is there already, and the time left knows that it cost this run nothing.
    assert next(step for step in steps if step.layer == 2).fraction > 0.5
    assert out.read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert not quantize.work_folder(out).exists()


CHANGES: dict[str, tuple[Options, str]] = {
    "the type": (Options(type="bf16", threads=1, evaluate=False), "--type was f16, is bf16"),
    "a switch": (Options(type="f16", threads=1, evaluate=False, awq=True), "--awq was False, is True"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_other_options_are_refused_and_lose_nothing(tmp_path: Path, source: Path, case: str) -> None:
    options, told = CHANGES[case]
    out = tmp_path / "m.gguf"
    interrupted(source, out)
    with pytest.raises(OutputError, match=f"holds the work of another run: {told}") as error:
        quantize.quantize(source, out, options)
    assert "--restart" in error.value.hint and "-o" in error.value.hint
    said: list[str] = []
    quantize.quantize(source, tmp_path / "m.gguf", say=said.append, options=FLOATS)
    assert said == ["continuing at layer 3 of 3"]
    out.unlink()
    interrupted(source, out)
    steps: list[Progress] = []
    quantize.quantize(source, out, options, steps.append, restart=True)
    assert {step.layer for step in steps} == {-1, 0, 1, 2}
    quantize.quantize(source, tmp_path / "fresh.gguf", options)
    assert out.read_bytes() == (tmp_path / "fresh.gguf").read_bytes()


def surveyed_with(text: Path, **budget: Any) -> Options:
    return Options(**budget, threads=1, calibration=(text,), evaluate=False, sequential=False)


def begun(source: Path, out: Path, options: Options, stage: str, il: int) -> None:
    """A run that ended in a stage of layer il."""

    class Stop(BaseException):
        pass

    def progress(step: Progress) -> None:
        if (step.stage, step.layer) == (stage, il):
            raise Stop

    with pytest.raises(Stop):
        quantize.quantize(source, out, options, progress)


def test_a_survey_holds_for_another_budget(tmp_path: Path, source: Path, text: Path) -> None:
    """It is gone on from, in its midst, with no question; where layers are written, --restart keeps it."""
    out, fresh = tmp_path / "m.gguf", tmp_path / "fresh.gguf"
    small, large = surveyed_with(text, type="q3_k_m"), surveyed_with(text, bpw=6.5)
    quantize.quantize(source, fresh, large)
    begun(source, out, small, "survey", 1)
    said: list[str] = []
    quantize.quantize(source, out, large, say=said.append)
    assert said[0] == "the survey of an earlier run is gone on from"
    assert out.read_bytes() == fresh.read_bytes()
    out.unlink()
    begun(source, out, small, "encode", 1)
    with pytest.raises(OutputError, match=r"--bpw was None, is 6\.5") as error:
        quantize.quantize(source, out, large)
    assert "but for the survey" in error.value.hint
    steps: list[Progress] = []
    quantize.quantize(source, out, large, steps.append, restart=True)
    assert {step.stage for step in steps} >= {"encode"} and "survey" not in {step.stage for step in steps}
    assert out.read_bytes() == fresh.read_bytes()


OTHERS = {
    "more types than it measured": {"bpw": 5.7},
    "less of the text": {"survey_tokens": 512},
    "no feedback": {"feedback": False},
}


@pytest.mark.parametrize("case", OTHERS)
def test_a_survey_that_does_not_hold_is_not_lost(tmp_path: Path, source: Path, text: Path, case: str) -> None:
    out, asked = tmp_path / "m.gguf", surveyed_with(text, bpw=10.0, survey_tokens=1024)
    begun(source, out, asked, "survey", 1)
    with pytest.raises(OutputError, match="holds the work of another run"):
        quantize.quantize(source, out, surveyed_with(text, **{"bpw": 10.0, "survey_tokens": 1024, **OTHERS[case]}))
    said: list[str] = []
    quantize.quantize(source, out, asked, say=said.append)
    assert said[0].startswith("continuing the survey")


@pytest.mark.parametrize("name", identity.numerics())
def test_other_numerics_are_refused(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    interrupted(source, tmp_path / "m.gguf")
    theirs = {**identity.numerics(), name: "another"}
    monkeypatch.setattr(identity, "numerics", lambda: theirs)
    with pytest.raises(OutputError, match=f"{name} (was|changed)"):
        quantize.quantize(source, tmp_path / "m.gguf", FLOATS)


def test_a_checkpoint_that_moved_is_the_same(tmp_path: Path) -> None:
    """With another comment in its config.json."""
    make.write_checkpoint(tmp_path / "a" / "hf", SMALL, n_shards=3)
    interrupted(tmp_path / "a" / "hf", tmp_path / "m.gguf")
    (tmp_path / "a").rename(tmp_path / "b")
    config = tmp_path / "b" / "hf" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "transformers_version": "9.9"}))
    said: list[str] = []
    quantize.quantize(tmp_path / "b" / "hf", tmp_path / "m.gguf", FLOATS, say=said.append)
    assert said == ["continuing at layer 3 of 3"]


def finished(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, bytes]:
    """A whole file, and its bytes, whose run died before its work folder was gone."""
    out = tmp_path / "m.gguf"
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "discard", Journal._release)
        quantize.quantize(source, out, FLOATS)
    return out, out.read_bytes()


def test_a_finished_marker_of_another_run(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole file whose work folder stayed: the same run takes it, another neither takes nor replaces it."""
    out, whole = finished(tmp_path, source, monkeypatch)
    assert quantize.is_finished(out)
    other = Options(type="bf16", threads=1, evaluate=False)
    with pytest.raises(OutputError, match="--type was f16, is bf16"):
        quantize.quantize(source, out, other)
    assert out.read_bytes() == whole
    assert quantize.quantize(source, out, FLOATS).recipe == "f16" and not quantize.work_folder(out).exists()


def test_a_finished_marker_is_of_its_file(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another file has been put in its place since: it is made again."""
    out, whole = finished(tmp_path, source, monkeypatch)
    out.write_bytes(b"something else")
    assert not quantize.is_finished(out)
    quantize.quantize(source, out, FLOATS)
    assert out.read_bytes() == whole


def test_other_threads_do_not(tmp_path: Path, source: Path) -> None:
    interrupted(source, tmp_path / "m.gguf")
    said: list[str] = []
    quantize.quantize(source, tmp_path / "m.gguf", Options(type="f16", threads=2, evaluate=False), say=said.append)
    assert said == ["continuing at layer 3 of 3"]


def test_another_text_or_source_is_refused(tmp_path: Path, text: Path) -> None:
    make.write_checkpoint(tmp_path / "hf", SMALL, n_shards=3)
    mine = tmp_path / "mine.txt"
    mine.write_text(text.read_text())
    options = Options(type="q4_0", threads=1, calibration=(mine,), awq=False, evaluate=False, plain_mix=True)
    interrupted(tmp_path / "hf", tmp_path / "m.gguf", options)
    mine.write_text(text.read_text() + " and on")
    with pytest.raises(OutputError, match="the calibration text changed"):
        quantize.quantize(tmp_path / "hf", tmp_path / "m.gguf", options)
    mine.write_text(text.read_text())
    weights = make.random_weights(SMALL, seed=7)
    make.write_checkpoint(tmp_path / "hf", SMALL, weights, n_shards=3)
    with pytest.raises(OutputError, match=r"run: model-00001-of-00003\.safetensors changed"):
        quantize.quantize(tmp_path / "hf", tmp_path / "m.gguf", options)


def test_restart(tmp_path: Path, source: Path) -> None:
    interrupted(source, tmp_path / "m.gguf")
    steps: list[Progress] = []
    quantize.quantize(source, tmp_path / "m.gguf", FLOATS, steps.append, restart=True)
    assert {step.layer for step in steps} == {-1, 0, 1, 2}


def test_a_lost_part_is_made_again(tmp_path: Path, source: Path) -> None:
    interrupted(source, tmp_path / "m.gguf")
    (quantize.work_folder(tmp_path / "m.gguf") / "model.gguf.part").unlink()
    quantize.quantize(source, tmp_path / "m.gguf", FLOATS)
    quantize.quantize(source, tmp_path / "fresh.gguf", FLOATS)
    assert (tmp_path / "m.gguf").read_bytes() == (tmp_path / "fresh.gguf").read_bytes()


# What can go wrong on the way, and be put right.


def shard_of(folder: Path, name: str) -> Path:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return folder / str(index["weight_map"][name])


LATE = "model.layers.2.mlp.experts.7.down_proj.weight"


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_late_nan_is_named_and_its_shard_can_be_replaced(tmp_path: Path, bad: float) -> None:
    """The layers before it are kept: nothing was read from the bad shard for them."""
    weights = make.random_weights(SMALL)
    good = make.write_checkpoint(tmp_path / "good", SMALL, weights, dtype="F32", n_shards=9)
    quantize.quantize(tmp_path / "good", tmp_path / "good.gguf", FLOATS)
    (tmp_path / "good").rename(tmp_path / "hf")
    shard = shard_of(tmp_path / "hf", LATE)
    repaired = shard.read_bytes()
    spoilt = {**good, LATE: good[LATE].copy()}
    spoilt[LATE][5, 3] = bad
    make.write_checkpoint(tmp_path / "bad", SMALL, spoilt, dtype="F32", n_shards=9)
    shard.write_bytes(shard_of(tmp_path / "bad", LATE).read_bytes())
    with pytest.raises(CheckpointError, match=rf"{LATE}.* 1 of {good[LATE].size} values not finite, first at \(5, 3\)"):
        quantize.quantize(tmp_path / "hf", tmp_path / "m.gguf", FLOATS)
    assert not (tmp_path / "m.gguf").exists()
    shard.write_bytes(repaired)
    said: list[str] = []
    quantize.quantize(tmp_path / "hf", tmp_path / "m.gguf", FLOATS, say=said.append)
    assert said == ["continuing at layer 3 of 3"]
    one, two = (cext.Gguf(tmp_path / name) for name in ("m.gguf", "good.gguf"))
    for tensor in two.tensors:
        np.testing.assert_array_equal(one.raw(tensor.name), two.raw(tensor.name), err_msg=tensor.name)


def test_a_nan_that_the_survey_meets(tmp_path: Path, text: Path) -> None:
    weights = make.random_weights(SMALL)
    make.write_checkpoint(tmp_path / "hf", SMALL, weights, dtype="F32", n_shards=9)
    shard = shard_of(tmp_path / "hf", LATE)
    repaired = shard.read_bytes()
    weights[LATE][-1, -1] = np.nan
    make.write_checkpoint(tmp_path / "bad", SMALL, weights, dtype="F32", n_shards=9)
    shard.write_bytes(shard_of(tmp_path / "bad", LATE).read_bytes())
    options = Options(type="q4_0", threads=1, calibration=(text,), awq=False, evaluate=False, feedback=False, bpw=7.0)
    with pytest.raises(CheckpointError, match=rf"{LATE}.* 1 of {weights[LATE].size} values not finite"):
        quantize.quantize(tmp_path / "hf", tmp_path / "m.gguf", options)
    shard.write_bytes(repaired)
    said: list[str] = []
    quantize.quantize(tmp_path / "hf", tmp_path / "m.gguf", options, say=said.append)
    assert said[0] == "continuing the survey of what each type costs at layer 3 of 3"
    assert (tmp_path / "m.gguf").exists()


def test_a_shard_that_disappears(tmp_path: Path) -> None:
    make.write_checkpoint(tmp_path / "hf", SMALL, n_shards=9)
    shard = shard_of(tmp_path / "hf", LATE)

    def lose(step: Progress) -> None:
        if step.layer == 1 and shard.exists():
            shard.rename(tmp_path / "kept")

    with pytest.raises(CheckpointError, match=rf"{shard.name}.*No such file"):
        quantize.quantize(tmp_path / "hf", tmp_path / "m.gguf", FLOATS, lose)
    with pytest.raises(CheckpointError, match=rf"{shard.name}.* is missing"):
        quantize.quantize(tmp_path / "hf", tmp_path / "m.gguf", FLOATS)
    (tmp_path / "kept").rename(shard)
    said: list[str] = []
    quantize.quantize(tmp_path / "hf", tmp_path / "m.gguf", FLOATS, say=said.append)
    assert said == ["continuing at layer 3 of 3"]


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_FSIZE as Linux has it")
def test_a_disk_that_fills_up(tmp_path: Path, source: Path, text: Path) -> None:
    """The kernel refuses the GGUF, then the hidden states that are larger than it; then there is room again."""
    out = tmp_path / "m.gguf"
    options = Options(type="q4_0", threads=1, calibration=(text,), awq=False, evaluate=False, plain_mix=True)
    code = (
        "import resource, sys, quantize\nfrom pathlib import Path\n"
        "limit = int(sys.argv[4])\nresource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))\n"
        "options = dict(type='q4_0', calibration=(Path(sys.argv[3]),), awq=False, evaluate=False, plain_mix=True)\n"
        "try: quantize.quantize(sys.argv[1], sys.argv[2], quantize.Options(**options))\n"
        "except quantize.OutputError as error: print(error, error.hint)"
    )
    quantize.quantize(source, tmp_path / "whole.gguf", options)
    nbytes = (tmp_path / "whole.gguf").stat().st_size
    for limit in (nbytes // 2, nbytes + 4096):
        command = [sys.executable, "-P", "-c", code, str(source), str(out), str(text), str(limit)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
        assert "File too large" in done.stdout and "GB are free" in done.stdout and done.stderr == ""
        assert done.stdout.count("\n") == 1 and not out.exists()
        assert not list(tmp_path.rglob("*.tmp"))
    quantize.quantize(source, out, options)
    assert out.read_bytes() == (tmp_path / "whole.gguf").read_bytes()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written(tmp_path: Path, source: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(OutputError, match="Permission denied"):
        quantize.quantize(source, tmp_path / "locked" / "m.gguf", FLOATS)
