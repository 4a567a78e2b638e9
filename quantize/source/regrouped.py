"""regrouped.py: weights whose rows a file has in another order, or in several tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantize.source.forms import F32, Restore, Weight
from quantize.source.stored import Files

Regroup = Callable[[Sequence[NDArray[Any]], NDArray[Any]], None]
"""The parts' values into the weight's, of one dtype."""


@dataclass(frozen=True)
class Regrouped:
    """A weight that is made of all of its parts at once."""

    shape: tuple[int, ...]
    parts: tuple[Weight, ...]
    regroup: Regroup

    @property
    def half(self) -> np.dtype[Any]:
        """Of the copy that the engine gets: the parts' own where they are alike and it takes them, else float32."""
        return self.parts[0].half if self._is_alike else np.dtype("<f4")

    @property
    def _is_alike(self) -> bool:
        form = self.parts[0].form
        return form.is_plain and all(part.form is form for part in self.parts)

    def read(self, files: Files, start: int = 0, stop: int | None = None) -> F32:
        """Rows start to stop in float32. CheckpointError names a part that holds NaN or infinity."""
        whole = np.empty(self.shape, np.float32)
        self.regroup([part.read(files) for part in self.parts], whole)
        return whole[start:stop]

    def read_half(self, files: Files, out: NDArray[Any]) -> Restore:
        """The weight into out, exactly."""
        if not self._is_alike:
            out[...] = self.read(files)
            return lambda half: half
        stored = [np.empty(part.shape, part.half) for part in self.parts]
        for part, values in zip(self.parts, stored, strict=True):
            part.read_half(files, values)
        self.regroup(stored, out)
        return lambda half: self.parts[0].form.decode(half, half.shape[-1])
