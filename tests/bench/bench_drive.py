"""Speed against memory, for a model that does not fit in it: dsv2's --ram beside llama.cpp under the same limit.

    python tests/bench/bench_drive.py MODEL.gguf -o drive.csv --plot drive.svg         # root, or a systemd of one's own
    python tests/bench/bench_drive.py MODEL.gguf --skewed SKEWED.gguf --memory 3,5,7,9,all --engines dsv2
    python tests/bench/bench_drive.py MODEL.gguf --engines dsv2 --uncapped                       # no limit to be had
    python tests/bench/bench_drive.py --read drive.csv --plot drive.svg --recall recall.csv      # figures taken before

Method. For each size of memory the drive's own rate is measured first: pieces of experts at random places, by as many
readers as the engine has, in reads of the engine's size past the page cache. Then each engine runs alone in a control
group that limits it to so much memory, page cache included (memory_cap.py; --uncapped leaves the group out and gives
dsv2 that much for its weights, and llama.cpp is left out). The file is taken out of the page cache before. dsv2 runs
with --ram auto: it finds the limit by itself. Tokens are drawn at random, others every round; the first round warms up
and is not counted. Routing is uniform for a model of random weights (make_random.py), and skewed for a copy made by
skew_routers.py.

ready: experts that were in memory when they were needed, those that were read ahead among them. hit: the bytes of a
token's experts that needed not be read for it, wrong guesses counted against it; -1 of prompts. drive_bytes: what dsv2
read a token by its own counts, io_bytes: what the system read for the process. bound: tokens a second if the drive did
nothing but read what was missing: of decoding (1 - hit) * the bytes of a token's experts, of a prompt the file once,
each divided by the drive's rate.
The plot needs matplotlib: pip install 'dsv2[bench]'.
"""

import argparse
import csv
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import bench_rows
from memory_cap import NoCapError, capped

from cext import Gguf
from cext.model import shape_of
from cext.system import direct_read_rate
from dsv2cli import benchmark
from dsv2cli.benchmark import LLAMA, OURS, Contender, Test
from dsv2cli.errors import CliError
from dsv2cli.residency import pieces_of

try:
    from matplotlib import pyplot
except ImportError:
    pyplot = None

RATE_SECONDS, RATE_BYTES = 3.0, 2 << 30  # of measuring the drive, whichever ends first
SETTINGS = {OURS: "kv=f16", LLAMA: "fa=1"}
GIB = 1 << 30
ALL = "all"


@dataclass(frozen=True)
class Row:
    """A round. Speeds in tokens a second, rates in bytes a second; -1 where there is no such figure."""

    machine: str
    isa: str
    threads: int
    model: str
    routing: str
    memory: str  # GiB, or "all"
    limit: str  # what holds it there
    engine: str
    kind: str
    n: int
    round: int
    tok_s: float
    ram: int  # what dsv2 chose for weights; -1: all mapped
    held: float  # share of the experts in memory
    ready: float
    hit: float
    drive_bytes: float  # a token
    io_bytes: float  # a token
    drive_rate: float
    bound_tok_s: float
    peak_bytes: int  # of the group so far


@dataclass(frozen=True)
class Shape:
    """Of a model, what bounds follow from: places and sizes of experts' pieces, bytes of a token's experts."""

    pieces: list[tuple[int, int]]
    token_bytes: float
    file_bytes: int


def shape(path: Path) -> Shape:
    with Gguf(path) as gguf:
        known, _ = shape_of(gguf)
        routed = [t for t in gguf.tensors if "_exps." in t.name]
        if any(t.part for t in gguf.tensors) or not routed:
            sys.exit(f"error: {path}: one file with routed experts is measured")
        token_bytes = sum(t.nbytes for t in routed) / known["n_expert"] * known["n_expert_used"]
        return Shape(pieces_of(gguf), token_bytes, gguf.nbytes)


# ---- The drive ----


