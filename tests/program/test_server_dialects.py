"""Anthropic's and ollama's dialects: the same answers as OpenAI's, in their words; and their own clients."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.serving import USUAL, Served, served
from support.tiny import spec_named, variant
from support.vocab import V25_TEMPLATE, write_model

WIDE = dataclasses.replace(USUAL, n_ctx=2048)
CHAT = "/v1/chat/completions"
HI = [{"role": "user", "content": "Hi the ant"}]
GREEDY: dict[str, Any] = {"temperature": 0}
TOOL = {"name": "f", "description": "d", "input_schema": {"type": "object", "properties": {"a": {"enum": [1, 2]}},
        "required": ["a"], "additionalProperties": False}}  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    spec = variant(spec_named("lite"), n_ctx=4096)
    path: Path = write_model(tmp_path_factory.mktemp("dialects") / "tiny.gguf", spec, V25_TEMPLATE, endless=True)
    with served(path, WIDE) as running:
        yield running


@pytest.fixture(scope="module")
def said(server: Served) -> str:
    """What OpenAI's dialect answers."""
    return str(server.asked(CHAT, messages=HI, max_tokens=9, **GREEDY)["choices"][0]["message"]["content"])


def test_anthropic(server: Served, said: str) -> None:
    body = server.asked("/v1/messages", messages=HI, max_tokens=9, **GREEDY)
    assert body["content"] == [{"type": "text", "text": said}]
    assert body["stop_reason"] == "max_tokens" and body["usage"]["output_tokens"] == 9
    events = server.events("/v1/messages", messages=HI, max_tokens=9, stream=True, **GREEDY)
    assert [events[0]["type"], *[e["type"] for e in events[-3:]]] == [
        "message_start", "content_block_stop", "message_delta", "message_stop",
    ]  # fmt: skip
    assert "".join(e["delta"]["text"] for e in events if e["type"] == "content_block_delta") == said
    counted = server.asked("/v1/messages/count_tokens", messages=HI)["input_tokens"]
    assert counted == sum(body["usage"][name] for name in ("input_tokens", "cache_read_input_tokens"))


