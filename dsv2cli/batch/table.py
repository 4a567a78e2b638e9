"""Plain text and CSV as lines of a batch: a template with the columns' values in it makes each request."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from dsv2cli.errors import CliError, UsageError

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
COLUMN_OF_TEXT = "text"
ID_COLUMNS = ("custom_id", "id")
DELIMITERS = {".csv": ",", ".tsv": "\t"}
MAX_FIELD = 8 << 20  # characters of a CSV's field
NAME = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Template:
    """A request's body with {column} in its texts. given: a message to the model, or a whole body as JSON."""

    body: dict[str, Any]

    @classmethod
    def parse(cls, given: str) -> Template:
        """The text of a message, or the name of a .json file that holds a body. CliError."""
        if not given.endswith(".json"):
            return cls({"messages": [{"role": "user", "content": given}]})
        try:
            body = msgspec.json.decode(Path(given).read_bytes())
        except OSError as error:
            raise CliError(f"`{given}`: {error.strerror or error}") from None
        except (msgspec.MsgspecError, RecursionError) as error:
            raise CliError(f"`{given}` is no JSON: {error}") from None
        if not isinstance(body, dict) or ("messages" in body) == ("prompt" in body):
            raise CliError(f"`{given}` is no request", 'a body has "messages", for a chat, or "prompt"')
        return cls(body)

    @property
    def url(self) -> str:
        return CHAT if "messages" in self.body else TEXT

    def check(self, columns: Sequence[str]) -> None:
        """UsageError where the template names a column that is not there, or none at all."""
        texts = list(_texts(self.body))
        named = {name for text in texts for name in NAME.findall(text)}
        if unknown := sorted(named - set(columns)):
            raise UsageError(
                f"the template names the column {unknown[0]!r}", f"there are: {', '.join(sorted(columns))}"
            )
        if not any(f"{{{column}}}" in text for column in columns for text in texts):
            raise UsageError("the template has no place for a column", f"as {{{columns[0]}}}")

    def fill(self, row: Mapping[str, str]) -> dict[str, Any]:
        """The body for a row. What a row holds is data: control tokens that it spells are letters."""
        place = re.compile("|".join(re.escape(f"{{{name}}}") for name in sorted(row, key=len, reverse=True)))

        def filled(value: Any) -> Any:
            if isinstance(value, str):
                return place.sub(lambda match: row[match[0][1:-1]], value)
            if isinstance(value, list):
                return [filled(item) for item in value]
            return {name: filled(item) for name, item in value.items()} if isinstance(value, dict) else value

        body: dict[str, Any] = filled(self.body)
        return body if self.url == CHAT else {"parse_special": False, **body}


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


def rows(data: bytes, suffix: str, name: str) -> tuple[list[str], Iterator[tuple[int, dict[str, str]]]]:
    """(columns, rows with their numbers in the file) of a CSV, by its suffix, or of a text's lines. CliError."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise CliError(f"`{name}`: line {line} is no UTF-8") from None
    if suffix not in DELIMITERS:
        return [COLUMN_OF_TEXT], (
            (number, {COLUMN_OF_TEXT: line.removesuffix("\r")})
            for number, line in enumerate(text.split("\n"), 1)
            if line.strip()
        )
    csv.field_size_limit(MAX_FIELD)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=DELIMITERS[suffix], strict=True)
    columns = next(_table(reader, name), (0, []))[1]
    if not columns or not all(columns) or len(set(columns)) < len(columns):
        raise CliError(f"`{name}`: the first line is to name the columns, each once")
    return columns, _rows(reader, columns, name)


def _rows(reader: Any, columns: list[str], name: str) -> Iterator[tuple[int, dict[str, str]]]:
    for number, fields in _table(reader, name):
        if len(fields) != len(columns):
            raise CliError(f"`{name}`: line {number} has {len(fields)} fields, the first line {len(columns)}")
        yield number, dict(zip(columns, fields, strict=True))


def _table(reader: Any, name: str) -> Iterator[tuple[int, list[str]]]:
    """Rows that hold anything, with the number of their first line."""
    while True:
        number = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise CliError(f"`{name}`: line {number}: {error}") from None
        if fields:
            yield number, fields


def requests(data: bytes, suffix: str, name: str, template: Template) -> Iterator[tuple[int, bytes]]:
    """Lines of a batch, with the numbers of those that they are made of. CliError, UsageError."""
    columns, found = rows(data, suffix, name)
    template.check(columns)
    id_column = next((column for column in ID_COLUMNS if column in columns), None)
    for number, row in found:
        custom_id = row[id_column] if id_column is not None else f"line-{number}"
        line = {"custom_id": custom_id, "method": "POST", "url": template.url, "body": template.fill(row)}
        yield number, msgspec.json.encode(line)
