"""OpenAI's completions: raw prompts, echoed with their log-probabilities where asked for."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any

from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response

from dsv2cli.scheduler import Logprobs
from dsv2cli.server import answering
from dsv2cli.server.answering import sse
from dsv2cli.server.dialects.wording import DONE, FINISH, Watch, text_logprobs, timings, usage
from dsv2cli.server.errors import bad_field
from dsv2cli.server.generation import Ended, Generation, Heard, Job, Piece
from dsv2cli.server.marked import plain
from dsv2cli.server.service import MAX_TOP, Service, new_id
from dsv2cli.server.wire import Sampled, parse


class CompletionRequest(Sampled, kw_only=True):
    prompt: str | list[str | int | list[int]] = ""
    max_tokens: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP)] | bool | None = None
    best_of: int | None = None
    suffix: str | None = None
    response_format: dict[str, Any] | None = None
    parse_special: bool | None = None


@dataclass(frozen=True)
class Prompt:
    """A raw prompt as the model reads it. own: those of its tokens that the client sent; text: what they are echoed as,
    None until somebody wants it."""

    ids: list[int]
    own: list[int]
    text: str | None = None


@dataclass(frozen=True)
class Asked:
    """Prompts that are ready to be answered; writers: what makes the choices of each."""

    generations: list[Generation]
    writers: list[TextAnswers]
    head: dict[str, Any]


async def completions(service: Service, request: Request) -> Response:
    body = await answering.body_of(request, CompletionRequest)
    asked = await prepare(service, body, request.state.salt)
    if not body.stream:
        return await answering.job(request, service, _job(asked))
    if len(asked.generations) > 1:
        raise bad_field("prompt", "several prompts cannot be streamed")
    [writer] = asked.writers
    await answering.aside(lambda: writer.prompt_text)  # which it keeps
    [ticket] = service.submit_all(asked.generations)
    return _stream_text(asked.head, body, ticket, writer)


async def job(service: Service, data: bytes, salt: bytes) -> Job:
    """Completions that are answered whole, from their body. ApiError."""
    return _job(await prepare(service, parse(data, CompletionRequest), salt))


async def prepare(service: Service, body: CompletionRequest, salt: bytes) -> Asked:
    """Prompts, constraint and sampling of a request. ApiError."""
    if body.best_of is not None and body.best_of > 1:
        raise bad_field("best_of", "is not offered: ask for n answers and choose")
    prompts = await answering.aside(text_prompts, service, body)
    limit = service.limit(body.max_tokens, service.n_predict, 16)
    n_top = int(body.logprobs) if body.logprobs is not None and body.logprobs is not False else None
    echoes = bool(body.echo)
    form = service.form(body, body.response_format)
    constraint = None if form is None else await answering.prepared(service.constraint, form)
    generations = [
        Generation(
            constraint=constraint,
            prompt=prompt.ids,
            params=service.params(body),
            limit=None if limit is None else max(limit, 1),
            n=body.n or 1,
            stops=service.stops(body.stop),
            n_top=n_top,
            rows=echoes and n_top is not None,
            salt=salt,
            use_cache=body.cache_prompt is not False,
            slot=body.id_slot,
            ignore_end=bool(body.ignore_eos),
        )
        for prompt in prompts
    ]
    writers = [
        TextAnswers(service, one, prompt if echoes else None, writes=limit != 0)
        for one, prompt in zip(generations, prompts, strict=True)
    ]
    head = {"id": new_id("cmpl"), "object": "text_completion", "created": int(time.time())}
    head |= {"model": body.model or service.name, "system_fingerprint": service.fingerprint}
    if body.suffix and not service.can_fill_in:
        head |= {"warnings": ["suffix was not used: the vocabulary has no tokens for filling in"]}
    return Asked(generations, writers, head)


def _job(asked: Asked) -> Job:
    def build(heard: list[list[Heard]]) -> dict[str, Any]:
        for writer, events in zip(asked.writers, heard, strict=True):
            for event in events:
                writer.feed(event)
        choices = [choice for writer in asked.writers for choice in writer.choices()]
        for i, choice in enumerate(choices):
            choice["index"] = i
        ended = [e for writer in asked.writers for e in writer.ended]
        return {**asked.head, "choices": choices, "usage": usage(ended), "timings": timings(ended[0].stats)}

    return Job(asked.generations, build)


def text_prompts(service: Service, body: CompletionRequest) -> list[Prompt]:
    """The prompts of a request: one, or several, each as text or as ids."""
    given = body.prompt
    items: list[Any] = [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else list(given)
    if not items:
        raise bad_field("prompt", "is empty")
    if isinstance(given, list) and len({type(item) for item in given}) > 1:
        raise bad_field("prompt", "mixes texts, ids and lists of ids")
    if len(items) > service.engine.limits.queue:
        raise bad_field("prompt", f"more than {service.engine.limits.queue} prompts at once")
    if body.suffix and service.can_fill_in:
        if not all(isinstance(item, str) for item in items):
            raise bad_field("suffix", "needs prompts of text")
        filled = [(item, service.fill_in(item, body.suffix)) for item in items]
        return [Prompt(ids, ids[service.begins(item, ids) :]) for item, ids in filled]
    prompts, special = [], body.parse_special is not False
    for item in items:
        if isinstance(item, str):
            ids = service.text_prompt(item, special=special)
            prompts.append(Prompt(ids, ids[service.begins(item, ids, special=special) :], item))
        else:
            service.check_ids(item, "prompt")
            prompts.append(Prompt(item, item))
    return prompts


class TextAnswers:
    """All answers to one prompt. echoed: the prompt, if it stands before each; writes: anything is written at all."""

    def __init__(self, service: Service, asked: Generation, echoed: Prompt | None, *, writes: bool) -> None:
        self.service, self._asked, self._echoed, self._writes = service, asked, echoed, writes
        self._texts = [""] * asked.n
        self._tokens: list[list[tuple[int, Logprobs]]] = [[] for _ in range(asked.n)]
        self.ended: list[Ended] = []

    def feed(self, event: Heard) -> tuple[str, Logprobs | None]:
        """Take an event; the text that it adds, and the log-probabilities of its token."""
        if not isinstance(event, Piece | Ended):
            return "", None
        text = plain(event.text) if self._writes else ""
        self._texts[event.choice] += text
        if isinstance(event, Ended):
            self.ended.append(event)
            return text, None
        if event.logprobs is not None and self._writes:
            self._tokens[event.choice].append((event.id, event.logprobs))
        return text, event.logprobs

    @cached_property
    def prompt_text(self) -> str:
        if self._echoed is None:
            return ""
        return self.service.spelt(self._echoed.own) if self._echoed.text is None else self._echoed.text

    def choices(self) -> list[dict[str, Any]]:
        rows = next((e.rows for e in self.ended if e.rows is not None), None)
        return [
            {
                "text": self.prompt_text + self._texts[e.choice],
                "index": e.choice,
                "finish_reason": FINISH[e.reason],
                "stop_reason": e.stop,
                "logprobs": self._logprobs(e.choice, rows),
            }
            for e in sorted(self.ended, key=lambda e: e.choice)
        ]

    def _logprobs(self, choice: int, rows: list[Logprobs | None] | None) -> dict[str, Any] | None:
        if self._asked.n_top is None:
            return None
        told: list[tuple[int, Logprobs | None]] = []
        offset = 0
        if self._echoed is not None and rows is not None:
            own = self._echoed.own
            told += zip(own, rows[len(rows) - len(own) :], strict=True)
            offset = len(self.prompt_text) - len(self.service.spelt(own))  # -1 where a text's first space is put there
        return text_logprobs(self.service, [*told, *self._tokens[choice]], self._asked.n_top, offset, len(told))


def _stream_text(head: dict[str, Any], body: CompletionRequest, ticket: Any, writer: TextAnswers) -> Response:
    wants_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
    asked: Generation = ticket.asked
    offsets = [len(writer.prompt_text)] * asked.n
    watch = Watch(body)

    def say(event: Heard) -> Iterable[bytes]:
        text, logprobs = writer.feed(event)
        told = watch.told(event)
        if not isinstance(event, Piece | Ended):
            if told:
                nothing = {"index": 0, "text": "", "finish_reason": None, "logprobs": None}
                yield sse(head | {"choices": [nothing]} | told)
            return
        finish = FINISH[event.reason] if isinstance(event, Ended) else None
        if not (text or logprobs or finish):
            return
        choice = {"index": event.choice, "text": text, "finish_reason": finish, "logprobs": None}
        if logprobs is not None and asked.n_top is not None and isinstance(event, Piece):
            one = [(event.id, logprobs)]
            choice["logprobs"] = text_logprobs(writer.service, one, asked.n_top, offsets[event.choice])
        offsets[event.choice] += len(text)
        more = {"timings": timings(event.stats)} if isinstance(event, Ended) else told
        yield sse(head | {"choices": [choice]} | more)

    def last() -> Iterable[bytes]:
        if wants_usage:
            yield sse(head | {"choices": [], "usage": usage(writer.ended), "timings": timings(writer.ended[0].stats)})
        yield DONE

    first = b""
    if writer.prompt_text:
        echo = [
            {"index": i, "text": writer.prompt_text, "finish_reason": None, "logprobs": None} for i in range(asked.n)
        ]
        first = sse(head | {"choices": echo})
    return answering.streamed(ticket, say, first=first, last=last)
