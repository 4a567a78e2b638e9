"""Whatever a client sends is answered with a 4xx in the form of its dialect, or is right; and the server lives on.

Every field of every dialect takes every odd value here, by the types that the dialects declare: one that is added there
is tried as well.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, get_args, get_type_hints

import httpx
import msgspec
import pytest
from support.cli import SECONDS
from support.serving import USUAL, Served, served
from support.tiny import spec_named, variant
from support.vocab import V25_TEMPLATE, write_model

from dsv2cli.server import guard, process
from dsv2cli.server.dialects import anthropic, chat, completions, native, ollama, responses, slots
from dsv2cli.server.wire import MAX_VALUES, QUICK, parse

HI = [{"role": "user", "content": "Hi"}]
JSON = {"content-type": "application/json"}


@dataclass(frozen=True)
class Form:
    """An endpoint: the type of its body, and fields that make one that is right."""

    path: str
    kind: type[msgspec.Struct]
    right: dict[str, Any]


FORMS = [
    Form("/v1/chat/completions", chat.ChatRequest, {"messages": HI, "max_tokens": 1}),
    Form("/v1/completions", completions.CompletionRequest, {"prompt": "Hi", "max_tokens": 1}),
    Form("/v1/responses", responses.ResponsesRequest, {"input": "Hi", "max_output_tokens": 1}),
    Form("/v1/messages", anthropic.MessagesRequest, {"messages": HI, "max_tokens": 1}),
    Form("/v1/messages/count_tokens", anthropic.MessagesRequest, {"messages": HI}),
    Form("/api/chat", ollama.ChatBody, {"messages": HI, "options": {"num_predict": 1}, "stream": False}),
    Form("/api/generate", ollama.GenerateBody, {"prompt": "Hi", "options": {"num_predict": 1}, "stream": False}),
    Form("/api/show", ollama.ShowBody, {}),
    Form("/completion", native.CompletionRequest, {"prompt": "Hi", "n_predict": 1}),
    Form("/tokenize", native.TokenizeRequest, {"content": "Hi"}),
    Form("/detokenize", native.DetokenizeRequest, {"tokens": [1]}),
    Form("/apply-template", chat.ChatRequest, {"messages": HI}),
    Form("/slots/0?action=save", slots.FileRequest, {"filename": "x"}),
]
by_path = pytest.mark.parametrize("form", FORMS, ids=lambda form: form.path)

ODD = [
    *("-1", "0", "1", "3", "-0", "2147483647", "2147483648", "-2147483649", "4294967296", "9223372036854775807"),
    *("9223372036854775808", "-9223372036854775809", "18446744073709551616", "1" + "0" * 400, "1e400", "-1e400"),
    *("1e308", "0.5", "1e-400", "NaN", "Infinity", '""', '"1"', '"-1"', '"NaN"', '"\\u0000"', '"\\ud800"', "true"),
    *("false", "null", "[]", "{}", "[[]]", "[null]", "[-1]", "[1e99]", "[9223372036854775808]", '[{}]', '[""]'),
    *('{"":1}', '{"type":1}', '{"type":null}', '{"type":"function"}', '{"type":{}}', '{"0":1e400}', '{"a":[[{}]]}'),
    "[" * 70 + "]" * 70,
    json.dumps("x" * 5000),
    json.dumps([[1, 2]] * 2000),
    json.dumps({str(i): i for i in range(2000)}),
]  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("hostile")
    path = write_model(folder / "tiny.gguf", variant(spec_named("lite"), n_ctx=256), V25_TEMPLATE)
    settings = replace(USUAL, n_ctx=96, queue=512, slot_folder=folder)
    with served(path, settings) as running:
        yield running


@pytest.fixture(autouse=True)
def lives(server: Served) -> Iterator[None]:
    yield
    assert server.client.get("/health").json() == {"status": "ok"}
    assert server.asked("/completion", prompt="Hi", n_predict=1)["stop"]


def complaint(path: str, response: httpx.Response) -> str | None:
    """What is wrong with an answer; None where it is right or a refusal in its dialect's form."""
    if response.status_code == 200:
        return None
    if not 400 <= response.status_code < 500:
        return f"{response.status_code}: {response.text[:200]}"
    try:
        body = response.json()
        if path.startswith("/api/"):
            message = body["error"]
        else:
            message = body["error"]["message"]
            if not isinstance(body["error"]["type"], str) or path.startswith("/v1/messages") != ("type" in body):
                return f"not its form: {response.text[:200]}"
    except (ValueError, KeyError, TypeError) as error:
        return f"{error!r}: {response.text[:200]}"
    return None if isinstance(message, str) and 0 < len(message) < 2000 else f"no message: {response.text[:200]}"


