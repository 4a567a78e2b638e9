"""GPTQ (Frantar et al., 2022) on a given grid, in float64: the oracle of cext/encode's first choice of codes.

The columns are quantised in order; what column j loses, over the Cholesky factor of H^-1, is taken from all columns
after it (the paper's algorithm 1, without its lazy batches).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]


def gptq(w: F64, h: F64, grid: NDArray[np.float64]) -> F64:
    """Rows w (r, n) under covariance h (n, n) -> values on the grid: grid[r, j] holds the points of row r, column j."""
    upper = np.linalg.cholesky(np.linalg.inv(h)).T
    w, out = w.copy(), np.empty_like(w)
    for j in range(w.shape[1]):
        points = grid[:, j]
        out[:, j] = np.take_along_axis(points, np.abs(points - w[:, j, None]).argmin(1)[:, None], 1)[:, 0]
        error = (w[:, j] - out[:, j]) / upper[j, j]
        w[:, j:] -= error[:, None] * upper[j, j:]
    return out


def loss(w: F64, q: F64, h: F64) -> F64:
    """(r,) each row's e H e^T."""
    e = np.asarray(q, np.float64) - w
    return (e @ h * e).sum(1)
