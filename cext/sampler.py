"""From logits to a token."""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from cext import _engine
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
        self.seed = secrets.randbits(32) if seed is None else seed
        if not 0 <= self.seed < 1 << 64:
            raise ArgumentError(f"seed is {self.seed}, expected 0 to 2^64 - 1")
        self._repeat_last_n = repeat_last_n
        self._handle = _engine.sampler_open(temperature, top_k, top_p, min_p, repeat_penalty, repeat_last_n, self.seed)

    def sample(self, logits: NDArray[np.float32]) -> int:
        """Draw from (n_vocab,) logits, which are left as they are, and remember the token for the repeat penalty."""
        if logits.ndim != 1:
            raise ArgumentError(f"logits have shape {logits.shape}, expected (n_vocab,)")
        return _engine.sampler_sample(self._handle, np.ascontiguousarray(logits, np.float32))

    def accept(self, ids: Iterable[int]) -> None:
        """Count tokens that were not sampled here (the prompt's) towards the repeat penalty: it looks at the last."""
        for token in deque(ids, self._repeat_last_n):
            _engine.sampler_accept(self._handle, int(token))
