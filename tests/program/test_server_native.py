"""llama-server's dialect, and tokens and templates over the wire."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.serving import USUAL, Served, served
from support.tiny import spec_named, variant
from support.vocab import BOS, EOS, IDS, USER, V25_TEMPLATE, write_model

from cext.tokenizer import Message, Tokenizer
from dsv2cli.server.answering import LONG
from dsv2cli.server.service import Service

HI = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = variant(spec_named("lite"), n_ctx=4096)
    return write_model(tmp_path_factory.mktemp("native") / "tiny.gguf", spec, V25_TEMPLATE, endless=True)


@pytest.fixture(scope="module")
def long(path: Path) -> Iterator[Served]:
    with served(path, dataclasses.replace(USUAL, n_ctx=4096)) as running:
        yield running


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


def test_probabilities_that_were_drawn_from(server: Served) -> None:
    asked: dict[str, Any] = {"prompt": "Hi", "n_predict": 6, "n_probs": 20, "post_sampling_probs": True, "seed": 3}
    drawn = server.asked("/completion", **asked, top_k=5, temperature=1.5, min_p=0, top_p=1)
    assert drawn["generation_settings"]["post_sampling_probs"] is True
    for one in drawn["completion_probabilities"]:
        assert len(one["top_probs"]) == 5 and sum(top["prob"] for top in one["top_probs"]) == pytest.approx(1)
        assert {top["id"]: top["prob"] for top in one["top_probs"]}[one["id"]] == one["prob"] > 0
        assert "logprob" not in one and [t["prob"] for t in one["top_probs"]] == sorted(
            (t["prob"] for t in one["top_probs"]), reverse=True
        )
    greedy = server.asked("/completion", **asked, temperature=0)["completion_probabilities"]
    assert all(one["prob"] == 1 and len(one["top_probs"]) == 1 for one in greedy)
    held = server.asked("/completion", **asked, temperature=1, top_k=0, top_p=1, min_p=0, grammar='root ::= "Hi"')
    tops = [top for one in held["completion_probabilities"] for top in one["top_probs"]]
    assert "Hi".startswith(tops[0]["token"]) and len(tops) < 20  # what the grammar forbids cannot be drawn


def test_progress(server: Served) -> None:
    events = server.events("/completion", prompt=[5] * 300, n_predict=1, stream=True, return_progress=True)
    told = [event["prompt_progress"] for event in events if "prompt_progress" in event]
    assert told[0]["total"] == 300 and told[0]["processed"] == told[0]["cache"] and told[-1]["processed"] == 300


@pytest.mark.parametrize(
    ("way", "body", "n_ids"),
    [
        ("/completion", {"prompt": [6] * 600, "n_predict": 3}, 600),
        ("/v1/completions", {"prompt": [7] * 600, "max_tokens": 3}, 600),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "the ant" * 200}], "max_tokens": 3}, None),
        ("/v1/responses", {"input": "an ant" * 200, "max_output_tokens": 3}, None),
    ],
)
def test_what_is_told_on_the_way(long: Served, way: str, body: dict[str, Any], n_ids: int | None) -> None:
    silent = [event for event in long.events(way, **body, stream=True, ignore_eos=True) if event != "[DONE]"]
    assert not any("prompt_progress" in event for event in silent)
    asked: dict[str, Any] = {"stream": True, "ignore_eos": True, "return_progress": True, "timings_per_token": True}
    events = [event for event in long.events(way, **body, **asked, cache_prompt=False) if event != "[DONE]"]
    progress = [event for event in events if "prompt_progress" in event]
    told = [event["prompt_progress"] for event in progress]
    done = [one["processed"] for one in told]
    assert done[0] == told[0]["cache"] == 0 and done == sorted(set(done)) and done[-1] == told[-1]["total"]
    assert len(done) >= 3 and (n_ids is None or done[-1] == n_ids)  # 512 at a time
    assert progress[0]["timings"]["prompt_n"] == progress[0]["timings"]["prompt_ms"] == 0
    assert [event["timings"]["prompt_n"] for event in progress] == done
    spoken = [event for event in events if "timings" in event and "prompt_progress" not in event]
    counts = [event["timings"]["predicted_n"] for event in spoken]
    assert counts and counts == sorted(counts) and counts[-1] == 3


def test_the_chunk_of_usage_has_timings(server: Served) -> None:
    usage = {"stream": True, "stream_options": {"include_usage": True}}
    for way, body in (("/v1/chat/completions", {"messages": HI}), ("/v1/completions", {"prompt": "Hi"})):
        *_, last, _ = server.events(way, **body, **usage, max_tokens=2, ignore_eos=True)
        assert last["choices"] == [] and last["timings"]["predicted_n"] == last["usage"]["completion_tokens"] == 2


def test_verbose_tells_the_prompt(server: Served) -> None:
    asked: dict[str, Any] = {"messages": HI, "max_tokens": 2, "temperature": 0, "verbose": True}
    told = server.asked("/chat/completions", **asked)["__verbose"]
    assert told["prompt"] == BOS + server.asked("/apply-template", messages=HI)["prompt"]
    assert told["generation_settings"]["temperature"] == 0
    assert "__verbose" not in server.asked("/chat/completions", **(asked | {"verbose": False}))
    streamed = [event for event in server.events("/chat/completions", **asked, stream=True) if event != "[DONE]"]
    assert [event["__verbose"] for event in streamed if "__verbose" in event] == [told]


def test_chats_are_counted(server: Served) -> None:
    ids = server.asked("/tokenize", messages=HI)["tokens"]
    for way in ("/chat/completions/input_tokens", "/v1/chat/completions/input_tokens"):
        assert server.asked(way, messages=HI)["input_tokens"] == len(ids)
    assert server.post("/chat/completions/input_tokens", messages=[]).status_code == 400


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
    assert prompt == f"Short.{USER}Hi<｜Assistant｜>"  # /completion begins it as it begins every text
    told = server.asked("/completion", prompt=prompt, n_predict=1)["tokens_evaluated"]
    assert told == len(server.asked("/tokenize", messages=messages)["tokens"])
    assert server.asked("/apply-template", messages=messages, add_generation_prompt=False)["prompt"] == prompt[:-13]


@pytest.mark.parametrize("text", ["Sure,", "Sure, ", f"a{EOS}{USER}b", ""])
def test_templates_go_on_with_the_last_message(server: Served, text: str) -> None:
    """What is told of a chat's prompt is what the chat is answered from."""
    begun = [*HI, {"role": "assistant", "content": text}]
    prompt = server.asked("/apply-template", messages=begun)["prompt"]
    assert prompt == f"{USER}Hi<｜Assistant｜>{text}"
    whole = server.asked("/apply-template", messages=begun, add_generation_prompt=False)["prompt"]
    assert whole == f"{USER}Hi<｜Assistant｜>{text}{EOS}"
    asked = [{}, {"continue_final_message": True, "add_generation_prompt": False}, {"add_generation_prompt": True}]
    for more in asked:
        answer = server.asked("/v1/chat/completions", messages=begun, max_tokens=1, verbose=True, **more)
        ids = server.asked("/tokenize", messages=begun, **more)["tokens"]
        assert len(ids) == answer["usage"]["prompt_tokens"]
        told = server.asked("/apply-template", messages=begun, **more)["prompt"]
        assert BOS + told == answer["__verbose"]["prompt"] == server.asked("/detokenize", tokens=ids)["content"]
    both = {"continue_final_message": True, "add_generation_prompt": True}
    for way in ("/apply-template", "/tokenize"):
        assert server.post(way, messages=begun, **both).status_code == 400
        assert server.post(way, messages=HI, continue_final_message=True).status_code == 400


