"""Where output goes: data to stdout; log, progress, statistics and errors to stderr.

Colours appear on terminals only and never under NO_COLOR. rich is imported when something needs it, not before.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import sys
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

PIPE_WIDTH = 160  # columns of a table that goes to a file or a pipe: nothing is cut to fit a screen that is not there
CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
STYLES = {"error": "1;31", "hint": "36", "warning": "33", "dim": "2", "prompt": "1;32"}


def is_terminal(stream: TextIO | None) -> bool:
    """True where a person sees the stream; False for files, pipes, and a stream closed before the program began."""
    try:
        return stream is not None and stream.isatty()
    except ValueError:
        return False


def wants_colour(stream: TextIO | None) -> bool:
    return is_terminal(stream) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def styled(text: str, style: str, stream: TextIO | None = None) -> str:
    """``text`` in a named style where ``stream`` (stderr) shows colours, else as it is."""
    return f"\x1b[{STYLES[style]}m{text}\x1b[0m" if wants_colour(stream or sys.stderr) else text


def printable(text: str) -> str:
    """Text from a file or a model, made safe for a terminal: no escape sequences, no other control characters."""
    return CONTROL_CHARACTERS.sub("", text)


def note(message: str, style: str | None = None) -> None:
    """One line of log on stderr."""
    with contextlib.suppress(OSError):  # a log that cannot be written is no reason to fail
        sys.stderr.write((styled(message, style) if style else message) + "\n")
        sys.stderr.flush()


def warn(message: str) -> None:
    note(f"{styled('warning:', 'warning')} {message}")


def print_error(message: str, hint: str = "") -> None:
    """The two lines every failure ends in. Line breaks inside are folded: a script reads one line."""
    note(f"{styled('error:', 'error')} {printable(fold(message))}")
    if hint:
        note(f"{styled('hint:', 'hint')} {printable(fold(hint))}")


def fold(text: str) -> str:
    return " ".join(text.split())


def print_json(value: Any) -> None:
    """One JSON document on stdout. NaN and infinity, which JSON lacks, are refused by raising ValueError."""
    print(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


@functools.cache
def stdout_console() -> Console:
    from rich.console import Console

    return Console(highlight=False, width=None if is_terminal(sys.stdout) else PIPE_WIDTH, no_color=no_colour())


@functools.cache
def stderr_console() -> Console:
    from rich.console import Console

    return Console(stderr=True, highlight=False, no_color=no_colour())


def no_colour() -> bool | None:
    return True if os.environ.get("NO_COLOR") else None


def progress(*, quiet: bool = False, transfer: bool = False, time_left: bool = True) -> Progress:
    """A progress display on stderr; silent where ``quiet``, and off a terminal (where only the log lines remain).

    time_left False: the task's own detail says it better.
    """
    from rich import progress as rp

    columns: list[rp.ProgressColumn] = [rp.TextColumn("{task.description}"), rp.BarColumn(bar_width=28)]
    if transfer:
        columns += [rp.DownloadColumn(binary_units=False), rp.TransferSpeedColumn()]
    else:
        columns += [rp.TaskProgressColumn(), rp.TextColumn("{task.fields[detail]}", style="dim")]
    if time_left:
        columns += [rp.TimeRemainingColumn(compact=True, elapsed_when_finished=True)]
    shown = is_terminal(sys.stderr) and not quiet
    return rp.Progress(*columns, console=stderr_console(), disable=not shown, transient=True)


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
