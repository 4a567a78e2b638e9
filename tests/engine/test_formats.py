"""The decoders against ggml's, bit for bit, and the facts of the formats against gguf-py's."""

import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Type
from support.blocks import (
    CODED_FORMATS,
    FLOAT_FORMATS,
    HALVES,
    block_size,
    ggml_decode,
    ggml_encode,
    random_blocks,
    with_halves,
)

import cext
from cext import _engine

DECODERS = [None, *cext.isas()]  # None is the scalar codec behind everything


def decode(isa: str | None, name: str, blocks: np.ndarray) -> np.ndarray:
    elements, nbytes = block_size(name)
    out = np.full(blocks.size // nbytes * elements, np.nan, np.float32)
    _engine._dequantize(isa, name, np.ascontiguousarray(blocks), out)
    return out


def assert_same_bits(got: np.ndarray, want: np.ndarray, what: str = "") -> None:
    """Equal as bit patterns, but for a NaN's payload and a zero's sign (a minimum of zero may be negative)."""
    same = (got == want) | (np.isnan(got) & np.isnan(want))
    worst = int(np.argmin(same))
    assert same.all(), f"{what}value {worst}: {got[worst]!r}, ggml has {want[worst]!r}"


def test_facts_equal_gguf_py() -> None:
    assert {f["name"] for f in cext.formats()} == {*FLOAT_FORMATS, *CODED_FORMATS}
    for info in cext.formats():
        size = GGML_QUANT_SIZES[Type(info["gguf_type"])]
        assert Type(info["gguf_type"]).name.lower() == info["name"]
        assert (info["block_elements"], info["block_bytes"]) == size


@pytest.mark.parametrize("name", CODED_FORMATS)
def test_encoded_rows(name: str) -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(0.0, 0.05, (3, 1024)).astype(np.float32) * rng.choice([0.01, 1.0, 30.0], (3, 1))
    blocks = ggml_encode(name, x.astype(np.float32))
    want = ggml_decode(name, blocks)
    for isa in DECODERS:
        assert_same_bits(decode(isa, name, blocks), want, f"{isa}: ")


@pytest.mark.parametrize("isa", DECODERS)
@pytest.mark.parametrize("name", CODED_FORMATS)
def test_every_bit_pattern(name: str, isa: str | None) -> None:
    blocks = np.random.default_rng(2).integers(0, 256, (256, block_size(name)[1]), dtype=np.uint8)
    assert_same_bits(decode(isa, name, blocks), ggml_decode(name, blocks))


@pytest.mark.parametrize("isa", DECODERS)
@pytest.mark.parametrize("name", CODED_FORMATS)
@pytest.mark.parametrize(
    "halves",
    [(1.0, 1.0), (0.0, 0.0), (-1.0, -1.0), (65504.0, 65504.0), (2.0**-24, 2.0**-24), (-(2.0**-15), 3 * 2.0**-24)],
    ids=["one", "zero", "negative", "largest", "subnormal", "subnormal mixed"],
)
def test_edges(name: str, isa: str | None, halves: tuple[float, float]) -> None:
    for fill in (0x00, 0xFF, 0x0F, 0xF0, 0x80, 0x7F, None):  # None: at random
        blocks = random_blocks(name, 2, 512, np.random.default_rng(3))
        if fill is not None:
            blocks[:] = fill
        blocks = with_halves(name, blocks, *halves[: len(HALVES[name])])
        got = decode(isa, name, blocks)
        assert np.isfinite(got).all(), f"filled with {fill}"
        assert_same_bits(got, ggml_decode(name, blocks), f"filled with {fill}: ")


@pytest.mark.parametrize("isa", DECODERS)
@pytest.mark.parametrize("name", CODED_FORMATS)
def test_misaligned_blocks(name: str, isa: str | None) -> None:
    blocks = random_blocks(name, 1, 512, np.random.default_rng(4)).reshape(-1)
    want = decode(isa, name, blocks)
    shifted = np.empty(blocks.size + 1, np.uint8)
    shifted[1:] = blocks
    got = np.empty_like(want)
    _engine._dequantize(isa, name, shifted[1:], got)
    assert got.tobytes() == want.tobytes()


def all_halves() -> np.ndarray:
    return np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)


