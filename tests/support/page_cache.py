"""What is in memory of a file or of an array, by mincore; Linux."""

import ctypes
import mmap
import os
import sys
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import pytest

MOSTLY = 0.1  # of a file, that may stay where it is dropped


def cached_bytes(path: str | PathLike[str]) -> int:
    """Bytes of its pages that are in memory, whoever brought them there."""
    with Path(path).open("rb") as file, mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=3) as pages:
        first = ctypes.c_char.from_buffer(pages)
        try:
            return _resident(ctypes.addressof(first), len(pages))
        finally:
            del first


def skip_unless_dropped(folder: Path) -> None:
    """Skip where a file stays in memory that the system is asked to drop."""
    if not sys.platform.startswith("linux"):
        pytest.skip("mincore is Linux's")
    path = folder / "dropped"
    path.write_bytes(os.urandom(4 << 20))
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    left = cached_bytes(path)
    path.unlink()
    if left > MOSTLY * (4 << 20):
        pytest.skip("this file system keeps files in memory")


def is_dropped(path: Path) -> bool:
    """Whether next to nothing of a file is in memory."""
    return cached_bytes(path) <= MOSTLY * path.stat().st_size


def read_in_small_pages(path: Path) -> None:
    """By a reader for whom nothing is read ahead, from the drive."""
    with path.open("rb", buffering=0) as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        while file.read(1 << 20):
            pass


def resident_bytes(array: np.ndarray[Any, Any]) -> int:
    """Of an array that begins with a page."""
    return _resident(array.ctypes.data, array.nbytes)


def _resident(at: int, nbytes: int) -> int:
    told = (ctypes.c_ubyte * -(-nbytes // mmap.PAGESIZE))()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mincore(ctypes.c_void_p(at), ctypes.c_size_t(nbytes), told):
        raise OSError(ctypes.get_errno(), "mincore")
    return mmap.PAGESIZE * sum(page & 1 for page in told)
