"""A model opened for use: an engine's model and the file's tokenizer."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from dsv2cli import console, usage
from dsv2cli.engines.choice import LLAMA, OURS, Engine, Wanted, why_not_ours
from dsv2cli.errors import CliError, UsageError
from dsv2cli.gpu import Layout, Wish
from dsv2cli.options import refuse_budget, refuse_gpu
from dsv2cli.residency import Beside, Plan, Weights, context, drive_record, measured_rate, open_placed
from dsv2cli.settling import Settling

if TYPE_CHECKING:
    from cext import DriveCounts
    from cext import Model as Ours
    from cext.model import DeviceWork, HotExperts, KvType
    from cext.tokenizer import Tokenizer
    from dsv2cli.engines.llamacpp.rpc import Endpoint
    from dsv2cli.engines.protocol import Model, Session
    from dsv2cli.scheduler import Begin, Evaluate


@dataclass(frozen=True)
class Runtime:
    """An open model, its tokenizer, and how long opening took (seconds). evaluate: a step of several of its sessions;
    interrupt: ends the one under way, and begin: begins one that is computed in parts, both where the engine can. plan:
    where its weights lie, if not all in memory; layout: what of it is on a GPU; settling: see ``settle``."""

    path: Path
    model: Model
    tokenizer: Tokenizer
    load_seconds: float
    evaluate: Evaluate
    interrupt: Callable[[], None]
    engine: Engine
    plan: Plan | None = None
    begin: Begin | None = None
    layout: Layout | None = None
    settling: Settling | None = None

    @property
    def name(self) -> str:
        return self.model.hparams["name"] or self.path.stem

    @property
    def n_ctx_train(self) -> int:
        """Tokens of context that the model was trained for; 0 where its file does not say."""
        return self.model.hparams["n_ctx_train"]

    def drive_counts(self) -> tuple[DriveCounts, DriveCounts] | None:
        """Of decoding and of reading prompts, since it was opened; None where all weights are in memory."""
        from cext import Model as Ours

        return self.model.drive_counts() if isinstance(self.model, Ours) else None

    def drive(self) -> dict[str, Any] | None:
        """The same with the budget and what follows from the counts, for programs."""
        counts = self.drive_counts()
        if counts is None or self.plan is None:
            return None
        return drive_record(self.plan, *counts)

    def device_work(self) -> DeviceWork | None:
        """What its GPU did since it was opened; None without one."""
        from cext import Model as Ours

        return self.model.watched(1) if self.layout is not None and isinstance(self.model, Ours) else None

    def gpu(self) -> dict[str, Any] | None:
        """The same in short, for programs."""
        work = self.device_work()
        if work is None or self.layout is None:
            return None
        record: dict[str, Any] = {"placed": self.layout.sentence, "bytes": work.memory, "most_bytes": work.memory_most}
        return record | {"experts": hot_record(work.hot)}

    def settle(self) -> None:
        """After an answer: see settling.py, where the weights are mapped and nobody asked for that."""
        if self.settling is not None:
            self.settling.begin()

    def context(self, n_ctx: int | None) -> int:
        """``n_ctx``, or for 0 what the model was trained for; None: 4096, or that if less."""
        return context(self.n_ctx_train, n_ctx)

    def session(self, n_ctx: int | None, kv_type: KvType = "f16") -> Session:
        """A session of ``n_ctx`` tokens, or 0 or None: see ``context``."""
        trained, n_ctx = self.n_ctx_train, self.context(n_ctx)
        if trained and n_ctx > trained:
            console.warn(f"the model was trained for {trained} tokens of context; past them it may write nonsense")
        return self.model.session(n_ctx, kv_type)


def hot_record(hot: HotExperts) -> dict[str, Any] | None:
    """Of routed experts that come and go on a GPU; None where none do."""
    if not hot.slots:
        return None
    per_token = hot.nbytes / hot.tokens if hot.tokens else None
    return asdict(hot) | {"held_share": hot.rate, "bytes_per_token": per_token}


@dataclass(frozen=True)
class Wishes:
    """How a model is to be run. servers: RPC servers that hold its layers; gpu_layers: layers for a GPU; n_seq:
    sequences that are stepped together; all llama.cpp's. ram, beside: dsv2's own. told: whether the person who runs it
    is to see what was chosen, and how far loading has come."""

    engine: Wanted = "auto"
    servers: tuple[Endpoint, ...] = ()
    gpu_layers: int = 0
    n_seq: int = 1
    told: bool = True
    ram: Weights = "all"  # for weights
    beside: Beside = field(default_factory=Beside)
    said: str = "auto"  # the words that ram came from
    gpu: Wish = field(default_factory=Wish)


@contextmanager
def open_model(path: Path, threads: int | None, wishes: Wishes | None = None) -> Iterator[Runtime]:
    """Model and tokenizer of a GGUF, with the engine that runs it. EngineError, OSError, CliError."""
    wishes = wishes or Wishes()
    begun = time.perf_counter()
    wants_llama = wishes.servers or wishes.gpu_layers or wishes.engine == LLAMA
    opened = None if wants_llama else _open_ours(path, threads, wishes)
    model, tokenizer, evaluate, interrupt, engine, plan, layout = opened or _open_llama(path, threads, wishes)
    settles = engine == OURS and plan is None and layout is None and wishes.ram == "auto"
    settling = Settling(cast("Ours", model)) if settles else None
    with tokenizer:
        try:
            n_rows = model.hparams["n_vocab"]
            if tokenizer.n_vocab > n_rows:
                raise CliError(
                    f"`{path}`: the vocabulary has {tokenizer.n_vocab} tokens and the model {n_rows}",
                    "the file was made with another model's tokenizer",
                )
            seconds = time.perf_counter() - begun
            begin = _parts_of(model)
            yield Runtime(path, model, tokenizer, seconds, evaluate, interrupt, engine, plan, begin, layout, settling)
        finally:
            if settling is not None:
                settling.end()
            if plan is not None:
                usage.learn(plan.usage, cast("Ours", model))
            model.close()


def _parts_of(model: Model) -> Begin | None:
    from cext import Model as Ours
    from cext import Reading

    return Reading if isinstance(model, Ours) and model.max_step == model.together else None


Opened = tuple["Model", "Tokenizer", "Evaluate", Callable[[], None], Engine, Plan | None, Layout | None]


def _open_ours(path: Path, threads: int | None, wishes: Wishes) -> Opened | None:
    """With dsv2's own engine; None where it is left to llama.cpp."""
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(_load_tokenizer, path)
        from cext import EngineError, UnsupportedError, eval_batch
        from dsv2cli.scheduler import Budget

        try:
            model, plan, layout = open_placed(path, threads, wishes.ram, wishes.beside, wishes.gpu)
        except UnsupportedError as error:
            if loading.exception() is None:
                loading.result().close()
            if wishes.engine == OURS:
                raise
            if (reason := why_not_ours(path)) is None:
                hint = "--engine llama.cpp runs it as far as llama.cpp understands it"
                error.hint = f"{error.hint}; {hint}" if error.hint else hint
                raise
            refuse_budget(wishes.said)
            refuse_gpu(wishes.gpu.which)
            if wishes.told:
                console.note(f"({reason}: llama.cpp runs this file)", "dim")
            return None
        try:
            tokenizer = loading.result()
        except EngineError:
            model.close()
            raise
    tell(path, [*model.notes, *tokenizer.notes])
    if layout is not None and wishes.told:
        console.note(f"({console.printable(layout.sentence)})", "dim")
    if plan is not None and wishes.told:
        console.note(f"({plan.sentence(measured_rate(path))})", "dim")
    # A long step's pieces are the steps that are taken where all weights are in memory: answers are the same.
    evaluate: Evaluate = partial(eval_batch, piece=Budget.alone) if model.max_step > model.together else eval_batch
    return model, tokenizer, evaluate, model.stop, OURS, plan, layout


