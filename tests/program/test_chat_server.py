"""A conversation with a server: what is sent and to whom, what is made of what comes back, and what is kept."""

from __future__ import annotations

import contextlib
import inspect
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.cli import Screen, assert_fails, dsv2, terminal
from support.serving import served
from support.tiny import spec_named
from support.vocab import write_model

from cext.tokenizer import Answer
from dsv2cli.chat import client, journal, remote, store
from dsv2cli.chat.answering import Progress
from dsv2cli.chat.settings import Sampling
from dsv2cli.commands.chat import RUNS_HERE, SAMPLED, chat, kept_key, there
from dsv2cli.errors import UsageError
from dsv2cli.scheduler import Stats

KEY = "sk-secret-0123456789"
MODELS = {"data": [{"id": "m", "max_model_len": 4096}]}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("chat-server") / "endless.gguf", spec_named("lite"), endless=True)


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state"


def event(**choice: Any) -> bytes:
    return b"data: " + json.dumps({"choices": [{"index": 0, **choice}]}).encode() + b"\n\n"


def said(*texts: str, stop: str = "stop", **fields: str) -> bytes:
    """A whole stream: reasoning, texts, an end and the tokens that they took."""
    events = [event(delta={"role": "assistant", "content": None})]
    events += [event(delta={name: text}) for name, text in fields.items()]
    events += [event(delta={"content": text}) for text in texts]
    usage = {"choices": [], "usage": {"prompt_tokens": 20, "completion_tokens": 5}}
    end = event(delta={}, finish_reason=stop) + b"data: " + json.dumps(usage).encode() + b"\n\n"
    return b": alive\n\n" + b"".join(events) + end + b"data: [DONE]\n\n"


class Stub:
    """A server that answers with what it is given, and keeps what it was asked."""

    def __init__(self) -> None:
        self.answers: list[tuple[int, dict[str, str], bytes]] = []
        self.models: tuple[int, bytes] = 200, json.dumps(MODELS).encode()
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.holds = False  # the connection open after an answer, until the client has gone
        self.asked, self.left = threading.Event(), threading.Event()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                stub.keys.append(self.headers.get("Authorization"))
                self._send(stub.models[0], {"Content-Type": "application/json"}, stub.models[1])

            def do_POST(self) -> None:
                stub.keys.append(self.headers.get("Authorization"))
                stub.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self._send(*stub.answers.pop(0))
                stub.asked.set()
                if stub.holds:
                    with contextlib.suppress(OSError):
                        assert self.rfile.read(1) == b""
                    stub.left.set()

            def _send(self, status: int, headers: dict[str, str], body: bytes) -> None:
                if not status:
                    return
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def streams(self, *answers: bytes) -> None:
        self.answers += [(200, {"Content-Type": "text/event-stream; charset=utf-8"}, answer) for answer in answers]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def stub() -> Iterator[Stub]:
    made = Stub()
    yield made
    made.close()


def talk(stub: Stub, state: Path, *more: str, **env: str) -> contextlib.AbstractContextManager[Screen]:
    return terminal("chat", "--server", stub.url, *more, XDG_STATE_HOME=str(state), **env)


def say(screen: Screen, typed: str, at: int, until: str) -> int:
    screen.type(typed)
    return screen.wait_for(until, at)


def test_our_own_server_s_answer_is_shown_and_gone_on_with(model: Path, state: Path) -> None:
    options = ("-n", "8", "--temp", "0", "-q")
    with served(model) as server:
        url = str(server.client.base_url)

        def content(n: int) -> str:
            ask = {"messages": [{"role": "user", "content": "Hi"}], "temperature": 0, "max_tokens": n}
            text: str = server.asked("/v1/chat/completions", **ask)["choices"][0]["message"]["content"]
            return text.lstrip()

        done = dsv2("chat", "--server", url, "-p", "Hi", *options)
        assert (done.returncode, done.stdout.rstrip("\n")) == (0, content(8).rstrip("\n")), done.stderr
        told = json.loads(dsv2("chat", "--server", url, "-p", "Hi", *options, "--json").stdout)
        assert told["answer"] == content(8) and told["answer_tokens"] == 8 and told["prompt_tokens"] > 0
        assert told["stop"] == "length" and told["model"] == "tiny"
        with terminal("chat", "--server", url, *options, XDG_STATE_HOME=str(state)) as screen:
            at = screen.wait_for("> $")
            at = say(screen, "Hi\n", at, "\n> $")
            at = say(screen, "/continue\n", at, "/continue\n(.|\n)*\n> $")
            say(screen, "/exit\n", at, "")
            assert screen.exit_code() == 0, screen.text
        tree = journal.read(store.existing(store.latest())).tree
        contents = [node.turn.said.content for node in tree.nodes if node.turn.said is not None]
        assert contents[0] == content(8) and contents[1].startswith(contents[0]) and len(contents[1]) > len(contents[0])


