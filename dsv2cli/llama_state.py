"""A long llama.cpp context made of a short one: a measurement at depth need not begin with minutes of prefill.

What llama.cpp saves of a sequence is unpacked, and its cached rows are repeated at positions that go on. Attention
takes as long over them as over any others. Of its layouts this reads that of a latent cache (keys alone, as MLA has).
"""

from __future__ import annotations

import numpy as np

HEAD = np.dtype([("magic", "<u4"), ("seq", "<i4"), ("n_stream", "<u4"), ("n_cell", "<u4")])
CELL = np.dtype([("pos", "<i4"), ("n_seq", "<u4"), ("seq", "<i4")])
KEYS = np.dtype([("type", "<i4"), ("row_bytes", "<u8")])  # packed: no padding between them


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
    _, n_layer = np.frombuffer(state, "<u4", 2, at)
    head["n_cell"] = depth
    more = np.zeros(depth, CELL)
    more["pos"], more["n_seq"] = np.arange(depth), 1
    parts = [head.tobytes(), more.tobytes(), state[at : at + 8]]
    at += 8
    for _ in range(n_layer):
        if at + KEYS.itemsize > len(state):
            return None
        row_bytes = int(np.frombuffer(state, KEYS, 1, at)["row_bytes"][0])
        begin, at = at + KEYS.itemsize, at + KEYS.itemsize + n * row_bytes
        rows = state[begin:at]
        parts += [state[begin - KEYS.itemsize : begin], rows * (depth // n), rows[: depth % n * row_bytes]]
    return b"".join(parts) if at == len(state) else None
