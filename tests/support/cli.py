"""Running dsv2 as a person does: in a process of its own, and in a pseudo-terminal."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import resource
import select
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from support import forks
from support.emulator import Emulator

import dsv2cli

PACKAGES = Path(dsv2cli.__file__).parents[1]  # the ones under test: installed, or a checkout on PYTHONPATH
# A shell's background job, as a CI run may be, ignores Ctrl-C, one of nohup a terminal's end too; its children would
# inherit that.
HEAR_SIGNALS = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
    " signal.signal(signal.SIGHUP, signal.SIG_DFL)"
)
# What is drawn without a seed is the same in every run of a test: no answer holds an odd piece of text by chance.
SAME_DRAWS = "import random, secrets; secrets.randbits = random.Random(1).getrandbits"
RUN_MAIN = f"{HEAR_SIGNALS}; {SAME_DRAWS}; from dsv2cli.app import main; main()"
COMMAND = [sys.executable, "-P", "-c", RUN_MAIN]  # -P: not what lies in the working folder
# In a new session, takes the terminal on stdin for its own, so that Ctrl-C reaches it.
IN_TERMINAL = [sys.executable, "-P", "-c", f"import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); {RUN_MAIN}"]
SECONDS = 300.0  # more is a hang, on however busy a machine
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def environment(**extra: str | None) -> dict[str, str]:
    """Variables of a run; None takes one out."""
    kept = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("HF_", "DSV2_", "HUGGING")) and k != "NO_COLOR" and not k.upper().endswith("_PROXY")
    }
    every = {**kept, "PYTHONPATH": str(PACKAGES), "XDG_CONFIG_HOME": os.devnull, **extra}  # nobody's own settings
    return {name: value for name, value in every.items() if value is not None}


def dsv2(*args: str | Path, stdin: str | bytes = b"", **env: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; stdout and stderr as text."""
    data = stdin.encode() if isinstance(stdin, str) else stdin
    done = forks.run([*COMMAND, *map(str, args)], environment(**env), SECONDS, data)
    out, err = (text.decode("utf-8") for text in (done.stdout, done.stderr))
    return subprocess.CompletedProcess(done.args, done.returncode, out, err)