def tried(server: Served, path: str, bodies: list[bytes]) -> list[str]:
    """The complaints about the answers to bodies, which are sent eight at a time."""

    def ask(body: bytes) -> str | None:
        response = server.client.post(path, content=body, headers=JSON, timeout=SECONDS)
        wrong = complaint(path, response)
        return wrong and f"{body[:120]!r}: {wrong}"

    with ThreadPoolExecutor(8) as pool:
        return [wrong for wrong in pool.map(ask, bodies) if wrong]


def with_field(right: dict[str, Any], name: str, value: str) -> bytes:
    """The JSON of a right body with a field of raw text."""
    rest = {key: one for key, one in right.items() if key != name}
    return f"{json.dumps(rest)[:-1]}{', ' if rest else ''}{json.dumps(name)}: {value}}}".encode()


def inner_of(kind: Any) -> list[type[msgspec.Struct]]:
    """The structures that a field's type names."""
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return [kind]
    return [inner for part in get_args(kind) for inner in inner_of(part)]


@by_path
def test_odd_values_in_every_field(server: Served, form: Form) -> None:
    bodies = []
    for name, kind in get_type_hints(form.kind, include_extras=True).items():
        bodies += [with_field(form.right, name, value) for value in ODD]
        for inner in inner_of(kind):
            for field in inner.__struct_fields__:
                held = form.right.get(name, {})
                bodies += [with_field(form.right, name, with_field(held, field, v).decode()) for v in ODD]
    assert len(bodies) >= len(ODD)
    assert not tried(server, form.path, bodies)


ODD_MESSAGES = [
    *({"role": role} for role in ("user", "assistant", "tool", "system", "", "\ud800", "developer", "x" * 500)),
    *({"role": "user", "content": content} for content in (None, 1, [], {}, [1], [{}], [{"type": "text"}], [[]], True)),
    *({"role": "user", "content": [{"type": kind, "text": 1}]} for kind in ("text", "image_url", "tool_use", "", None)),
    *({"role": "user", "content": [{"type": kind}]} for kind in ("tool_result", "tool_use", "thinking", "input_text")),
    *(
        {"role": "assistant", "tool_calls": calls}
        for calls in (1, {}, [1], [{}], [{"function": 1}], [{"function": {}}])
    ),
    {"role": "assistant", "tool_calls": [{"id": 1, "function": {"name": 1, "arguments": 1}}]},
    {"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": "{" * 500}}]},
    {"role": "tool", "tool_call_id": [], "content": {}},
    {"role": "user", "content": "\ud800", "name": "\udfff"},
    {"role": "user", "content": "x" * 100_000},
    *(1, None, "Hi", [], {}, {"content": "Hi"}, [HI]),
]
ODD_TOOLS = [
    *(1, None, "f", {}, {"type": "function"}, {"type": "function", "function": 1}, {"name": "f", "input_schema": 1}),
    *({"type": "function", "function": {"name": name}} for name in (1, "", None, "a b", "\ud800", "x" * 5000, "é")),
    *(
        {"type": "function", "function": {"name": "f", "parameters": schema}}
        for schema in (1, [], "x", {"type": "x"}, {"$ref": "#"}, {"properties": 1}, {"pattern": "("}, {"enum": 1})
    ),
    {"name": "f", "input_schema": {"type": "object", "properties": {"a": {"pattern": "(" * 50}}}},
]
CHATS = [form for form in FORMS if "messages" in form.right or form.path == "/v1/responses"]


