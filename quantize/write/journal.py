"""journal.py: the work folder of a run, OUT.work, that lets a killed run go on. Owns the folder; knows no models.

Records are JSON values and named arrays under short keys ("write/layer-7"). Each is written beside its place, synced
and renamed there, so that a record is whole or absent whenever the process dies. The folder belongs to one run at a
time, and to one identity: where that differs, what differs is told, and no work is thrown away unless it is asked for.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from cext import system
from quantize.base.closing import Closing
from quantize.base.errors import ArgumentError, OtherRunError, OutputError, disk_error

SUFFIX = ".work"
HEADS_BYTES = 1 << 16  # of the names and shapes in a record of arrays
PART_NAME = "model.gguf.part"  # the GGUF in the making
LOCK_NAME = "lock"
UNFINISHED = ".tmp"
ROOM_NAME = "room"  # holds the disk that records to come will take
IDENTITY, SOURCES, FINISHED = "identity", "sources", "finished"
RESTART_HINT = "--restart throws it away and starts over, -o names another file"


class Identity(Protocol):
    """What the bytes of a run's file depend on."""

    def record(self) -> dict[str, Any]:
        """name -> JSON value; the names appear in messages."""

    def kept(self, before: Mapping[str, Any]) -> Sequence[str]:
        """The stages whose records hold all the same, where before is the record of the run that made them."""

    def adopted(self, before: Mapping[str, Any]) -> Identity:
        """This, of a folder that keeps those stages' records."""


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


def check_output(out: Path, read: Iterable[Path]) -> None:
    """Whether out may be written, and replaced where it exists: a file that is none of those that the run reads.
    ArgumentError."""
    if out.is_dir():
        raise ArgumentError(f"`{out}` is a folder", "name the file: -o model.gguf")
    if not out.exists():
        return
    if not out.is_file():
        raise ArgumentError(f"`{out}` is a device or pipe, not a file", "name the file: -o model.gguf")
    for path in read:
        if path.exists() and path.samefile(out):
            raise ArgumentError(f"`{out}` is a file that this run reads", "name another with -o")


def work_folder(out: Path) -> Path:
    """Where a run that writes out keeps its journal."""
    out = written_as(out)
    return out.with_name(out.name + SUFFIX)


def is_finished(out: Path) -> bool:
    """Whether out is whole and only its work folder was not removed yet: its run died in the last instant."""
    path = work_folder(out) / f"{FINISHED}.json"
    with _reading(path):
        marker = json.loads(path.read_bytes()) if path.exists() else None
    return marker is not None and out.exists() and marker["stamp"] == _stamp(out)


