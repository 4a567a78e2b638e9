"""The thread that computes: it admits requests, steps all their answers together, and tells each what came of it.

Everything here but ``Engine.submit``, ``Ticket`` and the figures runs in that one thread. A prompt with several answers
is read once: the first answer reads it, the others fork its cache when it has. A prompt that begins like one which is
being read waits until that is read; one whose beginning is on the disk, until it has been fetched from there.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from dsv2cli.scheduler import (
    Budget,
    Context,
    End,
    Evaluate,
    Event,
    Parts,
    PromptRows,
    Read,
    Reason,
    Scheduler,
    Sequence,
    Stats,
    Text,
    Token,
)
from dsv2cli.server import errors
from dsv2cli.server.choosing import Chooser
from dsv2cli.server.generation import Began, Ended, Generation, Heard, Piece
from dsv2cli.server.marked import Marked
from dsv2cli.server.prefixes import LEAST, Found, Prefixes, common
from dsv2cli.server.slots import Slots

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from cext.model import KvType
    from dsv2cli.runtime import Runtime
    from dsv2cli.scheduler.context import Session
    from dsv2cli.server.disk import Disk

STEP_SECONDS = 0.25  # what a prompt may make the answers beside it wait for at once
INTERRUPT_SECONDS = 0.5  # between two calls to a step to end
FEWEST_BESIDE = 16  # tokens of prompts in such a step, unless the machine is so slow that it takes
SLOW_STEP_SECONDS = 0.4  # this long: experts are read for few tokens as for many, so that fewer gain little
LEAST_BESIDE = 4  # on however slow a machine
BESIDE_AT_FIRST = 8  # before it is known how long they take; doubled by each quick step
WHOLE = 256  # tokens of a prompt's pieces where they must not depend on who else is served
WORTH_WAITING = 16  # tokens that another is about to have read: for fewer, as of a template, nobody waits
MAX_ROWS_TOP = 20  # likeliest tokens kept beside a prompt's cache
T = TypeVar("T")


@dataclass(frozen=True)
class Limits:
    """What one server takes on. n_ctx: tokens a sequence; parallel: answers stepped together; queue: requests waiting
    beside them; cache_bytes: caches of all sessions, of which the kept prefixes are let go first."""

    n_ctx: int
    parallel: int
    queue: int
    cache_bytes: int
    deterministic: bool = False


class Ticket:
    """A request in the engine, as its asker in the event loop sees it."""

    def __init__(self, asked: Generation, look: Callable[[], object] = lambda: None) -> None:
        """look: lets the engine's thread see that it was cancelled, which may have nothing to step."""
        self.asked = asked
        self._look = look
        self.ids: NDArray[np.int32] = np.asarray(asked.prompt, np.int32)
        self.cancelled = False
        self.seeds = _seeds(asked)
        self.next_choice = 0  # the first that has not been admitted
        self.running: dict[int, Sequence] = {}
        self.fetching: Future[Any] | None = None  # a session of its prompt's beginning, from the disk
        self.fetched = False
        self.begun: Session | None = None  # what came of it
        self.slot = 0  # the first answer's
        self._loop = asyncio.get_running_loop()
        self._heard: asyncio.Queue[list[Heard]] = asyncio.Queue()

    def cancel(self) -> None:
        """End all answers before the next step. From any thread."""
        self.cancelled = True
        for sequence in list(self.running.values()):
            sequence.cancel()
        self._look()

    async def heard(self) -> list[Heard]:
        """What is new: at least one thing."""
        return await self._heard.get()

    async def __aiter__(self) -> AsyncIterator[Heard]:
        """Every event until the last answer has ended. Leaving early cancels."""
        n_ended = 0
        try:
            while n_ended < self.asked.n:
                for event in await self.heard():
                    n_ended += isinstance(event, Ended)
                    yield event
        finally:
            self.cancel()

    def tell(self, news: list[Heard]) -> None:
        with contextlib.suppress(RuntimeError):  # its loop is closed: nobody listens
            self._loop.call_soon_threadsafe(self._heard.put_nowait, news)


