"""A model opened for use: the engine's model and the file's tokenizer, loaded side by side."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dsv2cli import console
from dsv2cli.errors import CliError
from dsv2cli.options import MAX_CONTEXT

if TYPE_CHECKING:
    from cext import Model, Session
    from cext.model import KvType
    from cext.tokenizer import Tokenizer

DEFAULT_CONTEXT = 4096


@dataclass(frozen=True)
class Runtime:
    """An open model, its tokenizer, and how long opening took (seconds)."""

    path: Path
    model: Model
    tokenizer: Tokenizer
    load_seconds: float

    @property
    def name(self) -> str:
        return self.model.hparams["name"] or self.path.stem

    @property
    def n_ctx_train(self) -> int:
        """Tokens of context that the model was trained for; 0 where its file does not say."""
        return self.model.hparams["n_ctx_train"]

    def context(self, n_ctx: int) -> int:
        """``n_ctx``, or for 0 what the model was trained for."""
        return n_ctx or min(self.n_ctx_train or DEFAULT_CONTEXT, MAX_CONTEXT)

    def session(self, n_ctx: int | None, kv_type: KvType = "f16") -> Session:
        """A session of ``n_ctx`` tokens; 0: see ``context``. By default 4096, or what it was trained for if less."""
        trained = self.n_ctx_train
        n_ctx = min(DEFAULT_CONTEXT, trained or DEFAULT_CONTEXT) if n_ctx is None else self.context(n_ctx)
        if trained and n_ctx > trained:
            console.warn(f"the model was trained for {trained} tokens of context; past them it may write nonsense")
        return self.model.session(n_ctx, kv_type)


@contextmanager
def open_model(path: Path, threads: int | None) -> Iterator[Runtime]:
    """Model and tokenizer of a GGUF. EngineError, OSError."""
    begun = time.perf_counter()
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(_load_tokenizer, path)
        from cext import Model

        model = Model(path, threads)
        tokenizer = loading.result()
    tell(path, [*model.notes, *tokenizer.notes])
    with model, tokenizer:
        n_rows = model.hparams["n_vocab"]
        if tokenizer.n_vocab > n_rows:
            raise CliError(
                f"`{path}`: the vocabulary has {tokenizer.n_vocab} tokens and the model {n_rows}",
                "the file was made with another model's tokenizer",
            )
        yield Runtime(path, model, tokenizer, time.perf_counter() - begun)


def tell(path: Path, notes: Iterable[str]) -> None:
    """What the engine and the tokenizer have to say about a file, once, on stderr."""
    for line in notes:
        console.warn(console.printable(f"`{path}`: {line}"))


def _load_tokenizer(path: Path) -> Tokenizer:
    from cext.tokenizer import Tokenizer

    return Tokenizer(path)
