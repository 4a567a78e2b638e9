"""outputs.py: covariances G = E[g g^T] of the gradients g at a matrix's outputs, which encode/rows.py follows.

G comes from the survey's backward pass. Attention's matrices and the downs have one; gates and ups of experts, whose
hidden channels hardly share gradients, would gain 4 to 8 % of their loss and have the most of them to keep.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from quantize.base.blas import product
from quantize.encode.rows import Rows
from quantize.measure.evidence import prior_share
from quantize.measure.gradients import Floats
from quantize.source.arch import Arch

F32 = NDArray[np.float32]

BY_PART = ("attn_k_b", "attn_v_b")  # heads with outputs of their own; experts share theirs
BY_HEAD = ("attn_q", "attn_q_b", "attn_k", "attn_v")  # a matrix of all heads, whose outputs meet in none
ROLES = (*BY_PART, *BY_HEAD, "attn_q_a", "attn_kv_a_mqa", "attn_output", "ffn_down", "ffn_down_shexp", "ffn_down_exps")
# At which a block's gradients weigh as much as none off the diagonal, in tokens a row. The survey has few: with 4 a
# row (V2-Lite's residual stream) 0.1 would lose 3 % of a down's loss, this gains 5 to 10 of the 15 that many tokens do.
PRIOR_TOKENS = 2.0


class OutputSums:
    """Sums of g g^T over the survey's tokens, part by part: ``visit`` takes what backward.Visit does."""

    def __init__(self, arch: Arch) -> None:
        self._arch = arch
        self._sums: dict[str, dict[int, F32]] = {}

    def visit(self, role: str, part: int, gradients: Floats) -> None:
        """gradients (n_tokens, n_row) at a part's output."""
        if role not in ROLES:
            return
        n_blocks = self._heads(role) if role in BY_HEAD else 1
        m = gradients.shape[1] // n_blocks
        parts, at = self._sums.setdefault(role, {}), part if role in BY_PART else 0
        if at not in parts:
            parts[at] = np.zeros((n_blocks, m, m), np.float32)
        for i, block in enumerate(parts[at]):
            g = np.ascontiguousarray(gradients[:, i * m : (i + 1) * m], np.float32)
            product(g.T, g, block)

    def _heads(self, role: str) -> int:
        return self._arch.n_head_kv if role in ("attn_k", "attn_v") else self._arch.n_head

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
        g = (blocks[at : at + 1] if role in BY_PART else blocks).astype(np.float32)
        if role in self._scales:
            scale = self._scales[role] if self._scales[role].ndim == 1 else self._scales[role][at]
            scale = scale.reshape(len(g), -1)  # the blocks' rows follow one another
            g /= scale[:, :, None] * scale[:, None, :]
        try:
            return Rows(g)
        except np.linalg.LinAlgError:
            return None
