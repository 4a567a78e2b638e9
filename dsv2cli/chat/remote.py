"""remote.py: a conversation with a server. Its texts are all that is known of it: they go to the server with each turn.

What a person has not set (how to sample, whether to reason) is not sent: the server has it as it likes, and one that
knows fewer settings than ours refuses none.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cext.chat import THINK_TAGS
from cext.tokenizer import Answer
from dsv2cli import console
from dsv2cli.chat import files
from dsv2cli.chat.answering import Chat, Progress, Thought
from dsv2cli.chat.client import Listed, Part, RefusedError, Server, ServerError
from dsv2cli.chat.conversation import Turn
from dsv2cli.chat.journal import SERVER, Journal, JournalError, Model
from dsv2cli.chat.reasoning import Piece, Reasoning
from dsv2cli.chat.settings import Sampling
from dsv2cli.chat.store import SUFFIX
from dsv2cli.errors import UsageError
from dsv2cli.scheduler import Stats
from dsv2cli.scheduler.events import Reason

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

OPENING, CLOSING = "<think>\n", "\n</think>\n\n"  # of reasoning that comes apart, as it is shown
SHOWN = 6  # models of a list
STOPS: dict[str, Reason] = {"length": "length", "max_tokens": "length"}


def choose(server: Server, wanted: str | None) -> Listed:
    """The model to talk to: the one that is named, or the only one. UsageError, ServerError."""
    try:
        found = server.models()
    except RefusedError:  # it answers, but does not tell
        if wanted is None:
            raise
        return Listed(wanted, 0)
    if wanted is not None:
        return next((each for each in found if each.name == wanted), Listed(wanted, 0))
    if len(found) == 1:
        return found[0]
    names = ", ".join(each.name for each in found[:SHOWN]) + (", ..." if len(found) > SHOWN else "")
    raise UsageError(
        f"`{server.address.url}` has {len(found)} models" + (f": {names}" if found else ""),
        "name one: dsv2 chat NAME --server URL",
    )


@dataclass
class Thinking:
    """See ``answering.Thought``; its tokens are counted as they come, an event each."""

    n_tokens: int = 0
    seconds: float = 0.0


class NoTokens:
    """Stands in for a tokenizer where texts are all that there is: no tag is a token."""

    def control_id(self, spelling: str, /) -> int | None:
        return None


class RemoteConversation:
    """See ``conversation.Talk``."""

    def __init__(self, server: Server, model: Listed) -> None:
        self.server, self.model = server, model
        self.system: str | None = None
        self.thinking: bool | None = None
        self.turns: list[Turn] = []
        self.n_ctx = model.n_ctx

    @property
    def n_used(self) -> int | None:
        return self.turns[-1].n_used if self.turns else 0

    def said(self) -> Answer:
        said = self.turns[-1].said if self.turns else None
        return said or Answer(None, "")

    def text_of(self, turn: Turn) -> str:
        said = turn.said or Answer(None, "")
        return said.content if said.reasoning is None else f"{OPENING}{said.reasoning}{CLOSING}{said.content}"

    def changed(self, turn: Turn, text: str) -> Turn:
        return Turn(turn.user, said=Answer(None, text))

    def cancel(self) -> bool:
        return self.server.cancel()

    def clear(self) -> None:
        self.turns.clear()

    def reply(
        self, text: str | None, sampling: Sampling, stats: Stats, thought: Thinking, progress: Progress
    ) -> Generator[Piece, None, None]:
        """An answer to ``text``, or more of the last one, which takes its place; see ``Conversation.reply``.
        ServerError; what came before it stays."""
        last = self.turns[-1] if text is None else None
        body = self._body(text, sampling)
        before = Answer(None, "") if last is None else self.said()
        gathered = Gathered(before.reasoning or "", before.content)
        turn = Turn(text or "" if last is None else last.user, said=before)
        self.turns[len(self.turns) - (last is not None) :] = [turn]
        done = False
        progress.tell(f"waiting for {self.server.address.host}")
        try:
            for piece in self._pieces(body, stats, thought, gathered, goes_on=last is not None):
                turn.said = gathered.answer()
                yield piece
            done = stats.stop != "cancelled"
        except ServerError:
            stats.stop = "error"
            raise
        finally:
            turn.n_used = stats.n_prompt + stats.n_answer if stats.n_prompt else None
            nothing = turn.said == before
            if nothing and not (done and last is None) and self.turns and self.turns[-1] is turn:
                self.turns[-1:] = [] if last is None else [last]

    def _body(self, text: str | None, sampling: Sampling) -> dict[str, Any]:
        """What is asked: an answer to ``text``, or more of the last one."""
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for turn in self.turns:
            said = turn.said or Answer(None, "")
            messages += [{"role": "user", "content": turn.user}, {"role": "assistant", "content": said.content}]
        body: dict[str, Any] = {"model": self.model.name, "messages": messages}
        if text is not None:
            messages.append({"role": "user", "content": text})
        elif self.said().content.strip():
            body |= {"continue_final_message": True, "add_generation_prompt": False}
        else:
            raise UsageError("the last answer has no text to go on from", "/retry answers again")
        if self.thinking is not None:
            body["chat_template_kwargs"] = {"enable_thinking": self.thinking}
        return body | {name: value for name, value in sampling.figures().items() if value is not None}

    def _pieces(
        self, body: Mapping[str, Any], stats: Stats, thought: Thinking, gathered: Gathered, *, goes_on: bool
    ) -> Generator[Piece, None, None]:
        """The answer as it is shown, without the space it begins with unless it goes on; gathered has it without the
        tags that it is shown with here."""
        begun, first, stop = time.monotonic(), 0.0, ""
        split = Reasoning(NoTokens())
        inside, started = False, goes_on
        parts = self.server.answer(body)
        with contextlib.closing(parts):
            for part in parts:
                stop = part.stop or stop
                if part.content or part.reasoning:
                    now = time.monotonic()
                    first = first or now
                    stats.n_answer += 1
                    stats.prefill_seconds, stats.decode_seconds = first - begun, now - first
                if part.reasoning:
                    thought.n_tokens, thought.seconds = thought.n_tokens + 1, stats.decode_seconds
                    gathered.reason(part.reasoning, anew=not inside)
                    opening = f"\n\n{OPENING}" if started and not inside else OPENING  # after a text: on its own line
                    yield Piece(part.reasoning if inside else opening + part.reasoning.lstrip(), True)
                    inside = True
                text = part.content if started else part.content.lstrip()
                if text:
                    started = True
                    if inside:
                        yield Piece(CLOSING, True)
                        inside = False
                    pieces = [Piece(text, False)] if goes_on else split.feed(text)
                    if any(piece.reasoning for piece in pieces):
                        thought.n_tokens, thought.seconds = thought.n_tokens + 1, stats.decode_seconds
                    yield from gathered.each(pieces)
                _count(part, stats)
        yield from gathered.each(split.finish())
        stats.stop = "cancelled" if self.server.cancelled else STOPS.get(stop, "end")


@dataclass
class Gathered:
    """An answer's two parts as they come. reasoning: that comes apart from the text; tagged: with its tags, within."""

    reasoning: str
    content: str
    tagged: str = ""

    def reason(self, text: str, *, anew: bool) -> None:
        """anew: it does not go on from what came last."""
        self.reasoning += f"\n\n{text.lstrip()}" if anew and self.reasoning else text

    def each(self, pieces: Iterable[Piece]) -> Generator[Piece, None, None]:
        """Pieces of the text, taken when they are shown."""
        for piece in pieces:
            if piece.reasoning:
                self.tagged += piece.text
            else:
                self.content += piece.text
            yield piece

    def answer(self) -> Answer:
        reasoning = "\n\n".join(part for part in (self.reasoning.strip(), _untagged(self.tagged)) if part)
        return Answer(reasoning or None, self.content.lstrip() if reasoning or self.tagged else self.content)


