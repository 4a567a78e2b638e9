"""disk.py: what a run will take of the disk, known and claimed before it reads the first weight."""

from __future__ import annotations

from dataclasses import dataclass

from quantize.base.errors import OutputError
from quantize.budget import Budget
from quantize.job import Plan
from quantize.measure.outputs import BY_HEAD, BY_PART, ROLES
from quantize.measure.sensitivity import N_GRADIENTS
from quantize.source.tensors import Tensor
from quantize.write.journal import Journal

SMALL_RECORDS = 1 << 20  # bytes of JSON and of the heads of arrays, for each layer and the rest


@dataclass(frozen=True)
class Room:
    """Bytes, at most: of the file, and of the work folder beside it."""

    file: int
    work: int

    def __str__(self) -> str:
        return f"the file takes up to {self.file / 1e9:.2f} GB, its work folder up to {self.work / 1e9:.2f} GB more"


def room(plan: Plan, budget: Budget, header_bytes: int) -> Room:
    """What a plan takes. The survey's hidden states go before the write stage's come; what it found stays."""
    arch = plan.arch
    state = 4 * arch.n_embd  # of a token between two layers
    survey, held, tokens = 0, 0, 0
    if plan.allocates:  # the inputs of the layers so far, and two layers' gradients
        survey = (arch.n_layer + 2 * N_GRADIENTS) * plan.survey_tokens * state
    if plan.corpus is not None:
        tokens = plan.corpus.windows.size * state * (1 + plan.sequential) if plan.calibrated else 0
        held = plan.corpus.held.size * (state + 4 * arch.n_layer * arch.n_expert_used) if plan.evaluated else 0
    stay = sum(_output_bytes(plan, t) for t in plan.tensors) + state * arch.n_embd if plan.follows_outputs else 0
    small = SMALL_RECORDS * (arch.n_layer + 2)
    # What leaves a step is written before what entered it goes; the reference stays for the measuring.
    return Room(header_bytes + budget.nbytes, stay + max(survey, 2 * tokens + 3 * held) + small)


def _output_bytes(plan: Plan, tensor: Tensor) -> int:
    """Of the covariances of a tensor's outputs, in float16."""
    if tensor.role not in ROLES or tensor.il < 0:
        return 0
    n_row = tensor.shape[-2]
    if tensor.role in BY_HEAD:
        return 2 * n_row * n_row // plan.arch.n_head
    return 2 * n_row * n_row * (tensor.shape[0] if tensor.role in BY_PART else 1)


def claim(journal: Journal, wanted: Room) -> None:
    """Reserve it. OutputError, with both figures, where it is not there."""
    try:
        journal.reserve(wanted.file, wanted.work)
    except OutputError as error:
        raise OutputError(f"{error}: {wanted}", error.hint) from error
