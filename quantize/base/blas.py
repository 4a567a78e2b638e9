"""blas.py: numpy's linear algebra on one thread for a while, or on all in pieces of our own.

OpenBLAS, which numpy's wheels bring, wakes all its threads for matrices of a few hundred rows and lets them spin: on a
machine with anything else to do, factoring 512 rows then takes 1.7 s in place of 0.05. Where another library serves
numpy, or its switch is not found, nothing changes.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from contextvars import ContextVar, copy_context
from functools import cache, partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

import cext
from quantize.base.closing import Closing
from quantize.base.errors import QuantizeError

F32 = NDArray[np.float32]
T = TypeVar("T")
Made = TypeVar("Made")
PIECE = 256  # rows of a product that one core computes,
MAX_COLUMNS = 2048  # and columns: OpenBLAS keeps a copy of the second factor for each thread that ever ran one
CORES = ("scipy_openblas_get_corename64_", "scipy_openblas_get_corename", "openblas_get_corename")
SWITCHES = ("scipy_openblas_{}_num_threads64_", "scipy_openblas_{}_num_threads", "openblas_{}_num_threads")


@cache
def _switch() -> tuple[Callable[[], int], Callable[[int], None]] | None:
    """OpenBLAS's functions that get and set its number of threads."""
    for library in _libraries():
        for name in SWITCHES:
            get, put = (getattr(library, name.format(verb), None) for verb in ("get", "set"))
            if get is not None and put is not None:
                put.restype = None
                return get, put
    return None


def _libraries() -> Iterator[ctypes.CDLL]:
    """The OpenBLAS that came with numpy."""
    package = Path(np.__file__).parent
    for folder in (package.with_name("numpy.libs"), package / ".dylibs"):
        for path in sorted(folder.glob("*openblas*")):
            with suppress(OSError):
                yield ctypes.CDLL(str(path))


@cache
def kernel() -> str:
    """The name of the kernels that OpenBLAS chose for this processor, "" where it does not tell: the bits of a product
    depend on them.
    """
    for library in _libraries():
        for name in CORES:
            if (tell := getattr(library, name, None)) is not None:
                tell.restype = ctypes.c_char_p
                return bytes(tell()).decode()
    return ""


class _Count:
    """How many are in one_thread, and the threads that there were before the first."""

    lock = threading.Lock()
    inside, before = 0, 1


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, products and factors run on the thread that calls them, for all threads of the process: to be used by
    several at once, each with work of its own. The bits of a result then do not depend on who else is at work.
    """
    switch = _switch()
    if switch is None:
        yield
        return
    get, put = switch
    with _Count.lock:
        if _Count.inside == 0:
            _Count.before = get()
            put(1)
        _Count.inside += 1
    try:
        yield
    finally:
        with _Count.lock:
            _Count.inside -= 1
            if _Count.inside == 0:
                put(_Count.before)


class Crew(Closing):
    """Threads for the tasks of all who call; callers lend a hand. A context manager: close() ends the threads.

    They stay in the process that made them: QuantizeError in one that was forked off.
    """

    def __init__(self, threads: int, name: str) -> None:
        self.threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._lock = threading.Lock()
        self._callers = 0
        self._pid = os.getpid()

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(cancel_futures=True)

    @contextmanager
    def share(self) -> Iterator[int]:
        """Of the threads, how many a caller should take, now that so many call at once: to wake one costs more than
        small tasks do.
        """
        with self._lock:
            self._callers += 1
            mine = -(-self.threads // self._callers)
        try:
            yield mine
        finally:
            with self._lock:
                self._callers -= 1

    def run(self, tasks: Sequence[Callable[[], object]], n_threads: int) -> None:
        """All tasks, by n_threads, the caller's one of them. After an error no more are begun."""
        if os.getpid() != self._pid:
            raise QuantizeError(
                "these threads stayed in the process that this one was forked from",
                "start processes that quantise with spawn, not with fork",
            )
        left = iter(tasks)  # which they share
        others = [self._pool.submit(copy_context().run, _run_each, left) for _ in range(min(n_threads, len(tasks)) - 1)]
        try:
            _run_each(left)
        finally:
            others = [other for other in others if not other.cancel()]
            wait(others)
        for other in others:
            other.result()


