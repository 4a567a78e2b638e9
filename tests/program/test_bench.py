"""What measures: contexts filled the short way, sequences side by side, figures on their way to a table."""

import argparse
import csv
import ctypes
import json
import struct
from dataclasses import astuple, fields
from pathlib import Path

import bench_context
import bench_reopen
import bench_rows
import bench_threads
import numpy as np
import pytest
from support import llama
from support.cli import assert_fails, dsv2
from support.inprocess import run
from support.tiny import spec_named, variant
from support.vocab import write_model

from dsv2cli import benchmark
from dsv2cli.benchmark import LLAMA, OURS
from dsv2cli.contender import BATCH, LlamaCpp, Ours, measure
from dsv2cli.errors import CliError
from dsv2cli.llama_state import lengthened
from dsv2cli.planner import probe
from dsv2cli.planner.share import Yardstick

SPEC = variant(spec_named("lite"), n_ctx=4096, n_layer=27)  # without q-LoRA llama.cpp runs 26, 27 or 48 layers


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("bench") / "m.gguf", SPEC)


ARM = "processor\t: {}\nBogoMIPS\t: 108.00\nCPU implementer\t: {}\nCPU part\t: {}\n\n"


@pytest.mark.parametrize(
    ("cpuinfo", "name"),
    [
        ("processor\t: 0\nmodel name\t: AMD EPYC 9B14\nflags\t\t: a: b\n", "AMD EPYC 9B14"),
        (ARM.format(0, "0x41", "0xd0c") + ARM.format(1, "0x41", "0xd0c"), "Neoverse-N1"),
        (ARM.format(0, "0x41", "0xd05") + ARM.format(1, "0x41", "0xd0b"), "Cortex-A55 + Cortex-A76"),
        (ARM.format(0, "0x61", "0x032"), "ARM 0x61:0x32"),
        ("processor\t: 0\nisa\t: rv64imafdc\n", None),
    ],
    ids=["x86", "one kind", "two kinds", "unknown", "neither"],
)
def test_processors_are_named(cpuinfo: str, name: str | None) -> None:
    assert benchmark.processor_name(cpuinfo) == name


# A saved sequence of llama.cpp, in its own layout.


