"""An answer's Markdown as it comes: headings, lists, quotes, code, emphasis and tables, for a terminal with styles.

Nothing is drawn twice. What cannot be told yet waits: the first characters of a line, a span that has no end yet, the
rows of a table. A span that its line or LONGEST characters do not close is no span, and its marks are text; so are
underscores, which names have. Code is as it was written, so that what is copied from the terminal runs.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from prompt_toolkit.utils import get_cwidth

from dsv2cli.chat.wrapping import Wrapper

LONGEST = 400  # characters that an open span may hold back
MOST_ROWS = 200  # of a table that is held back
FENCE = re.compile(r"\s*(`{3,}|~{3,})\s*([^`]*)")
RULE = re.compile(r" {0,3}(?:(?:-\s*){3,}|(?:\*\s*){3,}|(?:_\s*){3,})")
UNDECIDED = re.compile(r"\s*(?:#{1,6} *|`{1,2}|~{1,2}|> *|[-*_][-*_ ]*|\+ *|\d{1,9}[.)]? *)?")
WHOLE_LINE = re.compile(r"\s*(?:```|~~~|\|)")
HEADING = re.compile(r" {0,3}#{1,6} +")
ITEM = re.compile(r"(\s*)(?:([-*+])|(\d{1,9}[.)])) +(?=\S)")
QUOTE = re.compile(r" {0,3}> ?")
SEPARATOR = re.compile(r"\s*\|?\s*:?-+:?\s*(?:\|\s*:?-+:?\s*)*\|?\s*")
SPECIAL = re.compile(r"[`*\\]")
ESCAPED = "*_`#"
STYLES = {1: "emphasis", 2: "strong", 3: "strong"}


class Markdown:
    """Feed it text; it feeds the wrapper."""

    def __init__(self, wrapper: Wrapper, columns: Callable[[], int]) -> None:
        self._wrapper, self._columns = wrapper, columns
        self._held = ""  # of the line, not yet told to the wrapper
        self._begun = False  # what kind of line it is is known,
        self._style: str | None = None  # and its style
        self._fence = ""  # what closes the code that is open
        self._rows: list[str] = []  # of a table

    def feed(self, text: str) -> None:
        for part in re.split("(\n)", text):
            if part == "\n":
                self._end_line()
            elif part:
                self._held += part
                self._go_on()
        self._wrapper.write()

    def finish(self) -> None:
        """What waited."""
        if self._held or self._begun:
            self._end_line()
        self._end_table()
        self._fence = ""
        self._wrapper.finish()

    # Lines.

    def _go_on(self) -> None:
        is_long = len(self._held) >= LONGEST
        if self._fence:
            if self._begun or is_long or not self._fence.startswith(self._held.strip()[:3]):
                self._begun = True
                self._code(self._held)
                self._held = ""
            return
        if not self._begun:
            if not is_long and (UNDECIDED.fullmatch(self._held) or WHOLE_LINE.match(self._held)):
                return
            self._begin()
        self._inline(last=False)

    def _begin(self) -> None:
        """The line is one that shows before its end: a heading, an item, a quote or a paragraph."""
        self._end_table()
        self._begun, self._style = True, None
        if match := HEADING.match(self._held):
            self._style = "label"
        elif match := QUOTE.match(self._held):
            self._style = "dim"
            self._put("│ ", "dim")
            self._wrapper.indent = "│ "
        elif match := ITEM.match(self._held):
            mark = f"{match[1]}{'•' if match[2] else match[3]} "
            self._put(mark, None)
            self._wrapper.indent = " " * len(mark)
        if match:
            self._held = self._held[match.end() :]

    def _end_line(self) -> None:
        line = self._held
        if self._fence:
            closes = not self._begun and line.strip().startswith(self._fence) and not line.strip().strip(self._fence[0])
            self._code(line, "dim" if closes else "code")
            self._fence = "" if closes else self._fence
        elif self._begun:
            self._inline(last=True)
        elif match := FENCE.fullmatch(line):
            self._end_table()
            self._fence = match[1]
            self._code(line, "dim")
        elif line.lstrip().startswith("|"):
            self._rows.append(line)
            self._held = ""
            if len(self._rows) >= MOST_ROWS:
                self._end_table()
            return
        elif RULE.fullmatch(line):
            self._end_table()
            self._put("─" * min(self._columns(), 40), "dim")
        else:
            self._begin()
            self._inline(last=True)
        self._wrapper.end_line()
        self._held, self._begun, self._style = "", False, None

    def _code(self, text: str, style: str = "code") -> None:
        """As it is: the terminal breaks it where it must, and copies it whole."""
        self._wrapper.verbatim(text, style)

    # Spans.

    def _inline(self, *, last: bool) -> None:
        """Tell what is known of the line; all of it where it is the last of it."""
        self._held = self._spans(self._held, self._style, last=last)

    def _spans(self, text: str, style: str | None, *, last: bool) -> str:
        """Tell of a text's spans what is known, and return the rest, which waits."""
        at = 0
        while at < len(text):
            found = SPECIAL.search(text, at)
            start = found.start() if found else len(text)
            self._put(text[at:start], style)
            at = start
            if found is None:
                break
            waits = not last and len(text) - at < LONGEST
            mark = self._mark(text, at)
            if at + len(mark) == len(text) and waits:
                break  # it may grow
            if text[at] == "\\":
                escapes = text[at + 1 : at + 2] in ESCAPED and at + 1 < len(text)
                self._put(text[at + 1] if escapes else "\\", style)
                at += 2 if escapes else 1
                continue
            end = self._closing(text, at, mark)
            if end < 0 and waits and self._opens(text, at, mark):
                break
            if end < 0:
                self._put(mark, style)
                at += len(mark)
            elif mark[0] == "`":
                self._put(text[at + len(mark) : end], "code")
                at = end + len(mark)
            else:
                self._spans(text[at + len(mark) : end], STYLES[len(mark)], last=True)
                at = end + len(mark)
        return text[at:]

    def _mark(self, text: str, at: int) -> str:
        """The run of one character that stands there."""
        end = at
        while end < len(text) and text[end] == text[at] and text[at] != "\\":
            end += 1
        return text[at : max(end, at + 1)]

    def _opens(self, text: str, at: int, mark: str) -> bool:
        """Whether a mark may open a span."""
        if mark[0] == "`":
            return True
        return len(mark) in STYLES and bool(text[at + len(mark) : at + len(mark) + 1].strip())

    def _closing(self, text: str, at: int, mark: str) -> int:
        """Where the span that a mark opens ends; -1 where none does."""
        if not self._opens(text, at, mark):
            return -1
        start = at + len(mark)
        while (end := text.find(mark, start)) >= 0:
            run = self._mark(text, end)
            closes = mark[0] == "`" or not text[end - 1].isspace()
            if len(run) == len(mark) and closes and end > at + len(mark):
                return end
            start = end + len(run)
        return -1

    def _put(self, text: str, style: str | None) -> None:
        self._wrapper.add(text, style)

    # Tables.

    def _end_table(self) -> None:
        """Write the rows that were held back, in columns where they are a table that fits."""
        rows, self._rows = self._rows, []
        if not rows:
            return
        cells = [[_visible(cell) for cell in _cells(row)] for row in rows]
        widths = [
            max(get_cwidth(row[i]) for row in [cells[0], *cells[2:]] if i < len(row))
            for i in range(len(cells[0]))
        ]  # fmt: skip
        is_table = len(rows) > 1 and bool(SEPARATOR.fullmatch(rows[1]))
        if not is_table or sum(widths) + 2 * len(widths) > self._columns():
            for line in rows:
                self._wrapper.add(line, None)
                self._wrapper.end_line()
            return
        for n, row in enumerate(cells):
            if n == 1:
                self._wrapper.verbatim("─" * (sum(widths) + 2 * len(widths) - 2), "dim")
            else:
                padded = [cell + " " * (width - get_cwidth(cell)) for cell, width in zip(row, widths, strict=False)]
                self._wrapper.verbatim("  ".join(padded).rstrip(), "label" if n == 0 else None)
            self._wrapper.end_line()


def _cells(row: str) -> list[str]:
    parts = re.split(r"(?<!\\)\|", row.strip().removeprefix("|"))
    return [part.strip() for part in (parts[:-1] if len(parts) > 1 and not parts[-1].strip() else parts)]


def _visible(cell: str) -> str:
    return re.sub(r"(\*\*|`)(.+?)\1", r"\2", cell).replace("\\|", "|")
