"""Tools: every family's form of a call, read piece by piece, and calls that a grammar makes sure of."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llguidance
import pytest
from support.serving import USUAL, Served, served
from support.templates import FAMILIES, write_family
from support.tiny import spec_named, variant
from support.vocab import V25_TEMPLATE, write_model

from cext.tokenizer import Message, Tokenizer
from dsv2cli.server.constraints import Grammars
from dsv2cli.server.errors import ApiError
from dsv2cli.server.marked import CLOSE, MARK, OPEN, Marked
from dsv2cli.server.splitting import Part, Splitter
from dsv2cli.server.tools import (
    Call,
    CallReader,
    History,
    Tool,
    form_of,
    history_of,
    parse_offer,
    parse_tools,
    with_told,
)

CHAT = "/v1/chat/completions"
QWEN_TEMPLATE = """\
{%- if tools %}{{ '# Tools' }}{% for tool in tools %}{{ '\\n' }}{{ tool | tojson }}{% endfor %}{{ '\\n' }}{% endif %}
{%- for m in messages %}
{{- m.content }}
{%- for call in m.tool_calls or [] %}
{{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}{{ call.function.arguments | tojson }}
{{- '}\\n</tool_call>' }}
{%- endfor %}
{{- '\\n' }}
{%- endfor %}
"""
CODER_TEMPLATE = """\
{%- if tools %}{{ '# Tools' }}{% for tool in tools %}{{ '\\n' }}{{ tool | tojson }}{% endfor %}{{ '\\n' }}{% endif %}
{%- for m in messages %}
{{- m.content }}
{%- for call in m.tool_calls or [] %}
{{- '\\n<tool_call>\\n<function=' + call.function.name + '>\\n' }}
{%- for name, value in call.function.arguments | items %}
{{- '<parameter=' + name + '>\\n' }}{{ value if value is string else value | tojson }}{{ '\\n</parameter>\\n' }}
{%- endfor %}
{{- '</function>\\n</tool_call>' }}
{%- endfor %}
{{- '\\n' }}
{%- endfor %}
"""
HI = [{"role": "user", "content": "Hi"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
TIME = {"type": "function", "function": {"name": "get_time"}}
EDIT = {
    "type": "function",
    "function": {
        "name": "edit",
        "parameters": {
            "type": "object",
            "properties": {
                "path": {"type": "string", "maxLength": 12},
                "text": {"type": "string"},
                "lines": {"type": "array", "items": {"type": "integer"}, "maxItems": 3},
                "mode": {"$ref": "#/$defs/mode"},
                "dry": {"type": "boolean"},
                "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
            },
            "required": ["path", "text", "lines"],
            "additionalProperties": False,
            "$defs": {"mode": {"type": "string", "enum": ["a", "w"]}},
        },
    },
}


class Vocabulary:
    """A tokenizer that knows some control tokens, and a template."""

    def __init__(self, template: str, *spellings: str) -> None:
        self.chat_template = template
        self._ids = {text: 1000 + i for i, text in enumerate(spellings)}

    def control_id(self, text: str) -> int | None:
        return self._ids.get(text)


DEEPSEEK = [
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁sep｜>",
    "<｜tool▁call▁end｜>",
]
KIMI = [
    f"<|tool_{n}|>"
    for n in ("calls_section_begin", "calls_section_end", "call_begin", "call_argument_begin", "call_end")
]
V3 = Vocabulary("{{ tools }}<｜tool▁call▁begin｜>```json", *DEEPSEEK, "<think>", "</think>")
V31 = Vocabulary("{{ tools }}<｜tool▁call▁begin｜>", *DEEPSEEK)
K2 = Vocabulary("{{ tools }}", *KIMI)
MISTRAL = Vocabulary("{{ tools }}", "[TOOL_CALLS]", "[ARGS]")
QWEN = Vocabulary("{{ tools }}<tool_call>arguments", "<tool_call>", "</tool_call>")
HERMES = Vocabulary("{{ tools }}<tool_call>arguments")  # the same as letters
GLM_TAGS = ("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")
GLM = Vocabulary("{{ tools }}<tool_call>arguments<arg_key>", *GLM_TAGS)
GLM_LETTERS = Vocabulary("{{ tools }}<tool_call>arguments<arg_key>")
CODER = Vocabulary("{{ tools }}<tool_call><function=f><parameter=p>", "<tool_call>", "</tool_call>")
CODER_LETTERS = Vocabulary("{{ tools }}<tool_call><function=f><parameter=p>")
TAGGED = [GLM, GLM_LETTERS, CODER, CODER_LETTERS]
PLAIN = Vocabulary("{{ messages }}")

ROME, NOW = Call("get_weather", '{"city": "Rome", "days": 2}'), Call("get_time", "{}")
ANSWERS: list[tuple[Any, str, list[Call], str]] = [
    (
        V3,
        "Sure.[<｜tool▁calls▁begin｜>][<｜tool▁call▁begin｜>]function[<｜tool▁sep｜>]get_weather\n"
        '```json\n{"city": "Rome", "days": 2}\n```'
        "[<｜tool▁call▁end｜>]\n[<｜tool▁call▁begin｜>]function[<｜tool▁sep｜>]get_time\n```json\n{}\n```[<｜tool▁call▁end｜>]"
        "[<｜tool▁calls▁end｜>]",
        [ROME, NOW],
        "Sure.",
    ),
    (
        V31,
        '[<｜tool▁calls▁begin｜>][<｜tool▁call▁begin｜>]get_weather[<｜tool▁sep｜>]{"city": "Rome", "days": 2}'
        "[<｜tool▁call▁end｜>][<｜tool▁calls▁end｜>]",
        [ROME],
        "",
    ),
    (
        K2,
        "[<|tool_calls_section_begin|>][<|tool_call_begin|>]functions.get_time:0[<|tool_call_argument_begin|>]{}"
        "[<|tool_call_end|>][<|tool_call_begin|>]functions.get_weather:1[<|tool_call_argument_begin|>]"
        '{"city": "Rome", "days": 2}'
        "[<|tool_call_end|>][<|tool_calls_section_end|>]",
        [NOW, ROME],
        "",
    ),
    (
        MISTRAL,
        '[[TOOL_CALLS]]get_weather[[ARGS]]{"city": "Rome", "days": 2}[[TOOL_CALLS]]get_time[[ARGS]]{}',
        [ROME, NOW],
        "",
    ),
    (
        QWEN,
        'So.[<tool_call>]\n{"name": "get_weather", "arguments": {"city": "Rome", "days": 2}}\n[</tool_call>]\n'
        '[<tool_call>]\n{"name": "get_time", "arguments": {}}\n[</tool_call>]',
        [ROME, NOW],
        "So.",
    ),
    (
        GLM,
        "So.[<tool_call>]get_weather\n[<arg_key>]city[</arg_key>]\n[<arg_value>]Rome[</arg_value>]\n"
        "[<arg_key>]days[</arg_key>]\n[<arg_value>]2[</arg_value>]\n[</tool_call>]\n[<tool_call>]get_time[</tool_call>]",
        [ROME, NOW],
        "So.",
    ),
    (
        GLM,  # 4.7's, and letters that spell a tag
        "[<tool_call>]edit[<arg_key>]path[</arg_key>][<arg_value>]1[</arg_value>]"
        '[<arg_key>]text[</arg_key>][<arg_value>] </arg_value> {"a": 1}\n[</arg_value>]'
        "[<arg_key>]lines[</arg_key>][<arg_value>][1, 2][</arg_value>][<arg_key>]note[</arg_key>]"
        "[<arg_value>]null[</arg_value>][</tool_call>]",
        [Call("edit", '{"path": "1", "text": " </arg_value> {\\"a\\": 1}\\n", "lines": [1, 2], "note": null}')],
        "",
    ),
    (
        GLM_LETTERS,
        "<tool_call>get_weather<arg_key>city</arg_key><arg_value>Rome</arg_value>"
        "<arg_key>days</arg_key><arg_value>two</arg_value></tool_call> then",
        [Call("get_weather", '{"city": "Rome", "days": "two"}')],  # no number: the client is told what was written
        " then",
    ),
    (
        CODER,
        "So.\n[<tool_call>]\n<function=get_weather>\n<parameter=city>\nRome\n</parameter>\n<parameter=days>\n2\n"
        "</parameter>\n</function>\n[</tool_call>]\n[<tool_call>]\n<function=get_time>\n</function>\n[</tool_call>]",
        [ROME, NOW],
        "So.\n",
    ),
    (
        CODER_LETTERS,
        "<tool_call>\n<function=edit>\n<parameter=path>\na\n</parameter>\n<parameter=text>\n\nif x:\n    y\n\n"
        "</parameter>\n"
        "<parameter=lines>\n[]\n</parameter>\n<parameter=dry>\nTrue\n</parameter>\n<parameter=note>\n5\n</parameter>\n"
        "</function>\n</tool_call>",
        [Call("edit", '{"path": "a", "text": "\\nif x:\\n    y\\n", "lines": [], "dry": true, "note": "5"}')],
        "",
    ),
    (CODER, "[<tool_call>]\n<function=get_time>\nnonsense\n</function>\n[</tool_call>]", [], None),
    (CODER, "[<tool_call>]\n<function=get_time>\n</func", [], None),
    (GLM, "[<tool_call>]nobody[</tool_call>]", [], None),
    (QWEN, 'typed <tool_call>\n{"name": "get_time"}\n</tool_call>', [], None),
    (HERMES, '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>', [NOW], ""),
    (
        PLAIN,
        'I look.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome", "days": 2}}\n</tool_call>',
        [ROME],
        "I look.\n",
    ),
    (PLAIN, "<tool_call>\n{not json}\n</tool_call>", [], "<tool_call>\n{not json}\n</tool_call>"),
    (
        PLAIN,
        '<tool_call>{"arguments" :  {"city":"R\\u00f6m","days":2.0 },"name": "get_weather"}</tool_call>',
        [Call("get_weather", '{"city":"R\\u00f6m","days":2.0 }')],  # as the model spelt them
        "",
    ),
    (PLAIN, '<tool_call>{"name": "get_time", "arguments": {]}</tool_call>', [], None),
    (PLAIN, '<tool_call>{"name": "get_time", "arguments": ' + "[" * 5000 + "</tool_call>", [], None),
    (PLAIN, "<tool_call>[1]</tool_call>", [], "<tool_call>[1]</tool_call>"),
    (PLAIN, '<tool_call>{"name": "rm_rf", "arguments": {}}</tool_call>', [], None),
    (PLAIN, "a < b <tool", [], "a < b <tool"),
    (PLAIN, '<tool_call>{"name": ["x"], "arguments": {}}</tool_call>', [], None),
    (PLAIN, '<tool_call>{"name": "get_time", "arguments": {}}</tool_call> and more', [NOW], " and more"),
    (PLAIN, '<tool_call>no</tool_call><tool_call>{"name": "get_time"}</tool_call>', [NOW], "<tool_call>no</tool_call>"),
    (V31, "typed <｜tool▁calls▁begin｜> is text", [], "typed <｜tool▁calls▁begin｜> is text"),
]


def marked(vocabulary: Any, text: str) -> str:
    """[spelling] as a control token shows."""
    for spelling in vocabulary._ids:
        text = text.replace(f"[{spelling}]", f"{OPEN}{spelling}{CLOSE}")
    return text


def pieces(text: str, size: int) -> Iterator[str]:
    """Text as tokens bring it: control tokens whole."""
    at = 0
    for match in MARK.finditer(text):
        yield from (text[i : min(i + size, match.start())] for i in range(at, match.start(), size))
        yield match[0]
        at = match.end()
    yield from (text[i : i + size] for i in range(at, len(text), size))


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(("vocabulary", "answer", "calls", "content"), ANSWERS)
def test_calls_are_read(vocabulary: Any, answer: str, calls: list[Call], content: str | None, size: int) -> None:
    splitter, reader = Splitter(vocabulary), CallReader(form_of(vocabulary), parse_tools([WEATHER, TIME, EDIT]))
    said, found = "", []
    for piece in pieces(marked(vocabulary, answer), size):
        parts, new = reader.feed(splitter.feed(piece))
        said += "".join(part.text for part in parts if part.kind == "content")
        found += new
    parts, new = reader.feed(splitter.finish())
    rest, last = reader.finish()
    said += "".join(part.text for part in parts + rest if part.kind == "content")
    assert found + new + last == calls
    assert content is None or said == content


@pytest.mark.parametrize(
    ("vocabulary", "begun", "kind"),
    [(V3, "<think>", "content"), (V3, f"{OPEN}<think>{CLOSE}", "content"), (PLAIN, "<think>", "reasoning"),
     (PLAIN, "<think>a</think>", "content"), (PLAIN, "a <think>", "content"), (V3, "", "content")],
)  # fmt: skip
def test_what_was_begun_is_text(vocabulary: Any, begun: str, kind: str) -> None:
    """Somebody's message opens no reasoning where a token does that, whatever it spells."""
    splitter = Splitter(vocabulary)
    splitter.begin(begun)
    assert [(part.kind, part.text) for part in splitter.feed("so") + splitter.finish()] == [(kind, "so")]


def test_a_choice_among_some_tools() -> None:
    """In both of OpenAI's forms."""
    for choice in (
        {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [TIME]}},
        {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "get_time"}]},
    ):
        offer = parse_offer([WEATHER, TIME], choice, None)
        assert [tool.name for tool in offer.tools] == ["get_time"] and offer.must and offer.several
    loose = parse_offer([WEATHER, TIME], {"type": "allowed_tools", "tools": [{"type": "mcp"}, TIME]}, False)
    assert [tool.name for tool in loose.tools] == ["get_time"] and not loose.must and not loose.several


