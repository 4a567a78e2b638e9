"""OpenAI's Responses (and Open Responses'): conversations of items, kept here for those who go on from one."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

from msgspec import Meta, Struct
from msgspec.structs import replace
from starlette.requests import Request
from starlette.responses import Response

from dsv2cli.server import answering
from dsv2cli.server.dialects.chat import Asked, ChatRequest, prepare
from dsv2cli.server.dialects.response_events import Progress
from dsv2cli.server.dialects.wording import Watch
from dsv2cli.server.errors import ApiError, bad_field
from dsv2cli.server.generation import Job
from dsv2cli.server.guard import MAX_BODY
from dsv2cli.server.items import Item, as_messages, read_input
from dsv2cli.server.kept import Kept, Turn
from dsv2cli.server.pages import page
from dsv2cli.server.service import MAX_TOP, Service, new_id
from dsv2cli.server.tools import parse_tools
from dsv2cli.server.wire import Sampled, dump, parse

LOGPROBS = "message.output_text.logprobs"
# What may be asked to be included. All but the log-probabilities is of tools that are not here, or hides reasoning
# that is told openly.
INCLUDABLE = frozenset(
    {
        LOGPROBS,
        "reasoning.encrypted_content",
        "code_interpreter_call.outputs",
        "computer_call_output.output.image_url",
        "file_search_call.results",
        "message.input_image.image_url",
        "web_search_call.action.sources",
        "web_search_call.results",
    }
)
MAX_PAGE = 100
MAX_TOOLS = 128
Metadata = Annotated[
    dict[Annotated[str, Meta(max_length=64)], Annotated[str, Meta(max_length=512)]], Meta(max_length=16)
]


class Reasoning(Struct, kw_only=True):
    effort: str | None = None
    summary: str | None = None


class TextOptions(Struct, kw_only=True):
    format: dict[str, Any] | None = None
    verbosity: str | None = None


class ResponsesRequest(Sampled, kw_only=True):
    input: str | Annotated[list[Any], Meta(max_length=4096)] | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    max_output_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    max_tool_calls: int | None = None
    tools: Annotated[list[dict[str, Any]], Meta(max_length=512)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: Reasoning | None = None
    include: list[str] | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP)] | None = None
    metadata: Metadata | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    truncation: str | None = None
    background: bool | None = None
    conversation: Any = None
    prompt: Any = None
    context_management: list[Any] | None = None
    moderation: Any = None


def check_supported(body: ResponsesRequest) -> None:
    """ApiError for what would change the answer and is not done here."""
    refused = {
        "background": (body.background, "answers are not written in the background: ask for a stream"),
        "conversation": (body.conversation, "conversations are not kept: go on with previous_response_id"),
        "prompt": (body.prompt, "no prompts are kept here: give instructions and input"),
        "truncation": (body.truncation not in (None, "disabled"), "items are not left out: only disabled is done"),
        "context_management": (body.context_management, "conversations are not compacted"),
        "moderation": (body.moderation, "nothing is moderated here"),
        "n": (body.n not in (None, 1), "a response is one answer"),
    }
    for name, (is_wanted, why) in refused.items():
        if is_wanted:
            raise bad_field(name, why)
    for i, name in enumerate(body.include or ()):
        if name not in INCLUDABLE:
            raise bad_field(f"include[{i}]", f"{name[:50]!r} is nothing that can be included")


@dataclass(frozen=True)
class Conversation:
    """before: the turns of the responses that came before; asked: the items of this one; turn: the same, to be kept."""

    before: tuple[Turn, ...]
    asked: list[Item]
    turn: Turn

    def as_chat(self, body: ResponsesRequest) -> ChatRequest:
        """The same request in terms of chat completions. ApiError."""
        items = [item for turn in self.before for item in turn.items()] + self.asked
        messages = as_messages(items)
        if sum(len(str(message)) for message in messages) > MAX_BODY:  # small requests refer to long conversations
            raise bad_field("input", f"the conversation is longer than {MAX_BODY >> 20} MiB")
        if not messages:  # some clients send nothing, to see that a server answers
            messages = [{"role": "user", "content": ""}]
        if body.instructions:
            messages.insert(0, {"role": "system", "content": body.instructions})
        is_cut = bool(items) and items[-1].get("role") == "assistant" and items[-1]["status"] != "completed"
        return ChatRequest(
            messages=messages,
            max_tokens=body.max_output_tokens,
            logprobs=_wants_logprobs(body),
            top_logprobs=body.top_logprobs,
            tools=_chat_tools(body.tools or ()) or None,
            tool_choice=body.tool_choice,
            parallel_tool_calls=body.parallel_tool_calls,
            response_format=_format(body),
            reasoning_effort=body.reasoning.effort if body.reasoning else None,
            add_generation_prompt=not is_cut,
            continue_final_message=is_cut,
            **{name: getattr(body, name) for name in Sampled.__struct_fields__},
        )


def _wants_logprobs(body: ResponsesRequest) -> bool:
    return LOGPROBS in (body.include or ()) or bool(body.top_logprobs)


def _functions(tools: Any) -> list[Mapping[str, Any]]:
    """Tools of other kinds run on OpenAI's servers, or speak no JSON: agents list them and do without."""
    return [tool for tool in tools if tool.get("type") == "function"]


