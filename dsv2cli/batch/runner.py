"""All lines of a batch answered, several at a time, in an order in which prompts that begin alike come together."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from dsv2cli.batch.lines import Bad, Line
from dsv2cli.server.errors import ApiError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dsv2cli.batch.ledger import Ledger

BLOCK = 32  # tokens: beginnings are compared by so many at once
SYNC_SECONDS = 1.0
COMPARED = 4096  # tokens of a prompt that are: what is kept of a beginning outlives the prompt
LOOKS = 2  # lines that are looked at together


class StoppedError(Exception):
    """Whoever answers has stopped: no answer is no failure of the request."""


class Desk(Protocol):
    """What answers requests, by their URL and body."""

    async def look(self, url: str, body: bytes) -> NDArray[np.int32]:
        """The ids of the (first) prompt. ApiError where the request would be refused."""

    async def answer(self, url: str, body: bytes, seed: int) -> dict[str, Any]:
        """The body of the answer; seed: for a request without one. ApiError; StoppedError."""


async def look_over(
    desk: Desk, lines: Sequence[Line], told: Callable[[int], None] = lambda n: None
) -> tuple[list[Line], list[Bad]]:
    """(lines that will be answered, in the order for it; those that would be refused). told: how many were looked at.

    Lines whose prompts begin alike follow each other, in the order in which beginnings come first in the input.
    """
    keys: dict[int, tuple[int, ...]] = {}
    bad: list[Bad] = []
    beginnings: dict[bytes, int] = {}  # digest of a prompt's first blocks -> the first line that has them
    rest = iter(lines)

    async def work() -> None:
        for line in rest:
            try:
                ids = await desk.look(line.url, line.body)
            except ApiError as error:
                bad.append(Bad(line.number, line.custom_id, error))
            else:
                keys[line.number] = tuple(
                    beginnings.setdefault(digest, line.number) for digest in blocks(ids[:COMPARED])
                )
            told(len(keys) + len(bad))

    await asyncio.gather(*(work() for _ in range(LOOKS)))
    good = [line for line in lines if line.number in keys]
    return sorted(good, key=lambda line: (keys[line.number], line.number)), sorted(bad, key=lambda b: b.number)


def blocks(ids: NDArray[np.int32]) -> list[bytes]:
    """A digest of the first block of tokens, of the first two, and so on."""
    found: list[bytes] = []
    before = b""
    for start in range(0, len(ids) - BLOCK + 1, BLOCK):
        before = blake2b(before + ids[start : start + BLOCK].tobytes(), digest_size=8).digest()
        found.append(before)
    return found


async def run(
    desk: Desk,
    lines: Sequence[Line],
    ledger: Ledger,
    *,
    at_once: int,
    seed: int = 0,
    told: Callable[[], None] = lambda: None,
    stopping: asyncio.Event | None = None,
) -> None:
    """Answer the lines in their order, ``at_once`` of them at a time. told: after each result.

    Once ``stopping`` is set no more are begun, and those under way are finished; cancelled, they are lost. LedgerError.
    """
    rest = iter(lines)

    async def work() -> None:
        for line in rest:
            if stopping is not None and stopping.is_set():
                return
            try:
                entry, failed = await _result(desk, line, line.seed(seed))
            except StoppedError:
                return
            ledger.put(entry, failed=failed)
            told()

    async def sync() -> None:
        while True:
            await asyncio.sleep(SYNC_SECONDS)
            await asyncio.to_thread(ledger.sync)

    syncing = asyncio.create_task(sync())
    workers = [asyncio.create_task(work()) for _ in range(at_once)]
    try:
        await _all_or_none([*workers], syncing)
    finally:
        for task in (syncing, *workers):
            task.cancel()
        await asyncio.gather(syncing, *workers, return_exceptions=True)
        ledger.sync()


async def _all_or_none(workers: list[asyncio.Task[None]], beside: asyncio.Task[None]) -> None:
    """Wait for the workers, or raise what the first that fails does."""
    left = set(workers)
    while left:
        done, _ = await asyncio.wait({*left, beside}, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
        left -= done


async def _result(desk: Desk, line: Line, seed: int) -> tuple[dict[str, Any], bool]:
    """(a line's result in OpenAI's form, whether it failed)."""
    try:
        body = await desk.answer(line.url, line.body, seed)
    except ApiError as error:
        return response(line, error.status, error.body()), True
    return response(line, 200, body), False


def response(line: Line | Bad, status: int, body: dict[str, Any]) -> dict[str, Any]:
    """A result that is an answer over HTTP, or would be."""
    told = {"status_code": status, "request_id": line.id.removeprefix("batch_"), "body": body}
    return {"id": line.id, "custom_id": line.custom_id, "response": told, "error": None}


def refusal(bad: Bad) -> dict[str, Any]:
    """The result of a line that was never asked."""
    code = str(bad.error.code or "invalid_request")
    error = {"code": code, "message": str(bad), "param": bad.error.param, "line": bad.number}
    return {"id": bad.id, "custom_id": bad.custom_id, "response": None, "error": error}
