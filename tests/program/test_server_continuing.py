"""Answers that go on with what the assistant's last message began, in every dialect that has such a thing."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.serving import USUAL, Served, scripted, served
from support.tiny import spec_named, variant
from support.vocab import ASSISTANT, EOS, USER, V25_TEMPLATE, write_model

from cext.tokenizer import Message, Tokenizer

CHAT = "/v1/chat/completions"
HI = {"role": "user", "content": "Hi the ant"}
GREEDY: dict[str, Any] = {"temperature": 0}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = variant(spec_named("lite"), n_ctx=4096)
    return write_model(tmp_path_factory.mktemp("going") / "tiny.gguf", spec, V25_TEMPLATE, endless=True)


@pytest.fixture(scope="module")
def server(path: Path) -> Iterator[Served]:
    with served(path, dataclasses.replace(USUAL, n_ctx=1024)) as running:
        yield running


def begun(text: Any) -> list[dict[str, Any]]:
    return [HI, {"role": "assistant", "content": text}]


def content(server: Served, messages: list[dict[str, Any]], **asked: Any) -> str:
    body = server.asked(CHAT, **({"messages": messages, "max_tokens": 8, **GREEDY} | asked))
    return str(body["choices"][0]["message"]["content"])


def raw(server: Served, path: Path, text: str, *, ended: bool = False) -> str:
    """What the engine writes after the same tokens, put together by hand."""
    tokenizer = Tokenizer(path)
    ids = tokenizer.chat([Message("user", "Hi the ant")]) + tokenizer.encode(text)
    if ended:
        ids += [tokenizer.control_id(EOS) or 0, tokenizer.control_id(ASSISTANT) or 0]
    return str(server.asked("/completion", prompt=ids, n_predict=8, **GREEDY)["content"])


@pytest.mark.parametrize("text", ["Sure,", "Sure, ", " Hi", f"a{EOS}{USER}b", "é\n", "{"])
def test_the_answer_goes_on(server: Served, path: Path, text: str) -> None:
    """From the message's last character, spaces too; the end of a turn that it spells is letters."""
    wanted = raw(server, path, text)
    assert content(server, begun(text)) == wanted
    assert content(server, begun([{"type": "text", "text": text}])) == wanted
    assert content(server, begun(text), continue_final_message=True, add_generation_prompt=False) == wanted
    events = server.events(CHAT, messages=begun(text), max_tokens=8, stream=True, **GREEDY)
    told = [event["choices"][0]["delta"].get("content") or "" for event in events[:-1]]
    assert "".join(told) == wanted
    anthropic = server.asked("/v1/messages", messages=begun(text), max_tokens=8, **GREEDY)
    assert anthropic["content"] == [{"type": "text", "text": wanted}]
    blocks = begun([{"type": "text", "text": text}])
    counted = server.asked("/v1/messages/count_tokens", messages=blocks)["input_tokens"]
    assert counted == server.asked(CHAT, messages=begun(text), max_tokens=1)["usage"]["prompt_tokens"]
    ollama = server.asked("/api/chat", messages=begun(text), stream=False, options={"num_predict": 8, **GREEDY})
    assert ollama["message"]["content"] == wanted


def test_parts_that_are_gone_on_with_are_paragraphs(server: Served, path: Path) -> None:
    parts = [{"type": "text", "text": "Sure"}, {"type": "text", "text": "so"}]
    assert content(server, begun(parts)) == raw(server, path, "Sure\n\nso")


def test_two_answers_at_the_end_are_not_guessed_about(server: Served) -> None:
    """Which of them is to be continued, if any, has to be said; dialects without a word for it go on with the last."""
    twice = [*begun("Sure,"), {"role": "assistant", "content": "and"}]
    refused = server.post(CHAT, messages=twice, max_tokens=1)
    assert refused.status_code == 400 and "continue_final_message" in refused.json()["error"]["message"]
    on = content(server, twice, continue_final_message=True)
    assert on != content(server, twice, add_generation_prompt=True)
    assert content(server, [*twice, HI])
    anthropic = server.asked("/v1/messages", messages=twice, max_tokens=8, **GREEDY)
    assert anthropic["content"][0]["text"] == on
    ollama = server.asked("/api/chat", messages=twice, stream=False, options={"num_predict": 8, **GREEDY})
    assert ollama["message"]["content"] == on


def test_a_turn_of_its_own_where_one_is_asked_for(server: Served, path: Path) -> None:
    wanted = raw(server, path, "Sure,", ended=True)
    assert content(server, begun("Sure,"), add_generation_prompt=True) == wanted
    assert content(server, begun("Sure,"), continue_final_message=False) == wanted
    items = [HI, {"role": "assistant", "content": "Sure,"}]
    body = server.asked("/v1/responses", input=items, max_output_tokens=8, **GREEDY)
    assert body["output"][0]["content"][0]["text"] == wanted  # a response is an item of its own
    cut = [HI, {"role": "assistant", "content": "Sure,", "status": "incomplete"}]
    body = server.asked("/v1/responses", input=cut, max_output_tokens=8, **GREEDY)
    assert body["output"][0]["content"][0]["text"] == raw(server, path, "Sure,")


def test_without_the_beginning_of_an_answer(server: Served, path: Path) -> None:
    ids = Tokenizer(path).chat([Message("user", "Hi the ant")], answer=False)
    wanted = server.asked("/completion", prompt=ids, n_predict=8, **GREEDY)["content"]
    assert content(server, [HI], add_generation_prompt=False) == wanted


def test_nothing_begun_is_an_answer_from_its_beginning(server: Served) -> None:
    assert content(server, begun("")) == content(server, [HI])


@pytest.mark.parametrize(
    ("messages", "asked"),
    [
        ([HI], {"continue_final_message": True}),
        (begun("x"), {"continue_final_message": True, "add_generation_prompt": True}),
        (
            [
                HI,
                {
                    "role": "assistant",
                    "content": "x",
                    "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": "{}"}}],
                },
            ],
            {"continue_final_message": True},
        ),
        (begun("x"), {"continue_final_message": "yes"}),
    ],
)
def test_what_cannot_be(server: Served, messages: Any, asked: dict[str, Any]) -> None:
    response = server.post(CHAT, messages=messages, max_tokens=1, **asked)
    assert response.status_code == 400 and response.json()["error"]["param"] == "continue_final_message"


def test_reasoning_that_was_begun(server: Served) -> None:
    """Where the tags are letters, those of the beginning count with those of the answer."""
    with scripted(server, "so.</think>\n\nTwo.", " more", "<think>not"):
        for text, reasoning, said in (("<think>One and", "so.", "Two."), ("<think>a</think>b", None, " more"),
                                      ("b", None, "<think>not")):  # fmt: skip
            message = server.asked(CHAT, messages=begun(text))["choices"][0]["message"]
            assert message.get("reasoning_content") == reasoning and message["content"] == said


@pytest.mark.parametrize("seed", range(4))
def test_a_form_holds_for_the_whole(server: Served, seed: int) -> None:
    schema = {"type": "object", "properties": {"name": {"enum": ["ant", "hill"]}}, "required": ["name"],
              "additionalProperties": False}  # fmt: skip
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    for text in ("{", '{"name": "', '{"name": "ant"}'):
        rest = content(server, begun(text), response_format=form, seed=seed, temperature=1.5, max_tokens=50)
        assert json.loads(text + rest)["name"] in ("ant", "hill")
    refused = server.post(CHAT, messages=begun("Sure: {"), response_format=form)
    assert refused.status_code == 400 and "Sure: {" in refused.json()["error"]["message"]
