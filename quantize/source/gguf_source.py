"""gguf_source.py: a GGUF in F32, F16 or BF16 as a model to quantise, split or not; Q8_0 with a word of warning.

The file's directory is read and checked by the engine; weights are read with positioned reads, of a stack one expert
at a time. Weights have the names that a checkpoint's would have: kv_b_proj is attn_kv_b, or put together again from
attn_k_b and attn_v_b. The vocabulary, the template and where the model comes from are carried on as they are.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import cext
from cext.errors import EngineError
from cext.model import shape_of
from quantize.base.errors import CheckpointError, UnsupportedError
from quantize.source.arch import Arch
from quantize.source.forms import FORMS, Restore, Weight
from quantize.source.gguf_arch import arch_of_file
from quantize.source.resolve import OTHER_MODEL_HINT
from quantize.source.stored import Files, StoredTensor, stamps
from quantize.source.tensors import Form, Tensor, model_tensors, source_shape

F32 = NDArray[np.float32]
SUFFIX = ".gguf"
TYPES_HINT = "it is quantised already: start from the checkpoint (safetensors), or from a GGUF in BF16, F16 or F32"
Q8_0_BLOCK, Q8_0_BYTES = 32, 34
# Of general.*, what is said anew of the file that is made.
SAID_ANEW = (
    "general.architecture",
    "general.type",
    "general.name",
    "general.file_type",
    "general.quantization_version",
    "general.quantized_by",
    "general.alignment",
)
_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


@dataclass(frozen=True)
class Heads:
    """kv_b_proj (n_head * (nope + v), latent), put together from attn_k_b (n_head, latent, nope), folded along its
    rows or not, and attn_v_b (n_head, v, latent).
    """

    name: str
    shape: tuple[int, ...]
    k: Weight
    v: Weight
    n_head: int

    @property
    def half(self) -> np.dtype[Any]:
        """Of the copy that the engine gets: both parts' own where they are alike, else float32."""
        return self.k.form.half if self.is_alike else np.dtype("<f4")

    @property
    def is_alike(self) -> bool:
        """Whether both parts are stored as the engine takes them."""
        return self.k.form is self.v.form and self.k.form.is_plain

    def read(self, files: Files, start: int = 0, stop: int | None = None) -> F32:
        """Rows start to stop in float32."""
        whole = np.empty(self.shape, np.float32)
        self._join(self.k.read(files), self.v.read(files), whole)
        return whole[start:stop]

    def read_half(self, files: Files, out: NDArray[Any]) -> Restore:
        """The weight into out, exactly."""
        if not self.is_alike:
            out[...] = self.read(files)
            return lambda half: half
        k, v = np.empty(self.k.shape, self.half), np.empty(self.v.shape, self.half)
        self.k.read_half(files, k)
        self.v.read_half(files, v)
        self._join(k, v, out)
        return lambda half: self.k.form.decode(half, half.shape[-1])

    def _join(self, k: NDArray[Any], v: NDArray[Any], out: NDArray[Any]) -> None:
        latent = self.shape[1]
        heads = out.reshape(self.n_head, -1, latent)
        k_heads = k.reshape(self.n_head, latent, -1).transpose(0, 2, 1)
        heads[:, : k_heads.shape[1]] = k_heads
        heads[:, k_heads.shape[1] :] = v.reshape(self.n_head, -1, latent)


