"""What is asked: the lines of OpenAI's batch files, each checked before any is answered."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from dsv2cli.server.errors import ApiError, bad_field
from dsv2cli.server.wire import parse

BOM = b"\xef\xbb\xbf"
MAX_LINE = 32 << 20  # bytes, as a request's body over HTTP
CustomId = Annotated[str, Meta(min_length=1, max_length=512)]


class _Form(Struct):
    custom_id: CustomId
    url: Annotated[str, Meta(max_length=256)]
    body: dict[str, Any]
    method: str = "POST"


class _Parts(Struct):
    body: msgspec.Raw


class _Named(Struct):
    custom_id: CustomId | None = None


@dataclass(frozen=True)
class Line:
    """A request. number: its line in the input, from 1; raw: the line itself."""

    number: int
    custom_id: str
    url: str
    raw: bytes

    @property
    def body(self) -> bytes:
        return bytes(msgspec.json.decode(self.raw, type=_Parts).body)

    @property
    def id(self) -> str:
        """Of the line's result: the same whenever it is made."""
        return result_id(self.number, self.custom_id)

    def seed(self, base: int) -> int:
        """For answers whose request names no seed: the line's own, in whatever order and process it is answered."""
        mixed = blake2b(b"%d:" % base + self.custom_id.encode(), digest_size=8)
        return int.from_bytes(mixed.digest(), "little")


@dataclass(frozen=True)
class Bad:
    """A line that cannot be answered, and why. custom_id None: it has none that could be read."""

    number: int
    custom_id: str | None
    error: ApiError

    @property
    def id(self) -> str:
        return result_id(self.number, self.custom_id)

    def __str__(self) -> str:
        named = "" if self.custom_id is None else f" ({self.custom_id})"
        return f"line {self.number}{named}: {self.error.message}"


def result_id(number: int, custom_id: str | None) -> str:
    named = f"{number}:" if custom_id is None else f"{number}:{custom_id}"
    return f"batch_req_{blake2b(named.encode(), digest_size=12).hexdigest()}"


def numbered(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The lines of a file that hold anything, with their numbers from 1."""
    for number, line in enumerate(data.removeprefix(BOM).split(b"\n"), 1):
        if stripped := line.strip():
            yield number, stripped


def check(given: Iterable[tuple[int, bytes]], urls: Iterable[str]) -> tuple[list[Line], list[Bad]]:
    """The lines that have the form of one, and the others. urls: what a line may ask for."""
    known = sorted(urls)
    lines: list[Line] = []
    bad: list[Bad] = []
    first: dict[str, int] = {}
    for number, raw in given:
        try:
            form = _form(raw, known)
            if (before := first.setdefault(form.custom_id, number)) != number:
                raise bad_field("custom_id", f"is that of line {before} too")
        except ApiError as error:
            bad.append(Bad(number, _custom_id(raw), error))
        else:
            lines.append(Line(number, form.custom_id, form.url, raw))
    return lines, bad


def _form(raw: bytes, urls: list[str]) -> _Form:
    if len(raw) > MAX_LINE:
        raise ApiError(400, f"is longer than {MAX_LINE >> 20} MiB")
    form = parse(raw, _Form)
    if form.method != "POST":
        raise bad_field("method", f"{form.method[:20]!r} is not POST")
    if form.url not in urls:
        raise bad_field("url", f"{form.url[:100]!r} is none of {', '.join(urls)}")
    return form


def _custom_id(raw: bytes) -> str | None:
    try:
        return msgspec.json.decode(raw[:MAX_LINE], type=_Named).custom_id
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
