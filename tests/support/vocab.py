"""A small byte-pair vocabulary with control tokens, as GGUF keys: with it, tiny models can chat."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from support.tiny import Checkpoint as TinyCheckpoint
from support.tiny import Spec, gguf_byte, gguf_metadata, gguf_tensors, variant, write_tensors

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
ODD_MARKER = "<|odd|>"
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4
MERGES = [
    ("U", "s"), ("e", "r"), ("Us", "er"), ("A", "s"), ("s", "i"), ("As", "si"), ("Assi", "s"), ("Assis", "t"),
    ("a", "n"), ("an", "t"), ("Assist", "ant"), ("Ġ", "H"), ("ĠH", "i"), ("Ġ", "t"), ("h", "e"), ("Ġt", "he"),
    ("Ġ", "a"),
]  # fmt: skip
# (spelling, type): some writers mark turn markers as ordinary text, and they must not be typed all the same
SPECIALS = [(BOS, CONTROL), (EOS, CONTROL), (USER, USER_DEFINED), (ASSISTANT, USER_DEFINED), (ODD_MARKER, USER_DEFINED)]
N_VOCAB = 256 + len(MERGES) + len(SPECIALS)
IDS = {text: 256 + len(MERGES) + i for i, (text, _) in enumerate(SPECIALS)}

V2_TEMPLATE = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}{{ bos_token }}"
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + eos_token }}"
    "{% elif message['role'] == 'system' %}{{ message['content'] + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
V25_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] }}"
    "{% elif message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}"
    "{% else %}{{ '<｜Assistant｜>' + message['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)


def vocabulary(template: str | None = V2_TEMPLATE, **changes: Any) -> dict[str, Any]:
    """The tokenizer keys of a GGUF; ``changes`` by key replace some, or with None take them out."""
    tokens = [gguf_byte(i) for i in range(256)] + [a + b for a, b in MERGES] + [text for text, _ in SPECIALS]
    keys: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "deepseek-llm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [NORMAL] * (256 + len(MERGES)) + [kind for _, kind in SPECIALS],
        "tokenizer.ggml.merges": [f"{a} {b}" for a, b in MERGES],
        "tokenizer.ggml.bos_token_id": IDS[BOS],
        "tokenizer.ggml.eos_token_id": IDS[EOS],
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": template,
    }
    keys |= {f"tokenizer.{name.replace('__', '.')}": value for name, value in changes.items()}
    return {key: value for key, value in keys.items() if value is not None}


def write_vocab(path: Path, template: str | None = V2_TEMPLATE, **changes: Any) -> Path:
    """A GGUF that holds the vocabulary and no weights."""
    return write_tensors(path, {"general.name": "vocabulary"} | vocabulary(template, **changes), {})


def write_model(
    path: Path, spec: Spec, template: str | None = V2_TEMPLATE, dtype: Any = None, *, endless: bool = False
) -> Path:
    """A tiny random model that speaks this vocabulary; matrices in ``dtype`` (float32).

    endless: the head gives the end token the least of all logits, so that greedy answers never end.
    """
    spec = variant(spec, n_vocab=N_VOCAB)
    tensors = gguf_tensors(TinyCheckpoint(spec))
    if endless:
        tensors["output.weight"][IDS[EOS]] = 0  # a logit of 0, and of some 270 random ones the largest is above
    if dtype is not None:
        tensors = {n: t if t.ndim == 1 or "ffn_gate_inp" in n else t.astype(dtype) for n, t in tensors.items()}
    return write_tensors(path, gguf_metadata(spec) | vocabulary(template), tensors, spec.arch)