def _stamp(path: Path) -> list[int]:
    """Of a file: a rename leaves it, another content does not."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


class Journal(Closing):
    """An open work folder. A context manager: leaving it keeps the records, unless there are none or discard() ran.

    sources: files whose change matters only once they were read. restart: throw away what another run has left, but
    for the stages that hold all the same; where nothing differs, everything. Raises OutputError: no such place, another
    run at work, not ours, or with the work of a run of another identity.
    """

    def __init__(self, out: Path, identity: Identity, sources: Sources, restart: bool = False) -> None:
        self.out, self.folder = out, work_folder(out)
        self.part = self.folder / PART_NAME
        self._room = 0  # bytes that all records together are to have
        self.kept: tuple[str, ...] = ()  # stages of a run of another identity that are gone on from
        self._identity = identity
        self._sources = sources
        self._stamps = sources.stamps()
        self._known: dict[str, list[int]] = {}
        self._fd = _lock(out, self.folder)
        try:
            self._adopt(restart)
            for left in self.folder.rglob(f"*{UNFINISHED}"):  # by a run that was killed as it wrote a record
                left.unlink()
        except BaseException:
            self._release()
            raise

    @property
    def n_bytes(self) -> int:
        """Bytes of everything in the folder, the unfinished GGUF included."""
        return sum(path.stat().st_blocks * 512 for path in self.folder.rglob("*") if path.is_file())

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing that a later run could go on from."""
        records = (path for path in self.folder.rglob("*.*") if path.suffix in (".json", ".npz"))
        return all(path.parent == self.folder and path.stem in (IDENTITY, SOURCES) for path in records)

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
        with suppress(OSError):  # another has taken what a record dropped before had
            self._hold_room(sum(array.nbytes for array in arrays.values()) + HEADS_BYTES)
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
        with suppress(OSError):
            self._hold_room()

    def drop_all(self, stage: str) -> None:
        """Forget every record whose key begins with "stage/"."""
        shutil.rmtree(self.folder / stage, ignore_errors=True)

    def reserve(self, part: int, records: int) -> None:
        """Claim the disk: bytes of the part, unless it is there, and of all records, those that are there included.

        OutputError where it is full. Where the file system cannot claim, the free bytes are compared.
        """
        self._room = records
        wanted = max(0, records - self._n_recorded()) + (0 if self.part.exists() else part)
        if system.free_disk(self.folder) < wanted:
            raise disk_error(self.folder, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), wanted)
        try:
            if not self.part.exists():
                with self.part.open("xb") as file:
                    system.reserve(file.fileno(), part)
            self._hold_room()
        except OSError as error:
            self.part.unlink(missing_ok=True)
            raise disk_error(self.folder, error, wanted) from error

    def _n_recorded(self) -> int:
        """Bytes of the records."""
        records = (path for path in self.folder.rglob("*.*") if path.suffix in (".json", ".npz"))
        return sum(path.stat().st_size for path in records)

    def _hold_room(self, coming: int = 0) -> None:
        """Of the claim, hold what neither stands in records nor is about to be written."""
        if self._room == 0:
            return
        left = max(0, self._room - self._n_recorded() - coming)
        with (self.folder / ROOM_NAME).open("ab") as file:
            try:
                system.reserve(file.fileno(), left)
            except OSError as error:
                if error.errno != errno.EFBIG:  # too large for one file: records are several
                    raise
                os.ftruncate(file.fileno(), 0)

    def finish(self, report: Any) -> None:
        """Record that the part is the whole file; what is left is to rename it to its name."""
        self.put(FINISHED, {"identity": _plain(self._identity), "stamp": _stamp(self.part), "report": report})

    def finished(self) -> Any | None:
        """What finish() was told, by a run of this identity that made the file and died before its folder was gone."""
        marker = self.get(FINISHED) if is_finished(self.out) else None
        return marker["report"] if marker is not None and marker["identity"] == _plain(self._identity) else None

    def discard(self) -> None:
        """Remove the folder; nothing can be recorded after it."""
        if self._fd < 0:
            return
        # What tells whose folder it is goes last: a run may die here too.
        self._clear(keep=(f"{FINISHED}.json",))
        self._clear()
        with suppress(OSError):
            (self.folder / LOCK_NAME).unlink()
            self.folder.rmdir()
        self._release()

    def settle(self) -> None:
        """Remove all that finished() does not need: the same run is answered by it from now on, another refused."""
        self._clear(keep=tuple(f"{name}.json" for name in (IDENTITY, SOURCES, FINISHED)))

    def close(self) -> None:
        """Let go of the folder; it stays where a later run could go on from it."""
        if self._fd >= 0 and self.is_empty:
            self.discard()
        elif self._fd >= 0:
            (self.folder / ROOM_NAME).unlink(missing_ok=True)
            self._release()

    def _release(self) -> None:
        if self._fd >= 0:
            _unlock(self._fd)
            self._fd = -1

    def _adopt(self, restart: bool) -> None:
        """Go on from what an earlier run has left, or refuse to."""
        stands = (self.folder / f"{IDENTITY}.json").exists()
        before = self._before(restart)
        if before is None:
            names = {path.name for path in self.folder.iterdir() if path.suffix != UNFINISHED}
            others = names - {LOCK_NAME, ROOM_NAME}
            if others and not stands:
                raise OutputError(f"`{self.folder}` is not a work folder of dsv2", "move it away, or choose another -o")
            self._begin(())
            return
        self._known = self.get(SOURCES) or {}
        sources = [f"{name} changed" for name, stamp in self._known.items() if self._stamps.get(name) != stamp]
        differences = [*_differences(before, _plain(self._identity)), *sources]
        if differences:
            kept = () if sources else tuple(self._identity.kept(before))
            self._refuse_to_lose(kept, differences, restart)
            self._identity = self._identity.adopted(before) if kept else self._identity
            self._begin(kept)
        elif restart or not (stands or is_finished(self.out)):
            self._begin(())

    def _before(self, restart: bool) -> Any | None:
        """The identity of the run whose records these are; None for a new folder, or one to be thrown away."""
        try:
            before = self.get(IDENTITY)
            if before is None and (marker := self.get(FINISHED)) is not None:  # its run died as it removed the rest
                return marker["identity"]
        except OutputError:
            if restart:
                return None
            raise
        return before

    def _refuse_to_lose(self, kept: Sequence[str], differences: Sequence[str], restart: bool) -> None:
        lost = [path.name for path in self.folder.iterdir() if path.is_dir() and path.name not in kept]
        if not restart and (lost or is_finished(self.out)):
            hint = RESTART_HINT.replace("it away", f"it away but for the {kept[0]}") if kept else RESTART_HINT
            raise OtherRunError(f"`{self.folder}` holds the work of another run: {'; '.join(differences)}", hint)

    def _begin(self, kept: Sequence[str]) -> None:
        """With those stages' records alone."""
        self.kept = tuple(stage for stage in kept if (self.folder / stage).exists())
        # Until the new identity stands, the old one tells whose records these are.
        self._clear(keep=(*self.kept, f"{IDENTITY}.json", f"{SOURCES}.json"))
        self._write(f"{IDENTITY}.json", lambda file: file.write(json.dumps(self._identity.record()).encode()))
        if not self.kept:
            self._clear(keep=(f"{IDENTITY}.json",))
            self._known = {}

    def _clear(self, keep: Sequence[str] = ()) -> None:
        for path in self.folder.iterdir():
            if path.name in (*keep, LOCK_NAME):
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

    def _note_sources(self) -> None:
        """Before a record: which files stand behind it and those before."""
        new = {name: self._stamps[name] for name in self._sources.touched if name not in self._known}
        if new:
            self._known |= new
            self._write(f"{SOURCES}.json", lambda file: file.write(json.dumps(self._known).encode()))

    def _write(self, name: str, write: Callable[[IO[bytes]], object]) -> None:
        path = self.folder / name
        try:
            system.make_folder(path.parent)
            with system.replaced(path, mode=0o666, prefix=f"{path.name}.", suffix=UNFINISHED) as file:
                write(file)
        except OSError as error:
            raise disk_error(self.folder, error) from error


