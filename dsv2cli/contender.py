"""contender.py: one engine in a process of its own, measured on request. Run by benchmark.py; see there.

Reads a line of JSON, runs it, writes a line of JSON. Tokens are drawn at random: every expert gets its share. A context
is filled once and rewound after every measurement; a deeper one begins with it. A long one is a short one repeated:
attention takes as long over such rows as over any others.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from dsv2cli import memory, runtime
from dsv2cli.gpu import Wish
from dsv2cli.llama_state import lengthened
from dsv2cli.options import Kept, gpu_wish, memory_for_weights
from dsv2cli.residency import Beside, Weights, drive_record, measured_rate, open_placed
from dsv2cli.settling import settle

if TYPE_CHECKING:
    from cext.model import KvType

SEED = 20240507
PAUSE = 0.05  # seconds after which the workers of the engine that ran before sleep, and no longer spin
NOT_REPACKED = (
    "llama.cpp's AMX layout of weights can end its process: it is measured with the weights as the file has them"
)
BATCH = 512  # tokens computed at once where a context is filled; llama.cpp's own default in its batches
Ids = NDArray[np.int32]


class Engine(Protocol):
    """What is measured."""

    threads: int
    isa: str
    n_vocab: int
    notes: list[str]  # what a reader of the figures should know
    is_on_gpu: bool  # a part of it

    def select(self, variant: str, sequences: int) -> None:
        """Run with this setting, so many sequences side by side, from now on."""

    def fill(self, ids: Ids) -> None:
        """Make every context hold as many tokens as these, which they may be."""

    def eval(self, ids: Ids) -> None:
        """Append to the first sequence."""

    def settle(self) -> int:
        """Bytes of weights that are moved to huge pages of memory now, as after a first answer: settling.py."""

    def drive(self) -> dict[str, Any] | None:
        """What was read from the file for experts that memory does not hold; None where all are there, or it does not
        tell."""

    def step(self, ids: Ids) -> None:
        """Append one token to each sequence, together."""


class Ours:
    """dsv2's engine; a setting is a cache type, "kv=f16"."""

    def __init__(self, model: Path, n_ctx: int, threads: int, ram: Weights = "all", gpu: Wish | None = None) -> None:
        from cext import MAX_STEP, Session

        beside = Beside(n_ctx, n_step=min(MAX_STEP, n_ctx))
        self._model, self._plan, layout = open_placed(model, threads or None, ram, beside, gpu)
        runtime.tell(model, self._model.notes)
        self.notes = [self._plan.sentence(measured_rate(model))] if self._plan else []
        self.notes += [layout.sentence] if layout else []
        self.is_on_gpu = layout is not None
        self._n_ctx, self._is_mapped = n_ctx, self._plan is None and layout is None
        self._opened: dict[str, list[Session]] = {}
        self.threads, self.isa = self._model.threads, self._model.isa
        self.n_vocab = self._model.hparams["n_vocab"]
        self._sessions = [self._model.session(1)]  # for the first logits, before a setting is selected

    def select(self, variant: str, sequences: int) -> None:
        """CliError where the contexts do not fit in the memory that is free."""
        opened = self._opened.setdefault(variant, [])
        kv_type = cast("KvType", variant.removeprefix("kv="))
        new = [self._model.session(self._n_ctx, kv_type) for _ in range(len(opened), sequences)]
        if new:
            memory.refuse(new, min(self._model.together, self._n_ctx))
        opened += new
        self._sessions = opened[:sequences]

    def fill(self, ids: Ids) -> None:
        for session in self._sessions:
            session.rewind(min(session.n_past, len(ids)))
            if len(ids) - session.n_past > 2 * BATCH:
                session.eval(ids[session.n_past :][:BATCH])
                session.repeat(len(ids))
            elif session.n_past < len(ids):
                session.eval(ids[session.n_past :])

    def eval(self, ids: Ids) -> None:
        self._sessions[0].eval(ids)

    def settle(self) -> int:
        return settle(self._model) if self._is_mapped else 0

    def drive(self) -> dict[str, Any] | None:
        counts = self._model.drive_counts()
        return drive_record(self._plan, *counts) if counts and self._plan else None

    def step(self, ids: Ids) -> None:
        from cext import eval_batch

        if len(ids) == 1:
            self.eval(ids)
        else:
            eval_batch([(session, ids[i : i + 1]) for i, session in enumerate(self._sessions)])


