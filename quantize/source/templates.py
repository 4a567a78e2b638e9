"""templates.py: a checkpoint's chat template, in every form that it is published in.

A file chat_template.jinja (with others in additional_chat_templates/), else tokenizer_config.json's chat_template (a
text, a list of named ones, or an object of them), else chat_template.json, which processors have: transformers' order.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quantize.base.errors import CheckpointError
from quantize.source import files
from quantize.source.checkpoint import read_json

NO_TEMPLATE = "the checkpoint has no chat template: chats with the GGUF go by V2's, `User: ...` and `Assistant: ...`"
DEFAULT = "default"
BYTE_ORDER_MARK = "\ufeff"


def read(folder: Path, settings: dict[str, Any]) -> tuple[str, list[str]]:
    """The template ("" where there is none), and what a person should know of it. settings: tokenizer_config.json."""
    single = folder / files.CHAT_TEMPLATE
    if single.exists():
        return _text(single), []
    if others := sorted(folder.glob("*.jinja")) + sorted((folder / files.TEMPLATES).glob("*.jinja")):
        return _choose({path.stem: _text(path) for path in others})
    older = folder / files.CHAT_TEMPLATE_JSON
    if not settings.get("chat_template") and older.exists():
        found = read_json(older)
        return _of(older, found.get("chat_template", found))
    return _of(folder / files.TOKENIZER_CONFIG, settings.get("chat_template"))


def _of(path: Path, value: Any) -> tuple[str, list[str]]:
    """The template that a JSON value holds."""
    if value is None or value in ("", [], {}):
        return "", [NO_TEMPLATE]
    if isinstance(value, str):
        return value.removeprefix(BYTE_ORDER_MARK), []
    named = value
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        named = {entry.get("name"): entry.get("template") for entry in value}
    if not isinstance(named, dict) or not all(isinstance(t, str) for pair in named.items() for t in pair):
        raise CheckpointError(
            f"`{path}`: chat_template is neither a text nor a list or an object of named ones",
            "put the template into chat_template.jinja beside it, which is read first",
        )
    return _choose({name: text.removeprefix(BYTE_ORDER_MARK) for name, text in named.items()})


def _choose(named: dict[str, str]) -> tuple[str, list[str]]:
    """Of several templates the plain one."""
    name = next((n for n in (DEFAULT, "chat", "chat_template") if n in named), next(iter(named)))
    others = ", ".join(n for n in named if n != name)
    if name == DEFAULT or not others:
        return named[name], []
    return named[name], [f"of the chat templates none is called {DEFAULT}: `{name}` was taken, and not {others}"]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"`{path}`: not UTF-8 ({error})", "save it as UTF-8") from error
    except OSError as error:
        raise CheckpointError(f"`{path}`: {error.strerror}") from error