@pytest.mark.parametrize("form", CHATS, ids=lambda form: form.path)
def test_odd_messages_and_tools(server: Served, form: Form) -> None:
    field = "messages" if "messages" in form.right else "input"
    bodies = [form.right | {field: [message]} for message in ODD_MESSAGES]
    bodies += [form.right | {field: [*HI, message, *HI]} for message in ODD_MESSAGES]
    bodies += [
        form.right | {"tools": [tool], "tool_choice": choice}
        for tool in ODD_TOOLS
        for choice in ("required", {"type": "any"}, {"type": "function", "function": {"name": "f"}}, {"name": 1})
    ]
    assert not tried(server, form.path, [json.dumps(body).encode() for body in bodies])


SCHEMAS: list[Any] = [
    *({"type": "object", "$ref": "#"}, {"$ref": "#/x"}, {"$ref": "http://a.example/"}, {"$ref": "file:///etc/passwd"}),
    *({"type": "nothing"}, {"type": []}, {"enum": []}, {"enum": list(range(2000))}, {"pattern": "(a+)+$"}),
    *({"type": "string", "pattern": p} for p in ("(", "(?=a)", "a{1,100000}", "(a{1,500}){1,500}", "\\", "[z-a]")),
    *({"type": "string", "minLength": n, "maxLength": 1} for n in (-1, 2, 10**9, 2**63, 1e400)),
    *({"type": "array", "minItems": n} for n in (-1, 10**6, 2**63, 2**64)),
    {"type": "integer", "minimum": 10**400, "maximum": -(10**400)},
    {"type": "number", "multipleOf": 0},
    {"anyOf": [{"type": "string"}] * 3000},
    {"allOf": [{"type": "string", "pattern": f"(.*[a{i}]){{9}}"} for i in range(30)]},
    {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(300)}},
    {"type": "object", "properties": {"\ud800": {}}},
    *(0, "", [], None, False, True),
]  # fmt: skip
NESTED: Any = {}
for _ in range(60):
    NESTED = {"type": "object", "properties": {"a": NESTED}, "required": ["a"]}
GRAMMARS = [
    *("", "root", "root ::=", "root ::= root", "root ::= a", "::=", 'root ::= "a', "root ::= [", "root ::= (" * 999),
    *('root ::= "a"{1,100000}', 'root ::= ("a"{1,999}){1,999}', 'root ::= root "a" | root root', "\ud800", "\0" * 99),
    'root ::= "a"\n' * 500,
    "root ::= " + " | ".join(f'"{i}"' for i in range(2000)),
    "root ::= " + " ".join(["[a-z]*"] * 300),
    *(
        f"root ::= a0\n{body}"
        for body in ("\n".join(f"a{i} ::= a{i + 1} a{i + 1}" for i in range(9)) + '\na9 ::= "x"',)
    ),
]
REGEXES = [
    *("(", ")", "*", "a{,", "a{99999}", "(a+)+b", "(a|a)*" * 30, "(?=a)", "(?P<x>", "\\p{Nope}", "[", "(" * 5000),
    "\ud800",
    *("((a{1,100}){1,100}){1,100}", "(.*a){25}", "a" * 100_000, "\\1(a)", "(?i)\u212a*", "[^\\x00-\\U0010ffff]", ""),
]  # fmt: skip
CHOICES = [
    *([], [""], ["a"] * 5000, ["\ud800"], ["\n\"'\\"], ["a" * 10**5]),
    [str(i) for i in range(3000)],
]


