"""Files that clients bring for batches, and those that batches leave: in one folder, under names of our own.

A folder a key (by a digest of it), in which ``<id>.data`` is a file and ``<id>.json`` says what it is; the second is
written last and removed first, so that what is listed is whole, and what was brought and is not listed goes. No name
that a client gives is ever part of a path: it is looked up among those that are there. One server at a time has the
folder.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import msgspec
from msgspec import Struct

from cext import system
from dsv2cli.errors import CliError
from dsv2cli.server.errors import ApiError

MAX_COMING = 4  # uploads of a key at once
DATA, ABOUT, PART = ".data", ".json", ".part"
OWNER = re.compile("[0-9a-f]{32}")  # see ``owner_name``
UPLOADED = re.compile(rf"file-[0-9a-f]{{24}}{re.escape(DATA)}")  # a batch's results have longer names


@dataclass(frozen=True)
class Limits:
    """Bytes of one file; files and bytes of each key, what its batches leave included."""

    file_bytes: int = 200 << 20
    key_files: int = 1000
    key_bytes: int = 1 << 30


class Stored(Struct, kw_only=True):
    """A file, as OpenAI's clients hear of it."""

    id: str
    bytes: int
    created_at: int
    filename: str
    purpose: str
    object: str = "file"
    status: str = "processed"
    expires_at: int | None = None
    status_details: str | None = None

    def told(self) -> dict[str, Any]:
        found: dict[str, Any] = msgspec.to_builtins(self)
        return found


def owner_name(salt: bytes) -> str:
    """The folder of a key's files. salt: the key's digest, or b"" where no keys are asked for."""
    return hashlib.sha256(b"dsv2 files" + salt).hexdigest()[:32]


def write_whole(path: Path, data: bytes) -> None:
    """Replace a small file: it is the old or the new one whatever happens."""
    with system.replaced(path, prefix=path.name, suffix=PART) as file:
        file.write(data)


@dataclass
class Upload:
    """A file that is being brought."""

    path: Path
    most: int
    file: IO[bytes]
    n: int = 0

    def write(self, data: bytes) -> None:
        self.n += len(data)
        self.check(self.most)
        self.file.write(data)

    def check(self, most: int) -> None:
        """ApiError where it has more bytes."""
        if self.n > most:
            raise ApiError(413, f"the file is larger than the {most >> 20} MiB that it may have")


