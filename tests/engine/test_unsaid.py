"""Files as converters of different years wrote them: what they leave unsaid is inferred to the bit, told or refused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ref.hparams import Yarn
from support import gguf_bytes as gb
from support.tiny import (
    Checkpoint,
    Spec,
    gguf_metadata,
    gguf_tensors,
    gguf_vocabulary,
    spec_named,
    write_tensors,
)

import cext
from cext.model import shape_of

V3 = spec_named("v3")
LITE = spec_named("lite")
# GLM-4.7-Flash's switches (config.json of zai-org/GLM-4.7-Flash): 4 of 64 experts, sigmoid, 1 group, normalised, x1.8.
GLM = replace(V3, name="glm", n_group=1, n_group_used=1, n_used=4, scale=1.8, eps=1e-5, yarn=None, rope_base=1e6)

Keys = dict[str, Any]


class Files:
    """Writes variants of a spec's GGUF."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.n = 0

    def write(
        self,
        spec: Spec,
        *,
        drop: tuple[str, ...] = (),
        put: Keys | None = None,
        tensors: Callable[[dict[str, Any]], dict[str, Any]] = lambda t: t,
    ) -> Path:
        keys = gguf_metadata(spec) | {f"deepseek2.{key}": value for key, value in (put or {}).items()}
        keys = {key: value for key, value in keys.items() if key.removeprefix("deepseek2.") not in drop}
        self.n += 1
        path = self.folder / f"{spec.name}-{self.n}.gguf"
        return write_tensors(path, keys | gguf_vocabulary(spec.n_vocab), tensors(gguf_tensors(Checkpoint(spec))))


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def logits(path: Path, n_vocab: int = 101) -> np.ndarray:
    with cext.Model(path, threads=1) as model:
        return model.session(32, kv_type="f32").eval(np.arange(24) * 7 % n_vocab, "all")


def notes(path: Path) -> str:
    with cext.Model(path, threads=1) as model, cext.Gguf(path) as gguf:
        shape, said = shape_of(gguf)  # what inspect tells, which binds no tensors
        assert (shape, said) == (model.hparams, model.notes[: len(said)])
        return "\n".join(model.notes)


def test_a_whole_file_needs_no_word(files: Files) -> None:
    for spec in (V3, LITE, GLM):
        assert notes(files.write(spec)) == ""


# What is missing and can be told from the rest.


def draft_head(spec: Spec, n: int = 1) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """The last block's tensors again as n more blocks, with those of a multi-token predictor beside them."""

    def add(tensors: dict[str, Any]) -> dict[str, Any]:
        last = f"blk.{spec.n_layer - 1}."
        more = {}
        for il in range(spec.n_layer, spec.n_layer + n):
            more |= {f"blk.{il}.{k.removeprefix(last)}": v for k, v in tensors.items() if k.startswith(last)}
            more[f"blk.{il}.nextn.eh_proj.weight"] = np.zeros((spec.n_embd, 2 * spec.n_embd), np.float32)
            more[f"blk.{il}.nextn.enorm.weight"] = np.ones(spec.n_embd, np.float32)
        return tensors | more

    return add


@pytest.mark.parametrize("spec", [GLM, V3], ids=lambda s: s.name)
@pytest.mark.parametrize("n", [1, 2])
def test_a_draft_heads_blocks_are_not_run(files: Files, spec: Spec, n: int) -> None:
    put = {"block_count": spec.n_layer + n, "nextn_predict_layers": n}
    with_head = files.write(spec, put=put, tensors=draft_head(spec, n))
    assert np.array_equal(logits(with_head), logits(files.write(spec)))
    assert notes(with_head) == ""
    unsaid = files.write(spec, put={"block_count": spec.n_layer + n}, tensors=draft_head(spec, n))
    assert np.array_equal(logits(unsaid), logits(with_head))
    assert f"nextn_predict_layers` is missing: {n}" in notes(unsaid)


def test_a_draft_head_alone_says_what_it_is(files: Files) -> None:
    def alone(tensors: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in draft_head(GLM)(tensors).items() if not k.startswith(("blk.0", "blk.1", "blk.2"))}

    path = files.write(GLM, put={"block_count": GLM.n_layer + 1, "nextn_predict_layers": 1}, tensors=alone)
    with pytest.raises(cext.UnsupportedError, match=r"\.gguf: a draft head alone") as raised:
        cext.Model(path)
    assert "own file" in raised.value.hint
    with pytest.raises(cext.UnsupportedError, match="a draft head alone"):
        cext.Model(files.write(GLM, put={"block_count": 1, "nextn_predict_layers": 1}))


