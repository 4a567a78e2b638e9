"""grouped.py: integers of 4 bits from -8 to 7, and a scale for a group of columns: what clusters' kernels multiply by.

As feedback.py has it, columns are rounded one after the other under an input covariance H = M diag(v) M^T, and the
error of each is carried on to those after it; here a scale is for 128 columns, and is chosen on the targets that the
columns before them have left. Scales are numbers of bfloat16 and of a half alike: both kinds of file say the same.
"""

from __future__ import annotations

from functools import partial

import numpy as np
from numpy.typing import NDArray

from quantize.base.blas import one_thread, pieces, spread
from quantize.encode.factor import Factor, damped
from quantize.encode.feedback import DAMPING, Covariance, chunks
from quantize.source.forms import bf16_to_f32, f32_to_bf16

F32 = NDArray[np.float32]
GROUPS = (128, 64, 32)
LOW, HIGH = -8, 7
Q4_0_BLOCK = 32
# Of the scale that just holds the largest value: a smaller one cuts a few and is finer for the rest.
SHARES = np.linspace(0.5, 1.05, 28, dtype=np.float32)
LEAST_SCALE = np.float32(2.0**-14)  # of a half that is normal


def encode(
    rows: F32, group: int, covariance: Covariance | None, importance: F32 | None, out: NDArray[np.uint8]
) -> None:
    """rows (r, n) -> out (r, n / 32 * 18): blocks of Q4_0, those of a group with one scale. n: whole groups.
    importance: E[x^2] (n,), where there is no covariance."""
    r, n = rows.shape
    codes, scales = np.empty((r, n), np.int8), np.empty((r, n // group), np.float32)
    for run in chunks(n):
        upper, v = _factor(covariance, importance, n, run)
        of_groups = slice(run.start // group, run.stop // group)
        with one_thread():
            spread(
                [
                    partial(_encode, rows[at, run], group, upper, v, codes[at, run], scales[at, of_groups])
                    for at in pieces(r)
                ]
            )
    out[...] = _packed(codes, np.repeat(scales, group // Q4_0_BLOCK, axis=1)).reshape(out.shape)


def _factor(covariance: Covariance | None, importance: F32 | None, n: int, run: slice) -> tuple[F32 | None, F32]:
    """(M or None for the identity, v) of a run of channels."""
    width = run.stop - run.start
    if covariance is not None and np.isfinite(covariance.mean) and covariance.mean > 0:
        block = covariance.blocks[chunks(n).index(run)]
        try:
            factor = Factor(damped(block, covariance.mean, DAMPING))
        except np.linalg.LinAlgError:
            return None, np.maximum(block.diagonal(), np.float32(1e-12))
        upper = factor.above
        for at, inner in zip(factor.blocks, factor.inner, strict=True):
            upper[at, at] = inner
        return upper, factor.v.astype(np.float32)
    if importance is not None:
        return None, np.maximum(importance[run], np.float32(1e-12))
    return None, np.ones(width, np.float32)


def _encode(w: F32, group: int, upper: F32 | None, v: F32, codes: NDArray[np.int8], scales: F32) -> None:
    errors = np.zeros(w.shape, np.float32)
    for i, start in enumerate(range(0, w.shape[1], group)):
        at = slice(start, start + group)
        target = w[:, at] if upper is None else w[:, at] + errors[:, :start] @ upper[:start, at]
        scales[:, i] = scale = _best_scale(target, v[at])
        if upper is None:
            codes[:, at] = _rounded(target, scale[:, None])
            continue
        inner = np.ascontiguousarray(upper[at, at])
        for j in range(group):
            wanted = target[:, j] + errors[:, start : start + j] @ inner[:j, j]
            codes[:, start + j] = chosen = _rounded(wanted, scale)
            errors[:, start + j] = w[:, start + j] - chosen * scale


def _rounded(values: F32, scale: F32) -> F32:
    rounded: F32 = np.clip(np.rint(values / scale), LOW, HIGH)
    return rounded


def _best_scale(target: F32, v: F32) -> F32:
    """(r,) the scale of each row's (r, group) values with the least squared error, weighed by v (group,)."""
    widest = np.maximum(target.max(axis=1) / HIGH, target.min(axis=1) / LOW)
    best, least = _representable(widest), np.full(len(target), np.inf, np.float32)
    for share in SHARES:
        scale = _representable(widest * share)
        error = target - _rounded(target, scale[:, None]) * scale[:, None]
        loss = (error * error) @ v
        is_less = loss < least
        best[is_less], least[is_less] = scale[is_less], loss[is_less]
    return best


def _representable(scale: F32) -> F32:
    """The nearest number that bfloat16 and a normal half both have."""
    return np.maximum(bf16_to_f32(f32_to_bf16(scale)).reshape(scale.shape), LEAST_SCALE)


def _packed(codes: NDArray[np.int8], scales: F32) -> NDArray[np.uint8]:
    """Blocks of Q4_0: a half, then 16 bytes of two values each, i low and 16 + i high."""
    r, n_blocks = scales.shape
    nibbles = (codes + 8).astype(np.uint8).reshape(r, n_blocks, 2, 16)
    blocks = np.empty((r, n_blocks, 18), np.uint8)
    blocks[:, :, :2] = scales.astype(np.float16).view(np.uint8).reshape(r, n_blocks, 2)
    blocks[:, :, 2:] = nibbles[:, :, 0] | nibbles[:, :, 1] << 4
    return blocks


def unpacked(data: NDArray[np.uint8], group: int) -> tuple[NDArray[np.int8], NDArray[np.uint16]]:
    """Blocks of Q4_0 (r, row bytes) -> (codes (r, n), the groups' scales as bfloat16 bits (r, n / group)). ValueError
    where the blocks of a group have several, or one that bfloat16 has not."""
    blocks = data.reshape(len(data), -1, 18)
    halves = np.ascontiguousarray(blocks[:, :, :2]).view(np.float16)[:, :, 0]
    scales = halves.reshape(len(data), -1, group // Q4_0_BLOCK)
    bits = f32_to_bf16(scales[:, :, 0].astype(np.float32)).reshape(scales.shape[:2])
    if (scales != scales[:, :, :1]).any() or (bf16_to_f32(bits.reshape(-1)) != scales[:, :, 0].reshape(-1)).any():
        raise ValueError("blocks of Q4_0 that share no scale of bfloat16")
    nibbles = np.stack([blocks[:, :, 2:] & 15, blocks[:, :, 2:] >> 4], axis=2)
    return nibbles.reshape(len(data), -1).astype(np.int8) - np.int8(8), bits
