"""client.py: a server that speaks OpenAI's chat completions, asked over HTTP for an answer as it is written.

What it says is foreign: every line is bounded and every field looked at before use. No redirect is followed, so that
the key goes to the address that was given and to no other.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import json
import os
import socket
import ssl
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import quote, urlsplit

from dsv2cli.errors import CliError, UsageError

CONNECT_SECONDS = 10.0
SILENT_SECONDS = 600.0  # without a byte, after which a server is given up: prompts take their time
MAX_LINE = 1 << 22  # bytes of an event
MAX_BODY = 1 << 22  # of an answer in one piece, or a list of models
MAX_ERROR = 1 << 16
MAX_NAME = 256  # characters of a model's
SHOWN = 300  # characters of what a server says of an error
DEFAULT_KEY = "DSV2_API_KEY"
PATH = "/chat/completions"
URL_HINT = "as in --server http://127.0.0.1:8080/v1"
REFUSED = (401, 403)


class ServerError(CliError):
    """A server that cannot be reached, refuses, or breaks off."""


class RefusedError(ServerError):
    """A server that answers, but not with what was asked for."""


class _CancelledError(Exception):
    """``Server.cancel`` was called while something was asked."""


class Listed(NamedTuple):
    """A model of a server's. n_ctx: tokens of context; 0 where it does not say."""

    name: str
    n_ctx: int


class Part(NamedTuple):
    """What an event adds to an answer. stop: why it ended, once it has; counts: tokens, as the server counts them."""

    content: str = ""
    reasoning: str = ""
    stop: str = ""
    counts: Mapping[str, Any] = {}


@dataclass(frozen=True)
class Address:
    """url: without a slash at its end, up to what stands before /chat/completions."""

    url: str
    is_secure: bool
    host: str
    port: int | None
    path: str

    @property
    def is_here(self) -> bool:
        """Whether it is this machine's own."""
        with contextlib.suppress(ValueError):
            return ipaddress.ip_address(self.host).is_loopback
        return self.host == "localhost" or self.host.endswith(".localhost")


def address(text: str) -> Address:
    """What --server says. UsageError."""
    spelt = text if "://" in text else f"http://{text}"
    try:
        parts = urlsplit(spelt)
        port = parts.port
    except ValueError as error:
        raise UsageError(f"--server `{text}` is no address ({error})", URL_HINT) from None
    if parts.scheme not in ("http", "https") or not parts.hostname or not (spelt.isascii() and spelt.isprintable()):
        raise UsageError(f"--server `{text}` is no address of a server", URL_HINT)
    if parts.username is not None or parts.password is not None:
        raise UsageError("--server holds a name or a password", f"a key goes into the environment: {DEFAULT_KEY}")
    if parts.query or parts.fragment or " " in spelt:
        raise UsageError(f"--server `{text}` has more than an address and a path", URL_HINT)
    path = parts.path.rstrip("/").removesuffix(PATH) or "/v1"
    place = parts.netloc.rpartition("@")[2]
    return Address(f"{parts.scheme}://{place}{path}", parts.scheme == "https", parts.hostname, port, path)


def key(variable: str | None) -> str | None:
    """The key in a variable of the environment, DSV2_API_KEY if None; None where that holds none. UsageError where one
    that was named holds none, or what it holds can be no key."""
    found = os.environ.get(variable or DEFAULT_KEY, "").strip()
    if variable is not None and not found:
        raise UsageError(f"--key-env: {variable} holds no key", f"export {variable}=...")
    if not (found.isascii() and found.isprintable()) or " " in found:
        raise UsageError(f"what {variable or DEFAULT_KEY} holds is no key: it has spaces, or what is no letter")
    return found or None


