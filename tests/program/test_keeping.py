"""Conversations on the disk: what was said comes back as it was or is refused, and reopening reads nothing again."""

from __future__ import annotations

import errno
import os
import random
import re
import signal
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.cli import assert_fails, dsv2, terminal
from support.journals import MODEL, shape
from support.sequences import Watched, greedy
from support.tiny import spec_named, variant
from support.vocab import write_model

import cext
from cext import system
from cext.tokenizer import Answer, Message, Tokenizer
from dsv2cli import runtime
from dsv2cli.chat import journal, store
from dsv2cli.chat.caching import Caching
from dsv2cli.chat.conversation import Conversation, Turn
from dsv2cli.chat.journal import Journal, JournalError, Model
from dsv2cli.chat.keeping import Keeping
from dsv2cli.chat.tree import Setting
from dsv2cli.errors import UsageError
from dsv2cli.scheduler import Scheduler, Token

SPEC = variant(spec_named("lite"), n_ctx=4096)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("keeping") / "endless.gguf", SPEC, endless=True)


@pytest.fixture(scope="module")
def other_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same but for its weights."""
    return write_model(tmp_path_factory.mktemp("keeping") / "other.gguf", variant(SPEC, seed=77), endless=True)


@pytest.fixture(scope="module")
def opened(path: Path) -> Iterator[runtime.Runtime]:
    with runtime.open_model(path, 1) as found:
        yield found


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state"


class Talk:
    """A conversation that is kept, and what its engine evaluated."""

    def __init__(self, opened: runtime.Runtime, n_ctx: int = 2048, kv: str = "f16", *, keeps: bool = True) -> None:
        self.watched = Watched()
        session = opened.model.session(n_ctx, kv)
        self.conversation = Conversation(session, opened.tokenizer, "Be brief.", scheduler=Scheduler(self.watched))
        self.keeping = Keeping(Caching(opened, self.conversation), self.conversation, {"temperature": 0.0}, keeps)

    def say(self, text: str, limit: int = 6) -> list[int]:
        events = list(self.conversation.reply(text, greedy(), limit))
        self.keeping.close_turn("length")
        return [event.id for event in events if isinstance(event, Token)]

    def again(self, limit: int = 6) -> None:
        last = self.keeping.last()
        assert last is not None
        with self.keeping.answering_at(last.parent):
            self.say(last.turn.user, limit)


def test_a_full_disk_loses_nothing_that_was_said(
    opened: runtime.Runtime, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    talk = Talk(opened)
    talk.say("one")
    whole = system.write_at

    def full(fd: int, data: bytes, offset: int) -> None:
        whole(fd, data[: len(data) // 2], offset)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(system, "write_at", full)
    talk.say("two")
    talk.say("three")
    assert capsys.readouterr().err.count("warning: the conversation is not kept") == 1
    assert len(journal.read(store.existing(talk.keeping.name)).tree.nodes) == 1
    monkeypatch.setattr(system, "write_at", whole)
    talk.say("four")
    found = journal.read(store.existing(talk.keeping.name))
    assert shape(found.tree) == shape(talk.keeping.tree) and len(found.tree.nodes) == 4


# The conversation.


def test_retry_is_a_branch_and_clear_another_conversation(opened: runtime.Runtime) -> None:
    talk = Talk(opened)
    first = talk.say("Hi")
    talk.say("And?")
    talk.watched.evaluated.clear()
    talk.again()
    tree = talk.keeping.tree
    assert [node.parent for node in tree.nodes] == [0, 1, 1] and tree.head == 3
    assert tree.node(2).turn.answer == tree.node(3).turn.answer
    assert len(talk.watched.evaluated) == 6  # the last token of the prompt, and the answer but its last
    name = talk.keeping.name
    talk.keeping.begin_anew()
    assert talk.conversation.turns == [] and talk.keeping.name == ""
    assert talk.say("Hi") == first
    assert len(store.names()) == 2 and len(journal.read(store.existing(name)).tree.nodes) == 3


@pytest.mark.parametrize("past", [[], ["Hi"], ["Hi", "the end", "the end"]])
@pytest.mark.parametrize("how", ["ctrl-c", "cancelled", "too long", "token"])
def test_a_retry_that_fails_keeps_the_turn(opened: runtime.Runtime, past: list[str], how: str) -> None:
    """Before the first token the old answer is what there is; from then on the new one."""
    talk = Talk(opened, 512, keeps=False)
    for text in [*past, "And?"]:
        talk.say(text)
    before = list(talk.conversation.turns)
    if how == "too long":
        talk.conversation.system = "x" * 600
    elif how != "token":

        def ctrl_c() -> None:
            raise KeyboardInterrupt

        talk.watched.calls = 0
        talk.watched.raises = {1: ("before", ctrl_c if how == "ctrl-c" else talk.conversation.cancel)}
    errors = {"ctrl-c": KeyboardInterrupt, "too long": cext.ContextFullError}
    if how in errors:
        with pytest.raises(errors[how]):
            talk.again(1)
    else:
        talk.again(1)
    turns = talk.conversation.turns
    assert [len(turn.answer) for turn in turns] == [6] * len(past) + [1 if how == "token" else 6]
    assert all(a is b for a, b in zip(turns[:-1], before, strict=False))
    assert (turns[-1] is before[-1]) == (how != "token")


def test_a_failed_turn_is_followed_by_the_right_one(opened: runtime.Runtime) -> None:
    """After a step back, what fails leaves the conversation where it stood."""
    talk = Talk(opened, 512)
    for text in ("one", "two", "three"):
        talk.say(text)
    talk.keeping.go_to(1)
    with pytest.raises(cext.ContextFullError):
        talk.say("x" * 600)
    talk.keeping.close_turn("error")
    assert [turn.user for turn in talk.conversation.turns] == ["one"] and len(talk.keeping.tree.nodes) == 3
    talk.say("four")
    assert [node.turn.user for node in talk.keeping.tree.path()] == ["one", "four"]


@pytest.mark.parametrize("limits", [(3, 5), (1, 7), (7, 1)])
def test_an_answer_goes_on_as_if_it_had_not_stopped(opened: runtime.Runtime, limits: tuple[int, int]) -> None:
    whole = Talk(opened, keeps=False).say("Tell me", 8)
    talk = Talk(opened, keeps=False)
    talk.say("Tell me", limits[0])
    last = talk.keeping.last()
    assert last is not None
    with talk.keeping.answering_at(last.parent):
        talk.conversation.turns.append(last.turn)
        list(talk.conversation.go_on(greedy(), limits[1]))
        talk.keeping.close_turn("length")
    assert talk.conversation.turns[-1].answer == whole
    assert talk.keeping.tree.node(1).turn.answer == whole[: limits[0]], "the shorter answer is a branch"


def test_going_on_with_nothing_new_leaves_the_answer(opened: runtime.Runtime) -> None:
    talk = Talk(opened, keeps=False)
    talk.say("Tell me", 4)
    turn = talk.conversation.turns[-1]
    talk.watched.calls, talk.watched.raises = 0, {1: ("before", talk.conversation.cancel)}
    list(talk.conversation.go_on(greedy(), 5))
    talk.keeping.close_turn("cancelled")
    assert talk.conversation.turns == [turn] and talk.conversation.turns[0] is turn and len(turn.answer) == 4


def test_nothing_new_is_no_branch(opened: runtime.Runtime) -> None:
    """/continue where the answer cannot go on."""
    talk = Talk(opened)
    talk.say("one")
    talk.say("two")
    last = talk.keeping.last()
    assert last is not None
    talk.watched.calls, talk.watched.raises = 0, {1: ("before", talk.conversation.cancel)}
    with talk.keeping.answering_at(last.parent):
        talk.conversation.turns.append(last.turn)
        list(talk.conversation.go_on(greedy(), 5))
        talk.keeping.close_turn("cancelled")
    assert len(talk.keeping.tree.nodes) == 2 and talk.keeping.last() is last
    assert [turn.user for turn in talk.conversation.turns] == ["one", "two"]
    assert len(journal.read(store.existing(talk.keeping.name)).tree.nodes) == 2


@pytest.mark.parametrize("where", ["identity", "create", "add"])
def test_ctrl_c_leaves_a_turn_in_the_tree_and_in_the_file(
    where: str, opened: runtime.Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk = Talk(opened)
    place: object = {"identity": store, "create": Journal, "add": Journal}[where]
    usual = getattr(place, where)

    def interrupted(*args: object) -> object:
        signal.raise_signal(signal.SIGINT)
        return usual(*args)

    with monkeypatch.context() as patch:
        patch.setattr(place, where, interrupted)
        with pytest.raises(KeyboardInterrupt):  # told, but when all is done
            talk.say("one")
    talk.say("two")
    found = journal.read(store.existing(talk.keeping.name)).tree
    assert shape(found) == shape(talk.keeping.tree) and [node.parent for node in found.nodes] == [0, 1]


def test_a_name_that_another_takes_first(opened: runtime.Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """As two conversations that close their first turn at once see it."""
    usual = store.free_name
    asked: list[str] = []

    def slow() -> str:
        asked.append(usual())
        if len(asked) == 1:
            Journal.create(store.path_of(asked[0]), MODEL).close()
        return asked[-1]

    monkeypatch.setattr(store, "free_name", slow)
    talk = Talk(opened)
    talk.say("one")
    assert talk.keeping.name == asked[1] != asked[0]
    assert len(journal.read(store.existing(talk.keeping.name)).tree.nodes) == 1


# Reopened.


def reopened(opened: runtime.Runtime, name: str, n_ctx: int = 2048, kv: str = "f16") -> Talk:
    talk = Talk(opened, n_ctx, kv)
    talk.conversation.system = "another"
    talk.keeping.reopen(name)
    return talk


def two_turns(opened: runtime.Runtime) -> tuple[str, list[int]]:
    """The name of a conversation of two turns that was left, and what a third one answers."""
    talk = Talk(opened)
    talk.say("Tell me a long story " * 20)
    talk.say("And?")
    name = talk.keeping.name
    talk.keeping.leave()
    third = reopened(opened, name)
    answer = third.say("the end")
    third.keeping.go_to(2)
    third.keeping.leave()
    return name, answer


def test_reopened_it_reads_what_is_new_alone(opened: runtime.Runtime) -> None:
    name, _ = two_turns(opened)
    talk = reopened(opened, name)
    assert talk.conversation.system == "Be brief." and len(talk.conversation.turns) == 2
    answer = talk.say("the end")
    new = len(opened.tokenizer.chat([Message("user", "the end")]))
    assert len(talk.watched.evaluated) <= new + len(answer) + 2
    fresh = Talk(opened, keeps=False)
    fresh.conversation.turns[:] = talk.conversation.turns[:-1]
    assert fresh.say("the end") == answer and len(fresh.watched.evaluated) > 200


@pytest.mark.parametrize("what", ["missing", "cut", "flipped", "version", "no cache", "another type", "too short"])
def test_a_cache_of_no_use_is_told_and_read_again(
    what: str, opened: runtime.Runtime, capsys: pytest.CaptureFixture[str]
) -> None:
    name, answer = two_turns(opened)
    cache = store.cache_of(store.existing(name))
    data = cache.read_bytes()
    changed = {
        "cut": data[: len(data) // 2],
        "flipped": data[:5000] + bytes([data[5000] ^ 4]) + data[5001:],
        "version": data[:8] + b"\x09" + data[9:],
        "no cache": b"hello",
    }
    if what == "missing":
        cache.unlink()
    elif what in changed:
        cache.write_bytes(changed[what])
    capsys.readouterr()
    kv, n_ctx = "q8_0" if what == "another type" else "f16", 256 if what == "too short" else 2048
    talk = reopened(opened, name, n_ctx, kv)
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "the text will be read again" in told
    if what == "missing":
        assert "it has no cache" in told
    if what not in ("another type", "too short"):
        assert talk.say("the end") == answer and len(talk.watched.evaluated) > 200


def test_a_cache_of_another_conversation_is_no_harm(opened: runtime.Runtime) -> None:
    """It is compared token by token."""
    name, answer = two_turns(opened)
    other = Talk(opened)
    other.say("Something else " * 30)
    other.keeping.leave()
    theirs = store.cache_of(store.existing(store.latest()))
    store.cache_of(store.existing(name)).write_bytes(theirs.read_bytes())
    assert reopened(opened, name).say("the end") == answer


@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize("where", ["no cache", "at its beginning"])
def test_a_loaded_conversation_takes_nothing_of_the_one_before(
    where: str, keeps: bool, opened: runtime.Runtime
) -> None:
    name, answer = two_turns(opened)
    cache = store.cache_of(store.existing(name))
    cache.unlink()
    if where == "at its beginning":
        there = reopened(opened, name)
        there.keeping.go_to(0)
        there.keeping.leave()
    talk = Talk(opened, keeps=keeps)
    talk.say("a secret " * 20)
    talk.keeping.reopen(name)
    assert talk.conversation.session.n_past == 0
    talk.keeping.leave()
    assert not cache.exists()
    again = reopened(opened, name)
    if where == "no cache":
        assert again.say("the end") == answer


def test_ctrl_c_while_the_cache_is_kept_leaves_both_conversations(
    opened: runtime.Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, _ = two_turns(opened)
    talk = Talk(opened)
    talk.say("one")
    mine = talk.keeping.name

    def ctrl_c(path: Path, nbytes: int) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store, "why_no_room", ctrl_c)
        for leaving in (lambda: talk.keeping.reopen(name), talk.keeping.begin_anew):
            with pytest.raises(KeyboardInterrupt):
                leaving()
    Journal.reopen(store.existing(name)).close()  # nothing holds it
    talk.say("two")
    assert talk.keeping.name == mine and len(journal.read(store.existing(mine)).tree.nodes) == 2


def test_ctrl_c_while_one_is_loaded_comes_when_it_is(
    opened: runtime.Runtime, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else an empty session would be kept in the place of its cache, and a torn turn go untold."""
    name, _ = two_turns(opened)
    with store.existing(name).open("ab") as file:
        file.write(b'{"parent": 2')
    talk, let_go = Talk(opened), Caching.let_go

    def interrupted(self: Caching, *, empty: bool = False) -> None:
        signal.raise_signal(signal.SIGINT)
        let_go(self, empty=empty)

    with monkeypatch.context() as patch:
        patch.setattr(Caching, "let_go", interrupted)
        with pytest.raises(KeyboardInterrupt):
            talk.keeping.reopen(name)
    assert "the last turn was not whole" in capsys.readouterr().err
    assert talk.keeping.name == name and talk.conversation.session.n_past > 200


