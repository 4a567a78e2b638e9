"""An answer's text as its tokens come."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol


class Characters(Protocol):
    """What is needed of a ``cext.tokenizer.TextStream``."""

    def feed(self, token: int) -> str: ...
    def finish(self) -> str: ...


class Text:
    """Whole characters only; and what may be the beginning of a stop string waits until it is one or is none.

    The answer ends before the stop string that is complete first, wherever tokens begin and end in it. ValueError for
    an empty stop string.
    """

    def __init__(self, characters: Characters, stops: Iterable[str] = ()) -> None:
        self._characters = characters
        self._stops = tuple(stops)
        if not all(self._stops):
            raise ValueError("a stop string is empty")
        self._held = ""
        self.stop: str | None = None  # the stop string that came

    def feed(self, token: int) -> str:
        """The text that is certain now."""
        piece = self._characters.feed(token)
        return self._release(piece) if self._stops else piece

    def finish(self) -> str:
        """What waited, when no token follows; nothing after a stop string."""
        text = self._release(self._characters.finish()) + self._held
        self._held = ""
        return text

    def _release(self, piece: str) -> str:
        if self.stop is not None:
            return ""
        self._held += piece
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            _, at, self.stop = min(found)
            keep = len(self._held) - at
        else:
            keep = max((overlap(self._held, stop) for stop in self._stops), default=0)
        text = self._held[: len(self._held) - keep]
        self._held = "" if self.stop is not None else self._held[len(text) :]
        return text


def overlap(text: str, stop: str) -> int:
    """The length of the longest end of ``text`` that begins ``stop``."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
