"""The MODEL argument: a path, an alias, a repository in the cache, or nothing for the model in the package."""

from __future__ import annotations

from pathlib import Path

from dsv2cli import hub
from dsv2cli.errors import CliError, UsageError

PACKAGED = Path(__file__).parent / "models"


def model(name: str | None) -> Path:
    """The GGUF that MODEL means. UsageError or CliError where there is none, or more than one."""
    if name is None:
        return _one(sorted(PACKAGED.glob("*.gguf")), "this installation ships no model", "give the path of a GGUF file")
    path = Path(name).expanduser()
    if path.is_file():
        return _checked(path)
    if path.is_dir():
        return _in_folder(path)
    if path.suffix == ".gguf" or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise CliError(f"`{name}`: no such file", "")
    return _by_name(name)


def checkpoint(name: str) -> Path:
    """The folder of safetensors that SRC means: a path, or an alias or repository that was downloaded."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        if path.suffix in (".safetensors", ".json"):
            return path.parent
        raise UsageError(f"`{name}` is no checkpoint", "SRC is a folder with config.json and *.safetensors")
    repo = hub.resolve(name)
    folder = hub.snapshot(repo)
    if folder is None or not (folder / "config.json").is_file():
        raise CliError(f"{repo} is not on this machine", f"dsv2 download {name}")
    return folder


def _checked(path: Path) -> Path:
    if path.suffix in (".safetensors", ".bin", ".json"):
        raise UsageError(f"`{path}` is part of a checkpoint, not a GGUF", f"dsv2 quantize {path.parent} makes one")
    return path


def _in_folder(folder: Path) -> Path:
    found = sorted(folder.glob("*.gguf"))
    if not found and any(folder.glob("*.safetensors")):
        raise UsageError(f"`{folder}` is a checkpoint, not a GGUF", f"dsv2 quantize {folder} makes one")
    return _one(found, f"`{folder}` holds no GGUF file", "give the path of one")


def _by_name(name: str) -> Path:
    """A GGUF of an alias or repository: made here by ``dsv2 quantize`` (in this folder), or downloaded."""
    try:
        repo = hub.resolve(name)
    except UsageError as error:
        raise UsageError(f"`{name}` is no file, no alias and no owner/name", error.hint) from error
    stem = repo.split("/")[1]
    folder = hub.snapshot(repo)
    here = [p for p in sorted(Path.cwd().glob(f"{stem}-*.gguf")) if hub.GGUF_TYPE.fullmatch(p.stem.removeprefix(stem))]
    found = here + (sorted(folder.rglob("*.gguf")) if folder else [])
    downloaded = folder is not None and any(folder.glob("*.safetensors"))
    steps = f"dsv2 quantize {name}" if downloaded else f"dsv2 download {name}, then dsv2 quantize {name}"
    return _one(found, f"no GGUF of {repo} here", steps)


def _one(found: list[Path], none: str, hint: str) -> Path:
    """The only model found. A split one is opened by its first part."""
    found = [path for path in found if not (split := hub.GGUF_SPLIT.search(path.stem)) or int(split[1]) == 1]
    if not found:
        raise CliError(none, hint)
    if len(found) > 1:
        names = ", ".join(f"`{path.name}`" for path in found[:6])
        raise UsageError(f"{len(found)} GGUF files to choose from: {names}", "give the path of the one you mean")
    return found[0]
