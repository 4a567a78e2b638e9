"""GGUF files that must be refused, each with the error it must give. Read by the tests and by the fuzzer's corpus."""

from dataclasses import dataclass
from typing import Literal

from support import gguf_bytes as gb
from support.gguf_bytes import Tensor, gguf, kv, string, u32, u64

UNRUN = 19  # iq1_s: a type whose size is known, of 50 bytes a block of 256, and that no kernel runs

U64_MAX = 2**64 - 1


@dataclass(frozen=True)
class Hostile:
    """A file and what a reader must say of it: the error's class, and words that its message must hold."""

    name: str
    content: bytes
    words: tuple[str, ...]
    error: Literal["format", "unsupported"] = "format"


def _file_kinds() -> list[Hostile]:
    tail = b"\0" * 64
    return [
        Hostile("empty", b"", ("is empty",)),
        Hostile("three-bytes", b"GGU", ("header", "magic", "ends at 3")),
        Hostile("magic-only", b"GGUF", ("version", "ends at 4")),
        Hostile("no-counts", b"GGUF" + u32(3), ("number of tensors", "ends at 8")),
        Hostile("random-magic", b"\x89PNG" + tail, ("not a GGUF", "89 50 4e 47")),
        Hostile("git-lfs-pointer", b"version https://git-lfs.github.com/spec/v1\n" + tail, ("not a GGUF",)),
        Hostile("web-page", b"<!DOCTYPE html><html>404</html>" + tail, ("not a GGUF",)),
        Hostile("ggjt", b"tjgg" + tail, ("not a GGUF",)),
        Hostile("safetensors", u64(100) + b'{"__metadata__":{}}' + tail, ("not a GGUF",)),
        Hostile("version-0", gguf(version=0) + tail, ("version 0",), "unsupported"),
        Hostile("version-1", gguf(version=1) + tail, ("version 1",), "unsupported"),
        Hostile("version-4", gguf(version=4) + tail, ("version 4",), "unsupported"),
        Hostile("big-endian", gguf(version=3 << 24) + tail, ("big-endian",), "unsupported"),
    ]


def _counts() -> list[Hostile]:
    one = [kv("a", gb.U32, 1)]
    return [
        Hostile("tensor-count-huge", gguf(n_tensors=U64_MAX), ("number of tensors", str(U64_MAX))),
        Hostile("key-count-huge", gguf(n_kv=U64_MAX), ("number of keys", str(U64_MAX))),
        Hostile("tensor-count-wraps", gguf(n_tensors=2**61), ("number of tensors", str(2**61))),
        Hostile("tensor-count-one-more", gguf(one, n_tensors=1, alignment=1), ("number of tensors is 1",)),
        Hostile("key-count-one-more", gguf(one, n_kv=2, alignment=1), ("number of keys is 2",)),
        Hostile("million-keys-of-zeros", gguf(n_kv=1 << 20) + b"\0" * (15 << 20), ("key 1 of", "0 bytes")),
    ]


