"""text.py: text that people give, as bytes of a file or a pipe and as words of a command line or a terminal.

All of it is UTF-8. A byte order mark at the beginning is dropped and CR LF becomes LF; nothing else is changed. What
cannot be read is refused with its encoding named, where that can be told, and never read with characters replaced.
"""

from __future__ import annotations

import codecs
import os
import select
import stat
import sys
from pathlib import Path

from dsv2cli import console
from dsv2cli.errors import CliError, UsageError

MARKS = (  # UTF-32's first: the little one begins like UTF-16's
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
# Which of four bytes are zero, mostly, in the Latin letters of an encoding without its mark.
ZEROS: dict[tuple[bool, ...], str] = {
    (False, True, False, True): "UTF-16LE",
    (True, False, True, False): "UTF-16BE",
    (False, True, True, True): "UTF-32LE",
    (True, True, True, False): "UTF-32BE",
}
MANY = 0.7
LOOKED_AT = 4096  # bytes, to tell an encoding
WAIT_SECONDS = 2.0  # for a pipe's first byte, after which it is told what is waited for


def decode(data: bytes, name: str) -> str:
    """Bytes called ``name`` ("`notes.txt`", "the input") as text. UsageError where they are none."""
    other = _other_encoding(data)
    if other:
        raise UsageError(f"{name} is {other}, expected UTF-8", f"convert it first: iconv -f {other} -t UTF-8")
    try:
        text = data.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        at = error.start + len(data) - len(data.removeprefix(codecs.BOM_UTF8))
        raise UsageError(
            f"{name} is not UTF-8 text: byte {at} is 0x{data[at]:02x}",
            "convert text of another encoding first: iconv -f ENCODING -t UTF-8",
        ) from error
    return text.replace("\r\n", "\n")


def _other_encoding(data: bytes) -> str:
    """UTF-16 or UTF-32, by their marks or by their zeros; "" for what may be UTF-8."""
    for mark, name in MARKS:
        if data.startswith(mark):
            return name
    head = data[: min(LOOKED_AT, len(data) // 4 * 4)]
    zeros = tuple(head[i::4].count(0) > MANY * len(head) / 4 for i in range(4))
    return ZEROS.get(zeros, "") if head else ""


def read(path: Path) -> str:
    """A text file, or a pipe that has a name. UsageError, OSError."""
    kind = kind_of(path)
    if kind in ("a device", "a socket"):
        raise UsageError(f"`{path}` is {kind}, not a text file", "a text on stdin is read where the name is -")
    return decode(path.read_bytes(), f"`{path}`")


def read_stdin(*, waits: bool) -> str:
    """All of stdin as text, without its last line end. UsageError, CliError.

    waits: in silence; else it is told, where nothing comes for a while.
    """
    try:
        if not waits and not select.select([sys.stdin], [], [], WAIT_SECONDS)[0]:
            console.note("(waiting for the end of the pipe on stdin; < /dev/null goes without it)", "dim")
        data = sys.stdin.buffer.read()
    except OSError as error:
        raise CliError(f"cannot read stdin: {error.strerror or error}", "give a file's text with < FILE") from error
    return decode(data, "the text on stdin").removesuffix("\n")


KINDS = (
    (stat.S_ISREG, "a file"),
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (lambda mode: True, "a device"),
)


def kind_of(path: Path) -> str:
    """What stands on the disk under a name, in words; "" where nothing does."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return ""
    return next(what for fits, what in KINDS if fits(mode))


def typed(words: str, name: str) -> str:
    """Words of a command line or a terminal as text. UsageError.

    Python spells bytes that its locale cannot read as surrogates; under LC_ALL=C those of UTF-8 are among them.
    """
    try:
        words.encode("utf-8")
    except UnicodeEncodeError:
        return decode(os.fsencode(words), name)
    return words
