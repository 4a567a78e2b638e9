"""``dsv2 batch``: the server's engine and dialects over a file of requests, without a server."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cext import Model
from cext.saved import identity
from dsv2cli import console
from dsv2cli.batch import runner
from dsv2cli.batch.ledger import Ledger
from dsv2cli.batch.lines import Bad, Line
from dsv2cli.errors import CliError
from dsv2cli.server.desk import Desk

if TYPE_CHECKING:
    from dsv2cli.runtime import Runtime
    from dsv2cli.server.service import Service

TOLD_SECONDS = 60.0  # between lines of progress where no terminal shows it
AHEAD = 2  # lines in the engine for each answer that is stepped: when one ends, the next is at hand


@dataclass(frozen=True)
class Answerer:
    """What answers. identity: of the model; n_parallel: answers that are stepped together; n_tokens: those of prompts
    and of answers so far."""

    desk: runner.Desk
    identity: str
    n_parallel: int
    n_tokens: Callable[[], tuple[int, int]]


@contextlib.contextmanager
def here(load: Callable[[], AbstractContextManager[Service]]) -> Iterator[Answerer]:
    """A model of this process."""
    with load() as service:
        engine = service.engine
        engine.start()

        def n_tokens() -> tuple[int, int]:
            figures = engine.figures
            return figures.prompt_tokens + figures.cached_tokens, figures.answer_tokens

        try:
            yield Answerer(Desk(service), model_identity(engine.runtime), engine.limits.parallel, n_tokens)
        finally:
            engine.stop()


@dataclass(frozen=True)
class Plan:
    """What is to be answered, by what, into which ledger.

    ledger: makes it of what the model is; bad: lines that have not the form of one; skip_bad: they, and those that
    would be refused, are results too, and no reason to begin nothing; again: lines whose answer failed before are asked
    again.
    """

    lines: list[Line]
    bad: list[Bad]
    answerer: AbstractContextManager[Answerer]
    ledger: Callable[[str], Ledger]
    seed: int = 0
    skip_bad: bool = False
    again: bool = False
    quiet: bool = False


def run(plan: Plan) -> None:
    """Answer what is not answered yet. CliError where lines failed, KeyboardInterrupt where Ctrl-C ended it."""
    if plan.bad and not plan.skip_bad:
        raise refused(plan.bad)
    with plan.answerer as answerer, plan.ledger(answerer.identity) as ledger:
        asyncio.run(Work(plan, answerer, ledger).run())


def refused(bad: list[Bad]) -> CliError:
    """All that is wrong, told."""
    for one in bad:
        console.note(str(one), label="error")
    what = "1 line" if len(bad) == 1 else f"{len(bad)} lines"
    return CliError(f"{what} cannot be answered, and nothing was begun", "--skip-bad leaves them out")


def model_identity(runtime: Runtime) -> str:
    """What tells the model from others."""
    model = runtime.model
    return identity(model).hex() if isinstance(model, Model) else f"{runtime.name}, {model.nbytes} bytes"


@dataclass
class Work:
    """A run under way."""

    plan: Plan
    answerer: Answerer
    ledger: Ledger
    began: float = field(default_factory=time.monotonic)
    told: float = 0.0
    n_left: int = 0
    n_before: int = 0
    interrupted: bool = False
    ended: bool = False

    async def run(self) -> None:
        self.stopping = asyncio.Event()
        main = asyncio.current_task()
        assert main is not None
        with self._signals(main), console.progress(quiet=self.plan.quiet) as display:
            try:
                await self._run(display)
            except asyncio.CancelledError:
                if not (self.interrupted or self.ended):
                    raise
            except runner.StoppedError:  # before anything was asked; the end tells how far it came
                pass
        if self.interrupted:
            raise KeyboardInterrupt
        if self.ended:
            raise CliError(f"ended by SIGTERM, {self._so_far()}", "the same command goes on")
        self._say_end()

    async def _run(self, display: Any) -> None:
        ledger, plan = self.ledger, self.plan
        if plan.again:
            ledger.forget_failures()
        desk = self.answerer.desk
        left = [line for line in plan.lines if line.id not in ledger.done]
        looking = display.add_task("checking", total=len(left), detail="")
        ordered, bad = await runner.look_over(desk, left, lambda n: display.update(looking, completed=n))
        if bad and not plan.skip_bad:
            raise refused(bad)
        display.remove_task(looking)
        ledger.begin()
        for one in plan.bad:
            if one.id not in ledger.done:
                ledger.put(runner.refusal(one), failed=True)
        for one in bad:
            ledger.put(runner.response(one, one.error.status, one.error.body()), failed=True)
        self.n_left, self.n_before = len(ordered), len(ledger.done)
        if not plan.quiet and self.n_before:
            console.note_above(display, f"{self.n_before} of {self.n_all} lines are done")
        self.began = self.told = time.monotonic()
        answering = display.add_task("answering", total=self.n_all, completed=self.n_before, detail="")

        def told() -> None:
            display.update(answering, completed=len(ledger.done), detail=self._speed())
            if display.disable and not plan.quiet and time.monotonic() - self.told > TOLD_SECONDS:
                self.told = time.monotonic()
                console.note(f"{self._so_far()}, {self._speed()}, {self._time_left()} left")

        at_once = AHEAD * self.answerer.n_parallel
        await runner.run(desk, ordered, ledger, at_once=at_once, seed=plan.seed, told=told, stopping=self.stopping)

    @property
    def n_all(self) -> int:
        return len(self.plan.lines) + len(self.plan.bad)

    @contextlib.contextmanager
    def _signals(self, main: asyncio.Task[Any]) -> Iterator[None]:
        """The first Ctrl-C lets what is under way be finished; a second one, or SIGTERM, leaves it."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()

        def interrupt() -> None:
            if self.stopping.is_set() or not self.n_left:
                main.cancel()
            elif not self.plan.quiet:
                console.note("finishing the answers under way; Ctrl-C again leaves them")
            self.interrupted = True
            self.stopping.set()

        def terminate() -> None:
            self.ended = True
            main.cancel()

        loop.add_signal_handler(signal.SIGINT, interrupt)
        loop.add_signal_handler(signal.SIGTERM, terminate)
        try:
            yield
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)

    def _so_far(self) -> str:
        return f"{len(self.ledger.done)} of {self.n_all} lines are done"

    def _speed(self) -> str:
        (read, written), seconds = self.answerer.n_tokens(), max(time.monotonic() - self.began, 1e-3)
        return f"{written / seconds:.0f} tok/s written, {read / seconds:.0f} read"

    def _time_left(self) -> str:
        n = len(self.ledger.done) - self.n_before
        return console.format_seconds((time.monotonic() - self.began) / max(n, 1) * (self.n_left - n))

    def _say_end(self) -> None:
        failed = self.ledger.n_failed
        if len(self.ledger.done) < self.n_all:
            raise CliError(f"what answers has stopped: {self._so_far()}", "the same command goes on")
        if failed:
            what = "1 line" if failed == 1 else f"{failed} lines"
            raise CliError(
                f"{what} of {self.n_all} failed: `{self.ledger.errors_path}` has why", "--retry asks them again"
            )
        if not self.plan.quiet:
            seconds = console.format_seconds(time.monotonic() - self.began)
            cost = f", {self._speed()}, {seconds}" if self.n_left else ""
            console.note(f"`{self.ledger.path}`: all {self.n_all} lines{cost}")
