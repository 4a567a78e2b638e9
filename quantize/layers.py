"""layers.py: the write stage. Each sublayer is loaded, calibrated, folded, encoded, written at its place, and dropped.

A step is the embeddings, a layer, or the head. After each, its bytes are synced, the hidden states that leave it and
what is to be reported of it go to the journal: a run that dies here goes on at the step that it died in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType as Type
from numpy.typing import NDArray

import cext
from cext import Sublayer
from quantize import recipe, report
from quantize.base import heap
from quantize.base.blas import side_by_side
from quantize.base.errors import QuantizeError
from quantize.effort import Effort
from quantize.encode.encoder import F16_MAX
from quantize.encode.feedback import Covariance
from quantize.encode.objective import Objective
from quantize.evaluate import REFERENCE, Held
from quantize.job import Job
from quantize.measure import loss
from quantize.measure.awq import FoldResult, Scales, Searcher
from quantize.measure.calibrate import FEW_TOKENS, Stream, SublayerStats
from quantize.measure.drift import FeedForward, expert_bytes
from quantize.measure.evidence import Bundle, Evidence, ReadPart, bundles
from quantize.measure.loss import SAMPLE_STEP, Loss, LossMeter, TensorLoss
from quantize.measure.objectives import Objectives
from quantize.measure.outputs import Outputs
from quantize.meter import Stage
from quantize.report import Coverage
from quantize.source.arch import Arch
from quantize.source.tensors import PartReader, Tensor, Weights, read
from quantize.survey import EMBEDDINGS, OUTPUTS
from quantize.write.writer import Writer

F32 = NDArray[np.float32]

RECORDS = "write"  # of this stage in the journal
RECORD = RECORDS + "/step-{}"
STREAM = RECORDS + "/stream-{}"
LANE_BYTES = 3 << 28  # that experts in the making may take together, beside the weights of all


@dataclass(frozen=True)
class Step:
    """What became of one step."""

    il: int  # -1: the embeddings; n_layer: the head
    folds: tuple[FoldResult, ...]
    coverage: Coverage | None
    losses: tuple[TensorLoss, ...]
    seconds: float  # of work on the file when the step was done, earlier runs included

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Step:
        """From the journal's record, which is asdict of this."""
        coverage = record["coverage"]
        return cls(
            record["il"],
            tuple(FoldResult(**fold) for fold in record["folds"]),
            None if coverage is None else Coverage(coverage["il"], tuple(coverage["counts"]), coverage["few"]),
            tuple(TensorLoss(**loss) for loss in record["losses"]),
            record["seconds"],
        )


@dataclass(frozen=True)
class Encoded:
    """A part of a tensor, encoded."""

    tensor: Tensor
    part: int
    data: NDArray[np.uint8]
    decoded: F32  # (n_row, n), as it will be read
    loss: Loss


def steps_done(job: Job) -> list[Step]:
    """The steps that earlier runs finished, in order from the embeddings."""
    if not job.journal.part.exists():
        job.journal.drop_all(RECORDS)
    steps: list[Step] = []
    while (record := job.journal.get(RECORD.format(len(steps) - 1))) is not None:
        steps.append(Step.of(record))
    return steps


def tensors_of(job: Job, il: int) -> tuple[Tensor, ...]:
    """The tensors that step il writes."""
    plan = job.plan
    if 0 <= il < plan.arch.n_layer:
        return plan.layers[il]
    roles = ("token_embd",) if il < 0 else ("output_norm", "output")
    return tuple(plan.outside[role] for role in roles if role in plan.outside)


