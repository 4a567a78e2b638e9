"""Latent attention's kernels and cache types against float64 arithmetic, with bounds derived from what each rounds."""

from itertools import pairwise

import numpy as np
import pytest
from ref.model import Model as Reference
from support.kernels import U, assert_within
from support.tiny import SPECS, Checkpoint, gguf_tensors, spec_named, tokens, variant

import cext
from cext import _engine

ISAS = cext.isas()
KINDS = ("f32", "i16", "q8_0")
BLOCK = {"f32": 128, "i16": 128, "q8_0": 256}  # positions scored at a time, from the start of a call
SHARE = {"f32": 128, "i16": 128, "q8_0": 64}  # of these, those whose weights share a scale


def rotation(n):
    """Walsh-Hadamard over blocks of the largest power of two in n: orthogonal and symmetric, (n, n)."""
    block = n & -n
    h = np.ones((1, 1))
    while len(h) < block:
        h = np.block([[h, h], [h, -h]])
    return np.kron(np.eye(n // block), h / np.sqrt(block))


def i16_scale(x):
    """One a row of x (rows, n): the longest row that keeps any product of two within 31 bits, in int16."""
    return np.maximum(np.abs(x).max(axis=1) / 32700, np.sqrt((x**2).sum(axis=1)) / 46300)


def rounding(kind, x, n):
    """How far a value of rows x (rows, n + tail) may lie from where it was, the heads rotated for q8_0."""
    x = x.astype(np.float64)
    few = 40 * U * np.abs(x).max(axis=1, keepdims=True)  # the scale and the rotation are float32
    if kind == "f32":
        return np.zeros_like(x)
    if kind == "i16":
        return np.broadcast_to(0.5 * i16_scale(x)[:, None] + few, x.shape)
    head, tail = x[:, :n] @ rotation(n), x[:, n:]
    head = np.broadcast_to(0.5 * np.abs(head).max(axis=1, keepdims=True) / 127, head.shape)
    tail = np.broadcast_to(0.5 * i16_scale(tail)[:, None] if tail.size else tail, tail.shape)
    return np.concatenate([head, tail], axis=1) + few


def rotated(kind, x, n):
    """x in float64, as rows of the kind hold it."""
    x = x.astype(np.float64)
    return np.concatenate([x[:, :n] @ rotation(n), x[:, n:]], axis=1) if kind == "q8_0" else x


def pack(isa, kind, x, n):
    """Rows x (rows, n + tail) as the kind keeps them, float32 again; heads rotated for q8_0."""
    y = np.empty_like(x)
    _engine._pack_rows(isa, kind, n, x.shape[1] - n, x, y)
    return y


def random_rows(rng, n_rows, n, n_tail, outliers=False):
    x = rng.normal(size=(n_rows, n + n_tail)).astype(np.float32)
    if outliers:
        x[:, rng.integers(0, n + n_tail, 2)] *= 30
    return x


WIDTHS = ((1, 0), (8, 8), (32, 8), (23, 6), (96, 32), (512, 64), (130, 2), (64, 0))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "n_tail"), WIDTHS)
def test_rows_round_as_they_should(n, n_tail, kind, isa):
    rng = np.random.default_rng(1)
    x = random_rows(rng, 9, n, n_tail, outliers=True)
    x[1] = 0
    x[2] = 1
    x[3] *= np.float32(1e-20)
    x[4, 0] = 1000  # nearly all of the row
    assert_within(pack(isa, kind, x, n), rotated(kind, x, n), rounding(kind, x, n) * (1 + 1e-6))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("n", (1, 3, 8, 22, 64, 96, 256, 512, 640, 1024))