@pytest.mark.parametrize("vocabulary", [V3, V31, K2, MISTRAL, QWEN, HERMES, PLAIN, *TAGGED])
@pytest.mark.parametrize("begun", [False, True])
def test_grammars_are_grammars(vocabulary: Any, begun: bool) -> None:
    grammar = form_of(vocabulary).grammar(parse_tools([WEATHER, TIME, EDIT]), begun=begun, several=True)
    assert llguidance.LLMatcher.validate_grammar(llguidance.LLMatcher.grammar_from_lark(grammar)) == "", grammar


def test_whose_form_is_whose() -> None:
    for vocabulary, native in ((QWEN, True), (HERMES, True), (PLAIN, False), *((one, True) for one in TAGGED)):
        assert form_of(vocabulary).native is native
        assert (form_of(vocabulary).style is not None) == (vocabulary in TAGGED)
    for other in ("<function=f>", "<parameter=p>"):  # calls in other tags, which are told in our own form
        assert not form_of(
            Vocabulary(f"{{{{ tools }}}}<tool_call>arguments{other}", "<tool_call>", "</tool_call>")
        ).native


def test_a_call_is_shown_as_its_template_takes_it(tmp_path: Path) -> None:
    """Arguments as their text, or as an object; content as nothing, or as ""."""
    for family, wanted in (
        (FAMILIES["k2"], History()),
        (FAMILIES["k2-thinking"], History(objects=True)),
        (FAMILIES["glm"], History(objects=True)),
        (QWEN_TEMPLATE, History(objects=True)),
        (QWEN_TEMPLATE.replace("m.content }}", "m.role + m.content }}"), History(empty=True, objects=True)),
        ("{{ messages[0].content }}", History()),  # knows no calls
    ):
        tokenizer = Tokenizer(write_family(tmp_path / "v.gguf", family))
        assert history_of(lambda messages, t=tokenizer: t.decode(t.chat(messages))) == wanted, family  # type: ignore[misc]
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "[1"}}
    message = Message("assistant", None, {"tool_calls": [call]})
    assert History(objects=True).shown(message) == message  # no JSON: as it came
    assert History(empty=True).shown(message).content == ""


