"""quantize.quantize: every tensor and key of a checkpoint, hostile checkpoints, and a run that is cut short."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from support import checkpoints as make
from support import llama

import cext
import quantize
from quantize import CheckpointError, Options, Progress, QuantizeError, UnsupportedError, job

# Rows that 256 divides, so that K-quants are really used; small enough to calibrate in a second.
WIDE = {
    **make.V2,
    "num_hidden_layers": 2,
    "hidden_size": 256,
    "q_lora_rank": 256,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 32,
    "v_head_dim": 64,
    "intermediate_size": 256,
    "moe_intermediate_size": 256,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
}
WIDE_V3 = {
    **make.V3,
    **{k: WIDE[k] for k in WIDE if k.endswith(("size", "rank", "dim", "experts", "tok", "layers"))},
    "n_group": 1,
    "topk_group": 1,
}
FLOATS = Options(type="f32", threads=1, evaluate=False)


def expected_tensors(config: dict[str, Any], weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A second, independent mapping: checkpoint names to GGUF's, straight from the published converter's rules."""
    names = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.q_a_proj": "attn_q_a",
        "self_attn.q_a_layernorm": "attn_q_a_norm",
        "self_attn.q_b_proj": "attn_q_b",
        "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
        "self_attn.kv_a_layernorm": "attn_kv_a_norm",
        "self_attn.o_proj": "attn_output",
        "mlp.gate": "ffn_gate_inp",
    }
    for kind in ("gate", "up", "down"):
        names[f"mlp.{kind}_proj"] = f"ffn_{kind}"
        names[f"mlp.shared_experts.{kind}_proj"] = f"ffn_{kind}_shexp"
    tensors = {
        "token_embd.weight": weights["model.embed_tokens.weight"],
        "output_norm.weight": weights["model.norm.weight"],
    }
    if "lm_head.weight" in weights:
        tensors["output.weight"] = weights["lm_head.weight"]
    nope, v, h = config["qk_nope_head_dim"], config["v_head_dim"], config["num_attention_heads"]
    for il in range(config["num_hidden_layers"]):
        hf, blk = f"model.layers.{il}.", f"blk.{il}."
        for theirs, ours in names.items():
            if f"{hf}{theirs}.weight" in weights:
                tensors[f"{blk}{ours}.weight"] = weights[f"{hf}{theirs}.weight"]
        kv_b = weights[f"{hf}self_attn.kv_b_proj.weight"].reshape(h, nope + v, -1)
        tensors[f"{blk}attn_k_b.weight"] = kv_b[:, :nope].swapaxes(1, 2)
        tensors[f"{blk}attn_v_b.weight"] = kv_b[:, nope:]
        if f"{hf}mlp.gate.e_score_correction_bias" in weights:
            tensors[f"{blk}exp_probs_b.bias"] = weights[f"{hf}mlp.gate.e_score_correction_bias"]
        if f"{hf}mlp.experts.0.up_proj.weight" in weights:
            for kind in ("gate", "up", "down"):
                parts = [weights[f"{hf}mlp.experts.{e}.{kind}_proj.weight"] for e in range(config["n_routed_experts"])]
                tensors[f"{blk}ffn_{kind}_exps.weight"] = np.stack(parts)
    return tensors


