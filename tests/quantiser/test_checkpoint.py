"""quantize.source.safetensors and checkpoint: what a good checkpoint reads as, and how bad ones are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support import checkpoints as make

from quantize.base.errors import CheckpointError, UnsupportedError
from quantize.source.checkpoint import Checkpoint
from quantize.source.forms import E4M3_VALUES, bf16_to_f32, f32_to_bf16
from quantize.source.safetensors import MAX_HEADER_BYTES, read_header


def raw_file(path: Path, header: object, data: bytes = b"", n_header: int | None = None) -> Path:
    """A safetensors file from a header that may be anything."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if n_header is None else n_header).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: str, shape: list[object], span: list[object]) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": span}


def test_header_reads_back(tmp_path: Path) -> None:
    a, b = np.arange(6, dtype=np.float32).reshape(2, 3), np.arange(4, dtype=np.float16)
    make.write_safetensors(tmp_path / "m.safetensors", {"a": ("F32", a), "b": ("F16", b), "e": ("F32", a[:0])})
    tensors = read_header(tmp_path / "m.safetensors")
    assert {n: (t.dtype, t.shape, t.nbytes) for n, t in tensors.items()} == {
        "a": ("F32", (2, 3), 24),
        "b": ("F16", (4,), 8),
        "e": ("F32", (0, 3), 0),
    }
    data = (tmp_path / "m.safetensors").read_bytes()
    assert data[tensors["b"].offset :][:8] == b.tobytes()


HOSTILE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "empty": (lambda p: raw_file(p, b"", n_header=0), "not JSON"),
    "seven bytes": (lambda p: p.write_bytes(b"1234567") and p, "too short"),
    "header past the end": (lambda p: raw_file(p, {}, n_header=100), "runs past the end"),
    "header length 2**64-1": (lambda p: raw_file(p, {}, n_header=2**64 - 1), "limit"),
    "header over the limit": (lambda p: raw_file(p, {}, n_header=MAX_HEADER_BYTES + 1), "limit"),
    "not utf-8": (lambda p: raw_file(p, b"\xff\xfe{}"), "not JSON"),
    "deep nesting": (lambda p: raw_file(p, b"[" * 100_000), "not JSON"),
    "a list": (lambda p: raw_file(p, [1]), "expected an object"),
    "an entry that is a list": (lambda p: raw_file(p, {"t": []}), "not an object"),
    "dtype of no name": (lambda p: raw_file(p, {"t": entry("f 7", [1], [0, 4])}, b"1234"), "not the name of one"),
    "dtype of another type": (lambda p: raw_file(p, {"t": entry({}, [1], [0, 4])}, b"1234"), "not the name of one"),  # type: ignore[arg-type]
    "negative dim": (lambda p: raw_file(p, {"t": entry("F32", [-1], [0, 4])}, b"1234"), "shape"),
    "boolean dim": (lambda p: raw_file(p, {"t": entry("F32", [True], [0, 4])}, b"1234"), "shape"),
    "float dim": (lambda p: raw_file(p, {"t": entry("F32", [1.0], [0, 4])}, b"1234"), "shape"),
    "nine dims": (lambda p: raw_file(p, {"t": entry("F32", [1] * 9, [0, 4])}, b"1234"), "shape"),
    "overflowing shape": (lambda p: raw_file(p, {"t": entry("F32", [2**62, 4], [0, 0])}), "takes"),
    "one offset": (lambda p: raw_file(p, {"t": entry("F32", [1], [0])}, b"1234"), "pair"),
    "negative offset": (lambda p: raw_file(p, {"t": entry("F32", [1], [-4, 0])}, b"1234"), "pair"),
    "backward offsets": (lambda p: raw_file(p, {"t": entry("F32", [0], [4, 0])}, b"1234"), "outside"),
    "offsets past the end": (lambda p: raw_file(p, {"t": entry("F32", [2], [0, 8])}, b"1234"), "truncated"),
    "size and shape disagree": (lambda p: raw_file(p, {"t": entry("F32", [2], [0, 4])}, b"1234"), "takes 8 bytes"),
    "overlap": (
        lambda p: raw_file(p, {"a": entry("F32", [2], [0, 8]), "b": entry("F32", [2], [4, 12])}, bytes(12)),
        "`b` overlaps `a`",
    ),
    "hole": (
        lambda p: raw_file(p, {"a": entry("F32", [1], [0, 4]), "b": entry("F32", [1], [8, 12])}, bytes(12)),
        "belong to no tensor",
    ),
    "trailing bytes": (lambda p: raw_file(p, {"a": entry("F32", [1], [0, 4])}, bytes(5)), "belong to no tensor"),
    "duplicate name": (
        lambda p: raw_file(p, b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{}}', bytes(4)),
        "`a` appears twice",
    ),
    "a folder": (lambda p: p.mkdir() or p, "directory"),  # type: ignore[func-returns-value]
    "missing": (lambda p: p, "No such file"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_header(tmp_path: Path, case: str) -> None:
    build, expected = HOSTILE[case]
    path = build(tmp_path / "bad.safetensors")
    with pytest.raises(CheckpointError) as error:
        read_header(path)
    message = str(error.value)
    assert expected.lower() in message.lower()
    assert "bad.safetensors" in message and "\n" not in message


@pytest.mark.parametrize("cut", [1, 7, 100])
def test_every_truncation_is_refused(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "m.safetensors"
    make.write_safetensors(path, {"a": ("F32", np.ones((4, 8), np.float32))})
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(CheckpointError, match="truncated"):
        read_header(path)


def test_bf16_agrees_with_integer_rounding() -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal(10_000).astype(np.float32) * np.float32(10.0) ** rng.integers(-30, 30, 10_000)
    edges = np.array([0.0, -0.0, 1.0, 3.3895e38, -3.4e38, np.inf, 1e-45], np.float32)
    values = np.concatenate([values.astype(np.float32), edges])
    finite = np.isfinite(values)
    np.testing.assert_array_equal(f32_to_bf16(values[finite]), make.bf16_bits(values[finite]))
    assert np.isnan(bf16_to_f32(f32_to_bf16(np.array([np.nan], np.float32))))[0]
    bits = np.arange(65536, dtype=np.uint16)
    back = f32_to_bf16(bf16_to_f32(bits))
    exact = ~np.isnan(bf16_to_f32(bits))
    np.testing.assert_array_equal(back[exact], bits[exact])


def test_e4m3_table() -> None:
    expected = np.array([make.e4m3_value(code) for code in range(256)], np.float32)
    np.testing.assert_array_equal(E4M3_VALUES, expected)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "F8_E4M3"])