EDITED = {"path": "a b.py", "text": "\nif <x>:\n    '\"'\n", "lines": [1, 2], "mode": "w", "dry": False, "note": "é"}


@pytest.mark.parametrize("template", [FAMILIES["glm"], CODER_TEMPLATE], ids=["glm", "coder"])
def test_calls_in_tags_there_and_back(tmp_path: Path, template: str) -> None:
    """What the template writes of a call is read as that call, and is what the grammar holds an answer to."""
    tokenizer = Tokenizer(write_family(tmp_path / "v.gguf", template))
    form, tools = form_of(tokenizer), parse_tools([EDIT, TIME])
    assert form.begin_id is not None and form.style is not None
    grammars = Grammars(tokenizer, [tokenizer.eos or 0])

    def written(arguments: dict[str, Any]) -> list[int]:
        function = {"name": "edit", "arguments": json.dumps(arguments)}
        call = Message("assistant", "", {"tool_calls": [{"id": "c", "type": "function", "function": function}]})
        ids = tokenizer.chat([Message("user", "Hi"), History(objects=True).shown(call)], answer=False)
        at = ids.index(form.begin_id or 0)
        return ids[at : ids.index(tokenizer.control_id("</tool_call>") or 0, at) + 1]

    def is_followed(ids: list[int], begun: bool) -> bool:
        grammar = grammars.lark(form.grammar(tools, begun=begun, several=True))
        matcher = llguidance.LLMatcher(grammars.prepare(), grammar, log_level=0)
        ids = ids[begun:]
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()

    ids, stream = written(EDITED), Marked(tokenizer)
    reader = CallReader(form, tools)
    reader.feed([Part("control", "<tool_call>")])
    _, calls = reader.feed([Part("content", "".join(map(stream.feed, ids[1:])))])
    assert [(call.name, json.loads(call.arguments)) for call in calls] == [("edit", EDITED)]
    for begun in (False, True):
        assert is_followed(ids, begun) and is_followed(ids + ids, begun)
        assert is_followed(written({name: EDITED[name] for name in ("path", "text", "lines")}), begun)
        for wrong in ({"path": "longer than it may be"}, {"mode": "x"}, {"lines": ["a"]}, {"dry": 1}, {"other": 1}):
            assert not is_followed(written(EDITED | wrong), begun), wrong
        assert not is_followed(written({"path": "a"}), begun)


