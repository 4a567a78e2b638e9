"""preflight.py: whether a checkpoint can be quantised, told by its small files before its weights are here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from quantize.source import arch as arch_of
from quantize.source.checkpoint import SCALE_SUFFIX, Checkpoint, missing
from quantize.source.safetensors import StoredTensor
from quantize.source.tensors import Form, left_out, model_tensors
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
        kv_b = (arch.n_head * (arch.nope + arch.v_dim), arch.kv_lora_rank)
        used: set[str] = set()
        for tensor in model_tensors(arch):
            shape = kv_b if tensor.form in (Form.K_B, Form.V_B) else tensor.source_shape
            used.update(tensor.sources)
            for source in tensor.sources:
                if known is not None and source not in known:
                    raise missing(folder, source, known)
                stored = headers.get(source)
                # Scales may lie in a shard whose header was not read.
                if stored is not None and (stored.dtype != "F8_E4M3" or source + SCALE_SUFFIX in headers):
                    checkpoint.verify(source, shape)
        left_out(arch, {name: headers[name].dtype if name in headers else "" for name in known or headers}, used)
