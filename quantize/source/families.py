"""families.py: the kinds of checkpoint that can be quantised, a row each. The next one is one row more, and where its
vocabulary is split by rules of its own, a row of vocab.PRE_TOKENIZERS.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from quantize.base.errors import CheckpointError, UnsupportedError

Attention = Literal["latent", "plain"]
TEXT_CONFIG = "text_config"  # a key of config.json: what a model of several kinds of input says of its language model

_V2: Mapping[str, object] = {"scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False}
_V3: Mapping[str, object] = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True}


# DeepSeekMoE: plain attention. Its GGUF architecture knows one router and one scale; its code scales cos and sin alone.
_MOE: Mapping[str, object] = {"scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False}
_MOE_FIXED: Mapping[str, object] = {**_MOE, "routed_scaling_factor": 1.0}


# Mistral4Config of transformers 5.24. What groups of experts would mean there, GGUF's routers do not compute.
_MISTRAL4: Mapping[str, object] = {
    "scoring_func": "softmax",
    "topk_method": "greedy",
    "norm_topk_prob": True,
    "n_shared_experts": 1,
    "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 128.0, "original_max_position_embeddings": 8192,
        "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
    },
}  # fmt: skip
_ONE_GROUP: Mapping[str, object] = {"n_group": 1, "topk_group": 1}


@dataclass(frozen=True)
class Family:
    """What a kind of checkpoint is called, and what it takes for granted."""

    model_type: str  # of config.json
    architecture: str = "deepseek2"  # GGUF's name for it
    attention: Attention = "latent"  # how its layers attend
    defaults: Mapping[str, object] = field(default_factory=dict)  # of keys that config.json leaves out
    fixed: Mapping[str, object] = field(default_factory=dict)  # of keys that GGUF cannot say otherwise: see arch.FIXED
    scales_queries: bool = False  # by their position: Llama 4's rule for long contexts
    has_experts: bool = True
    nested: bool = False  # the language model's shape stands under TEXT_CONFIG
    text_type: str = ""  # the model_type that stands there, where the outer one says too little
    prefix: str = ""  # what the names of its tensors begin with, before "model." and "lm_head."
    beside: tuple[str, ...] = ()  # beginnings of the names of tensors for other kinds of input, which are left out


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("deepseek", "deepseek", "plain", _MOE, _MOE_FIXED),
        Family("deepseek_v2", defaults=_V2),
        Family("deepseek_v3", defaults=_V3),
        Family("kimi_k2", defaults=_V3),
        Family("glm4_moe_lite", defaults={**_V3, "first_k_dense_replace": 1, "rms_norm_eps": 1e-5}),
        Family("youtu", defaults={"tie_word_embeddings": True}, has_experts=False),
        Family("youtu_llm", defaults={"tie_word_embeddings": True}, has_experts=False),  # before transformers 5
        Family("mistral4", "mistral4", defaults=_MISTRAL4, fixed=_ONE_GROUP, scales_queries=True),
        Family(
            "mistral3",
            "mistral4",
            defaults=_MISTRAL4,
            fixed=_ONE_GROUP,
            scales_queries=True,
            nested=True,
            text_type="mistral4",
            prefix="language_model.",
            beside=("vision_tower.", "multi_modal_projector."),
        ),
        Family(
            "kimi_vl",
            defaults=_V3,
            nested=True,
            prefix="language_model.",
            beside=("vision_tower.", "multi_modal_projector."),
        ),
        Family(
            "kimi_k25", defaults=_V3, nested=True, prefix="language_model.", beside=("vision_tower.", "mm_projector.")
        ),
    )
}


def find(config: Mapping[str, Any]) -> tuple[Family, Mapping[str, Any]]:
    """The family of a config.json, and the part of it that describes the language model. UnsupportedError."""
    named = config.get("model_type")
    family = FAMILIES.get(named) if isinstance(named, str) else None
    inner = config.get(TEXT_CONFIG)
    text_type = inner.get("model_type") if isinstance(inner, dict) else None
    if family is None or (family.text_type and text_type is not None and text_type != family.text_type):
        classes = config.get("architectures")
        also = f" ({classes[0]})" if isinstance(classes, list) and classes else ""
        inside = f"; its {TEXT_CONFIG} is {text_type!r}" if isinstance(inner, dict) else ""
        raise UnsupportedError(
            f"config.json: model_type {named!r}{also} is not supported{inside}",
            f"these can be quantised: model_type {', '.join(FAMILIES)}; a GGUF of it that others made may run",
        )
    if not family.nested:
        return family, config
    if not isinstance(inner, dict):
        raise CheckpointError(
            f"config.json: `{TEXT_CONFIG}` is {inner!r}, expected an object: it describes the language model",
            "the hub's copy of config.json replaces it",
        )
    return family, inner