def test_a_conversation_is_kept_as_others_are(stub: Stub, state: Path) -> None:
    counts = [f'"prompt_tokens": {20 + 10 * i}'.encode() for i in range(5)]
    stub.streams(*(said(f"{i} is", " said").replace(b'"prompt_tokens": 20', n) for i, n in enumerate(counts)))
    with talk(stub, state, "-s", "Be brief.") as screen:
        at = screen.wait_for(r"m at http://127.0.0.1:\d+/v1, 4096 tokens of context.*\n> $")
        for typed in ("one\n", "two\n", "/retry\n"):
            at = say(screen, typed, at, r"said\n> $")
        listed = r"  1  2 turns, the last: two\n     1 is said\n\* 2  2 turns, the last: two\n     2 is said\n> $"
        at = say(screen, "/branch\n", at, listed)
        at = say(screen, "/branch 1\n", at, r"2 turns; the last:\)\n> two\n1 is said\n> $")
        at = say(screen, "/stats\n", at, r"2 turns, 35 of 4096 tokens of context\n> $")
        at = say(screen, "/save rome\n", at, r"kept as rome: .*\n> $")
        say(screen, "/exit\n", at, "")
        assert screen.exit_code() == 0
    assert stub.bodies[2]["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "0 is said"},
        {"role": "user", "content": "two"},
    ]
    assert not list(store.existing("rome").parent.glob("*.cache"))
    done = dsv2("chat", "-r", "rome", "-p", "three", "-q")  # where it was
    assert (done.returncode, done.stdout) == (0, "3 is said\n"), done.stderr
    asked = stub.bodies[3]
    assert asked["model"] == "m" and [m["content"] for m in asked["messages"]] == [
        "Be brief.", "one", "0 is said", "two", "1 is said", "three",
    ]  # fmt: skip
    with talk(stub, state, "-C") as screen:
        at = screen.wait_for(r"\(rome: 3 turns; the last:\)\n> three\n3 is said\n> $")
        at = say(screen, "/edit answer\n", at, "> 3 is said$")
        at = say(screen, "\x15Words of mine,\n", at, r"\(changed; .*\)\n> $")
        at = say(screen, "/stats\n", at, r"\n3 turns\n> $")  # how many tokens they are the server has not said
        at = say(screen, "/continue\n", at, r"4 is said\n> $")
        say(screen, "/exit\n", at, "")
        assert screen.exit_code() == 0
    last = stub.bodies[4]
    assert last["messages"][-1] == {"role": "assistant", "content": "Words of mine,"}
    assert last["continue_final_message"] is True and last["add_generation_prompt"] is False
    found = journal.read(store.existing("rome"))
    assert found.model == journal.Model(journal.SERVER, "m", stub.url)
    assert [n.parent for n in found.tree.nodes] == [0, 1, 1, 2, 2, 2]
    texts = [n.turn.said.content for n in found.tree.nodes if n.turn.said is not None]
    assert texts[-2:] == ["Words of mine,", "Words of mine,4 is said"]


