"""What the command line raises for itself. Everything that carries a ``hint`` is printed the same way (see app.py)."""

from __future__ import annotations

FAILED, MISUSED, INTERRUPTED = 1, 2, 130  # exit codes; 0 is done, 130 stopped with Ctrl-C


class CliError(Exception):
    """A failure to tell in one line: ``error: message``, and ``hint: hint`` where there is something to do about it."""

    exit_code = FAILED

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class UsageError(CliError):
    """The command was called in a way that cannot work, whatever the files hold."""

    exit_code = MISUSED
