"""Functions that a model may call: how each family writes a call, how one is read, and how one is made sure of.

A template that knows tools writes their descriptions itself, and the model answers in its family's own form. For the
others the descriptions and the form are said in the system message. Where a call must come, a grammar holds the model
to the form and the arguments to their schema; where it may come, from the token on that begins one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import msgspec

from cext.errors import TemplateError, TokenizerError
from cext.template import free_variables
from cext.tokenizer import Message
from dsv2cli.scheduler.text import overlap
from dsv2cli.server.errors import bad_field
from dsv2cli.server.marked import CLOSE, MARK, OPEN
from dsv2cli.server.splitting import Part
from dsv2cli.server.tagged import MAYBE_NEWLINE, TIGHT, Style, Tag, glm, quoted, qwen_coder

if TYPE_CHECKING:
    from cext.tokenizer import Tokenizer

NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,128}")
MAX_SCHEMA = 1 << 20  # characters of all tools
CALL, CALL_END = "<tool_call>", "</tool_call>"
NEWLINE, CLOSING = "\n", "}\n"  # what stands between two calls; behind a call's arguments
GLM_TAG, CODER_TAGS = "<arg_key>", ("<function=", "<parameter=")  # of calls that are no JSON
NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}
TOLD = """\
You can call functions. To call one, answer with nothing but
<tool_call>
{"name": "the function's name", "arguments": {...}}
</tool_call>
for each call. The functions, each with the JSON Schema of its arguments:
"""


@dataclass(frozen=True)
class Tool:
    name: str
    schema: Mapping[str, Any]


@dataclass(frozen=True)
class Call:
    """arguments: as JSON text, as the model wrote it."""

    name: str
    arguments: str


def parse_tools(given: Sequence[Mapping[str, Any]], *, flat: bool = False) -> list[Tool]:
    """OpenAI's descriptions of functions. Kinds that are no functions are left out. flat: in the form of Responses,
    which have no object within. ApiError."""
    tools, n_chars = [], 0
    for i, entry in enumerate(given):
        if entry.get("type", "function") != "function":
            continue
        function, where = entry.get("function", entry), f"tools[{i}]" + ("" if flat else ".function")
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise bad_field(f"{where}.name", "is no name of letters, digits, _ . : / -")
        schema = function.get("parameters") or NO_ARGUMENTS
        n_chars += len(json.dumps(schema))
        if not isinstance(schema, Mapping) or n_chars > MAX_SCHEMA:
            raise bad_field(f"{where}.parameters", "is no JSON Schema, or they are very long")
        tools.append(Tool(name, schema))
    return tools


@dataclass(frozen=True)
class Form:
    """How a family writes calls.

    begin: what begins them, as ``Marked`` spells it; end: what closes each one, if anything; begin_id: begin's token.
    call: matches one call, with the groups name and arguments (or json). write: the body of a grammar's rule of a call,
    given a tool and the name of the rule of its arguments. around: what stands before the first call (after begin) and
    behind the last one, as grammar; again: before each further one. native: the template describes tools. style: of
    arguments that are no JSON.
    """

    begin: str
    end: str
    begin_id: int | None
    call: re.Pattern[str]
    write: Callable[[Tool, str], str]
    around: tuple[str, str] = ("", "")
    again: str = ""
    native: bool = True
    style: Style | None = None

    def grammar(self, tools: Sequence[Tool], *, begun: bool, several: bool) -> str:
        """Lark: one call or more. begun: the token that begins them has come already."""
        rules = [rule for i, tool in enumerate(tools) for rule in self._arguments(tool, f"args{i}")]
        rules += [f"call{i}: {self.write(tool, f'args{i}')}" for i, tool in enumerate(tools)]
        begin = "" if begun else f"<[{self.begin_id}]>" if self.begin_id is not None else ""
        calls = "(" + " | ".join(f"call{i}" for i in range(len(tools))) + ")"
        calls += f" ({self.again} {calls})*" if several else ""
        return "\n".join([f"start: {begin} {self.around[0]} {calls} {self.around[1]}", *rules])

    def _arguments(self, tool: Tool, name: str) -> list[str]:
        if self.style is not None:
            return self.style.rules(tool.schema, name)
        return [f"{name}: %json {json.dumps({**tool.schema, **TIGHT})}"]


def form_of(tokenizer: Tokenizer) -> Form:
    """The form that a model's vocabulary and template speak of."""
    template = tokenizer.chat_template or ""
    for make in (_deepseek, _kimi, _mistral, _tagged, _qwen):
        form = make(tokenizer, template)
        if form is not None and "tools" in free_variables(template):
            return form
    return _told()