def test_a_server_is_told_what_a_person_has_set_and_no_more(stub: Stub, state: Path, tmp_path: Path) -> None:
    stub.streams(*(said("ok") for _ in range(4)))
    assert dsv2("chat", "--server", stub.url, "-p", "x").returncode == 0
    assert stub.bodies[-1].keys() == {"model", "messages", "stream", "stream_options"}
    assert stub.keys == [None, None]
    settings = tmp_path / "dsv2" / "config.toml"
    settings.parent.mkdir()
    settings.write_text("temp = 0.25\nkv = 'q8_0'\n", encoding="utf-8")
    done = dsv2(
        "chat", "--server", stub.url, "-p", "x", "--top-k", "3", "--think", "off", XDG_CONFIG_HOME=str(tmp_path)
    )
    assert done.returncode == 0, done.stderr
    told = stub.bodies[-1]
    assert (told["temperature"], told["top_k"], told["chat_template_kwargs"]) == (0.25, 3, {"enable_thinking": False})
    assert "top_p" not in told and "seed" not in told
    with talk(stub, state) as screen:
        at = screen.wait_for("> $")
        at = say(screen, "/set\n", at, r"temp +as the server has it\n(.|\n)*> $")
        at = say(screen, "/set seed 5\n", at, "> $")
        at = say(screen, "/set max-tokens 9\n", at, "> $")
        at = say(screen, "/set\n", at, r"seed +5\n +max-tokens +9\n(.|\n)*> $")
        at = say(screen, "x\n", at, r"ok\n> $")
        at = say(screen, "/set max-tokens 0\n", at, "> $")
        at = say(screen, "x\n", at, r"ok\n> $")
        say(screen, "/exit\n", at, "")
        assert screen.exit_code() == 0
    assert stub.bodies[2]["seed"] == 5 and stub.bodies[2]["max_tokens"] == 9 and "temperature" not in stub.bodies[2]
    assert "max_tokens" not in stub.bodies[3]


def test_a_key_comes_from_the_environment_and_is_never_shown(stub: Stub) -> None:
    refusal = json.dumps({"error": {"message": f"no such key: {KEY}"}}).encode()
    stub.answers.append((401, {"Content-Type": "application/json"}, refusal))
    done = dsv2("chat", "m", "--server", stub.url, "-p", "x", DSV2_API_KEY=KEY)
    assert_fails(done, 1, "401", "no such key: (the key)", "DSV2_API_KEY")
    assert KEY not in done.stderr and stub.keys == [f"Bearer {KEY}"] * 2
    stub.streams(said("ok"))
    assert (
        dsv2("chat", "--server", stub.url, "-p", "x", "--key-env", "MINE", DSV2_API_KEY=KEY, MINE="other").returncode
        == 0
    )
    assert stub.keys[2:] == ["Bearer other"] * 2
    assert_fails(dsv2("chat", "--server", stub.url, "-p", "x", "--key-env", "NONE"), 2, "NONE holds no key")
    assert_fails(dsv2("chat", "-p", "x", "--key-env", "MINE"), 2, "--server")
    wrong = dsv2("chat", "--server", stub.url, "-p", "x", DSV2_API_KEY="two words")
    assert_fails(wrong, 2, "is no key")
    assert "two words" not in wrong.stderr


@pytest.mark.parametrize("key", ["sk-" + "x" * 200, 'sk-"quoted\\0123'])
def test_a_key_is_hidden_before_a_text_is_cut_and_however_it_is_spelt(key: str, stub: Stub) -> None:
    for error in ("." * (client.SHOWN - 8) + key, json.dumps({"key": key}), {"type": {"key": key}}):
        body = json.dumps({"error": error}).encode()
        stub.answers.append((400, {"Content-Type": "application/json"}, body))
        with pytest.raises(client.ServerError) as told:
            list(client.Server(client.address(stub.url), key).answer({}))
        assert key[:5] not in str(told.value) and "(the ke" in str(told.value)


def test_a_key_in_a_status_line_is_hidden() -> None:
    response = SimpleNamespace(status=400, reason=f"Bad {KEY}" + "x" * 5000, headers={}, read=lambda n: b"")
    told = client.Server(client.address("h"), KEY)._refusal(response)  # type: ignore[arg-type]
    assert KEY not in str(told) and "400 Bad (the key)" in str(told) and len(str(told)) < 2 * client.SHOWN


