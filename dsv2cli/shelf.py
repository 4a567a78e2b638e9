"""shelf.py: the models that are on this machine, and taking one away.

Those of the hub's cache, of the package, and of folders that are named. What is removed is named by its own path or by
its repository, is looked at again before it goes, and no link is followed to get at it.
"""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from dsv2cli import hub
from dsv2cli.errors import CliError, UsageError
from dsv2cli.hub import cache, choice
from dsv2cli.hub.labels import part_of

Kind = Literal["gguf", "checkpoint", "unfinished"]
DEPTH = 2  # folders below a named one that are looked into

# Of a checkpoint in a folder, beside its weights. A folder may be a person's own: what only might be the checkpoint's
# (README.md, another .json) stays, unless it is recorded as downloaded.
_OWN = re.compile(
    r"(?:config|generation_config|configuration|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab"
    r"|chat_template|model\.safetensors\.index)\.json"
    r"|chat_template\.jinja|additional_chat_templates/[^/]+\.jinja|merges\.txt|vocab\.txt|tokenizer\.model|[^/]+\.tiktoken|tiktoken\.model"
)
_CLIENTS = frozenset({".gitignore", "CACHEDIR.TAG"})  # the hub's client's, beside its records


@dataclass(frozen=True)
class Held:
    """A model here. name: what the other commands take. files: its own, and nobody else's."""

    name: str
    kind: Kind
    nbytes: int
    path: Path
    where: Literal["cache", "package", "folder"]
    files: tuple[Path, ...] = field(repr=False, default=())


def every(folders: Iterable[Path]) -> list[Held]:
    """All there are, by name."""
    from dsv2cli.locate import PACKAGED

    found = [*_packaged(PACKAGED), *cached()]
    seen = {held.path.resolve() for held in found}
    for folder in folders:
        found += [held for held in in_folder(folder) if held.path.resolve() not in seen]
    return found


def _packaged(folder: Path) -> Iterator[Held]:
    for path in sorted(folder.glob("*.gguf")):
        yield Held(path.stem, "gguf", path.stat().st_size, path, "package", (path,))


# The hub's cache.


def cached() -> list[Held]:
    """What the cache holds: each GGUF of a repository, its checkpoint, and what is unfinished."""
    root = cache.cache_root()
    found: list[Held] = []
    for folder in sorted(root.glob("models--*")) if root.is_dir() else []:
        if folder.is_symlink() or not folder.is_dir():
            continue
        repo = folder.name.removeprefix("models--").replace("--", "/", 1)
        found += _of_repository(repo, folder)
    return found


def _of_repository(repo: str, folder: Path) -> Iterator[Held]:
    told: set[str] = set()
    snapshots = _snapshots(folder)
    for snapshot in snapshots:
        files = [f for f in cache.files_of(snapshot) if (snapshot / f.path).exists()]
        for one in choice.models(choice.candidates(files)):
            name = f"{repo}:{one.label.name}" if one.label else repo
            if name not in told and not one.missing:
                told.add(name)
                paths = _in_all(snapshots, [f.path for f in one.files])
                yield Held(name, "gguf", one.nbytes, snapshot / one.files[0].path, "cache", paths)
        weights = [f for f in files if f.path.endswith(".safetensors")]
        if weights and repo not in told:
            told.add(repo)
            mine = [f for f in files if not f.path.endswith(".gguf")]
            paths = _in_all(snapshots, [f.path for f in mine])
            yield Held(repo, "checkpoint", sum(f.nbytes for f in mine), snapshot, "cache", paths)
    partial: dict[Path, int] = {}
    for path in folder.rglob(f"*{cache.PARTIAL}"):
        if path.is_file() and not path.is_symlink():
            with suppress(OSError):  # finished meanwhile
                partial[path] = path.stat().st_blocks * 512
    if partial:
        yield Held(repo, "unfinished", sum(partial.values()), folder, "cache", tuple(partial))


def _snapshots(folder: Path) -> list[Path]:
    """A repository's, the newest first."""
    found = []
    for path in (folder / "snapshots").glob("*"):
        with suppress(OSError):
            if not path.is_symlink() and path.is_dir():
                found.append((path.stat().st_mtime, path))
    return [path for _, path in sorted(found, reverse=True)]


