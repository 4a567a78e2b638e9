"""tokenizer.py: text to token ids and back, and chats to prompts, from a GGUF's own vocabulary.

The byte-pair work is llama.cpp's (llama-cpp-python, ``vocab_only``: no weight is read). Owned here is what must hold
whatever the vocabulary says: text typed by a person never becomes a control token, half a UTF-8 character is never
shown, and no input, however long or strange, takes the process down.
"""

from __future__ import annotations

import codecs
import contextlib
import ctypes
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from os import PathLike
from typing import Any

import llama_cpp

from cext import vocabulary
from cext.chat import MAX_OPENING, THINK_TAGS, Answer, Message, chat_ids, has_switch, split_answer, switches
from cext.errors import TemplateError, TokenizerError
from cext.traced import Traced
from cext.words import Words

__all__ = ["Answer", "Message", "TemplateError", "TextStream", "Tokenizer", "TokenizerError"]

# llama.cpp splits words with std::regex, which recurses once a character, at 300 bytes each: 30,000 letters in a row
# overflow the usual stack of 8 MB. Runs past this length, which fits 512 KB, are cut; nothing shorter is ever touched.
MAX_RUN = 1024
LONG_RUN = re.compile(rf"\S{{{MAX_RUN + 1},}}|\s{{{MAX_RUN + 1},}}")
# A word always ends between a letter and the punctuation after it, so a cut there changes nothing.
WORD_END = re.compile(r"(?<=[A-Za-z])(?=[!-/:-@\[-`{-~])|(?<=[一-龥])(?=[！-／：-～‘-‟、。])")
REASONING = frozenset(itertools.chain(*THINK_TAGS))
# Warnings of llama.cpp's that are told in our own words, or are about what it guesses and we do not.
TOLD = re.compile("missing pre-tokenizer|QUALITY WILL BE|CONSIDER REGEN|special_eo[stm]_id is not in|bad special token")
MAX_TOLD = 4
PIECE = 1 << 16  # tokens or characters that are gone through at once: other threads of the interpreter wait meanwhile
MAX_TEXT_BYTES = 1 << 30  # llama.cpp counts bytes and tokens in 32 bits