@pytest.mark.parametrize("isa", DECODERS)
@pytest.mark.parametrize("n", [1 << 16, 3, 1])
def test_every_f16(isa: str | None, n: int) -> None:
    halves = all_halves()[-n:]
    assert_same_bits(decode(isa, "f16", halves.view(np.uint8)), halves.view(np.float16).astype(np.float32))


@pytest.mark.parametrize("isa", DECODERS)
@pytest.mark.parametrize("n", [1 << 16, 3, 1])
def test_every_bf16(isa: str | None, n: int) -> None:
    halves = all_halves()[-n:]
    assert_same_bits(decode(isa, "bf16", halves.view(np.uint8)), (halves.astype(np.uint32) << 16).view(np.float32))


@pytest.mark.parametrize("isa", DECODERS)
def test_f32_is_copied(isa: str | None) -> None:
    x = np.random.default_rng(5).integers(0, 1 << 32, 77, dtype=np.uint32).view(np.float32)
    assert decode(isa, "f32", x.view(np.uint8)).tobytes() == x.tobytes()


def floats_near_halves() -> np.ndarray:
    """Every half, the midpoints between neighbours, and the floats just beside those; overflow, tiny values, zero."""
    finite = all_halves().view(np.float16)
    finite = np.sort(finite[np.isfinite(finite)]).astype(np.float32)
    middle = (finite[1:] + finite[:-1]) / 2
    near = np.concatenate(
        [finite, middle, np.nextafter(middle, np.float32(np.inf)), np.nextafter(middle, np.float32(-np.inf))]
    )
    special = [65519.996, 65520.0, 1e9, -1e9, np.inf, -np.inf, 1e-30, -1e-30, 1e-42, 0.0, -0.0]
    return np.concatenate([near, np.array(special, np.float32)]).astype(np.float32)


def test_f32_to_f16_rounds_to_nearest_even() -> None:
    x = floats_near_halves()
    with np.errstate(over="ignore"):
        want = x.astype(np.float16).view(np.uint16)
    got = np.empty_like(want)
    _engine._half("f32_to_f16", x, got)
    worst = int(np.argmax(got != want))
    assert (got == want).all(), f"{x[worst]!r}: {got[worst]:#06x}, numpy has {want[worst]:#06x}"


def test_scalar_halves_and_nan() -> None:
    halves = all_halves()
    got = np.empty(halves.size, np.float32)
    _engine._half("f16_to_f32", halves, got)
    assert_same_bits(got, halves.view(np.float16).astype(np.float32))
    _engine._half("bf16_to_f32", halves, got)
    assert_same_bits(got, (halves.astype(np.uint32) << 16).view(np.float32))
    nan = np.empty(1, np.uint16)
    _engine._half("f32_to_f16", np.array([np.nan], np.float32), nan)
    assert np.isnan(nan.view(np.float16))[0]


@pytest.mark.parametrize("call", [("avx9", "q8_0"), (None, "q9_9")])
def test_unknown_names_are_refused(call: tuple[str | None, str]) -> None:
    with pytest.raises(ValueError, match=r"avx9|q9_9"):
        _engine._dequantize(*call, np.zeros(34, np.uint8), np.empty(32, np.float32))


def test_short_buffers_are_refused() -> None:
    with pytest.raises(ValueError, match="blocks: 33 bytes"):
        _engine._dequantize(None, "q8_0", np.zeros(33, np.uint8), np.empty(32, np.float32))
    with pytest.raises(ValueError, match="whole blocks"):
        _engine._dequantize(None, "q8_0", np.zeros(34, np.uint8), np.empty(31, np.float32))
