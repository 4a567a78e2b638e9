"""Models on the Hugging Face hub: their short names, what a download would fetch, and the shared cache they live in.

The hub's own client makes the requests (so HF_ENDPOINT, HF_TOKEN, HF_HOME and HF_HUB_OFFLINE mean what they always
mean) and its cache layout is kept, so other programs find the files. The bytes themselves are transfer.py's.
"""

from __future__ import annotations

import difflib
import json
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from dsv2cli.console import format_bytes
from dsv2cli.errors import CliError, UsageError

Kind = Literal["safetensors", "gguf"]

ALIASES = {
    "lite": "deepseek-ai/DeepSeek-V2-Lite",
    "lite-chat": "deepseek-ai/DeepSeek-V2-Lite-Chat",
    "coder-lite": "deepseek-ai/DeepSeek-Coder-V2-Lite-Instruct",
    "coder-lite-base": "deepseek-ai/DeepSeek-Coder-V2-Lite-Base",
    "v2": "deepseek-ai/DeepSeek-V2",
    "v2-chat": "deepseek-ai/DeepSeek-V2-Chat",
    "v2-chat-0628": "deepseek-ai/DeepSeek-V2-Chat-0628",
    "v2.5": "deepseek-ai/DeepSeek-V2.5",
    "v2.5-1210": "deepseek-ai/DeepSeek-V2.5-1210",
    "coder": "deepseek-ai/DeepSeek-Coder-V2-Instruct",
    "coder-0724": "deepseek-ai/DeepSeek-Coder-V2-Instruct-0724",
    "coder-base": "deepseek-ai/DeepSeek-Coder-V2-Base",
}
REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# A checkpoint's own files: weights, configuration, tokenizer, licence. Not its Python code, nor copies in subfolders.
CHECKPOINT_FILE = re.compile(r"[^/]+\.safetensors|[^/]+\.json|tokenizer\.model|LICENSE[^/]*|README\.md")
GGUF_TYPE = re.compile(r"(?i)[-._](IQ[1-4]_[A-Z]+|Q[2-8]_K(?:_[SML]+)?|Q[458]_[01]|BF16|F16|F32)(?=[-._]|$)")
GGUF_SPLIT = re.compile(r"-(\d{5})-of-\d{5}$")  # and the part's number
INDEX_FILE = "model.safetensors.index.json"
COMMIT = re.compile(r"[0-9a-f]{40}")
SHA256_DIGITS = 64
HASH = re.compile(rf"[0-9a-f]{{40}}|[0-9a-f]{{{SHA256_DIGITS}}}")
DEFAULT_GGUF_TYPE = "Q4_K_M"
SPARE_BYTES = 64 << 20  # left free on a disk: metadata, and whatever else is being written


@dataclass(frozen=True)
class RemoteFile:
    """A file as the hub lists it. etag names it in the cache: its sha256 where stored as LFS, else its git blob id."""

    path: str
    nbytes: int
    etag: str
    sha256: bool


@dataclass(frozen=True)
class Plan:
    """What to fetch: some files of one commit. ``offline`` where the listing came from the cache, not from the hub."""

    repo: str
    revision: str
    commit: str
    kind: Kind
    files: tuple[RemoteFile, ...]
    offline: bool = False

    @property
    def nbytes(self) -> int:
        return sum(f.nbytes for f in self.files)


@dataclass(frozen=True)
class Target:
    """Where one file of a plan goes, and where its bytes wait until they are complete and verified."""

    file: RemoteFile
    final: Path
    partial: Path
    link: Path | None  # in the cache: the snapshot's name for the blob

    @property
    def present_bytes(self) -> int:
        """Bytes on disk already; nbytes where the file is complete under its final name."""
        if self.is_complete():
            return self.file.nbytes
        return min(self.partial.stat().st_size, self.file.nbytes) if self.partial.is_file() else 0

    def is_complete(self) -> bool:
        if not self.final.is_file() or self.final.stat().st_size != self.file.nbytes:
            return False
        return self.link is not None or _recorded_etag(self) == self.file.etag


# Names.


def resolve(name: str) -> str:
    """An alias or ``owner/name`` to a repository id. UsageError where it is neither."""
    if name.lower() in ALIASES:
        return ALIASES[name.lower()]
    if REPO_ID.fullmatch(name) and ".." not in name and "--" not in name:
        return name
    near = difflib.get_close_matches(name.lower(), ALIASES, 3)
    known = ", ".join(near or ALIASES)
    raise UsageError(
        f"`{name}` is neither owner/name nor a known alias",
        f"{'did you mean' if near else 'aliases:'} {known}{'?' if near else ''}",
    )


# What to fetch.