@pytest.mark.parametrize("kind", ["schema", "grammar", "regex", "choice"])
def test_forms_that_cannot_be_followed(server: Served, kind: str) -> None:
    right = {"prompt": "Hi", "max_tokens": 1}
    values: dict[str, tuple[str, list[Any]]] = {
        "schema": ("json_schema", [*SCHEMAS, NESTED]),
        "grammar": ("grammar", GRAMMARS),
        "regex": ("guided_regex", REGEXES),
        "choice": ("guided_choice", CHOICES),
    }
    field, odd = values[kind]
    assert not tried(server, "/v1/completions", [json.dumps(right | {field: value}).encode() for value in odd])
    ollamas = [{"messages": HI, "stream": False, "options": {"num_predict": 1}, "format": value} for value in odd]
    assert not tried(server, "/api/chat", [json.dumps(body).encode() for body in ollamas])


BODIES = [
    *(
        b"",
        b" ",
        b"{",
        b"}",
        b"[]",
        b"null",
        b"1",
        b'"x"',
        b"nonsense",
        b"\xff\xfe{}",
        b"{}" * 2,
        b"{'a': 1}",
        b"\0" * 99,
    ),
    *(
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"[" * 3000 + b"]" * 3000,
        b'{"a":' * 65 + b"1" + b"}" * 65,
        b"\xef\xbb\xbf{}",
    ),
    b'{"messages": "\xff"}',
    b'{"prompt": "\\ud83d"}',
    b'{"x": ' + b"[0]," * 300_000 + b"}",
    b'{"x": [' + b"0," * 300_000 + b"0]}",
    b'{"x": "' + b"a" * 3_000_000 + b'"}',
    b"{" + b'"max_tokens": 1, ' * 20_000 + b'"n": 10000000000}',
    b'{"n": 1, "n": -1}',
]


@by_path
def test_bodies_that_are_no_requests(server: Served, form: Form) -> None:
    assert not tried(server, form.path, BODIES)
    twice = json.dumps(form.right).encode()
    assert not tried(server, form.path, [twice[:-1] + b", " * bool(form.right) + twice[1:]])  # duplicate keys


@pytest.mark.parametrize("mark", ["0,", "[],", "{},", "[[]],"])
def test_bodies_of_too_many_values(server: Served, mark: str) -> None:
    """What 32 MiB of them would be made into takes gigabytes, and nobody else is answered meanwhile."""
    n = MAX_VALUES // sum(mark.count(c) for c in ",[{")
    for many, status in ((n - 100, 400), (n + 100, 413)):
        body = b'{"prompt": [' + mark.encode() * many + b"0]}"
        response = server.client.post("/completion", content=body, headers=JSON, timeout=SECONDS)
        assert response.status_code == status and not complaint("/completion", response), response.text[:200]
    text = ", [{" * (MAX_VALUES // 3 + 100)
    assert server.client.post("/tokenize", json={"content": text}, timeout=SECONDS).status_code == 413


@pytest.mark.parametrize(("n", "in_loop"), [(10, True), (QUICK, False)])
def test_large_bodies_are_read_beside_the_event_loop(
    server: Served, n: int, in_loop: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = list[str]()

    def noted(body: bytes, kind: type[Any]) -> Any:
        threads.append(threading.current_thread().name)
        return parse(body, kind)

    monkeypatch.setattr("dsv2cli.server.answering.parse", noted)
    assert server.client.post("/tokenize", json={"content": "a" * n}).status_code == 200
    assert [not name.startswith("asyncio") for name in threads] == [in_loop]


@by_path
@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "", "application/jsonx", ";" * 500]
)
def test_what_is_no_json(server: Served, form: Form, kind: str) -> None:
    response = server.client.post(form.path, content=b"{}", headers={"content-type": kind})
    assert response.status_code == 415 and not complaint(form.path, response)


@pytest.mark.parametrize(
    "path", ["/v1/nothing", "/api/nothing", "/v1/messages/nothing", "/api/pull", "/%00", "/..//etc/passwd"]
)
@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "PATCH", "TRACE", "BREW"])
def test_paths_and_methods_that_are_none(server: Served, path: str, method: str) -> None:
    response = server.client.request(method, path, content=b"{}", headers=JSON)
    assert response.status_code in (404, 405) and not complaint(path, response)


