"""blas.py: numpy's linear algebra on one thread for a while.

OpenBLAS, which numpy's wheels bring, wakes all its threads for matrices of a few hundred rows and lets them spin: on a
machine with anything else to do, factoring 512 rows then takes 1.7 s in place of 0.05. Where another library serves
numpy, or its switch is not found, nothing changes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np

SWITCHES = ("scipy_openblas_{}_num_threads64_", "scipy_openblas_{}_num_threads", "openblas_{}_num_threads")


@cache
def _switch() -> tuple[Callable[[], int], Callable[[int], None]] | None:
    """OpenBLAS's functions that get and set its number of threads."""
    package = Path(np.__file__).parent
    for folder in (package.with_name("numpy.libs"), package / ".dylibs"):
        for path in sorted(folder.glob("*openblas*")):
            try:
                library = ctypes.CDLL(str(path))
            except OSError:
                continue
            for name in SWITCHES:
                get, put = (getattr(library, name.format(verb), None) for verb in ("get", "set"))
                if get is not None and put is not None:
                    put.restype = None
                    return get, put
    return None


SMALL = 2048  # rows up to which one thread is enough


@contextmanager
def one_thread_if_small(n: int) -> Iterator[None]:
    """Inside, products and factors of matrices of n rows run on the calling thread alone, unless they are large enough
    for more to pay. Not to be entered twice at once.
    """
    switch = _switch()
    if switch is None or n > SMALL:
        yield
        return
    get, put = switch
    before = get()
    put(1)
    try:
        yield
    finally:
        put(before)
