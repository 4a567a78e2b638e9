"""tensors.py: which tensors a GGUF of this architecture has, and which checkpoint tensors each is made of.

Shapes are numpy's (ggml's reversed). GGUF's architectures of the family turn adjacent dimensions together, and so do
V2 and V3, whose rows stay in order; DeepSeekMoE turns the halves of a head against each other: Form.PAIRED.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cext import Sublayer, system
from quantize.base.errors import UnsupportedError
from quantize.source.arch import Arch
from quantize.source.forms import FORMS, Restore
from quantize.source.found import is_of_activations
from quantize.source.store import Store

# Kept in float32: the router decides which experts run, and its matrix is small.
F32_ROLES = ("ffn_gate_inp", "exp_probs_b")
SUBLAYERS: tuple[Sublayer, ...] = ("attention", "feed_forward")  # of a layer, in order

# What quantisers beside ours leave with a weight: compressed-tensors, GPTQ, AWQ, fp8 in other forms.
QUANTISED_SUFFIXES = (
    "_scale", "_zero_point", "_packed", "_shape", "_g_idx", ".g_idx", ".qweight", ".qzeros", ".scales", "_scale_2",
)  # fmt: skip


class Form(Enum):
    """How checkpoint tensors become a GGUF tensor."""

    WHOLE = "whole"  # one tensor, as it is
    PAIRED = "paired"  # one tensor of heads' rows, the two that turn together made neighbours
    STACK = "stack"  # one tensor an expert, along a new first axis
    K_B = "k_b"  # the K rows of kv_b_proj, per head and transposed: (n_head, kv_lora_rank, nope)
    V_B = "v_b"  # the V rows of kv_b_proj, per head: (n_head, v_dim, kv_lora_rank)


@dataclass(frozen=True)
class Tensor:
    """One tensor of the GGUF."""

    name: str  # "blk.3.ffn_gate_exps.weight"
    role: str  # "ffn_gate_exps": the name without its layer and suffix
    il: int  # -1 outside the layers
    shape: tuple[int, ...]
    sources: tuple[str, ...]  # checkpoint names; one an expert for a stack
    form: Form

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def is_matrix(self) -> bool:
        """Whether it is quantised at all. Norms, biases and the router stay float32."""
        n_dims = max((i + 1 for i, n in enumerate(reversed(self.shape)) if n > 1), default=1)
        return n_dims >= 2 and self.role not in F32_ROLES and not self.role.endswith("_norm")

    @property
    def sublayer(self) -> Sublayer:
        """Where it belongs in its layer."""
        return "attention" if self.role.startswith("attn_") else "feed_forward"

    @property
    def in_parts(self) -> bool:
        """Whether it is a stack of experts, or of heads."""
        return self.form in (Form.STACK, Form.K_B, Form.V_B)


def _attention(arch: Arch, il: int) -> Iterator[Tensor]:
    layer, d, h = f"{arch.family.prefix}model.layers.{il}.", arch.n_embd, arch.n_head
    qk = arch.nope + arch.rope

    def tensor(role: str, source: str, shape: tuple[int, ...], form: Form = Form.WHOLE) -> Tensor:
        return Tensor(f"blk.{il}.{role}.weight", role, il, shape, (f"{layer}self_attn.{source}.weight",), form)

    yield Tensor(f"blk.{il}.attn_norm.weight", "attn_norm", il, (d,), (f"{layer}input_layernorm.weight",), Form.WHOLE)
    if arch.attention == "plain":
        yield tensor("attn_q", "q_proj", (h * qk, d), Form.PAIRED)
        yield tensor("attn_k", "k_proj", (arch.n_head_kv * qk, d), Form.PAIRED)
        yield tensor("attn_v", "v_proj", (arch.n_head_kv * arch.v_dim, d))
    else:
        yield from _latent(arch, tensor)
    yield tensor("attn_output", "o_proj", (d, h * arch.v_dim))


def _latent(arch: Arch, tensor: Callable[..., Tensor]) -> Iterator[Tensor]:
    d, h, qk, kv = arch.n_embd, arch.n_head, arch.nope + arch.rope, arch.kv_lora_rank
    if arch.q_lora_rank:
        yield tensor("attn_q_a", "q_a_proj", (arch.q_lora_rank, d))
        yield tensor("attn_q_a_norm", "q_a_layernorm", (arch.q_lora_rank,))
        yield tensor("attn_q_b", "q_b_proj", (h * qk, arch.q_lora_rank))
    else:
        yield tensor("attn_q", "q_proj", (h * qk, d))
    yield tensor("attn_kv_a_mqa", "kv_a_proj_with_mqa", (kv + arch.rope, d))
    yield tensor("attn_kv_a_norm", "kv_a_layernorm", (kv,))
    yield tensor("attn_k_b", "kv_b_proj", (h, kv, arch.nope), Form.K_B)
    yield tensor("attn_v_b", "kv_b_proj", (h, arch.v_dim, kv), Form.V_B)


def _ffn(arch: Arch, il: int) -> Iterator[Tensor]:
    hf, d, f, e = f"{arch.family.prefix}model.layers.{il}.", arch.n_embd, arch.n_ff_expert, arch.n_expert
    names = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}

    def tensor(role: str, source: str, shape: tuple[int, ...], suffix: str = "weight") -> Tensor:
        return Tensor(f"blk.{il}.{role}.{suffix}", role, il, shape, (f"{hf}{source}",), Form.WHOLE)

    def shape(kind: str, width: int) -> tuple[int, ...]:
        return (d, width) if kind == "down" else (width, d)

    yield tensor("ffn_norm", "post_attention_layernorm.weight", (d,))
    if arch.is_dense(il):
        for kind, source in names.items():
            yield tensor(f"ffn_{kind}", f"mlp.{source}.weight", shape(kind, arch.n_ff))
        return
    yield tensor("ffn_gate_inp", "mlp.gate.weight", (e, d))
    if arch.has_router_bias:
        yield tensor("exp_probs_b", "mlp.gate.e_score_correction_bias", (e,), "bias")
    for kind, source in names.items():
        experts = tuple(f"{hf}mlp.experts.{i}.{source}.weight" for i in range(e))
        role = f"ffn_{kind}_exps"
        yield Tensor(f"blk.{il}.{role}.weight", role, il, (e, *shape(kind, f)), experts, Form.STACK)
    if arch.n_expert_shared:
        for kind, source in names.items():
            yield tensor(
                f"ffn_{kind}_shexp", f"mlp.shared_experts.{source}.weight", shape(kind, arch.n_expert_shared * f)
            )


def layer_tensors(arch: Arch, il: int) -> list[Tensor]:
    """The tensors of one block, in the order of the file."""
    return [*_attention(arch, il), *_ffn(arch, il)]


def model_tensors(arch: Arch) -> list[Tensor]:
    """Every tensor of the GGUF, in the order of the file: embeddings, blocks, final norm, head."""
    v, d = arch.n_vocab, arch.n_embd

    def outside(role: str, source: str, shape: tuple[int, ...]) -> Tensor:
        return Tensor(f"{role}.weight", role, -1, shape, (f"{arch.family.prefix}{source}.weight",), Form.WHOLE)

    tensors = [outside("token_embd", "model.embed_tokens", (v, d))]
    for il in range(arch.n_layer):
        tensors += layer_tensors(arch, il)
    tensors.append(outside("output_norm", "model.norm", (d,)))
    if not arch.tied:
        tensors.append(outside("output", "lm_head", (v, d)))
    return tensors


def check(arch: Arch, store: Store, tensors: list[Tensor]) -> None:
    """Match the plan with what is stored before anything is written.

    Raises CheckpointError for a missing tensor or a wrong shape, UnsupportedError for one that is stored otherwise.
    """
    for tensor in tensors:
        expected = source_shape(arch, tensor)
        for source in tensor.sources:
            store.verify(source, expected, len(tensor.sources))
    for tensor in tensors:
        for source in tensor.sources:
            store.verify_told(source, source_shape(arch, tensor))


def source_shape(arch: Arch, tensor: Tensor) -> tuple[int, ...]:
    """The shape that each of a tensor's sources must have."""
    if tensor.form in (Form.K_B, Form.V_B):
        return (arch.n_head * (arch.nope + arch.v_dim), arch.kv_lora_rank)
    return tensor.shape[1:] if tensor.form is Form.STACK else tensor.shape


