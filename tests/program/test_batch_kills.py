"""A batch that is killed, or told to end: the same command goes on, and nothing is lost or there twice."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support import forks
from support.batches import answers, results, save, short
from support.cli import COMMAND, RUN_MAIN, SECONDS, environment
from support.inprocess import run
from support.tiny import spec_named, variant
from support.vocab import V25_TEMPLATE, write_model

N = 40
OPTIONS = ("-c", "512", "--kv", "f32", "-t", "1", "-q", "--skip-bad", "--parallel", "4")

# Dies at its n-th act on the disk: before it, after it, or where it writes in the middle. -1: never.
KILLED = """
import os, random, signal, sys
at, rng, acts = int(sys.argv.pop(1)), random.Random(sys.argv.pop(1)), 0
def dies(name):
    act = getattr(os, name)
    def call(*args, **named):
        global acts
        acts += 1
        if acts == at:
            if name == "write":
                act(args[0], args[1][:rng.randrange(len(args[1]) + 1)])
            elif rng.random() < 0.5:
                act(*args, **named)
            os.kill(os.getpid(), signal.SIGKILL)
        return act(*args, **named)
    setattr(os, name, call)
for name in ("write", "fsync", "ftruncate", "replace", "unlink"):
    dies(name)
"""


# With its first result it hears these signals, or waits without end.
AT_THE_FIRST = """
import os, signal, sys, threading
from dsv2cli.batch.ledger import Ledger
names, put = sys.argv.pop(1).split(), Ledger.put
def heard(ledger, *given, **named):
    put(ledger, *given, **named)
    Ledger.put = put
    for name in names:
        os.kill(os.getpid(), getattr(signal, name))
    if not names:
        print("begun", flush=True)
        threading.Event().wait()
Ledger.put = heard
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = variant(spec_named("lite"), n_ctx=4096)
    return write_model(tmp_path_factory.mktemp("kills") / "tiny.gguf", spec, V25_TEMPLATE, endless=True)


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lines: list[Any] = short(N, temperature=1.0)
    lines[7] = "no line"
    lines[9]["body"]["n"] = 99
    return save(tmp_path_factory.mktemp("given") / "in.jsonl", lines)


def whole(path: Path, given: Path, out: Path, *more: str) -> dict[str, Any]:
    """The answers of a run that nobody disturbed."""
    assert run("batch", given, path, "-o", out, *OPTIONS, *more).code == 1
    return answers(out)


def check(out: Path, undisturbed: dict[str, Any], *, same: bool) -> None:
    found = answers(out)
    assert found.keys() == undisturbed.keys()
    assert found == undisturbed or not same
    errors = results(out.with_name("out.errors.jsonl"))
    assert sorted(str(error["custom_id"]) for error in errors) == ["None", "r9"]


@pytest.mark.parametrize(
    ("n_kills", "seed"),
    [pytest.param(10, 1, id="10"), *(pytest.param(100, i, id=f"100-{i}", marks=pytest.mark.heavy) for i in (2, 3))],
)
def test_killed_again_and_again(path: Path, given: Path, tmp_path: Path, n_kills: int, seed: int) -> None:
    """At a random act on the disk, or as soon as so many bytes of answers are there."""
    rng = random.Random(seed)
    undisturbed = whole(path, given, tmp_path / "whole", "--deterministic")
    n = batch = 0
    while n < n_kills:
        out = tmp_path / f"{batch}" / "out"
        out.parent.mkdir()
        batch += 1
        args = ["batch", str(given), str(path), "-o", str(out), *OPTIONS, "--deterministic"]
        while n < n_kills:
            before = {r["id"] for r in whole_results(out)}
            code = killed(args, out, rng)
            assert before <= {r["id"] for r in whole_results(out)}
            n += code == -signal.SIGKILL
            if code != -signal.SIGKILL:
                assert code == 1  # two lines failed
                break
        assert run(*args).code == 1
        check(out, undisturbed, same=True)


def whole_results(out: Path) -> list[Any]:
    """The results that are there, but for what stands behind the last whole line."""
    lines = out.read_bytes().split(b"\n")[:-1] if out.exists() else []
    return [json.loads(line) for line in lines]


def killed(args: list[str], out: Path, rng: random.Random) -> int:
    if rng.random() < 0.7:
        script = [sys.executable, "-P", "-c", KILLED + RUN_MAIN, str(rng.randint(1, 20)), str(rng.random())]
        return forks.run([*script, *args], environment(), SECONDS).returncode
    size = (out.stat().st_size if out.exists() else 0) + rng.randint(0, 6000)
    process = forks.popen([*COMMAND, *args], environment(), stderr=subprocess.DEVNULL)
    while process.poll() is None and not (out.exists() and out.stat().st_size >= size):
        time.sleep(0.002)
    process.kill()
    return process.wait()


def test_killed_while_others_share_the_steps(path: Path, given: Path, tmp_path: Path) -> None:
    """As it is usually run: no line is lost, and every one has its answer."""
    rng = random.Random(4)
    undisturbed = whole(path, given, tmp_path / "whole")
    out = tmp_path / "out"
    args = ["batch", str(given), str(path), "-o", str(out), *OPTIONS]
    for _ in range(3):
        killed(args, out, rng)
    assert run(*args).code == 1
    check(out, undisturbed, same=False)


@pytest.mark.parametrize(("signals", "code"), [(["INT"], 130), (["INT", "INT"], 130), (["TERM"], 1)])
def test_told_to_end(path: Path, tmp_path: Path, signals: list[str], code: int) -> None:
    """Ctrl-C finishes what is under way; a second one, or SIGTERM, leaves it. Only whole answers are kept."""
    given, out = save(tmp_path / "in.jsonl", short(60, max_tokens=150)), tmp_path / "out"
    args = ["batch", str(given), str(path), "-o", str(out), *OPTIONS[:-2], "--parallel", "2"]
    script = [sys.executable, "-P", "-c", AT_THE_FIRST + RUN_MAIN, " ".join(f"SIG{name}" for name in signals)]
    ended = forks.run([*script, *args], environment(), SECONDS, text=True)
    told = ended.stderr
    assert ended.returncode == code, told
    assert "Traceback" not in told and ("of 60 lines are done" in told) == (signals == ["TERM"])
    n = len(answers(out))
    assert 0 < n < 60
    assert all(r["response"]["body"]["usage"]["completion_tokens"] == 150 for r in results(out))
    assert run(*args).code == 0 and len(answers(out)) == 60


def test_two_processes_on_one_file(path: Path, tmp_path: Path) -> None:
    given, out = save(tmp_path / "in.jsonl", short(60)), tmp_path / "out"
    args = ["batch", str(given), str(path), "-o", str(out), *OPTIONS]
    script = [sys.executable, "-P", "-c", AT_THE_FIRST + RUN_MAIN, ""]
    with forks.popen([*script, *args], environment(), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "begun\n"
        refused = run(*args)
        process.kill()
    assert refused.code == 1 and "another process" in refused.told
    assert run(*args).code == 0 and len(answers(out)) == 60
