"""An answer's text in which control tokens stay apart from letters that spell the same.

A control token that the model writes (a reasoning tag, the beginning of a tool call) shows as OPEN + spelling + CLOSE,
two code points that are no characters and that ordinary text never holds here.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from cext.tokenizer import REASONING

if TYPE_CHECKING:
    from cext.tokenizer import Tokenizer

OPEN, CLOSE = "\ufdd0", "\ufdd1"
MARK = re.compile(f"{OPEN}([^{OPEN}{CLOSE}]*){CLOSE}")
_NO_CHARACTERS = str.maketrans({OPEN: "\ufffd", CLOSE: "\ufffd"})


class Marked:
    """A tokenizer's stream of text (``scheduler.text.Characters``) with its control tokens marked."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._stream = tokenizer, tokenizer.stream()

    def feed(self, token: int) -> str:
        spelling = self._tokenizer.special_text(token)
        if spelling is None:
            return self._stream.feed(token).translate(_NO_CHARACTERS)
        return f"{self.finish()}{OPEN}{spelling}{CLOSE}"

    def finish(self) -> str:
        text = self._stream.finish().translate(_NO_CHARACTERS)
        self._stream = self._tokenizer.stream()
        return text


def typed(text: str) -> str:
    """Somebody's text, in which nothing shows as a control token."""
    return text.translate(_NO_CHARACTERS)


def plain(text: str) -> str:
    """Without its control tokens, but for reasoning tags, which are part of a text."""
    return MARK.sub(lambda match: match[1] if match[1] in REASONING else "", text)


def spelt(text: str) -> str:
    """With its control tokens as they are spelt."""
    return MARK.sub(r"\1", text)