def forget(path: Path) -> None:
    """Take a file out of the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def io_bytes(process_id: int) -> int:
    """What the system has read from drives for a process so far; -1 where it does not tell."""
    with suppress(OSError, ValueError, StopIteration):
        lines = Path(f"/proc/{process_id}/io").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("read_bytes")))
    return -1


# ---- Measuring ----


def counts(runs: Contender) -> dict[str, Any] | None:
    return runs.footprint().drive


def since(later: dict[str, Any], earlier: dict[str, Any], part: str) -> dict[str, float]:
    return {key: later[part][key] - earlier[part][key] for key in ("tokens", "needed", "ready", "bytes_read")}


def bound(test: Test, hit: float, found: Shape, rate: float | None) -> float:
    """Tokens a second that the drive allows; -1 where nothing is read, or not known."""
    if rate is None:
        return -1
    if test.kind == "prefill":
        return test.n / (found.file_bytes / rate)
    if hit < 0:
        return -1
    missing = (1 - hit) * found.token_bytes
    return rate / missing if missing > 0 else -1


def measure(runs: Contender, test: Test, rounds: int, facts: dict[str, Any], found: Shape) -> Iterator[dict[str, Any]]:
    """A row's figures for each round but the first."""
    for round_ in range(rounds + 1):
        drive, read = counts(runs), io_bytes(runs.process_id)
        rate = runs.rate(test, SETTINGS[runs.name], seed=1000 + round_)
        after, io = counts(runs), io_bytes(runs.process_id)
        n = test.n + 1  # one more wakes it
        row = {"ready": -1.0, "hit": -1.0, "drive_bytes": -1.0, "ram": -1, "held": 1.0 if runs.name == OURS else -1.0}
        if drive and after:
            part = since(after, drive, "reading" if test.kind == "prefill" else "decoding")
            read_a_token = part["bytes_read"] / max(part["tokens"], 1)
            row = {
                "ready": part["ready"] / max(part["needed"], 1),
                "hit": 1 - read_a_token / found.token_bytes if test.kind == "decode" else -1.0,
                "drive_bytes": read_a_token,
                "ram": after["ram"],
                "held": after["held_share"],
            }
        told = f"{facts['memory']} GiB, {test.name}, {facts['routing']}, {runs.name}, round {round_}: {rate:.2f} tok/s"
        print(
            f"{told}, hit {row['hit']:.3f}, ready {row['ready']:.3f}, {max(0, io - read) / n / 1e6:.0f} MB a token",
            file=sys.stderr,
        )
        if round_ > 0:
            more = {"io_bytes": (io - read) / n if read >= 0 else -1.0, "round": round_, "tok_s": rate}
            yield row | more | {"bound_tok_s": bound(test, float(row["hit"]), found, facts["drive_rate"])}


def run(options: argparse.Namespace, memory: str, path: Path, routing: str) -> Iterator[Row]:
    """Every engine with so much memory, one after another."""
    found = shape(path)
    tests = [Test("decode", options.decode)] if options.decode else []
    if options.prefill and routing == "uniform":
        tests.append(Test("prefill", options.prefill))
    n_ctx = max(test.n for test in tests) + 1
    nbytes = None if memory == ALL else int(float(memory) * GIB)
    threads = options.threads
    for engine in options.engines:
        forget(path)
        rate = direct_read_rate(path, found.pieces, RATE_SECONDS, RATE_BYTES)
        told = f"{rate / 1e9:.2f} GB/s" if rate else "has no reads past the cache"
        print(f"the drive: {told}", file=sys.stderr)
        ram = str(nbytes) if options.uncapped and nbytes else "auto"
        try:
            with (
                capped(None if options.uncapped else nbytes) as cap,
                benchmark.contender(engine, path, n_ctx, threads, ram, cap.launcher) as runs,
            ):
                threads = threads or int(runs.hello["threads"])
                facts = {
                    "machine": benchmark.machine(), "isa": str(runs.hello["isa"]), "threads": threads,
                    "model": path.name, "routing": routing, "memory": memory, "limit": cap.how, "engine": engine,
                    "drive_rate": rate,
                }  # fmt: skip
                for note in runs.hello["notes"]:
                    print(f"({note})", file=sys.stderr)
                for test in tests:
                    for figures in measure(runs, test, options.rounds, facts, found):
                        values = facts | figures | {"kind": test.kind, "n": test.n, "peak_bytes": cap.peak()}
                        values["drive_rate"] = rate or -1.0
                        yield Row(**values)
        except CliError as error:
            print(f"{memory} GiB, {engine}: {error}", file=sys.stderr)