KEYS: dict[str, Any] = {
    "general.architecture": "deepseek2",
    "general.file_type": 0,
    "deepseek2.block_count": 3,
    "deepseek2.context_length": 512,
    "deepseek2.embedding_length": 64,
    "deepseek2.feed_forward_length": 96,
    "deepseek2.vocab_size": 320,
    "deepseek2.attention.head_count": 4,
    "deepseek2.attention.head_count_kv": 1,
    "deepseek2.attention.layer_norm_rms_epsilon": 1e-6,
    "deepseek2.attention.q_lora_rank": 48,
    "deepseek2.attention.kv_lora_rank": 32,
    "deepseek2.attention.key_length": 40,
    "deepseek2.attention.value_length": 32,
    "deepseek2.attention.key_length_mla": 24,
    "deepseek2.attention.value_length_mla": 16,
    "deepseek2.rope.dimension_count": 8,
    "deepseek2.rope.freq_base": 10000.0,
    "deepseek2.rope.scaling.type": "yarn",
    "deepseek2.rope.scaling.factor": 4.0,
    "deepseek2.rope.scaling.original_context_length": 128,
    "deepseek2.rope.scaling.yarn_log_multiplier": 0.0707,
    "deepseek2.leading_dense_block_count": 1,
    "deepseek2.expert_count": 8,
    "deepseek2.expert_used_count": 3,
    "deepseek2.expert_shared_count": 2,
    "deepseek2.expert_feed_forward_length": 32,
    "deepseek2.expert_group_count": 1,
    "deepseek2.expert_group_used_count": 1,
    "deepseek2.expert_weights_scale": 1.0,
    "deepseek2.expert_weights_norm": False,
    "deepseek2.expert_gating_func": 1,
    "tokenizer.ggml.model": "gpt2",
}
ARCHITECTURES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "v2": (make.V2, {}),
    "grouped": (
        make.V2_GROUPED,
        {"expert_group_count": 4, "expert_group_used_count": 2, "expert_weights_scale": 16.0},
    ),
    "lite": (make.V2_LITE, {"attention.q_lora_rank": None}),
    "v3": (
        make.V3,
        {
            "expert_group_count": 4,
            "expert_group_used_count": 2,
            "expert_weights_scale": 2.5,
            "expert_weights_norm": True,
            "expert_gating_func": 2,
            "expert_shared_count": 1,
        },
    ),
    "no yarn, tied, all dense but one": (
        {**make.V2, "rope_scaling": None, "tie_word_embeddings": True, "first_k_dense_replace": 2},
        {
            "leading_dense_block_count": 2,
            **{f"rope.scaling.{k}": None for k in ("type", "factor", "original_context_length", "yarn_log_multiplier")},
        },
    ),
    # Greedy routing ignores groups: no engine may be told of any.
    "greedy with groups in the config": ({**make.V2, "n_group": 4, "topk_group": 2}, {}),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize(("dtype", "n_shards"), [("BF16", 1), ("F32", 3), ("F16", 2), ("F8_E4M3", 2)])
def test_every_tensor_and_key(tmp_path: Path, name: str, dtype: str, n_shards: int) -> None:
    config, changed = ARCHITECTURES[name]
    weights = make.write_checkpoint(tmp_path / "hf", config, dtype=dtype, n_shards=n_shards)
    quantize.quantize(tmp_path / "hf", tmp_path / "m.gguf", FLOATS)
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    expected = expected_tensors(config, weights)
    assert {t.name for t in reader.tensors} == set(expected)
    for tensor in reader.tensors:
        assert tuple(tensor.shape[::-1]) == expected[tensor.name].shape, tensor.name
        np.testing.assert_array_equal(
            tensor.data.reshape(expected[tensor.name].shape), expected[tensor.name], err_msg=tensor.name
        )
    for key, value in {**KEYS, **{f"deepseek2.{k}": v for k, v in changed.items()}}.items():
        field = reader.fields.get(key)
        got = field.contents() if field else None
        assert got == (pytest.approx(value, rel=1e-7) if isinstance(value, float) else value), key


def test_the_name_is_the_repository_s(tmp_path: Path) -> None:
    """Hugging Face's cache keeps a checkpoint in models--OWNER--NAME/snapshots/COMMIT."""
    folder = tmp_path / "models--deepseek-ai--DeepSeek-V2-Lite" / "snapshots" / "0f2a"
    make.write_checkpoint(folder, make.V2)
    quantize.quantize(folder, tmp_path / "m.gguf", FLOATS)
    assert cext.Gguf(tmp_path / "m.gguf").metadata["general.name"] == "DeepSeek-V2-Lite"


def test_multi_token_prediction_layers_are_left_out_and_said_so(tmp_path: Path) -> None:
    make.write_checkpoint(tmp_path / "hf", make.V3)
    report = quantize.quantize(tmp_path / "hf", tmp_path / "m.gguf", FLOATS)
    assert report.left_out and all(name.startswith("model.layers.3.") for name in report.left_out)
    assert any("multi-token prediction" in note for note in report.notes)
    assert not any("blk.3." in t.name for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors)


@pytest.mark.parametrize("type_", ["f16", "bf16", "q8_0"])
def test_types_that_need_no_calibration(tmp_path: Path, type_: str) -> None:
    weights = make.write_checkpoint(tmp_path / "hf", make.V2, dtype="F32")
    report = quantize.quantize(tmp_path / "hf", tmp_path / "m.gguf", Options(type=type_, threads=1))
    assert report.calibration_tokens == 0 and report.folds == ()
    file = cext.Gguf(tmp_path / "m.gguf")
    bound = {"f16": 2**-11, "bf16": 2**-8, "q8_0": 1 / 127}[type_]
    for name, values in expected_tensors(make.V2, weights).items():
        exact = values.ndim < 2 or "ffn_gate_inp" in name
        scale = np.abs(values).max(-1, keepdims=True) if type_ == "q8_0" else np.abs(values)
        error = np.abs(file.read(name) - values)
        assert (error <= (0 if exact else scale * bound + 2**-24)).all(), name


