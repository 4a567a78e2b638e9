"""A client that goes: no step that begins after the one under way is for it, and nothing of it is left by then.

Steps are counted, not seconds: each waits until the test lets it go on.
"""

from __future__ import annotations

import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.cli import SECONDS, wait_until
from support.serving import ENDLESS, LONG, Served, served
from support.tiny import spec_named, variant
from support.vocab import write_model

TEXT = "/v1/completions"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = variant(spec_named("lite"), n_ctx=4096)
    return write_model(tmp_path_factory.mktemp("gone") / "tiny.gguf", spec, endless=True)


class Steps:
    """An engine's, held one by one. sessions: whose each is, in order."""

    def __init__(self, server: Served) -> None:
        scheduler = server.engine._scheduler
        assert scheduler._parts is not None
        self.sessions: list[set[int]] = []
        self._held = False
        self._begun, self._go = threading.Semaphore(0), threading.Semaphore(0)
        evaluate, begin = scheduler._evaluate, scheduler._parts._begin

        def step(batch: Any, n_logits: Any) -> Any:
            self._step(batch)
            return evaluate(batch, n_logits)

        def parts(batch: Any, n_logits: Any) -> Any:
            reading = begin(batch, n_logits)
            run = reading.run

            def part(n_layers: int) -> Any:
                self._step(batch)
                return run(n_layers)

            reading.run = part  # type: ignore[method-assign]
            return reading

        scheduler._evaluate = step
        scheduler._parts._begin = parts

    def _step(self, batch: Any) -> None:
        self.sessions.append({id(session) for session, _ in batch})
        if self._held:
            self._begun.release()
            assert self._go.acquire(timeout=SECONDS)

    def hold(self) -> None:
        """Return when a step is under way: it goes on with ``end``."""
        self._held = True
        self.wait()

    def free(self) -> None:
        self._held = False
        self._go.release()

    def wait(self) -> None:
        """Until a step is under way."""
        assert self._begun.acquire(timeout=SECONDS)

    def end(self) -> None:
        """Let the step under way end, and the next begin."""
        self._go.release()
        self.wait()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("state", ["queued", "reading", "writing"])
def test_whoever_goes_is_in_no_step_but_the_one_under_way(path: Path, state: str, stream: bool) -> None:
    parallel = 1 if state == "queued" else 2
    prompt = [5, *range(100)] * 40 if state == "reading" else "Hi the ant"
    body = json.dumps({"prompt": prompt, "stream": stream, **LONG}).encode()
    head = f"POST {TEXT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n".encode()
    with served(path, replace(ENDLESS, parallel=parallel)) as server, ThreadPoolExecutor(1) as pool:
        engine, url = server.engine, server.client.base_url
        steps = Steps(server)
        stays = pool.submit(server.post, TEXT, prompt="Hi", **LONG)
        try:
            wait_until(lambda: engine.n_running == 1 and len(steps.sessions) > 3)
            if state == "reading":
                steps.hold()  # or it would have been read before anybody looks
            client = socket.create_connection((url.host, url.port or 80), SECONDS)
            client.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            if state == "reading":
                wait_until(lambda: engine.n_waiting == 1)
                while steps.sessions[-1] == steps.sessions[0]:
                    steps.end()
            else:
                wait_until(lambda: engine.n_waiting == 1 if state == "queued" else len(steps.sessions[-1]) == 2)
                steps.hold()
            goes = max(engine._all_tickets(), key=lambda ticket: len(ticket.asked.prompt))
            client.close()
            wait_until(lambda: goes.cancelled)  # with the same step under way
            steps.end()
            assert steps.sessions[-1] == steps.sessions[0]  # the next is another's alone
            assert engine.figures.cancelled == 1 and engine.n_waiting == 0
            assert engine.n_running == 1 and goes not in engine._all_tickets()
            assert not stays.done()
        finally:
            steps.free()
            for ticket in engine._all_tickets():
                ticket.cancel()
        assert stays.result().status_code == 200
