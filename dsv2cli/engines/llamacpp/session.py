"""A sequence in one of llama.cpp's contexts: the tokens it is to hold, and how many of them are in the cache.

llama.cpp keeps no list of tokens and some of its caches cannot forget the end alone (a recurrent state). So a session
knows its tokens itself, and what the cache lacks of them is read again before what comes next.
"""

from __future__ import annotations

import ctypes
import weakref
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from cext.errors import ArgumentError, EngineError
from dsv2cli.engines.llamacpp.library import library

if TYPE_CHECKING:
    from cext.model import KvType
    from dsv2cli.engines.llamacpp.model import Model

F32 = NDArray[np.float32]


class Room:
    """One of llama.cpp's contexts: cells that n_seq sequences share. Owned by its model; used by its worker alone."""

    def __init__(self, context: Any, n_seq: int, n_ctx: int, kv_type: KvType, token_bytes: int) -> None:
        lib = library()
        self.context = context
        self.memory = lib.llama_get_memory(context)
        self.n_seq, self.n_ctx, self.kv_type, self.token_bytes = n_seq, n_ctx, kv_type, token_bytes
        self.nbytes = token_bytes * n_ctx * n_seq
        self.n_batch = int(lib.llama_n_batch(context))
        self.batch = lib.llama_batch_init(self.n_batch, 0, 1)
        self.free = deque(range(n_seq))  # sequences that no session has; the cache may still hold what they had

    @property
    def is_idle(self) -> bool:
        """Whether no session is in it."""
        return len(self.free) == self.n_seq

    def close(self) -> None:
        if self.context is not None:
            library().llama_batch_free(self.batch)
            library().llama_free(self.context)
            self.context = None


class Session:
    """See protocol.Session; made by ``Model.session`` and ``fork``."""

    def __init__(self, model: Model, room: Room) -> None:
        self.model, self.room = model, room
        self.seq = room.free.popleft()
        weakref.finalize(self, room.free.append, self.seq)
        self.n_ctx, self.kv_type = room.n_ctx, room.kv_type
        self.kv_bytes = room.token_bytes * room.n_ctx
        self.growth = 0  # llama.cpp takes the whole cache from the system when it makes a context
        self.tokens: list[int] = []
        self.n_cached = 0  # so many of the first of them are in the cache,
        self.is_clean = False  # and nothing after them

    @property
    def n_past(self) -> int:
        """Tokens it holds."""
        return len(self.tokens)

    @property
    def ids(self) -> NDArray[np.int32]:
        return np.array(self.tokens, np.int32)

    def eval(self, ids: Sequence[int] | NDArray[np.integer[Any]], logits: Literal["last", "all"] = "last") -> F32:
        """Append tokens; the logits after the last, (n_vocab,), or after each, (n, n_vocab). See ``evaluate``."""
        given = [int(i) for i in ids]
        rows = self.model.evaluate([(self, given)], [len(given) if logits == "all" else 1])
        return rows if logits == "all" else rows[0]

    def rewind(self, n: int) -> None:
        """Forget all but the first n tokens; ArgumentError unless 0 <= n <= n_past."""
        if not 0 <= n <= self.n_past:
            raise ArgumentError(f"rewinding to {n} of {self.n_past} tokens")
        if n < self.n_cached:
            self.n_cached, self.is_clean = n, False
        del self.tokens[n:]

    def fork(self, n: int | None = None) -> Session:
        """A session that begins with the first n tokens of this one (None: all). Where this one's context has no
        sequence left, it is one in another context and reads them again. ArgumentError, and what ``session`` raises."""
        n = self.n_past if n is None else n
        if not 0 <= n <= self.n_past:
            raise ArgumentError(f"a fork at {n} of {self.n_past} tokens")
        other = self.model.session_beside(self)
        other.tokens = self.tokens[:n]
        if other.room is self.room:
            self.model.worker.run(lambda: self._share(other))
        return other

    def _share(self, other: Session) -> None:
        """Let the other see what is cached here of its tokens; a state that cannot be cut is shared whole or not."""
        n = min(self.n_cached, len(other.tokens))
        whole = n == self.n_cached and self.is_clean
        other.settle()
        if n and (whole or not self.model.is_recurrent):
            library().llama_memory_seq_cp(self.room.memory, self.seq, other.seq, -1, -1 if whole else n)
            other.n_cached = n

    def settle(self) -> None:
        """Make the cache hold the first ``n_cached`` tokens and nothing else. In the worker."""
        if self.is_clean:
            return
        lib = library()
        if not lib.llama_memory_seq_rm(self.room.memory, self.seq, self.n_cached, -1):
            lib.llama_memory_seq_rm(self.room.memory, self.seq, -1, -1)
            self.n_cached = 0  # a state that knows no earlier one: its tokens are read again
        self.is_clean = True


def step(room: Room, parts: list[tuple[Session, list[int], int]], n_vocab: int, stopped: Any) -> F32:
    """Evaluate what the cache lacks and the new tokens of a room's sessions; the logits wanted, part by part.

    In the worker. Nothing is appended to ``tokens``: that is for who called, when all rooms have done their part.
    """
    lib = library()
    every: list[tuple[int, int, int, bool]] = []  # token, position, sequence, whether logits are wanted
    for session, ids, n_logits in parts:
        session.settle()
        whole = session.tokens[session.n_cached :] + ids
        first = len(whole) - n_logits
        every += [(token, session.n_cached + i, session.seq, i >= first) for i, token in enumerate(whole)]
        session.is_clean = False  # until all of it is in
    out = np.empty((sum(n for _, _, n in parts), n_vocab), np.float32)
    row = 0
    for start in range(0, len(every), room.n_batch):
        chunk = every[start : start + room.n_batch]
        for i, (token, position, seq, wanted) in enumerate(chunk):
            room.batch.token[i], room.batch.pos[i] = token, position
            room.batch.n_seq_id[i], room.batch.seq_id[i][0] = 1, seq
            room.batch.logits[i] = wanted
        room.batch.n_tokens = len(chunk)
        status = lib.llama_decode(room.context, room.batch)
        if status:
            raise stopped(status)
        n = sum(wanted for *_, wanted in chunk)
        if n:
            logits = lib.llama_get_logits(room.context)
            if not logits:
                raise EngineError("llama.cpp gives no logits")
            out[row : row + n] = np.ctypeslib.as_array(
                ctypes.cast(logits, ctypes.POINTER(ctypes.c_float)), (n, n_vocab)
            )
            row += n
    for session, ids, _ in parts:
        session.n_cached, session.is_clean = len(session.tokens) + len(ids), True
    return out
