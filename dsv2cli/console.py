"""Where output goes: data to stdout; log, progress, statistics and errors to stderr. The one place that writes.

All text is foreign here, whatever it was put together from: a file's metadata, a path, a name and an exception stand in
what the commands say, so what is written is plain text, never rich's markup, and its control characters are spelt out.
Colours are named styles that are put around it afterwards, on terminals that have them and never under NO_COLOR.
rich is imported when something needs it, not before.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from dsv2cli.errors import CliError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from rich.text import Text

PIPE_WIDTH = 160  # columns of a table that goes to a file or a pipe: nothing is cut to fit a screen that is not there
NARROWEST, WIDEST = 20, 1000  # columns that COLUMNS may ask for
BETWEEN = 3  # blanks between two columns of a table
SHOWN_CHARACTERS = 4096  # of one text; a longer one is cut
STYLES = {"error": "1;31", "hint": "36", "warning": "33", "dim": "2", "prompt": "1;32", "label": "1"}
STYLES |= {"strong": "1", "emphasis": "3", "code": "36"}  # of an answer
# What moves a terminal's cursor, sets its title, turns text round or ends a line, and what no encoding holds: C0, DEL,
# C1, line and paragraph separators, bidirectional embeddings, overrides and isolates, surrogates.
UNSAFE = "\\x00-\\x1f\\x7f-\\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\\ud800-\\udfff"
UNSAFE_IN_A_LINE = re.compile(f"[{UNSAFE}]")
UNSAFE_IN_A_TEXT = re.compile(f"(?![\\n\\t])[{UNSAFE}]")
UNSAFE_IN_JSON = re.compile(f"(?!\\n)[{UNSAFE}]")
PLAIN_TERMINALS = ("", "dumb", "unknown")  # values of TERM that promise no control sequences
BYTES = range(0xDC80, 0xDD00)  # how Python spells the bytes of a name that are not UTF-8


def is_terminal(stream: TextIO | None) -> bool:
    """True where a person sees the stream; False for files, pipes, and a stream closed before the program began."""
    try:
        return stream is not None and stream.isatty()
    except ValueError:
        return False


def obeys(stream: TextIO | None) -> bool:
    """Whether the stream is a terminal that understands control sequences: moving the cursor, erasing, colours."""
    return is_terminal(stream) and os.environ.get("TERM", "").lower() not in PLAIN_TERMINALS


def wants_colour(stream: TextIO | None) -> bool:
    return obeys(stream) and not os.environ.get("NO_COLOR")


def styled(text: str, style: str, stream: TextIO | None = None) -> str:
    """``text`` in a named style where ``stream`` (stderr) shows colours, else as it is."""
    return f"\x1b[{STYLES[style]}m{text}\x1b[0m" if wants_colour(stream or sys.stderr) else text


# Foreign text.


def printable(text: str) -> str:
    """A line of text made safe: control characters spelt out (``\\x1b``), a very long one cut."""
    return UNSAFE_IN_A_LINE.sub(_spelt_out, cut(text, SHOWN_CHARACTERS))


def printable_text(text: str) -> str:
    """Text of several lines, an answer say, made safe: line breaks and tabs stay, carriage returns go."""
    return UNSAFE_IN_A_TEXT.sub(_spelt_out, text.replace("\r", ""))


def cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]}... ({len(text)} characters)"


def fold(text: str) -> str:
    return " ".join(text.split())


def _spelt_out(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code - 0xDC00:02x}" if code in BYTES else found[0].encode("unicode_escape").decode("ascii")


# Log and errors, on stderr.

_BREAKING: list[bool] = []  # blocks of breaking_lines
COPIED = ("error", "hint")  # labels


def note(message: str, style: str | None = None, *, label: str = "") -> None:
    """One line of log; on a terminal it breaks between words, but for errors and hints, whose commands and paths are
    copied. label: a style's name that stands before it, as in "warning: ..."."""
    line, before = printable(message), f"{label}: " if label else ""
    if (_BREAKING or label not in COPIED) and obeys(sys.stderr):
        line = broken(before + line, width(sys.stderr))[len(before) :]
    shown = styled(before[:-1], label) + " " if label else ""
    _tell(shown + (styled(line, style) if style else line) + "\n")


