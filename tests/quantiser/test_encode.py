"""quantize.encode.encoder against ggml called directly, and against gguf-py's own decoders."""

from __future__ import annotations

import ctypes
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as Type

from quantize.base.errors import QuantizeError
from quantize.encode.encoder import DECODERS, FLOAT_TYPES, GRID_TYPES, NEED_IMPORTANCE, Encoder, row_bytes
from quantize.encode.objective import Objective
from quantize.source.forms import bf16_to_f32

BLOCK_TYPES = sorted(DECODERS)


@pytest.fixture(scope="module")
def ggml() -> ctypes.CDLL:
    folder = Path(llama_cpp.__file__).parent / "lib"
    lib = ctypes.CDLL(str(next(p for p in folder.iterdir() if p.name in ("libggml-base.so", "libggml-base.dylib"))))
    lib.ggml_quantize_chunk.restype = ctypes.c_size_t
    return lib


def direct(ggml: ctypes.CDLL, rows: np.ndarray, type_: Type, weights: np.ndarray | None) -> np.ndarray:
    out = np.empty((rows.shape[0], row_bytes(type_, rows.shape[1])), np.uint8)
    n = ggml.ggml_quantize_chunk(
        ctypes.c_int(type_),
        ctypes.c_void_p(rows.ctypes.data),
        ctypes.c_void_p(out.ctypes.data),
        ctypes.c_int64(0),
        ctypes.c_int64(rows.shape[0]),
        ctypes.c_int64(rows.shape[1]),
        None if weights is None else ctypes.c_void_p(weights.ctypes.data),
    )
    assert n == out.nbytes
    return out


def sample(n_rows: int, n: int) -> np.ndarray:
    rng = np.random.default_rng(7)
    values = rng.standard_normal((n_rows, n)).astype(np.float32) * 0.02
    values[0] = 0  # an empty block has no scale
    values[1] = 1.0
    values[2, ::32] = 30.0  # outliers
    values[3] = -values[3].__abs__()
    return values


@pytest.mark.parametrize("type_", BLOCK_TYPES, ids=lambda t: t.name)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("threads", [1, 3])
def test_bytes_are_ggml_s(ggml: ctypes.CDLL, type_: Type, weighted: bool, threads: int) -> None:
    rows = sample(37, 512)
    weights = None
    if weighted:
        weights = np.random.default_rng(1).gamma(0.5, size=512).astype(np.float32)
        weights /= np.float32(weights.mean(dtype=np.float64))  # the encoder normalises; start from its fixed point
        weights /= np.float32(weights.mean(dtype=np.float64))
    with Encoder(threads) as encoder:
        got = encoder.encode(rows, type_, Objective(weights))
        again = encoder.encode(rows.reshape(37, 2, 256), type_, Objective(None if weights is None else weights[:256]))
    if type_ != Type.Q8_0 and weights is not None:
        normalised = weights / np.float32(weights.mean(dtype=np.float64))
        weights = np.maximum(normalised, np.float32(1e-6))
    if type_ in NEED_IMPORTANCE and weights is None:
        weights = np.ones(512, np.float32)
    np.testing.assert_array_equal(got, direct(ggml, rows, type_, weights))
    assert again.shape == (37, 2, row_bytes(type_, 256))


@pytest.mark.parametrize("type_", BLOCK_TYPES, ids=lambda t: t.name)
def test_decode_agrees_with_gguf_py(type_: Type) -> None:
    rows = sample(9, 256)
    with Encoder(2) as encoder:
        data = encoder.encode(rows, type_)
        got = encoder.decode(data, type_, 256)
    expected = gguf.quants.dequantize(data, type_)
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-12)  # the same few float operations, maybe fused


@pytest.mark.parametrize("type_", FLOAT_TYPES, ids=lambda t: t.name)
def test_float_types(type_: Type) -> None:
    rows = sample(5, 33)
    with Encoder(2) as encoder:
        data = encoder.encode(rows, type_)
        got = encoder.decode(data, type_, 33)
    expected = {
        Type.F32: lambda: rows,
        Type.F16: lambda: rows.astype(np.float16).astype(np.float32),
        Type.BF16: lambda: bf16_to_f32(gguf.quants.quantize(rows, Type.BF16).view(np.uint16)),
    }[type_]()
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("type_", BLOCK_TYPES, ids=lambda t: t.name)
@pytest.mark.parametrize("case", ["zeros", "one column", "tiny", "huge spread"])
def test_odd_importance_leaves_no_nan(type_: Type, case: str) -> None:
    weights = np.zeros(256, np.float32)
    if case == "one column":
        weights[17] = 5.0
    elif case == "tiny":
        weights[:] = 1e-38
    elif case == "huge spread":
        weights[:] = np.logspace(-30, 30, 256).astype(np.float32)
    with Encoder(1) as encoder:
        for rows in (sample(8, 256), np.zeros((2, 256), np.float32), np.full((2, 256), 1e-30, np.float32)):
            assert np.isfinite(encoder.decode(encoder.encode(rows, type_, Objective(weights)), type_, 256)).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_bad_importance_is_refused(bad: float) -> None:
    weights = np.ones(256, np.float32)
    weights[3] = bad
    with Encoder(1) as encoder, pytest.raises(ValueError, match="importance"):
        encoder.encode(np.ones((1, 256), np.float32), Type.Q4_K, Objective(weights))


def test_importance_moves_the_error() -> None:
    rng = np.random.default_rng(3)
    rows = rng.standard_normal((64, 256)).astype(np.float32)
    weights = np.ones(256, np.float32)
    weights[:32] = 100.0
    with Encoder(1) as encoder:
        plain = encoder.decode(encoder.encode(rows, Type.Q3_K), Type.Q3_K, 256) - rows
        weighted = encoder.decode(encoder.encode(rows, Type.Q3_K, Objective(weights)), Type.Q3_K, 256) - rows
    assert (weighted**2 @ weights).sum() < (plain**2 @ weights).sum()


def test_values_that_do_not_fit() -> None:
    with Encoder(1) as encoder:
        with pytest.raises(QuantizeError, match="float16"):
            encoder.encode(np.full((1, 4), 1e5, np.float32), Type.F16)
        with pytest.raises(QuantizeError, match="not finite"):
            encoder.encode(np.full((1, 32), 1e9, np.float32), Type.Q8_0)
        for type_ in GRID_TYPES:
            for bad in (1e30, np.inf, np.nan):
                with pytest.raises(QuantizeError, match="weights over"):
                    encoder.encode(np.full((1, 256), bad, np.float32), type_)
        with pytest.raises(ValueError, match="multiple"):
            encoder.encode(np.ones((1, 100), np.float32), Type.Q4_0)
        with pytest.raises(ValueError, match="threads"):
            Encoder(0)
