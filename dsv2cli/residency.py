"""Where a model's weights lie: all of them in the file's mapping, or within a budget of memory, the rest in the file.

A budget is chosen from what is free (control groups and other processes counted, swap not), of which caches, the
engine's own scratch and a margin for the system are kept out. The engine is asked what each takes: a model is opened
mapped, which reads next to nothing, and again within a budget where it does not fit.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dsv2cli import console, reading, usage
from dsv2cli.errors import CliError, UsageError
from dsv2cli.gpu import Layout, Wish, attends, find, lay_out
from dsv2cli.options import MAX_CONTEXT

if TYPE_CHECKING:
    from cext import DriveCounts, EngineError, Gguf, Gpu, Model, WeightNeeds
    from cext.model import Hparams, KvType
    from dsv2cli.usage import Usage

Weights = int | Literal["auto", "all"]  # bytes that they may take
DEFAULT_CONTEXT = 4096
USUAL_STEP = 512  # tokens of a prompt's piece
MARGIN_SHARE, LEAST_MARGIN = 16, 256 << 20  # of what is free one part in so many, and at least so much of much
MEASURED, MEASURED_SECONDS = 128 << 20, 0.15  # of a drive: a shorter file tells nothing of it


@dataclass(frozen=True)
class Beside:
    """What is to have memory beside a model's weights. n_ctx: as ``context``; n_seq: sequences with caches of it;
    caches: what those of all may take at least; n_step: tokens of the longest step; rows: of logits that are held;
    share: of what is free, this model's part."""

    n_ctx: int | None = None
    kv: KvType = "f16"
    n_seq: int = 1
    caches: int = 0
    n_step: int = USUAL_STEP
    rows: int = 0
    share: float = 1.0

    def nbytes(self, model: Model) -> int:
        """All of it, full."""
        step = model.step_bytes(max(1, min(self.n_step, self._context(model))))
        return self.cache_bytes(model) + step + 4 * self.rows * model.hparams["n_vocab"]

    def cache_bytes(self, model: Model) -> int:
        """Of the caches."""
        return max(self.n_seq * model.session(self._context(model), self.kv).kv_bytes, self.caches)

    def _context(self, model: Model) -> int:
        return context(model.hparams["n_ctx_train"], self.n_ctx)


