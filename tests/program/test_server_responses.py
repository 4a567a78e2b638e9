"""OpenAI's Responses: the answers of a chat in items, their events, and conversations that go on from a kept one."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support.cli import wait_until
from support.serving import ENDLESS, LONG, USUAL, Served, scripted, served
from support.tiny import spec_named, variant
from support.vocab import EOS, USER, V25_TEMPLATE, write_model

from dsv2cli.commands.serve import rules_of
from dsv2cli.server.dialects import responses

PATH = "/v1/responses"
CHAT = "/v1/chat/completions"
ASKED = "Hi the ant"
GREEDY: dict[str, Any] = {"temperature": 0}
WEATHER = {
    "type": "function",
    "name": "get_weather",
    "description": "Get the current weather for a location",
    "parameters": {
        "type": "object",
        "properties": {"location": {"enum": ["Rome", "Oslo"]}},
        "required": ["location"],
        "additionalProperties": False,
    },
}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"location": "Rome"}}\n</tool_call>'


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = variant(spec_named("lite"), n_ctx=4096)
    return write_model(tmp_path_factory.mktemp("responses") / "tiny.gguf", spec, V25_TEMPLATE, endless=True)


@pytest.fixture(scope="module")
def server(path: Path) -> Iterator[Served]:
    with served(path, dataclasses.replace(USUAL, n_ctx=2048)) as running:
        yield running


def text_of(response: dict[str, Any]) -> str:
    return "".join(part["text"] for item in response["output"] if item["type"] == "message" for part in item["content"])


# Open Responses' rules: what every response and every event has.

NUMBER = (int, float)
NULL = type(None)
RESPONSE: dict[str, Any] = {
    "id": str, "object": str, "created_at": int, "completed_at": (int, NULL), "status": str, "model": str,
    "incomplete_details": (dict, NULL), "previous_response_id": (str, NULL), "instructions": (str, NULL),
    "output": list, "error": (dict, NULL), "tools": list, "tool_choice": (str, dict), "truncation": str,
    "parallel_tool_calls": bool, "text": dict, "top_p": NUMBER, "presence_penalty": NUMBER,
    "frequency_penalty": NUMBER, "top_logprobs": int, "temperature": NUMBER, "reasoning": (dict, NULL),
    "user": (str, NULL), "usage": (dict, NULL), "max_output_tokens": (int, NULL), "max_tool_calls": (int, NULL),
    "store": bool, "background": bool, "service_tier": str, "metadata": dict, "safety_identifier": (str, NULL),
    "prompt_cache_key": (str, NULL),
}  # fmt: skip
ITEMS: dict[str, dict[str, Any]] = {
    "message": {"id": str, "status": str, "role": str, "content": list},
    "function_call": {"id": str, "call_id": str, "name": str, "arguments": str, "status": str},
    "reasoning": {"id": str, "summary": list, "content": list},
}
PARTS: dict[str, dict[str, Any]] = {
    "output_text": {"text": str, "annotations": list, "logprobs": list},
    "reasoning_text": {"text": str},
}
PLACE = {"item_id": str, "output_index": int, "content_index": int}
EVENTS: dict[str, dict[str, Any]] = {
    "response.created": {"response": dict},
    "response.in_progress": {"response": dict},
    "response.completed": {"response": dict},
    "response.incomplete": {"response": dict},
    "response.failed": {"response": dict},
    "response.output_item.added": {"output_index": int, "item": dict},
    "response.output_item.done": {"output_index": int, "item": dict},
    "response.content_part.added": PLACE | {"part": dict},
    "response.content_part.done": PLACE | {"part": dict},
    "response.output_text.delta": PLACE | {"delta": str, "logprobs": list},
    "response.output_text.done": PLACE | {"text": str, "logprobs": list},
    "response.reasoning_text.delta": PLACE | {"delta": str},
    "response.reasoning_text.done": PLACE | {"text": str},
    "response.function_call_arguments.delta": {"item_id": str, "output_index": int, "delta": str},
    "response.function_call_arguments.done": {"item_id": str, "output_index": int, "arguments": str},
}


def check_fields(value: dict[str, Any], fields: dict[str, Any]) -> None:
    for name, kind in fields.items():
        assert name in value and isinstance(value[name], kind), (name, value)


def check_response(response: dict[str, Any]) -> None:
    check_fields(response, RESPONSE)
    assert response["object"] == "response" and response["id"].startswith("resp_")
    for item in response["output"]:
        check_item(item)
    if response["usage"] is not None:
        usage = response["usage"]
        assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
        assert isinstance(usage["input_tokens_details"]["cached_tokens"], int)
        assert isinstance(usage["output_tokens_details"]["reasoning_tokens"], int)


def check_item(item: dict[str, Any]) -> None:
    check_fields(item, ITEMS[item["type"]])
    assert item.get("encrypted_content", "") is not None
    for part in item.get("content", ()):
        check_fields(part, PARTS[part["type"]])


def streamed(server: Served, **asked: Any) -> list[dict[str, Any]]:
    """The events of a stream, each checked, their order as well: items one after another, every text told whole."""
    *events, done = server.events(PATH, **asked, stream=True)
    assert done == "[DONE]"
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    text, open_item = "", ""
    for event in events:
        kind = event["type"]
        check_fields(event, EVENTS[kind])
        if "response" in event:
            check_response(event["response"])
        if "item" in event:
            check_item(event["item"])
        if kind == "response.output_item.added":
            assert not open_item and event["item"]["status"] == "in_progress"
            text, open_item = "", event["item"]["id"]
        elif kind.endswith(".delta"):
            assert event["item_id"] == open_item
            text += event["delta"]
        elif kind.endswith(("_text.done", "arguments.done")):
            assert event.get("text", event.get("arguments")) == text and event["item_id"] == open_item
        elif kind == "response.output_item.done":
            assert event["item"]["id"] == open_item and event["item"]["status"] != "in_progress"
            open_item = ""
    assert not open_item
    return events


def kinds(events: list[dict[str, Any]]) -> list[str]:
    """Types in their order, the same one several times in a row once."""
    names = [event["type"].removeprefix("response.") for event in events]
    return [name for i, name in enumerate(names) if i == 0 or names[i - 1] != name]


MESSAGE = ["output_item.added", "content_part.added", "output_text.delta", "output_text.done", "content_part.done",
           "output_item.done"]  # fmt: skip
THOUGHT = ["output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.done",
           "content_part.done", "output_item.done"]  # fmt: skip
CALLED = ["output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"]


def user(text: str) -> dict[str, Any]:
    return {"type": "message", "role": "user", "content": text}


@pytest.mark.parametrize(
    ("asked", "answer", "wanted"),
    [
        ({"input": [user("Say hello in exactly 3 words.")]}, "Hello to you", "message"),
        (
            {"input": [{"type": "message", "role": "system", "content": "You are a pirate."}, user("Say hello.")]},
            "Ahoy",
            "message",
        ),
        ({"input": [user("What's the weather like?")], "tools": [WEATHER]}, CALL, "function_call"),
        (
            {
                "input": [
                    user("My name is Alice."),
                    {"type": "message", "role": "assistant", "content": "Hello Alice!"},
                    user("What is my name?"),
                ]
            },
            "Alice",
            "message",
        ),
    ],
    ids=["basic", "system-prompt", "tool-calling", "multi-turn"],
)
def test_open_responses(server: Served, asked: dict[str, Any], answer: str, wanted: str) -> None:
    """The cases of its compliance suite that a text model can pass, whole and streamed."""
    with scripted(server, answer, answer):
        whole = server.asked(PATH, model="m", **asked)
        events = streamed(server, model="m", **asked)
    check_response(whole)
    last = events[-1]["response"]
    for response in (whole, last):
        assert response["status"] == "completed" and [item["type"] for item in response["output"]] == [wanted]
    assert text_of(whole) == text_of(last) == ("" if wanted == "function_call" else answer)
    if wanted == "function_call":
        assert json.loads(last["output"][0]["arguments"]) == {"location": "Rome"}
    parts = CALLED if wanted == "function_call" else MESSAGE
    assert kinds(events) == ["created", "in_progress", *parts, "completed"]


def test_open_responses_own_types(server: Served) -> None:
    """Its suite's cases, as the types have them that are made from its specification (openresponses-types)."""
    types = pytest.importorskip("openresponses_types").types
    rome = [user("What's the weather like in Rome?")]
    cases = [({"input": rome}, "Rain."), ({"input": rome, "instructions": "Be brief.", "tools": [WEATHER]}, CALL)]
    for asked, answer in cases:
        with scripted(server, answer, answer):
            whole = server.asked(PATH, model="m", **asked)
            events = streamed(server, model="m", **asked)
        types.ResponseResource.model_validate(whole)
        for event in events:
            name = "".join(word.capitalize() for word in re.split("[._]", event["type"]))
            found = getattr(types, f"{name}StreamingEvent").model_validate(event)
            assert found.type == event["type"] or found.type.value == event["type"]


