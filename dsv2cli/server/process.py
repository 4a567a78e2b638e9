"""The server as a process: its socket, its signals, and how it ends."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import uvicorn

from dsv2cli.errors import CliError
from dsv2cli.server.app import State, build
from dsv2cli.server.engine import Engine, Limits
from dsv2cli.server.generation import Params
from dsv2cli.server.guard import Rules
from dsv2cli.server.service import Service

if TYPE_CHECKING:
    from cext.model import KvType
    from dsv2cli.runtime import Runtime

MAX_HEADERS = 16 << 10  # bytes (CVE-2025-48956)
MAX_CONNECTIONS = 512
IDLE_SECONDS = 30


def listen(host: str, port: int) -> socket.socket:
    """A bound socket, before anything slow. CliError where the address cannot be had."""
    try:
        family, kind, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        bound = socket.socket(family, kind)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(where)
        bound.listen(128)
    except OSError as error:
        raise CliError(
            f"cannot listen on {host}, port {port}: {error.strerror or error}", "--port 0 takes any that is free"
        ) from None
    return bound


def address(bound: socket.socket) -> str:
    host, port = bound.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def prepare(
    runtime: Runtime, limits: Limits, kv: KvType, name: str, rules: Rules, grace: float
) -> tuple[Engine, uvicorn.Server]:
    """An engine and the server before it, neither begun. grace: seconds that what runs has at the end."""
    engine = Engine(runtime, limits, kv)
    state = State()
    state.service = Service(engine, name, Params(temperature=0.7))
    config = uvicorn.Config(
        build(state, rules),
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        h11_max_incomplete_event_size=MAX_HEADERS,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=int(grace),
    )
    return engine, uvicorn.Server(config)


def run(engine: Engine, server: uvicorn.Server, listening: socket.socket) -> None:
    """Serve until SIGTERM or Ctrl-C: then no more is taken on, and what runs has its grace."""
    engine.start()
    try:
        server.run(sockets=[listening])
    finally:
        engine.stop(0)
