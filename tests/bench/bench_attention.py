"""Attention alone: milliseconds a layer for decode and prefill by depth, cache type and instruction set, as CSV.

    python tests/bench/bench_attention.py [-o FILE] [--shape lite|236b] [--threads N] [--isa NAME]...
        [--kv TYPE]... [--cpu]

The model is one dense layer of random Q8_0 weights with DeepSeek-V2's attention and a narrow everything else (hidden
256, feed-forward 64), so that a step is its attention, the projections of q, kv and the heads included. A figure is the
least of several runs, in turn over cache types, because other programs only ever add to it; --cpu counts the process's
processor time instead of the clock's, for machines that are not idle (with one thread).
"""

import argparse
import csv
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import gguf
import numpy as np
from numpy.typing import NDArray
from support.tiny import Checkpoint, Spec, add_key, gguf_metadata, gguf_tensors, gguf_vocabulary

import cext

NARROW = {
    "n_layer": 1,
    "n_layer_dense": 1,
    "n_embd": 256,
    "kv_lora_rank": 512,
    "nope": 128,
    "rope": 64,
    "v": 128,
    "n_ff_dense": 64,
    "n_ctx": 1 << 17,
}
SHAPES = {"lite": Spec("lite", n_head=16, **NARROW), "236b": Spec("236b", n_head=128, **NARROW)}
DECODE_DEPTHS = (0, 1024, 4096, 16384)
PREFILL_DEPTHS = (0, 4096, 16384)
STEP = 512
COLUMNS = ("shape", "isa", "threads", "kv_type", "phase", "tokens", "depth", "ms_a_layer")


@dataclass(frozen=True)
class Case:
    phase: str
    tokens: int
    depth: int


CASES = (*(Case("decode", 1, d) for d in DECODE_DEPTHS), *(Case("prefill", STEP, d) for d in PREFILL_DEPTHS))


def write_model(path: Path, spec: Spec) -> Path:
    """The spec's model with its matrices in Q8_0."""
    writer = gguf.GGUFWriter(path, "deepseek2")
    for key, value in (gguf_metadata(spec) | gguf_vocabulary(spec.n_vocab)).items():
        add_key(writer, key, value)
    q8_0 = gguf.GGMLQuantizationType.Q8_0
    for name, value in gguf_tensors(Checkpoint(spec)).items():
        if value.ndim == 1:
            writer.add_tensor(name, value)
        else:
            writer.add_tensor(name, gguf.quants.quantize(value, q8_0), raw_dtype=q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def step_ms(session: cext.Session, ids: NDArray[np.int32], case: Case, clock: Callable[[], float]) -> float:
    """Milliseconds of the fastest of several runs of a case."""
    times = []
    for _ in range(3 if case.tokens > 1 else 10):
        session.rewind(case.depth)
        begin = clock()
        session.eval(ids[case.depth : case.depth + case.tokens], "all")  # or its only layer runs for the last alone
        times.append(clock() - begin)
    return 1000 * min(times)


def measure(
    model: cext.Model, kv_types: list[str], depth: int, clock: Callable[[], float]
) -> Iterator[tuple[str, Case, float]]:
    """Every case up to a depth, for each cache type in turn; sessions are filled once and rewound."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, model.hparams["n_vocab"], depth + STEP).astype(np.int32)
    sessions = {kv: model.session(len(ids), kv_type=kv) for kv in kv_types}
    for session in sessions.values():
        session.eval(ids)
    for case in sorted((c for c in CASES if c.depth <= depth), key=lambda c: -c.depth):
        rounds = [{kv: step_ms(session, ids, case, clock) for kv, session in sessions.items()} for _ in range(3)]
        for kv in kv_types:
            yield kv, case, min(times[kv] for times in rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--shape", action="append", choices=SHAPES)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--isa", action="append")
    parser.add_argument("--kv", action="append")
    parser.add_argument("--depth", type=int, default=max(DECODE_DEPTHS), help="deepest context to fill")
    parser.add_argument("--cpu", action="store_true", help="processor time instead of the clock's")
    options = parser.parse_args()
    out = options.output.open("w", encoding="utf-8", newline="") if options.output else sys.stdout
    table = csv.writer(out)
    table.writerow(COLUMNS)
    with tempfile.TemporaryDirectory() as folder:
        for shape in options.shape or SHAPES:
            path = write_model(Path(folder) / f"{shape}.gguf", SHAPES[shape])
            for isa in options.isa or [name for name in cext.isas() if name != "scalar"]:
                with cext.Model(path, threads=options.threads, isa=isa) as model:
                    clock = time.process_time if options.cpu else time.perf_counter
                    for kv, case, ms in measure(model, options.kv or ["f16", "q8_0"], options.depth, clock):
                        row = (shape, isa, model.threads, kv, case.phase, case.tokens, case.depth, f"{ms:.3f}")
                        table.writerow(row)
                        out.flush()


if __name__ == "__main__":
    main()