def config_with(**changes: Any) -> dict[str, Any]:
    return {k: v for k, v in {**make.V2, **changes}.items() if v != "remove"}


YARN = make.V2["rope_scaling"]
REFUSED_CONFIGS: dict[str, tuple[dict[str, Any], type[QuantizeError], str]] = {
    "llama": (
        config_with(model_type="llama", architectures=["LlamaForCausalLM"]),
        UnsupportedError,
        "LlamaForCausalLM",
    ),
    "deepseek v1": (config_with(model_type="deepseek"), UnsupportedError, "mscale_all_dim"),
    "no model type": (config_with(model_type="remove", architectures="remove"), UnsupportedError, "None"),
    "attention bias": (config_with(attention_bias=True), UnsupportedError, "attention_bias"),
    "every second layer": (config_with(moe_layer_freq=2), UnsupportedError, "moe_layer_freq"),
    "gelu": (config_with(hidden_act="gelu"), UnsupportedError, "hidden_act"),
    "halves rotated": (config_with(rope_interleave=False), UnsupportedError, "rope_interleave"),
    "grouped queries": (config_with(num_key_value_heads=2), UnsupportedError, "num_key_value_heads"),
    "V2 renormalised": (config_with(norm_topk_prob=True), UnsupportedError, "norm_topk_prob"),
    "unknown scores": (config_with(scoring_func="relu"), UnsupportedError, "scoring_func"),
    "unknown routing": (config_with(topk_method="best"), UnsupportedError, "topk_method"),
    "linear rope": (config_with(rope_scaling={"type": "linear", "factor": 2.0}), UnsupportedError, "linear"),
    "unequal mscale": (config_with(rope_scaling={**YARN, "mscale": 1.0}), UnsupportedError, "equal"),
    "no mscale_all_dim": (config_with(rope_scaling={**YARN, "mscale_all_dim": None}), UnsupportedError, "equal"),
    "yarn without factor": (config_with(rope_scaling={**YARN, "factor": None}), CheckpointError, "factor"),
    "rope is text": (config_with(rope_scaling="yarn"), CheckpointError, "rope_scaling"),
    "no hidden size": (config_with(hidden_size="remove"), CheckpointError, "hidden_size"),
    "negative layers": (config_with(num_hidden_layers=-1), CheckpointError, "num_hidden_layers"),
    "layers as text": (config_with(num_hidden_layers="3"), CheckpointError, "num_hidden_layers"),
    "boolean vocabulary": (config_with(vocab_size=True), CheckpointError, "vocab_size"),
    "enormous": (config_with(hidden_size=1 << 40), CheckpointError, "hidden_size"),
    "eps of zero": (config_with(rms_norm_eps=0), CheckpointError, "rms_norm_eps"),
    "groups that do not divide": (
        config_with(topk_method="group_limited_greedy", n_group=3, topk_group=1),
        CheckpointError,
        "3 of 8 experts",
    ),
    "more experts than groups hold": (
        config_with(topk_method="group_limited_greedy", n_group=4, topk_group=1),
        CheckpointError,
        "cannot be chosen",
    ),
    "config of another model": (config_with(hidden_size=128), CheckpointError, "config.json makes it"),
    "one layer too many": (config_with(num_hidden_layers=4), CheckpointError, "missing"),
    "one layer too few": (config_with(num_hidden_layers=2), UnsupportedError, "has no place"),
    "untied head expected elsewhere": (config_with(q_lora_rank=None), CheckpointError, "q_proj.*missing"),
}


@pytest.mark.parametrize("case", REFUSED_CONFIGS)
def test_refused_configs(tmp_path: Path, case: str) -> None:
    config, kind, expected = REFUSED_CONFIGS[case]
    make.write_checkpoint(tmp_path / "hf", make.V2)
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    with pytest.raises(kind, match=expected) as error:
        quantize.quantize(tmp_path / "hf", tmp_path / "m.gguf", FLOATS)
    assert "\n" not in str(error.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]


def test_a_tensor_with_no_place(tmp_path: Path) -> None:
    weights = make.random_weights(make.V2)
    weights["model.layers.1.self_attn.q_a_proj.lora_A.weight"] = np.ones((4, 64), np.float32)
    make.write_checkpoint(tmp_path / "hf", make.V2, weights)
    with pytest.raises(UnsupportedError, match="lora_A"):
        quantize.quantize(tmp_path / "hf", tmp_path / "m.gguf", FLOATS)


