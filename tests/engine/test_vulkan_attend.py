"""The attention of few tokens on a GPU against that of any number, and what a cache's rows give in numpy."""

from collections.abc import Iterator

import numpy as np
import pytest
from support.gpu import Gpu, device, number
from support.gpu_products import EXACT, JOIN, Job, replace, run
from support.gpu_rows import Array, kept, pad, place, rotated
from support.kernels import SENTINEL

TILE = 64


@pytest.fixture(scope="module")
def gpu() -> Iterator[Gpu]:
    yield Gpu(number())


def scores_to_values(scores: Array, values: Array) -> Array:
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return (weights / weights.sum(axis=-1, keepdims=True)) @ values


def joined(parts: Array, v: int) -> Array:
    """(.., n_parts, v + 2) sums, maxima and weights of parts -> (.., v)."""
    top = parts[..., v].max(axis=-1, keepdims=True)
    share = np.exp(parts[..., v] - top)
    total = (parts[..., v + 1] * share).sum(axis=-1)
    return (parts[..., :v] * share[..., None]).sum(axis=-2) / total[..., None]


def turned(x: Array, turns: Array) -> Array:
    """Pairs of x (.., n) by angles (.., n / 2)."""
    pairs = (x[..., ::2] + 1j * x[..., 1::2]) * np.exp(1j * turns)
    return np.stack([pairs.real, pairs.imag], axis=-1).reshape(x.shape)