def apart(evaluate: Evaluate) -> Evaluate:
    """A step of each session alone: sums are then added in an order that knows no neighbours."""

    def each(batch: list[tuple[Any, list[int]]], n_logits: list[int]) -> NDArray[np.float32]:
        return np.concatenate([evaluate([item], [n]) for item, n in zip(batch, n_logits, strict=True)])

    return each


def beside_next(beside: int, n_read: int, seconds: float, n_answers: int) -> int:
    """Tokens of prompts beside so many answers, after a step that read n_read of ``beside`` and took so long: what
    keeps it near STEP_SECONDS, or FEWEST_BESIDE where these keep it near SLOW_STEP_SECONDS; about as many as there are
    answers at least. More are not taken for a step that did not read as many as it might."""
    if not n_read:
        return beside

    def near(target: float) -> int:
        return round(beside * min(2.0, max(0.5, target / max(seconds, 1e-3))))

    least = min(FEWEST_BESIDE, max(LEAST_BESIDE, n_answers))
    found = max(least, near(STEP_SECONDS), min(FEWEST_BESIDE, near(SLOW_STEP_SECONDS)))
    return found if n_read >= beside else min(found, beside)


def _never_began(choice: int, reason: Reason, error: Exception | None) -> Ended:
    return Ended(choice, reason, "", None, Stats(), None, error)


def _seeds(asked: Generation) -> list[int]:
    """One a choice, so that n answers differ and the same request gives the same n."""
    first = secrets.randbits(32) if asked.params.seed is None else asked.params.seed
    return [(first + i) % (1 << 64) for i in range(asked.n)]


@dataclass
class Figures:
    """Counters since the start, for /metrics. Times in seconds."""

    began: float = field(default_factory=time.time)
    requests: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    answer_tokens: int = 0
    prompt_seconds: float = 0.0
    answer_seconds: float = 0.0
    steps: int = 0
    step_seconds: float = 0.0
    longest_step: float = 0.0
    in_steps: int = 0  # answers, summed over steps
    longest: int = 0  # tokens of a prompt and its answer


