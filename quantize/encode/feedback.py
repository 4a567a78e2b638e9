"""feedback.py: encoding under an input covariance H, so that a matrix's outputs change least: tr(dW H dW^T) is lowered.

The columns are chosen one after the other and the error of each is carried on to those after it, as in GPTQ (Frantar et
al., 2022), here through H's own factor: H = M diag(v) M^T with a unit upper triangle M, so that a row's loss is
sum_j v_j (e_j + sum_{i<j} e_i M_ij)^2. Scales and codes of 256 columns are searched together (cext/encode), on the
targets that the columns before have left; a second sweep goes over all blocks again, under the errors of all others.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
from gguf.constants import GGMLQuantizationType as Type
from numpy.typing import NDArray

from cext import _engine
from quantize.base.blas import by_pieces, by_rows, pieces, product, spread
from quantize.encode.factor import BLOCK, Factor, damped, unit_upper

F32 = NDArray[np.float32]
Sweep = tuple[bool, F32, F32, F32, F32]  # as cext/encode/encode.h takes it: all, carry, cov, tri, var

TYPES = (
    Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0, Type.IQ4_NL,
    Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K, Type.IQ4_XS,
    Type.IQ2_XXS, Type.IQ2_XS, Type.IQ2_S, Type.IQ3_XXS, Type.IQ3_S,
)  # fmt: skip
# Wider inputs get one covariance for each so many channels, and none between them: 16,384 channels would take 1 GB, and
# as much again to factor.
MAX_WIDTH = 6144
# Added to the diagonal, as a share of its mean. More calibrated output error, less of it elsewhere.
DAMPING = 0.02
# Sequential calibration: what inputs lack is made up for in full only as far as it repeats itself on other text.
CORRECTION, CORRECTION_DAMPING = 0.5, 0.05
ROUNDS, POLISH = 2, 4  # of cext/encode: how hard to search in each block
SWEEPS = 2  # the second takes another 2 to 3 % off the error of correlated inputs


def chunks(n: int) -> list[slice]:
    """The runs of channels that have a covariance each: whole blocks, of even widths."""
    n_chunks = -(-n // MAX_WIDTH)
    width = -(-n // (n_chunks * BLOCK)) * BLOCK
    return [slice(start, min(start + width, n)) for start in range(0, n, width)]


def gram(x: F32, onto: list[F32] | None = None) -> list[F32]:
    """x^T x for inputs x (m, n), a matrix for each chunk; added to those in onto, where there are any."""
    out = [np.zeros((c.stop - c.start,) * 2, np.float32) for c in chunks(x.shape[1])] if onto is None else onto
    for c, total in zip(chunks(x.shape[1]), out, strict=True):
        _add_square(total, np.ascontiguousarray(x[:, c]))
    return out


def _add_square(total: F32, x: F32) -> None:
    """x^T x, piece by piece, half of it mirrored."""
    runs = pieces(x.shape[1])

    def multiply(rows: slice, columns: slice) -> None:
        total[rows, columns] += x[:, rows].T @ x[:, columns]
        if rows is not columns:
            total[columns, rows] = total[rows, columns].T

    spread([partial(multiply, a, b) for i, a in enumerate(runs) for b in runs[i:]])


@dataclass(frozen=True, eq=False)
class Covariance:
    """E[x x^T] of a matrix's inputs x, a square for each of chunks(n). The scale does not matter.

    Where x has drifted from the original's x + d: drift E[x d^T] (n, n); and where a matrix of n_row rows shall make up
    for what its output lacks, r: residual E[x r^T] (n, n_row), both on the same scale.
    """

    blocks: tuple[F32, ...]
    drift: F32 | None = None
    residual: F32 | None = None

    @classmethod
    def of(cls, x: F32) -> Covariance:
        """Of inputs x (m, n)."""
        return cls(tuple(gram(x)))

    @property
    def n(self) -> int:
        """Channels."""
        return sum(len(block) for block in self.blocks)

    @cached_property
    def mean(self) -> float:
        """The mean square of a channel."""
        return float(sum(np.trace(block, dtype=np.float64) for block in self.blocks) / self.n)

    def blend(self, other: Covariance, share: float) -> Covariance:
        """(1 - share) of this and share of the other, of equal mean."""
        if other.mean <= 0:
            return self
        if self.mean <= 0:
            return other
        mine, theirs = np.float32((1 - share) / self.mean), np.float32(share / other.mean)
        drift = None
        if self.drift is not None:
            drift = self.drift * mine if other.drift is None else _mixed(self.drift, mine, other.drift, theirs)
        pairs = zip(self.blocks, other.blocks, strict=True)
        return Covariance(tuple(_mixed(a, mine, b, theirs) for a, b in pairs), drift)

    def diagonal_blend(self, share: float) -> Covariance:
        """(1 - share) of what lies off the diagonal."""
        blocks = []
        for block in self.blocks:
            out = block * np.float32(1 - share)
            np.fill_diagonal(out, block.diagonal())
            blocks.append(out)
        drift, residual = (None if x is None else x * np.float32(1 - share) for x in (self.drift, self.residual))
        return Covariance(tuple(blocks), drift, residual)

    def scaled(self, factor: F32) -> Covariance:
        """Of the inputs times factor (n,)."""
        runs = chunks(self.n)
        blocks = tuple(b * np.outer(factor[c], factor[c]) for b, c in zip(self.blocks, runs, strict=True))
        drift = None if self.drift is None else self.drift * np.outer(factor, factor)
        residual = None if self.residual is None else self.residual * factor[:, None]
        return Covariance(blocks, drift, residual)

    def corrected(self, rows: F32) -> F32:
        """rows (n_row, n) moved towards those that give, of x, what they gave of x + d, and r."""
        if (self.drift is None and self.residual is None) or not np.isfinite(self.mean) or self.mean <= 0:
            return rows
        wanted = np.zeros((self.n, len(rows)), np.float32) if self.drift is None else by_pieces(self.drift, rows)
        if self.residual is not None:
            wanted += self.residual
        wanted *= np.float32(CORRECTION / self.mean)
        try:
            if "damped" not in self.__dict__:  # gate and up share it
                self.__dict__["damped"] = Factor(damped(self.blocks[0], self.mean, CORRECTION_DAMPING))
            moved: F32 = self.__dict__["damped"].solve(wanted)
        except np.linalg.LinAlgError:
            return rows
        if not np.isfinite(moved).all():
            return rows
        moved += rows
        return moved

    @classmethod
    def even(cls, n: int) -> Covariance:
        """Of inputs that are alike and not correlated: what is left is the search for scales."""
        return cls(tuple(np.eye(c.stop - c.start, dtype=np.float32) for c in chunks(n)))

    @property
    def sweeps(self) -> list[list[Sweep]] | None:
        """What the encoder needs, for each chunk. None where there is nothing to go by: no inputs, or not finite."""
        made: list[list[Sweep]] | None = self.prepared().__dict__["made"]
        return made

    def prepared(self) -> Covariance:
        """This, with its sweeps made, on all cores: before threads share it. Kept by hand: cached_property has one lock
        for all covariances up to Python 3.11, and threads make many at once.
        """
        if "made" not in self.__dict__:
            self.__dict__["made"] = self._make_sweeps()
        return self

    def _make_sweeps(self) -> list[list[Sweep]] | None:
        if not np.isfinite(self.mean) or self.mean <= 0:
            return None
        try:
            return [_sweeps(damped(block, self.mean, DAMPING)) for block in self.blocks]
        except np.linalg.LinAlgError:
            return None


def _mixed(a: F32, mine: np.float32, b: F32, theirs: np.float32) -> F32:
    out = np.empty_like(a)

    def fill(rows: slice) -> None:
        np.multiply(a[rows], mine, out=out[rows])
        out[rows] += b[rows] * theirs

    by_rows(fill, len(a))
    return out


class Sums:
    """Running sums of a covariance over inputs that come some at a time."""

    def __init__(self) -> None:
        self._gram: list[F32] = []
        self._drift: F32 | None = None
        self._residual: F32 | None = None

    def add(self, x: F32, missing: F32 | None = None, residual: F32 | None = None) -> None:
        """Inputs x (m, n), what they lack (m, n), and what the outputs lack (m, n_row)."""
        self._gram = gram(x, self._gram or None)
        if missing is not None and len(self._gram) == 1:
            self._drift = product(x.T, missing, self._drift)
        if residual is not None and len(self._gram) == 1:
            self._residual = product(x.T, residual, self._residual)

    def done(self) -> Covariance:
        return Covariance(tuple(self._gram), self._drift, self._residual)


def _sweeps(h: F32) -> list[Sweep]:
    """First sweep, under the errors of the blocks before; second, under those of all others."""
    n = len(h)
    factor = Factor(h)
    first = (False, factor.above, *_tables(n))
    spread([partial(_fill_first, factor, i, first) for i in range(len(factor.blocks))])
    if len(factor.blocks) == 1:
        return [first]
    second = (True, np.empty((n, n), np.float32), *_tables(n))
    spread([partial(_fill_second, h, at, second) for at in factor.blocks])
    return [first, second][:SWEEPS]


def _fill_first(factor: Factor, i: int, sweep: Sweep) -> None:
    """carry: the factor's own columns, which this takes over."""
    _, carry, cov, tri, var = sweep
    at, inner = factor.blocks[i], factor.inner[i]
    v = factor.v[at]
    carry[: at.start, at] = carry[: at.start, at] @ factor.inverse[i]
    cov[at, : len(v)], tri[at, : len(v)], var[at] = (inner * v) @ inner.T, inner, v


def _fill_second(h: F32, at: slice, sweep: Sweep) -> None:
    _, carry, cov, tri, var = sweep
    block = h[at, at].astype(np.float64)
    np.matmul(h[:, at], np.linalg.inv(block).astype(np.float32), out=carry[:, at])
    carry[at, at] = 0
    cov[at, : len(block)] = block
    tri[at, : len(block)], var[at] = unit_upper(block)


def _tables(n: int) -> tuple[F32, F32, F32]:
    return np.zeros((n, BLOCK), np.float32), np.zeros((n, BLOCK), np.float32), np.ones(n, np.float32)


def encode_rows(rows: F32, type_: Type, sweeps: list[Sweep], out: NDArray[np.uint8]) -> None:
    """rows (r, n) contiguous -> out (r, row_bytes). ValueError where a value is not finite."""
    _engine.encode(int(type_), rows, len(rows), rows.shape[1], sweeps, ROUNDS, POLISH, out)