def state(n: int, layers: list[bytes], tail: bytes = b"", *, transposed: bool = False) -> bytes:
    """A head, one stream of n cells at positions 0, 1, ..., and for each layer the type, the row's size and n rows."""
    cells = b"".join(struct.pack("<iIi", i, 1, 0) for i in range(n))
    keys = b"".join(struct.pack("<iQ", 1, len(rows) // n) + rows for rows in layers)
    return struct.pack("<IiII", 7, 0, 1, n) + cells + struct.pack("<II", transposed, len(layers)) + keys + tail


@pytest.mark.parametrize(("depth", "repeated"), [(3, b"aabbcc"), (6, b"aabbcc" * 2), (8, b"aabbccaabbccaabb")])
def test_rows_are_repeated(depth: int, repeated: bytes) -> None:
    other = repeated.replace(b"a", b"x")
    assert lengthened(state(3, [b"aabbcc", b"xxbbcc"]), 3, depth) == state(depth, [repeated, other])


@pytest.mark.parametrize(("depth", "values"), [(6, b"pqrpqrxyzxyz"), (8, b"pqrpqrpqxyzxyzxy")])
def test_values_are_repeated(depth: int, values: bytes) -> None:
    """Two values of a byte at three positions: value by value where they lie transposed, else position by position."""
    head, keys = struct.pack("<iII", 1, 1, 2), (b"aabbcc" * 3)[: 2 * depth]
    short, long = (
        state(3, [b"aabbcc"], head + b"pqrxyz", transposed=True),
        state(depth, [keys], head + values, transposed=True),
    )
    assert lengthened(short, 3, depth) == long
    head, rows = struct.pack("<iQ", 1, 2), (b"pxqyrz" * 3)[: 2 * depth]
    assert lengthened(state(3, [b"aabbcc"], head + b"pxqyrz"), 3, depth) == state(depth, [keys], head + rows)


@pytest.mark.parametrize(
    "content",
    [
        state(3, [b"aabbcc"], tail=b"values"),
        state(3, [b"aabbcc"], tail=struct.pack("<iQ", 1, 1 << 60) + b"pqr"),
        state(3, [b"aabbcc"], tail=struct.pack("<iII", 1, 1, 1 << 31) + b"pqr", transposed=True),
        state(3, [b"aabbcc"], tail=struct.pack("<iII", 1, 1, 2) + b"pqrxyz" + b"more", transposed=True),
        state(3, [b"aabbcc"])[:-1],
        state(3, [b"aabbcc"])[:30],
        state(3, [b"aabbcc"]).replace(struct.pack("<II", 1, 3), struct.pack("<II", 2, 3), 1),
        state(4, [b"aabbccdd"]),
        b"",
    ],
)
def test_other_layouts_are_left_alone(content: bytes) -> None:
    assert lengthened(content, 3, 6) is None


def saved(engine: LlamaCpp, setting: str) -> bytes:
    context = engine._contexts[setting]
    out = (ctypes.c_uint8 * engine._lib.llama_state_seq_get_size(context, 0))()
    engine._lib.llama_state_seq_get_data(context, out, len(out), 0)
    return bytes(out)


@pytest.mark.parametrize("setting", ["fa=0", "fa=1"])
@pytest.mark.parametrize("kind", ["latent", "plain", "shared heads"])
def test_llama_cpp_takes_a_lengthened_context(model: Path, tmp_path: Path, kind: str, setting: str) -> None:
    depth = 2 * BATCH + 200
    spec = {"plain": "moe", "shared heads": "moe_shared"}.get(kind)
    path = write_model(tmp_path / "m.gguf", variant(spec_named(spec), n_ctx=4096)) if spec else model
    engine = LlamaCpp(path, depth + 8, 1)
    engine.select(setting, 1)
    ids = np.arange(depth, dtype=np.int32) % 200
    evaluated = []
    run = engine.eval
    engine.eval = lambda ids: (evaluated.append(len(ids)), run(ids))  # type: ignore[method-assign,assignment]
    run(ids[:BATCH])
    want = lengthened(saved(engine, setting), BATCH, depth)
    engine._rewind(0)
    engine.fill(ids)
    assert saved(engine, setting) == want
    engine.step(np.array([5], np.int32))
    assert evaluated == [BATCH, 1]
    memory = engine._lib.llama_get_memory(engine._contexts[setting])
    assert engine._lib.llama_memory_seq_pos_max(memory, 0) == depth
    assert measure(engine, "decode", 2, depth, 1, setting) > 0
    assert engine._lib.llama_memory_seq_pos_max(memory, 0) == depth + 1


@pytest.mark.parametrize("spec", ["moe", "moe_shared"])
def test_both_read_a_quantised_file_of_plain_attention(tmp_path: Path, spec: str) -> None:
    """Matrices that a processor with AMX would be given in its own layout, several tokens at once."""
    plain = write_model(tmp_path / "f32.gguf", spec_named(spec))
    path = llama.quantize(plain, tmp_path / "q8_0.gguf", llama.FILE_TYPES["q8_0"])
    tests = [benchmark.Test("prefill", 40), benchmark.Test("decode", 2, 40)]
    result = benchmark.run(path, tests, threads=2, rounds=1, against=(LLAMA,))
    assert [len(row.ratios(LLAMA)) for row in result.rows] == [1, 1]


def test_llama_cpps_own_reason(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf", variant(SPEC, n_layer=3))
    with pytest.raises(CliError, match=r"^`.*m\.gguf`: llama\.cpp \S+ cannot load it: .*q_lora_rank") as caught:
        benchmark.run(path, [benchmark.Test("decode", 1)], threads=1, rounds=1, against=(LLAMA,))
    assert "another file" in caught.value.hint


def test_how_a_process_ended() -> None:
    assert [benchmark.ending(code) for code in (1, -11, -200)] == [
        "ended with exit code 1",
        "ended by SIGSEGV",
        "ended by signal 200",
    ]


# Ours.


@pytest.mark.parametrize("setting", ["kv=f16", "kv=q8_0"])
@pytest.mark.parametrize(("kind", "sequences"), [("prefill", 1), ("decode", 1), ("decode", 3)])
def test_a_test_leaves_its_context(model: Path, setting: str, kind: str, sequences: int) -> None:
    engine = Ours(model, 64, 1)
    for depth in (0, 20, 10):
        assert measure(engine, kind, 4, depth, sequences, setting) > 0
        assert [s.n_past for s in engine._sessions] == [depth + 4] * sequences
        assert {s.kv_type for s in engine._sessions} == {setting.removeprefix("kv=")}


def test_the_same_context_whatever_ran_before(model: Path) -> None:
    """A deeper context begins with the shallower one: what was there is kept, and is what would be filled anew."""
    kept, fresh = Ours(model, 64, 1), Ours(model, 64, 1)
    for depth in (8, 40, 24):
        measure(kept, "decode", 2, depth, 1, "kv=f16")
    measure(fresh, "decode", 2, 24, 1, "kv=f16")
    np.testing.assert_allclose(
        *(e._sessions[0].eval([3]) for e in (kept, fresh)), rtol=0, atol=0.05
    )  # the prompt was cut differently, over a cache of halves


# The script.


def test_figures_survive_their_csv(tmp_path: Path) -> None:
    facts = {"machine": "one, two", "isa": "x", "threads": 2, "model": "m.gguf", "kind": "decode", "n": 4}
    samples = {
        (OURS, "kv=f16"): [30.0, 20.0, 25.0],
        (OURS, "kv=q8_0"): [40.0, 50.0, 60.0],
        (LLAMA, "fa=0"): [10.0, 5.0, 10.0],
        (LLAMA, "fa=1"): [9.0, 9.0, 9.0],
    }
    rows = list(bench_context.rows_of(samples, **facts, depth=1024, sequences=1))
    rows += bench_context.rows_of({(OURS, "kv=f16"): [7.0]}, **facts, depth=0, sequences=4)
    assert [(r.ratio_min, r.ratio_median, r.ratio_max) for r in rows[:2]] == [(2.5, 3.0, 4.0), (4.0, 6.0, 10.0)]
    path = tmp_path / "speed.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([[f.name for f in fields(bench_context.Row)], *map(astuple, rows)])
    assert bench_rows.read(bench_context.Row, path) == rows
    assert bench_context.markdown(rows).splitlines()[4:] == [
        "| decode 4 at 1024 | 25.0 [20.0, 30.0] | 3.00 | 50.0 [40.0, 60.0] | 6.00 | 10.0 [5.0, 10.0] fa=0 |",
        "| decode 4 x 4 | 7.0 [7.0, 7.0] | - | - | - | - |",
    ]


def test_threads_are_measured_in_turn_beside_a_plain_read(model: Path, tmp_path: Path) -> None:
    options = argparse.Namespace(model=model, threads=(2, 1), prefill=8, decode=4, rounds=1)
    path = tmp_path / "threads.csv"
    rows = bench_rows.write(bench_threads.Row, bench_threads.run(options), path)
    assert bench_rows.read(bench_threads.Row, path) == rows
    assert [(r.threads, r.round, r.model) for r in rows] == [(2, 0, model.name), (1, 0, model.name)]
    assert all(r.prefill_tok_s > 0 and r.decode_tok_s > 0 and r.read_gb_s > 0 for r in rows)
    size = model.stat().st_size / 1e9  # a token reads some of the weights, never more than all
    assert all(0 < r.decode_gb_s / r.decode_tok_s < size for r in rows)


def test_llama_cpp_runs_where_it_can() -> None:
    both = (OURS, LLAMA)
    assert [len(bench_context.series_of(t, both, 4096)) for t in (
        benchmark.Test("decode", 1, 4096), benchmark.Test("decode", 1, 8192), benchmark.Test("decode", 1, 0, 4)
    )] == [4, 2, 2]  # fmt: skip


def test_what_is_reopened_is_what_was_read(model: Path, tmp_path: Path) -> None:
    options = argparse.Namespace(model=model, threads=1, folder=tmp_path, rounds=2, kv=["f16", "q8_0"], tokens=700)
    rows = bench_rows.write(bench_reopen.Row, bench_reopen.rows(options), tmp_path / "reopen.csv")
    assert [(r.kv, r.round) for r in rows] == [("f16", 0), ("q8_0", 0), ("f16", 1), ("q8_0", 1)]
    assert all(r.file_bytes > 0 and r.read_seconds > 0 for r in rows) and rows[0].file_bytes == rows[2].file_bytes
    assert bench_rows.read(bench_reopen.Row, tmp_path / "reopen.csv") == rows
    assert [p.name for p in tmp_path.iterdir()] == ["reopen.csv"]


# What share of the machine, and what it costs.


def test_shares_are_of_the_bytes_and_the_products_that_were_measured() -> None:
    yardstick = Yardstick(
        bandwidth=40e9, products=300e9, token_bytes=1_600_000_000, context_bytes=30_000, layer_products=2_000_000_000
    )
    assert yardstick.share(benchmark.Test("decode", 128), 20.0) == pytest.approx(20 * (1.6e9 + 64 * 3e4) / 40e9)
    deep = yardstick.share(benchmark.Test("decode", 100, 16384), 20.0)
    assert deep == pytest.approx(20 * (1.6e9 + (16384 + 50) * 3e4) / 40e9)
    assert yardstick.share(benchmark.Test("prefill", 512), 75.0) == pytest.approx(0.5)


def test_a_bench_tells_its_share_and_what_it_costs(model: Path) -> None:
    ask = ("bench", model, "-p", "16", "-n", "2", "-r", "1", "-t", "1")
    done = dsv2(*ask, "--watts", "36", "--price", "0.5", "--json", "-q")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["beside"]["bytes_per_second"] > 0 and told["beside"]["multiply_adds_per_second"] > 0
    for test in told["tests"]:
        [rate] = test["tokens_per_second"]["dsv2"]
        assert test["share"] > 0
        assert test["kwh_per_million"]["dsv2"] == pytest.approx(10 / rate)  # 36 W: a kWh in 100,000 s
        assert test["cost_per_million"]["dsv2"] == pytest.approx(5 / rate)
    shown = dsv2(*ask, "--watts", "36")
    for words in ("of the bandwidth", "of the dots", "kWh a million", "this machine, before and after"):
        assert words in shown.stdout, shown.stdout
    plain = json.loads(dsv2(*ask, "--no-share", "--json", "-q").stdout)
    assert plain["beside"] is None and {t["share"] for t in plain["tests"]} == {None}
    assert plain["tests"][0]["kwh_per_million"] == {"dsv2": None}


@pytest.mark.parametrize(
    ("options", "word"),
    [(("--price", "0.3"), "--watts"), (("--watts", "0"), "range"), (("--watts", "9", "--csv"), "--json")],
)
def test_what_a_cost_is_reckoned_from(model: Path, options: tuple[str, ...], word: str) -> None:
    assert_fails(dsv2("bench", model, *options), 2, word)


def test_where_the_machine_cannot_be_measured_it_is_said(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "UNSAFE_SHARE", 0.0)
    monkeypatch.setattr("cext.system.free_bytes", lambda **how: 1 << 30)
    ran = run("bench", model, "-p", "8", "-n", "0", "-r", "1", "-t", "1")
    assert ran.code == 0 and "no share of the machine: too little memory" in ran.told and b"of the dots" not in ran.out
