"""One answer, shown as it is written: its text, its reasoning, how far reading the prompt has come, its figures."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from cext.system import resident_bytes
from dsv2cli import console, interrupts
from dsv2cli.chat import files
from dsv2cli.chat.conversation import Conversation, Talk, room_hint
from dsv2cli.chat.reasoning import Piece, Reasoning
from dsv2cli.chat.settings import Sampling
from dsv2cli.chat.view import view
from dsv2cli.scheduler import Event, Read, Stats, Token

if TYPE_CHECKING:
    from cext import DriveCounts
    from cext.model import HotExperts
    from dsv2cli.engines.protocol import Session
    from dsv2cli.runtime import Runtime

LONG_READ = 1.0  # seconds of reading a prompt, from which on it is told how far it has come
LOOK = 0.25  # seconds between looks at how far a long step has come
MANY = 512  # tokens of one whose reading is taken for long before any of it is read


class Thought(Protocol):
    """What is known of an answer's reasoning. n_tokens, seconds: that it took so far."""

    n_tokens: int
    seconds: float


@dataclass
class Chat(ABC):
    """A conversation and how to show it. What differs with who answers is ``LocalChat``'s or remote.py's."""

    conversation: Talk
    sampling: Sampling
    quiet: bool = False
    raw: bool = False
    markdown: bool = True  # on a terminal that has styles
    folded: bool = False  # a line in place of reasoning, on a terminal
    last: Stats = field(default_factory=Stats)

    def answer(self, text: str | None) -> str:
        """Stream one answer to stdout and return it; None: what is new of the last one, which goes on. Ctrl-C ends it.
        ContextFullError where ``text`` is too long, CliError where a server fails."""
        self.last = Stats()
        progress = Progress(shown=not self.quiet)
        thought, pieces = self.pieces(text, progress)
        fold = Fold(thought, progress) if self.folded and console.is_terminal(sys.stdout) else None
        shows = view(plain=self.raw, markdown=self.markdown)
        written: list[str] = []
        try:
            with interrupts.heard(self.conversation.cancel), contextlib.closing(pieces):
                for piece in pieces:
                    shown = piece.text if fold is None else fold.rest(piece)
                    if shown:
                        progress.clear()
                        written.append(shown)
                        shows.show(Piece(shown, piece.reasoning))
            if fold is not None:
                fold.tell()
        finally:
            progress.clear()
            if written:
                shows.finish()
        self._tell_stop()
        return "".join(written)

    @abstractmethod
    def rest(self) -> None:
        """An answer is there, and the next message is being written: time for what makes the next one faster."""

    def collect(self, text: str) -> str:
        """One answer, as a string and nowhere else; Ctrl-C ends it."""
        self.last = Stats()
        _, pieces = self.pieces(text, Progress(shown=False))
        with interrupts.heard(self.conversation.cancel), contextlib.closing(pieces):
            return "".join(piece.text for piece in pieces)

    @abstractmethod
    def pieces(self, text: str | None, progress: Progress) -> tuple[Thought, Generator[Piece, None, None]]:
        """An answer as it comes, to ``text`` or going on with the last."""

    @abstractmethod
    def headline(self) -> str:
        """Whom one talks to."""

    @abstractmethod
    def count(self, text: str) -> int | None:
        """Its tokens, where they can be known."""

    @abstractmethod
    def room_hint(self, n: int) -> str:
        """What to do about a prompt of n tokens, which are too many."""

    @abstractmethod
    def sizes(self, typed: str) -> list[str]:
        """Of the files that a message names, what they would add."""

    def obey(self, sampling: Sampling) -> None:
        """Answer so from now on."""
        self.sampling = sampling

    def report(self, answer: str) -> dict[str, object]:
        """The last answer and its figures, for programs."""
        said = self.conversation.said()
        return {
            "answer": answer if said.reasoning is None else said.content,
            "reasoning": said.reasoning,
            "stop": self.last.stop,
            "prompt_tokens": self.last.n_prompt,
            "answer_tokens": self.last.n_answer,
        }

    def _tell_stop(self) -> None:
        if self.last.stop == "cancelled":
            console.note("(stopped)", "dim")
        elif self.quiet:
            return
        elif self.last.stop == "length":
            console.note(f"(stopped after {self.last.n_answer} tokens: -n)", "dim")
        elif self.last.stop == "context":
            console.note(f"(the context of {self.conversation.n_ctx} tokens is full: -c makes it larger)", "dim")

    @abstractmethod
    def tell_stats(self) -> None:
        """A line about the last answer, on stderr."""


