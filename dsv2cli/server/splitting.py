"""An answer as it comes, in its parts: reasoning, content, and the control tokens that a dialect may want to see."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

from cext.chat import THINK_TAGS
from dsv2cli.scheduler.text import overlap
from dsv2cli.server.marked import CLOSE, MARK, OPEN, typed

if TYPE_CHECKING:
    from cext.tokenizer import Tokenizer


class Part(NamedTuple):
    kind: Literal["reasoning", "content", "control"]
    text: str


class Splitter:
    """Feed it an answer's text, as ``Marked`` spells it. Where a reasoning tag is a token, only that token counts;
    where it is none, its letters do, and text that may become one waits.

    opening: the tag at the end of the prompt, if the answer begins in the middle of its reasoning.
    """

    def __init__(self, tokenizer: Tokenizer, opening: str = "") -> None:
        spelt = {tag for pair in THINK_TAGS for tag in pair}
        self._tokens = {tag for tag in spelt if tokenizer.control_id(tag) is not None}
        self._letters = [(o, c) for o, c in THINK_TAGS if o not in self._tokens]
        self._reasoning = bool(opening.strip())
        self._began = False  # something other than space has come, so that no tag can open any more
        self._at_edge = True  # spaces at the edge of a part are nobody's
        self._held = ""

    def begin(self, text: str) -> None:
        """What stands before the answer and belongs to it, as somebody typed it: it tells reasoning from content."""
        self.finish(typed(text))

    def feed(self, text: str) -> list[Part]:
        parts: list[Part] = []
        self._held += text
        at = 0
        held, self._held = self._held, ""
        for match in MARK.finditer(held):
            self._plain(held[at : match.start()], parts, final=True)
            self._control(match[1], parts)
            at = match.end()
        self._plain(held[at:], parts, final=False)
        return parts

    def finish(self, text: str = "") -> list[Part]:
        parts = self.feed(text)
        held, self._held = self._held, ""
        self._say(held, parts)
        return parts

    def _control(self, spelling: str, parts: list[Part]) -> None:
        if spelling in self._tokens:
            opens = any(spelling == o for o, _ in THINK_TAGS)
            self._turn(opens and not self._began if opens else False)
        else:
            self._began = True
            parts.append(Part("control", spelling))

    def _turn(self, reasoning: bool) -> None:
        self._reasoning, self._began, self._at_edge = reasoning, True, True

    def _plain(self, text: str, parts: list[Part], *, final: bool) -> None:
        text = text.replace(OPEN, "").replace(CLOSE, "")
        while text:
            tag, at = self._next_tag(text)
            if at < 0:
                keep = 0 if final else len(text) - self._waits(text)
                if final:
                    self._say(text, parts)
                else:
                    self._say(text[:keep], parts)
                    self._held = text[keep:]
                return
            self._say(text[:at], parts)
            self._turn(not self._reasoning)
            text = text[at + len(tag) :]

    def _wanted(self) -> list[str]:
        if self._reasoning:
            return [c for _, c in self._letters]
        return [] if self._began else [o for o, _ in self._letters]

    def _next_tag(self, text: str) -> tuple[str, int]:
        found = [(text.find(tag), tag) for tag in self._wanted() if tag in text]
        if not found:
            return "", -1
        at, tag = min(found)
        if not self._reasoning and text[:at].strip():  # an opening tag only opens at the beginning
            return "", -1
        return tag, at

    def _waits(self, text: str) -> int:
        """How many characters at the end may belong to a tag that is wanted."""
        if not self._reasoning and text.strip() and not any(t.startswith(text.lstrip()) for t in self._wanted()):
            return 0
        return max((overlap(text, tag) for tag in self._wanted()), default=0)

    def _say(self, text: str, parts: list[Part]) -> None:
        if self._at_edge and (self._reasoning or self._began):
            text = text.lstrip()
        if not text:
            return
        if text.strip():
            self._began, self._at_edge = True, False
        parts.append(Part("reasoning" if self._reasoning else "content", text))
