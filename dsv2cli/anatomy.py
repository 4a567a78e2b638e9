"""What a GGUF is made of, from its header alone: architecture, types, bytes each token reads, memory at a context."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dsv2cli.console import cut
from dsv2cli.engines.cache import cache_of, count
from dsv2cli.engines.choice import LLAMA, OURS, Engine, Wanted, no_chat_model, not_ours
from dsv2cli.errors import CliError

if TYPE_CHECKING:
    from cext import Gguf, TensorInfo
    from cext.model import Hparams

# Bytes of a cached row of n values and a tail of m (a latent and its rotary key), with scales (cext/memory/kv.c).
ROW_BYTES: dict[str, Callable[[int, int], int]] = {
    "f16": lambda n, m: 2 * _padded(n + m) + 4,
    "q8_0": lambda n, m: _padded(n) + 2 * _padded(m) + 12,
    "f32": lambda n, m: 4 * (n + m),
}
# First match wins. What a decoded token reads of a part: all of it, but for the experts it chose and one embedding row.
PARTS = (
    ("routed experts", re.compile(r"_exps\.")),
    ("shared experts", re.compile(r"_shexp\.")),
    ("router", re.compile(r"ffn_gate_inp\.|exp_probs_b")),
    ("norms", re.compile(r"_norm\.")),
    ("attention", re.compile(r"\.attn_")),
    ("dense layers", re.compile(r"\.ffn_")),
    ("embeddings", re.compile(r"^token_embd\.")),
    ("head", re.compile(r"^output\.")),
)
OTHER = "other"
DRAFT = "draft head"  # blocks for multi-token prediction behind the model's own: not read
BLOCK = re.compile(r"blk\.(\d+)\.")
COUNTS = (  # keys that are reckoned with or shown
    "block_count", "expert_count", "expert_used_count", "leading_dense_block_count", "context_length",
    "attention.kv_lora_rank", "rope.dimension_count", "expert_group_count", "expert_shared_count", "embedding_length",
    "attention.head_count", "attention.q_lora_rank", "expert_feed_forward_length", "expert_group_used_count",
    "attention.head_count_kv", "attention.key_length", "attention.value_length",
)  # fmt: skip
TEXTS = (
    "general.architecture", "general.name", "tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.chat_template",
)  # fmt: skip
WRITTEN_WRONGLY = (
    "what wrote the file wrote this wrongly: dsv2 quantize makes one from the checkpoint, or take another maker's"
)
CONTEXTS = (4096, 16384, 65536)


@dataclass(frozen=True)
class TypeSize:
    """All tensors of one type."""

    name: str
    n_tensors: int
    n_values: int
    nbytes: int
    runs: bool  # this build's engine has the format

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.n_values if self.n_values else 0.0


@dataclass(frozen=True)
class PartSize:
    """All tensors of one part of the model, and the bytes of them that one decoded token reads."""

    name: str
    n_tensors: int
    nbytes: int
    token_bytes: int


@dataclass(frozen=True)
class Anatomy:
    """A GGUF taken apart. kv_bytes is the cache of one token by --kv type.

    engine: what runs it, and why where it is not dsv2's own; None where nothing does. kind: what it is where it is no
    model that writes text.
    """

    path: Path
    name: str
    architecture: str
    file_bytes: int
    keys: dict[str, Any]  # the architecture's own, without its prefix
    vocabulary: dict[str, Any]  # kind, pre-tokenizer, size, whether there is a chat template
    types: tuple[TypeSize, ...]
    parts: tuple[PartSize, ...]
    kv_bytes: dict[str, int]
    notes: dict[str, Any]  # dsv2.*: what our quantiser wrote down
    remarks: tuple[str, ...] = ()  # the engine's: what the file leaves unsaid, or why it does not run
    engine: Engine | None = OURS
    reason: str = ""
    kind: str | None = None

    @property
    def tensor_bytes(self) -> int:
        return sum(t.nbytes for t in self.types)

    @property
    def n_values(self) -> int:
        return sum(t.n_values for t in self.types)

    @property
    def token_bytes(self) -> int:
        """Bytes of weights that one decoded token reads."""
        return sum(p.token_bytes for p in self.parts)

    @property
    def expert_usage(self) -> NDArray[np.int64] | None:
        """Calibration tokens that chose each expert, (n_layer, n_expert), with the layers that have experts only."""
        if not is_known(self.architecture):
            return None
        names = ("block_count", "expert_count", "leading_dense_block_count")
        n_layer, n_expert, n_dense = (self.keys.get(name, 0) for name in names)
        counts = self.notes.get("dsv2.expert_usage")
        if not isinstance(counts, list):
            return None
        if not 0 <= n_dense < n_layer or n_expert < 1 or len(counts) != n_layer * n_expert:
            return None
        if not all(isinstance(n, int) and 0 <= n < 1 << 48 for n in counts):
            return None
        return np.array(counts, np.int64).reshape(n_layer, n_expert)[n_dense:]

    @property
    def contexts(self) -> tuple[int, ...]:
        """Contexts worth knowing the memory at: a few, and the longest the model was trained for."""
        longest = count(self.keys, "context_length") or CONTEXTS[0]
        return (*(c for c in CONTEXTS if c < longest), longest)

    def memory(self, n_ctx: int, kv_type: str = "f16") -> int:
        """Bytes of weights and cache with a context of n_ctx; the engine's scratch comes on top."""
        return self.tensor_bytes + self.kv_bytes[kv_type] * n_ctx


