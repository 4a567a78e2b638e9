"""corpus.py: calibration text -> windows of token ids. Plain text and chat (.jsonl), tokenised as the model sees them.

Tokenised from the vocabulary that the GGUF will carry. Chat is rendered with the model's own template, so that its
markers and turns are calibrated too.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cext.tokenizer import Message, Tokenizer, TokenizerError
from quantize.base.errors import CalibrationError, QuantizeError
from quantize.write.writer import write_vocab_only

DEFAULT_FILES = (Path(__file__).with_name("calibration.txt"), Path(__file__).with_name("calibration-chat.jsonl"))
WINDOW = 512  # tokens that attend to each other
MIN_WINDOWS = 2  # below this an average over tokens says nothing
# Tokens to calibrate with where nobody says how many: as many as have so many values in their hidden states (1.6 GB of
# memory with sequential calibration), within limits.
ENOUGH_VALUES, LEAST_TOKENS, MOST_TOKENS = 1 << 27, 1 << 16, 1 << 18
SURVEY_VALUES, LEAST_SURVEY, MOST_SURVEY = 1 << 24, 1 << 13, 3 << 13  # likewise of the survey
HELD_WINDOWS = 8  # held back to measure the finished file with,
HELD_SHARE = 8  # but no more than one window in so many


@dataclass(frozen=True)
class Corpus:
    """Calibration windows, those held back from calibration, and where they came from."""

    windows: NDArray[np.int32]  # (n_windows, WINDOW)
    held: NDArray[np.int32]  # (n_held, WINDOW): evenly spread over the text; n_held may be 0
    sources: tuple[str, ...]  # file names
    sha256: str  # of the files' bytes, in order

    @property
    def n_tokens(self) -> int:
        """Tokens to calibrate with."""
        return int(self.windows.size)


def enough(n_embd: int) -> int:
    """Tokens to calibrate a model that wide with. Four times as many take 5 to 8 % off a narrow one's divergence."""
    return min(max(LEAST_TOKENS, ENOUGH_VALUES // n_embd), MOST_TOKENS)


def enough_to_survey(n_embd: int) -> int:
    """Tokens to survey a model that wide with: three times as many take 1 to 6 % off a narrow one's divergence."""
    return min(max(LEAST_SURVEY, SURVEY_VALUES // n_embd), MOST_SURVEY)


def load(files: Sequence[Path], metadata: Mapping[str, object], max_tokens: int) -> Corpus:
    """Read, render, tokenise and cut the files; evenly thinned where they hold more than max_tokens.

    metadata: the GGUF's keys, tokenizer included. Raises CalibrationError for a file that cannot be read, is not text
    or chat, or holds fewer than MIN_WINDOWS windows with the others; QuantizeError for a tokenizer that does not work.
    """
    digest = hashlib.sha256()
    windows: list[NDArray[np.int32]] = []
    n_tokens = 0
    with _tokenizer(metadata) as tokenizer:
        for path in files:
            try:
                if path.is_char_device() or path.is_block_device():
                    raise CalibrationError(
                        f"calibration file `{path}` is a device", "name a text, or a .jsonl of chats"
                    )
                data = path.read_bytes()
            except OSError as error:
                raise CalibrationError(f"calibration file `{path}`: {error.strerror}") from error
            digest.update(data)
            text = _decode(path, data)
            ids = _chat_ids(path, text, tokenizer) if path.suffix == ".jsonl" else tokenizer.encode(text)
            n_tokens += len(ids)
            windows += _cut(ids, tokenizer.bos)
    if len(windows) < MIN_WINDOWS:
        raise CalibrationError(
            f"the calibration text holds {n_tokens} tokens, at least {MIN_WINDOWS * WINDOW} are needed",
            "give more text, or leave --calibration out to use the text that comes with dsv2",
        )
    every = np.stack(windows)
    n_held = min(HELD_WINDOWS, len(every) // HELD_SHARE)
    is_held = np.zeros(len(every), bool)
    is_held[(np.arange(n_held) * 2 + 1) * len(every) // (2 * n_held or 1)] = True
    kept = every[~is_held]
    n_kept = max(MIN_WINDOWS, max_tokens // WINDOW)
    if len(kept) > n_kept:
        kept = kept[np.linspace(0, len(kept) - 1, n_kept).round().astype(int)]
    return Corpus(kept, every[is_held], tuple(path.name for path in files), digest.hexdigest())


@contextmanager
def _tokenizer(metadata: Mapping[str, object]) -> Iterator[Tokenizer]:
    with tempfile.TemporaryDirectory(prefix="dsv2-") as folder:
        path = Path(folder) / "vocab.gguf"
        write_vocab_only(path, metadata)
        try:
            with Tokenizer(path) as tokenizer:
                yield tokenizer
        except TokenizerError as error:
            raise QuantizeError(_told(error, path), "the checkpoint's tokenizer does not work in llama.cpp") from error


def _told(error: TokenizerError, path: str | Path) -> str:
    """An error of the tokenizer without the temporary file that it names."""
    return str(error).replace(f"`{path}`", "the checkpoint's tokenizer")


def _decode(path: Path, data: bytes) -> str:
    """Text as the commands read it everywhere: UTF-8, a byte order mark dropped, CR LF as LF."""
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        raise CalibrationError(
            f"calibration file `{path}`: {'UTF-16' if utf16 else f'byte {error.start} is not UTF-8 text'}",
            f"convert it first: iconv -f {'UTF-16' if utf16 else 'ENCODING'} -t UTF-8",
        ) from error


def _chat_ids(path: Path, text: str, tokenizer: Tokenizer) -> list[int]:
    """Conversations, one {"messages": [...]} a line, one after the other as the model's template renders them.

    Messages are in OpenAI's form: content as text, as parts or null beside tool calls; "tools" may stand beside them.
    """
    ids: list[int] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"calibration file `{path}`, line {number}"
        try:
            chat = json.loads(line)
            messages = [Message.parse(message) for message in chat["messages"]]
            tools = chat.get("tools")
            if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
                raise ValueError("tools are not a list of objects")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CalibrationError(
                f"{where}: not a conversation ({type(error).__name__}: {error})",
                'one JSON object a line: {"messages": [{"role": "user", "content": "..."}, ...]}',
            ) from error
        try:
            ids += tokenizer.chat(messages, answer=False, tools=tools)
        except TokenizerError as error:
            raise CalibrationError(
                f"{where}: {_told(error, tokenizer.path)}", "take the line out, or write it as the template can show it"
            ) from error
    return ids


def _cut(ids: Sequence[int], bos: int | None) -> list[NDArray[np.int32]]:
    """Windows of WINDOW tokens that begin as training sequences do; the tail that fills none is left out."""
    windows = []
    at = 0
    while at < len(ids):
        head = [] if bos is None or ids[at] == bos else [bos]
        body = ids[at : at + WINDOW - len(head)]
        if len(head) + len(body) < WINDOW:
            break
        windows.append(np.array([*head, *body], np.int32))
        at += len(body)
    return windows
