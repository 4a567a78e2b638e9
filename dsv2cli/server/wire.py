"""Bodies of requests to typed values, and values to JSON. Unknown fields are ignored, wrong types refused by name.

A large body is read in pieces: other threads have the interpreter between them, the event loop's above all, and the
decoder holds it for as long as it is at work.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta, Struct

from dsv2cli.server.errors import ApiError

MAX_DEPTH = 64
MAX_VALUES = 1 << 19  # of a body: what they are made into takes a hundred times their bytes, and holds the interpreter
QUICK = 1 << 16  # bytes of a body that is read in the event loop
PIECE = 1 << 20  # bytes of JSON that are decoded at once
DENSE = 8  # values of fewer bytes are decoded together: one by one they take long
LOW_SURROGATE = re.compile(rb"\\u[dD][c-fC-F]")  # the second half of an escaped character
T = TypeVar("T")

Count = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Share = Annotated[float, Meta(ge=0, le=1)]
Temperature = Annotated[float, Meta(ge=0, le=1e4)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
StopString = Annotated[str, Meta(min_length=1, max_length=256)]
Stops = str | Annotated[list[StopString], Meta(max_length=16)]
Bias = dict[str, float] | Annotated[list[tuple[int | str, float | bool]], Meta(max_length=1024)]


class StreamOptions(Struct):
    include_usage: bool | None = None


class StructuredOutputs(Struct):
    """vLLM's."""

    json: Any = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None


class Sampled(Struct, kw_only=True):
    """What every dialect of OpenAI's and llama-server's says of how an answer is drawn."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Meta(ge=1, le=16)] | None = None
    stop: Stops | None = None
    seed: int | None = None
    temperature: Temperature | None = None
    top_p: Share | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    min_p: Share | None = None
    repeat_penalty: Annotated[float, Meta(gt=0, le=1e4)] | None = None
    repeat_last_n: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Bias | None = None
    ignore_eos: bool | None = None
    cache_prompt: bool | None = None
    id_slot: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    return_progress: bool | None = None
    timings_per_token: bool | None = None
    grammar: str | None = None
    json_schema: Any = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Any = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None


def parse(body: bytes, kind: type[T]) -> T:
    """A body as ``kind``. ApiError 400 says what is wrong and where."""
    n_values = check_values(body)
    try:
        raw = msgspec.json.decode(body or b"{}") if n_values * DENSE > len(body) else decoded(body)
        check_depth(raw)
        return msgspec.convert(raw, kind, strict=True)
    except msgspec.ValidationError as error:
        what, _, where = str(error).partition(" - at `")
        field = where.rstrip("`").removeprefix("$.") or None
        raise ApiError(400, f"{field}: {what}" if field else what, param=field) from None
    except msgspec.DecodeError as error:
        raise ApiError(400, f"the body is no JSON: {error}") from None
    except (RecursionError, UnicodeDecodeError):
        raise ApiError(400, "the body is no JSON that can be read: nested too deeply, or not UTF-8") from None


def decoded(data: bytes) -> Any:
    """A JSON value, at most PIECE of it at once. msgspec.DecodeError, RecursionError."""
    if len(data) <= PIECE:
        return msgspec.json.decode(data)
    begin = data[:PIECE].lstrip()[:1]
    if begin == b"{":
        members = msgspec.json.decode(data, type=dict[str, msgspec.Raw])
        return {name: decoded(bytes(member)) for name, member in members.items()}
    if begin == b"[":
        return [decoded(bytes(item)) for item in msgspec.json.decode(data, type=list[msgspec.Raw])]
    return _text(data) if begin == b'"' else msgspec.json.decode(data)


def _text(data: bytes) -> str:
    """A JSON string, its quotes included."""
    pieces, at, end = [], data.index(b'"') + 1, data.rindex(b'"')
    while end - at > PIECE:
        cut = _cut(data, at, at + PIECE)
        pieces.append(msgspec.json.decode(b'"' + data[at:cut] + b'"', type=str))
        at = cut
    return "".join([*pieces, msgspec.json.decode(b'"' + data[at:], type=str)])


def _cut(data: bytes, begin: int, end: int) -> int:
    """The last place up to ``end`` where no character, and no escape, is cut in two."""
    escape = data.rfind(b"\\", begin, end)
    if escape >= end - len(r"\u0000"):
        n_before = escape - len(data[begin:escape].rstrip(b"\\")) - begin
        end = escape - n_before % 2  # a backslash that is escaped itself is the end of an escape, not its beginning
        if LOW_SURROGATE.match(data, end):
            end -= len(r"\u0000")
    begun = (at for at in range(end, end - 4, -1) if not 0x80 <= data[at] < 0xC0)  # else within a character
    return next(begun, end)


def check_values(body: bytes) -> int:
    """How many values a body may hold, by its commas and brackets, those in its texts included. ApiError where they are
    more than MAX_VALUES."""
    piece, n = 1 << 20, 0
    for begin in range(0, len(body), piece):  # a dense one is refused at its beginning
        n += sum(body.count(mark, begin, begin + piece) for mark in b",[{")
        if n > MAX_VALUES:
            raise ApiError(413, f"the body holds more than {MAX_VALUES} values")
    return n


def check_depth(value: Any) -> None:
    """ApiError where data is nested deeper than MAX_DEPTH. Not by recursion."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            item
            for inner in level
            for item in (inner.values() if isinstance(inner, dict) else inner if isinstance(inner, list) else ())
            if isinstance(item, dict | list)
        ]
        if not level:
            return
    raise ApiError(400, f"the body is nested deeper than {MAX_DEPTH} levels")


def dump(value: Any) -> bytes:
    return msgspec.json.encode(value)