def dsv2_after(script: str, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a process that a script has prepared."""
    command = [sys.executable, "-P", "-c", f"{script}; {RUN_MAIN}", *args]
    return forks.run(command, environment(**env), SECONDS, text=True)


def wait_until(what: Callable[[], object], seconds: float = SECONDS) -> None:
    """As long as a machine may take that stands still for moments."""
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.005)


def worked(process: subprocess.Popen[Any], seconds: float) -> None:
    """Until a process that runs has computed for so long."""

    def enough() -> bool:
        assert process.poll() is None
        user, system = Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13]
        return int(user) + int(system) >= seconds * os.sysconf("SC_CLK_TCK")

    wait_until(enough)


def processor_seconds(command: Sequence[str], env: Mapping[str, str], enough: float, n: int = 30) -> float:
    """The least processor time of ``n`` runs, or the first that is below ``enough``: a busy machine takes more."""
    least = float("inf")
    for _ in range(n):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, env=env, capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        least = min(least, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        if least < enough:
            break
    return least


def assert_fails(result: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    """One error line and at most one hint that together hold the words; no traceback, nothing on stdout."""
    assert result.returncode == code, (result.returncode, result.stderr)
    told = [line for line in result.stderr.splitlines() if line.startswith(("error:", "hint:"))]
    assert [line.split(":")[0] for line in told] in (["error"], ["error", "hint"]), result.stderr
    assert "Traceback" not in result.stderr and result.stdout == ""
    for word in words:
        assert word in " ".join(told), result.stderr


class Screen:
    """A program in a pseudo-terminal: what it showed so far, as bytes (``raw``), and as ``text``: as it is to be seen
    where an emulator obeys it, else without escape sequences."""

    def __init__(
        self, process: subprocess.Popen[bytes], terminal: int, theirs: int, emulator: Emulator | None = None
    ) -> None:
        self.process, self.terminal, self.theirs, self.emulator = process, terminal, theirs, emulator
        self.raw, self.text = b"", ""

    def type(self, text: str | bytes) -> None:
        """And read meanwhile: a program that waits to be read reads nothing."""
        data, deadline = text if isinstance(text, bytes) else text.encode(), time.monotonic() + SECONDS
        while data:
            assert time.monotonic() < deadline, f"the program does not read: {self.text!r}"
            with contextlib.suppress(BlockingIOError):
                data = data[os.write(self.terminal, data) :]
            if data:
                self._read(0.01)

    def wait_for(self, pattern: str, start: int = 0) -> int:
        """Read until ``pattern`` shows after position ``start``; returns where it ends."""
        deadline = time.monotonic() + SECONDS
        while True:
            if found := re.compile(pattern).search(self.text, start):
                return found.end()
            assert time.monotonic() < deadline, f"no {pattern!r} in {self.text[start:]!r}"
            if not self._read(0.1):
                raise AssertionError(f"the program ended without {pattern!r}: {self.text[start:]!r}")

    def wait_to_see(self, words: str) -> None:
        """Read until they are in a line of the window, above the cursor or below."""
        assert self.emulator is not None
        deadline = time.monotonic() + SECONDS
        while not any(words in line for line in self.emulator.window):
            assert self._read(0.1) and time.monotonic() < deadline, self.emulator.window

    def _read(self, seconds: float) -> bool:
        """More of the screen within ``seconds``; False once the program has gone."""
        if select.select([self.terminal], [], [], seconds)[0]:
            try:
                data = os.read(self.terminal, 65536)
            except BlockingIOError:
                return True
            except OSError:  # Linux, when the other end is closed
                return False
            self.raw += data
            if self.emulator is not None:
                self.emulator.feed(data)
                self.text = self.emulator.text
                return bool(data)
            self.text = ESCAPES.sub("", self.raw.decode("utf-8", "replace")).replace("\r", "")
            return bool(data)
        return True

    def resize(self, rows: int, columns: int) -> None:
        """Of the window; the program is told."""
        assert self.emulator is not None
        self.emulator.resize(rows, columns)
        fcntl.ioctl(self.terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def exit_code(self) -> int:
        """When the program has ended, and all that it wrote has been read."""
        deadline = time.monotonic() + SECONDS
        while self.process.poll() is None:
            self._read(0.05)
            assert time.monotonic() < deadline, self.text
        while select.select([self.terminal], [], [], 0)[0] and self._read(0):
            pass
        return self.process.returncode


@contextmanager
def terminal(
    *args: str | Path, before: str = "", keep: bool = False, size: tuple[int, int] = (50, 160), **env: str | None
) -> Iterator[Screen]:
    """A command in a pseudo-terminal. before: Python that runs first; keep: the terminal stays open when the command
    has gone, to be looked at. size: rows and columns. env: None takes a variable out. State is kept in
    a folder of its own. A chat moves the cursor about,
    and is seen through an emulator."""
    ours, theirs = pty.openpty()
    os.set_blocking(ours, False)
    emulator = Emulator(*size) if "chat" in args else None
    if emulator is not None:
        fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
    state = tempfile.TemporaryDirectory()
    sizes = {"COLUMNS": None, "LINES": None}  # which come before the terminal's own
    variables = environment(**{"TERM": "xterm", "XDG_STATE_HOME": state.name, **sizes, **env})
    process = forks.popen(
        [*IN_TERMINAL[:-1], before + IN_TERMINAL[-1], *map(str, args)],
        variables,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    if not keep:
        os.close(theirs)
    try:
        yield Screen(process, ours, theirs, emulator)
    finally:
        process.kill()
        process.wait()
        state.cleanup()
        os.close(ours)
        if keep:
            os.close(theirs)
