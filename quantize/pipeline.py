"""pipeline.py: checkpoint in, GGUF out, one layer in memory at a time. Read this first.

The stages: plan (headers and calibration text, no weights), allocate (every tensor's type, and with it the file's
whole layout), write (layer by layer, at fixed offsets), report. All that a stage makes goes to the journal, so that a
run that was killed goes on where it was.
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from gguf.constants import GGMLQuantizationType as Type

from cext import system
from quantize import recipe, report
from quantize.base import heap
from quantize.base.blas import employed
from quantize.base.errors import disk_error
from quantize.budget import Budget, budget_of, settle
from quantize.disk import Room, claim, room
from quantize.effort import Effort
from quantize.encode.encoder import Encoder
from quantize.evaluate import evaluate
from quantize.identity import identity
from quantize.job import Job, Options, Plan, make_plan
from quantize.layers import Step, WriteStage, steps_done, tensors_of
from quantize.measure.calibrate import FEW_TOKENS
from quantize.measure.score import Distance
from quantize.meter import Meter, OnProgress
from quantize.report import Report
from quantize.source.source import open_source
from quantize.source.tensors import left_out_notes
from quantize.write.journal import Journal, check_output, written_as
from quantize.write.writer import Writer, header_bytes


def quantize(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    options: Options | None = None,
    progress: OnProgress | None = None,
    *,
    say: Callable[[str], None] = lambda line: None,
    restart: bool = False,
    keep: bool = False,
) -> Report:
    """Turn the checkpoint folder source into the GGUF file out.

    out appears only when it is complete. A run that is killed, stopped, or fails leaves its work in OUT.work, and the
    same call goes on with it; restart throws it away. keep: what tells whose the file is stays in OUT.work, and the
    same call again returns at once, where another is refused. progress is called often, say with lines for a person,
    both from this thread. Raises QuantizeError, of one of its kinds.
    """
    options, out = options or Options(), written_as(out)
    heap.map_large()
    group = recipe.find(options.type).group
    with open_source(source) as opened, Encoder(options.threads, group) as encoder, employed(encoder):
        check_output(out, (*opened.files(), *options.calibration))
        plan = make_plan(opened, options)
        meter = Meter(progress, Effort(plan).phases(), plan.arch.n_layer, sum(t.size for t in plan.tensors))
        meter.tell("read")
        infos = [(t.name, t.shape, Type.F32) for t in plan.tensors]  # a header is as long whatever the types
        n_header = header_bytes(_metadata(plan, (), None), infos)
        budget = budget_of(plan, n_header)
        run = identity(plan, budget.allowed)
        with Journal(out, run, opened.store, restart) as journal:
            if (record := journal.finished()) is not None:
                return _leave(Report.of({**record, "path": out}), journal, keep)
            if journal.kept:
                say(f"the {' and the '.join(journal.kept)} of an earlier run is gone on from")
            made = _run(Job(plan, journal, encoder, meter, say), budget, room(plan, budget, n_header), out)
            return _leave(made, journal, keep)


def _run(job: Job, budget: Budget, wanted: Room, out: Path) -> Report:
    done = steps_done(job)
    if job.journal.is_empty:
        job.say(str(wanted))
    claim(job.journal, wanted)
    types = settle(job, budget)
    if done:
        job.say(_resume_line(job.plan, len(done) - 1))
    infos = [(t.name, t.shape, types[t.name]) for t in job.plan.tensors]
    names = [t.name for step in done for t in tensors_of(job, step.il)]
    with Writer(out, job.journal.part, _metadata(job.plan, (), None), infos, names) as writer:
        stage = WriteStage(job, types, writer, done)
        steps = stage.run()
        distance = evaluate(job, job.journal.part) if job.plan.evaluated else None
        job.meter.tell("finish")
        writer.finish(_metadata(job.plan, steps, distance))
        made = _report(job.plan, out, writer.nbytes, types, steps, distance, stage.seconds)
        job.journal.finish(made.record())
        writer.commit()
    return made


def _leave(made: Report, journal: Journal, keep: bool) -> Report:
    """The file stands under its name: put the report beside it, and the work away."""
    write_report(made, made.path)
    if keep:
        journal.settle()
    else:
        journal.discard()
    return made


def write_report(made: Report, out: Path) -> None:
    """Beside what was made. OutputError."""
    text = json.dumps(made.as_json(), indent=1, ensure_ascii=False, allow_nan=False)
    path = report_path(out)
    try:
        for left in path.parent.glob(f"{glob.escape(path.name)}.*.tmp"):  # by a run that was killed here
            left.unlink()
        with system.replaced(path, mode=0o666, prefix=f"{path.name}.", suffix=".tmp") as file:
            # A path in other bytes than UTF-8's: surrogates, which this spells as JSON does.
            file.write((text + "\n").encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise disk_error(path, error) from error


def report_path(out: Path) -> Path:
    """Where the report of a file stands."""
    return out.with_name(out.name + ".report.json")


def _resume_line(plan: Plan, il: int) -> str:
    """il: the step to go on with."""
    n_layer = plan.arch.n_layer
    if il < n_layer:
        return f"continuing at layer {il + 1} of {n_layer}"
    return "continuing at the head" if il == n_layer else "continuing: all layers are written"


def _metadata(plan: Plan, steps: Sequence[Step], distance: Distance | None) -> dict[str, object]:
    """Every key of the file. Its length never changes during a run: figures that come later are zeros at first."""
    errors = report.layer_errors((loss for step in steps for loss in step.losses), plan.arch.n_layer)
    keys: dict[str, object] = {
        **plan.keys,
        "general.type": "model",
        "general.name": plan.source.name,
        **plan.provenance,
        "general.file_type": int(plan.recipe.file_type),
        "general.quantization_version": 2,
        **plan.tokenizer,
        "dsv2.layer_error": np.array(errors, np.float32),
    }
    if plan.corpus is not None and plan.calibrated:
        usage = np.zeros((plan.arch.n_layer, plan.arch.n_expert), np.uint32)
        for step in steps:
            if step.coverage is not None:
                usage[step.il] = step.coverage.counts
        keys |= {
            "dsv2.calibration.sources": list(plan.corpus.sources),
            "dsv2.calibration.sha256": plan.corpus.sha256,
            "dsv2.calibration.tokens": plan.corpus.n_tokens,
            # Tokens that chose each expert, (block_count, expert_count): which ones to keep near.
            "dsv2.expert_usage": usage.reshape(-1),
        }
    if plan.evaluated:
        names = ("perplexity_ratio", "kld_mean", "kld_p99", "top1", *(("routing",) if _routes(plan) else ()))
        figures = {name: getattr(distance, name, None) or 0.0 for name in names}
        keys["dsv2.evaluation.tokens"] = distance.n_scored if distance is not None else 0
        keys |= {f"dsv2.evaluation.{name}": float(value) for name, value in figures.items()}
    return keys


def _routes(plan: Plan) -> bool:
    """Whether any layer chooses experts."""
    return not all(plan.arch.is_dense(il) for il in range(plan.arch.n_layer))


def _report(
    plan: Plan,
    out: Path,
    nbytes: int,
    types: Mapping[str, Type],
    steps: Sequence[Step],
    distance: Distance | None,
    seconds: float,
) -> Report:
    sizes = [(t, types[t.name], recipe.nbytes(t, types[t.name])) for t in plan.tensors]
    coverage = tuple(step.coverage for step in steps if step.coverage is not None)
    losses = tuple(loss for step in steps for loss in step.losses)
    text = plan.corpus if plan.calibrated else None
    return Report(
        path=out,
        recipe=plan.label,
        nbytes=nbytes,
        source_nbytes=plan.store.nbytes,
        n_values=sum(t.size for t in plan.tensors),
        roles=report.role_sizes(sizes),
        evaluation=distance,
        layer_errors=report.layer_errors(losses, plan.arch.n_layer),
        losses=losses,
        folds=tuple(fold for step in steps for fold in step.folds),
        coverage=coverage,
        calibration_tokens=text.n_tokens if text else 0,
        calibration_sources=text.sources if text else (),
        calibration_sha256=text.sha256 if text else "",
        left_out=plan.left_out,
        notes=tuple(_notes(plan, coverage)),
        options={**asdict(plan.options), "calibration": [str(path) for path in plan.options.calibration]},
        seconds=seconds,
    )


def _notes(plan: Plan, coverage: Sequence[report.Coverage]) -> list[str]:
    """What a person should know."""
    notes = [
        *left_out_notes(plan.arch, plan.left_out),
        *plan.notes,
        *report.coverage_notes(coverage, FEW_TOKENS),
    ]
    if plan.options.evaluate and not plan.evaluated:
        notes.append("the text is too short to hold some of it back: the file was not measured against the original")
    return notes
