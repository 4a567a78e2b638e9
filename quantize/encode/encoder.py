"""encoder.py: float32 rows -> the bytes of a GGUF tensor, and back, on every core.

Under an input covariance the encoder is feedback.py's; without one it is ggml's own, from the libggml-base that
llama-cpp-python bundles, called through ctypes. Both leave the GIL alone: rows are independent, so threads take slices
of them, and the bytes do not depend on how many there are.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Type
from numpy.typing import NDArray

import cext
from quantize.base.blas import Crew, pieces
from quantize.base.errors import QuantizeError
from quantize.encode import feedback, grouped
from quantize.encode.feedback import Covariance, Sweep
from quantize.encode.objective import Objective
from quantize.encode.rows import Rows
from quantize.source.forms import bf16_to_f32, f32_to_bf16

FLOAT_TYPES = (Type.F32, Type.F16, Type.BF16)
# ggml's decoders, by the name in the library. Q8_0 and the float types ignore importance weights.
DECODERS = {
    Type.Q4_0: "q4_0", Type.Q4_1: "q4_1", Type.Q5_0: "q5_0", Type.Q5_1: "q5_1", Type.Q8_0: "q8_0",
    Type.Q2_K: "q2_K", Type.Q3_K: "q3_K", Type.Q4_K: "q4_K", Type.Q5_K: "q5_K", Type.Q6_K: "q6_K",
    Type.IQ4_NL: "iq4_nl", Type.IQ4_XS: "iq4_xs", Type.IQ2_XXS: "iq2_xxs", Type.IQ2_XS: "iq2_xs", Type.IQ2_S: "iq2_s",
    Type.IQ3_XXS: "iq3_xxs", Type.IQ3_S: "iq3_s",
}  # fmt: skip
IGNORES_IMPORTANCE = (*FLOAT_TYPES, Type.Q8_0)
# Of these, ggml's encoders end the process where they meet a value that is not finite or whose square is not.
GRID_TYPES = (Type.IQ2_XXS, Type.IQ2_XS, Type.IQ2_S, Type.IQ3_XXS, Type.IQ3_S)
FED_BACK = feedback.TYPES  # what a covariance changes the encoding of
NEED_IMPORTANCE = (Type.IQ2_XXS, Type.IQ2_XS)
GRID_MAX = 1e6
F16_MAX = 65504.0
NOT_FINITE_HINT = "the weights are too large for this type"
# Rows that a thread encodes under a covariance at a time: enough to read its tables once for many. The encoder takes 16
# side by side.
MIN_ROWS, MAX_ROWS = 16, 384
EVEN = Objective()
MIN_SLICE = 1 << 14  # values: a millisecond or so of encoding,
MIN_DECODED = 1 << 18  # and of decoding
# A weight that no calibration token touched still has to come out near itself: the floor keeps the sums positive.
IMPORTANCE_FLOOR = 1e-6


def row_bytes(type_: Type, n: int) -> int:
    """Bytes of a row of n values. ValueError unless whole blocks fit."""
    block, size = GGML_QUANT_SIZES[type_]
    if n % block:
        raise ValueError(f"a row of {n} values is not a multiple of {type_.name}'s block of {block}")
    return n // block * size


@cache
def _ggml() -> ctypes.CDLL:
    spec = find_spec("llama_cpp")
    folders = [Path(p) / "lib" for p in (spec.submodule_search_locations or [])] if spec else []
    for folder in folders:
        for name in ("libggml-base.so", "libggml-base.dylib", "ggml-base.dll"):
            if (folder / name).exists():
                lib = ctypes.CDLL(str(folder / name))
                lib.ggml_quantize_chunk.restype = ctypes.c_size_t
                lib.ggml_quantize_chunk.argtypes = [
                    ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p,
                    ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p,
                ]  # fmt: skip
                lib.ggml_quantize_init.argtypes = [ctypes.c_int]
                lib.ggml_validate_row_data.restype = ctypes.c_bool
                lib.ggml_validate_row_data.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
                return lib
    raise QuantizeError(
        "ggml's encoders are missing: llama-cpp-python is not installed", "pip install llama-cpp-python"
    )


@cache
def ggml_version() -> str:
    """The hash of ggml's encoders: another library may encode otherwise."""
    return hashlib.sha256(Path(_ggml()._name).read_bytes()).hexdigest()


