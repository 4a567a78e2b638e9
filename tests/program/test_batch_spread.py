"""What is asked of which actor when actors die; Ray itself is played here (see test_batch_ray)."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from dsv2cli.batch.runner import StoppedError
from dsv2cli.server import cluster
from dsv2cli.server.errors import ApiError


class ActorError(Exception):
    pass


class TaskError(Exception):
    cause: BaseException | None = None


RAY = SimpleNamespace(exceptions=SimpleNamespace(RayActorError=ActorError, RayTaskError=TaskError))


class Actor:
    """Dies under so many of the requests that it hears, and after each fails so many calls."""

    def __init__(self, deaths: int = 0, away: int = 0) -> None:
        self.deaths, self.away, self.left, self.heard = deaths, away, 0, 0
        self.about = SimpleNamespace(remote=self._about)
        self.answer = SimpleNamespace(remote=self._answer)

    async def _about(self) -> tuple[str, int, int]:
        await asyncio.sleep(0)
        if self.left:
            self.left -= 1
            raise ActorError
        return "model", 1, 1

    async def _answer(self, *_: Any) -> tuple[dict[str, Any], None]:
        await self._about()
        self.heard += 1
        if self.deaths:
            self.deaths -= 1
            self.left = self.away
            raise ActorError
        return {}, None


def ask(*actors: Actor, n: int = 1) -> list[Any]:
    async def asked() -> list[Any]:
        spread = cluster.Spread(RAY, list(actors))
        return await asyncio.gather(*(spread.answer("/", b"", 0) for _ in range(n)), return_exceptions=True)

    return asyncio.run(asked())


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "PAUSE", 0)


@pytest.mark.parametrize("n", [1, 5])
def test_one_that_opens_the_model_again_is_waited_for(n: int) -> None:
    assert ask(Actor(deaths=1, away=100), n=n) == [{}] * n
    assert ask(Actor(deaths=1, away=100), Actor(deaths=1, away=100), n=n) == [{}] * n


def test_meanwhile_another_is_asked() -> None:
    first, second = Actor(deaths=1, away=10**9), Actor()
    assert ask(first, second, n=4) == [{}] * 4
    assert first.heard == 1 and second.heard == 4


def test_what_kills_every_actor_is_given_up() -> None:
    actors = Actor(deaths=10**9, away=3), Actor(deaths=10**9, away=3)
    [error] = ask(*actors)
    assert isinstance(error, ApiError) and error.code == "actor_died"
    assert actors[0].heard + actors[1].heard == cluster.ATTEMPTS


def test_none_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "START_SECONDS", 0.01)
    [error] = ask(Actor(deaths=1, away=10**9))
    assert isinstance(error, StoppedError)
