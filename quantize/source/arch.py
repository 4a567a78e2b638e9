"""arch.py: config.json of the DeepSeek-V2 family -> a checked shape and the keys of its GGUF.

Owns what the keys mean; families.py, what each kind of checkpoint takes for granted. What GGUF cannot say (two
different mscales, expert layers that skip) is refused here rather than written as something else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quantize.base.errors import CheckpointError, UnsupportedError
from quantize.source import families
from quantize.source.families import Attention, Family

GATING = {"softmax": 1, "sigmoid": 2}  # deepseek2.expert_gating_func

# What deepseek2 GGUF has no key for: config key -> the only value that it stands for
FIXED: dict[str, object] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "moe_layer_freq": 1,
    "rope_interleave": True,
    "partial_rotary_factor": 1.0,
}
MAX_COUNT = 1 << 24  # above any width or count of the family; products of three stay below 2**72, which Python holds


@dataclass(frozen=True)
class Yarn:
    """YaRN's context extension, as config.json gives it."""

    factor: float
    original_context: int
    mscale_all_dim: float | None  # None: the softmax is not scaled, and cos and sin are, as GGUF has it by default
    beta_fast: float
    beta_slow: float
    temperature: float = 0.0  # queries at pos are multiplied by 1 + this * ln(1 + floor(pos / original_context))


@dataclass(frozen=True)
class Arch:
    """The shape of a model. Widths in values; 0 where a part is absent."""

    family: Family
    n_layer: int
    n_ctx: int
    n_embd: int
    n_vocab: int
    n_head: int
    n_head_kv: int  # that keys and values are cached for; 1 where a latent serves all
    q_lora_rank: int
    kv_lora_rank: int
    nope: int
    rope: int
    v_dim: int
    n_ff: int
    n_layer_dense: int
    n_expert: int
    n_expert_used: int
    n_expert_shared: int
    n_ff_expert: int
    n_group: int
    n_group_used: int
    expert_scale: float
    expert_norm: bool
    gating: str
    has_router_bias: bool
    rms_eps: float
    rope_base: float
    yarn: Yarn | None
    tied: bool
    n_nextn: int  # multi-token prediction layers at the end of the checkpoint, which GGUF leaves out

    @property
    def attention(self) -> Attention:
        """How its layers attend."""
        return self.family.attention

    def is_dense(self, il: int) -> bool:
        """Whether layer il has a plain feed-forward network instead of experts."""
        return il < self.n_layer_dense

    def keys(self) -> dict[str, int | float | bool | str]:
        """The ``deepseek2.*`` metadata: int stands for GGUF's uint32, float for float32."""
        keys: dict[str, int | float | bool | str] = {
            "block_count": self.n_layer,
            "context_length": self.n_ctx,
            "embedding_length": self.n_embd,
            "feed_forward_length": self.n_ff,
            "vocab_size": self.n_vocab,
            "attention.head_count": self.n_head,
            "attention.head_count_kv": self.n_head_kv,
            "attention.layer_norm_rms_epsilon": self.rms_eps,
            **self._head_keys(),
            "rope.dimension_count": self.rope,
            "rope.freq_base": self.rope_base,
            "leading_dense_block_count": self.n_layer_dense,
            "expert_shared_count": self.n_expert_shared,
            "expert_feed_forward_length": self.n_ff_expert,
        }
        if self.n_expert:
            keys |= {
                "expert_count": self.n_expert,
                "expert_used_count": self.n_expert_used,
                "expert_group_count": self.n_group,
                "expert_group_used_count": self.n_group_used,
                "expert_weights_scale": self.expert_scale,
                "expert_weights_norm": self.expert_norm,
                "expert_gating_func": GATING[self.gating],
            }
        if self.yarn is not None:
            keys |= {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": self.yarn.factor,
                "rope.scaling.original_context_length": self.yarn.original_context,
                "rope.scaling.yarn_beta_fast": self.yarn.beta_fast,
                "rope.scaling.yarn_beta_slow": self.yarn.beta_slow,
            }
            if self.yarn.mscale_all_dim is not None:
                keys["rope.scaling.yarn_log_multiplier"] = 0.1 * self.yarn.mscale_all_dim
            if self.yarn.temperature:
                keys["attention.temperature_scale"] = self.yarn.temperature
                keys["attention.temperature_length"] = self.yarn.original_context
        return {f"{self.family.architecture}.{key}": value for key, value in keys.items()}

    def _head_keys(self) -> dict[str, int]:
        """Widths of heads, and of a latent with its rotary key, which is one head to all."""
        key, value = self.nope + self.rope, self.v_dim
        if self.attention == "plain":
            return {"attention.key_length": key, "attention.value_length": value}
        return {
            "attention.kv_lora_rank": self.kv_lora_rank,
            "attention.key_length": self.kv_lora_rank + self.rope,
            "attention.value_length": self.kv_lora_rank,
            "attention.key_length_mla": key,
            "attention.value_length_mla": value,
            **({"attention.q_lora_rank": self.q_lora_rank} if self.q_lora_rank else {}),
        }