@pytest.mark.parametrize("n_shards", [1, 3])
def test_values(tmp_path: Path, dtype: str, n_shards: int) -> None:
    config = {**make.V3, "hidden_size": 192, "intermediate_size": 200}  # 200: fp8's last block is a tail
    exact = make.write_checkpoint(tmp_path, config, dtype=dtype, n_shards=n_shards)
    with Checkpoint(tmp_path) as checkpoint:
        assert {n for n in checkpoint.tensors if not n.endswith("_scale_inv")} == set(exact)
        for name, values in exact.items():
            np.testing.assert_array_equal(checkpoint.read_f32(name), values, err_msg=name)
            half = np.empty(values.shape, checkpoint.half_dtype(name))
            checkpoint.read_half(name, half)
            as_f32 = bf16_to_f32(half) if half.dtype == np.uint16 else half.astype(np.float32)
            if dtype == "F8_E4M3":
                np.testing.assert_array_equal(as_f32, bf16_to_f32(make.bf16_bits(values)), err_msg=name)
            else:
                np.testing.assert_array_equal(as_f32, values, err_msg=name)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "F8_E4M3"])
@pytest.mark.parametrize(("start", "stop"), [(0, 1), (0, 64), (5, 20), (63, 64), (7, 7)])
def test_rows(tmp_path: Path, dtype: str, start: int, stop: int) -> None:
    name = "model.layers.1.self_attn.o_proj.weight"
    exact = make.write_checkpoint(tmp_path, make.V3, dtype=dtype)[name]
    with Checkpoint(tmp_path) as checkpoint:
        np.testing.assert_array_equal(checkpoint.read_rows(name, start, stop), exact[start:stop])


def test_rows_name_what_is_not_finite_by_its_place_in_the_whole(tmp_path: Path) -> None:
    weights = make.random_weights(make.V2)
    weights["lm_head.weight"][30, 2] = np.nan
    make.write_checkpoint(tmp_path, make.V2, weights, dtype="F32")
    with Checkpoint(tmp_path) as checkpoint, pytest.raises(CheckpointError, match=r"lm_head.*\(30, 2\)"):
        checkpoint.read_rows("lm_head.weight", 20, 40)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "F8_E4M3"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_not_finite_is_named(tmp_path: Path, dtype: str, value: float) -> None:
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    if dtype == "F8_E4M3":
        make.write_checkpoint(tmp_path, make.V3, dtype=dtype)
        with Checkpoint(tmp_path) as checkpoint:
            stored = checkpoint.find(name)
        data = bytearray((tmp_path / "model.safetensors").read_bytes())
        data[stored.offset + 5] = 0x7F if value > 0 else 0xFF
        (tmp_path / "model.safetensors").write_bytes(data)
    else:
        weights = make.random_weights(make.V3)
        weights[name][0, 5] = value
        with np.errstate(all="ignore"):
            bits = {"F32": weights, "F16": weights, "BF16": weights}[dtype]
            make.write_checkpoint(tmp_path, make.V3, bits, dtype)
    with Checkpoint(tmp_path) as checkpoint:
        with pytest.raises(CheckpointError, match=r"experts\.2\.up_proj.*\(0, 5\)"):
            checkpoint.read_f32(name)
        with pytest.raises(CheckpointError, match=r"experts\.2\.up_proj.*\(0, 5\)"):
            checkpoint.read_half(name, np.empty(checkpoint.find(name).shape, checkpoint.half_dtype(name)))