def test_branches_and_settings_come_back(opened: runtime.Runtime) -> None:
    talk = Talk(opened)
    talk.say("one")
    talk.conversation.system = "Be long."
    talk.say("two")
    talk.keeping.go_to(1)
    talk.say("three")
    talk.keeping.rename("a-name")
    talk.keeping.go_to(2)
    before = shape(talk.keeping.tree)
    talk.keeping.leave()
    again = reopened(opened, "a-name")
    assert shape(again.keeping.tree) == before and again.keeping.tree.head == 2
    assert again.conversation.system == "Be long." and [t.user for t in again.conversation.turns] == ["one", "two"]
    assert store.cache_of(store.existing("a-name")).is_file()


def test_how_full_the_context_is_before_anything_of_it_is_read(opened: runtime.Runtime) -> None:
    """The cache still holds another branch, or nothing."""
    talk, tokenizer = Talk(opened), opened.tokenizer
    conversation = talk.conversation

    def taken() -> int:
        messages = [Message("system", conversation.system or "")]
        for turn in conversation.turns:
            messages += [Message("user", turn.user), Message("assistant", turn.answer)]
        end = messages.pop().content if conversation.turns else []
        return len(tokenizer.chat(messages)) + len(end) if conversation.turns else 0

    assert conversation.n_used == 0
    talk.say("one")
    talk.say("two " * 50, limit=40)
    assert conversation.n_used == taken()
    talk.keeping.go_to(1)
    assert conversation.n_used == taken() < 100
    talk.say("three")
    assert abs(conversation.n_used - conversation.session.n_past) <= 1  # the last token is not evaluated
    talk.keeping.go_to(2)
    assert conversation.n_used == taken() > conversation.session.n_past + 40
    conversation.system = "Be very long. " * 20
    assert conversation.n_used == taken()
    talk.keeping.go_to(0)
    assert conversation.n_used == 0
    talk.keeping.go_to(2)
    talk.keeping.rename("full")
    n = conversation.n_used
    talk.keeping.leave()
    store.cache_of(store.existing("full")).unlink(missing_ok=True)
    small = Talk(opened, n_ctx=128)
    small.keeping.reopen("full")
    assert small.conversation.session.n_past == 0
    assert small.conversation.n_used == 128 < n  # the oldest turns go before the next answer


