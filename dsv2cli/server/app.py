"""The routes, and what stands around them."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from dsv2cli import console
from dsv2cli.server import answering, errors, guard, metrics, webpage
from dsv2cli.server.answering import JSON_TYPE, ClientGoneError
from dsv2cli.server.dialects import anthropic, batches, chat, completions, models, native, ollama, responses, slots
from dsv2cli.server.errors import ApiError
from dsv2cli.server.guard import App, Guard, Rules, digest, key_of
from dsv2cli.server.wire import dump

if TYPE_CHECKING:
    from dsv2cli.server.service import Service

Handler = Callable[["Service", Request], Awaitable[Response]]

# (methods, path, handler): every path that is answered.
ROUTES: tuple[tuple[str, str, Handler], ...] = (
    ("POST", "/v1/chat/completions", chat.chat),
    ("POST", "/chat/completions", chat.chat),
    ("POST", "/v1/chat/completions/input_tokens", chat.input_tokens),
    ("POST", "/chat/completions/input_tokens", chat.input_tokens),
    ("POST", "/v1/completions", completions.completions),
    ("GET", "/v1/models", models.models),
    ("GET", "/models", models.models),
    ("GET", "/v1/models/{name:path}", models.model),
    ("POST", "/v1/responses", responses.responses),
    ("POST", "/responses", responses.responses),
    ("POST", "/v1/responses/input_tokens", responses.input_tokens),
    ("GET", "/v1/responses/{name}", responses.retrieve),
    ("DELETE", "/v1/responses/{name}", responses.delete),
    ("POST", "/v1/responses/{name}/cancel", responses.cancel),
    ("GET", "/v1/responses/{name}/input_items", responses.input_items),
    ("POST", guard.UPLOAD, batches.upload),
    ("GET", "/v1/files", batches.list_files),
    ("GET", "/v1/files/{name}", batches.file),
    ("GET", "/v1/files/{name}/content", batches.content),
    ("DELETE", "/v1/files/{name}", batches.delete_file),
    ("POST", "/v1/batches", batches.create),
    ("GET", "/v1/batches", batches.list_batches),
    ("GET", "/v1/batches/{name}", batches.batch),
    ("POST", "/v1/batches/{name}/cancel", batches.cancel),
    ("POST", "/v1/messages", anthropic.messages),
    ("POST", "/v1/messages/count_tokens", anthropic.count_tokens),
    ("GET", "/api/version", ollama.version),
    ("GET", "/api/tags", ollama.tags),
    ("GET", "/api/ps", ollama.running),
    ("POST", "/api/show", ollama.show),
    ("POST", "/api/chat", ollama.chat),
    ("POST", "/api/generate", ollama.generate),
    ("POST", "/completion", native.completion),
    ("POST", "/completions", native.completion),
    ("POST", "/infill", native.infill),
    ("POST", "/tokenize", native.tokenize),
    ("POST", "/detokenize", native.detokenize),
    ("POST", "/apply-template", native.apply_template),
    ("GET", "/tokenizer_info", native.tokenizer_info),
    ("GET", "/props", native.props),
    ("GET", "/slots", slots.slots),
    ("POST", "/slots/{slot}", slots.act),
    ("GET", "/metrics", metrics.metrics),
)


class State:
    """What the server is about to serve, or serves: None while it loads."""

    def __init__(self) -> None:
        self.service: Service | None = None
        self.began = time.time()


# What a server can be started without: the first part of its paths, and the page.
PAGE = "page"
CLOSABLE = ("slots", "metrics", PAGE)


def build(state: State, rules: Rules, closed: frozenset[str] = frozenset()) -> App:
    """The ASGI application. closed: of CLOSABLE, what is not answered."""

    def answered(handler: Handler) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            if state.service is None:
                return answering.refusal(errors.loading(), request)
            key = key_of(request.headers)
            request.state.salt = digest(key) if rules.keys else b""
            try:
                return await handler(state.service, request)
            except ApiError as error:
                return answering.refusal(error, request)
            except ClientGoneError:
                return Response(status_code=499)
            except Exception as error:
                tell_internal(request, error)
                failed = ApiError(500, f"internal error: {type(error).__name__}", "server_error")
                return answering.refusal(failed, request)

        return endpoint

    async def health(request: Request) -> Response:
        ready = state.service is not None
        body: dict[str, Any] = {"status": "ok"} if ready else errors.loading().body()
        return Response(dump(body), 200 if ready else 503, media_type=JSON_TYPE)

    def opened(path: str, handler: Handler) -> Handler:
        name = path.split("/")[1]
        return _closed(name) if name in closed else handler

    routes = [Route(path, answered(opened(path, handler)), methods=[method]) for method, path, handler in ROUTES]
    routes += [Route(path, webpage.page) for path in webpage.FILES if PAGE not in closed]
    routes += [Route(path, health) for path in ("/health", "/v1/health")]
    app = Starlette(routes=routes, exception_handlers={HTTPException: _refuse})
    app.router.redirect_slashes = False
    return Guard(app, rules)


def _closed(name: str) -> Handler:
    async def refused(service: Service, request: Request) -> Response:
        raise ApiError(501, f"this server was started with --no-{name}", "not_supported_error")

    return refused


async def _refuse(request: Request, error: Exception) -> Response:
    """Starlette's own refusals: no such path, no such method."""
    assert isinstance(error, HTTPException)
    what = {404: f"there is nothing at {request.url.path[:200]}", 405: f"{request.method} is not answered here"}
    message = what.get(error.status_code, str(error.detail))
    refused = ApiError(error.status_code, message, code=None, headers=dict(error.headers or {}))
    return answering.refusal(refused, request)


def tell_internal(request: Request, error: Exception) -> None:
    """A fault of this program, told where it runs; nothing of the request but its path."""
    console.note_text(
        f"internal error at {console.printable(request.url.path[:200])}: {type(error).__name__}: {error}\n"
    )
    if os.environ.get("DSV2_DEBUG"):
        console.note_text(traceback.format_exc())