def test_everything_in_one_answer(server: Served) -> None:
    answer = f"<think>Where?</think>I look. {CALL}\n{CALL}"
    with scripted(server, answer, answer):
        events = streamed(server, input="Hi", tools=[WEATHER])
        whole = server.asked(PATH, input="Hi", tools=[WEATHER])
    assert kinds(events) == ["created", "in_progress", *THOUGHT, *MESSAGE, *CALLED, *CALLED, "completed"]
    output = events[-1]["response"]["output"]
    assert [item["type"] for item in output] == ["reasoning", "message", "function_call", "function_call"]
    assert output[0]["content"][0]["text"] == "Where?" and text_of(whole) == "I look. "
    assert len({item["id"] for item in output}) == 4 and output[2]["call_id"] != output[3]["call_id"]
    usage = whole["usage"]["output_tokens_details"]["reasoning_tokens"]
    assert 0 < usage < whole["usage"]["output_tokens"]

    def shape(item: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in item.items() if name not in ("id", "call_id")}

    assert [shape(item) for item in whole["output"]] == [shape(item) for item in output]


# The same answers as a chat's.


def test_it_is_the_chat_s_answer(server: Served) -> None:
    chat = server.asked(CHAT, messages=[{"role": "user", "content": ASKED}], max_tokens=9, **GREEDY)
    body = server.asked(PATH, input=ASKED, max_output_tokens=9, metadata={"a": "b"}, model="x", **GREEDY)
    assert text_of(body) == chat["choices"][0]["message"]["content"]
    assert body["status"] == "incomplete" and body["incomplete_details"] == {"reason": "max_output_tokens"}
    assert body["output"][0]["status"] == "incomplete" and body["completed_at"] is None
    assert body["usage"]["output_tokens"] == 9 and body["metadata"] == {"a": "b"} and body["model"] == "x"
    assert body["usage"]["input_tokens"] == chat["usage"]["prompt_tokens"]
    events = streamed(server, input=ASKED, max_output_tokens=9, **GREEDY)
    assert events[-1]["type"] == "response.incomplete" and text_of(events[-1]["response"]) == text_of(body)
    seeded = [server.asked(PATH, input=ASKED, max_output_tokens=9, seed=5, temperature=1.5) for _ in range(2)]
    assert text_of(seeded[0]) == text_of(seeded[1])


