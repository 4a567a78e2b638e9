"""Answers of a given form: JSON Schema, regular expressions, choices and grammars, by llguidance.

llguidance says which tokens may come next; a mask before the sampler's cuts makes the others impossible. What it cannot
do is an error when the request comes, never an answer of another form.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import llguidance
import numpy as np
from llguidance.gbnf_to_lark import gbnf_to_lark

from cext.chat import THINK_TAGS
from dsv2cli.server.errors import bad_field

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from cext.tokenizer import Tokenizer
    from dsv2cli.server.generation import Constraint

MAX_GRAMMAR = 1 << 20  # characters
COMPILE_SECONDS = 2.0
LIMITS = llguidance.LLParserLimits(verbose_errors=False)
# Free whitespace invites a model to write nothing else.
JSON_OPTIONS: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
ANY_OBJECT = {"type": "object"}


class _Wrapped:
    """The vocabulary as llguidance asks for it."""

    def __init__(self, tokenizer: Tokenizer, n_vocab: int) -> None:
        self._tokenizer = tokenizer
        specials = {token: text for text, token in tokenizer.marker_ids.items()}
        self.eos_token_id = tokenizer.eos if tokenizer.eos is not None else 0
        self.bos_token_id = tokenizer.bos
        self.special_token_ids = sorted(specials)
        self.tokens = [
            specials[token].encode() if token in specials else tokenizer.token_bytes(token) for token in range(n_vocab)
        ]

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)


class Grammars:
    """Compiles what requests ask for. The vocabulary's table takes a second: it is made once, when first needed."""

    def __init__(self, tokenizer: Tokenizer, end_ids: Sequence[int]) -> None:
        self._tokenizer, self._end_ids = tokenizer, list(end_ids)
        self._lock = threading.Lock()
        self._made: llguidance.LLTokenizer | None = None

    def prepare(self) -> llguidance.LLTokenizer:
        with self._lock:
            if self._made is None:
                wrapped = _Wrapped(self._tokenizer, self._tokenizer.n_vocab)
                self._made = llguidance.LLTokenizer(
                    llguidance.TokenizerWrapper(wrapped), eos_token=self._end_ids or [wrapped.eos_token_id]
                )
        return self._made

    def schema(self, schema: Any, field: str) -> str:
        """Of a JSON Schema. ApiError where it is none, or asks for what is not supported."""
        if isinstance(schema, bool):
            schema = {} if schema else {"not": {}}
        if not isinstance(schema, dict):
            raise bad_field(field, "a JSON Schema is an object")
        text = json.dumps(schema)
        self._check_length(text, field)
        try:
            return str(llguidance.LLMatcher.grammar_from_json_schema(text, overrides=JSON_OPTIONS))
        except ValueError as error:  # numbers beyond float64
            raise bad_field(field, f"is no JSON Schema that can be read: {str(error)[:200]}") from None

    def regex(self, pattern: str, field: str) -> str:
        self._check_length(pattern, field)
        return llguidance.LLMatcher.grammar_from_regex(pattern)

    def choice(self, options: Sequence[str], field: str) -> str:
        if not options or not all(isinstance(option, str) and option for option in options):
            raise bad_field(field, "is no list of words")
        lark = "start: " + " | ".join(json.dumps(option) for option in options)
        self._check_length(lark, field)
        return llguidance.LLMatcher.grammar_from_lark(lark)

    def gbnf(self, grammar: str, field: str) -> str:
        """llama.cpp's form of grammars."""
        self._check_length(grammar, field)
        try:
            return llguidance.LLMatcher.grammar_from_lark(gbnf_to_lark(grammar))
        except Exception as error:  # its parser raises what it likes
            raise bad_field(field, f"is no grammar that can be read: {str(error)[:200]}") from None

    def lark(self, grammar: str) -> str:
        return llguidance.LLMatcher.grammar_from_lark(grammar)

    def _check_length(self, text: str, field: str) -> None:
        if len(text) > MAX_GRAMMAR:
            raise bad_field(field, f"is longer than {MAX_GRAMMAR} characters")

    def compiled(
        self, grammar: str, field: str, opening: str = "", after: int | None = None, begun: str = ""
    ) -> Callable[[], Constraint]:
        """What makes a constraint for each answer. The first mask is made here, so that what fails does so at once.

        opening: the reasoning tag at the prompt's end, if there is one: the form begins after its closing one. after:
        the token that it begins after instead, if that comes. begun: text that the answer goes on with.
        """
        started = time.monotonic()
        matcher = llguidance.LLMatcher(self.prepare(), grammar, log_level=0, limits=LIMITS)
        if error := matcher.get_error() or self._first_error(matcher):
            raise bad_field(field, f"cannot be followed: {error[:300]}")
        ids = self._tokenizer.encode(begun)
        if matcher.try_consume_tokens(ids) < len(ids):
            raise bad_field(field, f"does not allow an answer that begins like the last message: {begun[:100]!r}")
        if time.monotonic() - started > COMPILE_SECONDS:
            raise bad_field(field, f"takes longer than {COMPILE_SECONDS:g} s to prepare: make it simpler")
        behind = self._closing(opening) if after is None else after
        return lambda: Matching(matcher.deep_copy(), behind)

    @staticmethod
    def _first_error(matcher: llguidance.LLMatcher) -> str:
        """What only the first mask shows: a schema that refers to itself without end."""
        trial = matcher.deep_copy()
        trial.compute_bitmask()
        return trial.get_error() if trial.is_error() else ""

    def _closing(self, opening: str) -> int | None:
        tags = [closing for tag, closing in THINK_TAGS if tag == opening.strip()]
        return self._tokenizer.control_id(tags[0]) if tags else None


class Matching:
    """A ``generation.Constraint``: one answer's place in a grammar, behind the token ``after`` (None: at once)."""

    def __init__(self, matcher: llguidance.LLMatcher, after: int | None) -> None:
        self._matcher, self._after = matcher, after

    def mask(self, logits: NDArray[np.float32]) -> None:
        if self._after is not None:
            return
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            raise ValueError(f"the form that was asked for cannot be followed: {self._matcher.get_error()[:300]}")
        allowed = np.unpackbits(bits, bitorder="little")[: len(logits)].astype(bool)
        logits[: len(allowed)][~allowed] = -np.inf
        logits[len(allowed) :] = -np.inf

    def accept(self, token: int) -> None:
        if self._after is None:
            self._matcher.consume_token(token)
        elif token == self._after:
            self._after = None
