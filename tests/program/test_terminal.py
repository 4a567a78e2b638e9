"""What is typed is what is said: pastes, type-ahead, continued lines, spaces; terminals that obey nothing."""

from __future__ import annotations

import errno
import re
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from support.cli import Screen, environment, terminal
from support.tiny import spec_named, variant
from support.vocab import write_model

from cext import system
from cext.tokenizer import Message, Tokenizer
from dsv2cli.chat import history

AHEAD = ["second\n/stats\n/exit\n", "second\r/stats\r/exit\r", "\x1b[200~a\nb\x1b[201~\n/stats\n\x04"]
SYSTEM = ["/system You are brief. \\\nAlways.", "\x1b[200~/system You are brief. \nAlways.\x1b[201~"]
TERMINALS = {
    "xterm-256color": True,
    "tmux": True,
    "linux": True,
    "dumb": False,
}  # whether pastes are marked
PASTE = "\x1b[200~{}\x1b[201~"
ENDLESS = ("-n", "1000000", "-c", "200000")  # an answer that lasts until it is stopped
CODE = "    if x:\n        y = 1\n\n    # end  "


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = variant(spec_named("lite"), n_ctx=4096)
    return write_model(tmp_path_factory.mktemp("terminal") / "endless.gguf", spec, endless=True)


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Tokenizer:
    return Tokenizer(model)


def talk(model: Path, state: Path, *more: str, **env: str):
    options = ("-n", "4", "--temp", "0", *more)
    return terminal("chat", model, *options, XDG_STATE_HOME=str(state), **env)


