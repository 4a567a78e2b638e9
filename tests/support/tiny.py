"""Tiny random checkpoints over every switch of the architecture, as a Hugging Face folder and as an f32 GGUF.

The name mapping, the keys and the split of kv_b are written here a second time on purpose: the tests compare the
project's own converter with them. Weights come from raw PCG64 bits, whose stream numpy guarantees, by exact arithmetic,
so that they are the same on every machine and version; ``fingerprint`` tells if they ever are not.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray
from ref.hparams import Hparams, Yarn
from support.checkpoints import write_safetensors

F32 = NDArray[np.float32]


PLAIN_YARN = Yarn(factor=4.0, orig_ctx=32)  # cos and sin alone carry its temperature
LITE_YARN = Yarn(factor=40.0, orig_ctx=64, mscale_all_dim=0.707)


@dataclass(frozen=True)
class Spec:
    """One tiny model. The defaults are V2-Lite's switches; widths are chosen to be all different."""

    name: str
    seed: int = 0
    v3: bool = False  # DeepseekV3: sigmoid router with a selection bias
    n_head_kv: int = 0  # DeepSeekMoE: plain attention over so many heads of keys and values; 0: latent attention
    n_layer: int = 3
    n_layer_dense: int = 1
    n_embd: int = 64
    n_head: int = 4
    q_lora_rank: int = 0
    kv_lora_rank: int = 32
    nope: int = 16
    rope: int = 8
    v: int = 24
    n_ff_dense: int = 96
    n_ff_expert: int = 40
    n_expert: int = 8
    n_used: int = 3
    n_shared: int = 2
    n_group: int = 1
    n_group_used: int = 1
    scale: float = 1.0
    norm_topk: bool = False
    n_vocab: int = 144
    rope_base: float = 10000.0
    yarn: Yarn | None = LITE_YARN
    eps: float = 1e-6
    tied: bool = False
    block_gain: float = 1.0  # scales what each block adds to the residual stream
    n_ctx: int = 4096
    temperature: float = 0.0  # queries scaled by position, from YaRN's original context on

    @property
    def arch(self) -> str:
        return "deepseek" if self.n_head_kv else "deepseek2"

    @property
    def moe_layers(self) -> range:
        return range(self.n_layer_dense, self.n_layer)

    @property
    def hparams(self) -> Hparams:
        return Hparams(
            n_layer=self.n_layer,
            n_embd=self.n_embd,
            n_head=self.n_head,
            n_head_kv=self.n_head_kv or 1,
            q_lora_rank=self.q_lora_rank,
            kv_lora_rank=self.kv_lora_rank,
            qk_nope_head_dim=self.nope,
            qk_rope_head_dim=self.rope,
            v_head_dim=self.v,
            n_layer_dense=self.n_layer_dense,
            n_expert=self.n_expert,
            n_expert_used=self.n_used,
            n_expert_shared=self.n_shared,
            n_expert_group=self.n_group,
            n_expert_group_used=self.n_group_used,
            expert_weights_scale=self.scale,
            expert_weights_norm=self.norm_topk,
            sigmoid=self.v3,
            plain=self.n_head_kv > 0,
            rms_norm_eps=self.eps,
            rope_freq_base=self.rope_base,
            yarn=self.yarn,
            temperature_scale=self.temperature,
            temperature_length=self.yarn.orig_ctx if self.yarn and self.temperature else 0,
        )


# transformers rotates a view as complex numbers, so that nope + rope and kv_lora_rank + rope must be even there.
ODD = {
    "n_embd": 51,
    "n_head": 3,
    "kv_lora_rank": 22,
    "nope": 10,
    "rope": 6,
    "v": 13,
    "n_ff_dense": 37,
    "n_ff_expert": 19,
    "n_vocab": 101,
}
# DeepSeekMoE's attention: every value of a key is rotated, and a head's key and value are as wide.
MOE = {"nope": 0, "kv_lora_rank": 0, "yarn": None}
PRO = {"q_lora_rank": 48, "n_expert": 16, "n_used": 4, "n_group": 4, "n_group_used": 2, "scale": 4.0}

