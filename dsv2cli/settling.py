"""settling.py: weights in huge pages of memory, where their file lies in small ones and memory holds both.

The pages that the system's cache has a file in are small ones on most systems: to find each takes a walk through
tables (see planner/paging.py), and every token reads a good part of the file. The copy takes memory once more, and
some seconds: it is made once a first answer is there, and the cache keeps the file for others and for the next time.
"""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from dsv2cli.residency import margin

if TYPE_CHECKING:
    from collections.abc import Callable

    from cext import Model

LEAST = 1 << 30  # bytes of weights: smaller models are fast as they are
FEW = 0.05  # of the weights, in small pages, that are left there


def pays(model: Model) -> bool:
    """Whether memory has room for the weights twice and more than a few of those that were read lie in small pages."""
    from cext.system import free_bytes, small_file_bytes

    nbytes = model.needs().all
    if nbytes < LEAST:
        return False
    free, small = free_bytes(swap=False), small_file_bytes()
    if free is None or small is None:
        return False
    return free - margin(free) >= 2 * nbytes and small > FEW * nbytes


def settle(model: Model, stop: Callable[[], bool] = lambda: False) -> int:
    """The bytes that were moved; 0 where that does not pay, or the system cannot. EngineError where it fails."""
    from cext import UnsupportedError

    with suppress(UnsupportedError):
        if pays(model):
            return model.settle(stop)
    return 0


class Settling:
    """The same in a thread beside the model's steps, which it does not outlive."""

    def __init__(self, model: Model) -> None:
        self._model, self._stop = model, threading.Event()
        self._thread: threading.Thread | None = None
        self._resumed = 0.0  # when the last piece began

    def begin(self) -> None:
        """Once: what comes after the first call does nothing."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="settling", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        from cext import EngineError

        self._resumed = time.monotonic()
        with suppress(EngineError):  # a file that has changed, say: the next step tells
            settle(self._model, self._pause)

    def _pause(self) -> bool:
        """As long as the last piece took: half of the time memory is the steps' alone. Whether to stop."""
        stops = self._stop.wait(time.monotonic() - self._resumed)
        self._resumed = time.monotonic()
        return stops

    def end(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
