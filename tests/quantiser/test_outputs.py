"""encode.rows and measure.outputs: rows that follow each other, against Schur complements in float64."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as Type
from support.inputs import correlated

from quantize.encode.encoder import Encoder
from quantize.encode.feedback import Covariance
from quantize.encode.objective import Objective
from quantize.encode.rows import DAMPING, Rows
from quantize.measure.outputs import Outputs, OutputSums

RNG = np.random.default_rng(3)


def some(n_tokens: int, n: int) -> np.ndarray:
    return correlated(RNG, n_tokens, n, 6, 0.4)


def covariances(m: int, n_blocks: int = 1) -> np.ndarray:
    """(n_blocks, m, m) covariances of correlated gradients."""
    gradients = [some(4 * m, m) for _ in range(n_blocks)]
    return np.stack([g.T @ g / len(g) for g in gradients])


def damped(g: np.ndarray) -> np.ndarray:
    out = g.astype(np.float64) / np.trace(g) * len(g)
    return out + DAMPING * np.eye(len(g))


def left_of(h: np.ndarray, n: int) -> np.ndarray:
    """(n, n) what the first n rows count, where those after them make up for what they can."""
    rest = h[n:, :n]
    out: np.ndarray = h[:n, :n] - rest.T @ np.linalg.solve(h[n:, n:], rest) if n < len(h) else h
    return out


def loss(e: np.ndarray, g: np.ndarray, h: np.ndarray) -> float:
    return float(np.einsum("rs,ri,ij,sj->", g, e, h, e, optimize=True))


@pytest.mark.parametrize("m", [8, 20, 96, 300, 576, 1100])
def test_a_row_makes_up_for_those_before(m: int) -> None:
    """What the rows of a step are moved by, and how much all count, is what eliminating the rows after them gives."""
    g = covariances(m)
    rows = Rows(g)
    order = rows.order[0]
    assert sorted(order) == list(range(m)) and (np.diff(g[0].diagonal()[order]) <= 0).all()
    h = damped(g[0])[np.ix_(order, order)]
    lost = RNG.standard_normal((5, m)).astype(np.float32)
    counts = 0.0
    for at in rows.steps:
        left = left_of(h, at.stop)
        own, before = left[at, at], left[at, : at.start]
        counts += np.trace(own)
        expected = np.linalg.solve(own, before @ lost[:, : at.start].T) if at.start else np.zeros((at.stop, 5))
        np.testing.assert_allclose(rows.carried(0, at, lost), expected, rtol=1e-3, atol=1e-3)
    assert [at.start for at in rows.steps[1:]] == [at.stop for at in rows.steps[:-1]] and rows.steps[-1].stop == m
    assert rows.share == pytest.approx(counts / np.trace(h), rel=1e-4)
    assert rows.share < 0.9 or m == 8  # one step: nothing to make up


@pytest.mark.parametrize("type_", [Type.Q4_K, Type.Q2_K, Type.IQ3_S, Type.IQ4_NL, Type.Q8_0], ids=lambda t: t.name)
@pytest.mark.parametrize(("m", "n_blocks"), [(96, 1), (20, 3)])
def test_the_loss_is_lower(type_: Type, m: int, n_blocks: int) -> None:
    g, x = covariances(m, n_blocks), some(1024, 256)
    covariance, rows = Covariance.of(x), Rows(g)
    w = (RNG.standard_normal((n_blocks * m, 256)) * 0.03).astype(np.float32)
    h = x.T.astype(np.float64) @ x
    with Encoder(2) as encoder:
        follow, plain = (
            gguf.quants.dequantize(encoder.encode(w, type_, Objective(None, covariance, outputs)), type_) - w
            for outputs in (rows, None)
        )
    before, after = (
        sum(loss(e[i * m : (i + 1) * m], g[i], h) for i in range(n_blocks)) for e in (plain, follow)
    )  # blocks do not meet
    assert after < (rows.share + 0.1) * before


def test_the_same_on_any_number_of_threads() -> None:
    rows, covariance = Rows(covariances(40, 4)), Covariance.of(some(900, 512))
    w = RNG.standard_normal((160, 512)).astype(np.float32)
    made = []
    for threads in (1, 3):
        with Encoder(threads) as encoder:
            made.append(encoder.encode(w, Type.Q3_K, Objective(None, covariance, rows)))
    np.testing.assert_array_equal(*made)


def test_sums_of_gradients() -> None:
    """By head, by part, and of all experts together; what follows no outputs is left alone."""
    arch: Any = SimpleNamespace(n_head=3)
    sums = OutputSums(arch)
    g = {role: [some(200, m) for _ in range(n)] for role, m, n in (
        ("attn_q", 36, 1), ("attn_k_b", 16, 3), ("ffn_down_exps", 24, 2), ("ffn_gate_exps", 24, 2)
    )}  # fmt: skip
    for role, parts in g.items():
        for part in reversed(range(len(parts))):
            sums.visit(role, part, parts[part])
    arrays = sums.arrays(10**9)
    expected = {
        "attn_q": [g["attn_q"][0][:, i : i + 12] for i in (0, 12, 24)],
        "attn_k_b": g["attn_k_b"],
        "ffn_down_exps": [np.concatenate(g["ffn_down_exps"])],
    }
    assert arrays.keys() == expected.keys()
    for role, blocks in expected.items():
        wanted = [b.T @ b / np.square(b).sum() * b.shape[1] for b in blocks]
        np.testing.assert_allclose(arrays[role].astype(np.float32), np.stack(wanted), rtol=2e-3, atol=1e-3)
    few = sums.arrays(100)["attn_q"].astype(np.float32)
    most = arrays["attn_q"].astype(np.float32)
    np.testing.assert_allclose(few[0].diagonal(), most[0].diagonal())
    assert np.abs(few[0, 0, 1]) < np.abs(most[0, 0, 1])


def test_outputs_of_a_layer() -> None:
    """A head's own, all experts' one; folds scale G; without gradients there is nothing to follow."""
    k_b, down = covariances(16, 2), covariances(24)
    scale = np.exp(RNG.normal(0, 1, (2, 16))).astype(np.float32)
    arrays = {"attn_k_b": k_b.astype(np.float16), "ffn_down_exps": down.astype(np.float16)}
    outputs = Outputs(arrays, {"attn_k_b": scale})
    assert outputs.rows("ffn_gate_exps", 0) is None and outputs.share("ffn_gate_exps") == 1
    assert outputs.rows("ffn_down_exps", 0) is outputs.rows("ffn_down_exps", 1) is not None
    second = outputs.rows("attn_k_b", 1)
    assert second is not None
    own = arrays["attn_k_b"][1].astype(np.float32) / np.outer(scale[1], scale[1])
    np.testing.assert_array_equal(second.order, Rows(own[None]).order)
    plain = Outputs(arrays)
    shares = [rows.share for rows in (plain.rows("attn_k_b", part) for part in (0, 1)) if rows is not None]
    assert plain.share("attn_k_b") == pytest.approx(np.mean(shares)) and len(shares) == 2
    for bad in (0, np.nan, np.inf):
        assert Outputs({"attn_q_a": np.full((1, 8, 8), bad, np.float16)}).rows("attn_q_a", 0) is None


def test_wrong_sizes_are_refused() -> None:
    covariance = Covariance.of(some(400, 256))
    with Encoder(1) as encoder, pytest.raises(ValueError, match="24 rows, expected 23"):
        encoder.encode(np.zeros((23, 256), np.float32), Type.Q4_K, Objective(None, covariance, Rows(covariances(24))))
