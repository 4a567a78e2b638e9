"""factor.py: triangular factors of covariances, and equations solved by them, on all cores.

Blocks of columns, and pieces of what is computed from them, are the same whatever the number of cores: so are the bits.
"""

from __future__ import annotations

from functools import partial

import numpy as np
from numpy.typing import NDArray

from quantize.base.blas import PIECE, by_rows, one_thread, pieces, spread

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

BLOCK = 256  # columns that are factored together, in float64, and encoded together: DS_ENCODE_WIDTH


def damped(h: F32, mean: float, share: float) -> F32:
    """h (n, n) over the mean of its diagonal, with share added to that."""
    out = np.empty_like(h)

    def scale(rows: slice) -> None:
        np.divide(h[rows], np.float32(mean), out=out[rows])

    by_rows(scale, len(h))
    out.reshape(-1)[:: len(out) + 1] += np.float32(share)
    return out


def unit_upper(h: F64) -> tuple[F64, F64]:
    """M, unit upper, and v with h = M diag(v) M^T. LinAlgError unless h is positive definite."""
    upper = np.linalg.cholesky(h[::-1, ::-1])[::-1, ::-1]
    root = upper.diagonal()
    if not np.isfinite(root).all():
        raise np.linalg.LinAlgError("the factor is not finite")
    return upper / root, root * root


class Factor:
    """h (n, n) as M diag(v) M^T with a unit upper triangle M. LinAlgError unless h is positive definite.

    From the last block on, by products of wide matrices: on one core that takes half as long as one call for all.
    """

    def __init__(self, h: F32) -> None:
        n = len(h)
        self.blocks = pieces(n, BLOCK)
        self.above = np.zeros((n, n), np.float32)  # M above its diagonal blocks
        self.inner: list[F64] = []  # M's diagonal blocks, from the first
        self.inverse: list[F32] = []  # and their inverses
        self.v = np.empty(n)  # float64
        with one_thread():
            self._fill(h)

    def _fill(self, h: F32) -> None:
        def subtract(rows: slice, at: slice) -> None:
            left[rows] = h[rows, at] - self.above[rows, at.stop :] @ weighted.T

        def settle(rows: slice, at: slice, inverse: F32, v: F32) -> None:
            self.above[rows, at] = left[rows] @ inverse.T / v

        for at in reversed(self.blocks):
            left = np.empty((at.stop, at.stop - at.start), np.float32)
            weighted = self.above[at, at.stop :] * self.v[at.stop :].astype(np.float32)
            rows_above = pieces(at.start)
            spread([partial(subtract, rows, at) for rows in (*rows_above, at)])
            inner, v = unit_upper(left[at].astype(np.float64))
            inverse = np.linalg.inv(inner).astype(np.float32)
            if rows_above:
                spread([partial(settle, rows, at, inverse, v.astype(np.float32)) for rows in rows_above])
            self.inner.insert(0, inner)
            self.inverse.insert(0, inverse)
            self.v[at] = v

    def solve(self, b: F32) -> F32:
        """x (k, n) with h x^T = b (n, k). A piece of b's columns at a time: some give the same bits as all."""
        x = np.empty(b.shape[::-1], np.float32)
        inverse_v = (1.0 / self.v).astype(np.float32)[:, None]

        def columns(run: slice) -> None:
            part = np.zeros((len(b), PIECE), np.float32)
            n_columns = run.stop - run.start
            part[:, :n_columns] = b[:, run]
            for at, inverse in zip(reversed(self.blocks), reversed(self.inverse), strict=True):
                part[at] = inverse @ part[at]
                part[: at.start] -= self.above[: at.start, at] @ part[at]
            part *= inverse_v
            for at, inverse in zip(self.blocks, self.inverse, strict=True):
                part[at] -= self.above[: at.start, at].T @ part[: at.start]
                part[at] = inverse.T @ part[at]
            x[run] = part[:, :n_columns].T

        by_rows(columns, len(x))
        return x
