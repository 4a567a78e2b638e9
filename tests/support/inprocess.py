"""Running dsv2 inside the tests' own process: hundreds of commands in the time that a few processes take to start."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from dsv2cli import app


class Terminal(io.TextIOWrapper):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@dataclass(frozen=True)
class Ran:
    """What a command left behind."""

    code: int
    out: bytes
    err: bytes

    @property
    def told(self) -> str:
        return self.err.decode("utf-8", "backslashreplace")


def run(
    *args: str | bytes | Path,
    stdin: bytes = b"",
    terminal: bool = False,
    encoding: str = "utf-8",
    env: Mapping[str, str | None] = {},
) -> Ran:
    """A command to its end. stdin is a file; terminal: stdout and stderr say that they are one. env: None unsets."""
    words = [os.fsdecode(arg) for arg in args]
    made = Terminal if terminal else io.TextIOWrapper
    out, err = (made(io.BytesIO(), encoding=encoding, write_through=True) for _ in range(2))
    with tempfile.TemporaryFile() as given, environment(env):
        given.write(stdin)
        given.seek(0)
        before = sys.stdin, sys.stdout, sys.stderr
        sys.stdin, sys.stdout, sys.stderr = io.TextIOWrapper(given), out, err
        try:
            code = app.run(words)
        finally:
            sys.stdin, sys.stdout, sys.stderr = before
    return Ran(code, out.buffer.getvalue(), err.buffer.getvalue())  # type: ignore[attr-defined]


@contextlib.contextmanager
def environment(changes: Mapping[str, str | None]) -> Iterator[None]:
    before = dict(os.environ)
    for name in list(os.environ):
        if name.startswith(("HF_", "DSV2_", "HUGGING")) or name in ("NO_COLOR", "COLUMNS", "LINES"):
            del os.environ[name]
    os.environ["XDG_CONFIG_HOME"] = os.devnull  # nobody's own settings
    for name, value in changes.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def done(ran: Ran) -> Ran:
    """Of a command that has to succeed."""
    assert ran.code == 0, ran.told
    return ran
