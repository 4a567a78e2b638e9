"""What has been read, kept on disk below the prefixes in memory: for what these have let go of, and for a restart.

A prefix is stored as the whole blocks of its cache. A block's name is a digest over all that its numbers depend on (the
model, the cache's type, every token up to its end) and over what keeps it from others (the salt): prefixes that begin
alike share files, and another model's are not found. Nothing here makes the engine's thread wait: it asks, and threads
of this read and write.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cext import SESSION_BLOCK, EngineError, FormatError
from dsv2cli import console
from dsv2cli.server.blockfiles import Folder, name_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from cext import Model, Session
    from cext.model import KvType

MAX_HELD = 256 << 20  # bytes of caches that wait to be written
N_READERS = 2


class Disk:
    """The stored prefixes of one model, for sessions of one size. OSError where the folder cannot be used."""

    def __init__(self, model: Model, n_ctx: int, kv: KvType, path: Path, budget: int) -> None:
        self._model, self._n_ctx, self._kv = model, n_ctx, kv
        self._root = blake2b(model.identity() + kv.encode(), digest_size=32).digest()
        self.folder = Folder(path, budget)
        self._writer = ThreadPoolExecutor(1, "dsv2-cache-writer")
        self._readers = ThreadPoolExecutor(N_READERS, "dsv2-cache-reader")
        self._lock = threading.Lock()
        self._held = 0
        self._warned = False
        self.n_fetched = 0  # tokens, since the start

    @property
    def held_bytes(self) -> int:
        """Of caches that are here only because they are not written yet, at most."""
        return self._held

    def store(self, session: Session, salt: bytes, *, wait: bool = False) -> bool:
        """Write what is missing of a session that nobody steps, some time soon; False where too much waits already,
        unless that is to be waited for."""
        n = session.n_past // SESSION_BLOCK
        nbytes = n * session.block_bytes
        fork = session.fork(n * SESSION_BLOCK)
        with self._lock:
            if self._held and self._held + nbytes > MAX_HELD and not wait:
                return False
            self._held += nbytes
        written = self._writer.submit(self._write, fork, salt, nbytes)
        if wait:
            written.result()
        return True

    def fetch(
        self, ids: NDArray[np.int32], salt: bytes, begun: Session | None, cancelled: Callable[[], bool]
    ) -> Future[Session | None]:
        """A session of as many of the first tokens as are stored, but never all; None where ``begun`` holds more.

        begun: a session of the beginning, the asker's own, to go on from.
        """
        return self._readers.submit(self._read, ids, salt, begun, cancelled)

    def close(self) -> None:
        """When all that waits is written."""
        self._readers.shutdown()
        self._writer.shutdown()

    def _names(self, ids: NDArray[np.int32], salt: bytes) -> list[str]:
        """Of the whole blocks of tokens."""
        key = blake2b(salt, key=self._root, digest_size=32).digest()
        names = []
        for i in range(len(ids) // SESSION_BLOCK):
            block = ids[i * SESSION_BLOCK : (i + 1) * SESSION_BLOCK].astype("<i4")
            key = blake2b(block.tobytes(), key=key, digest_size=32).digest()
            names.append(name_of(i, key))
        return names

    # The threads.

    def _write(self, session: Session, salt: bytes, nbytes: int) -> None:
        try:
            self.folder.write(self._names(session.ids, salt), session.block)
        except (OSError, EngineError) as error:
            if not self._warned:
                self._warned = True
                reason = getattr(error, "strerror", None) or error
                console.warn(f"`{self.folder.path}`: what was read is not kept there: {reason}")
        finally:
            del session
            with self._lock:
                self._held -= nbytes

    def _read(
        self, ids: NDArray[np.int32], salt: bytes, begun: Session | None, cancelled: Callable[[], bool]
    ) -> Session | None:
        n_begun = begun.n_past if begun is not None else 0
        names = self._names(ids[: min(len(ids) - 1, self._n_ctx)], salt)
        first = n_begun // SESSION_BLOCK
        if first >= len(names) or not self.folder.has(names[first]):
            return None
        try:
            session = begun.fork(first * SESSION_BLOCK) if begun else self._model.session(self._n_ctx, self._kv)
            for name in names[first:]:
                if cancelled() or not self._append(session, name):
                    break
            self._check(session, names, ids)
        except EngineError:  # no memory, a model that is being closed
            return None
        if session.n_past <= n_begun:
            return None
        self.n_fetched += session.n_past - n_begun
        self.folder.touch(names[: session.n_past // SESSION_BLOCK])
        return session

    def _append(self, session: Session, name: str) -> bool:
        """Append a block from its file; False where it is none, and then the file is gone."""
        content = self.folder.read(name)
        if content is None:
            return False
        try:
            session.append_block(content)
        except (FormatError, ValueError):
            self.folder.remove(name)
            return False
        return True

    def _check(self, session: Session, names: list[str], ids: NDArray[np.int32]) -> None:
        """Names are compared by the tokens too: a block of others, and what follows it, is left out."""
        differing = np.flatnonzero(session.ids != ids[: session.n_past])
        if len(differing):
            i = int(differing[0]) // SESSION_BLOCK
            session.rewind(i * SESSION_BLOCK)
            self.folder.remove(names[i])
