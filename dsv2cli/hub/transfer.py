"""transfer.py: the bytes of a download. Resumes across drops and across runs, and names nothing that is not verified.

The hub client's own downloader starts a file anew in every process and checks hashes for some transports only. Here
its HTTP layer writes into ``*.incomplete`` beside the destination; the hash is computed as bytes arrive, compared with
the hub's listing, and only then is the file renamed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import queue
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO, cast

from cext import system
from dsv2cli.console import format_bytes
from dsv2cli.errors import CliError
from dsv2cli.hub import cache, client
from dsv2cli.hub.cache import Joined, Target
from dsv2cli.hub.listing import Plan, RemoteFile

WORKERS = 4
RETRIES = 5  # in a row without a new byte
JOINED_AT_ONCE = 16 << 20  # bytes
READ_BYTES = 1 << 20  # small, so that little is lost when a connection drops
LONGEST_PAUSE = 30.0  # seconds between two tries
Advanced = Callable[[RemoteFile, int], None]


class StoppedError(Exception):
    """The download was told to stop; what has arrived stays for the next run."""


class CorruptError(CliError):
    """The bytes that arrived are not those that the hub lists."""


@dataclass
class Transfer:
    """One download of a plan, into the shared cache or the folder ``to``.

    ``advanced(file, n)`` hears of n more bytes (fewer than none where some are fetched again), ``note`` of what a
    person would want to know. Both are called from several threads.
    """

    plan: Plan
    to: Path | None = None
    advanced: Advanced = lambda file, n: None
    note: Callable[[str], None] = lambda message: None
    keeps_ref: bool = True  # notes which commit the branch stood for: where all of the model has come
    stop: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.targets = cache.targets(self.plan, self.to)
        self.where = self.to if self.to is not None else cache.cache_root()

    @property
    def present_bytes(self) -> int:
        return sum(t.present_bytes for t in self.targets)

    def run(self) -> Path:
        """Fetch what is missing; returns the checkpoint's folder or the GGUF's path. CliError, OSError."""
        if not (self.plan.offline and self.to is None):
            cache.check_disk(self.where, self._needed_bytes())
            with quiet_client():
                self._fetch_all()
            if (joined := self.targets[0].joined if self.targets else None) is not None:
                self._join(joined)
            if self.to is None and self.keeps_ref:
                _write_ref(self.plan)
        return cache.location(self.plan, self.to)

    def _needed_bytes(self) -> int:
        """Of disk: what is to come, and where pieces are joined, one of them twice for a while."""
        needed = self.plan.nbytes - self.present_bytes
        waiting = [t.file.nbytes for t in self.targets if t.joined is not None and not t.is_joined()]
        return needed + max(waiting, default=0)

    def _join(self, joined: Joined) -> None:
        """Make one file of the pieces. Each goes once it is in; a run cut short goes on from the last whole one."""
        if waiting := [t for t in self.targets if not t.is_joined()]:
            joined.final.parent.mkdir(parents=True, exist_ok=True)
            joined.partial.parent.mkdir(parents=True, exist_ok=True)
            with _exclusive(joined.partial) as file:
                for target in waiting:
                    file.truncate(target.end - target.file.nbytes)
                    with target.final.open("rb") as piece:
                        shutil.copyfileobj(piece, file, JOINED_AT_ONCE)
                    if os.fstat(file.fileno()).st_size != target.end:
                        raise CorruptError(
                            f"`{target.final}` is not {target.file.nbytes} bytes any more", "the same command resumes"
                        )
                    system.sync_and_drop(file.fileno())
                    target.final.unlink()
                    self.note(f"{Path(target.file.path).name}: joined")
        if joined.partial.is_file():  # else it has its name already
            os.replace(joined.partial, joined.final)  # noqa: PTH105
        if joined.note is not None:
            joined.note.write_text(joined.pieces, encoding="utf-8")
        for target in self.targets:
            target.final.unlink(missing_ok=True)

    def _fetch_all(self) -> None:
        """Run the targets through daemon threads: Ctrl-C must not wait for a read that waits for the network."""
        waiting: queue.SimpleQueue[Target] = queue.SimpleQueue()
        results: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        for target in sorted(self.targets, key=lambda t: t.file.nbytes, reverse=True):
            waiting.put(target)

        def work() -> None:
            while not self.stop.is_set():
                try:
                    target = waiting.get_nowait()
                except queue.Empty:
                    return
                try:
                    self._fetch(target)
                    results.put(None)
                except BaseException as error:
                    results.put(error)

        threads = [threading.Thread(target=work, daemon=True) for _ in range(WORKERS)]
        for thread in threads:
            thread.start()
        try:
            for _ in self.targets:
                if error := results.get():
                    raise error
        finally:
            self.stop.set()
            for thread in threads:
                thread.join(timeout=1)

    def _fetch(self, target: Target) -> None:
        if not target.is_complete():
            target.partial.parent.mkdir(parents=True, exist_ok=True)
            target.final.parent.mkdir(parents=True, exist_ok=True)
            try:
                with _exclusive(target.partial) as file:
                    self._fetch_locked(target, file)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    raise CliError(
                        f"`{target.file.path}` to `{self.where}`: {error.strerror}, with"
                        f" {format_bytes(target.present_bytes)} of {format_bytes(target.file.nbytes)} written",
                        "free some space, and the same command resumes; or --to DIR on another disk",
                    ) from error
                raise
        if target.link is not None:
            _link(target.final, target.link)

    def _fetch_locked(self, target: Target, file: FileIO) -> None:
        if target.is_complete():  # another process finished it in the meantime
            return
        if self.to is not None and _hash_of(target.final, target.file) == target.file.etag:
            self.advanced(target.file, target.file.nbytes - os.fstat(file.fileno()).st_size)
            target.partial.unlink()
        else:
            self._fill(target, file)
            os.replace(target.partial, target.final)  # noqa: PTH105
        if target.note is not None:
            record = f"{self.plan.commit}\n{target.file.etag}\n{time.time()}\n"
            target.note.write_text(record, encoding="utf-8")

    def _fill(self, target: Target, file: FileIO) -> None:
        """Bring the partial file to its full length and check it. A file in parts that fails is fetched once whole."""
        sink = Sink(file, target.file, self.advanced, self.stop)
        resumed = sink.nbytes > 0
        cached = self._cached(target)
        if cached is not None:
            sink.restart()
            with cached.open("rb") as source:
                while block := source.read(READ_BYTES):
                    sink.write(block)
        else:
            resumed |= self._receive(target.file, sink)
            if resumed and not sink.is_whole():
                self.note(f"{target.file.path}: the parts do not make the whole; fetching it from the start")
                sink.restart()
                self._receive(target.file, sink)
        if not sink.is_whole():
            target.partial.unlink()
            raise CorruptError(
                f"`{target.file.path}` of {self.plan.repo}: the bytes received are not those the hub lists"
                f" (expected {target.file.etag}, got {sink.digest()})",
                "run the command again; if it persists, something on the way (a proxy, a mirror) alters the file",
            )
        system.sync_and_drop(file.fileno())

    def _cached(self, target: Target) -> Path | None:
        """The same file in the shared cache, when the destination is another folder."""
        if self.to is None:
            return None
        folder = cache.cache_folder(self.plan.repo)
        for path in (folder / "blobs" / target.file.etag, folder / "snapshots" / self.plan.commit / target.file.path):
            if path.is_file() and path.stat().st_size == target.file.nbytes:
                return path
        return None

    def _receive(self, file: RemoteFile, sink: Sink) -> bool:
        """Fetch from where the sink ends, and again from there after a drop, as long as bytes keep coming.

        Returns whether the connection was lost on the way.
        """
        from huggingface_hub import hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers

        url = hf_hub_url(self.plan.repo, file.path, revision=self.plan.commit)
        tries, lost = 0, False
        while sink.nbytes < file.nbytes:
            before = sink.nbytes
            headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
            try:
                with client.translated_errors(self.plan.repo, self.plan.revision):
                    # Larger files the client leaves to another transport, if it knows their size.
                    known = file.nbytes if file.nbytes <= client.constants().MAX_HTTP_DOWNLOAD_SIZE else None
                    http_get(url, cast(BinaryIO, sink), resume_size=before, headers=headers, expected_size=known)
            except client.UnreachableError:
                lost = True
                tries = 1 if sink.nbytes > before else tries + 1
                if tries > RETRIES:
                    raise
                self.note(f"{file.path}: connection lost at {format_bytes(sink.nbytes)}; resuming")
                if self.stop.wait(min(2.0 ** (tries - 1), LONGEST_PAUSE)):
                    raise StoppedError from None
            except OSError as error:
                if error.errno is not None:
                    raise
                break  # the client found the length wrong: is_whole() tells what to do
        return lost


class Sink:
    """The file that bytes are appended to, and their hash so far. What the hub client's ``http_get`` writes into."""

    def __init__(self, file: FileIO, remote: RemoteFile, advanced: Advanced, stop: threading.Event) -> None:
        self._file, self._remote, self._advanced, self._stop = file, remote, advanced, stop
        self.nbytes = 0
        self._hash = _hasher(remote)
        file.seek(0)
        while block := file.read(READ_BYTES):  # what an earlier run left
            self._check_stop()
            self._hash.update(block)
            self.nbytes += len(block)
        if self.nbytes > remote.nbytes:
            self.restart()

    def _check_stop(self) -> None:
        if self._stop.is_set():
            raise StoppedError

    def write(self, data: bytes) -> int:
        self._check_stop()
        view = memoryview(data)
        while view:
            view = view[self._file.write(view) :]
        self._hash.update(data)
        self.nbytes += len(data)
        self._advanced(self._remote, len(data))
        return len(data)

    def tell(self) -> int:
        return self.nbytes

    def seek(self, position: int, whence: int = 0) -> int:
        """Only to the start: the client does it when a server sends the whole file for a part of it."""
        if position != 0 or whence != 0:
            raise ValueError(f"a download can start anew, not move to byte {position}")
        return 0

    def truncate(self) -> int:
        self.restart()
        return 0

    def restart(self) -> None:
        self._advanced(self._remote, -min(self.nbytes, self._remote.nbytes))
        self._file.truncate(0)
        self._hash = _hasher(self._remote)
        self.nbytes = 0

    def digest(self) -> str:
        return str(self._hash.hexdigest())

    def is_whole(self) -> bool:
        return self.nbytes == self._remote.nbytes and self._remote.etag in ("", self.digest())