@pytest.mark.parametrize("schema", [{"type": "object"}, {}, {"type": "object", "properties": 5}])
@pytest.mark.parametrize("vocabulary", TAGGED)
def test_arguments_that_no_schema_names(vocabulary: Any, schema: dict[str, Any]) -> None:
    form = form_of(vocabulary)
    grammar = form.grammar([Tool("f", schema)], begun=False, several=True)
    assert llguidance.LLMatcher.validate_grammar(llguidance.LLMatcher.grammar_from_lark(grammar)) == "", grammar
    values = {'["a"]': ["a"], "5": 5, "a 5": "a 5", "NaN": "NaN", "1e400": "1e400", "[" * 9000: "[" * 9000}
    assert form.style is not None
    for text, value in values.items():
        written = f"<parameter=k>\n{text}\n</parameter>"
        if vocabulary is GLM:
            written = marked(vocabulary, f"[<arg_key>]k[</arg_key>][<arg_value>]{text}[</arg_value>]")
        elif vocabulary is GLM_LETTERS:
            written = f"<arg_key>k</arg_key><arg_value>{text}</arg_value>"
        assert json.loads(form.style.read(written, schema)) == {"k": value}


@pytest.mark.parametrize("vocabulary", TAGGED)
def test_odd_schemas_of_tagged_arguments(vocabulary: Any) -> None:
    """They make a grammar, or what llguidance refuses as one: nothing else."""
    values: list[Any] = [
        *(None, 5, True, "string", [], {}, {"type": 5}, {"type": []}, {"type": [5, None]}, {"type": "nothing"}),
        *({"enum": [None, 1, 1.5, True, "a", [], {}]}, {"enum": []}, {"const": {}}, {"const": "\ud800"}),
        *({"type": "string", "enum": ["\ud800", "", 5]}, {"type": "string", "minLength": True, "maxLength": -1}),
        *({"type": "string", "maxLength": 0}, {"type": "string", "minLength": 10**30}, {"$ref": "#"}, {"$ref": 5}),
        *({"$ref": "#/properties/p"}, {"$ref": "http://x"}, {"anyOf": [{"$ref": "#/properties/p"}]}, {"oneOf": [5]}),
        *(
            {"type": "integer", "minimum": "x"},
            {"type": "object", "$defs": 5},
            {"type": "array", "items": {"$ref": "#"}},
        ),
    ]
    odd: list[Any] = [["p"], 5, [[]]]
    schemas: list[dict[str, Any]] = [{"properties": {"p": value}, "required": each} for value in values for each in odd]
    schemas += [{"properties": {key: {}}} for key in ("", "\ud800", '"', "\\", "\n", "\0", ">", "é" * 9000)]
    for schema in schemas:
        grammar = form_of(vocabulary).grammar([Tool("f", schema)], begun=False, several=True)
        llguidance.LLMatcher.validate_grammar(llguidance.LLMatcher.grammar_from_lark(grammar))
        for text in ("<parameter=p>\n[1e999]\n</parameter>", "x", "<arg_key>p</arg_key><arg_value>\ud800</arg_value>"):
            CallReader(form_of(vocabulary), [Tool("f", schema)]).feed(
                [Part("content", f"<tool_call>{text}</tool_call>")]
            )


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    spec = variant(spec_named("lite"), n_ctx=4096)
    path: Path = write_model(tmp_path_factory.mktemp("tools") / "tiny.gguf", spec, V25_TEMPLATE)
    with served(path, dataclasses.replace(USUAL, n_ctx=2048)) as running:
        yield running


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_a_call_that_must_come(server: Served, choice: Any, seed: int) -> None:
    """Of a random model: its arguments are of the schema all the same."""
    asked: dict[str, Any] = {"messages": HI, "tools": [WEATHER, TIME], "tool_choice": choice, "seed": seed}
    body = server.asked(CHAT, **asked, max_tokens=300, parallel_tool_calls=False, temperature=1.5)
    [choice_] = body["choices"]
    assert choice_["finish_reason"] == "tool_calls" and choice_["message"]["content"] is None
    [call] = choice_["message"]["tool_calls"]
    assert call["type"] == "function" and call["id"]
    arguments = json.loads(call["function"]["arguments"])
    if call["function"]["name"] == "get_weather":
        assert (
            set(arguments) == {"city", "days"} and arguments["city"] in ("Rome", "Oslo") and 1 <= arguments["days"] <= 9
        )
    else:
        assert choice == "required"
    *chunks, _ = server.events(CHAT, **asked, max_tokens=300, parallel_tool_calls=False, temperature=1.5, stream=True)
    [streamed] = [c for chunk in chunks for c in chunk["choices"][0]["delta"].get("tool_calls", [])]
    assert streamed["function"] == call["function"] and streamed["index"] == 0
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_a_template_that_knows_qwens_calls(tmp_path: Path) -> None:
    """It describes the tools and writes the calls itself; what must be called is called in its form."""
    path: Path = write_model(tmp_path / "tiny.gguf", variant(spec_named("lite"), n_ctx=4096), QWEN_TEMPLATE)
    call = {"id": "c1", "type": "function", "function": {"name": "get_time", "arguments": '{"at":1}'}}
    history = [*HI, {"role": "assistant", "content": None, "tool_calls": [call]}]
    history += [{"role": "tool", "tool_call_id": "c1", "content": "noon"}, *HI]
    with served(path, dataclasses.replace(USUAL, n_ctx=2048)) as server:
        prompt = server.asked("/apply-template", messages=history, tools=[TIME])["prompt"]
        assert prompt.count("# Tools") == 1 and "You can call functions" not in prompt
        assert '<tool_call>\n{"name": "get_time", "arguments": {"at": 1}}\n</tool_call>' in prompt and "noon" in prompt
        asked = {"messages": history, "tools": [WEATHER, TIME], "tool_choice": "required", "max_tokens": 400}
        [choice] = server.asked(CHAT, **asked, parallel_tool_calls=False, seed=1)["choices"]
        [made] = choice["message"]["tool_calls"]
        assert made["function"]["name"] in ("get_weather", "get_time") and choice["message"]["content"] is None


