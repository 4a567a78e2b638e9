"""gguf_source.py: a GGUF in F32, F16 or BF16 as a model to quantise, split or not; Q8_0 with a word of warning.

The file's directory is read and checked by the engine. The vocabulary, the template and where the model comes from are
carried on as they are.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

import cext
from cext.errors import EngineError
from cext.model import shape_of
from quantize.base.closing import Closing
from quantize.base.errors import CheckpointError, UnsupportedError
from quantize.source.gguf_arch import arch_of_file
from quantize.source.gguf_store import PART, SUFFIX, GgufStore

# Of general.*, what is said anew of the file that is made.
SAID_ANEW = (
    "general.architecture",
    "general.type",
    "general.name",
    "general.file_type",
    "general.quantization_version",
    "general.quantized_by",
    "general.alignment",
)


class GgufSource(Closing):
    """A GGUF file, or a split one by its first part."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._notes: list[str] = []
        with _told(), cext.Gguf(self.path) as gguf:
            self._metadata = {key: gguf.metadata[key] for key in gguf.metadata if not key.startswith("dsv2.")}
            self._tensors = gguf.tensors
            shape, notes = shape_of(gguf)
        names = {info.name for info in self._tensors}
        self._notes += notes
        self.arch = arch_of_file(os.fspath(self.path), self._metadata, shape, names)
        self.store = GgufStore(self.path, self._tensors, self.arch)

    def close(self) -> None:
        self.store.close()

    @property
    def name(self) -> str:
        """As the file says, else the file's own."""
        said = self._metadata.get("general.name")
        return said if isinstance(said, str) and said else PART.sub("", self.path.name).removesuffix(SUFFIX)

    @property
    def tokenizer(self) -> Mapping[str, Any]:
        return self._carried[0]

    @property
    def provenance(self) -> Mapping[str, object]:
        return self._carried[1]

    @property
    def notes(self) -> Sequence[str]:
        return (*self._notes, *self._carried[2], *self._own_notes())

    def files(self) -> list[Path]:
        """All parts."""
        return self.store.paths()

    def left_out(self, used: Collection[str]) -> list[str]:
        parts = {part for name in used for part in self.store.parts(name)}
        names = [name for name in self.store.tensors if name not in parts]
        for name in names:
            if not self._may_leave_out(name):
                raise UnsupportedError(
                    f"`{self.path}`: tensor `{name}` has no place in the file to be made",
                    "leaving it out would change the model: start from the checkpoint (safetensors)",
                )
        return names

    def _may_leave_out(self, name: str) -> bool:
        """A draft head's block, and kv_b_proj in a form beside the one that is read."""
        block = re.match(r"blk\.(\d+)\.(.+)", name)
        if block is None:
            return False
        return int(block[1]) >= self.arch.n_layer or block[2] in ("attn_k_b.weight", "attn_v_b.weight")

    @cached_property
    def _carried(self) -> tuple[dict[str, Any], dict[str, object], list[str]]:
        """Keys of the vocabulary, keys of the origin, and what could not be carried on."""
        tokenizer: dict[str, Any] = {}
        origin: dict[str, object] = {}
        lost = []
        for key, value in self._metadata.items():
            kept = tokenizer if key.startswith("tokenizer.") else origin if key.startswith("general.") else None
            if kept is None or key in SAID_ANEW:
                continue
            if (plain := _plain(value)) is None:
                lost.append(key)
            else:
                kept[key] = plain
        if "tokenizer.ggml.tokens" not in tokenizer:
            raise UnsupportedError(f"`{self.path}`: no vocabulary (`tokenizer.ggml.tokens`)", "take another file of it")
        note = f"keys left out, for they cannot be written again: {', '.join(lost)}"
        return tokenizer, origin, [note] if lost else []

    def _own_notes(self) -> list[str]:
        notes = []
        blocks = {int(block[1]) for name in self.store.tensors if (block := re.match(r"blk\.(\d+)\.", name))}
        if n_draft := sum(il >= self.arch.n_layer for il in blocks):
            notes.append(f"{n_draft} multi-token prediction layer(s) left out: GGUF runs the model without")
        if n := sum(tensor.dtype == "Q8_0" for tensor in self.store.tensors.values()):
            notes.append(
                f"{n} tensors of the source are Q8_0: what that lost stays lost, and the report compares with it"
            )
        return notes


def _plain(value: object) -> object | None:
    """A value as the writer takes it: of integers uint32, in lists int32, of floats float32; None where it cannot."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value if 0 <= value < 1 << 32 else None
    if not isinstance(value, list):
        return value
    kinds = {type(item) for item in value}
    if kinds == {float}:
        return np.array(value, np.float32)
    if kinds == {int} and not all(-(1 << 31) <= item < 1 << 31 for item in value):
        return None
    return value if kinds in ({str}, {int}) else None


@contextmanager
def _told() -> Iterator[None]:
    """The engine's errors as the quantiser's."""
    try:
        yield
    except cext.UnsupportedError as error:
        raise UnsupportedError(str(error), error.hint) from error
    except EngineError as error:
        raise CheckpointError(str(error), error.hint) from error
