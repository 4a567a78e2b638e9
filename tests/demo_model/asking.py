"""The program's own conversations over a GGUF, without the terminal: what score.py asks."""

from collections.abc import Sequence
from pathlib import Path

import cext
from cext.tokenizer import Tokenizer
from dsv2cli.conversation import Conversation
from dsv2cli.scheduler import End, Token


class Program:
    """A model, and conversations with it under the sampler's defaults."""

    def __init__(self, path: Path) -> None:
        self._model, self._tokenizer = cext.Model(path), Tokenizer(path)

    def converse(self, asks: Sequence[str], seed: int, limit: int, system: str | None = None) -> list[str]:
        """The answer to each ask, one after another; an answer cut at `limit` tokens ends in a NUL."""
        out = []
        talk, sampler = Conversation(self._model.session(n_ctx=2048), self._tokenizer, system), cext.Sampler(seed=seed)
        for ask in asks:
            text = ""
            for event in talk.reply(ask, sampler, limit):
                if isinstance(event, Token | End):
                    text += event.text
                if isinstance(event, End) and event.reason == "length":
                    text += "\x00"
            out.append(text)
        return out
