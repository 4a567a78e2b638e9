"""``dsv2 batch --ray``: the same requests, answered by models that actors of a Ray cluster have opened.

An actor opens the model once. What is asked of one that dies is asked of another; Ray starts it again. Results come
back to the process that writes them, so that a run is gone on with as one without a cluster is.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import importlib
import logging
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv2cli.batch.runner import StoppedError
from dsv2cli.errors import CliError
from dsv2cli.server import offline, process
from dsv2cli.server.errors import ApiError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from dsv2cli.runtime import Wishes

Opening = tuple[Path, int | None, process.Settings, "Wishes"]  # the arguments of ``process.load``
START_SECONDS = 600.0
REACH_SECONDS = 10.0
ATTEMPTS = 8  # at a request under which actors die: it may be what kills them
PAUSE = 1.0  # seconds before one that died is tried again


class Worker:
    """What an actor is."""

    def __init__(self, opening: Opening) -> None:
        self._stack = contextlib.ExitStack()
        self._answerer = self._stack.enter_context(offline.here(process.load(*opening)))

    async def about(self) -> tuple[str, int, int]:
        """(the model's identity, answers that are stepped together, the process)."""
        return self._answerer.identity, self._answerer.n_parallel, os.getpid()

    async def look(self, url: str, body: bytes) -> Any:
        return await _packed(self._answerer.desk.look(url, body))

    async def answer(self, url: str, body: bytes, seed: int) -> Any:
        return await _packed(self._answerer.desk.answer(url, body, seed))


async def _packed(coming: Any) -> tuple[Any, dict[str, Any] | None]:
    """(value, the fields of the ApiError that came in its place): Ray's own errors are of failures alone."""
    try:
        return await coming, None
    except ApiError as error:
        return None, dataclasses.asdict(error)


@dataclass
class Spread:
    """A ``batch.runner.Desk`` whose requests go to the actor that has the fewest."""

    ray: Any
    actors: list[Any]
    n_read: int = 0
    n_written: int = 0
    under_way: list[int] = field(init=False)
    coming: dict[int, asyncio.Task[None]] = field(default_factory=dict)  # those that died, until they are back

    def __post_init__(self) -> None:
        self.under_way = [0] * len(self.actors)

    async def look(self, url: str, body: bytes) -> NDArray[np.int32]:
        found: NDArray[np.int32] = await self._ask("look", url, body)
        return found

    async def answer(self, url: str, body: bytes, seed: int) -> dict[str, Any]:
        found: dict[str, Any] = await self._ask("answer", url, body, seed)
        used = found.get("usage") or {}
        self.n_read += used.get("prompt_tokens", used.get("input_tokens", 0))
        self.n_written += used.get("completion_tokens", used.get("output_tokens", 0))
        return found

    async def _ask(self, method: str, *args: Any) -> Any:
        before = -1  # the one that died
        for _ in range(ATTEMPTS):
            chosen = await self._choose(before)
            self.under_way[chosen] += 1
            try:
                value, error = await getattr(self.actors[chosen], method).remote(*args)
            except self.ray.exceptions.RayActorError:
                before = chosen
                if chosen not in self.coming:
                    self.coming[chosen] = asyncio.create_task(self._come_back(chosen))
                continue
            except self.ray.exceptions.RayTaskError as failed:
                if isinstance(failed.cause, StoppedError):
                    raise StoppedError from None
                raise
            finally:
                self.under_way[chosen] -= 1
            if error is not None:
                raise ApiError(**error)
            return value
        raise ApiError(500, f"{ATTEMPTS} actors died on this request", "server_error", code="actor_died")

    async def _choose(self, before: int) -> int:
        """Of the actors that are there, another than ``before`` if there is one. StoppedError where none comes back."""
        try:
            async with asyncio.timeout(START_SECONDS):
                while len(self.coming) == len(self.actors):
                    await asyncio.wait(self.coming.values(), return_when=asyncio.FIRST_COMPLETED)
        except TimeoutError:
            raise StoppedError from None
        there = [i for i in range(len(self.actors)) if i not in self.coming]
        return min([i for i in there if i != before] or there, key=self.under_way.__getitem__)

    async def _come_back(self, i: int) -> None:
        """Wait for an actor that Ray starts again. While it opens the model every call fails at once, and with the
        same error as one under which it dies: only what answers ``about`` is asked."""
        try:
            while True:
                await asyncio.sleep(PAUSE)
                with contextlib.suppress(self.ray.exceptions.RayActorError):
                    await self.actors[i].about.remote()
                    return
        finally:
            del self.coming[i]


def _reach(address: str) -> None:
    """OSError where nothing listens there: Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), REACH_SECONDS).close()


@contextlib.contextmanager
def there(address: str, n: int | None, opening: Opening) -> Iterator[offline.Answerer]:
    """Actors on a cluster, ended with the block. n None: one for each of its machines. CliError."""
    try:
        ray: Any = importlib.import_module("ray")
    except ImportError:
        raise CliError("Ray is not installed here", "pip install 'dsv2[ray]'") from None
    path, threads, settings, wishes = opening
    try:
        _reach(address)
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False, include_dashboard=False)
    except (OSError, ValueError, RuntimeError) as error:
        raise CliError(f"no Ray cluster at {address!r}: {error}", "local starts one for this run") from None
    try:
        count = n or max(1, sum(bool(node["Alive"]) for node in ray.nodes()))
        kind = ray.remote(Worker).options(
            num_cpus=threads or 1, max_restarts=-1, max_concurrency=10_000, scheduling_strategy="SPREAD"
        )
        wishes = dataclasses.replace(wishes, told=False)
        actors = [kind.remote((path.resolve(), threads, settings, wishes)) for _ in range(count)]
        try:
            about = ray.get([actor.about.remote() for actor in actors], timeout=START_SECONDS)
        except ray.exceptions.RayError as error:
            raise CliError(f"the model does not open on every actor: {str(error).strip().splitlines()[-1]}") from None
        if len({identity for identity, _, _ in about}) > 1:
            raise CliError(f"`{path}` is not the same model on every machine")
        spread = Spread(ray, actors)
        parallel = sum(n_parallel for _, n_parallel, _ in about)
        yield offline.Answerer(spread, about[0][0], parallel, lambda: (spread.n_read, spread.n_written))
    finally:
        ray.shutdown()
