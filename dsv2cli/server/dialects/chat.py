"""OpenAI's chat completions, with what llama-server and vLLM add to them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response

from dsv2cli.server import answering
from dsv2cli.server.answering import sse
from dsv2cli.server.dialects.wording import DONE, FINISH, chat_logprob, timings, usage
from dsv2cli.server.errors import bad_field
from dsv2cli.server.generation import Ended, Generation, Heard, Piece
from dsv2cli.server.service import MAX_TOP, Service, new_id
from dsv2cli.server.splitting import Part, Splitter
from dsv2cli.server.wire import Sampled, parse


class ChatRequest(Sampled, kw_only=True):
    messages: Annotated[list[Any], Meta(max_length=4096)]
    max_tokens: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    max_completion_tokens: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP)] | None = None
    tools: Annotated[list[dict[str, Any]], Meta(max_length=128)] | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None


async def chat(service: Service, request: Request) -> Response:
    body = parse(await request.body(), ChatRequest)
    messages = service.messages(body.messages)
    thinking = _thinking(body)
    prompt = await answering.aside(service.chat_prompt, messages, tools=body.tools, thinking=thinking)
    asked = Generation(
        prompt=prompt,
        params=service.params(body),
        limit=service.limit(body.max_completion_tokens, body.max_tokens) or None,
        n=body.n or 1,
        stops=service.stops(body.stop),
        n_top=(body.top_logprobs or 0) if body.logprobs else None,
        opening=service.opening(prompt),
        salt=request.state.salt,
        use_cache=body.cache_prompt is not False,
        ignore_end=bool(body.ignore_eos),
    )
    [ticket] = service.submit_all([asked])
    head = {"id": new_id("chatcmpl"), "created": int(time.time()), "model": body.model or service.name}
    head |= {"system_fingerprint": service.fingerprint}
    if body.stream:
        chunks = ChatStream(service, head, body, asked)
        return answering.streamed(ticket, chunks.say, first=chunks.first(), last=chunks.last)
    return await answering.whole(request, [ticket], lambda heard: chat_body(service, head, asked, heard[0]))


def _thinking(body: ChatRequest) -> bool | None:
    """One switch for the names that it has: reasoning_effort, and templates' own variables."""
    given = body.chat_template_kwargs or {}
    for name, value in given.items():
        if name not in ("enable_thinking", "thinking", "reasoning_effort"):
            raise bad_field(f"chat_template_kwargs.{name}", "is no variable that may be set")
        if isinstance(value, bool):
            return value
        if name == "reasoning_effort" and value == "none":
            return False
    return False if body.reasoning_effort == "none" else None


class Answer:
    """One choice of a chat, collected as it comes."""

    def __init__(self, service: Service, opening: Sequence[int]) -> None:
        tokenizer = service.engine.runtime.tokenizer
        self._service = service
        self._splitter = Splitter(tokenizer, tokenizer.decode(opening))
        self.content, self.reasoning = "", ""
        self.logprobs: list[dict[str, Any]] = []
        self.n_reasoning = 0

    def feed(self, event: Piece | Ended) -> list[Part]:
        if isinstance(event, Ended):
            parts = self._splitter.finish(event.text)
        else:
            parts = self._splitter.feed(event.text)
            if event.logprobs is not None:
                self.logprobs.append(chat_logprob(self._service, event))
        for part in parts:
            if part.kind == "content":
                self.content += part.text
            elif part.kind == "reasoning":
                self.reasoning += part.text
        self.n_reasoning += isinstance(event, Piece) and bool(self.reasoning) and not self.content
        return parts


def chat_body(service: Service, head: dict[str, Any], asked: Generation, heard: list[Heard]) -> dict[str, Any]:
    answers = [Answer(service, asked.opening) for _ in range(asked.n)]
    ended: list[Ended] = []
    for event in heard:
        if isinstance(event, Piece | Ended):
            answers[event.choice].feed(event)
        if isinstance(event, Ended):
            ended.append(event)
    choices = [
        {
            "index": e.choice,
            "message": _message(answers[e.choice]),
            "finish_reason": FINISH[e.reason],
            "logprobs": {"content": answers[e.choice].logprobs} if asked.n_top is not None else None,
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


def _message(answer: Answer) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": answer.content, "refusal": None}
    return message | ({"reasoning_content": answer.reasoning.rstrip()} if answer.reasoning else {})


class ChatStream:
    """The chunks of a streamed chat."""

    def __init__(self, service: Service, head: dict[str, Any], body: ChatRequest, asked: Generation) -> None:
        self._service, self._asked = service, asked
        self._head = head | {"object": "chat.completion.chunk"}
        self._wants_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        self._answers = [Answer(service, asked.opening) for _ in range(asked.n)]
        self._ended: list[Ended] = []

    def first(self) -> bytes:
        """Every choice's role, before anything is read."""
        return b"".join(self._chunk(i, {"role": "assistant", "content": None}) for i in range(self._asked.n))

    def say(self, event: Heard) -> Iterable[bytes]:
        if not isinstance(event, Piece | Ended):
            return
        answer = self._answers[event.choice]
        parts = answer.feed(event)
        logprobs = None
        if isinstance(event, Piece) and event.logprobs is not None:
            logprobs = {"content": [answer.logprobs[-1]]}
        names = {"content": "content", "reasoning": "reasoning_content"}
        spoken = [part for part in parts if part.kind in names]
        for part in spoken:
            yield self._chunk(event.choice, {names[part.kind]: part.text}, logprobs=logprobs)
            logprobs = None
        if logprobs is not None:
            yield self._chunk(event.choice, {"content": ""}, logprobs=logprobs)
        if isinstance(event, Ended):
            self._ended.append(event)
            yield self._chunk(event.choice, {}, finish=FINISH[event.reason], timings=timings(event.stats))

    def last(self) -> Iterable[bytes]:
        if self._wants_usage:
            n_reasoning = sum(answer.n_reasoning for answer in self._answers)
            yield sse(self._head | {"choices": [], "usage": usage(self._ended, n_reasoning)})
        yield DONE

    def _chunk(
        self, index: int, delta: dict[str, Any], *, finish: str | None = None, logprobs: Any = None, **more: Any
    ) -> bytes:
        choice = {"index": index, "delta": delta, "finish_reason": finish, "logprobs": logprobs}
        return sse(self._head | {"choices": [choice]} | more)