# Seeds are such that no routing decision over the first 32 tokens is a near tie: see golden/make_golden.py.
# What DeepseekV2ForCausalLM and DeepseekV3ForCausalLM run as it stands: golden logits are kept for these.
SPECS = (
    Spec("lite", seed=225),
    Spec("pro", seed=726, **PRO),
    Spec("plain", seed=302, yarn=None, n_layer_dense=0, n_shared=1),
    Spec("odd", seed=53, **ODD, q_lora_rank=17, n_layer_dense=2),
    Spec("odd_grouped", seed=504, **ODD, n_expert=9, n_group=3, n_group_used=2, scale=16.0, yarn=None),
    Spec("v3", seed=30, v3=True, **(PRO | {"scale": 2.5}), n_shared=1, norm_topk=True, yarn=Yarn(40.0, 64, 1.0)),
    Spec("v3_unnormed", seed=6, v3=True, n_group=2, n_group_used=1, scale=2.5, rope_base=50000.0),
    Spec("moonlight", seed=82, v3=True, norm_topk=True, scale=2.446, yarn=None, eps=1e-5, rope_base=50000.0),
    Spec("v3_odd", seed=8, v3=True, **ODD, n_group=4, n_group_used=3, norm_topk=True, n_layer_dense=2),
    Spec("tied", seed=9, tied=True, n_head=1, n_used=1, n_shared=1, yarn=Yarn(4.0, 1024, 0.707)),
    Spec("whole_groups", seed=35, **(PRO | {"n_used": 8}), n_layer=2),
    Spec(
        "all_experts",
        seed=11,
        n_used=8,
        n_layer=2,
        n_head=8,
        nope=32,
        rope=64,
        yarn=Yarn(4.0, 32, 1.0, beta_fast=8.0, beta_slow=0.5),
    ),
    Spec("all_dense", seed=12, n_layer=2, n_layer_dense=2),
    Spec("moe", seed=43, **MOE, n_head_kv=4, rope=16, v=16),
    Spec(
        "moe_shared",
        seed=42,
        **(MOE | {"yarn": PLAIN_YARN}),
        n_head=6,
        n_head_kv=2,
        n_embd=60,
        rope=10,
        v=10,
        tied=True,
    ),
    Spec(
        "moe_one", seed=22, **MOE, n_head=5, n_head_kv=1, n_embd=170, rope=34, v=34, n_layer_dense=0, rope_base=50000.0
    ),
)
# Mistral Small 4's switches (config.json of mistralai/Mistral-Small-4-119B-2603): a latent of two heads' width, no
# dense layer, normalised softmax, YaRN of 128; the original context is short, so that prompts go beyond it.
MISTRAL = Spec(
    "mistral",
    seed=640,
    n_layer_dense=0,
    q_lora_rank=48,
    kv_lora_rank=64,
    nope=16,
    rope=16,
    v=32,
    n_expert=16,
    n_used=4,
    n_shared=1,
    norm_topk=True,
    yarn=Yarn(128.0, 8, 1.0),
    temperature=0.1,
)
# What transformers' V2 and V3 do not do: normalised softmax weights, queries scaled by position, and rows of odd width
# everywhere.
NUMPY_ONLY = (
    MISTRAL,
    Spec("normed", seed=295, norm_topk=True, scale=1.5),
    Spec("all_odd", seed=422, **(ODD | {"nope": 11, "kv_lora_rank": 23}), q_lora_rank=17),
)
# What a GGUF cannot say: only the numpy oracle is compared with transformers.
TWO_MSCALES = Spec("two_mscales", seed=96, yarn=Yarn(40.0, 64, mscale_all_dim=0.707, mscale=1.0))

# llama.cpp takes q-LoRA for granted unless a model has V2-Lite's 27 layers. Rows of 256 hold every block format;
# k_b's rows of 64 and the experts' down rows of 32 fall back to the formats of 32, as V2-Lite's 1408 do.
WIDE = Spec(
    "wide",
    seed=30,
    n_layer=3,
    n_embd=256,
    n_head=4,
    q_lora_rank=256,
    kv_lora_rank=256,
    nope=64,
    rope=32,
    v=64,
    n_ff_dense=512,
    n_ff_expert=256,
    n_expert=4,
    n_used=2,
    n_shared=1,
    n_vocab=320,
    yarn=Yarn(40.0, 64, 0.707),
    block_gain=0.25,
)


def spec_named(name: str) -> Spec:
    return next(s for s in (*SPECS, *NUMPY_ONLY, TWO_MSCALES) if s.name == name)


