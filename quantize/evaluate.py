"""evaluate.py: measures the finished file against the original, on text that calibration never saw.

The reference needs no second pass over the checkpoint: the held-back windows ride along while the layers are in memory
for calibration, apart from its statistics, and their last hidden states give the original's logits. The file's own
bytes then run in the engine, again a layer at a time, so that a file larger than memory is read once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType as Type
from numpy.typing import NDArray

import cext
from quantize.base.errors import QuantizeError
from quantize.encode.encoder import row_bytes
from quantize.job import SLAB_VALUES, Job
from quantize.measure import score
from quantize.measure.calibrate import Layer
from quantize.measure.score import Distance
from quantize.source.corpus import WINDOW
from quantize.source.tensors import read

F32 = NDArray[np.float32]

SKIPPED = WINDOW // score.SKIPPED_SHARE
REFERENCE = "evaluate/reference"  # in the journal
RECORD, STREAM = "evaluate/layer-{}", "evaluate/stream-{}"


class Held:
    """The held-back windows' hidden states between two layers, and the experts that their tokens chose so far."""

    def __init__(self, x: F32, n_used: int, experts: NDArray[np.int32] | None = None) -> None:
        self.x = x  # (n_windows * WINDOW, n_embd)
        self._experts = [] if experts is None else list(experts)
        self._n_used = n_used

    @classmethod
    def of(cls, arrays: Mapping[str, NDArray[Any]]) -> Held:
        """From ``arrays()``."""
        return cls(arrays["held"], arrays["held_experts"].shape[-1], arrays["held_experts"])

    @property
    def experts(self) -> NDArray[np.int32]:
        """(n_layer_routed, n_token, n_used) so far."""
        return np.array(self._experts, np.int32).reshape(len(self._experts), len(self.x), self._n_used)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What ``of`` takes."""
        return {"held": self.x, "held_experts": self.experts}

    def advance(self, layer: Layer, routed: bool) -> None:
        """Run every window through a layer, or part of one, replacing x. routed: experts are chosen in it."""
        chosen = []
        for start in range(0, len(self.x), WINDOW):
            window = self.x[start : start + WINDOW]
            out, tapped = layer.forward(window, 1, ("experts",) if routed else ())
            window[...] = out
            chosen += [tapped["experts"]] if routed else []
        if chosen:
            self._experts.append(np.concatenate(chosen))


def evaluate(job: Job, path: Path) -> Distance:
    """Compare the GGUF at path with the original, by the reference that the write stage left in the journal."""
    assert job.plan.corpus is not None
    windows = job.plan.corpus.held
    job.meter.begin("evaluate")
    reference = job.journal.get_arrays(REFERENCE)
    assert reference is not None, "the write stage records it before its last step"
    original = Held.of(reference)
    run = _run_layers(job, path)
    scores = []
    for i, window in enumerate(windows):
        rows = slice(i * WINDOW + SKIPPED, (i + 1) * WINDOW - 1)
        logits = _logits(job, run.x[rows], lambda role: _encoded_slabs(job, path, role))
        theirs = _logits(job, original.x[rows], lambda role: job.slabs(job.plan.outside[role]))
        if not np.isfinite(logits).all():
            raise QuantizeError("the finished file computes values that are not finite", "please report the model")
        chosen, mine = original.experts[:, rows], run.experts[:, rows]
        n_alike = sum(score.alike(a, b) for a, b in zip(mine, chosen, strict=True))
        scores.append(score.score(logits, theirs, window[SKIPPED + 1 :], chosen.size, n_alike))
    return score.summary(scores)


def _run_layers(job: Job, path: Path) -> Held:
    """The held-back windows through the file's layers, from where an earlier run got."""
    arch, journal = job.plan.arch, job.journal
    records = [il for il in range(arch.n_layer) if journal.get(RECORD.format(il)) is not None]
    first = len(records)
    if first == 0:
        run = Held(_embed(job, path), arch.n_expert_used)
    else:
        run = Held.of(journal.get_arrays(STREAM.format(first - 1)) or {})
    for il in range(first, arch.n_layer):
        job.meter.tell("evaluate", il, il / arch.n_layer, 1 / arch.n_layer)
        with cext.Gguf(path) as file:
            types = {tensor.name: tensor for tensor in file.tensors}
            tensors = {
                t.name: cext.Encoded(types[t.name].type, types[t.name].shape, file.raw(t.name))
                for t in job.plan.layers[il]
            }
            with cext.Layer(job.plan.keys, il, tensors, job.plan.options.threads) as layer:
                run.advance(layer, not arch.is_dense(il))
        journal.put_arrays(STREAM.format(il), run.arrays())
        journal.put(RECORD.format(il), {})
        journal.drop(STREAM.format(il - 1))
    return run


def _rows(job: Job, path: Path, role: str, rows: slice | NDArray[np.int32]) -> F32:
    """Rows of a matrix outside the layers, or the whole of a norm, as the file has them."""
    tensor = job.plan.outside[role]
    with cext.Gguf(path) as file:
        type_ = Type(next(t.type for t in file.tensors if t.name == tensor.name))
        raw = file.raw(tensor.name).reshape(-1, row_bytes(type_, tensor.shape[-1]))
        return job.encoder.decode(raw[rows], type_, tensor.shape[-1])


def _embed(job: Job, path: Path) -> F32:
    assert job.plan.corpus is not None
    return _rows(job, path, "token_embd", job.plan.corpus.held.reshape(-1))


def _encoded_slabs(job: Job, path: Path, role: str) -> Iterator[tuple[int, F32]]:
    """As ``job.slabs``, of the file."""
    n_rows, n = job.plan.outside[role].shape
    step = max(1, SLAB_VALUES // n)
    for start in range(0, n_rows, step):
        yield start, _rows(job, path, role, slice(start, start + step))


def _logits(job: Job, x: F32, slabs: Callable[[str], Iterable[tuple[int, F32]]]) -> F32:
    """(n, n_vocab) from the last hidden states (n, n_embd): norm and head, the head in slabs.

    The final norm is the original's: it stays in float32 in every file.
    """
    plan = job.plan
    norm = read(plan.arch, plan.store, plan.outside["output_norm"])
    scale = 1.0 / np.sqrt(np.square(x).mean(-1, dtype=np.float64, keepdims=True) + plan.arch.rms_eps)
    normed = (x * scale * norm).astype(np.float32)
    logits = np.empty((len(x), plan.arch.n_vocab), np.float32)
    for start, rows in slabs("output" if "output" in plan.outside else "token_embd"):
        logits[:, start : start + len(rows)] = normed @ rows.T
    return logits
