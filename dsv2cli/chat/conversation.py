"""A conversation with a model: turns, the cache kept across them, and what happens when the context is full.

The prompt of every turn is built anew from the turns and compared with what the cache holds; only the difference is
read. When the turns no longer fit, the oldest are dropped and the system message stays.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from cext import ContextFullError
from cext.tokenizer import Answer, Message, TokenizerError
from dsv2cli.options import MAX_CONTEXT
from dsv2cli.scheduler import Context, End, Event, Lookup, Sampling, Scheduler, Sequence, Stats, Text, Token

if TYPE_CHECKING:
    from cext.tokenizer import Tokenizer
    from dsv2cli.engines.protocol import Session

LEAST_ROOM = 256  # tokens kept free for an answer before it begins; a quarter of the context where that is less


@dataclass
class Turn:
    """What a person said and the tokens that answered it, without the token that ends an answer.

    opening: the end of the prompt that belongs to the answer: the tag that opens its reasoning, or nothing. said: the
    answer's text, where its tokens are not known: a server's; n_used: tokens of context up to its end, as the server
    told them.
    """

    user: str
    answer: list[int] = field(default_factory=list)
    opening: list[int] = field(default_factory=list)
    said: Answer | None = None
    n_used: int | None = field(default=None, compare=False)


class Talk(Protocol):
    """A conversation, whoever answers: a model here (``Conversation``) or a server (remote.py)."""

    turns: list[Turn]
    system: str | None

    @property
    def thinking(self) -> bool | None:
        """Whether the answers are to reason; None leaves it to the template."""

    @thinking.setter
    def thinking(self, thinking: bool | None) -> None: ...
    @property
    def n_ctx(self) -> int:
        """Tokens of context; 0 where that is not known."""

    @property
    def n_used(self) -> int | None:
        """Of them, those that the turns take; None where that is not known."""

    def said(self) -> Answer:
        """The last answer in its two parts."""

    def text_of(self, turn: Turn) -> str:
        """An answer as it was written."""

    def changed(self, turn: Turn, text: str) -> Turn:
        """The same question with another answer."""

    def cancel(self) -> bool:
        """End the answer that is being written; False where none is, or it ends already. From a signal's handler."""

    def clear(self) -> None:
        """Forget the turns; the system message stays."""


