"""The server as a process: its socket, its signals, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Literal

import anyio
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from cext import MAX_STEP
from cext.errors import TemplateError
from cext.template import free_variables
from dsv2cli import console, options, runtime
from dsv2cli.errors import INTERRUPTED, CliError
from dsv2cli.residency import Beside
from dsv2cli.server import files
from dsv2cli.server.app import State, build
from dsv2cli.server.batches import Batches
from dsv2cli.server.disk import Disk
from dsv2cli.server.engine import Engine, Limits
from dsv2cli.server.generation import Params
from dsv2cli.server.guard import Rules
from dsv2cli.server.service import Service

if TYPE_CHECKING:
    from cext.model import KvType
    from cext.tokenizer import Tokenizer

MAX_HEADERS = 16 << 10  # bytes (CVE-2025-48956)
MAX_CONNECTIONS = 512
IDLE_SECONDS = 30
HEAD_SECONDS = 30.0
NO_LISTENING = {
    errno.EADDRINUSE: "--port 0 takes any that is free",
    errno.EACCES: "ports below 1024 are the administrator's: --port takes another",
}
SWITCH_SECONDS = 0.001  # the engine's thread lets the others have the interpreter so soon


def listen(host: str, port: int, *, shared: bool = False) -> socket.socket:
    """A bound socket, before anything slow. shared: IPv6's :: leaves IPv4's addresses to others. CliError where the
    address cannot be had."""
    try:
        tcp = socket.IPPROTO_TCP  # named, since asyncio sends at once (TCP_NODELAY) on sockets that say so alone
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=tcp, flags=socket.AI_PASSIVE)
        family, kind, _, _, where = found[0]
        bound = socket.socket(family, kind, tcp)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared and family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        bound.bind(where)
        bound.listen(128)
    except OSError as error:
        hint = NO_LISTENING.get(error.errno or 0, "--host takes a name or an address of this machine")
        raise CliError(f"cannot listen on {host}, port {port}: {error.strerror or error}", hint) from None
    return bound


def listen_all(hosts: Sequence[str], port: int, tries: int = 8) -> list[socket.socket]:
    """As listen, at several addresses and one port; 0: any that is free at all of them. CliError."""
    bound: list[socket.socket] = []
    try:
        for host in hosts:
            bound.append(listen(host, bound[0].getsockname()[1] if bound else port, shared=len(hosts) > 1))
        return bound
    except CliError:
        for each in bound:
            each.close()
        if port or not bound or not tries:
            raise
    return listen_all(hosts, port, tries - 1)  # what is free at the first was taken at another


def address(bound: socket.socket) -> str:
    host, port = bound.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class Protocol(H11Protocol):
    """uvicorn's, which would wait for a request's head for ever: whoever holds a connection without one is let go."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._timer = self.loop.call_later(HEAD_SECONDS, transport.close)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        waits = self.cycle is None or self.cycle.response_complete
        if self._timer is not None and not waits:
            self._timer.cancel()
            self._timer = None
        elif self._timer is None and waits:
            self._timer = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)


class Server(uvicorn.Server):
    """uvicorn's, whose signals are ours: the first ends it gently, a second at once."""

    interrupted = False  # by Ctrl-C

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._hear) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.interrupted |= number == signal.SIGINT
        self.force_exit = self.should_exit
        self.should_exit = True


@dataclass(frozen=True)
class Plan:
    """What is to be served. load: opens the model, which takes a while; requests before it has are told so.

    grace: seconds that what runs has at the end. files: a folder for clients' files and batches; None: one that goes
    with the server. closed: of app.CLOSABLE, what is not answered.
    """

    load: Callable[[], AbstractContextManager[Service]]
    rules: Rules
    grace: float = 30.0
    files: Path | None = None
    closed: frozenset[str] = frozenset()


def server_of(state: State, plan: Plan) -> Server:
    config = uvicorn.Config(
        build(state, plan.rules, plan.closed),
        http=Protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        h11_max_incomplete_event_size=MAX_HEADERS,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=int(plan.grace),
    )
    return Server(config)


