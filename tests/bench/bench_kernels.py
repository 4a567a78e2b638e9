"""Products with every format, on one thread: operations and bytes a second by instruction set and tokens, as CSV.

    python tests/bench/bench_kernels.py [-o FILE] [--format NAME]... [--isa NAME]... [--tokens N]... [--rounds N]

A product is one expert's matrix (1408 rows of 2048 values) with N tokens; the experts take turns, more of them than a
cache holds, so that their weights come from memory as in a model. Rounds go over all cases in turn, because a machine's
speed drifts: a figure is the median of the rounds, the spread their range over the median. The limits (the dot
instruction on data in L1, a plain read of memory) are measured in the same rounds. `ggml` is the same product by the
libggml that llama-cpp-python brings, which also quantises the activations each time.
"""

import argparse
import csv
import ctypes
import statistics
import sys
import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import llama_cpp
import numpy as np
from numpy.typing import NDArray
from support.blocks import CODED_FORMATS, block_size, random_blocks, type_of
from support.kernels import aligned, pack

import cext
from cext import _engine

ROWS, K = 1408, 2048
WEIGHT_BYTES = 64 << 20  # of all experts: twice the largest cache there may be a share of
LEAST_S = 0.004  # of one measurement
PEAK_ROUNDS = 50_000
GGML = "ggml"  # beside the instruction sets
TOKENS = (1, 4, 8, 32, 128, 512)
COLUMNS = ("format", "isa", "tokens", "gops", "percent_of_peak", "gb_s", "percent_of_read", "spread_percent")