@pytest.mark.parametrize(
    ("url", "kept", "given", "variable"),
    [
        ("https://h/v1", "", None, ""),
        ("https://h/v1", "", "OTHER", "OTHER"),
        ("https://h/v1", "", client.DEFAULT_KEY, client.DEFAULT_KEY),
        ("https://h/v1", "MINE", None, "MINE"),
        ("https://h/v1", "MINE", "OTHER", "OTHER"),
        ("https://h/v1", client.DEFAULT_KEY, None, None),
        ("http://127.0.0.2:1/v1", "", None, None),
        ("http://localhost:1/v1", "MINE", None, "MINE"),
    ],
)
def test_which_key_goes_to_an_address_from_a_file(
    url: str,
    kept: str,
    given: str | None,
    variable: str | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("DSV2_API_KEY", KEY)
    assert kept_key(journal.Model(journal.SERVER, "m", url, kept), given) == variable
    told = capsys.readouterr().err
    assert told.count("no key goes to h,") == told.count("\n") == (variable == "") and KEY not in told


def test_the_name_of_the_key_s_variable_is_kept(stub: Stub) -> None:
    talk_, partner = there(stub.url, None, None, Sampling(0.7, 40, 0.95, 0.05, 1.0, 1), None, quiet=True)
    assert partner.model().key_env == ""
    path = store.path_of("old")
    journal.Journal.create(path, partner.model()).close()
    assert b"key_env" not in path.read_bytes() and journal.read(path).model.key_env == ""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSV2_API_KEY", KEY)
        patch.setenv("MINE", "other")
        for variable, name in ((None, client.DEFAULT_KEY), ("MINE", "MINE"), ("", "")):
            talk_, partner = there(stub.url, variable, None, talk_.sampling, None, quiet=True)
            assert partner.model().key_env == name
    path = store.path_of("new")
    model = journal.Model(journal.SERVER, "m", stub.url, "MINE")
    journal.Journal.create(path, model).close()
    assert journal.read(path).model == model and KEY.encode() not in path.read_bytes()
    stub.streams(said("ok"))
    stub.keys.clear()
    assert dsv2("chat", "-r", "new", "-p", "x", "-q", DSV2_API_KEY=KEY, MINE="other").returncode == 0
    assert stub.keys == ["Bearer other"] * 2


def test_a_conversation_with_another_server_is_not_loaded(stub: Stub) -> None:
    """Its text would go to this one. Where the command line says so it may."""
    kept = journal.Journal.create(store.path_of("theirs"), journal.Model(journal.SERVER, "m", "https://h/v1"))
    address = client.address(stub.url)
    conversation = remote.RemoteConversation(client.Server(address), client.Listed("m", 0))
    for given in (None, "mine"):
        with pytest.raises(journal.JournalError, match=r"another server, https://h/v1") as refused:
            remote.Texts(conversation, given).check(kept)
        assert f"dsv2 chat --server {stub.url} -r theirs" in refused.value.hint
    remote.Texts(conversation, "theirs").check(kept)
    kept.close()
    stub.streams(said("ok"))
    assert dsv2("chat", "--server", stub.url, "-r", "theirs", "-p", "x", "-q").stdout == "ok\n"


def test_it_goes_on_where_it_went_last(stub: Stub) -> None:
    """With another server, model or key: the file names them from the next turn on, and not before."""
    path = store.path_of("moved")
    first = journal.Model(journal.SERVER, "old", "https://h/v1", "")
    journal.Journal.create(path, first).close()
    before = path.read_bytes()
    stub.answers.append((400, {"Content-Type": "application/json"}, b"{}"))
    assert dsv2("chat", "--server", stub.url, "-r", "moved", "-p", "x", "-q").returncode == 1
    assert path.read_bytes() == before
    stub.streams(said("one"))
    asked = ("chat", "--server", stub.url, "-r", "moved", "-p", "x", "-q", "--key-env", "MINE")
    assert dsv2(*asked, MINE=KEY).stdout == "one\n"
    there = journal.Model(journal.SERVER, "m", stub.url, "MINE")
    assert journal.read(path).model == there and store.model_of("moved") == there
    assert journal.beginning(path)[0] == first and KEY.encode() not in path.read_bytes()
    n_lines = len(path.read_bytes().splitlines())
    stub.streams(said("two"))
    stub.keys.clear()
    ran = dsv2("chat", "-r", "moved", "-p", "y", "-q", MINE=KEY)
    assert ran.stdout == "two\n", ran.stderr
    assert stub.keys == [f"Bearer {KEY}"] * 2
    contents = journal.read(path)
    assert contents.model == there and [node.turn.user for node in contents.tree.nodes] == ["x", "y"]
    assert len(path.read_bytes().splitlines()) == n_lines + 1  # it is told once


def test_events_and_names_are_bounded(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "MAX_LINE", 1000)
    server = client.Server(client.address(stub.url))
    for line in (b"data: {}\n", b"data:\n", b"data: " + b"x" * 2000):
        stub.streams(line * 1000)
        with pytest.raises(client.ServerError, match="events of more than 1000 bytes"):
            list(server.answer({}))
    stub.streams(said(*("many" for _ in range(100))))
    assert "".join(part.content for part in server.answer({})) == "many" * 100
    stub.models = 200, json.dumps({"data": [{"id": "x" * 257}, {"id": "y" * 256}]}).encode()
    assert [each.name for each in server.models()] == ["y" * 256]


def test_a_redirect_is_not_followed(stub: Stub) -> None:
    elsewhere = Stub()
    try:
        stub.answers.append((307, {"Location": f"{elsewhere.url}/chat/completions"}, b""))
        done = dsv2("chat", "m", "--server", stub.url, "-p", "x", DSV2_API_KEY=KEY)
        assert_fails(done, 1, "sends on to", elsewhere.url, "307")
        assert not elsewhere.keys
    finally:
        elsewhere.close()


HTML = {"Content-Type": "text/html"}
STREAM = {"Content-Type": "text/event-stream"}


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((500, HTML, b"<html>oops"), ["500"]),
        ((404, HTML, b""), ["404", "ends before /chat/completions"]),
        ((400, {}, b'{"error": "no"}'), ["400", "no"]),
        ((422, {}, b'{"detail": [{"loc": ["body"]}]}'), ["422", '"loc"']),
        ((429, {"Retry-After": "7"}, b'{"message": "full"}'), ["429", "full", "try again in 7 s"]),
        ((400, {}, b"[" * 60000), ["400"]),
        ((200, HTML, b"<html>a page"), ["no chat completion"]),
        ((200, STREAM, b"data: {]\n\n"), ["no chat completion"]),
        ((200, STREAM, b'data: {"error": {"message": "out of\\nmemory"}}\n\n'), ["out of memory"]),
        ((200, STREAM, b""), ["broke off"]),
        ((0, {}, b""), ["closed the connection"]),
    ],
    ids=str,
)
def test_what_goes_wrong_is_told_in_a_line(
    answer: tuple[int, dict[str, str], bytes], words: list[str], stub: Stub
) -> None:
    stub.answers.append(answer)
    assert_fails(dsv2("chat", "--server", stub.url, "-p", "x"), 1, *words)


