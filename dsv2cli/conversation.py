"""A conversation with a model: turns, the cache kept across them, and what happens when the context is full.

The prompt of every turn is built anew from the turns and compared with what the cache holds; only the difference is
read. When the turns no longer fit, the oldest are dropped and the system message stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cext import ContextFullError
from cext.tokenizer import Message
from dsv2cli.generate import Evaluator, Progress, Sequencer, Stats, round_up_context, tokens

if TYPE_CHECKING:
    from cext import Sampler, Session
    from cext.tokenizer import Tokenizer

LEAST_ROOM = 256  # tokens kept free for an answer before it begins; a quarter of the context where that is less


@dataclass
class Turn:
    """What a person said and the tokens that answered it, without the token that ends an answer."""

    user: str
    answer: list[int] = field(default_factory=list)


class Conversation:
    """Turns over one session. ``dropped(n)`` is told when the n oldest turns leave the context; n_draft: see tokens."""

    def __init__(
        self,
        session: Session | Evaluator,
        tokenizer: Tokenizer,
        system: str | None = None,
        *,
        raw: bool = False,
        n_draft: int = 0,
        dropped: Callable[[int], None] = lambda n: None,
    ) -> None:
        self._sequencer = Sequencer(session)
        self._tokenizer = tokenizer
        self._raw = raw
        self._n_draft = n_draft
        self._dropped = dropped
        self.system = system
        self.turns: list[Turn] = []

    @property
    def n_ctx(self) -> int:
        return self._sequencer.session.n_ctx

    @property
    def n_used(self) -> int:
        """Tokens in the cache."""
        return self._sequencer.session.n_past

    def clear(self) -> None:
        """Forget the turns; the system message stays."""
        self.turns.clear()

    def reply(
        self, text: str, sampler: Sampler, limit: int | None, stats: Stats, told: Progress = lambda done, n: None
    ) -> Iterator[int]:
        """Answer ``text``, token by token. A turn that fails before its first token leaves no trace.

        Raises ContextFullError where ``text`` with the system message alone is longer than the context.
        """
        if self._raw:
            self.turns.clear()  # nothing joins the texts of different turns but a template
        turn = Turn(text)
        self.turns.append(turn)
        done = False
        try:
            prompt = self._make_room(self._prompt(), self._reserve(limit))
            yield from self._answer(turn, prompt, sampler, limit, stats, told)
            done = True
        finally:
            if not turn.answer and not done:
                self.turns.remove(turn)

    def take_back(self) -> str | None:
        """Remove the last turn and return what the person said in it, to be asked again; None where there is none."""
        return self.turns.pop().user if self.turns else None

    def _answer(
        self, turn: Turn, prompt: list[int], sampler: Sampler, limit: int | None, stats: Stats, told: Progress
    ) -> Iterator[int]:
        """The answer, going on in a smaller past whenever the context fills up in the middle of it."""
        first: Stats | None = None
        while True:
            left = None if limit is None else limit - len(turn.answer)
            part = Stats()
            try:
                is_end = self._tokenizer.is_end
                for token in tokens(self._sequencer, prompt, sampler, is_end, left, part, told, self._n_draft):
                    turn.answer.append(token)
                    yield token
            finally:
                first = _add(first, part, stats)
            if part.stop != "context" or len(self.turns) == 1:
                return
            prompt = self._make_room(self._prompt(), self._reserve(left))
            if len(prompt) >= self.n_ctx:
                return

    def _reserve(self, limit: int | None) -> int:
        reserve = min(LEAST_ROOM, self.n_ctx // 4)
        return reserve if limit is None else min(limit, reserve)

    def _make_room(self, prompt: list[int], reserve: int) -> list[int]:
        """The prompt of as many of the latest turns as leave ``reserve`` tokens free, or of the last turn alone."""
        n_dropped = 0
        turns = self.turns
        while len(prompt) + reserve > self.n_ctx and n_dropped < len(turns) - 1:
            n_dropped += 1
            prompt = self._prompt(n_dropped)
        if len(prompt) > self.n_ctx:
            raise ContextFullError(
                f"{len(prompt)} tokens do not fit in a context of {self.n_ctx}",
                f"-c {round_up_context(len(prompt))} makes room for them",
            )
        if n_dropped:
            del turns[:n_dropped]
            self._dropped(n_dropped)
        return prompt

    def _prompt(self, n_dropped: int = 0) -> list[int]:
        """The ids of the turns; the last one's answer stands open, so that it can be begun or gone on with."""
        *past, last = self.turns[n_dropped:]
        if self._raw:
            return self._tokenizer.prompt(last.user) + last.answer
        messages = [Message("system", self.system)] if self.system else []
        for turn in past:
            messages += [Message("user", turn.user), Message("assistant", turn.answer)]
        return self._tokenizer.chat([*messages, Message("user", last.user)]) + last.answer


def _add(first: Stats | None, part: Stats, total: Stats) -> Stats:
    """Join the statistics of an answer's parts: the prompt is the first part's, times and tokens add up."""
    if first is None:
        total.n_prompt, total.n_reused, total.prefill_seconds = part.n_prompt, part.n_reused, part.prefill_seconds
    else:
        total.decode_seconds += part.prefill_seconds  # reading the past again is a pause inside the answer
    total.n_answer += part.n_answer
    total.n_drafted += part.n_drafted
    total.n_taken += part.n_taken
    total.decode_seconds += part.decode_seconds
    total.stop = part.stop
    return first or part
