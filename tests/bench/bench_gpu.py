"""A model on a GPU, placed in several ways: speeds, counts and shaders' times, as a CSV and in words.

    python tests/bench/bench_gpu.py MODEL.gguf -o gpu.csv
    python tests/bench/bench_gpu.py MODEL.gguf --placements card,ram --threads 8,16 --depths 0,4096 --limit 120
    python tests/bench/bench_gpu.py MODEL.gguf --skewed SKEWED.gguf --placements hot
    python tests/bench/bench_gpu.py MODEL.gguf --minutes 10

Needs a build of the engine with shaders on the path and numpy, nothing else. Each placement, with each number of
threads, is a process of its own with a limit to its time: what fails or hangs costs its own figures. Rows are written
as they come.

card: all on the card. ram: all but the routed experts. 6g: as many layers' experts as 6 GB hold, too. hot: in as much,
the experts that are used most come and go. cpu: nothing. --skewed: decoding of a copy whose routers prefer some experts
(tests/bench/skew_routers.py), at 6g and hot, beside that of the model. --minutes: steps of mixed lengths for so long,
at hot, and memory of the process and of the card at the beginning and the end.
copies: prompts with the experts of ram and of 6g in memory, computed by the processor alone (never), on the card alone
(always) and shared out as is faster (auto), in turns: what is copied, at what rate, and how many experts each computes.
Prompts are random tokens; depths are made by repeating the rows of a short prompt (Session.repeat).
"""

import argparse
import csv
import mmap
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any, Literal, TextIO

import numpy as np

import cext
from cext import Device, Gguf, Model, Place, _engine

Row = tuple[str, int, str, str, float, str]  # placement, threads, test, what, value, unit
HEAD = ("placement", "threads", "test", "what", "value", "unit")
SMALL_CARD, SPARE = 6_000_000_000, 1_300_000_000  # bytes; of these for caches, steps and the driver
TOP = 12
SKEWED = "-skewed"  # behind a placement: of the other model
WARM = 256  # tokens, until experts have come
SEQUENCES, LONGEST = 8, 1024  # of mixed lengths: at once, and tokens of a prompt


def expert_layers(path: Path, room: int) -> tuple[int, int]:
    """How many layers' routed experts fit beside all other weights and two layers' copies for prompts, and the bytes
    that are left for them."""
    with Gguf(path) as gguf:
        layers: dict[int, int] = {}
        rest = 0
        for tensor in gguf.tensors:
            if "_exps." in tensor.name:
                il = int(tensor.name.split(".")[1])
                layers[il] = layers.get(il, 0) + tensor.nbytes
            elif tensor.name != "token_embd.weight":
                rest += tensor.nbytes
    left = room - rest - 2 * max(layers.values(), default=0)
    fit = np.cumsum([layers[il] for il in sorted(layers)]) <= left
    return int(fit.sum()), left


def devices(path: Path, how: str, which: str | None) -> list[Device]:
    if how == "cpu":
        return []
    hot = expert_layers(path, SMALL_CARD - SPARE)[1] if how == "hot" else None
    return [Device("vulkan", name=which, hot=hot)]


def places(path: Path, how: str) -> list[Place]:
    with Gguf(path) as gguf:
        shape, _ = cext.model.shape_of(gguf)
    n, dense, experts = shape["n_layer"], shape["n_layer_dense"], range(shape["n_expert"])
    if how == "cpu":
        return []
    on = [Place("ends", 1), Place("attention", 1, range(n)), Place("feed_forward", 1, range(n))]
    layers = dense + expert_layers(path, SMALL_CARD - SPARE)[0]
    first = {"card": n, "ram": dense, "hot": dense, "6g": layers}[how]
    return on + ([Place("experts", 0, range(first, n), experts)] if first < n else [])


