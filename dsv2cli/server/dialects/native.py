"""llama-server's own dialect, and what it and vLLM say of tokens and templates."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from msgspec import Meta, Struct
from starlette.requests import Request
from starlette.responses import Response

from dsv2cli.scheduler import Logprobs, Reason
from dsv2cli.server import answering
from dsv2cli.server.answering import sse
from dsv2cli.server.dialects.chat import ChatRequest, prompt_of
from dsv2cli.server.dialects.wording import Watch, settings, timings
from dsv2cli.server.errors import ApiError, bad_field
from dsv2cli.server.generation import Ended, Generation, Heard, Piece, take_all
from dsv2cli.server.marked import plain
from dsv2cli.server.service import MAX_TOP, Service
from dsv2cli.server.wire import Sampled, dump

if TYPE_CHECKING:
    from dsv2cli.server.engine import Ticket

STOP_TYPES: dict[Reason, str] = {"end": "eos", "stop": "word", "length": "limit", "context": "limit"}
Ids = Annotated[list[int], Meta(max_length=1 << 22)]


class CompletionRequest(Sampled, kw_only=True):
    prompt: str | list[Any] | dict[str, Any] = ""
    n_predict: Annotated[int, Meta(ge=-2, le=2**31 - 1)] | None = None
    max_tokens: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    n_probs: Annotated[int, Meta(ge=0, le=MAX_TOP)] = 0
    post_sampling_probs: bool = False
    return_tokens: bool = False
    response_fields: list[str] | None = None
    parse_special: bool | None = None


class ExtraFile(Struct, kw_only=True):
    text: str
    filename: str = ""


class InfillRequest(CompletionRequest, kw_only=True):
    input_prefix: str = ""
    input_suffix: str = ""
    input_extra: Annotated[list[ExtraFile], Meta(max_length=1024)] | None = None


# Completions.


async def completion(service: Service, request: Request) -> Response:
    body = await answering.body_of(request, CompletionRequest)
    prompts, several = await answering.aside(prompts_of, service, body)
    return await _answer(service, request, body, prompts, several=several)


async def infill(service: Service, request: Request) -> Response:
    """What stands between two texts; the files that belong to them come before."""
    body = await answering.body_of(request, InfillRequest)
    extra = "".join(f"{item.filename}\n{item.text}\n\n" for item in body.input_extra or ())
    before = extra + body.input_prefix + (body.prompt if isinstance(body.prompt, str) else "")
    try:
        ids = await answering.aside(service.fill_in, before, body.input_suffix)
    except ApiError:
        raise
    except Exception as error:
        raise ApiError(501, service.without_path(error), "not_supported_error") from None
    return await _answer(service, request, body, [ids], several=False)


def prompts_of(service: Service, body: CompletionRequest) -> tuple[list[list[int]], bool]:
    """(prompts, whether they are several): text, ids, both mixed, an object with a text, or a list of such."""
    given = body.prompt
    if isinstance(given, list) and not (given and any(isinstance(item, int) for item in given)):
        if not given:
            raise bad_field("prompt", "is empty")
        return [_prompt(service, item, body) for item in given], True
    return [_prompt(service, given, body)], False


def _prompt(service: Service, given: Any, body: CompletionRequest) -> list[int]:
    special = body.parse_special is not False
    if isinstance(given, dict):
        if given.get("multimodal_data"):
            raise bad_field("prompt.multimodal_data", "only text is read")
        given = given.get("prompt_string")
    if isinstance(given, str):
        return service.text_prompt(given, special=special)
    if not isinstance(given, list) or not all(isinstance(item, int | str) for item in given):
        raise bad_field("prompt", "is neither text nor ids nor both mixed")
    service.check_length(sum(len(item) for item in given if isinstance(item, str)))
    ids: list[int] = []
    for item in given:
        ids += [item] if isinstance(item, int) else service.engine.runtime.tokenizer.encode(item, special=special)
    service.check_ids(ids, "prompt")
    return ids


async def _answer(
    service: Service, request: Request, body: CompletionRequest, prompts: Sequence[list[int]], *, several: bool
) -> Response:
    form = service.form(body)
    constraint = None if form is None else await answering.prepared(service.constraint, form)
    limit = service.limit(body.n_predict, body.max_tokens, service.n_predict)
    asked = [
        Generation(
            prompt=ids,
            params=service.params(body),
            limit=None if limit is None else max(limit, 1),
            stops=service.stops(body.stop),
            n_top=body.n_probs or None,
            drawn=body.post_sampling_probs,
            salt=request.state.salt,
            use_cache=body.cache_prompt is not False,
            ignore_end=bool(body.ignore_eos),
            constraint=constraint,
            slot=body.id_slot,
        )
        for ids in prompts
    ]
    if len(asked) > service.engine.limits.queue:
        raise bad_field("prompt", f"more than {service.engine.limits.queue} prompts at once")
    if body.stream and len(asked) > 1:
        raise bad_field("prompt", "several prompts cannot be streamed")
    tickets = service.submit_all(asked)
    writers = [Written(service, body, ticket, i, writes=limit != 0) for i, ticket in enumerate(tickets)]
    if body.stream:
        return answering.streamed(tickets[0], writers[0].say)

    def build(heard: list[list[Heard]]) -> Any:
        answers = [writer.whole(events) for writer, events in zip(writers, heard, strict=True)]
        return answers if several else answers[0]

    return await answering.whole(request, tickets, build)


class Written:
    """An answer as llama-server tells it."""

    def __init__(self, service: Service, body: CompletionRequest, ticket: Ticket, index: int, *, writes: bool) -> None:
        self._service, self._body, self._ticket, self._index, self._writes = service, body, ticket, index, writes
        self._asked = ticket.asked
        self._text = ""
        self._ids: list[int] = []
        self._probs: list[dict[str, Any]] = []
        self._watch = Watch(body)

    def _feed(self, event: Piece | Ended) -> str:
        text = plain(event.text) if self._writes else ""
        self._text += text
        if isinstance(event, Piece) and self._writes:
            self._ids.append(event.id)
            if event.logprobs is not None:
                tell = drawn_probability if self._asked.drawn else probability
                self._probs.append(tell(self._service, event.id, event.logprobs))
        return text

    def say(self, event: Heard) -> Iterable[bytes]:
        told = self._watch.told(event)
        if isinstance(event, Piece):
            text = self._feed(event)
            more = {"completion_probabilities": self._probs[-1:]} if event.logprobs is not None else {}
            if self._writes:
                yield sse(self._part(text, [event.id], more | told))
        elif "prompt_progress" in told:
            yield sse(self._part("", [], told))
        elif isinstance(event, Ended):
            text = self._feed(event)
            yield sse(self._final(event) | {"content": text, "tokens": []})

    def _part(self, text: str, ids: list[int], more: dict[str, Any]) -> dict[str, Any]:
        n_prompt = len(self._asked.prompt)
        counts = {"tokens_predicted": len(self._ids), "tokens_evaluated": n_prompt}
        return (
            {"index": self._index, "content": text, "tokens": ids, "stop": False, "id_slot": self._ticket.slot}
            | counts
            | more
        )

    def whole(self, events: Iterable[Heard]) -> dict[str, Any]:
        answer = self._final(take_all(events, self._feed))
        if self._body.response_fields:
            return {name: value for name in self._body.response_fields for value in _field(answer, name)}
        return answer

    def _final(self, event: Ended) -> dict[str, Any]:
        stats, asked = event.stats, self._asked
        answer = {
            "index": self._index,
            "content": self._text,
            "tokens": self._ids if self._body.return_tokens else [],
            "id_slot": self._ticket.slot,
            "stop": True,
            "model": self._service.name,
            "tokens_predicted": stats.n_answer if self._writes else 0,
            "tokens_evaluated": stats.n_prompt,
            "tokens_cached": stats.n_prompt + stats.n_answer,
            "generation_settings": settings(self._service, asked),
            "prompt": self._service.engine.runtime.tokenizer.decode(asked.prompt),
            "has_new_line": "\n" in self._text,
            "truncated": event.reason == "context",
            "stop_type": STOP_TYPES.get(event.reason, "none"),
            "stopping_word": event.stop or "",
            "timings": timings(stats),
        }
        if asked.n_top is not None:
            answer["completion_probabilities"] = self._probs
        return answer


def _field(answer: dict[str, Any], path: str) -> list[Any]:
    """The value at a path such as generation_settings/n_predict, as a list of at most one."""
    value: Any = answer
    for name in path.split("/"):
        if not isinstance(value, dict) or name not in value:
            return []
        value = value[name]
    return [value]


def probability(service: Service, token: int, found: Logprobs) -> dict[str, Any]:
    def entry(token: int, value: float) -> dict[str, Any]:
        raw = service.engine.runtime.tokenizer.token_bytes(token)
        text = raw.decode("utf-8", "replace")
        return {"id": token, "token": text, "bytes": list(raw), "logprob": max(value, -9999.0)}

    return entry(token, found.chosen) | {"top_logprobs": [entry(other, value) for other, value in found.top]}


def drawn_probability(service: Service, token: int, found: Logprobs) -> dict[str, Any]:
    """The same for what was drawn from: probabilities in place of their logarithms."""

    def entry(told: dict[str, Any]) -> dict[str, Any]:
        logprob = told.pop("logprob")
        return told | {"prob": math.exp(logprob)}

    told = probability(service, token, found)
    top = [entry(other) for other in told.pop("top_logprobs")]
    return entry(told) | {"top_probs": top}


# Tokens and templates.


class TokenizeRequest(Struct, kw_only=True):
    content: str | list[str | int] | None = None
    prompt: str | None = None  # vLLM's name of it
    messages: list[Any] | None = None
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: bool | None = None
    add_special: bool = False
    add_special_tokens: bool | None = None
    parse_special: bool = True
    with_pieces: bool = False
    add_generation_prompt: bool | None = None


class DetokenizeRequest(Struct, kw_only=True):
    tokens: Ids


async def tokenize(service: Service, request: Request) -> Response:
    body = await answering.body_of(request, TokenizeRequest)
    chat = None if body.messages is None else await prompt_of(service, _as_chat(body, body.messages))

    def told() -> bytes:
        ids = _tokenized(service, body) if chat is None else chat.ids
        shown: Any = [{"id": token, "piece": _piece(service, token)} for token in ids] if body.with_pieces else ids
        return dump({"tokens": shown, "count": len(ids), "max_model_len": service.engine.limits.n_ctx})

    return Response(await answering.aside(told), media_type=answering.JSON_TYPE)


def _as_chat(body: TokenizeRequest, messages: list[Any]) -> ChatRequest:
    return ChatRequest(
        messages=messages,
        tools=body.tools,
        chat_template_kwargs=body.chat_template_kwargs,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
    )


def _tokenized(service: Service, body: TokenizeRequest) -> list[int]:
    tokenizer = service.engine.runtime.tokenizer
    given = body.content if body.content is not None else body.prompt or ""
    # vLLM adds what begins a text unless told not to; llama-server only where told to.
    begins = body.add_special if body.content is not None else body.add_special_tokens is not False
    ids: list[int] = []
    for item in given if isinstance(given, list) else [given]:
        ids += [item] if isinstance(item, int) else tokenizer.encode(item, special=body.parse_special)
    if ids:
        service.check_ids(ids, "content")
    if begins and tokenizer.add_bos and tokenizer.bos is not None and ids[:1] != [tokenizer.bos]:
        ids.insert(0, tokenizer.bos)
    return ids


def _piece(service: Service, token: int) -> Any:
    tokenizer = service.engine.runtime.tokenizer
    raw = (tokenizer.special_text(token) or "").encode() or tokenizer.token_bytes(token)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return list(raw)


async def detokenize(service: Service, request: Request) -> Response:
    body = await answering.body_of(request, DetokenizeRequest)

    def told() -> bytes:
        if body.tokens:
            service.check_ids(body.tokens, "tokens")
        text = service.spelt(body.tokens)
        return dump({"content": text, "prompt": text})

    return Response(await answering.aside(told), media_type=answering.JSON_TYPE)


async def apply_template(service: Service, request: Request) -> Response:
    """The prompt that a chat of the same body is answered from, but for the token that prompts of text begin with
    anyhow: /completion puts it there."""
    prompt = await prompt_of(service, await answering.body_of(request, ChatRequest))
    tokenizer = service.engine.runtime.tokenizer
    is_put = tokenizer.add_bos and prompt.ids[:1] == [tokenizer.bos]
    text = await answering.aside(service.spelt, prompt.ids[is_put:])
    return Response(dump({"prompt": text}), media_type=answering.JSON_TYPE)


async def tokenizer_info(service: Service, request: Request) -> Response:
    tokenizer = service.engine.runtime.tokenizer
    spellings = tokenizer.named_spellings
    answer = {f"{name}_token": spellings.get(name) or None for name in ("bos", "eos", "pad", "unk")}
    return Response(dump(answer | {"chat_template": tokenizer.chat_template}), media_type=answering.JSON_TYPE)


# The server.


async def props(service: Service, request: Request) -> Response:
    engine = service.engine
    asked = Generation(prompt=[], params=service.defaults)
    answer = {
        "default_generation_settings": {"n_ctx": engine.limits.n_ctx, "params": settings(service, asked)},
        "total_slots": engine.limits.parallel,
        "model_alias": service.name,
        "model_path": engine.runtime.path.name,  # its name alone: where it lies is nobody's affair
        "modalities": {"vision": False, "audio": False},
        "chat_template": engine.runtime.tokenizer.chat_template or "",
        "bos_token": service.token_text(engine.runtime.tokenizer.bos or 0),
        "eos_token": service.token_text(engine.runtime.tokenizer.eos or 0),
        "build_info": service.fingerprint,
        "limits": {"queue": engine.limits.queue, "n": 16, "stop": 16, "top_logprobs": MAX_TOP, "tools": 128},
    }
    return Response(dump(answer), media_type=answering.JSON_TYPE)
