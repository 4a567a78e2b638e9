"""ollama's dialect: what clients that know nothing else ask for."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Annotated, Any

from msgspec import Meta, Struct
from starlette.requests import Request
from starlette.responses import Response

from dsv2cli.scheduler import Stats
from dsv2cli.server import answering
from dsv2cli.server.dialects.chat import Answer, ChatRequest, at_least_one, goes_on, prepare
from dsv2cli.server.errors import ApiError
from dsv2cli.server.generation import Ended, Generation, Heard, Piece, take_all
from dsv2cli.server.marked import plain
from dsv2cli.server.service import Service
from dsv2cli.server.wire import Sampled, Stops, dump

VERSION = "0.18.3"  # of ollama, whose dialect this is: clients refuse older ones
NANO = 1e9
NDJSON = "application/x-ndjson"
DONE_REASONS = {"end": "stop", "stop": "stop", "length": "length", "context": "length"}


class Options(Struct, kw_only=True):
    num_predict: Annotated[int, Meta(ge=-2, le=2**31 - 1)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=1e4)] | None = None
    top_k: Annotated[int, Meta(ge=-1)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repeat_penalty: Annotated[float, Meta(gt=0, le=1e4)] | None = None
    repeat_last_n: Annotated[int, Meta(ge=-1)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    seed: int | None = None
    stop: Stops | None = None


class Asking(Struct, kw_only=True):
    model: str | None = None
    stream: bool | None = None
    format: str | dict[str, Any] | None = None
    options: Options | None = None
    think: bool | str | None = None


class ChatBody(Asking, kw_only=True):
    messages: Annotated[list[Any], Meta(max_length=4096)] | None = None
    tools: Annotated[list[dict[str, Any]], Meta(max_length=128)] | None = None


class GenerateBody(Asking, kw_only=True):
    prompt: str = ""
    suffix: str = ""
    system: str | None = None
    raw: bool = False


class ShowBody(Struct, kw_only=True):
    model: str | None = None
    name: str | None = None


def _now() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


def _stem(name: str) -> str:
    return name.removesuffix(":latest")


def _check_model(service: Service, name: str | None) -> None:
    if name:
        service.check_model(_stem(name))


def _sampling(body: Asking) -> dict[str, Any]:
    """The fields of OpenAI's requests that ollama's options stand for."""
    options = body.options or Options()
    named = {name: getattr(options, name) for name in Options.__struct_fields__}
    limit = named.pop("num_predict")
    return named | {"max_tokens": None if limit is None or limit < 0 else limit}


def _form(given: str | dict[str, Any] | None) -> dict[str, Any] | None:
    if given in (None, ""):
        return None
    if given == "json":
        return {"type": "json_object"}
    if isinstance(given, dict):
        return {"type": "json_schema", "json_schema": {"schema": given}}
    raise ApiError(400, "format is neither json nor a schema", param="format")


async def chat(service: Service, request: Request) -> Response:
    body = await answering.body_of(request, ChatBody)
    _check_model(service, body.model)
    if not body.messages:  # the model is asked to be loaded, which it is
        return Response(dump(_loaded(service) | {"message": {"role": "assistant", "content": ""}}))
    return await _chat(service, request, body, [_message(message) for message in body.messages], body.tools, "chat")


def _message(message: Any) -> Any:
    """ollama's calls have objects for arguments and no ids; the rest is OpenAI's."""
    if not isinstance(message, dict):
        return message
    shown = {key: value for key, value in message.items() if key != "images"}
    if message.get("images"):
        raise ApiError(400, "images: only text is read", param="messages")
    return shown


async def generate(service: Service, request: Request) -> Response:
    body = await answering.body_of(request, GenerateBody)
    _check_model(service, body.model)
    if not body.prompt and not body.suffix:
        return Response(dump(_loaded(service) | {"response": ""}))
    if body.raw or body.suffix:
        return await _raw(service, request, body)
    messages = [{"role": "system", "content": body.system}] if body.system else []
    return await _chat(service, request, body, [*messages, {"role": "user", "content": body.prompt}], None, "generate")


def _loaded(service: Service) -> dict[str, Any]:
    return {"model": service.name, "created_at": _now(), "done": True, "done_reason": "load"}


async def _chat(
    service: Service, request: Request, body: Asking, messages: list[Any], tools: Any, way: str
) -> Response:
    effort = None if body.think is None else "high" if body.think else "none"
    given = ChatRequest(
        messages=messages,
        tools=tools,
        response_format=_form(body.format),
        reasoning_effort=effort,
        continue_final_message=goes_on(messages),
        **_sampling(body),
    )
    asked = await prepare(service, given, request.state.salt)
    [ticket] = service.submit_all([asked.generation])
    told = Told(service, body.model or service.name, way, Answer(service, asked))
    return await _respond(request, body, ticket, told)


async def _raw(service: Service, request: Request, body: GenerateBody) -> Response:
    """A prompt without a template."""
    try:
        if body.suffix:
            ids = await answering.aside(service.fill_in, body.prompt, body.suffix)
        else:
            ids = await answering.aside(service.text_prompt, body.prompt)
    except ApiError:
        raise
    except Exception as error:
        raise ApiError(400, service.without_path(error)) from None
    sampled = Sampled(**{k: v for k, v in _sampling(body).items() if k != "max_tokens"}, json_schema=None)
    form = service.form(sampled, _form(body.format))
    generation = Generation(
        prompt=ids,
        params=service.params(sampled),
        limit=at_least_one(_sampling(body)["max_tokens"]),
        stops=service.stops(sampled.stop),
        salt=request.state.salt,
        constraint=None if form is None else await answering.prepared(service.constraint, form),
    )
    [ticket] = service.submit_all([generation])
    return await _respond(request, body, ticket, Told(service, body.model or service.name, "generate", None))


async def _respond(request: Request, body: Asking, ticket: Any, told: Told) -> Response:
    if body.stream is False:
        return await answering.whole(request, [ticket], lambda heard: told.whole(heard[0]))
    return answering.streamed(
        ticket,
        told.say,
        alive=b"",
        media_type=NDJSON,
        on_error=lambda error: dump({"error": error.message}) + b"\n",
    )


class Told:
    """An answer as ollama tells it: a line a piece. answer None: text that no template asked for."""

    def __init__(self, service: Service, name: str, way: str, answer: Answer | None) -> None:
        self._service, self._name, self._way, self._answer = service, name, way, answer
        self._began = time.perf_counter_ns()

    def say(self, event: Heard) -> Iterable[bytes]:
        if not isinstance(event, Piece | Ended):
            return
        content, reasoning, calls = self._feed(event)
        if content or reasoning or calls:
            yield self._line(content, reasoning, calls)
        if isinstance(event, Ended):
            yield dump(self._final(event, "", "", [])) + b"\n"

    def _feed(self, event: Piece | Ended) -> tuple[str, str, list[dict[str, Any]]]:
        if self._answer is None:
            return plain(event.text), "", []
        parts, calls = self._answer.feed(event)
        said = {kind: "".join(part.text for part in parts if part.kind == kind) for kind in ("content", "reasoning")}
        return said["content"], said["reasoning"], [_call(call) for call in calls]

    def _line(self, content: str, reasoning: str, calls: list[dict[str, Any]]) -> bytes:
        line = {"model": self._name, "created_at": _now(), "done": False}
        return dump(line | self._said(content, reasoning, calls)) + b"\n"

    def _said(self, content: str, reasoning: str, calls: list[dict[str, Any]]) -> dict[str, Any]:
        more = {"thinking": reasoning} if reasoning else {}
        if self._way == "generate":
            return {"response": content} | more
        return {"message": {"role": "assistant", "content": content} | more | ({"tool_calls": calls} if calls else {})}

    def _final(self, event: Ended, content: str, reasoning: str, calls: list[dict[str, Any]]) -> dict[str, Any]:
        head = {"model": self._name, "created_at": _now(), "done": True}
        reason = {"done_reason": DONE_REASONS.get(event.reason, "stop")}
        return head | self._said(content, reasoning, calls) | reason | self._durations(event.stats)

    def _durations(self, stats: Stats) -> dict[str, int]:
        return {
            "total_duration": time.perf_counter_ns() - self._began,
            "load_duration": 0,
            "prompt_eval_count": stats.n_prompt,
            "prompt_eval_duration": int(stats.prefill_seconds * NANO),
            "eval_count": stats.n_answer,
            "eval_duration": int(stats.decode_seconds * NANO),
        }

    def whole(self, heard: list[Heard]) -> dict[str, Any]:
        fed: list[tuple[str, str, list[dict[str, Any]]]] = []
        ended = take_all(heard, lambda event: fed.append(self._feed(event)))
        contents, reasonings, calls = zip(*fed, strict=True)
        return self._final(ended, "".join(contents), "".join(reasonings), [call for some in calls for call in some])


def _call(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return {"id": call["id"], "function": {"name": function["name"], "arguments": json.loads(function["arguments"])}}


# Models.


def _details(service: Service) -> dict[str, Any]:
    arch = service.engine.runtime.model.hparams["arch"]
    return {"format": "gguf", "family": arch, "families": [arch], "parameter_size": "", "quantization_level": ""}


def _entry(service: Service) -> dict[str, Any]:
    size = service.engine.runtime.model.nbytes
    digest = hashlib.sha256(service.name.encode()).hexdigest()
    modified = datetime.fromtimestamp(service.began, UTC).isoformat().replace("+00:00", "Z")
    entry = {"name": service.name, "model": service.name, "modified_at": modified, "size": size, "digest": digest}
    return entry | {"details": _details(service)}


async def tags(service: Service, request: Request) -> Response:
    return Response(dump({"models": [_entry(service)]}), media_type=answering.JSON_TYPE)


async def running(service: Service, request: Request) -> Response:
    entry = _entry(service) | {"expires_at": "2318-01-01T00:00:00Z", "size_vram": 0}
    return Response(
        dump({"models": [entry | {"context_length": service.engine.limits.n_ctx}]}), media_type=answering.JSON_TYPE
    )


async def show(service: Service, request: Request) -> Response:
    body = await answering.body_of(request, ShowBody)
    _check_model(service, body.model or body.name)
    hparams = service.engine.runtime.model.hparams
    arch = hparams["arch"]
    info = {
        "general.architecture": arch,
        "general.basename": service.name,
        f"{arch}.context_length": service.engine.limits.n_ctx,
        f"{arch}.embedding_length": hparams["n_embd"],
        f"{arch}.block_count": hparams["n_layer"],
    }
    template = service.engine.runtime.tokenizer.chat_template or ""
    shown = {"modelfile": "", "parameters": "", "template": template, "details": _details(service), "model_info": info}
    thinks = ["thinking"] if service.engine.runtime.tokenizer.can_switch_thinking else []
    return Response(dump(shown | {"capabilities": ["completion", "tools", *thinks]}), media_type=answering.JSON_TYPE)


async def version(service: Service, request: Request) -> Response:
    return Response(dump({"version": VERSION}), media_type=answering.JSON_TYPE)
