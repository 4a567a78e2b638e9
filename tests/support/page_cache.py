"""What is in memory of a file or of an array, by mincore; Linux."""

import ctypes
import mmap
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np


def cached_bytes(path: str | PathLike[str]) -> int:
    """Bytes of its pages that are in memory, whoever brought them there."""
    with Path(path).open("rb") as file, mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=3) as pages:
        first = ctypes.c_char.from_buffer(pages)
        try:
            return _resident(ctypes.addressof(first), len(pages))
        finally:
            del first


def resident_bytes(array: np.ndarray[Any, Any]) -> int:
    """Of an array that begins with a page."""
    return _resident(array.ctypes.data, array.nbytes)


def _resident(at: int, nbytes: int) -> int:
    told = (ctypes.c_ubyte * -(-nbytes // mmap.PAGESIZE))()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mincore(ctypes.c_void_p(at), ctypes.c_size_t(nbytes), told):
        raise OSError(ctypes.get_errno(), "mincore")
    return mmap.PAGESIZE * sum(page & 1 for page in told)