def _chat_tools(tools: Any) -> list[dict[str, Any]]:
    names = ("name", "description", "parameters", "strict")
    if len(_functions(tools)) > MAX_TOOLS:
        raise bad_field("tools", f"more than {MAX_TOOLS} functions")
    parse_tools(tools, flat=True)
    return [
        {"type": "function", "function": {name: tool[name] for name in names if tool.get(name) is not None}}
        for tool in _functions(tools)
    ]


def _format(body: ResponsesRequest) -> dict[str, Any] | None:
    given = body.text.format if body.text else None
    if given is None:
        return None
    if given.get("type") not in ("text", "json_object", "json_schema"):
        raise bad_field("text.format.type", "is none of text, json_object, json_schema")
    if given["type"] == "json_schema" and not isinstance(given.get("schema"), dict):
        raise bad_field("text.format.schema", "is missing")
    return given


def _in_its_words(error: ApiError) -> ApiError:
    """A refusal of the chat that a response became."""
    for chat_name, name in (("response_format", "text.format"), ("messages", "input")):
        if error.param and error.param.startswith(chat_name):
            error.param = name
            error.message = error.message.replace(chat_name, name, 1)
    return error


def previous_turns(service: Service, salt: bytes, name: str | None) -> tuple[Turn, ...]:
    if name is None:
        return ()
    kept = service.responses.find(salt, name)
    if kept is None:
        raise ApiError(
            400,
            f"no response {name[:100]!r} is kept here: it was not stored, or has been forgotten since;"
            " send the whole conversation as input",
            param="previous_response_id",
            code="previous_response_not_found",
        )
    return kept.turns


def _read(
    body: ResponsesRequest, before: tuple[Turn, ...], find: Callable[[str], dict[str, Any] | None]
) -> Conversation:
    asked = read_input(body.input, find)
    return Conversation(before, asked, Turn.of(asked))


async def prepare_response(
    service: Service, body: ResponsesRequest, salt: bytes, *, alone: bool = False
) -> tuple[Asked, Conversation]:
    """alone: what is kept here plays no part in it. ApiError."""
    check_supported(body)
    if alone and body.previous_response_id is not None:
        raise bad_field("previous_response_id", "a line of a batch goes on from no other response")
    before = previous_turns(service, salt, body.previous_response_id)
    find = (lambda name: None) if alone else partial(service.responses.item, salt)
    asked = await answering.aside(_read, body, before, find)
    try:
        return await prepare(service, await answering.aside(asked.as_chat, body), salt), asked
    except ApiError as error:
        raise _in_its_words(error) from None


async def responses(service: Service, request: Request) -> Response:
    body = await answering.body_of(request, ResponsesRequest)
    asked, progress = await _begin(service, body, request.state.salt)
    if not body.stream:
        return await answering.job(request, service, _job(asked, progress))
    [ticket] = service.submit_all([asked.generation])
    return answering.streamed(
        ticket, progress.say, first=progress.first(), last=progress.last, on_error=progress.failed
    )


async def job(service: Service, data: bytes, salt: bytes) -> Job:
    """A response that is answered whole, from its body, and not kept here. ApiError."""
    body = replace(parse(data, ResponsesRequest), store=False)
    return _job(*await _begin(service, body, salt, alone=True))