def is_known(architecture: str) -> bool:
    """Whether the engine runs files of this general.architecture."""
    from cext import architectures

    return architecture in architectures()


def study(path: Path, wanted: Wanted = "auto") -> Anatomy:
    """Read a GGUF's header, for an engine. FileError, FormatError; CliError where a key that is known holds what it
    cannot."""
    from cext import Gguf

    with Gguf(path) as gguf:
        metadata = gguf.metadata
        for key in TEXTS:
            _check(path, key, metadata.get(key, ""), str, "a text")
        _check(path, "tokenizer.ggml.tokens", metadata.get("tokenizer.ggml.tokens", []), list, "a list")
        architecture = metadata.get("general.architecture", "unknown")
        prefix = f"{architecture}."
        keys = {key.removeprefix(prefix): metadata[key] for key in metadata if key.startswith(prefix)}
        known = is_known(architecture)
        if known:
            for name in COUNTS:
                _check(path, prefix + name, keys.get(name, 0), int, "a count")
        kind = no_chat_model(metadata, len(gguf.tensors))
        reason = not_ours(architecture, (t.type_name for t in gguf.tensors)) or ""
        is_ours = not reason and wanted != LLAMA
        shape, remarks = _shape(gguf) if known else (None, ())
        keys |= _assumed(shape) if shape else {}
        cache = cache_of(keys)
        if cache.recurrent:
            remarks += ("some of its layers keep a state of fixed size in place of a cache, which is not counted here",)
        runs = kind is None and (shape is not None if is_ours else wanted != OURS)
        return Anatomy(
            path=path,
            name=metadata.get("general.name", path.stem),
            architecture=architecture,
            file_bytes=gguf.nbytes,
            keys=keys,
            vocabulary=_vocabulary(gguf),
            types=_types(gguf.tensors),
            parts=parts_of(gguf.tensors, keys),
            kv_bytes=_kv_bytes(keys) if is_ours else {name: cache.token_bytes(name) for name in ROW_BYTES},
            notes={key: metadata[key] for key in metadata if key.startswith("dsv2.")},
            remarks=remarks,
            engine=(OURS if is_ours else LLAMA) if runs else None,
            reason=reason,
            kind=kind,
        )


def _shape(gguf: Gguf) -> tuple[Hparams | None, tuple[str, ...]]:
    """The model's shape as the engine runs it, with remarks; None and the reason where it would not."""
    from cext import EngineError
    from cext.model import shape_of

    try:
        return shape_of(gguf)
    except EngineError as error:
        return None, (f"{error}: this build does not run it",)


