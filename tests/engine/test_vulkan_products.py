"""Products with every tensor format on a GPU, against gguf's decoders, float64 arithmetic and the processor's packs: on
whatever Vulkan finds here, a software device too."""

import struct

import numpy as np
import pytest
from gguf.quants import dequantize
from support.blocks import CODED_FORMATS, FLOAT_FORMATS, HALVES, WHOLE, block_size, random_blocks, type_of, with_halves
from support.gpu import Gpu, device, number
from support.gpu_products import ADD, EXACT, LANES, PRODUCT, Groups, Job, mul, pack, replace, rows, run
from support.kernels import (
    SENTINEL,
    Bytes,
    Doubles,
    Floats,
    U,
    assert_within,
    decode,
    expected_mul,
    quantize_activations,
    weight_magnitudes,
)

FORMATS = (*FLOAT_FORMATS, *CODED_FORMATS)
SOME = ("f32", "q4_k", "iq3_s")  # floats, codes, a grid: where the format is not what is tested
TINY = float(np.finfo(np.float32).tiny)


@pytest.fixture(scope="module")
def gpu() -> Gpu:
    return Gpu(number())


@pytest.fixture(scope="module")
def packs() -> None:
    if not device()["int_dot"]:
        pytest.skip("the device has no packed integer dot")


