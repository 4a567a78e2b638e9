"""Writes GGUF bytes field by field, so that a test can set any field to a value that no honest writer produces."""

import random
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
_PACK = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "?", U64: "Q", I64: "q", F64: "d"}

TYPE_F32, TYPE_F16, TYPE_Q8_0 = 0, 1, 8


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return u64(len(raw)) + raw


def value(kind: int, item: object) -> bytes:
    """One scalar or string, without its type."""
    if kind == STRING:
        assert isinstance(item, str | bytes)
        return string(item)
    return struct.pack("<" + _PACK[kind], item)


def kv(key: str | bytes, kind: int, item: object) -> bytes:
    """A scalar entry."""
    return string(key) + u32(kind) + value(kind, item)


def kv_array(key: str | bytes, kind: int, items: Sequence[object]) -> bytes:
    return string(key) + u32(ARRAY) + u32(kind) + u64(len(items)) + b"".join(value(kind, item) for item in items)


@dataclass(frozen=True)
class Tensor:
    """One record of the directory. shape is in ggml's order; offset counts from the data section."""

    name: str | bytes
    shape: tuple[int, ...]
    kind: int = TYPE_F32
    offset: int = 0
    n_dims: int | None = None  # as written; the length of shape unless set

    def record(self) -> bytes:
        n_dims = len(self.shape) if self.n_dims is None else self.n_dims
        return string(self.name) + u32(n_dims) + b"".join(map(u64, self.shape)) + u32(self.kind) + u64(self.offset)

    def nbytes(self) -> int:
        elements, size = GGML_QUANT_SIZES[GGMLQuantizationType(self.kind)]
        count = 1
        for n in self.shape:
            count *= n
        return count // elements * size


@dataclass(frozen=True)
class Header:
    """What stands before the entries, and where the data section begins: on a multiple of alignment."""

    version: int = 3
    n_kv: int | None = None  # the length of the list unless set
    n_tensors: int | None = None
    alignment: int = 32


def gguf(kvs: Sequence[bytes] = (), tensors: Sequence[Tensor] = (), data: bytes = b"", **header: int) -> bytes:
    """A whole file; header takes the fields of ``Header``."""
    h = Header(**header)
    n_tensors = len(tensors) if h.n_tensors is None else h.n_tensors
    n_kv = len(kvs) if h.n_kv is None else h.n_kv
    head = b"GGUF" + u32(h.version) + u64(n_tensors) + u64(n_kv)
    head += b"".join(kvs) + b"".join(t.record() for t in tensors)
    return head + b"\0" * (-len(head) % h.alignment) + data


