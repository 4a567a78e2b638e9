"""Batches that clients hand in and come back for: one after another, while nobody waits for an answer.

A batch's state is a file beside its results (see ``files``): a server that is started again goes on with what is not
done. The thread here runs them, in an event loop of its own; everything else may be called from any thread.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import Struct

from dsv2cli import console
from dsv2cli.batch import runner
from dsv2cli.batch.ledger import Ledger, LedgerError
from dsv2cli.batch.lines import Bad, check, numbered
from dsv2cli.server.desk import JOBS, Desk
from dsv2cli.server.errors import ApiError, bad_field
from dsv2cli.server.files import ABOUT, Files, owner_name, write_whole
from dsv2cli.server.offline import AHEAD, model_identity

if TYPE_CHECKING:
    from dsv2cli.server.service import Service

MAX_LINES = 50_000
MAX_TOLD = 100  # errors of a batch that are listed
KEY_BATCHES = 1000  # that are kept for a key
KEY_PENDING = 100  # and of them, those that are not done
PURPOSE = "batch"
ENDED = ("completed", "failed", "cancelled")


class Counts(Struct):
    total: int = 0
    completed: int = 0
    failed: int = 0


class Batch(Struct, kw_only=True):
    """As OpenAI's clients hear of it. Times in seconds since 1970. It never expires here."""

    id: str
    endpoint: str
    input_file_id: str
    completion_window: str
    created_at: int
    status: str = "validating"
    object: str = "batch"
    errors: dict[str, Any] | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    expires_at: int | None = None
    expired_at: int | None = None
    request_counts: Counts = msgspec.field(default_factory=Counts)
    metadata: dict[str, str] | None = None

    @property
    def has_ended(self) -> bool:
        return self.status in ENDED

    def become(self, status: str) -> None:
        self.status = status
        if status != "validating":
            setattr(self, f"{status}_at", int(time.time()))

    def told(self) -> dict[str, Any]:
        found: dict[str, Any] = msgspec.to_builtins(self)
        return found


