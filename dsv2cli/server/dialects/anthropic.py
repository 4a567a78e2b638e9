"""Anthropic's messages and count_tokens."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any

from msgspec import Meta, Struct
from starlette.requests import Request
from starlette.responses import Response

from dsv2cli.server import answering
from dsv2cli.server.answering import sse
from dsv2cli.server.dialects.chat import Answer, Asked, ChatRequest, goes_on, prepare, prompt_of
from dsv2cli.server.errors import ApiError, bad_field
from dsv2cli.server.generation import Began, Ended, Heard, Piece, take_all
from dsv2cli.server.service import Service, new_id
from dsv2cli.server.wire import Stops, dump

STOP_REASONS = {"end": "end_turn", "stop": "stop_sequence", "length": "max_tokens", "context": "max_tokens"}
CHOICES = {"auto": "auto", "any": "required", "none": "none"}
# Some agents put a line first whose number changes with every request: no prefix would ever be found again.
BILLING = "x-anthropic-billing-header"


class MessagesRequest(Struct, kw_only=True):
    messages: Annotated[list[Any], Meta(max_length=4096)]
    max_tokens: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    model: str | None = None
    system: str | list[dict[str, Any]] | None = None
    stream: bool = False
    stop_sequences: Stops | None = None
    temperature: Annotated[float, Meta(ge=0, le=1e4)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=0)] | None = None
    tools: Annotated[list[dict[str, Any]], Meta(max_length=128)] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None


def as_chat(body: MessagesRequest) -> ChatRequest:
    """The same request in OpenAI's terms. ApiError."""
    messages: list[Any] = []
    if system := system_text(body.system):
        messages.append({"role": "system", "content": system})
    for i, message in enumerate(body.messages):
        messages += _messages(message, f"messages[{i}]")
    if not body.messages:  # some clients send nothing, to see that a server answers
        messages.append({"role": "user", "content": ""})
    thinks = body.thinking and body.thinking.get("type") != "disabled"
    return ChatRequest(
        messages=messages,
        max_tokens=body.max_tokens,
        model=body.model,
        stop=body.stop_sequences,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        tools=[_tool(tool, i) for i, tool in enumerate(body.tools)] if body.tools else None,
        tool_choice=_choice(body.tool_choice),
        parallel_tool_calls=not (body.tool_choice or {}).get("disable_parallel_tool_use"),
        reasoning_effort=None if body.thinking is None else "high" if thinks else "none",
        continue_final_message=goes_on(messages),
    )


def system_text(given: str | list[dict[str, Any]] | None) -> str:
    blocks = [{"text": given}] if isinstance(given, str) else given or []
    texts = [str(block.get("text", "")) for block in blocks]
    return "\n\n".join(text for text in texts if text and not text.startswith(BILLING))


def _messages(message: Any, where: str) -> Iterator[dict[str, Any]]:
    """One of Anthropic's messages as OpenAI's: results of tools are messages of their own there."""
    if not isinstance(message, Mapping) or message.get("role") not in ("user", "assistant", "system"):
        raise bad_field(where, "is no message of user or assistant")
    role, content = message["role"], message.get("content")
    if isinstance(content, str):
        yield {"role": role, "content": content}
        return
    if not isinstance(content, list):
        raise bad_field(f"{where}.content", "is neither text nor blocks")
    texts, thoughts, calls = [], [], []
    for j, block in enumerate(content):
        kind = block.get("type") if isinstance(block, Mapping) else None
        if kind == "text":
            texts.append(str(block.get("text", "")))
        elif kind == "tool_use":
            function = {"name": block.get("name"), "arguments": json.dumps(block.get("input", {}), ensure_ascii=False)}
            calls.append({"id": block.get("id"), "type": "function", "function": function})
        elif kind == "tool_result":
            yield {"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": _result(block)}
        elif kind == "thinking":
            thoughts.append(str(block.get("thinking", "")))
        elif kind != "redacted_thinking":
            raise bad_field(f"{where}.content[{j}]", f"is of type {str(kind)[:50]!r}: only text and tools are read")
    if texts or calls:
        shown: dict[str, Any] = {"role": role, "content": "\n".join(texts) or None}
        shown |= {"tool_calls": calls} if calls else {}
        yield shown | ({"reasoning_content": "".join(thoughts)} if thoughts else {})


def _result(block: Mapping[str, Any]) -> str:
    content = block.get("content", "")
    if isinstance(content, str):
        return content
    return "\n".join(str(part.get("text", "")) for part in content or () if isinstance(part, Mapping))


def _tool(tool: Mapping[str, Any], index: int) -> dict[str, Any]:
    if not isinstance(tool.get("name"), str):
        raise bad_field(f"tools[{index}].name", "is missing")
    described = {"name": tool["name"], "description": tool.get("description", "")}
    return {"type": "function", "function": described | {"parameters": tool.get("input_schema")}}


def _choice(given: Mapping[str, Any] | None) -> Any:
    kind = (given or {"type": "auto"}).get("type")
    if kind == "tool" and given is not None:
        return {"type": "function", "function": {"name": given.get("name")}}
    if not isinstance(kind, str) or kind not in CHOICES:
        raise bad_field("tool_choice.type", "is none of auto, any, tool, none")
    return CHOICES[kind]


