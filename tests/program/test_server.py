"""dsv2 serve: OpenAI's dialect, many at once, prefixes shared, clients that go."""

from __future__ import annotations

import dataclasses
import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.cli import SECONDS, wait_until
from support.serving import ENDLESS, LONG, USUAL, Served, served
from support.tiny import spec_named, variant
from support.vocab import BOS, IDS, USER, V25_TEMPLATE, write_model

import cext
from cext.tokenizer import Message, Tokenizer
from dsv2cli.runtime import Wishes

SPEC = variant(spec_named("lite"), n_ctx=4096)
CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
HI = [{"role": "user", "content": "Hi the ant"}]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("server") / "tiny.gguf", SPEC, V25_TEMPLATE, endless=True)


@pytest.fixture(scope="module")
def server(path: Path) -> Iterator[Served]:
    with served(path) as running:
        yield running


def greedy(path: Path, ids: list[int], n: int) -> list[int]:
    """What the engine itself answers."""
    with cext.Model(path, threads=2) as model:
        session = model.session(512, "f32")
        logits, answer = session.eval(ids), list[int]()
        for _ in range(n):
            answer.append(int(logits.argmax()))
            logits = session.eval(answer[-1:])
    return answer


def test_a_chat_is_the_engine_s_answer(server: Served, path: Path) -> None:
    tokenizer = Tokenizer(path)
    ids = tokenizer.chat([Message("user", "Hi the ant")])
    body = server.asked(CHAT, messages=HI, max_tokens=8, temperature=0, model="whatever")
    choice = body["choices"][0]
    assert choice["message"] == {
        "role": "assistant",
        "content": tokenizer.decode(greedy(path, ids, 8)),
        "refusal": None,
    }
    assert choice["finish_reason"] == "length" and body["object"] == "chat.completion"
    assert body["usage"]["prompt_tokens"] == len(ids) and body["usage"]["completion_tokens"] == 8


def test_a_stream_says_the_same(server: Served) -> None:
    asked: dict[str, Any] = {"messages": HI, "max_tokens": 12, "seed": 7, "n": 2, "temperature": 1.0}
    whole = server.asked(CHAT, **asked)
    *chunks, done = server.events(CHAT, **asked, stream=True, stream_options={"include_usage": True})
    assert done == "[DONE]"
    for i in range(2):
        mine = [c["choices"][0] for c in chunks if c["choices"] and c["choices"][0]["index"] == i]
        assert mine[0]["delta"]["role"] == "assistant"
        assert "".join(c["delta"].get("content") or "" for c in mine) == whole["choices"][i]["message"]["content"]
        assert [c["finish_reason"] for c in mine if c["finish_reason"]] == ["length"]
    assert chunks[-1]["usage"]["completion_tokens"] == 24 and chunks[-1]["choices"] == []
    assert whole["choices"][0]["message"] != whole["choices"][1]["message"]


def test_what_a_client_sends_is_no_control_token(server: Served, path: Path) -> None:
    typed = [{"role": "user", "content": f"Hi{USER}"}]
    n = server.asked(CHAT, messages=typed, max_tokens=1)["usage"]["prompt_tokens"]
    assert n == len(Tokenizer(path).chat([Message("user", f"Hi{USER}")])) > 12
    raw = server.asked(TEXT, prompt=f"Hi{USER}", max_tokens=1, echo=True, logprobs=0)
    assert USER in raw["choices"][0]["logprobs"]["tokens"]  # a raw prompt's owner may spell them
    apart = server.asked(TEXT, prompt=f"Hi{USER}", max_tokens=1, echo=True, logprobs=0, parse_special=False)
    assert USER not in apart["choices"][0]["logprobs"]["tokens"]


def prompt_logprobs(path: Path, ids: list[int]) -> list[float]:
    with cext.Model(path, threads=2) as model:
        logits = model.session(512, "f32").eval(ids, "all").astype(np.float64)
    logits -= np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True)) + logits.max(1, keepdims=True)
    return [float(logits[i, token]) for i, token in enumerate(ids[1:])]


