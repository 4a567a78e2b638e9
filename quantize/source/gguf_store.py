"""gguf_store.py: the weights of a GGUF by the names that a checkpoint's would have, read with positioned reads.

A stack is read one expert at a time. Where a file has rows in another order or in several tensors than the checkpoint
(kv_b_proj as attn_k_b and attn_v_b, rows that turn together as neighbours), they are put back.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from cext.gguf import TensorInfo
from quantize.base.errors import CheckpointError, UnsupportedError
from quantize.source.arch import Arch
from quantize.source.forms import FORMS, Weight
from quantize.source.regrouped import Regrouped
from quantize.source.store import Store
from quantize.source.stored import StoredTensor
from quantize.source.tensors import Form, Tensor, model_tensors, source_shape

SUFFIX = ".gguf"
OTHER_MODEL_HINT = "the keys and the tensors are not of one model: was it edited? Take another file of it"
PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
TYPES_HINT = "it is quantised already: start from the checkpoint (safetensors), or from a GGUF in BF16, F16 or F32"
Q8_0_BLOCK, Q8_0_BYTES = 32, 34

Place = Callable[[], Weight | Regrouped]
"""A weight, of a file whose tensors are there and of types that can be read. CheckpointError."""


class GgufStore(Store):
    """The weights of an open GGUF."""

    def __init__(self, path: Path, tensors: Sequence[TensorInfo], arch: Arch) -> None:
        super().__init__(path, {info.name: _stored(path, info) for info in tensors})
        self._arch = arch
        self._places: dict[str, Place] = {}
        self._parts: dict[str, tuple[str, ...]] = {}
        for tensor in model_tensors(arch):
            self._place(tensor)

    def paths(self) -> list[Path]:
        """The first part may hold none."""
        return sorted({self.path, *super().paths()})

    def record(self, names: Collection[str]) -> Sequence[object]:
        used = {part for name in names for part in self.parts(name)}
        return ["GGUF", *sorted((t.name, t.dtype, t.shape) for t in self.tensors.values() if t.name in used)]

    def parts(self, name: str) -> tuple[str, ...]:
        return self._parts[name]

    def verify(self, name: str, shape: tuple[int, ...], n_stacked: int = 1) -> None:
        for part in self._parts[name]:
            stored = self.tensors.get(part)
            if stored is None:
                raise CheckpointError(f"`{self.path}`: tensor `{part}` is missing", OTHER_MODEL_HINT)
            if stored.dtype not in FORMS:
                raise UnsupportedError(f"`{self.path}`: tensor `{part}` is {stored.dtype}", TYPES_HINT)
            if len(stored.shape) == 3 and n_stacked > 1 and stored.shape[0] != n_stacked:
                raise CheckpointError(
                    f"tensor `{part}` is {stored.shape}, its keys make it a stack of {n_stacked}", OTHER_MODEL_HINT
                )
        weight = self.weight(name)
        if weight.shape != shape:
            raise self._shaped(", ".join(self._parts[name]), weight.shape, shape)

    def verify_told(self, name: str, shape: tuple[int, ...]) -> None:
        """Nothing: the directory tells all."""

    def weight(self, name: str) -> Weight | Regrouped:
        return self._places[name]()

    def _shaped(self, name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> CheckpointError:
        what = f"`{self.path}`: tensor `{name}` is {shape}, its keys make it {expected}"
        return CheckpointError(what, OTHER_MODEL_HINT)

    def _place(self, tensor: Tensor) -> None:
        """Where a tensor's sources stand in this file."""
        stem = tensor.name.removesuffix(f"{tensor.role}.weight")
        if tensor.form is Form.STACK:
            self._place_stack(tensor, f"{stem}ffn_gate_up_exps.weight")
        elif tensor.form in (Form.K_B, Form.V_B):
            self._place_heads(tensor, stem)
        else:
            self._place_whole(tensor, f"{stem}attn_qkv.weight")

    def _place_whole(self, tensor: Tensor, together: str) -> None:
        """A tensor of its own, or q, k and v of plain attention in one."""
        (source,) = tensor.sources
        name = tensor.name
        qkv = ("attn_q", "attn_k", "attn_v") if self._arch.attention == "plain" else ()
        if tensor.role in qkv and tensor.name not in self.tensors and together in self.tensors:
            name = together
        self._parts[source] = (name,)

        def make() -> Weight | Regrouped:
            stored = self.tensors[name]
            if name == together:
                stored = self._rows_of_qkv(stored, qkv.index(tensor.role))
            weight = _weight(source, stored)
            if tensor.form is not Form.PAIRED or weight.shape != tensor.shape:
                return weight
            return Regrouped(weight.shape, (weight,), lambda parts, out: _unpair_rows(self._arch, parts[0], out))

        self._places[source] = make

    def _rows_of_qkv(self, stored: StoredTensor, part: int) -> StoredTensor:
        arch = self._arch
        qk = arch.nope + arch.rope
        rows = (arch.n_head * qk, arch.n_head_kv * qk, arch.n_head_kv * arch.v_dim)
        if _weight(stored.name, stored).shape != (sum(rows), arch.n_embd):
            raise self._shaped(stored.name, stored.shape, (sum(rows), arch.n_embd))
        return stored.rows(sum(rows[:part]), sum(rows[: part + 1]))

    def _place_stack(self, tensor: Tensor, together: str) -> None:
        """Experts, or of gates and ups the halves of each."""
        half = {"ffn_gate_exps": 0, "ffn_up_exps": 1}.get(tensor.role)
        if tensor.name in self.tensors or together not in self.tensors:
            half = None
        name = tensor.name if half is None else together
        for i, source in enumerate(tensor.sources):
            self._parts[source] = (name,)
            self._places[source] = self._expert(source, name, i, half)

    def _expert(self, source: str, name: str, i: int, half: int | None) -> Place:
        def make() -> Weight:
            stack = self.tensors[name]
            if len(stack.shape) != 3 or stack.shape[0] <= i or (half is not None and stack.shape[1] % 2):
                raise CheckpointError(f"`{self.path}`: tensor `{name}` is {stack.shape}, expected a stack of experts")
            one = stack.item(i)
            if half is not None and (rows := one.shape[0] // 2):
                one = one.rows(half * rows, (half + 1) * rows)
            return _weight(source, one)

        return make

    def _place_heads(self, tensor: Tensor, stem: str) -> None:
        """kv_b_proj as it is, or in attn_k_b and attn_v_b, whose heads may be folded along their rows."""
        (source,) = tensor.sources
        whole, k, v = (f"{stem}{role}.weight" for role in ("attn_kv_b", "attn_k_b", "attn_v_b"))
        if whole in self.tensors:
            self._parts[source] = (whole,)
            self._places[source] = lambda: _weight(source, self.tensors[whole])
            return
        arch = self._arch
        shapes = (arch.n_head, arch.kv_lora_rank, arch.nope), (arch.n_head, arch.v_dim, arch.kv_lora_rank)

        def make() -> Regrouped:
            parts = tuple(_weight(name, self.tensors[name]) for name in (k, v))
            for part, shape in zip(parts, shapes, strict=True):
                if part.shape not in (shape, (shape[0] * shape[1], shape[2])):
                    raise self._shaped(part.name, part.shape, shape)
            return Regrouped(source_shape(arch, tensor), parts, lambda found, out: _join_kv_b(arch, found, out))

        self._parts[source] = (k, v)
        self._places[source] = make


def _stored(path: Path, info: TensorInfo) -> StoredTensor:
    shape, dtype = info.shape[::-1], info.type_name.upper()
    if dtype == "Q8_0":
        shape = (*shape[:-1], shape[-1] // Q8_0_BLOCK * Q8_0_BYTES)
    return StoredTensor(info.name, dtype, shape, _part_path(path, info.part), info.offset, info.nbytes)


def _part_path(path: Path, part: int) -> Path:
    if part == 0:
        return path
    return path.with_name(PART.sub(rf"-{part + 1:05d}-of-\2{SUFFIX}", path.name))


def _weight(name: str, stored: StoredTensor) -> Weight:
    shape = stored.shape
    if stored.dtype == "Q8_0":
        shape = (*shape[:-1], shape[-1] // Q8_0_BYTES * Q8_0_BLOCK)
    return Weight(name, shape, FORMS[stored.dtype], stored)


def _join_kv_b(arch: Arch, parts: Sequence[NDArray[Any]], out: NDArray[Any]) -> None:
    """K_B and V_B, each with its heads' rows under each other or not, into kv_b_proj: tensors.split_kv_b undone."""
    k, v = parts
    heads = out.reshape(arch.n_head, arch.nope + arch.v_dim, arch.kv_lora_rank)
    heads[:, : arch.nope] = k.reshape(arch.n_head, arch.kv_lora_rank, arch.nope).transpose(0, 2, 1)
    heads[:, arch.nope :] = v.reshape(arch.n_head, arch.v_dim, arch.kv_lora_rank)


def _unpair_rows(arch: Arch, w: NDArray[Any], out: NDArray[Any]) -> None:
    """Rows of heads that are neighbours into their halves: tensors.pair_rows undone."""
    pairs = w.reshape(-1, arch.rope // 2, 2, w.shape[-1])
    out.reshape(-1, 2, arch.rope // 2, w.shape[-1])[...] = pairs.swapaxes(1, 2)