class LlamaCpp:
    """llama.cpp through llama-cpp-python: mapped file, weights repacked where it can (``may_repack``). A setting is
    flash attention off or on and, where it is not f16, the cache's type: "fa=1,kv=q8_0"."""

    def __init__(self, model: Path, n_ctx: int, threads: int) -> None:
        from cext import cores
        from dsv2cli.engines.llamacpp import library

        self._lib = llama_cpp = library.library()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        params.use_extra_bufts = library.may_repack()
        self.notes = [] if params.use_extra_bufts else [NOT_REPACKED]
        self.is_on_gpu = False
        self._model, _ = library.load(str(model), params)
        self.threads, self.isa = threads or cores(), f"llama.cpp {llama_cpp.__version__}"
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._n_ctx = n_ctx
        self._contexts: dict[str, Any] = {}  # by setting: each keeps its own context filled
        self._positions: dict[str, int] = {}
        self.select("fa=0", 1)

    def select(self, variant: str, sequences: int) -> None:
        if sequences != 1:
            raise RuntimeError(f"llama.cpp is measured with one sequence, not {sequences}")
        if variant not in self._contexts:
            params = self._lib.llama_context_default_params()
            params.n_ctx, params.n_batch, params.n_ubatch = self._n_ctx, BATCH, BATCH
            params.n_threads = params.n_threads_batch = self.threads
            setting = dict(part.split("=") for part in variant.split(","))
            params.flash_attn_type = int(setting["fa"])
            params.type_k = params.type_v = getattr(self._lib, f"GGML_TYPE_{setting.get('kv', 'f16').upper()}")
            params.no_perf = True
            self._contexts[variant] = self._lib.llama_init_from_model(self._model, params)
            if not self._contexts[variant]:
                raise RuntimeError(f"llama.cpp makes no context of {self._n_ctx} tokens with {variant}")
            self._positions[variant] = 0
        self._variant = variant

    def fill(self, ids: Ids) -> None:
        self._rewind(min(self._positions[self._variant], len(ids)))
        if len(ids) - self._positions[self._variant] > 2 * BATCH:
            self.eval(ids[self._positions[self._variant] :][:BATCH])
            self._lengthen(len(ids))
        if self._positions[self._variant] < len(ids):
            self.eval(ids[self._positions[self._variant] :])

    def _lengthen(self, depth: int) -> None:
        """Fill the rest of the context with what it holds; where llama.cpp keeps it in another way, leave it."""
        context = self._contexts[self._variant]
        state = (ctypes.c_uint8 * self._lib.llama_state_seq_get_size(context, 0))()
        self._lib.llama_state_seq_get_data(context, state, len(state), 0)
        longer = lengthened(bytes(state), self._positions[self._variant], depth)
        if longer is not None:
            buffer = (ctypes.c_uint8 * len(longer)).from_buffer_copy(longer)
            if self._lib.llama_state_seq_set_data(context, buffer, len(longer), 0) != len(longer):
                raise RuntimeError(f"llama.cpp does not take a context lengthened to {depth}")
            self._positions[self._variant] = depth

    def settle(self) -> int:
        return 0

    def drive(self) -> None:
        return None

    def step(self, ids: Ids) -> None:
        self.eval(ids)

    def eval(self, ids: Ids) -> None:
        context = self._contexts[self._variant]
        for start in range(0, len(ids), BATCH):
            part = ids[start : start + BATCH]
            buffer = (self._lib.llama_token * len(part))(*part.tolist())
            status = self._lib.llama_decode(context, self._lib.llama_batch_get_one(buffer, len(part)))
            if status != 0:
                raise RuntimeError(f"llama_decode returned {status}")
            self._positions[self._variant] += len(part)
        self._lib.llama_synchronize(context)

    def _rewind(self, position: int) -> None:
        memory = self._lib.llama_get_memory(self._contexts[self._variant])
        self._lib.llama_memory_seq_rm(memory, 0, position, -1)
        self._positions[self._variant] = position


def measure(engine: Engine, kind: str, n: int, depth: int, sequences: int, variant: str, seed: int = SEED) -> float:
    """Seconds for one test: n tokens read at once, or n steps of one token for each sequence; one more wakes it."""
    rng = np.random.default_rng(seed)
    engine.select(variant, sequences)
    before = rng.integers(0, engine.n_vocab, depth, np.int32)
    engine.fill(before)
    ids = rng.integers(0, engine.n_vocab, (n, sequences), np.int32)
    time.sleep(PAUSE)
    engine.step(ids[0])
    engine.fill(before)
    begun = time.perf_counter()
    if kind == "prefill":
        engine.eval(np.ascontiguousarray(ids[:, 0]))
    else:
        for row in ids:
            engine.step(row)
    return time.perf_counter() - begun


def footprint() -> dict[str, Any]:
    """Resident bytes: the process's own, and pages of files."""
    fields: dict[str, int] = {"RssAnon": 0, "RssFile": 0}
    try:
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name in fields:
                fields[name] = int(value.split()[0]) * 1024
    except OSError:
        import resource

        fields["RssAnon"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"anonymous_bytes": fields["RssAnon"], "file_bytes": fields["RssFile"]}


def load(
    name: str, model: Path, n_ctx: int, threads: int, ram: Weights = "all", gpu: Wish | None = None
) -> tuple[Engine, float]:
    """An engine and the seconds from opening the file to its first logits, imports not counted."""
    __import__("cext" if name == "dsv2" else "dsv2cli.engines.llamacpp.library")
    begun = time.perf_counter()
    engine: Engine = Ours(model, n_ctx, threads, ram, gpu) if name == "dsv2" else LlamaCpp(model, n_ctx, threads)
    engine.eval(np.zeros(1, np.int32))
    return engine, time.perf_counter() - begun


def serve(name: str, model: Path, n_ctx: int, threads: int, ram: Weights, gpu: Wish) -> None:
    answers = sys.stdout
    sys.stdout = sys.stderr  # whatever a library prints is not an answer

    def answer(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    try:
        engine, seconds = load(name, model, n_ctx, threads, ram, gpu)
        told = {"threads": engine.threads, "isa": engine.isa, "notes": engine.notes, "is_on_gpu": engine.is_on_gpu}
        answer({"load_seconds": seconds} | told)
        for line in sys.stdin:
            request = json.loads(line)
            if request["kind"] == "memory":
                answer(footprint() | {"drive": engine.drive()})
            elif request["kind"] == "settle":
                answer({"bytes": engine.settle()})
            else:
                answer({"seconds": measure(engine, **request)})
    except Exception as error:
        answer({"error": str(error), "hint": getattr(error, "hint", "")})


if __name__ == "__main__":
    serve(
        sys.argv[1],
        Path(sys.argv[2]),
        int(sys.argv[3]),
        int(sys.argv[4]),
        memory_for_weights(sys.argv[5]),
        gpu_wish(Kept(sys.argv[6]), sys.argv[7] or None),  # the command that runs this one tells what is used
    )
