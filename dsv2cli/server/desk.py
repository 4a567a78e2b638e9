"""Requests without a connection, by their URL: what batches are answered by. The same dialects, the same engine."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from msgspec import Struct

from dsv2cli import console
from dsv2cli.batch.runner import StoppedError
from dsv2cli.server import answering
from dsv2cli.server.dialects import chat, completions, responses
from dsv2cli.server.errors import ApiError, bad_field
from dsv2cli.server.generation import Ended, Generation, Job
from dsv2cli.server.service import Service

if TYPE_CHECKING:
    from numpy.typing import NDArray

# What a line of a batch may ask for, and what makes a job of its body and a salt.
JOBS: dict[str, Callable[[Service, bytes, bytes], Awaitable[Job]]] = {
    "/v1/chat/completions": chat.job,
    "/v1/completions": completions.job,
    "/v1/responses": responses.job,
}
STOPPING = 503


class _Streamed(Struct):
    stream: Any = None


@contextmanager
def _faults(url: str) -> Iterator[None]:
    """A fault of ours, as an ApiError: the line that meets it fails, and no other."""
    try:
        yield
    except (ApiError, StoppedError):
        raise
    except Exception as error:
        console.note(f"internal error at {url}: {type(error).__name__}: {error}")
        raise ApiError(500, f"internal error: {type(error).__name__}", "server_error") from error


@dataclass(frozen=True)
class Desk:
    """A ``batch.runner.Desk`` of what a service serves. salt, background: see ``Generation``."""

    service: Service
    salt: bytes = b""
    background: bool = False

    async def look(self, url: str, body: bytes) -> NDArray[np.int32]:
        with _faults(url):
            job = await self._job(url, body)
        return np.asarray(job.asked[0].prompt, np.int32)

    async def answer(self, url: str, body: bytes, seed: int) -> dict[str, Any]:
        try:
            with _faults(url):
                return await self._answer(url, body, seed)
        except ApiError as error:
            if error.status == STOPPING:
                raise StoppedError from None
            raise

    async def _answer(self, url: str, body: bytes, seed: int) -> dict[str, Any]:
        job = await self._job(url, body)
        tickets = self.service.submit_all([self._own(one, seed) for one in job.asked])
        try:
            heard = await answering.collect(tickets)
        finally:
            answering.cancel(tickets)
        for events in heard:
            answering.raise_failure(events)
            if any(isinstance(event, Ended) and event.reason == "cancelled" for event in events):
                raise StoppedError
        return job.build(heard)

    def _own(self, asked: Generation, seed: int) -> Generation:
        params = replace(asked.params, seed=seed) if asked.params.seed is None else asked.params
        return replace(asked, params=params, background=self.background)

    async def _job(self, url: str, body: bytes) -> Job:
        if url not in JOBS:
            raise bad_field("url", f"{url[:100]!r} is none of {', '.join(JOBS)}")
        job = await JOBS[url](self.service, body, self.salt)
        if msgspec.json.decode(body, type=_Streamed).stream:
            raise bad_field("stream", "the answers of a batch are whole")
        for one in job.asked:
            self.service.engine.check(one)
        return job
