"""card.py: where a checkpoint comes from and under which licence, as its model card and its place tell: the
``general.*`` keys that every file made of it carries on.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

HUB = "https://huggingface.co/"
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
MAX_TEXT, MAX_LIST = 256, 16  # characters of a value and entries of a list: a card says no more than that
LICENSE_KEYS = {
    "license": "general.license",
    "license_name": "general.license.name",
    "license_link": "general.license.link",
}


def model_name(folder: Path) -> str:
    """The folder's name; the repository's where the folder is a snapshot in Hugging Face's cache."""
    repository = cached_repository(folder)
    return repository.split("/")[-1] if repository else folder.resolve().name


def cached_repository(folder: Path) -> str:
    """The repository ("owner/name", or an old one's "name") that a folder of Hugging Face's cache is a snapshot of."""
    folder = folder.resolve()
    place = folder.parent.parent.name
    return "/".join(place.split("--")[1:]) if folder.parent.name == "snapshots" and "--" in place else ""


def provenance(folder: Path) -> dict[str, object]:
    """The licence, the repository, and the models that the card of a checkpoint names it after; what is not told is
    left out.
    """
    card = front_matter(folder / "README.md")
    keys: dict[str, object] = {}
    for name, key in LICENSE_KEYS.items():
        if (value := card.get(name)) and isinstance(value, str):
            keys[key] = value
    if repository := cached_repository(folder):
        keys |= {"general.source.url": HUB + repository, "general.source.repo_url": HUB + repository}
    named = card.get("base_model", [])
    bases = [name for name in ([named] if isinstance(named, str) else named) if REPOSITORY.fullmatch(name)]
    if bases:
        keys["general.base_model.count"] = len(bases)
    for i, base in enumerate(bases):
        owner, name = base.split("/")
        keys |= {
            f"general.base_model.{i}.name": name,
            f"general.base_model.{i}.organization": owner,
            f"general.base_model.{i}.repo_url": HUB + base,
        }
    return keys


def front_matter(path: Path) -> Mapping[str, str | list[str]]:
    """The plain strings and lists of strings between the ``---`` at the head of a card; nothing where there is none.

    Not all of YAML: what is nested or folded is left out.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    found = re.match(r"---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", text, re.DOTALL)
    values: dict[str, str | list[str]] = {}
    under = ""
    for line in (found[1] if found else "").splitlines():
        if entry := re.fullmatch(r"([\w-]+):[ \t]*(.*)", line):
            under, rest = entry[1], _scalar(entry[2])
            if rest.startswith("[") and rest.endswith("]"):
                values[under] = [_scalar(item) for item in rest[1:-1].split(",")][:MAX_LIST]
            elif rest and rest not in ("|", ">"):
                values[under] = rest
        elif (item := re.fullmatch(r"[ \t]*-[ \t]+(.*)", line)) and under:
            items = values.setdefault(under, [])
            if isinstance(items, list) and len(items) < MAX_LIST:
                items.append(_scalar(item[1]))
    return values


def _scalar(text: str) -> str:
    """Without quotes, a comment behind it, and what cannot be printed."""
    text = re.sub(r"(?:^|[ \t])#.*$", "", text).strip()
    if len(text) >= 2 and text[0] == text[-1] and text[0] in "\"'":
        text = text[1:-1]
    return "".join(c for c in text if c.isprintable())[:MAX_TEXT]
