"""Uploads as HTML's forms have them (multipart/form-data), read as they come: one file, and fields beside it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from email.parser import BytesHeaderParser
from email.policy import HTTP

from dsv2cli.server.errors import ApiError

MAX_PARTS = 16
MAX_HEAD = 8 << 10  # bytes of a part's headers
MAX_VALUE = 4 << 10  # bytes of a field
MAX_NAME = 255  # characters of a file's name
FILE = "file"


@dataclass
class Form:
    """fields: name -> value; filename None: no file came."""

    fields: dict[str, str] = field(default_factory=dict)
    filename: str | None = None


def boundary_of(content_type: str) -> bytes:
    """ApiError where it is not a form's."""
    head = BytesHeaderParser(policy=HTTP).parsebytes(b"Content-Type: " + content_type.encode("latin-1", "replace"))
    boundary = head.get_boundary()
    if head.get_content_type() != "multipart/form-data" or not boundary or len(boundary) > 200:
        raise ApiError(415, "the Content-Type must be multipart/form-data, with its boundary")
    return boundary.encode("latin-1", "replace")


class _Reader:
    """The bytes of a body, up to what is asked for."""

    def __init__(self, chunks: AsyncIterator[bytes]) -> None:
        self._chunks = chunks
        self.buffer = b"\r\n"  # so that the first boundary is like the others

    async def more(self) -> None:
        try:
            self.buffer += await anext(self._chunks)
        except StopAsyncIteration:
            raise ApiError(400, "the form ends before its last boundary") from None

    async def until(self, mark: bytes, most: int, what: str) -> bytes:
        """What stands before a mark, which is taken away with it."""
        while (at := self.buffer.find(mark)) < 0:
            if len(self.buffer) > most + len(mark):
                raise ApiError(400, f"{what} takes more than {most} bytes")
            await self.more()
        if at > most:
            raise ApiError(400, f"{what} takes more than {most} bytes")
        found, self.buffer = self.buffer[:at], self.buffer[at + len(mark) :]
        return found

    async def pour(self, mark: bytes, sink: Callable[[bytes], None]) -> None:
        """The same of any length, given away in pieces."""
        while (at := self.buffer.find(mark)) < 0:
            keep = len(mark) - 1
            if len(self.buffer) > keep:
                sink(self.buffer[:-keep])
                self.buffer = self.buffer[-keep:]
            await self.more()
        sink(self.buffer[:at])
        self.buffer = self.buffer[at + len(mark) :]


async def read_form(chunks: AsyncIterator[bytes], boundary: bytes, sink: Callable[[bytes], None]) -> Form:
    """Read a form; its file goes to sink, piece by piece. ApiError."""
    reader, form = _Reader(chunks), Form()
    mark = b"\r\n--" + boundary
    await reader.until(mark, 0, "what stands before the first boundary")
    for _ in range(MAX_PARTS + 1):
        while len(reader.buffer) < 2:
            await reader.more()
        if reader.buffer.startswith(b"--"):
            return form
        await reader.until(b"\r\n", 0, "a boundary")
        name, filename = _disposition(await reader.until(b"\r\n\r\n", MAX_HEAD, "a part's head"))
        if name != FILE:
            value = await reader.until(mark, MAX_VALUE, f"the field {name[:50]!r}")
            form.fields[name] = value.decode("utf-8", "replace")
        elif form.filename is not None:
            raise ApiError(400, "the form holds more than one file", param=FILE)
        else:
            form.filename = filename[:MAX_NAME]
            await reader.pour(mark, sink)
    raise ApiError(400, f"the form has more than {MAX_PARTS} parts")


def _disposition(head: bytes) -> tuple[str, str]:
    """(name, file name) of a part."""
    parsed = BytesHeaderParser().parsebytes(head.lstrip(b"\r\n"))
    name = parsed.get_param("name", header="content-disposition")
    if not isinstance(name, str):
        raise ApiError(400, "a part of the form has no name")
    return name, parsed.get_filename() or ""
