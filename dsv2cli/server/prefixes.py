"""What has been read, kept for requests that begin alike.

A kept prefix is a session: its blocks of cache are counted and shared (cext/memory/blocks.c), so that a fork of one
costs nothing and prefixes that begin alike hold their common part once. The least recently used go first when the
blocks take more than their budget. llama.cpp's contexts take the same full or empty and have a fixed number of
sequences: there the least recently used go where a sequence is wanted and none is left.

Below it may be a disk (disk.py): what is kept is written there soon, so that nothing is lost where it goes from here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from dsv2cli.scheduler import Logprobs

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dsv2cli.scheduler.context import Session

LEAST = 8  # tokens: shorter prefixes are read again faster than they are looked for
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
    stored: bool = False  # on the disk, or on its way there


@dataclass(frozen=True)
class Found:
    """A session that begins with ``n`` of the tokens asked for, the asker's own, and the rows that belong to them."""

    session: Session
    n: int
    rows: list[Logprobs | None]


class Caches(Protocol):
    """What is asked of a model: see protocol.Model."""

    def n_left(self) -> int | None: ...
    def excess(self, budget: int) -> int: ...


class Below(Protocol):
    """What is asked of the disk: see disk.Disk."""

    @property
    def held_bytes(self) -> int: ...
    def store(self, session: Any, salt: bytes, *, wait: bool = False) -> bool: ...


class Prefixes:
    """The kept sessions, the least recently used first. For one thread.

    budget: bytes that the caches of all sessions of the model, running ones included, may take before the kept ones go;
    0 keeps none.
    """

    def __init__(self, caches: Caches, budget: int, below: Below | None = None) -> None:
        self._caches, self._budget, self._below = caches, budget, below
        self._kept: list[Kept] = []

    def __len__(self) -> int:
        return len(self._kept)

    def find(
        self, ids: NDArray[np.int32], salt: bytes, *, least: int = LEAST, rows: bool = False, n_top: int = 0
    ) -> Found | None:
        """What begins as the kept session that shares the most does; None where none shares ``least`` tokens."""
        best, n = self._longest(ids, salt, rows, n_top)
        if best is None or n < max(least, LEAST):
            return None
        self._kept.remove(best)
        return Found(self._begun(best, n), n, best.rows[: n + 1])

    def _longest(self, ids: NDArray[np.int32], salt: bytes, rows: bool, n_top: int) -> tuple[Kept | None, int]:
        best, longest = None, 0
        for kept in self._kept:
            if kept.salt != salt:
                continue
            n = common(kept.ids, ids)
            if rows:  # the token after the shared ones has a row too: the last of them is read again for it
                n = min(n, len(kept.rows)) - 1 if kept.n_top >= n_top else 0
            if n > longest:
                best, longest = kept, n
        return best, longest

    def _begun(self, best: Kept, n: int) -> Session:
        """A fork of what was taken out of the list. Where no sequence is left for one, the oldest goes or the session
        itself is given, its end lost: what are fewer tokens to read again."""
        if self._kept and len(self._kept[0].ids) < len(best.ids) - n:
            self.make_room()
        if self._caches.n_left() == 0:
            best.session.rewind(n)
            return best.session
        self._kept.append(best)
        return best.session.fork(n)

    def make_room(self) -> None:
        """Let go of the oldest until a sequence is left, or none is kept. Before a session is asked for."""
        while self._kept and self._caches.n_left() == 0:
            del self._kept[0]

    def beginning(self, ids: NDArray[np.int32], salt: bytes) -> tuple[Session | None, int]:
        """The kept session that shares the most first tokens, and how many. It stays kept."""
        best, n = self._longest(ids, salt, False, 0)
        return (best.session if best else None), n

    def keep(self, session: Session, salt: bytes, rows: list[Logprobs | None], n_top: int) -> None:
        """Take over a session that has ended. Those that are its beginning, with no more rows, are let go."""
        ids = session.ids
        if len(ids) < LEAST or not self._budget:
            return
        new = Kept(session, ids, salt, rows, n_top)
        self._kept = [kept for kept in self._kept if not _within(kept, new)]
        if not any(_within(new, kept) for kept in self._kept):
            self._kept.append(new)
            self._store(new)
        for old in self._kept[:-MOST_KEPT]:
            self._let_go(old)
        self.trim()

    def _store(self, kept: Kept, *, wait: bool = False) -> None:
        if self._below is not None and not kept.stored:
            kept.stored = self._below.store(kept.session, kept.salt, wait=wait)

    def _let_go(self, kept: Kept) -> None:
        self._store(kept)
        self._kept.remove(kept)

    def trim(self) -> None:
        """Let go of the oldest until the caches fit their budget, those on their way to the disk aside."""
        while self._kept and self._caches.excess(self._budget + (self._below.held_bytes if self._below else 0)):
            self._let_go(self._kept[0])

    def forked(self, ids: NDArray[np.int32], salt: bytes) -> Session | None:
        """A session of just these tokens; None where none that is kept begins with them."""
        best, n = self.beginning(ids, salt)
        return best.fork(n) if best is not None and n == len(ids) else None

    def forget(self, ids: NDArray[np.int32], salt: bytes) -> None:
        """Let go of all that begin with these tokens."""
        self._kept = [k for k in self._kept if k.salt != salt or common(k.ids, ids) < len(ids)]

    def store_all(self) -> None:
        """At the end: what is not on the disk yet, the latest first, since this may be cut short."""
        for kept in reversed(self._kept):
            self._store(kept, wait=True)

    def clear(self) -> None:
        self._kept.clear()


def _within(a: Kept, b: Kept) -> bool:
    """Whether b holds all that a does."""
    return (
        a.salt == b.salt
        and len(a.ids) <= len(b.ids)
        and common(a.ids, b.ids) == len(a.ids)
        and len(a.rows) <= len(b.rows)
        and (a.n_top <= b.n_top or not a.rows)
    )
