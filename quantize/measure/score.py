"""score.py: how far one model's predictions are from another's: perplexity, KL divergence, agreement.

Log-probabilities are float64. A standard error treats windows, not tokens, as independent.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

ROWS = 64  # positions taken to float64 at once: 52 MB for a vocabulary of 102,400
SKIPPED_SHARE = 4  # one position in so many is not scored, from the beginning of a window


@dataclass(frozen=True)
class Score:
    """Sums over the scored positions of one window."""

    n: int
    nll: float  # nats
    nll_reference: float
    kld: Sequence[float]  # nats, one a position
    n_top1: int  # positions where both find the same token likeliest
    n_routed: int  # (position, layer, expert) choices of the reference
    n_routed_alike: int  # of them, those the model chose too


@dataclass(frozen=True)
class Distance:
    """A model's distance from its reference, over all windows."""

    n_windows: int
    n_scored: int
    perplexity: float
    perplexity_reference: float
    kld_mean: float
    kld_error: float | None  # standard error of the mean; None for a single window
    kld_p99: float
    kld_max: float
    top1: float
    routing: float | None  # share of the reference's expert choices that the model made too; None where there are none

    @property
    def perplexity_ratio(self) -> float:
        """Of the model's to the reference's."""
        return self.perplexity / self.perplexity_reference


@dataclass(frozen=True)
class Compared:
    """Some of a window's positions, (n,) each; without a reference the model is its own."""

    logs: F64  # natural log-probability of the token that came
    logs_reference: F64
    kld: F64  # nats
    same_top: NDArray[np.bool_]  # both find the same token likeliest


def log_probabilities(logits: F32) -> Iterator[F64]:
    """Log-softmax in float64 of ROWS positions at a time."""
    for start in range(0, len(logits), ROWS):
        rows = logits[start : start + ROWS].astype(np.float64)
        rows -= rows.max(axis=1, keepdims=True)
        rows -= np.log(np.exp(rows).sum(axis=1, keepdims=True))
        yield rows


def target_logs(logits: F32, targets: NDArray[np.int32]) -> F64:
    """The log-probabilities (n,) that (n, n_vocab) logits give to targets (n,)."""
    return _joined([_at(rows, targets[i * ROWS :][:ROWS]) for i, rows in enumerate(log_probabilities(logits))])


def compare(logits: F32, reference: F32, targets: NDArray[np.int32]) -> Compared:
    """Positions' (n, n_vocab) logits beside the reference's; targets (n,): the tokens that came."""
    logs, logs_reference, klds = [], [], []
    pairs = zip(log_probabilities(logits), log_probabilities(reference), strict=True)
    for i, (mine, theirs) in enumerate(pairs):
        came = targets[i * ROWS :][:ROWS]
        logs.append(_at(mine, came))
        logs_reference.append(_at(theirs, came))
        klds.append((np.exp(theirs) * (theirs - mine)).sum(axis=1))
    same_top = logits.argmax(axis=1) == reference.argmax(axis=1)
    return Compared(_joined(logs), _joined(logs_reference), _joined(klds), same_top)


def _at(rows: F64, targets: NDArray[np.int32]) -> F64:
    return np.asarray(rows[np.arange(len(rows)), targets], np.float64)


def _joined(parts: list[F64]) -> F64:
    return np.concatenate(parts) if parts else np.empty(0)


def window(parts: Sequence[Compared], n_routed: int = 0, n_alike: int = 0) -> Score:
    """A window from its positions, in order; however it was cut, the sums are the same to the bit."""
    logs, logs_reference = (np.concatenate([getattr(p, name) for p in parts]) for name in ("logs", "logs_reference"))
    return Score(
        n=len(logs),
        nll=-_sum(logs),
        nll_reference=-_sum(logs_reference),
        kld=np.concatenate([part.kld for part in parts]).tolist(),
        n_top1=sum(int(part.same_top.sum()) for part in parts),
        n_routed=n_routed,
        n_routed_alike=n_alike,
    )


def _sum(logs: F64) -> float:
    """In groups of ROWS, as they always were: figures of earlier versions stay comparable."""
    return sum(float(logs[start : start + ROWS].sum()) for start in range(0, len(logs), ROWS))


def alike(mine: NDArray[np.integer], reference: NDArray[np.integer]) -> int:
    """How many of the reference's choices (n, k) the same rows of mine hold; the choices of a row are distinct."""
    return int((reference[:, :, None] == mine[:, None, :]).sum())


def score(logits: F32, reference: F32, targets: NDArray[np.int32], n_routed: int = 0, n_alike: int = 0) -> Score:
    """A window whose (n, n_vocab) logits are there at once."""
    return window([compare(logits, reference, targets)], n_routed, n_alike)


def summary(scores: Sequence[Score]) -> Distance:
    """All windows together."""
    n, n_routed = sum(s.n for s in scores), sum(s.n_routed for s in scores)
    kld = np.concatenate([s.kld for s in scores])
    return Distance(
        n_windows=len(scores),
        n_scored=n,
        perplexity=math.exp(sum(s.nll for s in scores) / n),
        perplexity_reference=math.exp(sum(s.nll_reference for s in scores) / n),
        kld_mean=float(kld.mean()),
        kld_error=standard_error([float(np.mean(s.kld)) for s in scores]),
        kld_p99=float(np.percentile(kld, 99)),
        kld_max=float(kld.max()),
        top1=sum(s.n_top1 for s in scores) / n,
        routing=sum(s.n_routed_alike for s in scores) / n_routed if n_routed else None,
    )


def standard_error(means: Sequence[float]) -> float | None:
    """Of the mean of window means; windows are of equal length."""
    return float(np.std(means, ddof=1) / math.sqrt(len(means))) if len(means) > 1 else None
