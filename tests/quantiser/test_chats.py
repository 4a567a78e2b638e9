"""Calibration chats in OpenAI's form: rendered as the model's template does, or the line is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.templates import FAMILIES, family_keys, write_family

from cext.tokenizer import Message, Tokenizer
from quantize.base.errors import CalibrationError, QuantizeError
from quantize.source import corpus

CALL = {"id": "f:0", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]},
    {"role": "user", "content": "Weather?", "name": None},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "f:0", "content": "21"},
    {"role": "assistant", "content": "<|im_end|> 21.", "reasoning_content": "Looked."},
]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "x <|im_end|>", "parameters": {}}}]


def loaded(tmp_path: Path, lines: list[object], family: str = "k2-thinking") -> corpus.Corpus:
    path = tmp_path / "c.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return corpus.load([path], family_keys(FAMILIES[family]), 1 << 20)


def test_tools_parts_and_null_are_rendered(tmp_path: Path) -> None:
    made = loaded(tmp_path, [{"messages": CHAT, "tools": TOOLS}] * 40)
    with Tokenizer(write_family(tmp_path / "v.gguf", FAMILIES["k2-thinking"])) as tokenizer:
        messages = [Message.parse(message) for message in CHAT]
        ids = tokenizer.chat(messages, answer=False, tools=TOOLS)
        text = tokenizer.decode(ids)
    assert "Be brief." in text and "None" not in text and '{"a": 1}' in text and "## Return of f:0" in text
    first = np.sort(np.concatenate([made.windows.ravel(), made.held.ravel()]))
    assert set(ids) == set(first.tolist())
    assert made.windows[0][: len(ids)].tolist() == ids


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"messages": [{"role": "user"}]}, "line 2: not a conversation .*the user message has no content"),
        ({"messages": [{"role": "user", "content": None}]}, "line 2: not a conversation .*no content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "line 2: .*type image_url"),
        ({"messages": CHAT, "tools": ["f"]}, "line 2: .*tools are not a list of objects"),
        ({"messages": 5}, "line 2: not a conversation"),
        ("[" * 100_000, "line 2: not a conversation"),
    ],
)
def test_what_is_no_conversation_is_named(tmp_path: Path, line: object, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        loaded(tmp_path, [{"messages": CHAT}, line])


@pytest.mark.parametrize(
    ("family", "chat", "message"),
    [
        ("mistral", [{"role": "critic", "content": "x"}], "line 3: .*refuses this conversation: Only user"),
        ("v2", [{"role": "developer", "content": "abc"}], "line 3: .*leaves out the developer message"),
        ("r1", [{"role": "assistant", "content": None, "tool_calls": [CALL]}], "line 3: .*fails on this conversation"),
    ],
)
def test_what_the_template_does_not_take_is_named(tmp_path: Path, family: str, chat: object, message: str) -> None:
    """Without the temporary file of the vocabulary, and with a hint that is about the file of chats."""
    good = {"messages": [{"role": "user", "content": "x"}]}
    with pytest.raises(CalibrationError, match=message) as caught:
        loaded(tmp_path, [good, good, {"messages": chat}], family)
    assert "c.jsonl" in str(caught.value) and ".gguf" not in str(caught.value)
    assert "the line" in caught.value.hint and "--" not in caught.value.hint


def test_a_tokenizer_that_does_not_load_is_told_without_a_path(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("a", encoding="utf-8")
    with pytest.raises(QuantizeError, match=r"the checkpoint's tokenizer: .*unknown pre-tokenizer type: 'x'") as caught:
        corpus.load([tmp_path / "t.txt"], family_keys(None, ggml__pre="x"), 1 << 20)
    assert ".gguf" not in str(caught.value)
