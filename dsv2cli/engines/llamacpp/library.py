"""llama.cpp's library as it is installed: started once, its log and its last words ours."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import re
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

from cext.errors import UnsupportedError
from cext.vocabulary import kept_log, start_llama
from dsv2cli import console
from dsv2cli.errors import FAILED

T = TypeVar("T")
PLACE = re.compile(r"^\S*?([^/\s]+:\d+): ")


@functools.cache
def library() -> Any:
    """The module ``llama_cpp``, with its backend started."""
    import llama_cpp

    start_llama()
    with contextlib.suppress(AttributeError, OSError):  # a version without: it ends by a signal
        ggml().ggml_set_abort_callback(_last_words)
    return llama_cpp


def version() -> str:
    return str(library().__version__)


def features() -> tuple[str, bool, bool]:
    """(instruction sets and the like that it was built with, whether it has RPC, whether it has GPUs)."""
    lib = library()
    words = lib.llama_print_system_info().decode("utf-8", "replace").replace("|", " ").split()
    with_it = [name for name, sign, on in zip(words, words[1:], words[2:], strict=False) if (sign, on) == ("=", "1")]
    has_rpc = bool(getattr(lib, "llama_supports_rpc", lambda: False)())
    return " ".join(with_it), has_rpc, bool(lib.llama_supports_gpu_offload())


def may_repack() -> bool:
    """Whether llama.cpp may copy weights into layouts of its own, which are faster.

    Not where it was built for AMX: GCC 12 takes the instruction that sets the tiles' shapes to read 8 bytes of 64 and
    leaves the rest unwritten, so that two tokens at once end the process; and experts of f16 in AMX's layout end in a
    failed check. llama.cpp cannot be asked for its other layouts alone.
    """
    return b"AMX_INT8 = 1" not in library().llama_print_system_info()


def load(path: str, params: Any) -> tuple[Any, list[str]]:
    """llama.cpp's model of a file, which the caller frees, and what it warned of.

    UnsupportedError with llama.cpp's own reason.
    """
    lib = library()
    with kept_log() as log:
        model = lib.llama_model_load_from_file(os.fsencode(path), params)
    if not model:
        raise UnsupportedError(f"`{path}`: llama.cpp {version()} cannot load it: {log.reason}", _remedy(log.reason))
    return model, log.warnings


def _remedy(reason: str) -> str:
    if "unknown model architecture" in reason or "pre-tokenizer" in reason:
        return "llama-cpp-python may be older than this model: pip install -U llama-cpp-python"
    if "memory" in reason or "alloc" in reason:
        return "free some memory, or take a smaller type"
    return "take another file of the model: this one may be damaged, or of another program"


@functools.cache
def ggml() -> Any:
    """The library below llama.cpp's, where devices are listed."""
    from llama_cpp._ggml import libggml

    return libggml


@ctypes.CFUNCTYPE(None, ctypes.c_char_p)  # type: ignore[untyped-decorator]
def _last_words(message: bytes | None) -> None:
    """llama.cpp checks itself and ends the process where it is wrong, after this: not with a dump of the stack."""
    told = PLACE.sub(r"\1: ", (message or b"").decode("utf-8", "replace").strip())
    console.print_error(f"llama.cpp ended: {told}", "the file may be damaged, or a machine of --rpc gone")
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    os._exit(FAILED)


class Worker:
    """One thread that calls llama.cpp, so that its owner hears Ctrl-C while it computes, and calls never meet.

    stop: a byte that llama.cpp looks at between two operations, and ends what it does where it is not 0.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="llama.cpp")
        self.stop = ctypes.create_string_buffer(2)

    def run(self, call: Callable[[], T]) -> T:
        """What the call returns or raises. Where Ctrl-C ends the wait, the call is stopped first."""
        future: Future[T] | None = None
        try:
            self.stop[0] = b"\0"
            future = self._pool.submit(call)
            return future.result()
        finally:
            while future is not None and not future.done():
                self.interrupt()
                with contextlib.suppress(KeyboardInterrupt):
                    wait([future])

    def interrupt(self) -> None:
        """Stop what runs. From any thread, or a signal's handler."""
        self.stop[0] = b"\1"

    @property
    def stopped(self) -> bool:
        return self.stop[0] != b"\0"

    def abort_callback(self) -> tuple[Any, int]:
        """(function, its argument) for llama.cpp to ask whether to stop.

        It is C's own strlen over ``stop``, since it is asked after each of a thousand operations a token, each of which
        would wait for Python: no character, no stop.
        """
        return ctypes.cast(ctypes.CDLL(None).strlen, library().ggml_abort_callback), ctypes.addressof(self.stop)

    def close(self) -> None:
        self._pool.shutdown()