@dataclass
class Server:
    """Asked one thing at a time. key: goes with every request."""

    address: Address
    key: str | None = field(default=None, repr=False)
    _exchange: _Exchange | None = None  # under way

    def models(self) -> list[Listed]:
        """Those that it has, or as many as it tells of. ServerError."""
        with self._asked("GET", "/models") as response:
            value = _json(self, response.read(MAX_BODY + 1))
        found = value.get("data")
        if not isinstance(found, list):
            raise RefusedError(f"`{self.address.url}` lists no models", URL_HINT)
        return [_listed(each) for each in found if isinstance(each, dict) and _is_name(each.get("id"))]

    def answer(self, body: Mapping[str, Any]) -> Generator[Part, None, None]:
        """Of a chat, as it is written; ends early where ``cancel`` was called. ServerError."""
        asked = {**body, "stream": True, "stream_options": {"include_usage": True}}
        with contextlib.suppress(_CancelledError), self._asked("POST", PATH, asked) as response:
            if "text/event-stream" not in (response.headers.get("Content-Type") or ""):
                yield self._part(_json(self, response.read(MAX_BODY + 1)), "message")
                return
            stopped = False
            for data in self._events(response):
                if data == b"[DONE]":
                    return
                part = self._part(_json(self, data), "delta")
                stopped = stopped or bool(part.stop)
                yield part
            if not stopped and not self.cancelled:
                raise ServerError(f"`{self.address.url}` broke off in the middle of the answer", "/continue goes on")

    @property
    def cancelled(self) -> bool:
        return self._exchange is not None and self._exchange.cancelled

    def cancel(self) -> bool:
        """End what is being asked, from a signal's handler; False where nothing is that can be ended."""
        return self._exchange is not None and self._exchange.cancel()

    @contextlib.contextmanager
    def _asked(
        self, method: str, path: str, body: Mapping[str, Any] | None = None
    ) -> Iterator[http.client.HTTPResponse]:
        headers = {"Accept": "text/event-stream, application/json", "User-Agent": "dsv2"}
        if self.key is not None:
            headers["Authorization"] = f"Bearer {self.key}"
        data = None
        if body is not None:
            headers["Content-Type"] = "application/json"
            data = json.dumps(body).encode()
        exchange = self._exchange = _Exchange(self.address)
        try:
            response = exchange.open(method, path, data, headers)
            if response.status != http.HTTPStatus.OK:
                raise self._refusal(response)
            yield response
        except (OSError, http.client.HTTPException, ValueError) as error:
            if exchange.cancelled:
                raise _CancelledError from error
            raise ServerError(*self._why(error)) from error
        finally:
            exchange.close()

    def _events(self, response: http.client.HTTPResponse) -> Iterator[bytes]:
        """The data of server-sent events; comments, which keep a connection alive, and other fields are passed over."""
        data: list[bytes] = []
        n = 0  # bytes of them
        while line := response.readline(MAX_LINE):
            text = line.rstrip(b"\r\n")
            if text.startswith(b"data:"):
                data.append(text[5:].removeprefix(b" "))
                n += len(line)
            if len(line) == MAX_LINE or n >= MAX_LINE:
                raise ServerError(f"`{self.address.url}` sends events of more than {MAX_LINE} bytes", URL_HINT)
            if not text and data:
                yield b"\n".join(data)
                data, n = [], 0
        if data:
            yield b"\n".join(data)

    def _part(self, value: Mapping[str, Any], where: str) -> Part:
        """Of an event, or of a whole answer. ServerError where it tells of one."""
        if value.get("error"):
            raise ServerError(f"`{self.address.url}`: {self._said(value)}")
        choices = value.get("choices")
        choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
        delta = choice.get(where)
        delta = delta if isinstance(delta, dict) else {}
        reasoning = delta.get("reasoning_content") or delta.get("reasoning")
        return Part(_text(delta.get("content")), _text(reasoning), _text(choice.get("finish_reason")), _counts(value))

    def _refusal(self, response: http.client.HTTPResponse) -> RefusedError:
        """Why it does not answer, in its words, and what to do."""
        status = f"{response.status} {self._shown(response.reason)}".strip()
        url = self.address.url
        if 300 <= response.status < 400:
            place = self._shown(response.headers.get("Location") or "another address")
            return RefusedError(
                f"`{url}` sends on to {place} ({status})", "give --server that address, if you trust it"
            )
        try:
            said = self._said(json.loads(response.read(MAX_ERROR)))
        except (ValueError, RecursionError, OSError, http.client.HTTPException):
            said = ""
        hint = ""
        if response.status in REFUSED:
            hint = f"{DEFAULT_KEY}, or the variable that --key-env names, holds the key"
        elif response.status == http.HTTPStatus.NOT_FOUND and not said:
            hint = f"the address ends before {PATH}, {URL_HINT}"
        elif wait := response.headers.get("Retry-After"):
            hint = f"try again in {wait} s" if wait.isascii() and wait.isdigit() else ""
        return RefusedError(f"`{url}`: {status}{f': {said}' if said else ''}", hint)

    def _said(self, value: Any) -> str:
        """An error, in the forms that servers have for one."""
        for name in ("error", "message", "detail"):
            value = value.get(name, value) if isinstance(value, dict) else value
        return self._shown(value if isinstance(value, str) else json.dumps(value))

    def _shown(self, text: str) -> str:
        """What a server says, without the key, as it is and as it is spelt in JSON and in an address. It is cut
        afterwards: of a key that lies across the cut, none is shown."""
        if self.key:
            spelt = {self.key, json.dumps(self.key)[1:-1], quote(self.key, safe="")}
            for each in sorted(spelt, key=len, reverse=True):
                text = text.replace(each, "(the key)")
        return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."

    def _why(self, error: Exception) -> tuple[str, str]:
        """(what went wrong, what to do about it)."""
        what, hint = next((what, hint) for kind, what, hint in REASONS if isinstance(error, kind))
        if isinstance(error, ConnectionRefusedError) and not self.address.is_here:
            hint = ""
        why = getattr(error, "verify_message", None) or getattr(error, "strerror", None) or error
        return f"`{self.address.url}` {what.format(why)}", hint


