"""What the system's page cache holds of a file, by mincore; Linux."""

import ctypes
import mmap
from os import PathLike
from pathlib import Path


def cached_bytes(path: str | PathLike[str]) -> int:
    """Bytes of its pages that are in memory, whoever brought them there."""
    libc = ctypes.CDLL(None, use_errno=True)
    with Path(path).open("rb") as file, mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=3) as pages:
        n = -(-len(pages) // mmap.PAGESIZE)
        told = (ctypes.c_ubyte * n)()
        first = ctypes.c_char.from_buffer(pages)
        try:
            at = ctypes.c_void_p(ctypes.addressof(first))
            if libc.mincore(at, ctypes.c_size_t(len(pages)), told):
                raise OSError(ctypes.get_errno(), "mincore")
        finally:
            del first
        return mmap.PAGESIZE * sum(page & 1 for page in told)