class LocalChat(Chat):
    """With a model that runs here."""

    conversation: Conversation

    def __init__(
        self,
        runtime: Runtime,
        conversation: Conversation,
        sampling: Sampling,
        *,
        quiet: bool = False,
        raw: bool = False,
    ) -> None:
        super().__init__(conversation, sampling, quiet, raw)
        self.runtime = runtime
        self.sampler = sampling.sampler()

    @property
    def session(self) -> Session:
        return self.conversation.session

    def rest(self) -> None:
        self.runtime.settle()

    def pieces(self, text: str | None, progress: Progress) -> tuple[Thought, Generator[Piece, None, None]]:
        reasoning = Reasoning(self.runtime.tokenizer)
        limit = self.sampling.max_tokens
        if text is None:
            reply = self.conversation.go_on(self.sampler, limit, self.last)
            self._feed_what_stands(reasoning)
        else:
            reply = self.conversation.reply(text, self.sampler, limit, self.last)
        return reasoning, self._pieces(reply, reasoning, progress, begun=self.raw or text is None)

    def _feed_what_stands(self, reasoning: Reasoning) -> None:
        """Let it know where in an answer that goes on its text stands."""
        turn, tokenizer = self.conversation.turns[-1], self.runtime.tokenizer
        stream, begun = tokenizer.stream(), False
        for token in (*turn.opening, *turn.answer):
            text = stream.feed(token)
            text = text if begun else text.lstrip()
            begun = begun or bool(text)
            reasoning.feed(text, token)

    def _pieces(
        self,
        reply: Generator[Event, None, None],
        reasoning: Reasoning,
        progress: Progress,
        *,
        begun: bool,
    ) -> Generator[Piece, None, None]:
        """The answer's text, after the tag that opens its reasoning in the prompt; without the space it begins with,
        unless it has begun."""
        with contextlib.closing(reply), self._watched(progress):
            for event in reply:
                if isinstance(event, Read):
                    progress.read(event.done, event.n)
                    continue
                text = event.text if begun else event.text.lstrip()
                if text and not begun:
                    text = self.conversation.opening + text
                    begun = True
                if self.raw:
                    yield Piece(text, False)
                elif begun:
                    yield from reasoning.feed(text, event.id if isinstance(event, Token) else None)
            yield from reasoning.finish()

    def _watched(self, progress: Progress) -> AbstractContextManager[None]:
        """Where experts come from a drive, a step may be the whole prompt: how far it has come is told meanwhile."""
        from cext import Model

        model = self.runtime.model
        if not isinstance(model, Model) or model.max_step <= model.together:
            return contextlib.nullcontext()
        return watched(progress, model.step_share, model.max_step)

    def headline(self) -> str:
        session = self.session
        cache = f"{console.format_bytes(session.kv_bytes)} of {session.kv_type}"
        return f"{self.runtime.name}, {session.n_ctx} tokens of context in {cache}, {self.runtime.model.isa}."

    def count(self, text: str) -> int | None:
        return len(self.runtime.tokenizer.encode(text))

    def room_hint(self, n: int) -> str:
        return room_hint(n, self.runtime.n_ctx_train)

    def sizes(self, typed: str) -> list[str]:
        found = files.count(typed, self.runtime.tokenizer)
        return [f"{name}: {'many' if n is None else n}" for name, n in found]

    def obey(self, sampling: Sampling) -> None:
        super().obey(sampling)
        self.sampler = sampling.sampler()

    def report(self, answer: str) -> dict[str, object]:
        stats = self.last
        return super().report(answer) | {
            "drafted_tokens": stats.n_drafted,
            "taken_tokens": stats.n_taken,
            "seed": self.sampling.seed,
            "load_seconds": round(self.runtime.load_seconds, 4),
            "first_token_seconds": round(stats.prefill_seconds, 4),
            "prefill_tokens_per_second": round(stats.prefill_rate, 2),
            "decode_tokens_per_second": round(stats.decode_rate, 2),
            "engine": self.runtime.engine,
            "kv_type": self.session.kv_type,
            "kv_bytes": self.session.kv_bytes,
            "resident_bytes": resident_bytes(),
            "drive": self.runtime.drive(),
            "gpu": self.runtime.gpu(),
        }

    def tell_stats(self) -> None:
        console.note(describe(self.last, self.runtime.load_seconds), "dim")
        if counts := self.runtime.drive_counts():
            console.note(describe_drive(*counts), "dim")
        if (work := self.runtime.device_work()) and work.hot.rate is not None:
            console.note(describe_hot(work.hot), "dim")


