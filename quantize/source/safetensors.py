"""safetensors.py: where each tensor of a checkpoint lies on disk. Reads headers only, and believes nothing in them.

A file is a little-endian u64 header length, that many bytes of JSON ({name: {dtype, shape, data_offsets}}), then data
that the tensors cover exactly. The numbers are checked against the file's size before anything is done with them.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from quantize.base.errors import CheckpointError
from quantize.source.stored import REPLACE_HINT, StoredTensor

# The format's own limit. A header past it is an attack or garbage: json would be asked to parse gigabytes.
MAX_HEADER_BYTES = 100_000_000
PREFIX_BYTES = 8
MAX_DIMS = 8
LFS_POINTER = b"version https://git-lfs.github.com/spec/"

DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
# The format grows: a dtype not above is taken as it comes, and means trouble where a tensor of it is needed.
DTYPE_NAME = re.compile(r"[A-Z][A-Z0-9_]{0,30}")


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one .safetensors file, by name. Raises CheckpointError."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            data = file.read(PREFIX_BYTES)
            data += file.read(header_bytes(path, data, size) - PREFIX_BYTES)
    except OSError as error:
        raise CheckpointError(f"`{path}`: {error.strerror}") from error
    tensors = parse_header(path, data, size)
    if tensors is None:
        raise _bad(path, "the file shrank while its header was read")
    return tensors


def header_bytes(path: Path, data: bytes, size: int) -> int:
    """How many bytes the header takes, by the first PREFIX_BYTES of a file of size bytes. CheckpointError."""
    if data.startswith(LFS_POINTER[:PREFIX_BYTES]):
        raise CheckpointError(
            f"`{path}` is a Git LFS pointer, which stands for the weights that were not fetched",
            "git lfs pull fetches them, or dsv2 download",
        )
    if size < PREFIX_BYTES:
        raise _bad(path, f"{size} bytes is too short for a safetensors header")
    n_header = int.from_bytes(data[:PREFIX_BYTES], "little")
    if n_header > MAX_HEADER_BYTES:
        raise _bad(path, f"header length {n_header} is over the format's limit of {MAX_HEADER_BYTES}")
    if n_header > size - PREFIX_BYTES:
        raise _bad(path, f"header length {n_header} runs past the end of the file ({size} bytes): truncated")
    return PREFIX_BYTES + n_header


def parse_header(path: Path, data: bytes, size: int) -> dict[str, StoredTensor] | None:
    """The tensors of a file of size bytes that begins with data, by name; None where its header goes on beyond that.

    path names it; nothing is read from there. Raises CheckpointError.
    """
    if len(data) < min(PREFIX_BYTES, size):
        return None
    data_start = header_bytes(path, data, size)
    if len(data) < data_start:
        return None
    entries = _parse(path, data[PREFIX_BYTES:data_start])
    tensors = {name: _entry(path, name, entry, data_start, size - data_start) for name, entry in entries.items()}
    _check_cover(path, list(tensors.values()), data_start, size)
    return tensors


def _bad(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"`{path}`: {what}", REPLACE_HINT)


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise _bad(path, f"`{key}` appears twice in the header")
            found[key] = value
        return found

    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise _bad(path, f"the header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise _bad(path, f"the header is a JSON {type(header).__name__}, expected an object")
    header.pop("__metadata__", None)
    return header


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _entry(path: Path, name: str, entry: Any, data_start: int, data_bytes: int) -> StoredTensor:
    if not isinstance(entry, dict):
        raise _bad(path, f"tensor `{name}`: its entry is not an object")
    dtype, shape, span = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or not DTYPE_NAME.fullmatch(dtype):
        raise _bad(path, f"tensor `{name}`: dtype {dtype!r} is not the name of one")
    if not isinstance(shape, list) or len(shape) > MAX_DIMS or not all(_is_count(n) for n in shape):
        raise _bad(path, f"tensor `{name}`: shape {shape!r} is not a list of at most {MAX_DIMS} counts")
    if not isinstance(span, list) or len(span) != 2 or not all(_is_count(n) for n in span):
        raise _bad(path, f"tensor `{name}`: data_offsets {span!r} is not a pair of offsets")
    begin, end = span
    if begin > end or end > data_bytes:
        raise _bad(path, f"tensor `{name}`: data_offsets {span} lie outside the {data_bytes} bytes of data: truncated")
    nbytes = math.prod(shape) * DTYPE_BYTES[dtype] if dtype in DTYPE_BYTES else end - begin
    if nbytes != end - begin:
        raise _bad(path, f"tensor `{name}`: {dtype} {shape} takes {nbytes} bytes, data_offsets hold {end - begin}")
    return StoredTensor(name, dtype, tuple(shape), path, data_start + begin, nbytes)


def _check_cover(path: Path, tensors: list[StoredTensor], data_start: int, size: int) -> None:
    """The format demands that tensors cover the data exactly: an overlap or a hole means damaged offsets."""
    at = data_start
    previous = ""
    for tensor in sorted(tensors, key=lambda t: (t.offset, t.nbytes)):
        if tensor.offset < at:
            raise _bad(path, f"tensor `{tensor.name}` overlaps `{previous}`")
        if tensor.offset > at:
            raise _bad(path, f"{tensor.offset - at} bytes before tensor `{tensor.name}` belong to no tensor")
        at = tensor.offset + tensor.nbytes
        previous = tensor.name
    if at != size:
        raise _bad(path, f"{size - at} bytes after the last tensor belong to no tensor")
