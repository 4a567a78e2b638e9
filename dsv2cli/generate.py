"""The token loop: a session that remembers its tokens, answers streamed as text, and what they cost.

Ctrl-C may come anywhere, so nothing here is believed that the session does not confirm: after an interruption its
``n_past`` says how many of the tokens given to it were evaluated.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from cext import Sampler, Session
    from cext.tokenizer import Tokenizer

CHUNK = 512  # tokens the engine evaluates at once: progress is told between chunks, and Ctrl-C heard
Stop = Literal["end", "length", "context", "interrupted"]
Progress = Callable[[int, int], None]  # (tokens read, tokens to read)


@dataclass
class Stats:
    """What one answer cost. Times in seconds."""

    n_prompt: int = 0  # tokens of the whole prompt
    n_reused: int = 0  # of them, those that were in the cache
    n_answer: int = 0
    n_drafted: int = 0  # tokens evaluated on the guess that they would be chosen
    n_taken: int = 0  # of them, those that were
    prefill_seconds: float = 0.0  # reading the prompt, to the first logits
    decode_seconds: float = 0.0  # all tokens after the first
    stop: Stop = "end"

    @property
    def prefill_rate(self) -> float:
        return _rate(self.n_prompt - self.n_reused, self.prefill_seconds)

    @property
    def decode_rate(self) -> float:
        return _rate(self.n_answer - 1, self.decode_seconds)


def _rate(n: int, seconds: float) -> float:
    return n / seconds if n > 0 and seconds > 0 else 0.0


class Evaluator(Protocol):
    """What the token loop needs of a ``cext.Session``."""

    n_ctx: int

    @property
    def n_past(self) -> int: ...
    def eval(self, ids: Sequence[int], logits: Literal["last", "all"] = "last") -> NDArray[np.float32]: ...
    def rewind(self, n: int) -> None: ...


class Sequencer:
    """A session together with the tokens in it, so that a prompt which begins alike is not read again."""

    def __init__(self, session: Session | Evaluator) -> None:
        self.session = session
        self._ids: list[int] = []

    @property
    def ids(self) -> list[int]:
        """The tokens in the cache, in order."""
        return self._ids[: self.session.n_past]

    def read(self, ids: Sequence[int], told: Progress = lambda done, n: None) -> NDArray[np.float32]:
        """Make the cache hold exactly ``ids`` and return the logits after the last; reads only what differs.

        ValueError where there are none.
        """
        same = self.reusable(ids)
        self.session.rewind(same)
        for start in range(same, len(ids) - CHUNK, CHUNK):
            told(start - same, len(ids) - same)
            self.append(ids[start : start + CHUNK])
        return self.append(ids[same + (len(ids) - same - 1) // CHUNK * CHUNK :])

    def append(self, ids: Sequence[int], logits: Literal["last", "all"] = "last") -> NDArray[np.float32]:
        """Evaluate more tokens after those in the cache; the logits after the last, or after each."""
        del self._ids[self.session.n_past :]
        self._ids += ids  # before evaluating: an interruption in between leaves n_past to tell the truth
        return self.session.eval(ids, logits)

    def reusable(self, ids: Sequence[int]) -> int:
        """How many of the first ``ids`` are in the cache already; never all of them, since logits are wanted."""
        n = 0
        for mine, wanted in zip(self.ids, ids[:-1], strict=False):
            if mine != wanted:
                break
            n += 1
        return n


class Lookup:
    """Prompt lookup: where the last MATCHED tokens stood before, what followed them is evaluated with the next token.

    As long as sampling takes the drafted tokens, their logits are there already; at the first other token the rest is
    forgotten. Every token is sampled from logits of its own, so the answer is the same: bit for bit with up to 3
    drafted tokens; longer steps add in another order, which tells in near ties. A step of k + 1 tokens reads more
    experts than one of one (on V2-Lite 2 tokens cost 1.6 times one, 4 cost 2.7), so drafts must mostly be right: hence
    the long match.
    """

    MATCHED = 8

    def __init__(self, sequencer: Sequencer, n_draft: int, stats: Stats) -> None:
        self._sequencer, self._n_draft, self._stats = sequencer, n_draft, stats
        self._ids: list[int] = []  # the tokens that were chosen
        self._followed: dict[tuple[int, ...], int] = {}  # MATCHED tokens -> position after where they stood last
        self._draft: list[int] = []
        self._rows: Iterator[NDArray[np.float32]] = iter(())  # logits after each drafted token
        for token in sequencer.ids:
            self._add(token)

    @property
    def room(self) -> int:
        return self._sequencer.session.n_ctx - len(self._ids)

    def append(self, token: int) -> NDArray[np.float32]:
        """The logits after ``token``, from the draft or evaluated with a new one."""
        expected = self._draft.pop(0) if self._draft else None
        self._add(token)
        if token == expected:
            self._stats.n_taken += 1
            return next(self._rows)
        self._sequencer.session.rewind(len(self._ids) - 1)
        self._draft = self._guess()
        if not self._draft:
            return self._sequencer.append([token])
        self._stats.n_drafted += len(self._draft)
        self._rows = iter(self._sequencer.append([token, *self._draft], "all"))
        return next(self._rows)

    def _add(self, token: int) -> None:
        if self._n_draft and len(self._ids) >= self.MATCHED:
            self._followed[tuple(self._ids[-self.MATCHED :])] = len(self._ids)
        self._ids.append(token)

    def _guess(self) -> list[int]:
        """What followed the last tokens, as much as may be drafted and fits."""
        start = self._followed.get(tuple(self._ids[-self.MATCHED :]))
        return [] if start is None else self._ids[start : start + min(self._n_draft, self.room)]


def round_up_context(n: int) -> int:
    """A context a person would choose, with space for an answer."""
    return -(-(n + 256) // 1024) * 1024


def tokens(
    sequencer: Sequencer,
    prompt: Sequence[int],
    sampler: Sampler,
    is_end: Callable[[int], bool],
    limit: int | None,
    stats: Stats,
    told: Progress = lambda done, n: None,
    n_draft: int = 0,
) -> Iterator[int]:
    """Sample after ``prompt`` until an end token, ``limit`` tokens or a full context; ``stats`` fills as it goes.

    The token that ends the answer is not yielded. The last token yielded may not be in the cache. n_draft: most
    tokens that Lookup drafts at once; 0: none.
    """
    stats.n_prompt, stats.n_reused, stats.stop = len(prompt), sequencer.reusable(prompt), "interrupted"
    begun = time.perf_counter()
    logits = sequencer.read(prompt, told)
    first = time.perf_counter()
    stats.prefill_seconds += first - begun
    sampler.accept(prompt[stats.n_reused :])
    ahead = Lookup(sequencer, n_draft, stats)
    n = 0
    while limit is None or n < limit:
        token = sampler.sample(logits)
        if is_end(token):
            stats.stop = "end"
            return
        n += 1
        stats.n_answer += 1
        yield token
        if ahead.room == 0:
            stats.stop = "context"
            return
        if limit is None or n < limit:
            logits = ahead.append(token)
            stats.decode_seconds += time.perf_counter() - first
            first = time.perf_counter()
    stats.stop = "length"


def stream(tokenizer: Tokenizer, ids: Iterator[int]) -> Iterator[str]:
    """Text of tokens as they come; whole characters only."""
    text = tokenizer.stream()
    for token in ids:
        if piece := text.feed(token):
            yield piece
    if rest := text.finish():
        yield rest


def resident_bytes() -> int:
    """Physical memory of this process now; its peak where the system does not tell."""
    try:
        with open("/proc/self/statm", "rb") as file:  # noqa: PTH123
            import resource

            return int(file.read().split()[1]) * resource.getpagesize()
    except (OSError, ValueError, IndexError):
        import resource
        import sys

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