class _Config:
    """config.json with typed, range-checked access; every failure names the key."""

    def __init__(self, config: Mapping[str, Any], defaults: Mapping[str, object]) -> None:
        self.values = {**defaults, **{k: v for k, v in config.items() if v is not None}}

    def count(self, key: str, default: int | None = None, least: int = 1) -> int:
        value = self.values.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= MAX_COUNT:
            raise CheckpointError(f"config.json: `{key}` is {value!r}, expected a count from {least} to {MAX_COUNT}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.values.get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e12:
            raise CheckpointError(f"config.json: `{key}` is {value!r}, expected a positive number")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.values.get(key, False)
        if not isinstance(value, bool):
            raise CheckpointError(f"config.json: `{key}` is {value!r}, expected true or false")
        return value

    def choice(self, key: str, allowed: tuple[str, ...]) -> str:
        value = self.values.get(key)
        if value not in allowed:
            raise UnsupportedError(f"config.json: `{key}` is {value!r}, expected one of {', '.join(allowed)}")
        return str(value)


def parse(config: dict[str, Any]) -> Arch:
    """The shape that config.json describes. CheckpointError: bad values; UnsupportedError: not this family."""
    family, text = families.find(config)
    c = _Config(text, family.defaults)
    for key, value in {**FIXED, **family.fixed}.items():
        if c.values.get(key, value) != value:
            raise UnsupportedError(
                f"config.json: `{key}` is {c.values[key]!r}, and {family.architecture} GGUF can only say {value!r}"
            )
    if family.model_type == "deepseek_v2" and c.flag("norm_topk_prob"):
        # The published code drops the scaling factor then, transformers ignores the flag: no answer is the right one.
        raise UnsupportedError("config.json: `norm_topk_prob` is true in a V2 model, where its meaning is not settled")
    n_layer = c.count("num_hidden_layers")
    experts = _experts(c, n_layer) if family.has_experts else _no_experts(c, n_layer)
    return Arch(
        family=family,
        n_layer=n_layer,
        n_ctx=c.count("max_position_embeddings"),
        n_embd=c.count("hidden_size"),
        n_vocab=c.count("vocab_size"),
        **(_latent_heads(c) if family.attention == "latent" else _plain_heads(c)),
        n_ff=c.count("intermediate_size"),
        **experts,
        rms_eps=c.number("rms_norm_eps", 1e-6),
        rope_base=_rope_base(c),
        yarn=_yarn(c, family),
        tied=c.flag("tie_word_embeddings"),
        n_nextn=max(c.count(key, 0, least=0) for key in ("num_nextn_predict_layers", "num_mtp_layers")),
    )


def _latent_heads(c: _Config) -> dict[str, Any]:
    n_head = c.count("num_attention_heads")
    if c.count("num_key_value_heads", n_head) != n_head:
        raise UnsupportedError("config.json: `num_key_value_heads` differs from `num_attention_heads`: not MLA")
    return {
        "n_head": n_head,
        "n_head_kv": 1,
        "q_lora_rank": c.count("q_lora_rank", 0, least=0),
        "kv_lora_rank": c.count("kv_lora_rank"),
        "nope": c.count("qk_nope_head_dim"),
        "rope": c.count("qk_rope_head_dim"),
        "v_dim": c.count("v_head_dim"),
    }


def _plain_heads(c: _Config) -> dict[str, Any]:
    """All heads together are as wide as the model; each is rotated whole."""
    n_head, width = c.count("num_attention_heads"), c.count("hidden_size")
    n_head_kv, head = c.count("num_key_value_heads", n_head), width // n_head
    if n_head % n_head_kv:
        raise CheckpointError(f"config.json: {n_head} heads cannot share {n_head_kv} heads of keys and values evenly")
    if width % n_head or head % 2 or c.count("head_dim", head) != head:
        raise UnsupportedError(
            f"config.json: {n_head} heads, `head_dim` {c.values.get('head_dim', head)}, `hidden_size` {width}",
            "together heads must be as wide as the model, and each of an even width",
        )
    return {
        "n_head": n_head, "n_head_kv": n_head_kv, "q_lora_rank": 0, "kv_lora_rank": 0, "nope": 0, "rope": head,
        "v_dim": head,
    }  # fmt: skip


def _experts(c: _Config, n_layer: int) -> dict[str, Any]:
    n_expert, n_used = c.count("n_routed_experts"), c.count("num_experts_per_tok")
    # Greedy routing looks at all experts whatever n_group says: one group, so that no engine limits it.
    method = c.choice("topk_method", ("greedy", "group_limited_greedy", "noaux_tc"))
    n_group, n_group_used = (c.count("n_group", 1), c.count("topk_group", 1)) if method != "greedy" else (1, 1)
    if n_expert % n_group or n_group_used > n_group or n_used > n_expert // n_group * n_group_used:
        raise CheckpointError(
            f"config.json: {n_used} of {n_expert} experts from {n_group_used} of {n_group} groups cannot be chosen"
        )
    return {
        "n_layer_dense": _dense_layers(c, n_layer),
        "n_expert": n_expert,
        "n_expert_used": n_used,
        "n_expert_shared": c.count("n_shared_experts", 0, least=0),
        "n_ff_expert": c.count("moe_intermediate_size"),
        "n_group": n_group,
        "n_group_used": n_group_used,
        "expert_scale": c.number("routed_scaling_factor", 1.0),
        "expert_norm": c.flag("norm_topk_prob"),
        "gating": c.choice("scoring_func", tuple(GATING)),
        "has_router_bias": method == "noaux_tc",
    }


def _dense_layers(c: _Config, n_layer: int) -> int:
    """Layers without experts: a count, or as transformers 5 lists them, "dense" or "sparse" by layer."""
    kinds = c.values.get("mlp_layer_types")
    if kinds is None:
        return min(c.count("first_k_dense_replace", 0, least=0), n_layer)
    if not isinstance(kinds, list) or len(kinds) != n_layer or not all(k in ("dense", "sparse") for k in kinds):
        raise CheckpointError(f"config.json: `mlp_layer_types` is not a list of {n_layer} times dense or sparse")
    n_dense = kinds.count("dense")
    if "sparse" in kinds[:n_dense]:
        raise UnsupportedError(
            "config.json: `mlp_layer_types` has dense layers after sparse ones, for which GGUF has no key"
        )
    return n_dense


def _no_experts(c: _Config, n_layer: int) -> dict[str, Any]:
    return {
        "n_layer_dense": n_layer,
        "n_expert": 0,
        "n_expert_used": 0,
        "n_expert_shared": 0,
        "n_ff_expert": c.count("intermediate_size"),  # of none; llama.cpp does not load a file that lacks the key
        "n_group": 1,
        "n_group_used": 1,
        "expert_scale": 1.0,
        "expert_norm": False,
        "gating": "softmax",
        "has_router_bias": False,
    }


def _rope(c: _Config) -> dict[str, Any]:
    rope = c.values.get("rope_scaling") or c.values.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise CheckpointError(f"config.json: `rope_scaling` is {rope!r}, expected an object")
    if (part := rope.get("partial_rotary_factor", 1.0)) != 1.0:
        raise UnsupportedError(f"config.json: `partial_rotary_factor` is {part!r}, and deepseek2 GGUF can only say 1")
    return rope


def _rope_base(c: _Config) -> float:
    rope = _Config(_rope(c), {"rope_theta": c.values.get("rope_theta", 10000.0)})
    return rope.number("rope_theta")


def _yarn(c: _Config, family: Family) -> Yarn | None:
    rope = _rope(c)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default" and family.scales_queries:
        raise UnsupportedError(f"config.json: `rope_parameters` of a {family.model_type} model are not yarn's")
    if kind == "default":
        return None
    if kind != "yarn":
        raise UnsupportedError(f"config.json: rope scaling {kind!r} is not supported", "V2-family models use yarn")
    y = _Config(rope, {})
    beta = y.values.get("llama_4_scaling_beta", 0)
    if not family.scales_queries and beta != 0:
        raise UnsupportedError(
            f"config.json: `llama_4_scaling_beta` is {beta!r}, which {family.model_type} models do not have"
        )
    mscale, all_dim = y.values.get("mscale"), y.values.get("mscale_all_dim")
    if "attention_factor" in y.values:
        raise UnsupportedError("config.json: rope_scaling has an attention_factor, for which deepseek2 GGUF has no key")
    # Without both, cos and sin carry 1 + 0.1 ln(factor) and the softmax scale nothing: GGUF without a multiplier.
    plain = not all_dim and mscale in (None, 0, 1)
    if not plain and mscale != all_dim:
        # GGUF keeps one multiplier: cos and sin unscaled, the softmax scale carrying m * m.
        raise UnsupportedError(
            f"config.json: rope_scaling has mscale {mscale} and mscale_all_dim {all_dim}; GGUF can only say equal ones"
        )
    if not plain and family.attention == "plain":
        raise UnsupportedError(
            f"config.json: rope_scaling has mscale_all_dim {all_dim}, which {family.architecture} GGUF cannot say"
        )
    return Yarn(
        factor=y.number("factor"),
        original_context=y.count("original_max_position_embeddings"),
        mscale_all_dim=None if plain else y.number("mscale_all_dim"),
        beta_fast=y.number("beta_fast", 32),
        beta_slow=y.number("beta_slow", 1),
        temperature=y.number("llama_4_scaling_beta") if beta != 0 or family.scales_queries else 0.0,
    )
