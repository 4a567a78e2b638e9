"""From logits to a token for a request: its constraint, biases and penalties, then the engine's sampler."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from cext import Sampler

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dsv2cli.server.generation import Constraint, Params


class Chooser:
    """A ``scheduler.Sampling`` of OpenAI's parameters.

    presence and frequency penalties count the answer's own tokens (OpenAI's rule; the repeat penalty, llama.cpp's,
    counts the prompt's last ones too). A constraint's mask comes after all of them and before the cuts, so that what
    remains can always be drawn.
    """

    def __init__(self, params: Params, constraint: Constraint | None, seed: int | None) -> None:
        self._params, self._constraint = params, constraint
        self._counts: Counter[int] = Counter()
        self._sampler = Sampler(
            params.temperature,
            params.top_k,
            params.top_p,
            params.min_p,
            params.repeat_penalty,
            params.repeat_last_n,
            seed,
        )
        self._bias = (
            np.fromiter(params.bias.keys(), np.int64, len(params.bias)),
            np.fromiter(params.bias.values(), np.float32, len(params.bias)),
        )
        self._is_plain = not (params.bias or params.presence_penalty or params.frequency_penalty or constraint)

    def accept(self, ids: Iterable[int]) -> None:
        self._sampler.accept(ids)

    def kept(self) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
        return self._sampler.kept()

    def sample(self, logits: NDArray[np.float32]) -> int:
        if self._is_plain:
            return self._sampler.sample(logits)
        shaped = logits.copy()
        params = self._params
        if params.bias:
            shaped[self._bias[0]] += self._bias[1]
        if self._counts and (params.presence_penalty or params.frequency_penalty):
            ids = np.fromiter(self._counts.keys(), np.int64, len(self._counts))
            counts = np.fromiter(self._counts.values(), np.float32, len(self._counts))
            shaped[ids] -= np.float32(params.presence_penalty) + np.float32(params.frequency_penalty) * counts
        if self._constraint is not None:
            self._constraint.mask(shaped)
            if not np.isfinite(shaped).any():
                raise ValueError("logit_bias leaves no token that the form of the answer allows")
        token = self._sampler.sample(shaped)
        self._counts[token] += 1
        if self._constraint is not None:
            self._constraint.accept(token)
        return token
