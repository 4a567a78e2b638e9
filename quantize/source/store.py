"""store.py: what holds a model's weights, whatever its files are: checkpoint.py's and gguf_store.py's are of this kind.

Weights go by the names that Hugging Face's checkpoints of the family give them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantize.base.closing import Closing
from quantize.source.forms import Restore, Weight
from quantize.source.regrouped import Regrouped
from quantize.source.stored import Files, StoredTensor


class Store(Closing):
    """Weights by name. Threads may read at once; of a weight that verify passed. A context manager."""

    def __init__(self, path: Path, tensors: Mapping[str, StoredTensor]) -> None:
        """path: the folder or file. tensors: as they are stored, by their names there."""
        self.path = path
        self.tensors = tensors
        self._files = Files()

    def close(self) -> None:
        """Release the files; reads after this open them again."""
        self._files.close()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors on disk."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def touched(self) -> set[str]:
        """Names of the files that weights were read from so far."""
        return self._files.touched

    def paths(self) -> list[Path]:
        """The files that hold tensors."""
        return sorted({tensor.shard for tensor in self.tensors.values()})

    def stamps(self) -> dict[str, list[int]]:
        """[bytes, time of the last change in ns] of every file, by its name."""
        stats = {path.name: path.stat() for path in self.paths()}
        return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}

    @abstractmethod
    def record(self, names: Collection[str]) -> Sequence[object]:
        """What the values of these weights depend on beside the bytes of the files, as JSON."""

    @abstractmethod
    def parts(self, name: str) -> tuple[str, ...]:
        """The names of the stored tensors that a weight is made of. CheckpointError where it is not there."""

    @abstractmethod
    def verify(self, name: str, shape: tuple[int, ...], n_stacked: int = 1) -> None:
        """Check by the headers that a weight is there, of that shape, in a form that can be read. QuantizeError.

        n_stacked: how many weights share its stack, if it is in one. Reads no weights: a run of hours should not end in
        what the headers could have told. What they do not tell ``verify_told`` asks.
        """

    @abstractmethod
    def verify_told(self, name: str, shape: tuple[int, ...]) -> None:
        """Check what a weight's files tell of it beside the headers."""

    @abstractmethod
    def weight(self, name: str) -> Weight | Regrouped:
        """Where and how a weight is stored. CheckpointError where it is not there."""

    def read_f32(self, name: str) -> NDArray[np.float32]:
        """A weight in float32. CheckpointError names one that holds NaN or infinity, or whose scales are none."""
        return self.weight(name).read(self._files)

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """Rows start to stop of a matrix, as read_f32 reads them: an embedding in slabs, its whole never in memory."""
        return self.weight(name).read(self._files, start, stop)

    def read_half(self, name: str, out: NDArray[Any]) -> Restore:
        """A weight into out of its shape and half_dtype: as stored where the engine runs that, else rounded.

        Returns what gives the exact weight back from that. Raises as read_f32.
        """
        return self.weight(name).read_half(self._files, out)

    def half_dtype(self, name: str) -> np.dtype[Any]:
        """What read_half writes: float32, float16, or uint16, which stands for bfloat16."""
        return self.weight(name).half

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a weight."""
        return self.weight(name).shape