class Conversation:
    """Turns over one session. ``dropped(n)`` is told when the n oldest turns leave the context; n_draft: most tokens
    that Lookup drafts at once; 0: none. raw: no template; then special: control tokens may be spelt, and suffix: what
    follows the text that is asked for. thinking: whether the model is to reason; None leaves it to the template.
    n_ctx_train: tokens that the model was trained for, for the hint of a prompt that is too long; 0: not known.
    interrupt: ends an evaluation under way, where the engine can."""

    def __init__(
        self,
        session: Session,
        tokenizer: Tokenizer,
        system: str | None = None,
        *,
        raw: bool = False,
        special: bool = False,
        suffix: str | None = None,
        thinking: bool | None = None,
        n_draft: int = 0,
        n_ctx_train: int = 0,
        dropped: Callable[[int], None] = lambda n: None,
        interrupt: Callable[[], None] = lambda: None,
        scheduler: Scheduler | None = None,
    ) -> None:
        self.session = session
        self._scheduler = scheduler or Scheduler()
        self._sequence: Sequence | None = None  # the answer that is being written
        self._tokenizer = tokenizer
        self._raw = raw
        self._special = special
        self._suffix = suffix
        self.thinking = thinking
        self._n_draft = n_draft
        self._n_ctx_train = n_ctx_train
        self._dropped = dropped
        self._interrupt = interrupt
        self.system = system
        self.turns: list[Turn] = []
        self._n_prompt = 0  # tokens of the last one
        self._counted: tuple[object, int] = (None, 0)  # what n_used was last known of, and n_used

    @property
    def session(self) -> Session:
        """The cache. Another one, of the same model, may take its place between two answers."""
        return self._session

    @session.setter
    def session(self, session: Session) -> None:
        self._session, self._context = session, Context(session)

    @property
    def n_ctx(self) -> int:
        return self._context.n_ctx

    @property
    def n_used(self) -> int:
        """Tokens that the turns take, whatever the cache holds: more than them, another branch, or nothing yet."""
        if self._counted[0] != self._countable():
            self._count(None)
        return self._counted[1]

    def _countable(self) -> tuple[object, ...]:
        return self.system, self.thinking, list(self.turns), len(self.turns[-1].answer) if self.turns else 0

    def _count(self, n_prompt: int | None) -> None:
        """Find n_used. n_prompt: tokens up to where the last answer begins, where they are known: to find them takes
        all that was said as tokens."""
        n = 0
        if self.turns:
            try:
                n_prompt = len(self._prompt()) if n_prompt is None else n_prompt
                n = n_prompt + len(self.turns[-1].answer)
            except TokenizerError:  # a template that refuses what was set since
                n = self.session.n_past
        self._counted = self._countable(), min(n, self.n_ctx)  # the oldest are dropped before the next answer

    @property
    def thinking(self) -> bool | None:
        """Whether the model is to reason. Setting it raises TemplateError where the template has no such switch."""
        return self._thinking

    @thinking.setter
    def thinking(self, thinking: bool | None) -> None:
        self._tokenizer.check_thinking(thinking)
        self._thinking = thinking

    def clear(self) -> None:
        """Forget the turns; the system message stays."""
        self.turns.clear()

    def reply(
        self, text: str, sampler: Sampling, limit: int | None, stats: Stats | None = None
    ) -> Generator[Event, None, None]:
        """Answer ``text``, event by event. A turn that fails before its first token leaves no trace.

        Raises ContextFullError where ``text`` with the system message alone is longer than the context, and what the
        engine raises.
        """
        if self._raw:
            self.turns.clear()  # nothing joins the texts of different turns but a template
        yield from self._answer(Turn(text), sampler, limit, stats)

    def go_on(self, sampler: Sampling, limit: int | None, stats: Stats | None = None) -> Generator[Event, None, None]:
        """The last answer goes on from where it ended, in a turn that takes the place of the last. See ``reply``."""
        last = self.turns.pop()
        turn = Turn(last.user, list(last.answer), list(last.opening))
        try:
            yield from self._answer(turn, sampler, limit, stats)
        finally:
            if len(turn.answer) == len(last.answer):
                if self.turns and self.turns[-1] is turn:
                    del self.turns[-1]
                self.turns.append(last)

    def _answer(
        self, turn: Turn, sampler: Sampling, limit: int | None, stats: Stats | None
    ) -> Generator[Event, None, None]:
        self.turns.append(turn)
        done = False
        try:
            sequence = self._sequence = self._begin(list(turn.answer), sampler, limit, stats)
            self._scheduler.add(sequence)
            for event in self._scheduler.run():
                if isinstance(event, Token):
                    turn.answer.append(event.id)
                elif isinstance(event, End):
                    if event.error is not None:
                        raise event.error
                    done = event.reason != "cancelled"
                yield event
        finally:
            if self._sequence is not None:
                self._scheduler.remove(self._sequence)
                self._sequence = None
            if not turn.answer and not done and self.turns and self.turns[-1] is turn:
                del self.turns[-1]
            elif done:
                self._count(self._n_prompt)

    def cancel(self) -> bool:
        """Let the answer that is being written end before the next step; False where none is, or it does already."""
        if self._sequence is None or self._sequence.cancelled:
            return False
        self._sequence.cancel()
        self._interrupt()
        return True

    @property
    def opening(self) -> str:
        """What the last prompt holds of its answer: the tag that opens its reasoning, or nothing."""
        return self._tokenizer.decode(self.turns[-1].opening) if self.turns else ""

    def said(self) -> Answer:
        """The last answer in its two parts, reasoning and content; without a template all of it is content."""
        turn = self.turns[-1] if self.turns else Turn("")
        if self._raw or self._suffix is not None:
            return Answer(None, self._tokenizer.decode(turn.answer))
        return self._tokenizer.split_answer(turn.opening + turn.answer)

    def text_of(self, turn: Turn) -> str:
        """See ``Talk``."""
        return self._tokenizer.decode(turn.answer)

    def changed(self, turn: Turn, text: str) -> Turn:
        """See ``Talk``."""
        return Turn(turn.user, self._tokenizer.encode(text), list(turn.opening))

    def _begin(self, held: list[int], sampler: Sampling, limit: int | None, stats: Stats | None) -> Sequence:
        """held: what there is of the answer already."""

        def refill(answer: list[int]) -> list[int] | None:
            """Go on in a smaller past when the context fills up in the middle of the answer."""
            if len(self.turns) == 1:
                return None
            left = None if limit is None else limit - len(answer)
            prompt = self._make_room([*held, *answer], self._reserve(left))
            return prompt if len(prompt) < self.n_ctx else None

        return Sequence(
            self._context,
            self._make_room(held, self._reserve(limit)),
            sampler,
            Text(self._tokenizer.stream()),
            self._tokenizer.is_end,
            limit=limit,
            drafter=Lookup(self._n_draft) if self._n_draft else None,
            refill=refill,
            stats=stats,
        )

    def _reserve(self, limit: int | None) -> int:
        reserve = min(LEAST_ROOM, self.n_ctx // 4)
        return reserve if limit is None else min(limit, reserve)

    def _make_room(self, answer: list[int], reserve: int) -> list[int]:
        """The prompt of as many of the latest turns as leave ``reserve`` tokens free, or of the last turn alone."""
        turns, n_dropped = self.turns, 0
        prompt, room = self._prompt(), self.n_ctx - len(answer)
        if len(prompt) + reserve > room and len(turns) > 1:
            n_dropped = bisect.bisect_left(
                range(len(turns) - 1), True, key=lambda n: len(self._prompt(n)) + reserve <= room
            )
            prompt = self._prompt(n_dropped)
        if (n := len(prompt) + len(answer)) > self.n_ctx:
            raise ContextFullError(
                f"{n} tokens do not fit in a context of {self.n_ctx}", room_hint(n, self._n_ctx_train)
            )
        if n_dropped:
            del turns[:n_dropped]
            self._dropped(n_dropped)
        if self._suffix is None and not self._raw:
            turns[-1].opening = self._tokenizer.opening(prompt)
        self._n_prompt = len(prompt)
        return prompt + answer

    def _prompt(self, n_dropped: int = 0) -> list[int]:
        """The ids of the turns, up to where the last one's answer begins."""
        *past, last = self.turns[n_dropped:]
        if self._suffix is not None:
            return self._tokenizer.fill_in(last.user, self._suffix)
        if self._raw:
            return self._tokenizer.prompt(last.user, special=self._special)
        messages = [Message("system", self.system)] if self.system else []
        for turn in past:
            messages += [Message("user", turn.user), Message("assistant", turn.opening + turn.answer)]
        return self._tokenizer.chat([*messages, Message("user", last.user)], thinking=self.thinking)


def round_up_context(n: int) -> int:
    """A context a person would choose, with space for an answer."""
    return -(-(n + 256) // 1024) * 1024


def room_hint(n: int, n_ctx_train: int) -> str:
    """What to do about a prompt of n tokens: a larger context where the model was trained for one, else less text."""
    wanted = round_up_context(n)
    if wanted > MAX_CONTEXT:
        return "shorten it"
    if not 0 < n_ctx_train < wanted:
        return f"-c {wanted} makes room for them"
    if n < n_ctx_train:
        return f"-c {n_ctx_train} makes room for them: all that the model was trained for"
    return f"shorten it: the model was trained for {n_ctx_train} tokens; past them (-c {wanted}) it may write nonsense"
