"""vocabulary.py: the tokenizer keys of a GGUF, checked, and llama.cpp's vocabulary made from them.

Owned here is what llama.cpp would abort on, guess or keep to itself: files are looked at before it reads them, what is
missing is told, and what it says on loading is kept.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import re
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp
from gguf import GGUFValueType, GGUFWriter

from cext.errors import TokenizerError
from cext.gguf import Gguf
from cext.words import RULES, Words

NORMAL, UNKNOWN_TOKEN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # tokenizer.ggml.token_type
# Control tokens are written like this in every vocabulary of the family; some files mark them as ordinary text.
MARKER = re.compile("<[|｜][^<>]{1,64}[|｜]>")
BYTE_PAIRS, PIECES = "gpt2", "llama"  # tokenizer.ggml.model: byte-level byte-pair encoding, SentencePiece
NO_VOCABULARY = (None, "", "none", "no_vocab")
# What SentencePiece's own trainer gives these tokens, and llama.cpp takes where a file does not say.
PIECES_NAMED = {"unknown": 0, "bos": 1, "eos": 2}
# What llama.cpp says where a key has another type than it expects, or the architecture is younger than it is.
OTHER_TYPE = re.compile("wrong type|invalid gguf type|unknown model architecture")
WARN, ERROR, CONT = 3, 4, 5  # ggml's log levels
MAX_KEPT = 64  # lines of llama.cpp's log


@dataclass(frozen=True)
class Vocabulary:
    """What a file says of its vocabulary.

    specials: id -> spelling of the tokens that mark structure: control tokens; user-defined ones and those with a
    name of their own that are written as markers ("<think>", "[INST]"); those written like control tokens whatever
    their type. named: ids by name ("bos", "eos", "padding"), where the file names one that it has. template: the Jinja
    source, or None. kind: tokenizer.ggml.model. unknown: tokens that stand for characters that the vocabulary lacks;
    byte pairs lack none. space_first: a text begins with a space of its own (SentencePiece).
    """

    kind: str
    n_vocab: int
    specials: Mapping[int, str]
    named: Mapping[str, int]
    pre: str | None
    template: str | None
    unknown: frozenset[int]
    space_first: bool


def read(path: str) -> Vocabulary:
    """The vocabulary's facts. TokenizerError where there is none, or one that llama.cpp would misread; OSError."""
    with Gguf(path) as gguf:
        metadata = gguf.metadata
        kind = metadata.get("tokenizer.ggml.model")
        if kind in NO_VOCABULARY or not isinstance(kind, str):
            raise TokenizerError(f"`{path}` has no vocabulary", "take a file that holds the vocabulary")
        tokens = metadata.get("tokenizer.ggml.tokens")
        if tokens is None:
            raise TokenizerError(f"`{path}`: tokenizer.ggml.tokens is missing", "take a file that holds the vocabulary")
        if not isinstance(tokens, list) or not tokens or not isinstance(tokens[0], str):
            raise TokenizerError(f"`{path}`: tokenizer.ggml.tokens is not a list of strings")
        if len(set(tokens)) != len(tokens):
            raise TokenizerError(f"`{path}`: {len(tokens) - len(set(tokens))} tokens of the vocabulary are there twice")
        if kind == PIECES and (byte := _missing_byte(tokens)) is not None:  # llama.cpp would end the process
            raise TokenizerError(
                f"`{path}`: the vocabulary has no token for the byte {byte:#04x}, to write unknown characters in",
                "the file is damaged, or its converter was: take another file of the model",
            )
        types = metadata.get("tokenizer.ggml.token_type")
        template = metadata.get("tokenizer.chat_template")
        pre = metadata.get("tokenizer.ggml.pre")
        named = {name: i for name, i in PIECES_NAMED.items() if kind == PIECES and i < len(tokens)}
        for key in metadata:
            if (match := re.fullmatch(r"tokenizer\.ggml\.(\w+)_token_id", key)) and _is_id(metadata[key], len(tokens)):
                named[match[1]] = int(metadata[key])
        space_first = kind == PIECES and bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    types = types if isinstance(types, list) else []
    unknown = {i for i, token_type in enumerate(types[: len(tokens)]) if token_type == UNKNOWN_TOKEN}
    unknown |= {named["unknown"]} if "unknown" in named else set()
    return Vocabulary(
        kind,
        len(tokens),
        _specials(tokens, types, named.values()),
        named,
        pre if isinstance(pre, str) else None,
        template if isinstance(template, str) and template.strip() else None,
        frozenset(unknown if kind != BYTE_PAIRS else ()),
        space_first,
    )


def words(path: str, pre: str | None) -> Words | None:
    """The file's rule and merges, where llama.cpp keeps to its rule in ASCII alone; None where it does, or where the
    file tells no merges. OSError."""
    if pre is None or pre not in RULES:
        return None
    with Gguf(path) as gguf:
        metadata = gguf.metadata
        tokens, merges = metadata["tokenizer.ggml.tokens"], metadata.get("tokenizer.ggml.merges")
        types = metadata.get("tokenizer.ggml.token_type", [])
    if not isinstance(merges, list) or not all(isinstance(merge, str) for merge in merges):
        return None
    kinds = [*types, *[NORMAL] * len(tokens)] if isinstance(types, list) else [NORMAL] * len(tokens)
    normal, defined = ({t: i for i, t in enumerate(tokens) if kinds[i] == kind} for kind in (NORMAL, USER_DEFINED))
    return Words(pre, normal, merges, defined)


def _missing_byte(tokens: list[str]) -> int | None:
    """The first byte that a SentencePiece vocabulary spells neither as <0x41> nor as itself."""
    known = set(tokens)
    return next((b for b in range(256) if f"<0x{b:02X}>" not in known and (b > 127 or chr(b) not in known)), None)