def _job(asked: Asked, progress: Progress) -> Job:
    return Job([asked.generation], lambda heard: progress.whole(heard[0]))


async def _begin(
    service: Service, body: ResponsesRequest, salt: bytes, *, alone: bool = False
) -> tuple[Asked, Progress]:
    asked, conversation = await prepare_response(service, body, salt, alone=alone)

    def finished(response: dict[str, Any]) -> bool:
        if body.store is False:
            return False
        turns = (*conversation.before, conversation.turn.answered(response["output"]))
        kept = Kept(dump(response | {"store": True}), turns)
        return service.responses.keep(salt, response["id"], kept)

    return asked, Progress(service, asked, told_head(service, body, asked), finished, Watch(body))


async def input_tokens(service: Service, request: Request) -> Response:
    body = await answering.body_of(request, ResponsesRequest)
    asked, _ = await prepare_response(service, body, request.state.salt)
    return _json({"object": "response.input_tokens", "input_tokens": len(asked.generation.prompt)})


def told_head(service: Service, body: ResponsesRequest, asked: Asked) -> dict[str, Any]:
    """What a response says of its request: every field that Open Responses asks for."""
    params, reasoning, text = asked.generation.params, body.reasoning or Reasoning(), body.text or TextOptions()
    verbosity = {"verbosity": text.verbosity} if text.verbosity is not None else {}
    return {
        "id": new_id("resp", "_"),
        "object": "response",
        "created_at": int(time.time()),
        "model": body.model or service.name,
        "previous_response_id": body.previous_response_id,
        "instructions": body.instructions,
        "tools": [_told_tool(tool) for tool in _functions(body.tools or ())],
        "tool_choice": "auto" if body.tool_choice is None else body.tool_choice,
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "text": {"format": _told_format(text.format or {"type": "text"})} | verbosity,
        "reasoning": {"effort": reasoning.effort, "summary": reasoning.summary},
        "temperature": params.temperature,
        "top_p": params.top_p,
        "presence_penalty": params.presence_penalty,
        "frequency_penalty": params.frequency_penalty,
        "top_logprobs": body.top_logprobs or 0,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": body.max_tool_calls,
        "truncation": "disabled",
        "store": body.store is not False,
        "background": False,
        "service_tier": "default",
        "metadata": body.metadata or {},
        "user": body.user,
        "safety_identifier": body.safety_identifier,
        "prompt_cache_key": body.prompt_cache_key,
    }


def _told_tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "function"} | {name: tool.get(name) for name in ("name", "description", "parameters", "strict")}


def _told_format(given: Mapping[str, Any]) -> dict[str, Any]:
    if given["type"] != "json_schema":
        return {"type": given["type"]}
    named = {name: given.get(name) for name in ("description", "schema")}
    return {"type": "json_schema", "name": given.get("name") or "", "strict": bool(given.get("strict"))} | named


# What is kept.


def _kept(service: Service, request: Request) -> tuple[str, Kept]:
    name = request.path_params["name"]
    kept = service.responses.find(request.state.salt, name)
    if kept is None:
        raise ApiError(404, f"no response {name[:100]!r} is kept here", param="response_id")
    return name, kept


async def retrieve(service: Service, request: Request) -> Response:
    _, kept = _kept(service, request)
    if request.query_params.get("stream") == "true":
        raise bad_field("stream", "only responses in the background are streamed again, and there are none here")
    return Response(kept.json, media_type=answering.JSON_TYPE)


async def delete(service: Service, request: Request) -> Response:
    name, _ = _kept(service, request)
    service.responses.forget(request.state.salt, name)
    return _json({"id": name, "object": "response", "deleted": True})


async def cancel(service: Service, request: Request) -> Response:
    _kept(service, request)
    raise ApiError(400, "only responses in the background can be cancelled, and there are none here: close the stream")


async def input_items(service: Service, request: Request) -> Response:
    """The items that a response answered, in pages; the newest first unless asked otherwise."""
    _, kept = _kept(service, request)
    items = await answering.aside(kept.input_items)
    return _json(page(items[::-1], request.query_params, MAX_PAGE))


def _json(value: Any) -> Response:
    return Response(dump(value), media_type=answering.JSON_TYPE)
