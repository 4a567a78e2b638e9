"""The server as a process: loading, signals, ends."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
from support import forks
from support.cli import PACKAGES, SECONDS, wait_until
from support.serving import RUN, running, served
from support.tiny import spec_named, variant
from support.vocab import write_model

from dsv2cli import runtime
from dsv2cli.errors import CliError
from dsv2cli.server import process as serving

STREAM = {"prompt": "Hi", "max_tokens": 100, "stream": True, "ignore_eos": True}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = variant(spec_named("lite"), n_ctx=4096)
    return write_model(tmp_path_factory.mktemp("process") / "tiny.gguf", spec, endless=True)


def test_what_is_sent_goes_at_once() -> None:
    """Else an answer's body waits, 40 ms, for the client to say that its head has come; asyncio sees to it where it
    knows that a socket is TCP's."""

    async def connected() -> bool:
        found: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        async def hear(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            accepted = writer.get_extra_info("socket")
            found.set_result(accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        with serving.listen("127.0.0.1", 0) as listening:
            async with await asyncio.start_server(hear, sock=listening):
                _, writer = await asyncio.open_connection(*listening.getsockname())
                writer.close()
                return bool(await found)

    assert asyncio.run(connected())


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_what_runs_is_finished(path: Path, number: int, code: int) -> None:
    with running(path, "-c", "1024") as (process, address):
        n, last = 0, ""
        with httpx.stream("POST", f"{address}/v1/completions", json=STREAM, timeout=SECONDS) as response:
            for line in response.iter_lines():
                if n == 3 and not line:  # once: a second signal would end it at once
                    process.send_signal(number)
                n += line.startswith("data: {")
                last = line or last
        assert last == "data: [DONE]" and n > 20
        assert process.wait(SECONDS) == code


def is_closed(address: str) -> bool:
    """Nobody listens there any more."""
    try:
        httpx.get(f"{address}/health", timeout=SECONDS)
    except httpx.ConnectError:
        return True
    except httpx.TransportError:
        pass  # it was about to
    return False


def test_a_second_signal_ends_it_at_once(path: Path) -> None:
    """Long before what runs has had its grace."""
    with running(path, "-c", "100000") as (process, address):
        body = STREAM | {"max_tokens": 99_000}
        with httpx.stream("POST", f"{address}/v1/completions", json=body, timeout=SECONDS) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            wait_until(lambda: is_closed(address))  # it has been heard
            assert process.poll() is None
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0


LOADS_FOR_EVER = """
import threading
from dsv2cli.engines.llamacpp import model
def load(path, params):
    print("loading", flush=True)
    threading.Event().wait()
model.load = load
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_ends_a_process_whose_model_still_loads(path: Path, number: int, code: int) -> None:
    """In llama.cpp, in a thread that Python waits for at its end."""
    command = [sys.executable, "-P", "-c", LOADS_FOR_EVER + RUN, "serve", str(path), "--port", "0"]
    command += ["--engine", "llama.cpp"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=PACKAGES)
    try:
        assert process.stdout is not None and process.stderr is not None
        found = re.search(r"http://[^/]+", process.stderr.readline())
        assert found and process.stdout.readline() == "loading\n"
        assert httpx.get(f"{found[0]}/health", timeout=SECONDS).status_code == 503
        process.send_signal(number)
        _, said = process.communicate(timeout=SECONDS)
        assert process.returncode == code and "Traceback" not in said and "Error" not in said, said
    finally:
        process.kill()
        process.wait()


def test_requests_while_it_loads(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual, may_load = runtime.open_model, threading.Event()

    def slow(*given: Any, **named: Any) -> Any:
        may_load.wait(SECONDS)
        return usual(*given, **named)

    monkeypatch.setattr(runtime, "open_model", slow)
    with served(path, ready=False) as server:
        health = server.client.get("/health")
        assert health.status_code == 503 and "loaded" in health.json()["error"]["message"]
        refused = server.post("/v1/completions", prompt="Hi")
        assert refused.status_code == 503 and refused.headers["retry-after"]
        may_load.set()
        wait_until(lambda: server.client.get("/health").status_code == 200)
        assert server.asked("/v1/completions", prompt="Hi", max_tokens=1)


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (["--host", "0.0.0.0"], 2, "no key is asked for"),
        (["--host", "203.0.113.1", "--no-auth"], 1, "hint: --host takes a name or an address of this machine"),
        (["--cors-origin", "*"], 2, "every web page"),
        (["--api-key", ""], 2, "empty"),
        (["--cache", "lots"], 2, "no size"),
        (["--port", "70000"], 2, "range"),
        (["--api-key-file", "nowhere.txt"], 1, "nowhere.txt"),
        (["--api-key-file", os.devnull], 1, "holds no key"),
        (["--api-key", "sesame", "--no-auth"], 2, "nobody for a key"),
        (["--host", "127.0.0.1,0.0.0.0"], 2, "0.0.0.0 can be reached"),
        (["--host", "127.0.0.1,"], 2, "no list of addresses"),
        (["--alias", "a,,b"], 2, "name of nothing"),
        (["--chat-template", "{% if %}"], 1, "cannot be compiled"),
        (["--chat-template", "llama9"], 2, "known: chatml"),
        (["--chat-template-file", "nowhere.jinja"], 1, "nowhere.jinja"),
        (["--chat-template", "{x}", "--chat-template-file", "y"], 2, "give one of them"),
        (["--think", "on"], 1, "cannot switch reasoning"),
    ],
)
def test_what_does_not_start(path: Path, options: list[str], code: int, says: str) -> None:
    command = [sys.executable, "-P", "-c", RUN, "serve", str(path), "--port", "0", *options]
    ended = forks.run(command, os.environ, SECONDS, text=True, cwd=PACKAGES)
    assert ended.returncode == code and says in ended.stderr, ended.stderr


def test_a_port_that_is_taken() -> None:
    with serving.listen("127.0.0.1", 0) as taken, pytest.raises(CliError, match="in use") as refused:
        serving.listen("127.0.0.1", taken.getsockname()[1])
    assert "--port 0" in (refused.value.hint or "")


def test_what_a_server_is_started_with(path: Path) -> None:
    """Names, defaults and a template of its own; parts that are not wanted are not there."""
    options = ["--alias", "small, tiny,small", "--tags", "chat, fim", "--temp", "0.25", "--top-k", "7"]
    options += ["--seed", "11", "-n", "3"]
    options += [
        "--no-slots",
        "--no-metrics",
        "--no-page",
        "--verbose",
        "--chat-template",
        "{{ bos_token }}[{{ messages[-1].content }}]",
    ]
    with running(path, *options) as (_, address), httpx.Client(base_url=address, timeout=SECONDS) as client:
        [listed] = client.get("/v1/models").json()["data"]
        assert listed["id"] == "small" and listed["aliases"] == ["small", "tiny"]
        assert listed["tags"] == ["chat", "fim"]
        assert [client.get(f"/v1/models/{name}").status_code for name in ("small", "tiny", "other")] == [200, 200, 404]
        params = client.get("/props").json()["default_generation_settings"]["params"]
        assert (params["temperature"], params["top_k"], params["seed"]) == (0.25, 7, 11)
        messages = [{"role": "user", "content": "Hi"}]
        assert client.post("/apply-template", json={"messages": messages}).json()["prompt"].endswith("[Hi]")
        answers = [
            client.post("/v1/chat/completions", json={"messages": messages, "ignore_eos": True}).json()
            for _ in range(2)
        ]
        assert [answer["usage"]["completion_tokens"] for answer in answers] == [3, 3]
        assert answers[0]["__verbose"]["prompt"].endswith("[Hi]")
        texts = [answer["choices"][0]["message"]["content"] for answer in answers]
        assert texts[0] == texts[1]  # the server's seed
        for way, status in (("/slots", 501), ("/metrics", 501), ("/", 404), ("/page.js", 404), ("/health", 200)):
            assert client.get(way).status_code == status, way
        assert client.post("/slots/0?action=erase", json={}).status_code == 501


def test_several_addresses(path: Path) -> None:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        pytest.skip("IPv6's loopback is not there")
    with running(path, "--host", "127.0.0.1,::1") as (_, address):
        port = httpx.URL(address).port
        for host in ("127.0.0.1", "[::1]"):
            assert httpx.get(f"http://{host}:{port}/v1/models", timeout=SECONDS).status_code == 200


def test_a_port_that_is_free_at_all_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is free at the first and taken at the second is given up for another; a port that is named is not."""
    ours, refused = serving.listen, [2]
    kept: list[socket.socket] = []

    def listen(host: str, port: int, *, shared: bool = False) -> socket.socket:
        if port and refused[0]:
            refused[0] -= 1
            raise CliError("taken")
        kept.append(ours(host, 0, shared=shared))
        return kept[-1]

    monkeypatch.setattr(serving, "listen", listen)
    bound = serving.listen_all(["127.0.0.1", "127.0.0.1"], 0)
    assert len(bound) == 2 and [each.fileno() < 0 for each in kept] == [True, True, False, False]
    for each in bound:
        each.close()
    refused[0] = 1
    with pytest.raises(CliError, match="taken"):
        serving.listen_all(["127.0.0.1"], 8080)


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "no.gguf").write_bytes(b"GGUF but no more")
    command = [sys.executable, "-P", "-c", RUN, "serve", str(tmp_path / "no.gguf"), "--port", "0"]
    ended = forks.run(command, os.environ, SECONDS, text=True, cwd=PACKAGES)
    assert ended.returncode == 1 and "no.gguf" in ended.stderr and "Traceback" not in ended.stderr
    assert json.dumps(ended.stdout) == '""'