@pytest.mark.parametrize("template", [FAMILIES["glm"], CODER_TEMPLATE], ids=["glm", "coder"])
def test_a_call_in_tags_that_must_come(tmp_path: Path, template: str) -> None:
    """Of a random model, in letters: whole and streamed."""
    path: Path = write_model(tmp_path / "tiny.gguf", variant(spec_named("lite"), n_ctx=4096), template)
    asked: dict[str, Any] = {"messages": HI, "tools": [WEATHER, TIME], "max_tokens": 400, "seed": 3}
    asked |= {"tool_choice": {"type": "function", "function": {"name": "get_weather"}}, "temperature": 1.5}
    with served(path, dataclasses.replace(USUAL, n_ctx=2048)) as server:
        [choice] = server.asked(CHAT, **asked)["choices"]
        [call] = choice["message"]["tool_calls"]
        arguments = json.loads(call["function"]["arguments"])
        assert arguments["city"] in ("Rome", "Oslo") and 1 <= arguments["days"] <= 9
        assert choice["message"]["content"] is None and choice["finish_reason"] == "tool_calls"
        *chunks, _ = server.events(CHAT, **asked, stream=True)
        [streamed] = [c for chunk in chunks for c in chunk["choices"][0]["delta"].get("tool_calls", [])]
        assert streamed["function"] == call["function"]


