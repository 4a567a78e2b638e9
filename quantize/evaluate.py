"""evaluate.py: measures the finished file against the original, on text that calibration never saw.

The reference needs no second pass over the checkpoint: the held-back windows ride along while the layers are in memory
for calibration, apart from its statistics, and their last hidden states give the original's logits. The file itself
runs in the engine as it will for whoever opens it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import cext
from quantize import score
from quantize.calibrate import Layer
from quantize.corpus import WINDOW
from quantize.errors import QuantizeError
from quantize.job import Job
from quantize.score import Distance, Score
from quantize.tensors import read

F32 = NDArray[np.float32]

SKIPPED = WINDOW // score.SKIPPED_SHARE
REFERENCE = "evaluate/reference"  # in the journal
RECORD = "evaluate/window-{}"


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

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What ``of`` takes: the hidden states, and the choices (n_layer_routed, n_token, n_used)."""
        shape = (len(self._experts), len(self.x), self._n_used)
        return {"held": self.x, "held_experts": np.array(self._experts, np.int32).reshape(shape)}

    def advance(self, layer: Layer, dense: bool) -> None:
        """Run every window through a layer, replacing x."""
        chosen = []
        for start in range(0, len(self.x), WINDOW):
            window = self.x[start : start + WINDOW]
            out, tapped = layer.forward(window, 1, () if dense else ("experts",))
            window[...] = out
            chosen += [] if dense else [tapped["experts"]]
        if chosen:
            self._experts.append(np.concatenate(chosen))


def evaluate(job: Job, path: Path) -> Distance:
    """Compare the file at path with the original, by the reference that the write stage left in the journal."""
    assert job.plan.corpus is not None
    windows = job.plan.corpus.held
    job.meter.begin("evaluate")
    reference = job.journal.get_arrays(REFERENCE)
    assert reference is not None, "the write stage records it before its last step"
    scores = []
    with cext.Model(path, job.plan.options.threads) as model:
        for i, window in enumerate(windows):
            job.meter.tell("evaluate", -1, i / len(windows))
            record = job.journal.get(RECORD.format(i))
            if record is None:
                rows = slice(i * WINDOW + SKIPPED, (i + 1) * WINDOW - 1)
                x, experts = reference["held"][rows], reference["held_experts"][:, rows]
                record = asdict(_score(job, model, window, x, experts))
                job.journal.put(RECORD.format(i), record)
            scores.append(Score(**record))
    return score.summary(scores)


def _score(job: Job, model: cext.Model, window: NDArray[np.int32], x: F32, experts: NDArray[np.int32]) -> Score:
    """One window. x, experts: the original's at the scored positions."""
    arch = job.plan.arch
    tap = cext.Tap({f"experts-{il}": None for il in range(arch.n_layer_dense, arch.n_layer)})
    scored = slice(SKIPPED, WINDOW - 1)
    logits = model.session(WINDOW, "f32").eval(window, "all", tap=tap)[scored]
    if not np.isfinite(logits).all():
        raise QuantizeError("the finished file computes values that are not finite", "please report the model")
    pairs = zip(tap.values(), experts, strict=True)
    n_alike = sum(score.alike(np.asarray(mine)[scored], theirs) for mine, theirs in pairs)
    return score.score(logits, _reference_logits(job, x), window[SKIPPED + 1 :], experts.size, n_alike)


def _reference_logits(job: Job, x: F32) -> F32:
    """The original's logits from its last hidden states (n, n_embd): norm and head, the head in slabs."""
    plan = job.plan
    norm = read(plan.arch, plan.checkpoint, plan.outside["output_norm"])
    scale = 1.0 / np.sqrt(np.square(x).mean(-1, dtype=np.float64, keepdims=True) + plan.arch.rms_eps)
    normed = (x * scale * norm).astype(np.float32)
    logits = np.empty((len(x), plan.arch.n_vocab), np.float32)
    for start, rows in job.slabs(plan.outside.get("output", plan.outside["token_embd"])):
        logits[:, start : start + len(rows)] = normed @ rows.T
    return logits