def test_prompt_logprobs_with_the_cache_on(server: Served, path: Path) -> None:
    """lm-eval's request: one context, several endings, each echoed with its log-probabilities."""
    rng = np.random.default_rng(5)
    context = [int(i) for i in rng.integers(0, 256, 200)]
    for ending in ([7, 8, 9], [7, 8, 10, 11], [30]):
        ids = context + ending
        body = server.asked(TEXT, prompt=ids, max_tokens=1, echo=True, logprobs=1, temperature=0)
        told = body["choices"][0]["logprobs"]
        assert told["token_logprobs"][0] is None and told["top_logprobs"][0] is None
        np.testing.assert_allclose(told["token_logprobs"][1 : len(ids)], prompt_logprobs(path, ids), atol=2e-5)
        for value, top in zip(told["token_logprobs"][1:], told["top_logprobs"][1:], strict=True):
            assert value in top.values() and max(top.values()) >= value
        assert len(told["tokens"]) == len(ids) + 1
    assert body["usage"]["prompt_tokens_details"]["cached_tokens"] >= 199  # the endings read their own tokens alone


@pytest.mark.parametrize("text", ["Hi the ant, é 日本 the", f"the ant{USER} Hi", "H"])
def test_an_echo_is_the_text_that_was_sent(server: Served, path: Path, text: str) -> None:
    """The token that is put before a text is no part of it, so that the text's own first token has a probability."""
    asked: dict[str, Any] = {"max_tokens": 4, "echo": True, "logprobs": 2, "temperature": 0}
    [choice] = server.asked(TEXT, prompt=text, **asked)["choices"]
    ids = Tokenizer(path).prompt(text, special=True)
    own, told = len(ids) - 1, choice["logprobs"]
    assert ids[0] == IDS[BOS] and choice["text"].startswith(text)
    assert len(told["tokens"]) == own + 4 and None not in told["token_logprobs"] + told["top_logprobs"]
    np.testing.assert_allclose(told["token_logprobs"][:own], prompt_logprobs(path, ids), atol=2e-5)
    for token, at in zip(told["tokens"][:own], told["text_offset"], strict=False):
        assert token.startswith("bytes:") or choice["text"][at : at + len(token)] == token
    assert told["text_offset"][own] == len(text)  # as lm-eval's gguf finds where a context ends
    as_ids = server.asked(TEXT, prompt=ids, **asked)["choices"][0]
    assert as_ids["text"] == BOS + choice["text"]
    first, *others = as_ids["logprobs"]["token_logprobs"]
    assert first is None
    np.testing.assert_allclose(others, told["token_logprobs"], atol=2e-5)
    [silent] = server.asked(TEXT, prompt=text, **asked, logit_bias={str(IDS[USER]): 100})["choices"]
    assert silent["text"] == text and silent["logprobs"]["text_offset"][own:] == [len(text)] * 4


@pytest.mark.parametrize(("text", "first"), [(BOS, [None]), (f"{BOS}Hi", [None, "H", "i"]), ("", [])])
def test_a_beginning_that_was_sent_is_echoed(server: Served, text: str, first: list[str | None]) -> None:
    [choice] = server.asked(TEXT, prompt=text, max_tokens=0, echo=True, logprobs=0)["choices"]
    values, tokens = choice["logprobs"]["token_logprobs"], choice["logprobs"]["tokens"]
    assert choice["text"] == text == "".join(tokens)
    assert [value and token for value, token in zip(values, tokens, strict=True)] == first


def test_turns_are_read_once(server: Served) -> None:
    messages = [{"role": "user", "content": "Hi " * 40}]
    first = server.asked(CHAT, messages=messages, max_tokens=5, temperature=0)
    messages += [first["choices"][0]["message"], {"role": "user", "content": "the ant"}]
    second = server.asked(CHAT, messages=messages, max_tokens=5, temperature=0)
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] >= first["usage"]["prompt_tokens"]
    alone = server.asked(CHAT, messages=messages, max_tokens=5, temperature=0, cache_prompt=False)
    assert alone["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert alone["choices"][0]["message"] == second["choices"][0]["message"]


def test_sixteen_at_once_answer_as_alone(server: Served) -> None:
    asks = [{"messages": [{"role": "user", "content": "Hi " * i}], "max_tokens": 20, "seed": i} for i in range(1, 17)]
    alone = [server.asked(CHAT, **ask)["choices"][0]["message"]["content"] for ask in asks]
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda ask: server.asked(CHAT, **ask)["choices"][0]["message"]["content"], asks))
    assert together == alone


