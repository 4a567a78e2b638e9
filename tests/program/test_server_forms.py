"""Answers of a form that was asked for: every one of them is of it, and what cannot be followed is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.serving import Served, served
from support.tiny import spec_named, variant
from support.vocab import V25_TEMPLATE, write_model

CHAT = "/v1/chat/completions"
HI = [{"role": "user", "content": "Hi"}]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A random model: whatever it would like to write, the form decides."""
    spec = variant(spec_named("lite"), n_ctx=4096)
    with served(write_model(tmp_path_factory.mktemp("forms") / "tiny.gguf", spec, V25_TEMPLATE)) as running:
        yield running


def test_the_first_form_finds_the_vocabulary_prepared(tmp_path: Path) -> None:
    """Or everybody, health too, would wait for as long as that takes."""
    spec = variant(spec_named("lite"), n_ctx=64)
    with served(write_model(tmp_path / "tiny.gguf", spec, V25_TEMPLATE)) as fresh:
        assert fresh.serving.state.service is not None and fresh.serving.state.service.grammars.is_prepared


def test_a_vocabulary_that_no_form_can_be_had_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It costs answers of a form alone, and is told: when the server begins, and to whoever asks for one."""

    def fails(*_: object, **__: object) -> None:
        raise ValueError("two tokens\nare alike")

    monkeypatch.setattr("llguidance.LLTokenizer", fails)
    spec = variant(spec_named("lite"), n_ctx=64)
    with served(write_model(tmp_path / "tiny.gguf", spec, V25_TEMPLATE)) as fresh:
        assert fresh.asked(CHAT, messages=HI, max_tokens=1)["usage"]["completion_tokens"] == 1
        for form in ({"json_schema": PERSON}, {"guided_regex": "a"}, {"response_format": {"type": "json_object"}}):
            refused = fresh.post(CHAT, messages=HI, max_tokens=1, **form)
            error = refused.json()["error"]
            assert refused.status_code == 501 and error["param"] in form and "are alike" in error["message"]
        assert fresh.client.get("/health").status_code == 200
    told = " ".join(capsys.readouterr().err.split())
    assert "no answer can be held to a form here: two tokens are alike" in told


def answer(server: Served, **asked: Any) -> str:
    choice = server.asked(CHAT, **({"messages": HI, "max_tokens": 200, "temperature": 1.5} | asked))["choices"][0]
    assert choice["finish_reason"] == "stop"
    return str(choice["message"]["content"])


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(
    "form",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "p", "schema": PERSON}}},
        {"json_schema": PERSON},
        {"guided_json": PERSON},
        {"structured_outputs": {"json": PERSON}},
        {"response_format": {"type": "json_object", "schema": PERSON}},
    ],
    ids=["openai", "llama-server", "guided", "vllm", "object"],
)
def test_schemas(server: Served, form: dict[str, Any], seed: int) -> None:
    person = json.loads(answer(server, seed=seed, **form))
    assert list(person) == ["name", "age", "tags"]  # in the schema's order
    assert len(person["name"]) <= 8 and 0 <= person["age"] <= 99 and set(person["tags"]) <= {"a", "b"}


@pytest.mark.parametrize("seed", range(4))
def test_other_forms(server: Served, seed: int) -> None:
    assert re.fullmatch("[0-9]{3}-[a-f]{2}", answer(server, guided_regex="[0-9]{3}-[a-f]{2}", seed=seed))
    assert answer(server, guided_choice=["red", "green", "é"], seed=seed) in ("red", "green", "é")
    grammar = 'root ::= "yes" | "no" [0-9]+ "!"'
    assert re.fullmatch("yes|no[0-9]+!", answer(server, grammar=grammar, seed=seed, logit_bias=[["!", 20]]))


def test_streamed_and_several(server: Served) -> None:
    asked = {"messages": HI, "n": 3, "max_tokens": 200, "stream": True, "seed": 3, "json_schema": PERSON}
    *chunks, _ = server.events(CHAT, **asked)
    for i in range(3):
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == i]
        json.loads("".join(c["delta"].get("content") or "" for c in mine))


def test_the_figures_are_the_model_s_own(server: Served) -> None:
    """Log-probabilities are those before the mask, and the token that was chosen is always among them."""
    asked: dict[str, Any] = {"messages": HI, "max_tokens": 20, "logprobs": True, "top_logprobs": 1, "seed": 1}
    told = server.asked(CHAT, **asked, guided_regex="x+")["choices"][0]["logprobs"]["content"]
    assert all(entry["token"] == "x" for entry in told)
    assert any(entry["top_logprobs"][0]["token"] != "x" for entry in told)


@pytest.mark.parametrize(
    ("form", "says"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "schema"),
        ({"json_schema": {"type": "nothing"}}, "json_schema"),
        ({"json_schema": {"$ref": "#"}}, "json_schema"),
        ({"json_schema": {"type": "string", "pattern": "(?=a)b"}}, "json_schema"),
        ({"json_schema": [1]}, "json_schema"),
        ({"guided_regex": "("}, "guided_regex"),
        ({"guided_regex": "a" * (1 << 21)}, "guided_regex"),
        ({"grammar": "root ::= ("}, "grammar"),
        ({"grammar": "root ::= nothing"}, "grammar"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": [""]}, "guided_choice"),
        ({"guided_regex": "a", "json_schema": {}}, "each ask for a form"),
    ],
)
def test_what_cannot_be_followed(server: Served, form: dict[str, Any], says: str) -> None:
    response = server.post(CHAT, messages=HI, **form)
    assert response.status_code == 400 and says in response.json()["error"]["message"], response.text


def test_many_different_schemas(server: Served) -> None:
    """None is kept: memory stays as it is, and each is followed (CVE-2025-29770)."""
    for i in range(60):
        schema = {"const": f"word {i}"}
        assert json.loads(answer(server, json_schema=schema)) == f"word {i}"


@pytest.mark.parametrize(
    "form",
    [
        {"grammar": "root ::= a0\n" + "\n".join(f"a{i} ::= a{i + 1}" for i in range(30_000)) + '\na30000 ::= "x"'},
        {"json_schema": {"allOf": [{"type": "string", "pattern": f"(.*[a{i}]){{9}}"} for i in range(30)]}},
    ],
    ids=["grammar", "schema"],
)
def test_what_would_take_minutes_is_refused(server: Served, form: dict[str, Any]) -> None:
    refused = server.post(CHAT, messages=HI, max_tokens=1, **form)
    assert refused.status_code == 400 and "takes too long to prepare" in refused.json()["error"]["message"]


def test_tools_are_bounded_together(server: Served) -> None:
    schema = {"type": "object", "properties": {"a": {"description": "x" * 400_000}}}
    tools = [{"type": "function", "function": {"name": f"f{i}", "parameters": schema}} for i in range(3)]
    refused = server.post(CHAT, messages=HI, max_tokens=1, tools=tools, tool_choice="required")
    assert refused.status_code == 400 and "tools[2]" in refused.json()["error"]["message"]
