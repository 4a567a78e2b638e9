"""Mistral Small 4: a file of its own architecture, experts' gate and up in one tensor, queries scaled by position."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from ref.hparams import Yarn
from ref.model import Model as Reference
from support import llama
from support.checkpoints import write_safetensors
from support.tiny import (
    MISTRAL,
    Checkpoint,
    Spec,
    gguf_metadata,
    gguf_tensors,
    gguf_vocabulary,
    tokens,
    variant,
    write_tensors,
)

import cext
from cext import Device, Place

FLOAT32 = 1e-5  # test_model.py's bound for 3 layers, and the oracle's own rounding
N_TOKENS = 60  # the original context is 8: 0, 1, ... 7 contexts further queries are scaled otherwise
ORIGINAL = MISTRAL.yarn.orig_ctx

Keys = dict[str, Any]


def fused(tensors: Keys) -> Keys:
    """As llama.cpp's converter stacks them: an expert's gate rows, then its up rows."""
    out = {}
    for name, value in tensors.items():
        if "ffn_gate_exps" in name:
            up = tensors[name.replace("gate", "up")]
            out[name.replace("gate", "gate_up")] = np.concatenate([value, up], axis=1)
        elif "ffn_up_exps" not in name:
            out[name] = value
    return out


def keys_of(spec: Spec, arch: str = "mistral4", *, drop: tuple[str, ...] = (), put: Keys | None = None) -> Keys:
    keys = {k.replace("deepseek2.", f"{arch}."): v for k, v in gguf_metadata(spec).items()}
    keys = {k: v for k, v in keys.items() if k.removeprefix(f"{arch}.") not in drop}
    return keys | {f"{arch}.{k}": v for k, v in (put or {}).items()} | gguf_vocabulary(spec.n_vocab)


def write(path: Path, spec: Spec = MISTRAL, arch: str = "mistral4", **changes: Any) -> Path:
    return write_tensors(path, keys_of(spec, arch, **changes), fused(gguf_tensors(Checkpoint(spec))), arch)


def logits(path: Path, ids: Any, kv_type: str = "f32") -> np.ndarray:
    with cext.Model(path, threads=1) as model:
        return model.session(len(ids), kv_type=kv_type).eval(ids, "all")


def firm_ids(spec: Spec, n: int = N_TOKENS) -> np.ndarray:
    """A prompt without near ties between experts, which float32 would settle differently here and there."""
    ref = Reference(spec.hparams, gguf_tensors(Checkpoint(spec)))
    for seed in range(300):
        ids = tokens(spec, n, seed)
        ref.forward(ids)
        if min(margin.min() for margin in ref.margins) > 2 * FLOAT32:
            return ids
    pytest.skip("every prompt has a near tie")


class Mistral4(Checkpoint):
    """The text part of config.json of mistralai/Mistral-Small-4-119B-2603, as transformers 5 writes such models."""

    def config(self) -> dict[str, Any]:
        s = self.spec
        unsaid = ("scoring_func", "topk_method", "moe_layer_freq", "rope_theta", "rope_scaling", "torch_dtype")
        config = {key: value for key, value in super().config().items() if key not in unsaid}
        rope = super().config()["rope_scaling"] | {
            "rope_type": "yarn", "rope_theta": s.rope_base, "llama_4_scaling_beta": s.temperature,
            "max_position_embeddings": s.n_ctx, "partial_rotary_factor": s.rope / (s.rope + s.nope),
        }  # fmt: skip
        head = {
            "head_dim": s.nope + s.rope,
            "qk_head_dim": s.nope + s.rope,
            "rope_interleave": True,
            "dtype": "float32",
        }
        return config | head | {
            "architectures": ["Mistral4ForCausalLM"], "model_type": "mistral4", "rope_parameters": rope,
        }  # fmt: skip

    def write(self, folder: Path) -> Path:
        s, out = self.spec, {n: t for n, t in self.tensors.items() if ".experts." not in n}
        for il in s.moe_layers:
            gate, up, down = (
                np.stack(
                    [self.tensors[f"model.layers.{il}.mlp.experts.{e}.{p}_proj.weight"] for e in range(s.n_expert)]
                )
                for p in ("gate", "up", "down")
            )
            out[f"model.layers.{il}.mlp.experts.gate_up_proj"] = np.concatenate([gate, up], axis=1)
            out[f"model.layers.{il}.mlp.experts.down_proj"] = down
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(self.config()), encoding="utf-8")
        write_safetensors(folder / "model.safetensors", {name: ("F32", value) for name, value in out.items()})
        return folder


@pytest.mark.oracle
@pytest.mark.parametrize(
    "spec",
    [
        MISTRAL,
        variant(MISTRAL, name="dense_first", n_layer_dense=1, q_lora_rank=0, seed=3, temperature=0.3),
        variant(
            MISTRAL,
            name="odd",
            seed=4,
            n_head=3,
            n_embd=51,
            n_ff_expert=19,
            nope=10,
            rope=6,
            v=13,
            yarn=Yarn(4.0, 5, 1.0),
        ),
    ],
    ids=lambda s: s.name,
)
def test_logits_are_transformers_beyond_the_original_context_too(tmp_path: Path, spec: Spec) -> None:
    hf = pytest.importorskip("support.hf", reason="needs PyTorch and transformers", exc_type=ImportError)
    ids = firm_ids(spec)
    expected = hf.logits(
        hf.load(Mistral4(spec).write(tmp_path / "hf"), spec.eps, hf.transformers.Mistral4ForCausalLM), ids
    )
    path = write(tmp_path / "m.gguf", spec)
    with cext.Model(path, threads=1) as model:
        session = model.session(N_TOKENS, kv_type="f32")
        prefill = session.eval(ids, "all")
        session.rewind(3)
        rest = np.concatenate([session.eval(ids[i : i + 1], "all") for i in range(3, N_TOKENS)])
    for got, true in ((prefill, expected), (rest, expected[3:])):
        assert np.abs(got - true).max() / np.ptp(true) < FLOAT32
    unscaled = write(tmp_path / "u.gguf", spec, put={"attention.temperature_scale": 0.0})
    error = np.abs(logits(unscaled, ids) - expected).max(1) / np.ptp(expected)
    assert error[: spec.yarn.orig_ctx].max() < FLOAT32 < error[-1], "the prompt does not reach where queries are scaled"


def test_a_long_prompt_by_either_route_of_attention(tmp_path: Path) -> None:
    """Long prefills expand keys and values, short ones absorb them: both scale queries by their position."""
    ids = np.concatenate([tokens(MISTRAL, 300), firm_ids(MISTRAL)])
    path = write(tmp_path / "m.gguf")
    expected = Reference(MISTRAL.hparams, gguf_tensors(Checkpoint(MISTRAL))).forward(ids)[-N_TOKENS:]
    with cext.Model(path, threads=2) as model:
        whole = model.session(512, kv_type="f32").eval(ids, "all")[-N_TOKENS:]
        pieces = model.session(512, kv_type="f32")
        pieces.eval(ids[:-N_TOKENS])
        by_piece = np.concatenate([pieces.eval(piece, "all") for piece in np.split(ids[-N_TOKENS:], 12)])
    for got in (whole, by_piece):
        error = np.abs(got - expected).max(1) / np.ptp(expected)
        assert np.median(error) < FLOAT32  # of 360 tokens in 3 layers a few are near ties between experts


@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
def test_every_cache_is_as_near_as_without_the_scale(tmp_path: Path, kv_type: str) -> None:
    """What the scale multiplies is the query: a cache's rows are the same."""
    ids = firm_ids(MISTRAL)
    for name, temperature in (("scaled", 0.1), ("plain", 0.0)):
        path = write(tmp_path / f"{name}.gguf", put={"attention.temperature_scale": temperature})
        exact, cached = logits(path, ids), logits(path, ids, kv_type)
        assert np.median(np.abs(exact - cached).max(1)) / np.ptp(exact) < 0.02


