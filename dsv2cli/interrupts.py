"""Ctrl-C as something to be heard between two steps, and not an exception in the middle of one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def heard(cancel: Callable[[], bool]) -> Iterator[None]:
    """While the block runs, Ctrl-C calls ``cancel``, and raises KeyboardInterrupt where that returns False.

    Nothing changes outside the main thread, or where Ctrl-C does something else already.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        if not cancel():
            raise KeyboardInterrupt

    usual = signal.default_int_handler
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is not usual:
        yield
        return
    signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)


@contextmanager
def held() -> Iterator[None]:
    """Ctrl-C changes nothing of what the block does, and is raised as KeyboardInterrupt when that is done.

    As ``heard``; where the block fails its error goes before.
    """
    came = False

    def note() -> bool:
        nonlocal came
        came = True
        return True

    with heard(note):
        yield
    if came:
        raise KeyboardInterrupt
