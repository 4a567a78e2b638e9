"""sensitivity.py: what a matrix in a type would cost, in nats a token, from one backward pass over survey text.

A perturbation dW of a matrix whose input is x_t and whose output has the gradient g_t of token losses sampled from the
model's own distribution raises the KL divergence by 1/2 E[(g_t . dW x_t)^2] a token (the Fisher information; no label
of the text is used). dW comes from the real encoder, on a sample of rows, which add up as 1/2 E[g_tr^2 (dw_r x_t)^2]
over their chance of being in the sample; that is larger where gradients are. The product is taken token by token: from
means over tokens, E[g_r^2] dw_r H dw_r, the first experts' downs come out at half of it.

Where the file will be written with error feedback, a cost is what feedback leaves of it on inputs that it was not
fitted to: it takes a third off K-quants of correlated inputs and little off grid types, which changes who wins. That
share is measured on some parts of a tensor and taken for all of them.

Of many experts some are looked at, each with a chance in proportion to what the tokens that chose it may lose.

The second gradient, of what routers lose, goes through the same sums: see flips.py.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Type
from numpy.typing import NDArray

from quantize.base.blas import spread
from quantize.encode.encoder import FED_BACK, GRID_TYPES, NEED_IMPORTANCE, Encoder
from quantize.encode.feedback import Covariance
from quantize.encode.objective import Objective
from quantize.measure.evidence import prior_share
from quantize.measure.gradients import Floats

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
SAMPLED_VALUES = 1 << 17  # of a tensor, encoded in every type: 0.5 % of V2-Lite's weights
SAMPLED_EXPERTS = 16  # of a layer
MIN_ROWS = 2  # of a part
MAX_TOKENS = 2048  # that the outputs of a part's rows are compared on
FEEDBACK_ROWS, FEEDBACK_PARTS = 16, 4  # sampled rows of parts that are encoded once more to see what feedback leaves
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


def pick_experts(mass: NDArray[np.float64]) -> NDArray[np.float64]:
    """The chance of each expert (n_expert,) to be looked at, 0 where it is not: all of a few, some of many. mass
    (n_gradients, n_expert): the most that leaving out each may cost.
    """
    picked, chance = pick_rows(_shares(mass), SAMPLED_EXPERTS)
    out = np.zeros(mass.shape[1])
    out[picked] = chance
    return out


@dataclass
class _Sums:
    """Of one tensor in one type."""

    twice: NDArray[np.float64]  # (n_gradients,) twice the plain encoder's cost, summed over tokens
    plain: float = 0.0  # squared output errors of some rows, and what feedback leaves of them
    left: float = 0.0


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
    _sums: dict[str, dict[Type, _Sums]] = field(default_factory=dict)
    _n_fed_back: Counter[str] = field(default_factory=Counter)
    # The last inputs' covariance, which goes when they do: gate's are up's too, a down's are large.
    _fitted: tuple[weakref.ref[Floats], Covariance] | None = None

    @property
    def costs(self) -> dict[str, dict[Type, Cost]]:
        """By role."""
        half = 0.5 / self.n_tokens
        out: dict[str, dict[Type, Cost]] = {}
        for role, types in self._sums.items():
            for type_, sums in types.items():
                share = min(1.0, sums.left / sums.plain) if sums.plain > 0 else 1.0
                fisher, routing = (half * share * sums.twice).tolist()
                out.setdefault(role, {})[type_] = Cost(fisher, routing)
        return out

    def visit(self, role: str, part: int, weights: Floats, inputs: Floats, gradients: Floats) -> None:
        """One part of a tensor: a sample of its rows in every type, and the noise that each makes."""
        squares = np.stack([np.einsum("tr,tr->r", g, g) for g in gradients]).astype(np.float64)
        rows, chance = pick_rows(row_mass(squares, weights), self.n_rows(role, weights.shape[1]))
        if len(rows):
            self.add(role, weights[rows], inputs, chance, lambda tokens: np.square(gradients[:, tokens][:, :, rows]))

    def n_rows(self, role: str, n: int) -> int:
        """Rows to sample of one part."""
        n_parts = self.n_parts(role)
        return max(MIN_ROWS, self.sampled_values // n // (min(n_parts, SAMPLED_EXPERTS)))

    def add(
        self,
        role: str,
        rows: Floats,
        inputs: Floats,
        chance: NDArray[np.float64],
        square: Callable[[slice], Floats],
    ) -> None:
        """square: some tokens -> the squared gradients at the rows' outputs for these, (n_gradients, m, n_row)."""
        rows = np.ascontiguousarray(rows, np.float32)
        step = -(-len(inputs) // MAX_TOKENS)
        met = np.ascontiguousarray(inputs[::step])
        weights = (square(slice(None, None, step)) * (step / chance).astype(np.float32)).reshape(N_GRADIENTS, -1)
        some = slice(None, None, -(-len(rows) // FEEDBACK_ROWS))
        unseen = inputs[1 :: 2 * step]
        importance, fitted = _importance(inputs), self._covariance(role, inputs)
        found: dict[Type, _Sums] = {}

        def price(type_: Type) -> None:
            error = self._error(rows, type_, importance)
            output_error = met @ error.T
            np.square(output_error, out=output_error)
            twice = (weights @ output_error.reshape(-1)).astype(np.float64)
            fed_back = fitted if type_ in FED_BACK else None
            found[type_] = _Sums(twice, *self._left(type_, rows[some], error[some], unseen, fed_back))

        types = self._candidates(rows, importance)
        # A type at a time on each core: of so few rows not even one encoder has work for all.
        spread([partial(price, type_) for type_ in sorted(types, key=lambda type_: type_ not in GRID_TYPES)])
        for type_ in types:
            self._add(role, type_, found[type_])

    def _covariance(self, role: str, inputs: Floats) -> Covariance | None:
        """The covariance H of half of these inputs, as an encoder would have it; None where it would have none."""
        if not self.feedback or len(inputs) < MIN_FEEDBACK_TOKENS or self._n_fed_back[role] == FEEDBACK_PARTS:
            return None
        self._n_fed_back[role] += 1
        if self._fitted is None or self._fitted[0]() is not inputs:
            half = inputs[::2].astype(np.float32, copy=False)
            share = prior_share(half.shape[1], len(half))
            self._fitted = weakref.ref(inputs, self._forget), Covariance.of(half).diagonal_blend(share).prepared()
        return self._fitted[1]

    def _forget(self, inputs: weakref.ref[Floats]) -> None:
        if self._fitted is not None and self._fitted[0] is inputs:
            self._fitted = None

    def _left(
        self, type_: Type, rows: F32, error: F32, inputs: Floats, fitted: Covariance | None
    ) -> tuple[float, float]:
        """Squared output errors of rows on inputs: the plain encoder's, and those under feedback fitted to others."""
        if fitted is None:
            return 0.0, 0.0
        fed_back = self._error(rows, type_, None, fitted)
        plain, left = (np.square(inputs @ e.T).sum(dtype=np.float64) for e in (error, fed_back))
        return float(plain), float(left)

    def errors(self, rows: F32, importance: F32 | None, fitted: Covariance | None = None) -> Iterator[tuple[Type, F32]]:
        """What encoding adds to the rows, in every type."""
        for type_ in self._candidates(rows, importance):
            yield type_, self._error(rows, type_, importance, fitted)

    def _candidates(self, rows: F32, importance: F32 | None) -> tuple[Type, ...]:
        return candidates(rows.shape[1], self.types, importance is not None)

    def _error(self, rows: F32, type_: Type, importance: F32 | None, fitted: Covariance | None = None) -> F32:
        data = self.encoder.encode(rows, type_, Objective(importance, fitted))
        return self.encoder.decode(data, type_, rows.shape[1]) - rows

    def record(self, role: str, type_: Type, twice: NDArray[np.float64]) -> None:
        """Add sums of squares over tokens, (n_gradients,)."""
        self._add(role, type_, _Sums(twice))

    def _add(self, role: str, type_: Type, more: _Sums) -> None:
        mine = self._sums.setdefault(role, {}).setdefault(type_, _Sums(np.zeros(N_GRADIENTS)))
        mine.twice += more.twice
        mine.plain += more.plain
        mine.left += more.left


def row_mass(squares: NDArray[np.float64], weights: Floats) -> NDArray[np.float64]:
    """How much each row may matter, (n_row,), from every gradient's sums of squares (n_gradients, n_row)."""
    mass: NDArray[np.float64] = _shares(squares) * np.einsum("rn,rn->r", weights, weights, dtype=np.float64)
    return mass


def _shares(squares: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n,) the sum of every gradient's shares (n_gradients, n)."""
    total = squares.sum(-1, keepdims=True)
    shares: NDArray[np.float64] = np.divide(squares, total, out=np.zeros_like(squares), where=total > 0).sum(0)
    return shares


def _importance(inputs: Floats) -> F32:
    """(n,) mean x^2 of the inputs, drawn towards even where they are few."""
    total = np.square(inputs).sum(0, dtype=np.float64)
    weights: F32 = (total + PRIOR_TOKENS * total.mean() / len(inputs)).astype(np.float32)
    return weights
