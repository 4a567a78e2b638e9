"""Kernel tables called with numpy arrays, and the arithmetic they promise, in float64."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from support.blocks import CODED_FORMATS, GRID_FORMATS, block_size, without_quants

from cext import _engine

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

U = 2.0**-24  # unit roundoff of float32
SENTINEL = np.float32(-1234.5)  # in outputs, where nothing may be written


def aligned(nbytes: int) -> Bytes:
    """Zeroed bytes at a multiple of 64, as packs want."""
    raw = np.zeros(nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + nbytes]


def pack(isa: str, name: str, x: Floats, rows: NDArray[np.int32] | None = None, splits: tuple[int, ...] = ()) -> Bytes:
    """The activation pack of x (or of x[rows]) for products with format `name`, made in the pieces that splits cut."""
    n_tok = len(x) if rows is None else len(rows)
    k = x.shape[1]
    act = aligned(_engine._act_bytes(isa, name, n_tok, k))
    cuts = [0, *splits, n_tok]
    for begin, end in pairwise(cuts):
        _engine._act_pack(isa, name, begin, end, n_tok, k, x, k, rows, act)
    return act


def mul(isa: str, name: str, w: Bytes, x: Floats, splits: tuple[int, ...] = ()) -> Floats:
    """x (n_tok, k) times w (rows, row bytes) transposed, computed in the row ranges that splits cut: (n_tok, rows)."""
    n_tok, k = x.shape
    n_rows = len(w)
    ldy = n_rows + 3
    act = pack(isa, name, x)
    y = np.full((n_tok, ldy), SENTINEL, np.float32)
    cuts = [0, *splits, n_rows]
    for begin, end in pairwise(cuts):
        _engine._mul(isa, name, w, w.shape[1], k, begin, end, act, n_tok, y, ldy)
    assert (y[:, n_rows:] == SENTINEL).all(), "wrote past the rows asked for"
    return y[:, :n_rows].copy()


def decode(name: str, w: Bytes) -> Doubles:
    """Weights (rows, row bytes) as (rows, k), by the scalar decoder that test_formats.py checks."""
    elements, nbytes = block_size(name)
    out = np.empty((len(w), w.shape[1] // nbytes * elements), np.float32)
    _engine._dequantize(None, name, np.ascontiguousarray(w), out)
    return out.astype(np.float64)


def quantize_activations(x: Floats) -> tuple[NDArray[np.int32], Floats]:
    """int8 values (n, k) and float32 scales (n, k / 32) as kernels.h promises them: max|x| / 127, ties to even."""
    blocks = x.reshape(len(x), -1, 32)
    top = np.abs(blocks).max(axis=2)
    tiny = top < np.float32(2.0**-100)
    with np.errstate(divide="ignore"):
        inverse = np.where(tiny, np.float32(0), np.float32(127) / np.where(tiny, np.float32(1), top))
    q = np.rint(blocks * inverse[:, :, None].astype(np.float32)).astype(np.int32)
    scale = np.where(tiny, np.float32(0), top / np.float32(127)).astype(np.float32)
    return q.reshape(x.shape), scale


def weight_magnitudes(name: str, w: Bytes) -> Doubles:
    """|quant's part| + |offset's or minimum's part| of each weight: a kernel may sum the two separately."""
    weights = decode(name, w)
    if name in GRID_FORMATS:
        return np.abs(weights)
    offset = decode(name, without_quants(name, w))
    return np.abs(weights - offset) + np.abs(offset)


@dataclass(frozen=True)
class Expected:
    """A product in float64, and how far float32 arithmetic may lie from it, both (n_tok, rows)."""

    y: Doubles
    bound: Doubles


def expected_mul(name: str, w: Bytes, x: Floats) -> Expected:
    """What mul must give, with activations rounded as kernels.h says.

    The bound is the standard one for a sum: (operations in sequence) * u * sum of magnitudes.
    """
    weights = decode(name, w)
    if name in CODED_FORMATS:
        q, scale = quantize_activations(x)
        values = q.astype(np.float64) * np.repeat(scale.astype(np.float64), 32, axis=1)
        magnitude = weight_magnitudes(name, w)
        n_ops = x.shape[1] / 16 + 12
    else:
        values, magnitude = x.astype(np.float64), np.abs(weights)
        n_ops = x.shape[1] + 2
    tiny = np.finfo(np.float32).tiny  # products that underflow lose up to this much each
    return Expected(values @ weights.T, n_ops * (U * (np.abs(values) @ magnitude.T) + tiny))


def assert_within(got: NDArray[np.floating], want: Doubles, bound: Doubles | float, what: str = "") -> None:
    error = np.abs(got.astype(np.float64) - want)
    over = error - np.broadcast_to(bound, error.shape)
    worst = np.unravel_index(int(np.argmax(np.where(np.isnan(over), np.inf, over))), over.shape)
    limit = np.broadcast_to(bound, error.shape)[worst]
    place = tuple(map(int, worst))
    assert np.isfinite(got).all() and over[worst] <= 0, (
        f"{what} at {place}: {got[worst]!r}, expected {want[worst]!r} within {limit:.3g}"
    )
