"""forecast.py: what a model takes of memory and how fast it will be: arithmetic on its figures and this machine's."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dsv2cli import residency
from dsv2cli.anatomy import Anatomy
from dsv2cli.engines.cache import count
from dsv2cli.engines.choice import OURS
from dsv2cli.memory import ROUND
from dsv2cli.planner import quality
from dsv2cli.planner.hollow import PROMPT, Work, work_of
from dsv2cli.planner.probe import Rates
from dsv2cli.planner.subject import Rung, Subject

if TYPE_CHECKING:
    from cext.model import KvType

DEPTHS = (0, 4096, 16384, 131072)
PROGRAM_BYTES = 67 << 20  # of an interpreter with what chat loads: 29 MiB its own, 38 of pages of libraries
TOKENIZER_BYTES = 370  # for each token: its text, its place in two tables, its merge
LEAST_BAND = 0.15  # of a speed: what a machine's memory drifts by within minutes, and scaling a part to the whole
MEMORY_BAND = 0.05
NOTICED = 1.1  # times as fast
DRIVES = (0.5e9, 3e9, 7e9)  # bytes a second: an SSD on SATA, one on PCIe 3, one on PCIe 4 or 5
KV: tuple[KvType, ...] = ("f16", "q8_0", "f32")


@dataclass(frozen=True)
class Memory:
    """Bytes at a context. scratch: of steps; program: of all else that is the process's own."""

    n_ctx: int
    kv_type: KvType
    weights: int
    cache: int
    scratch: int
    program: int
    free: int | None

    @property
    def own(self) -> int:
        """All but the weights, which are pages of the file."""
        return self.cache + self.scratch + self.program

    @property
    def total(self) -> int:
        return self.weights + self.own

    @property
    def fits(self) -> bool:
        return self.free is None or self.total <= self.free


@dataclass(frozen=True)
class Speed:
    """Tokens a second, and within which limits."""

    depth: int
    rate: float
    low: float
    high: float


@dataclass(frozen=True)
class Drive:
    """What is read from the drive where memory does not hold all experts. held: the share of them that it does;
    missed: bytes a token at most, where every expert is used as often; rates: tokens a second, by DRIVES. least: bytes
    for weights without which nothing runs."""

    ram: int
    least: int
    long_step: int
    total: int
    held: float
    missed: int
    rates: tuple[float | None, ...]

    @property
    def runs(self) -> bool:
        return self.ram >= self.least


@dataclass(frozen=True)
class Forecast:
    subject: Subject
    memory: Memory
    longest: (
        int | None
    )  # context that fits, at most what the model was trained for; None where the system tells nothing
    decode: tuple[Speed, ...]
    prefill: Speed | None
    rates: Rates | None
    why_no_speed: str
    drive: Drive | None
    advice: str


def memory_of(
    found: Anatomy, n_ctx: int | None, kv_type: KvType, free: int | None, scratch: int, n_vocab: int
) -> Memory:
    """At a context; None: as chat takes it, 0: as long as the model was trained for."""
    trained = count(found.keys, "context_length")
    n_ctx = residency.context(trained, n_ctx)
    program = PROGRAM_BYTES + TOKENIZER_BYTES * n_vocab
    return Memory(n_ctx, kv_type, found.tensor_bytes, found.kv_bytes[kv_type] * n_ctx, scratch, program, free)


def longest_context(found: Anatomy, memory: Memory, kv_type: KvType) -> int | None:
    """Tokens of context that fit beside everything else; None where the system does not tell what is free."""
    if memory.free is None:
        return None
    left = memory.free - memory.weights - memory.scratch - memory.program
    n = max(0, left) // max(1, found.kv_bytes[kv_type]) // ROUND * ROUND
    return min(n, count(found.keys, "context_length") or n)


def speed(depth: int, seconds: float, spread: float, n: int = 1) -> Speed:
    band = max(LEAST_BAND, spread)
    return Speed(depth, n / seconds, n / seconds / (1 + band), n / seconds * (1 + band))


def decode_seconds(token_bytes: int, n_layer: int, depth: int, rates: Rates) -> float:
    return token_bytes / rates.bandwidth + depth * n_layer * rates.attention


def prefill_seconds(work: Work, rates: Rates) -> float:
    """Of PROMPT tokens read at once into an empty context."""
    return PROMPT * work.layer_products / rates.products + work.head_bytes / rates.bandwidth


