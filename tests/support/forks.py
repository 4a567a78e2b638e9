"""Processes of Python without the second that imports take: forks of one that has imported all that dsv2 does.

Such a process is what a start would have made in all that a test sees of it: streams, terminal, folder, environment,
arguments, signals and end are its own, and it is a child of the test's process. Where variables say something to Python
itself or to a library as it is loaded, there is a start; and so wherever the start is what is tested (subprocess).
"""

from __future__ import annotations

import ctypes
import functools
import gc
import importlib.util
import io
import json
import os
import pkgutil
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

TESTS = str(Path(__file__).parents[1])
PACKAGES = ("cext", "quantize", "dsv2cli")
BESIDE = ("rich.progress", "prompt_toolkit.shortcuts", "huggingface_hub.hf_api")  # what these import when they run
READS_THE_ENVIRONMENT = "huggingface_hub"  # as it is imported
AT_A_START = ("PYTHON", "LC_", "LANG", "LD_", "MALLOC_", "OPENBLAS_", "OMP_", "GGML_", "LLAMA_")
PR_SET_CHILD_SUBREAPER = 36
HERE = (
    f"import sys; sys.path.append({TESTS!r}); from support import forks; exec(forks.wait_to_be_born(int(sys.argv[1])))"
)

_one_at_a_time = threading.Lock()


def popen(command: Sequence[str], env: Mapping[str, str], **named: Any) -> subprocess.Popen[Any]:
    """As subprocess.Popen: of [sys.executable, "-P", "-c", script, argument...]."""
    assert list(command[:3]) == [sys.executable, "-P", "-c"]
    begin = _Fork if sys.platform == "linux" and _at_a_start(env) == _at_a_start(os.environ) else subprocess.Popen
    return begin(command, env=env, **named)


def run(
    command: Sequence[str], env: Mapping[str, str], timeout: float, input: Any = None, **named: Any
) -> subprocess.CompletedProcess[Any]:
    """As subprocess.run with capture_output and no check."""
    into = subprocess.DEVNULL if input is None else subprocess.PIPE
    with popen(command, env, stdin=into, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **named) as process:
        try:
            out, err = process.communicate(input, timeout)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def _at_a_start(env: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in env.items() if name.startswith(AT_A_START) and name != "PYTHONPATH"}


class _Fork(subprocess.Popen[Any]):
    """Popen, but for how its process begins."""

    def _execute_child(self, args: Sequence[str], executable: Any, *given: Any) -> None:
        (_, _, _, cwd, env, _, _, _, stdin, into, out_of, stdout, error_of, stderr, _, _, _, _, _, session, *_) = given
        asked = json.dumps([args[3:], os.fspath(cwd or Path.cwd()), dict(env), session]).encode(
            "utf-8", "surrogateescape"
        )
        fds = [fd if fd >= 0 else usual for usual, fd in enumerate((stdin, stdout, stderr))]
        with _one_at_a_time:
            nursery, _ = _nursery()
            socket.send_fds(nursery, [len(asked).to_bytes(8)], fds)
            nursery.sendall(asked)
            self.pid = int.from_bytes(_read(nursery, 8))
        self._child_created = True
        self._close_pipe_fds(stdin, into, out_of, stdout, error_of, stderr)  # type: ignore[attr-defined]


@functools.cache
def _nursery() -> tuple[socket.socket, subprocess.Popen[bytes]]:
    """The process whose forks these are, and a connection to it with which it ends."""
    found = importlib.util.find_spec("dsv2cli")
    assert found is not None and found.origin is not None
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)  # the forks of a fork that has ended are this process's children
    ours, theirs = socket.socketpair()
    env = {**os.environ, "PYTHONPATH": str(Path(found.origin).parents[1])}
    command = [sys.executable, "-P", "-c", HERE, str(theirs.fileno())]
    fds = [theirs.fileno()]
    process = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, pass_fds=fds, start_new_session=True)
    theirs.close()
    return ours, process


# ---- In the other process ----


def wait_to_be_born(connection: int) -> str:
    """Returns in each fork alone: what it runs."""
    for package in map(importlib.import_module, PACKAGES):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)
    for name in BESIDE:
        importlib.import_module(name)
    for name in [name for name in sys.modules if name.startswith(READS_THE_ENVIRONMENT)]:
        del sys.modules[name]  # for each fork to import anew, without what it imports
    importlib.import_module("dsv2cli.app").commands()
    sys.path.remove(TESTS)
    gc.freeze()
    asked = socket.socket(fileno=connection)
    while True:
        head, fds, _, _ = socket.recv_fds(asked, 8, 3)
        if not head:
            os._exit(0)
        request = json.loads(_read(asked, int.from_bytes(head)).decode("utf-8", "surrogateescape"))
        read, write = os.pipe()
        between = os.fork()
        if not between:
            pid = os.fork()
            if not pid:
                for fd in (read, write, asked.detach()):
                    os.close(fd)
                return _begin(fds, *request)
            os.write(write, pid.to_bytes(8))
            os._exit(0)
        os.waitpid(between, 0)
        asked.sendall(os.read(read, 8))
        for fd in (read, write, *fds):
            os.close(fd)


def _begin(fds: Sequence[int], args: Sequence[str], cwd: str, env: Mapping[str, str], session: bool) -> str:
    """This process is as one of `python -P -c SCRIPT ARGUMENT...` in that folder with these streams and variables."""
    if session:
        os.setsid()
    os.chdir(cwd)
    for usual, fd in enumerate(fds):
        os.dup2(fd, usual)
    for fd in fds:
        os.close(fd)
    os.environ.clear()
    os.environ.update(env)
    script, sys.argv = args[0], ["-c", *args[1:]]
    for usual, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        stream = _stream(usual, mode, getattr(sys, name))
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    return script


def _stream(fd: int, mode: str, before: TextIO) -> TextIO:
    """As Python opens it; PYTHONUNBUFFERED is seen by what was opened before."""
    raw = io.FileIO(fd, mode, closefd=False)
    at_once, by_lines = getattr(before, "write_through", False), fd == 2 or raw.isatty()
    buffer: Any = io.BufferedReader(raw) if mode == "r" else raw if at_once else io.BufferedWriter(raw)
    return io.TextIOWrapper(buffer, before.encoding, before.errors, "\n", by_lines, at_once)


def _read(connection: socket.socket, n: int) -> bytes:
    data = b""
    while len(data) < n:
        more = connection.recv(n - len(data))
        if not more:
            raise EOFError("the process that dsv2's are forks of has ended")
        data += more
    return data
