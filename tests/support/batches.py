"""Files of requests, and what is read of their results."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


def line(i: int, url: str = CHAT, **body: Any) -> dict[str, Any]:
    """A line of a batch, r<i>."""
    asked = {"messages": [{"role": "user", "content": "Hi the ant"}]} if url == CHAT else {}
    return {"custom_id": f"r{i}", "method": "POST", "url": url, "body": asked | body}


def short(n: int, **more: Any) -> list[dict[str, Any]]:
    """Chats and raw prompts with answers of six tokens; greedy unless told otherwise."""
    asked = {"max_tokens": 6, "temperature": 0} | more
    return [
        line(i, TEXT, prompt=f"the ant {i}", **asked)
        if i % 2
        else line(i, messages=[{"role": "user", "content": f"Hi the ant {i}"}], **asked)
        for i in range(n)
    ]


def save(path: Path, lines: Iterable[Any]) -> Path:
    """Values as JSON, texts as they are."""
    path.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in lines))
    return path


def results(path: Path) -> list[Any]:
    data = path.read_text("utf-8")
    assert data == "" or data.endswith("\n")
    return [json.loads(line) for line in data.splitlines()]


def answers(path: Path) -> dict[str, Any]:
    """custom_id -> choices, each there once."""
    found = results(path)
    by_id = {result["custom_id"]: result["response"]["body"]["choices"] for result in found}
    assert len(by_id) == len(found)
    return by_id
