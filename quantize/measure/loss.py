"""loss.py: what encoding did to a tensor. Checks every part that leaves for NaN, and measures its output error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from gguf.constants import GGMLQuantizationType as Type
from numpy.typing import NDArray

from quantize.base.blas import product
from quantize.base.errors import QuantizeError

F32 = NDArray[np.float32]

SAMPLE_STEP = 4  # one sampled token in so many measures the error: the figure is for reading, not for choosing


@dataclass(frozen=True)
class TensorLoss:
    """One tensor of the file, and how much of its output encoding changed."""

    name: str
    type: str
    error: float  # squared, relative to the squared output on calibration tokens; of weights that none reaches


class Loss(NamedTuple):
    """What encoding changed of a part's output, and that output, both squared."""

    error: float
    energy: float


def measure(name: str, type_: Type, exact: F32, decoded: F32, inputs: F32 | None, importance: F32 | None) -> Loss:
    """A part (n_row, n) or a norm (n,) as it should be and as it will be read; inputs (m, n) of the exact weights, or
    what is known of them: importance (n,). Raises QuantizeError where a value is not finite.
    """
    if not np.isfinite(decoded).all():
        raise QuantizeError(
            f"tensor `{name}`: encoding to {type_.name} gave values that are not finite",
            "the weights are too large for this type, or calibration went wrong: please report the model",
        )
    error = decoded - exact  # dW
    if inputs is not None:
        return Loss(_square(product(error, inputs.T)), _square(product(exact, inputs.T)))
    weights = 1.0 if importance is None else np.sqrt(importance)
    return Loss(_square(error * weights), _square(exact * weights))


class LossMeter:
    """Adds up a tensor's parts."""

    def __init__(self, name: str, type_: Type) -> None:
        self.name, self.type = name, type_
        self._error = self._energy = 0.0

    def add(self, part: Loss) -> None:
        """One of them."""
        self._error += part.error
        self._energy += part.energy

    def done(self) -> TensorLoss:
        """The tensor's figure; 0 where its output is."""
        return TensorLoss(self.name, self.type.name, self._error / self._energy if self._energy > 0 else 0.0)


def _square(values: F32) -> float:
    flat = values.reshape(-1)
    return float(np.einsum("i,i->", flat, flat, dtype=np.float64))  # casts as it goes: no copy of all in float64
