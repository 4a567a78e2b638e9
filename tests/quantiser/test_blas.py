"""quantize.blas: work side by side comes back in order, and stops where it should."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from quantize.base import blas
from quantize.base.errors import QuantizeError


@pytest.mark.parametrize("n_lanes", [1, 2, 5])
@pytest.mark.parametrize("n_items", [0, 1, 2, 17])
def test_side_by_side_keeps_the_order(n_lanes: int, n_items: int) -> None:
    def work(i: int) -> int:
        time.sleep(0.002 * ((7 * i) % 3))  # later ones are done before earlier ones
        return i * i

    assert list(blas.side_by_side(work, range(n_items), n_lanes)) == [i * i for i in range(n_items)]


def test_lanes_run_at_the_same_time() -> None:
    meeting = threading.Barrier(3, timeout=300)
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


@pytest.mark.parametrize("n_threads", [1, 2, 5])
@pytest.mark.parametrize("n_tasks", [0, 1, 3, 40])
def test_every_task_of_every_caller_runs_once(n_threads: int, n_tasks: int) -> None:
    ran: list[tuple[int, int]] = []
    with blas.Crew(n_threads, "crew") as crew, ThreadPoolExecutor(3) as callers:
        tasks = [[partial(ran.append, (i, j)) for j in range(n_tasks)] for i in range(3)]
        list(callers.map(lambda mine: crew.run(mine, n_threads), tasks))
    assert sorted(ran) == [(i, j) for i in range(3) for j in range(n_tasks)]


def test_a_caller_does_not_wait_for_threads_that_are_busy() -> None:
    held = threading.Event()
    with blas.Crew(2, "crew") as crew:
        others = [crew._pool.submit(held.wait, 300) for _ in range(2)]
        ran: list[int] = []
        crew.run([partial(ran.append, i) for i in range(5)], 3)
        assert ran == [0, 1, 2, 3, 4] and not any(other.done() for other in others)
        held.set()


def test_threads_are_shared_among_callers() -> None:
    with blas.Crew(8, "crew") as crew, crew.share() as alone:
        with crew.share() as second, crew.share() as third:
            assert (alone, second, third) == (8, 4, 3)
        with crew.share() as again:
            assert again == 4


@pytest.mark.parametrize("n_threads", [1, 3])
def test_after_an_error_no_task_is_begun(n_threads: int) -> None:
    begun: list[int] = []

    def work(i: int) -> None:
        begun.append(i)
        time.sleep(0.001)
        if i == 4:
            raise ValueError("the fifth")

    with blas.Crew(n_threads, "crew") as crew, pytest.raises(ValueError, match="the fifth"):
        crew.run([partial(work, i) for i in range(100_000)], n_threads)
    assert len(begun) < 50_000  # but for those that others begin while it is raised


def test_products_are_the_employed_crews() -> None:
    names: set[str] = set()
    meeting = threading.Barrier(3, timeout=300)

    def work() -> None:
        names.add(threading.current_thread().name.split("_")[0])
        meeting.wait()

    with blas.Crew(3, "hired") as crew, blas.employed(crew):
        blas.spread([work] * 3)
    assert names == {"hired", threading.current_thread().name}


def test_two_quantisations_do_not_share_a_crew() -> None:
    """Each thread's products, and those of its lanes, are its own crew's, whoever was employed last."""
    names: dict[str, set[str]] = {"one": set(), "two": set()}
    shared = {name: threading.Event() for name in names}  # the first tasks wait for another thread's
    both = threading.Barrier(2, timeout=300)

    def work(mine: str) -> None:
        with blas.Crew(4, mine) as crew, blas.employed(crew):
            both.wait()

            def lane(i: int) -> None:
                def task() -> None:
                    names[mine].add(threading.current_thread().name.split("_")[0])
                    if len(names[mine]) > 1:
                        shared[mine].set()
                    shared[mine].wait(300)

                blas.spread([task] * 16)

            list(blas.side_by_side(lane, range(3), 2))
            both.wait()

    with ThreadPoolExecutor(2, thread_name_prefix="run") as runs:
        list(runs.map(work, names))
    assert names == {"one": {"one", "lane"}, "two": {"two", "lane"}}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_crew_is_refused_after_fork() -> None:
    """Its threads are not there: to wait for them would be to wait for ever."""
    read, write = os.pipe()
    with blas.Crew(2, "crew") as crew:
        crew.run([int] * 4, 2)
        child = os.fork()
        if child == 0:
            try:
                crew.run([int] * 4, 2)
            except QuantizeError as error:
                os.write(write, f"{error} ({error.hint})".encode())
            os._exit(0)
    os.close(write)
    told = os.read(read, 1000).decode()
    os.close(read)
    assert os.waitpid(child, 0)[1] == 0
    assert "forked" in told and "spawn" in told and "\n" not in told
