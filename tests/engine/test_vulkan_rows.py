"""Norms of rows and the rows that a cache is given, on a GPU, against numpy."""

import struct
from collections.abc import Iterator

import numpy as np
import pytest
from support.gpu import Gpu, number
from support.gpu_rows import Array, pad, place, rotated

F32, I16, Q8 = range(3)


@pytest.fixture(scope="module")
def gpu() -> Iterator[Gpu]:
    yield Gpu(number())


def normed(x: Array, w: Array, eps: float) -> Array:
    x = x.astype(np.float64)
    return np.asarray(x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * w)


@pytest.mark.parametrize("chosen", [None, [2, 0, 2]])
@pytest.mark.parametrize("n", [1, 63, 64, 65, 255, 257, 1536, 2048, 2049, 7168])
def test_norm(gpu: Gpu, n: int, chosen: list[int] | None) -> None:
    rng = np.random.default_rng(n)
    ldx, ldy = n + 3, n + 1
    x, w = rng.normal(0, 3, (3, ldx)).astype(np.float32), rng.normal(1, 0.3, n).astype(np.float32)
    y, row = np.full((3, ldy), 7, np.float32), np.array(chosen or [0, 1, 2], np.uint32)
    push = bytes(32) + struct.pack("<IIIf", n, ldx, ldy, 1e-6)
    links = [(-1, 0, 0, 0), (-1, 8, 1, 0), (-1, 16, 2, 0)] + ([(-1, 24, 3, 0)] if chosen else [])
    gpu.run("norm", [x, w, y, row], push, links, (3, 1, 1))
    np.testing.assert_allclose(y[:, :n], normed(x[row, :n], w, 1e-6), rtol=2e-6)
    assert (y[:, n:] == 7).all()


@pytest.mark.parametrize("kind", [F32, I16, Q8])
@pytest.mark.parametrize(
    ("rank", "n_tail", "zero"),
    [(512, 64, False), (64, 16, False), (96, 8, False), (640, 64, False), (1536, 128, False), (512, 64, True)],
)
def test_rows_of_a_cache(gpu: Gpu, kind: int, rank: int, n_tail: int, zero: bool) -> None:
    rng = np.random.default_rng(rank + n_tail)
    positions, width = [0, 63, 64, 65, 2000], rank + n_tail
    n_tok, n_blocks = len(positions), 2000 // 64 + 1
    row_bytes = [4 * width, 2 * pad(width), pad(rank)][kind]
    tail_bytes = 2 * pad(n_tail) if kind == Q8 else 0
    out_bytes, at = row_bytes + tail_bytes + 12, 128
    starts = np.cumsum([0, 64 * row_bytes, 256, 64 * tail_bytes, 256])  # data, scale, tail, tail_scale, sum
    blocks = np.zeros((n_blocks, (at + int(starts[-1]) + 256 + 63) // 64 * 64), np.uint8)
    tokens = np.zeros(n_tok, [("blocks", "<u8"), ("pos", "<u4"), ("scale", "<f4")])
    tokens["pos"] = positions
    kv_a, w = rng.normal(0, 2, (n_tok, width)).astype(np.float32), rng.normal(1, 0.3, rank).astype(np.float32)
    if zero:
        kv_a[:] = 0
    turns = rng.uniform(0, 6, (n_tok, n_tail // 2))
    angles = np.stack([np.cos(turns), np.sin(turns)], axis=-1).astype(np.float32)
    out, table = np.zeros((n_tok, out_bytes), np.uint8), np.zeros(n_blocks, np.uint64)
    push = bytes(40) + struct.pack("<4If", rank, n_tail, out_bytes, at, 1e-6)
    push += struct.pack("<7I", *(int(s) for s in starts), row_bytes, tail_bytes)
    links = [(-1, 8 * i, i, 0) for i in range(5)] + [(0, 16 * t, 5, 0) for t in range(n_tok)]
    links += [(5, 8 * i, 6, i * blocks.shape[1]) for i in range(n_blocks)]
    gpu.run(
        ("latent_store_f32", "latent_store_i16", "latent_store_q8")[kind],
        [tokens.view(np.uint8), kv_a, w, angles, out, table, blocks],
        push,
        links,
        (n_tok, 1, 1),
    )
    for t, pos in enumerate(positions):
        block, pair = blocks[pos // 64, at:], kv_a[t, rank:].astype(np.float64).reshape(-1, 2)
        tail = ((pair[:, 0] + 1j * pair[:, 1]) * np.exp(1j * turns[t])).view(np.float64)
        head = normed(kv_a[t, :rank], w, 1e-6)
        kept = out[t, : row_bytes + tail_bytes]
        data = block[pos % 64 * row_bytes :][:row_bytes]
        assert np.array_equal(data, kept[:row_bytes])
        scales, sums = out[t, -12:].view(np.float32), out[t, -4:].view(np.int32)
        if kind == F32:
            np.testing.assert_allclose(data.view(np.float32), np.concatenate([head, tail]), rtol=1e-4, atol=1e-5)
            continue
        assert block[starts[1] + 4 * (pos % 64) :][:4].view(np.float32)[0] == scales[0]
        if kind == I16:
            row, values = np.concatenate([head, tail]), data.view(np.int16)
            assert np.abs(values[place(width, 32)] * scales[0] - row).max() <= 0.51 * scales[0] + 1e-5
            assert zero or scales[0] == pytest.approx(max(np.abs(row).max() / 32700, np.linalg.norm(row) / 46300))
            continue
        row, values = rotated(head), data.view(np.int8)
        assert np.abs(values[place(rank, 64)] * scales[0] - row).max() <= 0.51 * scales[0]
        assert zero or scales[0] == pytest.approx(np.abs(row).max() / 127)
        assert sums[0] == values.astype(int).sum() == block[starts[4] + 4 * (pos % 64) :][:4].view(np.int32)[0]
        rotary = block[starts[2] + pos % 64 * tail_bytes :][:tail_bytes]
        assert np.array_equal(rotary, kept[row_bytes:])
        assert np.abs(rotary.view(np.int16)[place(n_tail, 32)] * scales[1] - tail).max() <= 0.51 * scales[1] + 1e-5
        assert block[starts[3] + 4 * (pos % 64) :][:4].view(np.float32)[0] == scales[1]