def _in_all(snapshots: list[Path], names: list[str]) -> tuple[Path, ...]:
    """Files of these names in every snapshot: an older one would come to light once the newest is gone."""
    return tuple(s / name for s in snapshots for name in names if os.path.lexists(s / name))


# Folders.


def in_folder(folder: Path, depth: int = DEPTH) -> Iterator[Held]:
    """GGUFs and checkpoints in a folder and some below it."""
    try:
        names = sorted(folder.iterdir())
        files = [path for path in names if path.is_file()]
    except OSError:  # listed, say, and not entered
        return
    ggufs: dict[tuple[str, int, bool, bool], list[Path]] = {}
    for path in files:
        if path.suffix.lower() == ".gguf" and (part := part_of(path.name)) is not None:
            # m.gguf, m-00001-of-00002.gguf and m-00001-of-00003.gguf are of three files, each whole by itself.
            ggufs.setdefault((part.whole, part.count, part.raw, part.whole == path.name), []).append(path)
    for parts in ggufs.values():
        nbytes = sum(path.stat().st_size for path in parts)
        yield Held(str(parts[0]), "gguf", nbytes, parts[0], "folder", tuple(parts))
    if own := _of_checkpoint(folder, {path.name for path in files}):
        yield Held(str(folder), "checkpoint", sum(p.stat().st_size for p in own), folder, "folder", own)
    for path in names if depth else []:
        if path.is_dir() and not path.is_symlink() and not path.name.startswith("."):
            yield from in_folder(path, depth - 1)


def _of_checkpoint(folder: Path, names: set[str]) -> tuple[Path, ...]:
    """Of a folder's files: the weights, what has transformers' names, what came with them; none where it is none."""
    from quantize.source.files import CONFIG, INDEX, TEMPLATES, is_companion, weights

    shards = _shards(folder / INDEX) & names or set(weights(names))
    if CONFIG not in names or not shards:
        return ()
    templates = folder / TEMPLATES
    with suppress(OSError):  # there is none, as a rule
        if not templates.is_symlink():
            names = names | {f"{TEMPLATES}/{path.name}" for path in templates.iterdir() if path.is_file()}
    return tuple(
        folder / name
        for name in sorted(names)
        if name in shards or _OWN.fullmatch(name) or (is_companion(name) and _is_downloaded(folder, name))
    )