class Copies:
    """Prompts with and without copies of experts, in turns; each has a model of its own."""

    def __init__(self, options: argparse.Namespace, threads: int) -> None:
        self.options, self.threads = options, threads
        self.rng = np.random.default_rng(2)

    def run(self) -> Iterator[Row]:
        for how in ("ram", "6g"):
            opened = {copies: self.opened(how, copies) for copies in ("never", "auto", "always")}
            for n in self.options.prompts:
                yield from self.prompts(how, opened, n)
            for model in opened.values():
                model.close()

    def opened(self, how: str, copies: Literal["never", "auto", "always"]) -> Model:
        device = Device("vulkan", name=self.options.gpu, copies=copies)
        placement = places(self.options.model, how)
        return Model(self.options.model, threads=self.threads or None, devices=[device], placement=placement)

    def prompts(self, how: str, opened: dict[str, Model], n: int) -> Iterator[Row]:
        sessions = {copies: model.session(n + 8, self.options.kv) for copies, model in opened.items()}
        spent: dict[str, list[float]] = {copies: [] for copies in opened}
        for i in range(self.options.rounds + 1):
            for copies, session in sessions.items():
                ids = self.rng.integers(0, session.model.hparams["n_vocab"], n, dtype=np.int32)
                session.rewind(0)
                if i == self.options.rounds:
                    session.model.watch(1, times=False)
                seconds = timed(lambda session=session, ids=ids: session.eval(ids))
                if i:  # the first calibrates, and makes pipelines
                    spent[copies].append(seconds)
        for copies, model in opened.items():
            work, test = model.watched(1), f"prefill{n}"
            where, threads = f"{how} copies={copies}", model.threads
            yield where, threads, test, "speed", n / median(spent[copies]), "tok/s"
            yield where, threads, test, "best", n / min(spent[copies]), "tok/s"
            yield where, threads, test, "worst", n / max(spent[copies]), "tok/s"
            yield where, threads, test, "copied", work.copied_bytes / 1e9, "GB a prompt"
            yield where, threads, test, "rate", work.copied_bytes / max(work.copy_ns, 1), "GB/s while copying"
            yield where, threads, test, "experts on the card", work.copied_experts, "a prompt"
            yield where, threads, test, "experts on the processor", work.kept_experts, "a prompt"
            yield where, threads, test, "crossing", work.crossing, "tokens of an expert"
            yield where, threads, test, "slots", work.slot_bytes / 1e9, "GB"
            yield where, threads, test, "waiting", work.wait_ns / 1e6, "ms a prompt"


