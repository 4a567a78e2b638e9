"""gguf_arch.py: the shape of a model in a GGUF, from its keys back to those of config.json, which arch.py reads.

The engine reads and checks the file's keys first, tells what they leave unsaid, and refuses those that would change the
arithmetic and that it does not know. What it knows and a file of ours could not say again is refused here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from cext.model import Hparams
from quantize.base.errors import QuantizeError, UnsupportedError
from quantize.source import arch as arch_of
from quantize.source import families
from quantize.source.arch import Arch

ARCHITECTURES = tuple(sorted({family.architecture for family in families.FAMILIES.values()}))
# Keys that change the arithmetic and that the engine reads, unless they have this value or our file would say them.
UNSAID = {"rope.scaling.attn_factor": None, "attention.temperature_scale": 0.0, "attention.temperature_length": 0}
# What a file may say otherwise than ours: draft layers in the count, the older form's widths of latent attention.
SAID_OTHERWISE = ("block_count", "feed_forward_length", "expert_feed_forward_length")
SAID_OTHERWISE_LATENT = ("attention.head_count_kv", "attention.key_length", "attention.value_length")


def arch_of_file(path: str, metadata: Mapping[str, Any], shape: Hparams, names: set[str]) -> Arch:
    """The shape that the engine read, as a checkpoint's config.json would have given it. names: of the tensors.

    Raises UnsupportedError for a file of another architecture, or with keys that ours would not have.
    """
    name = shape["arch"]
    if name not in ARCHITECTURES:
        raise UnsupportedError(
            f"`{path}`: a GGUF of architecture {name} is not read, only of {', '.join(ARCHITECTURES)}",
            "start from the checkpoint (safetensors)",
        )

    def key(suffix: str, default: Any = None) -> Any:
        return metadata.get(f"{name}.{suffix}", default)

    try:
        arch = arch_of.parse(_config(shape, key, names))
    except QuantizeError as error:
        raise type(error)(f"`{path}`: put as {error}", error.hint) from error
    ours = arch.keys()
    otherwise = SAID_OTHERWISE + (SAID_OTHERWISE_LATENT if arch.attention == "latent" else ())
    for suffix, neutral in UNSAID.items():
        if f"{name}.{suffix}" not in ours and key(suffix) is not None and key(suffix) != neutral:
            raise UnsupportedError(
                f"`{path}`: `{name}.{suffix}` is {key(suffix)}, which a file made here would not say",
                "start from the checkpoint (safetensors)",
            )
    for written, value in ours.items():
        suffix = written.removeprefix(f"{name}.")
        if written in metadata and suffix not in otherwise and not _same(metadata[written], value):
            raise UnsupportedError(
                f"`{path}`: `{written}` is {metadata[written]!r}, and a file made here would say {value!r}",
                "start from the checkpoint (safetensors)",
            )
    return arch


def _config(shape: Hparams, key: Any, names: set[str]) -> dict[str, Any]:
    has_bias = any(name.endswith(".exp_probs_b.bias") for name in names)
    is_v2 = shape["expert_gating"] == "softmax" and not has_bias and not shape["expert_weights_norm"]
    ungrouped = "group_limited_greedy" if shape["n_expert_group"] > 1 else "greedy"
    has_experts = shape["n_layer_dense"] < shape["n_layer"]
    ours = "youtu" if not has_experts else "deepseek_v2" if is_v2 else "deepseek_v3"
    return {
        "model_type": ours if shape["arch"] == "deepseek2" else shape["arch"],
        "num_hidden_layers": shape["n_layer"],
        "max_position_embeddings": shape["n_ctx_train"],
        "hidden_size": shape["n_embd"],
        "vocab_size": shape["n_vocab"],
        "num_attention_heads": shape["n_head"],
        "num_key_value_heads": shape["n_head_kv"] if shape["attention"] == "plain" else shape["n_head"],
        "q_lora_rank": shape["q_lora_rank"] or None,
        "kv_lora_rank": shape["kv_lora_rank"],
        "qk_nope_head_dim": shape["qk_nope_head_dim"],
        "qk_rope_head_dim": shape["qk_rope_head_dim"],
        "v_head_dim": shape["v_head_dim"],
        "head_dim": shape["qk_nope_head_dim"] + shape["qk_rope_head_dim"],
        "intermediate_size": shape["n_ff_dense"] or key("feed_forward_length") or shape["n_ff_expert"],
        "first_k_dense_replace": shape["n_layer_dense"],
        "n_routed_experts": shape["n_expert"],
        "num_experts_per_tok": shape["n_expert_used"],
        "n_shared_experts": shape["n_expert_shared"],
        "moe_intermediate_size": shape["n_ff_expert"],
        "n_group": shape["n_expert_group"],
        "topk_group": shape["n_expert_group_used"],
        "routed_scaling_factor": _decimal(shape["expert_weights_scale"]),
        "norm_topk_prob": shape["expert_weights_norm"],
        "scoring_func": shape["expert_gating"],
        "topk_method": "noaux_tc" if has_bias else ungrouped,
        "rms_norm_eps": _decimal(shape["rms_norm_eps"]),
        "rope_theta": _decimal(shape["rope_freq_base"]),
        "rope_scaling": _yarn(shape, key),
        "tie_word_embeddings": "output.weight" not in names,
    }


def _yarn(shape: Hparams, key: Any) -> dict[str, Any] | None:
    multiplier = key("rope.scaling.yarn_log_multiplier", 0.0)
    if shape["rope_scaling_factor"] == 1.0 and key("rope.scaling.type") != "yarn":
        return None
    mscale = float(_decimal(10 * _decimal(multiplier))) if multiplier else 0
    return {
        "type": "yarn",
        "factor": _decimal(shape["rope_scaling_factor"]),
        "original_max_position_embeddings": shape["rope_orig_ctx"],
        "beta_fast": _decimal(shape["rope_beta_fast"]),
        "beta_slow": _decimal(shape["rope_beta_slow"]),
        "mscale": mscale or None,
        "mscale_all_dim": mscale or None,
        "llama_4_scaling_beta": _decimal(shape["attention_temperature_scale"]) or None,
    }


def _decimal(value: float) -> float:
    """The number of fewest digits that a float32 stands for: what config.json had, as a rule."""
    return float(str(np.float32(value)))


def _same(said: object, ours: object) -> bool:
    if isinstance(said, bool) or isinstance(ours, bool | str) or not isinstance(said, int | float):
        return said == ours
    assert isinstance(ours, int | float)
    return bool(np.float32(said) == np.float32(ours))