def read_by(screen: Screen, at: int) -> int:
    """Tokens of the last prompt, as /stats says."""
    screen.type("/stats\n")
    at = screen.wait_for(r"read \d+ tokens( \(\d+ kept\))? at", at)
    counts = re.findall(r"read (\d+) tokens(?: \((\d+) kept\))? at", screen.text[:at])[-1]
    return sum(int(n) for n in counts if n)


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (PASTE.format("one\n\ntwo\nthree"), "one\n\ntwo\nthree"),
        (PASTE.format(CODE), CODE),
        ("  two spaces before, three after   ", "  two spaces before, three after   "),
        ("one\\\n  two\\\nthree", "one\n  two\nthree"),
        (PASTE.format("a\\\nb") + " c", "a\\\nb c"),
        (PASTE.format(" /system x\n/exit"), " /system x\n/exit"),
        ("né 模型 🦙", "né 模型 🦙"),
    ],
)  # fmt: skip
def test_one_message(typed: str, said: str, model: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    with talk(model, tmp_path) as screen:
        at = screen.wait_for("> $")
        screen.type(typed + "\n")
        at = screen.wait_for(r"\(stopped after 4 tokens: -n\)\n> $", at)
        assert read_by(screen, at) == len(tokenizer.chat([Message("user", said)]))
        screen.wait_for("1 turn,", at)


def test_lines_that_come_together_are_lines(model: Path, tmp_path: Path) -> None:
    with talk(model, tmp_path) as screen:
        at = screen.wait_for("> $")
        screen.type("first\nsecond\n/stats\n/exit\n")
        at = screen.wait_for("2 turns,", at)
        assert screen.exit_code() == 0


def stop(screen: Screen) -> None:
    """As Ctrl-C does, but for the keys that it would take along."""
    screen.process.send_signal(signal.SIGINT)


@pytest.mark.parametrize("ahead", AHEAD)
def test_what_is_typed_while_an_answer_is_written(ahead: str, model: Path, tmp_path: Path) -> None:
    with talk(model, tmp_path, *ENDLESS) as screen:
        at = screen.wait_for("> $")
        screen.type("Tell me a long story.\n")
        screen.wait_for(r"story\.\n(.|\n){40}", at)
        begun = len(screen.text)
        screen.type(ahead)
        screen.wait_for(r"(.|\n){400}", begun)
        stop(screen)
        at = screen.wait_for(r"\(stopped\)\n> (second|a\n *b)\n(.|\n){40}", begun)
        stop(screen)
        screen.wait_for("2 turns, ", at)
        assert screen.exit_code() == 0
        answer = screen.text[begun : screen.text.index("> ", begun)]
        assert "second" not in answer and "/exit" not in answer  # no echo between the words


def test_a_long_line_typed_ahead_is_whole(model: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    """A terminal that edits lines by itself keeps 4095 bytes of one."""
    long = "the User " * 600
    with talk(model, tmp_path, *ENDLESS) as screen:
        at = screen.wait_for("> $")
        screen.type("Hi\n")
        screen.wait_for(r"Hi\n(.|\n){40}", at)
        begun = len(screen.text)
        screen.type("/set max-tokens 4\n/clear\n" + long + "\n")
        screen.wait_for(r"(.|\n){400}", begun)
        stop(screen)
        at = screen.wait_for(r"\(stopped\)\n(.|\n)*\(stopped after 4 tokens: -n\)\n> $", begun)
        assert read_by(screen, at) == len(tokenizer.chat([Message("user", long)]))


@pytest.mark.parametrize("typed", SYSTEM)
def test_a_system_message_of_two_lines(typed: str, model: Path, tmp_path: Path) -> None:
    with talk(model, tmp_path) as screen:
        at = screen.wait_for("> $")
        screen.type(typed + "\n")
        at = screen.wait_for(r"Always\.\n> $", at)
        screen.type("/system\n")
        at = screen.wait_for(r"/system\nYou are brief\. \nAlways\.\n> $", at)
        screen.type("/stats\n")
        at = screen.wait_for("0 turns,", at)
        screen.type("/system none\n/system\n")
        screen.wait_for(r"\(no system message\)", at)


def test_bytes_that_are_no_text_are_refused_and_the_talk_goes_on(model: Path, tmp_path: Path) -> None:
    with talk(model, tmp_path) as screen:
        at = screen.wait_for("> $")
        screen.type(b"n\xe9\xff\n")
        at = screen.wait_for(r"error: what was typed is not UTF-8 text: byte 1 is 0xe9\n(.|\n)*> $", at)
        screen.type("Hi\n")
        screen.wait_for(r"\(stopped after 4 tokens: -n\)\n> $", at)


def test_a_retry_that_is_refused_keeps_the_turn(model: Path, tmp_path: Path) -> None:
    with talk(model, tmp_path, "-c", "256") as screen:
        at = screen.wait_for("> $")
        screen.type("Hi\n")
        at = screen.wait_for(r"-n\)\n> $", at)
        screen.type(f"/system {'zx' * 150}\n/retry\n")
        at = screen.wait_for(r"do not fit in a context of 256(.|\n)*> $", at)
        screen.type("/stats\n")
        at = screen.wait_for(r"1 turn, \d+ of 256", at)
        screen.type("/system none\n/retry\n")
        screen.wait_for(r"/retry\n(.|\n)*-n\)\n> $", at)


def test_reasoning_that_the_template_does_not_know(model: Path, tmp_path: Path) -> None:
    with talk(model, tmp_path) as screen:
        at = screen.wait_for("> $")
        screen.type("/think on\n")
        at = screen.wait_for(r"error:.*cannot switch reasoning on(.|\n)*hint: /think auto(.|\n)*> $", at)
        screen.type("/think\n")
        at = screen.wait_for(r"/think\nauto, shown\n> $", at)
        screen.type("/think maybe\n")
        at = screen.wait_for(r"/think takes on, off, auto, show or hide, and not maybe\n> $", at)
        screen.type("Hi\n")
        screen.wait_for(r"-n\)\n> $", at)
    with talk(model, tmp_path, "--think", "on") as screen:
        assert screen.exit_code() == 1 and re.search(r"reasoning on(.|\n)*hint: --think auto", screen.text)


def test_the_list_of_commands_is_aligned(model: Path, tmp_path: Path) -> None:
    with talk(model, tmp_path) as screen:
        at = screen.wait_for("> $")
        screen.type("/help\n")
        end = screen.wait_for(r"stops an answer\.\n> $", at)
        lines = re.findall(r"^  (/\S+(?: \S+){0,2}  +)\S", screen.text[at:end], re.MULTILINE)
        assert len(lines) == 17 and len({len(line) for line in lines}) == 1


@pytest.mark.parametrize("name", ["dumb", "", "unknown"])
def test_terminals_that_obey_nothing(name: str, model: Path, tmp_path: Path) -> None:
    with talk(model, tmp_path, TERM=name) as screen:
        at = screen.wait_for("> $")
        screen.type("the User " * 200 + "\n")  # long enough for progress
        at = screen.wait_for(r"\(stopped after 4 tokens: -n\)\n> $", at)
        screen.type("/nonsense\n/exit\n")
        assert screen.exit_code() == 0
        assert b"\x1b" not in screen.raw, screen.raw


@pytest.mark.parametrize("name", TERMINALS)
def test_pastes_are_marked_where_the_terminal_can(name: str, model: Path, tmp_path: Path) -> None:
    with talk(model, tmp_path, TERM=name) as screen:
        at = screen.wait_for("> $")
        screen.type("Hi\n")
        at = screen.wait_for(r"-n\)\n> $", at)
        screen.type("\x04")
        assert screen.exit_code() == 0
        assert (b"\x1b[?2004h" in screen.raw) == TERMINALS[name] and b"\x1b[6n" not in screen.raw


def assert_left_as_it_was(screen: Screen) -> None:
    assert screen.raw.rfind(b"\x1b[?2004h") <= screen.raw.rfind(b"\x1b[?2004l"), "pastes are still marked"
    flags = termios.tcgetattr(screen.theirs)[3]
    assert flags & termios.ECHO and flags & termios.ICANON, "the terminal does not echo"


BREAK = "import dsv2cli.chat.answering as r; r.LocalChat.tell_stats = None; "


@pytest.mark.parametrize("how", ["exit", "ctrl-d", "ctrl-c and exit", "crash", "SIGTERM", "SIGTERM in an answer"])
def test_the_terminal_is_left_as_it_was(how: str, model: Path, tmp_path: Path) -> None:
    n = ENDLESS if "answer" in how or "ctrl-c" in how else ("-n", "4")
    with terminal(
        "chat", model, *n, "--temp", "0",
        before=BREAK if how == "crash" else "", keep=True, XDG_STATE_HOME=str(tmp_path),
    ) as screen:  # fmt: skip
        at = screen.wait_for("> $")
        screen.type("Hi\n")
        if how == "crash":
            screen.type("/stats\n")
            assert screen.exit_code() == 1 and "internal error" in screen.text
        elif how == "ctrl-c and exit":
            screen.wait_for(r"Hi\n(.|\n){40}", at)
            screen.type("\x03")
            at = screen.wait_for(r"\(stopped\)\n> $", at)
            screen.type("/exit\n")
            assert screen.exit_code() == 0
        elif how.startswith("SIGTERM"):
            at = screen.wait_for(r"Hi\n(.|\n){40}" if "answer" in how else r"-n\)\n> $", at)
            time.sleep(0.2)
            screen.process.send_signal(signal.SIGTERM)
            assert screen.exit_code() == -signal.SIGTERM
        else:
            at = screen.wait_for(r"-n\)\n> $", at)
            screen.type({"exit": "/exit\n", "ctrl-d": "\x04"}[how])
            assert screen.exit_code() == 0
        assert_left_as_it_was(screen)


def test_sigterm_within_the_event_loop_ends_the_program(model: Path, tmp_path: Path) -> None:
    """Which reports most exceptions of its callbacks, waits for Enter, and goes on."""
    stop = "'x' in typed and os.kill(os.getpid(), 15) or ''"
    stop = f"import os, dsv2cli.chat.repl as r; r.Repl.meter = lambda self, typed: {stop}; "
    with terminal("chat", model, before=stop, keep=True, XDG_STATE_HOME=str(tmp_path)) as screen:
        screen.wait_for("> $")
        screen.type("x")
        assert screen.exit_code() == -signal.SIGTERM and "Unhandled" not in screen.text
        assert_left_as_it_was(screen)


def test_no_home(model: Path, tmp_path: Path) -> None:
    """A user that no file knows, in a container: no history, and nothing else is missing."""
    nobody = "import pwd; pwd.getpwuid = lambda uid: (_ for _ in ()).throw(KeyError(uid)); "
    with terminal("chat", model, "-n", "4", "--temp", "0", before=nobody, HOME=None, XDG_STATE_HOME=None) as screen:
        at = screen.wait_for("> $")
        screen.type("Hi\n")
        at = screen.wait_for(r"> $", at)
        screen.type("/exit\n")
        assert screen.exit_code() == 0 and "error" not in screen.text


def history_of(state: Path) -> list[str]:
    return (state / "dsv2" / "history").read_text(encoding="utf-8").splitlines()


def test_two_conversations_keep_each_other_s_history(model: Path, tmp_path: Path) -> None:
    with talk(model, tmp_path) as one, talk(model, tmp_path) as other:
        for screen in (one, other):
            screen.wait_for("> $")
        for screen, typed in ((one, "/help a"), (other, "/help b"), (one, "/help c")):
            at = len(screen.text)
            screen.type(f"{typed}\n")
            screen.wait_for(r"stops an answer\.\n> $", at)
        for screen in (other, one):
            screen.type("/exit\n")
            assert screen.exit_code() == 0
    assert history_of(tmp_path) == ["/help a", "/help b", "/help c", "/exit", "/exit"]
    with talk(model, tmp_path) as screen:
        at = screen.wait_for("> $")
        screen.type("\x1b[A" * 3 + "\n")  # back past both /exit
        screen.wait_for(r"stops an answer\.\n> $", at)
    assert history_of(tmp_path)[-1] == "/help c"


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGKILL])
def test_history_outlives_what_ends_the_conversation(number: signal.Signals, model: Path, tmp_path: Path) -> None:
    with talk(model, tmp_path) as screen:
        at = screen.wait_for("> $")
        screen.type("né 模型\n")
        screen.wait_for(r"-n\)\n> $", at)
        screen.process.send_signal(number)
        assert screen.exit_code() == -number
    assert history_of(tmp_path) == ["né 模型"]