class Engine:
    """A model, stepped for many. ``start`` and ``stop`` once."""

    def __init__(self, runtime: Runtime, limits: Limits, kv: KvType, disk: Disk | None = None) -> None:
        """disk: what is kept below the memory, and is closed with this."""
        self.runtime, self.limits, self.kv, self.disk = runtime, limits, kv, disk
        self.figures = Figures()
        self.prefixes = Prefixes(runtime.model, limits.cache_bytes, disk)
        tokenizer = runtime.tokenizer
        self.end_ids = [token for token in tokenizer.marker_ids.values() if tokenizer.is_end(token)]
        self._evaluate = apart(runtime.evaluate) if limits.deterministic else runtime.evaluate
        self._scheduler = self._new_scheduler()
        self._waiting: deque[Ticket] = deque()
        self._tickets: dict[Sequence, tuple[Ticket, int]] = {}
        self._paused: dict[Sequence, tuple[Ticket, int]] = {}  # answers in the background, while others are wanted
        self._is_wanted = False  # anything but answers in the background, now
        self._wake = threading.Condition()
        self._fetching: set[Ticket] = set()  # whose session from the disk is under way, or has not been taken
        self.slots = Slots(limits.parallel)
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._n_news = 0  # how often something came that the thread has to look at
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="dsv2-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Take no more, cut what still runs, and return when the thread has ended and what is kept is on the disk."""
        with self._wake:
            self._stopping = True
            for ticket in self._all_tickets():
                ticket.cancel()
        self._look()
        while self._thread.is_alive():  # a step that was about to begin would not have heard the first
            self.runtime.interrupt()
            self._thread.join(INTERRUPT_SECONDS)
        if self.disk is not None:
            self.prefixes.store_all()
            self.disk.close()

    def _look(self, _: object = None) -> None:
        """Let the thread look at what is new."""
        with self._wake:
            self._n_news += 1
            self._wake.notify()

    # Asked from the event loop.

    def submit(self, asked: Generation) -> Ticket:
        """Queue a request. ApiError where it cannot be answered, or too many wait."""
        self.check(asked)
        if asked.ignore_end:
            bias = {**asked.params.bias, **dict.fromkeys(self.end_ids, float("-inf"))}
            asked = replace(asked, params=replace(asked.params, bias=bias))
        ticket = Ticket(asked, self._look)
        with self._wake:
            if self._stopping:
                raise errors.stopping()
            if not asked.background and self.n_waiting >= self.limits.queue:
                raise errors.busy(self.n_waiting)
            self._waiting.append(ticket)
            self.figures.requests += 1
        self._look()
        return ticket

    def check(self, asked: Generation) -> None:
        """ApiError where the context does not hold the prompt."""
        if len(asked.prompt) > self.limits.n_ctx:
            raise errors.too_long(len(asked.prompt), self.limits.n_ctx)

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Run between two steps, in the thread that owns sessions and prefixes. ApiError where it ends."""
        future: Future[T] = Future()
        with self._wake:
            if self._stopping:
                raise errors.stopping()
            self._calls.append((function, future))
        self._look()
        return future

    def running(self) -> list[Sequence]:
        """The answers that are stepped now."""
        return list(self._tickets)

    @property
    def n_waiting(self) -> int:
        return sum(not ticket.asked.background for ticket in list(self._waiting))

    @property
    def n_running(self) -> int:
        return len(self._tickets)

    # The thread.

    def _run(self) -> None:
        seen = 0
        while True:
            with self._wake:
                while self._n_news == seen and not self._tickets and not self._is_over():
                    self._wake.wait()
                if self._is_over():
                    return
                seen = self._n_news
            self._answer_calls()
            try:
                self._admit()
                if self._tickets:
                    self._tell(self._step())
                    self._look()  # what ended may make room
            except Exception as error:
                self._give_up(error)
                self._look()

    def _is_over(self) -> bool:
        return self._stopping and not (self._waiting or self._tickets or self._paused or self._calls)

    def _answer_calls(self) -> None:
        while self._calls:
            function, future = self._calls.popleft()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except Exception as error:
                    future.set_exception(error)

    def _give_up(self, error: Exception) -> None:
        """After a failure that is no single answer's: all that run end with it, and the thread goes on for others."""
        for ticket, choice in self._tickets.values():
            ticket.cancel()  # its answers that have not begun would wait for the first one's prompt
            ticket.tell([_never_began(choice, "error", error)])
        self.figures.failed += len(self._tickets)
        self._tickets.clear()
        self.slots = Slots(self.limits.parallel)
        self.prefixes.clear()
        self._scheduler = self._new_scheduler()

    def _step(self) -> list[Event]:
        scheduler, n_running = self._scheduler, len(self._tickets)
        n_answers = sum(s.n_waiting == 1 for s in self._tickets)
        reading = [s for s in self._tickets if s.n_waiting > 1]
        n_before, n_computed = sum(s.n_waiting for s in reading), scheduler.n_computed
        begun = time.perf_counter()
        events = scheduler.step()
        seconds = time.perf_counter() - begun
        if scheduler.n_computed == n_computed:  # who came or went was told
            return events
        self.figures.in_steps += n_running
        self.figures.steps += 1
        self.figures.step_seconds += seconds
        self.figures.longest_step = max(self.figures.longest_step, seconds)
        if n_answers and reading and not self.limits.deterministic:
            n_read = n_before - sum(s.n_waiting for s in reading)
            scheduler.budget = self._budget(beside_next(scheduler.budget.beside, max(0, n_read), seconds, n_answers))
        return events

    def _new_scheduler(self) -> Scheduler:
        begin, parts = self.runtime.begin, None
        if begin is not None and not self.limits.deterministic:
            parts = Parts(begin, STEP_SECONDS)
        return Scheduler(self._evaluate, self._budget(BESIDE_AT_FIRST), parts)

    def _budget(self, beside: int) -> Budget:
        usual = Budget()
        if self.limits.deterministic:
            return replace(usual, alone=WHOLE, beside=WHOLE, whole=WHOLE)
        return replace(usual, beside=min(beside, usual.step // 2))

    # Admission.

    def _admit(self) -> None:
        """Let waiting requests join, the oldest first, as many as are stepped together."""
        with self._wake:
            waiting = sorted(self._waiting, key=lambda ticket: ticket.asked.background)
        self._make_way(waiting)
        done = []
        for ticket in waiting:
            while not ticket.cancelled and ticket.next_choice < ticket.asked.n and self._has_room(ticket):
                self._admit_choice(ticket)
            if ticket.cancelled:
                self._drop(ticket)
            if ticket.next_choice == ticket.asked.n:
                done.append(ticket)
        if done:
            with self._wake:
                self._waiting = deque(t for t in self._waiting if t not in done)

    def _make_way(self, waiting: list[Ticket]) -> None:
        """Answers in the background pause while others are wanted, and keep what they have read and written. Where the
        model has but so many sequences they end first, and one is left free of them."""
        running = [ticket for ticket, _ in self._tickets.values()]
        self._is_wanted = any(not t.asked.background and not t.cancelled for t in (*running, *waiting))
        if self._is_wanted and self._can_pause:
            for sequence, (ticket, _) in list(self._tickets.items()):
                if ticket.asked.background and not sequence.cancelled:
                    self._scheduler.remove(sequence)
                    self.slots.give_back(sequence, None)
                    self._paused[sequence] = self._tickets.pop(sequence)
        for sequence in list(self._paused):
            resumes = not self._is_wanted and len(self._tickets) < self.limits.parallel  # cancelled ones end in a step
            if resumes and not sequence.cancelled:
                self.slots.take(sequence, None)
            if resumes or sequence.cancelled:  # these need no slot to end
                self._tickets[sequence] = self._paused.pop(sequence)
                self._scheduler.add(sequence)

    @property
    def _can_pause(self) -> bool:
        return self.runtime.model.n_left() is None

    def _has_room(self, ticket: Ticket) -> bool:
        if ticket.asked.background and self._is_wanted:
            return False
        is_kept_free = ticket.asked.background and not self._can_pause and self.limits.parallel > 1
        if len(self._tickets) >= self.limits.parallel - is_kept_free:
            return False
        first = ticket.running.get(0)
        if ticket.next_choice > 0:  # the other answers fork the first one's prompt
            return first is None or first.ended or first.n_waiting <= 1
        return not self._is_being_read(ticket) and self._is_fetched(ticket)

    def _is_being_read(self, ticket: Ticket) -> bool:
        """Whether somebody reads a beginning that this prompt shares, and is not through with it."""
        for sequence, (other, _) in self._tickets.items():
            if sequence.n_waiting > 1 and other.asked.salt == ticket.asked.salt and other.asked.use_cache:
                shared = common(other.ids, ticket.ids)
                if shared >= WORTH_WAITING and shared > sequence.context.session.n_past:
                    return ticket.asked.use_cache
        return False

    # The disk.

    def _is_fetched(self, ticket: Ticket) -> bool:
        """Whether the disk has given what it holds of a prompt: asked for once, and not while another asks for the
        same beginning."""
        asked = ticket.asked
        if self.disk is None or ticket.fetched or asked.rows or not asked.use_cache:
            return True
        if ticket.fetching is None:
            if self._is_fetched_enough(ticket):
                return False
            begun: Any = self._known(ticket)
            ticket.fetching = self.disk.fetch(ticket.ids, asked.salt, begun, lambda: ticket.cancelled)
            self._fetching.add(ticket)
            ticket.fetching.add_done_callback(self._look)
        if not ticket.fetching.done():
            return False
        self._no_longer_fetched(ticket)
        ticket.fetched = True
        if ticket.fetching.exception() is None:
            ticket.begun = ticket.fetching.result()
        ticket.fetching = None
        return True

    def _is_fetched_enough(self, ticket: Ticket) -> bool:
        """Whether another's session with the same beginning is under way, or as many wait in memory as can join."""
        alike = [other for other in self._fetching if other.asked.background == ticket.asked.background]
        return len(alike) >= self.limits.parallel or any(
            self._shares(ticket, other) for other in self._fetching if other.fetching and not other.fetching.done()
        )

    def _no_longer_fetched(self, ticket: Ticket) -> None:
        """Its session is taken, or nobody wants it: another's may be fetched."""
        if ticket in self._fetching:
            self._fetching.remove(ticket)
            self._look()

    def _shares(self, a: Ticket, b: Ticket) -> bool:
        return a.asked.salt == b.asked.salt and common(a.ids, b.ids) >= WORTH_WAITING

    def _known(self, ticket: Ticket) -> Session | None:
        """A session of what is in memory of a prompt's beginning: a kept one's, or one's that runs."""
        kept, n = self.prefixes.beginning(ticket.ids, ticket.asked.salt)
        running, longer = self._running_beginning(ticket, n)
        best = running or kept
        return best.fork(max(n, longer)) if best is not None else None

    def _running_beginning(self, ticket: Ticket, least: int) -> tuple[Session | None, int]:
        """The session of an answer that runs which shares the most first tokens, more than ``least``, and how many."""
        best, longest = None, least
        for sequence, (other, _) in self._tickets.items():
            if other.asked.salt == ticket.asked.salt:
                n = common(sequence.context.session.ids, ticket.ids)
                if n > longest:
                    best, longest = sequence.context.session, n
        return best, longest

    def _drop(self, ticket: Ticket) -> None:
        """A request that nobody waits for: its answers that have not begun end at once."""
        for choice in range(ticket.next_choice, ticket.asked.n):
            ticket.tell([_never_began(choice, "cancelled", None)])
        ticket.next_choice = ticket.asked.n
        self._no_longer_fetched(ticket)
        ticket.fetching = ticket.begun = None
        self.figures.cancelled += 1

    def _admit_choice(self, ticket: Ticket) -> None:
        choice = ticket.next_choice
        ticket.next_choice += 1
        try:
            sequence = self._sequence(ticket, choice)
        except Exception as error:  # out of memory, a sampler out of range: this answer's affair alone
            self.figures.failed += 1
            ticket.tell([_never_began(choice, "error", error)])
            return
        ticket.running[choice] = sequence
        self._tickets[sequence] = (ticket, choice)
        slot = self.slots.take(sequence, ticket.asked.slot)
        if choice == 0:
            ticket.slot = slot
        self._scheduler.add(sequence)
        if ticket.cancelled:  # while the session was made: whoever cancelled did not see this answer
            sequence.cancel()

    def _sequence(self, ticket: Ticket, choice: int) -> Sequence:
        asked, tokenizer = ticket.asked, self.runtime.tokenizer
        found = self._find(ticket, choice)
        if found is None:
            self.prefixes.make_room()
        session = found.session if found else self.runtime.model.session(self.limits.n_ctx, self.kv)
        rows = None
        if asked.rows and choice == 0:
            rows = PromptRows(max(asked.n_top or 0, MAX_ROWS_TOP), found.rows if found else None)
        return Sequence(
            Context(session),
            asked.prompt,
            Chooser(asked.params, asked.constraint() if asked.constraint else None, ticket.seeds[choice]),
            Text(Marked(tokenizer), asked.stops),
            tokenizer.is_end,
            limit=asked.limit,
            n_top=asked.n_top,
            drawn=asked.drawn,
            rows=rows,
        )

    def _find(self, ticket: Ticket, choice: int) -> Found | None:
        """A session that has read the prompt's beginning: its own first answer's, a running one's, or a kept one."""
        asked = ticket.asked
        if self.limits.deterministic:
            return None
        n, first = len(asked.prompt) - 1, ticket.running.get(0)
        if choice and first is not None and common(first.context.session.ids, ticket.ids) >= n:
            if first in self._tickets:
                self.prefixes.make_room()
            if first in self._tickets or self.runtime.model.n_left() != 0:
                return Found(first.context.session.fork(n), n, [])
            del ticket.running[0]  # it has ended: as a kept one its sequence is there to be taken
        if not asked.use_cache:
            return None
        best, longest = (None, LEAST - 1) if asked.rows else self._running_beginning(ticket, LEAST - 1)
        fetched, ticket.begun = ticket.begun, None
        if fetched is not None and fetched.n_past > longest:
            best, longest = fetched, fetched.n_past
        kept = self.prefixes.find(ticket.ids, asked.salt, least=longest, rows=asked.rows, n_top=MAX_ROWS_TOP)
        if best is None or kept is not None:
            return kept
        self.prefixes.make_room()
        return Found(best.fork(longest), longest, [])

    # What came of a step.

    def _tell(self, events: list[Event]) -> None:
        news: dict[Ticket, list[Heard]] = {}
        for event in events:
            ticket, choice = self._tickets[event.sequence]
            heard = self._heard(event, ticket, choice)
            if heard is not None:
                news.setdefault(ticket, []).append(heard)
        for ticket, heard_now in news.items():
            ticket.tell(heard_now)
        if events and not self._tickets:
            self.prefixes.trim()

    def _heard(self, event: Event, ticket: Ticket, choice: int) -> Heard | None:
        if isinstance(event, Token):
            return Piece(choice, event.id, event.text, event.logprobs)
        if isinstance(event, Read):
            return Began(event.done, event.n, event.sequence.stats.n_reused) if choice == 0 else None
        return self._ended(event, ticket, choice)

    def _ended(self, event: End, ticket: Ticket, choice: int) -> Ended:
        sequence, asked = event.sequence, ticket.asked
        del self._tickets[sequence]
        self.slots.give_back(sequence, asked.salt if event.error is None and asked.use_cache else None)
        if choice:  # the first one's cache serves the others until they have all begun
            ticket.running.pop(choice)
        rows = sequence.rows.found if sequence.rows is not None else None
        if event.error is None and asked.use_cache and not self.limits.deterministic:
            try:
                self.prefixes.keep(sequence.context.session, asked.salt, list(rows or []), MAX_ROWS_TOP)
            except Exception:  # the answer is whole all the same: what was kept makes room
                self.prefixes.clear()
        self._count(event, choice)
        self.runtime.settle()
        return Ended(choice, event.reason, event.text, sequence.stop, sequence.stats, rows, event.error)

    def _count(self, event: End, choice: int) -> None:
        stats, figures = event.sequence.stats, self.figures
        if choice == 0:
            figures.prompt_tokens += stats.n_prompt - stats.n_reused
            figures.cached_tokens += stats.n_reused
        figures.answer_tokens += stats.n_answer
        figures.longest = max(figures.longest, stats.n_prompt + stats.n_answer)
        figures.prompt_seconds += stats.prefill_seconds
        figures.answer_seconds += stats.decode_seconds
        figures.finished += event.reason not in ("cancelled", "error")
        figures.cancelled += event.reason == "cancelled"
        figures.failed += event.reason == "error"

    def _all_tickets(self) -> list[Ticket]:
        return [
            *self._waiting,
            *{ticket: None for ticket, _ in [*list(self._tickets.values()), *list(self._paused.values())]},
        ]
