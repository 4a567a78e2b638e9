"""OpenAI's chat completions, with what llama-server and vLLM add to them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response

from cext.tokenizer import Message
from dsv2cli.server import answering
from dsv2cli.server.answering import sse
from dsv2cli.server.dialects.wording import DONE, FINISH, Watch, chat_logprob, settings, timings, usage
from dsv2cli.server.errors import bad_field
from dsv2cli.server.generation import Ended, Generation, Heard, Job, Piece
from dsv2cli.server.service import MAX_TOP, Service, new_id
from dsv2cli.server.splitting import Part, Splitter
from dsv2cli.server.tools import Call, CallReader, Offer, parse_offer, with_told
from dsv2cli.server.wire import Sampled, dump, parse


class ChatRequest(Sampled, kw_only=True):
    messages: Annotated[list[Any], Meta(max_length=4096)]
    max_tokens: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    max_completion_tokens: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP)] | None = None
    tools: Annotated[list[dict[str, Any]], Meta(max_length=128)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    verbose: bool | None = None


@dataclass(frozen=True)
class Prompt:
    """A chat as ids. begun: see ``_begun``; offer: the tools that its answers may call."""

    ids: list[int]
    begun: str | None
    offer: Offer


@dataclass(frozen=True)
class Asked:
    """A chat that is ready to be answered; offer: the tools that its answers may call; begun: the text at the end of
    the prompt that they go on with."""

    generation: Generation
    offer: Offer
    begun: str = ""


def at_least_one(limit: int | None) -> int | None:
    """Some clients ask for 0 tokens to see that a server answers: one is the least that a step writes."""
    return None if limit is None else max(limit, 1)


async def prompt_of(service: Service, body: ChatRequest) -> Prompt:
    """What a chat is answered from. ApiError; what the context does not hold is refused before it is all tokenised."""
    return await answering.aside(_prompt, service, body)


def _prompt(service: Service, body: ChatRequest) -> Prompt:
    messages, thinking = service.messages(body.messages), _thinking(service, body)
    offer = parse_offer(body.tools, body.tool_choice, body.parallel_tool_calls)
    described = body.tools if offer.tools else None
    begun = _begun(body, messages)
    if begun is not None:
        messages = messages[:-1] + ([Message("assistant", begun, messages[-1].fields)] if begun else [])
    if service.tool_form.native:
        messages = [service.history.shown(message) for message in messages]
    else:
        messages, described = with_told(messages, offer.tools), None
    service.check_length(sum(len(message.content) for message in messages if isinstance(message.content, str)))
    ids = service.chat_prompt(
        messages,
        tools=described,
        thinking=thinking,
        answer=begun is not None or body.add_generation_prompt is not False,
        continues=bool(begun),
    )
    return Prompt(ids, begun, offer)


async def prepare(service: Service, body: ChatRequest, salt: bytes) -> Asked:
    """Prompt, constraint and sampling of a chat. ApiError."""
    prompt = await prompt_of(service, body)
    offer, begun = prompt.offer, prompt.begun or ""
    opening = () if begun else service.opening(prompt.ids)
    form = service.form(body, body.response_format)
    if form is not None and offer.must:
        raise bad_field(form.field, "and tool_choice each ask for a form of the answer: give one of them")
    constraint = None if form is None else await answering.prepared(service.constraint, form, opening, begun)
    if form is None and (calls := offer.constraint(service.tool_form)):
        text = service.engine.runtime.tokenizer.decode(opening)
        constraint = await answering.prepared(service.grammars.compiled, calls[0], "tools", text, calls[1])
    generation = Generation(
        prompt=prompt.ids,
        params=service.params(body),
        limit=at_least_one(service.limit(body.max_completion_tokens, body.max_tokens, service.n_predict)),
        n=body.n or 1,
        stops=service.stops(body.stop),
        n_top=(body.top_logprobs or 0) if body.logprobs else None,
        opening=opening,
        salt=salt,
        use_cache=body.cache_prompt is not False,
        slot=body.id_slot,
        ignore_end=bool(body.ignore_eos),
        constraint=constraint,
    )
    return Asked(generation, offer, begun)


async def chat(service: Service, request: Request) -> Response:
    body = await answering.body_of(request, ChatRequest)
    asked = await prepare(service, body, request.state.salt)
    if not body.stream:
        return await answering.job(request, service, _job(service, body, asked))
    [ticket] = service.submit_all([asked.generation])
    chunks = ChatStream(service, _head(service, body), body, asked)
    return answering.streamed(ticket, chunks.say, first=chunks.first(), last=chunks.last)


async def input_tokens(service: Service, request: Request) -> Response:
    """How many tokens a chat's prompt has."""
    prompt = await prompt_of(service, await answering.body_of(request, ChatRequest))
    counted = {"object": "response.input_tokens", "input_tokens": len(prompt.ids)}
    return Response(dump(counted), media_type=answering.JSON_TYPE)


