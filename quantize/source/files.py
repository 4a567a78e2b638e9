"""files.py: which files of a folder or a repository make a checkpoint, by their names alone.

The one table: what is downloaded and what is read come from it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"  # the end tokens, where config.json names one of several
INDEX = "model.safetensors.index.json"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
TIKTOKEN = "tiktoken.model"
CHAT_TEMPLATE = "chat_template.jinja"
TEMPLATES = "additional_chat_templates"  # a folder: named ones beside that
CHAT_TEMPLATE_JSON = "chat_template.json"  # what processors saved before that

# Beside the weights, all of them small: configuration, tokenizer, templates, licence. No code, no copies in folders.
_COMPANION = re.compile(
    r"[^/]+\.(?:json|jinja|tiktoken|model)|additional_chat_templates/[^/]+\.jinja|merges\.txt"
    r"|(?:LICEN[CS]E|NOTICE|MODEL_LICENSE)[^/]*|README\.md",
    re.IGNORECASE,
)
_SHARD = re.compile(r"(?P<stem>[^/]+?)(?:-\d+(?P<count>-of-\d+)?)?\.safetensors")
_ADAPTER = re.compile(r"adapter[^/]*\.(?:safetensors|bin)", re.IGNORECASE)
_ORDER = ("model", "pytorch_model", "consolidated")  # the same weights under several names: transformers' own first


def is_companion(name: str) -> bool:
    """Whether a file belongs to a checkpoint without holding weights."""
    return _COMPANION.fullmatch(name) is not None


def is_adapter(name: str) -> bool:
    """Whether a file holds a low-rank adapter's weights, which make no model by themselves."""
    return _ADAPTER.fullmatch(name) is not None


def weights(names: Iterable[str]) -> list[str]:
    """The safetensors files that hold the model, where no index says so: one, or the shards of one set."""
    sets: dict[str, list[tuple[str, bool]]] = {}
    for name in sorted(names):
        if (shard := _SHARD.fullmatch(name)) and not is_adapter(name):
            sets.setdefault(shard["stem"], []).append((name, shard["count"] is not None))
    for stem in (*_ORDER, *sets):
        if found := sets.get(stem):
            numbered = [name for name, is_counted in found if is_counted]
            return numbered or [name for name, _ in found]
    return []
