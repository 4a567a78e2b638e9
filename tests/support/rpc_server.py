"""llama.cpp's RPC server on this machine's processor: ``python -m support.rpc_server PORT``; 9: it has no RPC."""

from __future__ import annotations

import ctypes
import sys

from dsv2cli.engines.llamacpp.library import ggml, library

NO_RPC = 9
CPU = 0  # ggml's kind of device


def main(port: int) -> None:
    library()
    lib = ggml()
    for name in ("ggml_backend_reg_by_name", "ggml_backend_reg_get_proc_address", "ggml_backend_dev_by_type"):
        getattr(lib, name).restype = ctypes.c_void_p
    registry = lib.ggml_backend_reg_by_name(b"RPC")
    if not registry:
        sys.exit(NO_RPC)
    address = lib.ggml_backend_reg_get_proc_address(ctypes.c_void_p(registry), b"ggml_backend_rpc_start_server")
    start = ctypes.CFUNCTYPE(
        None, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.POINTER(ctypes.c_void_p)
    )(address)
    devices = (ctypes.c_void_p * 1)(lib.ggml_backend_dev_by_type(CPU))
    start(f"127.0.0.1:{port}".encode(), None, 1, 1, devices)


if __name__ == "__main__":
    main(int(sys.argv[1]))
