"""Tiny checkpoints with the configuration keys of published models: their values where widths do not matter.

Where a configuration is from stands beside it. Widths, layers, experts and vocabulary are cut down; all else is kept.
"""

from __future__ import annotations

import base64
import json
import re
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import checkpoints as make

TINY = {
    "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 32,
    "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "intermediate_size": 96,
}  # fmt: skip
TINY_EXPERTS = {"moe_intermediate_size": 32, "n_routed_experts": 16}

# vllm-project/vllm, tests of its Glm4MoeLiteConfig; eos ids: transformers' generation tests of the model.
# No scoring_func, eos as a list, one multi-token prediction layer.
GLM_FLASH = {
    "architectures": ["Glm4MoeLiteForCausalLM"], "model_type": "glm4_moe_lite", "attention_bias": False,
    "attention_dropout": 0.0, "hidden_act": "silu", "first_k_dense_replace": 1, "max_position_embeddings": 202752,
    "n_group": 1, "topk_group": 1, "topk_method": "noaux_tc", "norm_topk_prob": True, "n_shared_experts": 1,
    "num_experts_per_tok": 4, "num_nextn_predict_layers": 1, "partial_rotary_factor": 1.0, "q_lora_rank": 768,
    "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 1000000, "routed_scaling_factor": 1.8,
    "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip
# As in the repository's own config.json, quoted whole in public tests of other loaders.
MOONLIGHT = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "attention_bias": False,
    "attention_dropout": 0.0, "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "aux_loss_alpha": 0.001, "ep_size": 1, "first_k_dense_replace": 1, "hidden_act": "silu",
    "initializer_range": 0.02, "max_position_embeddings": 8192, "moe_layer_freq": 1, "n_group": 1, "topk_group": 1,
    "n_shared_experts": 2, "norm_topk_prob": True, "num_experts_per_tok": 6, "num_nextn_predict_layers": 0,
    "pretraining_tp": 1, "q_lora_rank": None, "rms_norm_eps": 1e-05, "rope_theta": 50000.0,
    "routed_scaling_factor": 2.446, "scoring_func": "sigmoid", "seq_aux": True, "tie_word_embeddings": False,
    "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "use_cache": True,
}  # fmt: skip
# Kimi-K2-Instruct-0905, as quoted in drafters' configurations made from it.
KIMI_K2 = MOONLIGHT | {
    "model_type": "kimi_k2", "max_position_embeddings": 262144, "n_shared_experts": 1, "num_experts_per_tok": 8,
    "q_lora_rank": 1536, "routed_scaling_factor": 2.827,
    "rope_scaling": {"beta_fast": 1.0, "beta_slow": 1.0, "factor": 64.0, "mscale": 1.0, "mscale_all_dim": 1.0,
                     "original_max_position_embeddings": 4096, "type": "yarn"},
}  # fmt: skip
KIMI_VL = {  # text_config: Moonlight's with another base and length
    "architectures": ["KimiVLForConditionalGeneration"], "model_type": "kimi_vl", "pad_token_id": 0,
    "media_placeholder_token_id": 5, "vision_config": {"model_type": "moonvit", "hidden_size": 24},
    "text_config": MOONLIGHT | {"rope_theta": 800000.0, "max_position_embeddings": 131072},
}  # fmt: skip
KIMI_K25 = {
    "architectures": ["KimiK25ForConditionalGeneration"], "model_type": "kimi_k25", "pad_token_id": 0,
    "vision_config": {"mm_hidden_size": 24, "hidden_size": 24},
    "text_config": KIMI_K2 | {"rope_scaling": KIMI_K2["rope_scaling"] | {"beta_fast": 32.0}},
}  # fmt: skip
# kakaocorp's and ai-sage's: DeepSeek-V3's class with values of their cards; GigaChat's values are wider than its keys.
KANANA2 = MOONLIGHT | {
    "max_position_embeddings": 32768, "rope_theta": 1000000.0, "routed_scaling_factor": 2.5, "n_shared_experts": 2,
    "rms_norm_eps": 1e-06,
}  # fmt: skip
GIGACHAT3 = MOONLIGHT | {
    "max_position_embeddings": 262144, "rope_theta": 100000.0, "routed_scaling_factor": 1.0, "n_shared_experts": 1,
    "num_experts_per_tok": 4, "num_nextn_predict_layers": 1, "rms_norm_eps": 1e-06,
}  # fmt: skip
JOYAI = MOONLIGHT | {
    "max_position_embeddings": 131072, "q_lora_rank": 1536, "n_shared_experts": 1, "num_experts_per_tok": 8,
    "num_nextn_predict_layers": 1, "routed_scaling_factor": 2.5, "rope_theta": 10000.0, "rms_norm_eps": 1e-06,
}  # fmt: skip
# transformers' YoutuConfig, whose defaults are Youtu-LLM-2B's.
YOUTU = {
    "architectures": ["YoutuForCausalLM"], "model_type": "youtu", "attention_bias": False, "attention_dropout": 0.0,
    "hidden_act": "silu", "max_position_embeddings": 131072, "q_lora_rank": 1536, "rms_norm_eps": 1e-06,
    "rope_parameters": {"rope_theta": 1600000, "rope_type": "default"}, "rope_interleave": True,
    "tie_word_embeddings": True, "use_cache": True, "mlp_bias": False,
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """A published model, cut down."""

    config: dict[str, Any]
    pre: str  # GGUF's name for its splitting rules
    specials: tuple[str, ...]  # the first is bos, the second eos, those in ``ends`` end an answer
    ends: tuple[str, ...]
    prefix: str = ""
    beside: tuple[str, ...] = ()  # names of tensors of vision
    changes: dict[str, Any] | None = None  # of the tiny widths

    @property
    def tiny(self) -> dict[str, Any]:
        """Its configuration with tiny widths."""
        widths = TINY | ({} if self.config["model_type"] == "youtu" else TINY_EXPERTS) | (self.changes or {})
        n_vocab = n_base(self.pre) + len(self.specials) + 5  # five rows of padding
        widths |= {"vocab_size": n_vocab, "eos_token_id": self.end_ids if len(self.ends) > 1 else self.end_ids[0]}
        text = self.config.get("text_config", self.config)
        text = text | widths | ({"q_lora_rank": 48} if text["q_lora_rank"] else {})
        return {**self.config, "text_config": text} if "text_config" in self.config else text

    @property
    def text(self) -> dict[str, Any]:
        """The language model's part of that."""
        tiny = self.tiny
        found: dict[str, Any] = tiny.get("text_config", tiny)
        return found

    @property
    def end_ids(self) -> list[int]:
        return [n_base(self.pre) + self.specials.index(text) for text in self.ends]


KIMI_SPECIALS = ("[BOS]", "[EOS]", "<|im_end|>", "<|im_user|>", "<|im_assistant|>", "<|im_system|>", "<|im_middle|>")
GLM_SPECIALS = ("[gMASK]", "<|endoftext|>", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
FAMILIES = {
    "glm-4.7-flash": Family(
        GLM_FLASH, "glm4", GLM_SPECIALS, ("<|endoftext|>", "<|user|>", "<|observation|>"),
        changes={"qk_nope_head_dim": 24, "v_head_dim": 32},
    ),
    "moonlight": Family(MOONLIGHT, "kimi-k2", KIMI_SPECIALS, ("<|im_end|>",)),
    "kimi-k2": Family(KIMI_K2, "kimi-k2", KIMI_SPECIALS, ("<|im_end|>",)),
    "kimi-vl": Family(
        KIMI_VL, "kimi-k2", KIMI_SPECIALS, ("<|im_end|>",), "language_model.",
        ("vision_tower.patch_embed.proj.weight", "multi_modal_projector.linear_1.weight"),
    ),
    "kimi-k2.5": Family(
        KIMI_K25, "kimi-k2", KIMI_SPECIALS, ("<|im_end|>",), "language_model.",
        ("vision_tower.encoder.blocks.0.wo.weight", "mm_projector.proj.0.weight"),
    ),
    "kanana-2": Family(KANANA2, "kanana2", ("<|begin_of_text|>", "<|eot_id|>", "<|end_of_text|>"), ("<|eot_id|>",)),
    "gigachat3": Family(
        GIGACHAT3, "gigachat", ("<s>", "</s>", "<|message_sep|>", "<|role_sep|>"), ("</s>", "<|message_sep|>"),
        changes={"v_head_dim": 24},
    ),
    "joyai": Family(JOYAI, "deepseek-v3", (make.BOS, make.EOS), (make.EOS,)),
    "youtu": Family(YOUTU, "youtu", ("<|begin_of_text|>", "<|end_of_text|>"), ("<|end_of_text|>",)),
}  # fmt: skip

# Joins that cross what rules cut: case, contractions, marks, Han beside letters, digits, spaces and line ends.
JOINED = (
    "the",
    " the",
    "in",
    "er",
    "e's",
    "'s",
    "000",
    "    ",
    "\n\n",
    " \n",
    "/\n",
    "иМ",
    "тМ",
    "ве",
    "नम",
    "नु",
    "स्",
    "น่",
    "สุ",
    "本は",
    "漢a",
    "اَ",
    "لل",
    "שָ",
    "왔",
    "ㅋㅋ",
    "🙂",
    "aaaa",
    "----",
    "1234",
    "é",
    "ÀB",
    "τὴ",
)


def merges_of(texts: tuple[str, ...]) -> list[str]:
    """One pair after another, from the left, until each text is a token."""
    made: dict[str, None] = {}
    for text in texts:
        parts = [make.byte_tokens()[byte] for byte in text.encode()]
        while len(parts) > 1:
            made[f"{parts[0]} {parts[1]}"] = None
            parts[:2] = [parts[0] + parts[1]]
    return list(made)


MERGES = merges_of(JOINED)
CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
BY_CASE = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+" + CONTRACTION + r"?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*" + CONTRACTION + r"?|"
)
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
KIMI = (  # tokenization_kimi.py's and tokenization_moonshot.py's
    r"[\p{Han}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+"
    + CONTRACTION + r"?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*"
    + CONTRACTION + r"?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)  # fmt: skip
RULES: dict[str, list[str]] = {
    "glm4": [CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"],
    "kanana2": [BY_CASE + r"\p{N}{1,3}" + REST],
    "youtu": [
        "[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|[一-龥\u3040-ゟ゠-ヿ]+",
        BY_CASE + r"\p{N}" + REST,
    ],
}


def n_base(pre: str) -> int:
    """Tokens before the special ones."""
    return 256 + len(MERGES)


def pre_tokenizer(pre: str) -> dict[str, Any]:
    """As a tokenizer.json has it."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": pre == "gigachat"}
    if pre == "gigachat":
        return level
    if pre in make.PRE_TOKENIZERS:
        return {"type": "Sequence", "pretokenizers": [*make.PRE_TOKENIZERS[pre], level]}
    steps = [{"type": "Split", "pattern": {"Regex": r}, "behavior": "Isolated", "invert": False} for r in RULES[pre]]
    return {"type": "Sequence", "pretokenizers": [*steps, level]}


def write_vocabulary(folder: Path, family: Family, template: str | None = None) -> None:
    """The tokenizer in the form that the model has it, and its settings."""
    base = make.byte_tokens()
    tokens = [*base, *(merge.replace(" ", "") for merge in MERGES)]
    settings: dict[str, Any] = {"bos_token": family.specials[0], "eos_token": family.specials[1]}
    if template is not None:
        settings["chat_template"] = template
    special = {len(tokens) + i: text for i, text in enumerate(family.specials)}
    if family.pre == "kimi-k2":
        values = {character: byte for byte, character in enumerate(base)}
        ranked = [bytes(values[c] for c in token) for token in tokens]
        write_tiktoken(folder / "tiktoken.model", ranked)
        settings |= {
            "tokenizer_class": "TikTokenTokenizer",
            "auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]},
            "added_tokens_decoder": {str(id_): {"content": text, "special": True} for id_, text in special.items()},
        }
    else:
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        tokenizer = {
            "version": "1.0",
            "added_tokens": [{"id": id_, "content": text, **flags} for id_, text in special.items()],
            "normalizer": None,
            "pre_tokenizer": pre_tokenizer(family.pre),
            "post_processor": None,
            "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
            "model": {
                "ignore_merges": family.pre in ("glm4", "youtu"),
                "type": "BPE",
                "vocab": {t: i for i, t in enumerate(tokens)},
                "merges": MERGES,
            },
        }
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def write_tiktoken(path: Path, ranked: list[bytes]) -> None:
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(ranked)))


def write(folder: Path, name: str, template: str | None = None, **changes: Any) -> dict[str, np.ndarray]:
    """A checkpoint in float32 as the model's repository has it; returns its text model's tensors without the prefix."""
    family = FAMILIES[name] if not changes else replace(FAMILIES[name], config=FAMILIES[name].config | changes)
    folder.mkdir(parents=True, exist_ok=True)
    config = family.tiny
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    write_vocabulary(folder, family, template)
    weights = make.random_weights(filled(family.text), seed=len(name))
    stored = {family.prefix + n: ("F32", values) for n, values in weights.items()}
    stored |= {n: ("F32", np.ones((4, 4), np.float32)) for n in family.beside}
    make.write_safetensors(folder / "model.safetensors", stored)
    return weights


def filled(text: dict[str, Any]) -> dict[str, Any]:
    """A configuration that names everything that tensors' shapes follow from."""
    dense = {"n_routed_experts": 0, "n_shared_experts": 0, "moe_intermediate_size": 0, "topk_method": "greedy"}
    return text if "n_routed_experts" in text else text | dense | {"first_k_dense_replace": text["num_hidden_layers"]}


def write_reference(folder: Path, name: str, weights: dict[str, np.ndarray]) -> Path:
    """The same language model as transformers' own classes load it: by itself, without draft layers."""
    family = FAMILIES[name]
    folder.mkdir(parents=True)
    kind = family.text["model_type"]
    own = {"glm4_moe_lite": "Glm4MoeLiteForCausalLM", "youtu": "YoutuForCausalLM"}
    config = family.text | {"num_nextn_predict_layers": 0}
    config.pop("auto_map", None)
    if kind not in own:
        config |= {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    draft = f"model.layers.{config['num_hidden_layers']}."
    kept = {n: ("F32", values) for n, values in weights.items() if not n.startswith(draft)}
    make.write_safetensors(folder / "model.safetensors", kept)
    return folder


class Reference:
    """The checkpoint's tokenizer as its own library reads it: Hugging Face's, or tiktoken's rule by its definition."""

    def __init__(self, folder: Path, family: Family) -> None:
        tokenizers = pytest.importorskip("tokenizers", reason="comes with transformers")
        self.theirs = self.ranks = None
        if family.pre != "kimi-k2":
            self.theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
            return
        lines = (folder / "tiktoken.model").read_bytes().split(b"\n")
        self.ranks = {base64.b64decode(line.split()[0]): int(line.split()[1]) for line in lines if line}
        self.special = {text: len(self.ranks) + i for i, text in enumerate(family.specials)}
        self.words = tokenizers.pre_tokenizers.Split(tokenizers.Regex(KIMI), "isolated")

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Ids of a text; special: the spelling of a special token is that token."""
        if self.theirs is not None:
            self.theirs.encode_special_tokens = not special
            found: list[int] = self.theirs.encode(text, add_special_tokens=False).ids
            return found
        if special:
            parts = re.split("(" + "|".join(map(re.escape, self.special)) + ")", text)
            return [i for p in parts for i in ([self.special[p]] if p in self.special else self.encode(p))]
        return [id_ for word, _ in self.words.pre_tokenize_str(text) for id_ in self._joined(word.encode())]

    def _joined(self, word: bytes) -> list[int]:
        assert self.ranks is not None
        if word in self.ranks:
            return [self.ranks[word]]
        parts = [word[i : i + 1] for i in range(len(word))]
        while joins := [(self.ranks[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in self.ranks]:
            at = min(joins)[1]
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        return [self.ranks[part] for part in parts]