class Draw:
    """Uniform float32 numbers from raw PCG64 bits, exact in every step."""

    def __init__(self, seed: int) -> None:
        self.bits = np.random.PCG64(seed)

    def unit(self, *shape: int) -> F32:
        """In [-1, 1), multiples of 2^-23."""
        raw = self.bits.random_raw(int(np.prod(shape))) >> np.uint64(40)
        return (raw.astype(np.float32) * np.float32(2**-23) - np.float32(1)).reshape(shape)

    def matrix(self, rows: int, cols: int, gain: float = 1.0) -> F32:
        """(rows, cols) with variance gain^2 / cols: a normalised input comes out with root mean square gain."""
        return self.unit(rows, cols) * np.float32(gain * (3 / cols) ** 0.5)

    def norm(self, n: int) -> F32:
        return np.float32(1) + self.unit(n) * np.float32(0.5)


@dataclass(frozen=True)
class Checkpoint:
    """A spec's weights under the Hugging Face names, float32."""

    spec: Spec

    @cached_property
    def tensors(self) -> dict[str, F32]:
        s, draw = self.spec, Draw(self.spec.seed)
        out = {"model.embed_tokens.weight": draw.matrix(s.n_vocab, s.n_embd, gain=s.n_embd**0.5)}
        for il in range(s.n_layer):
            for name, value in self._layer(draw, il):
                out[f"model.layers.{il}.{name}"] = value
        out["model.norm.weight"] = draw.norm(s.n_embd)
        if not s.tied:
            out["lm_head.weight"] = draw.matrix(s.n_vocab, s.n_embd)
        return out

    def _layer(self, draw: Draw, il: int) -> Iterator[tuple[str, F32]]:
        s = self.spec
        yield "input_layernorm.weight", draw.norm(s.n_embd)
        if s.n_head_kv:
            yield "self_attn.q_proj.weight", draw.matrix(s.n_head * s.rope, s.n_embd, gain=1.5)
            yield "self_attn.k_proj.weight", draw.matrix(s.n_head_kv * s.rope, s.n_embd)
            yield "self_attn.v_proj.weight", draw.matrix(s.n_head_kv * s.v, s.n_embd)
        else:
            yield from self._latent(draw)
        yield "self_attn.o_proj.weight", draw.matrix(s.n_embd, s.n_head * s.v, gain=s.block_gain)
        yield "post_attention_layernorm.weight", draw.norm(s.n_embd)
        if il not in s.moe_layers:
            yield from self._mlp(draw, "mlp", s.n_ff_dense)
            return
        yield "mlp.gate.weight", draw.matrix(s.n_expert, s.n_embd, gain=2.0)
        if s.v3:
            yield "mlp.gate.e_score_correction_bias", draw.unit(s.n_expert) * np.float32(0.25)
        for e in range(s.n_expert):
            yield from self._mlp(draw, f"mlp.experts.{e}", s.n_ff_expert)
        yield from self._mlp(draw, "mlp.shared_experts", s.n_ff_expert * s.n_shared)

    def _latent(self, draw: Draw) -> Iterator[tuple[str, F32]]:
        s = self.spec
        if s.q_lora_rank:
            yield "self_attn.q_a_proj.weight", draw.matrix(s.q_lora_rank, s.n_embd)
            yield "self_attn.q_a_layernorm.weight", draw.norm(s.q_lora_rank)
            yield "self_attn.q_b_proj.weight", draw.matrix(s.n_head * (s.nope + s.rope), s.q_lora_rank, gain=1.5)
        else:
            yield "self_attn.q_proj.weight", draw.matrix(s.n_head * (s.nope + s.rope), s.n_embd, gain=1.5)
        yield "self_attn.kv_a_proj_with_mqa.weight", draw.matrix(s.kv_lora_rank + s.rope, s.n_embd)
        yield "self_attn.kv_a_layernorm.weight", draw.norm(s.kv_lora_rank)
        yield "self_attn.kv_b_proj.weight", draw.matrix(s.n_head * (s.nope + s.v), s.kv_lora_rank)

    def _mlp(self, draw: Draw, name: str, width: int) -> Iterator[tuple[str, F32]]:
        yield f"{name}.gate_proj.weight", draw.matrix(width, self.spec.n_embd)
        yield f"{name}.up_proj.weight", draw.matrix(width, self.spec.n_embd)
        yield f"{name}.down_proj.weight", draw.matrix(self.spec.n_embd, width, gain=2 * self.spec.block_gain)

    def fingerprint(self) -> str:
        """A hash of the weights: golden logits hold for these and no others."""
        digest = hashlib.sha256()
        for name, value in self.tensors.items():
            digest.update(f"{name}{value.shape}".encode() + value.tobytes())
        return digest.hexdigest()

    def config(self) -> dict[str, Any]:
        """config.json as the hub's checkpoints of this family write it."""
        s = self.spec
        if s.n_head_kv:
            return self._moe_config()
        kind = "V3" if s.v3 else "V2"
        config = {
            "architectures": [f"Deepseek{kind}ForCausalLM"],
            "model_type": f"deepseek_{kind.lower()}",
            "torch_dtype": "float32",
            "hidden_act": "silu",
            "attention_bias": False,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "vocab_size": s.n_vocab,
            "hidden_size": s.n_embd,
            "num_hidden_layers": s.n_layer,
            "num_attention_heads": s.n_head,
            "num_key_value_heads": s.n_head,
            "q_lora_rank": s.q_lora_rank or None,
            "kv_lora_rank": s.kv_lora_rank,
            "qk_nope_head_dim": s.nope,
            "qk_rope_head_dim": s.rope,
            "v_head_dim": s.v,
            "intermediate_size": s.n_ff_dense,
            "moe_intermediate_size": s.n_ff_expert,
            "n_routed_experts": s.n_expert,
            "num_experts_per_tok": s.n_used,
            "n_shared_experts": s.n_shared,
            "n_group": s.n_group,
            "topk_group": s.n_group_used,
            "topk_method": "noaux_tc" if s.v3 else "greedy" if s.n_group == 1 else "group_limited_greedy",
            "scoring_func": "sigmoid" if s.v3 else "softmax",
            "routed_scaling_factor": s.scale,
            "norm_topk_prob": s.norm_topk,
            "first_k_dense_replace": s.n_layer_dense,
            "moe_layer_freq": 1,
            "max_position_embeddings": s.n_ctx,
            "rms_norm_eps": s.eps,
            "rope_theta": s.rope_base,
            "tie_word_embeddings": s.tied,
        }
        if s.v3:
            config["num_nextn_predict_layers"] = 0
        if s.yarn:
            config["rope_scaling"] = {
                "type": "yarn",
                "factor": s.yarn.factor,
                "original_max_position_embeddings": s.yarn.orig_ctx,
                "beta_fast": s.yarn.beta_fast,
                "beta_slow": s.yarn.beta_slow,
                "mscale": s.yarn.mscale_all_dim if s.yarn.mscale is None else s.yarn.mscale,
                "mscale_all_dim": s.yarn.mscale_all_dim,
            }
        return config

    def _moe_config(self) -> dict[str, Any]:
        """The keys of deepseek-ai/deepseek-moe-16b-base."""
        s = self.spec
        config = {
            "architectures": ["DeepseekForCausalLM"],
            "model_type": "deepseek",
            "torch_dtype": "float32",
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "aux_loss_alpha": 0.001,
            "seq_aux": True,
            "pretraining_tp": 1,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "vocab_size": s.n_vocab,
            "hidden_size": s.n_embd,
            "num_hidden_layers": s.n_layer,
            "num_attention_heads": s.n_head,
            "num_key_value_heads": s.n_head_kv,
            "intermediate_size": s.n_ff_dense,
            "moe_intermediate_size": s.n_ff_expert,
            "n_routed_experts": s.n_expert,
            "num_experts_per_tok": s.n_used,
            "n_shared_experts": s.n_shared,
            "scoring_func": "softmax",
            "norm_topk_prob": s.norm_topk,
            "first_k_dense_replace": s.n_layer_dense,
            "moe_layer_freq": 1,
            "max_position_embeddings": s.n_ctx,
            "rms_norm_eps": s.eps,
            "rope_theta": s.rope_base,
            "rope_scaling": None,
            "tie_word_embeddings": s.tied,
        }
        if s.yarn:
            config["rope_scaling"] = {
                "type": "yarn",
                "factor": s.yarn.factor,
                "original_max_position_embeddings": s.yarn.orig_ctx,
            }
        return config

    def write(self, folder: Path) -> Path:
        """A Hugging Face folder: config.json and model.safetensors."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config(), indent=2), encoding="utf-8")
        write_safetensors(folder / "model.safetensors", {name: ("F32", value) for name, value in self.tensors.items()})
        return folder


GLOBAL_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
LAYER_NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.q_a_proj.weight": "attn_q_a.weight",
    "self_attn.q_a_layernorm.weight": "attn_q_a_norm.weight",
    "self_attn.q_b_proj.weight": "attn_q_b.weight",
    "self_attn.kv_a_proj_with_mqa.weight": "attn_kv_a_mqa.weight",
    "self_attn.kv_a_layernorm.weight": "attn_kv_a_norm.weight",
    "self_attn.kv_b_proj.weight": "attn_kv_b.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "mlp.shared_experts.gate_proj.weight": "ffn_gate_shexp.weight",
    "mlp.shared_experts.up_proj.weight": "ffn_up_shexp.weight",
    "mlp.shared_experts.down_proj.weight": "ffn_down_shexp.weight",
}


def pairs_together(w: F32, n_head: int) -> F32:
    """Rows of w, head by head, so that the two values that turn together (i and i + half) are neighbours."""
    half = len(w) // n_head // 2
    order = [head * 2 * half + i + part * half for head in range(n_head) for i in range(half) for part in range(2)]
    return w[order]


def gguf_tensors(checkpoint: Checkpoint, legacy: bool = False) -> dict[str, F32]:
    """The weights under their GGUF names, in numpy's order; legacy keeps kv_b, or q, k and v, in one piece."""
    s, source = checkpoint.spec, checkpoint.tensors
    out = {to: source[name] for name, to in GLOBAL_NAMES.items() if name in source}
    for il in range(s.n_layer):
        prefix = f"model.layers.{il}."
        for name, to in LAYER_NAMES.items():
            if prefix + name in source:
                out[f"blk.{il}.{to}"] = source[prefix + name]
        if il in s.moe_layers:
            for part in ("gate", "up", "down"):
                experts = [source[f"{prefix}mlp.experts.{e}.{part}_proj.weight"] for e in range(s.n_expert)]
                out[f"blk.{il}.ffn_{part}_exps.weight"] = np.stack(experts)
        if s.n_head_kv:
            q, k, v = (f"blk.{il}.attn_{part}.weight" for part in "qkv")
            out[q], out[k] = pairs_together(out[q], s.n_head), pairs_together(out[k], s.n_head_kv)
            if legacy:
                out[f"blk.{il}.attn_qkv.weight"] = np.concatenate([out.pop(name) for name in (q, k, v)])
        elif not legacy:
            kv_b = out.pop(f"blk.{il}.attn_kv_b.weight").reshape(s.n_head, s.nope + s.v, s.kv_lora_rank)
            out[f"blk.{il}.attn_k_b.weight"] = np.ascontiguousarray(kv_b[:, : s.nope].transpose(0, 2, 1))
            out[f"blk.{il}.attn_v_b.weight"] = np.ascontiguousarray(kv_b[:, s.nope :])
    return out