def test_llamacpp_agrees(tmp_path: Path) -> None:
    """The same file there; it reads both keys under either name of the architecture."""
    ids = firm_ids(MISTRAL)
    for arch in ("mistral4", "deepseek2"):
        path = write(tmp_path / f"{arch}.gguf", arch=arch)
        here, there = logits(path, ids), llama.logits(path, ids)
        assert np.abs(here - there).max() / np.ptp(there) < 2e-5


# One tensor for gate and up.


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q5_1"])
def test_fused_experts_are_the_same_to_the_bit(tmp_path: Path, kind: str) -> None:
    spec, type_ = variant(MISTRAL, n_embd=64, n_ff_expert=32), gguf.GGMLQuantizationType[kind]
    apart = gguf_tensors(Checkpoint(spec))
    paths = []
    for name, tensors in (("apart", apart), ("fused", fused(apart))):
        quantised = {n: (gguf.quants.quantize(t, type_), type_) if "_exps" in n else t for n, t in tensors.items()}
        paths.append(write_tensors(tmp_path / f"{name}.gguf", keys_of(spec), quantised, "mistral4"))
    ids = tokens(spec, 40)
    np.testing.assert_array_equal(logits(paths[0], ids), logits(paths[1], ids))


def test_a_fused_tensor_beside_the_two_is_refused(tmp_path: Path) -> None:
    """Which of them counts cannot be told."""
    both = gguf_tensors(Checkpoint(MISTRAL))
    path = write_tensors(tmp_path / "m.gguf", keys_of(MISTRAL), both | fused(both), "mistral4")
    with pytest.raises(cext.UnsupportedError, match=r"m\.gguf.*ffn_(gate|up)_exps"):
        cext.Model(path)


