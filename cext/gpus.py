"""The GPUs that Vulkan knows here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cext import _engine


@dataclass(frozen=True)
class Gpu:
    """A device as its driver tells of it. number: what ``Device.name`` takes; missing: what the engine needs and it
    lacks, "" where it can be used; memory, free: bytes of its own, and of these what this program may have now.
    coop: rows, columns and depth of its matrices of halves, "" without. software: the processor in a GPU's place, for
    tests."""

    number: int
    name: str
    driver: str
    api: str
    kind: Literal["other", "integrated", "discrete", "virtual", "software"]
    missing: str
    memory: int
    free: int
    subgroup: int
    int_dot: bool
    float16: bool
    coop: str

    @property
    def software(self) -> bool:
        return self.kind == "software"


def gpus() -> list[Gpu]:
    """All of them, those that cannot be used too. DeviceError says why there is none: no loader, no driver, or a build
    without shaders."""
    if not _engine.gpu_built():
        _engine.gpu_open(None)  # raises
    names = Gpu.__dataclass_fields__.keys() - {"number"}
    return [Gpu(i, **{name: device[name] for name in names}) for i, device in enumerate(_engine.gpu_list())]
