"""corpus.py: calibration text -> windows of token ids. Plain text and chat (.jsonl), tokenised as the model sees them.

Tokenisation is llama.cpp's, from the vocabulary that the GGUF will carry. Chat is rendered with the model's own
template, so that its markers and turns are calibrated too.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from numpy.typing import NDArray

from quantize.errors import CalibrationError, QuantizeError
from quantize.vocab import Vocab
from quantize.writer import write_vocab_only

DEFAULT_FILES = (Path(__file__).with_name("calibration.txt"), Path(__file__).with_name("calibration-chat.jsonl"))
WINDOW = 512  # tokens that attend to each other
MIN_WINDOWS = 2  # below this an average over tokens says nothing


@dataclass(frozen=True)
class Corpus:
    """Calibration windows and where they came from."""

    windows: NDArray[np.int32]  # (n_windows, WINDOW)
    sources: tuple[str, ...]  # file names
    sha256: str  # of the files' bytes, in order

    @property
    def n_tokens(self) -> int:
        """Tokens over all windows."""
        return int(self.windows.size)


def load(files: Sequence[Path], vocab: Vocab, metadata: Mapping[str, object], max_tokens: int) -> Corpus:
    """Read, render, tokenise and cut the files; evenly thinned where they hold more than max_tokens.

    metadata: the GGUF's keys, tokenizer included. Raises CalibrationError for a file that cannot be read, is not text
    or chat, or holds fewer than MIN_WINDOWS windows with the others.
    """
    digest = hashlib.sha256()
    texts = []
    for path in files:
        try:
            data = path.read_bytes()
        except OSError as error:
            raise CalibrationError(f"calibration file `{path}`: {error.strerror}") from error
        digest.update(data)
        texts.append(_conversations(path, data, vocab) if path.suffix == ".jsonl" else _decode(path, data))
    bos = vocab.special_ids.get("bos")
    streams = _tokenize(texts, metadata)
    windows = [window for stream in streams for window in _cut(stream, bos)]
    if len(windows) < MIN_WINDOWS:
        n = sum(len(stream) for stream in streams)
        raise CalibrationError(
            f"the calibration text holds {n} tokens, at least {MIN_WINDOWS * WINDOW} are needed",
            "give more text, or leave --calibration out to use the text that comes with dsv2",
        )
    keep = max(MIN_WINDOWS, max_tokens // WINDOW)
    if len(windows) > keep:
        windows = [windows[i] for i in np.linspace(0, len(windows) - 1, keep).round().astype(int)]
    return Corpus(np.stack(windows), tuple(path.name for path in files), digest.hexdigest())


def _decode(path: Path, data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CalibrationError(f"calibration file `{path}`: byte {error.start} is not utf-8 text") from error


def _conversations(path: Path, data: bytes, vocab: Vocab) -> str:
    """Chat, one {"messages": [...]} a line, as the model's template renders it."""
    if not vocab.chat_template:
        raise CalibrationError(
            f"calibration file `{path}` is chat, and the model has no chat template", "give plain text"
        )
    rendered = []
    for number, line in enumerate(_decode(path, data).splitlines(), 1):
        if not line.strip():
            continue
        try:
            messages = json.loads(line)["messages"]
            rendered.append(_render(vocab, messages))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CalibrationError(
                f"calibration file `{path}`, line {number}: not a conversation ({type(error).__name__}: {error})",
                'one JSON object a line: {"messages": [{"role": "user", "content": "..."}, ...]}',
            ) from error
    return "".join(rendered)


def _render(vocab: Vocab, messages: Sequence[Mapping[str, Any]]) -> str:
    def special(role: str) -> str:
        return vocab.tokens[vocab.special_ids[role]] if role in vocab.special_ids else ""

    try:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        template = environment.from_string(vocab.chat_template)
        return template.render(
            messages=messages, bos_token=special("bos"), eos_token=special("eos"), add_generation_prompt=False
        )
    except TemplateError as error:
        raise CalibrationError(f"the model's chat template fails: {error}", "calibrate with plain text") from error


def _tokenize(texts: Sequence[str], metadata: Mapping[str, object]) -> list[list[int]]:
    log = logging.getLogger("llama-cpp-python")
    level = log.level
    log.setLevel(logging.CRITICAL)  # the library reports its loading on stderr otherwise
    params = llama_cpp.llama_model_default_params()
    params.vocab_only = True
    with tempfile.TemporaryDirectory(prefix="dsv2-") as folder:
        path = Path(folder) / "vocab.gguf"
        write_vocab_only(path, metadata)
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        try:
            if model is None:
                raise QuantizeError("llama.cpp cannot read the tokenizer that tokenizer.json describes")
            vocab = llama_cpp.llama_model_get_vocab(model)
            return [_ids(vocab, text.encode("utf-8")) for text in texts]
        finally:
            if model is not None:
                llama_cpp.llama_model_free(model)
            log.setLevel(level)


def _ids(vocab: Any, data: bytes) -> list[int]:
    room = len(data) + 1  # byte-level BPE never makes more tokens than bytes
    ids = (llama_cpp.llama_token * room)()
    n = llama_cpp.llama_tokenize(vocab, data, len(data), ids, room, False, True)
    if n < 0:
        raise QuantizeError(f"llama.cpp made {-n} tokens of {len(data)} bytes of calibration text")
    return list(ids[:n])


def _cut(stream: Sequence[int], bos: int | None) -> list[NDArray[np.int32]]:
    """Windows of WINDOW tokens that begin as training sequences do; the tail that fills none is left out."""
    windows = []
    at = 0
    while at < len(stream):
        head = [] if bos is None or stream[at] == bos else [bos]
        body = stream[at : at + WINDOW - len(head)]
        if len(head) + len(body) < WINDOW:
            break
        windows.append(np.array([*head, *body], np.int32))
        at += len(body)
    return windows
