"""cache.py: where a model's files are and go: the hub client's shared cache, or a folder of one's own.

The cache keeps the client's layout (blobs by hash, a snapshot of links for each commit), so other programs find the
files. HF_HOME and HF_HUB_CACHE move it.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from dsv2cli.console import format_bytes
from dsv2cli.errors import CliError
from dsv2cli.hub import client
from dsv2cli.hub.listing import Listing, Plan, RemoteFile

COMMIT = re.compile(r"[0-9a-f]{40}")
SHA256_DIGITS = 64
HASH = re.compile(rf"[0-9a-f]{{40}}|[0-9a-f]{{{SHA256_DIGITS}}}")
PARTIAL = ".incomplete"
ONLINE_HINT = "unset HF_HUB_OFFLINE and run this again with a network"
SPARE_BYTES = 64 << 20  # left free on a disk: metadata, and whatever else is being written


@dataclass(frozen=True)
class Target:
    """Where one file of a plan goes, and where its bytes wait until they are complete and verified."""

    file: RemoteFile
    final: Path
    partial: Path
    link: Path | None = None  # in the cache: the snapshot's name for the blob
    note: Path | None = None  # in a folder of its own: the hub client's record of the file: commit, etag, time
    joined: Joined | None = None  # a raw piece of that
    end: int = 0  # where in it the piece ends

    @property
    def present_bytes(self) -> int:
        """Bytes on disk already; nbytes where the file is complete under its final name, or joined to others."""
        if self.is_complete():
            return self.file.nbytes
        return min(self.partial.stat().st_size, self.file.nbytes) if self.partial.is_file() else 0

    def is_joined(self) -> bool:
        return self.joined is not None and self.joined.taken_bytes >= self.end

    def is_complete(self) -> bool:
        if self.is_joined():
            return True
        if not self.final.is_file() or self.final.stat().st_size != self.file.nbytes:
            return False
        return self.note is None or self._recorded_etag() == self.file.etag

    def _recorded_etag(self) -> str | None:
        try:
            _, etag, when = str(self.note and self.note.read_text(encoding="utf-8")).split()
            return etag if self.final.stat().st_mtime - 1 <= float(when) else None
        except (OSError, ValueError):
            return None


@dataclass(frozen=True)
class Joined:
    """The file that raw pieces make, one after the other."""

    final: Path
    partial: Path
    nbytes: int
    pieces: str  # which they are: a hash of theirs
    note: Path | None = None  # in a folder of its own, where the final file may be of another revision: whose it is

    @property
    def taken_bytes(self) -> int:
        """How much of it is there; what follows the last whole piece of that is not to be relied on."""
        if self.final.is_file() and self.final.stat().st_size == self.nbytes:
            try:
                if self.note is None or self.note.read_text(encoding="utf-8") == self.pieces:
                    return self.nbytes
            except (OSError, ValueError):
                pass
        return self.partial.stat().st_size if self.partial.is_file() else 0


def cache_root() -> Path:
    """The shared cache's folder. CliError where there is no telling it."""
    root = Path(client.constants().HF_HUB_CACHE)
    if str(root).startswith("~"):
        raise CliError("there is no home folder to keep the hub's cache in", "set HOME, or HF_HOME to a folder")
    return root


def cache_folder(repo: str) -> Path:
    return cache_root() / f"models--{repo.replace('/', '--')}"


def snapshot(repo: str, revision: str = "main") -> Path | None:
    """The cached folder of a revision, complete or not; None where there is none."""
    folder = cache_folder(repo)
    commit = revision
    if not COMMIT.fullmatch(revision):
        ref = folder / "refs" / revision
        if not ref.is_file():
            return None
        commit = ref.read_text(encoding="utf-8").strip()
    found = folder / "snapshots" / commit
    return found if found.is_dir() else None


def listing(repo: str, revision: str) -> Listing:
    """What the cache has of a repository, without asking the hub. CliError."""
    folder = snapshot(repo, revision)
    if folder is None:
        raise CliError(
            f"{repo} ({revision}) is not in the cache, and HF_HUB_OFFLINE forbids asking the hub", ONLINE_HINT
        )
    return Listing(repo, revision, folder.name, tuple(files_of(folder)), offline=True)


def files_of(folder: Path) -> list[RemoteFile]:
    """What a snapshot holds, under the names that the hub lists."""
    return [_cached_file(folder, p) for p in sorted(folder.rglob("*")) if p.is_file() and p.suffix != PARTIAL]


def _cached_file(folder: Path, path: Path) -> RemoteFile:
    """A file of a snapshot, whose blob is named by its hash; no etag, and no check, where the cache has no links."""
    blob = path.resolve().name
    etag = blob if HASH.fullmatch(blob) else ""
    return RemoteFile(path.relative_to(folder).as_posix(), path.stat().st_size, etag, sha256=len(etag) == SHA256_DIGITS)


def targets(plan: Plan, to: Path | None) -> list[Target]:
    """Where the plan's files go: the shared cache, or the folder ``to`` with a .cache of its own, as the client."""
    joined = _joined(plan, to) if plan.joined else None
    made = []
    for file, end in zip(plan.files, accumulate(f.nbytes for f in plan.files), strict=True):
        if to is None:
            blob = cache_folder(plan.repo) / "blobs" / file.etag
            link = None if joined else location_root(plan, to) / file.path
            made.append(Target(file, blob, blob.with_name(f"{file.etag}{PARTIAL}"), link, joined=joined, end=end))
        else:
            kept = record(to, file.path)
            partial = kept.with_name(f"{kept.name}.{file.etag}{PARTIAL}")
            note = kept.with_name(f"{kept.name}.metadata")
            made.append(Target(file, to / file.path, partial, note=note, joined=joined, end=end))
    return made


def _joined(plan: Plan, to: Path | None) -> Joined:
    whole = str(plan.joined)
    final = location_root(plan, to) / whole
    pieces = hashlib.sha256(" ".join(f.etag for f in plan.files).encode()).hexdigest()
    if to is None:
        return Joined(final, final.with_name(f"{final.name}{PARTIAL}"), plan.nbytes, pieces)
    kept = record(to, whole)
    partial = kept.with_name(f"{kept.name}.{pieces}{PARTIAL}")
    return Joined(final, partial, plan.nbytes, pieces, kept.with_name(f"{kept.name}.pieces"))


def record(to: Path, path: str) -> Path:
    """Where the hub's client keeps what it knows of a file in a folder of its own, but for the ending."""
    return to / ".cache" / "huggingface" / "download" / path


def location_root(plan: Plan, to: Path | None) -> Path:
    return to if to is not None else cache_folder(plan.repo) / "snapshots" / plan.commit


def location(plan: Plan, to: Path | None) -> Path:
    """What to give to the other commands: the checkpoint's folder, or the (first) GGUF file."""
    root = location_root(plan, to)
    return root if plan.kind == "safetensors" else root / (plan.joined or plan.files[0].path)


def free_bytes(path: Path) -> int:
    """Free space where ``path`` is or will be."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def check_disk(where: Path, needed: int) -> None:
    """CliError unless ``needed`` bytes (and a little) are free."""
    free = free_bytes(where)
    if needed and needed + SPARE_BYTES > free:
        raise CliError(
            f"{format_bytes(needed)} to download, and the disk of `{where}` has {format_bytes(free)} free",
            "--to DIR puts the files on another disk; HF_HOME moves the whole cache",
        )
