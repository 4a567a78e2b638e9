"""outputs.py: encoding under what a matrix's outputs are worth, so that the loss of tokens changes least.

An error dW of a matrix that is fed x and whose output has the gradient g costs 1/2 tr(G dW H dW^T) with H = E[x x^T]
and G = E[g g^T], as far as the two do not depend on each other (the factored Fisher information; Tseng et al., 2025,
Model-Preserving Adaptive Rounding). feedback.py follows H, along a row; here rows follow G, one after the other: with
G = M diag(v) M^T, M a unit upper triangle, the loss is sum_r v_r |e_r + sum_{i<r} M_ir e_i|^2 in H's measure, so that a
row is encoded for what those before it have lost, and counts v_r in place of G_rr. One sweep: a second one, each row
given all others, was no better.

G comes from the survey's backward pass. Attention's matrices and the downs have one; gates and ups of experts, whose
hidden channels hardly share gradients, would gain 4 to 8 % of their loss and have the most of them to keep.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from quantize.arch import Arch
from quantize.backward import Floats
from quantize.blas import product
from quantize.evidence import prior_share
from quantize.factor import Factor, damped

F32 = NDArray[np.float32]

BY_PART = ("attn_k_b", "attn_v_b")  # heads with outputs of their own; experts share theirs
BY_HEAD = ("attn_q", "attn_q_b")  # a matrix of all heads, whose outputs meet in none
ROLES = (*BY_PART, *BY_HEAD, "attn_q_a", "attn_kv_a_mqa", "attn_output", "ffn_down", "ffn_down_shexp", "ffn_down_exps")
DAMPING = 0.02  # added to the diagonal, as a share of its mean
# At which a block's own gradients weigh as much as none off the diagonal, in tokens a row. The survey has few: with 4 a
# row (V2-Lite's residual stream) 0.1 would lose 3 % of a down's loss, this gains 5 to 10 of the 15 that many tokens do.
PRIOR_TOKENS = 2.0
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
            own = np.argsort(-block.diagonal(), kind="stable")  # the most weighty first: the most is left to make up
            h = damped(block[np.ix_(own, own)], mean, DAMPING)
            factor = Factor(h)
            self.order[i], self._upper[i] = i * self.m + own, factor.above
            for at, inner in zip(factor.blocks, factor.inner, strict=True):
                self._upper[i, at, at] = inner
            counts.append(self._counts(i, factor.v) / h.diagonal().sum(dtype=np.float64))
        self.share = float(np.mean(counts))  # of the loss, that is left where rows are alike

    def _counts(self, block: int, v: NDArray[np.float64]) -> float:
        """What all rows count, those of a step each by itself."""
        return sum(float((np.square(self._upper[block, at, at]) @ v[at]).sum()) for at in self.steps)

    def carried(self, block: int, at: slice, lost: F32) -> F32:
        """(rows of at, n) what the rows before have lost, lost (n, m), as the rows at feel it."""
        upper = self._upper[block]
        weights = upper[: at.start, at] @ np.linalg.inv(upper[at, at])
        return product(lost[:, : at.start], weights).T


class OutputSums:
    """Sums of g g^T over the survey's tokens, part by part: ``visit`` takes what backward.Visit does."""

    def __init__(self, arch: Arch) -> None:
        self._arch = arch
        self._sums: dict[str, dict[int, F32]] = {}

    def visit(self, role: str, part: int, gradients: Floats) -> None:
        """gradients (n_tokens, n_row) at a part's output."""
        if role not in ROLES:
            return
        n_blocks = self._arch.n_head if role in BY_HEAD else 1
        m = gradients.shape[1] // n_blocks
        parts, at = self._sums.setdefault(role, {}), part if role in BY_PART else 0
        if at not in parts:
            parts[at] = np.zeros((n_blocks, m, m), np.float32)
        for i, block in enumerate(parts[at]):
            g = np.ascontiguousarray(gradients[:, i * m : (i + 1) * m], np.float32)
            product(g.T, g, block)

    def arrays(self, n_tokens: int) -> dict[str, NDArray[np.float16]]:
        """(n_blocks, m, m) by role, those of parts one after the other; each block's mean diagonal is 1. Few tokens
        tell little of what lies off the diagonal: less of it.
        """
        return {
            role: np.concatenate([_kept(parts[at], n_tokens) for at in sorted(parts)])
            for role, parts in self._sums.items()
        }


def _kept(blocks: F32, n_tokens: int) -> NDArray[np.float16]:
    """Zeros where no gradient came."""
    out = np.zeros(blocks.shape, np.float16)
    share = prior_share(blocks.shape[1], n_tokens, PRIOR_TOKENS)
    for block, kept in zip(blocks, out, strict=True):
        mean = float(block.diagonal().mean(dtype=np.float64))
        if mean > 0:
            kept[...] = block * np.float32((1 - share) / mean)
            np.fill_diagonal(kept, block.diagonal() / mean)
    return out


class Outputs:
    """One layer's. arrays: as OutputSums gave them; scales: by what a fold multiplies rows, (n_row,) or
    (n_part, n_row), by role. Threads may share it.
    """

    def __init__(self, arrays: Mapping[str, NDArray[np.float16]], scales: Mapping[str, F32] | None = None) -> None:
        self._arrays, self._scales = arrays, scales or {}
        self._last: tuple[str, int] | None = None
        self._made: Rows | None = None
        self._lock = threading.Lock()

    def rows(self, role: str, part: int) -> Rows | None:
        """Of a part; None where nothing is known, or it cannot be used."""
        if role not in self._arrays:
            return None
        key = role, part if role in BY_PART else 0
        with self._lock:
            if self._last != key:
                self._made = None  # its memory first
                self._last, self._made = key, self._make(*key)
            return self._made

    def share(self, role: str) -> float:
        """Of a tensor's loss, that the rows leave of it."""
        parts = range(len(self._arrays[role]) if role in BY_PART and role in self._arrays else 1)
        made = [self.rows(role, part) for part in parts]
        return float(np.mean([1.0 if rows is None else rows.share for rows in made]))

    def _make(self, role: str, at: int) -> Rows | None:
        blocks = self._arrays[role]
        own = (blocks[at : at + 1] if role in BY_PART else blocks).astype(np.float32)
        if role in self._scales:
            scale = self._scales[role] if self._scales[role].ndim == 1 else self._scales[role][at]
            own /= np.outer(scale, scale)
        try:
            return Rows(own)
        except np.linalg.LinAlgError:
            return None