@dataclass
class Files:
    """All keys' files. From any thread. Owners are named as ``owner_name`` says."""

    folder: Path
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._files: dict[str, dict[str, Stored]] = {}
        self._n_coming: Counter[str] = Counter()
        for place in self.owners():
            for path in place.iterdir():
                if path.suffix == PART or (UPLOADED.fullmatch(path.name) and not path.with_suffix(ABOUT).exists()):
                    with suppress(OSError):
                        path.unlink()
            for path in sorted(place.glob(f"file-*{ABOUT}")):
                with suppress(OSError, msgspec.MsgspecError):
                    stored = msgspec.json.decode(path.read_bytes(), type=Stored)
                    if stored.id == path.stem and self.path(place.name, stored.id).is_file():
                        self._files.setdefault(place.name, {})[stored.id] = stored

    def owners(self) -> list[Path]:
        """The folders of owners. Whatever else lies in the folder that was named is somebody else's."""
        return [place for place in self.folder.iterdir() if OWNER.fullmatch(place.name) and place.is_dir()]

    def path(self, owner: str, name: str) -> Path:
        """Of a file's content. name: an id that was found, never one that was given."""
        return self.folder / owner / (name + DATA)

    def room(self, owner: str) -> Path:
        """The folder of an owner, made where it is missing."""
        place = self.folder / owner
        place.mkdir(mode=0o700, exist_ok=True)
        return place

    def all(self, owner: str) -> list[Stored]:
        """The newest first."""
        with self._lock:
            found = list(self._files.get(owner, {}).values())
        return sorted(found, key=lambda stored: stored.created_at)[::-1]

    def find(self, owner: str, name: str) -> Stored:
        """ApiError 404."""
        with self._lock:
            stored = self._files.get(owner, {}).get(name)
        if stored is None:
            raise ApiError(404, f"there is no file {name[:100]!r}", param="file_id", code="not_found")
        return stored

    def bytes_left(self, owner: str) -> int:
        """How many more the owner may have; less than 0 where there are too many."""
        with self._lock:
            return self._bytes_left(owner)

    def _bytes_left(self, owner: str) -> int:
        return self.limits.key_bytes - sum(stored.bytes for stored in self._files.get(owner, {}).values())

    def room_left(self, owner: str) -> int:
        """Bytes that one file more may have. ApiError where none may come."""
        with self._lock:
            return self._room_left(owner)

    def _room_left(self, owner: str) -> int:
        n, left = len(self._files.get(owner, {})), self._bytes_left(owner)
        if n >= self.limits.key_files or left <= 0:
            raise ApiError(
                413,
                f"{n} files are kept already, as much as may be: delete some",
                code="storage_limit_exceeded",
            )
        return min(self.limits.file_bytes, left)

    @contextmanager
    def upload(self, owner: str) -> Iterator[Upload]:
        """A place for a file, which is gone afterwards unless ``keep`` took it. ApiError where there is no room."""
        left = self.room_left(owner)
        if (n := self._n_coming[owner]) >= MAX_COMING:
            raise ApiError(429, f"{n} files are being brought already", headers={"Retry-After": "5"})
        path = self.room(owner) / f"{secrets.token_hex(12)}{PART}"
        self._n_coming[owner] += 1
        try:
            with path.open("xb") as file:
                yield Upload(path, left, file)
        finally:
            self._n_coming[owner] -= 1
            path.unlink(missing_ok=True)

    def keep(self, owner: str, upload: Upload, filename: str, purpose: str) -> Stored:
        """Take an upload over. ApiError where others have taken its room in the meantime."""
        upload.file.flush()
        os.fsync(upload.file.fileno())
        with self._lock:
            upload.check(self._room_left(owner))
            name = f"file-{secrets.token_hex(12)}"
            try:
                return self._take(owner, name, upload.path, filename, purpose)
            except BaseException:
                self._remove(owner, name)
                raise

    def take(self, owner: str, name: str, content: Path, filename: str, purpose: str) -> Stored:
        """Take a file in the owner's folder over, by an id of ours; nothing where that was done already."""
        with self._lock:
            return self._take(owner, name, content, filename, purpose)

    def _take(self, owner: str, name: str, content: Path, filename: str, purpose: str) -> Stored:
        target = self.path(owner, name)
        if content.exists():
            content.replace(target)
        stored = Stored(
            id=name,
            bytes=target.stat().st_size,
            created_at=int(time.time()),
            filename=filename or "file.jsonl",
            purpose=purpose,
        )
        write_whole(target.with_name(name + ABOUT), msgspec.json.encode(stored))
        system.sync_folder(target.parent)
        self._files.setdefault(owner, {})[name] = stored
        return stored

    def delete(self, owner: str, name: str) -> None:
        """ApiError 404."""
        self.find(owner, name)
        with self._lock:
            self._files[owner].pop(name, None)
            self._remove(owner, name)

    def _remove(self, owner: str, name: str) -> None:
        place = self.path(owner, name)
        place.with_name(name + ABOUT).unlink(missing_ok=True)
        place.unlink(missing_ok=True)


@contextmanager
def opened(folder: Path | None, limits: Limits) -> Iterator[Files]:
    """The files in a folder, locked for this process; None: in a folder of the server's own, gone with it. CliError."""
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="dsv2-files-") as made:
            yield Files(Path(made), limits)
        return
    with _locked(folder):
        yield Files(folder, limits)


def _locked(folder: Path) -> IO[bytes]:
    """A lock on a folder, made where it is missing, until what is returned is closed. CliError."""
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        lock = (folder / "lock").open("ab")
    except OSError as error:
        raise CliError(f"`{folder}`: {error.strerror or error}", "--files-dir names a folder") from None
    with suppress(OSError):  # a file system without locks
        if not system.try_lock(lock.fileno()):
            lock.close()
            raise CliError(f"`{folder}` is another server's", "each has a folder of its own: --files-dir")
    return lock
