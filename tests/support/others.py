"""Tiny random models of other architectures than DeepSeek-V2's, as llama.cpp's converter writes them: for its engine.

Vocabularies: byte-level byte pairs (support/vocab.py's), and SentencePiece's with bytes to fall back on.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from support.tiny import Draw, add_key
from support.vocab import N_VOCAB, vocabulary

F32 = np.ndarray[Any, np.dtype[np.float32]]
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6

# "<s>[INST] hi[/INST] answer</s>": Mixtral-8x7B-Instruct-v0.1's rule, shortened to what it writes.
MIXTRAL_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ ' [INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported') }}{% endif %}{% endfor %}"
)
CHATML_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WORDS = ("▁", "a", "b", "c", "e", "h", "i", "l", "o", "t", "▁a", "▁the", "▁h", "▁hi", "he", "th", "the", "ll", "[", "]")


@dataclass(frozen=True)
class Other:
    """A model's shape. n_expert 0: a dense one."""

    arch: str = "llama"
    n_layer: int = 2
    n_embd: int = 64
    n_head: int = 4
    n_head_kv: int = 2
    n_ff: int = 96
    n_expert: int = 0
    n_used: int = 0
    n_ctx: int = 512
    seed: int = 7
    biases: bool = False  # of queries, keys and values: Qwen2's
    head_norms: bool = False  # of queries and keys: Qwen3's
    dtype: type[np.floating[Any]] = np.float32

    @property
    def head(self) -> int:
        return self.n_embd // self.n_head


LLAMA = Other()
MIXTRAL = Other(n_expert=4, n_used=2, seed=8)
QWEN2 = Other("qwen2", biases=True, seed=9)
QWEN3 = Other("qwen3", head_norms=True, seed=10)
SHAPES = {"llama": LLAMA, "mixtral": MIXTRAL, "qwen2": QWEN2, "qwen3": QWEN3}


def pieces(template: str | None = MIXTRAL_TEMPLATE, **changes: Any) -> dict[str, Any]:
    """The keys of a SentencePiece vocabulary: <unk>, <s>, </s>, all bytes, some pieces; changes as in vocab.py."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *WORDS]
    keys: dict[str, Any] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(100 - 4 * len(word)) for word in WORDS],
        "tokenizer.ggml.token_type": [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(WORDS)],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.chat_template": template,
    }
    keys |= {f"tokenizer.{name.replace('__', '.')}": value for name, value in changes.items()}
    return {key: value for key, value in keys.items() if value is not None}


def byte_pairs(template: str | None = CHATML_TEMPLATE, **changes: Any) -> dict[str, Any]:
    """The keys of a byte-pair vocabulary with ChatML's two control tokens in place of two of vocab.py's."""
    keys = vocabulary(template, ggml__pre="qwen2", **changes)
    tokens, types = list(keys["tokenizer.ggml.tokens"]), list(keys["tokenizer.ggml.token_type"])
    tokens[-2:], types[-2:] = ["<|im_start|>", "<|im_end|>"], [CONTROL, CONTROL]
    return keys | {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.eos_token_id": N_VOCAB - 1,
        "tokenizer.ggml.add_bos_token": False,
    }


def keys_of(model: Other) -> dict[str, Any]:
    keys: dict[str, Any] = {
        "block_count": model.n_layer,
        "context_length": model.n_ctx,
        "embedding_length": model.n_embd,
        "feed_forward_length": model.n_ff,
        "attention.head_count": model.n_head,
        "attention.head_count_kv": model.n_head_kv,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.dimension_count": model.head,
        "rope.freq_base": 10000.0,
    }
    if model.n_expert:
        keys |= {"expert_count": model.n_expert, "expert_used_count": model.n_used}
    return {f"{model.arch}.{key}": value for key, value in keys.items()}


def tensors_of(model: Other, n_vocab: int) -> dict[str, F32]:
    draw, width, kv = Draw(model.seed), model.n_embd, model.head * model.n_head_kv
    out = {"token_embd.weight": draw.matrix(n_vocab, width, gain=width**0.5)}
    for il in range(model.n_layer):
        made = {"attn_norm": draw.norm(width), "ffn_norm": draw.norm(width)}
        made |= {
            "attn_q": draw.matrix(width, width, 1.5),
            "attn_k": draw.matrix(kv, width),
            "attn_v": draw.matrix(kv, width),
        }
        made["attn_output"] = draw.matrix(width, width)
        if model.head_norms:
            made |= {"attn_q_norm": draw.norm(model.head), "attn_k_norm": draw.norm(model.head)}
        shape = (model.n_expert,) if model.n_expert else ()
        kind = "_exps" if model.n_expert else ""
        for part, rows, cols in (("gate", model.n_ff, width), ("up", model.n_ff, width), ("down", width, model.n_ff)):
            made[f"ffn_{part}{kind}"] = draw.matrix(int(np.prod((*shape, rows))), cols, 2.0).reshape(*shape, rows, cols)
        if model.n_expert:
            made["ffn_gate_inp"] = draw.matrix(model.n_expert, width, 2.0)
        out |= {f"blk.{il}.{name}.weight": value for name, value in made.items()}
        if model.biases:
            out |= {f"blk.{il}.attn_{p}.bias": draw.unit(n) for p, n in (("q", width), ("k", kv), ("v", kv))}
    out["output_norm.weight"] = draw.norm(width)
    out["output.weight"] = draw.matrix(n_vocab, width, 3.0)
    return {name: v if v.ndim == 1 or "gate_inp" in name else v.astype(model.dtype) for name, v in out.items()}


def write(path: Path, model: Other, vocab: dict[str, Any] | None = None, **keys: Any) -> Path:
    """A model as a GGUF. vocab: byte pairs for Qwen's, pieces for others. keys: more of them, "." as "__"."""
    if vocab is None:
        vocab = byte_pairs() if model.arch.startswith("qwen") else pieces()
    n_vocab = len(vocab["tokenizer.ggml.tokens"])
    return write_raw(
        path,
        model.arch,
        {"general.name": f"tiny {model.arch}"}
        | keys_of(model)
        | vocab
        | {name.replace("__", "."): value for name, value in keys.items()},
        tensors_of(model, n_vocab),
    )


def write_raw(path: Path, arch: str, keys: dict[str, Any], tensors: dict[str, F32]) -> Path:
    writer = gguf.GGUFWriter(path, arch)
    for key, value in keys.items():
        if value is not None:
            add_key(writer, key, value)
    for name, value in tensors.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
