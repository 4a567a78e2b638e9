"""OUT and what stands beside it: results that are there for good, and never twice.

``OUT`` takes the answers and the file of errors the refusals, a line each, appended whole and synced every now and
then. ``OUT.batch.json`` says what they were made from: a run goes on where all of it is the same. Whoever writes holds
a lock on both. A line that a kill has cut is cut away; its request is answered again.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from cext import system
from dsv2cli.errors import CliError, UsageError

FORM = 1  # of the record
RESTART_HINT = "--restart throws the results away and starts over, -o names another file"


class LedgerError(CliError):
    """Results cannot be written, or are another run's."""


class _Result(Struct):
    """What is read again of a result."""

    id: str


@dataclass
class _Appended:
    """A file of whole lines, open to append."""

    path: Path
    fd: int
    dirty: bool = False
    n_whole: int = 0  # bytes of the lines that were read

    @classmethod
    def open(cls, path: Path) -> _Appended:
        return cls(path, os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644))

    def lock(self) -> bool:
        """False where another has the lock, or had it and has taken the file away."""
        with suppress(OSError):  # a file system without locks
            if not system.try_lock(self.fd):
                return False
        try:
            return os.path.samestat(os.fstat(self.fd), self.path.stat())
        except FileNotFoundError:
            return False

    def ids(self) -> set[str]:
        """Of the results in it; what stands behind the last whole one is none. LedgerError where a line before is."""
        found: set[str] = set()
        end = broken = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                end += len(line)
                result = _result(line) if line.endswith(b"\n") else None
                if result is None:
                    broken = broken or number
                elif broken:
                    raise LedgerError(f"`{self.path}`: line {broken} is no result", RESTART_HINT)
                else:
                    found.add(result)
                    self.n_whole = end
        return found

    def mend(self) -> None:
        """Cut away what stands behind the last whole line that was read."""
        if os.fstat(self.fd).st_size > self.n_whole:
            os.ftruncate(self.fd, self.n_whole)
            self.dirty = True

    def append(self, value: Any) -> None:
        """Add a line, or nothing of it. OSError."""
        line = msgspec.json.encode(value) + b"\n"
        before = os.fstat(self.fd).st_size
        done = 0
        try:
            while done < len(line):
                done += os.write(self.fd, line[done:])
        except OSError:
            os.ftruncate(self.fd, before)
            raise
        self.dirty = True

    def sync(self) -> None:
        if self.dirty:
            self.dirty = False
            os.fsync(self.fd)

    def close(self) -> None:
        os.close(self.fd)


def _result(line: bytes) -> str | None:
    try:
        return msgspec.json.decode(line, type=_Result).id
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """What the disk refuses, as a LedgerError with the file's name."""
    try:
        yield
    except OSError as error:
        hint = "what was answered before is kept: the same command goes on"
        raise LedgerError(f"`{path}`: {error.strerror or error}", hint) from error


def places(out: Path, errors: Path | None, read: Iterable[Path]) -> tuple[Path, Path]:
    """Where answers and errors go; errors None: beside the answers. UsageError where they cannot, or where a file is
    one that the run reads."""
    if out.is_dir() or not out.name:
        raise UsageError(f"`{out}` is a folder", "name the file: -o out.jsonl")
    if errors is None:
        errors = out.with_name(f"{out.stem}.errors{out.suffix or '.jsonl'}")
    if out.resolve() == errors.resolve():
        raise UsageError("answers and errors go to files of their own", "--errors names another")
    for place in (out, errors):
        for path in read:
            if _is_same(place, path):
                raise UsageError(f"`{place}` is a file that this run reads", "name another")
    return out, errors


def _is_same(place: Path, path: Path) -> bool:
    try:
        return place.samefile(path)
    except OSError:  # one of them is not there, or its name is none that a file can have
        return False


