"""The attention of few tokens on a GPU against that of any number, and what a cache's rows give in numpy."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from support.gpu import Gpu, number

TILE = 64


@pytest.fixture(scope="module")
def gpu() -> Iterator[Gpu]:
    yield Gpu(number())


def scores_to_values(scores: "np.ndarray[Any, Any]", values: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return (weights / weights.sum(axis=-1, keepdims=True)) @ values


def joined(parts: "np.ndarray[Any, Any]", v: int) -> "np.ndarray[Any, Any]":
    """(.., n_parts, v + 2) sums, maxima and weights of parts -> (.., v)."""
    top = parts[..., v].max(axis=-1, keepdims=True)
    share = np.exp(parts[..., v] - top)
    total = (parts[..., v + 1] * share).sum(axis=-1)
    return (parts[..., :v] * share[..., None]).sum(axis=-2) / total[..., None]


def attend(
    gpu: Gpu, kind: str, few: bool, n_head: int, widths: tuple[int, int, int], positions: list[int], n_parts: int
) -> tuple["np.ndarray[Any, Any]", "np.ndarray[Any, Any]"]:
    """What the shader gives, joined, and what numpy does: (n_tok, n_head, v). widths: of all, head, v. The rows' order
    is as it is: a query is in the same."""
    width, head, v = widths
    rng = np.random.default_rng(width + n_head)
    n_blocks, n_tok, tail = max(positions) // TILE + 1, len(positions), width - head
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
    q = rng.standard_normal((n_tok, n_head, width), np.float32) * np.float32(0.2)
    tokens = np.zeros(n_tok, [("blocks", "<u8"), ("pos", "<u4"), ("scale", "<f4")])
    tokens["pos"] = positions
    table = np.zeros(n_blocks, np.uint64)
    to = np.zeros((n_tok, n_head, n_parts, v + 2), np.float32)
    offsets = np.array([0, scale - at, tail_at - at, tail_scale - at, 0, row_bytes, tail_bytes], np.uint32)
    push = bytes(24) + np.array([n_head, width, head, v, n_parts, at], np.uint32).tobytes() + offsets.tobytes()
    links = [(-1, 0, 0, 0), (-1, 8, 1, 0), (-1, 16, 2, 0)]
    links += [(0, 16 * t, 3, 0) for t in range(n_tok)]
    links += [(3, 8 * i, 4, i * blocks.shape[1]) for i in range(n_blocks)]
    share = -(-v // 512) if few else -(-v // 128)
    name = f"latent_{'few' if few else 'attend'}_{kind}"
    groups = (n_parts, -(-n_head // 8), n_tok)
    gpu.run(name, [tokens.view(np.uint8), q, to, table, blocks], push, links, groups, [share])
    rows = data.reshape(-1, width).astype(np.float64)
    rows[:, :head] *= scales[0].reshape(-1, 1)
    rows[:, head:] *= scales[1].reshape(-1, 1)
    expected = np.stack([scores_to_values(q[t] @ rows[: n + 1].T, rows[: n + 1, :v]) for t, n in enumerate(positions)])
    return joined(to, v), expected


@pytest.mark.parametrize("kind", ["i16", "q8"])
@pytest.mark.parametrize(
    ("n_head", "widths", "positions", "n_parts"),
    [
        (16, (576, 512, 512), [0], 1),
        (16, (576, 512, 512), [700], 11),
        (5, (128, 64, 64), [63, 64, 130], 3),
        (9, (192, 128, 96), [200, 5], 2),  # parts of two tiles; a part of one token has none
        (128, (640, 576, 544), [70], 4),  # values beyond a group's; more parts than tiles
    ],
)
def test_few_tokens(gpu: Gpu, kind: str, n_head: int, widths: Any, positions: list[int], n_parts: int) -> None:
    all_, head, v = widths
    widths = (all_, all_, v) if kind == "i16" else (all_, head, head)
    got, expected = attend(gpu, kind, True, n_head, widths, positions, n_parts)
    bar = 1e-5 * np.abs(expected).max()
    assert np.abs(got - expected).max() <= bar
    many, _ = attend(gpu, kind, False, n_head, widths, positions, n_parts)
    assert np.abs(got - many).max() <= bar