def _address(array: NDArray[Any]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


class Encoder(Crew):
    """Encodes and decodes rows on so many threads, all cores unless told. group: so many columns of Q4_0 share a scale
    (grouped.py)."""

    def __init__(self, threads: int | None = None, group: int | None = None) -> None:
        if threads is not None and threads < 1:
            raise ValueError(f"threads is {threads}, expected at least 1")
        super().__init__(threads or cext.cores(), "encode")
        self._group = group

    def map(self, work: Callable[[slice], None], rows: NDArray[Any], min_values: int = MIN_SLICE) -> None:
        """Run work over slices of rows, a few for each thread, of min_values or more."""
        with self.share() as n_threads:
            n_parts = max(1, min(4 * n_threads, rows.size // min_values))
            self.run([partial(work, part) for part in _slices(len(rows), n_parts)], n_threads)

    def encode(
        self,
        values: NDArray[np.float32],
        type_: Type,
        objective: Objective = EVEN,
    ) -> NDArray[np.uint8]:
        """values (..., n) float32 -> (..., row_bytes) uint8.

        Types that ignore an importance may get it, and those that need it count all columns alike without. Types that
        feedback.py encodes follow a covariance instead, where it is positive definite, and the rows with it. Raises
        QuantizeError where the type cannot hold the values, ValueError where rows are not whole blocks.
        """
        importance, covariance, outputs = objective.importance, objective.covariance, objective.rows
        n = values.shape[-1]
        rows = np.ascontiguousarray(values, np.float32).reshape(-1, n)
        out = np.empty((len(rows), row_bytes(type_, n)), np.uint8)
        if type_ == Type.Q4_0 and self._group is not None:
            if not np.abs(rows).max(initial=0.0) <= GRID_MAX:  # a NaN too
                raise QuantizeError(f"weights over {GRID_MAX:g} or not finite", NOT_FINITE_HINT)
            grouped.encode(rows, self._group, covariance, importance, out)
            return out.reshape(*values.shape[:-1], out.shape[1])
        if covariance is not None and type_ in FED_BACK and covariance.sweeps is not None:
            if outputs is None:
                self._feed_back(rows, type_, covariance, out)
            else:
                self._follow(outputs, rows, type_, covariance, out)
            return out.reshape(*values.shape[:-1], out.shape[1])
        if importance is None and type_ in NEED_IMPORTANCE:
            importance = np.ones(n, np.float32)
        weights = None if importance is None or type_ in IGNORES_IMPORTANCE else _usable(importance, n)
        if type_ in FLOAT_TYPES:
            self.map(lambda part: _encode_float(rows[part], type_, out[part]), rows)
        else:
            _ggml().ggml_quantize_init(int(type_))  # tables of the grid types: once, before threads want them
            self.map(lambda part: _encode_blocks(rows[part], type_, weights, out[part]), rows)
        return out.reshape(*values.shape[:-1], out.shape[1])

    def _follow(
        self, outputs: Rows, rows: NDArray[np.float32], type_: Type, covariance: Covariance, out: NDArray[np.uint8]
    ) -> None:
        """Each step's rows under the errors dW of those of the steps before; blocks of rows side by side."""
        if outputs.order.size != len(rows):
            raise ValueError(f"the outputs are {outputs.order.size} rows, expected {len(rows)}")
        n = rows.shape[1]
        errors = np.empty((outputs.n_blocks, n, outputs.m), np.float32)
        for at in outputs.steps:
            picked = outputs.order[:, at]
            carried = [outputs.carried(i, at, block) for i, block in enumerate(errors)]
            target = (rows[picked] - np.stack(carried)).reshape(-1, n)
            data = np.empty((len(target), out.shape[1]), np.uint8)
            self._feed_back(target, type_, covariance, data)
            decoded = self.decode(data, type_, n).reshape(*picked.shape, n)
            errors[:, :, at] = (decoded - rows[picked]).swapaxes(1, 2)
            out[picked.reshape(-1)] = data

    def _feed_back(
        self, rows: NDArray[np.float32], type_: Type, covariance: Covariance, out: NDArray[np.uint8]
    ) -> None:
        if covariance.n != rows.shape[1]:
            raise ValueError(f"the covariance is of {covariance.n} columns, expected {rows.shape[1]}")
        if not np.isfinite(rows).all():
            raise QuantizeError(f"weights that are not finite cannot be encoded to {type_.name}")
        assert covariance.sweeps is not None
        for run, sweeps in zip(feedback.chunks(covariance.n), covariance.sweeps, strict=True):
            part = out[:, row_bytes(type_, run.start) : row_bytes(type_, run.stop)]
            part[...] = self._feed_back_run(np.ascontiguousarray(rows[:, run]), type_, sweeps)
        _validate(type_, out)

    def _feed_back_run(self, rows: NDArray[np.float32], type_: Type, sweeps: list[Sweep]) -> NDArray[np.uint8]:
        out = np.empty((len(rows), row_bytes(type_, rows.shape[1])), np.uint8)

        def work(at: slice) -> None:
            feedback.encode_rows(rows[at], type_, sweeps, out[at])

        with self.share() as n_threads:
            n_parts = n_threads * (2 if len(rows) > n_threads * MAX_ROWS // 2 else 1)
            step = -(-len(rows) // (n_parts * MIN_ROWS)) * MIN_ROWS
            self.run([partial(work, at) for at in pieces(len(rows), min(MAX_ROWS, step))], n_threads)
        return out

    def decode(self, data: NDArray[np.uint8], type_: Type, n: int) -> NDArray[np.float32]:
        """(..., row_bytes) uint8 -> (..., n) float32: what an engine multiplies by."""
        rows = np.ascontiguousarray(data).reshape(-1, row_bytes(type_, n))
        if type_ == Type.F32:
            return rows.view(np.float32).reshape(*data.shape[:-1], n)
        if type_ == Type.F16:
            return rows.view(np.float16).astype(np.float32).reshape(*data.shape[:-1], n)
        if type_ == Type.BF16:
            return bf16_to_f32(rows.view(np.uint16)).reshape(*data.shape[:-1], n)
        out = np.empty((len(rows), n), np.float32)
        function = getattr(_ggml(), f"dequantize_row_{DECODERS[type_]}")

        def work(part: slice) -> None:
            function(_address(rows[part]), _address(out[part]), ctypes.c_int64(out[part].size))

        self.map(work, out, MIN_DECODED)
        return out.reshape(*data.shape[:-1], n)


def _slices(n_rows: int, n_parts: int) -> list[slice]:
    return pieces(n_rows, max(1, -(-n_rows // n_parts)))


def _usable(importance: NDArray[np.float32], n: int) -> NDArray[np.float32]:
    """Importance with no zeros, no NaN, and a mean near one: the encoders multiply it by squared weights in float32."""
    if importance.shape != (n,):
        raise ValueError(f"importance is {importance.shape}, expected ({n},)")
    if not np.isfinite(importance).all() or (importance < 0).any():
        raise ValueError("importance holds values that are negative or not finite")
    mean = float(importance.mean(dtype=np.float64))
    if mean == 0:
        return np.ones(n, np.float32)
    usable: NDArray[np.float32] = np.maximum(importance / np.float32(mean), np.float32(IMPORTANCE_FLOOR))
    return usable


def _encode_float(rows: NDArray[np.float32], type_: Type, out: NDArray[np.uint8]) -> None:
    if type_ == Type.F32:
        out.view(np.float32)[...] = rows
    elif type_ == Type.BF16:
        out.view(np.uint16)[...] = f32_to_bf16(rows)
    else:
        worst = float(np.abs(rows).max(initial=0.0))
        if worst > F16_MAX:
            raise QuantizeError(
                f"a weight of {worst:g} does not fit float16", "write bf16 or f32 instead (--type bf16)"
            )
        out.view(np.float16)[...] = rows


def _encode_blocks(
    rows: NDArray[np.float32], type_: Type, weights: NDArray[np.float32] | None, out: NDArray[np.uint8]
) -> None:
    lib = _ggml()
    # `not`, so that a NaN is caught too.
    if type_ in GRID_TYPES and not np.abs(rows).max(initial=0.0) <= GRID_MAX:
        raise QuantizeError(f"encoding to {type_.name}: weights over {GRID_MAX:g} or not finite", NOT_FINITE_HINT)
    importance = None if weights is None else _address(weights)
    lib.ggml_quantize_chunk(int(type_), _address(rows), _address(out), 0, rows.shape[0], rows.shape[1], importance)
    _validate(type_, out)


def _validate(type_: Type, out: NDArray[np.uint8]) -> None:
    if not _ggml().ggml_validate_row_data(int(type_), _address(out), out.nbytes):
        raise QuantizeError(f"encoding to {type_.name} gave scales that are not finite", NOT_FINITE_HINT)
