"""Every kernel table against float64 arithmetic: products of all formats, row operations; edges of each."""

import numpy as np
import pytest
from support.blocks import CODED_FORMATS, FLOAT_FORMATS, HALVES, WHOLE, block_size, random_blocks, with_halves
from support.kernels import (
    SENTINEL,
    U,
    aligned,
    assert_within,
    decode,
    expected_mul,
    mul,
    pack,
    quantize_activations,
    weight_magnitudes,
)

import cext
from cext import _engine

ISAS = cext.isas()
FORMATS = (*FLOAT_FORMATS, *CODED_FORMATS)
N_TOKENS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 33, 70)


def random_weights(name: str, n_rows: int, k: int, rng: np.random.Generator) -> np.ndarray:
    if name in CODED_FORMATS:
        return random_blocks(name, n_rows, k, rng)
    x = rng.normal(0.0, 0.02, (n_rows, k)).astype(np.float32)
    if name == "bf16":
        return (x.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    return (x.astype(np.float16) if name == "f16" else x).view(np.uint8)


def random_activations(n_tok: int, k: int, rng: np.random.Generator) -> np.ndarray:
    """Values with outliers: a few columns fifty times the rest, as in real hidden states."""
    x = rng.normal(0.0, 1.0, (n_tok, k)).astype(np.float32)
    x[:, rng.integers(0, k, max(1, k // 100))] *= 50
    return x


def widths(name: str) -> tuple[int, ...]:
    """The last one is 11 blocks of 256 values: x86 takes those of grid formats by eights."""
    elements = block_size(name)[0]
    return (
        (256, 512, 2816)
        if elements == 256
        else (32, 64, 96, 256, 352, 1408)
        if elements == 32
        else (1, 7, 16, 33, 250, 1408)
    )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", FORMATS)
def test_mul_every_token_count(name: str, isa: str) -> None:
    rng = np.random.default_rng(1)
    k = widths(name)[-1]
    w = random_weights(name, 45, k, rng)
    for n_tok in N_TOKENS:
        x = random_activations(n_tok, k, rng)
        want = expected_mul(name, w, x)
        assert_within(mul(isa, name, w, x), want.y, want.bound, f"{name} {n_tok} tokens")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", FORMATS)
def test_mul_every_shape(name: str, isa: str) -> None:
    rng = np.random.default_rng(2)
    for k in widths(name):
        for n_rows in (1, 2, 15, 31, 32, 33, 64, 70):
            w = random_weights(name, n_rows, k, rng)
            for n_tok in (1, 3, 7):
                x = random_activations(n_tok, k, rng)
                want = expected_mul(name, w, x)
                assert_within(mul(isa, name, w, x), want.y, want.bound, f"{name} k={k} rows={n_rows} tokens={n_tok}")


def integer_blocks(name: str, fill: int | None, rng: np.random.Generator, n_rows: int, k: int) -> np.ndarray:
    """Weights that are whole numbers: scales and minimums of 1 (or WHOLE); the codes random or all one byte."""
    w = random_blocks(name, n_rows, k, rng)
    if fill is not None:
        w[:] = fill
    return with_halves(name, w, *[WHOLE.get(name, 1.0)] * len(HALVES[name]))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", CODED_FORMATS)
@pytest.mark.parametrize(
    "fill", [None, 0x00, 0xFF, 0x80, 0x7F, 0x88, 0x1F], ids=lambda f: "random" if f is None else f"{f:#04x}"
)
def test_integer_sums_are_exact(name: str, isa: str, fill: int | None) -> None:
    """With whole weights and activation scales of 1, sums are whole numbers. Where they stay under 2^24 no float
    operation rounds, so a saturated or dropped integer shows and all ISAs agree bit for bit; above, the bound is a few
    units, which a saturated 16-bit sum misses by far."""
    rng = np.random.default_rng(3)
    k = 256
    w = integer_blocks(name, fill, rng, 40, k)
    magnitudes, weights = weight_magnitudes(name, w), decode(name, w)
    for n_tok in (1, 2, 6, 8, 13):
        x = rng.integers(-1, 2, (n_tok, k)).astype(np.float32)
        x[:, ::32] = 127  # each 32 values reach 127: the scale is 1
        x[0] = -127
        if n_tok > 1:
            x[1] = np.where(np.arange(k) % 2, 127, -127)
        sums = np.abs(x) @ magnitudes.T
        bound = np.where(sums < 2**24, 0.0, 8 * U * sums)
        assert (bound[2:] == 0.0).all(), "small activations should make an exact case of every format"
        assert_within(mul(isa, name, w, x), x.astype(np.float64) @ weights.T, bound, f"{n_tok} tokens")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", CODED_FORMATS)
def test_all_extreme_activations(name: str, isa: str) -> None:
    rng = np.random.default_rng(4)
    w = random_blocks(name, 33, 512, rng)
    for value in (1e34, -1e34, 1e-30, 1e-38, 0.0):
        x = np.full((7, 512), value, np.float32)
        want = expected_mul(name, w, x)
        assert_within(mul(isa, name, w, x), want.y, want.bound, f"{value}")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", CODED_FORMATS)
@pytest.mark.parametrize(
    "halves", [(0.0, 0.0), (2.0**-24, 2.0**-24), (65504.0, 65504.0)], ids=["zero", "subnormal", "largest"]
)
def test_extreme_scales(name: str, isa: str, halves: tuple[float, float]) -> None:
    rng = np.random.default_rng(5)
    w = with_halves(name, random_blocks(name, 33, 512, rng), *halves[: len(HALVES[name])])
    for n_tok in (1, 3, 8):
        x = random_activations(n_tok, 512, rng)
        want = expected_mul(name, w, x)
        assert_within(mul(isa, name, w, x), want.y, want.bound)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("n_tok", [1, 3, 8, 33])
def test_mul_does_not_depend_on_the_split(name: str, isa: str, n_tok: int) -> None:
    rng = np.random.default_rng(6)
    k = 512
    w, x = random_weights(name, 150, k, rng), random_activations(n_tok, k, rng)
    whole = mul(isa, name, w, x)
    for splits in ((32,), (64, 96), (32, 64, 96, 128)):
        assert mul(isa, name, w, x, splits).tobytes() == whole.tobytes()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", FORMATS)
def test_mul_reads_rows_where_they_are(name: str, isa: str) -> None:
    """Rows further apart than their bytes, and weights at an odd address (floats at a multiple of their size)."""
    rng = np.random.default_rng(7)
    w, x = random_weights(name, 40, 512, rng), random_activations(7, 512, rng)
    wide = np.zeros((40, w.shape[1] + 24), np.uint8)
    wide[:, : w.shape[1]] = w
    odd = {"f32": 4, "f16": 2, "bf16": 2}.get(name, 1)
    raw = np.zeros(wide.size + odd, np.uint8)
    raw[odd:] = wide.reshape(-1)
    for n_tok in (1, 7):
        act = pack(isa, name, x[:n_tok])
        y = np.full((n_tok, 40), SENTINEL, np.float32)
        _engine._mul(isa, name, raw[odd:], wide.shape[1], 512, 0, 40, act, n_tok, y, 40)
        assert y.tobytes() == mul(isa, name, w, x[:n_tok]).tobytes()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", ["f32", "q8_0"])
def test_packing_in_pieces_and_by_rows(name: str, isa: str) -> None:
    rng = np.random.default_rng(8)
    x = random_activations(90, 320, rng)
    for n_tok in (1, 4, 5, 33, 90):
        rows = rng.integers(0, 90, n_tok).astype(np.int32)
        whole = pack(isa, name, np.ascontiguousarray(x[rows]))
        assert pack(isa, name, x, rows).tobytes() == whole.tobytes()
        splits = tuple(range(32, n_tok, 32))
        assert pack(isa, name, x, rows, splits).tobytes() == whole.tobytes()


@pytest.mark.parametrize("isa", ISAS)
def test_packs_of_parts_fit_where_the_whole_does(isa: str) -> None:
    """Callers size one buffer for all tokens, plus a row an expert, and pack each expert's tokens into it."""
    for k in (32, 96, 1408, 2048):
        row = _engine._act_bytes(isa, "q4_0", 1, k)
        for n_tok in range(2, 100):
            assert _engine._act_bytes(isa, "q4_0", n_tok, k) <= n_tok * row


@pytest.mark.parametrize("isa", ISAS)
def test_quantisation_of_activations(isa: str) -> None:
    """A q8_0 identity shows the packed values: scale * q, the nearest of 255 steps."""
    k = 64
    identity = np.zeros((k, k // 32, 34), np.uint8)
    identity[:, :, :2] = np.array([1.0], np.float16).view(np.uint8)
    for r in range(k):
        identity[r, r // 32, 2 + r % 32] = 1
    rng = np.random.default_rng(9)
    ties = (np.arange(k) - 31.5).astype(np.float32)  # max 32.5 of 127 steps: includes values on ties after scaling
    ties[0] = ties[32] = 127
    for n_tok in (1, 5, 6, 13):
        x = random_activations(n_tok, k, rng)
        x[0] = ties
        q, scale = quantize_activations(x)
        want = q * np.repeat(scale, 32, axis=1).astype(np.float64)
        assert_within(mul(isa, "q8_0", identity.reshape(k, -1), x), want, np.abs(want) * 4 * U)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 1, 1), (3, 5, 7), (16, 33, 64), (13, 70, 192), (25, 31, 577), (1, 128, 200), (40, 1, 10)]
)
def test_gemm(m: int, n: int, k: int, isa: str) -> None:
    rng = np.random.default_rng(10)
    lda, ldb_nt, ldb_nn, ldc = k + 2, k + 1, n + 3, n + 4
    a = rng.normal(size=(m, lda)).astype(np.float32)
    bt = rng.normal(size=(n, ldb_nt)).astype(np.float32)
    b = rng.normal(size=(k, ldb_nn)).astype(np.float32)
    start = rng.normal(size=(m, ldc)).astype(np.float32)
    a64, bt64, b64, start64 = (v.astype(np.float64) for v in (a[:, :k], bt[:, :k], b[:, :n], start[:, :n]))

    c = start.copy()
    _engine._gemm(isa, "nt", m, n, k, 0.125, a, lda, bt, ldb_nt, c, ldc)
    assert_within(c[:, :n], 0.125 * (a64 @ bt64.T), (k + 8) * U * 0.125 * (np.abs(a64) @ np.abs(bt64).T), "nt")
    assert (c[:, n:] == start[:, n:]).all()

    c = start.copy()
    _engine._gemm(isa, "nn_add", m, n, k, 1.0, a, lda, b, ldb_nn, c, ldc)
    bound = (k + 8) * U * (np.abs(a64) @ np.abs(b64) + np.abs(start64))
    assert_within(c[:, :n], start64 + a64 @ b64, bound, "nn_add")
    assert (c[:, n:] == start[:, n:]).all()


def run_row(isa: str, op: str, x: np.ndarray, other: np.ndarray | None = None, number: float = 0.0) -> np.ndarray:
    """One row operation with a guard behind its output; softmax and exp_sum start from x, add_scaled from other."""
    n = len(x)
    out = np.full(n + 4, SENTINEL, np.float32)
    if op in ("softmax", "exp_sum", "add_scaled"):
        out[:n] = x if other is None else other
    view = out[:n]
    _engine._row(isa, op, x, None if op == "add_scaled" else other, view, number)
    assert (out[n:] == SENTINEL).all(), "wrote past the end"
    return view


ROW_LENGTHS = (1, 2, 7, 8, 15, 16, 17, 31, 64, 100, 1408)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("n", ROW_LENGTHS)
def test_rms_norm(n: int, isa: str) -> None:
    rng = np.random.default_rng(12)
    for size in (1.0, 1e-12, 1e25):  # squares that vanish or overflow in float32
        x = (rng.normal(size=n) * size).astype(np.float32)
        weight = rng.normal(size=n).astype(np.float32)
        for eps in (1e-6, 0.0):
            want = x / np.sqrt(np.mean(x.astype(np.float64) ** 2) + float(np.float32(eps)))
            assert_within(run_row(isa, "rms_norm", x, None, eps), want, 4 * U * np.abs(want))
            assert_within(run_row(isa, "rms_norm", x, weight, eps), want * weight, 4 * U * np.abs(want * weight))
    x = rng.normal(size=n).astype(np.float32)
    want = run_row(isa, "rms_norm", x, weight, 1e-6)
    _engine._row(isa, "rms_norm", x, weight, x, 1e-6)
    assert (x == want).all(), "in place differs"


@pytest.mark.parametrize("isa", ISAS)
def test_exp_is_accurate(isa: str) -> None:
    """exp_sum with a maximum of zero is exp itself: within 1.5 ulp everywhere."""
    x = np.concatenate(
        [np.linspace(-103.9, 88.7, 100_001), np.linspace(-1, 1, 10_001), [0.0, -0.0, 1e-30, -1e-42]]
    ).astype(np.float32)
    y = x.copy()
    _engine._row(isa, "exp_sum", x, None, y, 0.0)
    want = np.exp(x.astype(np.float64))
    ulp = np.spacing(want.astype(np.float32)).astype(np.float64)
    assert_within(y, want, 1.5 * ulp)
    assert (y[x == 0.0] == 1.0).all()


@pytest.mark.parametrize("isa", ISAS)
def test_exp_at_its_limits(isa: str) -> None:
    y = np.array([-np.inf, -200.0, -104.0, -3e38, 89.0, 1000.0, np.inf, np.nan] * 5, np.float32)
    _engine._row(isa, "exp_sum", y.copy(), None, y, 0.0)
    assert y[:4].tolist() == [0.0] * 4 and np.isposinf(y[4:7]).all() and np.isnan(y[7])
    assert y[8:].tobytes() == np.tile(y[:8], 4).tobytes()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("n", ROW_LENGTHS)
def test_softmax_and_exp_sum(n: int, isa: str) -> None:
    rng = np.random.default_rng(13)
    for spread in (1.0, 30.0):
        x = (rng.normal(size=n) * spread).astype(np.float32)
        top = float(x.max())
        e = np.exp(x.astype(np.float64) - top)
        # A float32 difference is off by u of its size, and exp turns that into a relative error.
        relative = (np.abs(x - top) + 8) * U
        y = x.copy()
        total = _engine._row(isa, "exp_sum", x, None, y, top)
        assert_within(y, e, relative * e + 1e-45)
        assert abs(total - e.sum()) <= ((n + 1) * U * e + relative * e).sum()
        want = e / e.sum()
        assert_within(run_row(isa, "softmax", x), want, (relative + relative.max() + (n + 4) * U) * want + 1e-45)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("n", ROW_LENGTHS)
def test_silu_mul(n: int, isa: str) -> None:
    rng = np.random.default_rng(14)
    gate = (rng.normal(size=n) * 10).astype(np.float32)
    gate[:: max(1, n // 3)] = [-200.0, 200.0, 0.0, -90.0][: len(gate[:: max(1, n // 3)])]
    up = rng.normal(size=n).astype(np.float32)
    gate64 = gate.astype(np.float64)
    want = gate64 / (1 + np.exp(-gate64)) * up
    assert_within(run_row(isa, "silu_mul", gate, up), want, 8 * U * np.abs(want) + 1e-36)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("n", ROW_LENGTHS)
def test_add_scaled(n: int, isa: str) -> None:
    rng = np.random.default_rng(15)
    x, y = rng.normal(size=(2, n)).astype(np.float32)
    want = y.astype(np.float64) + 0.3 * x.astype(np.float64)
    assert_within(run_row(isa, "add_scaled", x, y, 0.3), want, 4 * U * (np.abs(y) + np.abs(x)))


def test_the_override_picks_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ISAS[-1] == "scalar"
    with pytest.raises(ValueError, match="no kernels named 'mmx'"):
        _engine._act_bytes("mmx", "q4_0", 1, 32)


def test_misaligned_packs_are_refused() -> None:
    act = aligned(_engine._act_bytes("scalar", "q8_0", 1, 32) + 64)
    with pytest.raises(ValueError, match="not aligned"):
        _engine._act_pack("scalar", "q8_0", 0, 1, 1, 32, np.zeros((1, 32), np.float32), 32, None, act[1:])
