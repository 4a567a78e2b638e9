"""rereading.py: a model's file read again, where the system's cache holds it in small pages.

Programs that write a file, or read it otherwise than the engine maps it, leave it in the cache in small pages, and to
find a byte in one takes a walk through tables, which are too many for a processor's caches: weights come slower until
the file leaves memory. Dropped there and read as the engine maps it, it lies in huge pages where kernel and file system
have them.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from dsv2cli import console

LEAST_BYTES = 512 << 20  # of a model: the tables of a smaller one are small too
LOOKED_INTO = 64  # pages of a file, which takes milliseconds
LEAST_HELD = 0.1  # of a file: what is not in memory is read into huge pages anyway
MOST_SECONDS = 20.0  # that reading may take: decoding saves as much in a minute or two


def renew(path: Path, room: int | None) -> None:
    """Read files of a model again that lie in small pages, where that is worth it and works, and say so. room: bytes of
    memory that all of them may take; None where the system does not tell."""
    from cext import EngineError

    with suppress(EngineError, OSError):  # who opens it tells
        _renew(path, room)


def _renew(path: Path, room: int | None) -> None:
    from cext import Gguf, system

    with Gguf(path) as gguf:
        nbytes, paths = gguf.nbytes, [Path(part) for part in gguf.paths]
    if nbytes < LEAST_BYTES or (room is not None and nbytes > room):
        return
    slow = [part for part in paths if is_slow(part)]
    if not slow:
        return
    size = sum(part.stat().st_size for part in slow)
    rate = system.reread_rate(max(slow, key=lambda part: part.stat().st_size))
    if rate is None or size / rate > MOST_SECONDS:
        return
    what = console.format_bytes(size)
    console.note(f"(reading `{path}` again, {what}: it lies in small pages, which makes it slow to decode)", "dim")
    for part in slow:
        system.read_again(part)


def is_slow(path: Path) -> bool:
    """Whether a file is in memory, and most of it in small pages."""
    from cext import system

    held, huge = system.cached_pages(path, LOOKED_INTO) or (0.0, 0.0)
    return held >= LEAST_HELD and huge < held / 2