def left_out(arch: Arch, dtypes: Mapping[str, str], used: set[str]) -> list[str]:
    """The names of tensors that are not used. UnsupportedError for one that the model is not whole without.

    dtypes: of all tensors, by name; "" where it is not known.
    """
    names = []
    for name, dtype in dtypes.items():
        if name in used:
            continue
        if not _may_leave_out(arch, name):
            what = f" ({dtype})" if dtype and dtype not in FORMS else ""
            hint = "an adapter or another architecture? Merge or remove it first: leaving it out would change the model"
            if what or name.endswith(QUANTISED_SUFFIXES):
                hint = (
                    "it belongs to weights that are quantised already in a way that is not read: start from the bf16,"
                    " f16, fp8 e4m3 or int4 checkpoint"
                )
            raise UnsupportedError(f"tensor `{name}`{what} has no place in a GGUF of {arch.family.model_type}", hint)
        names.append(name)
    return names


def _may_leave_out(arch: Arch, name: str) -> bool:
    """Tensors that do not change what the main model computes from text."""
    if _is_beside(arch, name) or _draft_layer(arch, name) is not None:
        return True
    if is_of_activations(name):
        return True
    name = name.removeprefix(arch.family.prefix)
    return name.endswith("rotary_emb.inv_freq") or (arch.tied and name == "lm_head.weight")