def test_a_fused_tensor_of_another_width_is_named(tmp_path: Path) -> None:
    tensors = fused(gguf_tensors(Checkpoint(MISTRAL)))
    for cut in (np.s_[:, :-1], np.s_[:, : MISTRAL.n_ff_expert], np.s_[:-1], np.s_[:, :, :-32]):
        wrong = {n: np.ascontiguousarray(t[cut]) if "gate_up" in n else t for n, t in tensors.items()}
        path = write_tensors(tmp_path / "m.gguf", keys_of(MISTRAL), wrong, "mistral4")
        with pytest.raises(cext.FormatError, match=r"m\.gguf: tensor `blk\.0\.ffn_gate_up_exps\.weight` is .*expected"):
            cext.Model(path)


# What files leave unsaid, and what they may say.


def notes(path: Path) -> str:
    with cext.Model(path, threads=1) as model:
        return "\n".join(model.notes)


@pytest.mark.parametrize(
    ("arch", "drop", "put", "words"),
    [
        ("mistral4", ("attention.temperature_scale", "attention.temperature_length"), {}, "scale` is missing: 0.1"),
        ("mistral4", ("attention.temperature_length",), {}, f"length` is missing: {ORIGINAL}, the original context"),
        ("mistral4", (), {"attention.temperature_length": 0}, ""),
        ("deepseek2", ("attention.temperature_length",), {}, f"length` is missing: {ORIGINAL}, the original context"),
    ],
)  # fmt: skip
def test_what_is_missing_is_told_and_is_the_same(tmp_path: Path, arch: str, drop: Any, put: Keys, words: str) -> None:
    """llama.cpp's converter writes neither key for checkpoints of transformers' form: its files lose what they had."""
    ids = tokens(MISTRAL, 40)
    whole, without = write(tmp_path / "w.gguf", arch=arch), write(tmp_path / "m.gguf", arch=arch, drop=drop, put=put)
    np.testing.assert_array_equal(logits(without, ids), logits(whole, ids))
    assert words in notes(without)
    assert notes(whole) == ""


def test_a_length_alone_changes_nothing(tmp_path: Path) -> None:
    """So llama.cpp writes models of Mistral's own form that have no scaling."""
    ids, spec = tokens(MISTRAL, 40), variant(MISTRAL, temperature=0.0)
    plain = write(tmp_path / "p.gguf", spec, "deepseek2")
    length = write(tmp_path / "l.gguf", spec, "deepseek2", put={"attention.temperature_length": ORIGINAL})
    np.testing.assert_array_equal(logits(length, ids), logits(plain, ids))
    assert notes(length) == ""


def test_without_any_length_it_is_refused(tmp_path: Path) -> None:
    spec = variant(MISTRAL, yarn=None, temperature=0.0)
    for arch, put in (("mistral4", {}), ("deepseek2", {"attention.temperature_scale": 0.1})):
        path = write(tmp_path / "m.gguf", spec, arch, put=put)
        with pytest.raises(cext.FormatError, match=rf"`{arch}\.attention\.temperature_length` is missing"):
            cext.Model(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention.temperature_scale", -0.1),
        ("attention.temperature_scale", float("nan")),
        ("attention.temperature_scale", float("inf")),
        ("attention.temperature_scale", 1e30),
        ("attention.temperature_scale", "0.1"),
        ("attention.temperature_scale", [0.1]),
        ("attention.temperature_length", 2**32 - 1),
        ("attention.temperature_length", 8.0),
        ("attention.temperature_length", "8"),
        ("attention.temperature_length", [8, 8]),
        ("expert_group_count", 4),
    ],
)
@pytest.mark.parametrize("arch", ["mistral4", "deepseek2"])
def test_hostile_values_are_refused_by_name(tmp_path: Path, arch: str, key: str, value: Any) -> None:
    put = {key: value} | ({"expert_group_used_count": 0} if key == "expert_group_count" else {})
    with pytest.raises(cext.EngineError, match=rf"m\.gguf.*`?{arch}\.{key.removesuffix('_count')}"):
        cext.Model(write(tmp_path / "m.gguf", arch=arch, put=put))


def test_the_shape_says_how_queries_are_scaled(tmp_path: Path) -> None:
    with cext.Model(write(tmp_path / "m.gguf"), threads=1) as model:
        assert model.hparams["arch"] == "mistral4"
        assert model.hparams["attention_temperature_scale"] == pytest.approx(0.1)
        assert model.hparams["attention_temperature_length"] == ORIGINAL
    assert {"deepseek2", "mistral4"} <= set(cext.architectures())


def test_experts_of_one_tensor_on_two_devices(tmp_path: Path) -> None:
    """Each device finds its experts' gates and ups in the halves that they have."""
    ids, path = firm_ids(MISTRAL, 24), write(tmp_path / "m.gguf")
    places = [Place("experts", 1, range(MISTRAL.n_layer), range(MISTRAL.n_expert // 2))]
    with cext.Model(path, threads=1, isa="scalar") as model:
        expected = model.session(len(ids), kv_type="f32").eval(ids, "all")
    with cext.Model(path, threads=1, isa="scalar", devices=[Device("cpu", 1, "scalar")], placement=places) as model:
        np.testing.assert_array_equal(model.session(len(ids), kv_type="f32").eval(ids, "all"), expected)