class WriteStage:
    """Writes every tensor in its settled type. types: by tensor name."""

    def __init__(self, job: Job, types: Mapping[str, Type], writer: Writer, done: list[Step]) -> None:
        self.job, self.plan, self.arch = job, job.plan, job.plan.arch
        self.types, self.writer = types, writer
        self.steps = done
        self.stream: Stream | None = None
        self.held: Held | None = None
        self.earlier = done[-1].seconds if done else 0.0
        self._folds: list[FoldResult] = []
        self._coverage: Coverage | None = None
        self._losses: dict[str, LossMeter] = {}
        self._works = Effort(job.plan, types).write()
        self._effort = sum(work.all for work in self._works)
        self._work = 0  # which of them is under way,
        self._written = 0  # and bytes of it
        self._nbytes = {t.name: recipe.nbytes(t, types[t.name]) for t in self.plan.tensors}

    def run(self) -> list[Step]:
        """The steps that are left; returns all of them."""
        meter = self.job.meter
        meter.bytes_total = sum(self._nbytes.values())
        meter.bytes_written = self.writer.n_done
        last = len(self.steps) - 2  # steps are numbered from -1
        meter.begin("write", sum(work.all for work in self._works if work.il <= last) / self._effort)
        if last < self.arch.n_layer and (arrays := self.job.journal.get_arrays(STREAM.format(last))):
            self.stream = Stream(self.arch, arrays["x"], arrays.get("drifted")) if "x" in arrays else None
            self.held = Held.of(arrays) if "held" in arrays else None
        for il in range(last + 1, self.arch.n_layer + 1):
            self._step(il)
        return self.steps

    @property
    def seconds(self) -> float:
        """Of work on the file so far, earlier runs included."""
        return self.earlier + self.job.meter.seconds

    def _step(self, il: int) -> None:
        self._folds, self._coverage, self._losses = [], None, {}
        if il < 0:
            self._begin(il, None)
            self._embed(self.plan.outside["token_embd"])
        elif il < self.arch.n_layer:
            self._layer(il)
        else:
            self._begin(il, None)
            self._head()
        losses = tuple(meter.done() for meter in self._losses.values())
        step = Step(il, tuple(self._folds), self._coverage, losses, self.seconds)
        self.writer.sync()
        self._record(step)
        self.steps.append(step)

    def _record(self, step: Step) -> None:
        """What leaves the step first, then the step, then away with what entered it."""
        journal, arrays = self.job.journal, {}
        if self.stream is not None:
            arrays["x"] = self.stream.x
            if self.stream.drifted is not None:
                arrays["drifted"] = self.stream.drifted
        if self.held is not None:
            arrays |= self.held.arrays()
        if step.il == self.arch.n_layer:
            arrays.pop("x", None)
            arrays.pop("drifted", None)
        if arrays:
            journal.put_arrays(REFERENCE if step.il == self.arch.n_layer else STREAM.format(step.il), arrays)
        journal.put(RECORD.format(step.il), asdict(step))
        journal.drop(STREAM.format(step.il - 1))

    def _embed(self, tensor: Tensor) -> None:
        """Encode the embeddings, and start the streams with those of their tokens."""
        text, n = self.plan.corpus, self.arch.n_embd
        windows = text.windows if text and self.plan.calibrated else np.zeros((0, 0), np.int32)
        held = text.held if text and self.plan.evaluated else np.zeros((0, 0), np.int32)
        ids = np.concatenate([windows.reshape(-1), held.reshape(-1)])
        x = np.empty((len(ids), n), np.float32)
        drifted = np.empty((windows.size, n), np.float32) if self.plan.sequential else None
        channels = self._embedding_channels()
        for start, values in self.job.slabs(tensor):
            mine = (ids >= start) & (ids < start + len(values))
            x[mine] = values[ids[mine] - start]
            decoded = self._write(tensor, values, Objective(covariance=channels))
            if drifted is not None:
                mine = mine[: windows.size]
                drifted[mine] = decoded[ids[: windows.size][mine] - start]
        if windows.size:
            self.stream = Stream(self.arch, x[: windows.size], drifted)
        if held.size:
            self.held = Held(x[windows.size :].copy(), self.arch.n_expert_used)

    def _embedding_channels(self) -> Covariance | None:
        """The covariance of their channels' gradients: as the survey found it, else all alike."""
        if not self.plan.options.feedback:
            return None
        arrays = self.job.journal.get_arrays(EMBEDDINGS)
        return Covariance.even(self.arch.n_embd) if arrays is None else Covariance(tuple(arrays.values()))

    def _layer(self, il: int) -> None:
        """Its attention, then its feed-forward network: of one at a time the weights and sums are in memory."""
        written = self._sublayer(il, "attention")
        if self.stream is not None and self.stream.drifted is not None:
            attend(self.job, il, self.stream, written)
        written.clear()
        self._sublayer(il, "feed_forward")
        if self.stream is not None:
            self.stream.ffn_inputs = None

    def _sublayer(self, il: int, sublayer: Sublayer) -> dict[Tensor, list[F32]]:
        """Calibrate, fold, encode and write it; returns attention's tensors, as they will be read, if streams drift."""
        self._begin(il, sublayer)
        tensors = {t.role: t for t in self.plan.layers[il] if t.sublayer == sublayer}
        weights: Weights | None = None
        if self.stream is not None or self.held is not None:
            weights = self.job.load(il, sublayer, partial(self._tell, "calibrate", 0.0))
        read_part = weights or PartReader(self.arch, self.plan.store)
        stats = self._calibrate(il, sublayer, weights) if weights is not None else None
        heap.trim()
        evidence, scales, drift = None, Scales(), None
        if stats is not None:
            evidence = Evidence(self.arch, tensors, stats, read_part, self.plan.options.importance)
            if self.plan.options.awq:
                scales = self._search(il, evidence, read_part)
            if self.stream is not None and stats.exact is not None:
                drift = FeedForward(self.arch, tensors, self.stream, stats.exact, scales, read_part)
        outputs = Outputs(self.job.journal.get_arrays(OUTPUTS.format(il)) or {}, scales.rows)

        def folded(tensor: Tensor, part: int) -> F32:
            return scales.apply(tensor.role, part, read_part(tensor, part))

        objectives = Objectives(evidence, scales, drift, outputs)
        written: dict[Tensor, list[F32]] = {}
        for encoded in self._encode_parts(list(tensors.values()), folded, objectives):
            self._put(encoded)
            if sublayer == "attention" and self.plan.sequential:
                written.setdefault(encoded.tensor, []).append(encoded.decoded)
            if drift is not None:
                drift.add(encoded.tensor.role, encoded.part)
            if weights is not None:
                weights.release(encoded.tensor, encoded.part)
        return written

    def _encode_parts(self, tensors: Sequence[Tensor], folded: ReadPart, objectives: Objectives) -> Iterator[Encoded]:
        """In the order of bundles, experts side by side."""

        def encode(bundle: Bundle) -> list[Encoded]:
            made = []
            for tensor, part in bundle:
                objective = objectives.of(tensor, part)
                made.append(self._encode(tensor, part, objective.corrected(folded(tensor, part)), objective))
                objectives.wrote(tensor, part, made[-1].decoded)
            return made

        nbytes = sum(self._nbytes[t.name] for t in tensors)
        for some in bundles(tensors):
            for made in side_by_side(encode, some, n_lanes(self.arch, self.job.encoder.threads) if some[1:] else 1):
                for encoded in made:
                    self._tell("encode", self._written / nbytes)
                    yield encoded

    def _search(self, il: int, evidence: Evidence, read_part: ReadPart) -> Scales:
        types = {role: self.types[t.name] for role, t in evidence.tensors.items()}
        searcher = Searcher(evidence, types, read_part, self.job.encoder)
        scales, results = searcher.run(il, lambda f: self._tell("search", f))
        self._folds += results
        return scales

    def _calibrate(self, il: int, sublayer: Sublayer, weights: Weights) -> SublayerStats | None:
        """Run the streams through its original weights."""
        stats, routed = None, sublayer == "feed_forward" and not self.arch.is_dense(il)
        covariances, tell = self.plan.options.feedback, partial(self._tell, "calibrate")
        with self.job.engine(il, weights, sublayer) as engine:
            if self.stream is not None and sublayer == "attention":
                stats = self.stream.attention(engine, tell, covariances)
            elif self.stream is not None:
                stats = self.stream.feed_forward(engine, il, tell, covariances)
            if self.held is not None:
                self.held.advance(engine, routed)
        if stats is not None and stats.routed is not None:
            self._coverage = report.coverage_of(il, stats.routed.counts, FEW_TOKENS)
        return stats

    def _head(self) -> None:
        outside = self.plan.outside
        norm = read(self.arch, self.plan.store, outside["output_norm"])
        self._write(outside["output_norm"], norm, Objective())
        if "output" not in outside:
            return
        objective, options = Objective(), self.plan.options
        if self.stream is not None:
            inputs = self.stream.final_inputs(norm, options.feedback)
            weights = inputs.mean_square if options.importance else None
            objective = Objective(weights, inputs.covariance, inputs=inputs.sample[::SAMPLE_STEP])
        for _, values in self.job.slabs(outside["output"]):
            self._write(outside["output"], objective.corrected(values), objective)

    def _write(self, tensor: Tensor, values: F32, objective: Objective) -> F32:
        """Encode the next rows of a tensor outside the layers and put them after those before; returns them as they
        will be read.
        """
        encoded = self._encode(tensor, 0, values, objective)
        self._put(encoded)
        il = self._works[self._work].il
        self._tell("encode", self._written / sum(self._nbytes[t.name] for t in tensors_of(self.job, il)))
        return encoded.decoded

    def _encode(self, tensor: Tensor, part: int, values: F32, objective: Objective) -> Encoded:
        encoder, type_ = self.job.encoder, self.types[tensor.name]
        try:
            data = encoder.encode(values, type_, objective)
        except QuantizeError as error:
            raise QuantizeError(f"tensor `{tensor.name}`: {error}", error.hint) from error
        decoded = encoder.decode(data, type_, values.shape[-1])
        distance = loss.measure(tensor.name, type_, values, decoded, objective.inputs, objective.importance)
        return Encoded(tensor, part, data, decoded, distance)

    def _put(self, encoded: Encoded) -> None:
        """After what was put of its tensor before."""
        tensor = encoded.tensor
        self._losses.setdefault(tensor.name, LossMeter(tensor.name, self.types[tensor.name])).add(encoded.loss)
        self.writer.append(tensor.name, encoded.data)
        self.job.meter.wrote(encoded.data.nbytes, encoded.decoded.size)
        self._written += encoded.data.nbytes

    def _begin(self, il: int, sublayer: Sublayer | None) -> None:
        """Progress from here on is of this piece of work."""
        heap.trim()
        self._work = next(i for i, work in enumerate(self._works) if (work.il, work.sublayer) == (il, sublayer))
        self._written = 0

    def _tell(self, stage: Stage, fraction: float) -> None:
        """fraction: of this stage of the work."""
        work = self._works[self._work]
        layer = sum(other.all for other in self._works if other.il == work.il)
        done = sum(before.all for before in self._works[: self._work])
        if stage == "calibrate":
            done += fraction * work.calibrate
        elif stage == "search":
            done += work.calibrate + fraction * work.search
        else:
            done += work.calibrate + work.search + fraction * work.encode
        il = work.il if work.il < self.arch.n_layer else -1
        self.job.meter.tell(stage, il, done / self._effort, layer / self._effort)


def n_lanes(arch: Arch, threads: int) -> int:
    """Experts in the making at a time: those that LANE_BYTES hold."""
    return max(1, min(threads, LANE_BYTES // expert_bytes(arch)))


def attend(job: Job, il: int, stream: Stream, written: Mapping[Tensor, Sequence[F32]]) -> None:
    """The drifted states through layer il's attention as it stands in the file. written: its tensors' parts, as they
    will be read.
    """
    plan = job.plan
    weights: dict[str, NDArray[np.floating]] = {}
    for tensor, parts in written.items():
        whole = np.stack(parts).reshape(tensor.shape)
        fits = whole.ndim > 1 and np.abs(whole).max() < F16_MAX
        weights[tensor.name] = whole.astype(np.float16 if fits else np.float32, copy=False)
    norm = next(tensor for tensor in plan.layers[il] if tensor.role == "ffn_norm")
    weights[norm.name] = read(plan.arch, plan.store, norm)
    with cext.Layer(plan.keys, il, weights, plan.options.threads, "attention") as layer:
        stream.attend(layer)