def _is_beside(arch: Arch, name: str) -> bool:
    return bool(arch.family.beside) and name.startswith(arch.family.beside)


def _draft_layer(arch: Arch, name: str) -> int | None:
    """The layer of a multi-token prediction head that a tensor belongs to."""
    layer = re.match(rf"{re.escape(arch.family.prefix)}model\.layers\.(\d+)\.", name)
    return int(layer[1]) if layer and arch.n_layer <= int(layer[1]) < arch.n_layer + arch.n_nextn else None


def left_out_notes(arch: Arch, names: Iterable[str]) -> list[str]:
    """What a person should know of the tensors that are left out, a sentence each."""
    notes, names = [], tuple(names)
    if drafts := {layer for name in names if (layer := _draft_layer(arch, name)) is not None}:
        notes.append(f"{len(drafts)} multi-token prediction layer(s) left out: GGUF runs the model without")
    if n_beside := sum(_is_beside(arch, name) for name in names):
        parts = ", ".join(f"{beginning}*" for beginning in arch.family.beside)
        notes.append(f"{n_beside} tensors of vision left out ({parts}): the file reads text alone")
    if n_activation := sum(is_of_activations(name) for name in names):
        notes.append(f"{n_activation} scales of activations left out: an engine rounds those in its own way, or not")
    return notes


def split_kv_b(arch: Arch, kv_b: NDArray[np.generic], form: Form) -> NDArray[np.generic]:
    """kv_b_proj (n_head * (nope + v_dim), kv_lora_rank) -> K_B (n_head, kv_lora_rank, nope) or V_B; contiguous."""
    heads = kv_b.reshape(arch.n_head, arch.nope + arch.v_dim, arch.kv_lora_rank)
    part = heads[:, : arch.nope].transpose(0, 2, 1) if form is Form.K_B else heads[:, arch.nope :]
    return np.ascontiguousarray(part)