def note_text(text: str) -> None:
    """Text of several lines on stderr, as it is."""
    lines = printable_text(text).split("\n")
    if _BREAKING and obeys(sys.stderr):
        columns = width(sys.stderr)
        lines = [broken(line, columns, indented=False) for line in lines]
    _tell("\n".join(lines) + "\n")


@contextlib.contextmanager
def breaking_lines() -> Iterator[None]:
    """Errors, hints and texts in this block break between words as notes do: a conversation is read there. Elsewhere
    a line of theirs is a line, which can be copied whole."""
    _BREAKING.append(True)
    try:
        yield
    finally:
        _BREAKING.pop()


def broken(line: str, columns: int, *, indented: bool = True) -> str:
    """A line in lines that a window so wide holds, but for words that are wider. indented: the further ones stand below
    its second column, or two further than its first where that leaves too little."""
    from rich.cells import cell_len

    if len(line) <= columns // 2 or cell_len(line) <= columns:
        return line
    begins = re.match(r" *(\S.*? {2,})?", line)
    indent = len(begins[0]) if begins else 0
    if indent > columns // 3:
        indent = min(len(line) - len(line.lstrip()) + 2, columns // 3)
    lines, taken = [""], 0
    for space, word in re.findall(r"( *)([^ ]+)", line):
        n = cell_len(word)
        if taken + len(space) + n > columns and lines[-1].strip():
            taken = indent if indented else 0
            lines.append(" " * taken + word)
        else:
            taken += len(space)
            lines[-1] += space + word
        taken += n
    return "\n".join(lines)


def warn(message: str) -> None:
    note(message, label="warning")


def print_error(message: str, hint: str = "") -> None:
    """The two lines every failure ends in. Line breaks inside are folded: a script reads one line."""
    note(fold(message), label="error")
    if hint:
        note(fold(hint), label="hint")


def prompt(text: str) -> None:
    """What stands before the place to type, where no line editor shows it."""
    _tell(printable(text))


def show_progress(text: str) -> None:
    """A line that the next one takes the place of; ``""`` takes it away. For terminals that obey."""
    _tell(f"\r\x1b[K{printable(text)}")


def _tell(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # a log that cannot be written is no reason to fail
        sys.stderr.write(text)
        sys.stderr.flush()


# Data, on stdout.


class OutputError(CliError):
    """Stdout takes no more."""


@contextlib.contextmanager
def _putting() -> Iterator[None]:
    """What goes to stdout: OutputError where it cannot be written, BrokenPipeError where its reader has left."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(f"cannot write the output: {error.strerror or error}") from error


def _put(text: str) -> None:
    with _putting():
        sys.stdout.write(text)


def flush() -> None:
    """What was written to stdout so far is on its way. OutputError, BrokenPipeError."""
    with _putting():
        sys.stdout.flush()


def send(sequence: str) -> None:
    """A control sequence of ours to the terminal on stdout, which obeys."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.write(sequence)
        sys.stdout.flush()


def say(line: str = "") -> None:
    """A line of text."""
    _put(printable(line) + "\n")


def say_broken(line: str) -> None:
    """A line of text that is read and not copied: it breaks between words where a terminal would break it within."""
    _put(_broken_on(sys.stdout, printable(line)) + "\n")


def _broken_on(stream: TextIO, line: str) -> str:
    return broken(line, width(stream)) if obeys(stream) else line


def say_text(text: str) -> None:
    """Text of several lines, as it is but for its control characters."""
    _put(printable_text(text) + "\n")


def say_fields(fields: Iterable[tuple[str, str]], width: int) -> None:
    """Lines of a label, ``width`` columns wide, and a value; they break as ``say_broken``'s."""
    for label, value in fields:
        line = _broken_on(sys.stdout, f"{label:<{width}} {printable(value)}")
        _put(styled(label, "label", sys.stdout) + line.removeprefix(label) + "\n")


def say_data(text: str) -> None:
    """Text with names of files in it, for another program: into a pipe the bytes that they have on the disk."""
    if is_terminal(sys.stdout):
        _put(printable_text(text))
        return
    with _putting():
        sys.stdout.flush()
        sys.stdout.buffer.write(os.fsencode(text))


def say_path(path: Path) -> None:
    """A path as a line of data."""
    say_data(str(path) + "\n") if not is_terminal(sys.stdout) else say(str(path))


def say_piece(piece: str, style: str | None = None) -> None:
    """A piece of an answer, at once: as it is into a pipe, safe on a terminal, and there in a named style."""
    text = printable_text(piece) if is_terminal(sys.stdout) else piece
    _put(styled(text, style, sys.stdout) if style else text)
    flush()


def say_part(text: str, style: str | None) -> None:
    """A part of what is shown on a terminal that obeys, in a named style; it may wait for ``flush``."""
    shown = printable_text(text)
    _put(styled(shown, style, sys.stdout) if style else shown)


def print_json(value: Any) -> None:
    """One JSON document. NaN and infinity, which JSON lacks, are refused by raising ValueError.

    Characters that stdout's encoding lacks, or that a terminal would obey, are written as JSON's own \\u escapes; what
    is no character, as bytes of a file that are not UTF-8, as U+FFFD: readers refuse halves of surrogate pairs.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(json.loads(text), indent=2, ensure_ascii=True, allow_nan=False)
    _put(UNSAFE_IN_JSON.sub(lambda found: f"\\u{ord(found[0]):04x}", text) + "\n")


# Tables and progress.


@dataclass
class Table:
    """Rows under a title and the names of columns: text in the first to the left, figures in the others to the right.

    Without names the first column holds labels and the second texts, which are wrapped. A row of None is a line.
    """

    title: str = ""
    columns: tuple[str, ...] = ()
    rows: list[tuple[str, ...] | None] = field(default_factory=list)

    def add(self, *cells: str) -> None:
        self.rows.append(cells)

    def add_line(self) -> None:
        self.rows.append(None)


def show(table: Table, stream: TextIO | None = None) -> None:
    """A table on stdout, or on stderr as a part of the log. Where a terminal is too narrow for the longest word of each
    column, a row is a name, and below it a line for each of its other cells."""
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    stream = stream or sys.stdout
    widths: list[int] | None = None
    if table.columns and is_terminal(stream):
        widths = _widths(table, width(stream))
        if widths is None:
            _write("".join(line + "\n" for line in _stacked(table, width(stream))), stream)
            return
    made = RichTable(
        title=Text(printable(table.title)) if table.title else None,
        title_justify="left",
        title_style="bold",
        show_header=bool(table.columns),
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        show_edge=False,
    )
    for i, column in enumerate(table.columns):
        made.add_column(Text(printable(column)), justify="right" if i else "left", width=widths[i] if widths else None)
    if not table.columns:
        made.add_column(style="bold")
        made.add_column(overflow="fold")
    for row in table.rows:
        made.add_section() if row is None else made.add_row(*(Text(printable(cell)) for cell in row))
    _show(made, stream)


def _widths(table: Table, room: int) -> list[int] | None:
    """Of the columns, with their words whole: together so many; None where they are more. The widest give way, their
    names before their cells."""
    from rich.cells import cell_len

    def longest(texts: Iterable[str]) -> int:
        return max((cell_len(printable(text)) for text in texts), default=0)

    columns = [[row[i] for row in table.rows if row is not None] for i in range(len(table.columns))]
    names = [longest(name.split()) for name in table.columns]
    cells = [max(name, longest(column)) for name, column in zip(names, columns, strict=True)]
    words = [max(name, longest(" ".join(column).split())) for name, column in zip(names, columns, strict=True)]
    wide = [max(n, longest([name])) for n, name in zip(cells, table.columns, strict=True)]
    room -= BETWEEN * (len(columns) - 1)
    for least in (cells, words):
        while sum(wide) > max(room, sum(least)):
            wide[max((i for i in range(len(wide)) if wide[i] > least[i]), key=wide.__getitem__)] -= 1
    return wide if sum(wide) <= room else None


def _stacked(table: Table, columns: int) -> Iterator[str]:
    """The lines of a table whose cells stand below one another."""
    if table.title:
        yield broken(printable(table.title), columns)
    for row in table.rows:
        name, *cells = row or ("",)
        yield printable(name)
        for column, cell in zip(table.columns[1:], cells, strict=False):
            if cell:
                yield broken(printable(f"  {column}: {cell}" if column else f"  {cell}"), columns)


def show_drawing(lines: Iterable[Text]) -> None:
    """Lines of coloured blocks on stdout (see figures.py)."""
    for line in lines:
        _show(line, sys.stdout)


def _show(drawn: Any, stream: TextIO) -> None:
    """Drawn first and written as a whole, so that a stream that breaks is met here and not inside rich."""
    out = _console(stream)
    # At the end of a capture rich flushes the stream, with what was put there before.
    with _putting() if stream is sys.stdout else contextlib.nullcontext(), out.capture() as captured:
        out.print(drawn)
    _write(captured.get(), stream)


def _write(text: str, stream: TextIO) -> None:
    if stream is sys.stderr:
        _tell(text)
    else:
        _put(text)


def width(stream: TextIO | None = None) -> int:
    """Columns of ``stream`` (stdout)."""
    return _console(stream or sys.stdout).width


def _console(stream: TextIO) -> Console:
    """rich for one stream, told what the stream is: by itself it would go by FORCE_COLOR, COLUMNS and the like."""
    from rich.console import Console

    wanted = os.environ.get("COLUMNS", "")
    columns = int(wanted) if re.fullmatch("[0-9]{2,4}", wanted) else 0
    known = columns if NARROWEST <= columns <= WIDEST else None
    return Console(
        file=stream,
        markup=False,
        emoji=False,
        highlight=False,
        width=known if is_terminal(stream) else PIPE_WIDTH,
        force_terminal=obeys(stream),
        force_interactive=obeys(stream),
        no_color=not wants_colour(stream),
        _environ={name: os.environ[name] for name in ("TERM", "COLORTERM") if name in os.environ},
    )


def progress(*, quiet: bool = False, transfer: bool = False, time_left: bool = True) -> Progress:
    """A progress display on stderr; silent where ``quiet``, and off a terminal (where only the log lines remain).

    time_left False: the task's own detail says it better.
    """
    from rich import progress as rp
    from rich.text import Text

    class PlainColumn(rp.ProgressColumn):
        """A task's own text: names of files and figures."""

        def __init__(self, shown: str, style: str = "") -> None:
            super().__init__()
            self._shown, self._style = shown, style

        def render(self, task: rp.Task) -> Text:
            return Text(printable(self._shown.format(task=task)), self._style)

    columns: list[rp.ProgressColumn] = [PlainColumn("{task.description}"), rp.BarColumn(bar_width=28)]
    if transfer:
        columns += [rp.DownloadColumn(binary_units=False), rp.TransferSpeedColumn()]
    else:
        columns += [rp.TaskProgressColumn(), PlainColumn("{task.fields[detail]}", "dim")]
    if time_left:
        columns += [rp.TimeRemainingColumn(compact=True, elapsed_when_finished=True)]
    shown = obeys(sys.stderr) and not quiet
    return rp.Progress(*columns, console=_console(sys.stderr), disable=not shown, transient=True)


def note_above(display: Progress, line: str) -> None:
    """A line of log while a progress display may be on the screen."""
    if display.disable:
        note(line)
        return
    from rich.text import Text

    display.console.print(Text(printable(line)), soft_wrap=True)


# Figures.


def format_bytes(n: float) -> str:
    """Decimal units, as disks and files are sold: 10360000000 -> "10.36 GB"."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(n) >= size:
            return f"{n / size:.2f} {unit}"
    return f"{n:.0f} B"


def format_seconds(seconds: float) -> str:
    """0.42 -> "0.42 s", 75 -> "1 min 15 s", 7260 -> "2 h 1 min"."""
    if seconds < 60:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