def test_what_came_before_it_broke_off_stays(stub: Stub, state: Path) -> None:
    stub.streams(event(delta={"content": "Half of"}), said(" it"))
    with talk(stub, state) as screen:
        at = screen.wait_for("> $")
        at = say(
            screen, "x\n", at, r"Half of\nerror: .* broke off in the middle of the answer\nhint: /continue goes on\n> $"
        )
        at = say(screen, "/continue\n", at, r" it\n> $")
        say(screen, "/exit\n", at, "")
        assert screen.exit_code() == 0
    nodes = journal.read(store.existing(store.latest())).tree.nodes
    assert [(n.turn.said.content if n.turn.said else None, n.stop) for n in nodes] == [
        ("Half of", "error"), ("Half of it", "end"),
    ]  # fmt: skip


@pytest.mark.parametrize("begun", [b"", event(delta={"content": "Half of"})], ids=["before", "within"])
def test_ctrl_c_ends_the_answer_and_the_request(begun: bytes, stub: Stub, state: Path) -> None:
    stub.holds = True
    stub.streams(begun, said("Whole"))
    with talk(stub, state) as screen:
        at = screen.wait_for("> $")
        screen.type("x\n")
        screen.wait_for("Half" if begun else "waiting for", at)  # which is wiped off
        assert stub.asked.wait(60)
        at = say(screen, "\x03", at, r"\(stopped\)\n> $")
        assert stub.left.wait(60), "the server still has its client"
        stub.holds = False
        at = say(screen, "y\n", at, r"Whole\n> $")
        say(screen, "/exit\n", at, "")
        assert screen.exit_code() == 0
    kept = [node.turn.user for node in journal.read(store.existing(store.latest())).tree.nodes]
    assert kept == (["x", "y"] if begun else ["y"])
    assert [m["content"] for m in stub.bodies[1]["messages"]] == (["x", "Half of", "y"] if begun else ["y"])