@dataclass(frozen=True)
class Plan:
    """What stays in memory of a model's weights. ram: the budget, None where all are mapped; beside: bytes of caches
    and steps; free: bytes, None where the system does not tell. usage: what is known of how experts were used."""

    needs: WeightNeeds
    shape: Hparams
    beside: int
    free: int | None
    ram: int | None
    usage: Usage | None = field(default=None, compare=False)
    is_asked: bool = False  # the budget is what somebody asked for

    @property
    def knows(self) -> bool:
        """Whether it is known which experts are used most."""
        return self.usage is not None and bool(self.usage.counts.any())

    def held(self, ram: int) -> float:
        """The share of the routed experts that a budget has room for."""
        if ram >= self.needs.all or not self.needs.slots:
            return 1.0
        return min(1.0, max(0.0, (ram - self.needs.shared) / self.needs.slots))

    def hits(self, ram: int) -> float:
        """How many of the experts that a token needs a budget can have in memory, if those stay that are used most; by
        the usage before, or as if all were used alike."""
        import numpy as np

        held = self.held(ram)
        if not self.knows:
            return held
        assert self.usage is not None
        counts = self.usage.counts[self.shape["n_layer_dense"] :].astype(float)
        rows = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        best = np.sort(rows.reshape(-1))[::-1]
        return float(min(1.0, best[: int(held * best.size)].sum() / max(rows.sum(), 1e-9)))

    def token_bytes(self, ram: int) -> float:
        """Bytes of the file that a decoded token then reads, at least."""
        chosen = self.shape["n_expert_used"] / max(self.shape["n_expert"], 1)
        return (1 - self.hits(ram)) * chosen * self.needs.experts

    def budgets(self) -> list[int]:
        """Some that hold ever more: the least, then quarters of the experts, at last all."""
        needs = self.needs
        quarters = [needs.shared + needs.slots * n // 4 for n in range(1, 4)]
        return [needs.least, *(ram for ram in quarters if needs.least < ram < needs.all), needs.all]

    def sentence(self, rate: float | None) -> str:
        """What lies where within the budget, and what to expect; rate: of the drive, bytes a second."""
        ram, size = self.ram or self.needs.all, console.format_bytes
        used = "used as they were so far" if self.knows else "all used alike"
        free = "" if self.free is None else f", {size(self.free)} being free"
        held, hits, read = self.held(ram), self.hits(ram), self.token_bytes(ram)
        limit = f", which the drive's {size(rate)}/s give {rate / read:.1f} times a second" if rate and read else ""
        return (
            f"memory holds {size(ram)} of {size(self.needs.all)} of weights{free}: {size(self.needs.shared)} that every"
            f" token needs and {100 * held:.0f} % of the experts; {used}, {100 * hits:.0f} % of a token's are there and"
            f" {size(read)} are read from the file{limit}"
        )


def context(trained: int, n_ctx: int | None) -> int:
    """Tokens of context where n_ctx are asked for; 0: what the model was trained for; None: 4096, or that if less."""
    if n_ctx is None:
        return min(DEFAULT_CONTEXT, trained or DEFAULT_CONTEXT)
    return n_ctx or min(trained or DEFAULT_CONTEXT, MAX_CONTEXT)


def margin(free: int) -> int:
    """What is left to the system, of so much that is free."""
    return max(free // MARGIN_SHARE, min(LEAST_MARGIN, free // 4))


def choose(needs: WeightNeeds, left: int, kept: int) -> int | None:
    """The budget in ``left`` bytes, of which ``kept`` are the margin, and go where the least needs them; None where the
    mapping serves as well: all fits, or not even the least does."""
    touched = min(needs.all, needs.shared + needs.experts)  # a draft head's pages are not
    if left - kept >= touched or left < needs.least:
        return None
    return max(needs.least, left - kept - needs.long_step)  # steps are longer then


def plan(model: Model, ram: Weights, beside: Beside) -> Plan:
    """For a model that is open, mapped. UsageError for a budget below the least."""
    from cext.system import free_bytes

    needs, taken, free = model.needs(), beside.nbytes(model), free_bytes(swap=False)
    if free is not None:
        free = int(free * beside.share)
    if ram == "auto":
        chosen = None if free is None else choose(needs, free - taken, margin(free))
    else:
        chosen = None if ram == "all" or ram >= needs.all else ram
        if chosen is not None and chosen < needs.least:
            raise UsageError(
                f"--ram {console.format_bytes(chosen)} does not hold `{model.path}`: it takes at least"
                f" {spelt(needs.least)}, of which {console.format_bytes(needs.shared)} are what every token needs",
                "more memory, or a file of fewer bits a weight; --ram all maps the file",
            )
    return Plan(needs, model.hparams, taken, free, chosen, is_asked=ram != "auto")


def spelt(nbytes: int) -> str:
    """A size that --ram takes as no less than these bytes: 1234567890 -> "1.24G"."""
    unit, size = ("G", 10**9) if nbytes >= 10**9 else ("M", 10**6)
    return f"{-(-nbytes * 100 // size) / 100:.2f}{unit}"


def strain(found: Plan, ram: Weights) -> str | None:
    """What is wrong where memory does not suffice: for a warning."""
    if found.free is None or ram == "all":
        return None
    size, left = console.format_bytes, found.free - found.beside
    if ram == "auto":
        touched = min(found.needs.all, found.needs.shared + found.needs.experts)
        if found.ram is not None or left - margin(found.free) >= touched:
            return None
        return (
            f"{size(found.needs.all)} of weights do not fit, nor the least of them that a budget takes,"
            f" {size(found.needs.least)}: {size(found.free)} are free, {size(found.beside)} for context and steps."
            " The file is mapped and read again and again"
        )
    if found.ram is None or found.ram <= left - found.needs.long_step:
        return None
    return (
        f"--ram {size(found.ram)} and {size(found.beside)} for context and steps are more than the {size(found.free)}"
        " that are free"
    )


def shared_out(paths: Sequence[Path], each: Sequence[Beside]) -> list[Beside]:
    """The same for models that are open together: what is free is shared by the sizes of their files."""
    from cext import EngineError, Gguf

    sizes = []
    for path in paths:
        try:
            with Gguf(path) as gguf:
                sizes.append(gguf.nbytes)
        except EngineError:  # who opens it says so
            sizes.append(1)
    return [replace(one, share=size / sum(sizes)) for one, size in zip(each, sizes, strict=True)]


def look(path: Path, beside: Beside) -> Plan | None:
    """What would be chosen for a file; None where the engine does not open it, or it has no routed experts."""
    from cext import EngineError, Model

    try:
        with Model(path) as model:
            found = plan(model, "auto", beside)
    except EngineError:
        return None
    return replace(found, usage=usage.known(path)) if found.needs.experts else None


def on_gpu(model: Model, wish: Wish, sought: Callable[[], Gpu], beside: Beside, found: Plan | None) -> Layout | None:
    """What of a model goes to a GPU; None where nothing does, with a line that says why, where that is worth one.

    found: the plan of the host's memory. Where that has a budget, experts are read from the file and stay on the
    processor; unless nobody asked for the budget, and what the device takes leaves all else room. CliError where the
    device is named and cannot be had."""
    from cext import EngineError, Gguf, UnsupportedError

    shape = model.hparams
    try:
        gpu = sought()
        if wish.which == "auto" and not attends(shape):
            raise UnsupportedError("this model's attention is not computed on one", f"--gpu {gpu.number} has the rest")
        if wish.which == "auto" and (slow := too_slow(gpu, model.threads)) is not None:
            not_used(slow)
            return None
        with Gguf(model.path) as gguf:
            caches = beside.cache_bytes(model)
            fill = partial(lay_out, gguf, shape, gpu, wish, cache_bytes=caches, share=beside.share)
            layout = fill()
            if found is not None and found.ram is not None:
                layout = fill(steady=True)  # whose pages are not touched again
                layout = layout if layout and is_enough(found, layout) else fill(with_experts=False)
    except EngineError as error:
        if wish.is_named:
            raise CliError(str(error), error.hint or "dsv2 doctor lists the devices") from error
        if wish.is_asked:
            not_used(error)
        return None
    if layout is None:
        problem = f"no part of the model fits on {gpu.name}, of which {console.format_bytes(gpu.free)} are free"
        if wish.is_named:
            raise CliError(problem, "--gpu off leaves it out")
        console.warn(console.printable(f"{problem}: the processor computes all of it"))
    return layout


def too_slow(gpu: Gpu, threads: int) -> EngineError | None:
    """What to say of a card that reads its memory no faster than so many threads of the processor read theirs."""
    from cext import UnsupportedError

    read = reading.measured(gpu, threads)
    if read is None or read.pays:
        return None
    rates = f"{read.card / 1e9:.1f} GB/s, the processor at {read.processor / 1e9:.1f}"
    return UnsupportedError(f"{gpu.name} reads its memory at {rates}", f"--gpu {gpu.number} takes it all the same")


def is_enough(found: Plan, layout: Layout) -> bool:
    """Whether memory has room for all that is not on a device, where it does not hold all: the file is mapped then."""
    if found.free is None or found.is_asked or not layout.experts:
        return False
    touched = min(found.needs.all, found.needs.shared + found.needs.experts)
    return found.free - found.beside - margin(found.free) >= touched - layout.weights


def not_used(error: EngineError) -> None:
    hint = f" ({error.hint})" if error.hint else ""
    console.warn(console.printable(f"no GPU is used: {error}{hint}"))


def open_placed(
    path: Path, threads: int | None, ram: Weights, beside: Beside, wish: Wish | None = None, *, warned: bool = False
) -> tuple[Model, Plan | None, Layout | None]:
    """The model, the plan where it has a budget, and what is on a GPU. warned: it has been told already that memory is
    scarce. What ``cext.Model`` and ``plan`` raise, and ``on_gpu``."""
    from cext import EngineError, Model

    wish = wish or Wish("off")
    layout: Layout | None = None
    with ThreadPoolExecutor(1) as pool:
        # Loaders and drivers take a tenth of a second, and a model's header as long.
        sought = None if wish.which == "off" else pool.submit(find, wish)
        model = Model(path, threads)
        try:
            found = None if ram == "all" else plan(model, ram, beside)
            if sought is not None:
                layout = on_gpu(model, wish, sought.result, beside, found)
            if found is not None and layout is not None and is_enough(found, layout):
                found = replace(found, ram=None)
            elif found is not None and not warned and (problem := strain(found, ram)) is not None:
                console.warn(console.printable(f"`{path}`: {problem}"))
                warned = True
        except BaseException:
            model.close()
            raise
    budget = found.ram if found is not None else None
    if budget is None and layout is None:
        return model, None, None
    model.close()  # before the other takes memory
    known = None if budget is None else usage.known(path)
    found = replace(found, usage=known) if found is not None and budget is not None else None
    counts = known.counts if known else None
    if layout is not None and layout.device.hot:  # not what was learnt: the same command is to give the same bits
        counts = usage.calibrated(path)
    if layout is None:
        return Model(path, threads, ram=budget, uses=counts), found, None
    try:
        placed = Model(path, threads, devices=[layout.device], placement=layout.placement, ram=budget, uses=counts)
    except EngineError as error:
        if wish.is_named:
            raise CliError(str(error), error.hint or "--gpu off leaves it out") from error
        not_used(error)
        return open_placed(path, threads, ram, beside, warned=warned)
    if found is not None:
        found = replace(found, needs=placed.needs())  # what lies on the device takes nothing here
    return placed, found, layout


def open_within(path: Path, threads: int | None, ram: Weights, beside: Beside) -> tuple[Model, Plan | None]:
    """The model opened on the processor, and the plan where it has a budget. What ``cext.Model`` and ``plan`` raise."""
    model, found, _ = open_placed(path, threads, ram, beside)
    return model, found


def drive_record(plan: Plan, decoding: DriveCounts, reading: DriveCounts) -> dict[str, Any]:
    """The budget and what the engine has counted, of decoding and of reading prompts."""
    record: dict[str, Any] = {"ram": plan.ram, "held_share": plan.held(plan.ram or plan.needs.all)}
    for name, counts in (("decoding", decoding), ("reading", reading)):
        derived = {
            "ready_share": counts.ready / counts.needed if counts.needed else None,  # read ahead, or kept
            "bytes_per_token": counts.bytes_read / counts.tokens if counts.tokens else None,
        }
        record[name] = asdict(counts) | derived
    return record


def pieces_of(gguf: Gguf) -> list[tuple[int, int]]:
    """Where in the first file of a model the pieces of its routed experts lie, in random order: (offset, bytes)."""
    found = []
    for tensor in gguf.tensors:
        n = tensor.shape[-1]
        if "_exps." in tensor.name and not tensor.part and n:
            found += [(tensor.offset + e * (tensor.nbytes // n), tensor.nbytes // n) for e in range(n)]
    random.Random(time.time_ns()).shuffle(found)  # other ones every time: a drive keeps what it has read
    return found


def measured_rate(path: Path) -> float | None:
    """The drive's bytes a second, of some pieces of experts read as the engine reads them, in a moment; None where it
    cannot be told."""
    from cext import EngineError, Gguf
    from cext.system import direct_read_rate

    try:
        with Gguf(path) as gguf:
            pieces = pieces_of(gguf)
    except EngineError:
        return None
    if sum(n for _, n in pieces) < MEASURED:
        return None
    return direct_read_rate(path, pieces, MEASURED_SECONDS, MEASURED)
