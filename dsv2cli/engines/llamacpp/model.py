"""A GGUF that llama.cpp runs: its weights, contexts made of it, and a step of several sequences."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cext import MAX_STEP, CacheUsage, Gguf, cores
from cext.errors import ArgumentError, ContextFullError, EngineError, FormatError, OutOfMemoryError, UnsupportedError
from cext.system import free_bytes
from cext.vocabulary import kept_log
from dsv2cli import console
from dsv2cli.engines.cache import Cache, cache_of, count
from dsv2cli.engines.choice import MODEL_HINT, architecture_of, no_chat_model
from dsv2cli.engines.llamacpp import rpc
from dsv2cli.engines.llamacpp.library import Worker, library, load, may_repack, version
from dsv2cli.engines.llamacpp.session import Room, Session, step
from dsv2cli.engines.protocol import Shape

if TYPE_CHECKING:
    from cext.model import KvType

F32 = NDArray[np.float32]
STEP = 512  # tokens computed at once; llama.cpp's own default
NO_ROOM, ABORTED = 1, 2  # what llama_decode returns
ALL_LAYERS = 1 << 16
NUMBERS = ("f64", "i8", "i16", "i32", "i64")  # types that no product takes: llama.cpp would read past its tables
MATRIX = re.compile(r"token_embd\.weight|output\.weight|blk\.\d+\.(attn_\w+|ffn_(gate|up|down)\w*)\.weight")


class StoppedError(EngineError):
    """An evaluation was stopped on request; nothing of it stays."""


@dataclass(frozen=True)
class Facts:
    """What the header says that is wanted before llama.cpp opens the file."""

    architecture: str
    name: str
    nbytes: int  # of all tensors
    cache: Cache
    logits: int  # bytes of a row
    n_layer: int
    width: int
    n_head: int


def study(path: str | PathLike[str]) -> Facts:
    """FormatError and FileError as the engine's own; UnsupportedError for a file that writes no text."""
    with Gguf(path) as gguf:
        values = gguf.metadata
        if (what := no_chat_model(values, len(gguf.tensors))) is not None:
            raise UnsupportedError(f"`{fspath(path)}` is {what}", MODEL_HINT)
        if wrong := next((t for t in gguf.tensors if t.type_name in NUMBERS and MATRIX.fullmatch(t.name)), None):
            raise FormatError(f"`{fspath(path)}`: `{wrong.name}` is {wrong.type_name.upper()}, which no weights are")
        architecture = architecture_of(values)
        keys = {k.removeprefix(f"{architecture}."): values[k] for k in values if k.startswith(f"{architecture}.")}
        name, tokens = values.get("general.name"), values.get("tokenizer.ggml.tokens")
        return Facts(
            architecture,
            name if isinstance(name, str) else "",
            sum(t.nbytes for t in gguf.tensors),
            cache_of(keys),
            4 * len(tokens) if isinstance(tokens, list) else 0,
            count(keys, "block_count"),
            count(keys, "embedding_length"),
            count(keys, "attention.head_count"),
        )