@pytest.mark.parametrize(
    "answer",
    [
        said("Yes", reasoning_content="be\ncause"),
        said("Yes", reasoning="be\ncause"),
        said("<think>\nbe\n", "cause\n</think>\n\nYes"),
    ],
    ids=["reasoning_content", "reasoning", "within"],
)
def test_reasoning_is_told_from_the_answer_and_not_sent_again(answer: bytes, stub: Stub, state: Path) -> None:
    stub.streams(answer, answer, answer, said("ok"))
    told = json.loads(dsv2("chat", "--server", stub.url, "-p", "x", "--json").stdout)
    assert (told["reasoning"], told["answer"]) == ("be\ncause", "Yes")
    shown = dsv2("chat", "--server", stub.url, "-p", "x", "-q").stdout
    assert shown == "<think>\nbe\ncause\n</think>\n\nYes\n"
    with talk(stub, state) as screen:
        at = screen.wait_for("> $")
        at = say(screen, "/think hide\n", at, "> $")
        at = say(screen, "x\n", at, r"\(thought for .*, [12] tokens; .*\)\nYes\n> $")
        at = say(screen, "y\n", at, r"ok\n> $")
        say(screen, "/exit\n", at, "")
        assert screen.exit_code() == 0
    assert [m["content"] for m in stub.bodies[-1]["messages"]] == ["x", "Yes", "y"]


def test_reasoning_that_comes_again_is_kept_without_our_tags(stub: Stub) -> None:
    """Between texts, and in an answer that goes on."""
    deltas = [{"reasoning": "one"}, {"content": "A"}, {"reasoning": "two"}, {"content": "B"}]
    again = [{"reasoning": "three"}, {"content": "C"}]
    stub.streams(*(b"".join(event(delta=d) for d in each) + said("") for each in (deltas, again)))
    conversation = remote.RemoteConversation(client.Server(client.address(stub.url)), client.Listed("m", 0))
    sampling = Sampling(0.7, 40, 0.95, 0.05, 1.0, 1, said=frozenset())

    def shown(text: str | None) -> str:
        pieces = conversation.reply(text, sampling, Stats(), remote.Thinking(), Progress(shown=False))
        return "".join(piece.text for piece in pieces)

    assert shown("x").count("<think>") == 2
    assert conversation.said() == Answer("one\n\ntwo", "AB")
    assert shown(None).count("</think>") == 1
    assert conversation.said() == Answer("one\n\ntwo\n\nthree", "ABC")


def test_a_server_that_does_not_stream(stub: Stub) -> None:
    whole = {"choices": [{"message": {"content": "At once"}, "finish_reason": "stop"}]}
    stub.answers.append((200, {"Content-Type": "application/json"}, json.dumps(whole).encode()))
    done = dsv2("chat", "--server", stub.url, "-p", "x", "-q")
    assert (done.returncode, done.stdout) == (0, "At once\n")


