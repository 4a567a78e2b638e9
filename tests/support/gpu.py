"""A device to test shaders on, and one shader run over arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

import cext
from cext import _engine

Link = tuple[int, int, int, int]


def usable() -> list[dict[str, Any]]:
    """The devices that the engine can compute on, software ones too; none without a loader, or shaders in the build."""
    if not _engine.gpu_built():
        return []
    try:
        return [device for device in _engine.gpu_list() if not device["missing"]]
    except cext.DeviceError:
        return []


def reason() -> str | None:
    """Why nothing can be tested on a GPU here, or None."""
    if not _engine.gpu_built():
        return "this build has no shaders: no glslang or glslc was there"
    try:
        devices = _engine.gpu_list()
    except cext.DeviceError as error:
        return str(error)
    if any(not device["missing"] for device in devices):
        return None
    return "; ".join(f"{d['name']}: {d['missing']}" for d in devices) or "Vulkan knows no device here"


def number() -> str:
    """The number of the device that tests run on: the first that can be used. Skips where there is none."""
    if why := reason():
        pytest.skip(why)
    return str(next(i for i, device in enumerate(_engine.gpu_list()) if not device["missing"]))


def device() -> dict[str, Any]:
    """What is known of that device. Skips where there is none."""
    which = int(number())
    return dict(_engine.gpu_list()[which])


class Gpu:
    """An open device. run: one shader over arrays, each in a buffer of its own; what can be written to comes back."""

    def __init__(self, which: str) -> None:
        self.handle = _engine.gpu_open(which)

    def run(
        self,
        shader: str,
        arrays: Sequence[np.ndarray[Any, Any]],
        push: bytes,
        links: Sequence[Link],
        groups: tuple[int, int, int],
        specs: Sequence[int] = (128,),
    ) -> None:
        """links: (where, at, to, to_at): 8 bytes of array `where` (-1: of push) become the address of `to` + to_at."""
        _engine.gpu_run(self.handle, shader, list(arrays), push, list(links), groups, list(specs))
