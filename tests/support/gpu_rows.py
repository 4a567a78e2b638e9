"""The order that a cache keeps a row's values in, and how a row of bytes is turned, in numpy (kernels/attention.h)."""

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def rotated(x: Array) -> Array:
    """Walsh-Hadamard over blocks of the largest power of two in the length."""
    block = x.size & -x.size
    rows, half = x.reshape(-1, block), 1
    while half < block:
        pairs = rows.reshape(-1, block // (2 * half), 2, half)
        sums = pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]
        rows, half = np.stack(sums, axis=2).reshape(-1, block), half * 2
    return np.asarray(rows.reshape(-1) / np.sqrt(block))


def place(n: int, group: int) -> Array:
    """Where each of n values is kept: fours of `group` / 16 runs of 16 beside each other."""
    i = np.arange(n)
    return i // group * group + i % 16 // 4 * (group // 4) + i % group // 16 * 4 + i % 4


def pad(n: int) -> int:
    return -(-n // 64) * 64


def kept(kind: str, x: Array, rank: int) -> Array:
    """A row x of a latent of `rank` values and a rotary key, as a cache of kind i16 or q8 keeps it."""
    n_tail = x.size - rank
    if kind == "i16":
        row = np.zeros(pad(x.size))
        row[place(x.size, 32)] = x
        return row
    head, tail = np.zeros(pad(rank)), np.zeros(pad(n_tail))
    head[place(rank, 64)] = rotated(x[:rank])
    tail[place(n_tail, 32)] = x[rank:]
    return np.concatenate([head, tail])
