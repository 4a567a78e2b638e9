"""The MODEL argument: a path, an alias, a repository in the cache, or nothing for the model in the package."""

from __future__ import annotations

import re
from pathlib import Path

from dsv2cli import hub
from dsv2cli.errors import CliError, UsageError
from dsv2cli.hub import cache, choice
from dsv2cli.hub.labels import made_as, normal, part_of
from dsv2cli.hub.names import Reference, is_path
from dsv2cli.text import kind_of

PACKAGED = Path(__file__).parent / "models"
SHOWN_FILES = 6
SRC_HINT = "SRC is a folder with config.json and *.safetensors, or a GGUF in BF16, F16 or F32"
# What a GGUF's name ends in after the model's: its type, and which part it is.
_TYPE_AND_PART = re.compile(r"(?:[-._](?:bf16|f16|fp16|f32|fp32|q8_0))?(?:-\d{5}-of-\d{5})?\.gguf$", re.IGNORECASE)


def model(name: str | None) -> Path:
    """The GGUF that MODEL means. UsageError or CliError where there is none, or more than one."""
    if name is None:
        found = sorted(PACKAGED.glob("*.gguf"))
        if not found:
            raise CliError("this installation ships no model", "give the path of a GGUF file")
        return found[0]
    if not name.strip():
        raise UsageError("the model's name is empty", "leave it out for the small model in the package")
    path = expanded(name)
    if path.is_file():
        return _checked(path)
    if path.is_dir():
        return _in_folder(path)
    if kind := kind_of(path):
        raise UsageError(f"`{name}` is {kind}, not a GGUF file", "weights are read in place, which takes a file")
    if is_path(name):
        raise CliError(f"`{name}`: no such file or folder", "")
    return _by_name(name)


