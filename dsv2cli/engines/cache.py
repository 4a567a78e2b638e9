"""The memory of llama.cpp's cache, from a file's header: rows of keys and values a layer, all positions kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

MAX_LAYERS = 1 << 16
MAX_WIDTH = 1 << 24
BYTES = {"f16": (1, 2), "q8_0": (32, 34), "f32": (1, 4)}  # (values, bytes) of a block of a row


@dataclass(frozen=True)
class Cache:
    """widths: values of a token's rows, (keys, values), for each layer that keeps any. recurrent: some layers keep a
    state of fixed size instead, which is not counted."""

    widths: tuple[tuple[int, int], ...]
    recurrent: bool

    def token_bytes(self, kv_type: str) -> int:
        """Bytes of a token's rows in all layers."""
        values, nbytes = BYTES[kv_type]
        return sum(-(-row // values) * nbytes for widths in self.widths for row in widths if row)


def cache_of(keys: Mapping[str, object]) -> Cache:
    """Of a model by its architecture's keys, without their prefix. What a file does not say makes no row."""
    n_layer = min(count(keys, "block_count") - count(keys, "nextn_predict_layers"), MAX_LAYERS)
    heads = _each(keys.get("attention.head_count"), n_layer)
    kept = _each(keys["attention.head_count_kv"], n_layer) if "attention.head_count_kv" in keys else heads
    recurrent = any(key.startswith(("ssm.", "wkv.", "shortconv.", "kda.")) for key in keys)
    interval = count(keys, "full_attention_interval")
    latent = count(keys, "attention.kv_lora_rank")
    rows = []
    for il in range(max(n_layer, 0)):
        if not kept[il] or (recurrent and interval and (il + 1) % interval):
            continue
        if latent and "attention.key_length_mla" in keys:
            rows.append((latent + count(keys, "rope.dimension_count"), 0))
            continue
        head = count(keys, "embedding_length") // heads[il] if heads[il] else 0
        widths = (count(keys, f"attention.{part}_length") or head for part in ("key", "value"))
        rows.append((kept[il] * next(widths), kept[il] * next(widths)))
    return Cache(tuple(rows), recurrent)


def count(keys: Mapping[str, object], name: str) -> int:
    """A key that holds a number of things; 0 where it is absent or holds something else."""
    value = keys.get(name, 0)
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MAX_WIDTH else 0


def _each(value: object, n_layer: int) -> list[int]:
    """A key that is one number for all layers, or a list of one for each."""
    given = value if isinstance(value, list) else [value] * max(n_layer, 0)
    numbers = [count({"": item}, "") for item in given[: max(n_layer, 0)]]
    return numbers + [0] * (n_layer - len(numbers))
