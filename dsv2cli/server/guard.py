"""Before any work: whose requests are heard, and how large they may be.

A server on a loopback address is within reach of every web page that its user opens: a page can name any host, and by
rebinding its own name it can even read the answers (CVE-2024-28224). So the Host must be an address or a name that was
meant, an Origin must be the server's own or allowed, and a body must be JSON, which no page sends without asking first.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import json
import re
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from dsv2cli.server.errors import ApiError
from dsv2cli.server.wire import QUICK

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

# Answered without a key: for load balancers; and the page, which asks its reader for one.
PUBLIC = frozenset({"/health", "/v1/health", "/", "/page.js", "/page.css"})
LOCAL = "localhost"
UPLOAD = "/v1/files"  # where a form comes in place of JSON, which is read as it comes: see dialects/batches.py
MAX_BODY = 32 << 20
BODY_SECONDS = 30.0
USUAL_HEADERS = "authorization, content-type, x-api-key, anthropic-version, anthropic-beta"
HEADER_NAMES = re.compile(r"[\w-]{1,100}(, ?[\w-]{1,100}){0,99}", re.ASCII)
PREFLIGHT = {"Access-Control-Allow-Methods": "GET, POST, DELETE, OPTIONS", "Access-Control-Max-Age": "600"}


@dataclass(frozen=True)
class Rules:
    """keys: digests of the API keys; none: no key is asked for. hosts, origins: allowed beside the usual ones; the
    origin LOCAL: every page that this machine serves."""

    keys: frozenset[bytes] = frozenset()
    hosts: frozenset[str] = frozenset()
    origins: frozenset[str] = field(default_factory=frozenset)


def digest(key: bytes) -> bytes:
    """Keys are kept and compared as digests: of equal length, so that the time tells nothing (CVE-2025-59425)."""
    return hashlib.sha256(key).digest()


def check_host(host: str | None, allowed: frozenset[str]) -> None:
    if host is None:
        return
    try:
        name = urlsplit(f"//{host}").hostname or ""
        if name not in allowed and name != "localhost" and not name.endswith(".localhost"):
            ipaddress.ip_address(name)  # an address cannot be rebound
    except ValueError:
        raise ApiError(403, f"requests for the host {host[:100]!r} are not answered; --allowed-host names it") from None


def is_allowed(origin: str, allowed: frozenset[str]) -> bool:
    if origin in allowed:
        return True
    try:
        parts = urlsplit(origin)
        is_origin = parts.scheme in ("http", "https") and origin == f"{parts.scheme}://{parts.netloc}"
        return LOCAL in allowed and is_origin and is_loopback(parts.hostname or "")
    except ValueError:
        return False


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_origin(origin: str | None, host: str | None, allowed: frozenset[str]) -> None:
    if origin is None or is_allowed(origin, allowed):
        return
    if host is not None and origin in (f"http://{host}", f"https://{host}"):
        return
    raise ApiError(403, f"pages of {origin[:100]!r} are not answered; --cors-origin allows them")


def key_of(headers: Mapping[str, str]) -> bytes:
    """The key that came with a request, in OpenAI's or in Anthropic's form. headers: bytes as Latin-1, as in ASGI."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    key = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
    return key.encode("latin-1")


def check_key(headers: Mapping[str, str], keys: frozenset[bytes]) -> None:
    if not keys:
        return
    given = digest(key_of(headers))
    matches = [hmac.compare_digest(given, key) for key in keys]
    if not any(matches):
        raise ApiError(
            401,
            "a valid API key is needed",
            "authentication_error",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


class Guard:
    """ASGI middleware. What passes has its whole body read, within MAX_BODY bytes and BODY_SECONDS."""

    def __init__(self, app: App, rules: Rules) -> None:
        self._app, self._rules = app, rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        origin = headers.get("origin")
        send = self._with_cors(send, origin)
        try:
            self._check(scope, headers)
            if scope["method"] == "OPTIONS":
                await _answer(send, 200, self._preflight(headers))
                return
            if scope["method"] == "POST" and scope["path"] != UPLOAD:
                receive = await _read_body(receive, headers)
        except ApiError as error:
            await _answer(send, error.status, error.headers, error.body(scope["path"]))
            return
        await self._app(scope, receive, send)

    def _check(self, scope: Scope, headers: Mapping[str, str]) -> None:
        host = headers.get("host")
        check_host(host, self._rules.hosts)
        if scope["method"] == "OPTIONS":
            return
        check_origin(headers.get("origin"), host, self._rules.origins)
        if scope["path"] not in PUBLIC:
            check_key(headers, self._rules.keys)
        if scope["method"] == "POST":
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            if scope["path"] == UPLOAD:
                if kind != "multipart/form-data":
                    raise ApiError(415, "the Content-Type must be multipart/form-data")
            elif kind != "application/json" and not (kind == "" and headers.get("content-length", "0") == "0"):
                raise ApiError(415, "the Content-Type must be application/json")

    def _preflight(self, headers: Mapping[str, str]) -> dict[str, str]:
        """What a page's browser is told before the page asks: of a page that is not allowed nothing, which means no.
        Clients in pages send headers of their own (X-Stainless-...): any may come, and none but the usual is read."""
        if not is_allowed(headers.get("origin", ""), self._rules.origins):
            return {}
        asked = headers.get("access-control-request-headers", "")
        names = asked if HEADER_NAMES.fullmatch(asked) else USUAL_HEADERS
        return PREFLIGHT | {"Access-Control-Allow-Headers": names}

    def _with_cors(self, send: Send, origin: str | None) -> Send:
        """With the origin by its name, never all of them: so a page may also ask with its credentials, as those behind
        a proxy that has people log in do."""
        if origin is None or not is_allowed(origin, self._rules.origins):
            return send

        async def marked(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                allow = [
                    (b"Access-Control-Allow-Origin", origin.encode()),
                    (b"Access-Control-Allow-Credentials", b"true"),
                    (b"Vary", b"Origin"),
                ]
                message["headers"] = [*message.get("headers", []), *allow]
            await send(message)

        return marked


async def _read_body(receive: Receive, headers: Mapping[str, str]) -> Receive:
    """Read all of a body, and give a ``receive`` that hands it out at once and then waits for the client to go."""
    too_large = ApiError(413, f"the body is larger than {MAX_BODY >> 20} MiB")
    length = headers.get("content-length", "0")
    if length.isdecimal() and int(length[:20]) > MAX_BODY:
        raise too_large
    pieces: list[bytes] = []
    n_bytes = 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while True:
                message = await receive()
                if message["type"] != "http.request":
                    break
                pieces.append(message.get("body", b""))
                n_bytes += len(pieces[-1])
                if n_bytes > MAX_BODY:
                    raise too_large
                if not message.get("more_body"):
                    break
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {BODY_SECONDS:g} s") from None
    body = b"".join(pieces) if n_bytes <= QUICK else await asyncio.to_thread(b"".join, pieces)
    pending: list[MutableMapping[str, Any]] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> MutableMapping[str, Any]:
        return pending.pop() if pending else await receive()

    return replay


async def _answer(send: Send, status: int, headers: Mapping[str, str], body: object = None) -> None:
    data = b"" if body is None else json.dumps(body).encode()
    named = {"Content-Length": str(len(data)), "Content-Type": "application/json", **headers}
    lines = [(name.encode(), value.encode()) for name, value in named.items()]
    await send({"type": "http.response.start", "status": status, "headers": lines})
    await send({"type": "http.response.body", "body": data})
