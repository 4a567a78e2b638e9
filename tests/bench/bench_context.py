"""Speed against context, dsv2 beside llama.cpp: a CSV of every figure, a Markdown table, a plot.

    python tests/bench/bench_context.py MODEL.gguf -o speed.csv --plot speed.svg
    python tests/bench/bench_context.py MODEL.gguf --depths 0,1024,4096,16384,131072 --llama-depth 16384 --threads 1,2
    python tests/bench/bench_context.py MODEL.gguf --engines dsv2 --depths 0 --sequences 1,4,16
    python tests/bench/bench_context.py --read speed.csv --plot speed.svg      # table and plot of figures taken before

Method. Each engine runs in a process of its own with the model loaded once, on random tokens. Every setting of every
engine (dsv2 with its caches; llama.cpp with and without flash attention, an f16 cache, repacked weights) runs in turn,
round after round; the first round warms up and is not counted. A figure is the median of its rounds, with the least and
the most; a ratio is the median of the ratios of one round, to llama.cpp's setting with the best median in that test.
Contexts are filled once and rewound; a long one repeats the rows of a short one, which takes attention as long
(dsv2cli/llama_state.py does it for llama.cpp). Beyond --llama-depth llama.cpp is left out. The table is of one number
of threads; the CSV has all.
The plot needs matplotlib: pip install 'dsv2[bench]'.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import median

import bench_rows

from dsv2cli import benchmark
from dsv2cli.benchmark import LLAMA, OURS, Contender, Test

try:
    from matplotlib import pyplot
except ImportError:
    pyplot = None

SETTINGS = {OURS: ("kv=f16", "kv=q8_0"), LLAMA: ("fa=0", "fa=1")}
COLOURS = {"kv=f16": "tab:blue", "kv=q8_0": "tab:green", "fa=0": "tab:orange", "fa=1": "tab:red"}
Series = tuple[str, str]  # engine, setting
Samples = dict[Series, list[float]]  # tokens a second, round by round


@dataclass(frozen=True)
class Row:
    """A line of the CSV. Speeds in tokens a second; ratios are 0 where llama.cpp did not run."""

    machine: str
    isa: str
    threads: int
    model: str
    kind: str
    n: int
    depth: int
    sequences: int
    engine: str
    setting: str
    rounds: int
    tok_s_min: float
    tok_s_median: float
    tok_s_max: float
    ratio_min: float = 0.0
    ratio_median: float = 0.0
    ratio_max: float = 0.0


def wanted_tests(options: argparse.Namespace) -> Iterator[Test]:
    """Shallow first: a deeper context begins with the shallower one. Several sequences decode at the least depth."""
    for depth in sorted(options.depths):
        if options.prefill:
            yield Test("prefill", options.prefill, depth)
        if options.decode:
            sequences = options.sequences if depth == min(options.depths) else (1,)
            yield from (Test("decode", options.decode, depth, n) for n in sequences)


def series_of(test: Test, engines: Iterable[str], llama_depth: int) -> list[Series]:
    """Who runs a test: llama.cpp is measured with one sequence, and up to a depth that it fills in bearable time."""
    runs = [e for e in engines if e == OURS or (test.sequences == 1 and test.depth <= llama_depth)]
    return [(engine, setting) for engine in runs for setting in SETTINGS[engine]]


def measure(contenders: dict[str, Contender], test: Test, series: Sequence[Series], rounds: int) -> Samples:
    """Every series in turn, round after round."""
    samples: Samples = {s: [] for s in series}
    for round_ in range(rounds + 1):
        for engine, setting in series:
            rate = contenders[engine].rate(test, setting)
            print(f"{test.name}, {engine} {setting}, round {round_}: {rate:.1f} tok/s", file=sys.stderr)
            if round_ > 0:
                samples[engine, setting].append(rate)
    return samples


def rows_of(samples: Samples, **facts: str | int) -> Iterator[Row]:
    """The lines of one test, with ratios to llama.cpp's best setting."""
    theirs = [s for s in samples if s[0] == LLAMA]
    best = max(theirs, key=lambda s: median(samples[s])) if theirs else None
    for (engine, setting), rates in samples.items():
        speeds = (min(rates), median(rates), max(rates))
        ratios = [a / b for a, b in zip(rates, samples[best], strict=True)] if best else [0.0]
        figures = [round(x, 4) for x in (*speeds, min(ratios), median(ratios), max(ratios))]
        values = {**facts, "engine": engine, "setting": setting, "rounds": len(rates)}
        yield Row(**values, **dict(zip([f.name for f in fields(Row)][-6:], figures, strict=True)))  # type: ignore[arg-type]


