"""exporter.py: a checkpoint in, a checkpoint of 4-bit integers out, as vLLM and SGLang serve it on clusters.

The run is pipeline.py's, under a recipe whose groups of columns share a scale: the same calibration, error feedback,
journal and measurement, into a GGUF of its own in the work folder. What that says is then written again as
compressed-tensors has it (pack-quantized, W4A16): the same integers and scales, number for number.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader
from gguf.constants import GGMLQuantizationType as Type
from numpy.typing import NDArray

from cext import system
from quantize.base.errors import ArgumentError, UnsupportedError, disk_error
from quantize.encode.grouped import GROUPS, unpacked
from quantize.job import Options
from quantize.meter import OnProgress
from quantize.pipeline import quantize, write_report
from quantize.report import Report
from quantize.source import files, tensors
from quantize.source.arch import Arch
from quantize.source.forms import bf16_to_f32, f32_to_bf16
from quantize.source.source import CheckpointSource, open_source
from quantize.source.tensors import Form

SHARD_BYTES = 4_000_000_000
WORK = ".export"  # a folder beside the checkpoint in the making
GGUF = "w4a16.gguf"
PARTS = "checkpoint"
FORMATS = ("compressed-tensors",)
NO_PREDICTION = "num_nextn_predict_layers"  # these layers are left out
DTYPES = {"BF16": 2, "F32": 4, "I32": 4, "I64": 8}


@dataclass(frozen=True)
class Entry:
    """A tensor of the checkpoint in the making. make: its bytes, when they are wanted."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    make: Callable[[], NDArray[Any]]

    @property
    def nbytes(self) -> int:
        return DTYPES[self.dtype] * int(np.prod(self.shape))


def export(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    options: Options | None = None,
    progress: OnProgress | None = None,
    *,
    format: str = FORMATS[0],
    group: int = GROUPS[0],
    say: Callable[[str], None] = lambda line: None,
    restart: bool = False,
) -> Report:
    """Write the checkpoint folder source as the folder out, its matrices in 4-bit integers by groups of columns.

    out appears only when it is complete. What was done of a run that ends early is kept in OUT.export, and the same
    call goes on from there. format: one of FORMATS. options: type is not looked at. Raises QuantizeError, of one of
    its kinds.
    """
    source, named, out = Path(source), Path(out), _resolved(out)
    if format not in FORMATS:
        raise ArgumentError(f"checkpoints of format `{format}`", f"one of {', '.join(FORMATS)}")
    if group not in GROUPS:
        raise ArgumentError(f"groups of {group} columns", f"one of {', '.join(map(str, GROUPS))}")
    _check(source, out, named)
    work = work_folder(out)
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(work, error) from error
    chosen = replace(options or Options(), type=f"w4a16-g{group}", bpw=None, size=None, plain_mix=False)
    try:
        made = quantize(source, work / GGUF, chosen, progress, say=say, restart=restart, keep=True)
    except BaseException:
        if not any(work.iterdir()):
            work.rmdir()
        raise
    say("writing the checkpoint")
    with open_source(source) as opened:
        assert isinstance(opened, CheckpointSource)
        try:
            _write(work / PARTS, opened, work / GGUF, format, group)
            parts = [path for path in (work / PARTS).rglob("*") if path.is_file()]
            made = replace(made, path=named, nbytes=sum(path.stat().st_size for path in parts))
            write_report(made, out)
            (work / PARTS).replace(out)
            shutil.rmtree(work)
        except OSError as error:
            raise disk_error(out, error) from error
    return made


def work_folder(out: str | os.PathLike[str]) -> Path:
    """Where the work of a run is kept until it is whole."""
    out = _resolved(out)
    return out.with_name(out.name + WORK)


def _resolved(out: str | os.PathLike[str]) -> Path:
    """The folder itself, whose name stays when another takes its place: no link to it, and not by way of a dot."""
    folder = Path(os.path.realpath(out))
    if not folder.name:
        raise ArgumentError(f"`{out}` is no folder that can be made", "-o names another folder")
    return folder


def _check(source: Path, out: Path, named: Path) -> None:
    """named: as it was given."""
    if source.suffix == ".gguf" and source.is_file():
        raise UnsupportedError(
            f"`{source}` is a GGUF: a checkpoint is made from a checkpoint", "give the folder of its safetensors"
        )
    if os.path.lexists(out) and (not out.is_dir() or any(out.iterdir())):  # a link still: in a circle
        raise ArgumentError(f"`{named}` exists", "-o names another folder")
    with open_source(source) as opened:
        if opened.arch.family.beside:
            raise UnsupportedError(
                f"`{source}` is the language part of a larger model, and a checkpoint of it alone would be no model"
            )


# The checkpoint.


def _write(folder: Path, source: CheckpointSource, gguf: Path, format: str, group: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    kept: list[str] = []  # modules that are no integers
    entries = list(_entries(source.arch, gguf, group, kept))
    shards = list(_shards(entries))
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        _write_shard(folder / name, shard)
    index = {
        "metadata": {"total_size": sum(entry.nbytes for entry in entries)},
        "weight_map": {entry.name: name for name, shard in zip(names, shards, strict=True) for entry in shard},
    }
    _write_json(folder / files.INDEX, index)
    for path in source.files():
        name = path.relative_to(source.store.path).as_posix()
        if files.is_companion(name) and name not in (files.INDEX, files.CONFIG):
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, folder / name)
    _write_json(folder / files.CONFIG, _config(source.store.config, format, group, kept))


