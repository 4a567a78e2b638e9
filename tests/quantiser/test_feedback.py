"""quantize.encode.feedback and cext/encode: against GPTQ in numpy, gguf-py's decoders, and plain encoding."""

from __future__ import annotations

import itertools

import gguf
import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Type
from ref.gptq import gptq, loss
from support.inputs import correlated

from cext import _engine
from quantize.base.errors import QuantizeError
from quantize.encode import feedback
from quantize.encode.encoder import Encoder, row_bytes
from quantize.encode.feedback import Covariance
from quantize.encode.objective import Objective

ALL = pytest.mark.parametrize("type_", feedback.TYPES, ids=lambda t: t.name)


def inputs(n: int, n_tokens: int, rank: int = 16, seed: int = 0) -> np.ndarray:
    return correlated(np.random.default_rng(seed), n_tokens, n, rank, 0.5)


def matrix(n_rows: int, n: int, seed: int = 1) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((n_rows, n)) * 0.03).astype(np.float32)


def damped(x: np.ndarray) -> np.ndarray:
    h = x.T.astype(np.float64) @ x
    h /= np.trace(h) / len(h)
    return h + feedback.DAMPING * np.eye(len(h))


def encode(w: np.ndarray, type_: Type, covariance: Covariance | None, threads: int = 2) -> np.ndarray:
    with Encoder(threads) as encoder:
        importance = None
        if covariance is not None and covariance.mean > 0:
            importance = np.concatenate([b.diagonal() for b in covariance.blocks]).astype(np.float32)
        return encoder.encode(w, type_, Objective(None if covariance is not None else importance, covariance))


def plain(w: np.ndarray, type_: Type, x: np.ndarray) -> np.ndarray:
    with Encoder(1) as encoder:
        return gguf.quants.dequantize(encoder.encode(w, type_, Objective(np.square(x).mean(0))), type_)


@ALL
@pytest.mark.parametrize("n", [256, 768])
def test_loss_is_below_plain_encoding_s(type_: Type, n: int) -> None:
    """On its own covariance, and on tokens that it did not see."""
    x, w = inputs(n, 4 * n), matrix(48, n)
    own, other = x[: 3 * n], x[3 * n :]
    q = gguf.quants.dequantize(encode(w, type_, Covariance.of(own)), type_)
    p = plain(w, type_, own)
    for tokens, most in ((own, 0.75), (other, 0.95)):
        h = tokens.T.astype(np.float64) @ tokens
        assert loss(w, q, h).sum() < most * loss(w, p, h).sum()
    assert (loss(w, q, damped(own)) <= loss(w, p, damped(own))).all()  # row by row


@ALL
def test_decoders_agree(type_: Type) -> None:
    """The bytes say what the encoder meant: gguf-py's decoder and ours find the same values, near the weights."""
    n = 512
    w = matrix(20, n)
    w[3] = 0
    w[4] *= 0.01
    w[5, ::7] *= 30
    data = encode(w, type_, Covariance.of(inputs(n, 2048)))
    assert data.shape == (20, row_bytes(type_, n))
    theirs = gguf.quants.dequantize(data, type_)
    with Encoder(1) as encoder:
        np.testing.assert_allclose(encoder.decode(data, type_, n), theirs, rtol=1e-6, atol=1e-12)
    assert (theirs[3] == 0).all()
    assert (np.abs(theirs - w).max(1) <= np.abs(w).max(1)).all()


