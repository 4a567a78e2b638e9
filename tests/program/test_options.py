"""Numbers outside an option's range are refused before anything is read, with the option and the range named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.inprocess import run
from support.tiny import spec_named, variant
from support.vocab import write_model

from dsv2cli.chat.conversation import room_hint
from dsv2cli.options import LARGEST, MAX_CONTEXT, MAX_SEED, Range

OUTSIDE = {
    "chat": {
        "--top-p": ["0", "-0.1", "1.01", "nan", "1e-60"],
        "--temp": ["-1", "inf", "nan", "-inf", "1e39", "1e400"],
        "--top-k": ["-1", "2147483648", "99999999999"],
        "--min-p": ["-0.1", "1.5", "nan"],
        "--repeat-penalty": ["0", "inf", "nan", "1e39"],
        "--seed": ["-1", "18446744073709551616", "9" * 40],
        "-c": ["1", "-1", "16777217", "99999999999"],
        "-n": ["0", "-1", "2147483648"],
        "-t": ["0", "513", "99999999999"],
        "--lookup": ["-1", "16"],
    },
    "inspect": {"-c": ["1", "-1", "9" * 400]},
    "perplexity": {"--windows": ["0", "99999999999"], "--skip": ["-1", "99999999999"], "-c": ["1"], "-t": ["513"]},
    "bench": {"-p": ["-1", "16777217"], "-n": ["-1"], "-r": ["0", "99999999999"], "-d": ["-1", "16777217", "9" * 40]},
    "quantize": {"--calibration-tokens": ["1023", "99999999999"], "-t": ["0", "99999999999"]},
}


@pytest.mark.parametrize(
    ("verb", "option", "value"),
    [
        (verb, option, value)
        for verb, options in OUTSIDE.items()
        for option, values in options.items()
        for value in values
    ],
)
def test_outside(verb: str, option: str, value: str) -> None:
    more = ["-p", "x"] if verb == "chat" else ["--text", "none.txt"] if verb == "perplexity" else []
    ran = run(verb, "none.gguf", *more, option, value)
    assert ran.code == 2 and ran.out == b"", ran
    assert option in ran.told and "no such file" not in ran.told


def test_edges_are_inside() -> None:
    for inside, numbers in {
        Range(0, 1, open_low=True): (1e-30, 1.0),
        Range(0.01, LARGEST): (0.01, 3.4e38),
        Range(0, MAX_SEED): (0, MAX_SEED),
        Range(2, MAX_CONTEXT, or_zero=True): (0, 2, MAX_CONTEXT),
    }.items():
        for number in numbers:
            assert inside.check(number) == number


def test_a_context_of_0_is_what_the_model_was_trained_for(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf", variant(spec_named("lite"), n_ctx=6000))
    counts = {}
    for context in ("0", "6000", "4096"):
        told = json.loads(run("chat", path, "-p", "Hi", "-n", "1", "--json", "-c", context).out)
        counts[context] = told["kv_bytes"]
    assert counts["0"] == counts["6000"] >= counts["4096"]
    (row,) = json.loads(run("inspect", path, "--json", "-c", "0").out)["memory"]
    assert row["context"] == 6000


@pytest.mark.parametrize(
    ("n", "trained", "hint"),
    [
        (3000, 163840, "-c 4096 makes room"),
        (3000, 0, "-c 4096 makes room"),
        (4000, 4096, "-c 4096 makes room for them: all that"),
        (24010, 4096, "shorten it: the model was trained for 4096 tokens"),
        (MAX_CONTEXT, 4096, "shorten it"),
    ],
)
def test_the_hint_of_a_long_prompt_knows_the_model(n: int, trained: int, hint: str) -> None:
    assert room_hint(n, trained).startswith(hint)