def test_rotation(n, isa):
    rng = np.random.default_rng(2)
    x = rng.normal(size=n).astype(np.float32)
    y = x.copy()
    _engine._rotate(isa, y)
    stages = np.log2(n & -n) + 2
    assert_within(y, x.astype(np.float64) @ rotation(n), stages * U * np.abs(x).sum())
    _engine._rotate(isa, y)
    assert_within(y, x.astype(np.float64), 2 * stages * U * np.abs(x).sum())
    _engine._rotate("scalar", x)
    z = x.copy()
    _engine._rotate("scalar", z)
    y = z.copy()
    _engine._rotate(isa, y)
    _engine._rotate("scalar", z)
    assert (y == z).all(), "the same sums in the same order give the same bits"


def attend(isa, kind, q, keys, values, *, n, v_dim, scale, cuts=(), visible=None, block=0):
    """m, l (rows,) and acc (rows, v_dim) after all positions, in the pieces that cuts make; m is in powers of two.

    block: positions that lie together in memory; 0 for all.
    """
    m, total = np.empty((2, len(q)), np.float32)
    acc = np.empty((len(q), v_dim), np.float32)
    pieces = np.array([0, *cuts, len(keys)], np.int32)
    sizes = n, q.shape[1] - n, v_dim, scale, block
    _engine._attend(isa, kind, *sizes, q, keys, values, visible, pieces, m, total, acc)
    return m, total, acc


def weight_steps(kind, weights, value_scale, cuts):
    """Half a step of the integers that stand for weights times their value's scale, (rows, positions); 0 for floats."""
    steps = np.zeros_like(weights)
    scaled = weights * value_scale
    for begin, end in pairwise((0, *cuts, weights.shape[1])):
        for at in range(begin, end, BLOCK[kind]):
            stop = min(at + BLOCK[kind], end)
            for share in range(at, stop, SHARE[kind]):
                part = scaled[:, share : min(share + SHARE[kind], stop)]
                size = part.max(axis=1) / 255 if kind == "q8_0" else part.sum(axis=1) / 32700
                steps[:, share : min(share + SHARE[kind], stop)] = 0.5 * size[:, None]
    return steps if kind != "f32" else np.zeros_like(weights)


def assert_attends(isa, kind, q, keys, values, *, n, v_dim, scale, cuts=(), visible=None):
    """Compare with softmax attention over the packed rows in float64.

    A score is off by the rounding of the query times the key's size, and by float32 or
    integer sums; exp makes that a relative error of its weight. Weights are integers of a block's or share's own step.
    """
    m, total, acc = attend(isa, kind, q, keys, values, n=n, v_dim=v_dim, scale=scale, cuts=cuts, visible=visible)
    scale = float(np.float32(scale))
    k = pack(isa, kind, keys, n).astype(np.float64)
    v = k[:, :v_dim] if values is None else pack(isa, kind, values, v_dim).astype(np.float64)
    whole = k if values is None else v
    dq, x = rounding(kind, q, n), rotated(kind, q, n)
    scores = x @ k.T * scale
    off = scale * (dq @ np.abs(k).T + (q.shape[1] + 20) * U * (np.abs(x) @ np.abs(k).T))
    if visible is not None:
        scores[np.arange(len(k)) >= visible[:, None]] = -np.inf
    top = scores.max(axis=1, keepdims=True)
    weights = np.exp(scores - top)
    off = np.where(weights > 0, off, 0)
    relative = np.expm1(np.minimum(off + off.max(axis=1, keepdims=True), 60)) + (len(k) + 40) * U
    assert_within(m, top[:, 0] / np.log(2), (off.max(axis=1) + 6 * U * np.abs(top[:, 0])) / np.log(2), "max")
    assert_within(total, weights.sum(axis=1), (relative * weights).sum(axis=1), "sum")
    if kind == "q8_0":
        value_scale = np.abs(v).max(axis=1) / 127
    elif kind == "f32":
        value_scale = np.ones(len(v))
    else:
        value_scale = i16_scale(whole)
    want = weights @ v
    steps = weight_steps(kind, weights * (1 + relative), value_scale, cuts) * (1 + 1e-4)
    size = np.abs(v) / np.where(value_scale == 0, 1, value_scale)[:, None] + 0.5
    bound = (relative * weights) @ np.abs(v) + steps @ size
    if kind == "q8_0":  # rotated back, every value of a block takes part in every other
        want, bound = want @ rotation(v_dim), bound @ np.abs(rotation(v_dim))
        bound += 40 * U * np.abs(want).max()
    assert_within(acc, want, bound + 1e-30, "acc")


