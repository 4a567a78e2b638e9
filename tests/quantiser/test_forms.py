"""quantize.source.forms, found, resolve, scheme: every form of a weight is read exactly, hostile ones are refused."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import checkpoints as make
from support import stored as forms

import cext
import quantize
from quantize import Options
from quantize.base.errors import CheckpointError, QuantizeError, UnsupportedError
from quantize.source import scheme, tensors
from quantize.source.arch import parse
from quantize.source.checkpoint import Checkpoint
from quantize.source.forms import E4M3_VALUES, bf16_to_f32, f32_to_bf16, nearest_e4m3
from quantize.source.stored import Files, StoredTensor

F32 = Options(type="f32", threads=1, evaluate=False)
CONFIG = {**make.V2, "num_hidden_layers": 2, "q_lora_rank": 64}
EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


def read_back(folder: Path, exact: dict[str, np.ndarray]) -> None:
    """Every weight in float32, by rows, and by way of the engine's copy, bit for bit."""
    with Checkpoint(folder) as checkpoint:
        for name, values in exact.items():
            np.testing.assert_array_equal(checkpoint.read_f32(name), values, err_msg=name)
            half = np.empty(values.shape, checkpoint.half_dtype(name))
            restore = checkpoint.read_half(name, half)
            np.testing.assert_array_equal(restore(half), values, err_msg=name)
            if half.dtype == np.uint16:
                np.testing.assert_array_equal(half, make.bf16_bits(values), err_msg=name)
            if values.ndim == 2:
                np.testing.assert_array_equal(checkpoint.read_rows(name, 3, 7), values[3:7], err_msg=name)


@pytest.mark.parametrize("form", forms.CONFIGS)
def test_a_form_is_read_exactly_and_quantised(tmp_path: Path, form: str) -> None:
    exact = forms.write(tmp_path / "hf", CONFIG, form)
    read_back(tmp_path / "hf", exact)
    report = quantize.quantize(tmp_path / "hf", tmp_path / "m.gguf", F32)
    arch = parse(CONFIG)
    with cext.Gguf(tmp_path / "m.gguf") as file:
        for tensor in tensors.model_tensors(arch):
            if tensor.form is tensors.Form.STACK:
                expected = np.stack([exact[source] for source in tensor.sources])
                np.testing.assert_array_equal(file.read(tensor.name), expected, err_msg=tensor.name)
    assert any("scales of activations left out" in note for note in report.notes) == (form == "fp8 tensor")


def test_all_roundings_tell_their_codes() -> None:
    """Of every fp8 code and of every int4 step, at scales of every size."""
    codes = E4M3_VALUES[np.isfinite(E4M3_VALUES)]
    for exponent in range(-99, 100, 3):
        for mantissa in (1.0, 1.0078125, 1.3, 1.77, 1.9999999):
            scale = np.float32(mantissa * 2.0**exponent)
            for values, nearest in ((codes, nearest_e4m3), (np.arange(-15, 16, dtype=np.float32), np.rint)):
                rounded = bf16_to_f32(f32_to_bf16(values * scale))
                np.testing.assert_array_equal(nearest(rounded / scale), values, err_msg=f"{scale}")


@pytest.mark.parametrize("scale", [1e-37, 3e-31, 1e33])
def test_scales_beyond_rounding_are_read_again(tmp_path: Path, scale: float) -> None:
    """bfloat16 loses codes where products are tiny; the exact weight is still what is encoded."""
    codes = np.arange(64 * 32, dtype=np.uint8).reshape(64, 32) & 0x7E
    config = {"quantization_config": forms.FP8_TENSOR}
    (tmp_path / "config.json").write_text(json.dumps(config))
    stored = {"w": ("F8_E4M3", codes), "w_scale_inv": ("F32", np.array(scale, np.float32))}
    make.write_safetensors(tmp_path / "model.safetensors", stored)
    with Checkpoint(tmp_path) as checkpoint:
        half = np.empty((64, 32), np.uint16)
        restore = checkpoint.read_half("w", half)
        np.testing.assert_array_equal(restore(half), E4M3_VALUES[codes] * np.float32(scale))