def speeds(found: Anatomy, work: Work, rates: Rates) -> tuple[tuple[Speed, ...], Speed]:
    """Of decoding at each of DEPTHS that the model was trained for, and of PROMPT tokens."""
    trained = count(found.keys, "context_length")
    decode = tuple(
        speed(d, decode_seconds(found.token_bytes, work.n_layer, d, rates), rates.spread)
        for d in DEPTHS
        if not trained or d < trained
    )
    return decode, speed(0, prefill_seconds(work, rates), rates.spread, PROMPT)


def forecast(
    subject: Subject,
    *,
    n_ctx: int | None = None,
    kv_type: KvType = "f16",
    ram: int | None = None,
    threads: int | None = None,
    free: int | None = None,
    rates: Rates | str = "not asked for",
) -> Forecast:
    """All of it. rates: this machine's, or why there are none. EngineError where the engine would not run the file."""
    from cext import Gguf

    found = subject.found
    scratch, budget = _asked_of_the_engine(found, n_ctx, kv_type, threads, free) if found.engine == OURS else (0, None)
    if isinstance(rates, Rates) and rates.scratch is not None:
        scratch = rates.scratch
    decode: tuple[Speed, ...] = ()
    prefill = None
    with Gguf(found.path) as gguf:
        tensors = list(gguf.tensors)
    embeddings = next((t for t in tensors if t.name == "token_embd.weight"), None)
    memory = memory_of(found, n_ctx, kv_type, free, scratch, embeddings.shape[-1] if embeddings else 0)
    if isinstance(rates, Rates):
        decode, prefill = speeds(found, work_of(tensors, found.keys), rates)
    known = rates if isinstance(rates, Rates) else None
    drive = _drive(found, memory, ram, budget, known)
    return Forecast(
        subject, memory, longest_context(found, memory, kv_type), decode, prefill, known,
        "" if known else str(rates), drive, advise(subject, memory, known, drive),
    )  # fmt: skip


def _asked_of_the_engine(
    found: Anatomy, n_ctx: int | None, kv_type: KvType, threads: int | None, free: int | None
) -> tuple[int, residency.Plan]:
    """What steps take at most, and which weights chat would hold in so much free memory. EngineError where the engine
    would not run the file."""
    from cext import Model

    with Model(found.path, threads) as model:
        beside = residency.Beside(n_ctx, kv_type).nbytes(model)
        needs = model.needs()
        ram = None if free is None else residency.choose(needs, free - beside, residency.margin(free))
        return model.step_bytes(PROMPT), residency.Plan(needs, model.hparams, beside, free, ram)


def _drive(
    found: Anatomy, memory: Memory, ram: int | None, budget: residency.Plan | None, rates: Rates | None
) -> Drive | None:
    """Where memory is short, or less of it is asked for; None where all weights are held."""
    if budget is None or not budget.needs.slots or (ram is None and memory.fits):
        return None
    if ram is None:
        ram = budget.ram if budget.ram is not None else (memory.free or 0) - memory.own - budget.needs.long_step
        ram = max(0, ram)
    if ram >= budget.needs.all:
        return None
    long_step = budget.needs.long_step
    missed = round(budget.token_bytes(ram))
    paces: tuple[float | None, ...] = (None,) * len(DRIVES)
    if rates is not None:
        step = decode_seconds(found.token_bytes, 0, 0, rates)
        paces = tuple(1 / (step + missed / drive) for drive in DRIVES)
    total = ram + memory.own + long_step
    return Drive(ram, budget.needs.least, long_step, total, budget.held(ram), missed, paces)


def rung_memory(rung: Rung, memory: Memory) -> int:
    """Of the same model in another size, at the same context."""
    return rung.nbytes + memory.own


def advise(subject: Subject, memory: Memory, rates: Rates | None, drive: Drive | None) -> str:
    """The one change that would help most, as a sentence; "" where there is none to be named."""
    return _make_fit(subject, memory, drive) if not memory.fits else _make_fast(subject, memory, rates)


