"""quantize.journal: what a work folder keeps, for whom, and when it is thrown away."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cext import system
from quantize.base.errors import ArgumentError, OutputError
from quantize.write.journal import Journal, check_output, is_finished, work_folder


class Files:
    """Two shards, of which some were read."""

    def __init__(self, **stamps: int) -> None:
        self.touched: set[str] = set()
        self._stamps = {"a": 1, "b": 1, **stamps}

    def stamps(self) -> dict[str, list[int]]:
        return {name: [8, stamp] for name, stamp in self._stamps.items()}


class Names(dict[str, Any]):
    """An identity; the stage "survey" hangs on "numpy" alone."""

    def record(self) -> dict[str, Any]:
        return {"--type": "q4_k_m", "numpy": "2", **self}

    def kept(self, before: Mapping[str, Any]) -> tuple[str, ...]:
        return ("survey",) if before["numpy"] == self.record()["numpy"] else ()

    def adopted(self, before: Mapping[str, Any]) -> Names:
        return self


def journal(folder: Path, files: Files | None = None, restart: bool = False, **names: Any) -> Journal:
    return Journal(folder / "m.gguf", Names(names), files or Files(), restart)


def begun(folder: Path, *touched: str) -> None:
    """A run that left a record, a part, and the shards that it had read."""
    files = Files()
    with journal(folder, files) as first:
        files.touched |= set(touched)
        first.part.touch()
        first.put("write/step-0", {"il": 0})


def test_records_come_back(tmp_path: Path) -> None:
    arrays = {"x": np.arange(6, dtype=np.float32).reshape(2, 3), "ids": np.array([1, -1], np.int32)}
    with journal(tmp_path) as first:
        assert first.get("a/b") is None and first.get_arrays("a/b") is None and first.is_empty
        first.part.touch()
        first.put("a/b", {"f": 0.1, "n": [1, 2], "text": "ü"})
        first.put("a/b", {"f": 0.1 + 0.2, "n": [], "text": ""})
        first.put_arrays("a/b", arrays)
    with journal(tmp_path) as again:
        assert not again.is_empty
        assert again.get("a/b") == {"f": 0.1 + 0.2, "n": [], "text": ""}
        got = again.get_arrays("a/b")
        assert got is not None and got.keys() == arrays.keys()
        for name, array in arrays.items():
            assert got[name].dtype == array.dtype
            np.testing.assert_array_equal(got[name], array)
        again.drop("a/b")
        again.drop("never there")
        assert again.get("a/b") is None and again.get_arrays("a/b") is None
    assert list(tmp_path.iterdir()) == []  # nothing to go on from: nothing is left behind


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "an option": ({"--type": "q2_k"}, "--type was q4_k_m, is q2_k"),
    "a new option": ({"--bpw": 4.5}, "--bpw was None, is 4.5"),
    "something long": ({"--type": "x" * 64}, "--type changed"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_another_identity_is_refused(tmp_path: Path, case: str) -> None:
    changed, told = CHANGES[case]
    begun(tmp_path)
    with pytest.raises(OutputError, match=f"the work of another run: {told}") as error:
        journal(tmp_path, **changed)
    assert "--restart" in error.value.hint and "-o" in error.value.hint
    with journal(tmp_path) as again:
        assert again.get("write/step-0") == {"il": 0} and again.part.exists()
    with journal(tmp_path, restart=True, **changed) as second:
        assert second.is_empty and not second.part.exists()
        second.part.touch()
        second.put("x", 1)
    with journal(tmp_path, **changed) as third:
        assert third.get("x") == 1


def test_what_holds_is_kept(tmp_path: Path) -> None:
    """Of a run of another type, the survey; of one with another numpy, nothing; and neither is lost without a word."""
    with journal(tmp_path) as first:
        first.put("survey/x", 1)
        first.put("types", 1)
    with journal(tmp_path, **{"--type": "q2_k"}) as second:  # nothing is lost: nothing is asked
        assert second.kept == ("survey",) and second.get("survey/x") == 1 and second.get("types") is None
        second.put("write/x", 1)
    with pytest.raises(OutputError, match="--type was q2_k, is q4_k_m") as error:
        journal(tmp_path)
    assert "but for the survey" in error.value.hint
    with journal(tmp_path, restart=True) as third:
        assert third.get("survey/x") == 1 and third.get("write/x") is None
    with pytest.raises(OutputError, match="numpy was 2, is 3"):
        journal(tmp_path, numpy="3")
    with journal(tmp_path, restart=True) as fourth:  # nothing differs: all of it, then
        assert fourth.is_empty


@pytest.mark.parametrize(("touched", "stamps", "told"), [
    (["a"], {"b": 2}, []),  # a shard that nothing was made of yet: repaired, it changes nothing
    (["a"], {"a": 2}, ["a changed"]),
    (["a", "b"], {"b": 2}, ["b changed"]),
])  # fmt: skip
def test_a_changed_shard_matters_once_it_was_read(
    tmp_path: Path, touched: list[str], stamps: dict[str, int], told: list[str]
) -> None:
    begun(tmp_path, *touched)
    if told:
        with pytest.raises(OutputError, match="; ".join(told)):
            journal(tmp_path, Files(**stamps))
    with journal(tmp_path, Files(**stamps), restart=bool(told)) as second:
        assert second.get("write/step-0") == (None if told else {"il": 0})


def test_restart(tmp_path: Path) -> None:
    begun(tmp_path)
    with journal(tmp_path, restart=True) as second:
        assert second.get("write/step-0") is None
    assert list(tmp_path.iterdir()) == []


def test_a_stage_s_records_are_dropped(tmp_path: Path) -> None:
    begun(tmp_path)
    with journal(tmp_path) as second:
        second.put("survey/x", 1)
        second.drop_all("write")
        second.drop_all("never there")
        assert second.get("write/step-0") is None and second.get("survey/x") == 1


def test_one_run_at_a_time(tmp_path: Path) -> None:
    with journal(tmp_path) as first:
        with pytest.raises(OutputError, match="another run"):
            journal(tmp_path)
        with Journal(tmp_path / "other.gguf", Names(), Files()):
            pass
        first.discard()
        with journal(tmp_path) as second:
            second.put("x", 1)
            with pytest.raises(OutputError, match="another run"):
                journal(tmp_path)


def test_places_that_will_not_do(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="is a folder"):
        Journal(tmp_path, Names(), Files())
    with pytest.raises(OutputError, match="no such folder"):
        Journal(tmp_path / "none" / "m.gguf", Names(), Files())
    (tmp_path / "m.gguf.work").mkdir()
    (tmp_path / "m.gguf.work" / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="not a work folder"):
        journal(tmp_path)
    with pytest.raises(OutputError, match="not a work folder"):
        journal(tmp_path, restart=True)
    assert (tmp_path / "m.gguf.work" / "thesis.txt").read_text() == "mine"
    (tmp_path / "f.gguf.work").touch()
    with pytest.raises(OutputError, match=r"f\.gguf\.work"):
        Journal(tmp_path / "f.gguf", Names(), Files())


@pytest.mark.parametrize("name", ["write/step-0.json", "identity.json"])
def test_a_damaged_record_is_named(tmp_path: Path, name: str) -> None:
    begun(tmp_path)
    (work_folder(tmp_path / "m.gguf") / name).write_bytes(b"{oops")
    with pytest.raises(OutputError, match="cannot be read") as error, journal(tmp_path) as second:
        second.get("write/step-0")
    assert "--restart" in error.value.hint
    with journal(tmp_path, restart=True) as third:
        assert third.is_empty


def test_a_full_disk_leaves_the_record_that_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun(tmp_path)

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with journal(tmp_path) as second:
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OutputError, match=r"No space left on device.*GB are free"):
            second.put("write/step-0", {"il": 1})
        assert second.get("write/step-0") == {"il": 0}
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_record_s_name_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its folder is synced once the record has its name there: else a power cut could leave a later one without it."""
    synced = []
    monkeypatch.setattr(system, "sync_folder", lambda path: synced.append((path, (path / "step-0.json").exists())))
    with journal(tmp_path) as first:
        first.put("write/step-0", {"il": 0})
        assert synced[-1] == (first.folder / "write", True)