@pytest.mark.parametrize(
    ("spec", "drop", "words"),
    [
        (GLM, "expert_gating_func", "sigmoid, because the router has a bias"),
        (V3, "expert_gating_func", "sigmoid, because the router has a bias"),
        (V3, "expert_weights_norm", "true, as in all"),
        (LITE, "expert_weights_scale", "1, as V2-Lite's"),
        (LITE, "expert_shared_count", "2, by the shape"),
        (LITE, "attention.layer_norm_rms_epsilon", "1e-6"),
        (LITE, "rope.freq_base", "10000"),
        (LITE, "rope.scaling.type", "yarn, as in all"),
        (replace(LITE, n_ctx=40 * 64), "rope.scaling.factor", "40, the trained context of 2560 over the original 64"),
        (replace(LITE, n_ctx=40 * 64), "rope.scaling.original_context_length", "64, the trained context"),
    ],
    ids=lambda x: x.name if isinstance(x, Spec) else str(x),
)
def test_a_missing_key_is_inferred_to_the_bit_and_told(files: Files, spec: Spec, drop: str, words: str) -> None:
    whole, without = files.write(spec), files.write(spec, drop=(drop,))
    assert np.array_equal(logits(without), logits(whole))
    assert f"`deepseek2.{drop}` is missing: {words}" in notes(without) or words in notes(without)
    assert drop in notes(without)
    assert notes(whole) == ""


@pytest.mark.parametrize(
    ("spec", "drop"),
    [
        (V3, ("expert_weights_scale",)),  # 2.5 there, 1.8, 2.446, 2.827 elsewhere: not to be guessed
        (V3, ("expert_group_used_count",)),
        (replace(LITE, n_ctx=4097), ("rope.scaling.factor",)),  # no whole ratio to the original context
        (LITE, ("rope.scaling.factor", "rope.scaling.original_context_length")),
        (replace(LITE, n_ctx=1001), ("rope.scaling.original_context_length",)),
    ],
)
def test_what_cannot_be_guessed_is_refused(files: Files, spec: Spec, drop: tuple[str, ...]) -> None:
    path = files.write(spec, drop=drop)
    with pytest.raises(cext.FormatError, match=rf"\.gguf.*`deepseek2\.{drop[0]}` is missing") as raised:
        cext.Model(path)
    assert raised.value.hint


def test_a_missing_temperature_of_yarn_is_told(files: Files) -> None:
    """Plain YaRN is what a file without the key says; no published model of the family is that."""
    assert "yarn_log_multiplier` is missing" in notes(files.write(LITE, drop=("rope.scaling.yarn_log_multiplier",)))


# Groups, which old files do not tell.


V2_SHAPE = replace(LITE, name="v2_shape", n_expert=160, n_used=6, n_group=8, n_group_used=3, scale=16.0, n_ff_expert=8)
V3_SHAPE = replace(
    replace(V3, name="v3_shape", n_layer=61, n_layer_dense=60, n_embd=7168, n_ff_dense=1, n_ff_expert=1),
    **{"n_head": 1, "nope": 2, "rope": 2, "v": 2, "kv_lora_rank": 2, "q_lora_rank": 0, "n_vocab": 101},
    **{"n_expert": 256, "n_used": 8, "n_group": 8, "n_group_used": 4},
)


@pytest.mark.parametrize("spec", [V2_SHAPE, V3_SHAPE], ids=lambda s: s.name)
def test_groups_of_the_two_published_shapes(files: Files, spec: Spec) -> None:
    groups = ("expert_group_count", "expert_group_used_count")
    whole, old = files.write(spec), files.write(spec, drop=(*groups, "expert_gating_func"))
    ungrouped = files.write(spec, put={"expert_group_count": 1, "expert_group_used_count": 1})
    assert np.array_equal(logits(old), logits(whole))
    assert not np.array_equal(logits(ungrouped), logits(whole))
    assert f"{spec.n_group_used} of {spec.n_group} groups" in notes(old)
    assert notes(ungrouped) == ""