def test_a_context_is_not_made_again_to_be_counted(opened: runtime.Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a long one that takes a second."""
    talk = Talk(opened)
    for text in ("one", "two"):
        talk.say(text)
        with monkeypatch.context() as patch:
            patch.setattr(Conversation, "_prompt", lambda *_: pytest.fail("made again"))
            n = talk.conversation.n_used
        talk.conversation._counted = None, 0
        assert talk.conversation.n_used == n > 0


def test_counting_a_context_changes_no_answer(opened: runtime.Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """A turn's own opening stays as it was, whatever reasoning is set to since."""
    talk = Talk(opened)
    talk.say("one")
    opening = list(talk.conversation.turns[0].opening)
    monkeypatch.setattr(Tokenizer, "opening", lambda self, prompt: list(prompt[-2:]))
    talk.conversation.system = "Be long."
    assert talk.conversation.n_used > 0
    assert talk.conversation.turns[0].opening == opening
    talk.say("two")
    assert len(talk.conversation.turns[1].opening) == 2


def test_names(opened: runtime.Runtime, state: Path) -> None:
    talk = Talk(opened)
    with pytest.raises(UsageError, match="nothing to keep yet"):
        talk.keeping.rename("x")
    talk.say("one")
    for wrong in ("", "a b", "../x", ".x", "a/b", "-r", "x" * 101, "a\n"):
        with pytest.raises(UsageError, match="is no name"):
            talk.keeping.rename(wrong)
    talk.keeping.rename("reise.2")
    other = Talk(opened)
    other.say("two")
    with pytest.raises(UsageError, match="already"):
        other.keeping.rename("reise.2")
    with pytest.raises(JournalError, match="open in another"):
        other.keeping.reopen("reise.2")
    assert other.keeping.tree.nodes[0].turn.user == "two" and other.say("three")
    with pytest.raises(UsageError, match="there is no conversation `nope`"):
        other.keeping.reopen("nope")
    assert stat.S_IMODE((state / "dsv2" / "conversations").stat().st_mode) == 0o700


def test_another_model_is_refused(path: Path, other_path: Path, opened: runtime.Runtime) -> None:
    name, _ = two_turns(opened)
    with runtime.open_model(other_path, 1) as other:
        talk = Talk(other)
        with pytest.raises(JournalError, match="with another model, ") as refused:
            talk.keeping.reopen(name)
    assert str(path) in refused.value.hint and f"-r {name}" in refused.value.hint


def test_tokens_that_the_vocabulary_lacks_are_refused(opened: runtime.Runtime) -> None:
    named = Model(store.identity(opened.path), "m", str(opened.path))
    kept = Journal.create(store.path_of("forged"), named)
    kept.add(kept.tree.add(Turn("a", [opened.tokenizer.n_vocab]), Setting(), "end"), Answer(None, ""))
    kept.close()
    with pytest.raises(JournalError, match="vocabulary"):
        Talk(opened).keeping.reopen("forged")


def test_caches_keep_within_their_bound(opened: runtime.Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [two_turns(opened)[0] for _ in range(3)]
    caches = [store.cache_of(store.existing(name)) for name in found]
    assert len(set(found)) == 3 and all(cache.exists() for cache in caches)
    for age, cache in enumerate(caches):
        os.utime(cache, (0, time.time() - 100 + age))
    abandoned = caches[0].with_name(f".{caches[0].name}.xyz")
    abandoned.write_bytes(b"x")
    os.utime(abandoned, (0, time.time() - 2 * store.ABANDONED))
    monkeypatch.setattr(store, "CACHES_BYTES", int(2.5 * caches[0].stat().st_size))
    store.prune(caches[2])
    assert [cache.exists() for cache in caches] == [False, True, True] and not abandoned.exists()
    monkeypatch.setattr(store, "CACHES_BYTES", 100)
    assert "larger than all caches" in store.why_no_room(caches[2], 200)
    assert len(store.names()) == 3


# The program.


def test_the_command_line(path: Path, other_path: Path, opened: runtime.Runtime, state: Path) -> None:
    name, answer = two_turns(opened)
    env = {"XDG_STATE_HOME": str(state)}
    said = opened.tokenizer.decode(answer).lstrip()
    options = ("-n", "6", "--temp", "0", "-q")
    done = dsv2("chat", "-r", name, "-p", "the end", *options, **env)  # with the model that it was with
    assert done.returncode == 0 and done.stdout.rstrip("\n") == said.rstrip("\n"), done
    assert [node.turn.user for node in journal.read(store.existing(name)).tree.path()][-1] == "the end"
    done = dsv2("chat", path, "-C", "-p", "x", "--json", "-n", "1", **env)
    assert done.returncode == 0 and len(journal.read(store.existing(name)).tree.path()) == 4
    assert dsv2("chat", path, "-p", "x", "-n", "1", "-q", **env).returncode == 0
    assert len(store.names()) == 1, "an answer to -p is not kept by itself"
    assert_fails(dsv2("chat", other_path, "-r", name, "-p", "x", **env), 1, "another model", str(path))
    assert_fails(dsv2("chat", "-r", "nope", "-p", "x", **env), 2, "nope", name)
    assert_fails(dsv2("chat", "-r", "../x", "-p", "x", **env), 2, "is no name")
    assert_fails(dsv2("chat", "-r", name, "-C", "-p", "x", **env), 2, "go on with one")
    assert_fails(dsv2("chat", "-r", name, "--raw", "-p", "x", **env), 2, "--raw")
    assert_fails(dsv2("chat", "-C", "-p", "x", XDG_STATE_HOME=str(state / "none")), 2, "no conversation to go on with")
    store.existing(name).write_bytes(store.existing(name).read_bytes().replace(b"And?", b"And!"))
    assert_fails(dsv2("chat", "-r", name, "-p", "x", **env), 1, "damaged: line 3 has changed", "head -n 2")


@pytest.mark.parametrize("term", ["xterm", "linux", "dumb"])
def test_nothing_is_kept_where_that_is_asked_for(term: str, path: Path, state: Path) -> None:
    with terminal("chat", path, "-n", "4", "--temp", "0", "--no-save", TERM=term, XDG_STATE_HOME=str(state)) as screen:
        at = screen.wait_for("> ")
        screen.type("Hi\n")
        screen.wait_for(r"-n\)\n", at)
        screen.type("/save x\n")
        screen.wait_for("not kept", at)
        screen.type("/exit\n")
        assert screen.exit_code() == 0
    history = state / "dsv2" / "history"
    assert not (state / "dsv2" / "conversations").exists() and not (history.exists() and history.read_bytes())


@pytest.mark.parametrize("n", [10, pytest.param(200, marks=pytest.mark.heavy)])
def test_kill_9_at_any_moment_loses_the_open_turn_at_most(n: int, path: Path, state: Path) -> None:
    """Closed turns are those that a prompt has followed. Greedy: what is there must be what an unbroken run says."""
    rng = random.Random(n)
    options = ("-n", "5", "--temp", "0", "-c", "512", "--kv", "f32")  # what was rounded alike however it was read
    env = {"XDG_STATE_HOME": str(state), "TERM": "dumb"}
    asked = 0
    for _ in range(n):
        goes_on = bool(store.names())
        with terminal("chat", path, *options, *(["-C"] if goes_on else []), **env) as screen:
            at = screen.wait_for(r"> $")
            closed = len(journal.read(store.existing(store.latest())).tree.nodes) if goes_on else 0
            begun = len(screen.text[:at])
            screen.type("".join(f"question {asked + i}\n" for i in range(400)))
            end = time.monotonic() + rng.uniform(0, 0.6)
            while time.monotonic() < end:
                screen._read(0.01)
            screen.process.send_signal(signal.SIGKILL)
            screen.process.wait()
            while screen._read(0):
                pass
            closed += len(re.findall(r"\(stopped after 5 tokens: -n\)\n(?=> )", screen.text[begun:]))
        if not store.names():
            assert not closed
            continue
        tree = journal.read(store.existing(store.latest())).tree
        assert closed <= len(tree.nodes) <= closed + 1, screen.text
        asked += 400
    assert len(store.names()) == 1
    found = journal.read(store.existing(store.latest())).tree
    assert [node.parent for node in found.nodes] == list(range(len(found.nodes)))
    with runtime.open_model(path, 1) as opened:
        fresh = Talk(opened, 512, "f32", keeps=False)
        fresh.conversation.system = None
        for node in found.nodes:
            assert fresh.say(node.turn.user, 5) == node.turn.answer