def test_a_folder_that_goes_before_its_lock_is_had_is_another_run_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who held the lock has finished and removed the folder: a lock on a file that is gone keeps nobody out."""
    lock = system.try_lock

    def late(fd: int) -> bool:
        shutil.rmtree(work_folder(tmp_path / "m.gguf"))
        return lock(fd)

    monkeypatch.setattr(system, "try_lock", late)
    with pytest.raises(OutputError, match="another run"):
        journal(tmp_path)


def test_what_is_no_file_or_is_read_is_not_written_over(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ArgumentError, match="a device or pipe"):
        check_output(tmp_path / "pipe", ())
    checkpoint, text = tmp_path / "checkpoint", tmp_path / "text.txt"
    checkpoint.mkdir()
    (checkpoint / "model.safetensors").write_bytes(b"weights")
    text.write_text("words")
    (tmp_path / "link.gguf").symlink_to(text)
    for out in (checkpoint / "model.safetensors", text, tmp_path / "link.gguf"):
        with pytest.raises(ArgumentError, match="this run reads"):
            check_output(out, (checkpoint / "model.safetensors", text))
    (checkpoint / "new.gguf").write_bytes(b"made before")
    check_output(checkpoint / "new.gguf", (checkpoint / "model.safetensors", text))


def test_finished_is_a_file_and_a_folder_without_part(tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    with journal(tmp_path) as first:
        first.part.write_bytes(b"GGUF")
        first.finish({"a": 1})
        assert not is_finished(out)
        first.part.rename(out)
    assert is_finished(out)
    with pytest.raises(OutputError, match="--type"):
        journal(tmp_path, **{"--type": "q2_k"})
    (work_folder(out) / "identity.json").unlink()  # as a run that dies while it removes its folder
    with pytest.raises(OutputError, match="--type"):
        journal(tmp_path, **{"--type": "q2_k"})
    with journal(tmp_path) as second:
        assert second.finished() == {"a": 1}
        second.discard()
    assert not is_finished(out) and [p.name for p in tmp_path.iterdir()] == ["m.gguf"]
