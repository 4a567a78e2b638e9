"""quantize.awq, evidence and calibrate: folds change nothing but the rounding, and pay where they can."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as Type
from support import calibrated
from support import checkpoints as make

import cext
from quantize.encode.encoder import Encoder
from quantize.measure.awq import EXPONENTS, GROUPS, Scales, Searcher, scale_of
from quantize.measure.calibrate import CHUNK_WINDOWS, FEW_TOKENS, SAMPLE_TOKENS, Inputs, Routed, Stream, SublayerStats
from quantize.measure.evidence import Evidence, n_parts
from quantize.source import tensors
from quantize.source.arch import Arch, parse
from quantize.source.checkpoint import Checkpoint
from quantize.source.corpus import WINDOW
from quantize.source.tensors import Tensor
from quantize.write.writer import Writer

CONFIGS = {"v2": make.V2_GROUPED, "lite": make.V2_LITE, "v3": {**make.V3, "num_nextn_predict_layers": 0}}
CONFIGS |= {"moe": make.MOE, "moe_shared": make.MOE_SHARED}


def read_layer(arch: Arch, checkpoint: Checkpoint, il: int) -> dict[str, np.ndarray]:
    return {t.role: tensors.read(arch, checkpoint, t) for t in tensors.layer_tensors(arch, il)}


def write_f32(path: Path, arch: Arch, values: dict[str, np.ndarray]) -> None:
    plan = tensors.model_tensors(arch)
    keys = {"general.architecture": arch.family.architecture, **arch.keys()}
    with Writer(path, path.with_suffix(".part"), keys, [(t.name, t.shape, Type.F32) for t in plan]) as writer:
        for tensor in plan:
            writer.append(tensor.name, values[tensor.name].astype(np.float32))
        writer.finish()
        writer.commit()


def folded(scales: Scales, tensor: Tensor, values: np.ndarray) -> np.ndarray:
    if n_parts(tensor) == 1:
        return scales.apply(tensor.role, 0, values)
    return np.stack([scales.apply(tensor.role, part, values[part]) for part in range(n_parts(tensor))])


FOLDS = [(name, group) for name in CONFIGS for group in ("all", *(g.name for g in GROUPS))]


ABSENT = {("lite", "q_a_norm"), ("moe_shared", "v_heads")}  # no q-LoRA; fewer values than columns
ABSENT |= {(name, group) for name in ("moe", "moe_shared") for group in ("q_a_norm", "kv_a_norm")}


@pytest.mark.parametrize(("name", "group"), [f for f in FOLDS if f not in ABSENT])
def test_folds_are_exact(tmp_path: Path, name: str, group: str) -> None:
    """Random scales from 1/8 to 8 in every fold: the model's float32 logits stay, to rounding."""
    arch = parse(CONFIGS[name])
    make.write_checkpoint(tmp_path / "hf", CONFIGS[name], dtype="F32")
    rng = np.random.default_rng(11)
    plain: dict[str, np.ndarray] = {}
    changed: dict[str, np.ndarray] = {}
    n_folds = 0
    with Checkpoint(tmp_path / "hf") as checkpoint:
        for tensor in tensors.model_tensors(arch):
            plain[tensor.name] = changed[tensor.name] = tensors.read(arch, checkpoint, tensor)
    for il in range(arch.n_layer):
        layer = {t.role: t for t in tensors.layer_tensors(arch, il)}
        scales = Scales()
        for fold in GROUPS:
            role = next((r for r in fold.targets if r in layer), None)
            if role and (name, fold.name) not in ABSENT and group in ("all", fold.name):
                shape = layer[role].shape[-1:] if role != "ffn_down_exps" else (arch.n_expert, arch.n_ff_expert)
                scales.fold(fold, layer, np.exp2(rng.uniform(-3, 3, shape)).astype(np.float32))
                n_folds += 1
        for tensor in layer.values():
            changed[tensor.name] = folded(scales, tensor, plain[tensor.name])
    moved = [n for n in plain if not np.array_equal(plain[n], changed[n])]
    assert len(moved) >= 2 * n_folds / len(GROUPS)
    write_f32(tmp_path / "plain.gguf", arch, plain)
    write_f32(tmp_path / "folded.gguf", arch, changed)
    ids = np.arange(3, 43, dtype=np.int32)
    logits = []
    for file in ("plain", "folded"):
        with cext.Model(tmp_path / f"{file}.gguf", threads=1) as model:
            logits.append(model.session(64, kv_type="f32").eval(ids, "all"))
    # A factor and its inverse add a few roundings of 2**-24 to every weight, and three layers some tens of products.
    np.testing.assert_allclose(logits[1], logits[0], rtol=0, atol=100 * 2**-23 * np.ptp(logits[0]))