# Below the requests: bytes.


def sent(server: Served, data: list[bytes], pause: float = 0.0) -> bytes:
    """The beginning of what comes back on a connection."""
    url = server.client.base_url
    with socket.create_connection((url.host, url.port or 80), SECONDS) as peer:
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):  # it is shut out
            for part in data:
                peer.sendall(part)
                time.sleep(pause)
        try:
            return peer.recv(4096)
        except ConnectionResetError:
            return b""


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    "data",
    [
        [HEAD + b"X-A: " + b"a" * (1 << 20) + b"\r\n\r\n"],
        [HEAD, *[f"X-{i}: {i}\r\n".encode() * 50 for i in range(200)]],
        [b"GET /" + b"a" * (1 << 17) + b" HTTP/1.1\r\nHost: localhost\r\n\r\n"],
        [HEAD + b"Content-Length: -1\r\n\r\n"],
        [HEAD + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n{}"],
        [HEAD + b"Content-Length: 99999999999999999999999\r\n\r\n{}"],
        [HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n"],
        [HEAD + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\n{}"],
        [HEAD + b"Transfer-Encoding: gzip\r\n\r\n{}"],
        [HEAD + b"Host: evil.example\r\nContent-Length: 2\r\n\r\n{}"],
        [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"],  # TLS
        [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"],
        [b"\r\n" * 5000],
        [b"GET / HTTP/1.1\r\n\r\n"],
        [b"GET http://evil.example/health HTTP/1.1\r\nHost: evil.example\r\n\r\n"],
        [b"GET /health HTTP/1.1\r\nHost: localhost\r\nX:\x00\r\n\r\n"],
    ],
)
def test_bytes_that_are_no_http(server: Served, data: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "HEAD_SECONDS", 0.5)  # what may go on to be a head, or a body, is waited for
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.5)
    answer = sent(server, data)
    assert not answer or 400 <= int(answer.split()[1]) < 500 or answer.split()[1] == b"501", answer[:200]


@pytest.mark.parametrize("before", [[], [b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"]])
def test_heads_that_do_not_come(server: Served, before: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    if not before:
        monkeypatch.setattr(process, "HEAD_SECONDS", 0.5)
    url = server.client.base_url
    with socket.create_connection((url.host, url.port or 80), SECONDS) as peer:
        for data in before:
            peer.sendall(data)
            answer = b""
            while not answer.endswith(b'{"status":"ok"}'):  # in one piece or two
                piece = peer.recv(4096)
                assert piece, answer
                answer += piece
        monkeypatch.setattr(process, "HEAD_SECONDS", 0.5)
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            for _ in range(15):  # a byte now and then
                peer.sendall(b"G")
                time.sleep(0.1)
        with contextlib.suppress(ConnectionResetError):
            assert peer.recv(4096) == b""


def test_chunks_past_the_limit(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "MAX_BODY", 100_000)
    chunk = b"%x\r\n%b\r\n" % (50_000, b" " * 50_000)
    assert b" 413 " in sent(server, [HEAD + b"Transfer-Encoding: chunked\r\n\r\n", chunk, chunk, chunk], 0.05)


def test_slow_bodies_hold_nobody_up(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "BODY_SECONDS", 1.0)
    answers: list[bytes] = []

    def slow() -> None:
        answers.append(sent(server, [HEAD + b"Content-Length: 1000\r\n\r\n", *[b" "] * 15], 0.1))

    threads = [threading.Thread(target=slow) for _ in range(20)]
    for thread in threads:
        thread.start()
    assert server.asked("/completion", prompt="Hi", n_predict=2)
    for thread in threads:
        thread.join()
    assert all(not answer or b" 408 " in answer for answer in answers) and any(answers)
