"""One answer, shown as it is written: its text, its reasoning, how far reading the prompt has come, its figures."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cext.system import resident_bytes
from dsv2cli import console, interrupts
from dsv2cli.chat.conversation import Conversation
from dsv2cli.chat.reasoning import Piece, Reasoning
from dsv2cli.chat.settings import Sampling
from dsv2cli.chat.view import view
from dsv2cli.scheduler import Event, Read, Stats, Token

if TYPE_CHECKING:
    from cext import DriveCounts, Sampler
    from dsv2cli.engines.protocol import Session
    from dsv2cli.runtime import Runtime

LONG_READ = 512  # tokens of prompt from which on it is told how far the reading has come


@dataclass
class Chat:
    """A conversation and how to show it."""

    runtime: Runtime
    conversation: Conversation
    sampler: Sampler
    sampling: Sampling
    quiet: bool = False
    raw: bool = False
    markdown: bool = True  # on a terminal that has styles
    folded: bool = False  # a line in place of reasoning, on a terminal
    last: Stats = field(default_factory=Stats)

    @property
    def session(self) -> Session:
        return self.conversation.session

    def answer(self, text: str | None) -> str:
        """Stream one answer to stdout and return it; None: what is new of the last one, which goes on. Ctrl-C ends it.
        ContextFullError where ``text`` is too long."""
        self.last = Stats()
        progress = Progress(shown=not self.quiet)
        reasoning = Reasoning(self.runtime.tokenizer)
        if text is None:
            reply = self.conversation.go_on(self.sampler, self.sampling.max_tokens, self.last)
            self._feed_what_stands(reasoning)
        else:
            reply = self.conversation.reply(text, self.sampler, self.sampling.max_tokens, self.last)
        fold = Fold(reasoning, progress) if self.folded and console.is_terminal(sys.stdout) else None
        shows = view(plain=self.raw, markdown=self.markdown)
        written: list[str] = []
        try:
            with interrupts.heard(self.conversation.cancel), contextlib.closing(reply):
                for piece in self._pieces(reply, reasoning, progress.read, begun=self.raw or text is None):
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

    def collect(self, text: str) -> str:
        """One answer, as a string and nowhere else; Ctrl-C ends it."""
        self.last = Stats()
        reply = self.conversation.reply(text, self.sampler, self.sampling.max_tokens, self.last)
        with interrupts.heard(self.conversation.cancel), contextlib.closing(reply):
            return "".join(
                piece.text for piece in self._pieces(reply, Reasoning(self.runtime.tokenizer), begun=self.raw)
            )

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
        reply: Iterator[Event],
        reasoning: Reasoning,
        told: Callable[[int, int], None] = lambda done, n: None,
        *,
        begun: bool,
    ) -> Iterator[Piece]:
        """The answer's text, after the tag that opens its reasoning in the prompt; without the space it begins with,
        unless it has begun."""
        for event in reply:
            if isinstance(event, Read):
                told(event.done, event.n)
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

    def _tell_stop(self) -> None:
        if self.last.stop == "cancelled":
            console.note("(stopped)", "dim")
        elif self.quiet:
            return
        elif self.last.stop == "length":
            console.note(f"(stopped after {self.last.n_answer} tokens: -n)", "dim")
        elif self.last.stop == "context":
            console.note(f"(the context of {self.conversation.n_ctx} tokens is full: -c makes it larger)", "dim")

    def tell_stats(self) -> None:
        console.note(describe(self.last, self.runtime.load_seconds), "dim")
        if counts := self.runtime.drive_counts():
            console.note(describe_drive(*counts), "dim")


@dataclass
class Progress:
    """A line on stderr while nothing of an answer is to be seen, gone when it begins."""

    shown: bool
    on_screen: bool = False

    def read(self, done: int, n: int) -> None:
        if n >= LONG_READ:
            self.tell(f"reading: {done} of {n} tokens")

    def tell(self, line: str) -> None:
        if self.shown and console.obeys(sys.stderr):
            console.show_progress(line)
            self.on_screen = True

    def clear(self) -> None:
        if self.on_screen:
            console.show_progress("")
            self.on_screen = False


@dataclass
class Fold:
    """A line in place of an answer's reasoning."""

    reasoning: Reasoning
    progress: Progress
    markdown: bool = True  # on a terminal that has styles
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


def tell_dropped(n: int) -> None:
    turns = "the oldest turn" if n == 1 else f"the {n} oldest turns"
    console.note(f"(context full: {turns} dropped, the system message stays)", "dim")
