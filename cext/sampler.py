"""From logits to a token."""

from __future__ import annotations

import operator
import secrets
from collections import deque
from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cext import _engine
from cext.arguments import real, whole
from cext.errors import ArgumentError


class Sampler:
    """Chooses the next token: repeat penalty, then top-k, top-p, min-p, temperature, then a seeded draw.

    temperature 0 is greedy; top_k 0, top_p 1, min_p 0 and repeat_penalty 1 switch a stage off. seed None draws one:
    see ``seed``. ArgumentError (a ValueError) out of range.
    """

    def __init__(
        self,
        temperature: float = 0.8,
        top_k: int = 40,
        top_p: float = 0.95,
        min_p: float = 0.05,
        repeat_penalty: float = 1.0,
        repeat_last_n: int = 64,
        seed: int | None = None,
    ) -> None:
        try:
            self.seed = secrets.randbits(32) if seed is None else operator.index(seed)
        except TypeError:
            raise TypeError(f"seed is {seed!r}, expected a whole number") from None
        if not 0 <= self.seed < 1 << 64:
            raise ArgumentError(f"seed is {self.seed}, expected 0 to 2^64 - 1")
        self._repeat_last_n = whole("repeat_last_n", repeat_last_n)
        self._handle = _engine.sampler_open(
            real("temperature", temperature),
            whole("top_k", top_k),
            real("top_p", top_p),
            real("min_p", min_p),
            real("repeat_penalty", repeat_penalty),
            self._repeat_last_n,
            self.seed,
        )

    def sample(self, logits: ArrayLike) -> int:
        """Draw from (n_vocab,) logits, which are left as they are, and remember the token for the repeat penalty.

        ArgumentError where they are none, or of another shape; TypeError where they are no real numbers.
        """
        array = np.asarray(logits)
        if array.ndim != 1 or array.size == 0:
            raise ArgumentError(f"logits have shape {array.shape}, expected (n_vocab,)")
        if array.dtype.kind not in "fiu":
            raise TypeError(f"logits are {array.dtype}, expected numbers")
        with np.errstate(over="ignore"):  # infinite then, which the engine tells from a number
            return _engine.sampler_sample(self._handle, np.ascontiguousarray(array, np.float32))

    def accept(self, ids: Iterable[int]) -> None:
        """Count tokens that were not sampled here (the prompt's) towards the repeat penalty: it looks at the last.

        ArgumentError, TypeError for what is no token id; then none of them count.
        """
        for token in [whole("a token id", token) for token in deque(ids, self._repeat_last_n)]:
            _engine.sampler_accept(self._handle, token)

    def kept(self) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
        """(tokens, probabilities) that the last token was drawn from, the likeliest first: after the penalty, the cuts
        and the temperature; together they make 1. One where it is greedy, none before the first draw."""
        none = np.empty(0, np.int32), np.empty(0)
        tokens = np.empty(_engine.sampler_kept(self._handle, *none), np.int32)
        weights = np.empty(len(tokens))
        _engine.sampler_kept(self._handle, tokens, weights)
        order = np.lexsort((tokens, -weights))[: np.count_nonzero(weights)]
        return tokens[order], weights[order] / weights.sum()
