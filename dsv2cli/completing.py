"""completing.py: names of models, conversations and presets for a shell that completes a line, in a few milliseconds.

Typer answers for verbs, options and their values, and takes as long as the program needs to begin; a model's name is
asked for most, and is answered here from names of folders alone. Knows the shells' forms as Typer's own scripts have
them: bash, zsh and fish; what it is not sure of it leaves to Typer.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Iterable, Mapping
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

TAKE_MODELS = ("chat", "serve", "inspect", "perplexity", "bench", "plan", "quantize", "export", "rm")
TAKE_NAMES = ("plan", "download")  # of the hub, fetched or not
FLAGS = (
    "-q",
    "--quiet",
    "-y",
    "--yes",
    "--json",
    "--csv",
    "--check",
    "--raw",
    "--special",
    "--no-speed",
    "--no-check",
    "-C",
    "--continue",
    "--no-save",
    "--plain",
    "--share",
    "--no-share",
)
MOST = 200
ENDINGS = (".gguf",)


def answered(environ: Mapping[str, str]) -> bool:
    """Write what completes the line, where that is a model's name; False where it is Typer's to answer."""
    shell = environ.get("_DSV2_COMPLETE", "").removeprefix("complete_")
    try:
        words, begun = _line(shell, environ)
    except ValueError:  # a quotation that is not closed
        return False
    verb = next((word for word in words if not word.startswith("-")), "")
    after = words[words.index(verb) + 1 :] if verb else []
    if verb == "chat" and after and after[-1] in NAMED:
        _write(shell, [name for name in NAMED[after[-1]]() if name.startswith(begun)])
        return True
    if verb not in (*TAKE_MODELS, *TAKE_NAMES) or begun.startswith("-") or (after and _wants_value(after[-1])):
        return False
    given = [w for i, w in enumerate(after) if not w.startswith("-") and not (i and _wants_value(after[i - 1]))]
    if given and verb != "rm":
        return False  # the model stands there already
    found = names(begun, of_hub=verb in TAKE_NAMES, files=verb in TAKE_MODELS)
    if shell == "fish" and environ.get("_TYPER_COMPLETE_FISH_ACTION") == "is-args":
        sys.exit(0 if found else 1)
    _write(shell, found)
    return True


def sessions() -> list[str]:
    """Names of kept conversations, as ``chat.store`` has them, without the engine that comes with it."""
    from dsv2cli import state

    place = state.folder()
    try:
        found = os.listdir(place / "conversations") if place is not None else []  # noqa: PTH208
    except OSError:
        return []
    return sorted(name.removesuffix(".jsonl") for name in found if re.fullmatch(r"\w[^/]*\.jsonl", name))


def presets() -> list[str]:
    """Names of sets of settings."""
    from dsv2cli import settings

    return settings.preset_names()


NAMED = {"-r": sessions, "--resume": sessions, "--preset": presets}
"""Options of chat whose values are names of this user's own."""


def _wants_value(word: str) -> bool:
    """Whether what follows belongs to this word: an option that is no flag and holds no value itself."""
    return word.startswith("-") and "=" not in word and word not in FLAGS


def _line(shell: str, environ: Mapping[str, str]) -> tuple[list[str], str]:
    """The words before the one that is begun, without the program's, and that one. ValueError: none of these shells."""
    if shell == "bash":
        words = shlex.split(environ.get("COMP_WORDS", ""))
        at = int(environ.get("COMP_CWORD", ""))
        return words[1:at], words[at] if at < len(words) else ""
    if shell in ("zsh", "fish"):
        line = environ.get("_TYPER_COMPLETE_ARGS", "")
        words = shlex.split(line)[1:]
        return (words[:-1], words[-1]) if words and not line.endswith(" ") else (words, "")
    raise ValueError(shell)


def names(begun: str, *, of_hub: bool, files: bool) -> list[str]:
    """Models whose names begin so: repositories in the hub's cache, aliases (of what is in the cache alone, unless
    of_hub), and GGUFs and folders here."""
    here = set(cached())
    found = [repo for repo in sorted(here) if repo.startswith(begun)]
    if "/" not in begun and not begun.startswith((".", "~")):
        found += [alias for alias, repo in _aliases().items() if alias.startswith(begun) and (of_hub or repo in here)]
    if files:
        found += paths(begun)
    return list(dict.fromkeys(found))[:MOST]


def _aliases() -> dict[str, str]:
    """The table of hub/aliases.py, without the package around it, which takes longer to import than all else here."""
    spec = spec_from_file_location("dsv2_aliases", Path(__file__).with_name("hub") / "aliases.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    table: dict[str, str] = module.ALIASES
    return table


def cached() -> list[str]:
    """owner/name of what the hub's cache has, by the names of its folders; nothing is looked into."""
    home = os.environ.get("HF_HOME") or os.path.join(  # noqa: PTH118
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "huggingface"  # noqa: PTH111
    )  # fmt: skip
    root = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or f"{home}/hub"
    try:
        with os.scandir(os.path.expanduser(root)) as entries:  # noqa: PTH111
            held = [entry.name for entry in entries if entry.name.startswith("models--")]
    except OSError:
        return []
    return [name.removeprefix("models--").replace("--", "/", 1) for name in held]


def paths(begun: str) -> list[str]:
    """GGUFs, and folders with a slash behind them, in the folder that a path names so far."""
    folder, _, start = begun.rpartition("/")
    place = Path(f"{folder}/" if begun.startswith("/") or folder else ".")
    try:
        entries = sorted(os.scandir(place.expanduser() if folder.startswith("~") else place), key=lambda e: e.name)
    except (OSError, RuntimeError):
        return []
    before = f"{folder}/" if "/" in begun else ""
    found = []
    for entry in entries:
        if not entry.name.startswith(start) or (entry.name.startswith(".") and not start.startswith(".")):
            continue
        if entry.name.lower().endswith(ENDINGS):
            found.append(before + entry.name)
        elif entry.is_dir():
            found.append(f"{before}{entry.name}/")
    return found


def _write(shell: str, found: Iterable[str]) -> None:
    """As the shell's script takes it. What would be more than a name to a shell is left out: it is foreign text that
    zsh's script evaluates."""
    safe = [name for name in found if re.fullmatch(r"[\w./:@+~,=%-]+", name)]
    if shell == "zsh":
        quoted = "\n".join('"' + name.replace(":", r"\\:") + '"' for name in safe)
        text = f"_arguments '*: :(({quoted}))'" if safe else "_files"
    else:
        text = "\n".join(safe)
    sys.stdout.write(text + "\n" if text else "")
