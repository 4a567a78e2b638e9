"""quantize.allocate: the best types for a budget, against every assignment there is."""

from itertools import pairwise, product
from math import sqrt

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as Type

from quantize.allocate import TIE, Choice, Item, allocate, parse_size
from quantize.base.errors import QuantizeError

TYPES = (Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q6_K)


def random_items(seed, n_items=5, n_choices=4):
    """Costs that fall by about 4 a bit, as encoders' do; sizes of different tensors are far apart."""
    rng = np.random.default_rng(seed)
    items = []
    for i in range(n_items):
        size, scale, reach = rng.integers(50, 2000), rng.lognormal(), rng.lognormal() * rng.integers(0, 2)
        bits = np.sort(rng.uniform(2, 7, n_choices))
        noise = scale * 4.0**-bits * rng.uniform(0.7, 1.3, n_choices)
        choices = [
            Choice(TYPES[c], int(size * bits[c]), float(noise[c]), float(noise[c] * reach)) for c in range(n_choices)
        ]
        items.append(Item(f"t{i}", tuple(choices)))
    return items


def damage(chosen, flips):
    return sum(c.fisher for c in chosen) + sqrt(flips * sum(c.routing for c in chosen))


def exhaustive(items, budget, flips):
    """The least damage of all assignments within the budget."""
    fit = (c for c in product(*(item.choices for item in items)) if sum(x.nbytes for x in c) <= budget)
    return min(damage(c, flips) for c in fit)


def chosen_by(items, types):
    return [next(c for c in item.choices if c.type == types[item.name]) for item in items]


@pytest.mark.parametrize("flips", [0.0, 0.5])
@pytest.mark.parametrize("seed", range(12))
def test_the_best_assignment(seed, flips):
    """Exact without flips; with them the slope may settle beside the best."""
    items = random_items(seed)
    least, most = (sum(f(c.nbytes for c in item.choices) for item in items) for f in (min, max))
    for share in (0.0, 0.2, 0.5, 0.8, 1.0):
        budget = int(least + share * (most - least))
        got = allocate(items, budget, flips)
        chosen = chosen_by(items, got.types)
        assert got.nbytes == sum(c.nbytes for c in chosen) <= budget
        assert got.damage == pytest.approx(damage(chosen, flips))
        assert got.damage <= exhaustive(items, budget, flips) * (1.05 if flips else 1 + 2 * TIE)


@pytest.mark.parametrize("flips", [0.0, 0.5])
def test_more_bytes_never_hurt_much(flips):
    items = random_items(3, n_items=30)
    least = sum(min(c.nbytes for c in item.choices) for item in items)
    got = [allocate(items, least + 997 * i, flips) for i in range(40)]
    assert all(after.damage <= before.damage * (1 + TIE) for before, after in pairwise(got))
    assert got[-1].damage < got[0].damage / 2


def test_deterministic_and_whatever_the_order():
    items = random_items(5, n_items=30)
    budget = sum(c.choices[2].nbytes for c in items)
    got = allocate(items, budget, 0.5)
    assert allocate(items, budget, 0.5) == got
    assert dict(allocate(items[::-1], budget, 0.5).types) == dict(got.types)


def test_budgets_at_the_ends():
    items = random_items(7)
    least = sum(min(c.nbytes for c in item.choices) for item in items)
    assert allocate(items, least).nbytes == least
    with pytest.raises(ValueError, match=f"the smallest types take {least} bytes, the budget is {least - 1}"):
        allocate(items, least - 1)
    everything = allocate(items, 10**9)
    assert everything.damage == pytest.approx(sum(min(c.fisher for c in item.choices) for item in items))


@pytest.mark.parametrize(("slower_cost", "wins"), [(1.0 - TIE / 2, Type.Q4_K), (1.0 - 3 * TIE, Type.IQ4_NL)])
def test_ties_go_to_the_faster_type(slower_cost, wins):
    """The faster type comes first; the other must be better by more than a tie to be chosen at the same bytes."""
    item = Item("t", (Choice(Type.Q4_K, 100, 1.0, 0.0), Choice(Type.IQ4_NL, 100, slower_cost, 0.0)))
    assert allocate([item], 100).types == {"t": wins}


def test_a_type_that_costs_more_bytes_and_more_damage_is_never_taken():
    item = Item("t", (Choice(Type.Q3_K, 110, 1.0, 0.0), Choice(Type.IQ3_XXS, 98, 0.9, 0.0)))
    assert allocate([item], 1000).types == {"t": Type.IQ3_XXS}


def test_routing_noise_counts_by_its_root():
    """One tensor's noise reaches a router, the other's does not: with flips, bytes go to the first."""
    quiet = Item("quiet", (Choice(Type.Q2_K, 100, 0.10, 0.0), Choice(Type.Q4_K, 200, 0.01, 0.0)))
    routed = Item("routed", (Choice(Type.Q2_K, 100, 0.09, 0.04), Choice(Type.Q4_K, 200, 0.01, 0.0025)))
    assert allocate([quiet, routed], 300, 0.0).types["quiet"] == Type.Q4_K
    assert allocate([quiet, routed], 300, 1.0).types["routed"] == Type.Q4_K


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("9.5G", 9_500_000_000),
        ("9.5 gb", 9_500_000_000),
        ("1GiB", 2**30),
        ("1gi", 2**30),
        ("700M", 700_000_000),
        ("12k", 12_000),
        (".5T", 500_000_000_000),
        ("123456", 123_456),
        ("3.", 3),
    ],
)
def test_sizes(text, expected):
    assert parse_size(text) == expected


@pytest.mark.parametrize(
    "text", ["", "G", "9,5G", "-1G", "0", "0.0G", "9.5X", "9.5GG", "nine", "1e9", "inf", "nan", "."]
)
def test_nonsense_sizes(text):
    with pytest.raises(QuantizeError, match="is not a size"):
        parse_size(text)
