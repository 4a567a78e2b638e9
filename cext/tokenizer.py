"""tokenizer.py: text to token ids and back, and chats to prompts, from a GGUF's own vocabulary.

The byte-pair work is llama.cpp's (llama-cpp-python, ``vocab_only``: no weight is read). Owned here is what must hold
whatever the vocabulary says: text typed by a person never becomes a control token, half a UTF-8 character is never
shown, and no input, however long or strange, takes the process down.
"""

from __future__ import annotations

import codecs
import contextlib
import ctypes
import functools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import llama_cpp

from cext.errors import EngineError
from cext.gguf import Gguf

# Control tokens are written like this in every vocabulary of the family; some files mark them as ordinary text.
MARKER = re.compile("<[|｜][^<>\ue000]{1,64}[|｜]>")
# llama.cpp splits words with std::regex, which recurses once a character, at 300 bytes each: 30,000 letters in a row
# overflow the usual stack of 8 MB. Runs past this length, which fits 512 KB, are cut; nothing shorter is ever touched.
MAX_RUN = 1024
LONG_RUN = re.compile(rf"\S{{{MAX_RUN + 1},}}|\s{{{MAX_RUN + 1},}}")
# A word always ends between a letter and the punctuation after it, so a cut there changes nothing.
WORD_END = re.compile(r"(?<=[A-Za-z])(?=[!-/:-@\[-`{-~])|(?<=[一-龥])(?=[！-／：-～‘-‟、。])")
MAX_TEXT_BYTES = 1 << 30  # llama.cpp counts bytes and tokens in 32 bits