class Ledger:
    """A context manager; ``begin`` once, then ``put`` as results come. Not for several threads.

    origin: name -> JSON value of everything that the results depend on; the names appear in messages. LedgerError: no
    such place, another process at work, not ours, or made from something else.
    """

    def __init__(self, out: Path, errors: Path, origin: Mapping[str, Any], *, restart: bool = False) -> None:
        self.path, self.errors_path = out, errors
        self._record = out.with_name(out.name + ".batch.json")
        self._origin = msgspec.json.decode(msgspec.json.encode({"form": FORM, **origin}))
        self._restart = restart
        self._is_new = not out.exists()
        self._has_begun = False
        self._files: list[_Appended] = []
        try:
            self._open(out)
            self._made_errors = not errors.exists()
            self._open(errors)
            self._failed: set[str] = set()
            self.done: set[str] = set()  # ids of results
            self._adopt()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def n_failed(self) -> int:
        return len(self._failed)

    @property
    def n_bytes(self) -> int:
        """Of the results that are there."""
        return sum(os.fstat(file.fd).st_size for file in self._files)

    def forget_failures(self) -> None:
        """Before ``begin``: lines whose answer failed are to be answered again."""
        self.done -= self._failed
        self._failed = set()
        self._files[True].n_whole = 0

    def begin(self) -> None:
        """Let results come: what is not to be kept goes, and the record says what they are made from."""
        out, errors = self._files
        with _told(self.path):
            out.mend()  # where it restarts, nothing was read
            errors.mend()
            self._write_record()
        self._has_begun = True

    def put(self, entry: dict[str, Any], *, failed: bool) -> None:
        """Add a result, as OpenAI's files have it. LedgerError."""
        with _told(self.errors_path if failed else self.path):
            self._files[failed].append(entry)
        self.done.add(entry["id"])
        if failed:
            self._failed.add(entry["id"])

    def sync(self) -> None:
        """What was put outlives a power cut. From any thread."""
        with _told(self.path):
            for file in self._files:
                file.sync()

    def close(self) -> None:
        """Sync and let go. Files that this made and nothing came of are gone, and so is one of errors without any."""
        files, self._files = self._files, []
        try:
            for file in files:
                with _told(file.path):
                    file.sync()
            if len(files) == 2 and self._may_go(self.errors_path, self._has_begun or self._made_errors):
                self.errors_path.unlink()
            if files and self._may_go(self.path, self._is_new and not self._has_begun):
                self.path.unlink()  # before the lock goes: who has it next sees that the file is gone
        finally:
            for file in files:
                file.close()

    @staticmethod
    def _may_go(path: Path, is_ours: bool) -> bool:
        return is_ours and path.exists() and path.stat().st_size == 0

    def _open(self, path: Path) -> None:
        if path.is_dir():
            raise LedgerError(f"`{path}` is a folder", "name the file: -o out.jsonl")
        if path.exists() and not path.is_file():
            raise LedgerError(f"`{path}` is no file", "results are read again when the run goes on: name a file")
        with _told(path):
            file = _Appended.open(path)
        if not file.lock():
            file.close()  # and it is none of ours, whoever made it
            raise LedgerError(f"`{path}` is being written by another process", "wait for it, or name another file")
        self._files.append(file)

    def _adopt(self) -> None:
        out, errors = self._files
        before = self._before()
        if self._restart:
            return
        if before is None:
            for file in (out, errors):
                if file.path.stat().st_size:
                    raise LedgerError(f"`{file.path}` is there, and no batch has begun it", RESTART_HINT)
            return
        if differing := sorted(k for k in before.keys() | self._origin.keys() if before.get(k) != self._origin.get(k)):
            told = "; ".join(f"{name} was {_short(before.get(name))}, is {_short(self._origin.get(name))}"
                             for name in differing)  # fmt: skip
            raise LedgerError(f"`{self.path}` was begun with something else: {told}", RESTART_HINT)
        with _told(self.path):
            self._failed = errors.ids()
            self.done = out.ids() | self._failed

    def _before(self) -> dict[str, Any] | None:
        """The record of the run that began the files."""
        if not self._record.exists():
            return None
        with _told(self._record):
            data = self._record.read_bytes()
        try:
            return msgspec.json.decode(data, type=dict[str, Any])
        except msgspec.MsgspecError:
            if self._restart:
                return None
            raise LedgerError(f"`{self._record}` cannot be read", RESTART_HINT) from None

    def _write_record(self) -> None:
        with system.replaced(self._record, mode=0o666) as file:
            file.write(msgspec.json.format(msgspec.json.encode(self._origin), indent=2) + b"\n")


def _short(value: Any) -> str:
    text = "not given" if value is None else value if isinstance(value, str) else msgspec.json.encode(value).decode()
    return text if len(text) <= 80 else text[:77] + "..."
