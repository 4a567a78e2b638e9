"""Reading what a person types: line editing and history, pasted paragraphs whole, lines joined by a backslash.

What a line means never depends on when it comes. Lines are one message where the terminal says that they were pasted
together (bracketed paste) or where a backslash joins them, and messages of their own otherwise, typed ahead or not.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
from collections.abc import Iterator
from types import FrameType, ModuleType

from dsv2cli import console
from dsv2cli.chat import history
from dsv2cli.text import typed

CONTINUED = "\\"
# Values of TERM of the terminals that mark what is pasted; terminfo has no word for it.
MARKS_PASTES = re.compile(
    "(xterm|screen|tmux|rxvt|alacritty|foot|kitty|vte|gnome|konsole|iterm2?|wezterm|ghostty|contour|mintty|mlterm|putty"
    "|st|rio)(-|$)"
)
PASTE_ON, PASTE_OFF = "\x1b[?2004h", "\x1b[?2004l"


def marks_pastes() -> bool:
    return console.obeys(sys.stdout) and bool(MARKS_PASTES.match(os.environ.get("TERM", "")))


class LineReader:
    """Prompts on the terminal. Without readline, or where stdout is no terminal, plain lines and no history."""

    def __init__(self, prompt: str, commands: list[str]) -> None:
        self._readline = _readline() if console.is_terminal(sys.stdout) else None
        self._prompt = prompt
        self._marks_pastes = self._readline is not None and marks_pastes()
        if self._readline is not None:
            self._set_up(self._readline, commands)

    def _set_up(self, readline: ModuleType, commands: list[str]) -> None:
        for line in history.read():
            with contextlib.suppress(UnicodeError):  # a locale that cannot spell it
                readline.add_history(line)
        readline.set_auto_history(False)  # a pasted paragraph is one entry
        readline.set_completer_delims(" \t\n")
        readline.set_completer(lambda text, i: ([c for c in commands if text and c.startswith(text)] + [None] * 9)[i])
        readline.parse_and_bind("tab: complete")
        readline.parse_and_bind(f"set enable-bracketed-paste {'on' if self._marks_pastes else 'off'}")

    def read(self) -> str | None:
        """One message, of several lines where they were pasted or end in a backslash; None at the end of input.

        Raises KeyboardInterrupt at Ctrl-C, UsageError where what was typed is no text.
        """
        try:
            lines = [self._line(self._prompt)]
        except EOFError:
            return None
        with contextlib.suppress(EOFError):
            while lines[-1].endswith(CONTINUED):
                lines[-1] = lines[-1].removesuffix(CONTINUED)
                lines.append(self._line("  "))
        text = "\n".join(lines)
        if self._readline is not None and text.strip():
            with contextlib.suppress(UnicodeError):  # a locale that cannot spell it
                self._readline.add_history(text)
            history.add(text)
        return typed(text, "what was typed")

    def _line(self, prompt: str) -> str:
        if self._readline is not None:
            return input(_shown_by_readline(prompt))
        console.prompt(prompt)
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.removesuffix("\n")

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """While nothing is read: what is typed ahead waits unseen and whole, pastes marked, for the next prompt."""
        if self._readline is None:
            yield
            return
        with _keys_waiting(sys.stdin.fileno()):
            self._mark_pastes(True)
            yield

    def _mark_pastes(self, on: bool) -> None:
        if self._marks_pastes:
            console.send(PASTE_ON if on else PASTE_OFF)

    def __enter__(self) -> LineReader:
        return self

    def __exit__(self, *exc: object) -> None:
        """Leave the terminal as it was."""
        self._mark_pastes(False)


@contextlib.contextmanager
def _keys_waiting(terminal: int) -> Iterator[None]:
    """Keys are kept as they come, without an echo between the words of an answer; Ctrl-C is still heard.

    A terminal that edits lines by itself would cut those of more than 4095 bytes.
    """
    import termios

    try:
        before = termios.tcgetattr(terminal)
        waiting = termios.tcgetattr(terminal)
        waiting[3] &= ~(termios.ICANON | termios.ECHO)
        termios.tcsetattr(terminal, termios.TCSADRAIN, waiting)
    except termios.error:
        yield
        return
    try:
        yield
    finally:
        with contextlib.suppress(termios.error):
            termios.tcsetattr(terminal, termios.TCSADRAIN, before)


@contextlib.contextmanager
def terminating_in_order() -> Iterator[None]:
    """SIGTERM unwinds as Ctrl-C does, so that the terminal is left as it was, and ends the program all the same."""

    def unwind(number: int, frame: FrameType | None) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, unwind)
    try:
        yield
    except Terminated:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)


class Terminated(BaseException):
    """SIGTERM came."""


def _readline() -> ModuleType | None:
    try:
        import readline
    except ImportError:
        return None
    return readline


def _shown_by_readline(prompt: str) -> str:
    """The prompt in colour; readline must be told which characters take no room."""
    if not prompt.strip() or not console.wants_colour(sys.stdout):
        return prompt
    start, end = console.styled("\0", "prompt", sys.stdout).split("\0")
    return f"\x01{start}\x02{prompt}\x01{end}\x02"