DEFAULT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
{%- if message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\\n\\n' }}
{%- elif message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + eos_token }}
{%- else %}{{ message['content'] + '\\n\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"""
PLACEHOLDER = re.compile("\ue000([0-9]+)\ue001")  # of a message; no marker holds one


class TokenizerError(EngineError):
    """The vocabulary or the chat template in a file cannot be used."""


@dataclass(frozen=True)
class Message:
    """One message of a chat. An assistant's content may be the ids it was sampled as, which are kept as they are."""

    role: str  # "system", "user" or "assistant"
    content: str | Sequence[int]


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _discard_log(level: int, text: bytes, user_data: Any) -> None:
    """llama.cpp writes its loader's log to stderr, which is ours."""


@functools.cache
def _start_llama() -> None:
    """Silence llama.cpp and start its backend, once. DSV2_DEBUG leaves the log on."""
    if not os.environ.get("DSV2_DEBUG"):
        llama_cpp.llama_log_set(_discard_log, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()


class Tokenizer:
    """The vocabulary of a GGUF. Raises TokenizerError where the file has none that can be used, OSError where no file.

    n_vocab: tokens in the vocabulary (a model's logits may have more, as padding). bos, eos: ids, or None. add_bos:
    whether a text begins with bos. chat_template: the file's Jinja template, or None.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._model = self._vocab = None
        self._pieces: dict[int, bytes] = {}
        self._special: dict[int, str | None] = {}
        self.n_vocab, self.bos, self.eos, self.chat_template = _checked_vocabulary(self.path)
        _start_llama()
        params = llama_cpp.llama_model_default_params()
        params.vocab_only = True
        self._model = llama_cpp.llama_model_load_from_file(self.path.encode(), params)
        if not self._model:
            raise TokenizerError(
                f"`{self.path}`: llama.cpp cannot load the vocabulary", "DSV2_DEBUG=1 shows what it says about it"
            )
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)
        self.add_bos: bool = self.bos is not None and bool(llama_cpp.llama_vocab_get_add_bos(self._vocab))

    def close(self) -> None:
        """Release the vocabulary. Calls after it raise TokenizerError."""
        if self._model:
            llama_cpp.llama_model_free(self._model)
            self._model = self._vocab = None

    def __enter__(self) -> Tokenizer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.close()

    # Text to ids.

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, without BOS. Never a control token, whatever the text spells."""
        ids: list[int] = []
        for piece in _cut_long_runs(text):
            ids += self._encode_plain(piece)
        return ids

    def prompt(self, text: str) -> list[int]:
        """Ids of a text from its beginning: BOS where the vocabulary asks for one, then ``encode(text)``."""
        return [*([self.bos] if self.add_bos and self.bos is not None else []), *self.encode(text)]

    def control_id(self, text: str) -> int | None:
        """The control token that is spelt exactly ``text``, or None. For templates; never for what a person typed."""
        ids = self._tokenize(text, parse_special=True)
        return ids[0] if len(ids) == 1 and self.special_text(ids[0]) == text else None

    def special_text(self, token: int) -> str | None:
        """The spelling of a control token (marked so, or written like one: <|...|>); None for ordinary tokens."""
        if token not in self._special:
            text = (llama_cpp.llama_vocab_get_text(self._open_vocab(), token) or b"").decode("utf-8", "replace")
            control = llama_cpp.llama_vocab_is_control(self._vocab, token) or MARKER.fullmatch(text)
            self._special[token] = text if control else None
        return self._special[token]

    def _encode_plain(self, text: str) -> list[int]:
        ids = self._tokenize(text, parse_special=False)
        for token in set(ids):
            spelling = self.special_text(token)
            if spelling is None:
                continue
            if len(spelling) < 2 or spelling not in text:
                raise TokenizerError(
                    f"`{self.path}`: the vocabulary marks {spelling!r}, ordinary text, as control token {token}"
                )
            # A control token marked as text: break its spelling apart, and it cannot be matched.
            return [i for piece in _break_apart(text, spelling) for i in self._encode_plain(piece)]
        return ids

    def _tokenize(self, text: str, parse_special: bool) -> list[int]:
        data = _utf8(text)
        if len(data) > MAX_TEXT_BYTES:
            raise TokenizerError(f"a text of {len(data)} bytes is too long to tokenise at once", "split it")
        size = len(data) + 1  # a token spells at least one byte
        ids = (llama_cpp.llama_token * size)()
        n = llama_cpp.llama_tokenize(self._open_vocab(), data, len(data), ids, size, False, parse_special)
        if n < 0:
            raise TokenizerError(f"`{self.path}`: the vocabulary cannot spell {text[:40]!r}")
        return list(ids[:n])

    def _open_vocab(self) -> Any:
        if self._vocab is None:
            raise TokenizerError(f"`{self.path}`: the tokenizer was closed")
        return self._vocab

    # Ids to text.

    def token_bytes(self, token: int) -> bytes:
        """The bytes a token adds to the text: part of a character at times; none for control tokens."""
        if token not in self._pieces:
            if not 0 <= token < self.n_vocab:  # a padded row of the head, which no text has
                return b""
            buffer = ctypes.create_string_buffer(64)
            n = llama_cpp.llama_token_to_piece(self._open_vocab(), token, buffer, len(buffer), 0, False)
            if n < 0:
                buffer = ctypes.create_string_buffer(-n)
                n = llama_cpp.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, False)
            self._pieces[token] = buffer.raw[: max(n, 0)]
        return self._pieces[token]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of a whole sequence; bytes that are no UTF-8 become U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def stream(self) -> TextStream:
        return TextStream(self)

    def is_end(self, token: int) -> bool:
        """True for EOS and the other tokens that end an answer."""
        return bool(0 <= token < self.n_vocab and llama_cpp.llama_vocab_is_eog(self._open_vocab(), token))

    # Chats.

    def chat(self, messages: Sequence[Message], *, answer: bool = True) -> list[int]:
        """A chat as the model was trained to read it, from BOS on; ends where the answer begins if ``answer``.

        The template is rendered with placeholders in the messages' places: control tokens come from the template's own
        text alone, and what a person typed never reaches the template engine. Plain template text and typed text are
        tokenised together, since words join across them ("User: " + "Hi" reads "User", ":", " Hi").
        """
        names = [chr(0xE000) + str(i) + chr(0xE001) for i in range(len(messages))]
        shown = [{"role": m.role, "content": name} for m, name in zip(messages, names, strict=True)]
        rendered = self._render(shown, answer)
        used = [int(i) for i in PLACEHOLDER.findall(rendered)]
        if missing := sorted(set(range(len(messages))) - set(used)):
            raise TokenizerError(
                f"`{self.path}`: the chat template leaves out the {messages[missing[0]].role} message",
                "chat without it, or use --raw",
            )
        ids: list[int] = []
        run = ""  # plain text not tokenised yet
        for part in self._parts(rendered):
            content = part if isinstance(part, str) else messages[part.index].content if part.index >= 0 else [part.id]
            if isinstance(content, str):
                run += content
                continue
            # A sampled answer begins with its own space, where the template has one for an answer given as text.
            sampled = not isinstance(part, str) and part.index >= 0
            ids += self.encode(run.rstrip(" ") if sampled else run)
            ids += content
            run = ""
        ids += self.encode(run)
        if self.add_bos and self.bos is not None and ids[:1] != [self.bos]:
            ids.insert(0, self.bos)
        return ids

    def _render(self, messages: list[dict[str, str]], answer: bool) -> str:
        try:
            text: str = _template(self.chat_template or DEFAULT_TEMPLATE).render(
                messages=messages,
                add_generation_prompt=answer,
                bos_token=self._spelling(self.bos),
                eos_token=self._spelling(self.eos),
            )
            return text
        except Exception as error:  # a template is a program from a file: anything can be wrong with it
            raise TokenizerError(
                f"`{self.path}`: the chat template refused the conversation: {error}", "--raw goes without a template"
            ) from error

    def _spelling(self, token: int | None) -> str:
        return (self.special_text(token) or "") if token is not None else ""

    def _parts(self, rendered: str) -> Iterator[str | _Part]:
        """Rendered text as plain text, control tokens (``id``) and message contents (``index``), in order."""
        ends = [re.escape(s) for t in (self.bos, self.eos) if (s := self._spelling(t))]
        pattern = "|".join([PLACEHOLDER.pattern.replace("(", "(?:"), MARKER.pattern, *ends])
        for text in re.split(f"({pattern})", rendered):
            if place := PLACEHOLDER.fullmatch(text):
                yield _Part(index=int(place[1]))
            elif (token := self.control_id(text) if re.fullmatch(pattern, text) else None) is not None:
                yield _Part(id=token)
            elif text:
                yield text


@dataclass(frozen=True)
class _Part:
    """A piece of a rendered template that is not its plain text."""

    index: int = -1  # of a message, whose content stands here
    id: int = -1  # or a control token


def _checked_vocabulary(path: str) -> tuple[int, int | None, int | None, str | None]:
    """(n_vocab, bos, eos, chat template) of a file; refuses what would abort inside llama.cpp or mislead it."""
    with Gguf(path) as gguf:
        kind = gguf.metadata.get("tokenizer.ggml.model")
        if kind != "gpt2":
            what = f"a vocabulary of kind `{kind}`" if kind else "no vocabulary"
            raise TokenizerError(f"`{path}` has {what}, expected byte-pair encoding (gpt2)")
        tokens = gguf.metadata.get("tokenizer.ggml.tokens")
        if not isinstance(tokens, list) or not tokens or not isinstance(tokens[0], str):
            raise TokenizerError(f"`{path}`: tokenizer.ggml.tokens is not a list of strings")
        if len(set(tokens)) != len(tokens):
            raise TokenizerError(f"`{path}`: {len(tokens) - len(set(tokens))} tokens of the vocabulary are there twice")

        def token(key: str) -> int | None:
            value = gguf.metadata.get(f"tokenizer.ggml.{key}_token_id")
            return value if isinstance(value, int) and 0 <= value < len(tokens) else None

        template = gguf.metadata.get("tokenizer.chat_template")
        return len(tokens), token("bos"), token("eos"), template if isinstance(template, str) else None


class TextStream:
    """Ids to text as they come. Bytes of an unfinished character wait for the rest of it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: int) -> str:
        return self._decoder.decode(self._tokenizer.token_bytes(token))

    def finish(self) -> str:
        """What is left when no token follows: U+FFFD for a character that never ended."""
        return self._decoder.decode(b"", True)


def _utf8(text: str) -> bytes:
    """UTF-8, with surrogates that stand for nothing (undecodable bytes of a terminal or a file) as U+FFFD."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


def _cut_long_runs(text: str) -> Iterator[str]:
    """``text`` in pieces with no run of spaces, or of anything else, longer than MAX_RUN; short texts are one piece."""
    start = 0
    for run in LONG_RUN.finditer(text):
        at = run.start()
        while run.end() - at > MAX_RUN:
            ends = [m.start() for m in WORD_END.finditer(text, at + 1, at + MAX_RUN)]
            at = ends[-1] if ends else at + MAX_RUN
            yield text[start:at]
            start = at
    yield text[start:]


def _break_apart(text: str, spelling: str) -> Iterator[str]:
    """``text`` cut after the first character of each ``spelling`` in it."""
    start = 0
    while (at := text.find(spelling, start)) >= 0:
        yield text[start : at + 1]
        start = at + 1
    yield text[start:]


@functools.cache
def _template(source: str) -> Any:
    """A compiled chat template, in Jinja's sandbox: it came with the file."""
    from jinja2 import TemplateError  # noqa: PLC0415
    from jinja2.sandbox import ImmutableSandboxedEnvironment  # noqa: PLC0415

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    return environment.from_string(source)