def _shown(spelling: str) -> str:
    return f"{OPEN}{spelling}{CLOSE}"


class _Marks:
    """The spellings of control tokens, as text is marked and as a grammar names them."""

    def __init__(self, tokenizer: Tokenizer, *spellings: str) -> None:
        self.ids = [tokenizer.control_id(text) for text in spellings]
        self.shown = [re.escape(_shown(text)) for text in spellings]
        self.rules = [f"<[{token}]>" for token in self.ids]

    @property
    def are_there(self) -> bool:
        return None not in self.ids


def _deepseek(tokenizer: Tokenizer, template: str) -> Form | None:
    """V2.5, V3, R1: function SEP name and a fenced block; V3.1: name SEP arguments."""
    names = ("calls▁begin", "calls▁end", "call▁begin", "sep", "call▁end")
    marks = _Marks(tokenizer, *(f"<｜tool▁{name}｜>" for name in names))
    if not marks.are_there or "tool▁call" not in template:
        return None
    begin, sep, end = marks.shown[2:]
    _, calls_end_rule, begin_rule, sep_rule, end_rule = marks.rules
    fenced = "```json" in template
    if fenced:
        pattern = rf"{begin}\s*function{sep}(?P<name>[^\n]*)\n```json\n(?P<arguments>.*?)\n?```\s*{end}"
    else:
        pattern = rf"{begin}(?P<name>.*?){sep}(?P<arguments>.*?){end}"

    def write(tool: Tool, arguments: str) -> str:
        if fenced:
            name = quoted(f"{tool.name}\n```json\n")
            return f'{begin_rule} "function" {sep_rule} {name} {arguments} "\\n```" {end_rule}'
        return f"{begin_rule} {quoted(tool.name)} {sep_rule} {arguments} {end_rule}"

    return Form(
        _shown("<｜tool▁calls▁begin｜>"),
        _shown("<｜tool▁call▁end｜>"),
        marks.ids[0],
        re.compile(pattern, re.DOTALL),
        write,
        ("", calls_end_rule),
    )


def _kimi(tokenizer: Tokenizer, template: str) -> Form | None:
    """Kimi-K2: functions.NAME:INDEX, then the arguments."""
    names = ("calls_section_begin", "calls_section_end", "call_begin", "call_argument_begin", "call_end")
    marks = _Marks(tokenizer, *(f"<|tool_{name}|>" for name in names))
    if not marks.are_there:
        return None
    _, _, begin, sep, end = marks.shown
    _, section_end, begin_rule, sep_rule, end_rule = marks.rules
    pattern = rf"{begin}\s*(?:functions\.)?(?P<name>.*?)(?::\d+)?\s*{sep}(?P<arguments>.*?){end}"

    def write(tool: Tool, arguments: str) -> str:
        return f"{begin_rule} {quoted(f'functions.{tool.name}:')} /[0-9]+/ {sep_rule} {arguments} {end_rule}"

    return Form(
        _shown("<|tool_calls_section_begin|>"),
        _shown("<|tool_call_end|>"),
        marks.ids[0],
        re.compile(pattern, re.DOTALL),
        write,
        ("", section_end),
    )


def _mistral(tokenizer: Tokenizer, template: str) -> Form | None:
    """Mistral: [TOOL_CALLS] name [ARGS] arguments, for each call."""
    marks = _Marks(tokenizer, "[TOOL_CALLS]", "[ARGS]")
    if not marks.are_there:
        return None
    begin, sep = marks.shown
    pattern = rf"{begin}(?P<name>.*?){sep}(?P<arguments>.*?)(?={begin}|\Z)"

    def write(tool: Tool, arguments: str) -> str:
        return f"{quoted(tool.name)} {marks.rules[1]} {arguments}"

    return Form(_shown("[TOOL_CALLS]"), "", marks.ids[0], re.compile(pattern, re.DOTALL), write, again=marks.rules[0])