def gguf_metadata(s: Spec, legacy: bool = False) -> dict[str, Any]:
    """The keys of the file, without the vocabulary; Python types decide the value types (int: u32, float: f32)."""
    if s.yarn and s.yarn.mscale not in (None, s.yarn.mscale_all_dim):
        raise ValueError(f"{s.name}: no GGUF key holds an mscale that differs from mscale_all_dim")
    keys: dict[str, Any] = {
        "block_count": s.n_layer,
        "context_length": s.n_ctx,
        "embedding_length": s.n_embd,
        "feed_forward_length": s.n_ff_dense,
        "vocab_size": s.n_vocab,
        "attention.head_count": s.n_head,
        "attention.layer_norm_rms_epsilon": s.eps,
        "rope.dimension_count": s.rope,
        "rope.freq_base": s.rope_base,
        "leading_dense_block_count": s.n_layer_dense,
        "expert_count": s.n_expert,
        "expert_used_count": s.n_used,
        "expert_shared_count": s.n_shared,
        "expert_feed_forward_length": s.n_ff_expert,
        "expert_weights_scale": s.scale,
        "expert_weights_norm": s.norm_topk,
    }
    if s.n_head_kv:
        keys["attention.head_count_kv"] = s.n_head_kv
    else:
        keys |= {
            "attention.head_count_kv": s.n_head if legacy else 1,
            "attention.kv_lora_rank": s.kv_lora_rank,
            "attention.key_length": s.nope + s.rope if legacy else s.kv_lora_rank + s.rope,
            "attention.value_length": s.v if legacy else s.kv_lora_rank,
        }
    if not legacy and not s.n_head_kv:
        keys |= {"attention.key_length_mla": s.nope + s.rope, "attention.value_length_mla": s.v}
    if s.q_lora_rank:
        keys["attention.q_lora_rank"] = s.q_lora_rank
    if s.n_group > 1:
        keys |= {"expert_group_count": s.n_group, "expert_group_used_count": s.n_group_used}
    if s.v3:
        keys["expert_gating_func"] = 2
    if s.yarn:
        keys |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": s.yarn.factor,
            "rope.scaling.original_context_length": s.yarn.orig_ctx,
            "rope.scaling.yarn_log_multiplier": 0.1 * s.yarn.mscale_all_dim,
        }
        betas = {"fast": s.yarn.beta_fast, "slow": s.yarn.beta_slow}
        if betas != {"fast": 32.0, "slow": 1.0}:
            keys |= {f"rope.scaling.yarn_beta_{end}": value for end, value in betas.items()}
        if s.temperature:
            keys |= {
                "attention.temperature_scale": s.temperature,
                "attention.temperature_length": s.yarn.orig_ctx,
            }
    return {"general.name": s.name} | {f"{s.arch}.{key}": value for key, value in keys.items()}


