"""llama-server's dialect, and tokens and templates over the wire."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.serving import Served, served
from support.tiny import spec_named, variant
from support.vocab import BOS, EOS, IDS, USER, V25_TEMPLATE, write_model

from cext.tokenizer import Message, Tokenizer


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = variant(spec_named("lite"), n_ctx=4096)
    return write_model(tmp_path_factory.mktemp("native") / "tiny.gguf", spec, V25_TEMPLATE, endless=True)


@pytest.fixture(scope="module")
def server(path: Path) -> Iterator[Served]:
    with served(path) as running:
        yield running


def test_whole_and_streamed(server: Served) -> None:
    asked = {"prompt": "Hi the", "n_predict": 9, "temperature": 0, "return_tokens": True}
    whole = server.asked("/completion", **asked)
    assert len(whole["tokens"]) == 9 == whole["tokens_predicted"] == whole["timings"]["predicted_n"]
    assert whole["stop"] and whole["stop_type"] == "limit" and not whole["truncated"]
    assert whole["generation_settings"]["n_predict"] == 9
    *parts, last = server.events("/completion", **asked, stream=True)
    assert [token for part in parts for token in part["tokens"]] == whole["tokens"]
    assert "".join(part["content"] for part in [*parts, last]) == whole["content"]
    assert not any(part["stop"] for part in parts) and last["stop"]


def test_every_form_of_prompt(server: Served) -> None:
    def content(prompt: Any) -> Any:
        answer = server.asked("/completion", prompt=prompt, n_predict=4, temperature=0)
        return [one["content"] for one in answer] if isinstance(answer, list) else answer["content"]

    ids = server.asked("/tokenize", content="Hi the", add_special=True)["tokens"]
    plain = content("Hi the")
    assert content(ids) == content({"prompt_string": "Hi the"}) == content([IDS[BOS], "Hi the"]) == plain
    assert content([ids, "Hi the", {"prompt_string": "Hi the"}]) == [plain] * 3
    for bad in ([], [[]], [1.5], [10**9], {"multimodal_data": "x", "prompt_string": "a"}, [[None]]):
        assert server.post("/completion", prompt=bad).status_code == 400


def test_fields_stops_probabilities_and_ends(server: Served) -> None:
    asked: dict[str, Any] = {"prompt": "Hi", "n_predict": 5, "temperature": 0}
    some = server.asked("/completion", **asked, response_fields=["content", "generation_settings/n_predict", "no"])
    assert set(some) == {"content", "generation_settings/n_predict"}
    text = server.asked("/completion", **asked)["content"]
    stopped = server.asked("/completion", **asked, stop=[text[1:3]])
    assert stopped["content"] == text[:1] and stopped["stop_type"] == "word" and stopped["stopping_word"] == text[1:3]
    probs = server.asked("/completion", **asked, n_probs=3)["completion_probabilities"]
    assert len(probs) == 5 and all(len(one["top_logprobs"]) == 3 for one in probs)
    assert all(one["id"] == one["top_logprobs"][0]["id"] for one in probs)  # greedy
    ignored = server.asked("/completion", **asked, ignore_eos=True)["generation_settings"]["logit_bias"]
    assert {"token": IDS[EOS], "bias": None} in ignored
    nothing = server.asked("/completion", prompt="Hi", n_predict=0)
    assert nothing["content"] == "" and nothing["tokens_predicted"] == 0


def test_progress(server: Served) -> None:
    events = server.events("/completion", prompt=[5] * 300, n_predict=1, stream=True, return_progress=True)
    told = [event["prompt_progress"] for event in events if "prompt_progress" in event]
    assert told[0]["total"] == 300 and told[0]["processed"] <= told[-1]["processed"] <= 300


def test_tokens_there_and_back(server: Served, path: Path) -> None:
    text = f"Hi the ant {USER} é🦙"
    spelt = server.asked("/tokenize", content=text)["tokens"]
    typed = server.asked("/tokenize", content=text, parse_special=False)["tokens"]
    assert IDS[USER] in spelt and IDS[USER] not in typed and typed == Tokenizer(path).encode(text)
    for ids in (spelt, typed):
        assert server.asked("/detokenize", tokens=ids) == {"content": text, "prompt": text}
    pieces = server.asked("/tokenize", content="é", with_pieces=True)["tokens"]
    assert all(isinstance(one["piece"], list | str) and one["piece"] for one in pieces)
    vllm = server.asked("/tokenize", prompt="Hi")
    assert vllm["tokens"][0] == IDS[BOS] and vllm["count"] == len(vllm["tokens"]) and vllm["max_model_len"] == 512
    chat = server.asked("/tokenize", messages=[{"role": "user", "content": "Hi"}])
    assert chat["tokens"] == Tokenizer(path).chat([Message("user", "Hi")])
    assert server.post("/detokenize", tokens=[10**9]).status_code == 400
    info = server.client.get("/tokenizer_info").json()
    assert (info["bos_token"], info["eos_token"], info["chat_template"]) == (BOS, EOS, V25_TEMPLATE)


def test_templates(server: Served) -> None:
    messages = [{"role": "system", "content": "Short."}, {"role": "user", "content": "Hi"}]
    prompt = server.asked("/apply-template", messages=messages)["prompt"]
    assert prompt == f"{BOS}Short.{USER}Hi<｜Assistant｜>"
    assert server.asked("/apply-template", messages=messages, add_generation_prompt=False)["prompt"] == prompt[:-13]


def test_infill_needs_its_tokens(server: Served) -> None:
    response = server.post("/infill", input_prefix="a", input_suffix="b")
    assert response.status_code == 501 and "filling in" in response.json()["error"]["message"]


def test_props_and_slots(server: Served, path: Path) -> None:
    props = server.client.get("/props").json()
    assert props["total_slots"] == 4 and props["default_generation_settings"]["n_ctx"] == 512
    assert props["model_path"] == "tiny.gguf"  # not where it lies
    slots = server.client.get("/slots").json()
    assert len(slots) == 4 and not any(slot["is_processing"] for slot in slots)
