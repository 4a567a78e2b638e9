"""Products with every format, on one thread: operations and bytes a second by instruction set and tokens, as CSV.

    python tests/bench/bench_kernels.py [-o FILE] [--format NAME]... [--isa NAME]... [--tokens N]... [--rounds N] [--l1]

A product is one expert's matrix (1408 rows of 2048 values) with N tokens; the experts take turns, more of them than a
cache holds (`--mib`), so that their weights come from memory as in a model; they lie in huge pages, as a file's should.
`--l1` adds the same with one row over and over, which is in L1. Rounds go over all cases in turn, because a machine's
speed drifts: a figure is the median of the rounds, the spread their range over the median (with `--least` the shortest
of them, which other work on the machine changes less). The limits (the dot instruction on data in L1, a plain read of
memory, the clock) are measured in the same rounds. Cycles are of 256 values of a row, with its share of a row's
beginning and end. `ggml` is the same product by the libggml that llama-cpp-python brings, which also quantises the
activations each time; `--ggml avx2=FOLDER` adds `ggml-avx2`, by a libggml built for that instruction set alone.
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
from dsv2cli import benchmark

ROWS, K = 1408, 2048
MIB = 1024  # of all experts: more than the largest caches hold
LEAST_S = 0.004  # of one measurement
PEAK_ROUNDS = 50_000
CLOCK_ROUNDS = 1_000_000
MEMORY, L1 = "memory", "L1"
Typical = Callable[[list[float]], float]  # of the rounds, the one that is told
GGML = "ggml"  # beside the instruction sets; one built for a set is GGML-SET
TOKENS = (1, 4, 8, 32, 128, 512)
COLUMNS = (
    "machine", "format", "isa", "weights_in", "tokens", "gops", "percent_of_peak", "gb_s", "percent_of_read",
    "cycles_per_256", "bytes_per_cycle", "ghz", "read_gb_s", "spread_percent",
)  # fmt: skip


class Ring:
    """Experts in one format, used in turn."""

    def __init__(self, name: str, nbytes: int) -> None:
        elements, block_bytes = block_size(name)
        self.name, self.row_bytes = name, K // elements * block_bytes
        self.n = -(-nbytes // (ROWS * self.row_bytes))
        one = random_blocks(name, ROWS, K, np.random.default_rng(0)).reshape(-1)
        self.experts = np.tile(one, (self.n, 1))  # one allocation: numpy asks for huge pages
        self.at = 0

    def next(self) -> NDArray[np.uint8]:
        self.at = (self.at + 1) % self.n
        return self.experts[self.at]


def ours(isa: str, ring: Ring, x: NDArray[np.float32], where: str) -> Callable[[], None]:
    """One product with the next expert, or with as many copies of one row."""
    act, n_tok = pack(isa, ring.name, x), len(x)
    y = aligned(4 * n_tok * ROWS)
    if where == L1:
        first = ring.experts[0]
        return lambda: _engine._mul(isa, ring.name, first, 0, K, 0, ROWS, act, n_tok, y, ROWS)
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

    def __init__(self, folder: Path) -> None:
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
        memory = np.empty(n * each + x.nbytes + (1 << 20), np.uint8)  # huge pages, as ours
        context = call["init"](InitParams(memory.nbytes, memory.ctypes.data, False))
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

        def run(work: object = work, memory: object = memory) -> None:  # buffers live as long as their user
            graph, plan = next(turns)
            call["graph_compute"](graph, ctypes.byref(plan))

        weakref.finalize(run, call["free"], context)
        return run


@dataclass(frozen=True)
class Case:
    format: str
    isa: str
    n_tok: int
    where: str = MEMORY


def seconds(run: Callable[[], object], count: int) -> float:
    begin = time.perf_counter()
    for _ in range(count):
        run()
    return (time.perf_counter() - begin) / count


def own_isa(isa: str) -> str:
    """The instruction set whose limits a row is held against."""
    return cext.isas()[0] if isa == GGML else isa.removeprefix(f"{GGML}-")


def products(
    ring: Ring, isas: list[str], ggmls: dict[str, Ggml], tokens: list[int], places: list[str]
) -> Iterator[tuple[Case, Callable[[], object]]]:
    """What runs a product of each instruction set and number of tokens."""
    rng = np.random.default_rng(1)
    for n_tok in tokens:
        x = rng.normal(0.0, 1.0, (n_tok, K)).astype(np.float32)
        for isa in isas:
            for where in places:
                if isa not in ggmls:
                    yield Case(ring.name, isa, n_tok, where), ours(isa, ring, x, where)
                elif where == MEMORY:
                    yield Case(ring.name, isa, n_tok), ggmls[isa].product(ring, x)


def limits(ring: Ring, isas: list[str]) -> Iterator[tuple[Case, Callable[[], object]]]:
    """The dot instruction, a plain read and the clock. ggml is held against the best instruction set's."""
    for isa in isas:
        own = own_isa(isa)
        yield Case("peak", isa, 0), lambda own=own: _engine._dot_peak(own, PEAK_ROUNDS)
        yield Case("read", isa, 0), lambda own=own: _engine._read_all(own, ring.next())
        yield Case("clock", isa, 0), lambda own=own: _engine._chain(own, CLOCK_ROUNDS)


