"""objective.py: what a part of a matrix is encoded under, in one place."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quantize.encode.feedback import Covariance
from quantize.encode.rows import Rows

F32 = NDArray[np.float32]


@dataclass(frozen=True)
class Objective:
    """The loss that a part's error dW is to keep small, as far as calibration knows it: 1/2 tr(G dW H dW^T).

    Without a covariance the importance stands for H's diagonal, without that all columns count alike; without rows, so
    do rows. All of it is of the part as it is encoded: folded, and moved by the regression of what its inputs lack.
    """

    importance: F32 | None = None  # (n,) E[x^2] of each input channel
    covariance: Covariance | None = None  # H = E[x x^T], (n, n)
    rows: Rows | None = None  # of G = E[g g^T], (n_row, n_row): how the rows of the matrix follow each other
    inputs: F32 | None = None  # X (m, n): inputs of some tokens, to measure the error with, not to encode by

    def corrected(self, values: F32) -> F32:
        """A part (n_row, n) moved to make up for what its inputs lack, as far as that is known."""
        return values if self.covariance is None else self.covariance.corrected(values)