def test_a_call_that_must_come(server: Served) -> None:
    for choice in ("required", {"type": "function", "name": "get_weather"}):
        body = server.asked(PATH, input="Hi", tools=[WEATHER], tool_choice=choice, parallel_tool_calls=False)
        [call] = body["output"]
        assert call["name"] == "get_weather" and json.loads(call["arguments"])["location"] in ("Rome", "Oslo")
        assert body["tool_choice"] == choice and body["tools"][0]["strict"] is None
    other = WEATHER | {"name": "other"}
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "other"}]}
    for seed in range(3):
        body = server.asked(
            PATH, input="Hi", tools=[WEATHER, other], tool_choice=allowed, parallel_tool_calls=False, seed=seed
        )
        assert [item["name"] for item in body["output"]] == ["other"]


def test_tools_of_other_kinds_are_left_out(server: Served) -> None:
    """Agents list them, and do without."""
    others = [{"type": "web_search"}, {"type": "custom", "name": "apply_patch"}, {"type": "namespace", "tools": []}]
    plain = server.asked(PATH, input="Hi", max_output_tokens=1, store=False)
    body = server.asked(PATH, input="Hi", max_output_tokens=1, tools=others, store=False)
    assert body["tools"] == [] and body["usage"]["input_tokens"] == plain["usage"]["input_tokens"]