def place(tensors: Sequence[Tensor], alignment: int = 32) -> tuple[list[Tensor], int]:
    """The same tensors one after the other, each on a multiple of alignment, and the bytes they take."""
    placed, end = [], 0
    for t in tensors:
        begin = -(-end // alignment) * alignment
        placed.append(Tensor(t.name, t.shape, t.kind, begin, t.n_dims))
        end = begin + t.nbytes()
    return placed, end


def small_file(version: int = 3) -> bytes:
    """A valid file of about 900 bytes with every kind of value and three tensors."""
    kvs = [
        kv("general.architecture", STRING, "none"),
        kv("a.u8", U8, 200),
        kv("a.i8", I8, -100),
        kv("a.u16", U16, 60000),
        kv("a.i16", I16, -30000),
        kv("a.u32", U32, 4_000_000_000),
        kv("a.i32", I32, -2_000_000_000),
        kv("a.f32", F32, 0.5),
        kv("a.yes", BOOL, True),
        kv("a.u64", U64, 2**63 + 1),
        kv("a.i64", I64, -(2**62)),
        kv("a.f64", F64, 0.1),
        kv("a.empty", STRING, ""),
        kv_array("a.words", STRING, ["one", "", "drei ö"]),
        kv_array("a.ints", I32, [1, -2, 3]),
        kv_array("a.flags", BOOL, [True, False]),
        kv_array("a.none", F32, []),
    ]
    tensors, end = place(
        [Tensor("x.weight", (8, 2)), Tensor("y", (3,), TYPE_F16), Tensor("z", (64, 1, 2, 1), TYPE_Q8_0)]
    )
    return gguf(kvs, tensors, bytes(i % 120 for i in range(end)), version=version)


def _block_tensors(il: int, dense: bool, n_embd: int) -> list[Tensor]:
    """Shapes of one block of ``tiny_model``: 2 heads of 4 + 2, latent 8, 2 experts of width 4."""
    parts: list[tuple[str, tuple[int, ...]]] = [
        ("attn_norm", (n_embd,)),
        ("attn_q", (n_embd, 12)),
        ("attn_kv_a_mqa", (n_embd, 10)),
        ("attn_kv_a_norm", (8,)),
        ("attn_output", (8, n_embd)),
        ("ffn_norm", (n_embd,)),
    ]
    parts += [("attn_kv_b", (8, 16))] if dense else [("attn_k_b", (4, 8, 2)), ("attn_v_b", (8, 4, 2))]
    if dense:
        parts += [("ffn_gate", (n_embd, 4)), ("ffn_up", (n_embd, 4)), ("ffn_down", (4, n_embd))]
    else:
        parts += [("ffn_gate_inp", (n_embd, 2)), ("ffn_gate_exps", (n_embd, 4, 2)), ("ffn_up_exps", (n_embd, 4, 2))]
        parts += [("ffn_down_exps", (4, n_embd, 2))]
        parts += [("ffn_gate_shexp", (n_embd, 4)), ("ffn_up_shexp", (n_embd, 4)), ("ffn_down_shexp", (4, n_embd))]
    return [Tensor(f"blk.{il}.{name}.weight", shape) for name, shape in parts]


def _numbers(nbytes: int) -> bytes:
    """Bytes that are moderate numbers read as f32 (0.03 to 0.13) or as f16 (1.2 to 1.5), of either sign, so that values
    and the scales of blocks are too."""
    raw = random.Random(1).randbytes(nbytes)
    return bytes(byte if i % 2 == 0 else 0x3D | (byte & 0x80) for i, byte in enumerate(raw))


@dataclass(frozen=True)
class Model:
    """A file in parts: values by key without the architecture, and tensors whose places are not yet chosen."""

    values: dict[str, tuple[int, object]]  # (type, value)
    tensors: list[Tensor]
    arch: str = "deepseek2"

    def content(self, data: bytes | None = None) -> bytes:
        """The file; data stands for the weights where it is given."""
        kvs = [kv("general.architecture", STRING, self.arch)]
        kvs += [kv(f"{self.arch}.{key}", kind, item) for key, (kind, item) in self.values.items()]
        tensors, end = place(self.tensors)
        return gguf(kvs, tensors, _numbers(end) if data is None else (data * end)[:end])


TINY_VALUES: dict[str, tuple[int, object]] = {
    "block_count": (U32, 2),
    "context_length": (U32, 64),
    "embedding_length": (U32, 32),
    "vocab_size": (U32, 8),
    "feed_forward_length": (U32, 4),
    "leading_dense_block_count": (U32, 1),
    "attention.head_count": (U32, 2),
    "attention.head_count_kv": (U32, 1),
    "attention.kv_lora_rank": (U32, 8),
    "attention.key_length": (U32, 10),
    "attention.value_length": (U32, 8),
    "attention.key_length_mla": (U32, 6),
    "attention.value_length_mla": (U32, 4),
    "attention.layer_norm_rms_epsilon": (F32, 1e-6),
    "rope.dimension_count": (U32, 2),
    "rope.freq_base": (F32, 10000.0),
    "rope.scaling.type": (STRING, "yarn"),
    "rope.scaling.factor": (F32, 2.0),
    "rope.scaling.original_context_length": (U32, 32),
    "rope.scaling.yarn_log_multiplier": (F32, 0.0707),
    "expert_count": (U32, 2),
    "expert_used_count": (U32, 1),
    "expert_shared_count": (U32, 1),
    "expert_feed_forward_length": (U32, 4),
    "expert_group_count": (U32, 1),
    "expert_group_used_count": (U32, 1),
    "expert_gating_func": (U32, 1),
    "expert_weights_scale": (F32, 1.0),
    "expert_weights_norm": (BOOL, False),
}


def tiny_model(kind: int = TYPE_F32, n_embd: int = 32) -> Model:
    """A valid model of 15 KB and more: a dense block with the legacy attn_kv_b, then experts with split ones.

    Matrices with rows of n_embd values are of the type kind; values are arbitrary and moderate.
    """
    ends = [
        Tensor("token_embd.weight", (n_embd, 8), TYPE_Q8_0),
        Tensor("output_norm.weight", (n_embd,)),
        Tensor("output.weight", (n_embd, 8), TYPE_F16),
    ]
    tensors = [*ends, *_block_tensors(0, True, n_embd), *_block_tensors(1, False, n_embd)]
    wide = [t.kind == TYPE_F32 and len(t.shape) > 1 and t.shape[0] == n_embd for t in tensors]
    tensors = [replace(t, kind=kind) if is_wide else t for t, is_wide in zip(tensors, wide, strict=True)]
    return Model(TINY_VALUES | {"embedding_length": (U32, n_embd)}, tensors)


def tiny_mistral4() -> Model:
    """The same as Mistral Small 4's architecture: experts' gate and up in one tensor, queries scaled by position."""
    tiny = tiny_model()
    tensors = [
        replace(t, name=t.name.replace("gate", "gate_up"), shape=(t.shape[0], 2 * t.shape[1], t.shape[2]))
        if "ffn_gate_exps" in t.name
        else t
        for t in tiny.tensors
        if "ffn_up_exps" not in t.name
    ]
    temperature = {"attention.temperature_scale": (F32, 0.1), "attention.temperature_length": (U32, 4)}
    return Model(tiny.values | temperature, tensors, "mistral4")
