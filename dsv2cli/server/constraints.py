"""Answers of a given form: JSON Schema, regular expressions, choices and grammars, by llguidance.

llguidance says which tokens may come next; a mask before the sampler's cuts makes the others impossible. What it cannot
do is an error when the request comes, never an answer of another form.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import llguidance
import numpy as np

from cext.chat import THINK_TAGS
from dsv2cli.server import trial
from dsv2cli.server.errors import ApiError, bad_field

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from cext.tokenizer import Tokenizer
    from dsv2cli.server.generation import Constraint

MAX_GRAMMAR = 1 << 20  # characters
COMPILE_SECONDS = 2.0
MOST_READ = 32  # llama.cpp's grammars that are remembered as llguidance's
MOST_TRIED = 4096  # outcomes of trials that are remembered
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
    """Compiles what requests ask for. The vocabulary's table takes a second and makes other threads
    wait: it is made once, with ``prepare`` or when first needed."""

    def __init__(self, tokenizer: Tokenizer, end_ids: Sequence[int]) -> None:
        self._tokenizer, self._end_ids = tokenizer, list(end_ids)
        self._lock = threading.Lock()
        self._made: llguidance.LLTokenizer | None = None
        self._tried: dict[bytes, str] = {}  # why a grammar cannot be followed, by its hash
        self._read: dict[bytes, str] = {}  # what llama.cpp's form is in llguidance's, by its hash

    @property
    def is_prepared(self) -> bool:
        return self._made is not None

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
        key = _key(grammar)
        read = self._read.get(key)
        if read is None:
            try:
                read, error = trial.tried("gbnf", grammar)
            except ValueError as unread:
                raise bad_field(field, f"is no grammar that can be read: {str(unread)[:200]}") from None
            except trial.TooMuchError:
                raise _too_much(field) from None
            self._remember(self._read, key, read, MOST_READ)
            self._remember(self._tried, _key(read), error, MOST_TRIED)
        return read

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
        tokenizer = self._prepared(field)
        error = self._trial(grammar, field)
        started = time.thread_time()  # of this thread: the machine may be busy with others
        if not error:
            matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=trial.LIMITS)
            error = trial.first_error(matcher)
        if error:
            raise bad_field(field, f"cannot be followed: {error[:300]}")
        ids = self._tokenizer.encode(begun)
        if matcher.try_consume_tokens(ids) < len(ids):
            raise bad_field(field, f"does not allow an answer that begins like the last message: {begun[:100]!r}")
        if time.thread_time() - started > COMPILE_SECONDS:
            raise _too_much(field)
        behind = self._closing(opening) if after is None else after
        return lambda: Matching(matcher.deep_copy(), behind)

    def _prepared(self, field: str) -> llguidance.LLTokenizer:
        """ApiError where the model's vocabulary is none that it can be had from."""
        try:
            return self.prepare()
        except Exception as error:
            message = f"{field}: no answer of this model can be held to a form: {str(error)[:200]}"
            raise ApiError(501, message, "not_supported_error", param=field) from None

    def _trial(self, grammar: str, field: str) -> str:
        """Why a grammar cannot be followed, or "", from a process that can be ended; once for each grammar."""
        key = _key(grammar)
        error = self._tried.get(key)
        if error is None:
            try:
                _, error = trial.tried("grammar", grammar)
            except trial.TooMuchError:
                raise _too_much(field) from None
            self._remember(self._tried, key, error, MOST_TRIED)
        return error

    def _remember(self, outcomes: dict[bytes, str], key: bytes, outcome: str, most: int) -> None:
        """The oldest are forgotten."""
        with self._lock:
            outcomes[key] = outcome
            while len(outcomes) > most:
                del outcomes[next(iter(outcomes))]

    def _closing(self, opening: str) -> int | None:
        tags = [closing for tag, closing in THINK_TAGS if tag == opening.strip()]
        return self._tokenizer.control_id(tags[0]) if tags else None


def _key(grammar: str) -> bytes:
    return blake2b(grammar.encode(errors="surrogatepass"), digest_size=32).digest()


def _too_much(field: str) -> ApiError:
    return bad_field(field, "takes too long to prepare: make it simpler")


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
