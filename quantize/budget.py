"""budget.py: the allocate stage. Every tensor's type, settled before a byte is written.

Named types are budgets: the bytes of llama.cpp's mix of that name, to be spent where the survey says they pay; --bpw
and --size are other budgets. The names of single types (the floats, q8_0, q4_0) and --plain-mix leave nothing to spend.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gguf.constants import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT
from gguf.constants import GGMLQuantizationType as Type

from quantize import recipe
from quantize.allocate import Choice, Item, allocate, format_size
from quantize.base.errors import QuantizeError
from quantize.job import Job, Plan
from quantize.measure.sensitivity import CANDIDATES, SMALL_BLOCKS, Cost, candidates
from quantize.source.tensors import Tensor
from quantize.survey import Survey, SurveyStage

# Types far below the budget's mean are not worth encoding samples in; the cheap ones from four bits up always are.
LEAST_SHARE, ALWAYS_BITS = 0.6, 4.0
RECORD = "types"


def padded_bytes(tensor: Tensor, type_: Type) -> int:
    """Bytes that a tensor takes of the file, up to where the next one begins."""
    n = recipe.nbytes(tensor, type_)
    return n + -n % GGUF_DEFAULT_ALIGNMENT


@dataclass(frozen=True)
class Budget:
    """What is known of a file's types before its weights are read."""

    nbytes: int  # that all tensors may take, padding included; what they take, where nothing is allocated
    fixed: Mapping[str, Type]  # by tensor name: the recipe's own
    allowed: tuple[Type, ...]  # what tensors may become; none where nothing is allocated


def budget_of(plan: Plan, header_bytes: int) -> Budget:
    """A plan's. header_bytes: of the file. QuantizeError where no types come to what is asked for."""
    fixed = {t.name: recipe.type_of(plan.recipe, plan.arch, t, plan.weighted) for t in plan.tensors}
    nbytes = budget_bytes(plan, fixed, header_bytes)
    bits = 8 * nbytes / sum(t.size for t in plan.tensors)
    return Budget(nbytes, fixed, allowed_types(bits) if plan.allocates else ())


def settle(job: Job, budget: Budget) -> dict[str, Type]:
    """The types by tensor name, from the journal where an earlier run settled them."""
    plan = job.plan
    if not plan.allocates:
        return dict(budget.fixed)
    known = job.journal.get(RECORD)
    if known is not None:
        return {name: Type[type_] for name, type_ in known.items()}
    survey = SurveyStage(job, budget.allowed).run()
    types, damage = spend(plan, survey, budget.allowed, budget.nbytes)
    job.journal.put(RECORD, {name: type_.name for name, type_ in types.items()})
    for line in describe(plan, types, damage):
        job.say(line)
    return types


def budget_bytes(plan: Plan, fixed: Mapping[str, Type], header_bytes: int) -> int:
    """Bytes that all tensors may take, padding included. QuantizeError where no types come to that."""
    options, n_values = plan.options, sum(t.size for t in plan.tensors)
    if options.size is not None:
        budget = options.size - header_bytes
        asked = f"--size {format_size(options.size)}"
    elif options.bpw is not None:
        budget = int(options.bpw * n_values / 8)
        asked = f"--bpw {options.bpw:g}"
    else:
        return sum(padded_bytes(t, fixed[t.name]) for t in plan.tensors)
    check_size(plan.tensors, budget, header_bytes, asked)
    return budget


def check_size(tensors: Sequence[Tensor], budget: int, header_bytes: int, asked: str) -> None:
    """QuantizeError where no types of the tensors come to so many bytes."""
    n_values = sum(t.size for t in tensors)
    sizes = [[padded_bytes(t, type_) for type_ in choices(t, (*CANDIDATES, *SMALL_BLOCKS))] for t in tensors]
    least, most = sum(map(min, sizes)), sum(map(max, sizes))
    if budget < least:
        bits, whole = 8 * least / n_values, least + header_bytes
        raise QuantizeError(
            f"{asked}: the smallest types take {bits:.3g} bits a weight, a file of {format_size(whole)}B",
            "ask for more, or quantise a smaller model",
        )
    if budget > most:
        raise QuantizeError(
            f"{asked}: 16 bits for every weight take only {format_size(most)}B", "--type bf16 keeps every bit"
        )


def allowed_types(bits: float) -> tuple[Type, ...]:
    """The types worth looking at for a budget of so many bits a weight."""
    least = min(LEAST_SHARE * bits, ALWAYS_BITS)
    every = dict.fromkeys((*CANDIDATES, *SMALL_BLOCKS))
    return tuple(t for t in every if 8 * GGML_QUANT_SIZES[t][1] / GGML_QUANT_SIZES[t][0] >= least)


def choices(tensor: Tensor, types: Sequence[Type]) -> tuple[Type, ...]:
    """What a tensor may become."""
    return candidates(tensor.shape[-1], types) if tensor.is_matrix else (Type.F32,)


def spend(plan: Plan, survey: Survey, allowed: Sequence[Type], budget: int) -> tuple[dict[str, Type], float]:
    """The types that cost least, and the KLD that they are predicted to have."""
    items = []
    for tensor in plan.tensors:
        costs = survey.costs.get(tensor.name)
        if costs is None:  # no error, or no token of the survey came by
            costs = dict.fromkeys(choices(tensor, allowed), Cost(0.0, 0.0))
        made = (Choice(t, padded_bytes(tensor, t), c.fisher, c.routing) for t, c in costs.items())
        items.append(Item(tensor.name, tuple(made)))
    found = allocate(items, budget, survey.flips)
    return dict(found.types), found.damage


def describe(plan: Plan, types: dict[str, Type], damage: float) -> list[str]:
    """A line for all, and one a role: its bits a weight and how often it takes which type."""
    sizes = {t.name: recipe.nbytes(t, types[t.name]) for t in plan.tensors}
    bits = 8 * sum(sizes.values()) / sum(t.size for t in plan.tensors)
    lines = [f"types: {bits:.3f} bits a weight, predicted KL divergence {damage:.4f}"]
    for role in dict.fromkeys(t.role for t in plan.tensors if t.is_matrix):
        mine = [t for t in plan.tensors if t.role == role]
        counts = Counter(types[t.name].name for t in mine)
        role_bits = 8 * sum(sizes[t.name] for t in mine) / sum(t.size for t in mine)
        named = ", ".join(name if n == len(mine) else f"{n} {name}" for name, n in counts.most_common())
        lines.append(f"  {role:<15} {role_bits:5.2f}  {named}")
    return lines
