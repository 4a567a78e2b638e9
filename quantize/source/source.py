"""source.py: a model to quantise: its weights, its shape and all that a GGUF says of it beside."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from quantize.base.closing import Closing
from quantize.source import arch as arch_of
from quantize.source import card, tensors
from quantize.source.arch import Arch
from quantize.source.checkpoint import Checkpoint
from quantize.source.files import TEMPLATES, is_companion
from quantize.source.gguf_source import GgufSource
from quantize.source.gguf_store import SUFFIX
from quantize.source.store import Store
from quantize.source.vocab import Vocab, read_vocab


class Source(Protocol):
    """An open model. A context manager; leaving it closes its files. What is wrong with it is told as it is asked."""

    @property
    def store(self) -> Store:
        """Its weights."""

    @property
    def arch(self) -> Arch:
        """Its shape."""

    @property
    def name(self) -> str:
        """What it is called."""

    @property
    def tokenizer(self) -> Mapping[str, Any]:
        """The ``tokenizer.*`` keys of its GGUF."""

    @property
    def provenance(self) -> Mapping[str, object]:
        """Keys: licence and origin."""

    @property
    def notes(self) -> Sequence[str]:
        """What reading it found that a person should know, a sentence each."""

    def files(self) -> list[Path]:
        """The files that are its own, and not to be written over."""

    def left_out(self, used: Collection[str]) -> list[str]:
        """The names of stored tensors that are not used. UnsupportedError for one that it is not whole without."""

    def __enter__(self) -> Source: ...

    def __exit__(self, *exc: object) -> None: ...


class CheckpointSource(Closing):
    """A Hugging Face checkpoint folder."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.store = Checkpoint(path)

    def close(self) -> None:
        self.store.close()

    @cached_property
    def arch(self) -> Arch:
        return arch_of.parse(self.store.config)

    @property
    def name(self) -> str:
        return card.model_name(self.store.path)

    @property
    def tokenizer(self) -> Mapping[str, Any]:
        return self._vocab.keys()

    @property
    def provenance(self) -> Mapping[str, object]:
        return card.provenance(self.store.path)

    @property
    def notes(self) -> Sequence[str]:
        return self._vocab.notes

    @cached_property
    def _vocab(self) -> Vocab:
        return read_vocab(self.store.path, self.arch.n_vocab)

    def files(self) -> list[Path]:
        """A GGUF that was written into the folder is none of them."""
        folder = self.store.path
        paths = (path for path in (*folder.iterdir(), *folder.glob(f"{TEMPLATES}/*")) if path.is_file())
        return [
            path
            for path in paths
            if is_companion(path.relative_to(folder).as_posix())
            or (path.suffix == ".safetensors" and path.parent == folder)
        ]

    def left_out(self, used: Collection[str]) -> list[str]:
        stored = {name: tensor.dtype for name, tensor in self.store.tensors.items()}
        return tensors.left_out(self.arch, stored, {part for name in used for part in self.store.parts(name)})


def open_source(path: str | os.PathLike[str]) -> Source:
    """The model at a path: a checkpoint's folder, or a GGUF. CheckpointError, UnsupportedError."""
    place = Path(path)
    return GgufSource(place) if place.suffix == SUFFIX and not place.is_dir() else CheckpointSource(place)
