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
    def eval(self, ids: Sequence[int]) -> NDArray[np.float32]: ...
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

    @property
    def room(self) -> int:
        return self.session.n_ctx - self.session.n_past

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

    def append(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Evaluate more tokens after those in the cache; the logits after the last."""
        del self._ids[self.session.n_past :]
        self._ids += ids  # before evaluating: an interruption in between leaves n_past to tell the truth
        return self.session.eval(ids)

    def reusable(self, ids: Sequence[int]) -> int:
        """How many of the first ``ids`` are in the cache already; never all of them, since logits are wanted."""
        n = 0
        for mine, wanted in zip(self.ids, ids[:-1], strict=False):
            if mine != wanted:
                break
            n += 1
        return n


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
) -> Iterator[int]:
    """Sample after ``prompt`` until an end token, ``limit`` tokens or a full context; ``stats`` fills as it goes.

    The token that ends the answer is not yielded. The last token yielded may not be in the cache.
    """
    stats.n_prompt, stats.n_reused, stats.stop = len(prompt), sequencer.reusable(prompt), "interrupted"
    begun = time.perf_counter()
    logits = sequencer.read(prompt, told)
    first = time.perf_counter()
    stats.prefill_seconds += first - begun
    sampler.accept(prompt[stats.n_reused :])
    n = 0
    while limit is None or n < limit:
        token = sampler.sample(logits)
        if is_end(token):
            stats.stop = "end"
            return
        n += 1
        stats.n_answer += 1
        yield token
        if sequencer.room == 0:
            stats.stop = "context"
            return
        if limit is None or n < limit:
            logits = sequencer.append([token])
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