def _tagged(tokenizer: Tokenizer, template: str) -> Form | None:
    """GLM from 4.5 on, Qwen3-Coder: a name, and each argument in tags of its own."""
    is_glm = GLM_TAG in template
    if CALL not in template or not (is_glm or all(tag in template for tag in CODER_TAGS)):
        return None
    begin, end = Tag.of(tokenizer, CALL), Tag.of(tokenizer, CALL_END)
    style = glm(tokenizer) if is_glm else qwen_coder()
    if is_glm:
        first = Tag.of(tokenizer, GLM_TAG).shown
        pattern = rf"{begin.shown}(?P<name>.*?)\s*(?P<tagged>{first}.*?)?{end.shown}"
    else:
        pattern = rf"{begin.shown}\s*<function=(?P<name>[^>\n]+)>\s*(?P<tagged>.*?)</function>\s*{end.shown}"
    opening = "" if begin.is_token else begin.rule

    def write(tool: Tool, arguments: str) -> str:
        if is_glm:
            return f"{opening} {quoted(tool.name)} {MAYBE_NEWLINE} {arguments} {end.rule}"
        function = quoted(f"\n<function={tool.name}>\n")
        return f'{opening} {function} {arguments} "</function>\\n" {end.rule}'

    return Form(
        _shown(CALL) if begin.is_token else CALL,
        _shown(CALL_END) if end.is_token else CALL_END,
        tokenizer.control_id(CALL),
        re.compile(pattern, re.DOTALL),
        write,
        again=f"{MAYBE_NEWLINE} {begin.rule if begin.is_token else ''}",
        style=style,
    )


def _qwen(tokenizer: Tokenizer, template: str) -> Form | None:
    """Qwen 2.5 and 3, Hermes: a JSON object between tags, which are tokens in most vocabularies. Not what writes
    arguments in tags that are neither GLM's nor Qwen3-Coder's."""
    others = (GLM_TAG, *CODER_TAGS)
    if CALL not in template or "arguments" not in template or any(tag in template for tag in others):
        return None
    marks = _Marks(tokenizer, CALL, CALL_END)
    if not marks.are_there:
        return replace(_told(), native=True)
    begin, end = marks.shown
    pattern = rf"{begin}\s*(?P<json>.*?)\s*(?:{end}|\Z)"

    def write(tool: Tool, arguments: str) -> str:
        return f"{quoted(_call_begin(tool))} {arguments} {quoted(CLOSING)} {marks.rules[1]}"

    again = f"{quoted(NEWLINE)} {marks.rules[0]}"
    return Form(_shown(CALL), _shown(CALL_END), marks.ids[0], re.compile(pattern, re.DOTALL), write, again=again)


def _told() -> Form:
    """The form of the system message, for templates that know none."""
    pattern = rf"{CALL}\s*(?P<json>.*?)\s*(?:{CALL_END}|\Z)"

    def write(tool: Tool, arguments: str) -> str:
        return f"{quoted(CALL + _call_begin(tool))} {arguments} {quoted(CLOSING + CALL_END + NEWLINE)}"

    return Form(CALL, CALL_END, None, re.compile(pattern, re.DOTALL), write, native=False)


def _call_begin(tool: Tool) -> str:
    return f'\n{{"name": {json.dumps(tool.name)}, "arguments": '


@dataclass(frozen=True)
class Offer:
    """What a request offers: the tools that may be called now, and whether one must be; several: more than one."""

    tools: tuple[Tool, ...]
    must: bool
    several: bool

    def constraint(self, form: Form) -> tuple[str, int | None] | None:
        """(grammar, the token that it begins after) that keeps calls to their form; None where nothing does."""
        if not self.tools or (not self.must and form.begin_id is None):
            return None
        grammar = form.grammar(self.tools, begun=not self.must, several=self.several)
        return grammar, None if self.must else form.begin_id