def timed(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


class Part:
    """One placement: its tests, as rows."""

    def __init__(self, options: argparse.Namespace, how: str, threads: int) -> None:
        self.options, self.how, self.threads = options, how, threads
        self.path = options.skewed if how.endswith(SKEWED) else options.model
        self.rng = np.random.default_rng(1)

    def row(self, test: str, what: str, value: float, unit: str) -> Row:
        return self.how, self.threads, test, what, value, unit

    def ids(self, n: int) -> "np.ndarray[Any, Any]":
        return self.rng.integers(0, self.model.hparams["n_vocab"], n, dtype=np.int32)

    def open(self, how: str) -> Iterator[Row]:
        placed = {"devices": devices(self.path, how, self.options.gpu), "placement": places(self.path, how)}
        begin = time.perf_counter()
        self.model = Model(self.path, threads=self.threads or None, **placed)
        self.threads = self.model.threads
        yield self.row("open", "seconds", time.perf_counter() - begin, "s")

    def run(self) -> Iterator[Row]:
        how, placement = self.how.removesuffix(SKEWED), self.how != "cpu"
        yield from self.open(how)
        depths, prompts = self.options.depths, self.options.prompts
        if self.how.endswith(SKEWED):
            depths, prompts, self.options.batches = depths[:1], [], []
        self.session = self.model.session(max([*depths, *prompts]) + 700, self.options.kv)
        for depth in depths:
            yield from self.decode(depth, bool(placement))
        for n in prompts:
            yield from self.prefill(n, bool(placement))
        for n in self.options.batches:
            yield from self.batch(n)
        self.model.close()

    def at(self, depth: int) -> None:
        self.session.rewind(0)
        if depth:
            self.session.eval(self.ids(min(depth, 256)))
            self.session.repeat(depth)

    def steps(self, n: int) -> list[float]:
        return [timed(lambda i=i: self.session.eval([i])) for i in self.ids(n).tolist()]

    def decode(self, depth: int, watched: bool) -> Iterator[Row]:
        test, n = f"decode@{depth}", self.options.steps
        self.at(depth)
        first = self.steps(1)[0]
        self.steps(WARM if self.how.startswith("hot") else 4)
        self.at(depth)
        if watched:
            self.model.watch(1, times=False)
        spent = self.steps(n)
        yield self.row(test, "speed", 1 / median(spent), "tok/s")
        yield self.row(test, "mean", n / sum(spent), "tok/s")
        yield self.row(test, "first", first * 1e3, "ms")
        if watched and (hot := self.model.watched(1).hot).slots:
            yield self.row(test, "choices that were there", 100 * (hot.rate or 0), "%")
            yield self.row(test, "uploads", hot.nbytes / max(hot.tokens, 1) / 1e6, "MB a token")
        if watched:
            self.model.watch(1, times=False)
            self.steps(8)
            yield from self.counted(test, 8)
            self.model.watch(1, times=True)
            self.steps(8)
            yield from self.shaders(test, 8)

    def prefill(self, n: int, watched: bool) -> Iterator[Row]:
        test = f"prefill{n}"
        spent = []
        for _ in range(self.options.rounds + 1):
            self.session.rewind(0)
            ids = self.ids(n)
            spent.append(timed(lambda ids=ids: self.session.eval(ids)))
        yield self.row(test, "speed", n / median(spent[1:]), "tok/s")
        yield self.row(test, "best", n / min(spent), "tok/s")
        yield self.row(test, "first", spent[0] * 1e3, "ms")
        if watched:
            self.model.watch(1, times=False)
            self.session.rewind(0)
            self.session.eval(self.ids(n))
            yield from self.counted(test, 1)
            self.model.watch(1, times=True)
            self.session.rewind(0)
            self.session.eval(self.ids(n))
            yield from self.shaders(test, 1)

    def batch(self, n: int) -> Iterator[Row]:
        """n sequences in one step."""
        sessions = [self.model.session(256, self.options.kv) for _ in range(n)]
        for session in sessions:
            session.eval(self.ids(16))
        spent = []
        for _ in range(12):
            step = [(session, self.ids(1)) for session in sessions]
            spent.append(timed(lambda step=step: cext.eval_batch(step)))
        yield self.row(f"batch{n}", "speed", n / median(spent[2:]), "tok/s")

    def mixed(self) -> Iterator[Row]:
        """Prompts and answers of mixed lengths, in several sequences, for so long."""
        yield from self.open("hot")
        sessions = [self.model.session(2 * LONGEST, self.options.kv) for _ in range(SEQUENCES)]
        self.round(sessions, LONGEST)  # as long as any: what grows has grown
        begin, n = time.monotonic(), 0
        yield from self.memory("start")
        while time.monotonic() - begin < 60 * self.options.minutes:
            n += self.round(sessions, int(self.rng.integers(1, LONGEST + 1)))
        yield from self.memory("end")
        yield self.row("mixed", "tokens", n, "")
        yield self.row("mixed", "seconds", time.monotonic() - begin, "s")
        self.model.close()

    def round(self, sessions: list[Any], longest: int) -> int:
        """New prompts for all, then an answer: the tokens that were evaluated."""
        n = 0
        for session in sessions:
            session.rewind(0)
            prompt = self.ids(int(self.rng.integers(1, longest)) if longest < LONGEST else LONGEST)
            session.eval(prompt)
            n += len(prompt)
        for _ in range(int(self.rng.integers(1, 64))):
            some = sessions[: int(self.rng.integers(1, SEQUENCES + 1))]
            cext.eval_batch([(session, self.ids(1)) for session in some])
            n += len(some)
        return n

    def memory(self, when: str) -> Iterator[Row]:
        pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
        kept = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[2])  # of files
        page = mmap.PAGESIZE / 1e6
        yield self.row("mixed", f"{when}: resident", pages * page, "MB")
        yield self.row("mixed", f"{when}: of it the file's", kept * page, "MB")
        yield self.row("mixed", f"{when}: on the card", self.model.watched(1).memory / 1e6, "MB")
        which = (self.options.gpu or "").lower()
        listed = [d for i, d in enumerate(_engine.gpu_list()) if which == str(i) or which in d["name"].lower()]
        yield self.row("mixed", f"{when}: free there", listed[0]["free"] / 1e6 if listed else 0, "MB")

    def counted(self, test: str, steps: int) -> Iterator[Row]:
        work = self.model.watched(1)
        for name in ("dispatches", "barriers", "recordings", "submissions", "waits"):
            yield self.row(test, name, getattr(work, name) / steps, "a step")
        yield self.row(test, "recording", work.record_ns / steps / 1e3, "us a step")
        yield self.row(test, "waiting", work.wait_ns / steps / 1e3, "us a step")

    def shaders(self, test: str, steps: int) -> Iterator[Row]:
        times = self.model.watched(1).times
        self.model.watch(1, times=False)
        yield self.row(test, "all shaders", sum(ns for _, ns in times.values()) / steps / 1e3, "us a step")
        for name, (n, ns) in sorted(times.items(), key=lambda item: -item[1][1])[:TOP]:
            yield self.row(test, f"{name} x{n / steps:g}", ns / steps / 1e3, "us a step")


