"""heap.py: what was freed, back to the system.

glibc keeps freed memory in a heap for each thread: with 16 of them 1.2 GB of a V2-Lite run that nobody used.
"""

from __future__ import annotations

import ctypes
from functools import cache


@cache
def _trim() -> ctypes._NamedFuncPointer | None:
    try:
        return getattr(ctypes.CDLL(None), "malloc_trim", None)
    except (OSError, TypeError):  # no C library under that name, as on Windows
        return None


def trim() -> None:
    """Before a step that takes much. Milliseconds; nothing where the C library has no such call."""
    call = _trim()
    if call is not None:
        call(0)
