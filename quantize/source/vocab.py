"""vocab.py: a checkpoint's tokenizer -> the ``tokenizer.*`` keys of a GGUF.

The words and their pairs come from a reader of the file that holds them; which of its tokens begin a text and end an
answer, and the chat template, are found here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantize.base.errors import CheckpointError, UnsupportedError
from quantize.source import families, files, templates, tiktoken, tokenizer_json
from quantize.source.bpe import Bpe
from quantize.source.checkpoint import read_json

SPECIAL_ROLES = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
END_ROLES = ("eos", "eot", "eom")  # llama.cpp ends an answer at each of these


@dataclass(frozen=True)
class Vocab:
    """A tokenizer as GGUF keeps it."""

    pre: str
    tokens: tuple[str, ...]  # one a row of the embedding; "[PAD7]" where the tokenizer has none
    types: tuple[int, ...]
    merges: tuple[str, ...]
    special_ids: dict[str, int]  # "bos", "eos", "eot", "eom", "padding", "unknown" -> id
    add_bos: bool
    add_eos: bool
    chat_template: str  # "" where the model has none
    notes: tuple[str, ...] = ()  # what a person should know, a sentence each

    def keys(self) -> dict[str, object]:
        """The ``tokenizer.*`` metadata."""
        keys: dict[str, object] = {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": self.pre,
            "tokenizer.ggml.tokens": list(self.tokens),
            "tokenizer.ggml.token_type": list(self.types),
            "tokenizer.ggml.merges": list(self.merges),
        }
        keys |= {f"tokenizer.ggml.{role}_token_id": id_ for role, id_ in self.special_ids.items()}
        keys |= {"tokenizer.ggml.add_bos_token": self.add_bos, "tokenizer.ggml.add_eos_token": self.add_eos}
        if self.chat_template:
            keys["tokenizer.chat_template"] = self.chat_template
        return keys


def read_vocab(folder: Path, n_vocab: int) -> Vocab:
    """The tokenizer of a checkpoint folder, padded to n_vocab tokens. Raises CheckpointError, UnsupportedError."""
    settings = _optional(folder / files.TOKENIZER_CONFIG)
    config = read_json(folder / files.CONFIG)
    path, words = _words(folder, settings, n_vocab)
    tokens = list(words.tokens)
    special, notes = _special_ids(
        path, settings, _with_text(config), _optional(folder / files.GENERATION_CONFIG), tokens
    )
    template, more = templates.read(folder, settings)
    first = tokens.index(words.in_front) if words.in_front in tokens else None
    if first is not None:
        special.setdefault("bos", first)
    return Vocab(
        pre=words.pre,
        tokens=words.tokens,
        types=words.types,
        merges=words.merges,
        special_ids=special,
        add_bos=bool(settings.get("add_bos_token", first is not None and special["bos"] == first)),
        add_eos=bool(settings.get("add_eos_token", False)),
        chat_template=template,
        notes=(*words.notes, *notes, *more),
    )


def _words(folder: Path, settings: dict[str, Any], n_vocab: int) -> tuple[Path, Bpe]:
    """The file that holds the vocabulary, and what it holds. Of two, tiktoken's is what was published."""
    if (path := folder / files.TIKTOKEN).exists() and tiktoken.rules(settings):
        return path, tiktoken.read(path, settings, n_vocab)
    if (path := folder / files.TOKENIZER).exists():
        return path, tokenizer_json.read(path, n_vocab)
    if (path := folder / files.TIKTOKEN).exists():
        return path, tiktoken.read(path, settings, n_vocab)
    raise UnsupportedError(
        f"`{folder}`: neither {files.TOKENIZER} nor {files.TIKTOKEN}, and no other vocabulary is read",
        f"a {files.TOKENIZER} of the same vocabulary, put there, will do"
        " (transformers makes one: AutoTokenizer.from_pretrained(...).save_pretrained(...))",
    )


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _with_text(config: dict[str, Any]) -> dict[str, Any]:
    """config.json with what it says of the language model alone, where that is a part of it."""
    inner = config.get(families.TEXT_CONFIG)
    return {**inner, **config} if isinstance(inner, dict) else config


def _special_ids(
    path: Path, settings: dict[str, Any], config: dict[str, Any], generation: dict[str, Any], tokens: list[str]
) -> tuple[dict[str, int], list[str]]:
    """Ids by role, and what they leave unsaid. All end tokens of both configurations end, the first of them is eos."""
    ids = {token: i for i, token in enumerate(tokens)}
    special: dict[str, int] = {}
    ends = [id_ for values in (config, generation) for id_ in _listed(path, values, "eos_token_id", len(tokens))]
    for key, role in SPECIAL_ROLES.items():
        named = settings.get(key)
        text = named.get("content") if isinstance(named, dict) else named
        if isinstance(text, str):
            if text not in ids:
                raise CheckpointError(f"`{path}`: {key} {text!r} of tokenizer_config.json is not in the vocabulary")
            special[role] = ids[text]
        elif found := ends if role == "eos" else _listed(path, config, f"{key}_id", len(tokens)):
            special[role] = found[0]
    if "eos" not in special:
        raise CheckpointError(
            f"`{path}`: no end-of-sequence token is named in {files.TOKENIZER_CONFIG}, {files.CONFIG} or"
            f" {files.GENERATION_CONFIG}",
            "without one no answer would end: name it there (eos_token, eos_token_id)",
        )
    others = [id_ for id_ in dict.fromkeys(ends) if id_ != special["eos"]]
    special |= dict(zip(END_ROLES[1:], others, strict=False))
    unsaid = [repr(tokens[id_]) for id_ in others[len(END_ROLES) - 1 :]]
    told = f"GGUF names at most {len(END_ROLES)} end tokens: {', '.join(unsaid)} may not end an answer"
    return special, [told] if unsaid else []


def _listed(path: Path, values: dict[str, Any], key: str, n_vocab: int) -> list[int]:
    """The ids of a key that holds one or several; those that padding or a text-only vocabulary lacks are left out."""
    named = values.get(key)
    found = named if isinstance(named, list) else [] if named is None else [named]
    for id_ in found:
        if not isinstance(id_, int) or isinstance(id_, bool):
            raise CheckpointError(f"`{path.parent}`: {key} is {named!r}, expected token ids")
    return [id_ for id_ in found if 0 <= id_ < n_vocab]
