"""rows.py: encoding row after row under a covariance G of the gradients at a matrix's outputs.

An error dW of a matrix with the inputs x and the gradients g at its output costs 1/2 tr(G dW H dW^T) with H = E[x x^T]
and G = E[g g^T], as far as the two do not depend on each other (the factored Fisher information; Tseng et al., 2025,
Model-Preserving Adaptive Rounding). feedback.py follows H, along a row; here rows follow G, one after the other: with
G = M diag(v) M^T, M a unit upper triangle, the loss is sum_r v_r |e_r + sum_{i<r} M_ir e_i|^2 in H's measure, so that a
row is encoded under the errors of those before it, and counts v_r in place of G_rr. One sweep: a second one, each row
under the errors of all others, was no better.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from quantize.base.blas import product
from quantize.encode.factor import Factor, damped

F32 = NDArray[np.float32]

DAMPING = 0.02  # added to the diagonal, as a share of its mean
# Steps of a block, whose rows are encoded together and so do not make up for each other: many of few rows, and of many
# rows enough at a time that the encoder's tables, which it reads for each step, do not cost more than the rows.
STEPS, WIDE_STEPS, WIDE, MIN_STEP = 32, 16, 1024, 8


class Rows:
    """How the rows of a matrix follow each other. g (k, m, m): of k blocks of m rows, which do not depend on each
    other; the scale of each does not matter. LinAlgError where one is not positive definite, or not finite.
    """

    def __init__(self, g: F32) -> None:
        self.n_blocks, self.m = g.shape[:2]
        step = -(-self.m // ((STEPS if self.m <= WIDE else WIDE_STEPS) * MIN_STEP)) * MIN_STEP
        self.steps = [slice(start, min(start + step, self.m)) for start in range(0, self.m, step)]  # of a block's rows
        self.order = np.empty((self.n_blocks, self.m), np.intp)  # rows of the matrix
        self._upper = np.empty(g.shape, np.float32)  # M of each block, in that order
        counts = []
        for i, block in enumerate(g):
            mean = block.diagonal().mean(dtype=np.float64)
            if not (np.isfinite(mean) and mean > 0):
                raise np.linalg.LinAlgError("no gradient reaches these rows, or one that is not finite")
            order = np.argsort(-block.diagonal(), kind="stable")  # the most weighty first: the most is left to make up
            h = damped(block[np.ix_(order, order)], mean, DAMPING)
            factor = Factor(h)
            self.order[i], self._upper[i] = i * self.m + order, factor.above
            for at, inner in zip(factor.blocks, factor.inner, strict=True):
                self._upper[i, at, at] = inner
            counts.append(self._counts(i, factor.v) / h.diagonal().sum(dtype=np.float64))
        self.share = float(np.mean(counts))  # of the loss, that is left where rows are alike

    def _counts(self, block: int, v: NDArray[np.float64]) -> float:
        """What all rows count, those of a step each by itself."""
        return sum(float((np.square(self._upper[block, at, at]) @ v[at]).sum()) for at in self.steps)

    def carried(self, block: int, at: slice, errors: F32) -> F32:
        """(rows of at, n): the errors dW^T (n, m) of the rows before, as those of at are to make up for them."""
        upper = self._upper[block]
        weights = upper[: at.start, at] @ np.linalg.inv(upper[at, at])
        return product(errors[:, : at.start], weights).T