def test_templates_are_told_of_tools(server: Served) -> None:
    tools = [{"type": "function", "function": {"name": "look_at_it", "parameters": {"type": "object"}}}]
    asked: dict[str, Any] = {"messages": HI, "tools": tools}
    told = server.asked("/apply-template", **asked)["prompt"]
    answer = server.asked("/v1/chat/completions", **asked, max_tokens=1, verbose=True)
    assert "look_at_it" in told and BOS + told == answer["__verbose"]["prompt"]
    assert len(server.asked("/tokenize", **asked)["tokens"]) == answer["usage"]["prompt_tokens"]


def test_infill_needs_its_tokens(server: Served) -> None:
    response = server.post("/infill", input_prefix="a", input_suffix="b")
    assert response.status_code == 501 and "filling in" in response.json()["error"]["message"]
    for extra in ({}, {"filename": "a"}, {"filename": 1, "text": "a"}, {"text": 1}, "a"):
        refused = server.post("/infill", input_prefix="a", input_suffix="b", input_extra=[extra])
        assert refused.status_code == 400 and "input_extra" in refused.json()["error"]["message"]


def test_props_and_slots(server: Served, path: Path) -> None:
    props = server.client.get("/props").json()
    assert props["total_slots"] == 4 and props["default_generation_settings"]["n_ctx"] == 512
    assert props["model_path"] == "tiny.gguf"  # not where it lies
    slots = server.client.get("/slots").json()
    assert len(slots) == 4 and not any(slot["is_processing"] for slot in slots)


