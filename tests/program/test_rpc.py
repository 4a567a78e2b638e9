"""One model over several machines: --rpc, and what it says before anything is sent."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from support import others
from support.cli import PACKAGES, assert_fails, dsv2, environment
from support.others import MIXTRAL

from dsv2cli.engines import llamacpp
from dsv2cli.engines.llamacpp import rpc
from dsv2cli.errors import UsageError

TESTS = Path(__file__).parents[1]
# The library that these tests run with, wherever it lies.
PATHS = {"PYTHONPATH": os.pathsep.join([str(PACKAGES), str(TESTS), str(Path(llama_cpp.__file__).parents[1])])}
SECONDS = 30.0
has_rpc = bool(llama_cpp.llama_supports_rpc())
needs_rpc = pytest.mark.skipif(
    not has_rpc,
    reason="the llama.cpp that is installed was built without RPC (CMAKE_ARGS=-DGGML_RPC=on pip install ...)",
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return others.write(tmp_path_factory.mktemp("rpc") / "m.gguf", MIXTRAL)


@pytest.mark.parametrize(
    "text", ["", "host", "host:", ":1", "host:0", "host:65536", "a b:1", "h:1,", "h:1,h:1", "[::1]:1"]
)
def test_what_names_no_server(text: str) -> None:
    with pytest.raises(UsageError, match="--rpc"):
        rpc.parse(text)


def test_a_wrong_name_is_told_before_anything_is_read(path: Path) -> None:
    assert_fails(dsv2("chat", path, "-p", "x", "--rpc", "h:1,h:1"), 2, "--rpc names a server twice")


def test_what_leaves_the_machine_is_told() -> None:
    assert rpc.warning(rpc.parse("127.0.0.1:1,localhost:2")) == ""
    told = rpc.warning(rpc.parse("127.0.0.1:1,10.0.0.2:50052,box:3"))
    assert "go to 10.0.0.2:50052, box:3 without encryption" in told and "trust" in told


@pytest.mark.skipif(has_rpc, reason="the llama.cpp that is installed has RPC")
def test_a_library_without_rpc_says_how_one_is_built(path: Path) -> None:
    result = dsv2("chat", path, "-p", "x", "--rpc", "192.0.2.1:50052")
    assert_fails(result, 1, "built without RPC", 'CMAKE_ARGS="-DGGML_RPC=on" pip install', "--no-binary")
    assert "warning: weights and text go to 192.0.2.1:50052" in result.stderr


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextlib.contextmanager
def server() -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """An RPC server in a process of its own: its address."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "support.rpc_server", str(port)],
        cwd=TESTS,
        env=environment(**PATHS),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        end = time.monotonic() + SECONDS
        while True:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.1)
        yield f"127.0.0.1:{port}", process
    finally:
        process.kill()
        process.wait()


@needs_rpc
def test_nobody_at_the_address(path: Path) -> None:
    assert_fails(
        dsv2("chat", path, "-p", "x", "--rpc", f"127.0.0.1:{free_port()}", **PATHS), 1, "nobody answers", "rpc-server"
    )


@needs_rpc
@pytest.mark.heavy
def test_two_servers_hold_a_model(path: Path) -> None:
    """The answer is the one of this machine alone; a server that goes is told in a line."""
    options = ["-p", "hi the", "-n", "24", "--temp", "0", "-t", "1", "--kv", "f32", "--json"]
    alone = json.loads(dsv2("chat", path, *options, "--engine", "llama.cpp", **PATHS).stdout)
    ids = [1, 5, 200, 31, 77]
    with llamacpp.Model(path, 1) as model:
        expected = model.session(64, "f32").eval(ids, "all")
    with server() as (first, _), server() as (second, process):
        both = f"{first},{second}"
        result = dsv2("chat", path, *options, "--rpc", both, **PATHS)
        assert result.returncode == 0, result.stderr
        assert json.loads(result.stdout)["answer"] == alone["answer"]
        with llamacpp.Model(path, 1, servers=rpc.parse(both)) as model:
            np.testing.assert_allclose(model.session(64, "f32").eval(ids, "all"), expected, atol=2e-4)
        script = (
            "import os, sys; from dsv2cli.engines import llamacpp; from dsv2cli.engines.llamacpp import rpc;"
            f"s = llamacpp.Model({str(path)!r}, 1, servers=rpc.parse({both!r})).session(64); s.eval([1, 2]);"
            f"os.kill({process.pid}, 9); s.eval([3]); s.eval([4])"
        )
        gone = subprocess.run(
            [sys.executable, "-P", "-c", script], env=environment(**PATHS), capture_output=True, check=False
        )
        assert gone.returncode == 1 and gone.stderr.decode().startswith("error: llama.cpp ended: "), gone.stderr
