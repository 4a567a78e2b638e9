"""benchmark.py: prefill and decode speed, alone or beside llama.cpp or ik_llama.cpp, in one interleaved run.

Memory bandwidth drifts on shared machines, so figures are compared only within a round: each engine lives in a process
of its own (contender.py), loaded once, and every test is run by one and then by the other before it is run again. The
first round warms up and is thrown away; for llama.cpp it also tells which of its settings is the better one for that
test. ik_llama.cpp is asked through its own llama-bench (llama_bench.py). Ratios are taken round by round.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dsv2cli.console import format_bytes
from dsv2cli.engines.choice import LLAMA, OURS
from dsv2cli.errors import CliError
from dsv2cli.llama_bench import LlamaBench

# What changes llama.cpp's speed from test to test: the faster one of these is compared with.
VARIANTS: dict[str, tuple[str, ...]] = {OURS: ("kv=f16",), LLAMA: ("fa=0", "fa=1")}
# The same where it is measured for itself, with the cache that is asked for; q8_0 needs flash attention.
LLAMA_ALONE = {
    "f16": VARIANTS[LLAMA],
    "f32": ("fa=0,kv=f32", "fa=1,kv=f32"),
    "q8_0": ("fa=1,kv=q8_0",),
}


@dataclass(frozen=True)
class Test:
    """``n`` tokens read at once (prefill) or one by one (decode), after ``depth`` tokens of context.

    Decoding may go on in several sequences at once, each with a context of its own.
    """

    kind: str
    n: int
    depth: int = 0
    sequences: int = 1

    @property
    def name(self) -> str:
        times = f" x {self.sequences}" if self.sequences > 1 else ""
        return f"{self.kind} {self.n}{times}" + (f" at {self.depth}" if self.depth else "")


@dataclass
class Row:
    """One test's results: tokens a second of each round, by engine."""

    test: Test
    rates: dict[str, list[float]] = field(default_factory=dict)
    variants: dict[str, str] = field(default_factory=dict)  # the setting each engine ran with

    def ratios(self, peer: str) -> list[float]:
        """Of the engine that is measured over a peer's, round by round; none where the peer has no such test."""
        measured = next(iter(self.rates.values()), [])
        return [ours / theirs for ours, theirs in zip(measured, self.rates.get(peer, []), strict=False)]

    def median(self, engine: str) -> float:
        return statistics.median(self.rates[engine])


@dataclass(frozen=True)
class Footprint:
    """An engine's process: seconds from opening the file to the first logits (warm file), and bytes of memory."""

    load_seconds: float
    anonymous_bytes: int  # its own
    file_bytes: int  # pages of the model file, shared with the system's cache
    drive: dict[str, Any] | None = None  # what was read of experts that memory does not hold: residency.drive_record


@dataclass(frozen=True)
class Result:
    model: Path
    threads: int
    isa: str
    machine: str
    rounds: int
    rows: list[Row]
    engines: list[str]  # the one that is measured, then its peers
    footprints: dict[str, Footprint]  # of those that run in a process of this program's
    notes: list[str]  # of the engines, on how they ran
    is_on_gpu: bool = False  # a part of what is measured


def tests(n_prefill: int, n_decode: int, depths: Sequence[int]) -> list[Test]:
    """Prefill and decode at every depth; 0 leaves one of them out."""
    made = []
    for depth in depths:
        made += [Test("prefill", n_prefill, depth)] if n_prefill else []
        made += [Test("decode", n_decode, depth)] if n_decode else []
    return made


def run(
    model: Path,
    wanted: Sequence[Test],
    *,
    threads: int | None,
    rounds: int,
    engine: str = OURS,
    against: Sequence[str | LlamaBench] = (),
    kv_type: str = "f16",
    ram: str = "all",
    gpu: str = "off",
    vram: str | None = None,
    told: Callable[[str, int, int], None] = lambda what, done, n: None,
) -> Result:
    """Run the tests with an engine, and others in turns with it; ``told(what runs now, steps done, steps)``. CliError
    where an engine fails. ram, gpu, vram: see ``contender``."""
    variants = {**VARIANTS, engine: LLAMA_ALONE[kv_type] if engine == LLAMA else (f"kv={kv_type}",)}
    n_ctx = max(test.depth + test.n for test in wanted)
    rows = [Row(test) for test in wanted]
    total, done = (1 + len(against)) * len(rows) * (rounds + 1), 0
    with contextlib.ExitStack() as stack:
        told("loading", 0, total)
        first = stack.enter_context(contender(engine, model, n_ctx, threads, ram, gpu=(gpu, vram)))
        used = int(first.hello["threads"])  # the others get as many as it chose
        engines: dict[str, Contender | Launched] = {engine: first}
        for peer in against:
            if isinstance(peer, LlamaBench):
                engines[peer.name] = Launched(peer, model, used)
            else:
                engines[peer] = stack.enter_context(contender(peer, model, n_ctx, used))
        settled = first.settle() if ram == "auto" and not against else 0  # others take memory for copies of their own
        for row in rows:  # a deeper context is kept from test to test: depth by depth, then round by round
            for round_ in range(rounds + 1):
                for name, runs in engines.items():
                    told(f"{row.test.name}, {name}", done, total)
                    done += 1
                    if not runs.measures(row.test):
                        continue
                    if round_ == 0:
                        row.variants[name] = runs.fastest(row.test, variants.get(name, ()))
                    else:
                        row.rates.setdefault(name, []).append(runs.rate(row.test, row.variants[name]))
        told("measuring memory", total, total)
        footprints = {name: runs.footprint() for name, runs in engines.items() if isinstance(runs, Contender)}
        isa = str(first.hello["isa"])
        notes = [note for runs in engines.values() for note in runs.hello["notes"]]
        if settled:
            notes.append(f"{format_bytes(settled)} of weights were copied to huge pages of memory first")
    is_on_gpu = bool(first.hello["is_on_gpu"])
    return Result(model, used, isa, machine(), rounds, rows, list(engines), footprints, notes, is_on_gpu)