def in_rounds(runs: dict[Case, Callable[[], object]], n_rounds: int) -> dict[Case, list[float]]:
    """Seconds of one run of each case, n_rounds times in turn."""
    counts = {case: max(1, int(LEAST_S / seconds(run, 1))) for case, run in runs.items()}
    times = defaultdict(list)
    for _ in range(n_rounds):
        for case, run in runs.items():
            times[case].append(seconds(run, counts[case]))
    return times


def row_of(case: Case, times: dict[Case, list[float]], row_bytes: int, typical: Typical) -> tuple[object, ...]:
    """The columns of a case."""
    middle = {c: typical(t) for c, t in times.items()}
    own = own_isa(case.isa)
    peak = 2 * _engine._dot_peak(own, PEAK_ROUNDS) / middle[Case("peak", case.isa, 0)]
    read = ROWS * row_bytes / middle[Case("read", case.isa, 0)]
    hertz = _engine._chain(own, CLOCK_ROUNDS) / middle[Case("clock", case.isa, 0)]
    ops = 2 * ROWS * K * case.n_tok / middle[case]
    rate = ROWS * row_bytes / middle[case]
    cycles = middle[case] * hertz / (ROWS * K / 256)
    spread = (max(times[case]) - min(times[case])) / middle[case]
    rates = (ops / 1e9, 100 * ops / peak, rate / 1e9, 100 * rate / read)
    figures = (*rates, cycles, rate / hertz, hertz / 1e9, read / 1e9, 100 * spread)
    return (benchmark.machine(), case.format, case.isa, case.where, case.n_tok, *(f"{x:.1f}" for x in figures))


def main() -> None:
    isas = [*(isa for isa in cext.isas() if isa != "scalar"), GGML]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--format", action="append", choices=CODED_FORMATS)
    parser.add_argument("--isa", action="append", choices=[*cext.isas(), GGML])
    parser.add_argument("--tokens", action="append", type=int)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--least", action="store_true", help="the shortest of the rounds, not their median")
    parser.add_argument("--l1", action="store_true", help="also with a row in L1")
    parser.add_argument("--mib", type=int, default=MIB, help="of weights, through which products go in turn")
    parser.add_argument("--ggml", action="append", default=[], metavar="ISA=FOLDER", help="also of the libggml there")
    options = parser.parse_args()
    folders = {f"{GGML}-{isa}": Path(folder) for isa, folder in (pair.split("=", 1) for pair in options.ggml)}
    chosen = [*(options.isa or isas), *folders]
    if GGML in chosen:
        folders[GGML] = Path(llama_cpp.__file__).parent / "lib"
    ggmls = {name: Ggml(folder) for name, folder in folders.items()}
    out = options.output.open("w", encoding="utf-8", newline="") if options.output else sys.stdout
    table = csv.writer(out)
    table.writerow(COLUMNS)
    for name in options.format or CODED_FORMATS:
        ring = Ring(name, options.mib << 20)
        places = [MEMORY, L1] if options.l1 else [MEMORY]
        runs = dict(limits(ring, chosen)) | dict(products(ring, chosen, ggmls, options.tokens or list(TOKENS), places))
        times = in_rounds(runs, options.rounds)
        for case in runs:
            if case.format == name:
                table.writerow(row_of(case, times, ring.row_bytes, min if options.least else statistics.median))
        out.flush()


if __name__ == "__main__":
    main()
