"""awq.py: activation-aware scaling. Which inputs of a layer may be rescaled for free, and whether it pays.

Multiplying a matrix's input channels by s and dividing what comes before them by s changes nothing in exact arithmetic,
but gives salient channels more of the quantiser's grid. GROUPS lists every such fold of this architecture; all of them
end in tensors that the GGUF has anyway. A fold is searched with ggml's encoder of the target type, importance weights
on, and kept only if it lowers the output error of the encoder that the file is written with, on tokens that the search
did not see.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from gguf.constants import GGMLQuantizationType as Type
from numpy.typing import NDArray

from quantize.encode.encoder import FLOAT_TYPES, Encoder
from quantize.encode.feedback import Covariance
from quantize.encode.objective import Objective
from quantize.measure.evidence import Evidence, Last, ReadPart, n_parts
from quantize.source.tensors import Tensor

F32 = NDArray[np.float32]


@dataclass(frozen=True)
class Group:
    """One fold: matrices that share an input, and what divides that input."""

    name: str
    targets: tuple[str, ...]  # their columns are multiplied by s, and their error judges it
    norm: str = ""  # the norm whose weights are divided by s, or
    rows: tuple[str, ...] = ()  # the matrix whose rows are, whichever of these a layer has
    columns_too: tuple[str, ...] = ()  # read the same input but are kept in float32: multiplied, not judged
    rows_too: tuple[str, ...] = ()  # meet the input in their rows, which a block scale follows: multiplied, not judged


GROUPS = (
    Group("attn_norm", ("attn_q", "attn_q_a", "attn_kv_a_mqa", "attn_k", "attn_v"), norm="attn_norm"),
    Group("q_a_norm", ("attn_q_b",), norm="attn_q_a_norm"),
    # Rescales the cached latent too: channels come nearer to each other in size, which an int8 cache likes.
    Group("kv_a_norm", ("attn_v_b",), norm="attn_kv_a_norm", rows_too=("attn_k_b",)),
    Group("v_heads", ("attn_output",), rows=("attn_v_b", "attn_v")),
    Group(
        "ffn_norm",
        ("ffn_gate", "ffn_up", "ffn_gate_exps", "ffn_up_exps", "ffn_gate_shexp", "ffn_up_shexp"),
        norm="ffn_norm",
        columns_too=("ffn_gate_inp",),  # forgetting the router would route wrongly
    ),
    Group("dense_up", ("ffn_down",), rows=("ffn_up",)),
    Group("shared_up", ("ffn_down_shexp",), rows=("ffn_up_shexp",)),
    Group("experts_up", ("ffn_down_exps",), rows=("ffn_up_exps",)),  # each expert has its own s
)
EXPONENTS = tuple(i / 20 for i in range(20))  # s = mean|x|**exponent; 0 is no fold
SCALE_LIMIT = 1e4
# Weights of a matrix that are encoded for each exponent, and to judge the best: rows are independent, so that some
# of them tell, and the ratio of two errors on the same rows and tokens is far steadier than either.
SEARCH_VALUES, JUDGE_VALUES = 1 << 17, 1 << 19
SEARCH_EXPERTS, JUDGE_EXPERTS = 16, 4  # judged with the covariance of each, which takes longer than encoding
SEARCH_TOKENS = 8  # one sampled token in so many is searched with, the others judge
MIN_SAMPLE = 8  # tokens below which an expert's output error is not evidence
MIN_GAIN = 0.02  # of the error: smaller gains are the sample's noise


@dataclass(frozen=True)
class FoldResult:
    """What became of one fold. Errors are relative squared output errors, summed over the targets, on unseen tokens."""

    il: int
    group: str
    exponent: float
    error_before: float
    error_after: float
    kept: bool


@dataclass
class Scales:
    """The factors of one layer's tensors, by role: columns (n,) or (n_part, n), rows (n_row,) or (n_part, n_row)."""

    columns: dict[str, F32] = field(default_factory=dict)
    rows: dict[str, F32] = field(default_factory=dict)
    _last: Last = field(default_factory=Last, init=False, repr=False, compare=False)

    def apply(self, role: str, part: int, values: F32) -> F32:
        """The folded weights of a part: a matrix (n_row, n), or a norm (n,)."""
        columns, rows = self.columns.get(role), self.rows.get(role)
        if columns is not None:
            values = values * (columns if columns.ndim == 1 else columns[part])
        if rows is not None:
            values = values * (rows if rows.ndim == 1 else rows[part])[:, None]
        return values

    def importance(self, role: str, part: int, importance: F32 | None) -> F32 | None:
        """Importance of the folded matrix's columns: its inputs were divided by the columns' factors."""
        columns = self.columns.get(role)
        if columns is None or importance is None:
            return importance
        factor: F32 = columns if columns.ndim == 1 else columns[part]
        return importance / (factor * factor)

    def covariance(self, role: str, part: int, covariance: Covariance | None) -> Covariance | None:
        """Of the folded matrix's inputs, likewise."""
        columns = self.columns.get(role)
        if columns is None or covariance is None:
            return covariance
        factor = columns if columns.ndim == 1 else columns[part]
        return self._last.of((covariance, id(columns)), lambda: covariance.scaled(1.0 / factor))

    def fold(self, group: Group, tensors: Mapping[str, Tensor], scale: F32) -> None:
        """Enter a group's scale: (n,) for one input, (n_expert, n) where every expert has its own."""
        for role in (*group.targets, *group.columns_too):
            if role in tensors:
                self.columns[role] = scale
        if group.norm:
            self.columns[group.norm] = 1.0 / scale
        for role in tensors.keys() & group.rows:
            n_part = n_parts(tensors[role])
            self.rows[role] = 1.0 / (scale if n_part == 1 else scale.reshape(n_part, -1))
        for role in group.rows_too:
            self.rows[role] = scale  # every head's rows are the same channels


