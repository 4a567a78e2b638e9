"""dsv2 bench --against ik=PATH: ik_llama.cpp's llama-bench is asked for the test that is wanted, and its answer is
found in what it prints. The program here is a stand-in that prints the true one's form, and the speed that a file
beside it says."""

from __future__ import annotations

import csv
import io
import json
import stat
import sys
from pathlib import Path

import pytest
from support.cli import assert_fails, dsv2
from support.tiny import spec_named, variant
from support.vocab import write_model

from dsv2cli.benchmark import Test
from dsv2cli.errors import CliError, UsageError
from dsv2cli.llama_bench import LlamaBench, settings

# A row of `llama-bench -o json`, without those of its fields that tell of GPUs.
ROW = """  {{
    "build_commit": "", "build_number": 0,
    "cpu_info": "Some \\"quoted\\" processor",
    "model_filename": "m.gguf",
    "model_size": 10359000000,
    "n_threads": {threads},
    "type_k": "{type_k}",
    "flash_attn": true,
    "mla_attn": 3,
    "repack": {repack},
    "fused_moe": true,
    "n_prompt": {n_prompt},
    "n_gen": {n_gen},
    "test_time": "2026-08-01T12:00:00Z",
    "avg_ns": 1000000,
    "stddev_ns": 0,
    "avg_ts": {rate},
    "stddev_ts": 0.000000,
    "test": "tg32@pp4096",
    "samples_ns": [ 1000000 ],
    "samples_ts": [ {rate} ]
  }}"""
STAND_IN = """#!{python}
import pathlib, sys
ROW = {row!r}
home = pathlib.Path(__file__).parent
asked = dict(zip(sys.argv[1::2], sys.argv[2::2], strict=True))
with (home / "asked").open("a") as file:
    file.write(" ".join(sys.argv[1:]) + "\\n")
assert asked.keys() <= {{"-m", "-t", "-fmoe", "-mla", "-fa", "-rtr", "-r", "-o", "-p", "-n", "-gp", "-ctk"}}, asked
assert asked["-o"] == "json" and asked["-r"] == "1", asked
print("a library's own line")
print("[")
tests = [(int(asked.get("-p", 512)), 0), (0, int(asked.get("-n", 128)))]
tests += [tuple(map(int, asked["-gp"].split(",")))] if "-gp" in asked else []
rate = float((home / "rate").read_text()) * (1 if asked["-rtr"] == "1" else 0.5)
print(",\\n".join(
    ROW.format(
        threads=asked["-t"], type_k=asked.get("-ctk", "f16"), n_prompt=p, n_gen=g, rate=rate,
        repack="true" if asked["-rtr"] == "1" else "false",
    )
    for p, g in tests if p or g
))
print("\\n]")
"""


def program(folder: Path, text: str, name: str = "llama-bench") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    (tmp_path / "rate").write_text("1000", encoding="utf-8")
    return program(tmp_path, STAND_IN.format(python=sys.executable, row=ROW))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("bench") / "m.gguf", variant(spec_named("lite"), n_ctx=256))


def test_each_round_has_both_settings_and_their_ratios(model: Path, stand_in: Path) -> None:
    asked = ("-p", "16", "-n", "2", "-d", "0,32", "-r", "2", "-t", "1", "--against", f"ik={stand_in}", "--json", "-q")
    result = dsv2("bench", model, *asked)
    assert result.returncode == 0, result.stderr
    told = json.loads(result.stdout)
    assert set(told["engines"]) == {"dsv2"}  # the memory of a process that comes and goes is not told
    tests = {(t["kind"], t["depth"]): t for t in told["tests"]}
    for (kind, depth), test in tests.items():
        measured = set() if (kind, depth) == ("prefill", 32) else {"ik -rtr 1", "ik -rtr 0"}  # it has no such test
        assert set(test["ratios"]) == set(test["ratio"]) == measured == set(test["tokens_per_second"]) - {"dsv2"}
        for peer in measured:
            theirs = test["tokens_per_second"][peer]
            assert theirs == [1000.0 if peer == "ik -rtr 1" else 500.0] * 2
            ours = test["tokens_per_second"]["dsv2"]
            assert test["ratios"][peer] == [a / b for a, b in zip(ours, theirs, strict=True)]
            assert test["variants"][peer] == f"-fmoe 1 -mla 3 -fa 1 {peer.removeprefix('ik ')}"
    lines = (stand_in.parent / "asked").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 3 * 2 * 3  # tests, settings, rounds and the one that warms up
    assert all(f"-m {model.absolute()} -t 1 -fmoe 1 -mla 3 -fa 1 -rtr" in line for line in lines)
    assert [line.split("json ")[1] for line in lines[::6]] == ["-p 16 -n 0", "-p 0 -n 2", "-p 0 -n 0 -gp 32,2"]
    assert [line.split("-rtr ")[1][0] for line in lines] == ["1", "0"] * 9  # in turns


