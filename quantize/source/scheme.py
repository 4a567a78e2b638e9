"""scheme.py: what config.json's quantization_config says of weights that are stored quantised, checked.

Read: fp8 e4m3 as DeepSeek-V3 has it (quant_method fp8: scales of blocks, or of whole tensors) and compressed-tensors'
float-quantized and pack-quantized. What a tensor's own shapes say must be what is said here; the rest is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantize.base.errors import CheckpointError, UnsupportedError
from quantize.source.families import TEXT_CONFIG

START_HINT = "start from the bf16, f16, f32, fp8 e4m3 or int4 checkpoint of the model"
V3_BLOCK = (128, 128)
MAX_BLOCK = 1 << 16
COMPRESSED = "compressed-tensors"
KEYS = ("quantization_config", "compression_config")
FORMATS = ("pack-quantized", "float-quantized", "naive-quantized", "mixed-precision", "dense")
PACKED_BITS = {4: "int4", 8: "int8"}  # the form of weights packed so


@dataclass(frozen=True)
class Kind:
    """How some weights of a checkpoint are stored: a form, and which of its values share a scale."""

    form: str  # a key of forms.FORMS
    share: str  # "tensor", "channel" (a row), "block" or "group" (of a row's columns)
    block: tuple[int, int] = (0, 0)  # of "block" and "group"
    has_zero: bool = False  # whether a zero point is subtracted from codes


DEFAULT = (Kind("F8_E4M3", "block", V3_BLOCK),)


def read(folder: Path, config: Mapping[str, Any]) -> tuple[Kind, ...]:
    """The kinds that a checkpoint's weights may have beside plain ones. CheckpointError, UnsupportedError."""
    inner = config.get(TEXT_CONFIG)
    places = (config, inner if isinstance(inner, dict) else {})
    said = next((place[key] for place in places for key in KEYS if place.get(key) is not None), None)
    if said is None:
        return DEFAULT
    method = said.get("quant_method") if isinstance(said, dict) else said
    if isinstance(said, dict) and method == COMPRESSED:
        return _compressed(folder, said)
    if not isinstance(said, dict) or method != "fp8" or said.get("fmt", "e4m3") != "e4m3":
        raise UnsupportedError(f"`{folder}`: the weights are already quantised ({method!r})", START_HINT)
    block = said.get("weight_block_size", list(V3_BLOCK))
    if block is None:
        return (Kind("F8_E4M3", "tensor"),)
    return (Kind("F8_E4M3", "block", _pair(folder, "weight_block_size", block)),)


def _pair(folder: Path, key: str, value: object) -> tuple[int, int]:
    if not isinstance(value, list) or len(value) != 2 or not all(_is_size(n) for n in value):
        raise CheckpointError(f"`{folder / 'config.json'}`: {key} {value!r} is not a pair of sizes")
    return (value[0], value[1])


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MAX_BLOCK


def _compressed(folder: Path, said: Mapping[str, Any]) -> tuple[Kind, ...]:
    groups = said.get("config_groups")
    if not isinstance(groups, dict) or not groups or not all(isinstance(g, dict) for g in groups.values()):
        raise CheckpointError(f"`{folder / 'config.json'}`: quantization_config has no config_groups")
    for format_ in (said.get("format"), *(group.get("format") for group in groups.values())):
        if format_ is not None and format_ not in FORMATS:
            raise UnsupportedError(f"`{folder}`: the weights are stored in {COMPRESSED}' {format_!r}", START_HINT)
    transforms = said.get("transform_config")
    if isinstance(transforms, dict) and transforms.get("config_groups"):
        raise UnsupportedError(f"`{folder}`: its weights are rotated (transform_config)", START_HINT)
    sparsity = said.get("sparsity_config")
    if isinstance(sparsity, dict) and sparsity.get("format", "dense") != "dense":
        raise UnsupportedError(f"`{folder}`: its weights are stored sparse ({sparsity['format']!r})", START_HINT)
    weights = [(name, group["weights"]) for name, group in groups.items() if group.get("weights") is not None]
    return tuple(_group(folder, f"config_groups.{name}.weights", args) for name, args in weights)


def _group(folder: Path, key: str, args: Any) -> Kind:
    """One of compressed-tensors' groups of modules."""

    def refused(what: str) -> UnsupportedError:
        return UnsupportedError(f"`{folder / 'config.json'}`: {key}: {what} is not read", START_HINT)

    if not isinstance(args, dict):
        raise CheckpointError(f"`{folder / 'config.json'}`: {key} is {args!r}, expected an object")
    bits, type_, strategy = args.get("num_bits", 8), args.get("type", "int"), args.get("strategy")
    symmetric = args.get("symmetric", True)
    if type_ == "float":
        if bits != 8 or not symmetric:
            raise refused(f"a float of {bits!r} bits" if bits != 8 else "fp8 with zero points")
        form = "F8_E4M3"
    elif type_ == "int" and isinstance(bits, int) and bits in PACKED_BITS:
        form = PACKED_BITS[bits]
    else:
        raise refused(f"num_bits {bits!r} of type {type_!r}")
    if args.get("actorder") in ("group", True):
        raise refused("actorder 'group', which takes columns out of their order,")
    if strategy is None:
        size = args.get("group_size")
        strategy = "tensor" if size is None else "channel" if size == -1 else "group"
    if strategy == "tensor" and not symmetric:
        raise refused("one zero point for a whole tensor")
    match strategy:
        case "tensor" | "channel":
            return Kind(form, strategy, has_zero=not symmetric)
        case "group" if _is_size(args.get("group_size")):
            return Kind(form, "group", (1, args["group_size"]), has_zero=not symmetric)
        case "block" if form == "F8_E4M3":
            block = args.get("block_structure")
            if isinstance(block, str) and re.fullmatch(r"\d{1,5}x\d{1,5}", block):  # older versions' "128x128"
                block = [int(n) for n in block.split("x")]
            return Kind(form, "block", _pair(folder, f"{key}.block_structure", block))
    raise refused(f"strategy {strategy!r} with group_size {args.get('group_size')!r}")
