"""Arguments of a call that stand in tags of their own, one by one, as GLM's and Qwen3-Coder's models write them.

What is text by its schema stands there as it is, without quotes; anything else is JSON. So a call can only be read, and
be held to its schema, with the schema beside it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from dsv2cli.server.marked import CLOSE, MARK, OPEN

if TYPE_CHECKING:
    from cext.tokenizer import Tokenizer

Schema = Mapping[str, Any]
KINDS = {str: "string", bool: "boolean", int: "integer", float: "number", list: "array", dict: "object"}
PYTHON = {"True": True, "False": False, "None": None}  # as models that saw much of it spell them
TEXT = "(?s:.*)"
ANY_NAME = r"/[^<>\s]{1,100}/"
MAX_COUNTED = 4096  # characters of a text whose length a grammar counts
MAX_REFS = 8
TEXT_ALONE = frozenset({"string"})
MAYBE_NEWLINE = '("\\n")?'
TIGHT = {"x-guidance": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}}


@dataclass(frozen=True)
class Tag:
    """shown: matches it in an answer's text, as ``Marked`` spells it; rule: as grammar; is_token: not of letters."""

    shown: str
    rule: str
    is_token: bool

    @staticmethod
    def of(tokenizer: Tokenizer, spelling: str) -> Tag:
        token = tokenizer.control_id(spelling)
        if token is None:
            return Tag(re.escape(spelling), quoted(spelling), False)
        return Tag(re.escape(f"{OPEN}{spelling}{CLOSE}"), f"<[{token}]>", True)


@dataclass(frozen=True)
class Style:
    """argument: matches one, with the groups key and value. before: grammar of what stands before a value, given its
    name's. end: the tag that ends a value, and what follows it."""

    argument: re.Pattern[str]
    before: Callable[[str], str]
    end: Tag
    behind: str = ""

    def read(self, text: str, schema: Schema) -> str:
        """A call's arguments as JSON. ValueError where it is something else."""
        if MARK.sub(r"\1", self.argument.sub("", text)).strip():
            raise ValueError("something else than arguments")
        found = {}
        for match in self.argument.finditer(text):
            name, value = (MARK.sub(r"\1", match[group]) for group in ("key", "value"))
            found[name.strip()] = _value(value, _kinds(_property(schema, name.strip()), schema))
        return json.dumps(found, ensure_ascii=False)

    def rules(self, schema: Schema, name: str) -> list[str]:
        """Grammar: the rule ``name`` of all arguments, in the schema's order, and those that it needs."""
        properties, required = schema.get("properties"), schema.get("required")
        if not isinstance(properties, Mapping) or not properties:
            if schema.get("additionalProperties") is False:
                return [f'{name}: ""']
            return [f"{name}: ({self.before(ANY_NAME)} {name}v)*", self._text(f"{name}v", TEXT)]
        required = required if isinstance(required, list) else []
        parts, rules = [], []
        for i, (key, given) in enumerate(properties.items()):
            part = f"{self.before(quoted(key))} {name}v{i}"
            parts.append(part if key in required else f"({part})?")
            rules.append(self._rule(f"{name}v{i}", given, schema))
        return [f"{name}: {' '.join(parts)}", *rules]

    def _rule(self, name: str, given: Any, root: Schema) -> str:
        kinds, given = _kinds(given, root), _resolved(given, root)
        if kinds is None or (kinds != TEXT_ALONE and "string" in kinds):
            return self._text(name, TEXT)
        if kinds != TEXT_ALONE:
            definitions = {key: root[key] for key in ("$defs", "definitions") if key in root}
            return f"{name}: %json {json.dumps({**definitions, **given, **TIGHT})} {self.end.rule} {self.behind}"
        if words := _words(given):
            return f"{name}: ({' | '.join(map(quoted, words))}) {self.end.rule} {self.behind}"
        least, most = (given.get(bound) for bound in ("minLength", "maxLength"))
        least = least if type(least) is int and 0 < least <= MAX_COUNTED else 0
        most = most if type(most) is int and least <= most <= MAX_COUNTED else ""
        return self._text(name, f"(?s:.{{{least},{most}}})" if least or most != "" else TEXT)

    def _text(self, name: str, pattern: str) -> str:
        if self.end.is_token:
            return f"{name}: /{pattern}/ {self.end.rule} {self.behind}"
        return f"{name}: {name}t {self.behind}\n{name}t[suffix={self.end.rule}]: /{pattern}/"


