"""Bodies of requests to typed values, and values to JSON. Unknown fields are ignored, wrong types refused by name."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta, Struct

from dsv2cli.server.errors import ApiError

MAX_DEPTH = 64
MAX_VALUES = 1 << 19  # of a body: what they are made into takes a hundred times their bytes, and holds the interpreter
QUICK = 1 << 16  # bytes of a body that is read in the event loop
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
    check_values(body)
    try:
        raw = msgspec.json.decode(body or b"{}")
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


def check_values(body: bytes) -> None:
    """ApiError where a body may hold more than MAX_VALUES: by its commas and brackets, those in its texts included."""
    piece, n = 1 << 20, 0
    for begin in range(0, len(body), piece):  # a dense one is refused at its beginning
        n += sum(body.count(mark, begin, begin + piece) for mark in b",[{")
        if n > MAX_VALUES:
            raise ApiError(413, f"the body holds more than {MAX_VALUES} values")


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