def test_foreign_text_stays_text(stub: Stub, state: Path) -> None:
    """Of the wrong type, or a terminal's."""
    odd = b"".join(
        b"data: " + json.dumps(value).encode() + b"\n\n"
        for value in ({"choices": [7]}, {"choices": {}}, {"usage": [], "choices": [{"delta": {"content": 7}}]}, {})
    )
    usage = {"choices": [], "usage": {"prompt_tokens": "7", "completion_tokens": -1}, "timings": {"prompt_ms": None}}
    stub.streams(odd + b"data: " + json.dumps(usage).encode() + b"\n\n" + said("a\x1b]0;b\x07\ud800"))
    with talk(stub, state) as screen:
        at = screen.wait_for("> $")
        at = say(screen, "x\n", at, r"a\\x1b\]0;b\\x07\\ud800\n> $")
        say(screen, "/exit\n", at, "")
        assert screen.exit_code() == 0
    assert dsv2("chat", "-C", "--server", stub.url, "-p", "x").returncode != 0  # nothing more is to be said
    assert stub.bodies[-1]["messages"][1]["content"] == "a\x1b]0;b\x07\ud800"


def test_which_model(stub: Stub) -> None:
    stub.models = 200, json.dumps({"data": [{"id": "a"}, {"id": "b"}, 7, {"id": None}]}).encode()
    assert_fails(dsv2("chat", "--server", stub.url, "-p", "x"), 2, "has 2 models: a, b", "name one")
    stub.models = 404, b""
    assert_fails(dsv2("chat", "--server", stub.url, "-p", "x"), 1, "404")
    stub.streams(said("ok"))
    assert dsv2("chat", "b", "--server", stub.url, "-p", "x").returncode == 0
    assert stub.bodies[-1]["model"] == "b"
    assert_fails(dsv2("chat", "b", "--server", "127.0.0.1:1", "-p", "x"), 1, "nothing listens", "dsv2 serve")


def test_a_conversation_with_a_model_here_is_another(model: Path, stub: Stub, state: Path) -> None:
    stub.streams(said("ok"))
    for command in (("chat", str(model), "-n", "2"), ("chat", "--server", stub.url)):
        with terminal(*command, XDG_STATE_HOME=str(state)) as screen:
            at = screen.wait_for("> $")
            at = say(screen, "Hi\n", at, r"(-n\)|ok)\n> $")
            say(screen, f"/save {command[1].replace('-', '').replace('/', '')[:6]}\n/exit\n", at, "")
            assert screen.exit_code() == 0
    [here] = [name for name in store.names() if name != "server"]
    assert_fails(dsv2("chat", "--server", stub.url, "-r", here, "-p", "x"), 1, "ran here", f"dsv2 chat -r {here}")
    assert_fails(dsv2("chat", model, "-r", "server", "-p", "x"), 1, "with a server", "dsv2 chat -r server")


@pytest.mark.parametrize(
    "options", [("--kv", "q8_0"), ("-c", "512"), ("--raw",), ("--fim", "a", "b"), ("--lookup", "3"), ("--ram", "all")]
)
def test_what_runs_here_has_no_place_beside_a_server(options: tuple[str, ...]) -> None:
    prompt = () if "--fim" in options else ("-p", "x")
    assert_fails(dsv2("chat", "--server", "127.0.0.1:9", *prompt, *options), 2, "how a model runs here")


def test_each_option_is_of_a_server_too_or_refused_beside_one() -> None:
    """A new one is to be decided on."""
    of_both = {
        "model",
        "prompt",
        "system",
        "think",
        "preset",
        "resume",
        "go_on",
        "server",
        "key_env",
        "no_save",
        "plain",
    }
    of_both |= {"as_json", "quiet", *SAMPLED}
    assert set(inspect.signature(chat).parameters) - {"line"} == of_both | set(RUNS_HERE)


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("http://h:1/v1/", "http://h:1/v1"),
        ("https://h", "https://h/v1"),
        ("localhost:8080", "http://localhost:8080/v1"),
        ("http://[::1]:80/a/chat/completions", "http://[::1]:80/a"),
        ("ftp://h", None),
        ("http://", None),
        ("http://u:p@h", None),
        ("http://h/?a=1", None),
        ("http://h:x", None),
        ("http://h\n", None),
        ("", None),
    ],
)
def test_addresses(text: str, url: str | None) -> None:
    if url is not None:
        assert client.address(text).url == url
        return
    with pytest.raises(UsageError) as told:
        client.address(text)
    assert ":p@" not in str(told.value)