def test_nothing_long_is_done_in_the_event_loop(long: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others wait for what is: /health too. Of texts and prompts of thousands of tokens, in every dialect."""
    seen: list[tuple[str, str]] = []

    def watched(owner: type, name: str) -> None:
        ours = getattr(owner, name)

        def call(self: Any, *args: Any, **named: Any) -> Any:
            if any(len(arg) > LONG for arg in args if isinstance(arg, str | list)):
                seen.append((name, threading.current_thread().name))
            return ours(self, *args, **named)

        monkeypatch.setattr(owner, name, call)

    for name in ("encode", "decode"):
        watched(Tokenizer, name)
    for name in ("spelt", "messages", "check_ids", "chat_prompt"):
        watched(Service, name)
    text = "Hi the " * (LONG // 2 + 100)
    ids = long.asked("/tokenize", content=text)["tokens"]
    assert LONG < len(ids) < 4000
    said = [{"role": "user", "content": text}]
    many = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}] * (LONG // 2 + 1)
    for path, body in (
        ("/tokenize", {"prompt": text}),
        ("/tokenize", {"messages": said}),
        ("/detokenize", {"tokens": ids}),
        ("/apply-template", {"messages": said}),
        ("/completion", {"prompt": text, "n_predict": 1}),
        ("/completion", {"prompt": ids, "n_predict": 1}),
        ("/completion", {"prompt": ids, "n_predict": 1, "stream": True}),
        ("/v1/completions", {"prompt": text, "max_tokens": 1}),
        ("/v1/completions", {"prompt": ids, "max_tokens": 1, "echo": True}),
        ("/v1/completions", {"prompt": ids, "max_tokens": 1, "echo": True, "stream": True}),
        ("/v1/chat/completions", {"messages": said, "max_tokens": 1, "verbose": True}),
        ("/v1/chat/completions", {"messages": said, "max_tokens": 1, "verbose": True, "stream": True}),
        ("/v1/chat/completions/input_tokens", {"messages": many}),
        ("/v1/responses", {"input": text, "max_output_tokens": 1}),
        ("/v1/messages", {"messages": said, "max_tokens": 1}),
        ("/v1/messages/count_tokens", {"messages": many}),
        ("/api/generate", {"model": "tiny", "prompt": text, "raw": True, "options": {"num_predict": 1}}),
        ("/api/chat", {"model": "tiny", "messages": said, "options": {"num_predict": 1}}),
    ):
        n_seen = len(seen)
        assert long.post(path, **body).status_code == 200, path
        assert len(seen) > n_seen, f"{path}: nothing long was done at all"
    assert [one for one in seen if not one[1].startswith("asyncio_")] == []


def test_what_no_context_holds_is_refused_before_it_is_tokenised(
    server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    n_ctx, longest = server.engine.limits.n_ctx, server.engine.runtime.tokenizer.longest
    text = "a" * (n_ctx * longest + 1)
    monkeypatch.setattr(Tokenizer, "encode", None)
    for path, body in (
        ("/completion", {"prompt": text}),
        ("/completion", {"prompt": [1, text]}),
        ("/infill", {"input_prefix": text}),
        ("/v1/completions", {"prompt": text}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": text}]}),
        ("/v1/responses", {"input": text}),
        ("/v1/messages", {"messages": [{"role": "user", "content": text}], "max_tokens": 1}),
        ("/v1/messages/count_tokens", {"messages": [{"role": "user", "content": text}]}),
        ("/v1/chat/completions/input_tokens", {"messages": [{"role": "user", "content": text}]}),
        ("/v1/responses/input_tokens", {"input": text}),
        ("/tokenize", {"messages": [{"role": "user", "content": text}]}),
        ("/apply-template", {"messages": [{"role": "user", "content": text}]}),
        ("/api/generate", {"model": "tiny", "prompt": text, "raw": True}),
    ):
        refused = server.post(path, **body)
        assert refused.status_code == 400 and f"at least {n_ctx + 1} tokens" in refused.text, (path, refused.text)
        if path.startswith("/v1/messages"):
            assert refused.json()["type"] == "error" and refused.json()["error"]["type"] == "invalid_request_error"


def test_no_token_is_longer_than_the_longest(path: Path) -> None:
    with Tokenizer(path) as tokenizer:
        assert tokenizer.longest >= max(len(tokenizer.token_bytes(token)) for token in range(tokenizer.n_vocab))
        for text in ("a" * 1000, "the " * 500, "né" * 300, "\x00\n" * 99, "一" * 200):
            assert -(-len(text) // tokenizer.longest) <= len(tokenizer.encode(text))
