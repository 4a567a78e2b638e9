"""allocate.py: which type each tensor gets, so that a budget of bytes buys the least damage. Knows numbers alone.

Damage has two parts. Noise in what a matrix puts out adds up in squares: a tensor's ``fisher`` is its share. Noise that
reaches a router makes tokens change experts, as often as the noise's size says: the root of the sum of the tensors'
``routing`` (sensitivity.py derives both). With the root's slope at the point reached in place of the root, the sum is
separable, and the best types are a knapsack's, solved over the budget in steps fine enough to be all but exact. The
slope then follows the result until they agree: the root is concave, so that each round can only lower the damage. Where
it ends depends on where it began, so that it begins at several slopes, and the best end counts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import gcd, sqrt

import numpy as np
from gguf.constants import GGMLQuantizationType as Type

from quantize.base.errors import ArgumentError

STARTS = (0.0, 1.0, 10.0, 100.0, 1000.0)  # slopes to begin with: the steeper, the fewer bits are missing
MAX_ROUNDS = 12  # of each; it settles in three or four
MAX_STEPS = 1 << 15  # of the budget: exact where it holds fewer of the sizes' common divisor
TIE = 0.02  # of a cost: below it the type that runs faster wins, where it takes no more bytes
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


@dataclass(frozen=True)
class Choice:
    """A tensor in one type."""

    type: Type
    nbytes: int
    fisher: float  # nats a token
    routing: float  # under the root, see Item


@dataclass(frozen=True)
class Item:
    """A tensor and the types it may take, those that run fastest first."""

    name: str
    choices: tuple[Choice, ...]


@dataclass(frozen=True)
class Allocation:
    """The types, and what they come to."""

    types: Mapping[str, Type]
    nbytes: int
    damage: float  # predicted mean KLD, nats a token


def parse_size(text: str) -> int:
    """Bytes of "9.5G" (10^9), "9.5GiB" (2^30), "700M" or "123456". ArgumentError where it says no size."""
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*([kmgt]i?|)b?", text.strip().lower())
    if match is None or not float(match[1]) > 0:
        raise ArgumentError(f"`{text}` is not a size", "a number and a unit: 9.5G (10^9 bytes), 9.5GiB (2^30), 700M")
    return int(float(match[1]) * _UNITS[match[2]])


def format_size(nbytes: float) -> str:
    """Bytes as parse_size reads them: 9500000000 -> "9.5G", 1000 -> "1k"."""
    for unit in "TGMk":
        if nbytes >= _UNITS[unit.lower()]:
            return f"{nbytes / _UNITS[unit.lower()]:.4g}{unit}"
    return f"{nbytes:.4g}"


def allocate(items: Sequence[Item], budget: int, flips: float = 0.0) -> Allocation:
    """The types of least damage whose bytes sum to budget or less; the same for the same numbers, always.

    Damage is sum(fisher) + sqrt(flips * sum(routing)). ValueError where even the smallest types take more.
    """
    least = sum(min(c.nbytes for c in item.choices) for item in items)
    if least > budget:
        raise ValueError(f"the smallest types take {least} bytes, the budget is {budget}")
    starts = STARTS if flips > 0 else STARTS[:1]
    return min((_settle(items, budget, flips, slope) for slope in starts), key=lambda result: result.damage)


def _settle(items: Sequence[Item], budget: int, flips: float, slope: float) -> Allocation:
    """The allocation that agrees with its own slope, from a first one on."""
    best: Allocation | None = None
    for _ in range(MAX_ROUNDS):
        chosen = _solve(items, budget, slope)
        routing = sum(c.routing for c in chosen)
        damage = sum(c.fisher for c in chosen) + sqrt(flips * routing)
        if best is not None and damage >= best.damage:
            break
        types = {item.name: c.type for item, c in zip(items, chosen, strict=True)}
        best = Allocation(types, sum(c.nbytes for c in chosen), damage)
        if flips * routing == 0:
            break
        slope = 0.5 * sqrt(flips / routing)
    assert best is not None
    return best


def _solve(items: Sequence[Item], budget: int, slope: float) -> list[Choice]:
    """One choice an item, of least sum(fisher + slope * routing): a knapsack, item by item over the room to spend."""
    useful = [_useful(item.choices, slope) for item in items]
    extra = [[c.nbytes - choices[0].nbytes for c in choices] for choices in useful]
    room = budget - sum(choices[0].nbytes for choices in useful)
    step = max(gcd(*(n for sizes in extra for n in sizes)), -(-room // MAX_STEPS), 1)
    n_steps = min(room, sum(sizes[-1] for sizes in extra)) // step
    cost = np.zeros(n_steps + 1)  # of the items so far, with so many steps at hand
    picks = np.zeros((len(items), n_steps + 1), np.int8)
    for choices, sizes, pick in zip(useful, extra, picks, strict=True):
        best = cost + _cost(choices[0], slope)
        for i, (choice, nbytes) in enumerate(zip(choices[1:], sizes[1:], strict=True), 1):
            steps = round(nbytes / step)
            if steps <= n_steps:
                with_it = cost[: n_steps + 1 - steps] + _cost(choice, slope)
                better = with_it < best[steps:]
                best[steps:][better] = with_it[better]
                pick[steps:][better] = i
        cost = best
    for start in range(n_steps, -1, -1):  # sizes were rounded to steps: the first that really fits
        picked, at = [], start
        for choices, sizes, pick in zip(useful[::-1], extra[::-1], picks[::-1], strict=True):
            picked.append(choices[pick[at]])
            at -= round(sizes[pick[at]] / step)
        if sum(c.nbytes for c in picked) <= budget:
            return picked[::-1]
    return [choices[0] for choices in useful]


def _cost(choice: Choice, slope: float) -> float:
    return choice.fisher + slope * choice.routing


def _useful(choices: Sequence[Choice], slope: float) -> list[Choice]:
    """Choices that no other beats at no more bytes, fewest bytes first. Near ties go to the earlier choice."""
    kept = []
    for i, choice in enumerate(choices):
        others = ((j, other) for j, other in enumerate(choices) if j != i and other.nbytes <= choice.nbytes)
        if not any(_beats(_cost(o, slope), _cost(choice, slope), j < i, o.nbytes < choice.nbytes) for j, o in others):
            kept.append(choice)
    return sorted(kept, key=lambda c: c.nbytes)


def _beats(cost: float, other: float, faster: bool, smaller: bool) -> bool:
    """Whether a choice of no more bytes makes another one pointless."""
    if faster and cost <= other * (1 + TIE):
        return True
    return cost <= other if smaller else cost < other / (1 + TIE)
