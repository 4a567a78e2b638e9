"""dsv2 bench as a process: alone and beside llama.cpp."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

from support.cli import assert_fails, dsv2
from support.tiny import (
    spec_named,
    variant,
)
from support.vocab import write_model

from dsv2cli.commands.bench import parse_depths

SPEC = variant(spec_named("lite"), n_ctx=4096)


def test_bench_alone(model: Path) -> None:
    result = dsv2("bench", model, "-p", "16", "-n", "4", "-d", "0,32", "-r", "2", "-t", "1")
    assert result.returncode == 0, result.stderr
    for test in ("prefill 16 ", "decode 4 ", "prefill 16 at 32", "decode 4 at 32"):
        assert test in result.stdout
    assert "first logits" in result.stdout and "median of 2 rounds" in result.stderr


def test_bench_beside_llama_cpp(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf", variant(SPEC, n_layer=27))  # without q-LoRA it runs 26, 27 or 48 layers
    result = dsv2("bench", path, "-p", "16", "-n", "2", "-r", "2", "-t", "1", "--against", "llama.cpp", "--json", "-q")
    assert result.returncode == 0, result.stderr
    told = json.loads(result.stdout)
    assert set(told["engines"]) == {"dsv2", "llama.cpp"} and told["threads"] == 1
    for test in told["tests"]:
        ours, theirs = test["tokens_per_second"]["dsv2"], test["tokens_per_second"]["llama.cpp"]
        assert len(ours) == len(theirs) == 2 and min(ours + theirs) > 0
        assert test["ratios"] == {"llama.cpp": [a / b for a, b in zip(ours, theirs, strict=True)]}
        assert test["variants"]["llama.cpp"] in ("fa=0", "fa=1")
    assert all(e["load_seconds"] > 0 and e["anonymous_bytes"] > 0 for e in told["engines"].values())


def test_bench_as_csv(model: Path) -> None:
    result = dsv2("bench", model, "-p", "8", "-n", "2", "-r", "2", "-t", "1", "--csv", "-q")
    rows = list(csv.DictReader(io.StringIO(result.stdout)))
    assert [(r["kind"], r["n"], r["depth"], r["round"]) for r in rows] == [
        ("prefill", "8", "0", "0"), ("prefill", "8", "0", "1"), ("decode", "2", "0", "0"), ("decode", "2", "0", "1")
    ]  # fmt: skip
    assert all(float(r["tokens_per_second"]) > 0 for r in rows)


def test_a_model_that_llama_cpp_does_not_run(model: Path) -> None:
    result = dsv2("bench", model, "-p", "8", "-n", "0", "-r", "1", "--against", "llama.cpp")
    assert_fails(result, 1, "cannot load it")
    assert result.stderr.count("llama.cpp") == 1


def test_errors_of_the_engine_are_told_as_in_other_commands(model: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(model.read_bytes()[:-100])
    errors = {dsv2(verb, bad).stderr for verb in ("inspect", "bench")}
    assert len(errors) == 1 and errors.pop().startswith("error: `")


def test_depths_are_sorted_and_each_runs_once() -> None:
    assert parse_depths("4096, 0,4096") == [0, 4096]