SHAPES = (  # query rows, n, n_tail, v_dim (0: values of their own, 40 wide), positions
    (1, 8, 0, 8, 1),
    (3, 32, 8, 32, 70),
    (16, 512, 64, 512, 300),
    (5, 36, 6, 36, 19),
    (33, 64, 8, 64, 257),
    (64, 128, 64, 128, 130),
    (17, 48, 0, 0, 140),
    (40, 192, 0, 0, 129),
)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention(shape, kind, isa):
    n_rows, n, n_tail, v_dim, n_pos = shape
    rng = np.random.default_rng(11)
    q, keys = random_rows(rng, n_rows, n, n_tail), random_rows(rng, n_pos, n, n_tail, outliers=True)
    values = None if v_dim else random_rows(rng, n_pos, 40, 0, outliers=True)
    sizes = {"n": n, "v_dim": v_dim or 40, "scale": 3 / np.sqrt((keys.astype(np.float64) ** 2).sum(axis=1).max())}
    for cuts in ((), (1,), tuple(range(50, n_pos, 50))):
        if all(0 < cut < n_pos for cut in cuts):
            assert_attends(isa, kind, q, keys, values, **sizes, cuts=cuts)
    # Causal: rows see 1, 2, ... positions, and in later pieces nothing.
    visible = (np.arange(n_rows) * 7 % n_pos + 1).astype(np.int32)
    assert_attends(isa, kind, q, keys, values, **sizes, visible=visible)
    assert_attends(isa, kind, q, keys, values, **sizes, visible=visible, cuts=tuple(range(64, n_pos, 64)))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", KINDS)
def test_attention_at_its_limits(kind, isa):
    rng = np.random.default_rng(12)
    n, n_pos = 64, 200
    q, keys = random_rows(rng, 16, n, 0), random_rows(rng, n_pos, n, 0)
    q[0] = 0  # every position alike
    keys[5] = 0
    keys[-20:] = 0
    keys[150] *= 100  # one that takes all, behind a block that took its share
    q[3] = keys[150]
    for scale in (0.02, 5.0, 1e-30):
        assert_attends(isa, kind, q, keys, None, n=n, v_dim=n, scale=scale)
    # The longest rows, aligned: the largest sum that int32 products make.
    same = np.full((16, n), 3.0, np.float32)
    assert_attends(isa, kind, same, np.full((n_pos, n), -7.0, np.float32), None, n=n, v_dim=n, scale=0.001)
    one = np.zeros((n_pos, n), np.float32)
    one[:, 7] = -1e4
    assert_attends(isa, kind, same, one, None, n=n, v_dim=n, scale=1e-5)