def test_every_quantised_matrix_is_in_one_group() -> None:
    """Columns of all matrices are scaled once, but for k_b's (rows) and those outside the layers."""
    targets = [role for g in GROUPS for role in g.targets]
    assert len(targets) == len(set(targets))
    roles = {t.role for c in CONFIGS.values() for il in (0, 1) for t in tensors.layer_tensors(parse(c), il)}
    matrices = {r for r in roles if not r.endswith("_norm") and r not in ("exp_probs_b", "ffn_gate_inp", "attn_k_b")}
    assert set(targets) == matrices


@pytest.mark.parametrize("exponent", EXPONENTS)
def test_scales_are_tame(exponent: float) -> None:
    magnitude = np.concatenate([np.zeros(3), np.logspace(-6, 3, 50)]).astype(np.float32)
    scale = scale_of(magnitude, exponent)
    assert np.isfinite(scale).all() and (scale > 0).all()
    assert np.log(scale.astype(np.float64)).mean() == pytest.approx(0, abs=1e-5)
    assert (np.diff(scale[3:]) >= 0).all()
    np.testing.assert_array_equal(scale_of(np.zeros(4, np.float32), exponent), np.ones(4))


# The search, on one layer whose inputs are made up.


def made_up(config: dict[str, Any], folder: Path, outliers: bool) -> tuple[Evidence, dict[str, np.ndarray]]:
    """Layer 0 with inputs that have a few large channels, or none."""
    arch = parse(config)
    make.write_checkpoint(folder, config, dtype="F32")
    with Checkpoint(folder) as checkpoint:
        weights = read_layer(arch, checkpoint, 0)
    rng = np.random.default_rng(2)

    def inputs(n: int) -> Inputs:
        spread = np.where(np.arange(n) % 32 == 5, 30.0, 1.0) if outliers else np.ones(n)
        sample = (rng.standard_normal((256, n)) * spread).astype(np.float32)
        return Inputs(np.abs(sample).mean(0), np.square(sample).mean(0), sample)

    widths = {"attn_norm": arch.n_embd, "q_a_norm": arch.q_lora_rank, "kv_a_norm": arch.kv_lora_rank}
    widths |= {"attn_heads": arch.n_head * arch.v_dim, "ffn_norm": arch.n_embd, "dense_hidden": arch.n_ff}
    stats = SublayerStats({tap: inputs(n) for tap, n in widths.items()}, None)
    layer = {t.role: t for t in tensors.layer_tensors(arch, 0)}

    def read(tensor: Tensor, part: int) -> np.ndarray:
        return weights[tensor.role][part] if n_parts(tensor) > 1 else weights[tensor.role]

    return Evidence(arch, layer, stats, read), weights


DENSE = {**make.V2, "hidden_size": 128, "q_lora_rank": 96, "kv_lora_rank": 64, "intermediate_size": 128}