def _plain(identity: Identity) -> Any:
    """As it comes back from JSON."""
    return json.loads(json.dumps(identity.record()))


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    changed = []
    for name in dict.fromkeys([*before, *now]):
        old, new = before.get(name), now.get(name)
        if old != new:
            short = all(len(str(value)) <= 24 for value in (old, new))
            changed.append(f"{name} was {old}, is {new}" if short else f"{name} changed")
    return changed


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise OutputError(f"`{path}` cannot be read ({error})", RESTART_HINT) from error


_LOCKED: set[tuple[int, int]] = set()  # by this process, where a file system's locks do not tell its runs apart
_LOCKING = threading.Lock()


def _lock(out: Path, folder: Path) -> int:
    """The lock of the folder, which is made where it is missing: an open file."""
    check_output(out, ())
    if not out.parent.is_dir():
        raise OutputError(f"`{out.parent}`: no such folder", f"mkdir -p {out.parent}")
    path = folder / LOCK_NAME
    try:
        system.make_folder(folder)
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise OutputError(f"`{folder}`: {error.strerror}", "choose another place with -o") from error
    try:
        if not _claim(fd, path):
            raise OtherRunError(f"`{out}`: another run is writing it", "wait for it, or choose another -o")
    except BaseException as error:
        os.close(fd)
        if isinstance(error, OSError):
            raise OutputError(f"`{folder}`: {error.strerror}", "choose another place with -o") from error
        raise
    return fd


def _claim(fd: int, path: Path) -> bool:
    stat = os.fstat(fd)
    with _LOCKING:
        if (stat.st_dev, stat.st_ino) in _LOCKED or not system.try_lock(fd):
            return False
        # The one who held the lock may have removed the folder between our open and our lock.
        if not path.exists() or path.stat().st_ino != stat.st_ino:
            return False
        _LOCKED.add((stat.st_dev, stat.st_ino))
        return True


def _unlock(fd: int) -> None:
    stat = os.fstat(fd)
    with _LOCKING:
        _LOCKED.discard((stat.st_dev, stat.st_ino))
        os.close(fd)