@pytest.mark.parametrize("type_", [Type.Q4_0, Type.Q8_0, Type.Q5_1], ids=lambda t: t.name)
def test_first_choice_is_gptq(type_: Type) -> None:
    """One round without polish, one sweep: on the scales that came out, the codes are GPTQ's but for a final refit."""
    n = 96
    x, w = inputs(n, 1000), matrix(30, n)
    h = damped(x)
    sweeps = Covariance.of(x).sweeps
    assert sweeps is not None and len(sweeps) == 1
    out = np.empty((30, row_bytes(type_, n)), np.uint8)
    _engine.encode(int(type_), w, 30, n, sweeps[0][:1], 1, 0, out)
    ours = gguf.quants.dequantize(out, type_)
    block, size = GGML_QUANT_SIZES[type_]
    assert block == 32
    lowest, n_codes = {Type.Q4_0: (-8, 16), Type.Q8_0: (-127, 255), Type.Q5_1: (0, 32)}[type_]
    grid = np.empty((30, n, n_codes))
    for i in range(n // 32):
        head = np.ascontiguousarray(out[:, i * size : i * size + 4]).view(np.float16).astype(np.float64)
        low = head[:, 1:2] if type_ == Type.Q5_1 else 0.0
        grid[:, 32 * i : 32 * i + 32] = (head[:, :1] * (lowest + np.arange(n_codes)) + low)[:, None]
    theirs = gptq(w.astype(np.float64), h, grid)
    # The scales were refitted to the codes after they were chosen, so the codes need not be what GPTQ chooses under the
    # final ones: but neither may be far better than the other, and hardly any code differs by more than one.
    step = grid[:, :, 1] - grid[:, :, 0]
    assert loss(w, ours, h).sum() == pytest.approx(loss(w, theirs, h).sum(), rel=0.2)
    assert (np.abs(ours - theirs) < 1.01 * np.abs(step)).mean() > 0.98


@ALL
def test_search_pays(type_: Type) -> None:
    """Polish, rounds and the second sweep lower the loss: each may cost a trifle, as blocks that come later lose what
    an earlier one gains, but not together.
    """
    x, w = inputs(512, 2048), matrix(32, 512)
    h = damped(x)
    sweeps = Covariance.of(x).sweeps
    assert sweeps is not None
    losses = []
    for n_sweeps, rounds, polish in ((1, 1, 0), (1, 1, 4), (1, 2, 4), (2, 2, 4)):
        out = np.empty((32, row_bytes(type_, 512)), np.uint8)
        _engine.encode(int(type_), w, 32, 512, sweeps[0][:n_sweeps], rounds, polish, out)
        losses.append(loss(w, gguf.quants.dequantize(out, type_), h).sum())
    assert all(later < 1.02 * earlier for earlier, later in itertools.pairwise(losses))
    assert losses[-1] < 0.97 * losses[0]


@ALL
@pytest.mark.parametrize("case", ["dead columns", "few tokens", "one direction", "nothing", "one row", "huge", "tiny"])
def test_odd_covariances(type_: Type, case: str) -> None:
    n, w = 256, matrix(1 if case == "one row" else 9, 256)
    x = inputs(n, 3 if case == "few tokens" else 400)
    if case == "dead columns":
        x[:, 10:70] = 0
    elif case == "one direction":
        x = np.outer(x[:, 0], x[0])
    elif case == "nothing":
        x[:] = 0
    elif case in ("huge", "tiny"):
        x *= np.float32(1e15 if case == "huge" else 1e-15)
    q = gguf.quants.dequantize(encode(w, type_, Covariance.of(x)), type_)
    assert np.isfinite(q).all()
    assert (np.square(q - w).sum(1) < np.square(w).sum(1)).all()  # weights that no input reaches are not thrown away


@pytest.mark.parametrize("type_", [Type.Q2_K, Type.IQ4_XS, Type.Q5_0], ids=lambda t: t.name)
def test_rows_do_not_depend_on_each_other(type_: Type) -> None:
    x, w = inputs(512, 1024), matrix(70, 512)
    covariance = Covariance.of(x)
    whole = encode(w, type_, covariance, threads=1)
    np.testing.assert_array_equal(encode(w, type_, covariance, threads=3), whole)
    np.testing.assert_array_equal(encode(w[33:34], type_, covariance), whole[33:34])


def test_wide_inputs_have_a_covariance_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feedback, "MAX_WIDTH", 512)
    n = 1376  # as V2-Lite's, no multiple of 256
    assert [(c.start, c.stop) for c in feedback.chunks(n)] == [(0, 512), (512, 1024), (1024, 1376)]
    x, w = inputs(n, 3000), matrix(10, n)
    covariance = Covariance.of(x)
    assert [len(b) for b in covariance.blocks] == [512, 512, 352]
    q = gguf.quants.dequantize(encode(w, Type.Q4_0, covariance), Type.Q4_0)
    h = x.T.astype(np.float64) @ x
    assert loss(w, q, h).sum() < loss(w, plain(w, Type.Q4_0, x), h).sum()


def test_folded_inputs() -> None:
    x = inputs(64, 300)
    factor = np.exp(np.random.default_rng(5).normal(size=64)).astype(np.float32)
    scaled = Covariance.of(x).scaled(factor)
    np.testing.assert_allclose(scaled.blocks[0], Covariance.of(x * factor).blocks[0], rtol=1e-4, atol=1e-2)


def test_blends_are_between() -> None:
    mine, theirs = Covariance.of(inputs(64, 300)), Covariance.of(inputs(64, 300, seed=4) * 100)
    empty = Covariance.of(np.zeros((0, 64), np.float32))
    assert mine.blend(theirs, 0.25).mean == pytest.approx(1, rel=1e-5)
    assert empty.blend(mine, 1.0) is mine and mine.blend(empty, 0.5) is mine
    half = mine.diagonal_blend(0.5).blocks[0]
    np.testing.assert_array_equal(half.diagonal(), mine.blocks[0].diagonal())
    assert half[0, 1] == pytest.approx(0.5 * mine.blocks[0][0, 1])
    assert empty.sweeps is None and Covariance((np.full((32, 32), np.nan, np.float32),)).sweeps is None


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(bad: float) -> None:
    w, covariance = matrix(4, 256), Covariance.of(inputs(256, 400))
    w[2, 17] = bad
    with Encoder(1) as encoder, pytest.raises(QuantizeError, match="finite"):
        encoder.encode(w, Type.Q4_K, Objective(None, covariance))
    assert covariance.sweeps is not None
    with pytest.raises(ValueError, match="not finite"):
        feedback.encode_rows(w, Type.Q4_K, covariance.sweeps[0], np.empty((4, 144), np.uint8))


def test_wrong_sizes_are_refused() -> None:
    covariance = Covariance.of(inputs(256, 400))
    with Encoder(1) as encoder:
        with pytest.raises(ValueError, match="256 columns"):
            encoder.encode(matrix(2, 512), Type.Q4_K, Objective(None, covariance))
        with pytest.raises(QuantizeError, match="not finite"):
            encoder.encode(matrix(2, 256) * 1e9, Type.Q8_0, Objective(None, covariance))
    w, out, sweeps = matrix(2, 256), np.empty((2, 144), np.uint8), covariance.sweeps
    assert sweeps is not None
    good = (int(Type.Q4_K), w, 2, 256, sweeps[0], 1, 1, out)
    _engine.encode(*good)
    for i, wrong in ((0, 0), (0, 99), (2, 3), (3, 250), (4, []), (5, 0), (6, -1), (7, out[0])):
        with pytest.raises(ValueError):
            _engine.encode(*good[:i], wrong, *good[i + 1 :])