@pytest.mark.parametrize("outliers", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_search_keeps_what_pays(tmp_path: Path, outliers: bool, weighted: bool) -> None:
    evidence, _ = made_up(DENSE, tmp_path, outliers)
    evidence.weighted = weighted
    types = dict.fromkeys(evidence.tensors, Type.Q4_0)
    with Encoder(1) as encoder:
        scales, results = Searcher(evidence, types, evidence._read, encoder).run(0)
    by_name = {r.group: r for r in results}
    assert set(by_name) == {"attn_norm", "q_a_norm", "kv_a_norm", "v_heads", "ffn_norm", "dense_up"}
    assert all(r.error_after < r.error_before for r in results if r.kept)
    kept = {r.group for r in results if r.kept}
    if outliers and not weighted:
        assert kept == set(by_name) and all(r.error_after < 0.8 * r.error_before for r in results)
    if not outliers:  # equal channels have nothing to win but the luck of another rounding
        assert all(r.error_after > 0.9 * r.error_before for r in results)
    touched = {role for g in GROUPS if g.name in kept for role in (*g.targets, g.norm, *g.rows, *g.rows_too) if role}
    assert set(scales.columns) | set(scales.rows) == touched & set(evidence.tensors)


def test_float_targets_are_left_alone(tmp_path: Path) -> None:
    evidence, _ = made_up(DENSE, tmp_path, outliers=True)
    with Encoder(1) as encoder:
        scales, results = Searcher(evidence, dict.fromkeys(evidence.tensors, Type.F16), evidence._read, encoder).run(0)
    assert results == [] and scales.columns == {}


# Statistics.


class Plain:
    """Stands in for a layer of the engine: taps that are simple functions of x."""

    def __init__(self, arch: Arch) -> None:
        self.arch = arch
        self.calls: list[int] = []

    def forward(self, x: np.ndarray, n_seq: int, tap: Iterable[str] = ()) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        self.calls.append(n_seq)
        return x + 1, {name: self.tapped(name, x) for name in tap}

    def tapped(self, name: str, x: np.ndarray) -> np.ndarray:
        a, n = self.arch, len(x)
        chosen = (np.abs(x[:, :1] * 1000).astype(np.int32) + np.arange(a.n_expert_used, dtype=np.int32)) % a.n_expert
        if name == "experts":
            return chosen
        if name == "expert_weights":
            return np.resize(np.abs(x), (n, a.n_expert_used)).astype(np.float32)
        if name == "expert_hidden":
            wide = x[:, None, :1] * (1 + chosen[..., None]) * np.arange(1, a.n_ff_expert + 1)
            return wide.astype(np.float32)
        widths = {"attn_norm": a.n_embd, "ffn_norm": a.n_embd, "q_a_norm": a.q_lora_rank, "kv_a_norm": a.kv_lora_rank}
        widths |= {"attn_heads": a.n_head * a.v_dim, "dense_hidden": a.n_ff}
        widths |= {"shared_hidden": a.n_expert_shared * a.n_ff_expert}
        return np.resize(x * len(name), (n, widths[name])).astype(np.float32)


@pytest.mark.parametrize("n_windows", [2, 8, 19])
@pytest.mark.parametrize("il", [0, 1])
def test_statistics(n_windows: int, il: int) -> None:
    """Sums over chunks equal sums over everything; x moves on; the sample is tokens that all taps agree on."""
    arch = parse(make.V2)
    rng = np.random.default_rng(1)
    x = rng.standard_normal((n_windows * WINDOW, arch.n_embd)).astype(np.float32)
    stream, layer = Stream(arch, x.copy()), Plain(arch)
    done: list[float] = []
    attention = stream.attention(layer, done.append)
    np.testing.assert_array_equal(stream.x, x + 1)
    assert sum(layer.calls) == n_windows and max(layer.calls) <= CHUNK_WINDOWS and done[-1] == 1.0
    stats = stream.feed_forward(layer, il, done.append)
    np.testing.assert_array_equal(stream.x, (x + 1) + 1)
    assert sum(layer.calls) == 2 * n_windows and done[-1] == 1.0 and attention.routed is None
    tapped = {name: [] for name in (*attention.inputs, *stats.inputs, "experts", "expert_hidden")}
    for start in range(0, len(x), CHUNK_WINDOWS * WINDOW):
        for name, parts in tapped.items():
            fed = x if name in attention.inputs else x + 1
            parts.append(layer.tapped(name, fed[start : start + CHUNK_WINDOWS * WINDOW]))
    whole = {name: np.concatenate(parts).astype(np.float64) for name, parts in tapped.items()}
    for name, inputs in (attention.inputs | stats.inputs).items():
        np.testing.assert_allclose(inputs.mean_abs, np.abs(whole[name]).mean(0), rtol=1e-5)
        np.testing.assert_allclose(inputs.mean_square, np.square(whole[name]).mean(0), rtol=1e-5)
        assert len(inputs.sample) <= SAMPLE_TOKENS and len(inputs.sample) >= min(len(x), SAMPLE_TOKENS) // 2
    assert (stats.routed is None) == (il == 0)
    if stats.routed is None:
        return
    chosen = whole["experts"].astype(int)
    assert stats.routed.counts.sum() == chosen.size
    for e in range(arch.n_expert):
        mine = chosen == e
        assert stats.routed.counts[e] == mine.sum()
        if mine.any():
            hidden, fed = whole["expert_hidden"][mine], whole["ffn_norm"][mine.any(1)]
            np.testing.assert_allclose(stats.routed.hidden_square[e], np.square(hidden).mean(0), rtol=1e-5)
            np.testing.assert_allclose(stats.routed.hidden_abs[e], np.abs(hidden).mean(0), rtol=1e-5)
            np.testing.assert_allclose(stats.routed.input_square[e], np.square(fed).mean(0), rtol=1e-4)
    rows = stats.inputs["ffn_norm"].sample
    assert stats.routed.sample_hidden.shape == (len(rows), arch.n_expert_used, arch.n_ff_expert)
    assert stats.routed.sample_experts.shape == (len(rows), arch.n_expert_used)


def test_stream_is_the_model(tmp_path: Path) -> None:
    """Layers run one by one on the checkpoint's arrays give what the whole model gives."""
    config = CONFIGS["v2"]
    arch = parse(config)
    make.write_checkpoint(tmp_path / "hf", config)
    ids = np.random.default_rng(3).integers(0, 256, 2 * WINDOW).astype(np.int32)
    keys = {"general.architecture": arch.family.architecture, **arch.keys()}
    with Checkpoint(tmp_path / "hf") as checkpoint:
        plan = tensors.model_tensors(arch)
        write_f32(tmp_path / "m.gguf", arch, {t.name: tensors.read(arch, checkpoint, t) for t in plan})
        stream = Stream(arch, checkpoint.read_f32("model.embed_tokens.weight")[ids])
        for il in range(arch.n_layer):
            weights = tensors.Weights(arch, checkpoint, tensors.layer_tensors(arch, il)).arrays
            calibrated.layer(stream, keys, il, weights)
        final = stream.final_inputs(checkpoint.read_f32("model.norm.weight"))
    squares = []
    with cext.Model(tmp_path / "m.gguf", threads=1) as model:
        for window in ids.reshape(2, WINDOW):
            taps = cext.Tap({"l_out-2": None, "result_norm": None})
            model.session(WINDOW, kv_type="f32").eval(window, "all", tap=taps)
            squares.append(np.square(taps["result_norm"].astype(np.float64)))
            expected = taps["l_out-2"]
    got = stream.x[WINDOW:]
    assert np.abs(got - expected).max() < 1e-4 * np.ptp(expected)
    np.testing.assert_allclose(final.mean_square, np.concatenate(squares).mean(0), rtol=1e-3)


def test_starved_experts_are_blended(tmp_path: Path) -> None:
    """Nothing of its own: the layer's. FEW_TOKENS or more: its own. Between: both."""
    config = make.V2
    arch = parse(config)
    make.write_checkpoint(tmp_path, config, dtype="F32")
    rng = np.random.default_rng(4)
    x = rng.standard_normal((64, arch.n_embd)).astype(np.float32)
    counts = np.array([0, FEW_TOKENS // 4, FEW_TOKENS, 10 * FEW_TOKENS, 0, 0, 0, 0])
    e, f, k = arch.n_expert, arch.n_ff_expert, arch.n_expert_used
    own_input = np.full((e, arch.n_embd), 7.0, np.float32) * (counts > 0)[:, None]
    own_hidden = np.full((e, f), 3.0, np.float32) * (counts > 0)[:, None]
    routed = Routed(
        counts, own_input, own_hidden, own_hidden, np.full((64, k), 3, np.int32), np.ones((64, k, f), np.float32)
    )
    shared = Inputs(np.abs(x).mean(0), np.square(x).mean(0), x)
    with Checkpoint(tmp_path) as checkpoint:
        layer = {t.role: t for t in tensors.layer_tensors(arch, 1)}
        evidence = Evidence(
            arch,
            layer,
            SublayerStats({"ffn_norm": shared}, routed),
            lambda tensor, part: checkpoint.read_f32(tensor.sources[part]),
        )
        gate = x @ checkpoint.read_f32(layer["ffn_gate_exps"].sources[1]).T.astype(np.float64)
        up = x @ checkpoint.read_f32(layer["ffn_up_exps"].sources[1]).T.astype(np.float64)
        silent = evidence.importance("ffn_down_exps", 0)
        np.testing.assert_array_equal(evidence.importance("ffn_up_exps", 0), shared.mean_square)
        assert silent is not None and np.isfinite(silent).all() and (silent > 0).all()
        expected = np.square(gate / (1 + np.exp(-gate)) * up).mean(0)
        np.testing.assert_allclose(evidence.importance("ffn_down_exps", 1), 0.25 * 3 + 0.75 * expected, rtol=1e-4)
        np.testing.assert_allclose(
            evidence.importance("ffn_gate_exps", 1), 0.25 * 7 + 0.75 * shared.mean_square, rtol=1e-6
        )
        for part in (2, 3):
            np.testing.assert_array_equal(evidence.importance("ffn_gate_exps", part), own_input[part])
            np.testing.assert_array_equal(evidence.importance("ffn_down_exps", part), own_hidden[part])
        assert len(evidence.sample("ffn_down_exps", 0)) == 0 and len(evidence.sample("ffn_up_exps", 3)) == 64


def test_key_rows_weigh_by_their_queries(tmp_path: Path) -> None:
    """k_b's columns meet the queries: q_nope = W_q x, per head."""
    evidence, weights = made_up(DENSE, tmp_path, outliers=True)
    arch = evidence.arch
    q = (evidence.sample("attn_q_b", 0).astype(np.float64) @ weights["attn_q_b"].T).reshape(-1, arch.n_head, 24)
    for head in range(arch.n_head):
        expected = np.square(q[:, head, : arch.nope]).mean(0)
        np.testing.assert_allclose(evidence.importance("attn_k_b", head), expected, rtol=1e-3)