def test_many_writers_of_one_history(tmp_path: Path) -> None:
    """Lines are whole and none is lost, while one of them cuts the file to its latest. All are patient: whose turn it
    is among so many is chance."""
    script = (
        "import sys; from dsv2cli.chat import history; history.PATIENCE = 60;"
        " [history.add(sys.argv[1] * 50 + str(i)) for i in range(150)]"
    )
    place = tmp_path / "dsv2" / "history"
    place.parent.mkdir()
    place.write_text("old\n" * (2 * history.LINES + 1), encoding="utf-8")
    writers = [
        subprocess.Popen([sys.executable, "-P", "-c", script, name], env=environment(XDG_STATE_HOME=str(tmp_path)))
        for name in "abc"
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path))
        patch.setattr(history, "PATIENCE", 60)
        while True:  # and once when they are through
            are_through = all(writer.poll() is not None for writer in writers)
            assert len(history.read()) == history.LINES
            if are_through:
                break
    assert [writer.returncode for writer in writers] == [0, 0, 0]
    lines = [line for line in history_of(tmp_path) if line != "old"]
    for name in "abc":
        assert [line for line in lines if line.startswith(name)] == [name * 50 + str(i) for i in range(150)]
    assert len(lines) == 450 and len(history_of(tmp_path)) <= 2 * history.LINES


