"""heap.py: what was freed, back to the system.

glibc keeps freed memory in a heap for each thread: with 16 of them 1.2 GB of a V2-Lite run that nobody used.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of malloc.h
MAPPED_BYTES = 4 << 20  # an allocation of so many has pages of its own, which go when it is freed


@cache
def _call(name: str) -> Any:
    """A function of the C library; None where it has no such call, as on Windows."""
    try:
        return getattr(ctypes.CDLL(None), name, None)
    except (OSError, TypeError):
        return None


def map_large() -> None:
    """Covariances and their factors come and go by the hundred: none of them from a heap, for the rest of the process.
    glibc would learn from the first that is freed to keep such memory.
    """
    if (mallopt := _call("mallopt")) is not None:
        mallopt(MMAP_THRESHOLD, MAPPED_BYTES)


def trim() -> None:
    """Before a step that takes much. Milliseconds."""
    if (malloc_trim := _call("malloc_trim")) is not None:
        malloc_trim(0)
