"""report.py: what a run says about itself while it works and when it is done. Plain data; nothing is printed here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf.constants import GGMLQuantizationType as Type

from quantize.awq import FoldResult
from quantize.tensors import Tensor


@dataclass(frozen=True)
class RoleSize:
    """All tensors of one role ("ffn_down_exps") together."""

    role: str
    types: tuple[str, ...]  # as in "Q4_K", most bytes first
    n_values: int
    nbytes: int

    @property
    def bits_per_weight(self) -> float:
        """Bits of the file for each value."""
        return 8 * self.nbytes / self.n_values


@dataclass(frozen=True)
class Coverage:
    """How many calibration tokens each expert of one layer saw."""

    il: int
    counts: tuple[int, ...]
    few: int  # experts below the floor, whose statistics were blended with the layer's


@dataclass(frozen=True)
class Report:
    """A finished run."""

    path: Path
    recipe: str
    nbytes: int  # of the file
    source_nbytes: int  # of the checkpoint's tensors
    n_values: int
    roles: tuple[RoleSize, ...]  # most bytes first
    folds: tuple[FoldResult, ...]
    coverage: tuple[Coverage, ...]
    calibration_tokens: int  # 0 where none were used
    calibration_sources: tuple[str, ...]
    calibration_sha256: str
    left_out: tuple[str, ...]  # checkpoint tensors that GGUF has no use for (multi-token prediction layers)
    notes: tuple[str, ...]  # what a person should know, one sentence each
    seconds: float

    @property
    def bits_per_weight(self) -> float:
        """Bits of the file for each value, headers included."""
        return 8 * self.nbytes / self.n_values


def role_sizes(tensors: Iterable[tuple[Tensor, Type, int]]) -> tuple[RoleSize, ...]:
    """Sizes by role of (tensor, type, bytes), most bytes first."""
    values: dict[str, int] = {}
    by_type: dict[str, dict[str, int]] = {}
    for tensor, type_, n in tensors:
        values[tensor.role] = values.get(tensor.role, 0) + tensor.size
        sizes = by_type.setdefault(tensor.role, {})
        sizes[type_.name] = sizes.get(type_.name, 0) + n
    roles = [
        RoleSize(role, tuple(sorted(sizes, key=lambda t: -sizes[t])), values[role], sum(sizes.values()))
        for role, sizes in by_type.items()
    ]
    return tuple(sorted(roles, key=lambda r: -r.nbytes))


def coverage_notes(coverage: Iterable[Coverage], floor: int) -> list[str]:
    """A sentence about starved experts, or none."""
    layers = [c for c in coverage if c.few]
    if not layers:
        return []
    few = sum(c.few for c in layers)
    least = min(min(c.counts) for c in layers)
    return [
        f"{few} experts in {len(layers)} layers saw fewer than {floor} calibration tokens (the least {least}); "
        "their statistics were blended with their layer's: more calibration text would help them"
    ]


def coverage_of(il: int, counts: np.ndarray, floor: int) -> Coverage:
    """From the (n_expert,) token counts of layer il."""
    return Coverage(il, tuple(int(n) for n in counts), int((counts < floor).sum()))