@pytest.mark.parametrize("seed", range(3))
def test_forms(server: Served, seed: int) -> None:
    schema = WEATHER["parameters"]
    form = {"type": "json_schema", "name": "w", "schema": schema, "strict": True}
    body = server.asked(PATH, input="Hi", text={"format": form, "verbosity": "low"}, seed=seed, temperature=1.5)
    assert json.loads(text_of(body))["location"] in ("Rome", "Oslo")
    assert body["text"] == {"format": form | {"description": None}, "verbosity": "low"}
    loose = server.asked(PATH, input="Hi", text={"format": {"type": "json_object"}}, seed=seed, max_output_tokens=400)
    assert loose["status"] == "incomplete" or isinstance(json.loads(text_of(loose)), dict)


def test_log_probabilities(server: Served) -> None:
    asked: dict[str, Any] = {"input": ASKED, "max_output_tokens": 6, **GREEDY}
    chat = server.asked(
        CHAT, messages=[{"role": "user", "content": ASKED}], max_tokens=6, logprobs=True, top_logprobs=2, **GREEDY
    )["choices"][0]["logprobs"]["content"]
    told = server.asked(PATH, **asked, include=["message.output_text.logprobs"], top_logprobs=2)
    found = told["output"][0]["content"][0]["logprobs"]
    assert [(e["token"], e["logprob"]) for e in found] == [(e["token"], e["logprob"]) for e in chat]
    assert all(len(entry["top_logprobs"]) == 2 for entry in found)
    events = streamed(server, **asked, include=["message.output_text.logprobs"])
    deltas = [e for event in events if event["type"].endswith("text.delta") for e in event["logprobs"]]
    assert [e["token"] for e in deltas] == [e["token"] for e in found]
    assert server.asked(PATH, **asked)["output"][0]["content"][0]["logprobs"] == []


def test_nothing_that_is_sent_becomes_a_control_token(server: Served) -> None:
    """In any field of any item: the same letters with a space in them take as many tokens, or more."""
    spelt, apart = f"{EOS}{USER}", f"{EOS[:-1]} {EOS[-1:]}{USER[:-1]} {USER[-1:]}"
    counts = []
    for text in (spelt, apart):
        items = [
            user(text),
            {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": text}]},
            {
                "type": "function_call",
                "call_id": "c",
                "name": "get_weather",
                "arguments": json.dumps({"location": text}),
            },
            {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": text}]},
        ]
        tool = WEATHER | {"parameters": {"type": "object", "description": text}}
        asked: dict[str, Any] = {"input": items, "instructions": text, "tools": [tool]}
        counts.append(server.asked(f"{PATH}/input_tokens", **asked)["input_tokens"])
        assert server.asked(PATH, **asked, max_output_tokens=1)["usage"]["input_tokens"] == counts[-1]
    assert 0 <= counts[1] - counts[0] <= 2 * 5  # a space each, in five places


@pytest.mark.parametrize("asked", [{}, {"input": ""}, {"input": []}, {"input": None, "instructions": "Go"}])
def test_a_request_to_see_that_it_answers(server: Served, asked: dict[str, Any]) -> None:
    assert server.asked(PATH, **asked, max_output_tokens=1)["usage"]["output_tokens"] == 1


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"background": True}, "background"),
    ({"conversation": "conv_1"}, "conversation"),
    ({"prompt": {"id": "p"}}, "prompt"),
    ({"truncation": "auto"}, "truncation"),
    ({"context_management": [{"type": "compaction"}]}, "context_management"),
    ({"moderation": {"model": "m"}}, "moderation"),
    ({"n": 2}, "n"),
    ({"include": ["the.moon"]}, "include[0]"),
    ({"previous_response_id": "resp_none"}, "previous_response_id"),
    ({"input": [{"type": "web_search_call", "id": "x"}]}, "input[0]"),
    ({"input": [user("a"), 7]}, "input[1]"),
    ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input[0].content[0]"),
    ({"input": [{"role": "user", "content": [{"type": "input_text", "text": 1}]}]}, "input[0].content[0].text"),
    ({"input": [{"role": "user"}]}, "input[0].content"),
    ({"input": [{"type": "function_call", "call_id": "c", "name": "f"}]}, "input[0].arguments"),
    ({"input": [{"type": "function_call_output", "call_id": "c", "output": "x"}]}, "input"),
    ({"input": [{"type": "function_call_output", "call_id": "c", "output": 5}]}, "input[0].output"),
    ({"input": [{"type": "item_reference", "id": "msg_none"}]}, "input[0].id"),
    ({"input": [{"type": "reasoning", "summary": ["x"]}]}, "input[0].summary[0]"),
    ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
    ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
    ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "nothing"}}}}, "text.format"),
    ({"tools": [{"type": "web_search"}, {"type": "function", "name": "a b"}]}, "tools[1].name"),
    ({"tools": [WEATHER | {"parameters": "x"}]}, "tools[0].parameters"),
    ({"tools": [WEATHER | {"name": f"f{i}"} for i in range(129)]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [WEATHER], "tool_choice": {"type": "function", "name": "g"}}, "tool_choice"),
    ({"tools": [WEATHER], "tool_choice": {"type": "web_search"}}, "tool_choice"),
    ({"tools": [WEATHER], "tool_choice": {"type": "allowed_tools", "tools": 5}}, "tool_choice.tools"),
    (
        {"tools": [WEATHER], "tool_choice": {"type": "allowed_tools", "tools": [{"type": "function", "name": "g"}]}},
        "tool_choice",
    ),
    ({"metadata": {"a": 1}}, "metadata[...]"),
    ({"metadata": {str(i): "x" for i in range(17)}}, "metadata"),
    ({"max_output_tokens": -1}, "max_output_tokens"),
    ({"top_logprobs": 21}, "top_logprobs"),
    ({"input": 5}, "input"),
    ({"store": "yes"}, "store"),
]


