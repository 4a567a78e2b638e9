"""Writes tiny random Hugging Face checkpoints of the DeepSeek-V2 family, with numpy alone.

The files are made from the published formats, not with the project's own readers, so that tests of those readers have
something independent to read.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

V2 = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "hidden_act": "silu",
    "attention_bias": False,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "topk_method": "greedy",
    "norm_topk_prob": False,
    "scoring_func": "softmax",
    "moe_layer_freq": 1,
    "vocab_size": 320,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 48,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "first_k_dense_replace": 1,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
    },
}
V2_GROUPED = {**V2, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 16.0}
V2_LITE = {**V2, "q_lora_rank": None}
V3 = {
    **V2,
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "num_nextn_predict_layers": 1,
    "n_shared_experts": 1,
}
# DeepSeekMoE: the keys of deepseek-ai/deepseek-moe-16b-base's config.json, which has none for latents.
MOE = {
    **{k: v for k, v in V2.items() if "lora" not in k and not k.startswith(("qk_", "v_head"))},
    "architectures": ["DeepseekForCausalLM"],
    "model_type": "deepseek",
    "rope_scaling": None,
    "aux_loss_alpha": 0.001,
    "seq_aux": True,
    "pretraining_tp": 1,
    "use_cache": True,
}
for _key in ("topk_method", "n_group", "topk_group", "routed_scaling_factor"):
    del MOE[_key]
MOE_SHARED = {**MOE, "num_key_value_heads": 2}
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ 'User: ' + m['content'] + '\n\n' }}"
    "{% elif m['role'] == 'assistant' %}{{ 'Assistant: ' + m['content'] + eos_token }}"
    "{% else %}{{ m['content'] + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
PRE_TOKENIZERS = {
    "deepseek-llm": [
        {"type": "Split", "pattern": {"Regex": "[\r\n]"}, "behavior": "Isolated", "invert": False},
        {"type": "Split", "pattern": {"Regex": "\\s?[A-Za-zµÀ-ÖØ-öø-ƺ]+"}, "behavior": "Isolated", "invert": False},
        {
            "type": "Split",
            "pattern": {"Regex": "\\s?[!-/:-~！-／：-～‘-‟\u3000-。]+"},
            "behavior": "Isolated",
            "invert": False,
        },
        {"type": "Split", "pattern": {"Regex": "\\s+$"}, "behavior": "Isolated", "invert": False},
        {"type": "Split", "pattern": {"Regex": "[一-龥ࠀ-一가-\ud7ff]+"}, "behavior": "Isolated", "invert": False},
        {"type": "Digits", "individual_digits": True},
    ],
    "deepseek-coder": [
        {"type": "Split", "pattern": {"Regex": "[\r\n]"}, "behavior": "Isolated", "invert": False},
        {"type": "Split", "pattern": {"Regex": "\\s?\\p{L}+"}, "behavior": "Isolated", "invert": False},
        {"type": "Split", "pattern": {"Regex": "\\s?\\p{P}+"}, "behavior": "Isolated", "invert": False},
        {"type": "Split", "pattern": {"Regex": "[一-龥ࠀ-一가-\ud7ff]+"}, "behavior": "Isolated", "invert": False},
        {"type": "Digits", "individual_digits": True},
    ],
    "deepseek-v3": [
        {"type": "Split", "pattern": {"Regex": "\\p{N}{1,3}"}, "behavior": "Isolated", "invert": False},
        {"type": "Split", "pattern": {"Regex": "[一-龥\u3040-ゟ゠-ヿ]+"}, "behavior": "Isolated", "invert": False},
        {
            "type": "Split",
            "pattern": {
                "Regex": "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|"
                "[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
            },
            "behavior": "Isolated",
            "invert": False,
        },
    ],
}


def bf16_bits(values: np.ndarray) -> np.ndarray:
    """float32 -> bfloat16 bits, nearest even; finite values only."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def bf16_values(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits -> float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def e4m3_value(code: int) -> float:
    """One fp8 e4m3 code, from the format's definition."""
    sign, exponent, mantissa = -1.0 if code >> 7 else 1.0, (code >> 3) & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def write_safetensors(path: Path, tensors: dict[str, tuple[str, np.ndarray]]) -> None:
    """{name: (safetensors dtype, array of the stored bits)} -> a file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (dtype, array) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [at, at + array.nbytes]}
        at += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, array in tensors.values():
            file.write(np.ascontiguousarray(array).tobytes())


def tensor_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint with this config, multi-token prediction layers included."""
    c, d = config, config["hidden_size"]
    f, e = c["moe_intermediate_size"], c["n_routed_experts"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (c["vocab_size"], d)}
    n_nextn = c.get("num_nextn_predict_layers", 0)
    for il in range(c["num_hidden_layers"] + n_nextn):
        p = f"model.layers.{il}."
        shapes[p + "input_layernorm.weight"] = (d,)
        shapes |= {f"{p}self_attn.{name}.weight": shape for name, shape in _attention_shapes(c).items()}
        shapes[p + "post_attention_layernorm.weight"] = (d,)
        parts: list[tuple[str, int]] = []
        if il < c["first_k_dense_replace"]:
            parts.append(("mlp.", c["intermediate_size"]))
        else:
            shapes[p + "mlp.gate.weight"] = (e, d)
            if c.get("topk_method") == "noaux_tc":
                shapes[p + "mlp.gate.e_score_correction_bias"] = (e,)
            parts += [(f"mlp.experts.{i}.", f) for i in range(e)]
            if c["n_shared_experts"]:
                parts.append(("mlp.shared_experts.", f * c["n_shared_experts"]))
        for part, width in parts:
            shapes[p + part + "gate_proj.weight"] = (width, d)
            shapes[p + part + "up_proj.weight"] = (width, d)
            shapes[p + part + "down_proj.weight"] = (d, width)
        if il >= c["num_hidden_layers"]:
            shapes[p + "eh_proj.weight"] = (d, 2 * d)
            for extra in ("enorm.weight", "hnorm.weight", "shared_head.norm.weight"):
                shapes[p + extra] = (d,)
    shapes["model.norm.weight"] = (d,)
    if not c["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (c["vocab_size"], d)
    return shapes


def _attention_shapes(c: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    d, h = c["hidden_size"], c["num_attention_heads"]
    if "kv_lora_rank" not in c:
        kv = d // h * c["num_key_value_heads"]
        return {"q_proj": (d, d), "k_proj": (kv, d), "v_proj": (kv, d), "o_proj": (d, d)}
    nope, rope, v, kv = (c[k] for k in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank"))
    q = {"q_proj": (h * (nope + rope), d)}
    if c["q_lora_rank"]:
        q = {
            "q_a_proj": (c["q_lora_rank"], d),
            "q_a_layernorm": (c["q_lora_rank"],),
            "q_b_proj": (h * (nope + rope), c["q_lora_rank"]),
        }
    return {
        **q,
        "kv_a_proj_with_mqa": (kv + rope, d),
        "kv_a_layernorm": (kv,),
        "kv_b_proj": (h * (nope + v), kv),
        "o_proj": (d, h * v),
    }


def random_weights(config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Float32 weights at a scale that keeps activations near one; norms near one, a spread router."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in tensor_shapes(config).items():
        if len(shape) == 1:
            centre = 0.0 if name.endswith("bias") else 1.0
            values = centre + 0.2 * rng.standard_normal(shape)
        else:
            scale = 1.0 if "embed" in name else 1.5 if "mlp.gate.weight" in name else 1.0
            values = scale * rng.standard_normal(shape) / (1.0 if "embed" in name else np.sqrt(shape[-1]))
        weights[name] = values.astype(np.float32)
    return weights


def to_fp8(values: np.ndarray, block: tuple[int, int] = (128, 128)) -> tuple[np.ndarray, np.ndarray]:
    """float32 (n, k) -> (e4m3 codes, scales of ceil(n/128) x ceil(k/128)), each block's largest value at 448."""
    table = np.array([e4m3_value(code) for code in range(256)], np.float32)
    order = np.argsort(table[:127])  # the positive finite codes ascend already; sorted for searchsorted's sake
    positive = table[:127][order]
    scales = np.empty((-(-values.shape[0] // block[0]), -(-values.shape[1] // block[1])), np.float32)
    codes = np.empty(values.shape, np.uint8)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = np.s_[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
            scales[i, j] = max(np.abs(values[part]).max() / 448.0, 1e-12)
            x = values[part] / scales[i, j]
            nearest = np.clip(np.searchsorted((positive[1:] + positive[:-1]) / 2, np.abs(x)), 0, 126)
            codes[part] = order[nearest] | np.where(x < 0, 0x80, 0)
    return codes, scales


def byte_tokens() -> list[str]:
    """The 256 characters that byte-level BPE writes bytes as."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(spare)) for b in range(256)]


def write_text(path: Path, n_words: int) -> Path:
    """A text in words that the tokenizer's merges know."""
    words = np.random.default_rng(5).choice(["the", "inner", "ether", "there", "tin", "nether"], n_words)
    path.write_text(" ".join(words), encoding="utf-8")
    return path


def write_tokenizer(folder: Path, pre: str = "deepseek-llm") -> None:
    """tokenizer.json and tokenizer_config.json: 256 bytes, BOS, EOS, one user-defined token, and a few merges."""
    vocab = {token: i for i, token in enumerate(byte_tokens())}
    added = [
        {"id": 256, "content": BOS, "special": True},
        {"id": 257, "content": EOS, "special": True},
        {"id": 258, "content": "<｜fim▁hole｜>", "special": False},
        {"id": 259, "content": "<tab>", "special": False},
    ]
    for token in added:
        token |= {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True}
    merges = ["t h", "th e", "Ġ the", "i n", "e r"]
    for i, merge in enumerate(merges):
        vocab[merge.replace(" ", "")] = 260 + i
    rules = [
        *PRE_TOKENIZERS[pre],
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    ]
    tokenizer = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": rules},
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=True), encoding="utf-8")
    settings = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": BOS,
        "eos_token": {"__type": "AddedToken", "content": EOS},
        "pad_token": EOS,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def write_checkpoint(
    folder: Path,
    config: dict[str, Any],
    weights: dict[str, np.ndarray] | None = None,
    dtype: str = "BF16",
    n_shards: int = 1,
) -> dict[str, np.ndarray]:
    """A checkpoint folder; returns the float32 values that its files stand for.

    dtype: "F32", "F16", "BF16", or "F8_E4M3" (projections in fp8 with scales, the rest in bf16, as V3 has it).
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = random_weights(config) if weights is None else weights
    stored: dict[str, tuple[str, np.ndarray]] = {}
    exact: dict[str, np.ndarray] = {}
    for name, values in weights.items():
        if dtype == "F8_E4M3" and name.endswith("proj.weight"):
            codes, scales = to_fp8(values)
            stored[name], stored[name + "_scale_inv"] = ("F8_E4M3", codes), ("F32", scales)
            table = np.array([e4m3_value(code) for code in range(256)], np.float32)
            full = np.repeat(np.repeat(scales, 128, 0), 128, 1)[: values.shape[0], : values.shape[1]]
            exact[name] = table[codes] * full
        elif dtype == "F32":
            stored[name], exact[name] = ("F32", values), values
        elif dtype == "F16":
            stored[name] = ("F16", values.astype(np.float16))
            exact[name] = values.astype(np.float16).astype(np.float32)
        else:
            stored[name] = ("BF16", bf16_bits(values))
            exact[name] = bf16_values(bf16_bits(values))
    config = {**config, **({"quantization_config": FP8} if dtype == "F8_E4M3" else {})}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    write_tokenizer(folder)
    if n_shards == 1:
        write_safetensors(folder / "model.safetensors", stored)
        return exact
    names = [f"model-{i + 1:05d}-of-{n_shards:05d}.safetensors" for i in range(n_shards)]
    where = {name: names[i * n_shards // len(stored)] for i, name in enumerate(stored)}
    for shard in names:
        write_safetensors(folder / shard, {name: t for name, t in stored.items() if where[name] == shard})
    index = {"metadata": {"total_size": sum(t.nbytes for _, t in stored.values())}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return exact