# Stacks.


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_stacked_experts_give_the_same_file(tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And each is read alone."""
    exact = make.write_checkpoint(tmp_path / "one", CONFIG, dtype=dtype)
    make.write_checkpoint(tmp_path / "hf", CONFIG, dtype=dtype)
    forms.finish(tmp_path / "hf", CONFIG, forms.plain(forms.stacked(exact, CONFIG), dtype))
    most: Counter[str] = Counter()
    read = Files.read_into

    def watching(self: Files, tensor: StoredTensor, out: Any) -> None:
        most[tensor.name] = max(most[tensor.name], out.nbytes)
        read(self, tensor, out)

    options = Options(type="q4_k_m", threads=1, calibration=(make.write_text(tmp_path / "t.txt", 1300),))
    one = quantize.quantize(tmp_path / "one", tmp_path / "one.gguf", options)
    monkeypatch.setattr(Files, "read_into", watching)
    quantize.quantize(tmp_path / "hf", tmp_path / "hf.gguf", options)
    same_tensors(tmp_path / "one.gguf", tmp_path / "hf.gguf")
    size = 4 if dtype == "F32" else 2
    stacks = {name: n for name, n in most.items() if ".experts." in name}
    assert set(stacks.values()) == {32 * 64 * size}
    assert one.calibration_tokens


def same_tensors(a: Path, b: Path) -> None:
    with cext.Gguf(a) as one, cext.Gguf(b) as other:
        assert [t[:4] for t in one.tensors] == [t[:4] for t in other.tensors]
        for tensor in one.tensors:
            np.testing.assert_array_equal(one.raw(tensor.name), other.raw(tensor.name), err_msg=tensor.name)


@pytest.mark.oracle
def test_stacks_are_transformers_modules(tmp_path: Path) -> None:
    """The orientation is that of its own modules' parameters."""
    hf = pytest.importorskip("support.hf", reason="needs PyTorch and transformers", exc_type=ImportError)
    make.write_checkpoint(tmp_path / "hf", CONFIG, dtype="F32")
    model = hf.load(tmp_path / "hf", 1e-6)
    stored = {name: ("F32", value.detach().float().numpy()) for name, value in model.state_dict().items()}
    assert any(name.endswith("experts.gate_up_proj") for name in stored)
    folder = tmp_path / "own"
    make.write_checkpoint(folder, CONFIG, dtype="F32")
    make.write_safetensors(folder / "model.safetensors", stored)
    quantize.quantize(folder, tmp_path / "m.gguf", F32)
    ids = np.random.default_rng(2).integers(0, CONFIG["vocab_size"], 40)
    expected = hf.logits(model, ids)
    with cext.Model(tmp_path / "m.gguf", threads=1) as engine:
        got = engine.session(40, kv_type="f32").eval(ids, "all")
    assert np.abs(got - expected).max() < 2e-5 * np.ptp(expected)


@pytest.mark.parametrize(
    ("shape", "scales"),
    [((8, 64, 64), (8, 2, 1)), ((8, 64, 64), (8, 1, 1)), ((8, 64, 64), (8,)), ((8, 64, 64), (8, 64, 1))],
)
def test_stacks_in_fp8(tmp_path: Path, shape: tuple[int, ...], scales: tuple[int, ...]) -> None:
    """Scales of a half, of an expert, or of a row, as transformers' FP8Experts and compressed-tensors keep them."""
    rng = np.random.default_rng(4)
    codes = rng.integers(0, 0x7F, shape, np.uint8)
    scale = rng.uniform(0.5, 2, scales).astype(np.float32)
    form = "fp8 channel" if scales[-2:] == (64, 1) else "fp8 tensor"
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": forms.CONFIGS[form]}))
    name = "model.layers.1.mlp.experts"
    stored = {f"{name}.gate_up_proj": ("F8_E4M3", codes), f"{name}.gate_up_proj_scale_inv": ("F32", scale)}
    make.write_safetensors(tmp_path / "model.safetensors", stored)
    full = scale.reshape(8, -1, 1).repeat(64 // max(1, scale[0].size), 1)
    expected = E4M3_VALUES[codes] * full
    with Checkpoint(tmp_path) as checkpoint:
        for i in range(8):
            for half, kind in enumerate(("gate", "up")):
                weight = f"{name}.{i}.{kind}_proj.weight"
                checkpoint.verify(weight, (32, 64), 8)
                np.testing.assert_array_equal(checkpoint.read_f32(weight), expected[i, half * 32 : half * 32 + 32])


def test_blocks_across_gate_and_up(tmp_path: Path) -> None:
    """Blocks of 48 rows over 2 x 32: three rows of scales, the second of which both have a part of; or two for each."""
    codes = np.full((2, 64, 16), 0x38, np.uint8)  # 1.0
    config = {"quant_method": "fp8", "weight_block_size": [48, 8]}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    scale = np.arange(1, 9, dtype=np.float32).reshape(2, 2, 2)
    name = "m.experts"
    stored = {f"{name}.gate_up_proj": ("F8_E4M3", codes), f"{name}.gate_up_proj_scale_inv": ("F32", scale)}
    make.write_safetensors(tmp_path / "model.safetensors", stored)
    with Checkpoint(tmp_path) as checkpoint:
        up = checkpoint.read_f32(f"{name}.1.up_proj.weight")
    # 2 rows of scales are also ceil(32 / 48) for each half: each half has its own, as transformers makes them.
    np.testing.assert_array_equal(up, np.repeat(scale[1, 1:], 8, 1).repeat(32, 0))


STACK_FAULTS: dict[str, Callable[[dict[str, tuple[str, np.ndarray]]], object]] = {
    "another number of experts": lambda s: s.update({GATE_UP: ("BF16", np.zeros((7, 64, 64), np.uint16))}),
    "more experts": lambda s: s.update({GATE_UP: ("BF16", np.zeros((9, 64, 64), np.uint16))}),
    "transposed": lambda s: s.update({DOWN: ("BF16", np.zeros((8, 32, 64), np.uint16))}),
    "odd rows": lambda s: s.update({GATE_UP: ("BF16", np.zeros((8, 63, 64), np.uint16))}),
    "a matrix": lambda s: s.update({GATE_UP: ("BF16", np.zeros((8, 64), np.uint16))}),
    "a number": lambda s: s.update({GATE_UP: ("BF16", np.zeros((), np.uint16))}),
    "none": lambda s: s.update({GATE_UP: ("BF16", np.zeros((0, 64, 64), np.uint16))}),
    "not there": lambda s: s.pop(DOWN),
}
GATE_UP, DOWN = (f"model.layers.1.mlp.experts.{name}_proj" for name in ("gate_up", "down"))


@pytest.mark.parametrize("fault", STACK_FAULTS)
def test_hostile_stacks_are_refused(tmp_path: Path, fault: str) -> None:
    exact = make.write_checkpoint(tmp_path / "hf", CONFIG)
    stored = forms.plain(forms.stacked(exact, CONFIG), "BF16")
    STACK_FAULTS[fault](stored)
    forms.finish(tmp_path / "hf", CONFIG, stored)
    refused(tmp_path, "experts")


# Hostile forms.


def refused(tmp_path: Path, *words: str) -> QuantizeError:
    with pytest.raises((CheckpointError, UnsupportedError)) as error:
        quantize.quantize(tmp_path / "hf", tmp_path / "m.gguf", F32)
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message
    assert not (tmp_path / "m.gguf").exists()
    return error.value


Change = Callable[[dict[str, tuple[str, np.ndarray]]], object]


def put(name: str, dtype: str, array: np.ndarray) -> Change:
    return lambda stored: stored.update({name: (dtype, array)})


def value(name: str, at: tuple[int, ...], bits: int) -> Change:
    """One stored value."""

    def change(stored: dict[str, tuple[str, np.ndarray]]) -> None:
        dtype, array = stored[name]
        array = array.copy()
        array[at] = bits
        stored[name] = (dtype, array)

    return change


def drop(name: str) -> Change:
    return lambda stored: stored.pop(name)


W = EXPERT
HOSTILE: dict[str, tuple[str, Change, tuple[str, ...]]] = {
    "no scales": ("int4", drop(f"{W}_scale"), (f"{W}_packed", "no scales")),
    "no shape": ("int4", drop(f"{W}_shape"), (f"{W}_packed", f"{W}_shape")),
    "a lying shape": ("int4", put(f"{W}_shape", "I64", np.array([32, 72])), (f"{W}_shape", "(32, 72)")),
    "a negative shape": ("int4", put(f"{W}_shape", "I64", np.array([-32, 64])), (f"{W}_shape",)),
    "a shape of three": ("int4", put(f"{W}_shape", "I64", np.array([32, 64, 1])), (f"{W}_shape",)),
    "a shape of floats": ("int4", put(f"{W}_shape", "F32", np.zeros(2, np.float32)), (f"{W}_shape", "F32")),
    "narrow words": ("int4", put(f"{W}_packed", "I32", np.zeros((32, 7), np.int32)), (f"{W}_packed", "8 words")),
    "wide words": ("int4", put(f"{W}_packed", "I32", np.zeros((32, 9), np.int32)), (f"{W}_packed", "8 words")),
    "few rows": ("int4", put(f"{W}_packed", "I32", np.zeros((31, 8), np.int32)), (f"{W}_packed",)),
    "one dimension": ("int4", put(f"{W}_packed", "I32", np.zeros(256, np.int32)), (f"{W}_packed", "matrix")),
    "words of 64 bits": ("int4", put(f"{W}_packed", "I64", np.zeros((32, 8), np.int64)), (f"{W}_packed", "I64")),
    "scales of another group": ("int4", put(f"{W}_scale", "BF16", np.ones((32, 1), np.uint16)), ("groups of 32",)),
    "scales in integers": ("int4", put(f"{W}_scale", "I16", np.ones((32, 2), np.int16)), (f"{W}_scale", "I16")),
    "a NaN scale": ("int4", value(f"{W}_scale", (5, 1), 0x7FC0), (f"{W}_scale", "(5, 1)", "nan")),
    "an infinite scale": ("int4", value(f"{W}_scale", (0, 0), 0x7F80), (f"{W}_scale", "inf")),
    "a zero scale": ("int4", value(f"{W}_scale", (31, 0), 0), (f"{W}_scale", "(31, 0)")),
    "a negative scale": ("int4", value(f"{W}_scale", (1, 1), 0xBF80), (f"{W}_scale", "-1")),
    "an order of columns": ("int4", put(f"{W}_g_idx", "I32", np.zeros(64, np.int32)), (f"{W}_g_idx",)),
    "zero points nobody told of": (
        "int4",
        put(f"{W}_zero_point", "I32", np.zeros((4, 2), np.int32)),
        (f"{W}_zero_point", "no zero points"),
    ),
    "no zero points": ("int4 asymmetric", drop(f"{W}_zero_point"), (f"{W}_packed", "zero points")),
    "zero points unpacked": (
        "int4 asymmetric",
        put(f"{W}_zero_point", "I8", np.zeros((32, 2), np.int8)),
        (f"{W}_zero_point", "(4, 2)"),
    ),
    "both": ("int4", put(W, "BF16", np.zeros((32, 64), np.uint16)), (W, "has scales")),
    "an fp8 NaN scale": ("fp8 channel", value(f"{W}_scale", (5, 0), 0x7FC0), (f"{W}_scale", "nan")),
    "an fp8 zero scale": ("fp8 tensor", put(f"{W}_scale_inv", "BF16", np.zeros((), np.uint16)), (f"{W}_scale_inv",)),
    "no fp8 scale": ("fp8 tensor", drop(f"{W}_scale_inv"), (W, "no scales")),
    "an fp8 scale a row in a model of one a tensor": (
        "fp8 tensor",
        put(f"{W}_scale_inv", "F32", np.ones((32, 1), np.float32)),
        (f"{W}_scale_inv", "one for all"),
    ),
    "an fp8 scale a column": (
        "fp8 channel",
        put(f"{W}_scale", "F32", np.ones((1, 64), np.float32)),
        (f"{W}_scale", "one a row"),
    ),
    "an fp8 NaN": ("fp8 channel", value(W, (2, 7), 0x7F), (W, "(2, 7)")),
    "fp8 of another shape": ("fp8 tensor", put(W, "F8_E4M3", np.zeros((32, 63), np.uint8)), (W, "(32, 63)")),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_forms_are_refused_by_name(tmp_path: Path, case: str) -> None:
    form, change, words = HOSTILE[case]
    exact = make.write_checkpoint(tmp_path / "hf", CONFIG)
    stored = forms.plain(exact, "BF16")
    for name in [n for n in exact if ".mlp.experts." in n]:
        del stored[name]
        stored |= forms.in_form(form, name, exact[name])[0]
    change(stored)
    forms.finish(tmp_path / "hf", {**CONFIG, "quantization_config": forms.CONFIGS[form]}, stored)
    refused(tmp_path, *words)


SCHEMES: dict[str, tuple[dict[str, Any], str]] = {
    "three bits": (forms.scheme(num_bits=3), "num_bits 3"),
    "bits that are text": (forms.scheme(num_bits="4"), "num_bits '4'"),
    "a list of bits": (forms.scheme(num_bits=[4]), "num_bits"),
    "fp4": (forms.scheme(type="float", num_bits=4), "4 bits"),
    "a group of nothing": (forms.scheme(group_size=0), "group_size 0"),
    "a negative group": (forms.scheme(group_size=-3), "group_size -3"),
    "an unknown strategy": (forms.scheme(strategy="tensor_group"), "tensor_group"),
    "columns out of order": (forms.scheme(actorder="group"), "actorder"),
    "no groups": ({**forms.scheme(), "config_groups": {}}, "no config_groups"),
    "groups in a list": ({**forms.scheme(), "config_groups": [1]}, "no config_groups"),
    "a group of text": ({**forms.scheme(), "config_groups": {"a": "b"}}, "no config_groups"),
    "weights of text": ({**forms.scheme(), "config_groups": {"a": {"weights": "b"}}}, "expected an object"),
    "nvfp4": ({**forms.scheme(), "format": "nvfp4-pack-quantized"}, "nvfp4"),
    "rotated": ({**forms.scheme(), "transform_config": {"config_groups": {"R1": {}}}}, "rotated"),
    "sparse": ({**forms.scheme(), "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse"),
    "gptq": ({"quant_method": "gptq", "bits": 4}, "gptq"),
    "awq": ({"quant_method": "awq"}, "awq"),
    "text": ("fp8", "fp8"),  # type: ignore[dict-item]
    "e5m2": ({"quant_method": "fp8", "fmt": "e5m2"}, "fp8"),
    "a block of one": ({"quant_method": "fp8", "weight_block_size": [128]}, "weight_block_size"),
    "a block of zero": ({"quant_method": "fp8", "weight_block_size": [0, 128]}, "weight_block_size"),
}


@pytest.mark.parametrize("case", SCHEMES)
def test_schemes_that_are_not_read_are_refused(case: str) -> None:
    said, word = SCHEMES[case]
    for config in ({"quantization_config": said}, {"text_config": {"quantization_config": said}}):
        with pytest.raises((CheckpointError, UnsupportedError)) as error:
            scheme.read(Path("hf"), config)
        assert word in str(error.value) and "\n" not in str(error.value)


def test_groups_that_do_not_divide_a_row(tmp_path: Path) -> None:
    forms.write(tmp_path / "hf", CONFIG, "int4", only=W)
    edited = json.loads((tmp_path / "hf" / "config.json").read_text())
    edited["quantization_config"] = forms.scheme(group_size=48)
    (tmp_path / "hf" / "config.json").write_text(json.dumps(edited))
    refused(tmp_path, f"{W}_scale", "groups of 48 do not divide")


def test_packed_weights_that_nobody_told_of(tmp_path: Path) -> None:
    forms.write(tmp_path / "hf", CONFIG, "int4", only=W)
    edited = json.loads((tmp_path / "hf" / "config.json").read_text())
    del edited["quantization_config"]
    (tmp_path / "hf" / "config.json").write_text(json.dumps(edited))
    refused(tmp_path, f"{W}_packed", "says nothing of such")