def _shards(index: Path) -> set[str]:
    """The safetensors files that an index names; none where there is no index that can be read."""
    try:
        named = {str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return set()
    return {name for name in named if name.endswith(".safetensors")}


def _is_downloaded(folder: Path, name: str) -> bool:
    """Whether the hub's client recorded a file, and nobody wrote to it since."""
    try:
        _, _, when = cache.record(folder, f"{name}.metadata").read_text(encoding="utf-8").split()
        return (folder / name).stat().st_mtime - 1 <= float(when)
    except (OSError, ValueError):
        return False


# Taking away.


def find(name: str) -> list[Held]:
    """What a name that a person gave means here, to be removed whole. CliError, UsageError where it is nothing, or no
    model."""
    from dsv2cli.locate import PACKAGED, expanded

    path = expanded(name)
    if path.exists() or path.is_symlink():
        return [_named_path(name, path, PACKAGED)]
    for held in _packaged(PACKAGED):
        if held.name == name:
            return [_named_path(name, held.path, PACKAGED)]
    try:
        reference = hub.resolve(name)
    except UsageError as error:  # its hints are what could be downloaded
        raise UsageError(f"`{name}` is nothing that is here", "dsv2 list shows what is") from error
    if reference.glob or reference.revision or name.strip().lower().endswith(":latest"):
        raise UsageError(
            f"`{name}` names a part of a repository",
            f"{reference.repo}:TYPE names one of its types, {reference.repo} all that is here of it",
        )
    mine = [held for held in cached() if held.name.partition(":")[0] == reference.repo]
    if reference.gguf_type:
        wanted = reference.gguf_type.upper()
        mine = [held for held in mine if held.name.partition(":")[2].upper() == wanted]
    if not mine:
        raise CliError(f"{reference} is not in the hub's cache", "dsv2 list shows what is here")
    return mine


def _named_path(name: str, path: Path, packaged: Path) -> Held:
    if path.is_symlink():
        raise UsageError(f"`{name}` is a link", f"name what it leads to, {path.resolve()}, or remove it by rm")
    if path.resolve().parent == packaged.resolve():
        raise UsageError(f"`{name}` is the package's own model", "pip uninstall dsv2 removes it with the package")
    if cache.cache_root().resolve() in path.resolve().parents:
        raise UsageError(f"`{name}` is in the hub's cache", "name its repository: dsv2 list shows it")
    if path.is_file() and path.suffix.lower() == ".gguf":
        part = part_of(path.name)
        among = [h for h in in_folder(path.parent, 0) if h.kind == "gguf" and path in h.files]
        if part is not None and among:
            return among[0]
    elif path.is_dir():
        found = [held for held in in_folder(path, 0) if held.kind == "checkpoint"]
        if found:
            return found[0]
    raise UsageError(f"`{name}` is no model", "dsv2 rm takes a GGUF, a checkpoint's folder, or a repository's name")


def remove(held: Held) -> int:
    """Take a model away; bytes that the disk has more. OSError where it cannot be done."""
    if held.where == "cache":
        return _remove_cached(held)
    freed = 0
    for path in held.files:
        freed += path.stat().st_size
        path.unlink()
        if held.kind == "gguf":
            _beside(path)
    if held.kind == "checkpoint":
        _remove_records(held)
        for folder in {path.parent for path in held.files} - {held.path}:
            with suppress(OSError):
                folder.rmdir()
        with suppress(OSError):  # it holds more, or it is the working folder
            held.path.rmdir()
    return freed


def _remove_records(held: Held) -> None:
    """What the hub's client noted of the files that went. Beside its records may be a person's whole cache and token,
    where the folder is a home: nothing else goes, and no link is followed."""
    records = cache.record(held.path, "")
    client = records.parent
    if any(folder.is_symlink() for folder in (client.parent, client, records)):
        return
    for name in (path.relative_to(held.path) for path in held.files):
        place = records / name.parent
        if place != records and place.is_symlink():
            continue
        for ending in (".metadata", ".lock", f".*{cache.PARTIAL}"):
            for record in list(place.glob(glob.escape(name.name) + ending)):
                record.unlink(missing_ok=True)
        if place != records:
            with suppress(OSError):
                place.rmdir()
    with suppress(OSError):
        records.rmdir()
        if {path.name for path in client.iterdir()} <= _CLIENTS:
            for path in client.iterdir():
                path.unlink()
            client.rmdir()
            client.parent.rmdir()


def _beside(path: Path) -> None:
    """The report that dsv2 quantize wrote of a file."""
    path.with_name(f"{path.name}.report.json").unlink(missing_ok=True)


def _remove_cached(held: Held) -> int:
    """Names in snapshots, then the blobs that no snapshot names any more; the repository's folder where that is all."""
    folder = _repository(held)
    freed = 0
    blobs = {path.resolve() for path in held.files if path.is_symlink()}
    for path in held.files:
        freed += path.lstat().st_size if path.is_file() and not path.is_symlink() else 0
        path.unlink(missing_ok=True)
    named = {path.resolve() for path in (folder / "snapshots").rglob("*") if path.is_symlink()}
    inside = (folder / "blobs").resolve()
    for blob in blobs - named:
        if blob.parent == inside and blob.is_file():
            freed += blob.stat().st_size
            blob.unlink()
    left = [p for p in folder.rglob("*") if p.is_file() or p.is_symlink()]
    if not [p for p in left if p.relative_to(folder).parts[0] not in ("refs", ".no_exist")]:
        shutil.rmtree(folder)
    return freed


def _repository(held: Held) -> Path:
    """Its folder in the cache, which it must lie in. CliError."""
    root = cache.cache_root()
    folder = cache.cache_folder(held.name.partition(":")[0])
    if folder.parent != root or folder.is_symlink() or not all(folder in path.parents for path in held.files):
        raise CliError(f"`{held.path}` is not where the hub's cache has {held.name}", "remove it by hand")
    return folder
