"""history.py: what was typed, remembered across conversations: a file of lines, of this user alone.

It is added to as lines are typed, so that nothing ends a conversation without them, and under a lock, so that several
conversations at once keep each other's. Where it cannot be read or written, there is no history and no complaint.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from cext import system
from dsv2cli import state

LINES = 1000  # that are read; the file is cut to them once it holds twice as many
PATIENCE = 1.0  # seconds that another's lock is waited for
PAUSE = 0.01


def path() -> Path | None:
    """Where lines are remembered; None where this user has no home."""
    folder = state.folder()
    return folder / "history" if folder else None


def read() -> list[str]:
    """The latest lines, oldest first. Bytes that are no text stand there as surrogates."""
    with contextlib.suppress(OSError), _opened() as (file, is_alone):
        lines = file.read().split(b"\n")[:-1]
        if is_alone and len(lines) > 2 * LINES and (place := path()):
            with contextlib.suppress(OSError), system.replaced(place.resolve()) as shorter:
                shorter.write(b"".join(line + b"\n" for line in lines[-LINES:]))
        return [os.fsdecode(line) for line in lines[-LINES:]]
    return []


def add(text: str) -> None:
    """Remember a text that was typed."""
    with contextlib.suppress(OSError, UnicodeError), _opened() as (file, _):
        file.write(os.fsencode(text) + b"\n")


@contextlib.contextmanager
def _opened() -> Iterator[tuple[BinaryIO, bool]]:
    """The file, made where it is missing, to read and to append to, and whether it is this process's alone: not
    where another's lock outlasts PATIENCE, or nothing can be locked. OSError."""
    place = path()
    if place is None:
        raise FileNotFoundError
    place.parent.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + PATIENCE
    while True:
        with os.fdopen(os.open(place, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600), "r+b", buffering=0) as file:
            is_alone = False
            with contextlib.suppress(OSError):  # a file system without locks
                while not (is_alone := system.try_lock(file.fileno())) and time.monotonic() < end:
                    time.sleep(PAUSE)
            if is_alone and not _is_at(file, place):
                continue  # another has put a shorter one in its place meanwhile
            yield file, is_alone
            return


def _is_at(file: BinaryIO, place: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), place.stat())
    except FileNotFoundError:
        return False