def _assumed(shape: Hparams) -> dict[str, Any]:
    """Keys as they are run: block_count without a draft head's blocks, groups where the file leaves them unsaid."""
    return {
        "block_count": shape["n_layer"],
        "expert_shared_count": shape["n_expert_shared"],
        "expert_group_count": shape["n_expert_group"],
        "expert_group_used_count": shape["n_expert_group_used"],
    }


def _check(path: Path, key: str, value: Any, kind: type, what: str) -> None:
    if isinstance(value, kind) and not isinstance(value, bool) and not (isinstance(value, int) and value < 0):
        return
    shown = f"a list of {len(value)} values" if isinstance(value, list) else cut(repr(value), 80)
    raise CliError(f"`{path}`: `{key}` is {shown}, expected {what}", WRITTEN_WRONGLY)


def _vocabulary(gguf: Gguf) -> dict[str, Any]:
    metadata = gguf.metadata
    return {
        "kind": metadata.get("tokenizer.ggml.model"),
        "pre": metadata.get("tokenizer.ggml.pre"),
        "size": len(metadata.get("tokenizer.ggml.tokens", ())),
        "chat_template": "tokenizer.chat_template" in metadata,
    }


def _n_values(tensor: TensorInfo) -> int:
    n = 1
    for dim in tensor.shape:
        n *= dim
    return n


def _types(tensors: Iterable[TensorInfo]) -> tuple[TypeSize, ...]:
    from cext import formats

    known = {f["name"] for f in formats()}
    sizes: dict[str, list[int]] = {}
    for tensor in tensors:
        size = sizes.setdefault(tensor.type_name, [0, 0, 0])
        for i, n in enumerate((1, _n_values(tensor), tensor.nbytes)):
            size[i] += n
    rows = (TypeSize(name, size[0], size[1], size[2], name in known) for name, size in sizes.items())
    return tuple(sorted(rows, key=lambda row: -row.nbytes))


def parts_of(tensors: list[TensorInfo], keys: dict[str, Any]) -> tuple[PartSize, ...]:
    """By part, in PARTS' order. Where there is no head, the embeddings are read whole in its place."""
    n_expert, n_used = count(keys, "expert_count"), count(keys, "expert_used_count")
    n_layer = count(keys, "block_count")
    tied = not any(t.name == "output.weight" for t in tensors)
    sizes: dict[str, list[int]] = {}
    for tensor in tensors:
        part = next((name for name, pattern in PARTS if pattern.search(tensor.name)), OTHER)
        read = tensor.nbytes
        block = BLOCK.match(tensor.name)
        if block and int(block[1]) >= n_layer:
            part, read = DRAFT, 0
        elif part == "routed experts" and n_expert:
            read = tensor.nbytes * n_used // n_expert
        elif part == "embeddings" and not tied:
            read = tensor.nbytes // tensor.shape[-1]
        size = sizes.setdefault(part, [0, 0, 0])
        for i, n in enumerate((1, tensor.nbytes, read)):
            size[i] += n
    order = [name for name, _ in PARTS] + [DRAFT, OTHER]
    return tuple(PartSize(name, *sizes[name]) for name in order if name in sizes)


def _padded(n: int) -> int:
    """Values of a row of integers: a whole number of vectors."""
    return -(-n // 64) * 64


def _kv_bytes(keys: dict[str, Any]) -> dict[str, int]:
    rows, n_layer = _cached_rows(keys), keys.get("block_count", 0)
    return {name: int(sum(n * row(*width) for n, *width in rows) * n_layer) for name, row in ROW_BYTES.items()}


def _cached_rows(keys: dict[str, Any]) -> list[tuple[int, int, int]]:
    """What a layer keeps of a token: (rows, values, values of a tail). A latent, or a key and a value by head."""
    if "attention.kv_lora_rank" in keys:
        return [(1, keys["attention.kv_lora_rank"], keys.get("rope.dimension_count", 0))]
    n_head = keys.get("attention.head_count", 0)
    head = keys.get("embedding_length", 0) // max(n_head, 1)
    widths = (keys.get(f"attention.{name}_length", head) for name in ("key", "value"))
    return [(keys.get("attention.head_count_kv", n_head), n, 0) for n in widths]
