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
from dsv2cli.server.errors import ApiError
from dsv2cli.server.marked import CLOSE, MARK, OPEN
from dsv2cli.server.splitting import Splitter
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
    splitter, reader = Splitter(vocabulary), CallReader(form_of(vocabulary), ["get_weather", "get_time"])
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


@pytest.mark.parametrize("vocabulary", [V3, V31, K2, MISTRAL, QWEN, HERMES, PLAIN])
@pytest.mark.parametrize("begun", [False, True])
def test_grammars_are_grammars(vocabulary: Any, begun: bool) -> None:
    grammar = form_of(vocabulary).grammar(parse_tools([WEATHER, TIME]), begun=begun, several=True)
    assert llguidance.LLMatcher.validate_grammar(llguidance.LLMatcher.grammar_from_lark(grammar)) == "", grammar


def test_whose_form_is_whose() -> None:
    for vocabulary, native in ((QWEN, True), (HERMES, True), (PLAIN, False)):
        assert form_of(vocabulary).native is native
    for other in ("<arg_key>", "<function=f>", "<parameter=p>"):  # calls in tags, which are told in our own form
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
