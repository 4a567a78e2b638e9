"""One model over several machines: the devices of llama.cpp's RPC servers.

Neither side checks who the other is and nothing is encrypted: weights and what is said go over the network as they are,
and a server does what it is told by whoever reaches it. For a network that one trusts, and no other.
"""

from __future__ import annotations

import ctypes
import ipaddress
import re
import socket
from dataclasses import dataclass
from typing import Any

from dsv2cli.engines.llamacpp.library import ggml, library, version
from dsv2cli.errors import CliError, UsageError

ENDPOINT = re.compile(r"(?P<host>[A-Za-z0-9._-]+):(?P<port>[0-9]{1,5})")  # llama.cpp takes no IPv6 address
SECONDS = 5.0  # for a server to answer the first call
MAX_SERVERS = 16  # llama.cpp's
BUILD = (
    'CMAKE_ARGS="-DGGML_RPC=on" pip install --force-reinstall --no-deps --no-binary llama-cpp-python'
    " llama-cpp-python=={version} builds one"
)


@dataclass(frozen=True)
class Endpoint:
    """A server's address."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"

    @property
    def is_here(self) -> bool:
        """Whether it is this machine."""
        try:
            return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def parse(text: str) -> tuple[Endpoint, ...]:
    """ "10.0.0.2:50052,10.0.0.3:50052" -> endpoints. UsageError."""
    found = []
    for part in text.split(","):
        match = ENDPOINT.fullmatch(part.strip())
        if match is None or not 1 <= int(match["port"]) <= 65535:
            raise UsageError(f"--rpc takes HOST:PORT,..., got `{part}`", "--rpc 10.0.0.2:50052,10.0.0.3:50052")
        found.append(Endpoint(match["host"], int(match["port"])))
    if len(found) > MAX_SERVERS:
        raise UsageError(f"--rpc names {len(found)} servers, and llama.cpp takes {MAX_SERVERS}")
    if len(set(found)) < len(found):
        raise UsageError("--rpc names a server twice")
    return tuple(found)


def warning(endpoints: tuple[Endpoint, ...]) -> str:
    """What a person has to know before anything is sent; "" where nothing leaves the machine."""
    away = ", ".join(str(endpoint) for endpoint in endpoints if not endpoint.is_here)
    return away and (
        f"weights and text go to {away} without encryption, and nothing checks who is there: --rpc is for a network"
        " that you trust"
    )


def devices(endpoints: tuple[Endpoint, ...]) -> Any:
    """The servers' devices, as llama.cpp's model takes them: pointers that end with a null. CliError."""
    library()
    lib = ggml()
    lib.ggml_backend_reg_by_name.restype = ctypes.c_void_p
    lib.ggml_backend_reg_get_proc_address.restype = ctypes.c_void_p
    lib.ggml_backend_reg_dev_count.restype = ctypes.c_size_t
    lib.ggml_backend_reg_dev_get.restype = ctypes.c_void_p
    registry = lib.ggml_backend_reg_by_name(b"RPC")
    address = registry and lib.ggml_backend_reg_get_proc_address(
        ctypes.c_void_p(registry), b"ggml_backend_rpc_add_server"
    )
    if not address:
        raise CliError("the llama.cpp that is installed was built without RPC", BUILD.format(version=version()))
    add_server = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_char_p)(address)
    found = []
    for endpoint in endpoints:
        _call(endpoint)
        server = add_server(str(endpoint).encode())
        if not server:
            raise CliError(f"{endpoint} is no RPC server of this llama.cpp's", "both sides are to be of one version")
        lib.ggml_backend_register(ctypes.c_void_p(server))
        n = lib.ggml_backend_reg_dev_count(ctypes.c_void_p(server))
        found += [lib.ggml_backend_reg_dev_get(ctypes.c_void_p(server), ctypes.c_size_t(i)) for i in range(n)]
    return (ctypes.c_void_p * (len(found) + 1))(*found, None)


def _call(endpoint: Endpoint) -> None:
    """CliError where nobody answers: llama.cpp would end the process."""
    try:
        socket.create_connection((endpoint.host, endpoint.port), SECONDS).close()
    except OSError as error:
        raise CliError(
            f"nobody answers at {endpoint}: {error.strerror or error}",
            f"on that machine: rpc-server -H 0.0.0.0 -p {endpoint.port} (llama.cpp's, of the same version)",
        ) from error