def random_weights(name: str, n_rows: int, k: int, rng: np.random.Generator) -> Bytes:
    if name in CODED_FORMATS:
        return random_blocks(name, n_rows, k, rng)
    x = rng.normal(0.0, 0.02, (n_rows, k)).astype(np.float32)
    if name == "bf16":
        return (x.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    return (x.astype(np.float16) if name == "f16" else x).view(np.uint8)


def normal(rng: np.random.Generator, *shape: int) -> Floats:
    return rng.normal(0.0, 1.0, shape).astype(np.float32)


def widths(name: str) -> tuple[int, ...]:
    """One block, and several: more than a subgroup takes at a time; of floats any number."""
    return {256: (256, 2304), 32: (32, 2080), 1: (1, 7, 33, 250, 2100)}[block_size(name)[0]]


def bound(values: Doubles, weights: Doubles) -> Doubles:
    """How far a sum of float32 products may be from values (n, k) by weights (rows, k), in whatever order."""
    n_ops = values.shape[1] + 4
    return n_ops * (U * (np.abs(values) @ np.abs(weights).T) + TINY)


def assert_product(got: Floats, name: str, w: Bytes, x: Floats, what: str = "") -> None:
    weights, values = decode(name, w), x.astype(np.float64)
    assert_within(got, values @ weights.T, bound(values, weights), what)


def assert_same_bits(got: Floats, want: Floats) -> None:
    same = (got == want) | (np.isnan(got) & np.isnan(want))
    worst = np.unravel_index(int(np.argmin(same)), same.shape)
    assert same.all(), f"value {worst}: {got[worst]!r}, expected {want[worst]!r}"


@pytest.mark.parametrize("lanes", [1, 2, 4])
def test_a_subgroup_that_is_not_full_sums_all_units(gpu: Gpu, lanes: int) -> None:
    """As where a driver tells of more lanes than it takes for a shader: here the workgroup has no more."""
    rng = np.random.default_rng(5)
    w, x, k = normal(rng, 3, 1056), normal(rng, 1, 1056), 1056
    y = np.full((1, 4), SENTINEL, np.float32)
    flags = EXACT + LANES * (lanes.bit_length() - 1)
    push = struct.pack(PRODUCT, 0, 0, 0, k, 4, 4 * k, k, 3, 1, flags, 0, 0.0, 0)
    links = [(-1, 0, 0, 0), (-1, 8, 1, 0), (-1, 16, 2, 0)]
    gpu.run("mul_vec_f32", [w, x, y], push, links, (3, 1, 1), (lanes, 1, 1, 2048, 0, 0))
    assert_product(y[:, :3], "f32", w.view(np.uint8), x)
    assert y[0, 3] == SENTINEL


# ---- Decoding ----


@pytest.mark.parametrize("name", FORMATS)
def test_rows_are_gguf_s(gpu: Gpu, name: str) -> None:
    rng = np.random.default_rng(1)
    which = np.array([11, 0, 5, 5, 2], np.uint32)
    for k in widths(name):
        w = random_weights(name, 12, k, rng)
        if name in CODED_FORMATS:
            w[:6] = rng.integers(0, 256, (6, w.shape[1]), np.uint8)  # scales of all patterns, infinite and no number
        got = rows(gpu, name, w, k, which)
        assert_same_bits(got, decode(name, w)[which].astype(np.float32))
        with np.errstate(all="ignore"):
            oracle = dequantize(w, type_of(name)).reshape(12, k)[which]
        finite = np.isfinite(oracle) & np.isfinite(got)
        assert (np.isfinite(oracle) == np.isfinite(got)).all()
        assert_within(got[finite], oracle[finite].astype(np.float64), 2 * U * np.abs(oracle[finite]) + TINY)


@pytest.mark.parametrize("name", CODED_FORMATS)
@pytest.mark.parametrize("halves", [(65504.0, 65504.0), (2.0**-24, 3 * 2.0**-24), (-(2.0**-15), -1.0)])
def test_rows_of_extreme_scales(gpu: Gpu, name: str, halves: tuple[float, float]) -> None:
    w = with_halves(name, random_blocks(name, 2, 512, np.random.default_rng(2)), *halves[: len(HALVES[name])])
    assert_same_bits(rows(gpu, name, w, 512, np.arange(2, dtype=np.uint32)), decode(name, w).astype(np.float32))


@pytest.mark.parametrize("name", ["f16", "bf16"])
def test_every_half(gpu: Gpu, name: str) -> None:
    w = np.arange(1 << 16, dtype=np.uint16).view(np.uint8).reshape(16, -1)
    with np.errstate(invalid="ignore"):
        want = decode(name, w).astype(np.float32)
    assert_same_bits(rows(gpu, name, w, 1 << 12, np.arange(16, dtype=np.uint32)), want)


# ---- Products ----


@pytest.mark.parametrize("name", FORMATS)
def test_few_slots(gpu: Gpu, name: str) -> None:
    rng = np.random.default_rng(3)
    for k in widths(name):
        for n_rows, n in ((1, 1), (45, 1), (45, 3)):
            w, x = random_weights(name, n_rows, k, rng), normal(rng, n, k)
            assert_product(mul(gpu, name, w, x), name, w, x, f"{name} k={k} rows={n_rows} slots={n}")


@pytest.mark.parametrize("name", FORMATS)
def test_many_slots(gpu: Gpu, name: str) -> None:
    """Few rows of floats are not cut into tiles, more are."""
    rng = np.random.default_rng(4)
    shapes = ((1, 33), (130, 70), (260, 66)) if name == "f32" else ((1, 33), (130, 70))
    for k in widths(name):
        for n_rows, n in shapes:
            w, x = random_weights(name, n_rows, k, rng), normal(rng, n, k)
            assert_product(mul(gpu, name, w, x), name, w, x, f"{name} k={k} rows={n_rows} slots={n}")


def test_every_number_of_slots_and_of_rows(gpu: Gpu) -> None:
    name = "q4_k"
    rng = np.random.default_rng(5)
    for n, n_rows in ((2, 7), (4, 16), (5, 17), (8, 15), (9, 64), (64, 63), (65, 65)):
        w, x = random_weights(name, n_rows, 512, rng), normal(rng, n, 512)
        assert_product(mul(gpu, name, w, x), name, w, x, f"{name} rows={n_rows} slots={n}")


def test_more_rows_than_a_small_matrix_has(gpu: Gpu) -> None:
    name = "q4_k"
    rng = np.random.default_rng(6)
    w, x = random_weights(name, 4099, 256, rng), normal(rng, 1, 256)
    assert_product(mul(gpu, name, w, x), name, w, x)


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("n", [1, 3, 40])
def test_a_row_is_the_same_among_others(gpu: Gpu, name: str, n: int) -> None:
    """What lies beside a row changes no bit of its products: an answer does not depend on where a model's parts are."""
    rng = np.random.default_rng(7)
    w, x = random_weights(name, 70, 512, rng), normal(rng, n, 512)
    whole = mul(gpu, name, w, x)
    assert mul(gpu, name, w[33:], x).tobytes() == np.ascontiguousarray(whole[:, 33:]).tobytes()


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("n", [2, 40])
def test_rows_of_x_and_y_stand_anywhere(gpu: Gpu, name: str, n: int) -> None:
    """At odd distances, read in another order, the sums added to what is there."""
    rng = np.random.default_rng(8)
    w, x = random_weights(name, 9, 256, rng), normal(rng, 5, 259)
    which = rng.integers(0, 5, n).astype(np.uint32)
    before = normal(rng, n, 11)
    y = before.copy()
    run(gpu, "mul", Job(name, w[None], x, 256, n_slots=n, slot_row=which, flags=ADD | EXACT), y)
    values, weights = x[which, :256].astype(np.float64), decode(name, w)
    limit = bound(values, weights) + 2 * U * np.abs(before[:, :9])
    assert_within(y[:, :9], before[:, :9] + values @ weights.T, limit)
    assert (y[:, 9:] == before[:, 9:]).all()


@pytest.mark.parametrize("name", ["f32", "q8_0", "q4_k"])
@pytest.mark.parametrize("n", [1, 40])
def test_heads(gpu: Gpu, name: str, n: int) -> None:
    """Blocks side by side in x and in y."""
    rng = np.random.default_rng(9)
    w, x = random_weights(name, 3 * 20, 256, rng).reshape(3, 20, -1), normal(rng, n, 3 * 320)
    y = np.full((n, 3 * 24), SENTINEL)
    run(gpu, "mul", Job(name, w, x, 256, stride_x=320, stride_y=24), y)
    for z in range(3):
        assert_product(y[:, 24 * z : 24 * z + 20], name, w[z], x[:, 320 * z : 320 * z + 256], f"head {z}")
        assert (y[:, 24 * z + 20 : 24 * z + 24] == SENTINEL).all()


@pytest.mark.parametrize("name", CODED_FORMATS)
@pytest.mark.parametrize("half", [np.inf, -np.inf, np.nan])
def test_what_is_no_number_shows_as_on_the_processor(gpu: Gpu, name: str, half: float) -> None:
    rng = np.random.default_rng(10)
    w = random_blocks(name, 6, 512, rng)
    w[2:4] = with_halves(name, w[2:4], *[half] * len(HALVES[name]))
    for n in (1, 40):
        got = mul(gpu, name, w, normal(rng, n, 512))
        assert not np.isfinite(got[:, 2:4]).any() and np.isfinite(got[:, [0, 1, 4, 5]]).all()


# ---- Matrix units ----


@pytest.fixture(scope="module")
def matrix_units() -> None:
    if not device()["coop"]:
        pytest.skip("the device has no cooperative matrices of halves that are summed in floats")


def assert_in_halves(got: Floats, name: str, w: Bytes, x: Floats) -> None:
    """As a product of halves: 11 bits of each factor, 2^-25 of it at least, of activations taken by 1/16."""
    weights, values = decode(name, w), x.astype(np.float64)
    a, b = np.abs(values), np.abs(weights)
    lost = 2.0**-10 * 1.001 * (a @ b.T) + 2.0**-25 * (a.sum(1)[:, None] + 16 * b.sum(1))
    assert_within(got, values @ weights.T, lost + bound(values, weights))


def assert_gated_in_halves(got: Floats, name: str, gate: Bytes, up: Bytes, x: Floats) -> None:
    """As the products of each in halves, and what silu makes of how far those may be."""
    values, g, u = x.astype(np.float64), decode(name, gate), decode(name, up)
    a, b = values @ g.T, values @ u.T
    off_a, off_b = (2.0**-10 * (np.abs(values) @ np.abs(m).T) + 1e-4 for m in (g, u))
    silu = a / (1 + np.exp(-a))
    limit = 1.1 * off_a * (np.abs(b) + off_b) + np.abs(silu) * off_b  # silu's slope is at most 1.1
    assert_within(got, silu * b, limit * (0.1 if name == "f32" else 1.0))


@pytest.mark.usefixtures("matrix_units")
@pytest.mark.parametrize("name", FORMATS)
def test_many_slots_in_halves(gpu: Gpu, name: str) -> None:
    rng = np.random.default_rng(16)
    for k in widths(name):
        for n_rows, n in ((1, 9), (130, 70)):
            w, x = random_weights(name, n_rows, k, rng), normal(rng, n, k)
            if name in CODED_FORMATS:
                w = with_halves(name, w, *[2.0**-6] * len(HALVES[name]))
            assert_in_halves(mul(gpu, name, w, x, flags=0), name, w, x)


@pytest.mark.usefixtures("matrix_units")
@pytest.mark.parametrize("name", SOME)
def test_experts_in_halves(gpu: Gpu, name: str) -> None:
    rng = np.random.default_rng(17)
    n_slots = sum(MANY.count)
    w, x = random_weights(name, 5 * 21, 512, rng).reshape(5, 21, -1), normal(rng, 30, 512)
    which, y = rng.integers(0, 30, n_slots).astype(np.uint32), np.full((n_slots, 22), SENTINEL)
    run(gpu, "mul", Job(name, w, x, 512, groups=MANY, slot_row=which, flags=0), y)
    first = 0
    for block, count in zip(MANY.block, MANY.count, strict=True):
        part = slice(first, first + count)
        first += count
        if block is None:
            assert (y[part] == SENTINEL).all()
        elif count:
            assert_in_halves(y[part, :21], name, w[block], x[which[part]])
    assert (y[:, 21:] == SENTINEL).all()


@pytest.mark.usefixtures("matrix_units")
@pytest.mark.parametrize("name", ["q4_k", "f16"])
def test_large_tiles_in_halves(gpu: Gpu, name: str) -> None:
    """So many blocks that tiles are large; rows and slots are no whole number of either."""
    rng = np.random.default_rng(19)
    blocks, n_rows, n = 260, 130, 9
    w, x = random_weights(name, blocks * n_rows, 256, rng).reshape(blocks, n_rows, -1), normal(rng, n, 256 * blocks)
    if name in CODED_FORMATS:
        w = with_halves(name, w.reshape(blocks * n_rows, -1), *[2.0**-6] * len(HALVES[name])).reshape(w.shape)
    y, gated = (np.full((n, blocks * n_rows + 1), SENTINEL) for _ in range(2))
    job = Job(name, w, x, 256, stride_x=256, stride_y=n_rows, flags=0)
    run(gpu, "mul", job, y)
    run(gpu, "mul_gated", replace(job, up=w[::-1]), gated)
    for z in (0, 101, 259):
        rows_of, values = slice(z * n_rows, (z + 1) * n_rows), x[:, z * 256 : (z + 1) * 256]
        assert_in_halves(y[:, rows_of], name, w[z], values)
        assert_gated_in_halves(gated[:, rows_of], name, w[z], w[259 - z], values)
    assert (y[:, -1] == SENTINEL).all() and (gated[:, -1] == SENTINEL).all()


@pytest.mark.usefixtures("matrix_units")
@pytest.mark.parametrize("name", ["q8_0", "q4_k"])
def test_halves_come_in_pieces(gpu: Gpu, name: str) -> None:
    """Of a matrix that is larger than the room for its halves, rows by rows; of many, blocks by blocks."""
    rng = np.random.default_rng(22)
    for blocks, n_rows in ((1, 1100), (5, 450)):
        w, x = random_weights(name, blocks * n_rows, 512, rng), normal(rng, 20, 512 * blocks)
        w = with_halves(name, w, *[2.0**-6] * len(HALVES[name])).reshape(blocks, n_rows, -1)
        y = np.full((20, blocks * n_rows), SENTINEL)
        run(gpu, "mul", Job(name, w, x, 512, stride_x=512, stride_y=n_rows, flags=0), y)
        for z in range(blocks):
            values = x[:, z * 512 : (z + 1) * 512]
            assert_in_halves(y[:, z * n_rows : (z + 1) * n_rows], name, w[z], values)


@pytest.mark.parametrize(("n_rows", "k", "n"), [(64, 2048, 70), (65, 1024, 33), (256, 1030, 34), (3, 7, 41)])
def test_few_rows_of_floats(gpu: Gpu, n_rows: int, k: int, n: int) -> None:
    """A router's."""
    rng = np.random.default_rng(23)
    w, x = random_weights("f32", n_rows, k, rng), normal(rng, n, k)
    assert_product(mul(gpu, "f32", w, x), "f32", w, x)


@pytest.mark.usefixtures("matrix_units")
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("grouped", [False, True])
def test_gated_in_halves(gpu: Gpu, name: str, grouped: bool) -> None:
    """Both matrices in one tile."""
    rng = np.random.default_rng(20)
    k, count = widths(name)[-1], (70, 3, 0, 67)
    n, blocks = (sum(count), 4) if grouped else (70, 1)
    w, up = (random_weights(name, blocks * 45, k, rng) for _ in range(2))
    if name in CODED_FORMATS:
        w, up = (with_halves(name, m, *[2.0**-8] * len(HALVES[name])) for m in (w, up))
    w, up = w.reshape(blocks, 45, -1), up.reshape(blocks, 45, -1)
    x, y = normal(rng, n, k), np.full((n, 47), SENTINEL)
    groups = Groups(block=(2, 0, 1, 3), count=count) if grouped else None
    run(gpu, "mul_gated", Job(name, w, x, k, up=up, groups=groups, flags=0), y)
    for i, first in enumerate(np.cumsum([0, *count[:-1]]) if grouped else [0]):
        part = slice(first, first + (count[i] if grouped else n))
        if part.start == part.stop:
            continue
        block = groups.block[i] if groups and groups.block[i] is not None else 0
        assert_gated_in_halves(y[part, :45], name, w[block], up[block], x[part])
    assert (y[:, 45:] == SENTINEL).all()


@pytest.mark.parametrize("name", ["q4_k", "f16"])
@pytest.mark.parametrize("flags", [0, EXACT])
@pytest.mark.parametrize("packed", [False, True])
def test_blocks_with_more_than_is_usual(
    gpu: Gpu, name: str, flags: int, packed: bool, request: pytest.FixtureRequest
) -> None:
    """The grid is made for what is usual; a block with more takes its tiles one after another."""
    if packed:
        request.getfixturevalue("packs")
        if name not in CODED_FORMATS:
            pytest.skip("products with floats take no packs")
    rng = np.random.default_rng(21)
    groups = Groups(block=(1, 0, 2), count=(1, 290, 0))
    w, x = random_weights(name, 3 * 21, 256, rng).reshape(3, 21, -1), normal(rng, 291, 256)
    y, plain = np.full((291, 21), SENTINEL), np.full((291, 21), SENTINEL)
    run(gpu, "mul", Job(name, w, x, 256, groups=groups, flags=flags, usual=20, packed=packed), y)
    run(gpu, "mul", Job(name, w, x, 256, groups=groups, flags=flags, packed=packed), plain)
    assert_same_bits(y, plain)
    assert not (y == SENTINEL).any()


@pytest.mark.usefixtures("matrix_units")
def test_what_halves_cannot_hold_is_no_number(gpu: Gpu) -> None:
    """Never a wrong finite sum."""
    rng = np.random.default_rng(18)
    w, x = random_blocks("q8_0", 4, 64, rng), normal(rng, 9, 64)
    w[2] = with_halves("q8_0", w[2], 65504.0)
    x[5] *= np.float32(1e7)
    got = mul(gpu, "q8_0", w, x, flags=0)
    assert not np.isfinite(got[5]).any() and not np.isfinite(got[:, 2]).any()
    ordinary = np.ix_([0, 1, 2, 3, 4, 6, 7, 8], [0, 1, 3])
    assert np.isfinite(got[ordinary]).all()


# ---- Gated products ----


def silu_products(name: str, gate: Bytes, up_name: str, up: Bytes, x: Floats) -> tuple[Doubles, Doubles]:
    """silu(x gate^T) (x up^T) in float64, and how far float32 may be from it."""
    values, g, u = x.astype(np.float64), decode(name, gate), decode(up_name, up)
    a, b = values @ g.T, values @ u.T
    sigmoid = 1 / (1 + np.exp(-a))
    slope = np.abs(sigmoid * (1 + a * (1 - sigmoid)))
    exponent = (3 + 2 * np.abs(a)) * 2 * U * np.abs(a)  # the units that Vulkan allows exp
    limit = (slope * bound(values, g) + (exponent + 8 * U) * np.abs(a)) * np.abs(b)
    return a * sigmoid * b, 2 * (limit + np.abs(a * sigmoid) * bound(values, u)) + TINY


@pytest.mark.parametrize("formats", [("q4_k", "q4_k"), ("iq3_s", "iq3_s"), ("f32", "f32"), ("q4_k", "q6_k")])
@pytest.mark.parametrize("n", [1, 11, 40])
def test_gated(gpu: Gpu, formats: tuple[str, str], n: int) -> None:
    """In one shader, or in two where formats differ or slots are many."""
    rng = np.random.default_rng(11)
    gate, up = (random_weights(name, 37, 512, rng) for name in formats)
    x, y = normal(rng, n, 512), np.full((n, 40), SENTINEL)
    run(gpu, "mul_gated", Job(formats[0], gate[None], x, 512, up=up[None], up_format=formats[1]), y)
    assert_within(y[:, :37], *silu_products(formats[0], gate, formats[1], up, x))
    assert (y[:, 37:] == SENTINEL).all()


def test_large_gates_stay_numbers(gpu: Gpu) -> None:
    gate, up = np.array([[[-200.0], [200.0], [-1e30]]], np.float32), np.ones((1, 3, 1), np.float32)
    for n in (1, 40):
        y = np.zeros((n, 3), np.float32)
        run(
            gpu,
            "mul_gated",
            Job("f32", gate.view(np.uint8), np.ones((n, 1), np.float32), 1, up=up.view(np.uint8)),
            y,
        )
        assert_within(y, np.tile([0.0, 200.0, 0.0], (n, 1)), 1e-4)


# ---- Norms on the way ----


def normalised(x: Floats, w: Floats, eps: float) -> Floats:
    """In float64, rounded once."""
    values = x.astype(np.float64)
    return np.asarray(values / np.sqrt((values**2).mean(axis=-1, keepdims=True) + eps) * w, np.float32)


@pytest.mark.parametrize(
    ("name", "k"),
    [
        ("f32", 33),
        ("f32", 2100),
        ("f16", 8200),
        ("q4_k", 512),
        ("q4_k", 4352),
        ("q6_k", 2048),
        ("q5_0", 1408),
        ("iq3_s", 256),
    ],
)
def test_what_is_normalised_on_the_way(gpu: Gpu, name: str, k: int) -> None:
    """Of one row, in both kinds of product; longer rows than a workgroup keeps; as if it had been made before."""
    rng = np.random.default_rng(22)
    w, up = (random_weights(name, 37, k, rng) for _ in range(2))
    x, norm = normal(rng, 1, k) * np.float32(30), rng.uniform(0.2, 2, k).astype(np.float32)
    made = normalised(x, norm, 1e-3)
    y, gated = np.full((1, 40), SENTINEL), np.full((1, 40), SENTINEL)
    job = Job(name, w[None], x, k, norm=norm, eps=1e-3)
    run(gpu, "mul", job, y)
    run(gpu, "mul_gated", replace(job, up=up[None]), gated)
    values, weights = made.astype(np.float64), decode(name, w)
    assert_within(y[:, :37], values @ weights.T, 2 * bound(values, weights))
    want, limit = silu_products(name, w, name, up, made)
    assert_within(gated[:, :37], want, 3 * limit)
    assert (y[:, 37:] == SENTINEL).all() and (gated[:, 37:] == SENTINEL).all()


def test_experts_read_one_row_that_is_normalised(gpu: Gpu) -> None:
    rng = np.random.default_rng(23)
    groups = Groups(block=(3, None, 0, 4), count=(1, 1, 1, 1))
    w, up = (random_weights("q4_k", 5 * 21, 512, rng).reshape(5, 21, -1) for _ in range(2))
    x, norm, y = normal(rng, 3, 512), rng.uniform(0.2, 2, 512).astype(np.float32), np.full((4, 21), SENTINEL)
    job = Job("q4_k", w, x, 512, up=up, groups=groups, slot_row=np.full(4, 2, np.uint32), norm=norm, eps=1e-6)
    run(gpu, "mul_gated", job, y)
    for slot, block in enumerate(groups.block):
        if block is None:
            assert (y[slot] == SENTINEL).all()
            continue
        want, limit = silu_products("q4_k", w[block], "q4_k", up[block], normalised(x[2:], norm, 1e-6))
        assert_within(y[slot : slot + 1], want, 3 * limit)


# ---- Experts ----

EXPERTS = Groups(block=(3, None, 0, 4, 1), count=(2, 3, 1, 0, 5))
"""A group that another device computes, and one without tokens."""
MANY = Groups(block=(3, None, 0, 4, 1), count=(70, 3, 1, 0, 130))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("groups", [EXPERTS, MANY], ids=["few", "many"])
def test_experts(gpu: Gpu, name: str, groups: Groups, packed: bool, request: pytest.FixtureRequest) -> None:
    if packed:
        request.getfixturevalue("packs")
        if name not in CODED_FORMATS:
            pytest.skip("products with floats take no packs")
    rng = np.random.default_rng(12)
    k, n_slots = 512, sum(groups.count)
    w, up = (random_weights(name, 5 * 21, k, rng).reshape(5, 21, -1) for _ in range(2))
    x, which = normal(rng, 30, k), rng.integers(0, 30, n_slots).astype(np.uint32)
    y, gated = np.full((n_slots, 22), SENTINEL), np.full((n_slots, 22), SENTINEL)
    job = Job(name, w, x, k, groups=groups, slot_row=which, packed=packed)
    run(gpu, "mul", job, y)
    run(gpu, "mul_gated", replace(job, up=up), gated)
    first = 0
    for block, count in zip(groups.block, groups.count, strict=True):
        part = slice(first, first + count)
        first += count
        if block is None or not count:
            assert (y[part] == SENTINEL).all() and (gated[part] == SENTINEL).all()
            continue
        values = x[which[part]]
        if packed:
            want = expected_mul(name, w[block], values)
            assert_within(y[part, :21], want.y, want.bound)
            q, scale = quantize_activations(values)
            values = (q * np.repeat(scale, 32, axis=1)).astype(np.float32)
        else:
            assert_product(y[part, :21], name, w[block], values, f"expert {block}")
        want_gated, limit = silu_products(name, w[block], name, up[block], values)
        assert_within(gated[part, :21], want_gated, limit * (4 if packed else 1))
        assert (y[part, 21:] == SENTINEL).all() and (gated[part, 21:] == SENTINEL).all()


@pytest.mark.parametrize("name", FORMATS)
def test_experts_of_a_token_are_summed(gpu: Gpu, name: str) -> None:
    """Any number of them, with what is beside them or nothing, into what is there; blocks in any order."""
    rng = np.random.default_rng(24)
    for k in (*widths(name), *((1408,) if block_size(name)[0] < 256 else ())):
        for n, with_others in ((1, False), (6, True), (7, True), (13, False)):
            block = tuple(int(i) for i in rng.integers(0, 4, n))
            w = random_weights(name, 4 * 45, k, rng).reshape(4, 45, -1)
            x, weights = normal(rng, n, k), rng.uniform(0, 1, n).astype(np.float32)
            y = normal(rng, 1, 47)
            others, before = normal(rng, 45) if with_others else None, y.copy()
            groups = Groups(block=block, count=(1,) * n)
            run(gpu, "mul_sum", Job(name, w, x, k, groups=groups, weights=weights, others=others, flags=0), y)
            want, limit = before[0, :45].astype(np.float64), 4 * U * np.abs(before[0, :45])
            if others is not None:
                want, limit = want + others, limit + 4 * U * np.abs(others)
            for i in range(n):
                values, matrix = x[i : i + 1].astype(np.float64), decode(name, w[block[i]])
                want = want + weights[i] * (values @ matrix.T)[0]
                limit = limit + 2 * weights[i] * bound(values, matrix)[0] + 2 * n * U * np.abs(want)
            assert_within(y[:1, :45], want[None], limit[None], f"{name} k={k} experts={n}")
            assert (y[:, 45:] == before[:, 45:]).all()


# ---- Packed activations ----


def hard_rows(rng: np.random.Generator) -> Floats:
    """Rows of 96 values: ordinary ones, ties, the smallest and the largest blocks, zeros."""
    ties = np.tile(np.arange(-47.5, 48.5, dtype=np.float32), 1)
    ties[[0, 32, 64]] = 127
    lines = [normal(rng, 96) * np.float32(10.0**e) for e in (-37, -31, -30, -5, 0, 3, 20, 37)]
    edges = [np.full(96, v, np.float32) for v in (0.0, -0.0, 2.0**-100, np.nextafter(np.float32(2.0**-100), 0), 3.4e38)]
    return np.stack([*lines, *edges, ties, -ties]).astype(np.float32)


def test_packs_are_the_processor_s(gpu: Gpu) -> None:
    rng = np.random.default_rng(13)
    many = (normal(rng, 60, 2080) * 10.0 ** rng.uniform(-6, 6, (60, 1))).astype(np.float32)
    for x in (many, hard_rows(rng), normal(rng, 1, 32)):
        q, scale = pack(gpu, x)
        want_q, want_scale = quantize_activations(x)
        assert (q == want_q).all() and scale.tobytes() == want_scale.tobytes()


@pytest.mark.usefixtures("packs")
@pytest.mark.parametrize("name", CODED_FORMATS)
def test_packed_products(gpu: Gpu, name: str) -> None:
    rng = np.random.default_rng(14)
    for k in widths(name):
        for n_rows, n in ((45, 1), (1, 3), (130, 70)):
            w, x = random_weights(name, n_rows, k, rng), normal(rng, n, k)
            want = expected_mul(name, w, x)
            assert_within(mul(gpu, name, w, x, packed=True), want.y, want.bound, f"{name} k={k} slots={n}")


@pytest.mark.usefixtures("packs")
@pytest.mark.parametrize("name", CODED_FORMATS)
def test_integer_products_are_exact(gpu: Gpu, name: str) -> None:
    """Whole weights and activation scales of 1: no float operation rounds, and every bit is the processor's."""
    rng = np.random.default_rng(15)
    for fill in (None, 0x00, 0xFF, 0x80, 0x7F):
        w = random_blocks(name, 40, 256, rng)
        if fill is not None:
            w[:] = fill
        w = with_halves(name, w, *[WHOLE.get(name, 1.0)] * len(HALVES[name]))
        for n in (3, 40):
            x = rng.integers(-1, 2, (n, 256)).astype(np.float32)
            x[:, ::32] = 127
            assert (np.abs(x) @ weight_magnitudes(name, w).T < 2**24).all()
            assert (mul(gpu, name, w, x, packed=True) == x.astype(np.float64) @ decode(name, w).T).all()
