"""A layer calibrated on original weights, as the write stage does it, but both sublayers in one go."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

import cext
from quantize.measure.calibrate import Stream, SublayerStats

Weights = Mapping[str, np.ndarray]


def reader(weights: Weights, il: int) -> Callable[[str, Any], Any]:
    """``read(role, part)``: a weight of layer il, or that part of a stack, as the stages read them."""

    def read(role: str, part: Any) -> Any:
        suffix = "bias" if role == "exp_probs_b" else "weight"
        whole = weights[f"blk.{il}.{role}.{suffix}"]
        return whole[part] if whole.ndim == 3 else whole

    return read


def attention(stream: Stream, keys: dict[str, Any], il: int, weights: Weights, **how: Any) -> SublayerStats:
    """Of layer il; the stream moves on."""
    with cext.Layer(keys, il, weights, 1, "attention") as engine:
        return stream.attention(engine, **how)


def feed_forward(stream: Stream, keys: dict[str, Any], il: int, weights: Weights, **how: Any) -> SublayerStats:
    """Likewise."""
    with cext.Layer(keys, il, weights, 1, "feed_forward") as engine:
        return stream.feed_forward(engine, il, **how)


def layer(stream: Stream, keys: dict[str, Any], il: int, weights: Weights, **how: Any) -> SublayerStats:
    """Of the original alone: the statistics of both."""
    first = attention(stream, keys, il, weights, **how)
    second = feed_forward(stream, keys, il, weights, **how)
    return SublayerStats({**first.inputs, **second.inputs}, second.routed)
