"""From a ticket to a response: whole or streamed, watched for a client that goes, kept alive while nothing comes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from dsv2cli.server.engine import Ticket
from dsv2cli.server.errors import ApiError
from dsv2cli.server.generation import Ended, Heard, Job
from dsv2cli.server.wire import QUICK, dump, parse

if TYPE_CHECKING:
    from dsv2cli.server.service import Service

ALIVE_SECONDS = 10.0  # clients and proxies give up on a silent connection
LONG = 2048  # tokens of a prompt that is not spelt in the event loop
NO_BUFFERING = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
JSON_TYPE = "application/json"
T = TypeVar("T")
_preparing = ThreadPoolExecutor(2, "dsv2-grammar")


async def aside(function: Callable[..., T], *args: Any, **named: Any) -> T:
    """Call in a thread what may take long: templates, tokenising. The event loop answers others meanwhile."""
    return await asyncio.to_thread(function, *args, **named)


async def prepared(function: Callable[..., T], *args: Any, **named: Any) -> T:
    """As aside, for grammars: what takes seconds waits for its like, and nothing else does for it."""
    return await asyncio.get_running_loop().run_in_executor(_preparing, partial(function, *args, **named))


async def body_of(request: Request, kind: type[T]) -> T:
    """A request's body as ``kind``. ApiError."""
    body = (await request.receive())["body"]  # whole, from the guard: Request.body would copy it
    return parse(body, kind) if len(body) <= QUICK else await aside(parse, body, kind)


class ClientGoneError(Exception):
    """Nobody waits for this answer any more."""


def failure(error: Exception) -> ApiError:
    """What a client is told of an answer that failed."""
    if isinstance(error, ApiError):
        return error
    hint = getattr(error, "hint", "")
    kind = "server_error" if not isinstance(error, ValueError) else "invalid_request_error"
    return ApiError(500 if kind == "server_error" else 400, f"{error}" + (f" ({hint})" if hint else ""), kind)


def raise_failure(events: Iterable[Heard]) -> None:
    """ApiError where an answer ended in an error."""
    for event in events:
        if isinstance(event, Ended) and event.error is not None:
            raise failure(event.error)


async def job(request: Request, service: Service, asked: Job) -> Response:
    """A job's body as the response to a request."""
    return await whole(request, service.submit_all(asked.asked), asked.build)


async def whole(request: Request, tickets: list[Ticket], build: Callable[[list[list[Heard]]], Any]) -> Response:
    """One JSON body of all events, made when the last has come. After ALIVE_SECONDS of waiting the response begins,
    with a space now and then before its JSON."""
    collecting = asyncio.create_task(collect(tickets))
    gone = asyncio.create_task(_gone(request))
    try:
        await asyncio.wait({collecting, gone}, timeout=ALIVE_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        if gone.done():
            raise ClientGoneError
        if collecting.done():
            events = collecting.result()
            for heard in events:
                raise_failure(heard)
            return Response(await _built(tickets, build, events), media_type=JSON_TYPE)
    except BaseException:
        collecting.cancel()
        cancel(tickets)
        raise
    finally:
        gone.cancel()

    async def body() -> AsyncIterator[bytes]:
        try:
            while not collecting.done():
                yield b" "
                await asyncio.wait({collecting}, timeout=ALIVE_SECONDS)
            events = collecting.result()
            try:
                for heard in events:
                    raise_failure(heard)
                yield await _built(tickets, build, events)
            except ApiError as error:
                yield dump(error.body(request.scope["path"]))
        finally:
            collecting.cancel()
            cancel(tickets)

    return StreamingResponse(body(), media_type=JSON_TYPE)


async def _built(tickets: list[Ticket], build: Callable[[list[list[Heard]]], Any], events: list[list[Heard]]) -> bytes:
    """Some dialects tell the prompts again, or their log-probabilities."""
    is_long = any(isinstance(event, Ended) and event.rows for heard in events for event in heard)
    is_long |= sum(len(ticket.ids) for ticket in tickets) > LONG
    return await aside(lambda: dump(build(events))) if is_long else dump(build(events))


async def collect(tickets: list[Ticket]) -> list[list[Heard]]:
    """All that each tells, until its last answer has ended. Cancelled, it leaves what comes to its caller."""
    return [[event async for event in ticket] for ticket in tickets]


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def cancel(tickets: Iterable[Ticket]) -> None:
    for ticket in tickets:
        ticket.cancel()


def sse(data: Any, event: str | None = None) -> bytes:
    """A server-sent event with a value as JSON."""
    return (b"event: " + event.encode() + b"\n" if event else b"") + b"data: " + dump(data) + b"\n\n"


def streamed(
    ticket: Ticket,
    say: Callable[[Heard], Iterable[bytes]],
    *,
    first: bytes = b"",
    last: Callable[[], Iterable[bytes]] = tuple,
    on_error: Callable[[ApiError], bytes] = lambda error: sse(error.body()),
    alive: bytes = b": keep-alive\n\n",
    media_type: str = "text/event-stream",
) -> StreamingResponse:
    """Each event as the dialect says it, at once; ``alive`` where nothing came for a while.

    first: sent with the headers, before the prompt is read; last: after the last event.
    """

    async def body() -> AsyncIterator[bytes]:
        n_ended = 0
        try:
            if first:
                yield first
            while n_ended < ticket.asked.n:
                try:
                    news = await asyncio.wait_for(ticket.heard(), ALIVE_SECONDS)
                except TimeoutError:
                    yield alive
                    continue
                for event in news:
                    if isinstance(event, Ended):
                        n_ended += 1
                        if event.error is not None:
                            yield on_error(failure(event.error))
                            return
                    is_long = isinstance(event, Ended) and len(ticket.ids) > LONG  # told again by some dialects
                    for line in await aside(lambda event=event: list(say(event))) if is_long else say(event):
                        yield line
            for line in last():
                yield line
        finally:
            ticket.cancel()

    return StreamingResponse(body(), media_type=media_type, headers=NO_BUFFERING)


def refusal(error: ApiError, request: Request) -> Response:
    return Response(json.dumps(error.body(request.scope["path"])), error.status, error.headers, JSON_TYPE)
