"""Which device computes which part of a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cext.arguments import whole
from cext.errors import ArgumentError

Part = Literal["ends", "attention", "feed_forward", "experts"]
Copies = Literal["auto", "never", "always"]

_PARTS: tuple[Part, ...] = ("ends", "attention", "feed_forward", "experts")
_COPIES: tuple[Copies, ...] = ("auto", "never", "always")


@dataclass(frozen=True)
class Device:
    """What to compute on beside the processor: of a kind that the build knows ("cpu": a team of threads of its own;
    "vulkan": a GPU).

    threads: of the processor, None for the fastest number. isa: of the processor, None for the best. name: of a GPU,
    its number in ``gpus()`` or letters of its name, None for the best that is no software. memory: of a GPU, the bytes
    of its own that weights, copies, caches and steps may take together, None for what there is. copies: whether a GPU
    computes a prompt's routed experts that lie in the host's memory, by copying them: as many as that is faster for,
    none, or all. It takes room for those of two layers; where there is none, none are copied. hot: of its memory, the
    bytes for routed experts that come and go: those that tokens choose of late, the others being the processor's. It
    has the feed-forward of all layers then, and all routed experts are placed at 0. What lies where follows from the
    steps that were taken, beginning with ``Model(uses=...)``, and logits with it, in their last bits. short_steps: none
    of more than MAX_STEP tokens; else a GPU that routes every layer, with experts in memory at most, computes twice as
    many together where it has room for them: its own 0.2 MB a token and more.
    """

    kind: str = "cpu"
    threads: int | None = None
    isa: str | None = None
    name: str | None = None
    memory: int | None = None
    copies: Copies = "auto"
    hot: int | None = None
    short_steps: bool = False

    def record(self) -> tuple[str, int, str | None, str | None, int, int, int, bool]:
        """As the extension takes it. ArgumentError for fewer than one thread or byte, ValueError for other copies."""
        if self.copies not in _COPIES:
            raise ValueError(f"copies is {self.copies!r}, expected one of {', '.join(_COPIES)}")
        threads = 0 if self.threads is None else whole("threads", self.threads, low=1)
        memory = 0 if self.memory is None else whole("memory", self.memory, low=1, high=2**63 - 1)
        hot = 0 if self.hot is None else whole("hot", self.hot, low=1, high=2**63 - 1)
        return self.kind, threads, self.isa, self.name, memory, _COPIES.index(self.copies), hot, self.short_steps


@dataclass(frozen=True)
class Place:
    """A part of a model on a device.

    part: "ends" (embeddings, final norm and head); or of the layers, "attention", "feed_forward" (dense, or router,
    shared and routed experts), "experts" (some routed experts alone). layers, experts: ranges of step 1, of which the
    ends have neither and the experts alone both. The model refuses layers, experts and devices that it does not have.
    """

    part: Part
    device: int
    layers: range = range(0)
    experts: range = range(0)

    def record(self) -> tuple[int, int, int, int, int, int]:
        """As the extension takes it. ValueError for another part or step, or ranges that the part does not have."""
        if self.part not in _PARTS:
            raise ValueError(f"part is {self.part!r}, expected one of {', '.join(_PARTS)}")
        if self.layers.step != 1 or self.experts.step != 1:
            raise ValueError("ranges of layers and experts have a step of 1")
        wants = {"layers": self.part != "ends", "experts": self.part == "experts"}
        for name, wanted in wants.items():
            found = getattr(self, name)
            if wanted and not found:
                raise ArgumentError(f"a place for {self.part} names no {name}: {name}=range(FIRST, LAST + 1)")
            if found and not wanted:
                raise ArgumentError(f"a place for {self.part} has no {name}, got {found}")
        ends = [self.layers.start, self.layers.stop, self.experts.start, self.experts.stop]
        first, last, first_expert, last_expert = (whole("the end of a range", end) for end in ends)
        part = _PARTS.index(self.part)
        return part, whole("device", self.device), first, last, first_expert, last_expert