def test_requests_that_begin_alike_read_it_once(path: Path) -> None:
    """Sent together, before anything is in the cache."""
    ids = [int(i) for i in np.random.default_rng(1).integers(0, 256, 300)]
    with served(path) as server, ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: server.asked(TEXT, prompt=[*ids, i], max_tokens=2), range(4)))
        assert server.engine.figures.prompt_tokens < 2 * 300


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("ended", ["running", "queued"])
def test_a_client_that_goes_costs_nothing_more(path: Path, stream: bool, ended: str) -> None:
    body = json.dumps({"prompt": "Hi", "stream": stream, **LONG}).encode()
    head = f"POST {TEXT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n".encode()
    with served(path, dataclasses.replace(ENDLESS, parallel=1)) as server, ThreadPoolExecutor(1) as pool:
        engine, url = server.engine, server.client.base_url
        if ended == "queued":
            neighbour = pool.submit(server.post, TEXT, prompt="Hi", **LONG)
            wait_until(lambda: engine.n_running == 1)
        with socket.create_connection((url.host, url.port or 80), SECONDS) as client:
            client.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            wait_until(lambda: engine.n_waiting if ended == "queued" else engine.n_running)
            if stream and ended == "running":
                assert client.recv(4096).startswith(b"HTTP/1.1 200")
        if ended == "queued":
            wait_until(lambda: engine.figures.cancelled >= 1 and engine.n_waiting == 0)
            assert engine.n_running == 1 and not neighbour.done()  # it goes on
        else:
            wait_until(lambda: engine.n_running == 0 and engine.figures.cancelled == 1)
        for ticket in engine._all_tickets():
            ticket.cancel()


