"""A long llama.cpp context made of a short one: a measurement at depth need not begin with minutes of prefill.

What llama.cpp saves of a sequence is unpacked, and its cached rows are repeated at positions that go on. Attention
takes as long over them as over any others. Of its layouts this reads that of a latent cache (keys alone, as MLA has)
and that of keys and values, these position by position or, without flash attention, value by value.
"""

from __future__ import annotations

import numpy as np

HEAD = np.dtype([("magic", "<u4"), ("seq", "<i4"), ("n_stream", "<u4"), ("n_cell", "<u4")])
CELL = np.dtype([("pos", "<i4"), ("n_seq", "<u4"), ("seq", "<i4")])
ROWS = np.dtype([("type", "<i4"), ("row_bytes", "<u8")])  # packed: no padding between them
COLUMNS = np.dtype([("type", "<i4"), ("bytes", "<u4"), ("n", "<u4")])  # of values: bytes of one, values of a position


def lengthened(state: bytes, n: int, depth: int) -> bytes | None:
    """The state of n tokens as one of depth tokens; None where its layout is another one."""
    at = HEAD.itemsize + n * CELL.itemsize
    if len(state) < at + 8:
        return None
    head, cells = np.frombuffer(state, HEAD, 1).copy(), np.frombuffer(state, CELL, n, HEAD.itemsize)
    if (
        head["n_stream"][0] != 1
        or head["n_cell"][0] != n
        or (cells["pos"] != np.arange(n)).any()
        or (cells["n_seq"] != 1).any()
    ):
        return None
    is_transposed, n_layer = np.frombuffer(state, "<u4", 2, at)
    head["n_cell"] = depth
    more = np.zeros(depth, CELL)
    more["pos"], more["n_seq"] = np.arange(depth), 1
    made, at = [head.tobytes(), more.tobytes(), state[at : at + 8]], at + 8
    for repeat in (_rows, _columns if is_transposed else _rows):
        if at == len(state):
            break  # a latent cache has no values
        for _ in range(n_layer):
            if (layer := repeat(state, at, n, depth)) is None:
                return None
            parts, at = layer
            made += parts
    return b"".join(made) if at == len(state) else None


def _rows(state: bytes, at: int, n: int, depth: int) -> tuple[list[bytes], int] | None:
    """A layer of n rows at a place as one of depth rows, and where it ends; None where it does not end in the state."""
    begin = at + ROWS.itemsize
    if begin > len(state):
        return None
    row_bytes = int(np.frombuffer(state, ROWS, 1, at)["row_bytes"][0])
    end = begin + n * row_bytes
    rows = state[begin:end]
    parts = [state[at:begin], rows * (depth // n), rows[: depth % n * row_bytes]]
    return (parts, end) if end <= len(state) else None


def _columns(state: bytes, at: int, n: int, depth: int) -> tuple[list[bytes], int] | None:
    """The same of a layer that holds all positions of a value before the next value."""
    begin = at + COLUMNS.itemsize
    if begin > len(state):
        return None
    layer = np.frombuffer(state, COLUMNS, 1, at)
    width, n_values = int(layer["bytes"][0]), int(layer["n"][0])
    end = begin + n_values * n * width
    if end > len(state):
        return None
    values = np.frombuffer(state, np.uint8, end - begin, begin).reshape(n_values, n * width)
    longer = np.concatenate([*[values] * (depth // n), values[:, : depth % n * width]], axis=1)
    return [state[at:begin], longer.tobytes()], end
