"""What a sequence needs of a sampler, and the log-probabilities of what it chose."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Sampling(Protocol):
    """What a sequence needs of a ``cext.Sampler``. Each sequence has its own, with a seed of its own."""

    def sample(self, logits: NDArray[np.float32]) -> int: ...
    def accept(self, ids: list[int]) -> None: ...


class Logprobs(NamedTuple):
    """Natural log-probabilities under the model itself: before penalties, cuts and temperature."""

    chosen: float
    top: tuple[tuple[int, float], ...]  # (token, log-probability), the likeliest first


def logprobs(logits: NDArray[np.float32], token: int, n_top: int) -> Logprobs:
    """Of a token and of the n_top likeliest, from (n_vocab,) logits; equal tokens have equal figures in both."""
    import numpy as np

    row = logits.astype(np.float64)
    row -= row.max()
    row -= np.log(np.exp(row).sum())
    n_top = min(n_top, len(row))
    best = np.argpartition(-row, n_top - 1)[:n_top] if n_top else np.empty(0, np.intp)
    best = best[np.lexsort((best, -row[best]))]
    return Logprobs(float(row[token]), tuple(zip(best.tolist(), row[best].tolist(), strict=True)))
