"""quantize.blas: work side by side comes back in order, and stops where it should."""

from __future__ import annotations

import threading
import time

import pytest

from quantize import blas


@pytest.mark.parametrize("n_lanes", [1, 2, 5])
@pytest.mark.parametrize("n_items", [0, 1, 2, 17])
def test_side_by_side_keeps_the_order(n_lanes: int, n_items: int) -> None:
    def work(i: int) -> int:
        time.sleep(0.002 * ((7 * i) % 3))  # later ones are done before earlier ones
        return i * i

    assert list(blas.side_by_side(work, range(n_items), n_lanes)) == [i * i for i in range(n_items)]


def test_lanes_run_at_the_same_time() -> None:
    meeting = threading.Barrier(3, timeout=30)
    assert list(blas.side_by_side(lambda i: meeting.wait() >= 0, range(6), 3)) == [True] * 6


@pytest.mark.parametrize("n_lanes", [1, 3])
def test_no_more_exist_than_lanes_and_one(n_lanes: int) -> None:
    begun: list[int] = []
    for i, made in enumerate(blas.side_by_side(lambda i: begun.append(i) or i, range(20), n_lanes)):
        assert made == i and len(begun) <= i + 1 + n_lanes


@pytest.mark.parametrize("n_lanes", [1, 3])
def test_an_error_ends_the_work(n_lanes: int) -> None:
    begun: list[int] = []

    def work(i: int) -> int:
        begun.append(i)
        if i == 4:
            raise ValueError("the fifth")
        return i

    seen = []
    with pytest.raises(ValueError, match="the fifth"):
        for made in blas.side_by_side(work, range(1000), n_lanes):
            seen.append(made)
    assert seen == [0, 1, 2, 3] and len(begun) <= 5 + n_lanes + 1


def test_products_of_a_lane_run_on_its_thread() -> None:
    """Lanes keep BLAS to one thread each, and give it back its own when they are done."""
    switch = blas._switch()
    if switch is None:
        pytest.skip("numpy's BLAS has no switch")
    before = switch[0]()
    assert set(blas.side_by_side(lambda i: switch[0](), range(4), 2)) == {1}
    assert switch[0]() == before
