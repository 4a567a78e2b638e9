"""Which device computes which part of a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Part = Literal["ends", "attention", "feed_forward", "experts"]

_PARTS: tuple[Part, ...] = ("ends", "attention", "feed_forward", "experts")


@dataclass(frozen=True)
class Device:
    """What to compute on beside the processor: of a kind that the build knows ("cpu": a team of threads of its own).

    threads: of the processor, None for the fastest number. isa: of the processor, None for the best.
    """

    kind: str = "cpu"
    threads: int | None = None
    isa: str | None = None

    def record(self) -> tuple[str, int, str | None]:
        """As the extension takes it. ValueError for fewer than one thread."""
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads is {self.threads}, expected at least 1")
        return self.kind, self.threads or 0, self.isa


@dataclass(frozen=True)
class Place:
    """A part of a model on a device.

    part: "ends" (embeddings, final norm and head); or of the layers, "attention", "feed_forward" (dense, or router,
    shared and routed experts), "experts" (some routed experts alone). layers, experts: ranges of step 1. The model
    refuses layers, experts and devices that it does not have.
    """

    part: Part
    device: int
    layers: range = range(0)
    experts: range = range(0)

    def record(self) -> tuple[int, int, int, int, int, int]:
        """As the extension takes it. ValueError for another part or step."""
        if self.part not in _PARTS:
            raise ValueError(f"part is {self.part!r}, expected one of {', '.join(_PARTS)}")
        if self.layers.step != 1 or self.experts.step != 1:
            raise ValueError("ranges of layers and experts have a step of 1")
        part = _PARTS.index(self.part)
        return part, self.device, self.layers.start, self.layers.stop, self.experts.start, self.experts.stop