def test_tools_cost_nothing_where_none_may_be_called(server: Served) -> None:
    plain = server.asked(CHAT, messages=HI, max_tokens=4, temperature=0)
    none = server.asked(CHAT, messages=HI, max_tokens=4, temperature=0, tools=[WEATHER], tool_choice="none")
    assert none["choices"] == plain["choices"] and none["usage"]["prompt_tokens"] == plain["usage"]["prompt_tokens"]
    told = server.asked(CHAT, messages=HI, max_tokens=4, tools=[WEATHER])
    assert told["usage"]["prompt_tokens"] > plain["usage"]["prompt_tokens"]


def test_the_whole_round(server: Served) -> None:
    """What comes back of a call is shown to a template that knows no tools."""
    call = {"id": "c1", "type": "function", "function": {"name": "get_time", "arguments": "{}"}}
    history = [
        *HI,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "noon"},
    ]
    assert server.asked(CHAT, messages=history, tools=[TIME], max_tokens=3)["usage"]["prompt_tokens"] > 60
    shown = with_told([Message.parse(m) for m in history], [Tool("get_time", {})])
    assert [message.role for message in shown] == ["system", "user", "assistant", "user"]
    assert "noon" in str(shown[3].content) and '"get_time"' in str(shown[2].content)


@pytest.mark.parametrize(
    ("tools", "choice"),
    [
        ([{"type": "function", "function": {"name": ""}}], None),
        ([{"type": "function", "function": {"name": "a b"}}], None),
        ([{"type": "function", "function": {"name": "f", "parameters": "x"}}], None),
        ([{"type": "function"}], None),
        ([], "required"),
        ([TIME], {"type": "function", "function": {"name": "other"}}),
        ([TIME], "maybe"),
        ([TIME], {}),
    ],
)
def test_what_is_refused(tools: Any, choice: Any) -> None:
    with pytest.raises(ApiError):
        parse_offer(tools, choice, None)


def test_a_schema_that_cannot_be_followed(server: Served) -> None:
    bad = {"type": "function", "function": {"name": "f", "parameters": {"type": "nothing"}}}
    response = server.post(CHAT, messages=HI, tools=[bad], tool_choice="required")
    assert response.status_code == 400 and "tools" in response.json()["error"]["message"]
