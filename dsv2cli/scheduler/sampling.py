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
    def kept(self) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
        """(tokens, probabilities) that the last one was drawn from, the likeliest first."""


class Logprobs(NamedTuple):
    """Natural log-probabilities under the model itself: before penalties, cuts and temperature. Or as they were drawn
    from, after all of these."""

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


def drawn_logprobs(sampler: Sampling, token: int, n_top: int) -> Logprobs:
    """Of the token that was drawn last and of the n_top likeliest, as it was drawn from them."""
    import numpy as np

    tokens, probabilities = sampler.kept()
    row = np.log(probabilities)
    top = zip(tokens[:n_top].tolist(), row[:n_top].tolist(), strict=True)
    return Logprobs(float(row[tokens == token][0]), tuple(top))


class PromptRows:
    """The log-probabilities of a prompt's own tokens, beside its cache: the first has none, each other those under the
    tokens before it. They are numbers and a few ids a token, never a row of logits.
    """

    def __init__(self, n_top: int, held: list[Logprobs | None] | None = None) -> None:
        """held: those of a beginning that is in the cache, with at least n_top likeliest tokens each."""
        self._n_top = n_top
        self.found: list[Logprobs | None] = [None, *(held or [])[1:]]

    def begin(self, n_cached: int) -> int:
        """How many of the first n_cached tokens need no evaluation: behind them, all rows are made anew."""
        n = max(0, min(n_cached, len(self.found) - 1))
        del self.found[n + 1 :]
        return n

    def add(self, logits: NDArray[np.float32], following: list[int]) -> None:
        """Rows (n, n_vocab) after n tokens, and the tokens that follow them in the prompt: n, or n - 1 at its end."""
        self.found += [logprobs(row, token, self._n_top) for row, token in zip(logits, following, strict=False)]