@dataclass
class Progress:
    """A line on stderr while nothing of an answer is to be seen, gone when it begins."""

    shown: bool
    on_screen: bool = False
    begun: float = field(default_factory=time.monotonic)  # reading
    n_read: int = 0  # of n tokens, after the last step
    n: int = 0
    lock: threading.RLock = field(default_factory=threading.RLock)  # of the line: another thread may tell of a step

    def read(self, done: int, n: int) -> None:
        """So many of a prompt's tokens are read. Told where it takes long, as far as that can be foreseen."""
        with self.lock:
            self.n_read, self.n = done, n
            self._read(done, n)

    def look(self, share: Callable[[], float], most: int) -> None:
        """Within a step of at most so many tokens, of which a share is computed."""
        with self.lock:
            done = self.n_read + int(share() * min(most, self.n - self.n_read))
            if done > self.n_read:
                self._read(done, self.n)

    def _read(self, done: int, n: int) -> None:
        seconds = time.monotonic() - self.begun
        if not done:
            self.begun = time.monotonic()
            if n >= MANY:
                self.tell(reading(0, n, 0.0))
        elif self.on_screen or seconds * n >= LONG_READ * done:
            self.tell(reading(done, n, seconds))

    def tell(self, line: str) -> None:
        if self.shown and console.obeys(sys.stderr):
            console.show_progress(line)
            self.on_screen = True

    def clear(self) -> None:
        with self.lock:
            if self.on_screen:
                console.show_progress("")
                self.on_screen = False


@contextlib.contextmanager
def watched(progress: Progress, share: Callable[[], float], most: int) -> Iterator[None]:
    """Look now and then how far the step has come that this thread waits for."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(LOOK):
            progress.look(share, most)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def reading(done: int, n: int, seconds: float) -> str:
    """The line of a prompt of which so many tokens were read in so many seconds."""
    line = f"reading: {done} of {n} tokens"
    if not done or seconds <= 0:
        return line
    rate = done / seconds
    left = f", {console.format_seconds((n - done) / rate)} left" if done < n else ""
    return f"{line}, {rate:.3g} tok/s{left}"


@dataclass
class Fold:
    """A line in place of an answer's reasoning."""

    reasoning: Thought
    progress: Progress
    folded: bool = False  # something is, and not yet told
    at_edge: bool = False  # of the content, whose first line breaks parted it from what is folded

    def rest(self, piece: Piece) -> str:
        """What is to be shown of a piece."""
        if piece.reasoning:
            self.folded = self.at_edge = True
            self.progress.tell(f"thinking: {self.reasoning.n_tokens} tokens")
            return ""
        text = piece.text.lstrip("\n") if self.at_edge else piece.text
        if text:
            self.tell()
            self.at_edge = False
        return text

    def tell(self) -> None:
        if self.folded:
            self.progress.clear()
            seconds, n = console.format_seconds(self.reasoning.seconds), self.reasoning.n_tokens
            console.note(f"(thought for {seconds}, {n} tokens; /think show shows it)", "dim")
            self.folded = False


def describe(stats: Stats, load_seconds: float) -> str:
    """The line of statistics."""
    n_read = stats.n_prompt - stats.n_reused
    kept = f" ({stats.n_reused} kept)" if stats.n_reused else ""
    drafts = f" ({stats.n_taken} of {stats.n_drafted} drafted tokens taken)" if stats.n_drafted else ""
    return (
        f"loaded in {load_seconds:.2f} s; read {n_read} tokens{kept} at {stats.prefill_rate:.1f} tok/s,"
        f" first token after {stats.prefill_seconds:.2f} s;"
        f" wrote {stats.n_answer} at {stats.decode_rate:.1f} tok/s{drafts};"
        f" {console.format_bytes(resident_bytes())} in memory"
    )


def describe_drive(decoding: DriveCounts, reading: DriveCounts) -> str:
    """The line about experts that are read from the file, since it was opened."""

    def share(part: int, whole: int) -> str:
        return f"{100 * part / whole:.0f} %" if whole else "none"

    token_bytes = decoding.bytes_read // max(decoding.tokens, 1)
    return (
        f"experts in memory when they were needed: {share(decoding.ready, decoding.needed)};"
        f" {console.format_bytes(token_bytes)} read a token, {console.format_bytes(reading.bytes_read)} for prompts;"
        f" guessed ahead: {share(decoding.right, decoding.needed_told)}, of the guesses right:"
        f" {share(decoding.right, decoding.told)};"
        f" waited {(decoding.wait_ns + reading.wait_ns) / 1e9:.2f} s for the drive"
    )


def describe_hot(hot: HotExperts) -> str:
    """The line about experts that come and go on a GPU, since it was opened."""
    return (
        f"choices of experts that were on the GPU: {100 * (hot.rate or 0):.0f} %;"
        f" {console.format_bytes(hot.nbytes // max(hot.tokens, 1))} copied there a token"
    )


def tell_dropped(n: int) -> None:
    turns = "the oldest turn" if n == 1 else f"the {n} oldest turns"
    console.note(f"(context full: {turns} dropped, the system message stays)", "dim")
