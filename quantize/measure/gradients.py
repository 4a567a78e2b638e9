"""gradients.py: what backward passes of a block's parts share: how they read weights and visit matrices, and norms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]  # float32 in use; float64 where tests want its precision
ReadWeight = Callable[[str, int], Floats]  # (role, part) -> a matrix (n_row, n), a norm (n,); part: expert or head
# (role, part, weights (n_row, n), inputs (m, n), gradients (n_grad, m, n_row)): output = inputs @ weights.T
Visit = Callable[[str, int, Floats, Floats, Floats], None]


def norm(x: Floats, weight: Floats, eps: float) -> Floats:
    """RMSNorm over the last axis."""
    out: Floats = x * _rms(x, eps) * weight
    return out


def norm_backward(x: Floats, weight: Floats, eps: float, dy: Floats) -> Floats:
    """The gradient at norm's x: with r = rms(x)^-1, r w dy - x r^3 mean(w dy x)."""
    r = _rms(x, eps)
    scaled = dy * weight
    scaled -= x * (r * r * (scaled * x).mean(-1, keepdims=True))
    scaled *= r
    return scaled


def _rms(x: Floats, eps: float) -> Floats:
    inverse: Floats = 1.0 / np.sqrt(np.square(x).mean(-1, keepdims=True) + eps)
    return inverse


def sigmoid(x: Floats) -> Floats:
    """1 / (1 + exp(-x)), without overflow."""
    out: Floats = 0.5 * (1.0 + np.tanh(0.5 * x))
    return out