def _untagged(reasoning: str) -> str:
    """Reasoning as it was shown, without its tags."""
    text = reasoning.strip()
    for opening, closing in THINK_TAGS:
        if text.startswith(opening):
            text = text.removeprefix(opening).removesuffix(closing)
    return text.strip()


def _count(part: Part, stats: Stats) -> None:
    """The server's own figures, where it tells them, in place of what was seen from here."""
    counts = part.counts
    stats.n_prompt = int(counts.get("prompt", stats.n_prompt))
    stats.n_reused = int(counts.get("cached", stats.n_reused))
    stats.n_answer = int(counts.get("answer", stats.n_answer))
    stats.prefill_seconds = counts.get("prompt_ms", 1e3 * stats.prefill_seconds) / 1e3
    stats.decode_seconds = counts.get("answer_ms", 1e3 * stats.decode_seconds) / 1e3


class RemoteChat(Chat):
    """With a server."""

    conversation: RemoteConversation

    def pieces(self, text: str | None, progress: Progress) -> tuple[Thought, Generator[Piece, None, None]]:
        thought = Thinking()
        return thought, self.conversation.reply(text, self.sampling, self.last, thought, progress)

    def rest(self) -> None:
        """The server's affair."""

    def headline(self) -> str:
        model, url = self.conversation.model, self.conversation.server.address.url
        return f"{model.name} at {url}{f', {model.n_ctx} tokens of context' if model.n_ctx else ''}."

    def count(self, text: str) -> int | None:
        return None

    def room_hint(self, n: int) -> str:
        return "shorten it"

    def sizes(self, typed: str) -> list[str]:
        found = []
        for path in files.named(typed):
            with contextlib.suppress(OSError):
                found.append(f"{path.name}: {console.format_bytes(path.stat().st_size)}")
        return found

    def report(self, answer: str) -> dict[str, object]:
        stats, conversation = self.last, self.conversation
        return super().report(answer) | {
            "server": conversation.server.address.url,
            "model": conversation.model.name,
            "first_token_seconds": round(stats.prefill_seconds, 4),
            "decode_tokens_per_second": round(stats.decode_rate, 2),
            "sampling": self.sampling.figures(),
        }

    def _tell_stop(self) -> None:
        if self.last.stop == "length" and not self.quiet and self.sampling.max_tokens is None:
            console.note(f"(stopped after {self.last.n_answer} tokens: the server writes no more)", "dim")
        else:
            super()._tell_stop()

    def tell_stats(self) -> None:
        stats = self.last
        kept = f" ({stats.n_reused} kept)" if stats.n_reused else ""
        console.note(
            f"read {stats.n_prompt - stats.n_reused} tokens{kept}, first text after {stats.prefill_seconds:.2f} s;"
            f" wrote {stats.n_answer} tokens at {stats.decode_rate:.1f} tok/s",
            "dim",
        )