@pytest.mark.parametrize(("asked", "param"), REFUSED)
def test_what_is_refused_is_named(server: Served, asked: dict[str, Any], param: str) -> None:
    response = server.post(PATH, **({"input": "Hi", "max_output_tokens": 1} | asked))
    error = response.json()["error"]
    assert response.status_code == 400 and error["param"] == param, error
    assert param.partition("[")[0] in error["message"] or "resp_none" in error["message"]


def test_a_failure_is_told_in_the_stream(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise MemoryError("no more")

    with monkeypatch.context() as broken:
        broken.setattr(server.engine._scheduler, "_evaluate", fails)
        events = streamed(server, input="Hi")
        assert server.post(PATH, input="Hi").status_code == 500
    assert events[-1]["type"] == "response.failed"
    response = events[-1]["response"]
    assert response["status"] == "failed" and response["error"]["code"] == "server_error"
    assert server.client.get(f"{PATH}/{response['id']}").status_code == 404


# Conversations.


def test_going_on_from_a_response(server: Served) -> None:
    first = server.asked(PATH, input=ASKED, max_output_tokens=5, instructions="Be brief", **GREEDY)
    asked: dict[str, Any] = {"input": "Hi", "max_output_tokens": 5, **GREEDY}
    second = server.asked(PATH, **asked, previous_response_id=first["id"], instructions="Be long")
    assert second["previous_response_id"] == first["id"]
    said = [text_of(first), text_of(second)]
    by_hand = [user(ASKED), {"role": "assistant", "content": said[0]}, user("Hi")]
    same = server.asked(PATH, **asked | {"input": by_hand}, instructions="Be long")
    assert text_of(same) == said[1] and same["usage"]["input_tokens"] == second["usage"]["input_tokens"]
    third = server.asked(PATH, **asked, previous_response_id=second["id"])
    branch = server.asked(PATH, **asked, previous_response_id=second["id"])  # two may go on from one
    assert text_of(branch) == text_of(third)
    assert server.client.delete(f"{PATH}/{second['id']}").json() == {
        "id": second["id"], "object": "response", "deleted": True,
    }  # fmt: skip
    assert server.client.get(f"{PATH}/{second['id']}").status_code == 404
    assert server.post(PATH, **asked, previous_response_id=second["id"]).status_code == 400
    again = server.asked(PATH, **asked, previous_response_id=third["id"])  # what came after it knows what it said
    items = server.client.get(f"{PATH}/{again['id']}/input_items", params={"order": "asc"}).json()["data"]
    assert [item["content"][0]["text"] for item in items] == [ASKED, said[0], "Hi", said[1], "Hi", text_of(third), "Hi"]


def test_the_same_turns_are_read_once(server: Served) -> None:
    first = server.asked(PATH, input="Hi " * 60, max_output_tokens=5, **GREEDY)
    second = server.asked(PATH, input="the ant", previous_response_id=first["id"], max_output_tokens=5, **GREEDY)
    assert second["usage"]["input_tokens_details"]["cached_tokens"] >= first["usage"]["input_tokens"]


def test_a_round_of_tools(server: Served) -> None:
    with scripted(server, f"<think>Where?</think>{CALL}"):
        first = server.asked(PATH, input="Weather?", tools=[WEATHER])
    call = first["output"][-1]
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "21 degrees"}
    kept = {"input": [result], "tools": [WEATHER], "max_output_tokens": 4, **GREEDY}
    second = server.asked(PATH, **kept, previous_response_id=first["id"])
    sent = {**kept, "input": [user("Weather?"), *first["output"], result], "store": False}
    assert text_of(server.asked(PATH, **sent)) == text_of(second)  # as agents do that keep their own books
    assert server.asked(f"{PATH}/input_tokens", **sent)["input_tokens"] == second["usage"]["input_tokens"]
    plain = server.asked(f"{PATH}/input_tokens", input="Weather?", tools=[WEATHER])["input_tokens"]
    assert second["usage"]["input_tokens"] > plain + 20