def test_a_table_and_a_csv_leave_out_what_was_not_measured(model: Path, stand_in: Path) -> None:
    asked = ("-p", "8", "-n", "2", "-d", "16", "-r", "1", "-t", "1", "--against", f"ik={stand_in}", "-q")
    shown = dsv2("bench", model, *asked)
    assert shown.returncode == 0, shown.stderr
    line = next(line for line in shown.stdout.splitlines() if "prefill 8 at 16" in line)
    assert line.count("-") == 4 and "1000.0" in shown.stdout and "500.0" in shown.stdout
    rows = list(csv.DictReader(io.StringIO(dsv2("bench", model, *asked, "--csv").stdout)))
    assert [(r["engine"], r["kind"]) for r in rows] == [
        ("dsv2", "prefill"), ("dsv2", "decode"), ("ik -rtr 1", "decode"), ("ik -rtr 0", "decode")
    ]  # fmt: skip


def test_the_cache_is_compared_with_its_like(stand_in: Path) -> None:
    for kv, given in (("q8_0", "-ctk q8_0"), ("f16", ""), ("f32", "")):
        repacked, in_place = settings(stand_in, kv)
        assert (repacked.repacked, in_place.repacked) == (True, False)
        assert repacked.setting == " ".join(filter(None, ["-fmoe 1 -mla 3 -fa 1", given, "-rtr 1"]))


def test_a_program_of_this_folder_is_no_command_of_the_path(stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(stand_in.parent)
    assert settings(Path("llama-bench"), "f16")[0].path == stand_in
    with pytest.raises(UsageError, match="`sh` is not there"):
        settings(Path("sh"), "f16")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("echo 'error: invalid parameter for argument: -fmoe' >&2; exit 1", "exit code 1: .*-fmoe"),
        ("kill -SEGV $$", "ended by SIGSEGV"),
        ("echo hello", "printed no result of decode 4"),
        ("echo '['; echo '{\"n_prompt\": 0'; echo ']'", "printed no result"),
        ("echo '['; echo '3'; echo ']'", "printed no result"),
        ('echo "["; echo \'{"n_prompt": 0, "n_gen": 4, "repack": true, "samples_ts": []}\'; echo "]"', "no result"),
        ('echo "["; echo \'{"n_prompt": 0, "n_gen": 4, "repack": true, "samples_ts": [0]}\'; echo "]"', "no result"),
        # Another test than the one asked for, and the other setting.
        ('echo "["; echo \'{"n_prompt": 0, "n_gen": 5, "repack": true, "samples_ts": [9]}\'; echo "]"', "no result"),
        ('echo "["; echo \'{"n_prompt": 0, "n_gen": 4, "repack": false, "samples_ts": [9]}\'; echo "]"', "no result"),
    ],
)
def test_other_programs_are_told_apart(tmp_path: Path, text: str, words: str) -> None:
    path = program(tmp_path, f"#!/bin/sh\n{text}\n")
    with pytest.raises(CliError, match=words) as caught:
        LlamaBench(path, True).rate(tmp_path / "m.gguf", 1, Test("decode", 4))
    assert "llama-bench" in caught.value.hint


def test_what_cannot_be_is_refused_before_the_model_is_opened(model: Path, stand_in: Path) -> None:
    folder = stand_in.parent
    (folder / "text").write_text("no program", encoding="utf-8")
    for given, words in {
        f"ik={folder / 'none'}": "is not there",
        f"ik={folder}": "is a folder",
        f"ik={folder / 'text'}": "is no program",
        "ik": "got `ik`",
        "ik=": "got `ik=`",
    }.items():
        assert_fails(dsv2("bench", model, "--against", given), 2, words)
    twice = ("--against", f"ik={stand_in}", "--against", f"ik={folder}/./../{folder.name}/llama-bench")
    assert_fails(dsv2("bench", model, *twice), 2, "twice")
