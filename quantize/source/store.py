"""store.py: what holds a model's weights, whatever its files are. checkpoint.py and gguf_source.py each have one.

Weights go by the names that Hugging Face's checkpoints of the family give them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from quantize.source.forms import Restore


class Store(Protocol):
    """Weights by name. Threads may read at once; of a weight that verify passed."""

    @property
    def path(self) -> Path:
        """The folder or file."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors on disk."""

    @property
    def touched(self) -> set[str]:
        """Names of the files that weights were read from so far."""

    def stamps(self) -> dict[str, list[int]]:
        """[bytes, time of the last change in ns] of every file, by its name."""

    def record(self, names: Collection[str]) -> Sequence[object]:
        """What the values of these weights depend on beside the bytes of the files, as JSON."""

    def verify(self, name: str, shape: tuple[int, ...], n_stacked: int = 1) -> None:
        """Check by the headers that a weight is there, of that shape, in a form that can be read. QuantizeError.

        n_stacked: how many weights share its stack, if it is in one.
        """

    def verify_told(self, name: str, shape: tuple[int, ...]) -> None:
        """Check what a weight's files tell of it beside the headers."""

    def read_f32(self, name: str) -> NDArray[np.float32]:
        """A weight in float32. CheckpointError names one that holds NaN or infinity, or whose scales are none."""

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """Rows start to stop of a matrix, as read_f32 reads them."""

    def read_half(self, name: str, out: NDArray[Any]) -> Restore:
        """A weight into out of its shape and half_dtype: as stored where the engine runs that, else rounded.

        Returns what gives the exact weight back from that.
        """

    def half_dtype(self, name: str) -> np.dtype[Any]:
        """float32, float16, or uint16, which stands for bfloat16."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a weight."""

    def parts(self, name: str) -> tuple[str, ...]:
        """The names of the stored tensors that a weight is made of. CheckpointError where it is not there."""

    def close(self) -> None:
        """Let go of the files."""
