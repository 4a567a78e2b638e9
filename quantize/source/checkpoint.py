"""checkpoint.py: a Hugging Face checkpoint folder, read lazily. Owns shards, dtypes, fp8 scales; knows no architecture.

Weights are read with positioned reads straight into the array that keeps them: one copy, no mapped pages counted
against this process, and a file that shrinks under us is an error instead of a signal.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cext import system
from quantize.base.errors import CheckpointError, QuantizeError, UnsupportedError
from quantize.source import files
from quantize.source.safetensors import DTYPE_BYTES, LFS_POINTER, REPLACE_HINT, StoredTensor, read_header

NUMPY_DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2"), "F8_E4M3": np.dtype("u1"),
}  # fmt: skip
TWO_SAVES = "these files are of different saves of a model: take all of them from one revision, into an empty folder"
SCALE_SUFFIX = "_scale_inv"  # DeepSeek-V3's block scales: weight = stored * scale
ROUNDED_AT_ONCE = 1 << 18  # values: their five copies stay in the cache, and are not five copies of everything


def _e4m3_values() -> NDArray[np.float32]:
    """All 256 values of fp8 e4m3 (bias 7, no infinity, 0x7f and 0xff NaN), by code."""
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, code & 7
    magnitude = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    values = np.where(code & 0x80, -magnitude, magnitude)
    values[[0x7F, 0xFF]] = np.nan
    return values.astype(np.float32)


E4M3_VALUES = _e4m3_values()


def bf16_to_f32(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """bfloat16 bit patterns to float32, exactly."""
    wide = bits.astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


def f32_to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """float32 to bfloat16 bits, round to nearest even; NaN stays NaN."""
    source = np.ascontiguousarray(values, np.float32).reshape(-1).view(np.uint32)
    out = np.empty(source.size, np.uint16)
    for start in range(0, source.size, ROUNDED_AT_ONCE):
        bits = source[start : start + ROUNDED_AT_ONCE]
        rounded = (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16
        quiet = (bits >> 16) | np.uint32(0x40)  # rounding could carry a NaN's mantissa into infinity
        is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
        out[start : start + len(bits)] = np.where(is_nan, quiet, rounded)
    return out.reshape(values.shape)


class Checkpoint:
    """An open checkpoint folder: ``config``, and its tensors by name. A context manager; close() releases the files.

    Raises CheckpointError where files are missing or malformed, UnsupportedError for weights stored in other ways.
    """

    def __init__(self, path: str | os.PathLike[str], tensors: Mapping[str, StoredTensor] | None = None) -> None:
        """tensors: those whose headers are known, where the weights themselves are not here yet."""
        self.path = Path(path)
        if not self.path.is_dir():
            what = "is a file" if self.path.exists() else "does not exist"
            raise CheckpointError(
                f"`{self.path}` {what}", "give the folder that holds config.json and the .safetensors files"
            )
        self.config = read_json(self.path / files.CONFIG)
        self.tensors = _index(self.path) if tensors is None else dict(tensors)
        self.scale_block = _scale_block(self.path, self.config)
        self._fds: dict[Path, int] = {}
        self._opening = threading.Lock()
        self.touched: set[str] = set()  # names of the shards that weights were read from

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the shards' file descriptors; reads after this open them again."""
        while self._fds:
            os.close(self._fds.popitem()[1])

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors on disk."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def stamps(self) -> dict[str, list[int]]:
        """[bytes, time of the last change in ns] of every shard, by its name."""
        shards = {tensor.shard for tensor in self.tensors.values()}
        stats = {shard.name: shard.stat() for shard in sorted(shards)}
        return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}

    def find(self, name: str) -> StoredTensor:
        """Where a tensor lies. CheckpointError where there is none."""
        tensor = self.tensors.get(name)
        if tensor is None:
            raise missing(self.path, name, self.tensors)
        return tensor

    def verify(self, name: str, shape: tuple[int, ...]) -> None:
        """Check that a tensor is there, of that shape, in a dtype that can be read, with its scales if it needs them.

        Reads no weights: a run of hours should not end in what the headers could have told.
        """
        tensor = self.find(name)
        if tensor.shape != shape:
            raise CheckpointError(
                f"tensor `{name}` is {tensor.shape}, config.json makes it {shape}",
                "config.json and the weights are not of the same model",
            )
        if tensor.dtype not in NUMPY_DTYPES:
            new = "" if tensor.dtype in DTYPE_BYTES else ", a dtype newer than this program"
            raise UnsupportedError(
                f"tensor `{name}` is {tensor.dtype}{new}", "weights must be F32, F16, BF16 or F8_E4M3 with block scales"
            )
        if tensor.dtype != "F8_E4M3":
            return
        scales = self.find(name + SCALE_SUFFIX)
        rows, columns = self.scale_block
        expected = tuple(-(-n // block) for n, block in zip(shape, (rows, columns), strict=False))
        if scales.dtype != "F32" or len(shape) != 2 or scales.shape != expected:
            raise CheckpointError(
                f"tensor `{scales.name}` is {scales.dtype} {scales.shape}, {rows}x{columns} blocks take F32 {expected}",
                "fp8 is read with F32 scales of blocks, of weight_block_size in config.json: start from bf16 otherwise",
            )

    def read_stored(self, name: str, out: NDArray[Any] | None = None) -> NDArray[Any]:
        """A tensor as stored: float32, float16, uint16 (bfloat16 bits) or uint8 (fp8 codes), into out where given.

        This and the other reads expect a tensor that ``verify`` passed.
        """
        tensor = self.find(name)
        dtype = NUMPY_DTYPES[tensor.dtype]
        if out is None:
            out = np.empty(tensor.shape, dtype)
        elif out.shape != tensor.shape or out.dtype != dtype or not out.flags.c_contiguous:
            raise ValueError(f"out is {out.dtype} {out.shape}, `{name}` needs contiguous {dtype} {tensor.shape}")
        self._read_into(tensor, out)
        return out

    def read_f32(self, name: str) -> NDArray[np.float32]:
        """A tensor in float32, fp8 scales applied. CheckpointError names a tensor that holds NaN or infinity."""
        return self._decode(name, self.read_stored(name))

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """Rows start to stop of a matrix, as read_f32 reads them: an embedding in slabs, its whole never in memory."""
        tensor = self.find(name)
        if tensor.dtype == "F8_E4M3":  # scales go by blocks of rows; nobody stores embeddings so
            return self.read_f32(name)[start:stop]
        row = tensor.nbytes // tensor.shape[0]
        part = replace(tensor, offset=tensor.offset + start * row, nbytes=(stop - start) * row)
        stored = np.empty((stop - start, *tensor.shape[1:]), NUMPY_DTYPES[tensor.dtype])
        self._read_into(part, stored)
        return self._decode(name, stored, start)

    def _decode(self, name: str, stored: NDArray[Any], first_row: int = 0) -> NDArray[np.float32]:
        match self.find(name).dtype:
            case "BF16":
                values = bf16_to_f32(stored)
            case "F8_E4M3":
                values = self._apply_scales(name, E4M3_VALUES[stored])
            case _:
                values = stored.astype(np.float32, copy=False)
        finite = np.isfinite(values)
        if not finite.all():
            first = np.argwhere(~finite)[0]
            worst = (int(first[0]) + first_row, *(int(i) for i in first[1:]))
            raise CheckpointError(
                f"tensor `{name}`: {np.count_nonzero(~finite)} of {values.size} values not finite, first at {worst}",
                "the shard is damaged or the training diverged: fetch it again, or use another revision",
            )
        return values

    def read_half(self, name: str, out: NDArray[Any]) -> None:
        """A tensor into out of its shape: as stored, except that fp8 becomes bfloat16 bits (uint16), which rounds.

        out's dtype is ``half_dtype(name)``. Raises as read_f32 does.
        """
        stored = self.find(name)
        if stored.dtype == "F8_E4M3":
            out[...] = f32_to_bf16(self.read_f32(name))
            return
        self.read_stored(name, out)
        bits, exponent = {"F32": (np.uint32, 0x7F800000), "F16": (np.uint16, 0x7C00), "BF16": (np.uint16, 0x7F80)}[
            stored.dtype
        ]
        if np.any((out.view(bits) & exponent) == exponent):
            self._decode(name, out)  # not finite: raises, with the place named

    def half_dtype(self, name: str) -> np.dtype[Any]:
        """The dtype that read_half writes for this tensor."""
        dtype = self.find(name).dtype
        return np.dtype("<u2") if dtype == "F8_E4M3" else NUMPY_DTYPES[dtype]

    def _apply_scales(self, name: str, values: NDArray[np.float32]) -> NDArray[np.float32]:
        rows, columns = self.scale_block
        scales = self.read_stored(name + SCALE_SUFFIX)
        for i, scale in enumerate(scales):
            band = values[i * rows : (i + 1) * rows]
            band *= np.repeat(scale, columns)[: values.shape[1]]
        return values

    def _read_into(self, tensor: StoredTensor, out: NDArray[Any]) -> None:
        if tensor.nbytes == 0:
            return
        view = out.reshape(-1).view(np.uint8).data
        done = 0
        try:
            with self._opening:  # threads read at once
                if tensor.shard not in self._fds:
                    self._fds[tensor.shard] = os.open(tensor.shard, os.O_RDONLY)
                fd = self._fds[tensor.shard]
            self.touched.add(tensor.shard.name)
            while done < tensor.nbytes:
                n = system.read_at(fd, view[done:], tensor.offset + done)
                if n == 0:
                    raise CheckpointError(
                        f"`{tensor.shard}`: the file ends inside tensor `{tensor.name}`", REPLACE_HINT
                    )
                done += n
        except OSError as error:
            raise CheckpointError(f"`{tensor.shard}`: tensor `{tensor.name}`: {error.strerror}") from error


def missing(folder: Path, name: str, there: Iterable[str]) -> QuantizeError:
    """What it means that a checkpoint lacks a tensor, by the names that it does have."""
    kept = set(there)
    one = re.fullmatch(r"(.+\.experts)\.\d+\.(?:gate|up|down)_proj\.weight", name)
    if one and (stacked := sorted(n for n in kept if re.match(rf"{re.escape(one[1])}\.\D*_proj", n))):
        return UnsupportedError(
            f"`{folder}`: the experts are fused into one tensor a layer (`{stacked[0]}`), which is not read",
            "take the model's original checkpoint, or save it with one tensor an expert",
        )
    if name.endswith(SCALE_SUFFIX):
        return UnsupportedError(
            f"`{folder}`: `{name.removesuffix(SCALE_SUFFIX)}` is fp8 and has no scales of blocks (`{name}`)",
            "scales of another form are not read: start from the bf16 checkpoint, or one in DeepSeek-V3's fp8",
        )
    if prefixed := sorted(n for n in kept if n.endswith(f".{name}")):
        return UnsupportedError(
            f"`{folder}`: tensor `{name}` is called `{prefixed[0]}`: the language model is a part of a larger one",
            "take the text model's own checkpoint, if there is one",
        )
    return CheckpointError(
        f"`{folder}`: tensor `{name}` is missing",
        "config.json describes a model that has it: are these the weights of another, or only some of them?",
    )


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"`{path}`: {error.strerror}",
            "a checkpoint's folder holds config.json, tokenizer.json and *.safetensors",
        ) from error
    except (ValueError, RecursionError) as error:
        pointer = path.read_bytes()[: len(LFS_POINTER)] == LFS_POINTER
        what = "a Git LFS pointer, not the file it stands for" if pointer else f"not valid JSON ({error})"
        hint = "git lfs pull fetches it" if pointer else "was it edited, or cut short? The hub's copy replaces it"
        raise CheckpointError(f"`{path}`: {what}", hint) from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. CheckpointError where it is missing or something else."""
    with _naming(path):
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    if not isinstance(value, dict):
        raise CheckpointError(f"`{path}`: a JSON {type(value).__name__}, expected an object")
    return value


def _index(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the folder: through the index where there is one, from the shards themselves otherwise."""
    index_path = folder / files.INDEX
    if index_path.exists():
        return _index_sharded(folder, index_path)
    names = sorted(p.name for p in folder.iterdir())
    shards = [folder / name for name in files.weights(names)]
    if not shards:
        raise CheckpointError(f"`{folder}`: no model in *.safetensors", _instead(names))
    tensors: dict[str, StoredTensor] = {}
    for shard in shards:
        for name, tensor in read_header(shard).items():
            if name in tensors:
                raise CheckpointError(f"tensor `{name}` is in both `{tensors[name].shard}` and `{shard}`", TWO_SAVES)
            tensors[name] = tensor
    return tensors


def _instead(names: Iterable[str]) -> str:
    """What a folder without safetensors has, and what can be done with that."""
    for name in names:
        if files.is_adapter(name):
            return f"`{name}` is an adapter: merge it into its base model first"
        if name.endswith(".gguf"):
            return f"`{name}` is quantised already: dsv2 chat runs it"
        if name.endswith((".bin", ".pt", ".pth")):
            return f"convert `{name}` to safetensors first: transformers' save_pretrained does"
    return "a checkpoint's folder holds config.json, tokenizer.json and *.safetensors"


def _index_sharded(folder: Path, index_path: Path) -> dict[str, StoredTensor]:
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"`{index_path}`: no weight_map", "the hub's copy of it replaces it")
    headers: dict[str, dict[str, StoredTensor]] = {}
    tensors: dict[str, StoredTensor] = {}
    for name, shard in weight_map.items():
        # A shard is a plain name beside the index: a path would let an index read any file of the machine.
        if not isinstance(shard, str) or shard != Path(shard).name:
            raise CheckpointError(f"`{index_path}`: tensor `{name}` points at {shard!r}, not at a file of this folder")
        if shard not in headers:
            if not (folder / shard).exists():
                raise CheckpointError(
                    f"`{folder / shard}` is missing: {files.INDEX} names it",
                    "dsv2 download, with --to and this folder, fetches what is missing",
                )
            headers[shard] = read_header(folder / shard)
        if name not in headers[shard]:
            raise CheckpointError(
                f"`{folder / shard}`: tensor `{name}` is missing, {files.INDEX} puts it there", TWO_SAVES
            )
        tensors[name] = headers[shard][name]
    _check_index(headers, tensors)
    return tensors


