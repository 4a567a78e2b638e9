"""DeepSeekMoE's checkpoints through the quantiser: rows in pairs, all stages, and the same answers as before."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import checkpoints as make
from support import llama
from support.scoring import relative_error
from support.tiny import Checkpoint as Tiny
from support.tiny import gguf_tensors, spec_named

import cext
import quantize
from cext.tokenizer import Tokenizer
from quantize import CheckpointError, Options, UnsupportedError
from quantize.source import arch as arch_of
from quantize.source import tensors
from quantize.source.checkpoint import Checkpoint

WIDE = {
    **make.MOE,
    "num_hidden_layers": 2,
    "hidden_size": 256,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "moe_intermediate_size": 256,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 2,
}
WIDE_SHARED = {**WIDE, "num_key_value_heads": 2, "first_k_dense_replace": 0}
IDS = np.random.default_rng(3).integers(3, 250, 40).astype(np.int32)


def logits(path: Path, ids: np.ndarray) -> np.ndarray:
    with cext.Model(path, threads=2) as model:
        return model.session(len(ids), kv_type="f32").eval(ids, "all")


@pytest.mark.parametrize("name", ["moe", "moe_shared", "moe_one"])
def test_rows_are_paired_as_the_tests_pair_them(tmp_path: Path, name: str) -> None:
    """tiny.py has the rule a second time, and its files equal transformers."""
    spec = replace(spec_named(name), n_vocab=320)
    checkpoint = Tiny(spec)
    checkpoint.write(tmp_path / "hf")
    make.write_tokenizer(tmp_path / "hf")
    expected = gguf_tensors(checkpoint)
    quantize.quantize(tmp_path / "hf", tmp_path / "m.gguf", Options(type="f32", threads=1, evaluate=False))
    with cext.Gguf(tmp_path / "m.gguf") as file:
        assert {t.name for t in file.tensors} == set(expected)
        for t in file.tensors:
            np.testing.assert_array_equal(file.read(t.name).reshape(expected[t.name].shape), expected[t.name])
        assert file.metadata["general.architecture"] == "deepseek"
        assert file.metadata["tokenizer.ggml.pre"] == "deepseek-llm"
        heads = {key: file.metadata[f"deepseek.attention.head_count{key}"] for key in ("", "_kv")}
    assert heads == {"": spec.n_head, "_kv": spec.n_head_kv}
    here, there = logits(tmp_path / "m.gguf", IDS), llama.logits(tmp_path / "m.gguf", IDS)
    assert relative_error(here, there).max() < 1e-5


def text_ids(path: Path, text: Path) -> np.ndarray:
    return np.array(Tokenizer(path).encode(text.read_text(encoding="utf-8")), np.int32)


@pytest.mark.parametrize(
    ("config", "options", "theirs"),
    [
        (WIDE, Options(type="q4_k_m"), "q4_k"),  # survey, error feedback, sequential
        pytest.param(WIDE_SHARED, Options(type="q3_k_m", awq=True), "q3_k", marks=pytest.mark.heavy),
        (WIDE_SHARED, Options(type="q4_0", sequential=False, feedback=False), "q4_0"),
    ],
    ids=["survey", "folds", "importance"],
)
def test_every_stage(tmp_path: Path, config: dict[str, Any], options: Options, theirs: str) -> None:
    """What it writes is no further from the original than llama.cpp's file of that type, in both engines."""
    make.write_checkpoint(tmp_path / "hf", config)
    text, other = make.write_text(tmp_path / "text.txt", 1100), make.write_text(tmp_path / "other.txt", 120)
    exact = tmp_path / "exact.gguf"
    for name, asked in (("exact", Options(type="f32", evaluate=False)), ("coded", options)):
        quantize.quantize(tmp_path / "hf", tmp_path / f"{name}.gguf", replace(asked, threads=2, calibration=(text,)))
    llama.quantize(exact, tmp_path / "theirs.gguf", llama.FILE_TYPES[theirs])
    ids = text_ids(exact, other)[:200]
    original = logits(exact, ids)
    ours, peer = (np.median(relative_error(logits(tmp_path / f"{n}.gguf", ids), original)) for n in ("coded", "theirs"))
    assert 0 < ours <= 1.05 * peer
    there = llama.logits(tmp_path / "coded.gguf", ids)
    assert np.median(relative_error(there, original)) <= 1.2 * ours + 0.01
    report = json.loads((tmp_path / "coded.gguf.report.json").read_text(encoding="utf-8"))
    names = json.dumps(report)
    assert all(f"blk.1.{role}.weight" in names for role in ("attn_q", "attn_k", "attn_v", "attn_output"))


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F8_E4M3"])
def test_parts_are_the_same_from_memory_and_from_disk(tmp_path: Path, dtype: str) -> None:
    config = {**WIDE, "num_hidden_layers": 2}
    make.write_checkpoint(tmp_path, config, dtype=dtype)
    arch = arch_of.parse(config)
    with Checkpoint(tmp_path) as checkpoint:
        layer = tensors.layer_tensors(arch, 1)
        held, disk = tensors.Weights(arch, checkpoint, layer), tensors.PartReader(arch, checkpoint)
        for tensor in layer:
            exact = tensors.read(arch, checkpoint, tensor)
            assert held.arrays[tensor.name].shape == tensor.shape == exact.shape
            if tensor.role in ("attn_q", "attn_k", "attn_v"):
                np.testing.assert_array_equal(held(tensor, 0), exact)
                np.testing.assert_array_equal(disk(tensor, 0), exact)
                held.release(tensor, 0)
                np.testing.assert_array_equal(held(tensor, 0), exact)


YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"num_key_value_heads": 3}, CheckpointError, "4 heads cannot share 3"),
        ({"num_key_value_heads": 8}, CheckpointError, "4 heads cannot share 8"),
        ({"num_key_value_heads": 0}, CheckpointError, "num_key_value_heads"),
        ({"hidden_size": 258}, UnsupportedError, "`hidden_size` 258"),
        ({"hidden_size": 252}, UnsupportedError, "`head_dim` 63"),
        ({"head_dim": 32}, UnsupportedError, "`head_dim` 32"),
        ({"norm_topk_prob": True}, UnsupportedError, "norm_topk_prob"),
        ({"scoring_func": "sigmoid"}, UnsupportedError, "scoring_func"),
        ({"routed_scaling_factor": 2.5}, UnsupportedError, "routed_scaling_factor"),
        ({"topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1}, UnsupportedError, "topk_method"),
        ({"attention_bias": True}, UnsupportedError, "attention_bias"),
        ({"moe_layer_freq": 2}, UnsupportedError, "moe_layer_freq"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, UnsupportedError, "linear"),
        ({"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 0.7}}, UnsupportedError, "mscale"),
    ],
    ids=str,
)
def test_what_gguf_cannot_say_is_refused(change: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        arch_of.parse(WIDE | change)


def test_yarn_scales_cos_and_sin_alone() -> None:
    keys = arch_of.parse(WIDE | {"rope_scaling": YARN}).keys()
    assert keys["deepseek.rope.scaling.type"] == "yarn"
    assert not any("log_multiplier" in key for key in keys)