@pytest.mark.parametrize("type_", ["f16", "q4_k_m"])
@pytest.mark.parametrize("name", ["model.embed_tokens", "model.layers.1.mlp.experts.3.up_proj", "model.norm"])
def test_nan_in_a_shard(tmp_path: Path, type_: str, name: str) -> None:
    weights = make.random_weights(WIDE)
    weights[f"{name}.weight"].reshape(-1)[3] = np.nan
    with np.errstate(all="ignore"):
        make.write_checkpoint(tmp_path / "hf", WIDE, weights, dtype="F32")
    (tmp_path / "text.txt").write_text("a calibration text. " * 400)
    options = Options(type=type_, threads=1, calibration=(tmp_path / "text.txt",), awq=False)
    with pytest.raises(CheckpointError, match=rf"{name}.*not finite"):
        quantize.quantize(tmp_path / "hf", tmp_path / "m.gguf", options)
    assert not (tmp_path / "m.gguf").exists()


def test_a_value_past_float16_names_its_tensor(tmp_path: Path) -> None:
    weights = make.random_weights(make.V2)
    weights["model.layers.1.self_attn.o_proj.weight"][0, 0] = 1e6
    make.write_checkpoint(tmp_path / "hf", make.V2, weights, dtype="F32")
    with pytest.raises(QuantizeError, match=r"blk\.1\.attn_output\.weight.*float16"):
        quantize.quantize(tmp_path / "hf", tmp_path / "m.gguf", Options(type="f16", threads=1))


@pytest.mark.parametrize("threads", [0, -1])
def test_threads_are_checked(threads: int) -> None:
    with pytest.raises(QuantizeError, match="threads"):
        Options(threads=threads)


LLAMA_CPP_RUNS = {
    "lite": ({**make.V2_LITE, "num_hidden_layers": 27}, "BF16"),  # it knows models without q-LoRA by their 27 layers
    "v2": (make.V2, "F16"),
    "v3": ({**make.V3, "num_nextn_predict_layers": 0}, "F8_E4M3"),
}


@pytest.mark.parametrize("name", LLAMA_CPP_RUNS)
def test_files_run_in_llama_cpp(tmp_path: Path, name: str) -> None:
    """The same logits from the same file, by an engine that reads the keys and tensors in its own way."""
    config, dtype = LLAMA_CPP_RUNS[name]
    make.write_checkpoint(tmp_path / "hf", config, dtype=dtype)
    quantize.quantize(tmp_path / "hf", tmp_path / "m.gguf", FLOATS)
    ids = np.random.default_rng(8).integers(3, 250, 40).astype(np.int32)
    theirs = llama.logits(tmp_path / "m.gguf", ids)
    with cext.Model(tmp_path / "m.gguf", threads=1) as model:
        ours = model.session(64, kv_type="f32").eval(ids, "all")
    assert np.ptp(theirs) > 1
    # float32 on both sides, sums in other orders: 1e-6 as measured; a wrong key or row is off by 0.1
    assert np.abs(ours - theirs).max() < 1e-5 * np.ptp(theirs)


