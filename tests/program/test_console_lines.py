"""Lines of a conversation's notes, broken between words."""

from __future__ import annotations

import pytest

from dsv2cli.console import broken

HELP = "  /save NAME          give this conversation a name (it is kept as it goes)"


@pytest.mark.parametrize(
    ("line", "columns", "expected"),
    [
        ("a few words", 11, ["a few words"]),
        ("a few words", 10, ["a few", "words"]),
        (HELP, 70, ["  /save NAME          give this conversation a name (it is kept as it", " " * 22 + "goes)"]),
        (HELP, 30, ["  /save NAME          give", "    this conversation a name", "    (it is kept as it goes)"]),
        ("wort " + "x" * 40, 20, ["wort", "x" * 40]),  # wider than the window: the terminal's to break
        ("x" * 40, 20, ["x" * 40]),
        ("漢字漢字 漢字漢字", 16, ["漢字漢字", "漢字漢字"]),  # two columns each
        ("", 2, [""]),
        ("end   ", 4, ["end"]),
    ],
)
def test_lines_break_between_words(line: str, columns: int, expected: list[str]) -> None:
    assert broken(line, columns).split("\n") == expected


def test_nothing_is_lost() -> None:
    line = "  one   two  three " + "four " * 30
    for columns in range(2, 90):
        for indented in (True, False):
            lines = broken(line, columns, indented=indented).split("\n")
            assert " ".join(lines).split() == line.split()
            assert all(len(it) <= max(columns, columns // 3 + 5) for it in lines), columns