@pytest.mark.parametrize("kind", ("i16", "q8_0"))
def test_integer_sums_are_bit_equal(kind):
    """Without a tail a score is an integer sum times a scale: the largest is the same on every ISA, bit for bit."""
    rng = np.random.default_rng(13)
    for n, n_pos in ((64, 1), (512, 37), (192, 260)):
        # Integers that need no rounding, with the row's scale fixed by its largest value and not by its length.
        top, rest = (127, 100) if kind == "q8_0" else (32700, 1000)
        keys = rng.integers(-rest, rest, (n_pos, n)).astype(np.float32)
        q = rng.integers(-rest, rest, (16, n)).astype(np.float32)
        if kind == "q8_0":  # each side packs the rotated rows: let them be integers there
            for row in (*keys, *q):
                row[0] = top
                _engine._rotate("scalar", row)
        else:
            keys[:, 0] = q[:, 0] = top
        results = [attend(isa, kind, q, keys, None, n=n, v_dim=n, scale=1e-9)[0] for isa in ISAS]
        for isa, m in zip(ISAS, results, strict=True):
            assert m.tobytes() == results[-1].tobytes(), isa


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_over_blocks_is_the_same_bits(shape, kind, isa):
    """Where rows lie does not matter: blocks are out of order in memory, the last one is partly filled."""
    n_rows, n, n_tail, v_dim, n_pos = shape
    rng = np.random.default_rng(15)
    n_pos += 300
    q, keys = random_rows(rng, n_rows, n, n_tail), random_rows(rng, n_pos, n, n_tail, outliers=True)
    values = None if v_dim else random_rows(rng, n_pos, 40, 0, outliers=True)
    visible = (np.arange(n_rows) * 37 % n_pos + 1).astype(np.int32)
    for sees in (None, visible):
        for block, cuts in ((64, ()), (64, (64, 256)), (128, (128,)), (192, ())):
            sizes = {"n": n, "v_dim": v_dim or 40, "scale": 0.1, "visible": sees, "cuts": cuts}
            whole, parts = (attend(isa, kind, q, keys, values, **sizes, block=b) for b in (0, block))
            for a, b in zip(whole, parts, strict=True):
                assert a.tobytes() == b.tobytes(), (block, cuts)


EXPANSIONS = ((32, 8, 16, 24), (512, 64, 128, 128), (23, 6, 11, 13), (130, 2, 70, 40), (64, 0, 1, 1))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", EXPANSIONS, ids=str)
@pytest.mark.parametrize("n_pos", (1, 9, 150))
def test_expansion(shape, n_pos, kind, isa):
    rank, n_tail, k_dim, v_dim = shape
    rng = np.random.default_rng(14)
    latents = random_rows(rng, n_pos, rank, n_tail, outliers=True)
    k_b = rng.normal(size=(rank, k_dim)).astype(np.float32)
    v_b = rng.normal(size=(v_dim, rank)).astype(np.float32)
    keys, values = np.empty((n_pos, k_dim + n_tail), np.float32), np.empty((n_pos, v_dim), np.float32)
    _engine._expand(isa, kind, rank, n_tail, k_dim, v_dim, 0, latents, k_b, v_b, keys, values)
    c = pack(isa, kind, latents, rank).astype(np.float64)
    head, tail = c[:, :rank], c[:, rank:]
    for got, plain, extra in ((keys, k_b.T, tail), (values, v_b, np.empty((n_pos, 0)))):
        w = rotated(kind, plain, rank)
        if kind == "q8_0":  # what comes out is rotated too
            w = rotation(len(w)) @ w
        dw = {"f32": np.zeros_like(w), "i16": rounding("i16", w, rank), "q8_0": int8_rounding(w)}[kind]
        want = head @ w.T
        bound = np.abs(head) @ dw.T + (rank + 10) * U * (np.abs(head) @ np.abs(w).T)
        if kind == "q8_0":  # packed again
            bound = bound + int8_rounding(np.abs(want) + bound)
        want = np.concatenate([want, extra], axis=1)
        bound = np.concatenate([bound, 4 * U * np.abs(extra)], axis=1)
        if kind == "i16":  # packed again, tail and all
            bound = bound + 0.51 * i16_scale(np.abs(want) + bound)[:, None]
        assert_within(got, want, bound + 1e-30)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", EXPANSIONS, ids=str)
def test_expansion_from_blocks_is_the_same_bits(shape, kind, isa):
    rank, n_tail, k_dim, v_dim = shape
    rng = np.random.default_rng(16)
    latents = random_rows(rng, 230, rank, n_tail, outliers=True)
    k_b = rng.normal(size=(rank, k_dim)).astype(np.float32)
    v_b = rng.normal(size=(v_dim, rank)).astype(np.float32)
    results = []
    for block in (0, 64, 128):
        keys, values = np.empty((230, k_dim + n_tail), np.float32), np.empty((230, v_dim), np.float32)
        _engine._expand(isa, kind, rank, n_tail, k_dim, v_dim, block, latents, k_b, v_b, keys, values)
        results.append(keys.tobytes() + values.tobytes())
    assert results[1] == results[0] and results[2] == results[0]


