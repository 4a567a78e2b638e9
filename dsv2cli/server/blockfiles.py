"""A folder of named blocks that never takes more than its bytes; the least recently used go first.

A file is whole under its name, or not there: it is written under another and renamed, and a digest tells what it must
hold. Several processes may use a folder: whoever writes or makes room holds its lock, and a name stands for the same
content whoever writes it. Nothing but files of these names is ever touched.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from hashlib import blake2b
from pathlib import Path

from cext import system

NAME = re.compile(r"[0-9]{6}-[0-9a-f]{64}\.kv")
UNFINISHED = ".unfinished-"
LOCK = ".lock"
MAGIC = b"DSV2BLK1"
DIGEST_BYTES = 32
PAGE = 4096  # what a file takes is a multiple of it
LOCK_SECONDS = 30.0


def name_of(depth: int, key: bytes) -> str:
    """depth: how many blocks come before it, at most 999,999; key: 32 bytes that all of the content depends on."""
    return f"{depth:06d}-{key.hex()}.kv"


def file_bytes(n_content: int) -> int:
    """Of disk, that a block takes."""
    return _pages(len(MAGIC) + DIGEST_BYTES + n_content)


def _pages(n: int) -> int:
    return -(-n // PAGE) * PAGE


def _seal(name: str, content: bytes | bytearray | memoryview) -> bytes:
    whole = blake2b(name.encode(), digest_size=DIGEST_BYTES)
    whole.update(content)
    return whole.digest()


class Folder:
    """budget: bytes of all its blocks. Made where it is missing, readable by its owner alone. OSError."""

    def __init__(self, path: Path, budget: int) -> None:
        self.path, self.budget = path, budget
        self.nbytes = 0  # of all blocks, when the lock was held last
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self._alone(), os.scandir(path) as entries:
            for entry in entries:
                if entry.name.startswith(UNFINISHED):  # nobody else writes now: its writer has been killed
                    _remove(path / entry.name)
        self.trim()

    def trim(self) -> None:
        """Let go of the oldest until all fit: the budget may be another than last time."""
        with self._alone():
            files = self._listed()
            self._make_room(files, 0, self._oldest(files, ()))

    def has(self, name: str) -> bool:
        return (self.path / name).exists()

    def read(self, name: str) -> memoryview | None:
        """The content; None where there is none, or none that is whole: a damaged file is removed."""
        path = self.path / name
        try:
            data = memoryview(path.read_bytes())
        except OSError:
            return None
        start = len(MAGIC) + DIGEST_BYTES
        if data[: len(MAGIC)] == MAGIC and data[len(MAGIC) : start] == _seal(name, data[start:]):
            return data[start:]
        self.remove(name)
        return None

    def remove(self, name: str) -> bool:
        """Whether it is gone."""
        return _remove(self.path / name)

    def touch(self, names: Iterable[str]) -> None:
        """They have been used now, all at once."""
        now = time.time_ns()
        for name in names:
            with contextlib.suppress(OSError):  # let go of meanwhile
                os.utime(self.path / name, ns=(now, now))

    def write(self, names: list[str], content: Callable[[int], bytes | bytearray]) -> int:
        """Blocks that follow one another, of which those that are missing are written, the first first, as far as they
        fit; content(i) is that of names[i]. How many of them are in the folder now. OSError."""
        n = 0
        with self._alone():
            files = self._listed()
            oldest = self._oldest(files, names)
            for i, name in enumerate(names):
                if name not in files:
                    data = content(i)
                    taken = file_bytes(len(data))
                    if not self._make_room(files, taken, oldest):
                        break
                    self._write(name, data)
                    self.nbytes += taken
                n += 1
            self.touch(names[:n])
        if n:
            system.sync_folder(self.path)
        return n

    def _write(self, name: str, content: bytes | bytearray) -> None:
        with system.replaced(self.path / name, prefix=UNFINISHED, lasting=False) as file:
            file.write(MAGIC)
            file.write(_seal(name, content))
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # the names of all of them last by one call, after the last

    def _make_room(self, files: dict[str, tuple[int, int]], wanted: int, oldest: Iterator[str]) -> bool:
        """Remove what ``oldest`` names until so many bytes fit; False where they do not."""
        while self.nbytes + wanted > self.budget:
            name = next(oldest, None)
            if name is None:
                return False
            if self.remove(name):
                self.nbytes -= files[name][1]
        return True

    def _oldest(self, files: dict[str, tuple[int, int]], spared: Iterable[str]) -> Iterator[str]:
        """Of those that were used at the same time the deepest first: nothing is found past a gap."""
        yield from sorted(files.keys() - frozenset(spared), key=lambda name: (files[name][0], -int(name[:6])))

    def _listed(self) -> dict[str, tuple[int, int]]:
        """name -> (when it was used last, ns; bytes of disk) of every block, and their sum anew."""
        found: dict[str, tuple[int, int]] = {}
        with os.scandir(self.path) as entries:
            for entry in entries:
                if NAME.fullmatch(entry.name):
                    with contextlib.suppress(OSError):
                        stat = entry.stat(follow_symlinks=False)
                        found[entry.name] = (stat.st_mtime_ns, _pages(stat.st_size))
        self.nbytes = sum(taken for _, taken in found.values())
        return found

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """While nobody else writes here, as far as the file system knows locks. TimeoutError."""
        fd = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            deadline = time.monotonic() + LOCK_SECONDS
            with contextlib.suppress(_NoLocksError):
                while not _locked(fd):
                    if time.monotonic() > deadline:
                        raise TimeoutError(f"`{self.path}` has been locked for {LOCK_SECONDS:g} s")
                    time.sleep(0.02)
            yield
        finally:
            os.close(fd)


class _NoLocksError(Exception):
    pass


def _locked(fd: int) -> bool:
    try:
        return system.try_lock(fd)
    except OSError as error:
        raise _NoLocksError from error


def _remove(path: Path) -> bool:
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return False
    return True
