"""Checkpoints for clusters: what stands in them, read by transformers with compressed-tensors and by our own reader."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as Type
from numpy.typing import NDArray
from support.checkpoints import V2, bf16_bits, bf16_values, write_checkpoint, write_text
from support.cli import assert_fails, dsv2
from support.page_cache import is_dropped, skip_unless_dropped

import quantize
from quantize import ArgumentError, Options, OtherRunError, OutputError, Progress, UnsupportedError, export, exporter
from quantize.encode import grouped
from quantize.encode.encoder import Encoder
from quantize.encode.feedback import Covariance
from quantize.encode.objective import Objective
from quantize.exporter import GGUF, packed, work_folder
from quantize.source.source import CheckpointSource, open_source

F32 = NDArray[np.float32]
WIDE = V2 | {
    "hidden_size": 128, "moe_intermediate_size": 128, "intermediate_size": 192, "q_lora_rank": 128, "v_head_dim": 32,
    "num_nextn_predict_layers": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt", 2400)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, text: Path) -> tuple[Path, Path, dict[str, F32]]:
    """(source, checkpoint, the source's weights), in groups of 128."""
    folder = tmp_path_factory.mktemp("made")
    weights = write_checkpoint(folder / "source", WIDE)
    report = export(folder / "source", folder / "out", Options(calibration=(text,), threads=2))
    assert report.evaluation is not None and report.evaluation.kld_mean < 0.05
    assert sorted(path.name for path in folder.iterdir()) == ["out", "out.report.json", "source"]
    return folder / "source", folder / "out", weights


def stored(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    with open_source(folder) as source:
        assert isinstance(source, CheckpointSource)
        return {name: (tensor.dtype, tensor.shape) for name, tensor in source.store.tensors.items()}


def test_what_is_in_integers(made: tuple[Path, Path, dict[str, F32]]) -> None:
    """Whole groups of what engines join; of kv_b_proj they make matrices of their own."""
    tensors = stored(made[1])
    config = json.loads((made[1] / "config.json").read_text(encoding="utf-8"))
    kept = config["quantization_config"]["ignore"]
    layers = [f"model.layers.{il}" for il in range(3)]
    wanted = {"lm_head", "model.embed_tokens"} | {f"{layer}.self_attn.kv_b_proj" for layer in layers}
    wanted |= {f"{layer}.mlp.gate" for layer in layers[1:]}
    wanted |= {f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")}  # 192 is no whole groups
    assert set(kept) == wanted
    assert {tensors[f"{name}.weight"][0] for name in wanted} <= {"BF16", "F32"}
    expert = "model.layers.1.mlp.experts.7.down_proj"
    assert tensors[f"{expert}.weight_packed"] == ("I32", (128, 16))
    assert tensors[f"{expert}.weight_scale"] == ("BF16", (128, 1))
    assert tensors[f"{expert}.weight_shape"] == ("I64", (2,)) and f"{expert}.weight" not in tensors
    assert config["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"] == 128
    assert config["num_nextn_predict_layers"] == 0  # left out
    assert (made[1] / "tokenizer.json").read_bytes() == (made[0] / "tokenizer.json").read_bytes()


def test_a_shard_that_was_written_leaves_the_cache(tmp_path: Path) -> None:
    skip_unless_dropped(tmp_path)
    data = np.random.default_rng(0).random(1 << 20, np.float32)
    path = tmp_path / "model.safetensors"
    exporter._write_shard(path, [exporter.Entry("w", "F32", data.shape, lambda: data)])
    assert is_dropped(path)
    assert path.read_bytes()[-data.nbytes :] == data.tobytes()


def test_our_own_reader_reads_it(made: tuple[Path, Path, dict[str, F32]], tmp_path: Path) -> None:
    """The integers are near the weights, what is kept moved a little at most, to make up for the others' errors; and
    quantize takes it as a source."""
    with open_source(made[1]) as source:
        for name, exact in made[2].items():
            if name.startswith("model.layers.3."):  # of the prediction head, which is left out
                continue
            found = source.store.read_f32(name)
            is_kept = f"{name}_packed" not in getattr(source.store, "tensors", {})
            error = np.square(found - exact).sum() / np.square(exact).sum()
            assert error < 1e-3 if is_kept else 1e-3 < error < 0.03, (name, error)
    quantize.quantize(made[1], tmp_path / "m.gguf", Options(type="f32", evaluate=False))


@pytest.mark.oracle
@pytest.mark.parametrize("group", [32, 64, 128])
def test_transformers_reads_it(tmp_path: Path, text: Path, group: int) -> None:
    """The weights are those of the GGUF that was measured, rounded to bfloat16, as are its products of two numbers."""
    pytest.importorskip("compressed_tensors")
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    hf = pytest.importorskip("support.hf")
    config = V2 if group == 32 else WIDE | {"num_hidden_layers": 2, "num_nextn_predict_layers": 0}
    write_checkpoint(tmp_path / "source", config)
    options = Options(calibration=(text,), threads=2, evaluate=False)
    export(tmp_path / "source", tmp_path / "out", options, group=group)
    alike = Options(type=f"w4a16-g{group}", calibration=(text,), threads=2, evaluate=False)
    quantize.quantize(tmp_path / "source", tmp_path / "same.gguf", alike)
    wanted = hf.from_gguf(tmp_path / "source", tmp_path / "same.gguf")
    loaded, told = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out",
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        quantization_config=transformers.CompressedTensorsConfig(dequantize=True),
        output_loading_info=True,
    )
    assert not any(told.values()), told
    loaded, tensors = loaded.float().eval(), stored(tmp_path / "out")
    with torch.no_grad():
        weights = dict(loaded.named_parameters())
        for name, value in wanted.named_parameters():
            if tensors.get(name, ("BF16",))[0] == "BF16":  # the router may be of float32
                value.copy_(value.bfloat16().float())
            assert torch.equal(value, weights[name]), name
    ids = np.random.default_rng(0).integers(0, 250, 60)
    assert np.array_equal(hf.logits(loaded, ids), hf.logits(wanted, ids))
    source = hf.logits(hf.load(tmp_path / "source"), ids)
    error = np.square(hf.logits(loaded, ids) - source).mean() / source.var()
    assert 0 < error < 0.2


class Stopped(Exception):
    pass


def stopping(stage: str, at: int) -> Callable[[Progress], None]:
    seen = 0

    def tell(step: Progress) -> None:
        nonlocal seen
        seen += step.stage == stage
        if seen == at:
            raise Stopped

    return tell


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_run_that_ends_early_is_gone_on_from(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path / "source", V2)
    options = Options(calibration=(text,), threads=2, evaluate=False)
    export(tmp_path / "source", tmp_path / "whole", options, group=32)
    out = tmp_path / "out"
    for at in (1, 12, 30):
        with pytest.raises(Stopped):
            export(tmp_path / "source", out, options, stopping("encode", at), group=32)
        assert not out.exists()
    assert work_folder(out).exists()

    def stop(*given: Any) -> None:
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr("quantize.exporter._write_shard", stop)
        with pytest.raises(Stopped):
            export(tmp_path / "source", out, options, group=32)
    assert not out.exists() and (work_folder(out) / GGUF).exists()

    def never(*given: Any, **named: Any) -> Any:
        raise AssertionError("encoded again")

    with monkeypatch.context() as patch:
        patch.setattr("quantize.pipeline._run", never)
        export(tmp_path / "source", out, replace(options, threads=1), group=32)  # their number changes nothing
    assert contents(out) == contents(tmp_path / "whole") and not work_folder(out).exists()


def stop_as_it_is_written(
    source: Path, out: Path, options: Options, monkeypatch: pytest.MonkeyPatch, *, restart: bool = False
) -> None:
    def stop(*given: Any) -> None:
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr("quantize.exporter._write_shard", stop)
        with pytest.raises(Stopped):
            export(source, out, options, group=32, restart=restart)


def test_the_work_of_another_run_is_neither_taken_nor_thrown_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As quantize has it, where the GGUF is whole and the checkpoint was being written."""
    source, out, text = tmp_path / "source", tmp_path / "out", write_text(tmp_path / "text.txt", 2400)
    write_checkpoint(source, V2 | {"num_hidden_layers": 2})
    options = Options(calibration=(text,), threads=2, evaluate=False)
    stop_as_it_is_written(source, out, options, monkeypatch)
    before = (work_folder(out) / GGUF).read_bytes()
    with pytest.raises(OtherRunError, match="--evaluate was False, is True"):
        export(source, out, replace(options, evaluate=True), group=32)
    with pytest.raises(OtherRunError, match="w4a16-g64"):
        export(source, out, options, group=64)
    text.write_text("Another text. " + text.read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(OtherRunError, match="the calibration text changed") as error:
        export(source, out, options, group=32)
    assert "--restart" in error.value.hint
    assert (work_folder(out) / GGUF).read_bytes() == before
    stop_as_it_is_written(source, out, options, monkeypatch, restart=True)
    moved = tmp_path / "elsewhere" / "out"
    moved.parent.mkdir()
    work_folder(out).rename(work_folder(moved))
    out = moved
    stop_as_it_is_written(source, out, options, monkeypatch)
    assert (work_folder(out) / GGUF).read_bytes() != before
    shard = next(source.glob("*.safetensors"))
    os.utime(shard, ns=(0, 0))
    with pytest.raises(OtherRunError, match=f"{shard.name} changed"):
        export(source, out, options, group=32)
    export(source, out, options, group=32, restart=True)
    export(source, tmp_path / "whole", options, group=32)
    assert contents(out) == contents(tmp_path / "whole") and not work_folder(out).exists()


def test_a_torn_record_is_told(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    write_checkpoint(source, V2 | {"num_hidden_layers": 2})
    options = Options(calibration=(text,), threads=2, evaluate=False)
    stop_as_it_is_written(source, out, options, monkeypatch)
    records = [path for path in work_folder(out).rglob("*.json") if path.parent != work_folder(out)]
    assert records
    for path in records:
        path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(OutputError, match="cannot be read"):
        export(source, out, options, group=32)
    export(source, out, options, group=32, restart=True)
    assert out.exists() and not work_folder(out).exists()


def test_where_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    write_checkpoint(source, V2 | {"num_hidden_layers": 2})
    named = source / "additional_chat_templates"
    named.mkdir()
    (named / "tool_use.jinja").write_text("{{ 2 }}", encoding="utf-8")
    (named / "notes.txt").write_text("mine", encoding="utf-8")
    here, link = tmp_path / "here", tmp_path / "link"
    here.mkdir()
    monkeypatch.chdir(here)
    for refused in ("/", "..", source):
        with pytest.raises(ArgumentError, match=r"no folder|exists"):
            export(source, refused)
    link.symlink_to(link)
    with pytest.raises(ArgumentError, match="exists"):
        export(source, link)
    link.unlink()
    link.symlink_to(here)
    assert work_folder(".") == work_folder(link) == tmp_path / "here.export"
    options = Options(threads=2, feedback=False, importance=False, evaluate=False)
    for out in (link, Path(), tmp_path / "absent"):
        report = export(source, out, options, group=32)
        assert report.path == out
        made = tmp_path / "absent" if out.name == "absent" else here
        assert report.nbytes == sum(path.stat().st_size for path in made.rglob("*") if path.is_file())
        templates = [path.name for path in (made / named.name).iterdir()]
        assert templates == ["tool_use.jinja"]
        shutil.rmtree(made)
        if made == here:
            here.mkdir()
            monkeypatch.chdir(here)
    assert link.is_symlink()


def test_what_is_refused(made: tuple[Path, Path, dict[str, F32]], tmp_path: Path) -> None:
    source = made[0]
    with pytest.raises(ArgumentError, match="groups of 100"):
        export(source, tmp_path / "out", group=100)
    with pytest.raises(ArgumentError, match="format `gptq`"):
        export(source, tmp_path / "out", format="gptq")
    with pytest.raises(ArgumentError, match="exists"):
        export(source, made[1])
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(UnsupportedError, match="is a GGUF"):
        export(tmp_path / "m.gguf", tmp_path / "out")
    with pytest.raises(quantize.CheckpointError):
        export(tmp_path / "nowhere", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_the_command(tmp_path: Path, text: Path) -> None:
    write_checkpoint(tmp_path / "source", V2 | {"num_hidden_layers": 2})
    asked = ["export", tmp_path / "source", "--calibration", text, "-t", "2", "--group-size", "32", "--no-evaluate"]
    assert_fails(dsv2(*asked), 2, "-o is missing")
    assert_fails(dsv2(*asked, "-o", "/"), 2, "no folder")
    assert_fails(dsv2(*asked, "-o", tmp_path / "out", "--format", "gptq"), 2, "gptq")
    result = dsv2(*asked, "-o", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{tmp_path / 'out'}\n" and "bits/weight" in result.stderr
    assert_fails(dsv2(*asked, "-o", tmp_path / "out"), 2, "exists", "-o names another")


# The encoding.


def correlated(n: int, seed: int = 0) -> Covariance:
    mixed = np.random.default_rng(seed).normal(size=(n, n)).astype(np.float32)
    return Covariance.of(np.random.default_rng(seed + 1).normal(size=(4 * n, n)).astype(np.float32) @ mixed)


def lost(rows: F32, decoded: F32, covariance: Covariance) -> float:
    error = rows - decoded
    return float(np.einsum("ij,jk,ik->", error, covariance.blocks[0], error))


@pytest.mark.parametrize("group", grouped.GROUPS)
def test_feedback_loses_less_of_the_outputs(group: int) -> None:
    rows = np.random.default_rng(3).normal(size=(40, 512)).astype(np.float32)
    covariance = correlated(512)
    with Encoder(2, group) as encoder:
        plain = encoder.encode(rows, Type.Q4_0)
        fed = encoder.encode(rows, Type.Q4_0, Objective(covariance=covariance))
        losses = [lost(rows, encoder.decode(data, Type.Q4_0, 512), covariance) for data in (plain, fed)]
        assert losses[1] < 0.7 * losses[0]
        for data in (plain, fed):
            codes, bits = grouped.unpacked(data, group)
            scales = np.repeat(bf16_values(bits), group, axis=1)
            assert np.array_equal(codes * scales, encoder.decode(data, Type.Q4_0, 512))
            assert np.array_equal(codes * scales, gguf.quants.dequantize(data, Type.Q4_0))
    with Encoder(1, group) as alone:
        assert np.array_equal(alone.encode(rows, Type.Q4_0, Objective(covariance=covariance)), fed)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-6, 1.0, 1e5])
def test_rows_of_any_size(scale: float) -> None:
    rows = (np.random.default_rng(1).normal(size=(3, 128)) * scale).astype(np.float32)
    rows[1] = np.abs(rows[1])
    with Encoder(1, 128) as encoder:
        data = encoder.encode(rows, Type.Q4_0, Objective(covariance=correlated(128)))
        found = encoder.decode(data, Type.Q4_0, 128)
    assert np.isfinite(found).all()
    assert np.abs(found - rows).max() <= max(0.6 * np.abs(rows).max(), 2.0**-14)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_weights_that_no_integer_holds(bad: float) -> None:
    rows = np.zeros((2, 128), np.float32)
    rows[1, 5] = bad
    with Encoder(1, 128) as encoder, pytest.raises(quantize.QuantizeError, match="not finite"):
        encoder.encode(rows, Type.Q4_0)


def test_the_best_scale_is_the_best_of_its_shares() -> None:
    target = np.random.default_rng(0).standard_t(3, size=(7, 128)).astype(np.float32)
    v = np.random.default_rng(1).uniform(0.1, 3, 128).astype(np.float32)
    best = grouped._best_scale(target, v)
    for row, scale in zip(target, best, strict=True):
        assert bf16_values(bf16_bits(np.array([scale])))[0] == scale

        def loss(s: float, row: F32 = row) -> float:
            return float((np.square(row - np.clip(np.rint(row / s), -8, 7) * s) * v).sum())

        widest = max(row.max() / 7, row.min() / -8)
        assert loss(scale) <= min(loss(widest * share) for share in (0.6, 0.75, 0.9, 1.0)) * 1.02


def test_eight_to_an_integer() -> None:
    codes = np.array([[-8, -7, 0, 7, 1, 2, 3, 7], [0] * 8], np.int8)
    words = packed(codes).view(np.uint32)
    assert [hex(word) for word in words[:, 0]] == ["0xfba9f810", "0x88888888"]
