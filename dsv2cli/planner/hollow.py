"""hollow.py: a few layers of a model's own shapes and types, laid as files of holes that the engine runs.

Zeros take as long to read and to multiply as weights do. The norms, the router and some embeddings are written, so that
tokens choose experts as they do in a model. Where a layer's experts are more than is to be touched there are fewer of
them, and fewer tokens in a prompt by as much, so that an expert has as many of them.

Dense layers and layers with experts take unlike times for a byte or a product, and a model has few of the former: so
there are two files, the first layer alone and all that were chosen, and what the others take is the difference.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dsv2cli.anatomy import BLOCK, Anatomy, parts_of
from dsv2cli.engines.cache import count

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy as np

    from cext import TensorInfo

ENOUGH_BYTES = 160 << 20  # that a token reads of them: more than a share of most caches
LAYER_BYTES = 384 << 20  # of the routed experts of a layer, all of which a prompt touches
FREE_SHARE = 16  # and no more of the free memory than one part in so many
MOST_BYTES = 1 << 30  # of all that is touched, where it is more than three layers
PROMPT = 512  # tokens read at once, as chat does
LEAST_PROMPT = 32
SEED = 20240507


@dataclass(frozen=True)
class Work:
    """What a token takes of a model or of a part of it: bytes read, multiply-adds of its layers and those of them that
    are not routed experts', bytes of the head."""

    token_bytes: int
    layer_products: int
    fixed_products: int
    head_bytes: int
    n_layer: int

    @property
    def layer_bytes(self) -> int:
        return self.token_bytes - self.head_bytes


def work_of(tensors: Sequence[TensorInfo], keys: dict[str, Any]) -> Work:
    """Of all layers that these tensors make."""
    n_expert, n_used, n_layer = (count(keys, k) for k in ("expert_count", "expert_used_count", "block_count"))
    token_bytes = sum(part.token_bytes for part in parts_of(list(tensors), keys))
    tied = not any(t.name == "output.weight" for t in tensors)
    routed = fixed = head = 0
    for t in tensors:
        block = BLOCK.match(t.name)
        if t.name == ("token_embd.weight" if tied else "output.weight"):
            head = t.nbytes
        elif block and int(block[1]) < n_layer and len(t.shape) > 1:
            n = math.prod(t.shape)
            if "_exps." in t.name and n_expert:
                routed += n * n_used // n_expert
            else:
                fixed += n
    return Work(token_bytes, routed + fixed, fixed, head, n_layer)


@dataclass(frozen=True)
class Hollow:
    """A file to be: its keys without the architecture's name, and its tensors."""

    architecture: str
    keys: dict[str, Any]
    infos: list[TensorInfo]

    @property
    def work(self) -> Work:
        return work_of(self.infos, self.keys)

    @property
    def touched(self) -> int:
        return sum(t.nbytes for t in self.infos if t.name != "token_embd.weight")

    def write(self, path: Path) -> None:
        import numpy as np
        from gguf.constants import GGMLQuantizationType as Type

        from quantize.write.writer import write_hollow

        rng = np.random.default_rng(SEED)
        slots = write_hollow(
            path,
            {"general.architecture": self.architecture}
            | {f"{self.architecture}.{key}": value for key, value in self.keys.items()},
            [(t.name, t.shape[::-1], Type(t.type)) for t in self.infos],
        )
        with path.open("r+b") as file:
            for name, slot in slots.items():
                values = _values(rng, name, slot.shape)
                if values is not None:
                    file.seek(slot.offset)
                    file.write(values)