def _is_id(value: object, n_vocab: int) -> bool:
    return isinstance(value, int) and 0 <= value < n_vocab


def _specials(tokens: list[str], types: list[Any], named: Iterable[int]) -> dict[int, str]:
    control = {i for i, kind in enumerate(types[: len(tokens)]) if kind in (CONTROL, UNKNOWN_TOKEN)}
    defined = {i for i, kind in enumerate(types[: len(tokens)]) if kind == USER_DEFINED} | set(named)
    written = {i for i, text in enumerate(tokens) if text[:1] == "<" and MARKER.fullmatch(text)}
    return {i: tokens[i] for i in sorted(control | written | {i for i in defined if is_written_as_marker(tokens[i])})}


def is_written_as_marker(text: str) -> bool:
    """Words between signs: "<think>", "[gMASK]", "｜DSML｜". User-defined tokens are also letters and runs of spaces
    that the byte-pair merges leave out, and those are text."""
    ends = text[:1] + text[-1:]
    return len(text) > 2 and not any(c.isalnum() or c.isspace() for c in ends) and any(c.isalpha() for c in text)


class Log:
    """What llama.cpp said while it loaded a file: warnings and errors, without the name of the function."""

    def __init__(self) -> None:
        self.lines: list[tuple[int, str]] = []

    def add(self, level: int, text: str) -> None:
        line = re.sub(r"^\w+:\s*", "", text.strip()).strip(" *")
        if level in (WARN, ERROR) and line and len(self.lines) < MAX_KEPT:
            self.lines.append((level, line))

    @property
    def reason(self) -> str:
        """Why it refused: its first error, without the words that every refusal begins with."""
        errors = [line for level, line in self.lines if level == ERROR]
        return re.sub("^(error loading model( vocabulary)?: )+", "", errors[0]) if errors else "it gives no reason"

    @property
    def warnings(self) -> list[str]:
        return list(dict.fromkeys(line for level, line in self.lines if level == WARN))


_loading = threading.Lock()  # llama.cpp has one log for the process
_log: Log | None = None


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _keep_log(level: int, text: bytes, user_data: Any) -> None:
    """llama.cpp writes its loader's log to stderr, which is ours."""
    if _log is not None:
        _log.add(level, (text or b"").decode("utf-8", "replace"))


@functools.cache
def start_llama() -> None:
    """Start llama.cpp's backend, once, with its log ours."""
    take_log()
    llama_cpp.llama_backend_init()


def take_log() -> None:
    """Take llama.cpp's log, which others in the process may have taken since. DSV2_DEBUG leaves it on the terminal."""
    if not os.environ.get("DSV2_DEBUG"):
        llama_cpp.llama_log_set(_keep_log, ctypes.c_void_p(0))


@contextlib.contextmanager
def kept_log() -> Iterator[Log]:
    """What llama.cpp says in the block, which no other thread's runs beside."""
    global _log  # noqa: PLW0603
    with _loading:
        take_log()
        _log = log = Log()
        try:
            yield log
        finally:
            _log = None


def load(path: str, kind: str) -> tuple[Any, Log]:
    """llama.cpp's model of a file's vocabulary, which the caller frees, and what it said. TokenizerError.

    Of SentencePiece's kind it adds no space before a text: that is for the text's first piece alone.
    """
    start_llama()
    model, log = _load(path, kind)
    if model is None and OTHER_TYPE.search(log.reason):
        with _plain_copy(path) as copy:
            model, log = _load(copy, kind)
    if model is None:
        raise TokenizerError(f"`{path}`: llama.cpp cannot load the vocabulary: {log.reason}", _remedy(log.reason))
    return model, log


def _load(path: str, kind: str) -> tuple[Any | None, Log]:
    params = llama_cpp.llama_model_default_params()
    params.vocab_only = True
    overrides = (llama_cpp.llama_model_kv_override * 2)()  # the first says no; the second, empty, ends the list
    overrides[0].tag = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_BOOL
    overrides[0].key = b"tokenizer.ggml.add_space_prefix"
    if kind == PIECES:
        params.kv_overrides = overrides
    with kept_log() as log:
        model = llama_cpp.llama_model_load_from_file(os.fsencode(path), params)
    return model or None, log


def _remedy(reason: str) -> str:
    if "pre-tokenizer" in reason:
        return "llama-cpp-python may be older than this model: pip install -U llama-cpp-python"
    return "the file's vocabulary is damaged or incomplete"


@contextlib.contextmanager
def _plain_copy(path: str) -> Iterator[str]:
    """A GGUF of the vocabulary alone, in the types that llama.cpp expects: it reads no other, though others say the
    same."""
    with Gguf(path) as gguf:
        keys = {key: gguf.metadata[key] for key in gguf.metadata if key.startswith("tokenizer.ggml.")}
    n_vocab = len(keys["tokenizer.ggml.tokens"])
    with tempfile.TemporaryDirectory(prefix="dsv2-", ignore_cleanup_errors=True) as folder:
        copy = Path(folder) / "vocabulary.gguf"
        writer = GGUFWriter(copy, "deepseek2")
        for key, value in keys.items():
            name = key.rpartition(".")[2]
            if name.startswith("add_"):
                writer.add_bool(key, bool(value))
            elif name.endswith("_token_id"):
                if _is_id(value, n_vocab):
                    writer.add_uint32(key, value)
            elif name == "token_type" and isinstance(value, list):
                writer.add_key_value(key, list(map(int, value)), GGUFValueType.ARRAY, GGUFValueType.INT32)
            elif name in ("tokens", "merges", "scores") and isinstance(value, list):
                writer.add_array(key, value)
            elif isinstance(value, str):
                writer.add_string(key, value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        yield str(copy)