def _hasher(remote: RemoteFile) -> Any:
    """The hash the hub lists: sha256 of an LFS file, git's sha1 of a blob for the small ones."""
    if remote.sha256:
        return hashlib.sha256()
    return hashlib.sha1(b"blob %d\0" % remote.nbytes, usedforsecurity=False)


def _hash_of(path: Path, remote: RemoteFile) -> str | None:
    """The hash of a file that may be the remote one already; None where its size says that it is not."""
    if not path.is_file() or path.stat().st_size != remote.nbytes:
        return None
    digest = _hasher(remote)
    with path.open("rb") as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
        system.drop_pages(file.fileno())  # see sync_and_drop
    return str(digest.hexdigest())


@contextlib.contextmanager
def _exclusive(path: Path) -> Iterator[FileIO]:
    """The partial file, open to append and locked against other processes. Unbuffered: a kill loses no byte."""
    with open(path, "a+b", buffering=0) as file:  # noqa: PTH123
        with contextlib.suppress(OSError):  # a file system without locks
            if not system.try_lock(file.fileno()):
                raise CliError(f"another process is downloading `{path.name}`", "let it finish, then run this again")
        yield file


def _link(blob: Path, name: Path) -> None:
    """Give a verified blob its name in the snapshot, as the hub's client does."""
    if name.exists():
        return
    name.parent.mkdir(parents=True, exist_ok=True)
    name.unlink(missing_ok=True)  # a link to a blob that has gone
    try:
        name.symlink_to(os.path.relpath(blob, name.parent))
    except OSError:
        with contextlib.suppress(FileExistsError):
            name.hardlink_to(blob)


def _write_ref(plan: Plan) -> None:
    """Note which commit the branch or tag stood for, which offline runs go by."""
    if cache.COMMIT.fullmatch(plan.revision):
        return
    ref = cache.cache_folder(plan.repo) / "refs" / plan.revision
    ref.parent.mkdir(parents=True, exist_ok=True)
    ref.write_text(plan.commit, encoding="utf-8")


@contextlib.contextmanager
def quiet_client() -> Iterator[None]:
    """The hub client's progress bars and warnings off (ours say the same), and its reads short."""
    from huggingface_hub import constants
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    logger = logging.getLogger("huggingface_hub")
    level, chunk, bars_off = logger.level, constants.DOWNLOAD_CHUNK_SIZE, are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    constants.DOWNLOAD_CHUNK_SIZE = READ_BYTES
    disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        constants.DOWNLOAD_CHUNK_SIZE = chunk
        if not bars_off:
            enable_progress_bars()