class Texts:
    """See ``keeping.Partner``: nothing is kept beside a conversation's texts, which any server could go on with; they
    go to another than their own where a person says so alone. given: the conversation that this server is to go on
    with, wherever it was; key_env: the variable that holds the server's key, "" where none is sent."""

    def __init__(self, conversation: RemoteConversation, given: str | None = None, key_env: str = "") -> None:
        self._conversation, self._given, self._key_env = conversation, given, key_env

    def model(self) -> Model:
        conversation = self._conversation
        return Model(SERVER, conversation.model.name, conversation.server.address.url, self._key_env)

    def check(self, journal: Journal) -> None:
        model, name = journal.contents.model, journal.path.name.removesuffix(SUFFIX)
        url = self._conversation.server.address.url
        if not model.is_server:
            raise JournalError(
                f"`{journal.path}` is a conversation with a model that ran here, {model.name}",
                f"dsv2 chat -r {name}",
            )
        if model.path != url and name != self._given:
            raise JournalError(
                f"`{journal.path}` is a conversation with another server, {model.path}",
                f"dsv2 chat -r {name} goes on there; dsv2 chat --server {url} -r {name} sends its text here",
            )

    def keep(self, journal: Journal, *, grown: bool = False) -> None:
        """Nothing: the texts are in the file."""

    def take(self, journal: Journal) -> None:
        """Nothing: the texts are in the file."""

    def let_go(self, *, empty: bool = False) -> None:
        """Nothing: the server has no past of its own."""