class Ring:
    """Experts in one format, used in turn."""

    def __init__(self, name: str) -> None:
        elements, nbytes = block_size(name)
        self.name, self.row_bytes = name, K // elements * nbytes
        self.n = -(-WEIGHT_BYTES // (ROWS * self.row_bytes))
        one = random_blocks(name, ROWS, K, np.random.default_rng(0)).reshape(-1)
        self.experts = [np.array(one) for _ in range(self.n)]
        self.at = 0

    def next(self) -> NDArray[np.uint8]:
        self.at = (self.at + 1) % self.n
        return self.experts[self.at]


def ours(isa: str, ring: Ring, x: NDArray[np.float32]) -> Callable[[], None]:
    """One product with the next expert."""
    act, n_tok = pack(isa, ring.name, x), len(x)
    y = aligned(4 * n_tok * ROWS)
    return lambda: _engine._mul(isa, ring.name, ring.next(), ring.row_bytes, K, 0, ROWS, act, n_tok, y, ROWS)


class InitParams(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


class Plan(ctypes.Structure):
    _fields_ = (
        ("work_size", ctypes.c_size_t),
        ("work_data", ctypes.c_void_p),
        ("n_threads", ctypes.c_int),
        ("threadpool", ctypes.c_void_p),
        ("abort_callback", ctypes.c_void_p),
        ("abort_callback_data", ctypes.c_void_p),
        ("use_ref", ctypes.c_bool),
    )


class Ggml:
    """ggml's matrix product on one thread, through its public functions."""

    def __init__(self) -> None:
        folder = Path(llama_cpp.__file__).parent / "lib"
        base, cpu = (
            ctypes.CDLL(str(next(p for p in sorted(folder.iterdir()) if p.name.startswith(name))))
            for name in ("libggml-base.", "libggml-cpu.")
        )
        pointer, i64 = ctypes.c_void_p, ctypes.c_int64
        self.call = {}
        for lib, name, result, arguments in (
            (base, "ggml_init", pointer, [InitParams]),
            (base, "ggml_free", None, [pointer]),
            (base, "ggml_new_tensor_2d", pointer, [pointer, ctypes.c_int, i64, i64]),
            (base, "ggml_mul_mat", pointer, [pointer, pointer, pointer]),
            (base, "ggml_get_data", pointer, [pointer]),
            (base, "ggml_graph_overhead", ctypes.c_size_t, []),
            (base, "ggml_new_graph", pointer, [pointer]),
            (base, "ggml_build_forward_expand", None, [pointer, pointer]),
            (cpu, "ggml_graph_plan", Plan, [pointer, ctypes.c_int, pointer]),
            (cpu, "ggml_graph_compute", ctypes.c_int, [pointer, ctypes.POINTER(Plan)]),
        ):
            function = getattr(lib, name)
            function.restype, function.argtypes = result, arguments
            self.call[name.removeprefix("ggml_")] = function

    def product(self, ring: Ring, x: NDArray[np.float32]) -> Callable[[], None]:
        """The counterpart of `ours`: a graph for each of enough experts that no cache holds them."""
        call, n_tok = self.call, len(x)
        n = min(ring.n, max(2, (256 << 20) // (4 * n_tok * ROWS)))
        each = ROWS * ring.row_bytes + 4 * n_tok * ROWS + call["graph_overhead"]() + (4 << 10)
        context = call["init"](InitParams(n * each + x.nbytes + (1 << 20), None, False))
        b = call["new_tensor_2d"](context, 0, K, n_tok)
        ctypes.memmove(call["get_data"](b), x.ctypes.data, x.nbytes)
        graphs, work = [], None
        for expert in ring.experts[:n]:
            a = call["new_tensor_2d"](context, int(type_of(ring.name)), K, ROWS)
            ctypes.memmove(call["get_data"](a), expert.ctypes.data, expert.nbytes)
            graph = call["new_graph"](context)
            call["build_forward_expand"](graph, call["mul_mat"](context, a, b))
            plan = call["graph_plan"](graph, 1, None)
            work = work or ctypes.create_string_buffer(plan.work_size + 64)
            plan.work_data = ctypes.addressof(work)
            graphs.append((graph, plan))
        turns = cycle(graphs)

        def run(work: object = work) -> None:  # the buffer lives as long as its user
            graph, plan = next(turns)
            call["graph_compute"](graph, ctypes.byref(plan))

        weakref.finalize(run, call["free"], context)
        return run


@dataclass(frozen=True)
class Case:
    format: str
    isa: str
    n_tok: int


def seconds(run: Callable[[], object], count: int) -> float:
    begin = time.perf_counter()
    for _ in range(count):
        run()
    return (time.perf_counter() - begin) / count


def products(ring: Ring, isas: list[str], tokens: list[int]) -> Iterator[tuple[Case, Callable[[], object]]]:
    """What runs a product of each instruction set and number of tokens."""
    ggml = Ggml() if GGML in isas else None
    rng = np.random.default_rng(1)
    for n_tok in tokens:
        x = rng.normal(0.0, 1.0, (n_tok, K)).astype(np.float32)
        for isa in isas:
            run = ggml.product(ring, x) if ggml and isa == GGML else ours(isa, ring, x)
            yield Case(ring.name, isa, n_tok), run


def limits(isas: list[str]) -> Iterator[tuple[Case, Callable[[], object]]]:
    """The dot instruction and a plain read. ggml is held against the best instruction set's."""
    data = np.ones(WEIGHT_BYTES, np.uint8)  # not zeros: their pages would all be one
    for isa in isas:
        own = cext.isas()[0] if isa == GGML else isa
        yield Case("peak", isa, 0), lambda own=own: _engine._dot_peak(own, PEAK_ROUNDS)
        yield Case("read", isa, 0), lambda own=own: _engine._read_all(own, data)


def in_rounds(runs: dict[Case, Callable[[], object]], n_rounds: int) -> dict[Case, list[float]]:
    """Seconds of one run of each case, n_rounds times in turn."""
    counts = {case: max(1, int(LEAST_S / seconds(run, 1))) for case, run in runs.items()}
    times = defaultdict(list)
    for _ in range(n_rounds):
        for case, run in runs.items():
            times[case].append(seconds(run, counts[case]))
    return times


def row_of(case: Case, times: dict[Case, list[float]], row_bytes: int) -> tuple[object, ...]:
    """The columns of a case."""
    middle = {c: statistics.median(t) for c, t in times.items()}
    own = cext.isas()[0] if case.isa == GGML else case.isa
    peak = 2 * _engine._dot_peak(own, PEAK_ROUNDS) / middle[Case("peak", case.isa, 0)]
    read = WEIGHT_BYTES / middle[Case("read", case.isa, 0)]
    ops = 2 * ROWS * K * case.n_tok / middle[case]
    rate = ROWS * row_bytes / middle[case]
    spread = (max(times[case]) - min(times[case])) / middle[case]
    figures = (ops / 1e9, 100 * ops / peak, rate / 1e9, 100 * rate / read, 100 * spread)
    return (case.format, case.isa, case.n_tok, *(f"{x:.1f}" for x in figures))


def main() -> None:
    isas = [*(isa for isa in cext.isas() if isa != "scalar"), GGML]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--format", action="append", choices=CODED_FORMATS)
    parser.add_argument("--isa", action="append", choices=[*cext.isas(), GGML])
    parser.add_argument("--tokens", action="append", type=int)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    out = options.output.open("w", encoding="utf-8", newline="") if options.output else sys.stdout
    table = csv.writer(out)
    table.writerow(COLUMNS)
    for name in options.format or CODED_FORMATS:
        ring, chosen = Ring(name), options.isa or isas
        runs = dict(limits(chosen)) | dict(products(ring, chosen, options.tokens or list(TOKENS)))
        times = in_rounds(runs, options.rounds)
        for case in runs:
            if case.format == name:
                table.writerow(row_of(case, times, ring.row_bytes))
        out.flush()


if __name__ == "__main__":
    main()