class Model:
    """See protocol.Model. threads: None takes every core. n_seq: sequences that a context is made for, which share it.
    told: the share of the file that is loaded, as it comes. servers: RPC servers whose devices hold the layers.
    gpu_layers: layers that a GPU of this machine holds, where llama.cpp was built for one.

    Raises EngineError with llama.cpp's own reason, and what ``study`` raises.
    """

    max_step = MAX_STEP

    def __init__(
        self,
        path: str | PathLike[str],
        threads: int | None = None,
        *,
        servers: tuple[rpc.Endpoint, ...] = (),
        gpu_layers: int = 0,
        n_seq: int = 1,
        told: Callable[[float], None] = lambda share: None,
    ) -> None:
        self.path = fspath(path)
        self.threads = threads or cores()
        self.facts = study(path)
        self.nbytes = self.facts.nbytes
        self._n_seq = n_seq
        self.worker = Worker()
        self._rooms: list[Room] = []
        lib = library()
        self.isa = f"llama.cpp {version()}"
        if gpu_layers and not lib.llama_supports_gpu_offload():
            raise UnsupportedError(
                "the llama.cpp that is installed was built for the processor alone", "--gpu-layers 0"
            )
        notes: list[str] = []
        params = lib.llama_model_default_params()
        params.n_gpu_layers = ALL_LAYERS if servers else gpu_layers
        params.use_extra_bufts = self._may_repack(notes) and not servers
        if servers:
            self._devices = rpc.devices(servers)
            params.devices = ctypes.cast(self._devices, ctypes.c_void_p)

        @lib.llama_progress_callback  # type: ignore[untyped-decorator]
        def progress(share: float, data: Any) -> bool:
            told(share)
            return not self.worker.stopped

        params.progress_callback = progress

        try:
            self._model, warnings = self.worker.run(lambda: load(self.path, params))
        except BaseException:
            self.worker.close()
            raise
        self.notes = [*notes, *(f"llama.cpp says: {line}" for line in warnings)]
        self.is_recurrent = bool(lib.llama_model_is_recurrent(self._model) or lib.llama_model_is_hybrid(self._model))
        self.n_vocab = int(lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self._model)))
        self.hparams: Shape = {
            "arch": self.facts.architecture,
            "name": self.facts.name,
            "n_layer": self.facts.n_layer,
            "n_ctx_train": max(0, int(lib.llama_model_n_ctx_train(self._model))),
            "n_vocab": self.n_vocab,
            "n_embd": self.facts.width,
        }

    def _may_repack(self, notes: list[str]) -> bool:
        """Whether llama.cpp may copy the weights into a layout that is faster: where memory holds them twice."""
        if not may_repack():
            return False
        free = free_bytes()
        if free is not None and self.facts.nbytes > free:
            notes.append(
                f"{console.format_bytes(self.facts.nbytes)} of weights are more than the {console.format_bytes(free)}"
                " of memory that are free: they are read from the disk again for every token, which is slow"
            )
            return False
        return True

    def session(self, n_ctx: int = 4096, kv_type: KvType = "f16") -> Session:
        """A sequence of at most n_ctx tokens, in a context of that size that has one left, or a new one.

        A context's memory is taken at once: OutOfMemoryError where it is not there; EngineError with llama.cpp's own
        reason.
        """
        if n_ctx < 1:
            raise ArgumentError(f"a context of {n_ctx} tokens")
        fitting = (r for r in self._rooms if r.free and (r.n_ctx, r.kv_type) == (n_ctx, kv_type))
        return Session(self, next(fitting, None) or self._new_room(n_ctx, kv_type))

    def session_beside(self, other: Session) -> Session:
        """A sequence in the same context as another, where that has one left."""
        room = other.room
        return Session(self, room) if room.free else self.session(room.n_ctx, room.kv_type)

    def cache_usage(self) -> CacheUsage:
        """What its contexts take, which is the same full or empty; they have no blocks."""
        return CacheUsage(0, 0, sum(room.nbytes for room in self._rooms))

    def n_left(self) -> int:
        """Sequences of its contexts that no session has; before there is a context, those of one."""
        return sum(len(room.free) for room in self._rooms) if self._rooms else self._n_seq

    def excess(self, budget: int) -> int:
        """See protocol.Model. One context stays whatever it takes: sequences in it cost nothing more."""
        nbytes = self.cache_usage().nbytes
        while nbytes > budget and len(self._rooms) > 1 and (idle := next((r for r in self._rooms if r.is_idle), None)):
            self._release([idle])
            nbytes -= idle.nbytes
        least = min((room.nbytes for room in self._rooms), default=0)
        return max(0, nbytes - max(budget, least))

    def _release(self, rooms: list[Room]) -> None:
        """Give contexts back that no session is in."""
        for room in rooms:
            self._rooms.remove(room)
            self.worker.run(room.close)

    def _new_room(self, n_ctx: int, kv_type: KvType) -> Room:
        lib, n_seq = library(), self._n_seq
        self._release([room for room in self._rooms if room.is_idle])  # of other sizes, or it would be taken
        self._check_memory(n_ctx, kv_type, n_seq)
        params = lib.llama_context_default_params()
        params.n_ctx = n_ctx * n_seq
        params.n_batch, params.n_ubatch = min(MAX_STEP, n_ctx * n_seq), STEP
        params.n_seq_max, params.kv_unified, params.swa_full = n_seq, True, True
        params.n_threads = params.n_threads_batch = self.threads
        params.type_k = params.type_v = {
            "f16": lib.GGML_TYPE_F16,
            "q8_0": lib.GGML_TYPE_Q8_0,
            "f32": lib.GGML_TYPE_F32,
        }[kv_type]
        params.abort_callback, params.abort_callback_data = self.worker.abort_callback()
        params.no_perf = True
        if kv_type == "f32":  # exact: llama.cpp's flash attention rounds to halves
            params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED

        def make() -> tuple[Any, Any]:
            with kept_log() as log:
                return lib.llama_init_from_model(self._open(), params), log

        context, log = self.worker.run(make)
        if not context:
            raise EngineError(
                f"`{self.path}`: llama.cpp makes no context of {n_ctx} tokens in {kv_type}: {log.reason}",
                "a smaller -c may fit, or --kv f16",
            )
        room = Room(context, n_seq, n_ctx, kv_type, self.facts.cache.token_bytes(kv_type))
        self._rooms.append(room)
        return room

    def _check_memory(self, n_ctx: int, kv_type: KvType, n_seq: int) -> None:
        free, row = free_bytes(), self.facts.cache.token_bytes(kv_type)
        other = min(STEP, n_ctx) * (self.facts.logits + 64 * self.facts.width)
        if kv_type == "f32":  # without flash attention every score of a step is kept
            other += 4 * min(STEP, n_ctx) * self.facts.n_head * n_ctx * n_seq
        if free is None or row * n_ctx * n_seq + other <= free:
            return
        fits = int(max(0, free - other) / max(row, 1) / n_seq) // 256 * 256
        hints = [f"a context of {fits} fits" if fits else "a smaller context"]
        if (coded := self.facts.cache.token_bytes("q8_0") * n_ctx * n_seq) < row * n_ctx * n_seq:
            hints.append(f"--kv q8_0 takes {console.format_bytes(coded)}")
        together = f" for {n_seq} sequences" if n_seq > 1 else ""
        raise OutOfMemoryError(
            f"a context of {n_ctx} tokens{together} takes {console.format_bytes(row * n_ctx * n_seq)}, computing"
            f" {console.format_bytes(other)}, and {console.format_bytes(free)} of memory are free",
            "; ".join(hints),
        )

    def step_bytes(self, n_tok: int) -> int:
        """0: a context has the memory of its steps from the beginning."""
        return 0

    def evaluate(self, batch: Sequence[tuple[Session, Sequence[int]]], n_logits: Sequence[int]) -> F32:
        """Append to several sessions of this model in one step: see ``cext.eval_batch``. Nothing changes on failure.

        Sessions that share a context are computed together, others one after another. ValueError, ContextFullError;
        StoppedError after ``interrupt``.
        """
        self._open()
        parts: dict[int, list[tuple[int, Session, list[int], int]]] = {}
        for at, ((session, given), n) in enumerate(zip(batch, n_logits, strict=True)):
            ids = self._checked(session, given)
            if not 0 <= n <= len(ids):
                raise ValueError(f"the logits of {n} tokens, where {len(ids)} are evaluated")
            parts.setdefault(id(session.room), []).append((at, session, ids, n))
        if len({id(session) for session, _ in batch}) < len(batch) or not batch:
            raise ValueError("a step takes each session once, and at least one")
        try:
            rows = self.worker.run(lambda: self._steps(list(parts.values())))
        finally:
            for session, _ in batch:
                if session.n_cached > session.n_past:  # another room failed
                    session.n_cached, session.is_clean = session.n_past, False
        return np.concatenate([rows[at] for at in range(len(batch))])

    def _steps(self, rooms: list[list[tuple[int, Session, list[int], int]]]) -> dict[int, F32]:
        """A step of every room; the logits of each part by its place in the batch. In the worker."""
        found: dict[int, F32] = {}
        with kept_log() as log:
            for parts in rooms:

                def failed(status: int) -> EngineError:
                    if status == ABORTED:
                        return StoppedError("the evaluation was stopped")
                    if status == NO_ROOM:
                        return ContextFullError("llama.cpp has no room left in its context", "-c makes it larger")
                    return EngineError(f"`{self.path}`: llama.cpp cannot evaluate it: {log.reason} ({status})")

                rows = step(parts[0][1].room, [(s, ids, n) for _, s, ids, n in parts], self.n_vocab, failed)
                for at, _, _, n in parts:
                    found[at], rows = rows[:n], rows[n:]
        for parts in rooms:
            for _, session, ids, _ in parts:
                session.tokens += ids
        return found

    def _checked(self, session: Session, given: Sequence[int]) -> list[int]:
        ids = [int(token) for token in given]
        if session.model is not self:
            raise ArgumentError("the session is another model's")
        if not ids or min(ids) < 0 or max(ids) >= self.n_vocab:
            raise ValueError(f"token ids are to be 0 to {self.n_vocab - 1}, and at least one")
        if session.n_past + len(ids) > session.n_ctx:
            raise ContextFullError(
                f"{len(ids)} tokens do not fit: the context holds {session.n_ctx} and {session.n_past} are used",
                "open the session with a larger n_ctx, or rewind it",
            )
        return ids

    def interrupt(self) -> None:
        """End the evaluation under way. From any thread, or a signal's handler."""
        self.worker.interrupt()

    def _open(self) -> Any:
        if self._model is None:
            raise ArgumentError(f"`{self.path}`: the model was closed")
        return self._model

    def close(self) -> None:
        """Release contexts and weights, after the call that is under way."""
        if self._model is None:
            return

        def free() -> None:
            for room in self._rooms:
                room.close()
            library().llama_model_free(self._model)
            self._model = None

        self.worker.run(free)
        self.worker.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