# Calibrated runs.


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibration text of a few windows."""
    return make.write_text(tmp_path_factory.mktemp("text") / "text.txt", 1200)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wide") / "hf"
    make.write_checkpoint(folder, WIDE)
    return folder


def test_calibrated_run(tmp_path: Path, wide: Path, text: Path) -> None:
    steps: list[Progress] = []
    options = Options(type="q3_k_m", threads=2, calibration=(text,), max_tokens=2048, awq=True)
    report = quantize.quantize(wide, tmp_path / "m.gguf", options, steps.append)

    file = cext.Gguf(tmp_path / "m.gguf")
    assert report.nbytes == (tmp_path / "m.gguf").stat().st_size
    assert report.bits_per_weight == pytest.approx(8 * report.nbytes / report.n_values)
    assert sum(role.nbytes for role in report.roles) == sum(t.nbytes for t in file.tensors)
    assert all(np.isfinite(file.read(t.name)).all() for t in file.tensors)

    assert report.calibration_tokens >= 1024 and report.calibration_tokens % 512 == 0
    assert report.calibration_sources == ("text.txt",)
    assert file.metadata["dsv2.calibration.sha256"] == report.calibration_sha256
    usage = np.reshape(file.metadata["dsv2.expert_usage"], (2, 4))
    assert usage[0].sum() == 0 and (usage[1:].sum(1) == 2 * report.calibration_tokens).all()
    assert [list(usage[c.il]) for c in report.coverage] == [list(c.counts) for c in report.coverage]

    groups = {(f.il, f.group) for f in report.folds}
    assert (0, "dense_up") in groups and (1, "experts_up") in groups and (1, "ffn_norm") in groups
    assert all(f.error_after < f.error_before for f in report.folds if f.kept)

    fractions = [s.fraction for s in steps]
    assert fractions[0] == 0.0 and fractions[-1] == 1.0
    assert all(b >= a - 1e-9 for a, b in pairwise(fractions))
    assert {s.stage for s in steps} == {"read", "survey", "calibrate", "search", "encode", "finish"}
    assert steps[-1].bytes_written == steps[-1].bytes_total


def test_bytes_do_not_depend_on_threads_or_slabs(
    tmp_path: Path, wide: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for threads, slab_values in ((1, 1 << 25), (3, 2560)):
        monkeypatch.setattr(job, "SLAB_VALUES", slab_values)
        options = Options(type="q2_k", plain_mix=True, threads=threads, calibration=(text,))
        quantize.quantize(wide, tmp_path / f"{threads}.gguf", options)
    assert (tmp_path / "1.gguf").read_bytes() == (tmp_path / "3.gguf").read_bytes()


@pytest.mark.parametrize("dtype", ["BF16", "F8_E4M3"])
def test_an_expert_that_no_token_reaches(tmp_path: Path, text: Path, dtype: str) -> None:
    """It must come out as near to itself as the others do, by the layer's statistics, with no NaN anywhere."""
    weights = make.random_weights(WIDE_V3)
    weights["model.layers.1.mlp.gate.e_score_correction_bias"][3] = -100.0
    exact = expected_tensors(WIDE_V3, make.write_checkpoint(tmp_path / "hf", WIDE_V3, weights, dtype))
    options = Options(type="q4_k_m", plain_mix=True, threads=2, calibration=(text,))
    report = quantize.quantize(tmp_path / "hf", tmp_path / "m.gguf", options)
    assert all(layer.counts[3] == 0 and layer.few >= 1 for layer in report.coverage)
    assert any("fewer than" in note for note in report.notes)
    file = cext.Gguf(tmp_path / "m.gguf")
    plain = Options(type="q4_k_m", plain_mix=True, threads=2, calibration=(text,), awq=False)
    quantize.quantize(tmp_path / "hf", tmp_path / "plain.gguf", plain)
    unfolded = cext.Gguf(tmp_path / "plain.gguf")
    for kind in ("gate", "up", "down"):
        name = f"blk.1.ffn_{kind}_exps.weight"
        assert np.isfinite(file.read(name)).all()
        error = np.square(unfolded.read(name) - exact[name]).mean((1, 2)) / np.square(exact[name]).mean((1, 2))
        assert error[3] < 1.5 * error[:3].max(), name


BAD_CALIBRATION: dict[str, tuple[str, bytes | None, str]] = {
    "too short": ("t.txt", b"just a few words", "at least 1024"),
    "empty": ("t.txt", b"", "holds 0 tokens"),
    "missing": ("t.txt", None, "No such file"),
    "binary": ("t.txt", b"a\xff\x00", "byte 1 is not UTF-8"),
    "UTF-16": ("t.txt", b"\xff\xfe\x00", "UTF-16"),
    "not JSON": ("c.jsonl", b'{"messages": [{"role": "user", "content": "hi"}]}\n{oops\n', "line 2"),
    "no messages": ("c.jsonl", b'{"text": "hi"}', "line 1"),
    "messages of text": ("c.jsonl", b'{"messages": ["hi"]}', "line 1"),
    "a list": ("c.jsonl", b"[1]", "line 1"),
}


@pytest.mark.parametrize("case", BAD_CALIBRATION)
def test_bad_calibration(tmp_path: Path, wide: Path, case: str) -> None:
    name, data, expected = BAD_CALIBRATION[case]
    if data is not None:
        (tmp_path / name).write_bytes(data)
    options = Options(type="q4_k_m", calibration=(tmp_path / name,))
    with pytest.raises(quantize.CalibrationError, match=expected):
        quantize.quantize(wide, tmp_path / "m.gguf", options)
    assert not list(tmp_path.glob("m.gguf*"))


def test_chat_is_rendered(tmp_path: Path, wide: Path) -> None:
    line = json.dumps(
        {"messages": [{"role": "user", "content": "the tin"}, {"role": "assistant", "content": "in the "}]}
    )
    (tmp_path / "c.jsonl").write_text(f"{line}\n\n" * 100)
    options = Options(type="q6_k", plain_mix=True, threads=1, calibration=(tmp_path / "c.jsonl",), awq=False)
    report = quantize.quantize(wide, tmp_path / "m.gguf", options)
    assert report.calibration_tokens >= 1024 and report.calibration_sources == ("c.jsonl",)
