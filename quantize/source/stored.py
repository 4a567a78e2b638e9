"""stored.py: bytes of tensors in files: where they lie, and reading them.

Weights are read with positioned reads straight into the array that keeps them: one copy, no mapped pages counted
against this process, and a file that shrinks under us is an error instead of a signal.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cext import system
from quantize.base.errors import CheckpointError

REPLACE_HINT = "download the file again; if it came from a conversion, run that again"


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as its file stores it, or a run of its rows."""

    name: str
    dtype: str  # the format's name for it
    shape: tuple[int, ...]  # row-major
    shard: Path
    offset: int  # bytes from the start of the shard
    nbytes: int

    def rows(self, start: int, stop: int) -> StoredTensor:
        """These of the first axis."""
        row = self.nbytes // self.shape[0]
        shape = (stop - start, *self.shape[1:])
        return replace(self, shape=shape, offset=self.offset + start * row, nbytes=(stop - start) * row)

    def item(self, i: int) -> StoredTensor:
        """One of the first axis, without it."""
        one = self.rows(i, i + 1)
        return replace(one, shape=one.shape[1:])


class Files:
    """The files of a model, opened as they are read. Threads may read at once."""

    def __init__(self) -> None:
        self._fds: dict[Path, int] = {}
        self._opening = threading.Lock()
        self.touched: set[str] = set()  # names of those that were read from

    def close(self) -> None:
        """Release the file descriptors; reads after this open them again."""
        while self._fds:
            os.close(self._fds.popitem()[1])

    def read_into(self, tensor: StoredTensor, out: NDArray[Any]) -> None:
        """All of a tensor's bytes into out, which is contiguous and as large. CheckpointError."""
        if out.nbytes != tensor.nbytes or not out.flags.c_contiguous:
            raise ValueError(f"out is {out.nbytes} bytes, `{tensor.name}` takes {tensor.nbytes}, contiguous")
        if tensor.nbytes == 0:
            return
        view = out.reshape(-1).view(np.uint8).data
        done = 0
        try:
            with self._opening:
                if tensor.shard not in self._fds:
                    self._fds[tensor.shard] = os.open(tensor.shard, os.O_RDONLY)
                fd = self._fds[tensor.shard]
            self.touched.add(tensor.shard.name)
            while done < tensor.nbytes:
                n = system.read_at(fd, view[done:], tensor.offset + done)
                if n == 0:
                    raise CheckpointError(
                        f"`{tensor.shard}`: the file ends inside tensor `{tensor.name}`", REPLACE_HINT
                    )
                done += n
        except OSError as error:
            raise CheckpointError(f"`{tensor.shard}`: tensor `{tensor.name}`: {error.strerror}") from error
