"""objectives.py: what each part of a sublayer's tensors is encoded under, as one Objective."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quantize.encode.objective import Objective
from quantize.measure.awq import Scales
from quantize.measure.drift import ROUTER, FeedForward
from quantize.measure.evidence import Evidence
from quantize.measure.loss import SAMPLE_STEP
from quantize.measure.outputs import Outputs
from quantize.source.tensors import Tensor

F32 = NDArray[np.float32]


@dataclass(frozen=True)
class Objectives:
    """Of one sublayer's parts, which are folded by scales. Threads may share it."""

    evidence: Evidence | None  # None: nothing is calibrated
    scales: Scales
    drift: FeedForward | None  # None: the inputs are the original's
    outputs: Outputs

    def of(self, tensor: Tensor, part: int) -> Objective:
        """Of a part. What was written of its bundle before it is told by ``wrote``."""
        role, rows = tensor.role, self.outputs.rows(tensor.role, part)
        judged = tensor.is_matrix or (self.drift is not None and role == ROUTER)
        if self.evidence is None or not judged:
            return Objective(rows=rows)
        covariance = self.drift.covariance(role, part) if self.drift is not None else None
        if covariance is None:
            covariance = self.scales.covariance(role, part, self.evidence.covariance(role, part))
        importance = self.scales.importance(role, part, self.evidence.importance(role, part))
        return Objective(importance, covariance, rows, self._inputs(self.evidence, role, part))

    def wrote(self, tensor: Tensor, part: int, decoded: F32) -> None:
        """A part as it will be read: what comes after it in its bundle goes by it."""
        if self.drift is not None:
            self.drift.wrote(tensor.role, part, decoded)

    def _inputs(self, evidence: Evidence, role: str, part: int) -> F32 | None:
        """Some inputs of a part as its folded weights meet them, (m, n); None for k_b, which the queries multiply."""
        if role == "attn_k_b":
            return None
        inputs = evidence.sample(role, part)[::SAMPLE_STEP]
        squared = self.scales.importance(role, part, np.ones(inputs.shape[1], np.float32))
        assert squared is not None, "there is an importance"
        return inputs * np.sqrt(squared)