def _run_each(tasks: Iterator[Callable[[], object]]) -> None:
    try:
        for task in tasks:
            task()
    except BaseException:
        deque(tasks, maxlen=0)
        raise


# Of this thread, and of those that work for it: another quantisation in the process has its own.
_CREW: ContextVar[Crew | None] = ContextVar("crew", default=None)


@contextmanager
def employed(crew: Crew) -> Iterator[None]:
    """Inside, spread's tasks are this crew's."""
    before = _CREW.set(crew)
    try:
        yield
    finally:
        _CREW.reset(before)


@cache
def _every_core(pid: int) -> Crew:
    """For those who employ nobody; a forked process has its own."""
    return Crew(cext.cores(), "blas")


def spread(tasks: Sequence[Callable[[], object]]) -> None:
    """Run tasks, each with results of its own, on the crew that is employed, else on all cores. Who cuts work into the
    same pieces whatever the number of threads, gets the same bits.
    """
    crew = _CREW.get() or _every_core(os.getpid())
    with one_thread(), crew.share() as n_threads:
        crew.run(tasks, n_threads)


def side_by_side(work: Callable[[T], Made], items: Iterable[T], n_lanes: int) -> Iterator[Made]:
    """What work makes of each item, in the order of the items, n_lanes of them in the making: while one takes a step
    that only one core can, the others spread over the rest. One that is made waits for those before it, so that
    n_lanes + 1 exist at most. With one lane there is no other thread.
    """
    if n_lanes == 1:
        yield from map(work, items)
        return
    with one_thread(), ThreadPoolExecutor(n_lanes, thread_name_prefix="lane") as lanes:
        coming: deque[Future[Made]] = deque()
        try:
            for item in items:
                coming.append(lanes.submit(copy_context().run, work, item))
                if len(coming) > n_lanes:
                    yield coming.popleft().result()
            while coming:
                yield coming.popleft().result()
        finally:
            for made in coming:
                made.cancel()


def pieces(n: int, most: int = PIECE) -> list[slice]:
    """[0, n) in runs of most."""
    return [slice(start, min(start + most, n)) for start in range(0, n, most)]


def by_rows(work: Callable[[slice], object], n_rows: int) -> None:
    """Run work on the pieces of n_rows, as spread does."""
    spread([partial(work, rows) for rows in pieces(n_rows)])


def from_rows(make: Callable[[slice], F32], n_rows: int, n: int) -> F32:
    """(n_rows, n), of which make gives the rows that it is asked for, as spread does."""
    out = np.empty((n_rows, n), np.float32)

    def fill(rows: slice) -> None:
        out[rows] = make(rows)

    by_rows(fill, n_rows)
    return out


def product(a: F32, b: F32, onto: F32 | None = None) -> F32:
    """a (m, k) b (k, n) on all cores, the same bits on any number of them; added to what is in onto (m, n), where that
    is given, with no more memory than pieces take.
    """
    out = np.zeros((len(a), b.shape[1]), np.float32) if onto is None else onto

    def multiply(rows: slice) -> None:
        out[rows] += a[rows] @ b

    by_rows(multiply, len(a))
    return out


def padded(n: int) -> int:
    """n rounded up to whole pieces. What BLAS makes of a number can depend on where it stands in a matrix, and on the
    matrix's size: only whole pieces are computed alike wherever they come from.
    """
    return -(-n // PIECE) * PIECE


def whole_piece(rows: F32) -> F32:
    """rows (m, n) of the last piece, zeros below them where m is less than a piece."""
    return rows if len(rows) == PIECE else np.pad(rows, ((0, PIECE - len(rows)), (0, 0)))


def by_pieces(a: F32, b: F32) -> F32:
    """a (m, k) b^T for b (n, k) on all cores: some pieces of b's rows at a time give the same bits as all."""
    out = np.empty((len(a), len(b)), np.float32)

    def multiply(rows: slice) -> None:
        piece = b[rows]
        out[:, rows] = (a @ whole_piece(piece).T)[:, : len(piece)]

    by_rows(multiply, len(b))
    return out