def halves(made: Array, v: int) -> tuple[Array, list[int], int]:
    """Queries (n_tok, n_head, width) as latent_coop.comp reads them, in whole rows and shares of depth, its constants
    and the groups of rows, as attend.c has them."""
    told, rows = device(), made.reshape(-1, made.shape[-1])
    m, n, k = (int(c) for c in told["coop"].split("x"))
    split = 8 * m * n // (32 * 16)
    width, columns = -(-rows.shape[1] // (k * split)) * k * split, -(-v // (8 * n)) * 8 * n
    groups = -(-len(rows) // 32)
    padded = np.zeros((32 * groups, width), np.float16)
    padded[: len(rows), : rows.shape[1]] = rows
    return padded, [8 * int(told["subgroup"]), m, n, k, width, columns], groups


def attend(
    gpu: Gpu, kind: str, way: str, n_head: int, rank: int, n_tail: int, positions: list[int], n_parts: int
) -> tuple[Array, Array]:
    """What the shader (few, attend, coop) gives, joined, and what numpy does: (n_tok, n_head, v), in the order that the
    cache has."""
    width = pad(rank + n_tail) if kind == "i16" else pad(rank) + pad(n_tail)
    head, v = (width, -(-rank // 32) * 32) if kind == "i16" else (pad(rank), pad(rank))
    rng = np.random.default_rng(width + n_head)
    n_blocks, n_tok, tail, nope = max(positions) // TILE + 1, len(positions), width - head, 24
    row_bytes, tail_bytes = (2 * width, 0) if kind == "i16" else (head, 2 * tail)
    at, scale = 256, 256 + TILE * row_bytes
    tail_at = scale + 256
    tail_scale = tail_at + TILE * tail_bytes
    blocks = np.zeros((n_blocks, (tail_scale + 512) // 256 * 256), np.uint8)
    data = rng.integers(-127, 128, (n_blocks, TILE, width), dtype=np.int16)
    scales = rng.uniform(0.001, 0.01, (2, n_blocks, TILE)).astype(np.float32)
    if kind == "i16":
        blocks[:, at:scale] = data.view(np.uint8).reshape(n_blocks, -1)
        scales[1] = scales[0]
    else:
        blocks[:, at:scale] = data[..., :head].astype(np.int8).view(np.uint8).reshape(n_blocks, -1)
        rotary = np.ascontiguousarray(data[..., head:])
        blocks[:, tail_at:tail_scale] = rotary.view(np.uint8).reshape(n_blocks, -1)
        blocks[:, tail_scale : tail_scale + 256] = scales[1].view(np.uint8)
    blocks[:, scale:tail_at] = scales[0].view(np.uint8)
    absorbed = rng.standard_normal((n_tok, n_head, rank), np.float32)
    q = rng.standard_normal((n_tok, n_head, nope + n_tail), np.float32)
    turns = rng.uniform(0, 6, (n_tok, n_tail // 2))
    angles = np.stack([np.cos(turns), np.sin(turns)], axis=-1).astype(np.float32)
    tokens = np.zeros(n_tok, [("blocks", "<u8"), ("pos", "<u4"), ("scale", "<f4")])
    tokens["pos"], tokens["scale"] = positions, rng.uniform(0.1, 0.3, n_tok)
    natural = np.concatenate([absorbed, turned(q[..., nope:].astype(np.float64), turns[:, None])], axis=-1)
    made = np.stack([[kept(kind, row, rank) for row in of_token] for of_token in natural])
    made *= tokens["scale"][:, None, None]
    table = np.zeros(n_blocks, np.uint64)
    to = np.zeros((n_tok, n_head, n_parts, v + 2), np.float32)
    offsets = [0, scale - at, tail_at - at, tail_scale - at, 0, row_bytes, tail_bytes]
    groups, specs = (n_parts, -(-n_head // 8), n_tok), [-(-v // (512 if way == "few" else 128))]
    queries = absorbed if way == "few" else made.astype(np.float32)
    if way == "coop":
        queries, specs, n_groups = halves(made, v)
        groups = (n_groups, n_parts, 1)
    arrays = [tokens.view(np.uint8), queries, q, angles, to, table, blocks]
    counts = [n_head, rank, nope, n_tail, width, head, v, n_parts, at]
    push = bytes(8 * 5) + np.array([*counts, *offsets, n_tok], np.uint32).tobytes()
    links = [(-1, 8 * i, i, 0) for i in range(5)]
    links += [(0, 16 * t, 5, 0) for t in range(n_tok)]
    links += [(5, 8 * i, 6, i * blocks.shape[1]) for i in range(n_blocks)]
    gpu.run(f"latent_{way}_{kind}", arrays, push, links, groups, specs)
    rows = data.reshape(-1, width).astype(np.float64)
    rows[:, :head] *= scales[0].reshape(-1, 1)
    rows[:, head:] *= scales[1].reshape(-1, 1)
    seen = [rows[: n + 1] for n in positions]
    expected = np.stack([scores_to_values(made[t] @ seen[t].T, seen[t][:, :v]) for t in range(n_tok)])
    return joined(to, v), expected


@pytest.mark.parametrize("kind", ["i16", "q8"])
@pytest.mark.parametrize(
    ("n_head", "rank", "n_tail", "positions", "n_parts"),
    [
        (16, 512, 64, [0], 1),
        (16, 512, 64, [700], 11),
        (5, 64, 32, [63, 64, 130], 3),
        (9, 96, 8, [200, 5], 2),  # parts of two tiles; a part of one token has none
        (128, 544, 64, [70], 4),  # values beyond a group's; more parts than tiles
    ],
)
def test_few_tokens(
    gpu: Gpu, kind: str, n_head: int, rank: int, n_tail: int, positions: list[int], n_parts: int
) -> None:
    """Queries and all; of any number of tokens, from the queries that numpy makes."""
    got, expected = attend(gpu, kind, "few", n_head, rank, n_tail, positions, n_parts)
    bar = 1e-5 * np.abs(expected).max()
    assert np.abs(got - expected).max() <= bar
    many, _ = attend(gpu, kind, "attend", n_head, rank, n_tail, positions, n_parts)
    assert np.abs(got - many).max() <= bar


@pytest.mark.parametrize("kind", ["i16", "q8"])
@pytest.mark.parametrize(
    ("n_head", "rank", "n_tail", "first", "n_tok", "n_parts"),
    [
        (16, 512, 64, 0, 4, 1),
        (16, 512, 64, 90, 3, 2),  # rows that are no whole tile; parts of several blocks
        (5, 64, 32, 61, 7, 9),  # more parts than there are tiles; heads over tiles of rows
        (3, 96, 8, 200, 11, 3),
    ],
)
def test_many_tokens_in_halves(
    gpu: Gpu, kind: str, n_head: int, rank: int, n_tail: int, first: int, n_tok: int, n_parts: int
) -> None:
    """Of one sequence, by matrix units."""
    if not device()["coop"]:
        pytest.skip("the device has no cooperative matrices of halves that are summed in floats")
    got, expected = attend(gpu, kind, "coop", n_head, rank, n_tail, [first + t for t in range(n_tok)], n_parts)
    assert np.abs(got - expected).max() <= 2.0**-8 * np.abs(expected).max()


@pytest.mark.parametrize("kind", ["f32", "i16", "q8"])
@pytest.mark.parametrize(("rank", "n_parts"), [(64, 1), (96, 5), (512, 64), (544, 9), (1536, 2)])
def test_parts_are_joined_on_the_way_to_a_product(gpu: Gpu, kind: str, rank: int, n_parts: int) -> None:
    """Of heads side by side; a part without positions; against W of the joined values in the model's order."""
    rng, n_head = np.random.default_rng(rank + n_parts), 3
    v = {"f32": rank, "i16": -(-rank // 32) * 32, "q8": pad(rank)}[kind]
    parts = rng.standard_normal((n_head, n_parts, v + 2)).astype(np.float32)
    parts[..., v + 1] = rng.uniform(1, 60, (n_head, n_parts))
    if n_parts > 1:
        parts[:, -1] = 0
        parts[:, -1, v] = -np.inf
    w = rng.standard_normal((n_head, 21, rank)).astype(np.float32)
    y = np.full((1, n_head * 24), SENTINEL, np.float32)
    flags = EXACT | JOIN * (1 + ["f32", "i16", "q8"].index(kind))
    job = Job("f32", w.view(np.uint8), parts.reshape(1, -1), rank, stride_x=n_parts * (v + 2), stride_y=24, flags=flags)
    run(gpu, "mul", replace(job, usual=n_parts), y)
    for h in range(n_head):
        values = joined(parts[h].astype(np.float64), v)
        if kind == "i16":
            values = values[place(rank, 32)]
        elif kind == "q8":
            values = rotated(values[place(rank, 64)])
        limit = 1e-5 * (np.abs(values) @ np.abs(w[h]).T + np.abs(values).max() * np.abs(w[h]).sum(axis=-1) / 8)
        assert (np.abs(y[0, 24 * h : 24 * h + 21] - values @ w[h].T) <= limit).all()
        assert (y[0, 24 * h + 21 : 24 * h + 24] == SENTINEL).all()