REASONS: tuple[tuple[type[Exception], str, str], ...] = (
    (ConnectionRefusedError, "is not there: nothing listens", "dsv2 serve begins one on this machine"),
    (socket.gaierror, "is not there: no machine has that name", ""),
    (ssl.SSLCertVerificationError, "has a certificate that is not to be trusted: {}", "SSL_CERT_FILE adds one"),
    (ssl.SSLError, "does not speak TLS: {}", "http:// is for servers without it"),
    (TimeoutError, "does not answer", ""),
    (ConnectionError, "closed the connection", ""),
    (http.client.IncompleteRead, "closed the connection", ""),
    (OSError, "cannot be reached: {}", ""),
    (Exception, "does not speak HTTP", URL_HINT),
)
"""What is told of an exception, the first that fits."""


class _Exchange:
    """One request and its answer."""

    def __init__(self, place: Address) -> None:
        made = http.client.HTTPSConnection if place.is_secure else http.client.HTTPConnection
        self._connection = made(place.host, place.port, timeout=CONNECT_SECONDS)
        self._path = place.path
        self._socket: socket.socket | None = None
        self.cancelled = False

    def open(self, method: str, path: str, data: bytes | None, headers: Mapping[str, str]) -> http.client.HTTPResponse:
        self._connection.connect()
        self._socket = self._connection.sock
        self._socket.settimeout(SILENT_SECONDS)
        self._connection.request(method, self._path + path, data, dict(headers))
        return self._connection.getresponse()

    def cancel(self) -> bool:
        """What waits for the server goes on at once, and finds the connection closed. False before there is one."""
        if self._socket is None or self.cancelled:
            return False
        self.cancelled = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        return True

    def close(self) -> None:
        """The server sees that nobody listens any more."""
        sock, self._socket = self._socket, None
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        self._connection.close()


def _json(server: Server, data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise RefusedError(f"`{server.address.url}` answers with what is no chat completion", URL_HINT)
    return value


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= MAX_NAME


def _listed(model: Mapping[str, Any]) -> Listed:
    about = model.get("meta")
    sizes = [model.get("max_model_len"), about.get("n_ctx") if isinstance(about, dict) else None]
    return Listed(str(model["id"]), next((n for n in sizes if type(n) is int and n > 0), 0))


def _counts(value: Mapping[str, Any]) -> dict[str, float]:
    """prompt, cached and answer tokens, and seconds, as far as an event tells them."""
    usage, timings = (v if isinstance(v := value.get(name), dict) else {} for name in ("usage", "timings"))
    details = usage.get("prompt_tokens_details")
    told = {
        "prompt": usage.get("prompt_tokens"),
        "cached": details.get("cached_tokens") if isinstance(details, dict) else None,
        "answer": usage.get("completion_tokens"),
        "prompt_ms": timings.get("prompt_ms"),
        "answer_ms": timings.get("predicted_ms"),
    }
    return {name: n for name, n in told.items() if isinstance(n, int | float) and 0 <= n < 1e12}
