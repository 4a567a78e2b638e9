"""Reading what a person types: line editing and history, pasted paragraphs whole, lines joined by a backslash."""

from __future__ import annotations

import contextlib
import os
import select
import sys
from pathlib import Path
from types import ModuleType

from dsv2cli import console

HISTORY_LINES = 1000
PASTE_SECONDS = 0.03  # lines that follow within this time were pasted, not typed
CONTINUED = "\\"


def history_path() -> Path:
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "dsv2" / "history"


class LineReader:
    """Prompts on the terminal. Without readline, or where stdout is no terminal, plain lines and no history."""

    def __init__(self, prompt: str, commands: list[str]) -> None:
        self._readline = _readline() if console.is_terminal(sys.stdout) else None
        self._prompt = prompt
        if self._readline is not None:
            self._set_up(self._readline, commands)

    def _set_up(self, readline: ModuleType, commands: list[str]) -> None:
        with contextlib.suppress(OSError):
            readline.read_history_file(history_path())
        readline.set_history_length(HISTORY_LINES)
        readline.set_auto_history(False)  # a pasted paragraph is one entry
        readline.set_completer_delims(" \t\n")
        readline.set_completer(lambda text, i: ([c for c in commands if text and c.startswith(text)] + [None] * 9)[i])
        readline.parse_and_bind("tab: complete")
        readline.parse_and_bind("set enable-bracketed-paste on")

    def read(self) -> str | None:
        """One message, of several lines where they were pasted or end in a backslash; None at the end of input.

        Raises KeyboardInterrupt at Ctrl-C.
        """
        try:
            lines = [self._line(self._prompt)]
        except EOFError:
            return None
        with contextlib.suppress(EOFError):
            while True:
                if lines[-1].endswith(CONTINUED):
                    lines[-1] = lines[-1].removesuffix(CONTINUED)
                    lines.append(self._line("  "))
                elif _more_is_waiting():
                    lines.append(self._line(""))
                else:
                    break
        text = "\n".join(lines)
        if self._readline is not None and text.strip():
            self._readline.add_history(text)
        return text

    def _line(self, prompt: str) -> str:
        if self._readline is not None:
            return input(_shown_by_readline(prompt))
        sys.stderr.write(prompt)
        sys.stderr.flush()
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\n")

    def close(self) -> None:
        """Keep the history, for this user alone."""
        if self._readline is None:
            return
        path = history_path()
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600)
            self._readline.write_history_file(path)


def _readline() -> ModuleType | None:
    try:
        import readline
    except ImportError:
        return None
    return readline


def _more_is_waiting() -> bool:
    return bool(select.select([sys.stdin], [], [], PASTE_SECONDS)[0])


def _shown_by_readline(prompt: str) -> str:
    """The prompt in colour; readline must be told which characters take no room."""
    if not prompt.strip() or not console.wants_colour(sys.stdout):
        return prompt
    start, end = console.styled("\0", "prompt", sys.stdout).split("\0")
    return f"\x01{start}\x02{prompt}\x01{end}\x02"