def _check_index(headers: dict[str, dict[str, StoredTensor]], tensors: dict[str, StoredTensor]) -> None:
    for shard, header in headers.items():
        for name, tensor in header.items():
            known = tensors.get(name)
            if known is None:
                raise CheckpointError(f"`{tensor.shard}`: tensor `{name}` is not in {files.INDEX}", TWO_SAVES)
            if known.shard.name != shard:
                raise CheckpointError(f"tensor `{name}` is in both `{known.shard}` and `{tensor.shard}`", TWO_SAVES)


def _scale_block(folder: Path, config: dict[str, Any]) -> tuple[int, int]:
    """Rows and columns that share one fp8 scale; (128, 128) where the config does not say."""
    quantization = config.get("quantization_config")
    if quantization is None:
        return (128, 128)
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    if method != "fp8" or quantization.get("fmt", "e4m3") != "e4m3":
        raise UnsupportedError(
            f"`{folder}`: the weights are already quantised ({method!r})",
            "start from the bf16, f16, f32 or fp8 e4m3 checkpoint",
        )
    block = quantization.get("weight_block_size", [128, 128])
    if not isinstance(block, list) or len(block) != 2 or not all(isinstance(n, int) and 0 < n <= 65536 for n in block):
        raise CheckpointError(f"`{folder / 'config.json'}`: weight_block_size {block!r} is not a pair of sizes")
    return (block[0], block[1])