def edit_index(folder: Path, edit: Callable[[dict[str, str]], object]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    edit(index["weight_map"])
    path.write_text(json.dumps(index))


BAD_FOLDERS: dict[str, tuple[Callable[[Path], object], type[Exception], str]] = {
    "missing shard": (
        lambda f: (f / "model-00002-of-00003.safetensors").unlink(),
        CheckpointError,
        "00002.* is missing",
    ),
    "index names another tensor": (
        lambda f: edit_index(f, lambda m: m.update({"model.extra": "model-00001-of-00003.safetensors"})),
        CheckpointError,
        "`model.extra` is missing",
    ),
    "index lacks a tensor": (lambda f: edit_index(f, lambda m: m.pop("lm_head.weight")), CheckpointError, "lm_head"),
    "index leaves the folder": (
        lambda f: edit_index(f, lambda m: m.update({"lm_head.weight": "../../etc/passwd"})),
        CheckpointError,
        "not at a file of this folder",
    ),
    "shard name is a number": (
        lambda f: edit_index(f, lambda m: m.update({"lm_head.weight": 3})),  # type: ignore[dict-item]
        CheckpointError,
        "not at a file",
    ),
    "index is not JSON": (
        lambda f: (f / "model.safetensors.index.json").write_text("{"),
        CheckpointError,
        "not valid JSON",
    ),
    "index is empty": (
        lambda f: (f / "model.safetensors.index.json").write_text("{}"),
        CheckpointError,
        "no weight_map",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), CheckpointError, "config.json"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), CheckpointError, "expected an object"),
    "config is binary": (lambda f: (f / "config.json").write_bytes(b"\xff\x00"), CheckpointError, "not valid JSON"),
    "already quantised": (
        lambda f: (f / "config.json").write_text('{"quantization_config": {"quant_method": "awq"}}'),
        UnsupportedError,
        "already quantised",
    ),
    "tensor in two shards": (
        lambda f: make.write_safetensors(
            f / "model-00001-of-00003.safetensors", {"lm_head.weight": ("F32", np.ones((2, 2), np.float32))}
        ),
        CheckpointError,
        "missing|both",
    ),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_bad_folder(tmp_path: Path, case: str) -> None:
    spoil, kind, expected = BAD_FOLDERS[case]
    make.write_checkpoint(tmp_path, make.V2, n_shards=3)
    spoil(tmp_path)
    with pytest.raises(kind, match=expected):
        Checkpoint(tmp_path)


def test_tensor_in_two_unindexed_shards(tmp_path: Path) -> None:
    make.write_checkpoint(tmp_path, make.V2)
    make.write_safetensors(tmp_path / "model-2.safetensors", {"lm_head.weight": ("F32", np.ones((2, 2), np.float32))})
    with pytest.raises(CheckpointError, match="in both"):
        Checkpoint(tmp_path)


def test_not_a_checkpoint_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        Checkpoint(tmp_path / "none")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        Checkpoint(tmp_path / "file")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="no model") as error:
        Checkpoint(tmp_path)
    assert "pytorch_model.bin" in error.value.hint


def test_file_that_shrinks_after_opening(tmp_path: Path) -> None:
    make.write_checkpoint(tmp_path, make.V2)
    shard = tmp_path / "model.safetensors"
    with Checkpoint(tmp_path) as checkpoint:
        shard.write_bytes(shard.read_bytes()[:-10])
        with pytest.raises(CheckpointError, match=r"ends inside tensor `lm_head\.weight`"):
            checkpoint.read_f32("lm_head.weight")


BAD_TENSORS: dict[str, tuple[dict[str, tuple[str, np.ndarray]], str]] = {
    "missing": ({}, "`w` is missing"),
    "another shape": ({"w": ("F32", np.zeros((256, 200), np.float32))}, "makes it"),
    "integers": ({"w": ("I8", np.zeros((200, 256), np.int8))}, "`w` is I8"),
    "fp8 e5m2": ({"w": ("F8_E5M2", np.zeros((200, 256), np.uint8))}, "`w` is F8_E5M2"),
    "no scales": ({"w": ("F8_E4M3", np.zeros((200, 256), np.uint8))}, "no scales that are read"),
} | {
    f"scales {dtype} {shape}": (
        {"w": ("F8_E4M3", np.zeros((200, 256), np.uint8)), "w_scale_inv": (dtype, np.ones(shape, kind))},
        "128x128 blocks take|scales are read in",
    )
    for dtype, kind, shape in (
        ("F32", np.float32, (1, 2)),
        ("F32", np.float32, (2, 1)),
        ("F32", np.float32, (4,)),
        ("I16", np.int16, (2, 2)),
    )
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_tensors_are_verified_from_the_headers(tmp_path: Path, case: str) -> None:
    tensors, expected = BAD_TENSORS[case]
    make.write_safetensors(tmp_path / "model.safetensors", {**tensors, "other": ("F32", np.zeros(1, np.float32))})
    (tmp_path / "config.json").write_text("{}")
    with Checkpoint(tmp_path) as checkpoint, pytest.raises((CheckpointError, UnsupportedError), match=expected):
        checkpoint.verify("w", (200, 256))
