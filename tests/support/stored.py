"""Writes the tensors of a checkpoint in the forms that are published: packed integers, fp8 with other scales, stacks.

From the formats' definitions, with numpy alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from support import checkpoints as make

Stored = dict[str, tuple[str, np.ndarray]]
GROUP = 32


def packed(codes: np.ndarray, bits: int = 4) -> np.ndarray:
    """(rows, n) signed codes -> (rows, words) int32: lowest bits first, offset by half the range, rows padded."""
    per_word = 32 // bits
    unsigned = (codes.astype(np.int64) + (1 << (bits - 1))).astype(np.uint64)
    padded = np.pad(unsigned, ((0, 0), (0, -codes.shape[1] % per_word)))
    words = np.zeros((len(codes), padded.shape[1] // per_word), np.uint64)
    for i in range(per_word):
        words |= padded[:, i::per_word] << np.uint64(bits * i)
    return words.astype(np.uint32).view(np.int32)


def int_codes(values: np.ndarray, group: int, bits: int, zero: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(codes, scales in bf16 bits (rows, groups), zero points (rows, groups)), nearest."""
    top = 1 << (bits - 1)
    parts = values.reshape(len(values), -1, group)
    if zero:
        low, high = np.minimum(parts.min(-1), 0), np.maximum(parts.max(-1), 0)
        bits16 = make.bf16_bits((high - low) / (2 * top - 1) + 1e-6)
        scale = make.bf16_values(bits16)
        zeros = np.clip(np.round(-top - low / scale), -top, top - 1)
    else:
        bits16 = make.bf16_bits(np.abs(parts).max(-1) / (top - 0.5) + 1e-6)
        scale, zeros = make.bf16_values(bits16), np.zeros(bits16.shape, np.float32)
    codes = np.clip(np.round(parts / scale[..., None]) + zeros[..., None], -top, top - 1)
    return codes.reshape(values.shape).astype(np.int8), bits16, zeros.astype(np.int8)


def to_int(
    name: str, values: np.ndarray, group: int = GROUP, bits: int = 4, zero: bool = False
) -> tuple[Stored, np.ndarray]:
    """compressed-tensors' pack-quantized, and the exact values that it stands for."""
    codes, scale, zeros = int_codes(values, group, bits, zero)
    stored: Stored = {
        f"{name}_packed": ("I32", packed(codes, bits)),
        f"{name}_scale": ("BF16", scale),
        f"{name}_shape": ("I64", np.array(values.shape, np.int64)),
    }
    if zero:
        stored[f"{name}_zero_point"] = ("I32", np.ascontiguousarray(packed(zeros.T, bits).T))
    steps = codes.astype(np.float32) - np.repeat(zeros.astype(np.float32), group, 1)
    return stored, steps * np.repeat(make.bf16_values(scale), group, 1)


def to_fp8(name: str, values: np.ndarray, kind: str) -> tuple[Stored, np.ndarray]:
    """fp8 e4m3 with scales of a kind: "tensor" (Mistral's), "tensor 1" and "channel" (compressed-tensors')."""
    table = np.array([make.e4m3_value(code) for code in range(256)], np.float32)
    most = np.abs(values).max(1, keepdims=True) if kind == "channel" else np.abs(values).max()
    scale = make.bf16_values(make.bf16_bits(np.asarray(most / 440, np.float32)))
    order = np.argsort(table[:127])
    middle = (table[:127][order][1:] + table[:127][order][:-1]) / 2
    x = values / scale
    codes = (order[np.searchsorted(middle, np.abs(x))] | np.where(x < 0, 0x80, 0)).astype(np.uint8)
    suffix = "_scale_inv" if kind == "tensor" else "_scale"
    shape = () if kind == "tensor" else (1,) if kind == "tensor 1" else (len(values), 1)
    stored: Stored = {name: ("F8_E4M3", codes), name + suffix: ("BF16", make.bf16_bits(scale).reshape(shape))}
    return stored, table[codes] * scale


def scheme(**weights: Any) -> dict[str, Any]:
    """compressed-tensors' quantization_config of one group."""
    is_int = weights.get("type", "int") == "int"
    args = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP, "symmetric": True} | weights
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized" if is_int else "float-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": args, "input_activations": None}},
        "ignore": ["lm_head", "re:.*self_attn.*"],
        "quantization_status": "compressed",
    }


FP8_TENSOR = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "static", "weight_block_size": None}
CONFIGS: dict[str, dict[str, Any]] = {
    "int4": scheme(),
    "int4 asymmetric": scheme(symmetric=False),
    "int8": scheme(num_bits=8),
    "int4 channel": scheme(strategy="channel", group_size=None),
    "fp8 tensor": FP8_TENSOR,
    "fp8 tensor 1": scheme(type="float", num_bits=8, strategy="tensor", group_size=None),
    "fp8 channel": scheme(type="float", num_bits=8, strategy="channel", group_size=None),
}


def in_form(form: str, name: str, values: np.ndarray) -> tuple[Stored, np.ndarray]:
    """A projection in one of CONFIGS' forms, and the exact values."""
    match form:
        case "int4":
            return to_int(name, values)
        case "int4 asymmetric":
            return to_int(name, values, zero=True)
        case "int8":
            return to_int(name, values, bits=8)
        case "int4 channel":
            return to_int(name, values, group=values.shape[1])
    stored, exact = to_fp8(name, values, form.removeprefix("fp8 "))
    if form == "fp8 tensor":
        stored[name.removesuffix("weight") + "activation_scale"] = (
            "BF16",
            make.bf16_bits(np.float32(0.02)).reshape(()),
        )
    return stored, exact


def write(
    folder: Path, config: dict[str, Any], form: str, only: str = "proj.weight", dtype: str = "BF16"
) -> dict[str, np.ndarray]:
    """A checkpoint whose tensors with names that end in only are in a form of CONFIGS; returns the exact values."""
    exact = make.write_checkpoint(folder, config, dtype=dtype)
    stored = plain(exact, dtype)
    for name in [n for n in exact if n.endswith(only)]:
        del stored[name]
        made, exact[name] = in_form(form, name, exact[name])
        stored |= made
    finish(folder, {**config, "quantization_config": CONFIGS[form]}, stored)
    return exact


def plain(exact: dict[str, np.ndarray], dtype: str) -> Stored:
    """Tensors as write_checkpoint stored them."""
    if dtype == "BF16":
        return {name: ("BF16", make.bf16_bits(values)) for name, values in exact.items()}
    return {name: ("F32", values) for name, values in exact.items()}


def finish(folder: Path, config: dict[str, Any], stored: Stored) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    make.write_safetensors(folder / "model.safetensors", stored)


def stacked(exact: dict[str, np.ndarray], config: dict[str, Any]) -> dict[str, np.ndarray]:
    """Experts as transformers 5's modules hold them: gate_up_proj (E, 2 I, H) and down_proj (E, H, I)."""
    out = {name: values for name, values in exact.items() if ".mlp.experts." not in name}
    n_expert = config["n_routed_experts"]
    for prefix in sorted({name.split(".experts.")[0] for name in exact if ".mlp.experts." in name}):
        parts = {
            kind: np.stack([exact[f"{prefix}.experts.{i}.{kind}_proj.weight"] for i in range(n_expert)])
            for kind in ("gate", "up", "down")
        }
        out[f"{prefix}.experts.gate_up_proj"] = np.concatenate([parts["gate"], parts["up"]], 1)
        out[f"{prefix}.experts.down_proj"] = parts["down"]
    return out
