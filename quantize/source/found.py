"""found.py: under which names a checkpoint's files hold a weight of the model, told by the names alone.

A weight stands under its own name, packed (`..._packed` with `..._shape`), or as an expert of a stack: transformers 5's
modules keep `experts.gate_up_proj` (E, 2 I, H), the gates' rows before the ups', and `experts.down_proj` (E, H, I).
Beside it may stand scales and zero points, and scales of activations, which this program does not round so.
"""

from __future__ import annotations

import re
from collections.abc import Container
from dataclasses import dataclass

SCALE_SUFFIXES = ("_scale_inv", "_scale")  # DeepSeek-V3's and transformers' name; compressed-tensors'
PACKED, SHAPE, ZERO = "_packed", "_shape", "_zero_point"
_EXPERT = re.compile(r"(?P<stack>.+\.experts)\.(?P<i>\d{1,6})\.(?P<kind>gate|up|down)_proj\.weight")
_ACTIVATION = re.compile(r".+(?:\.|_)(?:(?:input|activation|output)_(?:scale|zero_point)|[kvq]_scale)")


@dataclass(frozen=True)
class Found:
    """Where a weight is. Names of stored tensors; None where there is none."""

    values: str
    scale: str | None
    zero: str | None
    told_shape: str | None
    is_packed: bool
    expert: int | None = None  # of a stack
    half: int | None = None  # of a stack of gates and ups: 0 the gate, 1 the up

    @property
    def parts(self) -> tuple[str, ...]:
        """All of it."""
        named = (self.values, self.scale, self.zero, self.told_shape)
        return tuple(name for name in named if name is not None)


def find(name: str, names: Container[str]) -> Found | None:
    """Where the weight of that name is; None where it is not."""
    if name in names:
        return _with_scales(name, name, names)
    if name + PACKED in names:
        return _with_scales(name + PACKED, name, names)
    if (one := _EXPERT.fullmatch(name)) is None:
        return None
    both, alone = f"{one['stack']}.gate_up_proj", f"{one['stack']}.{one['kind']}_proj"
    if one["kind"] != "down" and both in names:
        return _with_scales(both, both, names, int(one["i"]), 0 if one["kind"] == "gate" else 1)
    return _with_scales(alone, alone, names, int(one["i"])) if alone in names else None


def is_of_activations(name: str) -> bool:
    """Whether a stored tensor tells how activations, or keys and values, are rounded by engines that round them so."""
    return _ACTIVATION.fullmatch(name) is not None


def _with_scales(
    values: str, base: str, names: Container[str], expert: int | None = None, half: int | None = None
) -> Found:
    scale = next((base + suffix for suffix in SCALE_SUFFIXES if base + suffix in names), None)
    zero, shape = (base + suffix if base + suffix in names else None for suffix in (ZERO, SHAPE))
    return Found(values, scale, zero, shape, values != base, expert, half)
