"""Sequences for the token loop's tests: samplers that say what they are told to, evaluations that are watched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

import cext
from dsv2cli.scheduler import Context, Event, Scheduler, Text, Token
from dsv2cli.scheduler import Sequence as Answer


def never_ends(token: int) -> bool:
    return False


def greedy() -> cext.Sampler:
    return cext.Sampler(temperature=0)


class Letters:
    """Text in which every token is a character of its own."""

    def feed(self, token: int) -> str:
        return chr(0x100 + token)

    def finish(self) -> str:
        return ""


class Scripted:
    """A sampler that says what it is told to, and keeps the logits it was shown."""

    def __init__(self, script: Sequence[int]) -> None:
        self.script, self.shown = list(script), list[NDArray[np.float32]]()

    def accept(self, ids: Sequence[int]) -> None:
        """Nothing depends on what was said."""

    def sample(self, logits: NDArray[np.float32]) -> int:
        self.shown.append(logits.copy())
        return self.script[len(self.shown) - 1]


class Watched:
    """``cext.eval_batch``, noting what was evaluated; at some calls Ctrl-C or an error comes before it, or after."""

    def __init__(self) -> None:
        self.steps: list[list[int]] = []  # tokens of each sequence, step by step
        self.evaluated: list[int] = []
        self.raises: dict[int, tuple[str, Callable[[], Any]]] = {}  # number of the call -> ("before" or "after", what)
        self.calls = 0

    def __call__(self, batch: list[tuple[cext.Session, list[int]]], n_logits: list[int]) -> NDArray[np.float32]:
        self.calls += 1
        when, happens = self.raises.get(self.calls, ("", lambda: None))
        if when == "before":
            happens()
        out = cext.eval_batch(batch, n_logits)
        self.steps.append([len(ids) for _, ids in batch])
        for _, ids in batch:
            self.evaluated += ids
        if when == "after":
            happens()
        return out


def sequence(session: cext.Session, prompt: Sequence[int], **options: Any) -> Answer:
    """A greedy answer that no token ends, unless the options say otherwise."""
    given = {"sampler": greedy(), "text": Text(Letters()), "is_end": never_ends, **options}
    context = given.pop("context", None) or Context(session)
    return Answer(context, list(prompt), **given)


def alone(session: cext.Session, prompt: Sequence[int], **options: Any) -> list[int]:
    """What it answers with nothing beside it."""
    scheduler = Scheduler()
    answer = sequence(session, prompt, **options)
    scheduler.add(answer)
    return said(list(scheduler.run()), answer)


def said(events: Sequence[Event], answer: Answer) -> list[int]:
    """The tokens of an answer, by its events."""
    return [e.id for e in events if isinstance(e, Token) and e.sequence is answer]