def test_a_history_that_another_holds_is_not_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock that outlasts patience: its owner may be writing what a cut would lose."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr(history, "PATIENCE", 0.05)
    place = tmp_path / "dsv2" / "history"
    place.parent.mkdir()
    place.write_text("old\n" * (2 * history.LINES + 1), encoding="utf-8")
    with place.open("rb+") as other:
        assert system.try_lock(other.fileno())
        assert len(history.read()) == history.LINES
        history.add("new")
        assert len(history_of(tmp_path)) == 2 * history.LINES + 2
    assert history.read()[-1] == "new" and len(history_of(tmp_path)) == history.LINES


def test_a_history_is_cut_as_a_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk, or a kill: nothing of what was typed is lost."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    place = tmp_path / "dsv2" / "history"
    place.parent.mkdir()
    elsewhere = tmp_path / "dotfiles"
    whole = "".join(f"line {i}\n" for i in range(2 * history.LINES + 1))
    elsewhere.write_text(whole, encoding="utf-8")
    place.symlink_to(elsewhere)

    def full(path: Path, target: Path) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        assert history.read()[-1] == f"line {2 * history.LINES}"
    assert place.read_text(encoding="utf-8") == whole
    assert len(history.read()) == history.LINES == len(history_of(tmp_path)) and place.is_symlink()
    history.add("new")
    assert history_of(tmp_path)[-1] == "new" and sorted(p.name for p in place.parent.iterdir()) == ["history"]


def test_a_history_that_cannot_be_kept(model: Path, tmp_path: Path) -> None:
    (tmp_path / "dsv2").write_text("a file where a folder is meant", encoding="utf-8")
    with talk(model, tmp_path) as screen:
        at = screen.wait_for("> $")
        screen.type("Hi\n")
        screen.wait_for(
            r"-n\)\nwarning: the conversation is not kept: .*/dsv2/conversations`: Not a directory\n> $", at
        )
        screen.type("/exit\n")
        assert screen.exit_code() == 0 and "error" not in screen.text
