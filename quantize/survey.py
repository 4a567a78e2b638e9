"""survey.py: the stage before allocation. One forward and one backward pass over some calibration text, layer by layer.

Forward, the engine runs the survey's windows through each layer and its inputs are kept in the journal. At the head, a
token is sampled from the model's own distribution and its loss's gradient taken. Backward, each layer's weights are
read once more, its gradients go on to the layer before, and the costs of its tensors are recorded. A layer is in memory
only while it runs; a run that dies goes on at the layer that it died in.

Disk, in the work folder: (n_layer + 3) x (tokens, n_embd) in float32; 236B with 8,192 tokens: 10.6 GB, all of it gone
when the survey ends; covariances G of outputs (outputs.py) stay until the file is finished: V2-Lite 0.8 GB, 236B 12 GB.
Memory: backward.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType as Type
from numpy.typing import NDArray

from quantize.base import heap
from quantize.base.errors import QuantizeError
from quantize.effort import Effort
from quantize.encode.encoder import FED_BACK
from quantize.encode.feedback import Covariance
from quantize.job import Job
from quantize.measure.backward import Block
from quantize.measure.evidence import n_parts, prior_share
from quantize.measure.flips import Flips
from quantize.measure.gradients import Floats, norm, norm_backward
from quantize.measure.outputs import PRIOR_TOKENS, Outputs, OutputSums
from quantize.measure.sensitivity import FISHER, N_GRADIENTS, Cost, CostMeter, pick_experts, pick_rows
from quantize.source.corpus import WINDOW
from quantize.source.tensors import Form, PartReader, Tensor, read, split_kv_b

F32 = NDArray[np.float32]
Costs = dict[str, dict[Type, Cost]]  # by role in a layer, by tensor name in a survey

INPUTS, GRADIENTS, COSTS = "survey/inputs-{}", "survey/gradients-{}", "survey/costs-{}"
# Covariances G of outputs, which the write stage goes by: of a layer's matrices, and of the embeddings' channels.
OUTPUTS, EMBEDDINGS = "survey/outputs-{}", "survey/outputs-embeddings"
CHUNK_WINDOWS = 4  # of a forward call
CHUNK_TOKENS = 1024  # at the head, whose outputs are as wide as the vocabulary
SEED = 20240507  # of the sampled tokens and signs: any will do, but always the same


@dataclass(frozen=True)
class Survey:
    """What every tensor would cost in every type, and how much changed routing costs: see allocate.Item."""

    costs: Costs
    flips: float


class SurveyStage:
    """Surveys a job's model. types: what tensors may become."""

    def __init__(self, job: Job, types: Sequence[Type]) -> None:
        self.job, self.plan, self.arch, self.types = job, job.plan, job.plan.arch, types
        self.windows = self.plan.survey_windows
        effort = Effort(self.plan)
        self._forward_effort, self._back_effort = effort.survey_forward(), effort.survey_back()
        self._effort = sum(self._forward_effort) + sum(self._back_effort)

    def run(self) -> Survey:
        """All passes that are left."""
        n_layer, journal = self.arch.n_layer, self.job.journal
        done = self._done()
        self.job.meter.begin("survey", done)
        if 0 < done < 1:
            self.job.say(f"continuing the survey of what each type costs, {100 * done:.0f} % done")
        if journal.get(COSTS.format(n_layer)) is None:
            self._forward()
            self._head()
        for il in reversed(range(n_layer)):
            if journal.get(COSTS.format(il)) is None:
                self._layer(il)
        if journal.get(COSTS.format(-1)) is None:
            self._embeddings()
        return self._survey()

    def _forward(self) -> None:
        """The inputs of every layer, and of the head, into the journal."""
        journal, n_layer = self.job.journal, self.arch.n_layer
        start = next((il for il in range(n_layer, -1, -1) if journal.get_arrays(INPUTS.format(il))), -1)
        if start > 0:
            place = f"layer {start + 1} of {n_layer}" if start < n_layer else "the head"
            self.job.say(f"continuing the survey of what each type costs at {place}")
        if start < 0:
            ids = self.windows.reshape(-1)
            journal.put_arrays(INPUTS.format(0), {"x": self.job.rows(self.plan.outside["token_embd"], ids)})
            start = 0
        x = self._array(INPUTS.format(start))
        for il in range(start, n_layer):
            self._tell(il, sum(self._forward_effort[:il]), self._forward_effort[il])
            with self.job.engine(il, self.job.load(il)) as engine:
                for at in range(0, len(x), CHUNK_WINDOWS * WINDOW):
                    chunk = x[at : at + CHUNK_WINDOWS * WINDOW]
                    chunk[:] = engine.forward(chunk, len(chunk) // WINDOW)[0]
            journal.put_arrays(INPUTS.format(il + 1), {"x": x})

    def _head(self) -> None:
        """Sampled losses, their gradient at the last layer's output, and the head's costs."""
        n_layer = self.arch.n_layer
        x = self._array(INPUTS.format(n_layer))
        weight = read(self.arch, self.plan.store, self.plan.outside["output_norm"])
        head = _Head(self.job, norm(x, weight, self.arch.rms_eps).astype(np.float32))
        self._tell(-1, sum(self._forward_effort))
        gradients = np.zeros((N_GRADIENTS, *x.shape), np.float32)
        gradients[FISHER] = norm_backward(x, weight, self.arch.rms_eps, head.gradient())
        meter = self._meter({})
        head.measure(meter)
        self._record(n_layer, gradients, meter.costs, 0.0)

    def _layer(self, il: int) -> None:
        heap.trim()
        later = sum(self._back_effort[il + 2 :])  # steps are numbered from -1
        self._tell(il, sum(self._forward_effort) + later, self._back_effort[il + 1])
        by_role = {t.role: t for t in self.plan.layers[il]}
        meter = self._meter(by_role)
        flips = Flips(self.arch, np.random.default_rng([SEED, il]))
        block = Block(self.arch, il, _Weights(self.job, by_role), len(self.windows), flips, pick_experts)
        sums = OutputSums(self.arch) if self.plan.follows_outputs else None

        def visit(role: str, part: int, weights: Floats, inputs: Floats, gradients: Floats) -> None:
            meter.visit(role, part, weights, inputs, gradients)
            if sums is not None:
                sums.visit(role, part, gradients[FISHER])

        dy = self._array(GRADIENTS.format(il + 1))
        dx = block.backward(self._array(INPUTS.format(il)), dy, visit).astype(np.float32, copy=False)
        if not np.isfinite(dx).all():
            raise QuantizeError(f"layer {il}: the survey's gradients are not finite", "--plain-mix does without them")
        costs = meter.costs
        if sums is not None:
            arrays = sums.arrays(self.windows.size)
            self.job.journal.put_arrays(OUTPUTS.format(il), arrays)
            costs = _followed(costs, Outputs(arrays))
        self._record(il, dx, costs, flips.total)

    def _embeddings(self) -> None:
        """Rows of token_embd: the gradient meets each row's error as it is."""
        gradients, ids = self._array(GRADIENTS.format(0)), self.windows.reshape(-1)
        tensor = self.plan.outside["token_embd"]
        rows, place = np.unique(ids, return_inverse=True)
        squares = np.square(gradients).sum(-1, dtype=np.float64)
        shares = (squares / np.maximum(squares.sum(-1, keepdims=True), 1e-300)).sum(0)
        meter = self._meter({})
        picked, chance = pick_rows(
            np.bincount(place, shares).astype(np.float64), meter.n_rows(tensor.role, self.arch.n_embd)
        )
        values = self.job.rows(tensor, rows[picked])
        fitted = None
        if self.plan.follows_outputs:
            share = prior_share(self.arch.n_embd, len(ids), PRIOR_TOKENS)
            fitted = Covariance.of(gradients[FISHER]).diagonal_blend(share)
            self.job.journal.put_arrays(EMBEDDINGS, {str(i): block for i, block in enumerate(fitted.blocks)})
        for type_, error in meter.errors(values, None, fitted):
            twice = np.zeros(N_GRADIENTS)
            for i, row in enumerate(picked):
                met = gradients[:, place == row] @ error[i]  # (n_gradients, tokens of this row)
                twice += np.square(met).sum(-1, dtype=np.float64) / chance[i]
            meter.record(tensor.role, type_, twice)
        self._record(-1, None, meter.costs, 0.0)

    def _meter(self, by_role: dict[str, Tensor]) -> CostMeter:
        def parts(role: str) -> int:
            return n_parts(by_role[role]) if role in by_role else 1

        return CostMeter(
            self.job.encoder, self.windows.size, parts, self.types, feedback=self.job.plan.options.feedback
        )

    def _array(self, key: str) -> F32:
        arrays = self.job.journal.get_arrays(key)
        if arrays is None:
            raise QuantizeError(f"the work folder lacks its record `{key}`", "--restart starts over")
        return next(iter(arrays.values()))

    def _record(self, il: int, gradients: F32 | None, costs: dict[str, dict[Type, Cost]], flips: float) -> None:
        """Keep what a step found; what only it needed goes."""
        journal = self.job.journal
        if gradients is not None:
            journal.put_arrays(GRADIENTS.format(il), {"g": gradients})
        plain = {role: {t.name: [c.fisher, c.routing] for t, c in types.items()} for role, types in costs.items()}
        journal.put(COSTS.format(il), {"costs": plain, "flips": flips})
        journal.drop(INPUTS.format(il))
        journal.drop(GRADIENTS.format(il + 1))

    def _steps(self) -> Iterator[tuple[int, Any]]:
        for il in range(-1, self.arch.n_layer + 1):
            yield il, self.job.journal.get(COSTS.format(il))

    def _done(self) -> float:
        """The fraction that earlier runs did."""
        back = [effort for (_, record), effort in zip(self._steps(), self._back_effort, strict=True) if record]
        return (sum(self._forward_effort) + sum(back)) / self._effort if back else 0.0

    def _survey(self) -> Survey:
        """The records together. A tied head's costs are the embeddings' too."""
        names = {(t.il, t.role): t.name for t in self.plan.tensors}
        costs: Costs = {}
        flips = 0.0
        for il, record in self._steps():
            flips += record["flips"]
            for role, types in record["costs"].items():
                name = names[il if il < self.arch.n_layer else -1, role]
                mine = costs.setdefault(name, {})
                for type_, (fisher, routing) in types.items():
                    if Type[type_] not in self.types:  # of a run with a smaller budget
                        continue
                    before = mine.get(Type[type_], Cost(0.0, 0.0))
                    mine[Type[type_]] = Cost(before.fisher + fisher, before.routing + routing)
        return Survey(costs, flips)

    def _tell(self, il: int, done: float, layer: float = 0.0) -> None:
        self.job.meter.tell("survey", il, done / self._effort, layer / self._effort)


def _followed(costs: Costs, outputs: Outputs) -> Costs:
    """Costs of one layer, by role, where the encoder follows its outputs' covariances G."""
    found: Costs = {}
    for role, types in costs.items():
        share = outputs.share(role)
        found[role] = {t: Cost(c.fisher * share, c.routing * share) if t in FED_BACK else c for t, c in types.items()}
    return found


class _Weights:
    """A layer's weights for backward.Block, read as they are asked for; k_b and v_b whole, for their heads."""

    def __init__(self, job: Job, by_role: dict[str, Tensor]) -> None:
        self.plan, self.by_role = job.plan, by_role
        self.read_part = PartReader(job.plan.arch, job.plan.store)
        self.heads: dict[str, F32] = {}

    def __call__(self, role: str, part: int) -> F32:
        tensor = self.by_role[role]
        if tensor.form not in (Form.K_B, Form.V_B):
            return self.read_part(tensor, part)
        if not self.heads:
            kv_b = self.plan.store.read_f32(tensor.sources[0])
            for t in (t for t in self.by_role.values() if t.form in (Form.K_B, Form.V_B)):
                self.heads[t.role] = split_kv_b(self.plan.arch, kv_b, t.form).astype(np.float32, copy=False)
        head: F32 = self.heads[role][part]
        return head


class _Head:
    """The output matrix over normed states h (m, n_embd), some rows of it and some tokens at a time."""

    def __init__(self, job: Job, h: F32) -> None:
        self.job, self.h = job, h
        outside = job.plan.outside
        self.tensor = outside["output"] if "output" in outside else outside["token_embd"]
        self.log_total = np.full(len(h), -np.inf, np.float32)  # (m,) log of the sum of exp(logits)
        for _, rows in job.slabs(self.tensor):
            for part in self._parts():
                logits = h[part] @ rows.T
                most = np.maximum(logits.max(-1), self.log_total[part])
                total = np.exp(logits - most[:, None]).sum(-1) + np.exp(self.log_total[part] - most)
                self.log_total[part] = most + np.log(total)
        self.mass = np.zeros(self.tensor.shape[0])  # (n_vocab,) sum of p (1 - p) over tokens, times the row's square

    def _parts(self) -> Iterator[slice]:
        return (slice(at, at + CHUNK_TOKENS) for at in range(0, len(self.h), CHUNK_TOKENS))

    def gradient(self) -> F32:
        """Of -log p(a token sampled from p), at h: (p - its one) W. Sampled by where a uniform number falls in p."""
        uniform = np.random.default_rng(SEED).random(len(self.h))
        below = np.zeros(len(self.h))  # probability of the rows before
        out = np.zeros_like(self.h)
        for first, rows in self.job.slabs(self.tensor):
            last_slab = first + len(rows) == self.tensor.shape[0]
            for part in self._parts():
                p = self._probabilities(part, rows)
                self.mass[first : first + len(rows)] += (p * (1 - p)).sum(0, dtype=np.float64)
                out[part] += p @ rows
                here, before = p.sum(-1, dtype=np.float64), below[part].copy()
                below[part] += here
                falls = (uniform[part] >= before) & ((uniform[part] < below[part]) | last_slab)
                if falls.any():
                    reach = np.cumsum(p[falls], -1, dtype=np.float64) + before[falls, None]
                    label = np.minimum((reach <= uniform[part][falls, None]).sum(-1), len(rows) - 1)
                    out[part][falls] -= rows[label]
            self.mass[first : first + len(rows)] *= np.einsum("rn,rn->r", rows, rows, dtype=np.float64)
        return out

    def _probabilities(self, part: slice, rows: F32) -> F32:
        logits: F32 = self.h[part] @ rows.T
        logits -= self.log_total[part, None]
        return np.exp(logits, out=logits)

    def measure(self, meter: CostMeter) -> None:
        """The costs of a sample of the head's rows. The gradient's expected square is p (1 - p), unsampled."""
        rows, chance = pick_rows(self.mass, meter.n_rows(self.tensor.role, self.tensor.shape[1]))
        values = self.job.rows(self.tensor, rows)
        p = self._probabilities(slice(None), values)
        square = np.zeros((N_GRADIENTS, *p.shape), np.float32)
        square[FISHER] = p * (1 - p)
        meter.add(self.tensor.role, values, self.h, chance, lambda tokens: square[:, tokens])