def plan(repo: str, revision: str = "main", only: Kind | None = None, gguf_type: str | None = None) -> Plan:
    """The files of a repository to download. Asks the hub, or under HF_HUB_OFFLINE the cache. CliError."""
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return _plan_from_cache(repo, revision, only, gguf_type)
    with translated_errors(repo, revision):
        info = HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    files = []
    for sibling in info.siblings or []:
        _check_path(repo, sibling.rfilename)
        if sibling.size is None or sibling.blob_id is None or info.sha is None:
            raise CliError(
                f"the hub lists `{sibling.rfilename}` of {repo} without its size and hash",
                "HF_ENDPOINT may point at a server that does not speak the hub's protocol",
            )
        etag = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
        files.append(RemoteFile(sibling.rfilename, sibling.size, etag, sha256=sibling.lfs is not None))
    kind, chosen = select(repo, files, only, gguf_type)
    return Plan(repo, revision, info.sha or revision, kind, tuple(chosen))


def select(
    repo: str, files: Sequence[RemoteFile], only: Kind | None, gguf_type: str | None
) -> tuple[Kind, list[RemoteFile]]:
    """Which of a repository's files make a model: the checkpoint, or the GGUF of one type."""
    ggufs = [f for f in files if f.path.lower().endswith(".gguf")]
    checkpoint = [f for f in files if CHECKPOINT_FILE.fullmatch(f.path)]
    has_weights = any(f.path.endswith(".safetensors") for f in checkpoint)
    if only == "safetensors" and gguf_type:
        raise UsageError("--type picks among GGUF files, and --only safetensors leaves them out", "drop one of the two")
    wants_gguf = only == "gguf" or gguf_type is not None or (only is None and not has_weights)
    if not wants_gguf:
        if not has_weights:
            raise CliError(
                f"{repo} has no safetensors weights", f"try `dsv2 download {repo} --only gguf`" if ggufs else ""
            )
        return "safetensors", checkpoint
    if not ggufs:
        hint = "download it without --only/--type, then `dsv2 quantize` makes one from its safetensors"
        raise CliError(f"{repo} has no GGUF files", hint if has_weights else "")
    return "gguf", _select_gguf(repo, ggufs, gguf_type)


def _select_gguf(repo: str, ggufs: Iterable[RemoteFile], gguf_type: str | None) -> list[RemoteFile]:
    """The file, or the parts of the one split file, of the type asked for."""
    models: dict[str, list[RemoteFile]] = {}  # by name without "-00001-of-00003"
    for file in ggufs:
        models.setdefault(GGUF_SPLIT.sub("", file.path[: -len(".gguf")]), []).append(file)
    types = {stem: found[-1].upper() for stem in models if (found := GGUF_TYPE.findall(PurePosixPath(stem).name))}
    wanted = gguf_type.upper() if gguf_type else None
    if wanted is None:
        wanted = DEFAULT_GGUF_TYPE if DEFAULT_GGUF_TYPE in types.values() else None
        if wanted is None and len(models) == 1:
            return sorted(next(iter(models.values())), key=lambda f: f.path)
    matches = [stem for stem in models if types.get(stem) == wanted]
    available = ", ".join(sorted(set(types.values()))) or ", ".join(sorted(models))
    if not matches or wanted is None:
        what = f"no GGUF of type {wanted}" if wanted else "GGUF files of several types"
        raise CliError(f"{repo} has {what}", f"--type takes one of: {available}")
    if len(matches) > 1:
        raise CliError(
            f"{repo} has {len(matches)} models of type {wanted}: {', '.join(sorted(matches))}",
            "download the one you mean by hand, and give its path to the other commands",
        )
    return sorted(models[matches[0]], key=lambda f: f.path)


def _check_path(repo: str, path: str) -> None:
    """A repository's file names become paths on this disk: none may leave their folder."""
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or "\\" in path or any(p in ("..", ".") or ":" in p for p in parts):
        raise CliError(
            f"{repo} lists a file named {path!r}, which would land outside its folder", "do not trust this repository"
        )


# The cache, and where files go.


def cache_root() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser()


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


def _plan_from_cache(repo: str, revision: str, only: Kind | None, gguf_type: str | None) -> Plan:
    folder = snapshot(repo, revision)
    hint = "unset HF_HUB_OFFLINE and run this again with a network"
    if folder is None:
        raise CliError(f"{repo} ({revision}) is not in the cache, and HF_HUB_OFFLINE forbids asking the hub", hint)
    files = [_cached_file(folder, path) for path in sorted(folder.rglob("*")) if path.is_file()]
    kind, chosen = select(repo, files, only, gguf_type)
    if kind == "safetensors" and (missing := missing_shards(folder)):
        raise CliError(f"the cached {repo} lacks {len(missing)} of its shards (`{missing[0]}`)", hint)
    return Plan(repo, revision, folder.name, kind, tuple(chosen), offline=True)