def test_anthropic_s_blocks(server: Served) -> None:
    """A round of tools, system in blocks, and the line that changes with every request, which is dropped."""
    history = [
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
        {"role": "assistant", "content": [{"type": "tool_use", "id": "t1", "name": "f", "input": {"a": 1}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": [{"text": "the"}]}]},
    ]
    asked: dict[str, Any] = {"messages": history, "tools": [TOOL], "max_tokens": 200}
    n = [
        server.asked(
            "/v1/messages/count_tokens",
            **asked,
            system=[{"type": "text", "text": f"x-anthropic-billing-header: cch={i}"}, {"type": "text", "text": "Go"}],
        )["input_tokens"]
        for i in (1, 22222)
    ]
    assert n[0] == n[1]
    for choice in ({"type": "any"}, {"type": "tool", "name": "f"}):
        body = server.asked("/v1/messages", **asked, tool_choice=choice | {"disable_parallel_tool_use": True})
        [block] = body["content"]
        assert body["stop_reason"] == "tool_use" and block["type"] == "tool_use" and block["input"]["a"] in (1, 2)
    events = server.events("/v1/messages", **asked, tool_choice={"type": "any"}, stream=True)
    deltas = [e["delta"]["partial_json"] for e in events if e.get("delta", {}).get("type") == "input_json_delta"]
    assert deltas and all(json.loads(delta)["a"] in (1, 2) for delta in deltas)


@pytest.mark.parametrize(
    "body",
    [
        {}, {"messages": "x", "max_tokens": 1}, {"messages": HI, "max_tokens": 0}, {"messages": [{}], "max_tokens": 1},
        {"messages": [{"role": "user", "content": [{"type": "image"}]}], "max_tokens": 1},
        {"messages": HI, "max_tokens": 1, "tool_choice": {"type": "maybe"}},
        {"messages": [{"role": "user", "content": []}], "max_tokens": 1},
        {"messages": HI, "max_tokens": 1, "tools": [{"description": "no name"}]},
    ],
)  # fmt: skip
def test_anthropic_s_refusals(server: Served, body: dict[str, Any]) -> None:
    response = server.post("/v1/messages", **body)
    told = response.json()
    assert response.status_code == 400 and told["type"] == "error" and told["error"]["type"] == "invalid_request_error"


def test_an_empty_chat_is_answered(server: Served) -> None:
    """Some clients send one to see that a server is there; the system's text alone may be one."""
    body = server.asked("/v1/messages", messages=[], max_tokens=3, **GREEDY)
    assert body["type"] == "message" and body["usage"]["output_tokens"] == 3
    told = server.asked("/v1/messages", messages=[], system="Go on, and on.", max_tokens=3, **GREEDY)
    assert told["usage"]["input_tokens"] > body["usage"]["input_tokens"]


def test_ollama(server: Served, said: str) -> None:
    options = {"temperature": 0, "num_predict": 9}
    body = server.asked("/api/chat", model="tiny", messages=HI, stream=False, options=options)
    assert body["message"] == {"role": "assistant", "content": said} and body["done_reason"] == "length"
    assert body["eval_count"] == 9 and body["prompt_eval_count"] > 0 and body["total_duration"] > 0
    lines = server.post("/api/chat", model="tiny:latest", messages=HI, options=options).text.splitlines()
    parts = [json.loads(line) for line in lines]
    assert "".join(part["message"]["content"] for part in parts) == said
    assert [part["done"] for part in parts] == [False] * (len(parts) - 1) + [True]
    generated = server.asked("/api/generate", prompt="Hi the ant", stream=False, options=options)
    assert generated["response"] == said
    raw = server.asked("/api/generate", prompt="Hi the ant", raw=True, stream=False, options=options)
    assert raw["response"] == server.asked("/completion", prompt="Hi the ant", n_predict=9, **GREEDY)["content"]
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    formed = server.asked("/api/chat", messages=HI, format=schema, stream=False)
    assert json.loads(formed["message"]["content"])["a"] in (1, 2)


def test_ollama_s_models(server: Served) -> None:
    assert server.client.get("/api/version").json()["version"] >= "0.18"
    assert server.client.get("/api/tags").json()["models"][0]["name"] == "tiny"
    assert server.client.get("/api/ps").json()["models"][0]["context_length"] == WIDE.n_ctx
    shown = server.asked("/api/show", model="tiny")
    assert {"completion", "tools"} <= set(shown["capabilities"])
    assert shown["model_info"][f"{shown['model_info']['general.architecture']}.context_length"] == WIDE.n_ctx
    for path in ("/api/show", "/api/chat", "/api/generate"):
        response = server.post(path, model="other", messages=HI, prompt="x")
        assert response.status_code == 404 and "other" in response.json()["error"]
    assert server.asked("/api/chat", model="tiny", messages=[])["done_reason"] == "load"
    for path in ("/api/pull", "/api/create", "/api/push", "/api/delete"):
        assert server.post(path, model="x").status_code == 404


def test_parts_are_lines_of_one_text(server: Served) -> None:
    """In every role and every dialect, whatever the template takes."""
    parts = [{"type": "text", "text": "Hi"}, {"type": "text", "text": "the ant"}]
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}

    def chat(content: Any) -> list[dict[str, Any]]:
        called = {"role": "assistant", "content": content, "tool_calls": [call]}
        result = {"role": "tool", "tool_call_id": "c", "content": content}
        return [{"role": role, "content": content} for role in ("system", "user")] + [called, result]

    told = server.asked(CHAT, messages=chat("Hi\nthe ant"), max_tokens=5, **GREEDY)
    assert server.asked(CHAT, messages=chat(parts), max_tokens=5, **GREEDY)["choices"] == told["choices"]
    user = {"role": "user", "content": parts}
    wanted = server.asked(CHAT, messages=[user], max_tokens=5, **GREEDY)["choices"][0]["message"]["content"]
    assert server.asked("/v1/messages", messages=[user], max_tokens=5, **GREEDY)["content"][0]["text"] == wanted
    items = [{"role": "user", "content": [{"type": "input_text", "text": part["text"]} for part in parts]}]
    body = server.asked("/v1/responses", input=items, max_output_tokens=5, **GREEDY)
    assert body["output"][0]["content"][0]["text"] == wanted
    odd = server.post(CHAT, messages=[{"role": "user", "content": [{"type": "text", "text": 5}]}])
    assert odd.status_code == 400 and "messages[0]" in odd.json()["error"]["message"]
