"""vocab.py: tokenizer.json and tokenizer_config.json -> the ``tokenizer.*`` keys of a GGUF.

The family uses byte-level BPE with one of three sets of splitting rules; GGUF names the set, so it is recognised here
from the rules themselves. An unknown set is refused: a wrong name would tokenise almost, but not quite, like the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantize.base.errors import CheckpointError, UnsupportedError
from quantize.source import files, templates
from quantize.source.checkpoint import read_json

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # tokenizer.ggml.token_type

# GGUF's name -> how each splitting rule begins, in order. Character lists differ in length between releases of Unicode,
# their beginnings do not.
PRE_TOKENIZERS: dict[str, tuple[str, ...]] = {
    "deepseek-llm": ("[\r\n]", "\\s?[A-Za-zµ", "\\s?[!-/:-~", "\\s+$", "[一-龥", "<digits>"),
    "deepseek-coder": ("[\r\n]", "\\s?\\p{L}+", "\\s?\\p{P}+", "[一-龥", "<digits>"),
    "deepseek-v3": ("\\p{N}{1,3}", "[一-龥", "[!\"#$%&'()*+,\\-./:;<=>?@"),
}
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
    path = folder / files.TOKENIZER
    if not path.exists():
        tiktoken = (folder / files.TIKTOKEN).exists() or any(folder.glob("*.tiktoken"))
        found = f"its vocabulary is tiktoken's ({files.TIKTOKEN})" if tiktoken else "no other vocabulary is read"
        raise UnsupportedError(
            f"`{folder}`: no {files.TOKENIZER}, and {found}",
            f"a {files.TOKENIZER} of the same vocabulary, put there, will do"
            " (transformers makes one: AutoTokenizer.from_pretrained(...).save_pretrained(...))",
        )
    tokenizer = read_json(path)
    settings = _optional(folder / files.TOKENIZER_CONFIG)
    config = read_json(folder / files.CONFIG)
    generation = _optional(folder / files.GENERATION_CONFIG)
    model = tokenizer.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or not isinstance(model.get("vocab"), dict):
        raise UnsupportedError(f"`{path}`: the model is not byte-level BPE")
    tokens, types = _tokens(path, model["vocab"], tokenizer.get("added_tokens") or [], n_vocab)
    special, notes = _special_ids(path, settings, config, generation, tokens)
    template, more = templates.read(folder, settings)
    return Vocab(
        pre=_recognise(path, tokenizer.get("pre_tokenizer")),
        tokens=tuple(tokens),
        types=tuple(types),
        merges=tuple(_merges(path, model.get("merges"))),
        special_ids=special,
        add_bos=bool(settings.get("add_bos_token", False)),
        add_eos=bool(settings.get("add_eos_token", False)),
        chat_template=template,
        notes=(*notes, *more),
    )


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _recognise(path: Path, pre_tokenizer: Any) -> str:
    rules = []
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer]) if isinstance(pre_tokenizer, dict) else []
    for step in steps:
        if not isinstance(step, dict):
            continue
        match step.get("type"):
            case "Split":
                pattern = step.get("pattern")
                rules.append(str(pattern.get("Regex", pattern.get("String", ""))) if isinstance(pattern, dict) else "")
            case "Digits" if step.get("individual_digits"):
                rules.append("<digits>")
    for name, beginnings in PRE_TOKENIZERS.items():
        if len(rules) == len(beginnings) and all(r.startswith(b) for r, b in zip(rules, beginnings, strict=True)):
            return name
    raise UnsupportedError(
        f"`{path}`: the pre-tokenizer's {len(rules)} rules match none of {', '.join(PRE_TOKENIZERS)}",
        "text would be split otherwise than in training; this tokenizer is not of the DeepSeek-V2 family",
    )


def _tokens(path: Path, vocab: dict[str, Any], added: list[Any], n_vocab: int) -> tuple[list[str], list[int]]:
    tokens: list[str | None] = [None] * n_vocab
    types = [UNUSED] * n_vocab

    def put(text: Any, id_: Any, kind: int) -> None:
        if not isinstance(text, str) or not isinstance(id_, int) or not 0 <= id_ < n_vocab:
            raise CheckpointError(f"`{path}`: token {text!r} has id {id_!r}, config.json's vocab_size is {n_vocab}")
        if tokens[id_] is not None and tokens[id_] != text:
            raise CheckpointError(f"`{path}`: tokens {tokens[id_]!r} and {text!r} share id {id_}")
        tokens[id_], types[id_] = text, kind

    for text, id_ in vocab.items():
        put(text, id_, NORMAL)
    for token in added:
        if not isinstance(token, dict):
            raise CheckpointError(f"`{path}`: an added token is {token!r}, expected an object")
        put(token.get("content"), token.get("id"), CONTROL if _is_control(token) else USER_DEFINED)
    return [f"[PAD{i}]" if t is None else t for i, t in enumerate(tokens)], types


def _is_control(token: dict[str, Any]) -> bool:
    """Tokens that text must never become. Chat and fill-in markers count, though the checkpoint calls them plain."""
    text = str(token.get("content"))
    bracketed = (text.startswith("<｜") and text.endswith("｜>")) or (text.startswith("<|") and text.endswith("|>"))
    return bool(token.get("special")) or bracketed


def _merges(path: Path, merges: Any) -> list[str]:
    if not isinstance(merges, list) or not merges:
        raise CheckpointError(f"`{path}`: the BPE model has no merges")
    texts = []
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(p, str) and p for p in pair):
            raise CheckpointError(f"`{path}`: merge {merge!r} is not a pair of tokens")
        texts.append(f"{pair[0]} {pair[1]}")
    return texts


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