def glm(tokenizer: Tokenizer) -> Style:
    """4.5 and later: a key and a value, with line breaks around them or without."""
    key, key_end, value, end = (
        Tag.of(tokenizer, text) for text in ("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")
    )
    pattern = rf"{key.shown}(?P<key>.*?){key_end.shown}\s*{value.shown}(?P<value>.*?){end.shown}"
    return Style(
        re.compile(pattern, re.DOTALL),
        lambda name: f"{key.rule} {name} {key_end.rule} {MAYBE_NEWLINE} {value.rule}",
        end,
        MAYBE_NEWLINE,
    )


def qwen_coder() -> Style:
    """Qwen3-Coder, Qwen3.5 and others: tags of letters, values on lines of their own."""
    pattern = r"<parameter=(?P<key>[^>\n]+)>\n?(?P<value>.*?)\n?</parameter>"
    closing = "\n</parameter>\n"
    return Style(
        re.compile(pattern, re.DOTALL),
        lambda name: f'"<parameter=" {name} ">\\n"',
        Tag(re.escape(closing), quoted(closing), False),
    )


def quoted(text: str) -> str:
    """As grammar. Halves of characters, which no answer can hold, are question marks."""
    return json.dumps(text.encode(errors="replace").decode(), ensure_ascii=False)


def _value(text: str, kinds: frozenset[str] | None) -> Any:
    """JSON where the schema allows what it says, else the text itself."""
    if kinds == TEXT_ALONE:
        return text
    try:
        value = PYTHON[text.strip()] if text.strip() in PYTHON else msgspec.json.decode(text)
    except (ValueError, RecursionError):
        return text
    kind = "null" if value is None else KINDS[type(value)]
    allowed = kinds is None or kind in kinds or (kind == "integer" and "number" in kinds)
    return value if allowed else text


def _property(schema: Schema, name: str) -> Any:
    properties = schema.get("properties")
    return properties.get(name, {}) if isinstance(properties, Mapping) else {}


def _resolved(schema: Any, root: Schema) -> Schema:
    """Where it refers to, within the root."""
    for _ in range(MAX_REFS):
        path = schema.get("$ref") if isinstance(schema, Mapping) else None
        if not isinstance(path, str):
            break
        schema = root if path.startswith("#/") else {}
        for part in path[2:].split("/"):
            schema = schema.get(part, {}) if isinstance(schema, Mapping) else {}
    return schema if isinstance(schema, Mapping) else {}


def _words(schema: Schema) -> list[str]:
    """What a text may be, where that is listed."""
    given = [schema["const"]] if "const" in schema else schema.get("enum")
    return [word for word in given if isinstance(word, str) and word] if isinstance(given, list) else []


def _kinds(schema: Any, root: Schema, depth: int = 0) -> frozenset[str] | None:
    """The JSON types that a schema allows; None: any, or it is not told simply."""
    schema = _resolved(schema, root)
    if depth > MAX_REFS:
        return None
    given = schema.get("type")
    if isinstance(given, str):
        return frozenset((given,))
    if isinstance(given, list):
        return frozenset(kind for kind in given if isinstance(kind, str))
    listed = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(listed, list):
        return frozenset("null" if value is None else KINDS[type(value)] for value in listed)
    for key in ("anyOf", "oneOf"):
        if isinstance(schema.get(key), list):
            found = [_kinds(one, root, depth + 1) for one in schema[key]]
            return None if None in found else frozenset().union(*(kinds for kinds in found if kinds))
    return None
