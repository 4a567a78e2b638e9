"""Steps any number of sequences together, and lets none of them wait for long or fall with another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cext import MAX_STEP, eval_batch
from dsv2cli.scheduler.events import Event, Reason
from dsv2cli.scheduler.parts import Part, Parts, Share
from dsv2cli.scheduler.sequence import Sequence

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# ``cext.eval_batch``, or another engine's over its own sessions: the logits after the last so many tokens of each, one
# after another.
Evaluate = Callable[[list[tuple[Any, list[int]]], list[int]], "NDArray[np.float32]"]


@dataclass(frozen=True)
class Budget:
    """Tokens a step. Progress is told, and cancelling heard, between steps. ValueError where prompts fill a step."""

    alone: int = 512  # of prompts, where nothing decodes; or as many as a step of a model on a drive or GPU can have
    beside: int = 64  # of prompts beside answers: what these wait for
    step: int = MAX_STEP  # of all together
    whole: int | None = None  # if given, prompts are read in pieces of just so many, the last one apart

    def __post_init__(self) -> None:
        if not 1 <= self.beside < self.step <= MAX_STEP or not 1 <= self.alone <= self.step:
            raise ValueError(f"{self}: expected 1 <= beside < step, 1 <= alone <= step <= {MAX_STEP}")

    def prompt_step(self, most: int) -> int:
        """Tokens of prompts where nothing decodes, of a model whose longest step is ``most``. Where experts come from
        the drive, or are copied to a GPU, a step has them once."""
        return most if most > MAX_STEP and self.whole is None else self.alone


class Scheduler:
    """Sequences, each with a context of its own, of one model. One thread steps; any may cancel a sequence.

    Every sequence that decodes is in every step, with a token and its drafts, as far as a step holds them; prompts are
    read in pieces with what the budget leaves, in turns. Who was not served goes before who was. parts: beside answers
    they are read so, in no step of these.
    """

    def __init__(
        self, evaluate: Evaluate = eval_batch, budget: Budget | None = None, parts: Parts | None = None
    ) -> None:
        self._evaluate = evaluate
        self.budget = budget or Budget()  # may be changed between steps
        self._parts = parts
        self._sequences: list[Sequence] = []  # in the order in which they are served
        self._news: list[Event] = []  # told before the next evaluation
        self.n_computed = 0  # steps in which something was

    def add(self, sequence: Sequence) -> None:
        """Let a sequence join at the next step; the first event of it says how much of its prompt is to be read."""
        self._sequences.append(sequence)
        self._news.append(sequence.progress)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, with no event; nothing where it has ended."""
        if sequence in self._sequences:
            self._sequences.remove(sequence)
            self._news = [event for event in self._news if event.sequence is not sequence]
            self._drop_parts()

    @property
    def idle(self) -> bool:
        """Nothing is left to step or to tell."""
        return not (self._sequences or self._news)

    def run(self) -> Iterator[Event]:
        """Step until all sequences have ended."""
        while self._sequences or self._news:
            yield from self.step()

    def step(self) -> list[Event]:
        """Evaluate once and return what came of it; at once where there is something to tell already: who joined, and
        who was cancelled."""
        for sequence in self._sequences:
            if sequence.cancelled:
                self._end_cancelled()
                break
        if self._parts is not None and not self._news and self._reads_layers(self._parts):
            return self._read_layers(self._parts)
        shares = [] if self._news else self._plan()
        events, self._news = self._news, []
        if shares:
            self.n_computed += 1
            begun = self._parts.now() if self._parts is not None and shares[0][0].n_waiting == 1 else None
            self._evaluate_shares(shares, events)
            if self._parts is not None:
                self._parts.answered(begun)
        return events

    def _end_cancelled(self) -> None:
        for sequence in [s for s in self._sequences if s.cancelled]:
            self._end(sequence, "cancelled", self._news)
        self._drop_parts()

    def _drop_parts(self) -> None:
        if self._parts is not None:
            self._parts.drop(self._sequences.__contains__)

    def _plan(self) -> list[Share]:
        """What is evaluated next."""
        decoding: list[Sequence] = []
        reading: list[Sequence] = []
        for sequence in self._sequences:
            (decoding if sequence.n_waiting == 1 else reading).append(sequence)
        budget = self.budget
        beside = budget.beside if self._parts is None else 0
        for_prompts = beside if reading else 0
        if reading and not decoding:
            for_prompts = budget.prompt_step(reading[0].context.session.model.max_step)
        for_answers = budget.step - for_prompts
        shares: list[Share] = []
        most = max(1, for_answers // len(decoding)) if decoding else 0
        for sequence in decoding[:for_answers]:
            self._ask(sequence, most, shares)
        if for_prompts:
            self._ask_readers(reading, for_prompts, shares)
        if len(shares) < len(self._sequences):
            self._put_behind(shares)
        return shares

    def _ask_readers(self, reading: list[Sequence], for_prompts: int, shares: list[Share]) -> None:
        for sequence in reading:
            piece = for_prompts if self.budget.whole is None else self.budget.whole
            if for_prompts >= min(piece, sequence.n_waiting) and for_prompts > 0:
                for_prompts -= self._ask(sequence, piece, shares)

    def _put_behind(self, shares: list[Share]) -> None:
        """Who is served moves behind those who are not."""
        served = {sequence: None for sequence, _, _ in shares}
        self._sequences = [s for s in self._sequences if s not in served] + list(served)

    # Some layers at a time.

    def _reads_layers(self, parts: Parts) -> bool:
        """Whether prompts are next: after a step of answers; where there are none, what was begun beside them."""
        n_decoding = sum(sequence.n_waiting == 1 for sequence in self._sequences)
        if n_decoding == len(self._sequences):
            return False
        return parts.is_next if n_decoding else bool(parts.under_way)

    def _read_layers(self, parts: Parts) -> list[Event]:
        """What fits in a turn, of a piece or several; the next turn begins with another."""
        events: list[Event] = []
        self.n_computed += 1
        beside = parts.is_next
        parts.begin_turn()
        if beside:
            self._begin_part(parts)
        while parts.under_way or (beside and self._begin_part(parts)):
            part = parts.under_way[0]
            n_layers = parts.fits(part)
            if not n_layers or any(sequence.cancelled for sequence in self._sequences):  # these end at once
                break
            try:
                logits = parts.run(part, n_layers)
            except Exception as error:
                parts.under_way.popleft()
                self._part_failed(parts, part, error)
                continue
            if logits is not None:
                parts.under_way.popleft()
                self._deliver(part.shares, logits, events)
        parts.under_way.rotate(-1)
        events += self._news
        self._news = []
        return events

    def _begin_part(self, parts: Parts) -> bool:
        """A piece of the prompts of which none is under way. Whether there is one."""
        under_way = {sequence for part in parts.under_way for sequence, _, _ in part.shares}
        shares: list[Share] = []
        reading = [s for s in self._sequences if s.n_waiting > 1 and s not in under_way]
        self._ask_readers(reading, parts.n_tok, shares)
        self._put_behind(shares)
        return bool(shares) and self._begin_shares(parts, shares)

    def _begin_shares(self, parts: Parts, shares: list[Share]) -> bool:
        try:
            parts.begin(shares)
        except Exception as error:
            return self._begin_failed(parts, shares, error)
        return True

    def _begin_failed(self, parts: Parts, shares: list[Share], error: Exception) -> bool:
        """Each alone, where it failed for several: an error ends who causes it. Whether one is under way."""
        if len(shares) == 1:
            self._end(shares[0][0], "error", self._news, error)
            return False
        return sum(self._begin_shares(parts, [share]) for share in shares) > 0

    def _part_failed(self, parts: Parts, part: Part, error: Exception) -> None:
        part.layers.close()
        shares = [share for share in part.shares if share[0] in self._sequences]
        if shares:
            self._begin_failed(parts, shares, error)

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
        self._deliver(shares, logits, events)
        return None

    def _deliver(self, shares: list[Share], logits: NDArray[np.float32], events: list[Event]) -> None:
        start = 0
        for sequence, _, n_logits in shares:
            rows = logits[start : start + n_logits]
            start += n_logits
            if sequence.cancelled or sequence not in self._sequences:
                continue  # it ends in the next step, or has gone while it was evaluated
            try:
                sequence.take(rows, events)
            except Exception as error:
                self._end(sequence, "error", events, error)
            else:
                if sequence.ended:
                    self._sequences.remove(sequence)

    def _take_back(self, sequence: Sequence, events: list[Event]) -> None:
        """Let the cache hold what it did before the step. A sequence whose cache cannot do that ends."""
        try:
            sequence.take_back()
        except Exception as error:
            self._end(sequence, "error", events, error)

    def _end(self, sequence: Sequence, reason: Reason, events: list[Event], error: Exception | None = None) -> None:
        events.append(sequence.end(reason, error))
        self._sequences.remove(sequence)
