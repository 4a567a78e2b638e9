"""The engine's thread between two steps: who joins, who makes way, and what a client that goes leaves to the others."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import pytest
from support.serving import USUAL, Served, served
from support.tiny import spec_named, variant
from support.vocab import write_model

from dsv2cli.server.engine import BESIDE_AT_FIRST, Engine, Ticket, beside_next
from dsv2cli.server.generation import Ended, Generation, Params, Piece

PARALLEL = 2
LONG = 99_000  # it does not end by itself


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    spec = variant(spec_named("lite"), n_ctx=4096)
    path = write_model(tmp_path_factory.mktemp("engine") / "tiny.gguf", spec, endless=True)
    with served(path, replace(USUAL, n_ctx=LONG + 100, parallel=PARALLEL)) as running:
        yield running


def submitted(engine: Engine, begin: int, limit: int, *, background: bool) -> Ticket:
    asked = Generation(prompt=[begin, *range(20)], params=Params(temperature=0), limit=limit, background=background)
    return engine.submit(asked)


async def began(ticket: Ticket) -> None:
    while not any(isinstance(event, Piece) for event in await ticket.heard()):
        pass


async def ended(ticket: Ticket) -> Ended:
    while True:
        for event in await ticket.heard():
            if isinstance(event, Ended):
                return event


def between_steps(engine: Engine, function: Callable[[], Any]) -> Awaitable[Any]:
    """Run where the thread admits next, before a step."""
    return asyncio.wrap_future(engine.call(function))


@pytest.mark.parametrize("goes", ["foreground", "background"])
def test_who_goes_takes_no_other_along(server: Served, goes: str) -> None:
    """A paused answer takes a slot again when there is one, and its end needs none."""
    engine = server.engine

    async def scene() -> list[Ended]:
        limit = 200 if goes == "foreground" else LONG
        behind = [submitted(engine, 100 + i, limit, background=True) for i in range(PARALLEL)]
        for ticket in behind:
            await began(ticket)
        n_before = 1 if goes == "foreground" else PARALLEL
        before = [submitted(engine, 200 + i, LONG, background=False) for i in range(n_before)]
        for ticket in before:
            await began(ticket)
        going, staying = (before, behind) if goes == "foreground" else (behind, before)

        def go() -> None:
            for ticket in going:
                ticket.cancel()

        await between_steps(engine, go)
        gone = [await ended(ticket) for ticket in going]
        assert [event.reason for event in gone] == ["cancelled"] * len(going)
        if goes == "background":
            await between_steps(engine, lambda: [ticket.cancel() for ticket in staying])
        return [await ended(ticket) for ticket in staying]

    left = asyncio.run(scene())
    assert {event.reason for event in left} == {"length" if goes == "foreground" else "cancelled"}
    assert [event.error for event in left] == [None] * PARALLEL


def test_no_more_is_fetched_than_can_join(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow:
        """A disk that does not answer."""

        def __init__(self) -> None:
            self.asked: list[Future[None]] = []

        def fetch(self, *_: object) -> Future[None]:
            self.asked.append(Future())
            return self.asked[-1]

    engine, disk = server.engine, Slow()
    monkeypatch.setattr(engine, "disk", disk)

    async def scene() -> None:
        tickets = [submitted(engine, i, 3, background=False) for i in range(PARALLEL + 3)]
        for _ in range(3):
            await between_steps(engine, lambda: None)
        assert len(disk.asked) == PARALLEL
        tickets[0].cancel()  # another's turn
        for _ in range(3):
            await between_steps(engine, lambda: None)
        assert len(disk.asked) == PARALLEL + 1 and tickets[0].fetching is None
        for n in range(PARALLEL + 3):
            while len(disk.asked) <= n:
                await asyncio.sleep(0.01)
            disk.asked[n].set_result(None)
        for ticket in tickets[1:]:
            assert (await ended(ticket)).reason == "length"

    asyncio.run(scene())


@pytest.mark.parametrize(
    ("n_answers", "alone", "token", "settles", "longest"),
    [
        (1, 0.03, 0.002, 110, 0.26),
        (1, 0.03, 0.01, 22, 0.26),
        (1, 0.1, 0.03, 10, 0.42),  # slow: few, and still below half a second
        (1, 0.6, 0.04, 4, 1.0),  # too slow for anything
        (16, 0.6, 0.01, 16, 0.8),  # so are answers alone: a prompt does not wait for them for ever
        (1, 0.0, 1e-6, None, 0.26),
    ],
)
def test_what_a_prompt_takes_of_a_step_beside_answers(
    n_answers: int, alone: float, token: float, settles: int | None, longest: float
) -> None:
    """On machines whose steps take ``alone`` seconds for the answers, and so many more for each token of a prompt."""
    beside, taken = BESIDE_AT_FIRST, []
    for _ in range(40):
        taken.append(alone + token * beside)
        beside = beside_next(min(beside, 1000), min(beside, 1000), taken[-1], n_answers)
    assert max(taken) <= longest
    assert beside > 1000 if settles is None else abs(beside - settles) <= 1


def test_what_was_not_read_tells_nothing() -> None:
    """Steps that only tell news, or end a prompt with few tokens, are quick: the next prompt begins no larger."""
    assert beside_next(10, 0, 1e-5, 1) == 10
    assert beside_next(10, 3, 0.01, 1) == 10
    assert beside_next(10, 10, 0.01, 1) == 20
    assert beside_next(40, 3, 1.0, 1) < 40