def _cached_file(folder: Path, path: Path) -> RemoteFile:
    """A file of a snapshot, whose blob is named by its hash; no etag, and no check, where the cache has no links."""
    blob = path.resolve().name
    etag = blob if HASH.fullmatch(blob) else ""
    return RemoteFile(path.relative_to(folder).as_posix(), path.stat().st_size, etag, sha256=len(etag) == SHA256_DIGITS)


def missing_shards(folder: Path) -> list[str]:
    """Names in a checkpoint's index that are not in its folder."""
    index = folder / INDEX_FILE
    if not index.is_file():
        return []
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CliError(f"`{index}`: not a checkpoint index ({error})", "download it again") from error
    return sorted(name for name in shards if not (folder / str(name)).is_file())


def targets(plan: Plan, to: Path | None) -> list[Target]:
    """Where the plan's files go: the shared cache, or the folder ``to`` with a .cache of its own, as the client."""
    folder = cache_folder(plan.repo)
    made = []
    for file in plan.files:
        if to is None:
            blob = folder / "blobs" / file.etag
            link = folder / "snapshots" / plan.commit / file.path
            made.append(Target(file, blob, blob.with_name(f"{file.etag}.incomplete"), link))
        else:
            notes = to / ".cache" / "huggingface" / "download" / file.path
            made.append(Target(file, to / file.path, notes.with_name(f"{notes.name}.{file.etag}.incomplete"), None))
    return made


def metadata_path(target: Target) -> Path:
    """The hub client's record of a file in a folder of its own: commit, etag and time, a line each."""
    name = target.partial.name.removesuffix(f".{target.file.etag}.incomplete")
    return target.partial.with_name(f"{name}.metadata")


def _recorded_etag(target: Target) -> str | None:
    try:
        _, etag, when = metadata_path(target).read_text(encoding="utf-8").split()
        return etag if target.final.stat().st_mtime - 1 <= float(when) else None
    except (OSError, ValueError):
        return None


def location(plan: Plan, to: Path | None) -> Path:
    """What to give to the other commands: the checkpoint's folder, or the (first) GGUF file."""
    root = to if to is not None else cache_folder(plan.repo) / "snapshots" / plan.commit
    return root if plan.kind == "safetensors" else root / plan.files[0].path


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


# Errors.


class translated_errors:
    """Turns the hub client's exceptions into one line and a hint."""

    def __init__(self, repo: str, revision: str = "main") -> None:
        self.repo, self.revision = repo, revision

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, CliError):
            told = explain(error, self.repo, self.revision)
            if told is not None:
                raise told from error


class UnreachableError(CliError):
    """No answer from the hub: the network, the name, or the server."""


def explain(error: Exception, repo: str, revision: str) -> CliError | None:  # noqa: PLR0911
    """What a failed request means and what to do about it; None for exceptions that are not the hub's."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{repo}"
    response = getattr(error, "response", None)
    status = response.status_code if response is not None else 0
    if isinstance(error, errors.GatedRepoError):
        return CliError(
            f"{repo} is gated: its owners ask you to accept their terms", f"accept them at {page}, then set HF_TOKEN"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return CliError(f"{repo} has no revision `{revision}`", f"branches and tags are listed at {page}/tree/main")
    if isinstance(error, errors.RepositoryNotFoundError):
        return CliError(
            f"no model `{repo}` on {constants.ENDPOINT}, or it is private",
            "check the name; for a private one set HF_TOKEN to a token that may read it",
        )
    if isinstance(error, errors.HfHubHTTPError):
        return _explain_status(status, repo, page)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return CliError("HF_HUB_OFFLINE forbids asking the hub", "unset it, or use a model that is in the cache")
    if isinstance(error, errors.HFValidationError):
        return UsageError(f"`{repo}` cannot be a model's name on the hub", "names read owner/name")
    if isinstance(error, (errors.HTTPError, ConnectionError, TimeoutError)):
        reason = str(error) or type(error).__name__
        return UnreachableError(
            f"cannot reach {constants.ENDPOINT}: {reason}", "check the network; the same command resumes"
        )
    return None


def _explain_status(status: int, repo: str, page: str) -> CliError:
    if status == 401:
        return CliError(
            "the hub does not accept the token (401)", "set HF_TOKEN to a valid one, or unset it for public models"
        )
    if status == 403:
        return CliError(
            f"the hub forbids reading {repo} (403)", f"see {page}; HF_TOKEN must belong to an account that may read it"
        )
    if status == 404:
        return CliError(f"the hub has no such file in {repo} (404)", f"see {page}/tree/main")
    if status == 429:
        return CliError(
            "the hub says: too many requests (429)",
            "wait some minutes, or set HF_TOKEN for a higher limit; the same command resumes",
        )
    if status >= 500:
        return CliError(f"the hub is in trouble ({status})", "try again later; the same command resumes")
    return CliError(f"the hub refused the request for {repo} ({status})", f"see {page}")
