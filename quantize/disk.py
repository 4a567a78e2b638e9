"""disk.py: what a run will take of the disk, known and claimed before it reads the first weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quantize.base.errors import OutputError
from quantize.budget import Budget
from quantize.job import Plan
from quantize.measure.outputs import BY_HEAD, BY_PART, ROLES
from quantize.measure.sensitivity import N_GRADIENTS
from quantize.recipe import Recipe
from quantize.source import corpus
from quantize.source.arch import Arch
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


@dataclass(frozen=True)
class Texts:
    """Tokens of a run that are surveyed, calibrated with and held back; 0 where that is not done."""

    surveyed: int
    calibrated: int
    held: int


def room(plan: Plan, budget: Budget, header_bytes: int) -> Room:
    """What a plan takes."""
    read = plan.corpus
    texts = Texts(
        plan.survey_tokens if plan.allocates else 0,
        int(read.windows.size) if read is not None and plan.calibrated else 0,
        int(read.held.size) if read is not None and plan.evaluated else 0,
    )
    work = _work_bytes(plan.arch, plan.tensors, texts, sequential=plan.sequential, follows=plan.follows_outputs)
    return Room(header_bytes + budget.nbytes, work)


def foreseen(arch: Arch, tensors: Sequence[Tensor], recipe: Recipe, file_bytes: int) -> Room:
    """What the default run for a file of so many bytes will take, before its vocabulary and text are read."""
    texts = Texts(
        corpus.enough_to_survey(arch.n_embd) if recipe.is_budget else 0,
        corpus.enough(arch.n_embd) if recipe.wants_calibration else 0,
        corpus.HELD_WINDOWS * corpus.WINDOW,
    )
    calibrated = recipe.wants_calibration
    work = _work_bytes(arch, tensors, texts, sequential=calibrated, follows=calibrated and recipe.is_budget)
    return Room(file_bytes, work)


def _work_bytes(arch: Arch, tensors: Sequence[Tensor], texts: Texts, *, sequential: bool, follows: bool) -> int:
    """The survey's hidden states go before the write stage's come; what it found stays."""
    state = 4 * arch.n_embd  # of a token between two layers
    # The inputs of the layers so far, and two layers' gradients.
    survey = (arch.n_layer + 2 * N_GRADIENTS) * texts.surveyed * state if texts.surveyed else 0
    calibration = texts.calibrated * state * (1 + sequential)
    held = texts.held * (state + 4 * arch.n_layer * arch.n_expert_used)
    stay = sum(_output_bytes(arch, t) for t in tensors) + state * arch.n_embd if follows else 0
    small = SMALL_RECORDS * (arch.n_layer + 2)
    # What leaves a step is written before what entered it goes; the reference stays for the measuring.
    return stay + max(survey, 2 * calibration + 3 * held) + small


def _output_bytes(arch: Arch, tensor: Tensor) -> int:
    """Of the covariances of a tensor's outputs, in float16."""
    if tensor.role not in ROLES or tensor.il < 0:
        return 0
    n_row = tensor.shape[-2]
    if tensor.role in BY_HEAD:
        return 2 * n_row * n_row // arch.n_head
    return 2 * n_row * n_row * (tensor.shape[0] if tensor.role in BY_PART else 1)


def claim(journal: Journal, wanted: Room) -> None:
    """Reserve it. OutputError, with both figures, where it is not there."""
    try:
        journal.reserve(wanted.file, wanted.work)
    except OutputError as error:
        raise OutputError(f"{error}: {wanted}", error.hint) from error