def scale_of(magnitude: F32, exponent: float) -> F32:
    """s for mean|x| (n,): its power, with a geometric mean of 1 so that no weight grows on the whole."""
    floor = float(magnitude.max(initial=0.0)) * 1e-4
    if floor == 0.0:
        return np.ones_like(magnitude)
    log = exponent * np.log(np.maximum(magnitude, floor).astype(np.float64))
    scale: F32 = np.clip(np.exp(log - log.mean()), 1 / SCALE_LIMIT, SCALE_LIMIT).astype(np.float32)
    return scale


@dataclass(frozen=True)
class _Probe:
    """Some rows of one part of a target, and some inputs to measure their outputs with."""

    role: str
    part: int
    type: Type
    weights: F32  # (r, n)
    importance: F32 | None  # (n,)
    inputs: F32  # (m, n)

    @cached_property
    def energy(self) -> float:
        """Squared output of the exact rows."""
        return _square(self.inputs @ self.weights.T)


class Searcher:
    """Searches the folds of one sublayer. types: the target type of each tensor, by role."""

    def __init__(self, evidence: Evidence, types: Mapping[str, Type], read: ReadPart, encoder: Encoder) -> None:
        self.evidence = evidence
        self.types = types
        self._read = read
        self._encoder = encoder

    def run(self, il: int, on_group: Callable[[float], None] | None = None) -> tuple[Scales, list[FoldResult]]:
        """All groups that this layer has: the factors of those that paid, and what became of each.

        on_group(fraction done) is called before each.
        """
        scales, results = Scales(), []
        groups = [group for group in GROUPS if self._has(group)]
        for i, group in enumerate(groups):
            if on_group:
                on_group(i / len(groups))
            search, judge = self._probes(group)
            if not search:
                continue
            errors = [self._error(search, exponent) for exponent in EXPONENTS]
            best = EXPONENTS[int(np.argmin(errors))]
            before = self._error(judge, 0.0, fed_back=best > 0)
            after = self._error(judge, best, fed_back=True) if best else before
            kept = after < before * (1 - MIN_GAIN)
            results.append(FoldResult(il, group.name, best, before, after, kept))
            if kept:
                scales.fold(group, self.evidence.tensors, self._scale(group, best))
        return scales, results

    def _has(self, group: Group) -> bool:
        """Whether a layer has its matrices, and a row for each column: heads that share values have fewer."""
        tensors = self.evidence.tensors
        target = next((tensors[role] for role in group.targets if role in tensors), None)
        rows = [tensors[role].size // tensors[role].shape[-1] for role in group.rows if role in tensors]
        if target is None or not group.rows:
            return target is not None
        return rows == [n_parts(target) * target.shape[-1]]

    def _scale(self, group: Group, exponent: float) -> F32:
        role = next(role for role in group.targets if role in self.evidence.tensors)
        if role != "ffn_down_exps":
            return scale_of(self.evidence.magnitude(role, 0), exponent)
        n = n_parts(self.evidence.tensors[role])
        return np.stack([scale_of(self.evidence.magnitude(role, part), exponent) for part in range(n)])

    def _probes(self, group: Group) -> tuple[list[_Probe], list[_Probe]]:
        """What to search with, and what to judge with: more rows, and tokens that the search did not see."""
        search, judge = [], []
        for role in group.targets:
            tensor = self.evidence.tensors.get(role)
            if tensor is None or self.types[role] in FLOAT_TYPES:
                continue
            parts = self._parts(tensor)
            for part in parts:
                weights = self._read(tensor, part)
                n_rows = max(1, min(len(weights), JUDGE_VALUES // (len(parts) * weights.shape[1])))
                rows = weights[np.linspace(0, len(weights) - 1, n_rows).round().astype(int)]
                inputs, importance = self.evidence.sample(role, part), self.evidence.importance(role, part)
                few = rows[:: JUDGE_VALUES // SEARCH_VALUES]
                seen = np.arange(len(inputs)) % SEARCH_TOKENS == 0
                search.append(_Probe(role, part, self.types[role], few, importance, inputs[seen]))
                if part in parts[:: -(-len(parts) // JUDGE_EXPERTS)]:
                    judge.append(_Probe(role, part, self.types[role], rows, importance, inputs[~seen]))
        return search, judge

    def _parts(self, tensor: Tensor) -> list[int]:
        n = n_parts(tensor)
        if n == 1:
            return [0]
        seen = [part for part in range(n) if len(self.evidence.sample(tensor.role, part)) >= MIN_SAMPLE]
        step = -(-len(seen) // SEARCH_EXPERTS) or 1
        return seen[::step]

    def _error(self, probes: list[_Probe], exponent: float, fed_back: bool = False) -> float:
        """Relative squared output error, summed over the roles so that each matrix counts alike. fed_back: of the
        encoder that the file will be written with, under the inputs' covariance where there is one.
        """
        error: dict[str, float] = {}
        energy: dict[str, float] = {}
        for probe in probes:
            scale = scale_of(self.evidence.magnitude(probe.role, probe.part), exponent)
            importance = None if probe.importance is None else probe.importance / (scale * scale)
            covariance = self.evidence.covariance(probe.role, probe.part) if fed_back else None
            folded = covariance.scaled(1.0 / scale) if covariance is not None else None
            data = self._encoder.encode(probe.weights * scale, probe.type, Objective(importance, folded))
            dw = self._encoder.decode(data, probe.type, len(scale)) / scale - probe.weights
            error[probe.role] = error.get(probe.role, 0.0) + _square(probe.inputs @ dw.T)
            energy[probe.role] = energy.get(probe.role, 0.0) + probe.energy
        return sum(error[role] / energy[role] for role in error if energy[role] > 0)


def _square(values: F32) -> float:
    return float(np.square(values).sum(dtype=np.float64))