def _open_llama(path: Path, threads: int | None, wishes: Wishes) -> Opened:
    """With llama.cpp, which is imported here and nowhere before."""
    if wishes.engine == OURS:
        raise UsageError("--rpc and --gpu-layers are llama.cpp's", "leave out --engine dsv2")
    from dsv2cli.engines import llamacpp
    from dsv2cli.engines.llamacpp import rpc

    if warning := rpc.warning(wishes.servers):
        console.warn(warning)
    llamacpp.study(path)  # what it is, before a word on its vocabulary
    tokenizer = _load_tokenizer(path)
    shown = wishes.told and console.obeys(sys.stderr)

    def told(share: float) -> None:
        if shown:
            console.show_progress(f"loading: {share:.0%}" if share < 1 else "")

    try:
        model = llamacpp.Model(
            path, threads, servers=wishes.servers, gpu_layers=wishes.gpu_layers, n_seq=wishes.n_seq, told=told
        )
    except BaseException:
        tokenizer.close()
        raise
    finally:
        told(1)
    known = " ".join(tokenizer.notes)
    tell(path, [*tokenizer.notes, *(note for note in model.notes if note.partition(": ")[2] not in known)])
    return model, tokenizer, model.evaluate, model.interrupt, LLAMA, None, None


def tell(path: Path, notes: Iterable[str]) -> None:
    """What the engine and the tokenizer have to say about a file, once, on stderr."""
    for line in notes:
        console.warn(console.printable(f"`{path}`: {line}"))


def _load_tokenizer(path: Path) -> Tokenizer:
    from cext.tokenizer import Tokenizer

    return Tokenizer(path)
