"""shelf.py: the models that are on this machine, and taking one away.

Those of the hub's cache, of the package, and of folders that are named. What is removed is named by its own path or by
its repository, is looked at again before it goes, and no link is followed to get at it.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from dsv2cli import hub
from dsv2cli.errors import CliError, UsageError
from dsv2cli.hub import cache, choice
from dsv2cli.hub.labels import part_of

Kind = Literal["gguf", "checkpoint", "unfinished"]
DEPTH = 2  # folders below a named one that are looked into


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
    for snapshot in sorted((folder / "snapshots").glob("*"), key=lambda p: p.stat().st_mtime, reverse=True):
        if snapshot.is_symlink() or not snapshot.is_dir():
            continue
        files = [f for f in cache.files_of(snapshot) if (snapshot / f.path).exists()]
        for one in choice.models(choice.candidates(files)):
            name = f"{repo}:{one.label.name}" if one.label else repo
            if name not in told and not one.missing:
                told.add(name)
                paths = tuple(snapshot / f.path for f in one.files)
                yield Held(name, "gguf", one.nbytes, paths[0], "cache", paths)
        weights = [f for f in files if f.path.endswith(".safetensors")]
        if weights and repo not in told:
            told.add(repo)
            yield Held(
                repo, "checkpoint", sum(f.nbytes for f in files), snapshot, "cache",
                tuple(snapshot / f.path for f in files),
            )  # fmt: skip
    partial = [p for p in folder.rglob(f"*{cache.PARTIAL}") if p.is_file() and not p.is_symlink()]
    if partial:
        nbytes = sum(p.stat().st_blocks * 512 for p in partial)
        yield Held(repo, "unfinished", nbytes, folder, "cache", tuple(partial))


# Folders.


def in_folder(folder: Path, depth: int = DEPTH) -> Iterator[Held]:
    """GGUFs and checkpoints in a folder and some below it."""
    try:
        names = sorted(folder.iterdir())
    except OSError:
        return
    ggufs: dict[str, list[Path]] = {}
    for path in names:
        if path.is_file() and path.suffix.lower() == ".gguf" and (part := part_of(path.name)) is not None:
            ggufs.setdefault(part.whole, []).append(path)
    for parts in ggufs.values():
        nbytes = sum(path.stat().st_size for path in parts)
        yield Held(str(parts[0]), "gguf", nbytes, parts[0], "folder", tuple(parts))
    weights = [path for path in names if path.suffix == ".safetensors" and path.is_file()]
    if weights and (folder / "config.json").is_file():
        files = _of_checkpoint(folder)
        yield Held(str(folder), "checkpoint", sum(p.stat().st_size for p in files), folder, "folder", files)
    for path in names if depth else []:
        if path.is_dir() and not path.is_symlink() and not path.name.startswith("."):
            yield from in_folder(path, depth - 1)


def _of_checkpoint(folder: Path) -> tuple[Path, ...]:
    from quantize.source.files import is_companion

    names = (path for path in folder.iterdir() if path.is_file())
    return tuple(sorted(p for p in names if p.suffix == ".safetensors" or is_companion(p.name)))


# Taking away.


def find(name: str) -> list[Held]:
    """What a name that a person gave means here, to be removed whole. CliError, UsageError where it is nothing, or no
    model."""
    from dsv2cli.locate import PACKAGED, expanded

    path = expanded(name)
    if path.exists() or path.is_symlink():
        return [_named_path(name, path, PACKAGED)]
    reference = hub.resolve(name)
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
        _beside(path)
    if held.kind == "checkpoint":
        shutil.rmtree(held.path / ".cache" / "huggingface", ignore_errors=True)
        for folder in (held.path / ".cache", held.path):
            if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
                folder.rmdir()
    return freed


def _beside(path: Path) -> None:
    """The report that dsv2 quantize wrote of a file."""
    path.with_name(f"{path.name}.report.json").unlink(missing_ok=True)


def _remove_cached(held: Held) -> int:
    """Names in snapshots, then the blobs that no snapshot names any more; the repository's folder where that is all."""
    folder = _repository(held)
    freed = 0
    blobs = {path.resolve() for path in held.files if path.is_symlink()}
    for path in held.files:
        freed += 0 if path.is_symlink() else path.stat().st_size
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
