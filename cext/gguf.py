"""GGUF files: metadata and tensors of a file that is mapped read-only and checked before use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from os import PathLike, fspath
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cext import _engine
from cext.errors import UnsupportedError

_DECODED = {entry["name"] for entry in _engine.formats()}


class TensorInfo(NamedTuple):
    """A tensor's record in the file."""

    name: str
    type: int  # the GGUF (ggml) type id
    type_name: str  # "q4_k"; "type 99" where nothing is known of it
    shape: tuple[int, ...]  # ggml's order: ne0 (the row) first
    offset: int  # bytes from the start of its file
    nbytes: int
    part: int = 0  # which file of a split model, from 0


class Metadata(Mapping[str, Any]):
    """Metadata by key, decoded when asked for: a vocabulary of 100,000 strings costs nothing until then."""

    def __init__(self, handle: _engine.Handle) -> None:
        self._handle = handle
        self._index = {key: i for i, key in enumerate(_engine.gguf_keys(handle))}

    def __getitem__(self, key: str) -> Any:
        return _engine.gguf_value(self._handle, self._index[key])

    def __iter__(self) -> Iterator[str]:
        return iter(self._index)

    def __len__(self) -> int:
        return len(self._index)


class Gguf:
    """A GGUF file, or a model split into several, opened by its first part. All in it is checked before use.

    Raises FileError (an OSError), also when the file is written to or cut short while it is open, and FormatError.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = fspath(path)
        self._handle = _engine.gguf_open(path)
        self.nbytes = _engine.gguf_size(self._handle)  # of the file, or of all parts of a split model
        self.metadata = Metadata(self._handle)
        self.tensors = [
            TensorInfo(name, kind, format_name or f"type {kind}", shape, offset, nbytes, part)
            for name, kind, format_name, shape, offset, nbytes, part in _engine.gguf_tensors(self._handle)
        ]

    @cached_property
    def _index(self) -> dict[str, int]:
        return {tensor.name: i for i, tensor in enumerate(self.tensors)}

    def read(self, name: str) -> NDArray[np.float32]:
        """A tensor decoded to float32, in numpy's order (ggml's shape reversed). KeyError, UnsupportedError."""
        i = self._index[name]
        if self.tensors[i].type_name not in _DECODED:  # before memory for a shape that no bytes stand for
            raise UnsupportedError(
                f"`{self.path}`: tensor `{name}` is {self.tensors[i].type_name}, which this build cannot decode"
            )
        out = np.empty(self.tensors[i].shape[::-1], np.float32)
        _engine.gguf_decode(self._handle, i, out)
        return out

    def raw(self, name: str) -> NDArray[np.uint8]:
        """A tensor's bytes as they are in the file. KeyError."""
        return np.frombuffer(_engine.gguf_bytes(self._handle, self._index[name]), np.uint8)

    def close(self) -> None:
        """Unmap the file, after the reads that are under way; what was read stays."""
        _engine.gguf_close(self._handle)

    def __enter__(self) -> Gguf:
        _engine.gguf_size(self._handle)  # ArgumentError where it is closed
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