def _keys() -> list[Hostile]:
    def bad_key(name: bytes) -> bytes:
        return gguf([kv(name, gb.U32, 1)])

    def bad_value(raw: bytes) -> bytes:
        return gguf([string("the.key") + raw], alignment=1) + b"\0" * 64

    return [
        Hostile("key-empty", bad_key(b""), ("key 1 of 1", "0 bytes")),
        Hostile("key-too-long", bad_key(b"k" * 65536), ("key 1 of 1", "65536 bytes")),
        Hostile(
            "key-length-wraps", gguf(n_kv=1, alignment=1) + u64(U64_MAX) + b"\0" * 64, ("key 1 of 1", str(U64_MAX))
        ),
        Hostile("key-past-end", gguf(n_kv=1, alignment=1) + u64(1000) + b"\0" * 64, ("key 1 of 1", "1000 bytes")),
        Hostile("key-nul", bad_key(b"a\0b"), ("0x00 at 1",)),
        Hostile("key-escape", bad_key(b"\x1b[2J"), ("0x1b at 0",)),
        Hostile("key-newline", bad_key(b"a\n"), ("0x0a at 1",)),
        Hostile("key-twice", gguf([kv("a", gb.U32, 1), kv("b", gb.U32, 1), kv("a", gb.U32, 2)]), ("key `a`", "twice")),
        Hostile("value-type-13", bad_value(u32(13)), ("`the.key`", "13")),
        Hostile("value-type-huge", bad_value(u32(2**32 - 1)), ("`the.key`", str(2**32 - 1))),
        Hostile("item-type-13", bad_value(u32(gb.ARRAY) + u32(13) + u64(1)), ("`the.key`", "item type", "13")),
        Hostile("string-wraps", bad_value(u32(gb.STRING) + u64(U64_MAX)), ("`the.key`", str(U64_MAX))),
        Hostile("string-past-end", bad_value(u32(gb.STRING) + u64(65)), ("`the.key`", "65 bytes")),
        Hostile("array-wraps", bad_value(u32(gb.ARRAY) + u32(gb.F64) + u64(2**61)), ("`the.key`", str(2**61), "f64")),
        Hostile(
            "array-longer-than-the-file",  # whose number of items alone would fit
            bad_value(u32(gb.ARRAY) + u32(gb.F64) + u64(60) + bytes(100)),
            ("`the.key`", "60 values of type f64 do not fit"),
        ),
        Hostile("array-huge", bad_value(u32(gb.ARRAY) + u32(gb.U8) + u64(U64_MAX)), ("`the.key`", str(U64_MAX), "u8")),
        Hostile("strings-huge", bad_value(u32(gb.ARRAY) + u32(gb.STRING) + u64(2**61)), ("`the.key`", str(2**61))),
        Hostile(
            "string-item-past-end",
            bad_value(u32(gb.ARRAY) + u32(gb.STRING) + u64(2) + string("a") + u64(500)),
            ("`the.key`", "500 bytes"),
        ),
        Hostile(
            "array-of-arrays",
            bad_value(u32(gb.ARRAY) + u32(gb.ARRAY) + u64(1) + u32(gb.U8) + u64(1) + b"\0"),
            ("`the.key`", "array of arrays"),
            "unsupported",
        ),
        Hostile("scalar-cut", gguf([string("the.key") + u32(gb.U64)], alignment=1), ("`the.key`", "u64")),
    ]


def _layout() -> list[Hostile]:
    def aligned(kind: int, item: object) -> bytes:
        return gguf([kv("general.alignment", kind, item)])

    cases = [
        Hostile(f"alignment-{n}", aligned(gb.U32, n), ("general.alignment", str(n), "power of two"))
        for n in (0, 1, 4, 24, 33, 2**17, 2**31)
    ]
    return [
        *cases,
        Hostile("alignment-string", aligned(gb.STRING, "32"), ("general.alignment", "string", "integer")),
        Hostile("alignment-negative", aligned(gb.I32, -32), ("general.alignment", "-32")),
        Hostile("alignment-wraps", aligned(gb.U64, U64_MAX), ("general.alignment", str(U64_MAX))),
        Hostile("split", gguf([kv("split.count", gb.U16, 3)]), ("3 parts", "split"), "unsupported"),
        Hostile(
            "split-past-its-end", gguf([kv("split.count", gb.U16, 2), kv("split.no", gb.U16, 2)]), ("split.no", "2")
        ),
        Hostile("key-with-delete", gguf([kv("the\x7fkey", gb.U8, 1)]), ("control byte 0x7f",)),
        Hostile("split-float", gguf([kv("split.count", gb.F32, 2.0)]), ("split.count", "f32")),
    ]