def parse_offer(given: Sequence[Mapping[str, Any]] | None, choice: Any, several: bool | None) -> Offer:
    """OpenAI's tools, tool_choice and parallel_tool_calls. ApiError."""
    tools = tuple(parse_tools(given or ()))
    if isinstance(choice, Mapping) and choice.get("type") == "allowed_tools":
        tools, choice = _allowed(tools, choice.get("allowed_tools", choice))
    if isinstance(choice, Mapping):
        function = choice.get("function", choice)
        name = function.get("name") if isinstance(function, Mapping) else None
        named = tuple(tool for tool in tools if tool.name == name)
        if not named:
            raise bad_field("tool_choice", f"names {str(name)[:100]!r}, which is not among the tools")
        return Offer(named, True, False)
    if choice not in (None, "auto", "none", "required"):
        raise bad_field("tool_choice", "is none of auto, none, required, or a function by name")
    if choice == "required" and not tools:
        raise bad_field("tool_choice", "asks for a call, and there are no tools")
    return Offer(() if choice == "none" else tools, choice == "required", several is not False)


def _allowed(tools: tuple[Tool, ...], choice: Any) -> tuple[tuple[Tool, ...], Any]:
    """The tools that OpenAI's choice among some of them leaves, and its mode."""
    given = choice.get("tools") if isinstance(choice, Mapping) else None
    if not isinstance(given, list) or not all(isinstance(tool, Mapping) for tool in given):
        raise bad_field("tool_choice.tools", "is no list of tools")
    functions = [tool.get("function", tool) for tool in given if tool.get("type", "function") == "function"]
    names = [function.get("name") if isinstance(function, Mapping) else None for function in functions]
    for name in names:
        if not any(tool.name == name for tool in tools):
            raise bad_field("tool_choice", f"names {str(name)[:100]!r}, which is not among the tools")
    return tuple(tool for tool in tools if tool.name in names), choice.get("mode", "auto")


def with_told(messages: Sequence[Message], tools: Sequence[Tool]) -> list[Message]:
    """A chat for a template that knows no tools: descriptions in the system message, calls and results as text."""
    lines = [json.dumps({"name": tool.name, "arguments": tool.schema}, ensure_ascii=False) for tool in tools]
    told = TOLD + "\n".join(lines) if tools else ""
    plain = [_as_text(message) for message in messages]
    if not told:
        return plain
    if plain and plain[0].role in ("system", "developer") and isinstance(plain[0].content, str):
        return [Message("system", f"{plain[0].content}\n\n{told}"), *plain[1:]]
    return [Message("system", told), *plain]


def _as_text(message: Message) -> Message:
    calls = message.fields.get("tool_calls")
    if message.role == "tool":
        return Message("user", f"<tool_response>\n{content_text(message)}\n</tool_response>")
    if not calls:
        return message
    written = [
        f'{CALL}\n{{"name": {json.dumps(call.name)}, "arguments": {call.arguments}}}\n{CALL_END}'
        for call in map(_given_call, calls)
    ]
    return Message(message.role, "\n".join(filter(None, [content_text(message), *written])))


@dataclass(frozen=True)
class History:
    """How a template takes a call that was made: content beside it as "" in place of nothing; arguments as an object
    in place of their JSON."""

    empty: bool = False
    objects: bool = False

    def shown(self, message: Message) -> Message:
        calls = message.fields.get("tool_calls")
        if not calls:
            return message
        fields = {**message.fields, "tool_calls": [_with_object(call) for call in calls]} if self.objects else None
        content = "" if self.empty and message.content is None else message.content
        return Message(message.role, content, message.fields if fields is None else fields)


def history_of(write: Callable[[list[Message]], str]) -> History:
    """What the template is made for, by what it writes of a call; write may fail."""
    function = {"name": "f", "arguments": '{"needle": "x"}'}
    asked = Message("user", "Hi")
    call = Message("assistant", None, {"tool_calls": [{"id": "call00000", "type": "function", "function": function}]})
    answer = Message("tool", "y", {"tool_call_id": "call00000", "name": "f"})
    for history in (History(), History(True), History(objects=True), History(True, True)):
        try:
            text = write([asked, history.shown(call), answer])
        except (TemplateError, TokenizerError):
            continue
        if '"needle"' in text or ("needle" in text and history.objects):
            return history
    return History()


