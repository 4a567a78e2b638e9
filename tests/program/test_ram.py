"""--ram: a model that is larger than its memory answers as one that is not, and says what that took."""

import json

import pytest
from support.cli import dsv2

ASK = ("chat", "-p", "Tell me a story about a ship. " * 8, "-n", "12", "--seed", "3", "--json")


def test_an_answer_within_a_budget_is_the_same() -> None:
    whole = json.loads(dsv2(*ASK).stdout)
    part = json.loads(dsv2(*ASK, "--ram", "20M").stdout)
    assert whole["drive"] is None
    assert part["answer"] == whole["answer"]
    assert part["drive"]["decoding"]["bytes_read"] > 0
    assert part["drive"]["reading"]["tokens"] > 10


def test_a_long_prompt_is_read_at_once_and_answered_the_same() -> None:
    """In one step of the pieces that a model in memory is stepped in: experts are read once for all of them."""
    ask = (*ASK[:2], "Tell me a story about a ship. " * 150, *ASK[3:])
    whole = json.loads(dsv2(*ask).stdout)
    part = json.loads(dsv2(*ask, "--ram", "20M").stdout)
    assert part["prompt_tokens"] > 2 * 512
    assert part["answer"] == whole["answer"]
    assert part["drive"]["reading"]["bytes_read"] < 30e6, "the whole file"


def test_statistics_tell_of_the_drive() -> None:
    ask = ("chat", "-p", "A ship", "-n", "4")
    assert "read a token" in dsv2(*ask, "--ram", "20M").stderr
    assert "read a token" not in dsv2(*ask, "--ram", "all").stderr


@pytest.mark.parametrize(
    ("ram", "code", "words"),
    [
        ("much", 2, ["--ram", "much", "9.5G"]),
        ("0", 2, ["--ram"]),
        ("1M", 2, ["1000000 bytes of memory", "expected at least", "more memory"]),
    ],
)
def test_sizes_that_cannot_be(ram: str, code: int, words: list[str]) -> None:
    result = dsv2(*ASK, "--ram", ram)
    assert result.returncode == code
    assert all(word in result.stderr for word in words), result.stderr


def test_it_is_not_llama_cpp_s() -> None:
    result = dsv2(*ASK, "--ram", "20M", "--engine", "llama.cpp")
    assert result.returncode == 2
    assert "--ram" in result.stderr
