"""Text to a terminal as it comes, its lines broken between words. What has been written is never written again.

A word waits until its end is known, since only then it is known on which line it stands. One that is wider than the
window is left to the terminal.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from prompt_toolkit.utils import get_cwidth

PARTS = re.compile(r"\n|[ \t]+|[^\s]+|\s")
TAB = 8

Put = Callable[[str, str | None], None]  # text, the name of its style


class Wrapper:
    """put: takes what is to be written; columns: how wide the window is now."""

    def __init__(self, put: Put, columns: Callable[[], int]) -> None:
        self._put, self._columns = put, columns
        self._out: list[tuple[str, str | None]] = []  # to be written
        self._column = 0
        self._space = ""  # before the word, unless that begins a line
        self._word: list[tuple[str, str | None]] = []
        self._width = 0  # of the word
        self._style: str | None = None  # of the word before it
        self.indent = ""  # of the lines that this one is broken into

    def feed(self, text: str, style: str | None = None) -> None:
        """More text, in a named style, written as far as it is known."""
        self.add(text, style)
        self.write()

    def add(self, text: str, style: str | None) -> None:
        """See ``feed``; it is written with what comes next."""
        for part in PARTS.findall(text):
            if part == "\n":
                self.end_line()
            elif part.isspace():
                self._end_word()
                self._space += part
            elif part.isascii():
                self._add(part, len(part), style)
            else:
                self._add_wide(part, style)

    def verbatim(self, text: str, style: str | None) -> None:
        """More text that is not broken."""
        self._end_word()
        self._emit(self._space + text, style)
        self._space = ""
        self._column += get_cwidth(text)

    def end_line(self) -> None:
        """A line break that is the text's own."""
        self._end_word()
        self._emit(self._space, None)
        self._emit("\n", None)
        self._space, self._column, self.indent = "", 0, ""

    def finish(self) -> None:
        """What waited; the next text begins a line."""
        self._end_word()
        self._space = ""
        if self._column:
            self.end_line()
        self.write()

    def write(self) -> None:
        """Have written what is known, pieces of one style together."""
        out, self._out = self._out, []
        text, style = "", None
        for piece, its in out:
            if its != style and text:
                self._put(text, style)
                text = ""
            text, style = text + piece, its
        if text:
            self._put(text, style)

    def _add(self, part: str, width: int, style: str | None) -> None:
        self._word.append((part, style))
        self._width += width
        if self._width >= self._columns():
            self._end_word()

    def _add_wide(self, part: str, style: str | None) -> None:
        """Lines may break on either side of a wide character, as in Chinese."""
        for character in part:
            width = get_cwidth(character)
            if width > 1:
                self._end_word()
            self._add(character, width, style)
            if width > 1:
                self._end_word()

    def _end_word(self) -> None:
        if not self._word:
            return
        columns = self._columns()
        space = sum(TAB if character == "\t" else 1 for character in self._space)
        if self._column + space + self._width > columns and self._column > len(self.indent):
            self._emit("\n" + self.indent, None)
            self._column = len(self.indent)
        else:
            self._emit(self._space, self._word[0][1] if self._word[0][1] == self._style else None)
            self._column += space
        for part, style in self._word:
            self._emit(part, style)
        self._style = self._word[-1][1]
        self._column += self._width
        if self._column > columns > 0:
            self._column = (self._column - 1) % columns + 1
        self._space, self._word, self._width = "", [], 0

    def _emit(self, text: str, style: str | None) -> None:
        if text:
            self._out.append((text, style))
