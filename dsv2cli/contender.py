"""contender.py: one engine in a process of its own, measured on request. Run by benchmark.py; see there.

Reads a line of JSON, runs it, writes a line of JSON. Tokens are drawn at random: every expert gets its share.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

SEED = 20240507
BATCH = 512  # tokens that llama.cpp computes at once, as many as ours does
Ids = NDArray[np.int32]


class Engine(Protocol):
    """What is measured."""

    threads: int
    isa: str
    n_vocab: int

    @property
    def position(self) -> int:
        """Tokens the context holds."""

    def select(self, variant: str) -> None: ...
    def eval(self, ids: Ids) -> None: ...
    def rewind(self, position: int) -> None: ...


class Ours:
    """dsv2's engine."""

    def __init__(self, model: Path, n_ctx: int, threads: int) -> None:
        from cext import Model

        self._model = Model(model, threads or None)
        self._session = self._model.session(n_ctx)
        self.threads, self.isa = self._model.threads, self._model.isa
        self.n_vocab = self._model.hparams["n_vocab"]

    @property
    def position(self) -> int:
        return self._session.n_past

    def select(self, variant: str) -> None:
        """There is nothing to select."""

    def eval(self, ids: Ids) -> None:
        self._session.eval(ids)

    def rewind(self, position: int) -> None:
        self._session.rewind(position)


class LlamaCpp:
    """llama.cpp through llama-cpp-python: mapped file, repacked weights, f16 cache; flash attention on or off."""

    def __init__(self, model: Path, n_ctx: int, threads: int) -> None:
        import llama_cpp

        self._lib = llama_cpp
        self._discard = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._discard, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(str(model).encode(), params)
        if not self._model:
            raise RuntimeError("llama.cpp cannot load the model")
        self.threads, self.isa = threads, "its own"
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._n_ctx = n_ctx
        self._contexts: dict[str, Any] = {}  # by setting: each keeps its own context filled
        self._positions: dict[str, int] = {}
        self.select("fa=0")

    @property
    def position(self) -> int:
        return self._positions[self._variant]

    def select(self, variant: str) -> None:
        if variant not in self._contexts:
            params = self._lib.llama_context_default_params()
            params.n_ctx, params.n_batch, params.n_ubatch = self._n_ctx, BATCH, BATCH
            params.n_threads = params.n_threads_batch = self.threads
            params.flash_attn_type = int(variant == "fa=1")
            params.no_perf = True
            self._contexts[variant] = self._lib.llama_init_from_model(self._model, params)
            if not self._contexts[variant]:
                raise RuntimeError(f"llama.cpp has no room for a context of {self._n_ctx}")
            self._positions[variant] = 0
        self._variant = variant

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

    def rewind(self, position: int) -> None:
        memory = self._lib.llama_get_memory(self._contexts[self._variant])
        self._lib.llama_memory_seq_rm(memory, 0, position, -1)
        self._positions[self._variant] = position


def measure(engine: Engine, kind: str, n: int, depth: int, variant: str) -> float:
    """Seconds for one test. The context up to ``depth`` stays for the next test."""
    engine.select(variant)
    ids = np.random.default_rng(SEED).integers(0, engine.n_vocab, depth + n, np.int32)
    if engine.position > depth:
        engine.rewind(depth)
    if engine.position < depth:
        engine.eval(ids[engine.position : depth])
    begun = time.perf_counter()
    if kind == "prefill":
        engine.eval(ids[depth:])
    else:
        for i in range(n):
            engine.eval(ids[depth + i : depth + i + 1])
    seconds = time.perf_counter() - begun
    engine.rewind(depth)
    return seconds


def memory() -> dict[str, int]:
    """Resident bytes: the process's own, and pages of files."""
    fields = {"RssAnon": 0, "RssFile": 0}
    try:
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name in fields:
                fields[name] = int(value.split()[0]) * 1024
    except OSError:
        import resource

        fields["RssAnon"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"anonymous_bytes": fields["RssAnon"], "file_bytes": fields["RssFile"]}


def load(name: str, model: Path, n_ctx: int, threads: int) -> tuple[Engine, float]:
    """An engine and the seconds from opening the file to its first logits, imports not counted."""
    __import__("cext" if name == "dsv2" else "llama_cpp")
    begun = time.perf_counter()
    engine: Engine = Ours(model, n_ctx, threads) if name == "dsv2" else LlamaCpp(model, n_ctx, threads)
    engine.eval(np.zeros(1, np.int32))
    return engine, time.perf_counter() - begun


def serve(name: str, model: Path, n_ctx: int, threads: int) -> None:
    answers = sys.stdout
    sys.stdout = sys.stderr  # whatever a library prints is not an answer

    def answer(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    try:
        engine, seconds = load(name, model, n_ctx, threads)
        answer({"load_seconds": seconds, "threads": engine.threads, "isa": engine.isa})
        for line in sys.stdin:
            request = json.loads(line)
            if request["kind"] == "memory":
                answer(memory())
            else:
                answer({"seconds": measure(engine, **request)})
    except Exception as error:
        answer({"error": str(error), "hint": getattr(error, "hint", "")})


if __name__ == "__main__":
    serve(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
