"""Rotary positions with YaRN: the decoupled RoPE of DeepSeek-V2, equations (14) and (15)."""

import math

import numpy as np
from numpy.typing import NDArray
from ref.hparams import Hparams, Yarn

F64 = NDArray[np.float64]


def yarn_ramp(yarn: Yarn, dim: int, base: float) -> F64:
    """How far each of the dim/2 frequencies is interpolated: 0 keeps it, 1 divides it by the factor.

    YaRN section 3.2: a frequency base^(-2i/dim) turns r times over the original context where
    i = dim ln(L / (2 pi r)) / (2 ln base). Between r = beta_fast and r = beta_slow the ramp is linear in i. DeepSeek
    rounds the two ends outwards and clips the upper one at dim - 1 (not at the last frequency, dim/2 - 1).
    """

    def index_of(turns: float) -> float:
        return dim * math.log(yarn.orig_ctx / (2 * math.pi * turns)) / (2 * math.log(base))

    low = max(math.floor(index_of(yarn.beta_fast)), 0)
    high = min(math.ceil(index_of(yarn.beta_slow)), dim - 1)
    width = high - low if high != low else 0.001
    ramp: F64 = np.clip((np.arange(dim // 2) - low) / width, 0, 1)
    return ramp


def frequencies(hp: Hparams) -> F64:
    """Radians a position for each pair, (qk_rope_head_dim / 2)."""
    dim = hp.qk_rope_head_dim
    theta: F64 = hp.rope_freq_base ** (-np.arange(0, dim, 2) / dim)
    if hp.yarn is None:
        return theta
    ramp = yarn_ramp(hp.yarn, dim, hp.rope_freq_base)
    return theta / hp.yarn.factor * ramp + theta * (1 - ramp)


def rotate(hp: Hparams, x: F64, positions: NDArray[np.int64]) -> F64:
    """Turn each adjacent pair (x[2i], x[2i+1]) of x (n, ..., qk_rope_head_dim) by position * frequency[i]."""
    angle = positions[:, None] * frequencies(hp)  # (n, dim/2)
    angle = angle.reshape(len(positions), *[1] * (x.ndim - 2), -1)
    factor = hp.yarn.rotation_factor if hp.yarn else 1.0
    pair = x[..., 0::2] + 1j * x[..., 1::2]
    turned = pair * np.exp(1j * angle) * factor
    out = np.empty_like(x)
    out[..., 0::2], out[..., 1::2] = turned.real, turned.imag
    return out