@pytest.mark.parametrize(
    "spec",
    [
        replace(V3_SHAPE, name="joyai", n_layer=40, n_layer_dense=39, n_embd=64, n_group=1, n_group_used=1),
        replace(V3_SHAPE, name="kimi", n_layer=3, n_layer_dense=2, n_embd=64, n_expert=384, n_group=1, n_group_used=1),
        replace(V2_SHAPE, name="eight", n_used=8, n_group=1, n_group_used=1),
    ],
    ids=lambda s: s.name,
)
def test_other_shapes_stay_without_groups(files: Files, spec: Spec) -> None:
    path = files.write(spec)
    assert notes(path) == ""
    with cext.Model(path, threads=1) as model:
        assert model.hparams["n_expert_group"] == 1


KIMI = replace(
    V3, name="kimi", n_expert=384, n_used=8, n_ff_expert=8, n_group=1, n_group_used=1,
    yarn=Yarn(32.0, 64, 1.0, beta_fast=1.0, beta_slow=1.0),
)  # fmt: skip


def test_kimi_k2_without_betas_is_run_with_its_own(files: Files) -> None:
    """Its converters wrote none for months, and DeepSeek's would be assumed."""
    whole = files.write(KIMI)
    without = files.write(KIMI, drop=("rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow"))
    deepseeks = files.write(KIMI, put={"rope.scaling.yarn_beta_fast": 32.0})
    assert np.array_equal(logits(without), logits(whole))
    assert not np.array_equal(logits(deepseeks), logits(whole))
    assert notes(whole) == notes(deepseeks) == ""
    assert "yarn_beta_fast` is missing: 1, because the shape is Kimi-K2's" in notes(without)


def test_kimi_k2_of_september_and_thinking_cannot_be_told_apart(files: Files) -> None:
    later = replace(KIMI, yarn=Yarn(64.0, 64, 1.0))
    assert "yarn_beta_fast` is missing: 32, as Kimi-K2-Thinking has it; Kimi-K2-0905 has 1" in notes(files.write(later))


# Keys that change the arithmetic.


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention.sliding_window", 4096),
        ("attention.indexer.top_k", 2048),
        ("attention.indexer.head_count", 64),
        ("attention.scale", 0.1),
        ("attention.causal", False),
        ("attention.clamp_kqv", 8.0),
        ("rope.scaling.yarn_ext_factor", 0.5),
        ("rope.dimension_sections", [1, 1, 2]),
        ("swiglu_clamp_exp", [0.0, 7.0, 0.0]),
        ("final_logit_softcapping", 30.0),
        ("hidden_activation", "gelu"),
        ("kda.head_dim", 128),
        ("expert_shared_feed_forward_length", 81),
    ],
)
def test_keys_that_change_the_arithmetic_are_refused_by_name(files: Files, key: str, value: Any) -> None:
    with pytest.raises(cext.UnsupportedError, match=rf"\.gguf: `deepseek2\.{key}` is "):
        cext.Model(files.write(LITE, put={key: value}))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention.temperature_scale", 0.0),
        ("attention.sliding_window", 0),
        ("attention.causal", True),
        ("rope.scaling.yarn_ext_factor", 1.0),
        ("rope.scaling.finetuned", True),
        ("swiglu_clamp_exp", [0.0, 0.0, 0.0]),
        ("hidden_activation", "silu"),
        ("logit_scale", 1.0),
        ("expert_shared_feed_forward_length", 80),
    ],
)
def test_the_same_keys_where_they_change_nothing(files: Files, key: str, value: Any) -> None:
    path = files.write(LITE, put={key: value})
    assert notes(path) == ""
    assert np.array_equal(logits(path), logits(files.write(LITE)))


def test_unknown_keys_are_told_once(files: Files) -> None:
    path = files.write(LITE, put={f"attention.new_{i}": i for i in range(5)} | {"z": "text"})
    told = notes(path)
    assert told.count("unknown keys") == 1
    assert "`deepseek2.attention.new_0`" in told
    assert "and 3 more" in told


# Tensors.