def test_references_to_items(server: Served) -> None:
    first = server.asked(PATH, input=ASKED, max_output_tokens=5, **GREEDY)
    reference = {"type": "item_reference", "id": first["output"][0]["id"]}
    items = [user(ASKED), reference, user("Hi")]
    told = [user(ASKED), {"role": "assistant", "content": text_of(first)}, user("Hi")]
    counts = [server.asked(f"{PATH}/input_tokens", input=given)["input_tokens"] for given in (items, told)]
    assert counts[0] == counts[1]


def test_a_message_that_was_cut_off_goes_on(server: Served) -> None:
    whole = server.asked(PATH, input=ASKED, max_output_tokens=12, **GREEDY)
    cut = server.asked(PATH, input=ASKED, max_output_tokens=6, **GREEDY)
    rest = server.asked(PATH, previous_response_id=cut["id"], max_output_tokens=6, **GREEDY)
    counted = server.asked(CHAT, messages=[{"role": "user", "content": ASKED}], max_tokens=1)["usage"]["prompt_tokens"]
    assert rest["usage"]["input_tokens"] <= counted + 12  # no second beginning of a turn, no end of the first
    assert cut["status"] == "incomplete" and text_of(whole).startswith(text_of(cut))


def test_what_is_kept_can_be_read_again(server: Served) -> None:
    body = server.asked(PATH, input=[user("a"), user("b"), user("c")], max_output_tokens=2)
    assert server.client.get(f"{PATH}/{body['id']}").json() == body and body["store"] is True
    events = streamed(server, input="Hi", max_output_tokens=3)
    told = events[-1]["response"]
    assert server.client.get(f"{PATH}/{told['id']}").json() == told
    url = f"{PATH}/{body['id']}/input_items"
    page = server.client.get(url, params={"limit": 2}).json()
    assert [item["content"][0]["text"] for item in page["data"]] == ["c", "b"] and page["has_more"]
    rest = server.client.get(url, params={"limit": 2, "after": page["last_id"]}).json()
    assert [item["content"][0]["text"] for item in rest["data"]] == ["a"] and not rest["has_more"]
    for params in ({"limit": "0"}, {"limit": "x"}, {"order": "up"}, {"after": "none"}, {"limit": "9" * 400}):
        assert server.client.get(url, params=params).status_code == 400, params
    assert server.client.get(f"{PATH}/{body['id']}", params={"stream": "true"}).status_code == 400
    assert server.post(f"{PATH}/{body['id']}/cancel").status_code == 400
    hidden = server.asked(PATH, input="Hi", max_output_tokens=1, store=False)
    assert hidden["store"] is False
    for path in (hidden["id"], "resp_none", "x" * 500):
        assert server.client.get(f"{PATH}/{path}").status_code == 404
        assert server.client.delete(f"{PATH}/{path}").status_code == 404
        assert server.client.get(f"{PATH}/{path}/input_items").status_code == 404


