"""quantize.disk: the bytes of the file and of the work folder are known, told and claimed before a weight is read."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from typing import Any

import pytest
from support import checkpoints as make

import quantize
from cext import system
from quantize import Options, OutputError, Progress, pipeline
from quantize.disk import Room
from quantize.source.stored import Files

SMALL = {**make.V2, "num_hidden_layers": 2, "n_routed_experts": 4}
RUNS: dict[str, dict[str, Any]] = {
    "the default": {"type": "q4_k_m"},
    "one stream": {"type": "q4_k_m", "sequential": False, "evaluate": False},
    "a plain mix": {"type": "q4_k_m", "plain_mix": True},
    "floats": {"type": "f16"},
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    make.write_checkpoint(tmp_path / "hf", SMALL)
    make.write_text(tmp_path / "text.txt", 2600)
    return tmp_path / "hf"


def asked(source: Path, **options: Any) -> Options:
    return Options(**options, threads=1, calibration=(source.parent / "text.txt",))


def record_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.*") if path.suffix in (".npz", ".json", ".tmp"))


@pytest.mark.parametrize("run", RUNS)
def test_no_run_takes_more_than_it_claimed(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, run: str
) -> None:
    """Looked at whenever a record is synced, with the one in the making; and not ten times less either."""
    out, rooms, taken = tmp_path / "m.gguf", [], [0]
    sync = os.fsync

    def looking(fd: int) -> None:
        taken.append(record_bytes(quantize.work_folder(out)))
        sync(fd)

    def note(*args: Any) -> Room:
        rooms.append(room(*args))
        return rooms[-1]

    room = pipeline.room
    monkeypatch.setattr(pipeline, "room", note)
    monkeypatch.setattr("quantize.disk.SMALL_RECORDS", 1 << 15)
    monkeypatch.setattr(os, "fsync", looking)
    said: list[str] = []
    quantize.quantize(source, out, asked(source, **RUNS[run]), say=said.append)
    assert max(taken) <= rooms[0].work <= 10 * max(taken) + (1 << 18)
    assert 0.9 * rooms[0].file - 4096 <= out.stat().st_size <= rooms[0].file
    figures = re.fullmatch(r"the file takes up to ([\d.]+) GB, its work folder up to ([\d.]+) GB more", said[0])
    assert figures is not None


@pytest.mark.parametrize("call", ["statvfs", "posix_fallocate"])
def test_a_disk_that_is_too_small_is_told_before_a_weight_is_read(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    reads: list[str] = []
    monkeypatch.setattr(Files, "read_into", lambda self, tensor, out: reads.append(tensor.name))

    def full(fd: int, offset: int, nbytes: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if call == "statvfs":
        monkeypatch.setattr(system, "free_disk", lambda folder: 1000)
    else:
        monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(OutputError, match=r"No space left.*GB are free there: the file takes up to .* GB more"):
        quantize.quantize(source, tmp_path / "m.gguf", asked(source, type="q4_k_m"))
    assert not reads and not quantize.work_folder(tmp_path / "m.gguf").exists()


def test_the_claim_is_held_and_given_back(tmp_path: Path, source: Path) -> None:
    """While a run works, what is free beside it is not what it will need; a run that stopped holds no room."""
    out, held = tmp_path / "m.gguf", []
    folder = quantize.work_folder(out)

    class Stop(BaseException):
        pass

    def progress(step: Progress) -> None:
        if (folder / "room").exists():
            held.append((folder / "room").stat().st_size + record_bytes(folder))
        if step.stage == "encode" and step.layer == 1:
            raise Stop

    with pytest.raises(Stop):
        quantize.quantize(source, out, asked(source, type="q4_k_m", evaluate=False), progress)
    assert len(held) > 10 and max(held) - min(held) < 1 << 18
    assert folder.is_dir() and not (folder / "room").exists()
    quantize.quantize(source, out, asked(source, type="q4_k_m", evaluate=False))
    assert out.exists() and not folder.exists()
