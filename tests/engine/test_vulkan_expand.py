"""Attention over keys and values that a GPU makes of the latents of a cache, its shaders one by one, in numpy."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf.quants import dequantize
from support.blocks import CODED_FORMATS, FLOAT_FORMATS, block_size, ggml_encode, random_blocks, type_of
from support.gpu import Gpu, device, number
from support.gpu_rows import pad, place, rotated
from support.tiny import SPECS, Spec, tokens, variant

from cext import Device, Model, Place, _engine

TILE = 64


@pytest.fixture(scope="module")
def gpu() -> Iterator[Gpu]:
    yield Gpu(number())


def shape() -> tuple[int, int, int]:
    if not device()["coop"]:
        pytest.skip("the device has no cooperative matrices of halves that are summed in floats")
    m, n, k = (int(c) for c in device()["coop"].split("x"))
    return m, n, k


def up_to(n: int, of: int) -> int:
    return -(-n // of) * of


@pytest.mark.parametrize(
    ("subgroups", "taken", "n_head", "nope", "n_tail", "v", "first", "n_tok", "cuts"),
    [
        (8, 32, 1, 16, 8, 24, 0, 70, [0, 70]),  # rows and positions that are no whole tiles
        (8, 16, 3, 32, 16, 16, 130, 65, [0, 64, 192, 195]),  # in three goes, the last of which only some tokens see
        (4, 16, 2, 32, 32, 40, 61, 40, [0, 64, 101]),
    ],
)
def test_attention(
    gpu: Gpu,
    subgroups: int,
    taken: int,
    n_head: int,
    nope: int,
    n_tail: int,
    v: int,
    first: int,
    n_tok: int,
    cuts: list[int],
) -> None:
    """Of tokens of one sequence, over all positions up to their own, in as many goes as there are cuts."""
    m, n, k = shape()
    threads, rng = subgroups * int(device()["subgroup"]), np.random.default_rng(n_tok)
    width, columns, n_pos = up_to(nope + n_tail, k), up_to(v, n), first + n_tok
    rows = up_to(n_tok, subgroups * m)
    queries = np.zeros((rows, n_head, width), np.float16)
    queries[:n_tok, :, : nope + n_tail] = rng.standard_normal((n_tok, n_head, nope + n_tail)) * rng.uniform(0.1, 3)
    keys = rng.standard_normal((n_pos, n_head, nope)).astype(np.float32)
    tails = rng.standard_normal((n_pos, n_tail)).astype(np.float32)
    values = rng.standard_normal((n_pos, n_head, v)).astype(np.float32)
    tokens = np.zeros(n_tok, [("blocks", "<u8"), ("pos", "<u4"), ("scale", "<f4")])
    tokens["pos"] = np.arange(first, n_pos)
    sums, tops = np.zeros((rows, n_head, columns), np.float32), np.zeros((rows, n_head, 2), np.float32)
    to = np.full((n_tok + 1, n_head, v), np.nan, np.float32)
    specs = [threads, m, n, k, width, columns, subgroups, taken]
    links = [(-1, 8 * i, i, 0) for i in range(8)]
    for begin, end in pairwise(cuts):
        arrays = [
            tokens.view(np.uint8),
            queries,
            keys[begin:end].copy(),
            tails[begin:end].copy(),
            values[begin:end].copy(),
        ]
        push = bytes(64) + np.array([n_tok, n_head, nope, n_tail, v, begin, end - begin], np.uint32).tobytes()
        groups = (n_head, rows // (subgroups * m), 1)
        gpu.run("expanded_attend", [*arrays, sums, tops, to], push, links, groups, specs)
    q = queries.astype(np.float64)
    for t in range(n_tok):
        seen = first + t + 1
        for h in range(n_head):
            scores = keys[:seen, h].astype(np.float64) @ q[t, h, :nope] + tails[:seen] @ q[t, h, nope : nope + n_tail]
            weights = np.exp(scores - scores.max())
            expected = weights / weights.sum() @ values[:seen, h]
            assert np.abs(to[t, h] - expected).max() <= 2.0**-8 * np.abs(values[:seen, h]).max(), (t, h)
    assert np.isnan(to[n_tok]).all()


@pytest.mark.parametrize("kind", ["i16", "q8"])
@pytest.mark.parametrize(("rank", "n_tail", "first", "n_pos"), [(512, 64, 0, 70), (96, 8, 128, 3)])
def test_rows_of_the_cache(gpu: Gpu, kind: str, rank: int, n_tail: int, first: int, n_pos: int) -> None:
    """In the order of the model, from any block on."""
    rng, n_blocks = np.random.default_rng(rank), (first + n_pos - 1) // TILE + 1
    width, at = (pad(rank + n_tail), 64) if kind == "i16" else (pad(rank), 64)
    row_bytes, tail_bytes = (2 * width, 0) if kind == "i16" else (width, 2 * pad(n_tail))
    scale = at + TILE * row_bytes
    tail, tail_scale = scale + 256, scale + 256 + TILE * tail_bytes
    blocks = np.zeros((n_blocks, tail_scale + 256), np.uint8)
    data = rng.integers(-127, 128, (n_blocks, TILE, width), dtype=np.int16 if kind == "i16" else np.int8)
    tails = rng.integers(-999, 999, (n_blocks, TILE, pad(n_tail)), dtype=np.int16)
    scales = rng.uniform(0.001, 0.01, (2, n_blocks, TILE)).astype(np.float32)
    blocks[:, at:scale] = data.view(np.uint8).reshape(n_blocks, -1)
    blocks[:, scale:tail] = scales[0].view(np.uint8)
    natural = data.reshape(-1, width) * scales[0].reshape(-1, 1).astype(np.float64)
    if kind == "i16":
        natural = natural[:, place(rank + n_tail, 32)]
        expected, expected_tails = natural[:, :rank], natural[:, rank:]
    else:
        blocks[:, tail:tail_scale] = tails.view(np.uint8).reshape(n_blocks, -1)
        blocks[:, tail_scale:] = scales[1].view(np.uint8)
        expected = np.stack([rotated(row) for row in natural[:, place(rank, 64)]])
        expected_tails = (tails.reshape(-1, pad(n_tail)) * scales[1].reshape(-1, 1))[:, place(n_tail, 32)]
    tokens, table = np.zeros(1, [("blocks", "<u8"), ("pos", "<u4"), ("scale", "<f4")]), np.zeros(n_blocks, np.uint64)
    latent, out_tails = np.zeros((n_pos, rank), np.float32), np.zeros((n_pos, n_tail), np.float32)
    offsets = [0, scale - at, tail - at, tail_scale - at, 0, row_bytes, tail_bytes]
    push = bytes(24) + np.array([rank, n_tail, first, at, *offsets], np.uint32).tobytes()
    links = [(-1, 8 * i, i, 0) for i in range(3)] + [(0, 0, 3, 0)]
    links += [(3, 8 * i, 4, i * blocks.shape[1]) for i in range(n_blocks)]
    arrays = [tokens.view(np.uint8), latent, out_tails, table, blocks]
    gpu.run(f"expanded_rows_{kind}", arrays, push, links, (n_pos, 1, 1), [rank])
    assert np.abs(latent - expected[first : first + n_pos]).max() <= 1e-5 * np.abs(expected).max()
    assert np.abs(out_tails - expected_tails[first : first + n_pos]).max() <= 1e-5 * np.abs(expected_tails).max()


@pytest.mark.parametrize("name", [*FLOAT_FORMATS, *CODED_FORMATS])
def test_transposed_weights(gpu: Gpu, name: str) -> None:
    """Of three blocks of rows that are no whole workgroup, as halves."""
    blocks, rows, k = 3, 130, max(96 if block_size(name)[0] <= 32 else 256, block_size(name)[0])
    rng = np.random.default_rng(k)
    if name in CODED_FORMATS:
        w = random_blocks(name, blocks * rows, k, rng)
    else:
        w = ggml_encode(name, rng.standard_normal((blocks * rows, k)).astype(np.float32))
    y, tables = np.zeros((blocks, k, rows), np.float16), np.frombuffer(_engine.gpu_tables(), np.uint8)
    counts = [0, k * rows // 2, 0, rows, w.shape[1], k, rows, 0, 0, 0, 0, 0]
    push = bytes(72) + np.array([rows * w.shape[1]], np.uint64).tobytes() + np.array(counts, np.uint32).tobytes()
    groups = (-(-rows // 128), 2 * -(-k // 32), blocks)
    gpu.run(f"transpose_{name}", [w, y, tables], push, [(-1, 0, 0, 0), (-1, 16, 1, 0), (-1, 40, 2, 0)], groups)
    expected = dequantize(w, type_of(name)).reshape(blocks, rows, k).transpose(0, 2, 1)
    assert np.allclose(y, expected, rtol=2.0**-10, atol=1e-6)


@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
def test_prompts_over_more_positions_than_there_is_room_for(tiny_gguf: Callable[[Spec], Path], kv_type: Any) -> None:
    """Logits as the processor's, of a step whose keys and values are made in several goes."""
    shape()
    spec = variant(SPECS[0], n_head=32, n_layer=2)
    ids, layers = tokens(spec, 1500), range(spec.n_layer)
    placement = [Place("ends", 1), Place("attention", 1, layers), Place("feed_forward", 1, layers)]
    gpu = Model(tiny_gguf(spec), devices=[Device("vulkan", name=number())], placement=placement)
    with gpu, Model(tiny_gguf(spec), threads=2) as processor:
        session, other = gpu.session(1600, kv_type), processor.session(1600, kv_type)
        session.eval(ids[:1400])
        other.eval(ids[:1400])
        gpu.watch(1, times=True)
        got, expected = session.eval(ids[1400:], "all"), other.eval(ids[1400:], "all")
        goes, _ = gpu.watched(1).times["expanded_attend"]
    assert goes > spec.n_layer
    off = np.sqrt(np.mean(np.square(got - expected), axis=-1)) / np.ptp(expected, axis=-1)
    assert np.median(off) <= {"f16": 1e-3, "q8_0": 1e-2}[kv_type]
