"""Reading what a person types, in terminals that obey nothing and without them; prompt.py is for the others.

What a line means never depends on when it comes. Lines are one message where the terminal says that they were pasted
together (bracketed paste) or where a backslash joins them, and messages of their own otherwise, typed ahead or not.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from importlib import import_module
from pathlib import Path
from types import FrameType, ModuleType
from typing import Protocol

from dsv2cli import console
from dsv2cli.chat import history
from dsv2cli.errors import CliError
from dsv2cli.text import decode, typed

CONTINUED = "\\"


class Reader(Protocol):
    """Where messages come from."""

    def read(self) -> str | None:
        """One message; None at the end of input. KeyboardInterrupt at Ctrl-C, UsageError where it is no text."""

    def edit(self, text: str) -> str | None:
        """``text`` as a person has changed it; None where that was given up. CliError where there is no way to."""

    def away(self) -> AbstractContextManager[None]:
        """While nothing is read: what is typed ahead waits for the next prompt."""

    def __enter__(self) -> Reader: ...
    def __exit__(self, *exc: object) -> None: ...


def draws() -> bool:
    """Whether messages are typed in a terminal that obeys, where prompt.py takes them."""
    return console.obeys(sys.stdin) and console.obeys(sys.stdout)


def prepare() -> None:
    """Import what the conversation will draw with beside whatever else is done until then."""
    if draws():
        threading.Thread(target=import_module, args=("dsv2cli.chat.prompt",), daemon=True).start()


class LineReader:
    """Prompts on the terminal. Without readline, or where stdout is no terminal, plain lines and no history.

    remembers: whether messages go into the history's file.
    """

    def __init__(self, prompt: str, *, remembers: bool = True) -> None:
        self._readline = _readline() if console.is_terminal(sys.stdout) else None
        self._prompt, self._remembers = prompt, remembers
        if self._readline is not None:
            self._set_up(self._readline)

    def _set_up(self, readline: ModuleType) -> None:
        for line in history.read():
            with contextlib.suppress(UnicodeError):  # a locale that cannot spell it
                readline.add_history(line)
        readline.set_auto_history(False)  # a message of several lines is one entry
        readline.parse_and_bind("set enable-bracketed-paste off")

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
            if self._remembers:
                history.add(text)
        return typed(text, "what was typed")

    def _line(self, prompt: str) -> str:
        if self._readline is not None:
            return input(prompt)
        console.prompt(prompt)
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.removesuffix("\n")

    def edit(self, text: str) -> str | None:
        """In the editor of the environment."""
        return edited(text)

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """See ``Reader``."""
        if self._readline is None:
            yield
            return
        with keys_waiting(sys.stdin.fileno()):
            yield

    def __enter__(self) -> LineReader:
        return self

    def __exit__(self, *exc: object) -> None:
        """The terminal is as it was."""


def edited(text: str) -> str | None:
    """``text`` after $VISUAL or $EDITOR has had it; None where that failed. CliError where neither is set."""
    editor = os.environ.get("VISUAL") or os.environ.get("EDITOR")
    if not editor:
        raise CliError("there is no editor", "set VISUAL or EDITOR to the command of one")
    with tempfile.NamedTemporaryFile("w+", suffix=".md", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        try:
            done = subprocess.run([*shlex.split(editor), file.name], check=False)
        except (OSError, ValueError) as error:
            raise CliError(f"cannot run the editor `{editor}`: {error}") from error
        if done.returncode:
            return None
        return decode(Path(file.name).read_bytes(), "the edited text").removesuffix("\n")


@contextlib.contextmanager
def keys_waiting(terminal: int) -> Iterator[None]:
    """Keys are kept as they come, without an echo between the words of an answer; Ctrl-C is still heard.

    A terminal that edits lines by itself would cut those of more than 4095 bytes. A shell that brings a stopped program
    back leaves the terminal as its own was.
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

    def come_back(number: int, frame: FrameType | None) -> None:
        with contextlib.suppress(termios.error):
            termios.tcsetattr(terminal, termios.TCSANOW, waiting)

    usual = signal.signal(signal.SIGCONT, come_back)
    try:
        yield
    finally:
        signal.signal(signal.SIGCONT, usual)
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


class Terminated(SystemExit):
    """SIGTERM came. An event loop lets SystemExit and KeyboardInterrupt through, and takes others for its own."""


def _readline() -> ModuleType | None:
    try:
        import readline
    except ImportError:
        return None
    return readline
