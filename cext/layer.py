"""One transformer block run from arrays: a checkpoint streams through it a layer at a time during calibration."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import numpy as np
from numpy.typing import NDArray

from cext import _engine
from cext.arguments import whole
from cext.model import Hparams, tap_array

Sublayer = Literal["attention", "feed_forward"]
_SUBLAYERS = (None, *get_args(Sublayer))  # as the engine counts them
_GGUF_TYPES = {"float32": 0, "float16": 1, "uint16": 30}  # uint16 holds bfloat16 bits


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _header(metadata: Mapping[str, Any]) -> bytes:
    """The scalars of metadata as a GGUF without tensors (version 3)."""
    entries = []
    for key, value in metadata.items():
        if isinstance(value, bool):
            entries.append(_string(key) + struct.pack("<I?", 7, value))
        elif isinstance(value, int):
            entries.append(_string(key) + struct.pack("<Iq", 11, value))
        elif isinstance(value, float):
            entries.append(_string(key) + struct.pack("<Id", 12, value))
        elif isinstance(value, str):
            entries.append(_string(key) + struct.pack("<I", 8) + _string(value))
    return struct.pack("<4sIQQ", b"GGUF", 3, 0, len(entries)) + b"".join(entries)


@dataclass(frozen=True)
class Encoded:
    """A tensor as a GGUF holds it: its type's id, its shape in ggml's order (the row first), its bytes."""

    type: int
    shape: tuple[int, ...]
    data: NDArray[np.uint8]


def _record(name: str, array: NDArray[Any] | Encoded) -> tuple[str, int, tuple[int, ...], NDArray[Any]]:
    if isinstance(array, Encoded):
        return name, array.type, (*array.shape, *(1,) * (4 - len(array.shape))), array.data
    kind = _GGUF_TYPES.get(array.dtype.name)
    if kind is None or not array.flags.c_contiguous:
        raise ValueError(
            f"tensor `{name}` is {array.dtype}: expected contiguous float32, float16 or bfloat16 bits in uint16"
        )
    return name, kind, (*array.shape[::-1], *(1,) * (4 - array.ndim)), array


class Layer:
    """One block over borrowed arrays, or over a file's own bytes, which stay alive with it.

    metadata: the GGUF keys of the whole model (deepseek2.*), as they would stand in the file. il: which block (it
    decides dense or experts). tensors: by GGUF name ("blk.3.attn_norm.weight"), in numpy's order (ggml's shape
    reversed): float32, float16, or uint16 holding bfloat16 bits. sublayer: attention alone ends at the residual after
    it, where the other begins; tensors of what is not run may be absent, but for ffn_norm. Raises FormatError,
    UnsupportedError, ValueError.
    """

    def __init__(
        self,
        metadata: Mapping[str, Any],
        il: int,
        tensors: Mapping[str, NDArray[Any] | Encoded],
        threads: int | None = None,
        sublayer: Sublayer | None = None,
    ) -> None:
        records = [_record(name, array) for name, array in tensors.items()]
        n_threads = 0 if threads is None else whole("threads", threads, low=1)
        self.il = whole("il", il)
        self._handle = _engine.block_open(_header(metadata), self.il, records, n_threads, _SUBLAYERS.index(sublayer))
        self.hparams = cast(Hparams, _engine.block_hparams(self._handle))

    def forward(
        self, x: NDArray[np.float32], n_seq: int, tap: Iterable[str] = ()
    ) -> tuple[NDArray[np.float32], dict[str, NDArray[Any]]]:
        """The output, of the block or its sublayer, for x (n_seq * n_tok, n_embd): n_seq windows of equal length, each
        from position 0.

        Returns (output of x's shape, {name: array}) for the tapped names, given without their "-il" (see ``Tap``); of
        one sublayer nothing of the other can be tapped but ffn_norm.
        """
        x = np.ascontiguousarray(x, np.float32)
        rows, n_seq = len(x), whole("n_seq", n_seq)
        if x.ndim != 2 or x.shape[1] != self.hparams["n_embd"] or n_seq < 1 or rows == 0 or rows % n_seq:
            raise ValueError(f"x is {x.shape}, expected (n_seq * n_tok, {self.hparams['n_embd']}) with n_seq = {n_seq}")
        out = np.empty_like(x)
        taps = {}
        for name in tap:
            shape = _engine.block_tap_shape(self._handle, f"{name}-{self.il}")
            taps[name] = tap_array(name, shape, rows, self.hparams)
        named = [(f"{name}-{self.il}", array) for name, array in taps.items()]
        _engine.block_forward(self._handle, x, n_seq, rows // n_seq, out, named)
        return out, taps

    def close(self) -> None:
        """Let go of the arrays and the threads, after the calls that are under way."""
        _engine.block_close(self._handle)

    def __enter__(self) -> Layer:
        _engine.block_hparams(self._handle)  # ArgumentError where it is closed
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