class Serving:
    """A model that loads and answers while a server listens before it. ``run`` returns when the server has ended."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self.state = State()
        self.server = server_of(self.state, plan)
        self._over = threading.Event()
        self._is_alone = False  # in its process
        self._failure: BaseException | None = None

    def run(self, *listening: socket.socket) -> None:
        """Until SIGTERM or Ctrl-C (KeyboardInterrupt): then no more is taken on, and what runs has its grace. Raises
        what opening the model raises. A model that is still being loaded is not waited for."""
        loader = threading.Thread(target=self._serve_model, name="dsv2-model", daemon=True)
        loader.start()
        try:
            self.server.run(sockets=list(listening))
        finally:
            self._over.set()
            if not self.is_loading:
                loader.join()
        if self._failure is not None:
            raise self._failure
        if self.server.interrupted:
            raise KeyboardInterrupt

    def run_alone(self, *listening: socket.socket) -> None:
        """As run, in a process that serves and nothing else: it ends at once where the model still loads.

        Loading cannot be stopped in every library, and Python would wait for its threads at the end.
        """
        self._is_alone = True
        sys.setswitchinterval(SWITCH_SECONDS)
        try:
            self.run(*listening)
        finally:
            if self.is_loading:
                if console.obeys(sys.stderr):
                    console.show_progress("")
                os._exit(INTERRUPTED if self.server.interrupted else 0)

    @property
    def is_loading(self) -> bool:
        """The model is neither open nor known to fail."""
        return self.state.service is None and self._failure is None

    @staticmethod
    def _prepare_forms(service: Service) -> None:
        """Before anyone waits for an answer: it holds the interpreter (102,400 tokens: 0.5 s on a Xeon), so who asks
        meanwhile hears that much later that the model loads. A vocabulary that cannot be had for it costs answers of a
        form alone."""
        try:
            service.grammars.prepare()
        except Exception as error:
            console.warn(console.printable(console.fold(f"no answer can be held to a form here: {error}")))

    def _serve_model(self) -> None:
        try:
            with self._plan.load() as service, files.opened(self._plan.files, files.Limits()) as kept:
                service.batches = Batches(service, kept)
                self._prepare_forms(service)
                anyio.run(anyio.sleep, 0)  # else the first stream loads the rest of it, in the event loop
                if self._is_alone:  # what stays is not gone through again and again, with all threads waiting
                    gc.collect()
                    gc.freeze()
                service.engine.start()
                service.batches.start()
                self.state.service = service
                self._over.wait()
                service.batches.stop()
                service.engine.stop()
        except BaseException as error:
            self._failure = error
            self.server.should_exit = True


def load(
    path: Path, threads: int | None, settings: Settings, wishes: runtime.Wishes | None = None
) -> Callable[[], AbstractContextManager[Service]]:
    """What opens a model for serving as the settings say."""

    @contextlib.contextmanager
    def opened() -> Iterator[Service]:
        with runtime.open_model(path, threads, wishes) as model:
            _prepare(model.tokenizer, settings)
            n_ctx = model.context(settings.n_ctx)
            limits = Limits(n_ctx, settings.parallel, settings.queue, settings.cache_bytes, settings.deterministic)
            disk = _disk(model, n_ctx, settings) if settings.disk is not None else None
            engine = Engine(model, limits, settings.kv, disk)
            yield Service(
                engine,
                settings.name or model.name,
                settings.params,
                settings.aliases,
                settings.tags,
                settings.verbose,
                settings.thinking,
                n_predict=settings.n_predict,
                slot_folder=settings.slot_folder,
            )

    return opened


def _prepare(tokenizer: Tokenizer, settings: Settings) -> None:
    """CliError where a chat cannot be written as the settings want it."""
    if settings.template is not None:
        tokenizer.chat_template = settings.template
    try:
        tokenizer.check_thinking(settings.thinking)
        free_variables(settings.template or "")
    except TemplateError as error:
        raise CliError(str(error), error.hint) from None


def _disk(model: runtime.Runtime, n_ctx: int, settings: Settings) -> Disk:
    """CliError where prefixes cannot be kept there."""
    from cext import Model

    assert settings.disk is not None
    path, budget = settings.disk
    if not isinstance(model.model, Model):
        raise CliError("--cache-dir: llama.cpp's caches are not kept on disk", "leave it out, or --engine dsv2")
    try:
        return Disk(model.model, n_ctx, settings.kv, path, budget)
    except OSError as error:
        raise CliError(f"cannot keep what is read in `{path}`: {error.strerror or error}") from None


@dataclass(frozen=True)
class Settings:
    """How a model is served. n_ctx None: 4096, or what it was trained for if less; 0: what it was trained for. name
    None: its own. disk: a folder for what has been read, and its bytes. slot_folder: where clients may save slots."""

    n_ctx: int | None = None
    parallel: int = 4
    queue: int = 64
    cache_bytes: int = 2_000_000_000
    kv: KvType = "f16"
    name: str | None = None
    deterministic: bool = False
    params: Params = field(default_factory=Params)
    n_predict: int | None = None  # most tokens of an answer that asks for no number
    disk: tuple[Path, int] | None = None
    slot_folder: Path | None = None
    aliases: tuple[str, ...] = ()  # names beside it
    tags: tuple[str, ...] = ()  # what the list of models tells of it
    thinking: bool | None = None  # of chats that say nothing about it
    template: str | None = None  # in place of the file's
    verbose: bool = False  # every chat's answer tells its prompt

    def wishes(
        self,
        engine: Literal["auto", "dsv2", "llama.cpp"],
        rpc: str | None,
        gpu_layers: int,
        *,
        told: bool,
        ram: str,
        gpu: str,
        vram: str | None,
    ) -> runtime.Wishes:
        """How the model is run (``options.wishes``): all answers' caches are to have memory beside it. UsageError."""
        beside = Beside(self.n_ctx, self.kv, n_seq=self.parallel, caches=self.cache_bytes, n_step=MAX_STEP)
        return options.wishes(
            engine,
            rpc,
            gpu_layers,
            n_seq=self.parallel,
            told=told,
            ram=ram,
            beside=beside,
            gpu=gpu,
            vram=vram,
            steady=self.deterministic,
        )
