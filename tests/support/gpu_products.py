"""Products on a GPU called with numpy arrays: operations of backend/vulkan/product.h, each over buffers of its own."""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from itertools import count

import numpy as np
from numpy.typing import NDArray
from support.gpu import Gpu, Link
from support.kernels import SENTINEL, Bytes, Floats

from cext import _engine

Ints = NDArray[np.uint32]

ADD, EXACT, JOIN, LANES = 1, 4, 16, 256
FIELDS = ("w", "x", "y", "groups", "slot_row", "tables", "up", "x_scale", "norm")
"""The addresses of a ds_gpu_product, in order."""
PRODUCT = f"<{8 * len(FIELDS)}xQ10IfI"
"""All of it: addresses, which links set, and numbers."""


@dataclass(frozen=True)
class Groups:
    """Which block of w (blocks, rows, row bytes) each group of slots is multiplied by; None: by none."""

    block: tuple[int | None, ...]
    count: tuple[int, ...]

    def records(self) -> NDArray[np.uint8]:
        """As the shaders read them, without addresses."""
        first = np.cumsum([0, *self.count])
        return np.frombuffer(
            b"".join(struct.pack("<QII", 0, first[i], n) for i, n in enumerate(self.count)), np.uint8
        ).copy()

    def links(self, at: int, to: int, block_bytes: int) -> list[Link]:
        return [(at, 16 * i, to, block * block_bytes) for i, block in enumerate(self.block) if block is not None]


@dataclass(frozen=True)
class Job:
    """A product: w (blocks, rows, row bytes) in `format` by k values of each row of x (n, ldx)."""

    format: str
    w: Bytes
    x: Floats
    k: int
    up: Bytes | None = None
    up_format: str | None = None
    packed: bool = False
    n_slots: int | None = None
    stride_x: int = 0
    stride_y: int = 0
    groups: Groups | None = None
    slot_row: Ints | None = None
    flags: int = EXACT
    usual: int = 0
    norm: Floats | None = None
    weights: Floats | None = None
    others: Floats | None = None
    eps: float = 0.0


def run(gpu: Gpu, operation: str, job: Job, y: Floats) -> None:
    """Into y (n, ldy), which is read where flags say so."""
    arrays: list[np.ndarray] = []
    links: list[Link] = []

    def put(field: str, array: np.ndarray | None) -> int:
        if array is None:
            return -1
        links.append((-1, 8 * FIELDS.index(field), len(arrays), 0))
        arrays.append(array)
        return len(arrays) - 1

    blocks, rows, row_bytes = job.w.shape
    x, scale = pack(gpu, job.x) if job.packed else (job.x, None)
    w_at, up_at = put("w", np.ascontiguousarray(job.w)), -1
    for field, array in (("x", x), ("y", y), ("slot_row", job.slot_row), ("x_scale", scale), ("norm", job.norm)):
        put(field, array)
    for field, array in (("up", job.weights), ("x_scale", job.others)):
        put(field, array)
    put("tables", np.frombuffer(_engine.gpu_tables(), np.uint8))
    up_row_bytes = row_bytes
    if job.up is not None:
        up_row_bytes = job.up.shape[2]
        up_at = put("up", np.ascontiguousarray(job.up))
    n_slots = job.n_slots if job.n_slots is not None else len(job.x)
    if job.groups is not None:
        n_slots = max(job.groups.count)
        links += job.groups.links(put("groups", job.groups.records()), w_at, rows * row_bytes)
        if job.up is not None:
            links.pop(next(i for i, link in enumerate(links) if link[:2] == (-1, 48)))
            links += job.groups.links(put("up", job.groups.records()), up_at, rows * up_row_bytes)
        blocks = len(job.groups.block)
    counts = (row_bytes, job.k, rows, n_slots, job.flags, job.usual)
    numbers = (job.stride_x, job.stride_y, job.x.shape[1], y.shape[1], *counts)
    stride_w = rows * row_bytes if job.groups is None else 0
    product = struct.pack(PRODUCT, stride_w, *numbers, job.eps, 0)
    formats = (job.format, job.up_format or job.format)
    _engine.gpu_product(gpu.handle, operation, formats, (up_row_bytes, blocks), arrays, product, links)


def pack(gpu: Gpu, x: Floats) -> tuple[NDArray[np.int8], Floats]:
    """int8 values (n, ldx) and scales (n, ldx / 32) of x (n, ldx), made there."""
    n, ldx = x.shape
    q, scale = np.full((n, ldx), 99, np.int8), np.full((n, ldx // 32), SENTINEL)
    at = count()
    links = [(-1, 8 * FIELDS.index(field), next(at), 0) for field in ("x", "y", "x_scale")]
    product = struct.pack(PRODUCT, 0, 0, 0, ldx, 0, 0, 0, 0, n, 0, 0, 0.0, 0)
    _engine.gpu_product(gpu.handle, "pack", ("f32", "f32"), (0, 1), [np.ascontiguousarray(x), q, scale], product, links)
    return q, scale


def mul(gpu: Gpu, name: str, w: Bytes, x: Floats, packed: bool = False, flags: int = EXACT) -> Floats:
    """x (n, k) times w (rows, row bytes) transposed: (n, rows)."""
    y = np.full((len(x), len(w) + 3), SENTINEL, np.float32)
    run(gpu, "mul", Job(name, w[None], x, x.shape[1], packed=packed, flags=flags), y)
    assert (y[:, len(w) :] == SENTINEL).all(), "wrote past the rows asked for"
    return y[:, : len(w)].copy()


def rows(gpu: Gpu, name: str, w: Bytes, k: int, which: Ints) -> Floats:
    """Rows of w decoded there: (which, k)."""
    y = np.full((len(which), k + 1), SENTINEL, np.float32)
    job = Job(name, w[None], np.zeros((1, 1), np.float32), k, n_slots=len(which), slot_row=which)
    run(gpu, "rows", job, y)
    assert (y[:, k:] == SENTINEL).all(), "wrote past a row"
    return y[:, :k].copy()


__all__ = ["ADD", "EXACT", "JOIN", "PRODUCT", "Groups", "Job", "mul", "pack", "replace", "rows", "run"]
