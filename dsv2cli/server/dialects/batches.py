"""OpenAI's files and batches."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, BinaryIO

from msgspec import Meta, Struct
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse

from dsv2cli.server import answering, guard
from dsv2cli.server.answering import ClientGoneError
from dsv2cli.server.batches import PURPOSE, Batches
from dsv2cli.server.errors import ApiError, bad_field
from dsv2cli.server.files import owner_name
from dsv2cli.server.multipart import boundary_of, read_form
from dsv2cli.server.pages import page
from dsv2cli.server.service import Service
from dsv2cli.server.wire import dump

UPLOAD_SECONDS = 600.0
PIECE = 1 << 16
MAX_PAGE, MAX_FILES_PAGE = 100, 10_000
Metadata = Annotated[
    dict[Annotated[str, Meta(max_length=64)], Annotated[str, Meta(max_length=512)]], Meta(max_length=16)
]


class BatchRequest(Struct, kw_only=True):
    input_file_id: str
    endpoint: str
    completion_window: Annotated[str, Meta(max_length=16)] = "24h"
    metadata: Metadata | None = None


def _batches(service: Service) -> Batches:
    assert service.batches is not None
    return service.batches


def _json(value: object) -> Response:
    return Response(dump(value), media_type=answering.JSON_TYPE)


# Files.


async def upload(service: Service, request: Request) -> Response:
    boundary = boundary_of(request.headers.get("content-type", ""))
    files, owner = _batches(service).files, owner_name(request.state.salt)
    try:
        with files.upload(owner) as coming:
            async with asyncio.timeout(UPLOAD_SECONDS):
                form = await read_form(_pieces(request), boundary, coming.write)
            if form.filename is None:
                raise bad_field("file", "is missing from the form")
            if form.fields.get("purpose") != PURPOSE:
                raise bad_field("purpose", f"files are kept for one, {PURPOSE!r}")
            stored = await answering.aside(files.keep, owner, coming, form.filename, PURPOSE)
    except TimeoutError:
        raise ApiError(408, "the file did not arrive in time") from None
    except ClientDisconnect:
        raise ClientGoneError from None
    except OSError as error:
        raise ApiError(507, f"the file cannot be kept: {error.strerror or error}", "server_error") from None
    return _json(stored.told())


async def _pieces(request: Request) -> AsyncIterator[bytes]:
    """The body as it comes. TimeoutError where nothing comes for a while."""
    stream = aiter(request.stream())
    while True:
        try:
            async with asyncio.timeout(guard.BODY_SECONDS):
                piece = await anext(stream)
        except StopAsyncIteration:
            return
        yield piece


async def list_files(service: Service, request: Request) -> Response:
    wanted = request.query_params.get("purpose")
    found = _batches(service).files.all(owner_name(request.state.salt))
    told = [stored.told() for stored in found if wanted in (None, stored.purpose)]
    return _json(page(told, request.query_params, MAX_FILES_PAGE))


async def file(service: Service, request: Request) -> Response:
    owner = owner_name(request.state.salt)
    return _json(_batches(service).files.find(owner, request.path_params["name"]).told())


async def content(service: Service, request: Request) -> Response:
    files, owner = _batches(service).files, owner_name(request.state.salt)
    stored = files.find(owner, request.path_params["name"])
    opened = await answering.aside(_open, files.path(owner, stored.id))

    async def body() -> AsyncIterator[bytes]:
        with opened as data:
            while piece := await answering.aside(data.read, PIECE):
                yield piece

    return StreamingResponse(body(), media_type="application/octet-stream")


def _open(path: Path) -> BinaryIO:
    return path.open("rb")


async def delete_file(service: Service, request: Request) -> Response:
    batches, salt, name = _batches(service), request.state.salt, request.path_params["name"]
    batches.check_unused(salt, name)
    await answering.aside(batches.files.delete, owner_name(salt), name)
    return _json({"id": name, "object": "file", "deleted": True})


# Batches.


async def create(service: Service, request: Request) -> Response:
    body = await answering.body_of(request, BatchRequest)
    told = await answering.aside(
        _batches(service).create,
        request.state.salt,
        body.input_file_id,
        body.endpoint,
        body.completion_window,
        body.metadata,
    )
    return _json(told)


async def list_batches(service: Service, request: Request) -> Response:
    return _json(page(_batches(service).all(request.state.salt), request.query_params, MAX_PAGE))


async def batch(service: Service, request: Request) -> Response:
    return _json(_batches(service).find(request.state.salt, request.path_params["name"]))


async def cancel(service: Service, request: Request) -> Response:
    return _json(await answering.aside(_batches(service).cancel, request.state.salt, request.path_params["name"]))
