"""A terminal as a person sees it: what was written to it, cursor movements obeyed, with all that has scrolled away."""

from __future__ import annotations

import codecs
import re
import unicodedata

TOKEN = re.compile(
    r"\x1b\[([?>=<]?)([0-9;:]*)([@-~])|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b[()#][0-9A-Za-z]|\x1b[78=>cDEHMNOZ]"
    r"|[\x00-\x1a\x1c-\x1f\x7f]|[^\x00-\x1f\x7f]+"
)
PARTIAL = re.compile(r"\x1b(?:\[[?>=<]?[0-9;:]*|\][^\x07\x1b]*\x1b?|[()#])?\Z")


def width(character: str) -> int:
    """Columns of a character."""
    if unicodedata.combining(character) or unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


class Emulator:
    """rows and columns of the window. All lines are kept: those above the window are the scrollback."""

    def __init__(self, rows: int, columns: int) -> None:
        self.rows, self.columns = rows, columns
        self.lines: list[list[str]] = [[]]
        self.joined: set[int] = set()  # lines that go on in the next, because they are full
        self.row = self.column = self.top = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._rest = ""

    def feed(self, data: bytes) -> None:
        text = self._rest + self._decoder.decode(data)
        partial = PARTIAL.search(text)
        cut = partial.start() if partial else len(text)
        text, self._rest = text[:cut], text[cut:]
        for found in TOKEN.finditer(text):
            if found[3]:
                self._control(found[1], found[2], found[3])
            elif found[0] >= " ":
                for character in found[0]:
                    self._put(character)
            else:
                self._move(found[0])

    def resize(self, rows: int, columns: int) -> None:
        """Of the window; what stands there stays as it is."""
        self.rows, self.columns = rows, columns
        self.top = max(self.top, self.row - rows + 1)

    @property
    def text(self) -> str:
        """From the first line to the cursor's."""
        parts = []
        for i, line in enumerate(self.lines[: self.row + 1]):
            shown = "".join(line)
            if i == self.row:
                shown = shown.rstrip().ljust(min(self.column, self.columns))
            parts.append(shown if i in self.joined or i == self.row else f"{shown}\n")
        return "".join(parts)

    @property
    def window(self) -> list[str]:
        """The lines that are to be seen."""
        return ["".join(line).rstrip() for line in self.lines[self.top : self.top + self.rows]]

    def _put(self, character: str) -> None:
        wide = width(character)
        if wide == 0:
            return
        if self.column + wide > self.columns:
            self.joined.add(self.row)
            self.column = 0
            self._down()
        line = self.lines[self.row]
        line.extend(" " * (self.column + wide - len(line)))
        line[self.column] = character
        if wide == 2:
            line[self.column + 1] = ""
        self.column += wide

    def _down(self) -> None:
        self.row += 1
        while self.row >= len(self.lines):
            self.lines.append([])
        self.top = max(self.top, self.row - self.rows + 1)

    def _move(self, code: str) -> None:
        if code == "\r":
            self.column = 0
        elif code == "\n":
            self.joined.discard(self.row)
            self._down()
        elif code == "\b":
            self.column = max(0, self.column - 1)
        elif code == "\t":
            self.column = min(self.columns - 1, self.column // 8 * 8 + 8)

    def _control(self, private: str, given: str, letter: str) -> None:
        numbers = [int(n) if n else 0 for n in re.split("[;:]", given)]
        n = max(1, numbers[0])
        if private:
            return
        if letter == "A":
            self.row = max(self.top, self.row - n)
        elif letter in "Be":
            for _ in range(n):
                if self.row < self.top + self.rows - 1:
                    self._down()
        elif letter in "Ca":
            self.column = min(self.columns - 1, self.column + n)
        elif letter == "D":
            self.column = max(0, min(self.column, self.columns - 1) - n)
        elif letter == "G":
            self.column = min(self.columns, n) - 1
        elif letter in "Hf":
            self._go_to(n, max(1, numbers[1] if len(numbers) > 1 else 1))
        elif letter == "K":
            self._erase_line(numbers[0])
        elif letter == "J":
            self._erase(numbers[0])

    def _go_to(self, row: int, column: int) -> None:
        while len(self.lines) < self.top + row:
            self.lines.append([])
        self.row, self.column = self.top + min(row, self.rows) - 1, min(column, self.columns) - 1

    def _erase_line(self, how: int) -> None:
        line = self.lines[self.row]
        if how == 0:
            del line[self.column :]
            self.joined.discard(self.row)
        elif how == 1:
            line[: self.column + 1] = " " * (self.column + 1)
        else:
            line.clear()

    def _erase(self, how: int) -> None:
        if how == 0:
            self._erase_line(0)
            del self.lines[self.row + 1 :]
        elif how == 2:
            for line in self.lines[self.top :]:
                line.clear()
