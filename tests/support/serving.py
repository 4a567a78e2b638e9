"""A server on a port of its own: in a thread of the test with a client of it, or as a process."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from support import forks
from support.cli import PACKAGES, SAME_DRAWS, SECONDS

from cext.tokenizer import Tokenizer
from dsv2cli.runtime import Wishes
from dsv2cli.server import engine, process
from dsv2cli.server.engine import Engine
from dsv2cli.server.guard import Rules
from dsv2cli.server.process import Serving, Settings

RUN = f"{SAME_DRAWS}; from dsv2cli.app import main; main()"
OPEN = Rules()
USUAL = Settings(n_ctx=512, parallel=4, queue=32, cache_bytes=64 << 20, kv="f32", name="tiny")
# A context that no answer fills within a test, and what asks an endless model for such a one: it ends when it is ended.
ENDLESS = replace(USUAL, n_ctx=100_000)
LONG: dict[str, Any] = {"max_tokens": 99_000, "temperature": 0}


@dataclass
class Served:
    serving: Serving
    client: httpx.Client

    @property
    def engine(self) -> Engine:
        assert self.serving.state.service is not None
        return self.serving.state.service.engine

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.client.post(path, json=body)

    def asked(self, path: str, **body: Any) -> Any:
        """The JSON of an answer that must be one."""
        response = self.post(path, **body)
        assert response.status_code == 200, response.text
        return response.json()

    def settle(self) -> None:
        """Until the engine's thread is between two steps, and through with what it does after having told an end."""
        self.engine.call(lambda: None).result(SECONDS)

    def begun(self, data: bytes) -> bytes:
        """The beginning of what comes back on a connection that brings this and no more."""
        url = self.client.base_url
        with socket.create_connection((url.host, url.port or 80), SECONDS) as peer:
            peer.sendall(data)
            return peer.recv(4096)

    def events(self, path: str, **body: Any) -> list[Any]:
        """The data of a stream's events; the last one is the text [DONE] where the dialect has it."""
        with self.client.stream("POST", path, json=body) as response:
            assert response.status_code == 200, response.read()
            assert response.headers["content-type"].startswith("text/event-stream")
            lines = list(response.iter_lines())
        data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
        return [text if text == "[DONE]" else json.loads(text) for text in data]


@contextmanager
def served(
    path: Path,
    settings: Settings = USUAL,
    rules: Rules = OPEN,
    *,
    threads: int = 2,
    wishes: Wishes | None = None,
    ready: bool = True,
    files: Path | None = None,
) -> Iterator[Served]:
    """ready: the model has been loaded."""
    listening = process.listen("127.0.0.1", 0)
    serving = process.Serving(process.Plan(process.load(path, threads, settings, wishes), rules, grace=5, files=files))
    thread = threading.Thread(target=serving.run, args=(listening,), daemon=True)
    thread.start()
    try:
        while ready and serving.state.service is None:
            assert thread.is_alive()
            time.sleep(0.01)
        with httpx.Client(base_url=f"http://{process.address(listening)}", timeout=SECONDS) as client:
            yield Served(serving, client)
    finally:
        serving.server.should_exit = True
        thread.join()
        listening.close()


class Script:
    """Stands in for the model's choices (``server.choosing.Chooser``): each answer is the next of a list."""

    def __init__(self, tokenizer: Tokenizer, answers: Iterable[str]) -> None:
        self._tokenizer, self._answers = tokenizer, iter(answers)

    def __call__(self, *_: object) -> Script:
        end = self._tokenizer.eos
        assert end is not None
        script = Script(self._tokenizer, ())
        script._ids = iter([*self._tokenizer.encode(next(self._answers), special=True), end])
        return script

    _ids: Iterator[int]

    def accept(self, ids: Iterable[int]) -> None: ...

    def sample(self, logits: object) -> int:
        return next(self._ids)


@contextmanager
def scripted(server: Served, *answers: str) -> Iterator[None]:
    """The server's next answers, one after another: what is said of them is tested, not what a model thinks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "Chooser", Script(server.engine.runtime.tokenizer, answers))
        yield


@contextmanager
def running(path: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """(the process, its address), when it listens."""
    command = [sys.executable, "-P", "-c", RUN, "serve", str(path), "--port", "0", *options]
    process = forks.popen(command, os.environ, stderr=subprocess.PIPE, text=True, cwd=PACKAGES)
    try:
        assert process.stderr is not None
        found = re.search(r"http://[^/]+", process.stderr.readline())
        assert found
        while httpx.get(f"{found[0]}/health", timeout=SECONDS).status_code == 503:
            time.sleep(0.02)
        yield process, found[0]
    finally:
        process.kill()
        process.wait()