def _config(given: Mapping[str, Any], format: str, group: int, kept: Iterable[str]) -> dict[str, Any]:
    """The source's, and how its weights are stored now."""
    config = {name: value for name, value in given.items() if name not in ("torch_dtype", "auto_map")}
    config |= {"dtype": "bfloat16", "torch_dtype": "bfloat16"}
    if NO_PREDICTION in config:
        config[NO_PREDICTION] = 0
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": group,
        "dynamic": False,
        "actorder": None,
    }
    groups = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    config["quantization_config"] = {
        "quant_method": format,
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": groups},
        "ignore": sorted(kept),
        "kv_cache_scheme": None,
    }
    return config


def _entries(arch: Arch, gguf: Path, group: int, kept: list[str]) -> Iterator[Entry]:
    """Every tensor, in the order of the GGUF. kept: takes the names of modules that are no integers."""
    stored = {tensor.name: tensor for tensor in GGUFReader(gguf).tensors}
    for tensor in tensors.model_tensors(arch):
        if tensor.form is Form.K_B:
            continue  # with V_B, of which one matrix is made
        found = stored[tensor.name]
        kind = Type(found.tensor_type)
        if tensor.form is Form.V_B:
            k_b = stored[tensor.name.replace("attn_v_b", "attn_k_b")]
            kept.append(_module(tensor.sources[0]))
            shape = tensors.source_shape(arch, tensor)
            yield Entry(tensor.sources[0], "BF16", shape, partial(_kv_b, arch, k_b.data, found.data))
        elif tensor.form is Form.STACK:
            for source, part in zip(tensor.sources, found.data, strict=True):
                yield from _matrix(source, kind, part, tensor.shape[1:], group, kept)
        elif tensor.form is Form.PAIRED:
            yield from _matrix(
                tensor.sources[0], kind, _unpaired(arch, found.data, tensor.shape[0]), tensor.shape, group, kept
            )
        elif len(tensor.shape) == 2:
            yield from _matrix(tensor.sources[0], kind, found.data, tensor.shape, group, kept)
        else:
            yield _kept(tensor.sources[0], kind, found.data, tensor.shape)


def _module(source: str) -> str:
    return source.removesuffix(".weight")


def _matrix(
    source: str, kind: Type, data: NDArray[Any], shape: tuple[int, ...], group: int, kept: list[str]
) -> Iterator[Entry]:
    if kind != Type.Q4_0:
        kept.append(_module(source))
        yield _kept(source, kind, data, shape)
        return
    name, (r, n) = _module(source), shape
    rows = data.reshape(r, -1)
    yield Entry(f"{name}.weight_packed", "I32", (r, n // 8), lambda: packed(unpacked(rows, group)[0]))
    yield Entry(f"{name}.weight_scale", "BF16", (r, n // group), lambda: unpacked(rows, group)[1])
    yield Entry(f"{name}.weight_shape", "I64", (2,), lambda: np.array(shape, "<i8"))


def packed(codes: NDArray[np.int8]) -> NDArray[np.int32]:
    """codes (r, n) from -8 to 7 -> (r, n / 8): eight to an integer, 8 more each, the first in the lowest bits."""
    nibbles = (codes + np.int8(8)).astype(np.uint32).reshape(len(codes), -1, 8)
    shifts = np.arange(0, 32, 4, dtype=np.uint32)
    words: NDArray[np.uint32] = np.bitwise_or.reduce(nibbles << shifts, axis=2)
    return words.view(np.int32)


def _bits(data: NDArray[Any], shape: tuple[int, ...]) -> NDArray[np.uint16]:
    return np.ascontiguousarray(data).view(np.uint16).reshape(shape)


def _kept(name: str, kind: Type, data: NDArray[Any], shape: tuple[int, ...]) -> Entry:
    """What is no integers: of bfloat16, where that holds the very numbers; of float32 otherwise."""
    if kind == Type.BF16:
        return Entry(name, "BF16", shape, partial(_bits, data, shape))
    values = np.ascontiguousarray(data, np.float32).reshape(shape)
    bits = f32_to_bf16(values)
    if (bf16_to_f32(bits) == values).all():
        return Entry(name, "BF16", shape, lambda: bits)
    return Entry(name, "F32", shape, lambda: values)


def _kv_b(arch: Arch, k_b: NDArray[Any], v_b: NDArray[Any]) -> NDArray[np.uint16]:
    """kv_b_proj of its two parts: tensors.split_kv_b, backwards."""
    k = _bits(k_b, (arch.n_head, arch.kv_lora_rank, arch.nope)).transpose(0, 2, 1)
    v = _bits(v_b, (arch.n_head, arch.v_dim, arch.kv_lora_rank))
    return np.concatenate([k, v], axis=1).reshape(-1, arch.kv_lora_rank)


def _unpaired(arch: Arch, data: NDArray[Any], n_rows: int) -> NDArray[Any]:
    """Rows as the checkpoint has them: tensors.pair_rows, backwards."""
    order = tensors.pair_rows(arch, np.arange(n_rows).reshape(n_rows, 1)).reshape(-1)
    out = np.empty_like(data)
    out[order] = data
    return out


# Files.


def _shards(entries: Iterable[Entry]) -> Iterator[list[Entry]]:
    shard: list[Entry] = []
    for entry in entries:
        if shard and sum(one.nbytes for one in shard) + entry.nbytes > SHARD_BYTES:
            yield shard
            shard = []
        shard.append(entry)
    if shard:
        yield shard


def _write_shard(path: Path, entries: list[Entry]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for entry in entries:
        header[entry.name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [at, at + entry.nbytes]}
        at += entry.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            data = np.ascontiguousarray(entry.make())
            assert data.nbytes == entry.nbytes, entry.name
            file.write(data.data)
        file.flush()
        system.sync_and_drop(file.fileno())


def _write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8", errors="backslashreplace")  # paths in other bytes, as pipeline.py has it
