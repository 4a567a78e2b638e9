"""writer.py: a GGUF written in any order and seen whole or not at all.

The layout follows from names, shapes and types before any weight is read: the header is written and the disk reserved
first, then every tensor goes to its own offset of an unfinished file, which a later run may go on with; the last act is
a rename. Owns the file format's byte layout; knows nothing of models.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGUF_VERSION, GGUFValueType
from gguf.constants import GGMLQuantizationType as Type
from numpy.typing import NDArray

from cext import system
from quantize.base.closing import Closing
from quantize.base.errors import OutputError, disk_error
from quantize.write.journal import RESTART_HINT

# Python's and numpy's types -> GGUF's. A list of int is int32 (token types are), a single int uint32 (counts are).
_SCALARS = {bool: (GGUFValueType.BOOL, "<?"), int: (GGUFValueType.UINT32, "<I"), float: (GGUFValueType.FLOAT32, "<f")}
_ARRAYS = {"int32": GGUFValueType.INT32, "uint32": GGUFValueType.UINT32, "float32": GGUFValueType.FLOAT32}
MAX_NAME_BYTES = 63  # ggml's own limit on tensor names


@dataclass(frozen=True)
class Slot:
    """One tensor's place in the file."""

    name: str
    shape: tuple[int, ...]  # numpy's order
    type: Type
    offset: int  # bytes from the start of the file
    nbytes: int


def _string(text: str) -> bytes:
    """GGUF's strings are UTF-8: a file's name in other bytes, or half of a surrogate pair, stands there as U+FFFD."""
    data = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def _value(value: object) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", GGUFValueType.STRING) + _string(value)
    if isinstance(value, np.ndarray):
        kind = _ARRAYS[value.dtype.name]
        head = struct.pack("<IIQ", GGUFValueType.ARRAY, kind, value.size)
        return head + value.astype(value.dtype.newbyteorder("<")).tobytes()
    if isinstance(value, list):
        if value and isinstance(value[0], str):
            head = struct.pack("<IIQ", GGUFValueType.ARRAY, GGUFValueType.STRING, len(value))
            return head + b"".join(_string(item) for item in value)
        return _value(np.array(value, np.int32))
    kind, layout = _SCALARS[type(value)]
    return struct.pack("<I", kind) + struct.pack(layout, value)


def _header(
    metadata: Mapping[str, object], tensors: Sequence[tuple[str, tuple[int, ...], Type]]
) -> tuple[bytes, list[int]]:
    """The bytes before the tensor data, padded to its alignment, and each tensor's offset from the end of them."""
    parts = [b"GGUF", struct.pack("<IQQ", GGUF_VERSION, len(tensors), len(metadata))]
    for key, value in metadata.items():
        parts += [_string(key), _value(value)]
    offsets, at = [], 0
    for name, shape, type_ in tensors:
        parts += [_string(name), struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))]
        parts.append(struct.pack("<IQ", type_, at))
        offsets.append(at)
        at += _padded(_nbytes(shape, type_))
    offsets.append(at)
    data = b"".join(parts)
    return data + bytes(-len(data) % GGUF_DEFAULT_ALIGNMENT), offsets


def _padded(n: int) -> int:
    return n + -n % GGUF_DEFAULT_ALIGNMENT


def _nbytes(shape: tuple[int, ...], type_: Type) -> int:
    block, size = GGML_QUANT_SIZES[type_]
    return math.prod(shape) // block * size


def header_bytes(metadata: Mapping[str, object], tensors: Sequence[tuple[str, tuple[int, ...], Type]]) -> int:
    """Bytes of a file before its tensors' data, padding included; whatever the tensors' types."""
    return len(_header(metadata, tensors)[0])


def write_vocab_only(path: Path, metadata: Mapping[str, object]) -> None:
    """A GGUF of metadata alone, which llama.cpp can tokenise with. Overwrites path."""
    path.write_bytes(_header(metadata, ())[0])


def write_hollow(
    path: Path, metadata: Mapping[str, object], tensors: Sequence[tuple[str, tuple[int, ...], Type]]
) -> dict[str, Slot]:
    """A GGUF whose tensors are one hole, which reads as zeros: as long as with weights, and no larger than its header
    on the disk where the file system has holes. Overwrites path; where each tensor would be. OSError."""
    header, offsets = _header(metadata, tensors)
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + offsets[-1])
    return _slots(len(header), offsets, tensors)


