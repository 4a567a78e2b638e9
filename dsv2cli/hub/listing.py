"""listing.py: what a repository holds, as the hub or, offline, the cache tells it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

from dsv2cli.errors import CliError

Kind = Literal["safetensors", "gguf"]


@dataclass(frozen=True)
class RemoteFile:
    """A file as the hub lists it. etag names it in the cache: its sha256 where stored as LFS, else its git blob id."""

    path: str
    nbytes: int
    etag: str
    sha256: bool


@dataclass(frozen=True)
class Listing:
    """All files of one commit. ``offline`` where they were read from the cache."""

    repo: str
    revision: str
    commit: str
    files: tuple[RemoteFile, ...]
    offline: bool = False


@dataclass(frozen=True)
class Plan:
    """What to fetch: some files of one commit. joined: the GGUF that its files are raw pieces of."""

    repo: str
    revision: str
    commit: str
    kind: Kind
    files: tuple[RemoteFile, ...]
    offline: bool = False
    joined: str | None = None

    @property
    def nbytes(self) -> int:
        return sum(f.nbytes for f in self.files)


def list_files(repo: str, revision: str = "main") -> Listing:
    """Ask the hub, or under HF_HUB_OFFLINE the cache. CliError."""
    from dsv2cli.hub import cache, client

    if client.constants().HF_HUB_OFFLINE:
        return cache.listing(repo, revision)
    with client.translated_errors(repo, revision):
        from huggingface_hub import HfApi

        timeout = client.constants().HF_HUB_ETAG_TIMEOUT
        info = HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=timeout)
    files = []
    for sibling in info.siblings or []:
        check_path(repo, sibling.rfilename)
        if sibling.size is None or sibling.blob_id is None or info.sha is None:
            raise CliError(
                f"the hub lists `{sibling.rfilename}` of {repo} without its size and hash",
                "HF_ENDPOINT may point at a server that does not speak the hub's protocol",
            )
        etag = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
        files.append(RemoteFile(sibling.rfilename, sibling.size, etag, sha256=sibling.lfs is not None))
    return Listing(repo, revision, info.sha or revision, tuple(files))


def check_path(repo: str, path: str) -> None:
    """A repository's file names become paths on this disk: none may leave their folder."""
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or "\\" in path or any(p in ("..", ".") or ":" in p for p in parts):
        raise CliError(
            f"{repo} lists a file named {path!r}, which would land outside its folder", "do not trust this repository"
        )