def gguf_vocabulary(n_vocab: int) -> dict[str, Any]:
    """A made-up byte vocabulary that llama.cpp's loader accepts: bytes first, then pairs of them."""
    tokens = [gguf_byte(i) for i in range(min(n_vocab, 256))]
    tokens += [gguf_byte(i % 256) + gguf_byte(i // 256) for i in range(n_vocab - len(tokens))]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "deepseek-llm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * n_vocab,
        "tokenizer.ggml.merges": [f"{gguf_byte(97)} {gguf_byte(98)}"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    }


def gguf_byte(i: int) -> str:
    """GPT-2's printable stand-in for a byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return chr(i) if i in printable else chr(256 + [b for b in range(256) if b not in printable].index(i))


def write_gguf(
    path: Path, spec: Spec, *, legacy: bool = False, dtype: type[np.floating[Any]] = np.float32, parts: int = 1
) -> Path:
    """The spec's model as a GGUF; dtype is that of the matrices (float32 or float16), vectors and router stay f32.

    In several parts their names are the path's with `-00001-of-00002` before the suffix; the first one's is returned.
    """
    tensors = {
        name: value if value.ndim == 1 or "ffn_gate_inp" in name else value.astype(dtype)
        for name, value in gguf_tensors(Checkpoint(spec), legacy).items()
    }
    keys = gguf_metadata(spec, legacy) | gguf_vocabulary(spec.n_vocab)
    return write_tensors(path, keys, tensors, spec.arch, parts)


def write_tensors(
    path: Path, keys: dict[str, Any], tensors: dict[str, Any], arch: str = "deepseek2", parts: int = 1
) -> Path:
    """Any keys and tensors as a GGUF, by gguf-py. A tensor is an array, or its blocks and their type."""
    writer = gguf.GGUFWriter(path, arch, split_max_tensors=-(-len(tensors) // parts) if parts > 1 else 0)
    for key, value in keys.items():
        add_key(writer, key, value)
    for name, value in tensors.items():
        blocks, kind = value if isinstance(value, tuple) else (value, None)
        writer.add_tensor(name, blocks, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path if parts == 1 else path.with_name(f"{path.stem}-00001-of-{parts:05d}.gguf")


def add_key(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case list():
            writer.add_array(key, value)


def tokens(spec: Spec, n: int, seed: int = 0) -> NDArray[np.int32]:
    """n token ids for a test."""
    raw = np.random.PCG64(1000 + seed).random_raw(n) % np.uint64(spec.n_vocab)
    return np.atleast_1d(raw).astype(np.int32)


def variant(spec: Spec, **changes: Any) -> Spec:
    return replace(spec, **changes)
