"""What has been read, kept for requests that begin alike.

A kept prefix is a session: its blocks of cache are counted and shared (cext/memory/blocks.c), so that a fork of one
costs nothing and prefixes that begin alike hold their common part once. The least recently used go first when the
blocks take more than their budget.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dsv2cli.scheduler import Logprobs

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dsv2cli.scheduler.context import Session

LEAST = 16  # tokens: shorter prefixes are read again faster than they are looked for
MOST_KEPT = 512


def common(a: NDArray[np.int32], b: NDArray[np.int32]) -> int:
    """How many of the first tokens of both are the same."""
    n = min(len(a), len(b))
    differing = np.flatnonzero(a[:n] != b[:n])
    return int(differing[0]) if len(differing) else n


@dataclass(eq=False)
class Kept:
    """A session that nobody steps. rows: the log-probabilities of its first tokens, where they were asked for, with so
    many of the likeliest tokens each."""

    session: Session
    ids: NDArray[np.int32]
    salt: bytes
    rows: list[Logprobs | None]
    n_top: int


@dataclass(frozen=True)
class Found:
    """A session that begins with ``n`` of the tokens asked for, the asker's own, and the rows that belong to them."""

    session: Session
    n: int
    rows: list[Logprobs | None]


class Prefixes:
    """The kept sessions, the least recently used first. For one thread.

    nbytes: how much the caches of all sessions of the model take now, running ones included; budget: what they may take
    before the kept ones go.
    """

    def __init__(self, nbytes: Callable[[], int], budget: int) -> None:
        self._nbytes, self._budget = nbytes, budget
        self._kept: list[Kept] = []

    def __len__(self) -> int:
        return len(self._kept)

    def find(self, ids: NDArray[np.int32], salt: bytes, *, rows: bool = False, n_top: int = 0) -> Found | None:
        """A fork of the session that shares the longest beginning; None where none shares enough."""
        best, longest = None, LEAST - 1
        for kept in self._kept:
            if kept.salt != salt:
                continue
            n = common(kept.ids, ids)
            if rows:  # the token after the shared ones has a row too: the last of them is read again for it
                n = min(n, len(kept.rows)) - 1 if kept.n_top >= n_top else 0
            if n > longest:
                best, longest = kept, n
        if best is None:
            return None
        self._kept.remove(best)
        self._kept.append(best)
        return Found(best.session.fork(longest), longest, best.rows[: longest + 1])

    def keep(self, session: Session, salt: bytes, rows: list[Logprobs | None], n_top: int) -> None:
        """Take over a session that has ended. Those that are its beginning, with no more rows, are let go."""
        ids = session.ids
        if len(ids) < LEAST:
            return
        new = Kept(session, ids, salt, rows, n_top)
        self._kept = [kept for kept in self._kept if not _within(kept, new)]
        if not any(_within(new, kept) for kept in self._kept):
            self._kept.append(new)
        del self._kept[:-MOST_KEPT]
        self.trim()

    def trim(self) -> None:
        """Let go of the oldest until the caches fit their budget."""
        while self._kept and self._nbytes() > self._budget:
            del self._kept[0]

    def clear(self) -> int:
        n = len(self._kept)
        self._kept.clear()
        return n


def _within(a: Kept, b: Kept) -> bool:
    """Whether b holds all that a does."""
    return (
        a.salt == b.salt
        and len(a.ids) <= len(b.ids)
        and common(a.ids, b.ids) == len(a.ids)
        and len(a.rows) <= len(b.rows)
        and (a.n_top <= b.n_top or not a.rows)
    )
