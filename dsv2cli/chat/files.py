"""Files named in a message: @path, or @"a path with spaces". Their text goes with the message, as text."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from dsv2cli import console, text
from dsv2cli.errors import UsageError

if TYPE_CHECKING:
    from cext.tokenizer import Tokenizer

NAMED = re.compile(r'(?<!\S)@(?:"([^"\n]+)"|(\S+))')
BEGUN = re.compile(r'(?<!\S)@("[^"\n]*|[^\s"]*)\Z')
MAX_BYTES = 16 << 20  # of a file
COUNTED_BYTES = 1 << 18  # of a file whose tokens are counted while its name is typed
MAX_SHOWN = 200  # names that may follow


def named(message: str) -> list[Path]:
    """The files that a message names and that are there, in order, each once. What names none is a word like others."""
    found = []
    for match in NAMED.finditer(message):
        path = Path(match[1] or match[2])
        for each in (path, Path(str(path).rstrip(".,;:!?)"))):
            try:
                there = each.expanduser().is_file()
            except (OSError, ValueError, RuntimeError):
                there = False
            if there:
                found.append(each.expanduser())
                break
    return list(dict.fromkeys(found))


def with_files(message: str) -> tuple[str, list[tuple[Path, str]]]:
    """The message with the text of the files that it names behind it, and these. UsageError, OSError."""
    parts = []
    for path in named(message):
        if (size := path.stat().st_size) > MAX_BYTES:
            raise UsageError(f"`{path}` has {console.format_bytes(size)}, more than any context holds")
        parts.append((path, text.read(path)))
    body = "".join(f"\n\n{path}:\n\n{content}" for path, content in parts)
    return message + body, parts


def completions(begun: str) -> Iterable[tuple[str, int, str]]:
    """What may follow a text that ends in an @ and the beginning of a path: (path, characters it replaces, size)."""
    match = BEGUN.search(begun)
    if match is None:
        return
    start = match[1].removeprefix('"')
    folder, _, name = start.rpartition("/")
    place = Path(f"{folder}/" if "/" in start else ".")
    try:
        there = sorted(place.expanduser().iterdir())
    except (OSError, ValueError, RuntimeError):
        return
    for path in [p for p in there if p.name.startswith(name) and (name or not p.name.startswith("."))][:MAX_SHOWN]:
        try:
            about = "folder" if path.is_dir() else console.format_bytes(path.stat().st_size)
        except OSError:
            continue
        whole = f"{folder}/{path.name}" if "/" in start else path.name
        whole += "/" if about == "folder" else ""
        yield f'"{whole}"' if " " in whole else whole, len(match[1]), about


def count(message: str, tokenizer: Tokenizer) -> list[tuple[str, int | None]]:
    """(name, tokens) of the files that a message names; None for what is too large to count at once, or no text."""
    return [(path.name, _count(path, tokenizer)) for path in named(message)]


def _count(path: Path, tokenizer: Tokenizer) -> int | None:
    try:
        about = path.stat()
        if about.st_size > COUNTED_BYTES:
            return None
        return _n_tokens(path, about.st_mtime_ns, about.st_size, tokenizer)
    except (OSError, UsageError):
        return None


@lru_cache(64)
def _n_tokens(path: Path, changed: int, size: int, tokenizer: Tokenizer) -> int:
    return len(tokenizer.encode(text.read(path)))
