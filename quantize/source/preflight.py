"""preflight.py: whether a checkpoint can be quantised, told by its small files before its weights are here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from quantize.source import arch as arch_of
from quantize.source.checkpoint import Checkpoint, missing
from quantize.source.found import find
from quantize.source.stored import StoredTensor
from quantize.source.tensors import left_out, model_tensors, source_shape
from quantize.source.vocab import read_vocab


def preflight(folder: Path, headers: Mapping[str, StoredTensor], names: Iterable[str] | None) -> None:
    """Raise what quantize would for this checkpoint, as far as can be told without weights.

    folder has config.json, the tokenizer and the like; headers are those of some of its tensors; names are all of
    them, None where no index tells.
    """
    with Checkpoint(folder, headers) as checkpoint:
        arch = arch_of.parse(checkpoint.config)
        read_vocab(folder, arch.n_vocab)
        known = set(names) if names is not None else None
        used: set[str] = set()
        for tensor in model_tensors(arch):
            shape = source_shape(arch, tensor)
            for name in tensor.sources:
                found = find(name, headers if known is None else known)
                if found is None and known is not None:
                    raise missing(folder, name, known)
                used.update(found.parts if found is not None else ())
                # Scales may lie in a shard whose header was not read.
                if found is not None and headers.keys() >= {*found.parts}:
                    checkpoint.verify(name, shape, len(tensor.sources))
        left_out(arch, {name: headers[name].dtype if name in headers else "" for name in known or headers}, used)