class Launched:
    """A llama-bench, as a contender: what it measures it loads for."""

    def __init__(self, peer: LlamaBench, model: Path, threads: int) -> None:
        self._peer, self._model, self._threads = peer, model, threads
        self.hello: dict[str, Any] = {"notes": []}
        self.measures = peer.measures

    def rate(self, test: Test, variant: str) -> float:
        return self._peer.rate(self._model, self._threads, test)

    def fastest(self, test: Test, variants: Sequence[str]) -> str:
        """Its one setting; run once, so that a wrong program fails before minutes of rounds."""
        self.rate(test, self._peer.setting)
        return self._peer.setting


class Contender:
    """An engine in its own process, asked over pipes: a line of JSON in, a line of JSON out."""

    def __init__(self, name: str, process: subprocess.Popen[str]) -> None:
        self.name, self._process = name, process
        self.hello = self._receive()

    @property
    def process_id(self) -> int:
        return self._process.pid

    def measures(self, test: Test) -> bool:
        """Whether it has such a test."""
        return True

    def rate(self, test: Test, variant: str, seed: int | None = None) -> float:
        """Tokens a second, all sequences together; seed: of other tokens than the usual."""
        answer = self._ask({**asdict(test), "variant": variant} | ({} if seed is None else {"seed": seed}))
        return test.n * test.sequences / float(answer["seconds"])

    def fastest(self, test: Test, variants: Sequence[str]) -> str:
        """The setting that does this test best."""
        return max(variants, key=lambda variant: self.rate(test, variant))

    def settle(self) -> int:
        """See ``contender.Engine``."""
        return int(self._ask({"kind": "settle"})["bytes"])

    def footprint(self) -> Footprint:
        answer = self._ask({"kind": "memory"})
        return Footprint(self.hello["load_seconds"], answer["anonymous_bytes"], answer["file_bytes"], answer["drive"])

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        return self._receive()

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise CliError(f"{self.name} {ending(self._process.wait())}", "DSV2_DEBUG=1 shows what it said")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            of_another = self.name != OURS and self.name not in answer["error"]
            raise CliError(f"{self.name}: {answer['error']}" if of_another else answer["error"], answer.get("hint", ""))
        return answer


def ending(code: int) -> str:
    """ "ended with exit code 1", "ended by SIGSEGV": a process's, by its return code."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"ended by signal {-code}"


def environment() -> dict[str, str]:
    """Of a process that is to find these packages."""
    home = str(Path(__file__).parents[1])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH")]))}


@contextlib.contextmanager
def contender(
    name: str,
    model: Path,
    n_ctx: int,
    threads: int | None,
    ram: str = "all",
    launcher: Sequence[str] = (),
    gpu: tuple[str, str | None] = ("off", None),
) -> Iterator[Contender]:
    """An engine with the model loaded; its process ends with the block. ram, gpu: of dsv2's own, as --ram, --gpu and
    --vram take it.
    launcher: a command that runs the one behind it in its place."""
    # -P: the packages at home, not what lies in the working folder.
    asked = [name, str(model), str(n_ctx), str(threads or 0), ram, gpu[0], gpu[1] or ""]
    command = [*launcher, sys.executable, "-P", "-m", "dsv2cli.contender", *asked]
    quiet = None if os.environ.get("DSV2_DEBUG") else subprocess.DEVNULL
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=quiet,
        text=True,
        env=environment(),
    )
    try:
        yield Contender(name, process)
    finally:
        process.kill()
        process.communicate()


# Arm's own cores, by the part number in their identification register.
ARM_PARTS = {
    0xD03: "Cortex-A53", 0xD05: "Cortex-A55", 0xD08: "Cortex-A72", 0xD0B: "Cortex-A76", 0xD0C: "Neoverse-N1",
    0xD40: "Neoverse-V1", 0xD41: "Cortex-A78", 0xD44: "Cortex-X1", 0xD46: "Cortex-A510", 0xD47: "Cortex-A710",
    0xD48: "Cortex-X2", 0xD49: "Neoverse-N2", 0xD4D: "Cortex-A715", 0xD4E: "Cortex-X3", 0xD4F: "Neoverse-V2",
    0xD80: "Cortex-A520", 0xD81: "Cortex-A720", 0xD82: "Cortex-X4", 0xD84: "Neoverse-V3", 0xD8E: "Neoverse-N3",
}  # fmt: skip
ARM_LIMITED = 0x41


def processor_name(cpuinfo: str) -> str | None:
    """The name in the text of /proc/cpuinfo: written out on x86, the numbers of maker and part on ARM."""
    facts = [(key.strip(), value.strip()) for key, _, value in (line.partition(":") for line in cpuinfo.splitlines())]
    if names := [value for key, value in facts if key == "model name"]:
        return names[0]
    makers = [int(value, 16) for key, value in facts if key == "CPU implementer"]
    parts = [int(value, 16) for key, value in facts if key == "CPU part"]
    kinds = dict.fromkeys(zip(makers, parts, strict=False))  # large and small cores
    names = [(maker == ARM_LIMITED and ARM_PARTS.get(part)) or f"ARM {maker:#x}:{part:#x}" for maker, part in kinds]
    return " + ".join(names) or None


def machine() -> str:
    """The processor's name and number of processors, for the record."""
    name = None
    with contextlib.suppress(OSError):
        name = processor_name(Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    return f"{name or platform.processor() or platform.machine()}, {os.cpu_count()} processors"
