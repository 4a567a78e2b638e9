"""traced.py: strings that know where each of their characters came from, through all that a template does with them.

A chat template must see the real text of a chat, and what it writes must be told apart from what it was given. So its
own literals and everything that it is given are ``Traced``: equal to the plain string in every way, with a number for
each character. What this class cannot follow gives an ordinary string, whose characters count as of unknown origin:
a mark can be lost, never gained.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Iterator
from typing import Any, SupportsIndex

UNKNOWN, TEMPLATE, FIRST_SOURCE = 0, 1, 2  # origins; from FIRST_SOURCE on, each character given has one of its own
MAX_LENGTH = 1 << 25  # characters a template may write
CONVERSION = re.compile(r"%(?:\((?P<key>[^()]*)\))?(?P<how>[#0\- +]*[0-9]*(?:\.[0-9]*)?)(?P<kind>[A-Za-z%])")


class TooLong(ValueError):
    """A template makes more text than any model reads."""


class Traced(str):
    """A string with the origin of each of its characters."""

    __slots__ = ("_origins",)
    _origins: array[int]

    def __new__(cls, text: str, origins: array[int] | None = None) -> Traced:
        """``text`` of ``origins`` (one a character); of unknown origin without them."""
        self = super().__new__(cls, text)
        self._origins = array("I", bytes(4 * len(text))) if origins is None else origins
        return self

    def __str__(self) -> str:
        return self

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, at: SupportsIndex | slice) -> str:
        part = self._origins[at] if isinstance(at, slice) else array("I", [self._origins[at]])
        return Traced(super().__getitem__(at), part)

    def __add__(self, other: str) -> str:
        return joined((self, other)) if isinstance(other, str) else NotImplemented

    def __radd__(self, other: str) -> str:
        return joined((other, self)) if isinstance(other, str) else NotImplemented

    def __mul__(self, n: SupportsIndex) -> str:
        if len(self) * n.__index__() > MAX_LENGTH:
            raise TooLong(f"a text of {len(self) * n.__index__()} characters")
        return Traced(super().__mul__(n), self._origins * n.__index__())

    __rmul__ = __mul__

    def __mod__(self, values: Any) -> str:
        plain = str.__mod__(self, values)
        if "*" in self:  # a width among the values
            return plain
        given = iter(values if isinstance(values, tuple) else (values,))
        pieces: list[str] = []
        at = 0
        for match in CONVERSION.finditer(self):
            pieces.append(self[at : match.start()])
            at = match.end()
            if match["kind"] == "%":
                pieces.append(self[at - 1 : at])
                continue
            value = values[match["key"]] if match["key"] is not None else next(given)
            as_it_is = isinstance(value, str) and match["kind"] == "s" and not match["how"]
            pieces.append(value if as_it_is else f"%{match['how']}{match['kind']}" % (value,))
        return checked(plain, [*pieces, self[at:]])

    def join(self, parts: Iterable[str]) -> str:
        pieces: list[str] = []
        for part in parts:
            if not isinstance(part, str):
                raise TypeError(f"sequence item {len(pieces) // 2}: expected str instance, {type(part).__name__} found")
            pieces += (self, part)
        return joined(pieces[1:])

    def lstrip(self, chars: str | None = None) -> str:
        return self[len(self) - len(super().lstrip(chars)) :]

    def rstrip(self, chars: str | None = None) -> str:
        return self[: len(super().rstrip(chars))]

    def strip(self, chars: str | None = None) -> str:
        return self.lstrip(chars).rstrip(chars)

    def removeprefix(self, prefix: str) -> str:
        return self[len(prefix) :] if self.startswith(prefix) else self

    def removesuffix(self, suffix: str) -> str:
        return self[: len(self) - len(suffix)] if suffix and self.endswith(suffix) else self

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._located(super().split(sep, maxsplit), sep)

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._located(super().rsplit(sep, maxsplit), sep)

    def splitlines(self, keepends: bool = False) -> list[str]:
        parts: list[str] = []
        at = 0
        for line, whole in zip(super().splitlines(keepends), super().splitlines(True), strict=True):
            parts.append(self[at : at + len(line)])
            at += len(whole)
        return parts

    def partition(self, sep: str) -> tuple[str, str, str]:
        return self._parted(super().partition(sep))

    def rpartition(self, sep: str) -> tuple[str, str, str]:
        return self._parted(super().rpartition(sep))

    def replace(self, old: str, new: str, count: SupportsIndex = -1) -> str:
        plain = super().replace(old, new, count)
        return checked(plain, _between(self.split(old, count), new)) if old else plain

    # A changed case keeps its places, wherever no character becomes two.

    def upper(self) -> str:
        return self._as_long(super().upper())

    def lower(self) -> str:
        return self._as_long(super().lower())

    def title(self) -> str:
        return self._as_long(super().title())

    def capitalize(self) -> str:
        return self._as_long(super().capitalize())

    def _as_long(self, text: str) -> str:
        return Traced(text, self._origins) if len(text) == len(self) else text

    def _located(self, parts: list[str], sep: str | None) -> list[str]:
        """The parts of a split, where they stand: one separator apart, or at the next word."""
        found: list[str] = []
        at = 0
        for part in parts:
            at = self.find(part, at) if sep is None else at
            found.append(self[at : at + len(part)])
            at += len(part) + len(sep or "")
        return found

    def _parted(self, parts: tuple[str, str, str]) -> tuple[str, str, str]:
        a, b = len(parts[0]), len(parts[0]) + len(parts[1])
        return self[:a], self[a:b], self[b:]


def origins_of(text: str) -> array[int]:
    """The origin of each character; UNKNOWN for those of an ordinary string."""
    return text._origins if isinstance(text, Traced) else array("I", bytes(4 * len(text)))


def written(text: str) -> Traced:
    """A literal of the template."""
    return Traced(text, array("I", [TEMPLATE]) * len(text))


def joined(pieces: Iterable[object]) -> Traced:
    """All pieces as one string, of the origins that they have. TooLong past MAX_LENGTH."""
    texts: list[str] = []
    origins = array("I")
    for piece in pieces:
        text = piece if isinstance(piece, str) else str(piece)
        texts.append(text)
        origins.extend(origins_of(text))
        if len(origins) > MAX_LENGTH:
            raise TooLong(f"a text of more than {MAX_LENGTH} characters")
    return Traced("".join(texts), origins)


def checked(plain: str, pieces: Iterable[str]) -> str:
    """``plain``, traced where the pieces spell it: what was followed wrongly counts as not followed."""
    made = joined(pieces)
    return made if made == plain else plain


def _between(parts: list[str], separator: str) -> list[str]:
    return [piece for part in parts for piece in (separator, part)][1:]
