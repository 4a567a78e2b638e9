"""What any dialect asks of the engine, and what it hears of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from dsv2cli import options
from dsv2cli.scheduler import Logprobs, Reason, Stats

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Constraint(Protocol):
    """Which tokens may come next. One for each answer; it is moved by what was chosen."""

    def mask(self, logits: NDArray[np.float32]) -> None:
        """Set the logits of tokens that may not come to -inf, in place; (n_vocab,)."""

    def accept(self, token: int) -> None: ...


@dataclass(frozen=True)
class Params:
    """How tokens are chosen. seed None: a new one each time. bias: token -> added to its logit."""

    temperature: float = options.TEMPERATURE
    top_k: int = options.TOP_K
    top_p: float = options.TOP_P
    min_p: float = options.MIN_P
    repeat_penalty: float = options.REPEAT_PENALTY
    repeat_last_n: int = 64
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    bias: dict[int, float] = field(default_factory=dict)
    seed: int | None = None


@dataclass(frozen=True)
class Generation:
    """A prompt and how it is answered, n times.

    n_top: how many of the likeliest tokens' log-probabilities come with each token; None: none. drawn: as they were
    drawn from, not the model's own. rows: those of the prompt's tokens as well. opening: the end of the prompt that
    belongs to the answer (a reasoning tag). salt: requests share what was read only with those of the same salt.
    constraint: makes one for each answer. slot: the number that the answer is to have among those stepped together,
    where it is free. background: it is answered while nobody waits for another.
    """

    prompt: list[int]
    params: Params
    limit: int | None = None
    n: int = 1
    stops: tuple[str, ...] = ()
    n_top: int | None = None
    drawn: bool = False
    rows: bool = False
    opening: tuple[int, ...] = ()
    salt: bytes = b""
    use_cache: bool = True
    ignore_end: bool = False
    constraint: Callable[[], Constraint] | None = None
    slot: int | None = None
    background: bool = False


class Began(NamedTuple):
    """The prompt is being read: so many of its tokens, which were not in the cache, of so many."""

    done: int
    n: int
    cached: int


class Piece(NamedTuple):
    """A token of answer number ``choice``, and the text that is certain with it."""

    choice: int
    id: int
    text: str
    logprobs: Logprobs | None


class Ended(NamedTuple):
    """An answer's last event, with the text that waited. rows: the prompt's log-probabilities, where asked for."""

    choice: int
    reason: Reason
    text: str
    stop: str | None  # the stop string that ended it
    stats: Stats
    rows: list[Logprobs | None] | None
    error: Exception | None


Heard = Began | Piece | Ended


@dataclass(frozen=True)
class Job:
    """A request that is answered whole: its prompts, and what makes a body of the events of each. Knows no connection.

    build is called once.
    """

    asked: list[Generation]
    build: Callable[[list[list[Heard]]], dict[str, Any]]


def take_all(events: Iterable[Heard], take: Callable[[Piece | Ended], object]) -> Ended:
    """Give every event of one answer to ``take``; the last one."""
    ended = None
    for event in events:
        if isinstance(event, Piece | Ended):
            take(event)
            ended = event
    assert isinstance(ended, Ended)
    return ended
