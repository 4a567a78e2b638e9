"""The covariances of a layer's inputs: collected as the tokens pass, made per expert when it is encoded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest
from support import calibrated
from support import checkpoints as make

import cext
from quantize.base import blas
from quantize.measure.awq import Scales
from quantize.measure.calibrate import Stream, SublayerStats
from quantize.measure.evidence import PRIOR_TOKENS, Evidence, bundles, n_parts
from quantize.source import tensors
from quantize.source.arch import Arch, parse
from quantize.source.checkpoint import Checkpoint
from quantize.source.corpus import WINDOW
from quantize.source.tensors import PartReader, Tensor

IL = 1
BF16 = 2.0**-8  # of a value: how far its rounding to bfloat16 may be, twice


@dataclass(frozen=True)
class Case:
    arch: Arch
    layer: dict[str, Tensor]
    taps: dict[str, np.ndarray]  # of all tokens
    stats: SublayerStats
    read: PartReader

    def evidence(self, stats: SublayerStats | None = None) -> Evidence:
        return Evidence(self.arch, self.layer, stats or self.stats, self.read)


@pytest.fixture(scope="module", params=["grouped", "lite"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    config = {"grouped": make.V2_GROUPED, "lite": make.V2_LITE}[request.param]
    arch, folder = parse(config), tmp_path_factory.mktemp("hf")
    make.write_checkpoint(folder, config, dtype="F32")
    x = np.random.default_rng(0).standard_normal((6 * WINDOW, arch.n_embd)).astype(np.float32)
    names = ["attn_norm", "kv_a_norm", "attn_heads", "ffn_norm", "experts", "expert_weights", "expert_hidden"]
    names += ["shared_hidden"] if arch.n_expert_shared else []
    names += ["q_a_norm"] if arch.q_lora_rank else []
    with Checkpoint(folder) as checkpoint:
        layer = {t.role: t for t in tensors.layer_tensors(arch, IL)}
        weights = tensors.Weights(arch, checkpoint, layer.values()).arrays
        keys = {"general.architecture": "deepseek2", **arch.keys()}
        with cext.Layer(keys, IL, weights, 1) as engine:
            _, taps = engine.forward(x, 6, names)
        stats = calibrated.layer(Stream(arch, x.copy()), keys, IL, weights, covariances=True)
        yield Case(arch, layer, taps, stats, PartReader(arch, checkpoint))


def test_of_all_tokens(case: Case) -> None:
    for tap, inputs in case.stats.inputs.items():
        x = case.taps[tap].astype(np.float64)
        assert inputs.covariance is not None
        (block,) = inputs.covariance.blocks
        np.testing.assert_allclose(block, x.T @ x, rtol=0, atol=1e-5 * np.square(x).sum(0).max())


def test_of_an_expert(case: Case) -> None:
    """Tokens that chose it, each weighed as the router weighs it."""
    routed = case.stats.routed
    assert routed is not None and routed.rows is not None
    hidden = case.taps["expert_hidden"].reshape(*case.taps["experts"].shape, -1)
    for expert in range(case.arch.n_expert):
        token, slot = np.nonzero(case.taps["experts"] == expert)
        weight = case.taps["expert_weights"][token, slot][:, None]
        for got, rows in (
            (routed.rows.inputs_of(expert), case.taps["ffn_norm"][token]),
            (routed.rows.hidden_of(expert), hidden[token, slot]),
        ):
            np.testing.assert_allclose(got, rows * weight, rtol=BF16, atol=1e-30)


def test_every_matrix_has_one(case: Case) -> None:
    evidence = case.evidence()
    for tensor in case.layer.values():
        if tensor.is_matrix:
            for part in range(n_parts(tensor)):
                covariance = evidence.covariance(tensor.role, part)
                assert covariance is not None and covariance.n == tensor.shape[-1]
                assert covariance.sweeps is not None


def test_queries_feed_k_b(case: Case) -> None:
    evidence = case.evidence()
    covariance = evidence.covariance("attn_k_b", 1)
    assert covariance is not None
    squares = covariance.blocks[0].diagonal() / len(case.stats.inputs["attn_norm"].sample)
    np.testing.assert_allclose(squares, evidence.importance("attn_k_b", 1), rtol=1e-4)


def test_an_expert_that_no_token_reaches(case: Case) -> None:
    """Its inputs are the layer's; its hidden channels what the layer's inputs would have made of them."""
    routed = case.stats.routed
    assert routed is not None and routed.rows is not None
    elsewhere = np.where(routed.rows.experts == 0, 1, routed.rows.experts)
    counts = routed.counts.copy()
    counts[0] = 0
    stats = replace(case.stats, routed=replace(routed, counts=counts, rows=replace(routed.rows, experts=elsewhere)))
    evidence = case.evidence(stats)
    whole = case.stats.inputs["ffn_norm"].covariance
    inputs, hidden = evidence.covariance("ffn_up_exps", 0), evidence.covariance("ffn_down_exps", 0)
    assert whole is not None and inputs is not None and hidden is not None
    np.testing.assert_allclose(inputs.blocks[0] / inputs.mean, whole.blocks[0] / whole.mean, rtol=1e-5, atol=1e-6)
    assert hidden.mean > 0 and hidden.sweeps is not None and inputs.sweeps is not None


def test_a_rare_expert_is_drawn_to_the_layer(case: Case) -> None:
    routed = case.stats.routed
    assert routed is not None and routed.rows is not None
    n = case.arch.n_embd
    counts = routed.counts.copy()
    counts[2] = PRIOR_TOKENS * n  # as many as the prior
    evidence = case.evidence(replace(case.stats, routed=replace(routed, counts=counts)))
    whole, mixed = case.stats.inputs["ffn_norm"].covariance, evidence.covariance("ffn_gate_exps", 2)
    own = routed.rows.inputs_of(2).astype(np.float64)
    own = own.T @ own
    assert whole is not None and mixed is not None
    share = PRIOR_TOKENS * n / (PRIOR_TOKENS * n + int(counts[2]))
    expected = (1 - share) * own / own.trace() + share * whole.blocks[0] / whole.blocks[0].trace()
    np.testing.assert_allclose(mixed.blocks[0] / mixed.blocks[0].trace(), expected, rtol=0, atol=1e-4 * expected.max())


def test_parts_come_in_order(case: Case) -> None:
    """Every part once, a tensor's own in order, and an expert's gate and up together, with one covariance."""
    seen: dict[str, list[int]] = {}
    evidence, last = case.evidence(), None
    every = (of for some in bundles(list(case.layer.values())) for bundle in some for of in bundle)
    for tensor, part in every:
        seen.setdefault(tensor.role, []).append(part)
        if tensor.role == "ffn_gate_exps":
            last = evidence.covariance(tensor.role, part)
        elif tensor.role == "ffn_up_exps":
            assert evidence.covariance(tensor.role, part) is last
    assert seen == {role: list(range(n_parts(tensor))) for role, tensor in case.layer.items()}


def test_none_where_none_was_collected(case: Case) -> None:
    bare = {tap: replace(inputs, covariance=None) for tap, inputs in case.stats.inputs.items()}
    evidence = case.evidence(replace(case.stats, inputs=bare))
    assert all(
        evidence.covariance(role, 0) is None for role in ("attn_k_b", "attn_output", "ffn_up_exps", "ffn_down_exps")
    )


def test_folds_share_a_scaled_one(case: Case) -> None:
    evidence, scales = case.evidence(), Scales()
    columns = np.exp(np.random.default_rng(1).normal(size=case.arch.n_embd)).astype(np.float32)
    scales.columns |= {"ffn_gate_exps": columns, "ffn_up_exps": columns}
    plain = evidence.covariance("ffn_gate_exps", 0)
    assert plain is not None
    gate, up = (scales.covariance(role, 0, plain) for role in ("ffn_gate_exps", "ffn_up_exps"))
    assert gate is up and gate is not None
    np.testing.assert_allclose(gate.blocks[0], plain.blocks[0] / np.outer(columns, columns), rtol=1e-5)
    assert scales.covariance("attn_output", 0, plain) is plain


@pytest.mark.parametrize("m", (1, 512, 513, 1300))
def test_product_in_pieces(m: int) -> None:
    """The same bits as each piece on one thread, whatever the cores; and the product."""
    rng = np.random.default_rng(m)
    a, b = rng.standard_normal((m, 700), np.float32), rng.standard_normal((700, 300), np.float32)
    got = blas.product(a, b)
    with blas.one_thread():
        expected = np.concatenate([a[i : i + blas.PIECE] @ b for i in range(0, m, blas.PIECE)])
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_allclose(got, a.astype(np.float64) @ b, rtol=0, atol=700 * 2**-23 * 16)
