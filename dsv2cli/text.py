"""text.py: text that people give, as bytes of a file or a pipe and as words of a command line or a terminal.

All of it is UTF-8. A byte order mark at the beginning is dropped and CR LF becomes LF; nothing else is changed. What
cannot be read is refused with its encoding named, where that can be told, and never read with characters replaced.
"""

from __future__ import annotations

import codecs
import os
from pathlib import Path

from dsv2cli.errors import UsageError

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
    """A text file. UsageError, OSError."""
    return decode(path.read_bytes(), f"`{path}`")


def typed(words: str, name: str) -> str:
    """Words of a command line or a terminal as text. UsageError.

    Python spells bytes that its locale cannot read as surrogates; under LC_ALL=C those of UTF-8 are among them.
    """
    try:
        words.encode("utf-8")
    except UnicodeEncodeError:
        return decode(os.fsencode(words), name)
    return words
