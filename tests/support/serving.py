"""A server in a thread of the test, on a port of its own, and a client of it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from dsv2cli import runtime
from dsv2cli.server import process
from dsv2cli.server.engine import Engine, Limits
from dsv2cli.server.guard import Rules

OPEN = Rules()
LIMITS = Limits(n_ctx=512, parallel=4, queue=32, cache_bytes=64 << 20)


@dataclass
class Served:
    """engine: what computes; client: asks it."""

    engine: Engine
    client: httpx.Client

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.client.post(path, json=body)

    def asked(self, path: str, **body: Any) -> Any:
        """The JSON of an answer that must be one."""
        response = self.post(path, **body)
        assert response.status_code == 200, response.text
        return response.json()

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
    path: Path, limits: Limits = LIMITS, rules: Rules = OPEN, kv: Any = "f32", threads: int = 2
) -> Iterator[Served]:
    listening = process.listen("127.0.0.1", 0)
    with runtime.open_model(path, threads) as opened:
        engine, server = process.prepare(opened, limits, kv, "tiny", rules, 5)
        thread = threading.Thread(target=process.run, args=(engine, server, listening), daemon=True)
        thread.start()
        try:
            with httpx.Client(base_url=f"http://{process.address(listening)}", timeout=60) as client:
                yield Served(engine, client)
        finally:
            server.should_exit = True
            thread.join()
            listening.close()
