"""--ram: a model that is larger than its memory answers as one that is not, and says what that took."""

import json
from pathlib import Path

import pytest
from support.cli import assert_fails, dsv2, dsv2_after

from dsv2cli import locate

MODEL = str(locate.model(None))

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


SCARCE = "import cext.system; cext.system.free_bytes = lambda *root, swap=True: {free}"


def test_what_does_not_fit_runs_without_a_flag() -> None:
    """The packaged model where memory for a part of it is free, beside what its context and steps take."""
    here = json.loads(dsv2("inspect", "--json").stdout)["ram"]
    free = (here["auto"]["beside"] + 22_000_000) * 4 // 3
    whole = json.loads(dsv2(*ASK).stdout)
    part = dsv2_after(SCARCE.format(free=free), *ASK)
    told = json.loads(part.stdout)
    assert told["answer"] == whole["answer"] and told["drive"]["ram"] < 23_000_000
    assert 0 < told["drive"]["held_share"] < 1 and told["drive"]["decoding"]["ready_share"] > 0
    said = [line for line in part.stderr.splitlines() if "memory holds" in line]
    assert len(said) == 1 and "29.14 MB of weights" in said[0]
    assert "memory holds" not in dsv2_after(SCARCE.format(free=free), *ASK, "-q").stderr
    assert "memory holds" not in dsv2_after(SCARCE.format(free=free), *ASK, "--ram", "all").stderr
    assert dsv2(*ASK).stderr == dsv2(*ASK, "--ram", "all").stderr


def test_inspect_tells_what_budgets_hold() -> None:
    told = json.loads(dsv2("inspect", "--json").stdout)["ram"]
    assert told["auto"]["ram"] is None and told["by_usage"]
    shares = [row["held_share"] for row in told["budgets"]]
    assert shares == sorted(shares) and shares[-1] == 1 and told["budgets"][0]["ram"] == told["least"]
    shown = dsv2("inspect").stdout
    least = shown.split("the least")[1].split()[0]
    assert json.loads(dsv2(*ASK, "--ram", least).stdout)["drive"]["held_share"] < 0.1
    assert dsv2(*ASK, "--ram", f"{told['least'] - 1000}").returncode == 2
    assert "--ram auto" in shown and "all is mapped" in shown


def test_bench_tells_of_the_drive() -> None:
    run = dsv2("bench", "-p", "20", "-n", "4", "-r", "1", "--json", "--ram", "20M")
    drive = json.loads(run.stdout)["engines"]["dsv2"]["drive"]
    assert drive["ram"] == 20_000_000 and drive["decoding"]["bytes_per_token"] > 0 and "memory holds" in run.stderr
    assert (
        json.loads(dsv2("bench", "-p", "0", "-n", "2", "-r", "1", "--json").stdout)["engines"]["dsv2"]["drive"] is None
    )


def test_perplexity_beside_itself_within_a_budget(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("The ship made music. " * 60)
    ask = ("perplexity", MODEL, "--text", str(tmp_path / "text"), "-c", "64", "--reference-kv", "f32", "--json")
    assert json.loads(dsv2(*ask, "--ram", "20M").stdout) == json.loads(dsv2(*ask).stdout)


@pytest.mark.parametrize("command", ["chat", "bench", "perplexity", "serve", "batch"])
def test_every_command_that_runs_a_model_has_it(command: str) -> None:
    more = {
        "perplexity": (MODEL, "--text", __file__),
        "chat": ("-p", "x"),
        "batch": (__file__, "-o", "out.jsonl", "--template", "{text}"),
    }.get(command, ())
    assert_fails(dsv2(command, *more, "--ram", "much"), 2, "--ram", "much", "auto")
    if command not in ("serve", "batch"):  # which say it when they have loaded
        assert_fails(dsv2(command, *more, "--ram", "1M"), 2 if command != "bench" else 1, "at least", "1.00 MB")


@pytest.mark.parametrize(
    ("ram", "code", "words"),
    [
        ("much", 2, ["--ram", "much", "9.5G"]),
        ("0", 2, ["--ram"]),
        ("1M", 2, ["1.00 MB", "at least", "13.14M", "more memory"]),
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
