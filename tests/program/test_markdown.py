"""Answers on a terminal: the same however they come, each character written once, lines broken between words."""

from __future__ import annotations

import itertools
import random
import re

import pytest
from support.emulator import Emulator

from dsv2cli.chat.markdown import LONGEST, MOST_ROWS, Markdown
from dsv2cli.chat.wrapping import Wrapper

TEXT = """# A heading with `code` of some length

A paragraph with **bold words**, *emphasis*, `code here` and 2 * 3 = 6, snake_case, __init__, and an **unclosed bold
next \\(x\\) line \\* star, ``a ` tick``, ***both***, *not
closed*.

- item one is long enough to be wrapped somewhere in the middle of the line
* [ ] two
  1. nested
> quoted text that goes on and on until it wraps

```python
def f(*args):
    return "a very long line in code that is not to be broken" + `x` # **no**
  ```
~~~
``` inside
~~~
---
| a | b |
|---|---|
| **1** | two \\| three |
| 3 | `four` | five |

| no | table

end 中文没有空格的长句子应该在任何字符处换行而不会出错吗 e\u0301\u0301
#no heading
    #    code
+
* *
1.
"""


PARTS = ["a", "bc ", " ", "\n", "*", "**", "`", "```", "|", "#", "- ", "1. ", "模", "\\", ">"]


class Shown:
    """What was written."""

    def __init__(self, columns: int = 40, *, markdown: bool = True) -> None:
        self.written: list[str] = []
        self.wrapper = Wrapper(self.put, lambda: columns)
        self.markdown = Markdown(self.wrapper, lambda: columns) if markdown else None

    def put(self, text: str, style: str | None) -> None:
        assert text
        self.written.append(f"\x1b[1m{text}\x1b[0m" if style else text)

    def feed(self, *pieces: str) -> str:
        for piece in pieces:
            (self.markdown or self.wrapper).feed(piece)
        (self.markdown or self.wrapper).finish()
        return "".join(self.written)


def unstyled(text: str) -> str:
    return text.replace("\x1b[1m", "").replace("\x1b[0m", "")


def words(text: str) -> str:
    return "".join(text.split())


@pytest.mark.parametrize("markdown", [True, False])
def test_however_it_comes_it_looks_the_same(markdown: bool) -> None:
    rng = random.Random(1)
    whole = unstyled(Shown(markdown=markdown).feed(TEXT))
    assert unstyled(Shown(markdown=markdown).feed(*TEXT)) == whole
    for _ in range(200):
        cuts = sorted(rng.sample(range(len(TEXT)), rng.randrange(1, 60)))
        pieces = [TEXT[a:b] for a, b in zip([0, *cuts], [*cuts, len(TEXT)], strict=True)]
        assert unstyled(Shown(markdown=markdown).feed(*pieces)) == whole


@pytest.mark.parametrize("columns", [1, 2, 10, 30, 40, 200])
def test_no_text_is_lost(columns: int) -> None:
    """Of random text, nothing but marks; without Markdown nothing but spaces where lines are broken."""
    rng = random.Random(columns)
    marks = re.compile(r"[*`#>|_~+.)\\•│─\s0-9-]")
    for _ in range(300):
        text = "".join(rng.choice(PARTS) for _ in range(rng.randrange(1, 80)))
        assert words(Shown(columns, markdown=False).feed(text)) == words(text)
        assert marks.sub("", unstyled(Shown(columns).feed(*text))) == marks.sub("", text), repr(text)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("**bold** and *it* and `x*y*`", "\x1b[1mbold\x1b[0m and \x1b[1mit\x1b[0m and \x1b[1mx*y*\x1b[0m"),
        ("2 * 3 * 4 and a ** b", "2 * 3 * 4 and a ** b"),
        ("*args, **kwargs", "*args, **kwargs"),
        ("snake_case __init__ _x_", "snake_case __init__ _x_"),
        ("`open", "`open"),
        ("# Title", "\x1b[1mTitle\x1b[0m"),
        ("#hashtag", "#hashtag"),
        ("1. one", "1. one"),
        ("- one", "• one"),
        ("-5 degrees", "-5 degrees"),
        ("--- a/file", "--- a/file"),
        ("a | b", "a | b"),
        ("\\(x\\) \\*y\\*", "\\(x\\) *y*"),
        ("```\n  a **b**\n```", "\x1b[1m```\x1b[0m\n\x1b[1m  a **b**\x1b[0m\n\x1b[1m```\x1b[0m"),
        ("|a|b|\n|-|-|\n|1|22|\nx", "\x1b[1ma  b\x1b[0m\n\x1b[1m─────\x1b[0m\n1  22\nx"),
    ],
)
def test_marks(text: str, shown: str) -> None:
    assert Shown().feed(*text).replace("\x1b[0m\x1b[1m", "") == f"{shown}\n"


def test_what_waits_is_bounded() -> None:
    shown = Shown()
    assert shown.markdown is not None
    shown.markdown.feed("`" + "word " * 200)
    assert len("".join(shown.written)) > 1000 - LONGEST - 40
    shown = Shown()
    shown.markdown.feed("| a | b |\n|---|---|\n" + "| 1 | 2 |\n" * (MOST_ROWS + 10))
    assert "".join(shown.written).count("\n") >= MOST_ROWS
    for begins in ("| ", "```", "- - - ", "```\n```x"):
        shown = Shown()
        shown.markdown.feed(begins + "word " * 200)
        assert len("".join(shown.written)) > 1000 - LONGEST - 40, begins
    shown = Shown()
    shown.markdown.feed("One two thr")
    assert "".join(shown.written) == "One two"


@pytest.mark.parametrize("columns", [10, 30, 79])
def test_lines_are_broken_between_words(columns: int) -> None:
    rng = random.Random(columns)
    text = " ".join("x" * rng.randrange(1, 10) for _ in range(400))
    lines = Shown(columns, markdown=False).feed(text).split("\n")
    assert " ".join(lines).split() == text.split() and max(map(len, lines)) <= columns
    for line, following in itertools.pairwise(lines):
        first = following.split()[0] if following.split() else ""
        assert not first or len(line) + 1 + len(first) > columns, "a line is as full as it can be"


@pytest.mark.parametrize("columns", [30, 80])
def test_10000_lines_leave_a_whole_scrollback(columns: int) -> None:
    """Each once, in order, with nothing redrawn and few bytes beside the text."""
    rng = random.Random(2)
    kinds = ["{}. **line** number with `code` and more words to wrap", "## Heading {}", "- item {} of *many* things",
             "| {} | cell |", "> quoted line {}", "plain line {} of text", "    indented {}"]  # fmt: skip
    text = "\n".join(kinds[i % len(kinds)].format(i) + ("\n" if i % 11 == 0 else "") for i in range(10_000))
    pieces, at = [], 0
    while at < len(text):
        n = rng.randrange(1, 12)
        pieces.append(text[at : at + n])
        at += n
    written = Shown(columns).feed(*pieces)
    assert len(written.encode()) < 3 * len(text.encode())
    assert not re.search(r"\r|\x1b\[[^m]*[A-HJKf]", written), "the cursor only ever goes on"
    screen = Emulator(24, columns)
    screen.feed(written.replace("\n", "\r\n").encode())
    seen = [int(n) for n in re.findall(r"\d+", screen.text)]
    assert seen == list(range(10_000))
