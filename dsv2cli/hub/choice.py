"""choice.py: which of a repository's files make the model that a person means: the checkpoint, or one of its GGUFs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from glob import escape
from pathlib import PurePosixPath

from dsv2cli.errors import CliError, UsageError
from dsv2cli.hub.labels import Label, label_of, normal, part_of
from dsv2cli.hub.listing import Kind, Listing, Plan, RemoteFile

# Taken where no type is asked for, the first that is there: what most people run, then what comes nearest to it.
DEFAULT_TYPES = ("Q4_K_M", "Q4_K_XL", "Q4_K_L", "Q4_K_S")
# Beside a model: what sees for it, its importance matrix, what drafts for it (a model, not the one meant).
_NO_MODEL = re.compile(r"(?:^|[-._/])(?:mmproj|imatrix)(?:[-._/]|$)", re.IGNORECASE)
_DRAFT = re.compile(r"(?:^|/)(?:mtp|draft|eagle)[-._/]|[-._](?:draft|mtp-draft)(?:[-._]|$)", re.IGNORECASE)
SHOWN_NAMES = 8


@dataclass(frozen=True)
class Candidate:
    """One GGUF of a repository: a file, the parts of a split one, or raw pieces to be joined."""

    whole: str
    files: tuple[RemoteFile, ...]
    raw: bool
    missing: str = ""  # which parts are not listed

    @property
    def stem(self) -> str:
        return self.whole[: -len(".gguf")]

    @property
    def label(self) -> Label | None:
        return label_of(self.whole)

    @property
    def nbytes(self) -> int:
        return sum(f.nbytes for f in self.files)

    def matches(self, glob: str) -> bool:
        """Whether a pattern means it: its path, its name, or either of a part of it. Case does not matter."""
        paths = [self.whole, self.stem, *(f.path for f in self.files)]
        names = [name for path in paths for name in (path, PurePosixPath(path).name)]
        return any(fnmatchcase(name.lower(), glob.lower()) for name in names)


def check_wishes(only: Kind | None, gguf_type: str | None, glob: str | None) -> None:
    """UsageError where no repository could hold what is asked for."""
    if only == "safetensors" and (gguf_type or glob):
        option = "--type" if gguf_type else "--file"
        raise UsageError(f"{option} picks among GGUF files, and --only safetensors leaves them out", "drop one of them")


def choose(listing: Listing, only: Kind | None = None, gguf_type: str | None = None, glob: str | None = None) -> Plan:
    """The plan for what a person asked for. CliError, UsageError."""
    kind, files = select(listing.repo, listing.files, only, gguf_type, glob)
    part = part_of(files[0].path)
    joined = part.whole if part is not None and part.raw else None
    return Plan(listing.repo, listing.revision, listing.commit, kind, tuple(files), listing.offline, joined)


def select(
    repo: str,
    files: Sequence[RemoteFile],
    only: Kind | None = None,
    gguf_type: str | None = None,
    glob: str | None = None,
) -> tuple[Kind, list[RemoteFile]]:
    """The kind, and the files in order: of a checkpoint all that may be needed, of a GGUF its parts."""
    from quantize.source import files as checkpoint_files

    check_wishes(only, gguf_type, glob)
    names = [f.path for f in files]
    weights = set(checkpoint_files.weights(names))
    ggufs = candidates(files)
    if only == "gguf" or gguf_type or glob or (only is None and not weights and ggufs):
        if not ggufs:
            hint = f"dsv2 download {repo}, then dsv2 quantize {repo} makes one of its safetensors" if weights else ""
            raise CliError(f"{repo} has no GGUF files", hint or _what_else(names)[1])
        return "gguf", list(_pick(repo, ggufs, gguf_type, glob).files)
    if not weights:
        what, hint = _what_else(names)
        raise CliError(f"{repo} {what}", f"dsv2 download {repo} --only gguf takes its GGUF" if ggufs else hint)
    return "safetensors", [f for f in files if f.path in weights or checkpoint_files.is_companion(f.path)]


def _what_else(names: Sequence[str]) -> tuple[str, str]:
    """What a repository without a model of ours has in place of one, and what helps."""
    from quantize.source import files as checkpoint_files

    if not names:
        return "is empty", "its page tells where the model went, if anything does"
    folders = {str(PurePosixPath(n).parent) for n in names if n.endswith(".safetensors") and "/" in n}
    if folders:
        where = ", ".join(sorted(folders)[:3])
        return (
            f"has no weights at its top, only in folders of it ({where})",
            "fetch the folder you mean with the hub's own client, and give its path to dsv2 quantize",
        )
    if adapters := [n for n in names if checkpoint_files.is_adapter(n)]:
        return (
            f"holds an adapter (`{adapters[0]}`) and no model",
            "merge it into its base model first; config and card name that",
        )
    if old := [n for n in names if n.endswith((".bin", ".pt", ".pth", ".ckpt"))]:
        return (
            f"has its weights only as `{PurePosixPath(old[0]).suffix}` files (`{old[0]}`), not as safetensors or GGUF",
            "another revision may have safetensors (see its page); transformers' save_pretrained writes them",
        )
    return "has neither safetensors weights nor GGUF files", "check the name: is this the model's own repository?"


def candidates(files: Iterable[RemoteFile]) -> list[Candidate]:
    """Every GGUF that is listed, in the order of its name; of one that is there whole and in pieces, the whole."""
    found: dict[tuple[str, bool], list[tuple[int, int, RemoteFile]]] = {}
    for file in files:
        if (part := part_of(file.path)) is not None:
            found.setdefault((part.whole, part.raw), []).append((part.number, part.count, file))
    made = []
    for (whole, raw), parts in sorted(found.items()):
        if raw and (whole, False) in found:
            continue
        parts.sort(key=lambda p: p[:2])
        count = max(n for p in parts for n in p[:2])
        lacking = sorted(set(range(1, count + 1)) - {p[0] for p in parts})
        missing = f"part {lacking[0]} of {count}" if lacking else ""
        made.append(Candidate(whole, tuple(p[2] for p in parts), raw, missing))
    return made


def models(ggufs: Sequence[Candidate]) -> list[Candidate]:
    """Those that are models, without what lies beside one."""
    rest = [c for c in ggufs if not _NO_MODEL.search(c.whole)]
    return [c for c in rest if not _DRAFT.search(c.whole)] or rest


def of_type(ggufs: Sequence[Candidate], wanted: str) -> list[Candidate]:
    """Those that a type means: by the most exact reading under which there are any, or by their names."""
    labels = [(c, c.label.spellings if c.label else ()) for c in ggufs]
    for exactness in range(3):
        if found := [c for c, names in labels if names and names[exactness] == normal(wanted)]:
            return found
    named = wanted.lower().removesuffix(".gguf")
    return [c for c in ggufs if named in (c.stem.lower(), PurePosixPath(c.stem).name.lower())]


def _pick(repo: str, ggufs: Sequence[Candidate], gguf_type: str | None, glob: str | None) -> Candidate:
    among = models(ggufs)
    if glob:
        # What is no model can still be named outright.
        among = [c for c in among if c.matches(glob)] or [c for c in ggufs if c.matches(glob)]
        if not among:
            raise CliError(f"{repo} has no GGUF named `{glob}`", f"it has {_list(ggufs)}")
    if not among:
        raise CliError(f"{repo} has no model, only {_list(ggufs)}", "the model's own repository has it")
    if gguf_type:
        found = of_type(among, gguf_type)
        if not found:
            raise CliError(f"{repo} has no GGUF of type {normal(gguf_type)}", _types_hint(among, gguf_type))
    elif len(among) == 1 or glob:
        found = among
    else:
        found = next((f for t in DEFAULT_TYPES if (f := of_type(among, t))), [])
        if not found:
            raise CliError(f"{repo} has {len(among)} GGUFs, none of them {DEFAULT_TYPES[0]}", _types_hint(among, ""))
    if len(found) > 1:
        what = f" of type {normal(gguf_type)}" if gguf_type else f" named `{glob}`" if glob else ""
        raise CliError(f"{repo} has {len(found)} models{what}: {_list(found)}", _file_hint(found[0]))
    if found[0].missing:
        raise CliError(
            f"{repo} lists {PurePosixPath(found[0].stem).name} without its {found[0].missing}",
            "the upload is incomplete or goes on elsewhere: another type may be whole (--type)",
        )
    return found[0]


def _file_hint(candidate: Candidate) -> str:
    return f"--file '{escape(candidate.stem)}' takes the first"


def _types_hint(among: Sequence[Candidate], wanted: str) -> str:
    """What --type takes here; the nearest alone where one is near. Files without a type go by their names."""
    import difflib

    names = sorted({c.label.name if c.label else c.stem for c in among})
    by_reading = {reading: c.label.name for c in among if c.label for reading in c.label.spellings}
    near = [by_reading[r] for r in difflib.get_close_matches(normal(wanted), by_reading, 3)] if wanted else []
    if near:
        return f"did you mean --type {' or '.join(dict.fromkeys(near))}? It has {', '.join(names)}"
    return f"--type takes one of: {', '.join(names)}"


def _list(ggufs: Sequence[Candidate]) -> str:
    names = [c.stem for c in ggufs]
    more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
    return ", ".join(names[:SHOWN_NAMES]) + more
