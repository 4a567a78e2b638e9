"""Checkpoints of Mistral Small 4: what config.json says, where its language model stands, what is refused."""

import copy
from typing import Any

import pytest

from quantize import CheckpointError, UnsupportedError
from quantize.source import arch as arch_of
from quantize.source.tensors import left_out, model_tensors

# config.json of mistralai/Mistral-Small-4-119B-2603, as transformers' Mistral4Config gives its values.
SMALL4: dict[str, Any] = {
    "architectures": ["Mistral3ForConditionalGeneration"],
    "model_type": "mistral3",
    "image_token_index": 10,
    "text_config": {
        "model_type": "mistral4",
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "first_k_dense_replace": 0,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "kv_lora_rank": 256,
        "max_position_embeddings": 1048576,
        "moe_intermediate_size": 2048,
        "n_group": 1,
        "n_routed_experts": 128,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 36,
        "num_key_value_heads": 32,
        "q_lora_rank": 1024,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 64,
        "rms_norm_eps": 1e-06,
        "rope_interleave": True,
        "rope_parameters": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 128.0,
            "llama_4_scaling_beta": 0.1,
            "max_position_embeddings": 1048576,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_theta": 10000.0,
            "rope_type": "yarn",
            "type": "yarn",
        },
        "routed_scaling_factor": 1.0,
        "tie_word_embeddings": False,
        "topk_group": 1,
        "v_head_dim": 128,
        "vocab_size": 131072,
    },
    "vision_config": {"model_type": "pixtral"},
}


def changed(**text: Any) -> dict[str, Any]:
    config = copy.deepcopy(SMALL4)
    for key, value in text.items():
        if key in config["text_config"]["rope_parameters"]:
            config["text_config"]["rope_parameters"][key] = value
        else:
            config["text_config"][key] = value
    return config


def test_the_keys_of_the_real_configuration() -> None:
    """What llama.cpp's converter writes of it, and the scaling of queries, which that one leaves out."""
    keys = arch_of.parse(SMALL4).keys()
    expected = {
        "block_count": 36, "context_length": 1048576, "embedding_length": 4096, "feed_forward_length": 12288,
        "attention.head_count": 32, "attention.q_lora_rank": 1024, "attention.kv_lora_rank": 256,
        "attention.key_length": 320, "attention.value_length": 256, "attention.key_length_mla": 128,
        "attention.value_length_mla": 128, "rope.dimension_count": 64, "leading_dense_block_count": 0,
        "expert_count": 128, "expert_used_count": 4, "expert_shared_count": 1, "expert_feed_forward_length": 2048,
        "expert_weights_norm": True, "expert_weights_scale": 1.0, "expert_gating_func": 1, "expert_group_count": 1,
        "rope.scaling.type": "yarn", "rope.scaling.factor": 128.0, "rope.scaling.original_context_length": 8192,
        "rope.scaling.yarn_log_multiplier": 0.1, "rope.freq_base": 10000.0, "vocab_size": 131072,
        "attention.temperature_scale": 0.1, "attention.temperature_length": 8192,
    }  # fmt: skip
    assert {key: keys[f"mistral4.{key}"] for key in expected} == expected
    assert all(key.startswith("mistral4.") for key in keys)


def test_the_language_model_alone_and_what_it_leaves_unsaid() -> None:
    text = SMALL4["text_config"]
    assert arch_of.parse(text).keys() == arch_of.parse(SMALL4).keys()
    unsaid = ("rope_parameters", "norm_topk_prob", "n_shared_experts", "routed_scaling_factor", "first_k_dense_replace")
    assert arch_of.parse({k: v for k, v in text.items() if k not in unsaid}).keys() == arch_of.parse(SMALL4).keys()


def test_tensors_stand_under_the_language_model_and_the_eyes_are_left_out() -> None:
    arch = arch_of.parse(SMALL4)
    used = {source for tensor in model_tensors(arch) for source in tensor.sources}
    assert all(name.startswith("language_model.") for name in used)
    assert {"language_model.lm_head.weight", "language_model.model.layers.35.mlp.gate.weight"} <= used
    vision = ["vision_tower.ln_pre.weight", "multi_modal_projector.linear_1.weight"]
    assert left_out(arch, dict.fromkeys([*used, *vision], "BF16"), used) == vision
    with pytest.raises(UnsupportedError, match="audio_tower"):
        left_out(arch, {"audio_tower.conv.weight": "BF16"}, used)


@pytest.mark.parametrize("text_type", ["mistral", "ministral3", None, 3])
def test_other_models_behind_the_same_eyes_are_refused(text_type: Any) -> None:
    """Small 3.x and Ministral 3 have the same outer model_type."""
    config = changed(model_type=text_type)
    if text_type is None:
        del config["text_config"]
        with pytest.raises(CheckpointError, match="text_config"):
            arch_of.parse(config)
        return
    with pytest.raises(UnsupportedError, match=rf"mistral3.*its text_config is {text_type!r}"):
        arch_of.parse(config)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_group": 4, "topk_group": 2}, "n_group"),
        ({"topk_group": 2}, "topk_group"),
        ({"rope_interleave": False}, "rope_interleave"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"llama_4_scaling_beta": None}, "llama_4_scaling_beta"),
        ({"llama_4_scaling_beta": -0.1}, "llama_4_scaling_beta"),
        ({"llama_4_scaling_beta": float("nan")}, "llama_4_scaling_beta"),
        ({"llama_4_scaling_beta": "0.1"}, "llama_4_scaling_beta"),
        ({"llama_4_scaling_beta": [0.1]}, "llama_4_scaling_beta"),
        ({"original_max_position_embeddings": 0}, "original_max_position_embeddings"),
        ({"original_max_position_embeddings": 1 << 40}, "original_max_position_embeddings"),
        ({"mscale_all_dim": 0.5}, "mscale_all_dim"),
        ({"rope_type": "llama3"}, "llama3"),
        ({"rope_type": "default"}, "yarn"),
        ({"num_key_value_heads": 8}, "num_key_value_heads"),
    ],
)
def test_what_a_gguf_cannot_say_is_refused_by_name(changes: dict[str, Any], words: str) -> None:
    with pytest.raises((CheckpointError, UnsupportedError), match=words):
        arch_of.parse(changed(**changes))


def test_queries_of_other_families_do_not_grow() -> None:
    """transformers' DeepseekV3 does not look at the key: what was meant by it cannot be told."""
    config = dict(SMALL4["text_config"], model_type="deepseek_v3", topk_method="noaux_tc")
    with pytest.raises(UnsupportedError, match=r"llama_4_scaling_beta.*deepseek_v3"):
        arch_of.parse(config)