def run(options: argparse.Namespace, threads: int | None) -> Iterator[Row]:
    """Every test with one number of threads."""
    tests = list(wanted_tests(options))
    room = max(options.prefill, options.decode)
    with ExitStack() as stack:
        contenders: dict[str, Contender] = {}
        for engine in options.engines:
            depth = max(t.depth for t in tests if engine == OURS or t.depth <= options.llama_depth)
            made = stack.enter_context(benchmark.contender(engine, options.model, depth + room, threads))
            contenders[engine] = made
            threads = int(made.hello["threads"])  # the next gets as many as the first chose
        for test in tests:
            series = series_of(test, options.engines, options.llama_depth)
            facts = {
                "machine": benchmark.machine(),
                "isa": str(contenders[options.engines[0]].hello["isa"]),
                "threads": int(threads or 0),
                "model": options.model.name,
            }
            if series:
                yield from rows_of(measure(contenders, test, series, options.rounds), **facts, **asdict(test))


def markdown(rows: Sequence[Row]) -> str:
    """The table: a line a test, a column for each of dsv2's caches and one for the better of llama.cpp's settings."""
    caches = [s for s in SETTINGS[OURS] if any(r.setting == s for r in rows)]
    lines = [
        f"{rows[0].model}, {rows[0].threads} threads, {rows[0].isa}, {rows[0].machine}; tokens a second, median of"
        f" {rows[0].rounds} rounds [least, most]",
        "",
        "| | " + " | ".join(f"dsv2 {c.removeprefix('kv=')} | ratio" for c in caches) + " | llama.cpp |",
        "|---|" + "---|---|" * len(caches) + "---|",
    ]
    tests: dict[Test, list[Row]] = {}
    for row in rows:
        tests.setdefault(Test(row.kind, row.n, row.depth, row.sequences), []).append(row)
    for test, group in tests.items():
        ours = {r.setting: r for r in group if r.engine == OURS}
        theirs = max((r for r in group if r.engine == LLAMA), key=lambda r: r.tok_s_median, default=None)
        cells = [test.name]
        for cache in caches:
            row = ours.get(cache)
            cells += [speed(row), f"{row.ratio_median:.2f}" if row and row.ratio_median else "-"]
        cells.append(f"{speed(theirs)} {theirs.setting}" if theirs else "-")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def speed(row: Row | None) -> str:
    return f"{row.tok_s_median:.1f} [{row.tok_s_min:.1f}, {row.tok_s_max:.1f}]" if row else "-"


def plot(rows: Sequence[Row], path: Path) -> None:
    """Decode and prefill against context, the rounds' spread as bars."""
    if pyplot is None:
        sys.exit("error: the plot needs matplotlib\nhint: pip install 'dsv2[bench]'")
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, kind in zip(axes, ("decode", "prefill"), strict=True):
        chosen = [r for r in rows if r.kind == kind and r.sequences == 1]
        for engine, setting in dict.fromkeys((r.engine, r.setting) for r in chosen):
            line = [r for r in chosen if (r.engine, r.setting) == (engine, setting)]
            bars = [[r.tok_s_median - r.tok_s_min for r in line], [r.tok_s_max - r.tok_s_median for r in line]]
            x, y = [r.depth for r in line], [r.tok_s_median for r in line]
            axis.errorbar(
                x, y, bars, label=f"{engine} {setting}", color=COLOURS[setting], marker="o", markersize=4, capsize=3
            )
        depths = sorted({r.depth for r in chosen})
        axis.set_xscale("symlog", base=2, linthresh=1024)
        axis.set_xticks(depths, [f"{d // 1024}K" if d >= 1024 else str(d) for d in depths])
        axis.set(title=kind, xlabel="tokens of context before", ylabel="tokens a second")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle(f"{rows[0].model}, {rows[0].threads} threads, {rows[0].machine}", fontsize=9)
    figure.savefig(path)


def parse() -> argparse.Namespace:
    parser = bench_rows.parser(__doc__)
    parser.add_argument("--engines", type=lambda s: tuple(s.split(",")), default=(OURS, LLAMA))
    parser.add_argument("--depths", type=bench_rows.numbers, default=(0, 1024, 4096, 16384), help="up to 131072")
    parser.add_argument("--llama-depth", type=int, default=16384, metavar="N", help="its deepest context")
    parser.add_argument("--threads", type=bench_rows.numbers, default=(0,), help="0: what dsv2 chooses")
    parser.add_argument(
        "--sequences", type=bench_rows.numbers, default=(1,), help="decoded side by side at the least depth"
    )
    parser.add_argument("--prefill", type=int, default=512, metavar="N")
    parser.add_argument("--decode", type=int, default=32, metavar="N")
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    options = bench_rows.parse(parser)
    if unknown := set(options.engines) - set(SETTINGS):
        parser.error(f"--engines takes {' and '.join(SETTINGS)}, got {', '.join(sorted(unknown))}")
    return options


def main() -> None:
    options = parse()
    if options.read:
        rows = bench_rows.read(Row, options.read)
    else:
        measured = (row for threads in options.threads for row in run(options, threads or None))
        rows = bench_rows.write(Row, measured, options.output)
    first = [row for row in rows if row.threads == rows[-1].threads]
    print(markdown(first), file=sys.stdout if options.output or options.read else sys.stderr)
    if options.plot:
        plot(first, options.plot)


if __name__ == "__main__":
    main()
