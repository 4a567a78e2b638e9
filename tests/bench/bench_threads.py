"""Speed against threads, with the memory's pace beside it: a CSV of every figure, a plot.

    python tests/bench/bench_threads.py MODEL.gguf --threads 1,2,4,8,16 -o threads.csv --plot threads.svg
    python tests/bench/bench_threads.py --read threads.csv --plot threads.svg      # plot of figures taken before

Method. Every number of threads in turn, round after round; each time `dsv2 bench` in a process of its own (which warms
up first) between two plain reads of the mapped file, all threads each their part of it, of which the faster counts.
What decoding reads is its share, as `dsv2 bench` tells it, of the pace at which the engine's own products read.
The plot needs matplotlib: pip install 'dsv2[bench]'.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import bench_rows
import numpy as np

from cext import _engine

try:
    from matplotlib import pyplot
except ImportError:
    pyplot = None

GB = 1e9


@dataclass(frozen=True)
class Row:
    """A line of the CSV. Tokens a second; GB a second that decoding read, that products read, that a plain read takes;
    10^9 multiply-adds a second that products make."""

    machine: str
    isa: str
    model: str
    threads: int
    round: int
    prefill_tok_s: float
    decode_tok_s: float
    decode_gb_s: float
    products_gb_s: float
    read_gb_s: float
    products_gmac_s: float


def read_pace(model: Path, isa: str, threads: int) -> float:
    """GB a second of reading the whole mapped file once, each thread its part."""
    whole = np.memmap(model, np.uint8, mode="r")
    parts = np.array_split(whole, threads)
    with ThreadPoolExecutor(threads) as pool:
        begin = time.perf_counter()
        list(pool.map(lambda part: _engine._read_all(isa, part), parts))
        return len(whole) / (time.perf_counter() - begin) / GB


def bench(options: argparse.Namespace, threads: int) -> dict[str, Any]:
    enter = "from dsv2cli.entry import main; main()"
    command = [sys.executable, "-P", "-c", enter, "bench", str(options.model), "--json", "--quiet", "--gpu", "off"]
    counts = ["-t", str(threads), "-r", "1", "-p", str(options.prefill), "-n", str(options.decode)]
    # The same program as this one's, wherever it was found.
    here = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    told = subprocess.run([*command, *counts], stdout=subprocess.PIPE, env=here, check=True).stdout
    return dict(json.loads(told))


def measure(options: argparse.Namespace, threads: int, round_: int) -> Row:
    isa = _engine.isa()
    paces = [read_pace(options.model, isa, threads)]
    told = bench(options, threads)
    paces.append(read_pace(options.model, isa, threads))
    tests = {t["kind"]: t for t in told["tests"]}
    products = told["beside"]["bytes_per_second"] / GB
    figures = {
        "prefill_tok_s": tests["prefill"]["tokens_per_second"]["dsv2"][0],
        "decode_tok_s": tests["decode"]["tokens_per_second"]["dsv2"][0],
        "decode_gb_s": tests["decode"]["share"] * products,
        "products_gb_s": products,
        "read_gb_s": max(paces),
        "products_gmac_s": told["beside"]["multiply_adds_per_second"] / GB,
    }
    rounded = {name: round(value, 2) for name, value in figures.items()}
    print(f"{threads} threads, round {round_}: {rounded}", file=sys.stderr)
    return Row(told["machine"], told["isa"], options.model.name, threads, round_, **rounded)


def run(options: argparse.Namespace) -> Iterator[Row]:
    for round_ in range(options.rounds):
        for threads in options.threads:
            yield measure(options, threads, round_)


def plot(rows: Sequence[Row], path: Path) -> None:
    """What decoding reads beside a plain read, prefill beside as many times one thread's: medians, each round a dot."""
    if pyplot is None:
        sys.exit("error: the plot needs matplotlib\nhint: pip install 'dsv2[bench]'")
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    threads = sorted({r.threads for r in rows})

    def line(axis: Any, name: str, label: str, colour: str) -> list[float]:
        middle = [median(getattr(r, name) for r in rows if r.threads == t) for t in threads]
        axis.plot(threads, middle, label=label, color=colour)
        axis.scatter([r.threads for r in rows], [getattr(r, name) for r in rows], color=colour, s=10)
        return middle

    line(left, "read_gb_s", "a plain read of the file", "tab:gray")
    line(left, "decode_gb_s", "decoding", "tab:blue")
    left.set(title="decode: memory read", xlabel="threads", ylabel="GB a second")
    one = line(right, "prefill_tok_s", "prefill", "tab:blue")[0] / threads[0]
    right.plot(threads, [one * t for t in threads], label="times the threads", color="tab:gray", linestyle=":")
    right.set(title="prefill", xlabel="threads", ylabel="tokens a second")
    for axis in (left, right):
        axis.set_xticks(threads)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle(f"{rows[0].model}, {rows[0].isa}, {rows[0].machine}", fontsize=9)
    figure.savefig(path)


def parse() -> argparse.Namespace:
    parser = bench_rows.parser(__doc__)
    parser.add_argument("--threads", type=bench_rows.numbers, default=(1, 2))
    parser.add_argument("--prefill", type=int, default=512, metavar="N")
    parser.add_argument("--decode", type=int, default=64, metavar="N")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    return bench_rows.parse(parser)


def main() -> None:
    options = parse()
    rows = bench_rows.read(Row, options.read) if options.read else bench_rows.write(Row, run(options), options.output)
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
