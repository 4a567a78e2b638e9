"""Whose requests a server hears: hosts, origins, keys, content types, sizes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.serving import Served, served
from support.tiny import spec_named
from support.vocab import write_model

from dsv2cli.commands.serve import rules_of
from dsv2cli.errors import UsageError
from dsv2cli.server import guard
from dsv2cli.server.guard import is_allowed, is_loopback

CHAT = "/v1/chat/completions"
BODY = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("guard") / "tiny.gguf", spec_named("lite"))


@pytest.fixture(scope="module")
def server(path: Path) -> Iterator[Served]:
    with served(path, rules=rules_of("127.0.0.1", [], ["Box.lan"], ["https://chat.example"])) as running:
        yield running


@pytest.fixture(scope="module")
def keyed(path: Path) -> Iterator[Served]:
    with served(path, rules=rules_of("127.0.0.1", ["sesame", "schlüssel"], [], [])) as running:
        yield running


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8080", 200), ("LOCALHOST", 200), ("a.localhost", 200), ("127.0.0.1:1", 200), ("[::1]:80", 200),
        ("192.168.1.5", 200), ("box.lan:8080", 200), ("evil.example", 403), ("localhost.evil.example", 403),
        ("127.0.0.1.evil.example", 403), ("evil.example:127", 403), ("", 403), ("[::1", 403),
    ],
)  # fmt: skip
def test_hosts(server: Served, host: str, status: int) -> None:
    assert server.client.get("/health", headers={"host": host}).status_code == status


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        (None, 200), ("https://chat.example", 200), ("same", 200), ("http://evil.example", 403), ("null", 403),
        ("https://chat.example.evil.example", 403), ("http://chat.example", 403), ("http://127.0.0.1:1", 403),
    ],
)  # fmt: skip
def test_origins(server: Served, origin: str | None, status: int) -> None:
    before = server.engine.figures.requests
    value = str(server.client.base_url).rstrip("/") if origin == "same" else origin
    response = server.client.post(CHAT, json=BODY, headers={} if value is None else {"origin": value})
    assert response.status_code == status
    assert server.engine.figures.requests - before == (status == 200)  # refused before any work
    allowed = response.headers.get("access-control-allow-origin")
    assert allowed == (origin if origin == "https://chat.example" else None)
    assert response.headers.get("access-control-allow-credentials") == ("true" if allowed else None)


def test_preflights(server: Served) -> None:
    asked = {"origin": "https://chat.example", "access-control-request-method": "POST"}
    answer = server.client.options(CHAT, headers=asked)
    assert answer.status_code == 200 and "POST" in answer.headers["access-control-allow-methods"]
    assert answer.headers["access-control-allow-origin"] == "https://chat.example"
    assert b"Access-Control-Allow-Methods" in dict(answer.headers.raw)  # some clients of others know one spelling alone
    assert "access-control-allow-private-network" not in answer.headers
    assert server.client.options(CHAT, headers=asked | {"host": "evil.example"}).status_code == 403


@pytest.mark.parametrize("origin", ["http://evil.example", "https://chat.example.evil.example", "null", None])
def test_preflights_of_other_pages_are_told_nothing(server: Served, origin: str | None) -> None:
    """A browser takes that for a no, and says why where the page's author looks."""
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    answer = server.client.options(CHAT, headers=asked | ({"origin": origin} if origin else {}))
    assert answer.status_code == 200 and not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ("authorization,x-stainless-lang,x-stainless-os", "authorization,x-stainless-lang,x-stainless-os"),
        ("Authorization", "Authorization"), (None, "authorization, content-type"), ("", "authorization, content-type"),
        ("a b", "authorization, content-type"), ("x" * 5000, "authorization, content-type"),
    ],
)  # fmt: skip
def test_headers_that_a_page_may_send(server: Served, asked: str | None, told: str) -> None:
    """OpenAI's client in a page sends a dozen of its own, and asks for each."""
    headers = {"origin": "https://chat.example", "access-control-request-method": "POST"}
    headers |= {} if asked is None else {"access-control-request-headers": asked}
    answer = server.client.options(CHAT, headers=headers)
    assert answer.headers["access-control-allow-headers"].startswith(told)


@pytest.mark.parametrize(
    ("origin", "is_let_in"),
    [
        ("http://localhost:3000", True), ("https://localhost", True), ("http://127.9.9.9:1", True),
        ("http://[::1]:3000", True), ("http://localhost.evil.example", False), ("http://notlocalhost", False),
        ("null", False), ("file://", False), ("http://localhost@evil.example", False), ("http://localhost/", False),
        ("http://[", False), ("ftp://localhost", False), ("http://evil.example#localhost", False),
    ],
)  # fmt: skip
def test_every_page_of_this_machine(path: Path, origin: str, is_let_in: bool) -> None:
    assert is_allowed(origin, rules_of("127.0.0.1", [], [], ["localhost"]).origins) == is_let_in
    assert not is_allowed(origin, frozenset())


@pytest.mark.parametrize(
    "headers",
    [{}, {"authorization": "Bearer wrong"}, {"authorization": "sesame"}, {"x-api-key": "sesam"}, {"x-api-key": ""}],
)
def test_wrong_keys(keyed: Served, headers: dict[str, str]) -> None:
    response = keyed.client.post(CHAT, json=BODY, headers=headers)
    assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_api_key"
    assert keyed.client.get("/v1/models", headers=headers).status_code == 401
    assert keyed.client.get("/health", headers=headers).status_code == 200


@pytest.mark.parametrize("headers", [{"authorization": "Bearer sesame"}, {"x-api-key": "schlüssel".encode()}])
def test_right_keys(keyed: Served, headers: dict[str, Any]) -> None:
    assert keyed.client.post(CHAT, json=BODY, headers=headers).status_code == 200


def test_keys_share_no_prefixes(keyed: Served) -> None:
    """Time would tell one key's user what another's has asked."""
    body = {"prompt": "the ant " * 40, "max_tokens": 1}
    cached = [
        keyed.client.post("/v1/completions", json=body, headers={"authorization": f"Bearer {key}".encode()}).json()[
            "usage"
        ]
        for key in ("sesame", "sesame", "schlüssel")
    ]
    assert [bool(usage["prompt_tokens_details"]["cached_tokens"]) for usage in cached] == [False, True, False]


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", None])
def test_only_json_is_heard(server: Served, kind: str | None) -> None:
    headers = {} if kind is None else {"content-type": kind}
    response = server.client.post(CHAT, content=b'{"messages": []}', headers=headers)
    assert response.status_code == 415


def test_bodies_that_are_too_large(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "MAX_BODY", 1000)
    assert server.client.post(CHAT, content=b" " * 1001, headers=JSON).status_code == 413
    assert server.client.post(CHAT, content=iter([b" " * 600] * 2), headers=JSON).status_code == 413


def test_bodies_that_do_not_come(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.3)
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n".encode()
    assert b" 408 " in server.begun(head + b"Content-Length: 10\r\n\r\n{")


def test_headers_that_are_too_large(server: Served) -> None:
    assert server.client.get("/health", headers={"x-long": "a" * (1 << 17)}).status_code in (400, 431)


def test_what_is_refused_at_the_start() -> None:
    assert [is_loopback(host) for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost", "0.0.0.0", "::", "box")] == [
        True, True, True, True, False, False, False,
    ]  # fmt: skip
    with pytest.raises(UsageError, match="every web page"):
        rules_of("127.0.0.1", [], [], ["*"])
    with pytest.raises(UsageError, match="empty"):
        rules_of("127.0.0.1", [" "], [], [])
