"""gguf_header.py: the beginning of a GGUF that is not here: its architecture, and the type of each of its tensors.

The engine reads files; this reads as many bytes as have come, and asks for more. It believes no count.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

MAX_BYTES = 64 << 20  # of a header: vocabularies of 256,000 tokens take 15 MB
MAX_TENSORS = 1 << 20
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


class IncompleteError(Exception):
    """More bytes are needed."""


class HeaderError(ValueError):
    """These are not the first bytes of a GGUF."""


@dataclass(frozen=True)
class Header:
    """What the metadata's plain values are, by key (lists are left out), and each tensor's type id, by name. nbytes: of
    all this, the tensors' records included."""

    values: dict[str, object]
    tensors: dict[str, int]
    nbytes: int


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data, self.at = data, 0

    def take(self, n: int) -> bytes:
        if n > MAX_BYTES:
            raise HeaderError(f"a string of {n} bytes")
        if len(self._data) - self.at < n:
            raise IncompleteError
        self.at += n
        return self._data[self.at - n : self.at]

    def number(self, kind: str) -> int:
        return int(struct.unpack(f"<{kind}", self.take(struct.calcsize(f"<{kind}")))[0])

    def string(self) -> str:
        return self.take(self.number("Q")).decode("utf-8", "replace")

    def value(self, kind: int) -> object:
        if kind == _STRING:
            return self.string()
        if kind in _SCALARS:
            form = f"<{_SCALARS[kind]}"
            return struct.unpack(form, self.take(struct.calcsize(form)))[0]
        if kind != _ARRAY:
            raise HeaderError(f"a value of the unknown kind {kind}")
        item, n = self.number("I"), self.number("Q")
        if item in _SCALARS:
            self.take(n * struct.calcsize(f"<{_SCALARS[item]}"))
        elif item == _STRING:
            for _ in range(n):
                self.take(self.number("Q"))
        else:
            raise HeaderError(f"a list of the kind {item}")
        return None


def parse(data: bytes) -> Header:
    """Read a header from the first bytes of a file. IncompleteError: give more; HeaderError: it is none."""
    if data[:4] != b"GGUF"[: len(data)]:
        raise HeaderError(f"it begins with {data[:4]!r}")
    reader = _Reader(data)
    reader.take(4)
    version = reader.number("I")
    if version not in (2, 3):
        raise HeaderError(f"version {version}")
    n_tensors, n_keys = reader.number("Q"), reader.number("Q")
    if n_tensors > MAX_TENSORS or n_keys > MAX_TENSORS:
        raise HeaderError(f"{n_tensors} tensors and {n_keys} keys")
    values: dict[str, object] = {}
    for _ in range(n_keys):
        key = reader.string()
        if (value := reader.value(reader.number("I"))) is not None:
            values[key] = value
    tensors: dict[str, int] = {}
    for _ in range(n_tensors):
        name = reader.string()
        n_dims = reader.number("I")
        if n_dims > 8:
            raise HeaderError(f"tensor `{name}` of {n_dims} dimensions")
        reader.take(8 * n_dims)
        tensors[name] = reader.number("I")
        reader.take(8)
    return Header(values, tensors, reader.at)