class Small:
    """A few layers of a model: one dense where it has any, and such with experts from all its depth."""

    def __init__(self, tensors: list[TensorInfo], found: Anatomy, free: int | None = None) -> None:
        self._found = found
        self.whole = work_of(tensors, found.keys)
        self._by_layer: dict[int, list[TensorInfo]] = {}
        self._outside = []
        n_layer = count(found.keys, "block_count")
        for t in tensors:
            if (block := BLOCK.match(t.name)) is None:
                self._outside.append(t)
            elif int(block[1]) < n_layer:
                self._by_layer.setdefault(int(block[1]), []).append(t)
        self._by_layer = dict(sorted(self._by_layer.items()))
        self.n_dense = min(count(found.keys, "leading_dense_block_count"), n_layer)
        self._set_experts(count(found.keys, "expert_count"), count(found.keys, "expert_used_count"), free)
        self.chosen = self._choose()
        self.n_prompt = max(LEAST_PROMPT, PROMPT * self.n_expert // self.n_all) if self.n_all else PROMPT
        self.all = self._laid(self.chosen)
        # Alone where there are others to be told from it, and such that are not here.
        self.first = self._laid(self.chosen[:1]) if 1 < len(self.chosen) < len(self._by_layer) else None

    def part(self, layers: Sequence[int]) -> Work:
        """What a token takes of these layers, as the model has them."""
        return work_of([t for il in layers for t in self._by_layer[il]], self._found.keys)

    @property
    def begins_dense(self) -> bool:
        """Whether the first of the chosen is dense, and others have experts."""
        return self.chosen[0] < self.n_dense <= self.chosen[-1]

    @property
    def like_first(self) -> list[int]:
        """The model's layers that are not as the chosen but the first are."""
        return [il for il in self._by_layer if il < self.n_dense] if self.begins_dense else self.chosen[:1]

    @property
    def like_others(self) -> list[int]:
        """Its layers that are as the chosen but the first are."""
        return [il for il in self._by_layer if il not in self.like_first]

    def _set_experts(self, n_all: int, n_used: int, free: int | None) -> None:
        """So many experts a layer that a prompt touches no more than it has to."""
        largest = max((sum(t.nbytes for t in ts if "_exps." in t.name) for ts in self._by_layer.values()), default=0)
        most = LAYER_BYTES if free is None else min(LAYER_BYTES, free // FREE_SHARE)
        self.n_all = self.n_expert = n_all
        if n_all and largest > most:
            self.n_expert = min(n_all, max(2 * n_used, n_all * most // largest))

    def _choose(self) -> list[int]:
        outside = sum(t.nbytes for t in self._outside if t.name.startswith("output."))
        layers = self._by_layer
        every = sorted(layers)
        if sum(self._touched(layers[il]) for il in every) + outside <= ENOUGH_BYTES:
            return every
        dense, sparse = [il for il in every if il < self.n_dense][:1], [il for il in every if il >= self.n_dense]
        chosen = dense or sparse[:1]
        if not sparse or sparse == chosen:
            sparse = [il for il in every if il not in chosen]
        read = outside + sum(self._read(layers[il]) for il in chosen)
        touched = outside + sum(self._touched(layers[il]) for il in chosen)
        n = 0
        while n < len(sparse) and (n < 2 or read < ENOUGH_BYTES):
            read, touched = read + self._read(layers[sparse[n]]), touched + self._touched(layers[sparse[n]])
            if n > 1 and touched > MOST_BYTES:
                break
            n += 1
        return sorted({*chosen, *(sparse[i * len(sparse) // n] for i in range(n))}) if n else chosen

    def _shrunk(self, t: TensorInfo) -> int:
        return t.nbytes * self.n_expert // self.n_all if "_exps." in t.name and self.n_all else t.nbytes

    def _touched(self, tensors: list[TensorInfo]) -> int:
        return sum(map(self._shrunk, tensors))

    def _read(self, tensors: list[TensorInfo]) -> int:
        return sum(t.nbytes // 10 if "_exps." in t.name else t.nbytes for t in tensors)

    def _laid(self, layers: Sequence[int]) -> Hollow:
        changes = {
            "block_count": len(layers), "leading_dense_block_count": sum(il < self.n_dense for il in layers),
            "nextn_predict_layers": 0, "expert_count": self.n_expert, "expert_group_count": 1,
            "expert_group_used_count": 1,
        }  # fmt: skip
        keys = {**self._found.keys, **{k: v for k, v in changes.items() if k in self._found.keys}}
        keys["vocab_size"] = next(t.shape[1] for t in self._outside if t.name == "token_embd.weight")
        renamed = [self._renamed(t, i) for i, il in enumerate(layers) for t in self._by_layer[il]]
        return Hollow(self._found.architecture, keys, self._ends() + renamed)

    def _renamed(self, t: TensorInfo, il: int) -> TensorInfo:
        """The tensor in layer il, of so many experts."""
        name, shape = BLOCK.sub(f"blk.{il}.", t.name, count=1), t.shape
        if self.n_all and ("_exps." in name or "ffn_gate_inp." in name or "exp_probs_b" in name):
            shape = (*shape[:-1], self.n_expert) if shape[-1] == self.n_all else shape
        return t._replace(name=name, shape=shape, nbytes=t.nbytes * shape[-1] // t.shape[-1])

    def _ends(self) -> list[TensorInfo]:
        """A head of its own, and embeddings in halves, of which rows can be written."""
        embeddings = next(t for t in self._outside if t.name == "token_embd.weight")
        n = embeddings.shape[0] * embeddings.shape[1]
        made = [embeddings._replace(type=1, type_name="f16", nbytes=2 * n)]
        if not any(t.name == "output.weight" for t in self._outside):
            made.append(embeddings._replace(name="output.weight"))
        return made + [t for t in self._outside if t.name != "token_embd.weight"]


def _values(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> bytes | None:
    import numpy as np

    if name.endswith("_norm.weight"):
        return np.ones(shape, "<f4").tobytes()
    if "ffn_gate_inp." in name:
        return rng.standard_normal(shape, np.float32).astype("<f4").tobytes()
    if name == "token_embd.weight":
        return rng.standard_normal((min(PROMPT, shape[0]), shape[1]), np.float32).astype("<f2").tobytes()
    return None
