"""checkpoint.py: a Hugging Face checkpoint folder, read lazily. Owns shards and their index; knows no architecture."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from quantize.base.errors import CheckpointError, QuantizeError, UnsupportedError
from quantize.source import files, scheme
from quantize.source.forms import Weight
from quantize.source.found import Found, find
from quantize.source.resolve import OTHER_MODEL_HINT, weight_of
from quantize.source.safetensors import LFS_POINTER, read_header
from quantize.source.store import Store
from quantize.source.stored import StoredTensor

TWO_SAVES = "these files are of different saves of a model: take all of them from one revision, into an empty folder"


class Checkpoint(Store):
    """An open checkpoint folder: ``config``, and its weights by name.

    Raises CheckpointError where files are missing or malformed, UnsupportedError for weights stored in other ways.
    """

    def __init__(self, path: str | os.PathLike[str], tensors: Mapping[str, StoredTensor] | None = None) -> None:
        """tensors: those whose headers are known, where the weights themselves are not here yet."""
        folder = Path(path)
        if not folder.is_dir():
            what = "is a file" if folder.exists() else "does not exist"
            raise CheckpointError(
                f"`{folder}` {what}", "give the folder that holds config.json and the .safetensors files"
            )
        self.config = read_json(folder / files.CONFIG)
        super().__init__(folder, _index(folder) if tensors is None else dict(tensors))
        self.kinds = scheme.read(folder, self.config)
        self._weights: dict[str, Weight] = {}

    def record(self, names: Collection[str]) -> Sequence[object]:
        used = {part for name in names if (found := find(name, self.tensors)) for part in found.parts}
        stored = sorted((t.name, t.dtype, t.shape) for t in self.tensors.values() if t.name in used)
        return [*stored, [asdict(kind) for kind in self.kinds]]

    def find(self, name: str) -> StoredTensor:
        """Where a stored tensor lies. CheckpointError where there is none."""
        tensor = self.tensors.get(name)
        if tensor is None:
            raise missing(self.path, name, self.tensors)
        return tensor

    def parts(self, name: str) -> tuple[str, ...]:
        return self._found(name).parts

    def verify(self, name: str, shape: tuple[int, ...], n_stacked: int = 1) -> None:
        found = self._found(name)
        stored = self.find(found.values)
        if found.expert is not None and stored.shape[:1] != (n_stacked,):
            raise CheckpointError(
                f"tensor `{stored.name}` is {stored.shape}, config.json makes it a stack of {n_stacked}",
                OTHER_MODEL_HINT,
            )
        self._weights[name] = weight_of(name, found, self.tensors, self.kinds, shape)

    def verify_told(self, name: str, shape: tuple[int, ...]) -> None:
        """Check the shape that a packed weight tells of itself."""
        if (told := self._found(name).told_shape) is None:
            return
        stored = self.find(told)
        if stored.dtype not in ("I64", "I32") or stored.shape != (len(shape),):
            raise CheckpointError(f"tensor `{told}` is {stored.dtype} {stored.shape}, expected I64 {(len(shape),)}")
        values = np.empty(stored.shape, "<i8" if stored.dtype == "I64" else "<i4")
        self._files.read_into(stored, values)
        if tuple(values.tolist()) != shape:
            raise CheckpointError(
                f"tensor `{told}` says {tuple(values.tolist())}, config.json makes the weight {shape}",
                OTHER_MODEL_HINT,
            )

    def _found(self, name: str) -> Found:
        found = find(name, self.tensors)
        if found is None:
            raise missing(self.path, name, self.tensors)
        return found

    def weight(self, name: str) -> Weight:
        if name not in self._weights:
            self._weights[name] = weight_of(name, self._found(name), self.tensors, self.kinds)
        return self._weights[name]


def missing(folder: Path, name: str, there: Iterable[str]) -> QuantizeError:
    """What it means that a checkpoint lacks a tensor, by the names that it does have."""
    kept = set(there)
    one = re.fullmatch(r"(.+\.experts)\.\d+\.(?:gate|up|down)_proj\.weight", name)
    if one and (stacked := sorted(n for n in kept if re.match(rf"{re.escape(one[1])}\.\D*_proj", n))):
        return UnsupportedError(
            f"`{folder}`: the experts are fused into one tensor a layer (`{stacked[0]}`), and `{name}` is in none",
            "stacks are read as transformers 5 makes them, experts.gate_up_proj and experts.down_proj: take the model's"
            " original checkpoint otherwise, or save it with one tensor an expert",
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