class GgufStore:
    """The weights of an open GGUF, by the names of a checkpoint's."""

    def __init__(self, path: Path, tensors: Sequence[cext.gguf.TensorInfo], arch: Arch) -> None:
        self.path = path
        self._arch = arch
        self.tensors = {info.name: _stored(path, info) for info in tensors}
        self._files = Files()
        self._places: dict[str, Callable[[], Weight | Heads]] = {}
        self._parts: dict[str, tuple[str, ...]] = {}
        for tensor in model_tensors(arch):
            self._place(tensor)

    def close(self) -> None:
        """Release the files; reads after this open them again."""
        self._files.close()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors on disk."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def touched(self) -> set[str]:
        """Names of the files that weights were read from."""
        return self._files.touched

    def stamps(self) -> dict[str, list[int]]:
        """[bytes, time of the last change in ns] of every file, by its name."""
        return stamps({self.path, *(tensor.shard for tensor in self.tensors.values())})

    def record(self, names: Collection[str]) -> Sequence[object]:
        """What the values of these weights depend on beside the bytes of the files, as JSON."""
        used = {part for name in names for part in self.parts(name)}
        return ["GGUF", *sorted((t.name, t.dtype, t.shape) for t in self.tensors.values() if t.name in used)]

    def parts(self, name: str) -> tuple[str, ...]:
        """The tensors of the file that a weight is made of."""
        return self._parts[name]

    def verify(self, name: str, shape: tuple[int, ...], n_stacked: int = 1) -> None:
        """Check that a weight is there, of that shape, in a type that can be read; its stack whole."""
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
        weight = self._weight(name)
        if weight.shape != shape:
            raise CheckpointError(
                f"`{self.path}`: tensor `{', '.join(self._parts[name])}` is {weight.shape}, its keys make it {shape}",
                OTHER_MODEL_HINT,
            )

    def verify_told(self, name: str, shape: tuple[int, ...]) -> None:
        """Nothing: the directory tells all."""

    def read_f32(self, name: str) -> F32:
        """A weight in float32."""
        return self._weight(name).read(self._files)

    def read_rows(self, name: str, start: int, stop: int) -> F32:
        """Rows start to stop of a matrix, as read_f32 reads them."""
        return self._weight(name).read(self._files, start, stop)

    def read_half(self, name: str, out: NDArray[Any]) -> Restore:
        """A weight into out, of its shape and half_dtype. Returns what gives the exact weight back from that."""
        return self._weight(name).read_half(self._files, out)

    def half_dtype(self, name: str) -> np.dtype[Any]:
        """The dtype that read_half writes for this weight."""
        weight = self._weight(name)
        return weight.half if isinstance(weight, Heads) else weight.form.half

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a weight."""
        return self._weight(name).shape

    def _weight(self, name: str) -> Weight | Heads:
        return self._places[name]()

    def _place(self, tensor: Tensor) -> None:
        """Where a tensor's sources stand in this file."""
        if tensor.form in (Form.K_B, Form.V_B):
            self._place_heads(tensor.sources[0], tensor)
            return
        if tensor.form is not Form.STACK:
            (source,) = tensor.sources
            self._parts[source] = (tensor.name,)
            self._places[source] = lambda: _weight(source, self.tensors[tensor.name])
            return
        kind = {"ffn_gate_exps": 0, "ffn_up_exps": 1}.get(tensor.role)
        both = tensor.name.replace(tensor.role, "ffn_gate_up_exps")
        is_both = kind is not None and tensor.name not in self.tensors and both in self.tensors
        name = both if is_both else tensor.name
        for i, source in enumerate(tensor.sources):
            self._parts[source] = (name,)
            self._places[source] = self._expert(source, name, i, kind if is_both else None)

    def _expert(self, source: str, name: str, i: int, half: int | None) -> Callable[[], Weight]:
        def make() -> Weight:
            stack = self.tensors[name]
            if len(stack.shape) != 3 or stack.shape[0] <= i or (half is not None and stack.shape[1] % 2):
                raise CheckpointError(f"`{self.path}`: tensor `{name}` is {stack.shape}, expected a stack of experts")
            one = stack.item(i)
            if half is not None and (rows := one.shape[0] // 2):
                one = one.rows(half * rows, (half + 1) * rows)
            return _weight(source, one)

        return make

    def _place_heads(self, source: str, tensor: Tensor) -> None:
        stem = tensor.name.removesuffix(f"{tensor.role}.weight")
        whole, k, v = (f"{stem}{role}.weight" for role in ("attn_kv_b", "attn_k_b", "attn_v_b"))
        if whole in self.tensors:
            self._parts[source] = (whole,)
            self._places[source] = lambda: _weight(source, self.tensors[whole])
            return
        shape = source_shape(self._arch, tensor)

        def make() -> Heads:
            k_part, v_part = (_weight(name, self.tensors[name]) for name in (k, v))
            h, latent = self._arch.n_head, self._arch.kv_lora_rank
            expected = ((h, latent, self._arch.nope), (h, self._arch.v_dim, latent))
            for part, size in zip((k_part, v_part), expected, strict=True):
                if part.shape not in (size, (size[0] * size[1], size[2])):
                    raise CheckpointError(
                        f"`{self.path}`: tensor `{part.name}` is {part.shape}, its keys make it {size}",
                        OTHER_MODEL_HINT,
                    )
            return Heads(source, shape, k_part, v_part, h)

        self._parts[source] = (k, v)
        self._places[source] = make


def _stored(path: Path, info: cext.gguf.TensorInfo) -> StoredTensor:
    shape, dtype = info.shape[::-1], info.type_name.upper()
    if dtype == "Q8_0":
        shape = (*shape[:-1], shape[-1] // Q8_0_BLOCK * Q8_0_BYTES)
    return StoredTensor(info.name, dtype, shape, _part_path(path, info.part), info.offset, info.nbytes)


def _part_path(path: Path, part: int) -> Path:
    if part == 0:
        return path
    return path.with_name(_PART.sub(rf"-{part + 1:05d}-of-\2{SUFFIX}", path.name))


def _weight(name: str, stored: StoredTensor) -> Weight:
    shape = stored.shape
    if stored.dtype == "Q8_0":
        shape = (*shape[:-1], shape[-1] // Q8_0_BYTES * Q8_0_BLOCK)
    return Weight(name, shape, FORMS[stored.dtype], stored)


class GgufSource:
    """A GGUF file, or a split one by its first part."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._notes: list[str] = []
        with _told(), cext.Gguf(self.path) as gguf:
            self._metadata = {key: gguf.metadata[key] for key in gguf.metadata if not key.startswith("dsv2.")}
            self._tensors = gguf.tensors
            shape, notes = shape_of(gguf)
        names = {info.name for info in self._tensors}
        self._notes += notes
        self.arch = arch_of_file(os.fspath(self.path), self._metadata, shape, names)
        self.store = GgufStore(self.path, self._tensors, self.arch)

    def __enter__(self) -> GgufSource:
        return self

    def __exit__(self, *exc: object) -> None:
        self.store.close()

    @property
    def name(self) -> str:
        """As the file says, else the file's own."""
        said = self._metadata.get("general.name")
        return said if isinstance(said, str) and said else _PART.sub("", self.path.name).removesuffix(SUFFIX)

    @property
    def tokenizer(self) -> Mapping[str, Any]:
        return self._carried[0]

    @property
    def provenance(self) -> Mapping[str, object]:
        return self._carried[1]

    @property
    def notes(self) -> Sequence[str]:
        return (*self._notes, *self._carried[2], *self._own_notes())

    def files(self) -> list[Path]:
        """All parts."""
        return sorted({self.path, *(tensor.shard for tensor in self.store.tensors.values())})

    def left_out(self, used: Collection[str]) -> list[str]:
        parts = {part for name in used for part in self.store.parts(name)}
        names = [name for name in self.store.tensors if name not in parts]
        for name in names:
            if not self._may_leave_out(name):
                raise UnsupportedError(
                    f"`{self.path}`: tensor `{name}` has no place in the file to be made",
                    "leaving it out would change the model: start from the checkpoint (safetensors)",
                )
        return names

    def _may_leave_out(self, name: str) -> bool:
        """A draft head's block, and kv_b_proj in a form beside the one that is read."""
        block = re.match(r"blk\.(\d+)\.(.+)", name)
        if block is None:
            return False
        return int(block[1]) >= self.arch.n_layer or block[2] in ("attn_k_b.weight", "attn_v_b.weight")

    @cached_property
    def _carried(self) -> tuple[dict[str, Any], dict[str, object], list[str]]:
        """Keys of the vocabulary, keys of the origin, and what could not be carried on."""
        tokenizer: dict[str, Any] = {}
        origin: dict[str, object] = {}
        lost = []
        for key, value in self._metadata.items():
            kept = tokenizer if key.startswith("tokenizer.") else origin if key.startswith("general.") else None
            if kept is None or key in SAID_ANEW:
                continue
            if (plain := _plain(value)) is None:
                lost.append(key)
            else:
                kept[key] = plain
        if "tokenizer.ggml.tokens" not in tokenizer:
            raise UnsupportedError(f"`{self.path}`: no vocabulary (`tokenizer.ggml.tokens`)", "take another file of it")
        note = f"keys left out, for they cannot be written again: {', '.join(lost)}"
        return tokenizer, origin, [note] if lost else []

    def _own_notes(self) -> list[str]:
        notes = []
        blocks = {int(block[1]) for name in self.store.tensors if (block := re.match(r"blk\.(\d+)\.", name))}
        if n_draft := sum(il >= self.arch.n_layer for il in blocks):
            notes.append(f"{n_draft} multi-token prediction layer(s) left out: GGUF runs the model without")
        if n := sum(tensor.dtype == "Q8_0" for tensor in self.store.tensors.values()):
            notes.append(
                f"{n} tensors of the source are Q8_0: what that lost stays lost, and the report compares with it"
            )
        return notes


def _plain(value: object) -> object | None:
    """A value as the writer takes it: of integers uint32, in lists int32, of floats float32; None where it cannot."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value if 0 <= value < 1 << 32 else None
    if not isinstance(value, list):
        return value
    kinds = {type(item) for item in value}
    if kinds == {float}:
        return np.array(value, np.float32)
    if kinds == {int} and not all(-(1 << 31) <= item < 1 << 31 for item in value):
        return None
    return value if kinds in ({str}, {int}) else None


@contextmanager
def _told() -> Iterator[None]:
    """The engine's errors as the quantiser's."""
    try:
        yield
    except cext.UnsupportedError as error:
        raise UnsupportedError(str(error), error.hint) from error
    except EngineError as error:
        raise CheckpointError(str(error), error.hint) from error
