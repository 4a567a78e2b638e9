"""tokenizer_json.py: a tokenizer.json -> the tokens, merges and splitting rules of byte-level BPE.

GGUF names the rules by which text is split into words, so they are recognised here from the rules themselves. Unknown
ones are refused: a wrong name would tokenise almost, but not quite, like the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from cext.words import CONTRACTIONS, RULES, WHOLE, merge
from quantize.base.errors import CheckpointError, UnsupportedError
from quantize.source.bpe import NORMAL, Bpe, Table, added_kind
from quantize.source.checkpoint import read_json

# English contractions as llama.cpp spells them.
_SPELT_OUT = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
# GGUF's name -> the splitting rules, in order. One that ends in "..." is known by how it begins: lists of characters
# differ between releases of Unicode, their beginnings do not. In angle brackets: a step that is no regular expression.
PRE_TOKENIZERS: dict[str, tuple[str, ...]] = {
    "deepseek-llm": ("[\r\n]...", "\\s?[A-Za-zµ...", "\\s?[!-/:-~...", "\\s+$...", "[一-龥...", "<digits>"),
    "deepseek-coder": ("[\r\n]...", "\\s?\\p{L}+...", "\\s?\\p{P}+...", "[一-龥...", "<digits>"),
    "deepseek-v3": ("\\p{N}{1,3}...", "[一-龥...", "[!\"#$%&'()*+,\\-./:;<=>?@..."),
    "glm4": (
        CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    "gigachat": ("<gpt-2>",),
    "kanana2": (RULES["kanana2"],),
    "tekken": (RULES["tekken"],),
    "youtu": ("[가-힣ㄱ-ㆎ]+|...", RULES["youtu"]),
}


def read(path: Path, n_vocab: int) -> Bpe:
    """The vocabulary, padded to n_vocab tokens. Raises CheckpointError, UnsupportedError."""
    tokenizer = read_json(path)
    model = tokenizer.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or not isinstance(model.get("vocab"), dict):
        raise UnsupportedError(f"`{path}`: the model is not byte-level BPE")
    added = tokenizer.get("added_tokens") or []
    if not isinstance(added, list):
        raise CheckpointError(f"`{path}`: added_tokens is not a list")
    table = Table(path, n_vocab)
    for text, id_ in model["vocab"].items():
        table.put(text, id_, NORMAL)
    for token in added:
        if not isinstance(token, dict):
            raise CheckpointError(f"`{path}`: an added token is {token!r}, expected an object")
        table.put(token.get("content"), token.get("id"), added_kind(token))
    pre = recognise(path, tokenizer.get("pre_tokenizer"))
    merges = _merges(path, model.get("merges"))
    ordinary = model["vocab"].keys() - {token.get("content") for token in added}
    if pre in WHOLE and model.get("ignore_merges") is not True and (alone := unjoined(ordinary, merges)):
        raise UnsupportedError(
            f"`{path}`: `ignore_merges` is {model.get('ignore_merges')!r}, and {pre} GGUF can only say true: a word"
            f" {alone!r} would be that token, which no merges make",
            "the hub's copy of the tokenizer replaces it",
        )
    tokens, types = table.rows()
    in_front = _in_front(tokenizer.get("post_processor"))
    return Bpe(
        pre=pre,
        tokens=tokens,
        types=types,
        merges=tuple(merges),
        in_front=in_front[0] if in_front else None,
        notes=(*_unsaid_front(in_front[1:]), *_normalised(tokenizer.get("normalizer"))),
    )


def recognise(path: Path, pre_tokenizer: Any) -> str:
    """GGUF's name of a pre-tokenizer's rules. UnsupportedError where it has none."""
    rules = [rule for step in _steps(pre_tokenizer, "pretokenizers") for rule in _rule(step)]
    for name, known in PRE_TOKENIZERS.items():
        if len(rules) == len(known) and all(map(_is, rules, known)):
            return name
    raise UnsupportedError(
        f"`{path}`: the pre-tokenizer's {len(rules)} rules match none of {', '.join(PRE_TOKENIZERS)}",
        "text would be split otherwise than in training; this tokenizer is not of the DeepSeek-V2 family",
    )


def _is(rule: str, known: str) -> bool:
    return rule.startswith(known[:-3]) if known.endswith("...") else rule == known


def _steps(value: Any, key: str) -> list[dict[str, Any]]:
    """The steps of a pre-tokenizer, post-processor or normalizer: a sequence of them, or one."""
    if not isinstance(value, dict):
        return []
    steps = value.get(key, [value])
    return [step for step in steps if isinstance(step, dict)] if isinstance(steps, list) else []


def _rule(step: dict[str, Any]) -> list[str]:
    match step.get("type"):
        case "Split":
            pattern = step.get("pattern")
            text = str(pattern.get("Regex", pattern.get("String", ""))) if isinstance(pattern, dict) else ""
            # What stands between two matches is a word too: rules that match all text leave nothing there.
            whole = step.get("behavior") == "Isolated" or (step.get("behavior") == "Removed" and step.get("invert"))
            return [text.replace(_SPELT_OUT, CONTRACTIONS) if whole else f"<split {step.get('behavior')}>"]
        case "Digits" if step.get("individual_digits"):
            return ["<digits>"]
        case "ByteLevel":
            prefix = ["<a space in front>"] if step.get("add_prefix_space") else []
            return prefix + (["<gpt-2>"] if step.get("use_regex", True) else [])
        case kind:
            return [f"<{kind}>"]


def unjoined(tokens: Iterable[str], merges: Sequence[str]) -> str | None:
    """A token that the merges do not make of its characters; None where they make all."""
    ranks = {pair: rank for rank, pair in reversed(list(enumerate(merges)))}
    return next((token for token in sorted(tokens) if merge(token, ranks) != [token]), None)


def _merges(path: Path, merges: Any) -> list[str]:
    if not isinstance(merges, list) or not merges:
        raise CheckpointError(f"`{path}`: the BPE model has no merges")
    texts = []
    for entry in merges:
        pair = entry.split(" ") if isinstance(entry, str) else entry
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(p, str) and p for p in pair):
            raise CheckpointError(f"`{path}`: merge {entry!r} is not a pair of tokens")
        texts.append(f"{pair[0]} {pair[1]}")
    return texts


def _in_front(post_processor: Any) -> list[str]:
    """The tokens that a template puts before a text."""
    for step in _steps(post_processor, "processors"):
        single = step.get("single")
        if step.get("type") == "TemplateProcessing" and isinstance(single, list):
            pieces = [p.get("SpecialToken") if isinstance(p, dict) else None for p in single]
            return [str(p.get("id")) for p in takewhile(lambda p: isinstance(p, dict), pieces) if p]
    return []


def _unsaid_front(tokens: list[str]) -> tuple[str, ...]:
    told = f"GGUF puts one token before a text: {', '.join(tokens)}, which should follow it, stands in chats alone"
    return (told,) if tokens else ()


def _normalised(normalizer: Any) -> tuple[str, ...]:
    kinds = ", ".join(str(step.get("type")) for step in _steps(normalizer, "normalizers"))
    told = f"the tokenizer changes text before it splits it ({kinds}), which GGUF cannot say: text is read as it is"
    return (told,) if kinds else ()