DEFAULT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
{%- if message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\\n\\n' }}
{%- elif message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + eos_token }}
{%- else %}{{ message['content'] + '\\n\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"""


class _Vocab(int):
    """llama.cpp's vocabulary: its address. The model that it lies in is freed with the last reference, of which a call
    under way in another thread holds one."""

    _model: Any

    def __new__(cls, model: Any) -> _Vocab:
        vocab = super().__new__(cls, llama_cpp.llama_model_get_vocab(model))
        vocab._model = model
        return vocab

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # the interpreter may be ending
            llama_cpp.llama_model_free(self._model)


class Tokenizer:
    """The vocabulary of a GGUF. Raises TokenizerError where the file has none that can be used, OSError where no file.

    n_vocab: tokens in the vocabulary (a model's logits may have more, as padding). bos, eos: ids, or None. add_bos:
    whether a text begins with bos. chat_template: the file's Jinja template, or None. markers, marker_ids: how control
    tokens are spelt, for templates. notes: what the file does not say and was assumed, to be told once.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = os.fsdecode(path)
        self._vocab: _Vocab | None = None
        self._pieces: dict[int, bytes] = {}
        self._facts = vocabulary.read(self.path)
        self.n_vocab, self.chat_template = self._facts.n_vocab, self._facts.template
        self.bos, self.eos = self._facts.named.get("bos"), self._facts.named.get("eos")
        self._special: dict[int, str | None] = dict(self._facts.specials)
        self.marker_ids = {text: token for token, text in self._facts.specials.items() if len(text) > 1}
        model, log = vocabulary.load(self.path, self._facts.kind)
        self._vocab = _Vocab(model)
        self.add_bos: bool = self.bos is not None and bool(llama_cpp.llama_vocab_get_add_bos(self._vocab))
        self.notes = self._assumptions(log.warnings)

    def _assumptions(self, warnings: Sequence[str]) -> tuple[str, ...]:
        notes = []
        if self._facts.pre is None and self._facts.kind == vocabulary.BYTE_PAIRS:
            notes.append(
                "does not say how text is split into words (tokenizer.ggml.pre): llama.cpp's default rules are assumed,"
                " and tokens may differ from those the model was trained on"
            )
        if self.eos is None:
            ends = [text for token, text in self._facts.specials.items() if self.is_end(token)]
            what = (
                f"answers end at {', '.join(ends[:4])}" if ends else "nothing but -n or a full context ends an answer"
            )
            notes.append(f"names no token that ends an answer (tokenizer.ggml.eos_token_id): {what}")
        if self.chat_template is None:
            notes.append(
                'has no chat template (tokenizer.chat_template): DeepSeek-V2\'s "User: ... Assistant: ..." is assumed'
            )
        told = [line for line in warnings if not TOLD.search(line)]
        return (*notes, *(f"llama.cpp says of its vocabulary: {line}" for line in told[:MAX_TOLD]))

    def close(self) -> None:
        """Release the vocabulary, after the calls that are under way. Calls after it raise TokenizerError."""
        self._vocab = None

    def __enter__(self) -> Tokenizer:
        self._open_vocab()  # TokenizerError where it is closed
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # Text to ids.

    def encode(self, text: str, *, special: bool = False, continues: bool = False) -> list[int]:
        """Ids of plain text, without BOS. Never a control token, whatever the text spells, unless ``special``.

        continues: the text goes on after other text, and does not begin with the space that SentencePiece puts there.
        """
        ids: list[int] = []
        at = 0
        for match in self.markers.finditer(text) if special else ():
            ids += self.encode(text[at : match.start()])
            ids.append(self.marker_ids[match[0]])
            at = match.end()
        rest = text[at:]
        if self._facts.kind == vocabulary.PIECES:
            space = " " if self._facts.space_first and rest and not (continues and not at) else ""
            return ids + self._encode_plain(space + rest)
        for piece in _cut_long_runs(rest) if self._facts.kind == vocabulary.BYTE_PAIRS else [rest]:
            ids += self._encode_plain(piece)
        return ids

    @cached_property
    def markers(self) -> re.Pattern[str]:
        """Matches the spelling of any control token, the longest there is."""
        return re.compile("|".join(map(re.escape, sorted(self.marker_ids, key=len, reverse=True))) or "(?!)")

    def prompt(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of a text from its beginning: BOS where the vocabulary asks for one, then ``encode(text)``."""
        ids = self.encode(text, special=special)
        return [self.bos, *ids] if self.add_bos and self.bos is not None and ids[:1] != [self.bos] else ids

    def fill_in(self, prefix: str, suffix: str) -> list[int]:
        """A prompt that asks for what stands between two texts. TokenizerError where the vocabulary has no tokens
        for that."""
        vocab = self._open_vocab()
        before = llama_cpp.llama_vocab_fim_pre(vocab)
        after = llama_cpp.llama_vocab_fim_suf(vocab)
        middle = llama_cpp.llama_vocab_fim_mid(vocab)
        if min(before, after, middle) < 0:
            raise TokenizerError(
                f"`{self.path}`: the vocabulary has no tokens for filling in (<｜fim▁begin｜> and so on)",
                "DeepSeek-Coder-V2 has them, chat models mostly not",
            )
        start = [self.bos] if self.add_bos and self.bos is not None else []
        return [*start, before, *self.encode(prefix), after, *self.encode(suffix), middle]

    def control_id(self, text: str) -> int | None:
        """The control token that is spelt exactly ``text``, or None. For templates; never for what a person typed."""
        return self.marker_ids.get(text)

    def special_text(self, token: int) -> str | None:
        """The spelling of a token that marks structure (vocabulary.Vocabulary.specials); None for ordinary tokens."""
        if token not in self._special and 0 <= token < self.n_vocab:  # llama.cpp knows a few ends by their spelling
            vocab = self._open_vocab()
            control = llama_cpp.llama_vocab_is_control(vocab, token)
            text = (llama_cpp.llama_vocab_get_text(vocab, token) or b"").decode("utf-8", "replace")
            self._special[token] = text if control else None
        return self._special.get(token)

    def _encode_plain(self, text: str) -> list[int]:
        ids = self._tokenize(text)
        if not self._spelt(ids):
            return ids
        # Control tokens that the file marks as text, or as user-defined: with a cut after each one's first character,
        # no piece holds a whole spelling.
        spellings = "|".join(map(re.escape, self.marker_ids))
        cuts = [match.start() + 1 for match in re.finditer(f"(?={spellings})", text)]
        pieces = [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]
        ids = [token for piece in pieces for token in self._tokenize(piece)]
        if wrong := self._spelt(ids):
            raise TokenizerError(
                f"`{self.path}`: the vocabulary marks {wrong[0]!r}, ordinary text, as control token",
                "the file is damaged, or its converter was: take another file of the model",
            )
        return ids

    def _spelt(self, ids: Sequence[int]) -> list[str]:
        """The control tokens among ``ids``. What stands for a character that the vocabulary lacks is none."""
        found: set[int] = set()
        for at in range(0, len(ids), PIECE):
            found.update(ids[at : at + PIECE])
        found -= self._facts.unknown
        return [spelling for token in found if (spelling := self.special_text(token)) is not None]

    def _tokenize(self, text: str) -> list[int]:
        data, vocab = _utf8(text), self._open_vocab()
        if len(data) > MAX_TEXT_BYTES:
            raise TokenizerError(f"a text of {len(data)} bytes is too long to tokenise at once", "split it")
        if not text.isascii() and self._words is not None:
            return self._words.encode(data.decode())
        size = len(data) + 1  # a token spells at least one byte
        ids = (llama_cpp.llama_token * size)()
        n = llama_cpp.llama_tokenize(vocab, data, len(data), ids, size, False, False)
        if n < 0:
            raise TokenizerError(f"`{self.path}`: the vocabulary cannot spell {text[:40]!r}")
        return [token for at in range(0, n, PIECE) for token in ids[at : min(at + PIECE, n)]]

    @cached_property
    def _words(self) -> Words | None:
        """For rules that llama.cpp does not keep to."""
        return vocabulary.words(self.path, self._facts.pre)

    def _open_vocab(self) -> _Vocab:
        vocab = self._vocab
        if vocab is None:
            raise TokenizerError(f"`{self.path}`: the tokenizer was closed")
        return vocab

    # Ids to text.

    def token_bytes(self, token: int) -> bytes:
        """The bytes a token adds to the text: part of a character at times; none for control tokens."""
        if token not in self._pieces:
            if not 0 <= token < self.n_vocab:  # a padded row of the head, which no text has
                return b""
            buffer = ctypes.create_string_buffer(64)
            vocab = self._open_vocab()
            n = llama_cpp.llama_token_to_piece(vocab, token, buffer, len(buffer), 0, False)
            if n < 0:
                buffer = ctypes.create_string_buffer(-n)
                n = llama_cpp.llama_token_to_piece(vocab, token, buffer, len(buffer), 0, False)
            piece = buffer.raw[: max(n, 0)]
            if not piece and self.special_text(token) in REASONING:  # part of the answer's text, whatever its type
                piece = (self.special_text(token) or "").encode()
            self._pieces[token] = piece
        return self._pieces[token]

    @cached_property
    def longest(self) -> int:
        """Bytes of the longest token, and as many as a character may have where it has a token of none."""
        return max(4, *(len(self.token_bytes(token)) for token in range(self.n_vocab)))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of a whole sequence; bytes that are no UTF-8 become U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def stream(self) -> TextStream:
        return TextStream(self)

    def is_end(self, token: int) -> bool:
        """True for EOS and the other tokens that end an answer. Where a file names no EOS, llama.cpp takes token 11,
        which is a comma in V2's vocabulary: no token ends an answer that is neither named nor a control token."""
        if not (0 <= token < self.n_vocab and llama_cpp.llama_vocab_is_eog(self._open_vocab(), token)):
            return False
        return token in self._facts.named.values() or self.special_text(token) is not None

    # Chats.

    def chat(
        self,
        messages: Sequence[Message],
        *,
        answer: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool | None = None,
        continues: bool = False,
    ) -> list[int]:
        """A chat as the model was trained to read it, from BOS on; ends where the answer begins if ``answer``, or where
        the last message's text does if the answer ``continues`` that.

        The template sees what transformers would show it. Control tokens come from its own text alone, never from
        what a person or a tool said. tools: OpenAI's descriptions. thinking: told to the template where it has a
        variable for it; None leaves that to the template. Raises TemplateError and TokenizerError (cext/chat.py).
        """
        ids = chat_ids(self, self._source, messages, answer=answer, tools=tools, thinking=thinking, continues=continues)
        if self.add_bos and self.bos is not None and ids[:1] != [self.bos]:
            ids.insert(0, self.bos)
        return ids

    @property
    def can_switch_thinking(self) -> bool:
        """Whether the chat template has a variable that turns reasoning on and off."""
        return has_switch(self._source)

    def check_thinking(self, thinking: bool | None) -> None:
        """TemplateError where the chat template cannot be told to reason, or not to; None asks for nothing."""
        try:
            switches(self._source, thinking)
        except TemplateError as error:
            raise TemplateError(f"`{self.path}`: {error}", error.hint) from error

    @property
    def _source(self) -> str:
        return self.chat_template or DEFAULT_TEMPLATE

    @cached_property
    def named_spellings(self) -> dict[str, str]:
        """What templates know as bos_token, eos_token and so on."""
        names = {"unk": "unknown", "pad": "padding", "sep": "seperator", "cls": "cls", "mask": "mask"}
        found = {
            name: self.special_text(self._facts.named[key]) for name, key in names.items() if key in self._facts.named
        }
        ends = {"bos": self._spelling(self.bos), "eos": self._spelling(self.eos)}
        return ends | {name: text for name, text in found.items() if text}

    def _spelling(self, token: int | None) -> str:
        return (self.special_text(token) or "") if token is not None else ""

    # Reasoning.

    def opening(self, prompt: Sequence[int]) -> list[int]:
        """The end of a prompt that belongs to the answer: the tag that opens its reasoning, where one stands there.
        Where a tag is a token, only that token counts."""
        for n in range(1, min(MAX_OPENING, len(prompt)) + 1):
            end, text = list(prompt[-n:]), self.decode(prompt[-n:]).strip()
            if any(text == tag and self.control_id(tag) in (None, *end) for tag, _ in THINK_TAGS):
                return end
        return []

    def split_answer(self, ids: Sequence[int]) -> Answer:
        """An answer's reasoning and its content; ``ids`` begin with the opening tag, which may stand in the prompt."""
        reasoning, content = split_answer(self, ids, Traced(self.decode(ids)))
        return Answer(None if reasoning is None else str.__str__(reasoning).strip(), str.__str__(content).lstrip())


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
    for run in _long_runs(text):
        at = run.start()
        while run.end() - at > MAX_RUN:
            ends = [m.start() for m in WORD_END.finditer(text, at + 1, at + MAX_RUN)]
            at = ends[-1] if ends else at + MAX_RUN
            yield text[start:at]
            start = at
    yield text[start:]


def _long_runs(text: str) -> Iterator[re.Match[str]]:
    """As LONG_RUN.finditer, but never one search through all of a long text: other threads would wait for it."""
    at = 0
    while at < len(text):
        found = LONG_RUN.search(text, at, at + PIECE)
        run = found and LONG_RUN.match(text, found.start())
        if run:
            yield run
        at = run.end() if run else at + PIECE - MAX_RUN