def test_another_key_s_responses_are_not_there(path: Path) -> None:
    with served(path, rules=rules_of("127.0.0.1", ["one", "two"], [], [])) as server:
        mine, theirs = ({"authorization": f"Bearer {key}"} for key in ("one", "two"))
        ask = {"input": "Hi", "max_output_tokens": 1}
        body = server.client.post(PATH, json=ask, headers=mine).json()
        follow = ask | {"previous_response_id": body["id"]}
        reference = ask | {"input": [{"type": "item_reference", "id": body["output"][0]["id"]}]}
        for headers, status in ((mine, 200), (theirs, 404)):
            assert server.client.get(f"{PATH}/{body['id']}", headers=headers).status_code == status
            for asked in (follow, reference):
                code = server.client.post(PATH, json=asked, headers=headers).status_code
                assert code == (200 if status == 200 else 400)
        assert server.client.delete(f"{PATH}/{body['id']}", headers=theirs).status_code == 404
        assert server.client.delete(f"{PATH}/{body['id']}", headers=mine).status_code == 200
        assert server.client.get(f"{PATH}/{body['id']}").status_code == 401


# What else may come.

ODD: list[Any] = [None, True, 0, -1, 2**31, 2**63, 1e308, "", "x", "\ud800", "\x00", [], [[]], {}, {"type": []}, [None]]
FULL: dict[str, Any] = {
    "input": [
        user("a"),
        {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "b"}], "content": None},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "c", "annotations": []}]},
        {"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "get_weather", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": [{"type": "input_text", "text": "d"}]},
    ],
    "instructions": "e",
    "tools": [WEATHER, {"type": "web_search"}],
    "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "get_weather"}]},
    "text": {"format": {"type": "text"}, "verbosity": "low"},
    "reasoning": {"effort": "low", "summary": "auto"},
    "include": ["reasoning.encrypted_content"],
    "metadata": {"a": "b"},
    "previous_response_id": None,
    "top_logprobs": 1,
    "temperature": 1,
    "store": True,
    "client_metadata": {"x": "y"},
}


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], (*path, key))


def changed(place: tuple[Any, ...], odd: Any) -> dict[str, Any]:
    body: Any = json.loads(json.dumps(FULL))
    inner = body
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = odd
    return dict(body)


@pytest.mark.parametrize("seed", range(8))
def test_odd_requests_are_answered_or_refused(server: Served, seed: int) -> None:
    """Anything anywhere: never an error of the server's."""
    cases = [(place, odd) for place in places(FULL) for odd in ODD]
    for place, odd in cases[seed::8]:
        data = json.dumps(changed(place, odd) | {"max_output_tokens": 1}).encode()
        url = PATH if len(place) == 1 else f"{PATH}/input_tokens"
        response = server.client.post(url, content=data, headers={"content-type": "application/json"})
        assert response.status_code in (200, 400), (place, odd, response.text)
        if response.status_code == 400:
            assert response.json()["error"]["message"], (place, odd)


def test_small_requests_do_not_become_large_conversations(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(responses, "MAX_BODY", 4000)
    first = server.asked(PATH, input=[user("Hi " * 600) | {"id": "msg_long"}], max_output_tokens=1)
    twice = [{"type": "item_reference", "id": "msg_long"}] * 2
    assert "before it" in server.post(PATH, input=twice).json()["error"]["message"]
    long = [*twice[:1], user("Hi " * 1000)]
    for asked in ({"input": long}, {"input": "Hi " * 1000, "previous_response_id": first["id"]}):
        assert "longer than" in server.post(PATH, **asked).json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_answers_that_the_server_s_end_cuts_off(path: Path, stream: bool) -> None:
    """They are told as failed: what was cut off without the client's will is no answer."""
    asked = {"input": ASKED, "max_output_tokens": LONG["max_tokens"], "stream": stream, **GREEDY}
    with served(path, ENDLESS) as server, ThreadPoolExecutor(1) as pool:
        asking = pool.submit(server.post, PATH, **asked)
        wait_until(server.engine.running)
        server.engine.running()[0].cancel()
        response = asking.result()
    if stream:
        last = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")][-1]
        assert last["type"] == "response.failed" and "shutting down" in last["response"]["error"]["message"]
    else:
        assert response.status_code == 503
