"""sensitivity.py: what a matrix in a type would cost, in nats a token, from one backward pass over survey text.

A perturbation dW of a matrix that is fed x_t and whose output has the gradient g_t of token losses sampled from the
model's own distribution raises the KL divergence by 1/2 E[(g_t . dW x_t)^2] a token (the Fisher information; no label
of the text is used). dW comes from the real encoder, on a sample of rows, which add up as 1/2 E[g_tr^2 (dw_r x_t)^2]
over their chance of being in the sample; that is larger where gradients are. The product is taken token by token: from
means over tokens, E[g_r^2] dw_r H dw_r, the first experts' downs come out at half of it.

Where the file will be written with error feedback, a cost is what feedback leaves of it on inputs that it was not
fitted to: it takes a third off K-quants of correlated inputs and little off grid types, which changes who wins.

The second gradient, of what routers lose, goes through the same sums: see flips.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Type
from numpy.typing import NDArray

from quantize.backward import Floats
from quantize.encode import FED_BACK, NEED_IMPORTANCE, Encoder
from quantize.evidence import prior_share
from quantize.feedback import Covariance

F32 = NDArray[np.float32]

FISHER, ROUTING = 0, 1  # the two gradients, in this order wherever they are stacked
N_GRADIENTS = 2
# What tensors may become, those with faster kernels first among equals (a near tie at no more bytes goes to the first).
CANDIDATES = (
    Type.Q4_K, Type.Q5_K, Type.Q6_K, Type.Q8_0, Type.Q3_K, Type.Q2_K, Type.IQ4_XS, Type.IQ4_NL,
    Type.IQ3_S, Type.IQ3_XXS, Type.IQ2_S, Type.IQ2_XS, Type.IQ2_XXS, Type.BF16,
)  # fmt: skip
# For rows that 256 does not divide. What 32 does not divide either stays in 16 bits.
SMALL_BLOCKS = (Type.Q4_0, Type.IQ4_NL, Type.Q5_0, Type.Q5_1, Type.Q8_0, Type.BF16)
SAMPLED_VALUES = 1 << 18  # of a tensor, encoded in every type: 2 % of V2-Lite's weights, 0.3 % of V2's
MIN_ROWS = 2  # of a part
FEEDBACK_ROWS = 16  # of a part's sampled rows, encoded once more to see what feedback leaves
MIN_FEEDBACK_TOKENS = 64  # below which a part's inputs do not tell
PRIOR_TOKENS = 64  # at which a part's own input statistics weigh as much as even ones


@dataclass(frozen=True)
class Cost:
    """Of one tensor in one type: the two sums of allocate.Choice."""

    fisher: float
    routing: float


def candidates(n: int, types: Sequence[Type], weighted: bool = True) -> tuple[Type, ...]:
    """Of types, those for rows of n values; some cannot be encoded without importance weights."""
    fitting = SMALL_BLOCKS if n % 256 else CANDIDATES
    allowed = (t for t in fitting if t in types and (weighted or t not in NEED_IMPORTANCE))
    return tuple(t for t in allowed if n % GGML_QUANT_SIZES[t][0] == 0)


def pick_rows(mass: NDArray[np.float64], n: int) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """About n rows, each with probability in proportion to its mass, spread evenly; and those probabilities.

    Rows so heavy that they are certain have probability 1; rows without mass are left out. Deterministic.
    """
    chance = np.zeros(len(mass))
    open_ = mass > 0
    while open_.any():  # what certain rows leave is shared out again
        share = mass[open_] * (n - np.count_nonzero(chance == 1)) / mass[open_].sum()
        certain = np.flatnonzero(open_)[share >= 1]
        if len(certain) == 0:
            chance[open_] = share
            break
        chance[certain] = 1
        open_[certain] = False
    steps = np.floor(np.cumsum(chance) + 0.5 + 1e-9)
    rows = np.flatnonzero(np.diff(steps, prepend=0.0) > 0)
    return rows, chance[rows]


@dataclass
class CostMeter:
    """Sums the costs of one layer's tensors as their parts come by; ``visit`` is backward.Visit.

    n_tokens: of the survey. n_parts: (role) -> parts of that tensor. types: that tensors may become.
    feedback: whether the file's encoder feeds errors back.
    """

    encoder: Encoder
    n_tokens: int
    n_parts: Callable[[str], int]
    types: Sequence[Type]
    sampled_values: int = SAMPLED_VALUES
    feedback: bool = False
    costs: dict[str, dict[Type, Cost]] = field(default_factory=dict)

    def visit(self, role: str, part: int, weights: Floats, inputs: Floats, gradients: Floats) -> None:
        """One part of a tensor: a sample of its rows in every type, and the noise that each makes."""
        squares = np.einsum("gtr,gtr->gr", gradients, gradients, dtype=np.float64)
        rows, chance = pick_rows(row_mass(squares, weights), self.n_rows(role, weights.shape[1]))
        if len(rows) == 0:
            return
        square = np.square(gradients[:, :, rows])
        self.add(role, weights[rows], inputs, chance, lambda e: np.einsum("gtr,tr->gr", square, np.square(e)))

    def n_rows(self, role: str, n: int) -> int:
        """Rows to sample of one part."""
        return max(MIN_ROWS, self.sampled_values // n // self.n_parts(role))

    def add(
        self,
        role: str,
        rows: Floats,
        inputs: Floats,
        chance: NDArray[np.float64],
        damage: Callable[[Floats], NDArray[np.float64]],
    ) -> None:
        """damage: output errors (m, n_row) -> twice the cost of each row, (n_gradients, n_row), summed over tokens."""
        rows = np.ascontiguousarray(rows)
        importance = _importance(inputs)
        some = slice(None, None, -(-len(rows) // FEEDBACK_ROWS))
        fitted = _fitted(inputs[::2]) if self.feedback and len(inputs) >= MIN_FEEDBACK_TOKENS else None
        for type_, error in self.errors(role, rows, importance):
            twice = damage(inputs @ error.T) @ (1 / chance)
            if fitted is not None:
                twice *= self.left(type_, rows[some], error[some], inputs[1::2], fitted)
            self.record(role, type_, twice)

    def left(self, type_: Type, rows: F32, error: F32, inputs: Floats, fitted: Covariance) -> float:
        """The share of an encoding's squared output error on the inputs that stays under feedback fitted to others."""
        before = float(np.square(inputs @ error.T).sum(dtype=np.float64))
        if before == 0 or type_ not in FED_BACK:
            return 1.0
        data = self.encoder.encode(rows, type_, None, fitted)
        error = self.encoder.decode(data, type_, rows.shape[1]) - rows
        return min(1.0, float(np.square(inputs @ error.T).sum(dtype=np.float64)) / before)

    def errors(self, role: str, rows: F32, importance: F32 | None) -> Iterator[tuple[Type, F32]]:
        """What encoding adds to the rows, in every type."""
        for type_ in candidates(rows.shape[1], self.types, importance is not None):
            data = self.encoder.encode(rows, type_, importance)
            yield type_, self.encoder.decode(data, type_, rows.shape[1]) - rows

    def record(self, role: str, type_: Type, twice: NDArray[np.float64]) -> None:
        """Add sums of squares over tokens, (n_gradients,)."""
        mine = self.costs.setdefault(role, {})
        before = mine.get(type_, Cost(0.0, 0.0))
        half = 0.5 / self.n_tokens
        mine[type_] = Cost(before.fisher + half * float(twice[FISHER]), before.routing + half * float(twice[ROUTING]))


def row_mass(squares: NDArray[np.float64], weights: Floats) -> NDArray[np.float64]:
    """How much each row may matter, (n_row,), from every gradient's sums of squares (n_gradients, n_row)."""
    total = squares.sum(-1, keepdims=True)
    shares = np.divide(squares, total, out=np.zeros_like(squares), where=total > 0).sum(0)
    mass: NDArray[np.float64] = shares * np.einsum("rn,rn->r", weights, weights, dtype=np.float64)
    return mass


def _fitted(inputs: Floats) -> Covariance:
    """The covariance that an encoder would be given of these inputs (m, n)."""
    m, n = inputs.shape
    return Covariance.of(np.ascontiguousarray(inputs, np.float32)).diagonal_blend(prior_share(n, m))


def _importance(inputs: Floats) -> F32:
    """(n,) mean x^2 of the inputs, drawn towards even where they are few."""
    total = np.square(inputs).sum(0, dtype=np.float64)
    weights: F32 = (total + PRIOR_TOKENS * total.mean() / len(inputs)).astype(np.float32)
    return weights