def int8_rounding(x):
    """Half a step of rows x (rows, n) as int8, and the float32 that it takes to rotate them."""
    top = np.abs(x).max(axis=1, keepdims=True)
    return np.broadcast_to(0.5 * top / 127 + 80 * U * top, x.shape)


# ---- The q8_0 cache in models ----

DENSE = spec_named("all_dense")  # no routing: a rounding cannot tip a choice
WIDE = variant(DENSE, name="wide", kv_lora_rank=128)  # expanding pays from about a hundred tokens on
LITE, PRO = SPECS[0], SPECS[1]


class CodedCache(Reference):
    """Latents as q8_0 keeps them."""

    def cached(self, c_kv, k_pe):
        turn = rotation(c_kv.shape[1])
        x = c_kv @ turn
        step = np.abs(x).max(axis=1, keepdims=True) / 127
        return np.rint(x / step) * step @ turn, k_pe


def in_pieces(session, ids, cuts):
    return np.concatenate([session.eval(ids[begin:end], "all") for begin, end in pairwise([0, *cuts, len(ids)])])


def rms(x):
    return np.sqrt(np.mean(np.square(x)))


@pytest.mark.parametrize("spec", (DENSE, WIDE), ids=lambda s: s.name)
@pytest.mark.parametrize(
    ("cuts", "roundings"), (([], 5), ([1, 140], 5), ([*range(1, 200)], 2)), ids=("prefill", "split", "decode")
)
def test_q8_0_cache_costs_what_its_rounding_costs(tiny_gguf, spec, cuts, roundings):
    """Each further rounding to eight bits costs no more than the latents' own: errors of independent numbers.

    Absorbed: the queries and the weights. Expanded: the up-projections, keys and values as well.
    """
    ids, tensors = tokens(spec, 200), gguf_tensors(Checkpoint(spec))
    exact, coded = (kind(spec.hparams, tensors).forward(ids) for kind in (Reference, CodedCache))
    effect = rms(coded - exact)
    with cext.Model(tiny_gguf(spec), threads=2) as model:
        got = in_pieces(model.session(200, kv_type="q8_0"), ids, cuts)
    assert 5e-4 < effect / rms(exact) < 2e-2
    assert rms(got - coded) < np.sqrt(roundings) * effect


@pytest.mark.parametrize("spec", (LITE, PRO, WIDE), ids=lambda s: s.name)
@pytest.mark.parametrize("keep", (0, 1, 63, 64, 65, 200))
def test_q8_0_rewind(tiny_gguf, spec, keep):
    """What was forgotten leaves no trace, in whole and in partial blocks."""
    ids, others = tokens(spec, 230), tokens(spec, 230, seed=1)
    with cext.Model(tiny_gguf(spec), threads=2) as model:
        straight, rewound = (model.session(460, kv_type="q8_0") for _ in range(2))
        for session in (straight, rewound):
            if keep:
                session.eval(ids[:keep])
        rewound.eval(others)
        rewound.rewind(keep)
        np.testing.assert_array_equal(rewound.eval(ids[keep:], "all"), straight.eval(ids[keep:], "all"))


@pytest.mark.parametrize("kv_type", ("f16", "q8_0", "f32"))
@pytest.mark.parametrize("spec", (LITE, WIDE), ids=lambda s: s.name)
def test_threads_do_not_change_a_bit(tiny_gguf, spec, kv_type):
    ids = tokens(spec, 400)
    results = []
    for threads in (1, 2, 5):
        with cext.Model(tiny_gguf(spec), threads=threads) as model:
            results.append(in_pieces(model.session(400, kv_type=kv_type), ids, [200, 260, *range(390, 400)]))
    for got in results[1:]:
        np.testing.assert_array_equal(got, results[0])