def checkpoint(name: str) -> Path:
    """What SRC means: a folder of safetensors or a GGUF, as a path, or an alias or repository that was downloaded."""
    path = expanded(name)
    if name.strip() and path.is_dir():
        is_gguf = not (path / "config.json").exists() and not any(path.glob("*.safetensors"))
        return _in_folder(path) if is_gguf and any(path.glob("*.gguf")) else path
    if path.is_file():
        if path.suffix == ".gguf":
            return _checked(path)
        if path.suffix in (".safetensors", ".json"):
            return path.parent
        raise UsageError(f"`{name}` is no checkpoint", SRC_HINT)
    if name.strip() and (kind := kind_of(path)):
        raise UsageError(f"`{name}` is {kind}, not a checkpoint", SRC_HINT)
    reference = hub.resolve(name)
    folder = cache.snapshot(reference.repo, reference.revision or "main")
    if folder is not None and (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
        return folder
    if folder is not None and any(folder.rglob("*.gguf")):
        return _by_name(name)
    raise CliError(f"{reference.repo} is not on this machine", f"dsv2 download {name}")


def model_name(source: str, folder: Path) -> str:
    """What a checkpoint is called: its repository's name, or its folder's where it has none. A GGUF: its file's name,
    less the type.
    """
    if folder.suffix == ".gguf" and folder.is_file():
        return _TYPE_AND_PART.sub("", folder.name)
    snapshot = re.fullmatch(r"models--.+?--(.+)", folder.resolve().parent.parent.name)
    if snapshot and folder.resolve().parent.name == "snapshots":  # whose own name is a commit's
        return snapshot[1]
    if not expanded(source).exists():
        return hub.resolve(source).stem
    return folder.resolve().name


def expanded(name: str) -> Path:
    """A path with its ~ read as the home folder, where there is one."""
    path = Path(name)
    try:
        return path.expanduser()
    except RuntimeError:
        return path


def _checked(path: Path) -> Path:
    if path.suffix in (".safetensors", ".bin", ".json"):
        raise UsageError(f"`{path}` is part of a checkpoint, not a GGUF", f"dsv2 quantize {path.parent} makes one")
    part = part_of(path.name)
    if part is not None and part.raw:
        pieces = f"{path.name[: -len(path.name.rpartition('.')[2])]}*" if part.count == 0 else f"{part.whole}.part*"
        raise UsageError(
            f"`{path}` is a piece of a GGUF, which has to be joined to the others first",
            f"in its folder: cat {pieces} > {part.whole} (in the order of their numbers)",
        )
    return path


def _in_folder(folder: Path) -> Path:
    found = _wholes(sorted(folder.glob("*.gguf")))
    if not found and any(folder.glob("*.safetensors")):
        raise UsageError(f"`{folder}` is a checkpoint, not a GGUF", f"dsv2 quantize {folder} makes one")
    if not found:
        raise CliError(f"`{folder}` holds no GGUF file", "give the path of one")
    if len(found) > 1:
        raise UsageError(
            f"`{folder}` holds {len(found)} GGUF files to choose from: {_names(found)}", f"give one: {found[0]}"
        )
    return found[0]


def _by_name(name: str) -> Path:
    """A GGUF of an alias or repository: made here by ``dsv2 quantize`` (in this folder), or downloaded."""
    try:
        reference = hub.resolve(name)
    except UsageError as error:
        told = str(error) if "://" in name else f"`{name}` is no file, no alias and no owner/name"
        raise UsageError(told, error.hint) from error
    found = _made_here(reference) + _downloaded(reference)
    if not found:
        raise CliError(f"no GGUF of {reference} here", _how_to_get(name, reference))
    if len(found) > 1:
        base = name.removesuffix(f":{reference.gguf_type}")
        types = [label for path in found if (label := _type_of(reference, path))]
        hint = f"{base}:{types[0]} means one of them" if not reference.gguf_type and types else f"give one: {found[0]}"
        raise UsageError(f"{len(found)} GGUF files of {reference} to choose from: {_names(found)}", hint)
    return found[0]


def _made_here(reference: Reference) -> list[Path]:
    made = [(path, made_as(reference.stem, path.name)) for path in sorted(Path.cwd().glob("*.gguf"))]
    wanted = normal(reference.gguf_type) if reference.gguf_type else None
    return [path for path, what in made if what is not None and wanted in (None, normal(what))]


def _downloaded(reference: Reference) -> list[Path]:
    folder = cache.snapshot(reference.repo, reference.revision or "main")
    if folder is None:
        return []
    files = cache.files_of(folder)
    among = choice.models([c for c in choice.candidates(files) if not c.raw])
    if reference.glob:
        among = [c for c in among if c.matches(reference.glob)]
    if reference.gguf_type:
        among = choice.of_type(among, reference.gguf_type)
    return [folder / c.files[0].path for c in among]


def _type_of(reference: Reference, path: Path) -> str:
    label = next((c.label for c in choice.candidates([hub.RemoteFile(path.name, 0, "", sha256=False)])), None)
    return made_as(reference.stem, path.name) or (label.name if label else "")


def _how_to_get(name: str, reference: Reference) -> str:
    folder = cache.snapshot(reference.repo, reference.revision or "main")
    if folder is not None and any(folder.glob("*.safetensors")):
        return f"dsv2 quantize {name}"
    if reference.gguf_type or reference.glob or "gguf" in reference.repo.lower():
        return f"dsv2 download {name}"
    return f"dsv2 download {name}, then dsv2 quantize {name}; or download one of its GGUFs, where others made them"


def _wholes(found: list[Path]) -> list[Path]:
    """Without all parts but the first of those that are split: a split one is opened by that."""
    return [p for p in found if (part := part_of(p.name)) is not None and part.number == 1]


def _names(found: list[Path]) -> str:
    more = f" and {len(found) - SHOWN_FILES} more" if len(found) > SHOWN_FILES else ""
    return ", ".join(f"`{path.name}`" for path in found[:SHOWN_FILES]) + more