async def job(service: Service, data: bytes, salt: bytes) -> Job:
    """A chat that is answered whole, from its body. ApiError."""
    body = parse(data, ChatRequest)
    return _job(service, body, await prepare(service, body, salt))


def _job(service: Service, body: ChatRequest, asked: Asked) -> Job:
    head = _head(service, body)

    def build(heard: list[list[Heard]]) -> dict[str, Any]:
        return chat_body(service, head, asked, heard[0]) | _verbose(service, body, asked)

    return Job([asked.generation], build)


def _head(service: Service, body: ChatRequest) -> dict[str, Any]:
    head = {"id": new_id("chatcmpl"), "created": int(time.time()), "model": body.model or service.name}
    return head | {"system_fingerprint": service.fingerprint}


def _verbose(service: Service, body: ChatRequest, asked: Asked) -> dict[str, Any]:
    """What llama-server tells those who ask for it, or of every chat where it was started so: the prompt as it was
    read, and how the answer was drawn."""
    if not (service.verbose if body.verbose is None else body.verbose):
        return {}
    prompt = asked.generation.prompt
    told = {"prompt": service.spelt(prompt), "tokens_evaluated": len(prompt)}
    return {"__verbose": told | {"generation_settings": settings(service, asked.generation)}}


def _thinking(service: Service, body: ChatRequest) -> bool | None:
    """One switch for the names that it has: reasoning_effort, and templates' own variables; the server's own where
    nothing is said. A word for some effort leaves it to the template."""
    given = body.chat_template_kwargs or {}
    for name, value in given.items():
        if name not in ("enable_thinking", "thinking", "reasoning_effort"):
            raise bad_field(f"chat_template_kwargs.{name}", "is no variable that may be set")
        if isinstance(value, bool):
            return value
        if name == "reasoning_effort" and value == "none":
            return False
    if body.reasoning_effort is None:
        return service.thinking
    return False if body.reasoning_effort == "none" else None


def _begun(body: ChatRequest, messages: Sequence[Message]) -> str | None:
    """The text of the assistant's that is to be continued; None where an answer of its own is asked for. Without a word
    about it, as llama-server: the last message is continued if it is the assistant's, behind one that is not."""
    last, wanted = messages[-1], body.continue_final_message
    if wanted and body.add_generation_prompt:
        raise bad_field("continue_final_message", "and add_generation_prompt cannot both be true")
    is_text = last.role == "assistant" and not last.fields.get("tool_calls")
    if wanted and not is_text:
        raise bad_field("continue_final_message", "the last message is no text of the assistant's")
    if wanted is None and body.add_generation_prompt is None:
        wanted = is_text
        if is_text and len(messages) > 1 and messages[-2].role == "assistant":
            raise bad_field(
                "messages",
                "end in two of the assistant's: continue_final_message goes on with the last,"
                " add_generation_prompt begins another",
            )
    return _in_parts(body.messages[-1]["content"]) if wanted else None


def goes_on(messages: Sequence[Any]) -> bool:
    """Whether a chat of a dialect that has no word for it ends in text of the assistant's, which is continued."""
    last = messages[-1] if messages else None
    return isinstance(last, Mapping) and last.get("role") == "assistant" and not last.get("tool_calls")


def _in_parts(content: Any) -> str:
    """The text that an answer goes on with: parts of it are paragraphs, as for llama-server."""
    return content if isinstance(content, str) else "\n\n".join(part.get("text", "") for part in content or ())


