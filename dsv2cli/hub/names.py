"""names.py: the words that people have for a model: an alias, owner/name, owner/name:TYPE, a link."""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass, replace
from glob import escape
from urllib.parse import unquote, urlsplit

from dsv2cli.errors import UsageError
from dsv2cli.hub.aliases import ALIASES
from dsv2cli.hub.labels import part_of

_REPO_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)
_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co", "hf-mirror.com")
_VIEWS = ("blob", "resolve", "raw", "tree")  # owner/name/VIEW/REVISION/PATH
MAX_NAME = 96  # the hub's own limit
SHOWN_ALIASES = 12


@dataclass(frozen=True)
class Reference:
    """A repository, and what of it is meant where the words say so."""

    repo: str
    revision: str | None = None
    gguf_type: str | None = None
    glob: str | None = None  # of a GGUF's path: a link's file or folder

    def __str__(self) -> str:
        return f"{self.repo}:{self.gguf_type}" if self.gguf_type else self.repo

    @property
    def stem(self) -> str:
        """The model's own name: what a file made of it is called by."""
        return self.repo.split("/")[1]


def is_path(text: str) -> bool:
    """Whether text can only be meant as a place on this disk, there or not."""
    return (
        text.startswith((".", "/", "~", "\\"))
        or text.endswith(("/", ".gguf", ".safetensors", ".json"))
        or "\\" in text
        or bool(re.match(r"[A-Za-z]:[/\\]", text))
    ) and "://" not in text


def resolve(name: str) -> Reference:
    """What a name stands for. UsageError where it is none, with what was likely meant."""
    text = name.strip()
    text = re.sub(r"^(?:hf|huggingface)://(?:models/)?", "hf.co/", text)
    host, path = _place(text if "://" in text else f"https://{text}")
    if host and host in {*_HOSTS, _place(os.environ.get("HF_ENDPOINT", ""))[0]}:
        return _of_link(name, path)
    if "://" in text:
        raise UsageError(f"`{name}` is not a page of the hub", f"links begin with https://{_HOSTS[0]}/")
    if is_path(text):
        raise UsageError(f"`{name}`: no such file or folder", "a model on the hub reads owner/name")
    repo, _, label = text.partition(":")
    return replace(_of_repo(name, repo), gguf_type=_type(label))


def _place(link: str) -> tuple[str, str]:
    """(host, path) of a link; empty where it is none."""
    try:
        parts = urlsplit(link)
    except ValueError:
        return "", ""
    return parts.netloc.lower(), parts.path


def _type(label: str) -> str | None:
    """The part behind the colon; ``latest``, as ollama has it, means whichever is the default."""
    return label if label and label.lower() != "latest" else None


def _of_repo(name: str, repo: str) -> Reference:
    if target := ALIASES.get(repo.lower()):
        return Reference(target)
    if _REPO_ID.fullmatch(repo) and len(repo) <= MAX_NAME and not re.search(r"\.\.|--|[.-]$|[.-]/|\.git$", repo):
        return Reference(repo)
    if repo.count("/") > 1 and _REPO_ID.fullmatch(owner := "/".join(repo.split("/")[:2])):
        rest = repo.split("/", 2)[2]
        raise UsageError(
            f"`{name}` is neither owner/name nor a known alias",
            f"for a file of {owner}: dsv2 download {owner} --file {rest!r}",
        )
    raise UsageError(f"`{name}` is neither owner/name nor a known alias", _near(repo))


def _near(text: str) -> str:
    """The aliases and repositories that look like what was typed, as a hint."""
    by_name = {repo.split("/")[1].lower(): repo for repo in ALIASES.values()} | {r.lower(): r for r in ALIASES.values()}
    known = {**by_name, **{alias: alias for alias in ALIASES}}
    wanted = text.lower().removesuffix("-gguf")
    near = [known[wanted]] if wanted in known else [known[k] for k in difflib.get_close_matches(wanted, known, 3)]
    if near:
        return f"did you mean {' or '.join(dict.fromkeys(near))}?"
    return f"aliases: {', '.join(list(ALIASES)[:SHOWN_ALIASES])} ... (dsv2 download --aliases); or the hub's owner/name"


def _of_link(name: str, path: str) -> Reference:
    parts = [unquote(part) for part in path.split("/") if part]
    if parts and parts[0] in ("datasets", "spaces", "collections", "papers", "docs"):
        raise UsageError(f"`{name}` is not a model's page ({parts[0]})", "a model's page reads owner/name")
    if len(parts) < 2:
        raise UsageError(f"`{name}` is not a model's page", "a model's page reads owner/name")
    last, _, label = parts[1].partition(":")
    found = replace(_of_repo(name, f"{parts[0]}/{last}"), gguf_type=_type(label))
    if len(parts) < 4 or parts[2] not in _VIEWS:
        return found
    inside = escape("/".join(parts[4:]))
    if parts[2] == "tree" and inside:
        inside += "/*"
    # A link to any other file of a checkpoint means the checkpoint.
    wanted = inside if inside.endswith("/*") or part_of("/".join(parts[4:])) else None
    return replace(found, revision=parts[3], glob=wanted)
