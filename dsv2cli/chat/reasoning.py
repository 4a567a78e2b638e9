"""reasoning.py: which of an answer's text, as it comes, is reasoning: what stands between its tags, and the tags."""

from __future__ import annotations

import time
from typing import NamedTuple, Protocol

from cext.chat import THINK_TAGS
from dsv2cli.scheduler.text import overlap


class Controls(Protocol):
    """What of a ``Tokenizer`` is wanted here."""

    def control_id(self, spelling: str, /) -> int | None:
        """The token that is spelt so; None where none is."""


class Piece(NamedTuple):
    """Text of an answer."""

    text: str
    reasoning: bool


class Reasoning:
    """Feed it an answer's text, which begins with the tag that opens its reasoning, if it has any.

    As in ``Tokenizer.split_answer``, a closing tag that is a token is that token alone; where it is none, its letters
    count, and text that may become them waits.
    """

    def __init__(self, tokenizer: Controls) -> None:
        self._tokenizer = tokenizer
        self._place = "before"  # its tags, then "inside" and "after"
        self._closing = ""
        self._held = ""
        self._begun = 0.0
        self.n_tokens = 0  # of the answer, that are reasoning
        self.seconds = 0.0  # from its first text to its last

    def feed(self, text: str, token: int | None = None) -> list[Piece]:
        """``text``: what has come; ``token``: with which token of the answer, if one came."""
        if self._place == "before":
            self._open(text)
        elif self._place == "inside":
            self._held += text
        else:
            return [Piece(text, False)] if text else []
        if self._place == "inside":
            self.n_tokens += token is not None
            self.seconds = time.monotonic() - self._begun
            return self._close(token)
        return self._let_go(reasoning=False) if self._place == "after" else []

    def finish(self) -> list[Piece]:
        """What waited."""
        return self._let_go(reasoning=self._place == "inside")

    def _open(self, text: str) -> None:
        """Where the text so far begins with an opening tag, or cannot any more, the place is known."""
        self._held += text
        rest = self._held.lstrip()
        for opening, closing in THINK_TAGS:
            if rest.startswith(opening):
                self._place, self._closing, self._begun = "inside", closing, time.monotonic()
                return
        if rest and not any(opening.startswith(rest) for opening, _ in THINK_TAGS):
            self._place = "after"

    def _close(self, token: int | None) -> list[Piece]:
        """The reasoning that is known to be, and what follows its closing tag."""
        ends_it = self._tokenizer.control_id(self._closing)
        if ends_it is None:
            at = self._held.find(self._closing)
            waits = overlap(self._held, self._closing)
        else:
            at = self._held.rfind(self._closing) if token == ends_it else -1
            waits = 0
        if at < 0:
            known = len(self._held) - waits
            said, self._held = self._held[:known], self._held[known:]
            return [Piece(said, True)] if said else []
        self._place, end = "after", at + len(self._closing)
        said, self._held = self._held[:end], self._held[end:]
        return [Piece(said, True), *self._let_go(reasoning=False)]

    def _let_go(self, *, reasoning: bool) -> list[Piece]:
        held, self._held = self._held, ""
        return [Piece(held, reasoning)] if held else []
