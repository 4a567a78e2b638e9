"""Where conversations lie: a folder of this user alone, NAME.jsonl for each and, for reopening it quickly, NAME.cache.

The text and the ids in the first are the truth. A cache may be missing, old or damaged: it is a copy of work, and what
it lacks is read again. All caches together keep within CACHES_BYTES; the one used longest ago goes first.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from cext.system import free_disk
from dsv2cli import state
from dsv2cli.chat.journal import JournalError, Model, beginning, read
from dsv2cli.errors import CliError, UsageError

SUFFIX, CACHE = ".jsonl", ".cache"
CACHES_BYTES = 4_000_000_000
LEFT_FREE = 1_000_000_000  # bytes of the disk that no cache takes
NAME = re.compile(r"\w[\w.+-]{0,99}")
ABANDONED = 3600  # seconds after which an unfinished file is nobody's
SAMPLES, SAMPLE_BYTES = 16, 4096


def folder() -> Path | None:
    """Where this user's conversations lie; None where this user has no home."""
    place = state.folder()
    return None if place is None else place / "conversations"


def made_folder() -> Path:
    """The folder, made where it is missing. CliError, OSError."""
    place = folder()
    if place is None:
        raise CliError("there is no home to keep conversations in", "XDG_STATE_HOME names a folder for them")
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    return place


def names() -> list[str]:
    """Of all conversations, the one that was gone on with last first."""
    found: list[tuple[float, str]] = []
    place = folder()
    with contextlib.suppress(OSError):
        for path in place.glob(f"*{SUFFIX}") if place is not None else ():
            name = path.name.removesuffix(SUFFIX)
            if NAME.fullmatch(name):
                with contextlib.suppress(OSError):
                    found.append((path.stat().st_mtime, name))
    return [name for _, name in sorted(found, reverse=True)]


def path_of(name: str) -> Path:
    """The file of a conversation that is, or is to be, called ``name``. UsageError, CliError, OSError."""
    if not NAME.fullmatch(name):
        raise UsageError(
            f"`{name}` is no name: letters, digits, and - _ . + after the first", "such as: a-trip-to-rome"
        )
    return made_folder() / f"{name}{SUFFIX}"


def existing(name: str) -> Path:
    """The file of a conversation that is there. UsageError, CliError, OSError."""
    path = path_of(name)
    if not path.is_file():
        others = names()
        hint = f"there are: {', '.join(others[:6])}{', ...' if len(others) > 6 else ''}" if others else ""
        raise UsageError(f"there is no conversation `{name}`", hint)
    return path


def latest() -> str:
    """The name of the conversation that was gone on with last. UsageError where there is none."""
    for name in names():
        return name
    raise UsageError("there is no conversation to go on with", "dsv2 chat begins one")


def model_of(name: str) -> Model | None:
    """Whom a conversation is with; None where its file cannot be read. JournalError."""
    with contextlib.suppress(OSError):
        return read(existing(name)).model
    return None


def model_path(name: str) -> Path | None:
    """Where the model of a conversation lies; None where it is there no more, or a server's."""
    model = model_of(name)
    if model is None or model.is_server:
        return None
    path = Path(model.path)
    with contextlib.suppress(OSError, ValueError):
        return path if path.is_file() else None
    return None


@dataclass(frozen=True)
class Summary:
    """A line of a list. when: day and hour, local; begins: the first message."""

    name: str
    when: str
    model: str
    begins: str


def summaries() -> list[Summary]:
    """Of all conversations that can be read, the one that was gone on with last first."""
    found = []
    for name in names():
        with contextlib.suppress(OSError, CliError):
            path = existing(name)
            model, begins = beginning(path)
            when = time.strftime("%Y-%m-%d %H:%M", time.localtime(path.stat().st_mtime))
            found.append(Summary(name, when, model.name, begins))
    return found


def free_name() -> str:
    """A name for a conversation that has none yet: when it began. CliError, OSError."""
    name = time.strftime("%Y-%m-%d-%H%M%S")
    place = made_folder()
    every = (name, *(f"{name}-{i}" for i in range(2, 1000)))
    return next(n for n in every if not os.path.lexists(place / f"{n}{SUFFIX}"))


def identity(path: Path) -> str:
    """What tells a model's file from others, wherever it lies: its size, its beginning, and samples of the rest."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        whole = blake2b(size.to_bytes(8, "little"), digest_size=32)
        for i in range(SAMPLES):
            file.seek(i * max(size - SAMPLE_BYTES, 0) // (SAMPLES - 1))
            whole.update(file.read(SAMPLE_BYTES))
    return whole.hexdigest()


def check_model(path: Path, wanted: Model, opened: Path) -> None:
    """JournalError unless the conversation at ``path`` is of the model's file that is open."""
    name = path.name.removesuffix(SUFFIX)
    if wanted.is_server:
        raise JournalError(f"`{path}` is a conversation with a server, {wanted.path}", f"dsv2 chat -r {name}")
    if wanted.identity != identity(opened):
        raise JournalError(
            f"`{path}` is a conversation with another model, {wanted.name}",
            f"dsv2 chat '{wanted.path}' -r {name}",
        )


# Caches.


def cache_of(path: Path) -> Path:
    """Beside a conversation's file."""
    return path.with_name(path.name.removesuffix(SUFFIX) + CACHE)


def why_no_room(path: Path, nbytes: int) -> str:
    """Why a cache of so many bytes is not to be kept at ``path``; "" where it may be."""
    if nbytes > CACHES_BYTES:
        return f"it is larger than all caches together may be, {CACHES_BYTES / 1e9:.0f} GB"
    there = path.stat().st_size if path.exists() else 0
    if free_disk(path.parent) + there < nbytes + LEFT_FREE:
        return "the disk is nearly full"
    return ""


def prune(newest: Path) -> None:
    """Keep the caches within their bound, the one written last first; what was never finished goes."""
    found: list[tuple[float, int, Path]] = []
    for path in newest.parent.iterdir():
        with contextlib.suppress(OSError):
            about = path.stat()
            if path.suffix == CACHE and not path.name.startswith("."):
                found.append((about.st_mtime, about.st_size, path))
            elif (
                path.name.startswith(".")
                and (CACHE in path.name or SUFFIX in path.name)
                and time.time() - about.st_mtime > ABANDONED
            ):
                path.unlink()
    left = CACHES_BYTES
    for _, size, path in sorted(found, key=lambda each: (each[2] == newest, each[0]), reverse=True):
        left -= size
        if left < 0:
            with contextlib.suppress(OSError):
                path.unlink()