# ---- What is told ----


Series = tuple[str, str, str]  # kind, routing, engine


def size_of(memory: str) -> float:
    return float("inf") if memory == ALL else float(memory)


def grouped(rows: Sequence[Row]) -> dict[Series, dict[str, list[Row]]]:
    """By series, by memory from the least."""
    out: dict[Series, dict[str, list[Row]]] = {}
    for row in sorted(rows, key=lambda row: size_of(row.memory)):
        out.setdefault((row.kind, row.routing, row.engine), {}).setdefault(row.memory, []).append(row)
    return out


def middle(rows: Sequence[Row], name: str) -> float:
    return float(median(getattr(row, name) for row in rows))


def markdown(rows: Sequence[Row]) -> str:
    lines = [
        f"{rows[0].model}, {rows[0].threads} threads, {rows[0].machine}; median [least, most]; {rows[0].limit}",
        "",
        "| | memory, GiB | tok/s | hit | MB read a token | drive, GB/s | bound, tok/s | of the bound |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (kind, routing, engine), by_memory in grouped(rows).items():
        for memory, group in by_memory.items():
            speeds, limit = [row.tok_s for row in group], middle(group, "bound_tok_s")
            hit, read = middle(group, "hit"), middle(group, "io_bytes") / 1e6
            cells = [
                f"{kind} {group[0].n}, {routing}, {engine}",
                memory,
                f"{median(speeds):.2f} [{min(speeds):.2f}, {max(speeds):.2f}]",
                f"{hit:.3f}" if hit >= 0 else "-",
                f"{read:.1f}" if read >= 0 else "-",
                f"{middle(group, 'drive_rate') / 1e9:.2f}",
                *([f"{limit:.2f}", f"{100 * median(speeds) / limit:.0f} %"] if limit > 0 else ["-", "-"]),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw_speed(axis: Any, rows: Sequence[Row], kind: str, sizes: Sequence[str]) -> None:
    """Tokens a second against memory, the rounds' spread as bars, dsv2's bound dashed."""
    colours = {("uniform", OURS): "tab:blue", ("skewed", OURS): "tab:green", ("uniform", LLAMA): "tab:orange"}
    for (of, routing, engine), by_memory in grouped(rows).items():
        if of != kind:
            continue
        groups = [(sizes.index(memory), group) for memory, group in by_memory.items()]
        at = [i for i, _ in groups]
        speeds = [[row.tok_s for row in group] for _, group in groups]
        y = [median(s) for s in speeds]
        bars = [
            [m - min(s) for m, s in zip(y, speeds, strict=True)],
            [max(s) - m for m, s in zip(y, speeds, strict=True)],
        ]
        colour = colours.get((routing, engine), "tab:red")
        axis.errorbar(at, y, bars, label=f"{engine}, {routing}", color=colour, marker="o", markersize=4, capsize=3)
        bounds = [(i, limit) for i, group in groups if (limit := middle(group, "bound_tok_s")) > 0]
        if engine == OURS and bounds:
            axis.plot(*zip(*bounds, strict=True), "--", color=colour, alpha=0.6, label=f"the drive's bound, {routing}")
    axis.set_xticks(range(len(sizes)), sizes)
    axis.set(title=kind, xlabel="memory, GiB", ylabel="tokens a second", yscale="log")


def draw_recall(axis: Any, path: Path) -> None:
    """How much of what a layer needs was told a layer before (bench_residency.py --recall), by layer."""
    recalls: dict[str, list[tuple[int, float]]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["ahead"] == "1":
                recalls.setdefault(row["model"], []).append((int(row["layer"]), float(row["recall"])))
    for model, points in recalls.items():
        axis.plot(*zip(*points, strict=True), marker="o", markersize=4, label=model)
    axis.set(title="forecast a layer ahead", xlabel="layer", ylabel="of the needed experts, named", ylim=(0, 1))


def plot(rows: Sequence[Row], path: Path, recall: Path | None) -> None:
    if pyplot is None:
        sys.exit("error: the plot needs matplotlib\nhint: pip install 'dsv2[bench]'")
    sizes = sorted({row.memory for row in rows}, key=size_of)
    kinds = [kind for kind in ("decode", "prefill") if any(row.kind == kind for row in rows)]
    n = len(kinds) + (recall is not None)
    figure, axes = pyplot.subplots(1, n, figsize=(5 * n, 4), layout="constrained", squeeze=False)
    for axis, kind in zip(axes[0], kinds, strict=False):
        draw_speed(axis, rows, kind, sizes)
    if recall is not None:
        draw_recall(axes[0][-1], recall)
    for axis in axes[0]:
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize=8)
    figure.suptitle(f"{rows[0].model}, {rows[0].threads} threads, {rows[0].machine}", fontsize=9)
    figure.savefig(path)


def parse() -> argparse.Namespace:
    parser = bench_rows.parser(__doc__)
    parser.add_argument("--skewed", type=Path, metavar="GGUF", help="the model with skewed routers")
    parser.add_argument("--recall", type=Path, metavar="CSV", help="of bench_residency.py --recall: a panel more")
    parser.add_argument("--engines", type=lambda s: tuple(s.split(",")), default=(OURS, LLAMA))
    parser.add_argument(
        "--memory", type=lambda s: tuple(s.split(",")), default=("3", "4", "5", "6", "7", "8", "10", ALL)
    )
    parser.add_argument("--uncapped", action="store_true", help="no control group: dsv2 alone, with that --ram")
    parser.add_argument("--threads", type=int, help="what dsv2 chooses, if left out")
    parser.add_argument("--decode", type=int, default=32, metavar="N")
    parser.add_argument("--prefill", type=int, default=2048, metavar="N")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    options = bench_rows.parse(parser)
    if unknown := set(options.engines) - set(SETTINGS):
        parser.error(f"--engines takes {' and '.join(SETTINGS)}, got {', '.join(sorted(unknown))}")
    if not (options.decode or options.prefill):
        parser.error("--decode 0 and --prefill 0 leave nothing to measure")
    for size in options.memory:
        if size != ALL and not size.replace(".", "", 1).isdigit():
            parser.error(f"--memory takes numbers of GiB and `{ALL}`, got {size}")
    if options.uncapped:
        options.engines = (OURS,)
    return options


def rows_of(options: argparse.Namespace) -> Iterator[Row]:
    for memory in options.memory:
        yield from run(options, memory, options.model, "uniform")
        if options.skewed:
            yield from run(options, memory, options.skewed, "skewed")


def main() -> None:
    options = parse()
    try:
        read = options.read
        rows = bench_rows.read(Row, read) if read else bench_rows.write(Row, rows_of(options), options.output)
    except NoCapError as error:
        sys.exit(f"error: {error}\nhint: --uncapped measures dsv2 alone, with --ram for its limit")
    if not rows:
        sys.exit("error: nothing was measured")
    print(markdown(rows), file=sys.stdout if options.output or options.read else sys.stderr)
    if options.plot:
        plot(rows, options.plot, options.recall)


if __name__ == "__main__":
    main()