def test_pieces_of_products_are_the_whole(tiny_gguf):
    """Enough rows that their pieces halve from round to round, and jobs that no piece ends with."""
    spec = variant(DENSE, name="broad", n_layer=1, n_layer_dense=1, n_ff_dense=20000)
    ids = tokens(spec, 9)
    results = []
    for threads in (1, 2, 3, 16):
        with cext.Model(tiny_gguf(spec), threads=threads) as model:
            results.append(in_pieces(model.session(9, kv_type="f32"), ids, [7, 8]))
    for got in results[1:]:
        np.testing.assert_array_equal(got, results[0])


@pytest.mark.parametrize("heads", (1, 5, 64, 65, 130))
def test_any_number_of_heads(tiny_gguf, heads):
    """Heads are taken in blocks of up to 64, tokens together as far as they fit."""
    widths = {"kv_lora_rank": 16, "nope": 4, "rope": 4, "v": 4}
    spec = variant(DENSE, name=f"heads{heads}", n_head=heads, n_layer=1, n_layer_dense=1, **widths)
    ids = tokens(spec, 70)
    exact = Reference(spec.hparams, gguf_tensors(Checkpoint(spec))).forward(ids)
    with cext.Model(tiny_gguf(spec), threads=3) as model:
        for cuts in ([], [3, 6, 69]):
            got = in_pieces(model.session(70, kv_type="f32"), ids, cuts)
            assert np.abs(got - exact).max() < 1.2e-5 * np.ptp(exact)
            coded = in_pieces(model.session(70, kv_type="q8_0"), ids, cuts)
            assert rms(coded - exact) < 0.03 * rms(exact)


def test_a_batch_of_cache_types(tiny_gguf):
    """Sequences of one step may keep their latents differently, and attend by different routes."""
    ids = tokens(WIDE, 300)
    depths = {"f16": 3, "q8_0": 120, "f32": 40, "i": 0}
    with cext.Model(tiny_gguf(WIDE), threads=2) as model:
        sessions, expected = [], []
        for kv_type, depth in depths.items():
            alone, session = (model.session(400, kv_type="f16" if kv_type == "i" else kv_type) for _ in range(2))
            if depth:
                alone.eval(ids[:depth])
                session.eval(ids[:depth])
            new = ids[depth : depth + (200 if kv_type == "i" else 7)]
            sessions.append((session, new))
            expected.append(alone.eval(new))
        got = cext.eval_batch(sessions)
    for row, want, kv_type in zip(got, expected, depths, strict=True):
        tolerance = 0.02 if kv_type == "q8_0" else 1e-3
        assert np.abs(row - want).max() < tolerance * np.ptp(want), kv_type


@pytest.mark.parametrize("kv_type", ("f16", "q8_0", "f32"))
def test_positions_shared_out(tiny_gguf, kv_type):
    """Far into a context each head's positions are split into tasks and joined; of single tokens they are not."""
    depth, n = 16400, 130
    spec = variant(WIDE, name="wide_few", n_head=2, n_layer=1, n_layer_dense=1)
    ids = tokens(spec, depth + n)
    logits = []
    for threads in (1, 3):
        with cext.Model(tiny_gguf(spec), threads=threads) as model:
            session = model.session(depth + n, kv_type=kv_type)
            session.eval(ids[:depth])
            logits.append(session.eval(ids[depth:], "all"))
            session.rewind(depth)
            single = in_pieces(session, ids[depth:], range(1, n))
    np.testing.assert_array_equal(logits[0], logits[1])
    tolerance = {"f32": 1.2e-5, "f16": 5e-4, "q8_0": 2e-2}[kv_type]
    assert np.abs(logits[0] - single).max() < tolerance * np.ptp(single)
