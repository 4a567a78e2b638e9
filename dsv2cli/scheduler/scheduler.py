"""Steps any number of sequences together, and lets none of them wait for long or fall with another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cext import MAX_STEP, eval_batch
from dsv2cli.scheduler.events import Event, Reason
from dsv2cli.scheduler.sequence import Sequence

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# ``cext.eval_batch``, or another engine's over its own sessions: the logits after the last so many tokens of each, one
# after another.
Evaluate = Callable[[list[tuple[Any, list[int]]], list[int]], "NDArray[np.float32]"]
# A sequence's part in a step: tokens, and of how many of the last ones the logits are wanted.
Share = tuple[Sequence, list[int], int]


@dataclass(frozen=True)
class Budget:
    """Tokens a step. Progress is told, and cancelling heard, between steps. ValueError where prompts fill a step."""

    alone: int = 512  # of prompts, where nothing decodes; or as many as a step of a model on a drive can have
    beside: int = 64  # of prompts beside answers: what these wait for
    step: int = MAX_STEP  # of all together
    whole: int | None = None  # if given, prompts are read in pieces of just so many, the last one apart

    def __post_init__(self) -> None:
        if not 1 <= self.beside < self.step <= MAX_STEP or not 1 <= self.alone <= self.step:
            raise ValueError(f"{self}: expected 1 <= beside < step, 1 <= alone <= step <= {MAX_STEP}")


class Scheduler:
    """Sequences, each with a context of its own, of one model. One thread steps; any may cancel a sequence.

    Every sequence that decodes is in every step, with a token and its drafts, as far as a step holds them; prompts are
    read in pieces with what the budget leaves, in turns. Who was not served goes before who was.
    """

    def __init__(self, evaluate: Evaluate = eval_batch, budget: Budget | None = None) -> None:
        self._evaluate = evaluate
        self.budget = budget or Budget()  # may be changed between steps
        self._sequences: list[Sequence] = []  # in the order in which they are served
        self._news: list[Event] = []  # told before the next evaluation

    def add(self, sequence: Sequence) -> None:
        """Let a sequence join at the next step; the first event of it says how much of its prompt is to be read."""
        self._sequences.append(sequence)
        self._news.append(sequence.progress)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, with no event; nothing where it has ended."""
        if sequence in self._sequences:
            self._sequences.remove(sequence)
            self._news = [event for event in self._news if event.sequence is not sequence]

    @property
    def idle(self) -> bool:
        """Nothing is left to step or to tell."""
        return not (self._sequences or self._news)

    def run(self) -> Iterator[Event]:
        """Step until all sequences have ended."""
        while self._sequences or self._news:
            yield from self.step()

    def step(self) -> list[Event]:
        """Evaluate once and return what came of it; at once where there is something to tell already."""
        shares = [] if self._news else self._plan()
        events, self._news = self._news, []
        if shares:
            self._evaluate_shares(shares, events)
        return events

    def _plan(self) -> list[Share]:
        """What is evaluated next: whoever is in it moves behind those who are not. Ends what was cancelled."""
        cancelled: list[Sequence] = []
        decoding: list[Sequence] = []
        reading: list[Sequence] = []
        for sequence in self._sequences:
            (cancelled if sequence.cancelled else decoding if sequence.n_waiting == 1 else reading).append(sequence)
        for sequence in cancelled:
            self._end(sequence, "cancelled", self._news)
        budget = self.budget
        for_prompts = (budget.beside if decoding else self._alone(reading[0])) if reading else 0
        for_answers = budget.step - for_prompts
        shares: list[Share] = []
        most = max(1, for_answers // len(decoding)) if decoding else 0
        for sequence in decoding[:for_answers]:
            self._ask(sequence, most, shares)
        for sequence in reading:
            piece = for_prompts if budget.whole is None else budget.whole
            if for_prompts >= min(piece, sequence.n_waiting) and for_prompts > 0:
                for_prompts -= self._ask(sequence, piece, shares)
        if len(shares) < len(self._sequences):
            served = {sequence: None for sequence, _, _ in shares}
            self._sequences = [s for s in self._sequences if s not in served] + list(served)
        return shares

    def _alone(self, reading: Sequence) -> int:
        """Tokens of prompts where nothing decodes. Where experts come from the drive, a step reads them once."""
        most = reading.context.session.model.max_step
        return most if most > MAX_STEP and self.budget.whole is None else self.budget.alone

    def _ask(self, sequence: Sequence, most: int, shares: list[Share]) -> int:
        """Append what the sequence wants of at most so many tokens, and return how many it is."""
        try:
            ids, n_logits = sequence.want(most)
        except Exception as error:  # its session is closed, or in use elsewhere
            self._end(sequence, "error", self._news, error)
            return 0
        shares.append((sequence, ids, n_logits))
        return len(ids)

    def _evaluate_shares(self, shares: list[Share], events: list[Event]) -> None:
        """Evaluate and append what comes of it. Where it fails, each is tried alone: an error ends who causes it.

        Where a sequence was cancelled meanwhile, it was that: an engine may stop what it computes.
        """
        batch: list[tuple[Any, list[int]]] = []
        wanted: list[int] = []
        for sequence, ids, n_logits in shares:
            batch.append((sequence.context.session, ids))
            wanted.append(n_logits)
        try:
            logits = self._evaluate(batch, wanted)
        except Exception as error:
            if len(shares) == 1:
                sequence = shares[0][0]
                if sequence.cancelled:
                    return self._end(sequence, "cancelled", events)
                return self._end(sequence, "error", events, error)
            for sequence, _, _ in shares:  # some may have been evaluated before it failed
                self._take_back(sequence, events)
            for share in shares:
                if not share[0].ended:
                    self._evaluate_shares([share], events)
            return None
        start = 0
        for sequence, _, n_logits in shares:
            self._deliver(sequence, logits[start : start + n_logits], events)
            start += n_logits
        return None

    def _take_back(self, sequence: Sequence, events: list[Event]) -> None:
        """Let the cache hold what it did before the step. A sequence whose cache cannot do that ends."""
        try:
            sequence.take_back()
        except Exception as error:
            self._end(sequence, "error", events, error)

    def _deliver(self, sequence: Sequence, logits: NDArray[np.float32], events: list[Event]) -> None:
        if sequence.cancelled:
            return  # it ends in the next step
        try:
            sequence.take(logits, events)
        except Exception as error:
            self._end(sequence, "error", events, error)
        else:
            if sequence.ended:
                self._sequences.remove(sequence)

    def _end(self, sequence: Sequence, reason: Reason, events: list[Event], error: Exception | None = None) -> None:
        events.append(sequence.end(reason, error))
        self._sequences.remove(sequence)