def _tensors() -> list[Hostile]:
    data = b"\0" * 256

    def one(name: str | bytes = "t", shape: tuple[int, ...] = (8,), **fields: int) -> bytes:
        return gguf([], [Tensor(name, shape, **fields)], data)

    def two(first: Tensor, second: Tensor) -> bytes:
        return gguf([], [first, second], data)

    return [
        Hostile("name-empty", one(""), ("tensor 1 of 1", "0 bytes")),
        Hostile("name-too-long", one("n" * 65), ("tensor 1 of 1", "65 bytes")),
        Hostile("name-nul", one(b"a\0b"), ("0x00 at 1",)),
        Hostile("name-escape", one(b"\x1b[31m"), ("0x1b at 0",)),
        Hostile("name-twice", two(Tensor("t", (8,)), Tensor("t", (8,), offset=32)), ("tensor `t`", "twice")),
        Hostile("no-dims", one(n_dims=0), ("`t`", "0 dimensions")),
        Hostile("five-dims", one(shape=(1, 1, 1, 1, 1)), ("`t`", "5 dimensions")),
        Hostile("dims-huge", one(n_dims=2**32 - 1), ("`t`", str(2**32 - 1))),
        Hostile("dim-zero", one(shape=(8, 0)), ("`t`", "dimension 1 is 0")),
        Hostile("dim-negative", one(shape=(U64_MAX,)), ("`t`", str(U64_MAX))),
        Hostile("dim-2-63", one(shape=(2**63,)), ("`t`", str(2**63))),
        Hostile("product-wraps-to-zero", one(shape=(2**32, 2**32)), ("`t`", "dimension 1", str(2**32))),
        Hostile("product-wraps-to-small", one(shape=(2**62 + 2, 4)), ("`t`", "dimension 1 is 4")),
        Hostile("bytes-wrap", one(shape=(2**62,)), ("`t`", str(2**62), "memory")),
        Hostile("row-not-whole-blocks", one(shape=(33, 2), kind=gb.TYPE_Q8_0), ("`t`", "33", "q8_0", "32")),
        Hostile("row-not-whole-superblocks", one(shape=(128, 2), kind=12), ("`t`", "128", "q4_k", "256")),
        Hostile("row-of-unrun-type", one(shape=(128, 2), kind=UNRUN), ("`t`", "128", "iq1_s", "256")),
        Hostile("offset-unaligned", one(offset=16), ("`t`", "16", "alignment 32")),
        Hostile("offset-past-end", one(offset=1 << 20), ("`t`", str(1 << 20))),
        Hostile("offset-wraps", one(offset=2**64 - 32), ("`t`", str(2**64 - 32))),
        Hostile("end-past-end", one(shape=(65,)), ("`t`", "260 bytes", "256")),
        Hostile("end-past-end-by-offset", one(shape=(32,), offset=160), ("`t`", "128 bytes", "160")),
        Hostile("unknown-type-past-end", one(kind=999, offset=512), ("`t`", "512")),
        Hostile("no-data", gguf([], [Tensor("t", (8,))]), ("`t`", "32 bytes")),
        Hostile("overlap-same", two(Tensor("a", (8,)), Tensor("b", (8,))), ("`a`", "`b`", "overlap")),
        Hostile("overlap-partly", two(Tensor("a", (9,)), Tensor("b", (8,), offset=32)), ("`a`", "`b`", "36 bytes")),
        Hostile("overlap-backwards", two(Tensor("a", (8,), offset=32), Tensor("b", (9,))), ("`a`", "`b`", "overlap")),
        Hostile("overlap-inside", two(Tensor("a", (64,)), Tensor("b", (1,), offset=128)), ("`a`", "`b`", "overlap")),
        Hostile(
            "overlap-unrun", two(Tensor("a", (256,), UNRUN), Tensor("b", (1,), offset=32)), ("50 bytes", "overlap")
        ),
        Hostile("overlap-unknown", two(Tensor("a", (64,)), Tensor("b", (1,), 999, 32)), ("`a`", "`b`", "overlap")),
        Hostile("unknown-twice-at-0", two(Tensor("a", (1,), 999), Tensor("b", (1,), 999)), ("`a`", "`b`", "overlap")),
    ]


HOSTILE: list[Hostile] = [*_file_kinds(), *_counts(), *_keys(), *_layout(), *_tensors()]