def device_rows(which: str | None) -> Iterator[Row]:
    """What the device is; the link as copies of 256 MiB see it."""
    listed = _engine.gpu_list()
    for i, device in enumerate(listed):
        for key, value in device.items():
            print(f"# device {i}: {key}: {value}", flush=True)
    gpu = _engine.gpu_open(which)
    try:
        into, back = _engine.gpu_link(gpu, 256 << 20)
    finally:
        _engine.gpu_close(gpu)
    yield "link", 0, "copy 256 MiB", "to the device", into / 1e9, "GB/s"
    yield "link", 0, "copy 256 MiB", "to the host", back / 1e9, "GB/s"


def child(options: argparse.Namespace) -> None:
    how, threads = options.part.split(":")
    part = Part(options, how, int(threads))
    if how == "device":
        rows = device_rows(options.gpu)
    elif how == "copies":
        rows = Copies(options, int(threads)).run()
    else:
        rows = part.mixed() if how == "mixed" else part.run()
    table = csv.writer(sys.stdout, lineterminator="\n")
    for placement, n, test, what, value, unit in rows:
        table.writerow((placement, n, test, what, f"{value:.6g}", unit))
        sys.stdout.flush()


def run_part(part: str, arguments: list[str], limit: float, out: TextIO) -> None:
    """The rows of a process; what it says else, and how it ended, to stderr."""
    command = [sys.executable, str(Path(__file__).resolve()), *arguments, "--part", part]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    timer = threading.Timer(limit, process.kill)
    timer.start()
    begin = time.perf_counter()
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        row = next(csv.reader([line]))
        if len(row) == len(HEAD) and not line.startswith("#"):
            csv.writer(out, lineterminator="\n").writerow(row)
            out.flush()
    code = process.wait()
    timer.cancel()
    spent = time.perf_counter() - begin
    told = "ended" if code == 0 else f"FAILED with {code}" + (" (its time was over)" if spent >= limit else "")
    print(f"# {part}: {told} after {spent:.1f} s", flush=True)


def numbers(text: str) -> list[int]:
    return [int(x) for x in text.split(",") if x]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("-o", "--out", type=Path, default=Path("gpu.csv"))
    parser.add_argument("--gpu", default=None, help="number or letters of its name")
    parser.add_argument("--placements", default="card,ram,6g,hot,copies,cpu")
    parser.add_argument("--skewed", type=Path, help="a copy of the model whose routers prefer some experts")
    parser.add_argument("--minutes", type=float, default=0, help="of steps of mixed lengths")
    parser.add_argument("--threads", type=numbers, default=[0], help="0: what is fastest")
    parser.add_argument("--depths", type=numbers, default=[0, 4096, 16384])
    parser.add_argument("--prompts", type=numbers, default=[512, 2048])
    parser.add_argument("--batches", type=numbers, default=[8], help="sequences in a step")
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kv", default="f16")
    parser.add_argument("--limit", type=float, default=150, help="seconds of a placement")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        child(options)
        return
    hows = [how for how in options.placements.split(",") if how]
    hows += [f"{how}{SKEWED}" for how in ("6g", "hot") if options.skewed]
    parts = ["device:0"] + [f"{how}:{n}" for how in hows for n in options.threads]
    parts += ["mixed:0"] if options.minutes else []
    with options.out.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerow(HEAD)
        for part in parts:
            more = 60 * options.minutes if part.startswith("mixed") else 0
            run_part(part, sys.argv[1:], options.limit + more, file)


if __name__ == "__main__":
    main()
