"""bpe.py: a byte-level BPE vocabulary as its file tells it, in the form that GGUF keeps."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantize.base.errors import CheckpointError

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # tokenizer.ggml.token_type


@dataclass(frozen=True)
class Bpe:
    """What a reader makes of its file."""

    pre: str  # GGUF's name for how text is split into words
    tokens: tuple[str, ...]  # one a row of the embedding; "[PAD7]" where the vocabulary has none
    types: tuple[int, ...]
    merges: tuple[str, ...]  # "left right", the earlier the sooner
    in_front: str | None = None  # the token that the file puts before every text
    notes: tuple[str, ...] = ()


class Table:
    """Tokens by id, in the making. Every failure names the file, the token and the id."""

    def __init__(self, path: Path, n_vocab: int) -> None:
        self.path, self.n_vocab = path, n_vocab
        self.ids: dict[str, int] = {}
        self._kinds: dict[int, tuple[str, int]] = {}

    def put(self, text: Any, id_: Any, kind: int) -> None:
        """Enter a token; the later kind counts where the same token comes twice."""
        if not isinstance(text, str) or not isinstance(id_, int) or isinstance(id_, bool):
            raise CheckpointError(f"`{self.path}`: token {text!r} has id {id_!r}, expected a text and a number")
        if not 0 <= id_ < self.n_vocab:
            raise CheckpointError(
                f"`{self.path}`: token {text!r} has id {id_}, config.json's vocab_size is {self.n_vocab}"
            )
        known = self._kinds.get(id_)
        if known is not None and known[0] != text:
            raise CheckpointError(f"`{self.path}`: tokens {known[0]!r} and {text!r} share id {id_}")
        if self.ids.setdefault(text, id_) != id_:
            raise CheckpointError(f"`{self.path}`: token {text!r} has the ids {self.ids[text]} and {id_}")
        self._kinds[id_] = (text, kind)

    def __contains__(self, id_: int) -> bool:
        return id_ in self._kinds

    def rows(self) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """(tokens, types) of all ids, padding where there is none."""
        all_ = [self._kinds.get(i, (f"[PAD{i}]", UNUSED)) for i in range(self.n_vocab)]
        return tuple(text for text, _ in all_), tuple(kind for _, kind in all_)


def added_kind(token: dict[str, Any]) -> int:
    """Of a token beside the byte pairs. Those that text must never become are control tokens: chat and fill-in markers
    count, though a checkpoint may call them plain."""
    text = str(token.get("content"))
    bracketed = (text.startswith("<｜") and text.endswith("｜>")) or (text.startswith("<|") and text.endswith("|>"))
    return CONTROL if token.get("special") or bracketed else USER_DEFINED
