"""pipeline.py: checkpoint in, GGUF out, one layer in memory at a time. Read this first.

The stages: plan (headers and calibration text, no weights), allocate (every tensor's type, and with it the file's
whole layout), write (layer by layer, at fixed offsets), report. All that a stage makes goes to the journal, so that a
run that was killed goes on where it was.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from gguf.constants import GGMLQuantizationType as Type

from quantize import recipe, report
from quantize.calibrate import FEW_TOKENS
from quantize.checkpoint import Checkpoint
from quantize.encode import Encoder
from quantize.job import Job, Options, Plan, make_plan
from quantize.journal import Journal
from quantize.layers import Step, WriteStage, steps_done, tensors_of
from quantize.meter import Meter, OnProgress
from quantize.report import Report
from quantize.writer import Writer


def quantize(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    options: Options | None = None,
    progress: OnProgress | None = None,
    *,
    say: Callable[[str], None] = lambda line: None,
    restart: bool = False,
) -> Report:
    """Turn the checkpoint folder source into the GGUF file out.

    out appears only when it is complete. A run that is killed, stopped, or fails leaves its work in OUT.work, and the
    same call goes on with it; restart throws it away. progress is called often, say with lines for a person, both from
    this thread. Raises QuantizeError, of one of its kinds.
    """
    options, out = options or Options(), Path(out)
    with Checkpoint(source) as checkpoint, Encoder(options.threads) as encoder:
        plan = make_plan(checkpoint, options)
        meter = Meter(progress, ("write",), plan.arch.n_layer)
        meter.tell("read")
        with Journal(out, plan.fingerprint(), checkpoint, restart) as journal:
            if journal.changed:
                say(f"starting over: {'; '.join(journal.changed)}")
            return _run(Job(plan, journal, encoder, meter, say), out)


def _run(job: Job, out: Path) -> Report:
    types = _allocate(job.plan)
    done = steps_done(job)
    if done:
        job.say(_resume_line(job.plan, len(done) - 1))
    infos = [(t.name, t.shape, types[t.name]) for t in job.plan.tensors]
    names = [t.name for step in done for t in tensors_of(job, step.il)]
    with Writer(out, job.journal.part, _metadata(job.plan, ()), infos, names) as writer:
        steps = WriteStage(job, types, writer, done).run()
        job.meter.tell("finish")
        writer.finish(_metadata(job.plan, steps))
        writer.commit()
    made = _report(job, out, types, steps)
    job.journal.discard()
    return made


def _resume_line(plan: Plan, il: int) -> str:
    where = "the head" if il >= plan.arch.n_layer else f"layer {il + 1} of {plan.arch.n_layer}"
    return f"continuing at {where}"


def _allocate(plan: Plan) -> dict[str, Type]:
    """Every tensor's type, by its name: the same however often a run is cut short."""
    return {t.name: recipe.type_of(plan.recipe, plan.arch, t, plan.weighted) for t in plan.tensors}


def _metadata(plan: Plan, steps: list[Step] | tuple[()]) -> dict[str, object]:
    """Every key of the file. Its length never changes during a run: figures that come later are zeros at first."""
    keys: dict[str, object] = {
        **plan.keys,
        "general.type": "model",
        "general.name": _model_name(plan.checkpoint.path),
        "general.file_type": int(plan.recipe.file_type),
        "general.quantization_version": 2,
        **plan.tokenizer,
    }
    if plan.corpus is not None:
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
    return keys


def _report(job: Job, out: Path, types: Mapping[str, Type], steps: list[Step]) -> Report:
    plan = job.plan
    sizes = [(t, types[t.name], recipe.nbytes(t, types[t.name])) for t in plan.tensors]
    coverage = tuple(step.coverage for step in steps if step.coverage is not None)
    notes = report.coverage_notes(coverage, FEW_TOKENS)
    if plan.left_out and plan.arch.n_nextn:
        notes.insert(0, f"{plan.arch.n_nextn} multi-token prediction layer(s) left out: GGUF runs the model without")
    return Report(
        path=out,
        recipe=plan.recipe.name,
        nbytes=out.stat().st_size,
        source_nbytes=plan.checkpoint.nbytes,
        n_values=sum(t.size for t in plan.tensors),
        roles=report.role_sizes(sizes),
        folds=tuple(fold for step in steps for fold in step.folds),
        coverage=coverage,
        calibration_tokens=plan.corpus.n_tokens if plan.corpus else 0,
        calibration_sources=plan.corpus.sources if plan.corpus else (),
        calibration_sha256=plan.corpus.sha256 if plan.corpus else "",
        left_out=plan.left_out,
        notes=tuple(notes),
        seconds=sum(step.seconds for step in steps),
    )


def _model_name(folder: Path) -> str:
    """The folder's name; the repository's where the folder is a snapshot in Hugging Face's cache."""
    folder = folder.resolve()
    if folder.parent.name == "snapshots":
        return folder.parent.parent.name.split("--")[-1]
    return folder.name
