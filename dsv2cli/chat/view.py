"""How an answer is shown as it comes: plain into a pipe; on a terminal that obeys, broken between words and styled."""

from __future__ import annotations

import shutil
import sys
from typing import TYPE_CHECKING, Protocol

from dsv2cli import console

if TYPE_CHECKING:
    from dsv2cli.chat.markdown import Markdown
    from dsv2cli.chat.reasoning import Piece


class View(Protocol):
    """One answer's."""

    def show(self, piece: Piece) -> None:
        """More of it."""

    def finish(self) -> None:
        """All of it has been shown; what comes next begins a line."""


def view(*, plain: bool, markdown: bool) -> View:
    """plain: as it is, whatever it is shown on; markdown: whether marks become styles, where there are styles."""
    if plain or not console.obeys(sys.stdout):
        return Plain()
    return Terminal(markdown=markdown and console.wants_colour(sys.stdout))


class Plain:
    """The text and nothing else."""

    def __init__(self) -> None:
        self._last = "\n"

    def show(self, piece: Piece) -> None:
        console.say_piece(piece.text, "dim" if piece.reasoning else None)
        self._last = piece.text[-1:] or self._last

    def finish(self) -> None:
        if self._last != "\n":
            console.say_piece("\n")


class Terminal:
    """Lines broken between words; reasoning dimmed."""

    def __init__(self, *, markdown: bool) -> None:
        from dsv2cli.chat.markdown import Markdown
        from dsv2cli.chat.wrapping import Wrapper

        self._wrapper = Wrapper(console.say_part, _columns)
        self._markdown: Markdown | None = Markdown(self._wrapper, _columns) if markdown else None

    def show(self, piece: Piece) -> None:
        text = console.printable_text(piece.text)
        if piece.reasoning or self._markdown is None:
            self._wrapper.feed(text, "dim" if piece.reasoning else None)
        else:
            self._markdown.feed(text)
        console.flush()

    def finish(self) -> None:
        if self._markdown is not None:
            self._markdown.finish()
        self._wrapper.finish()
        console.flush()


def _columns() -> int:
    """Of the window as it is now."""
    return max(shutil.get_terminal_size().columns, 2)
