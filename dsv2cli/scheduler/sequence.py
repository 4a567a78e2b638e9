"""One answer as a state: what it wants evaluated next, and what becomes of the logits it gets."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from dsv2cli.scheduler.context import Context
from dsv2cli.scheduler.drafts import Drafter
from dsv2cli.scheduler.events import End, Event, Read, Reason, Token
from dsv2cli.scheduler.sampling import Logprobs, PromptRows, Sampling, drawn_logprobs, logprobs
from dsv2cli.scheduler.stats import Stats
from dsv2cli.scheduler.text import Text

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

ROWS_AT_ONCE = 64  # of a prompt's logits: each row is as long as the vocabulary

# The prompt to go on from when the context is full in the middle of an answer, given the answer; None: to stop there.
Refill = Callable[[list[int]], list[int] | None]


class Sequence:
    """A prompt and the answer to it, sampled until an end token, a stop string, ``limit`` tokens or a full context.

    The token that ends the answer is no part of it, and its last token may not be in the cache. n_top: how many of the
    likeliest tokens' log-probabilities come with each token; None: none at all. drawn: they are those that it was drawn
    from, not the model's own. rows: takes those of the prompt's own tokens, which it may hold already for a beginning
    that is in the cache. ValueError for a prompt or an answer of no tokens.
    """

    def __init__(
        self,
        context: Context,
        prompt: list[int],
        sampler: Sampling,
        text: Text,
        is_end: Callable[[int], bool],
        *,
        limit: int | None = None,
        drafter: Drafter | None = None,
        n_top: int | None = None,
        drawn: bool = False,
        rows: PromptRows | None = None,
        refill: Refill = lambda answer: None,
        stats: Stats | None = None,
    ) -> None:
        if not prompt:
            raise ValueError("a prompt of no tokens")
        if limit is not None and limit < 1:
            raise ValueError(f"an answer of {limit} tokens")
        self.context = context
        self.answer: list[int] = []
        self.stats = stats or Stats()
        self.cancelled = self.ended = False
        self.rows = rows
        self.n_prompt = len(prompt)
        self._sampler, self._text, self._is_end = sampler, text, is_end
        self._limit, self._drafter, self._n_top, self._drawn, self._refill = limit, drafter, n_top, drawn, refill
        self._n_asked = 0  # tokens that are being evaluated
        self._draft: list[int] = []  # and those on a guess, after them
        self._began = time.perf_counter()
        self._first = 0.0  # when the first logits came
        self._read(prompt)
        self.stats.n_prompt, self.stats.n_reused = len(prompt), self._n_kept

    def _read(self, prompt: list[int]) -> None:
        self._ids = list(prompt)  # the sequence: the prompt, and every token that was chosen
        self._n_kept = self.context.reusable(prompt)  # of the prompt, what was in the cache
        if self.rows is not None:
            self._n_kept = self.rows.begin(self._n_kept)
        self.n_waiting = len(prompt) - self._n_kept  # not evaluated: 1 where it decodes, more where it reads a prompt
        self._sampler.accept(self._ids)
        if self._drafter is not None:
            self._drafter.begin(self._ids)

    @property
    def progress(self) -> Read:
        n = len(self._ids) - self._n_kept
        return Read(self, n - self.n_waiting, n)

    @property
    def stop(self) -> str | None:
        """The stop string that ended it."""
        return self._text.stop

    def cancel(self) -> None:
        """End before the next step. From any thread, or a signal's handler."""
        self.cancelled = True

    def want(self, most: int) -> tuple[list[int], int]:
        """(at most so many tokens to evaluate next, of how many of the last ones the logits are wanted)."""
        n_done = len(self._ids) - self.n_waiting
        reads_rows = self.rows is not None and n_done < self.n_prompt
        ids = self._ids[n_done : n_done + (min(most, ROWS_AT_ONCE) if reads_rows else most)]
        self._n_asked = len(ids)
        n_logits = len(ids) if reads_rows else 1 if self._n_asked == self.n_waiting else 0
        self._draft = []
        if self._drafter is not None and self.n_waiting == 1 and (draft := self._drafter.guess(most - 1)):
            self._draft = draft[: self._room()]
            ids += self._draft
            n_logits += len(self._draft)
        self.context.keep(n_done)
        return ids, n_logits

    def take_back(self) -> None:
        """What was wanted has failed: the cache forgets as much of it as it took in."""
        n_done = len(self._ids) - self.n_waiting
        if self.context.session.n_past > n_done:
            self.context.keep(n_done)

    def _room(self) -> int:
        """How many drafted tokens fit in the context and may be wanted."""
        room = self.context.n_ctx - len(self._ids)
        return room if self._limit is None else min(room, self._limit - len(self.answer) - 1)

    def take(self, logits: NDArray[np.float32], events: list[Event]) -> None:
        """What was wanted is evaluated: append to events what comes of it; logits (n_logits, n_vocab)."""
        n_done = len(self._ids) - self.n_waiting
        self.n_waiting -= self._n_asked
        if self.rows is not None and n_done < self.n_prompt:
            self.rows.add(logits[: self._n_asked], self._ids[n_done + 1 : n_done + self._n_asked + 1])
            logits = logits[self._n_asked - 1 :] if self.n_waiting == 0 else logits[:0]
        if not len(logits):
            events.append(self.progress)
            return
        now = time.perf_counter()
        if self._first:
            self.stats.decode_seconds = now - self._first
        else:
            self._first = now
            self.stats.prefill_seconds = now - self._began
            events.append(self.progress)
        if self._draft:
            self.stats.n_drafted += len(self._draft)
        for row, guess in zip(logits, [*self._draft, None], strict=True):
            token = self._sampler.sample(row)
            if reason := self._add(token, row, events):
                events.append(self.end(reason))
                return
            if token != guess:
                return  # of the other drafts nothing is kept: see want
            self.n_waiting -= 1
            self.stats.n_taken += 1

    def _add(self, token: int, row: NDArray[np.float32], events: list[Event]) -> Reason | None:
        """Append a token that was chosen from a row of logits; the reason to end, if there is one."""
        if self._is_end(token):
            return "end"
        self._ids.append(token)
        self.n_waiting += 1
        self.answer.append(token)
        self.stats.n_answer += 1
        if self._drafter is not None:
            self._drafter.add(token)
        text = self._text.feed(token)
        events.append(
            Token(self, token, text, None if self._n_top is None else self._logprobs(token, row, self._n_top))
        )
        if self._text.stop is not None:
            return "stop"
        if len(self.answer) == self._limit:
            return "length"
        if len(self._ids) > self.context.n_ctx:
            prompt = self._refill(self.answer)
            if prompt is None:
                return "context"
            self._read(prompt)
        return None

    def _logprobs(self, token: int, row: NDArray[np.float32], n_top: int) -> Logprobs:
        return drawn_logprobs(self._sampler, token, n_top) if self._drawn else logprobs(row, token, n_top)

    def end(self, reason: Reason, error: Exception | None = None) -> End:
        self.stats.stop, self.ended = reason, True
        return End(self, reason, self._text.finish(), error)