class Answer:
    """One choice of a chat, collected as it comes: reasoning, content, calls of tools."""

    def __init__(self, service: Service, asked: Asked) -> None:
        tokenizer = service.engine.runtime.tokenizer
        self._service = service
        self._splitter = Splitter(tokenizer, tokenizer.decode(asked.generation.opening))
        if asked.begun:
            self._splitter.begin(asked.begun)
        self._calls = CallReader(service.tool_form, asked.offer.tools) if asked.offer.tools else None
        self.content, self.reasoning = "", ""
        self.calls: list[dict[str, Any]] = []
        self.logprobs: list[dict[str, Any]] = []
        self.n_reasoning = 0

    def feed(self, event: Piece | Ended) -> tuple[list[Part], list[dict[str, Any]]]:
        """(parts that are new, calls that are complete now)."""
        is_last = isinstance(event, Ended)
        parts = self._splitter.finish(event.text) if is_last else self._splitter.feed(event.text)
        calls: list[Call] = []
        if self._calls is not None:
            parts, calls = self._calls.feed(parts)
            if is_last:
                rest, more = self._calls.finish()
                parts, calls = parts + rest, calls + more
        if isinstance(event, Piece) and event.logprobs is not None:
            self.logprobs.append(chat_logprob(self._service, event))
        self.content += "".join(part.text for part in parts if part.kind == "content")
        self.reasoning += "".join(part.text for part in parts if part.kind == "reasoning")
        self.n_reasoning += not is_last and bool(self.reasoning) and not self.content and not self.calls
        told = [self._told(call, len(self.calls) + i) for i, call in enumerate(calls)]
        self.calls += told
        return parts, told

    @staticmethod
    def _told(call: Call, index: int) -> dict[str, Any]:
        function = {"name": call.name, "arguments": call.arguments}
        return {"id": new_id("call"), "index": index, "type": "function", "function": function}

    def finish(self, event: Ended) -> str:
        return "tool_calls" if self.calls else FINISH[event.reason]

    def message(self) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": self.content, "refusal": None}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning.rstrip()
        if self.calls:
            message["content"] = self.content.rstrip() or None
            message["tool_calls"] = [{k: v for k, v in call.items() if k != "index"} for call in self.calls]
        return message


def chat_body(service: Service, head: dict[str, Any], asked: Asked, heard: list[Heard]) -> dict[str, Any]:
    answers = [Answer(service, asked) for _ in range(asked.generation.n)]
    ended: list[Ended] = []
    for event in heard:
        if isinstance(event, Piece | Ended):
            answers[event.choice].feed(event)
        if isinstance(event, Ended):
            ended.append(event)
    wants_logprobs = asked.generation.n_top is not None
    choices = [
        {
            "index": e.choice,
            "message": answers[e.choice].message(),
            "finish_reason": answers[e.choice].finish(e),
            "logprobs": {"content": answers[e.choice].logprobs} if wants_logprobs else None,
        }
        for e in sorted(ended, key=lambda e: e.choice)
    ]
    return {
        **head,
        "object": "chat.completion",
        "choices": choices,
        "usage": usage(ended, sum(answer.n_reasoning for answer in answers)),
        "timings": timings(ended[0].stats),
    }


class ChatStream:
    """The chunks of a streamed chat."""

    def __init__(self, service: Service, head: dict[str, Any], body: ChatRequest, asked: Asked) -> None:
        self._n = asked.generation.n
        self._head = head | {"object": "chat.completion.chunk"}
        self._wants_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        self._answers = [Answer(service, asked) for _ in range(self._n)]
        self._verbose = partial(_verbose, service, body, asked)
        self._watch = Watch(body)
        self._ended: list[Ended] = []

    def first(self) -> bytes:
        """Every choice's role, before anything is read."""
        return b"".join(self._chunk(i, {"role": "assistant", "content": None}) for i in range(self._n))

    def say(self, event: Heard) -> Iterable[bytes]:
        told = self._watch.told(event)
        if not isinstance(event, Piece | Ended):
            if told:
                yield self._chunk(0, {}, **told)
            return
        answer = self._answers[event.choice]
        parts, calls = answer.feed(event)
        logprobs = None
        if isinstance(event, Piece) and event.logprobs is not None:
            logprobs = {"content": [answer.logprobs[-1]]}
        names = {"content": "content", "reasoning": "reasoning_content"}
        spoken = [part for part in parts if part.kind in names]
        for part in spoken:
            yield self._chunk(event.choice, {names[part.kind]: part.text}, logprobs=logprobs, **told)
            logprobs = None
        if calls:
            yield self._chunk(event.choice, {"tool_calls": calls}, logprobs=logprobs, **told)
        elif logprobs is not None:
            yield self._chunk(event.choice, {"content": ""}, logprobs=logprobs, **told)
        if isinstance(event, Ended):
            self._ended.append(event)
            more = {"timings": timings(event.stats)} | self._verbose()
            yield self._chunk(event.choice, {}, finish=answer.finish(event), **more)

    def last(self) -> Iterable[bytes]:
        if self._wants_usage:
            n_reasoning = sum(answer.n_reasoning for answer in self._answers)
            cost = {"usage": usage(self._ended, n_reasoning), "timings": timings(self._ended[0].stats)}
            yield sse(self._head | {"choices": []} | cost)
        yield DONE

    def _chunk(
        self, index: int, delta: dict[str, Any], *, finish: str | None = None, logprobs: Any = None, **more: Any
    ) -> bytes:
        choice = {"index": index, "delta": delta, "finish_reason": finish, "logprobs": logprobs}
        return sse(self._head | {"choices": [choice]} | more)
