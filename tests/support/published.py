"""config.json of published models, as their repositories have them, and hubs that serve what tells of such a model.

Weights are not there: a shard's header is, and the hub lists the length that goes with it.
"""

from __future__ import annotations

import json
from typing import Any

from support.families import GLM_FLASH, MOONLIGHT
from support.hub import Hub

_YARN = {
    "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
    "original_max_position_embeddings": 4096, "type": "yarn",
}  # fmt: skip
_V2 = {
    "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "attention_bias": False,
    "first_k_dense_replace": 1, "hidden_act": "silu", "kv_lora_rank": 512, "max_position_embeddings": 163840,
    "moe_layer_freq": 1, "n_shared_experts": 2, "norm_topk_prob": False, "num_experts_per_tok": 6,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "rms_norm_eps": 1e-06, "rope_theta": 10000,
    "rope_scaling": _YARN, "scoring_func": "softmax", "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "vocab_size": 102400,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "deepseek-ai/DeepSeek-V2-Lite": _V2 | {
        "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408, "n_group": 1, "topk_group": 1,
        "n_routed_experts": 64, "num_attention_heads": 16, "num_key_value_heads": 16, "num_hidden_layers": 27,
        "q_lora_rank": None, "routed_scaling_factor": 1.0, "topk_method": "greedy",
    },
    "deepseek-ai/DeepSeek-V2": _V2 | {
        "hidden_size": 5120, "intermediate_size": 12288, "moe_intermediate_size": 1536, "n_group": 8, "topk_group": 3,
        "n_routed_experts": 160, "num_attention_heads": 128, "num_key_value_heads": 128, "num_hidden_layers": 60,
        "q_lora_rank": 1536, "routed_scaling_factor": 16.0, "topk_method": "group_limited_greedy",
    },
    "deepseek-ai/DeepSeek-V3": _V2 | {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "first_k_dense_replace": 3,
        "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048, "n_group": 8, "topk_group": 4,
        "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128,
        "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1,
        "q_lora_rank": 1536, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
        "rope_scaling": _YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}, "vocab_size": 129280,
        "quantization_config": {"fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]},
    },
    "moonshotai/Moonlight-16B-A3B-Instruct": MOONLIGHT | {
        "hidden_size": 2048, "intermediate_size": 11264, "moe_intermediate_size": 1408, "n_routed_experts": 64,
        "num_attention_heads": 16, "num_key_value_heads": 16, "num_hidden_layers": 27, "kv_lora_rank": 512,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "vocab_size": 163840,
    },
    "zai-org/GLM-4.7-Flash": GLM_FLASH | {
        "hidden_size": 2048, "intermediate_size": 10240, "moe_intermediate_size": 1536, "n_routed_experts": 64,
        "num_attention_heads": 20, "num_key_value_heads": 20, "num_hidden_layers": 47, "kv_lora_rank": 512,
        "qk_nope_head_dim": 192, "qk_rope_head_dim": 64, "v_head_dim": 256, "vocab_size": 154880,
    },
}  # fmt: skip
SHARD = "model-00001-of-00001.safetensors"


def shard(nbytes: int) -> bytes:
    """The beginning of a safetensors file with one tensor of so many bytes."""
    entry = {"model.embed_tokens.weight": {"dtype": "U8", "shape": [nbytes], "data_offsets": [0, nbytes]}}
    header = json.dumps(entry).encode()
    return len(header).to_bytes(8, "little") + header


def add(hub: Hub, repo: str, nbytes: int) -> None:
    """A published model's checkpoint of so many bytes of weights: what tells of it, and a shard that only begins."""
    beginning = shard(nbytes)
    hub.add(repo, {"config.json": json.dumps(CONFIGS[repo]).encode(), SHARD: beginning + bytes(64)})
    hub.listed_size[SHARD] = len(beginning) + nbytes