def pair_rows(arch: Arch, w: NDArray[Any]) -> NDArray[Any]:
    """Rows of heads (n, n_embd), rows i and i + half of each made neighbours, as llama.cpp's converter has them."""
    halves = w.reshape(-1, 2, arch.rope // 2, w.shape[-1])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(w.shape)


def _formed(arch: Arch, tensor: Tensor, values: NDArray[Any]) -> NDArray[Any]:
    """What a tensor that is no stack makes of its source's values."""
    if tensor.form is Form.WHOLE:
        return values
    return pair_rows(arch, values) if tensor.form is Form.PAIRED else split_kv_b(arch, values, tensor.form)


def read(arch: Arch, store: Store, tensor: Tensor) -> NDArray[np.float32]:
    """A whole GGUF tensor in float32, of tensor.shape. A stack reads one expert at a time with read_expert instead."""
    if tensor.form is Form.STACK:
        return np.stack([store.read_f32(source) for source in tensor.sources])
    return _formed(arch, tensor, store.read_f32(tensor.sources[0])).astype(np.float32, copy=False)


class _Last:
    """The last array that was made, for who asks for it part by part. Not a cached method: what holds one holds itself,
    and a layer's weights would stay in memory until the collector comes round.
    """

    def __init__(self) -> None:
        self._key: Hashable = None
        self._value: NDArray[Any] | None = None

    def of(self, key: Hashable, make: Callable[[], NDArray[Any]]) -> NDArray[Any]:
        """The array of this key, made where another is kept; that one goes first."""
        if self._value is None or self._key != key:
            self.clear()
            self._key, self._value = key, make()
        return self._value

    def clear(self) -> None:
        self._key = self._value = None


class PartReader:
    """Parts of a layer's tensors in float32, experts one by one.

    Keeps the last tensor of heads, and the last that was stored: k_b and v_b are halves of one.
    """

    def __init__(self, arch: Arch, store: Store) -> None:
        self.arch, self.store = arch, store
        self._stored, self._whole = _Last(), _Last()

    def __call__(self, tensor: Tensor, part: int) -> NDArray[np.float32]:
        """An expert of a stack, a head of k_b or v_b, or the whole of another tensor, whose part is 0."""
        if tensor.form is Form.STACK:
            return self.store.read_f32(tensor.sources[part])
        if not tensor.in_parts:
            return read(self.arch, self.store, tensor)
        head: NDArray[np.float32] = self._whole.of(tensor, lambda: self._split(tensor))[part]
        return head

    def _split(self, tensor: Tensor) -> NDArray[np.float32]:
        stored = self._stored.of(tensor.sources[0], lambda: self.store.read_f32(tensor.sources[0]))
        return split_kv_b(self.arch, stored, tensor.form).astype(np.float32, copy=False)


class Weights:
    """Tensors of a layer in memory, read once: as the engine takes them, and part by part in float32.

    on_tensor is called before each is read. ``release`` gives back the memory of parts that nobody will ask for again.
    """

    def __init__(
        self,
        arch: Arch,
        store: Store,
        tensors: Iterable[Tensor],
        on_tensor: Callable[[], None] = lambda: None,
    ) -> None:
        self._arch, self._store = arch, store
        self._read = PartReader(arch, store)
        self._pages: dict[str, system.Pages] = {}
        self._restore: dict[str, list[Restore]] = {}  # by source of a matrix, by name of a stack
        self._heads: dict[str, NDArray[Any]] = {}  # by source, as stored: what k_b and v_b, or paired rows, are made of
        self._whole = _Last()
        self.arrays: dict[str, NDArray[Any]] = {}
        """By name: float32, float16, or uint16 holding bfloat16 bits."""
        for tensor in tensors:
            on_tensor()
            self.arrays[tensor.name] = self._stack(tensor) if tensor.form is Form.STACK else self._one(tensor)

    def __call__(self, tensor: Tensor, part: int) -> NDArray[np.float32]:
        """As PartReader gives it, read again only where memory does not hold it any more, or does not tell it."""
        if tensor.name not in self.arrays:
            return self._read(tensor, part)
        if tensor.form is Form.STACK:
            return self._restore[tensor.name][part](self.arrays[tensor.name][part])
        if tensor.form is Form.WHOLE:
            return self._restore[tensor.sources[0]][0](self.arrays[tensor.name])
        values: NDArray[np.float32] = self._whole.of(tensor, lambda: self._restored(tensor))
        return values[part] if tensor.in_parts else values

    def release(self, tensor: Tensor, part: int) -> None:
        """Nobody will ask for this part again, nor run an engine over its tensor."""
        if (pages := self._pages.get(tensor.name)) is not None:
            nbytes = len(pages.memory) // tensor.shape[0]
            pages.release(part * nbytes, (part + 1) * nbytes)
        elif not tensor.in_parts:
            self.arrays.pop(tensor.name, None)
            if self._heads.pop(tensor.sources[0], None) is not None:
                self._whole.clear()

    def _restored(self, tensor: Tensor) -> NDArray[np.float32]:
        """All of a tensor that is not as its source is stored."""
        source = tensor.sources[0]
        exact = self._restore[source][0](self._heads[source])
        return _formed(self._arch, tensor, exact).astype(np.float32, copy=False)

    def _one(self, tensor: Tensor) -> NDArray[Any]:
        source = tensor.sources[0]
        half = self._heads.get(source)
        if half is None:
            half = np.empty(self._store.shape(source), self._store.half_dtype(source))
            self._restore[source] = [self._store.read_half(source, half)]
        if tensor.form is Form.WHOLE:
            return half
        self._heads[source] = half
        return _formed(self._arch, tensor, half)

    def _stack(self, tensor: Tensor) -> NDArray[Any]:
        dtype = self._store.half_dtype(tensor.sources[0])
        pages = self._pages[tensor.name] = system.Pages(tensor.size * dtype.itemsize)
        stack: NDArray[Any] = np.frombuffer(pages.memory, dtype).reshape(tensor.shape)
        restore = self._restore[tensor.name] = []
        for part, source in zip(stack, tensor.sources, strict=True):
            if self._store.half_dtype(source) != dtype:
                raise UnsupportedError(f"tensor `{source}` is stored otherwise than `{tensor.sources[0]}`")
            restore.append(self._store.read_half(source, part))
        return stack