def folded(tensors: dict[str, Any], spec: Spec = LITE) -> dict[str, Any]:
    """ik_llama.cpp's layout: attn_k_b and attn_v_b in two dimensions, attn_kv_b whole beside them."""
    legacy = gguf_tensors(Checkpoint(spec), legacy=True)
    flat = {k: v.reshape(-1, v.shape[-1]) if "_k_b" in k or "_v_b" in k else v for k, v in tensors.items()}
    return flat | {k: v for k, v in legacy.items() if "attn_kv_b" in k}


def test_folded_heads_are_accepted(files: Files) -> None:
    widths = {"attention.key_length": 24, "attention.value_length": 24, "attention.head_count_kv": 4}
    drop = ("attention.key_length_mla", "attention.value_length_mla")
    path = files.write(LITE, put=widths, drop=drop, tensors=folded)
    assert np.array_equal(logits(path), logits(files.write(LITE)))
    assert notes(path) == ""


@pytest.mark.parametrize("new", ["exp_probs_b.weight", "exp_probs_bias", "ffn_gate_inp.bias"])
def test_a_renamed_bias_of_the_router_is_refused(files: Files, new: str) -> None:
    def rename(tensors: dict[str, Any]) -> dict[str, Any]:
        return {k.replace("exp_probs_b.bias", new): v for k, v in tensors.items()}

    with pytest.raises(cext.UnsupportedError, match=rf"\.gguf: tensor `blk\.1\.{new}` has no place"):
        cext.Model(files.write(V3, tensors=rename))


@pytest.mark.parametrize("name", ["blk.0.attn_q.bias", "blk.2.attn_gate.weight", "rope_freqs.weight"])
def test_a_tensor_that_would_be_left_out_is_refused(files: Files, name: str) -> None:
    path = files.write(LITE, tensors=lambda t: t | {name: np.ones(8, np.float32)})
    with pytest.raises(cext.UnsupportedError, match=rf"\.gguf: tensor `{name}`"):
        cext.Model(path)


def test_what_is_no_part_of_the_text_model_is_told(files: Files) -> None:
    extra = {f"v.blk.{i}.attn_q.weight": np.ones((2, 2), np.float32) for i in range(3)}
    assert "3 tensors are no part" in notes(files.write(LITE, tensors=lambda t: t | extra))


def test_a_router_bias_in_some_layers_only_is_missing_in_the_others(files: Files) -> None:
    with pytest.raises(cext.FormatError, match=r"`blk\.2\.exp_probs_b\.bias` is missing"):
        cext.Model(files.write(V3, tensors=lambda t: {k: v for k, v in t.items() if k != "blk.2.exp_probs_b.bias"}))


def test_a_router_without_its_bias_is_told(files: Files) -> None:
    path = files.write(V3, tensors=lambda t: {k: v for k, v in t.items() if "exp_probs_b" not in k})
    assert "no bias" in notes(path)


@pytest.mark.parametrize(
    ("kind", "words"), [(19, "iq1_s"), (29, "iq1_m"), (34, "tq1_0"), (39, "mxfp4"), (31, "31"), (152, "152")]
)
def test_a_type_that_does_not_run_says_what_can_be_done(tmp_path: Path, kind: int, words: str) -> None:
    tiny = gb.tiny_model()
    strange = [
        replace(t, kind=kind, shape=(256, *t.shape[1:])) if "ffn_gate_exps" in str(t.name) else t for t in tiny.tensors
    ]
    known = kind in [t.value for t in gb.GGMLQuantizationType]
    if not known:  # its size is anybody's guess: at the end, on no bytes
        strange = [t for t in strange if t.kind != kind] + [t for t in strange if t.kind == kind]
    path = tmp_path / "model.gguf"
    if known:
        path.write_bytes(replace(tiny, tensors=strange).content())
    else:
        kvs = [gb.kv("general.architecture", gb.STRING, "deepseek2")]
        kvs += [gb.kv(f"deepseek2.{key}", k, item) for key, (k, item) in tiny.values.items()]
        placed, end = gb.place(strange[:-1])
        last = replace(strange[-1], offset=-(-end // 32) * 32)
        path.write_bytes(gb.gguf(kvs, [*placed, last], bytes(last.offset + 32)))
    with pytest.raises(cext.UnsupportedError, match=rf"model\.gguf.*ffn_gate_exps.*{words}") as raised:
        cext.Model(path)
    assert "another type" in raised.value.hint
    assert "quantize" not in raised.value.hint  # nobody has the 640 GB that it takes