class Batches:
    """All keys' batches over the files that they are made of."""

    def __init__(self, service: Service, files: Files) -> None:
        self.files = files
        self._service = service
        self._lock = threading.Condition()
        self._batches: dict[str, dict[str, Batch]] = {}
        self._salts: dict[str, bytes] = {}
        self._queue: deque[tuple[str, str]] = deque()
        self._current: str | None = None  # the id of the batch that runs
        self._cancel: tuple[asyncio.AbstractEventLoop, asyncio.Task[None]] | None = None
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="dsv2-batches", daemon=True)
        self._read()

    def _read(self) -> None:
        for place in self.files.owners():
            for path in place.glob(f"batch_*{ABOUT}"):
                with suppress(OSError, msgspec.MsgspecError):
                    batch = msgspec.json.decode(path.read_bytes(), type=Batch)
                    if batch.id == path.stem:
                        self._batches.setdefault(place.name, {})[batch.id] = batch
        left = [(owner, batch) for owner, mine in self._batches.items() for batch in mine.values()]
        self._queue.extend(
            (owner, batch.id)
            for owner, batch in sorted(left, key=lambda item: item[1].created_at)
            if not batch.has_ended
        )

    # Asked from the event loop.

    def create(self, salt: bytes, input_file_id: str, endpoint: str, window: str, metadata: Any) -> dict[str, Any]:
        """Queue a batch. ApiError."""
        owner = owner_name(salt)
        if endpoint not in JOBS:
            raise bad_field("endpoint", f"{endpoint[:100]!r} is none of {', '.join(JOBS)}")
        if self.files.find(owner, input_file_id).purpose != PURPOSE:
            raise bad_field("input_file_id", f"the file's purpose is not {PURPOSE}")
        self.files.room_left(owner)  # or an ApiError
        with self._lock:
            mine = self._batches.setdefault(owner, {})
            n_pending = sum(not batch.has_ended for batch in mine.values())
            if n_pending >= KEY_PENDING:
                raise ApiError(429, f"{n_pending} batches wait already", "rate_limit_error", code="queue_full")
            self._make_room(owner)
            batch = Batch(
                id=f"batch_{secrets.token_hex(12)}",
                endpoint=endpoint,
                input_file_id=input_file_id,
                completion_window=window,
                created_at=int(time.time()),
                metadata=metadata,
            )
            self._save(owner, batch)
            mine[batch.id] = batch
            self._queue.append((owner, batch.id))
            self._lock.notify_all()
            return batch.told()

    def _make_room(self, owner: str) -> None:
        """Forget the oldest that have ended; their files stay."""
        mine = self._batches[owner]
        ended = sorted((b for b in mine.values() if b.has_ended), key=lambda b: b.created_at)
        for batch in ended[: max(0, len(mine) + 1 - KEY_BATCHES)]:
            del mine[batch.id]
            self._place(owner, batch.id, ABOUT).unlink(missing_ok=True)

    def all(self, salt: bytes) -> list[dict[str, Any]]:
        """The newest first."""
        with self._lock:
            mine = [batch.told() for batch in self._batches.get(owner_name(salt), {}).values()]
        return sorted(mine, key=lambda batch: batch["created_at"])[::-1]

    def find(self, salt: bytes, name: str) -> dict[str, Any]:
        """ApiError 404."""
        with self._lock:
            return self._find(owner_name(salt), name).told()

    def _find(self, owner: str, name: str) -> Batch:
        batch = self._batches.get(owner, {}).get(name)
        if batch is None:
            raise ApiError(404, f"there is no batch {name[:100]!r}", param="batch_id", code="not_found")
        return batch

    def cancel(self, salt: bytes, name: str) -> dict[str, Any]:
        """Ask that a batch end; what was answered is kept. ApiError."""
        owner = owner_name(salt)
        with self._lock:
            batch = self._find(owner, name)
            if batch.has_ended or batch.status == "finalizing":
                raise ApiError(409, f"the batch is {batch.status} already", code="invalid_status")
            if batch.status != "cancelling":
                batch.become("cancelling")
                self._save(owner, batch)
            if (owner, name) in self._queue:
                self._queue.remove((owner, name))
                self._finish(owner, batch, "cancelled")
            self._interrupt(name)
            return batch.told()

    def _interrupt(self, name: str | None) -> None:
        """Cancel what the thread does, if it is that batch."""
        if self._cancel is not None and self._current == name:
            loop, task = self._cancel
            with suppress(RuntimeError):  # it has ended in this instant
                loop.call_soon_threadsafe(task.cancel)

    def check_unused(self, salt: bytes, file_id: str) -> None:
        """ApiError where a batch that is not done reads the file."""
        with self._lock:
            mine = self._batches.get(owner_name(salt), {}).values()
            if any(batch.input_file_id == file_id and not batch.has_ended for batch in mine):
                raise ApiError(409, "a batch that is not done reads this file", code="file_in_use")

    # The thread.

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Leave what runs where it is, and return when the thread has ended."""
        with self._lock:
            self._stopping = True
            self._lock.notify_all()
            self._interrupt(self._current)
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._lock:
                while not (self._queue or self._stopping):
                    self._lock.wait()
                if self._stopping:
                    return
                owner, name = self._queue.popleft()
                batch = self._batches[owner][name]
                self._current = name
            try:
                asyncio.run(self._run(owner, batch))
            except Exception as error:  # a full disk, a fault: this batch's affair alone
                console.note(f"batch {name}: {type(error).__name__}: {error}", label="error")
                with suppress(OSError):
                    self._fail(owner, batch, [told_error(None, f"internal error: {type(error).__name__}")])
            finally:
                self._current = None

    async def _run(self, owner: str, batch: Batch) -> None:
        main = asyncio.current_task()
        assert main is not None
        with self._lock:
            self._cancel = (asyncio.get_running_loop(), main)
            if self._stopping:
                return
        try:
            is_whole = await self._answer(owner, batch)
        except asyncio.CancelledError:
            is_whole = False
        except LedgerError as error:
            return self._fail(owner, batch, [told_error(None, str(error).replace(str(self.files.folder), "..."))])
        finally:
            with self._lock:
                self._cancel = None
        if batch.status == "cancelling":
            self._finish(owner, batch, "cancelled")
        elif is_whole and not batch.has_ended:
            with self._lock:
                batch.become("finalizing")
                self._save(owner, batch)
            self._finish(owner, batch, "completed")
        return None

    async def _answer(self, owner: str, batch: Batch) -> bool:
        """Answer all lines that are not answered. False where they never will be, or the engine has stopped."""
        if batch.status in ("cancelling", "finalizing"):
            return batch.status == "finalizing"
        try:
            self.files.find(owner, batch.input_file_id)
            data = await asyncio.to_thread(self.files.path(owner, batch.input_file_id).read_bytes)
        except (ApiError, OSError):
            self._fail(owner, batch, [told_error(None, "the input file is gone")])
            return False
        lines, bad = await asyncio.to_thread(check, numbered(data), [batch.endpoint])
        if bad or not lines or len(lines) > MAX_LINES:
            what = "holds no line" if not lines else f"has more than {MAX_LINES} lines"
            wrong = [told_error(one, str(one)) for one in bad] or [told_error(None, f"the input file {what}")]
            self._fail(owner, batch, wrong)
            return False
        desk = Desk(self._service, hashlib.sha256(owner.encode()).digest(), background=True)
        with self._ledger(owner, batch, data) as ledger:
            left = [line for line in lines if line.id not in ledger.done]
            ordered, refused = await runner.look_over(desk, left)
            with self._lock:
                if batch.status == "validating":
                    batch.become("in_progress")
                    self._save(owner, batch)
            ledger.begin()

            def told() -> None:
                n_failed = ledger.n_failed
                batch.request_counts = Counts(len(lines), len(ledger.done) - n_failed, n_failed)
                self._check_room(owner, ledger)

            told()
            for one in refused:
                ledger.put(runner.response(one, one.error.status, one.error.body()), failed=True)
                told()
            at_once = AHEAD * self._service.engine.limits.parallel
            await runner.run(desk, ordered, ledger, at_once=at_once, told=told)
            return len(ledger.done) == len(lines)

    def _check_room(self, owner: str, ledger: Ledger) -> None:
        """LedgerError where results, which are not among the owner's files yet, have taken the owner's room."""
        if ledger.n_bytes > self.files.bytes_left(owner):
            raise LedgerError("the results and the files that are kept are as much as may be: delete some")

    @contextmanager
    def _ledger(self, owner: str, batch: Batch, data: bytes) -> Iterator[Ledger]:
        origin = {
            "the input": hashlib.sha256(data).hexdigest(),
            "the model": model_identity(self._service.engine.runtime),
            "the batch": batch.id,
        }
        self.files.room(owner)
        out, errors = self._place(owner, batch.id, ".out"), self._place(owner, batch.id, ".errors")
        with Ledger(out, errors, origin) as ledger:
            yield ledger

    def _place(self, owner: str, name: str, suffix: str) -> Path:
        return self.files.folder / owner / (name + suffix)

    def _save(self, owner: str, batch: Batch) -> None:
        self.files.room(owner)
        write_whole(self._place(owner, batch.id, ABOUT), msgspec.json.encode(batch))

    def _fail(self, owner: str, batch: Batch, errors: list[dict[str, Any]]) -> None:
        batch.errors = {"object": "list", "data": errors[:MAX_TOLD]}
        self._finish(owner, batch, "failed")

    def _finish(self, owner: str, batch: Batch, status: str) -> None:
        """Make files of the results. Where that was cut short, it is done again and comes to the same."""
        number = batch.id.removeprefix("batch_")
        for suffix, kind in ((".out", "output"), (".errors", "error")):
            name, place = f"file-{number}-{kind}", self._place(owner, batch.id, suffix)
            if (place.exists() and place.stat().st_size) or self.files.path(owner, name).exists():
                self.files.take(owner, name, place, f"{batch.id}_{kind}.jsonl", f"{PURPOSE}_output")
                setattr(batch, f"{kind}_file_id", name)
            place.unlink(missing_ok=True)
        with self._lock:
            batch.become(status)
            self._save(owner, batch)
        self._place(owner, batch.id, ".out.batch.json").unlink(missing_ok=True)


def told_error(bad: Bad | None, message: str) -> dict[str, Any]:
    """One of a batch's errors."""
    if bad is None:
        return {"code": "invalid_request", "message": message, "param": None, "line": None}
    return {"code": "invalid_line", "message": message, "param": bad.error.param, "line": bad.number}
