"""Lines of a conversation's notes, broken between words."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable

import pytest
from support.inprocess import Terminal, environment

from dsv2cli.console import Table, breaking_lines, broken, note, print_error, say_fields, show

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


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """What a call writes to a terminal of so many columns, without what dresses it."""

    def lines(columns: int, call: Callable[[], None]) -> list[str]:
        out = Terminal(io.BytesIO(), encoding="utf-8", write_through=True)
        with environment({"COLUMNS": str(columns), "TERM": "xterm"}):
            monkeypatch.setattr(sys, "stdout", out)
            monkeypatch.setattr(sys, "stderr", out)
            call()
            monkeypatch.undo()
        written = out.buffer.getvalue().decode()  # type: ignore[attr-defined]
        return [line.rstrip() for line in re.sub("\x1b\\[[0-9;]*m", "", written).splitlines()]

    return lines


def test_no_word_of_a_table_is_cut(seen: Callable[..., list[str]]) -> None:
    """In columns as long as the longest words of each fit beside one another, else below one another."""
    table = Table("Sizes", ("type", "read a token", "KLD of storyteller-52m", ""))
    table.add("q2_k", "1.06 GB", "0.109", "does not fit")
    table.add_line()
    table.add("all", "2.00 GB", "", "fits")
    everything = sorted(
        f"{table.title} {' '.join(table.columns)} q2_k 1.06 GB 0.109 does not fit all 2.00 GB fits".split()
    )
    assert "does not fit" in "".join(seen(55, lambda: show(table)))  # names break before cells
    for columns in (40, 41, 44, 50, 60, 100):
        lines = seen(columns, lambda: show(table))
        assert all(len(line) <= columns for line in lines), columns
        assert sorted(word for line in lines for word in line.split() if "\u2500" not in word) == everything, columns
    assert seen(30, lambda: show(table)) == [
        "Sizes", "q2_k", "  read a token: 1.06 GB", "  KLD of storyteller-52m:", "  0.109", "  does not fit", "",
        "all", "  read a token: 2.00 GB", "  fits",
    ]  # fmt: skip


def test_values_of_fields_hang_below_one_another(seen: Callable[..., list[str]]) -> None:
    fields = [("model", "one-name"), ("this machine", "reads prompts at a pace")]
    assert seen(40, lambda: say_fields(fields, 8)) == ["model    one-name", "this machine reads prompts at a pace"]
    assert seen(22, lambda: say_fields(fields, 13)) == [
        "model         one-name", "this machine  reads", "  prompts at a pace",
    ]  # fmt: skip


def test_notes_break_and_what_is_copied_does_not(seen: Callable[..., list[str]]) -> None:
    """But in a conversation, which is read."""
    assert seen(20, lambda: note("read 15 tokens at 145 tok/s")) == ["read 15 tokens at", "145 tok/s"]
    command = "dsv2 download owner/name --to here"
    failed = ["error: there is none", f"hint: {command}"]
    assert seen(20, lambda: print_error("there is none", command)) == failed

    def in_a_conversation() -> None:
        with breaking_lines():
            print_error("there is none", command)

    assert seen(20, in_a_conversation) == [failed[0], "hint: dsv2 download", "owner/name --to here"]
