"""Blocks of the tensor formats for tests: ggml's encoders and decoders, random bit patterns, edges."""

import ctypes
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Type
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

FLOAT_FORMATS = ("f32", "f16", "bf16")
CODED_FORMATS = (
    "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs",
    "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s",
)  # fmt: skip
GRID_FORMATS = ("iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s")  # signed entries of a grid: no offset or minimum
# What a block's scale must be for whole weights, where 1 does not do it.
WHOLE = {"iq2_xxs": 8.0, "iq2_xs": 8.0, "iq2_s": 8.0, "iq3_xxs": 4.0}
# Where the halves (scale, then minimum) stand in a block, and which bytes hold the quants.
HALVES = {
    "q4_0": (0,), "q4_1": (0, 2), "q5_0": (0,), "q5_1": (0, 2), "q8_0": (0,), "q2_k": (80, 82), "q3_k": (108,),
    "q4_k": (0, 2), "q5_k": (0, 2), "q6_k": (208,), "iq4_nl": (0,), "iq4_xs": (0,),
    "iq2_xxs": (0,), "iq2_xs": (0,), "iq2_s": (0,), "iq3_xxs": (0,), "iq3_s": (0,),
}  # fmt: skip
QUANTS = {
    "q4_0": (2, 18), "q4_1": (4, 20), "q5_0": (2, 22), "q5_1": (4, 24), "q8_0": (2, 34), "q2_k": (16, 80),
    "q3_k": (0, 96), "q4_k": (16, 144), "q5_k": (16, 176), "q6_k": (0, 192), "iq4_nl": (2, 18), "iq4_xs": (8, 136),
}  # fmt: skip


def type_of(name: str) -> Type:
    return Type[name.upper()]


def block_size(name: str) -> tuple[int, int]:
    """(values, bytes) of a block."""
    return GGML_QUANT_SIZES[type_of(name)]


@cache
def _libggml() -> ctypes.CDLL:
    spec = find_spec("llama_cpp")
    assert spec is not None and spec.submodule_search_locations is not None
    folder = Path(spec.submodule_search_locations[0]) / "lib"
    library = next(p for p in sorted(folder.iterdir()) if p.name.startswith("libggml-base."))
    return ctypes.CDLL(str(library))


def ggml_encode(name: str, x: Floats) -> Bytes:
    """Rows (n, k) encoded by ggml, as (n, row bytes); every column weighs the same."""
    x = np.ascontiguousarray(x, np.float32)
    n_rows, k = x.shape
    elements, nbytes = block_size(name)
    out = np.empty((n_rows, k // elements * nbytes), np.uint8)
    encode = _libggml().ggml_quantize_chunk
    encode.restype = ctypes.c_size_t
    encode.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p] + [ctypes.c_int64] * 3 + [ctypes.c_void_p]
    importance = np.ones(k, np.float32)
    ones = importance.ctypes.data if name.startswith(("iq2", "iq3")) else None  # some of these refuse to do without
    written = encode(int(type_of(name)), x.ctypes.data, out.ctypes.data, 0, n_rows, k, ones)
    assert written == out.nbytes
    return out


def ggml_decode(name: str, blocks: Bytes) -> Floats:
    """Blocks decoded by ggml's own C, flat."""
    blocks = np.ascontiguousarray(blocks)
    elements, nbytes = block_size(name)
    out = np.empty(blocks.size // nbytes * elements, np.float32)
    decode = getattr(_libggml(), "dequantize_row_" + name.removesuffix("_k") + "_K" * name.endswith("_k"))
    decode.restype = None
    decode.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    decode(blocks.ctypes.data, out.ctypes.data, out.size)
    return out


def with_halves(name: str, blocks: Bytes, *values: float) -> Bytes:
    """A copy of blocks (..., n * block bytes) with every scale (and minimum) set."""
    out = blocks.copy().reshape(-1, block_size(name)[1])
    for offset, value in zip(HALVES[name], values, strict=False):
        out[:, offset : offset + 2] = np.array([value], np.float16).view(np.uint8)
    return out.reshape(blocks.shape)


def without_quants(name: str, blocks: Bytes) -> Bytes:
    """A copy of blocks with all quant bits zero: what is left is each value's offset or minimum."""
    out = blocks.copy().reshape(-1, block_size(name)[1])
    out[:, slice(*QUANTS[name])] = 0
    return out.reshape(blocks.shape)


def random_blocks(name: str, n_rows: int, k: int, rng: np.random.Generator) -> Bytes:
    """Random bit patterns, every code and sub-scale possible, with halves of ordinary size and both signs."""
    elements, nbytes = block_size(name)
    n_blocks = n_rows * k // elements
    blocks = rng.integers(0, 256, (n_blocks, nbytes), dtype=np.uint8)
    for offset in HALVES[name]:
        halves = rng.normal(0.0, 0.02, n_blocks).astype(np.float16)
        blocks[:, offset : offset + 2] = halves.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(n_rows, -1)