def _slots(
    n_header: int, offsets: Sequence[int], tensors: Sequence[tuple[str, tuple[int, ...], Type]]
) -> dict[str, Slot]:
    return {
        name: Slot(name, shape, type_, n_header + offset, _nbytes(shape, type_))
        for (name, shape, type_), offset in zip(tensors, offsets, strict=False)
    }


class Writer(Closing):
    """An open GGUF in the making at part, which commit() moves to path. A context manager; leaving it keeps part.

    tensors: (name, numpy shape, type) in the order of the file. done: names of those that part holds already, from a
    run that was cut short. Raises OutputError: no permission, not enough room, or a part of another length.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        part: str | os.PathLike[str],
        metadata: Mapping[str, object],
        tensors: Sequence[tuple[str, tuple[int, ...], Type]],
        done: Iterable[str] = (),
    ) -> None:
        self.path, self.part = Path(path), Path(part)
        for name, _, _ in tensors:
            if len(name.encode()) > MAX_NAME_BYTES:
                raise ValueError(f"tensor name `{name}` is longer than {MAX_NAME_BYTES} bytes")
        self._infos = list(tensors)
        header, offsets = _header(metadata, tensors)
        self._n_header = len(header)
        self.nbytes = len(header) + offsets[-1]
        self.slots = _slots(len(header), offsets, tensors)
        if len(self.slots) != len(tensors):
            raise ValueError("two tensors have the same name")
        self._written: dict[str, int] = dict.fromkeys(self.slots, 0)
        for name in done:
            self._written[name] = self.slots[name].nbytes
        self._fd = self._open(any(self._written.values()))
        try:
            self._reserve()
            self._pwrite(0, header)
        except BaseException:
            self.close()
            raise

    @property
    def n_done(self) -> int:
        """Bytes of tensors written."""
        return sum(self._written.values())

    def append(self, name: str, data: NDArray[Any]) -> None:
        """The next of a tensor's bytes: all of it, an expert, or some rows. Tensors may take turns."""
        slot, done = self.slots[name], self._written[name]
        if data.nbytes > slot.nbytes - done:
            raise ValueError(f"`{name}` takes {slot.nbytes} bytes, not {data.nbytes} after {done}")
        self._pwrite(slot.offset + done, np.ascontiguousarray(data).reshape(-1).view(np.uint8).data)
        self._written[name] += data.nbytes

    def sync(self) -> None:
        """Return when all that was appended is on the disk."""
        self._settle(os.fsync)

    def finish(self, metadata: Mapping[str, object] | None = None) -> None:
        """Check that every tensor is whole and settle the header. metadata replaces the first, at the same length.

        Raises ValueError where tensors are missing or the header would move them.
        """
        missing = [name for name, n in self._written.items() if n != self.slots[name].nbytes]
        if missing:
            raise ValueError(f"{len(missing)} tensors are not written whole, the first `{missing[0]}`")
        if metadata is not None:
            header, _ = _header(metadata, self._infos)
            if len(header) != self._n_header:
                raise ValueError(f"the header grew from {self._n_header} to {len(header)} bytes")
            self._pwrite(0, header)
        self._settle(system.sync_and_drop)

    def _settle(self, sync: Callable[[int], None]) -> None:
        try:
            sync(self._fd)
        except OSError as error:
            raise disk_error(self.part, error, self.nbytes) from error

    def commit(self) -> None:
        """After finish(): make the file appear under its name."""
        try:
            self.part.replace(self.path)
            system.sync_folder(self.path.parent)
        except OSError as error:
            raise disk_error(self.path, error, self.nbytes) from error
        self.close()

    def close(self) -> None:
        """Let go of the file, finished or not."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _open(self, resumed: bool) -> int:
        try:
            fd = os.open(self.part, os.O_RDWR | (0 if resumed else os.O_CREAT | os.O_TRUNC), 0o666)
        except OSError as error:
            raise OutputError(f"`{self.part}`: {error.strerror}", "choose another place with -o") from error
        if resumed and os.fstat(fd).st_size != self.nbytes:
            found = os.fstat(fd).st_size
            os.close(fd)
            raise OutputError(f"`{self.part}` has {found} bytes, it should have {self.nbytes}", RESTART_HINT)
        return fd

    def _reserve(self) -> None:
        """Claim the disk now: running out after hours of work is worse than before them."""
        try:
            system.reserve(self._fd, self.nbytes)
        except OSError as error:
            raise disk_error(self.part, error, self.nbytes) from error

    def _pwrite(self, offset: int, data: bytes | memoryview) -> None:
        try:
            system.write_at(self._fd, data, offset)
        except OSError as error:
            raise disk_error(self.part, error, self.nbytes) from error
