"""report.py: what a run says about itself while it works and when it is done. Plain data; nothing is printed here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType as Type

from quantize.measure.awq import FoldResult
from quantize.measure.loss import TensorLoss
from quantize.measure.score import Distance
from quantize.source.tensors import Tensor


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
    """A finished file: what it is, how far it is from the original, and how it was made."""

    path: Path
    recipe: str
    nbytes: int  # of the file
    source_nbytes: int  # of the checkpoint's tensors
    n_values: int
    roles: tuple[RoleSize, ...]  # most bytes first
    evaluation: Distance | None  # from the original, on text held back from calibration
    layer_errors: tuple[float, ...]  # of each layer: the mean of its matrices' relative output errors
    losses: tuple[TensorLoss, ...]
    folds: tuple[FoldResult, ...]
    coverage: tuple[Coverage, ...]
    calibration_tokens: int  # 0 where none were used
    calibration_sources: tuple[str, ...]
    calibration_sha256: str
    left_out: tuple[str, ...]  # checkpoint tensors that GGUF has no use for (multi-token prediction layers)
    notes: tuple[str, ...]  # what a person should know, one sentence each
    options: dict[str, Any]
    seconds: float  # of work, over all runs that the file took

    @property
    def bits_per_weight(self) -> float:
        """Bits of the file for each value, headers included."""
        return 8 * self.nbytes / self.n_values

    def as_json(self) -> dict[str, Any]:
        """For OUT.report.json: the fields under short names, figures first."""
        fields = asdict(self)
        evaluation = self.evaluation
        if evaluation is not None:
            fields["evaluation"]["perplexity_ratio"] = evaluation.perplexity_ratio
        roles = [asdict(role) | {"bits_per_weight": role.bits_per_weight} for role in self.roles]
        return {
            "path": str(self.path),
            "type": self.recipe,
            "nbytes": self.nbytes,
            "source_nbytes": self.source_nbytes,
            "n_values": self.n_values,
            "bits_per_weight": self.bits_per_weight,
            "roles": roles,
            "evaluation": fields["evaluation"],
            "calibration": {
                "tokens": self.calibration_tokens,
                "sources": self.calibration_sources,
                "sha256": self.calibration_sha256,
            },
            "expert_coverage": fields["coverage"],
            "layer_errors": self.layer_errors,
            "tensors": fields["losses"],
            "folds": fields["folds"],
            "left_out": self.left_out,
            "notes": self.notes,
            "options": self.options,
            "seconds": self.seconds,
            "weights_per_second": self.n_values / self.seconds,
        }

    def record(self) -> dict[str, Any]:
        """For the journal: what ``of`` takes."""
        return {**asdict(self), "path": str(self.path)}

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Report:
        """From ``record()``, by way of JSON."""
        evaluation = record["evaluation"]
        fields: dict[str, Any] = {
            **{name: tuple(value) if isinstance(value, list) else value for name, value in record.items()},
            "path": Path(record["path"]),
            "roles": tuple(RoleSize(**{**role, "types": tuple(role["types"])}) for role in record["roles"]),
            "evaluation": None if evaluation is None else Distance(**evaluation),
            "losses": tuple(TensorLoss(**loss) for loss in record["losses"]),
            "folds": tuple(FoldResult(**fold) for fold in record["folds"]),
            "coverage": tuple(Coverage(**{**c, "counts": tuple(c["counts"])}) for c in record["coverage"]),
        }
        return cls(**fields)


def layer_errors(losses: Iterable[TensorLoss], n_layer: int) -> tuple[float, ...]:
    """The mean error of each layer's quantised matrices; 0 where it has none."""
    errors: list[list[float]] = [[] for _ in range(n_layer)]
    for loss in losses:
        if loss.name.startswith("blk.") and loss.type != "F32":
            errors[int(loss.name.split(".")[1])].append(loss.error)
    return tuple(sum(layer) / len(layer) if layer else 0.0 for layer in errors)


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