async def messages(service: Service, request: Request) -> Response:
    body = await answering.body_of(request, MessagesRequest)
    asked = await prepare(service, await answering.aside(as_chat, body), request.state.salt)
    [ticket] = service.submit_all([asked.generation])
    name = body.model or service.name
    if body.stream:
        stream = MessageStream(service, asked, name)

        def failed(error: ApiError) -> bytes:
            return sse(error.body(request.scope["path"]), "error")

        return answering.streamed(ticket, stream.say, last=stream.last, on_error=failed, alive=_ping())
    return await answering.whole(request, [ticket], lambda heard: _whole(service, asked, name, heard[0]))


async def count_tokens(service: Service, request: Request) -> Response:
    body = await answering.body_of(request, MessagesRequest)
    prompt = await prompt_of(service, await answering.aside(as_chat, body))
    return Response(dump({"input_tokens": len(prompt.ids)}), media_type=answering.JSON_TYPE)


def _usage(cached: int, n_prompt: int, n_answer: int) -> dict[str, int]:
    return {
        "input_tokens": n_prompt - cached,
        "cache_read_input_tokens": cached,
        "cache_creation_input_tokens": 0,
        "output_tokens": n_answer,
    }


def _reason(answer: Answer, event: Ended) -> str:
    return "tool_use" if answer.calls else STOP_REASONS.get(event.reason, "end_turn")


def _head(name: str, usage: dict[str, int]) -> dict[str, Any]:
    head = {"id": new_id("msg"), "type": "message", "role": "assistant", "model": name, "content": []}
    return head | {"stop_reason": None, "stop_sequence": None, "usage": usage}


def _whole(service: Service, asked: Asked, name: str, heard: list[Heard]) -> dict[str, Any]:
    answer = Answer(service, asked)
    ended = take_all(heard, answer.feed)
    blocks: list[dict[str, Any]] = []
    if answer.reasoning:
        blocks.append({"type": "thinking", "thinking": answer.reasoning.rstrip(), "signature": ""})
    if answer.content.strip() or not answer.calls:
        blocks.append({"type": "text", "text": answer.content})
    for call in answer.calls:
        arguments = json.loads(call["function"]["arguments"])
        blocks.append({"type": "tool_use", "id": call["id"], "name": call["function"]["name"], "input": arguments})
    stats = ended.stats
    head = _head(name, _usage(stats.n_reused, stats.n_prompt, stats.n_answer))
    return head | {"content": blocks, "stop_reason": _reason(answer, ended), "stop_sequence": ended.stop}


class MessageStream:
    """The events of a streamed message: blocks of thinking, text and calls, one after another."""

    def __init__(self, service: Service, asked: Asked, name: str) -> None:
        self._answer = Answer(service, asked)
        self._name, self._n_prompt = name, len(asked.generation.prompt)
        self._index, self._open = -1, ""
        self._begun = False
        self._ended: Ended | None = None

    def say(self, event: Heard) -> Iterable[bytes]:
        if not self._begun:
            self._begun = True
            cached = event.cached if isinstance(event, Began) else 0
            yield _event("message_start", message=_head(self._name, _usage(cached, self._n_prompt, 0)))
        if not isinstance(event, Piece | Ended):
            return
        parts, calls = self._answer.feed(event)
        for part in parts:
            if part.kind == "reasoning":
                yield from self._block("thinking", {"type": "thinking", "thinking": "", "signature": ""})
                yield self._delta({"type": "thinking_delta", "thinking": part.text})
            elif part.kind == "content":
                yield from self._block("text", {"type": "text", "text": ""})
                yield self._delta({"type": "text_delta", "text": part.text})
        for call in calls:
            head = {"type": "tool_use", "id": call["id"], "name": call["function"]["name"], "input": {}}
            yield from self._block(call["id"], head)
            yield self._delta({"type": "input_json_delta", "partial_json": call["function"]["arguments"]})
        if isinstance(event, Ended):
            self._ended = event

    def last(self) -> Iterable[bytes]:
        if self._index < 0:
            yield from self._block("text", {"type": "text", "text": ""})
        yield from self._close()
        assert self._ended is not None
        delta = {"stop_reason": _reason(self._answer, self._ended), "stop_sequence": self._ended.stop}
        stats = self._ended.stats
        yield _event("message_delta", delta=delta, usage=_usage(stats.n_reused, stats.n_prompt, stats.n_answer))
        yield _event("message_stop")

    def _block(self, name: str, head: dict[str, Any]) -> Iterator[bytes]:
        """The block of that name, opened after the last one is closed, if it is not open."""
        if self._open == name:
            return
        yield from self._close()
        self._index, self._open = self._index + 1, name
        yield _event("content_block_start", index=self._index, content_block=head)

    def _close(self) -> Iterator[bytes]:
        if self._open == "thinking":
            yield self._delta({"type": "signature_delta", "signature": ""})
        if self._open:
            yield _event("content_block_stop", index=self._index)
        self._open = ""

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return _event("content_block_delta", index=self._index, delta=delta)


def _event(kind: str, **fields: Any) -> bytes:
    return sse({"type": kind, **fields}, kind)


def _ping() -> bytes:
    return _event("ping")