def _with_object(call: Mapping[str, Any]) -> Mapping[str, Any]:
    """A call whose arguments are an object, if that is what their text is."""
    function = call["function"]
    try:
        arguments = json.loads(function.get("arguments") or "{}")
    except (TypeError, ValueError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": arguments}} if isinstance(arguments, dict) else call


def check_calls(message: Message, field: str) -> None:
    """ApiError unless a message's calls have OpenAI's form."""
    calls = message.fields.get("tool_calls")
    if calls is None:
        return
    if not isinstance(calls, list):
        raise bad_field(f"{field}.tool_calls", "is no list")
    for i, call in enumerate(calls):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise bad_field(f"{field}.tool_calls[{i}]", "is no call of a function with a name")


def _given_call(call: Mapping[str, Any]) -> Call:
    function = call["function"]
    arguments = function.get("arguments", "{}")
    return Call(str(function.get("name", "")), arguments if isinstance(arguments, str) else json.dumps(arguments))


def content_text(message: Message) -> str:
    return message.content if isinstance(message.content, str) else ""


class _Told(msgspec.Struct):
    """A call in the form of the system message. arguments: as they are spelt, which is how they come back."""

    name: str
    arguments: msgspec.Raw = msgspec.Raw(b"{}")


class CallReader:
    """An answer's parts with its calls read out of them, each as soon as it is complete."""

    def __init__(self, form: Form, tools: Sequence[Tool]) -> None:
        self._form, self._schemas = form, {tool.name: tool.schema for tool in tools}
        self._calling = ""  # everything from the mark that begins calls on
        self._at = 0  # how much of it has been read
        self._held = ""  # content that may be the beginning of that mark

    def feed(self, parts: Sequence[Part]) -> tuple[list[Part], list[Call]]:
        """(what is no call, calls that are complete)."""
        passed: list[Part] = []
        for part in parts:
            shown = _shown(part.text) if part.kind == "control" else part.text
            if self._calling:
                self._calling += shown
            elif part.kind == "reasoning":
                passed.append(part)
            else:
                self._look(shown, passed, is_control=part.kind == "control")
        return passed, self._complete(passed, final=False)

    def finish(self) -> tuple[list[Part], list[Call]]:
        """What is left: calls that an end token cut off, and text that is none."""
        passed: list[Part] = []
        calls = self._complete(passed, final=True)
        self._pass(self._held + self._calling[self._at :], passed)
        self._held = self._calling = ""
        self._at = 0
        return passed, calls

    def _look(self, shown: str, passed: list[Part], *, is_control: bool) -> None:
        if is_control:
            if shown == self._form.begin:
                self._calling = shown
            return
        text = self._held + shown
        at = text.find(self._form.begin)
        if at >= 0:
            self._held, self._calling, text = "", text[at:], text[:at]
        else:
            keep = overlap(text, self._form.begin)
            self._held, text = text[len(text) - keep :], text[: len(text) - keep]
        if text:
            passed.append(Part("content", text))

    def _complete(self, passed: list[Part], *, final: bool) -> list[Call]:
        """The calls that are whole; what stands between them, and what only looks like one, is content."""
        found = []
        for match in self._form.call.finditer(self._calling, self._at):
            closed = self._form.end and match[0].endswith(self._form.end)
            if not (final or closed or match.end() < len(self._calling)):
                break
            self._pass(self._calling[self._at : match.start()], passed)
            self._at = match.end()
            call = self._read(match)
            if call is None:
                self._pass(match[0], passed)
            else:
                found.append(call)
        return found

    @staticmethod
    def _pass(text: str, passed: list[Part]) -> None:
        text = MARK.sub("", text)
        if text.strip():
            passed.append(Part("content", text))

    def _read(self, match: re.Match[str]) -> Call | None:
        groups = match.groupdict()
        try:
            if "tagged" in groups:
                name, style = groups["name"].strip(), self._form.style
                assert style is not None
                arguments = style.read(groups["tagged"] or "", self._schemas.get(name, {}))
            elif "json" in groups:
                call = msgspec.json.decode(groups["json"], type=_Told)
                name, arguments = call.name, bytes(call.arguments).decode()
            else:
                name, arguments = groups["name"].strip(), groups["arguments"].strip() or "{}"
                json.loads(arguments)
        except (ValueError, RecursionError):
            return None
        return Call(name, arguments) if name in self._schemas else None