@pytest.mark.parametrize(
    ("path_", "body", "status", "says"),
    [
        (CHAT, {}, 400, "messages"),
        (CHAT, {"messages": []}, 400, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": 3}]}, 400, "messages[0]"),
        (CHAT, {"messages": HI, "n": 10**9}, 400, "n:"),
        (CHAT, {"messages": HI, "temperature": "hot"}, 400, "temperature"),
        (CHAT, {"messages": HI, "max_tokens": -5}, 400, "max_tokens"),
        (CHAT, {"messages": HI, "stop": [""]}, 400, "stop"),
        (CHAT, {"messages": HI, "chat_template_kwargs": {"messages": "x"}}, 400, "chat_template_kwargs"),
        (CHAT, {"messages": HI * 300}, 400, "tokens"),
        (TEXT, {"prompt": []}, 400, "prompt"),
        (TEXT, {"prompt": [[]]}, 400, "prompt"),
        (TEXT, {"prompt": [-1]}, 400, "prompt"),
        (TEXT, {"prompt": [10**6]}, 400, "prompt"),
        (TEXT, {"prompt": ["a", 1]}, 400, "prompt"),
        (TEXT, {"prompt": "a", "best_of": 2}, 400, "best_of"),
        (TEXT, {"prompt": "a", "logprobs": 21}, 400, "logprobs"),
        ("/v1/nothing", {}, 404, "nothing at"),
    ],
)
def test_refusals_name_the_field(server: Served, path_: str, body: dict[str, Any], status: int, says: str) -> None:
    response = server.post(path_, **body)
    error = response.json()["error"]
    assert response.status_code == status and says in error["message"], response.text
    assert error.keys() >= {"message", "type", "param", "code"}


def test_what_is_not_followed_is_told(server: Served) -> None:
    """Clients send fields that a model has no use for: the answer says which were not used."""
    assert "suffix" in server.asked(TEXT, prompt="a", suffix="b", max_tokens=1)["warnings"][0]
    developer = [{"role": "developer", "content": "Short."}, *HI]
    system = [{"role": "system", "content": "Short."}, *HI]
    n = [server.asked(CHAT, messages=m, max_tokens=1)["usage"]["prompt_tokens"] for m in (developer, system)]
    assert n[0] == n[1]  # the template knows no developer


def test_a_prompt_beyond_the_context(server: Served) -> None:
    response = server.post(TEXT, prompt=[1] * 600)
    error = response.json()["error"]
    assert response.status_code == 400 and error["type"] == "exceed_context_size_error"
    assert (error["n_prompt_tokens"], error["n_ctx"]) == (600, 512)


@pytest.mark.parametrize("body", [b"{", b"nonsense", b'{"n": NaN}', b"[" * 100_000, b'{"a":' * 200 + b"1" + b"}" * 200])
def test_bodies_that_are_no_json(server: Served, body: bytes) -> None:
    response = server.client.post(CHAT, content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400 and "error" in response.json()


def test_penalties_biases_and_ends(server: Served, path: Path) -> None:
    ids = Tokenizer(path).chat([Message("user", "Hi the ant")])
    likeliest = greedy(path, ids, 1)[0]
    asked: dict[str, Any] = {"messages": HI, "max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": 2}
    plain = server.asked(CHAT, **asked)["choices"][0]["logprobs"]["content"][0]
    assert plain["id"] == likeliest == plain["top_logprobs"][0]["id"]
    banned = server.asked(CHAT, **asked, logit_bias={str(likeliest): -100})["choices"][0]["logprobs"]["content"][0]
    assert banned["id"] == plain["top_logprobs"][1]["id"] and banned["top_logprobs"] == plain["top_logprobs"]
    forced = server.asked(
        CHAT, messages=HI, max_tokens=9, temperature=0, logit_bias=[[IDS["<｜end▁of▁sentence｜>"], 100]]
    )
    assert forced["choices"][0]["finish_reason"] == "stop" and forced["usage"]["completion_tokens"] == 0
    ignored = server.asked(CHAT, messages=HI, max_tokens=9, ignore_eos=True)
    assert ignored["usage"]["completion_tokens"] == 9
    often = server.asked(CHAT, messages=HI, max_tokens=40, temperature=0, frequency_penalty=2.0)
    assert (
        often["choices"][0]["message"]
        != server.asked(CHAT, messages=HI, max_tokens=40, temperature=0)["choices"][0]["message"]
    )


def test_metrics_tell_of_a_drive(path: Path, server: Served) -> None:
    with cext.Model(path) as model:
        least = model.needs().least
    assert "drive_bytes_total" not in figures(server)
    with served(path, wishes=Wishes(ram=least)) as small:
        before = figures(small)
        assert before["weights_budget_bytes"] == least and before["drive_bytes_total"] == 0
        small.asked(TEXT, prompt=[5, 6, 7], max_tokens=4, temperature=0)
        after = figures(small)
    assert after["experts_needed_total"] > 0 and after["drive_bytes_total"] > 0
    assert after["experts_ready_total"] <= after["experts_needed_total"] and after["drive_bytes_per_token"] > 0


def figures(server: Served) -> dict[str, float]:
    lines = server.client.get("/metrics").text.splitlines()
    pairs = (line.removeprefix("llamacpp:").split() for line in lines if line.startswith("llamacpp:"))
    return {name: float(value) for name, value in pairs}


def test_models_health_and_metrics(server: Served) -> None:
    assert server.client.get("/health").json() == {"status": "ok"}
    entry = server.client.get("/v1/models").json()["data"][0]
    assert entry["id"] == "tiny" and entry["max_model_len"] == 512
    assert server.client.get("/v1/models/tiny").json() == entry
    assert server.client.get("/v1/models/other").status_code == 404
    text = server.client.get("/metrics").text
    assert "llamacpp:prompt_tokens_total" in text


def test_the_queue_is_bounded(path: Path) -> None:
    limits = dataclasses.replace(ENDLESS, parallel=1, queue=2)
    with served(path, limits) as server, ThreadPoolExecutor(3) as pool:
        engine = server.engine
        running = pool.submit(server.post, TEXT, prompt="Hi", **LONG)
        wait_until(lambda: engine.n_running == 1)
        waiting = [pool.submit(server.post, TEXT, prompt="Hi", max_tokens=1) for _ in range(2)]
        wait_until(lambda: engine.n_waiting == 2)
        refused = server.post(TEXT, prompt="Hi", max_tokens=1)
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) > 0
        assert server.client.get("/health").status_code == 200
        for sequence in engine.running():
            sequence.cancel()
        assert [future.result().status_code for future in (running, *waiting)] == [200, 200, 200]


def test_an_error_of_the_engine_fails_its_request_alone(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with served(path) as server:
        evaluate = server.engine._scheduler._evaluate
        bad = 77

        def fails(batch: Any, n_logits: Any) -> Any:
            if any(ids == [bad] and session.n_past == 0 for session, ids in batch):
                raise cext.EngineError("the device is on fire", "")
            return evaluate(batch, n_logits)

        monkeypatch.setattr(server.engine._scheduler, "_evaluate", fails)
        with ThreadPoolExecutor(3) as pool:
            asked = [pool.submit(server.post, TEXT, prompt=ids, max_tokens=4) for ids in ([5, 6], [bad], [8, 9])]
        codes = [future.result().status_code for future in asked]
    assert codes == [200, 500, 200]


def test_deterministic(path: Path) -> None:
    """Alone and among others, in whatever order: the same log-probabilities to the bit."""
    limits = dataclasses.replace(USUAL, deterministic=True, parallel=8)
    prompts = [[int(i) for i in np.random.default_rng(s).integers(0, 256, 40 + 70 * s)] for s in range(6)]

    def ask(server: Served, ids: list[int]) -> Any:
        return server.asked(TEXT, prompt=ids, max_tokens=6, temperature=0, logprobs=3)["choices"][0]["logprobs"]

    with served(path, dataclasses.replace(limits, kv="f16")) as server:
        alone = [ask(server, ids) for ids in prompts]
        with ThreadPoolExecutor(6) as pool:
            assert list(pool.map(lambda ids: ask(server, ids), prompts)) == alone


def raises(*given: Any) -> Any:
    raise MemoryError


def test_several_answers_of_a_prompt_that_cannot_be_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one's failure is the others' chance, and theirs the end: nobody waits for ever."""
    with served(path) as server:
        monkeypatch.setattr(server.engine._scheduler, "_evaluate", raises)
        assert server.post(TEXT, prompt=[5] * 400, n=3, max_tokens=2).status_code == 500
        wait_until(lambda: server.engine.n_running == server.engine.n_waiting == 0)


def test_a_failure_beside_the_answers_is_not_the_server_s_end(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with served(path) as server:
        with monkeypatch.context() as broken:
            broken.setattr(server.engine.prefixes, "keep", raises)
            assert server.asked(TEXT, prompt="Hi the ant", max_tokens=2)  # nothing is kept, and the answer is whole
        with monkeypatch.context() as broken:
            broken.setattr(server.engine, "_heard", raises)
            assert server.post(TEXT, prompt="Hi the ant", max_tokens=2).status_code == 500
        assert server.asked(TEXT, prompt="Hi the ant", max_tokens=2)


@pytest.mark.parametrize(
    ("path_", "body"),
    [
        (CHAT, {"messages": HI, "logit_bias": {"--5": 1}}),
        (CHAT, {"messages": [*HI, {"role": "assistant", "tool_calls": 5}, *HI]}),
        (CHAT, {"messages": [*HI, {"role": "assistant", "tool_calls": [{"function": 7}]}, *HI]}),
        (CHAT, {"messages": HI, "guided_choice": ["x"], "logit_bias": [["x", -100]]}),
        (CHAT, {"messages": HI, "logit_bias": {"5": 1e300}, "max_tokens": 1}),
        ("/tokenize", {"content": [99999999], "with_pieces": True}),
        ("/tokenize", {"content": [-3]}),
    ],
)
def test_odd_requests_are_no_internal_errors(server: Served, path_: str, body: dict[str, Any]) -> None:
    assert server.post(path_, **body).status_code in (200, 400)
    assert server.client.get("/health").status_code == 200


def test_few_tokens_are_few_in_every_dialect(server: Served) -> None:
    assert server.asked(CHAT, messages=HI, max_tokens=0)["usage"]["completion_tokens"] == 1
    for raw in (False, True):
        asked = {"prompt": "Hi", "raw": raw, "stream": False, "options": {"num_predict": 0}}
        assert server.asked("/api/generate", **asked)["eval_count"] == 1
