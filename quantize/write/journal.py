"""journal.py: the work folder of a run, OUT.work, that lets a killed run go on. Owns the folder; knows no models.

Records are JSON values and named arrays under short keys ("write/layer-7"). Each is written beside its place, synced
and renamed there, so that a record is whole or absent whenever the process dies. The folder belongs to one run at a
time, and to one fingerprint: what was made from other sources, options or code is thrown away, and said so.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from quantize.base.errors import OutputError, disk_error

SUFFIX = ".work"
PART_NAME = "model.gguf.part"  # the GGUF in the making
FINGERPRINT, SOURCES, FINISHED = "fingerprint", "sources", "finished"
RESTART_HINT = "--restart throws it away and starts over"


class Sources(Protocol):
    """What a run reads: ``Checkpoint`` is one."""

    def stamps(self) -> dict[str, list[int]]:
        """Every file with what changes when it does: [bytes, time of its last change in ns]."""

    @property
    def touched(self) -> set[str]:
        """The files that weights were read from so far."""


def written_as(out: str | os.PathLike[str]) -> Path:
    """The file that writing out makes: where it is a link, what that leads to, on whose disk the room was meant."""
    return Path(os.path.realpath(out)) if os.path.islink(out) else Path(out)  # noqa: PTH114


def work_folder(out: Path) -> Path:
    """Where a run that writes out keeps its journal."""
    out = written_as(out)
    return out.with_name(out.name + SUFFIX)


def is_finished(out: Path) -> bool:
    """Whether out is whole and only its work folder was not removed yet: its run died in the last instant."""
    folder = work_folder(out)
    return out.exists() and (folder / f"{FINISHED}.json").exists() and not (folder / PART_NAME).exists()


class Journal:
    """An open work folder. A context manager: leaving it keeps the records, unless there are none or discard() ran.

    fingerprint: everything that the output depends on, name -> JSON value; the names appear in messages. sources: files
    whose change matters only once they were read. Raises OutputError: no such place, another run at work, not ours.
    """

    def __init__(self, out: Path, fingerprint: Mapping[str, Any], sources: Sources, restart: bool = False) -> None:
        self.folder = work_folder(out)
        self.part = self.folder / PART_NAME
        self.changed: list[str] = []  # why an earlier run's records were thrown away
        self._sources = sources
        self._stamps = sources.stamps()
        self._fd = _lock(out, self.folder)
        try:
            self._known: dict[str, list[int]] = {}
            self._adopt(json.loads(json.dumps(dict(fingerprint))), restart)
        except BaseException:
            os.close(self._fd)
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def n_bytes(self) -> int:
        """Bytes of everything in the folder, the unfinished GGUF included."""
        return sum(path.stat().st_blocks * 512 for path in self.folder.rglob("*") if path.is_file())

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing that a later run could go on from."""
        records = (path for path in self.folder.rglob("*.*") if path.suffix in (".json", ".npz"))
        return all(path.parent == self.folder and path.stem in (FINGERPRINT, SOURCES) for path in records)

    def put(self, key: str, value: Any) -> None:
        """Record a JSON value."""
        self._note_sources()
        self._write(key + ".json", lambda file: file.write(json.dumps(value).encode()))

    def get(self, key: str) -> Any | None:
        """The JSON value under a key; None where there is none."""
        path = self.folder / f"{key}.json"
        with _reading(path):
            return json.loads(path.read_bytes()) if path.exists() else None

    def put_arrays(self, key: str, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Record named arrays."""
        self._note_sources()
        self._write(key + ".npz", lambda file: np.savez(file, **cast(Any, arrays)))

    def get_arrays(self, key: str) -> dict[str, NDArray[Any]] | None:
        """The arrays under a key; None where there are none."""
        path = self.folder / f"{key}.npz"
        with _reading(path):
            if not path.exists():
                return None
            with np.load(path) as file:
                return {name: file[name] for name in file.files}

    def drop(self, key: str) -> None:
        """Forget a record, if there is one."""
        for suffix in (".json", ".npz"):
            (self.folder / (key + suffix)).unlink(missing_ok=True)

    def drop_all(self, stage: str) -> None:
        """Forget every record whose key begins with "stage/"."""
        shutil.rmtree(self.folder / stage, ignore_errors=True)

    def discard(self) -> None:
        """Remove the folder; nothing can be recorded after it."""
        if self._fd < 0:
            return
        # What tells whose folder it is goes last: a run may die here too.
        self._clear(keep=(FINGERPRINT, FINISHED))
        self._clear(keep=(FINISHED,))
        self._clear()
        with suppress(OSError):
            self.folder.rmdir()
        os.close(self._fd)
        self._fd = -1

    def close(self) -> None:
        """Let go of the folder; it stays where a later run could go on from it."""
        if self._fd >= 0 and self.is_empty:
            self.discard()
        elif self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _adopt(self, fingerprint: dict[str, Any], restart: bool) -> None:
        finished = (self.folder / f"{FINISHED}.json").exists()
        is_ours = finished or (self.folder / f"{FINGERPRINT}.json").exists()
        if not is_ours and any(path.suffix != ".tmp" for path in self.folder.iterdir()):
            raise OutputError(f"`{self.folder}` is not a work folder of dsv2", "move it away, or choose another -o")
        if is_ours and restart:
            self.changed = ["--restart"]
        elif is_ours:
            self._known = self.get(SOURCES) or {}
            before = self.get(FINGERPRINT)
            if before is not None:  # else it is finished, and was being removed
                self.changed = self._differences(before, fingerprint)
        if not is_ours or self.changed:
            self._clear(keep=(FINGERPRINT,))
            self._known = {}
            self._write(f"{FINGERPRINT}.json", lambda file: file.write(json.dumps(fingerprint).encode()))

    def _differences(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
        changed = []
        for name in dict.fromkeys([*before, *now]):
            old, new = before.get(name), now.get(name)
            if old != new:
                short = all(len(str(value)) <= 24 for value in (old, new))
                changed.append(f"{name} was {old}, is {new}" if short else f"{name} changed")
        return changed + [f"{name} changed" for name, stamp in self._known.items() if self._stamps.get(name) != stamp]

    def _clear(self, keep: tuple[str, ...] = ()) -> None:
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in [f"{key}.json" for key in keep]:
                path.unlink()

    def _note_sources(self) -> None:
        """Before a record: which files stand behind it and those before."""
        new = {name: self._stamps[name] for name in self._sources.touched if name not in self._known}
        if new:
            self._known |= new
            self._write(f"{SOURCES}.json", lambda file: file.write(json.dumps(self._known).encode()))

    def _write(self, name: str, write: Callable[[IO[bytes]], object]) -> None:
        path = self.folder / name
        temporary = path.with_name(path.name + ".tmp")
        try:
            path.parent.mkdir(exist_ok=True)
            with temporary.open("wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            sync_folder(path.parent)
        except OSError as error:
            with suppress(OSError):
                temporary.unlink()
            raise disk_error(self.folder, error) from error


def sync_folder(folder: Path) -> None:
    """Make the names in a folder outlive a power cut."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise OutputError(f"`{path}` cannot be read ({error})", RESTART_HINT) from error


def _lock(out: Path, folder: Path) -> int:
    """The folder, made where it is missing, held open and locked."""
    if out.is_dir():
        raise OutputError(f"`{out}` is a folder", "name the file: -o model.gguf")
    if not out.parent.is_dir():
        raise OutputError(f"`{out.parent}`: no such folder", f"mkdir -p {out.parent}")
    try:
        folder.mkdir(exist_ok=True)
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise OutputError(f"`{folder}`: {error.strerror}", "choose another place with -o") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The one who held the lock may have removed the folder between our open and our lock.
        if not folder.exists() or folder.stat().st_ino != os.fstat(fd).st_ino:
            raise BlockingIOError
    except OSError as error:
        os.close(fd)
        if isinstance(error, BlockingIOError):
            raise OutputError(f"`{out}`: another run is writing it", "wait for it, or choose another -o") from error
        raise OutputError(f"`{folder}`: {error.strerror}") from error
    return fd