def _make_fit(subject: Subject, memory: Memory, drive: Drive | None) -> str:
    found, free = subject.found, memory.free or 0
    room = free - memory.weights - memory.scratch - memory.program
    coded = found.kv_bytes["q8_0"] * memory.n_ctx
    if memory.kv_type == "f16" and coded < memory.cache and coded <= room:
        return "--kv q8_0 keeps the context in half of the memory, and then it fits"
    shorter = longest_context(found, memory, memory.kv_type) or 0
    if shorter >= min(residency.DEFAULT_CONTEXT, memory.n_ctx // 2):
        return f"a context of {shorter} tokens fits (--ctx {shorter})"
    fitting = [r for r in subject.ladder if r.nbytes < memory.weights and rung_memory(r, memory) <= free]
    if fitting:
        best = max(fitting, key=lambda r: r.nbytes)
        return f"in {best.name} it fits (--type {best.name})"
    if drive is not None and drive.runs:
        return "--ram holds a part of the experts and reads the others from the drive as they are chosen"
    return "more memory, or a smaller model: no type of this one fits"


def _make_fast(subject: Subject, memory: Memory, rates: Rates | None) -> str:
    found = subject.found
    if rates is None or not found.token_bytes:
        return ""
    if rates.small_pages and rates.slowed > NOTICED:
        drop = f"dd of={shlex.quote(str(found.path))} oflag=nocache conv=notrunc,fdatasync count=0"
        return (
            f"the system's cache holds {rates.small_pages:.0%} of the file in small pages;"
            f" read anew it decodes {rates.slowed:.2f} times as fast: `{drop}` drops it there, once no other program"
            " has it mapped"
        )
    n_layer = count(found.keys, "block_count")
    step = decode_seconds(found.token_bytes, n_layer, 0, rates)
    attention = memory.n_ctx * n_layer * rates.attention
    if memory.kv_type == "f16" and attention > step:
        return f"with {memory.n_ctx} tokens of context attention takes most of the time: --kv q8_0 halves what it reads"
    smaller = [r for r in subject.ladder if r.read is not None and r.read < 0.9 * found.token_bytes]
    if smaller:
        best = max(smaller, key=lambda r: r.read or 0)
        gain = (step + attention) / ((best.read or 0) / rates.bandwidth + attention)
        return (
            f"decoding waits for memory: {best.name} reads less and is {gain:.2f} times as fast, at a cost in quality"
        )
    return "decoding waits for memory: a machine whose memory is faster is faster by as much"


def describe(made: Forecast) -> dict[str, Any]:
    """All figures, for JSON."""
    subject, found, memory = made.subject, made.subject.found, made.memory
    return {
        "model": subject.label,
        "architecture": found.architecture,
        "engine": found.engine,
        "is_here": subject.is_here,
        "type": subject.type,
        "bytes_looked_at": subject.n_fetched,
        "bytes_there": subject.n_whole,
        "remarks": [*subject.remarks, *found.remarks],
        "steps": [
            {
                "step": s.name, "fetch_bytes": s.fetched, "disk_bytes": s.disk, "work_bytes": s.work,
                "folder": str(s.folder), "free_bytes": s.free,
            }
            for s in subject.steps
        ],
        "memory": {
            "context": memory.n_ctx, "kv": memory.kv_type, "weights": memory.weights, "cache": memory.cache,
            "scratch": memory.scratch, "program": memory.program, "total": memory.total, "free": memory.free,
            "fits": memory.fits, "band": MEMORY_BAND,
            "parts": {p.name: p.nbytes for p in found.parts},
            "cache_bytes_per_token": found.kv_bytes,
        },
        "longest_context": made.longest,
        "read_per_token": {
            "weights": found.token_bytes, "parts": {p.name: p.token_bytes for p in found.parts},
            "cache_at": {str(d): found.kv_bytes[memory.kv_type] * d for d in DEPTHS},
        },
        "machine": None if made.rates is None else {
            "threads": made.rates.threads, "isa": made.rates.isa, "bytes_per_second": round(made.rates.bandwidth),
            "multiply_adds_per_second": round(made.rates.products), "spread": round(made.rates.spread, 3),
            "seconds": round(made.rates.seconds, 2), "slowed_by_small_pages": round(made.rates.slowed, 3),
        },
        "why_no_speed": made.why_no_speed,
        "decode": [_speed(s) for s in made.decode],
        "prefill": _speed(made.prefill) if made.prefill else None,
        "drive": None if made.drive is None else {
            "ram": made.drive.ram, "least_ram": made.drive.least, "runs": made.drive.runs,
            "long_step": made.drive.long_step, "total": made.drive.total,
            "held": round(made.drive.held, 4), "read_per_token": made.drive.missed,
            "decode_at": [
                {"bytes_per_second": d, "tokens_per_second": None if r is None else round(r, 2)}
                for d, r in zip(DRIVES, made.drive.rates, strict=True)
            ],
        },
        "ladder": [
            {"type": r.name, "bytes": r.nbytes, "bits": r.bits, "read_per_token": r.read,
             "memory": rung_memory(r, memory), "kld": r.kld, "kld_of": quality.MODEL if r.kld is not None else None,
             "fits": memory.free is None or rung_memory(r, memory) <= memory.free}
            for r in subject.ladder
        ],
        "advice": made.advice,
    }  # fmt: skip


def _speed(s: Speed) -> dict[str, float | int]:
    return {"depth": s.depth, "rate": round(s.rate, 2), "low": round(s.low, 2), "high": round(s.high, 2)}
