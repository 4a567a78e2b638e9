"""The place to type: what is pasted, edited, searched, completed and named arrives as it is, in any terminal."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.cli import COMMAND, SECONDS, Screen, environment, terminal
from support.tiny import spec_named, variant
from support.vocab import IDS, write_model

from cext.tokenizer import Tokenizer
from dsv2cli.chat import files, journal, store
from dsv2cli.chat.settings import SETTINGS, Sampling, changed
from dsv2cli.errors import UsageError

ENDS = r"\(stopped after 4 tokens: -n\)\n> $"
LINES = "\n".join(f"{' ' * (i % 9)}line {i} of\tmany: {{}} \\ // '' né 模型" for i in range(200))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = variant(spec_named("lite"), n_ctx=32768)
    return write_model(tmp_path_factory.mktemp("prompt") / "endless.gguf", spec, endless=True)


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state"


def talk(model: Path, state: Path, *more: str, size: tuple[int, int] = (50, 160), **env: str):
    options = ("-n", "4", "--temp", "0", *more)
    return terminal("chat", model, *options, size=size, XDG_STATE_HOME=str(state), **env)


def asked(screen: Screen) -> list[str]:
    """What was said, as it was kept; the program has ended."""
    screen.type("/exit\n")
    assert screen.exit_code() == 0, screen.text
    return [node.turn.user for node in journal.read(store.existing(store.latest())).tree.nodes]


def say(screen: Screen, typed: str, at: int, until: str = ENDS) -> int:
    screen.type(typed)
    return screen.wait_for(until, at)


@pytest.mark.parametrize("size", [(50, 160), (10, 30)])
def test_200_indented_lines_are_pasted_as_they_are(model: Path, state: Path, size: tuple[int, int]) -> None:
    with talk(model, state, "-c", "32768", size=size) as screen:
        at = screen.wait_for("> $")
        say(screen, f"\x1b[200~{LINES}\x1b[201~\n", at)
        assert asked(screen) == [LINES]


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("one\x1b\rtwo\r", "one\ntwo"),  # Alt+Enter
        ("one\x1b[13;2utwo\r", "one\ntwo"),  # Shift+Enter
        ("  one\\\r    two\r", "  one\n    two"),
        ("one\x02\x02\x02\x1b\n\r", "\none"),  # in the middle of a line
        ("one two\x17three\r", "one three"),  # Ctrl+W
        ("é模" + "\x7f" + "型\r", "é型"),
    ],
)
def test_keys(typed: str, said: str, model: Path, state: Path) -> None:
    with talk(model, state) as screen:
        at = screen.wait_for("> $")
        say(screen, typed, at)
        assert asked(screen) == [said]


def test_history_is_searched(model: Path, state: Path) -> None:
    (state / "dsv2").mkdir(parents=True)
    (state / "dsv2" / "history").write_text("a first thing\nthe second\na third thing\n", encoding="utf-8")
    with talk(model, state) as screen:
        at = screen.wait_for("> $")
        say(screen, "\x12first", 0, r"> a first thing\n(.|\n)*first$")
        say(screen, "\r", 0, "> a first thing$")
        say(screen, "\r", at)
        assert asked(screen) == ["a first thing"]
    assert (state / "dsv2" / "history").read_text(encoding="utf-8").splitlines()[-2:] == ["a first thing", "/exit"]


def test_the_editor(model: Path, state: Path, tmp_path: Path) -> None:
    editor = tmp_path / "my editor"
    editor.write_text('#!/bin/sh\nsed -i "s/cat/dog/" "$1"\n', encoding="utf-8")
    editor.chmod(0o700)
    with talk(model, state, VISUAL=f"'{editor}'") as screen:
        at = screen.wait_for("> $")
        say(screen, "a cat\x07", at, "a dog$")
        say(screen, "\r", at)
        assert asked(screen) == ["a dog"]


def test_a_named_file_goes_with_the_message_as_text(model: Path, state: Path, tmp_path: Path) -> None:
    """Control tokens that it spells are letters; the meter and a line say how long it is."""
    control = next(iter(IDS))
    content = f"the text {control}\n  of a file\n"
    (tmp_path / "my notes.txt").write_text(content, encoding="utf-8")
    (tmp_path / "long.txt").write_text("the User " * 2000, encoding="utf-8")
    n = len(Tokenizer(model).encode(content))
    with talk(model, state, "-c", "2048") as screen:
        at = screen.wait_for("> $")
        at = say(screen, f"read @{tmp_path}/my\t", at, 'read @"')
        screen.wait_to_see(f"0 of 2048 tokens | my notes.txt: {n}")
        at = say(screen, " and @nobody\r", at, rf"my notes\.txt: {n} tokens\)\n(.|\n)*{ENDS}")
        at = say(
            screen, f"@{tmp_path}/long.txt\r", at, r"error: `.*long\.txt` has \d+ tokens, .* holds 2048\n(.|\n)*> $"
        )
        assert asked(screen) == [
            f'read @"{tmp_path}/my notes.txt" and @nobody\n\n{tmp_path}/my notes.txt:\n\n{content}'
        ]


def test_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.py", "a b.py", ".hidden", "né.md"):
        (tmp_path / name).write_text(name, encoding="utf-8")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.py").write_bytes(b"\xff\xfe\x00")
    named = {
        "what does @a.py do?": ["a.py"],
        "@a.py, @a.py and @né.md.": ["a.py", "né.md"],
        'x @"a b.py"': ["a b.py"],
        "me@a.py @nothing @ @/ @folder @\x00 @" + "x" * 9000: [],
    }
    for message, found in named.items():
        assert [str(path) for path in files.named(message)] == found
    assert [text for text, _, _ in files.completions("see @")] == ['"a b.py"', "a.py", "folder/", "né.md"]
    assert [(text, n) for text, n, _ in files.completions("see @folder/")] == [("folder/a.py", 7)]
    assert [text for text, _, _ in files.completions('see @"a ')] == ['"a b.py"']
    assert [text for text, _, _ in files.completions("see @.h")] == [".hidden"]
    for nothing in ("me@a", "@none/", "@~nosuchuser/", "@~nosuchuser/a"):
        assert list(files.completions(nothing)) == []
    with pytest.raises(UsageError, match="UTF-16"):
        files.with_files("@folder/a.py")


def test_turns_are_edited(model: Path, state: Path) -> None:
    with talk(model, state) as screen:
        at = screen.wait_for("> $")
        for text in ("one", "two", "three"):
            at = say(screen, f"{text}\n", at)
        at = say(screen, "/edit 2\n", at, "> two$")
        at = say(screen, " more\n", at)
        at = say(screen, "/edit answer\n", at, r"/edit answer\n> \S")
        at = say(screen, "\x15new words\n", at, r"\(changed; .*\)\n> $")
        at = say(screen, "/continue\n", at)
        at = say(screen, "/edit\n", at, "> two more$")
        at = say(screen, "\x03", at, "> $")  # given up
        at = say(screen, "/edit 9\n", at, "error: /edit takes `answer` or a turn, 1 to 2, and not 9")
        assert asked(screen) == ["one", "two", "three", "two more", "two more", "two more"]
    tree = journal.read(store.existing(store.latest())).tree
    assert [node.parent for node in tree.nodes] == [0, 1, 2, 1, 1, 1] and tree.head == 6
    remembered = (state / "dsv2" / "history").read_text(encoding="utf-8").splitlines()
    assert remembered[3:6] == ["/edit 2", "/edit answer", "/continue"], "no answer of the model's"
    tokenizer = Tokenizer(model)
    assert tokenizer.decode(tree.node(5).turn.answer).endswith("new words")
    assert tree.node(6).turn.answer[: len(tree.node(5).turn.answer)] == tree.node(5).turn.answer
    assert len(tree.node(6).turn.answer) == len(tree.node(5).turn.answer) + 4


def test_completion_of_commands_and_names(model: Path, state: Path) -> None:
    with talk(model, state) as screen:
        at = screen.wait_for("> $")
        say(screen, "/sess\t", at, "/sessions$")
        at = say(screen, "\n", at, r"no conversation is kept yet\n> $")
        say(screen, "/lo\t", at, "/load ?$")
        say(screen, "x", at, "/load x$")  # what takes a name is ready for one
        at = say(screen, "\n", at, r"error: there is no conversation `x`(.|\n)*\n> $")
        say(screen, "/set repe\t", at, "/set repeat-penalty$")
        at = say(screen, " 2\n", at, r"/set repeat-penalty 2\n> $")
        at = say(screen, "/set\n", at, r"repeat-penalty  2\n(.|\n)*> $")
        at = say(
            screen, "/set top-p 0\n", at, r"error: `top-p` takes a number in the range 0<x<=1, and not `0`\n(.|\n)*> $"
        )
        say(screen, "/exit\n", at, "")
        assert screen.exit_code() == 0


def test_settings() -> None:
    sampling = Sampling(0.7, 40, 0.95, 0.05, 1.0, 1)
    for name, word in {"temp": "0", "top-k": "0", "seed": str(2**64 - 1), "max-tokens": "5"}.items():
        assert getattr(changed(sampling, name, word), SETTINGS[name].field) == SETTINGS[name].parse(word)
    assert changed(sampling, "max-tokens", "0").max_tokens is None
    wrong = [
        ("temp", "-1"),
        ("temp", "nan"),
        ("top-k", "1.5"),
        ("top-k", "9" * 30),
        ("seed", "x"),
        ("temperature", "1"),
    ]
    for name, word in wrong:
        with pytest.raises(UsageError):
            changed(sampling, name, word)


def test_settings_are_shown_one_or_all(model: Path, state: Path) -> None:
    with talk(model, state) as screen:
        at = screen.wait_for("> $")
        at = say(screen, "/set seed 5\n", at, "> $")
        at = say(screen, "/set seed\n", at, r"/set seed\n  seed            5\n> $")
        at = say(screen, "/set markdown\n", at, r"  markdown        on\n> $")
        at = say(screen, "/set\n", at, r"  temp            0\n(.|\n)*  markdown        on\n> $")
        at = say(screen, "/set colour\n", at, r"error: there is no setting `colour`\nhint: there are temp, .*\n> $")
        say(screen, "/set temp 1 2\n", at, r"error: /set takes a name and a value\n.*\n> $")


def test_an_answer_that_has_ended_is_not_gone_on_with_unsaid(state: Path) -> None:
    with terminal("chat", "--temp", "0", size=(50, 160), XDG_STATE_HOME=str(state)) as screen:
        at = screen.wait_for("> $")
        at = say(screen, "Who are you?\n", at, r"model(.|\n)*\n> $")
        at = say(screen, "/continue\n", at, r"\(the answer had come to its end: there is no more of it\)\n> $")
        say(
            screen,
            "/branch\n",
            at,
            r"\* 1  1 turn, the last: Who are you\?\n     I am a small demonstration model.*\n> $",
        )


def test_a_window_of_30_columns_that_changes(model: Path, state: Path) -> None:
    with talk(model, state, size=(12, 30)) as screen:
        at = screen.wait_for("> $")
        screen.type("a message that is longer than the window is wide, by far")
        screen.wait_for(r"b\s*y f\s*a\s*r\s*$", at)
        screen.resize(20, 60)
        screen.type(" and more")
        screen.wait_for(r"a\s*n\s*d m\s*o\s*r\s*e\s*$", at)
        at = len(screen.text)
        screen.type("\n")
        screen.wait_for(r"after 4 tokens", at)
        screen.resize(6, 30)
        time.sleep(0.2)
        screen.type("/undo\n")
        screen.wait_for("taken back", at)
        assert asked(screen) == ["a message that is longer than the window is wide, by far and more"]


def test_no_colour(model: Path, state: Path) -> None:
    with talk(model, state, NO_COLOR="1") as screen:
        at = screen.wait_for("> $")
        say(screen, "Hi\n", at)
        assert asked(screen) == ["Hi"]
        assert set(re.findall(rb"\x1b\[[0-9;]*m", screen.raw)) <= {b"\x1b[0m", b"\x1b[m"}


def test_it_is_imported_for_a_conversation_alone(model: Path) -> None:
    watch = "import atexit, sys; atexit.register(lambda: print('prompt_toolkit' in sys.modules, file=sys.stderr))"
    for args in (("chat", "--help"), ("chat", str(model), "-p", "x", "-n", "1", "-q")):
        command = [*COMMAND[:-1], f"{watch}; {COMMAND[-1]}", *args]  # a start: forks have imported it
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
        assert done.stderr.splitlines()[-1] == "False"


@pytest.fixture
def tmux(tmp_path: Path) -> Iterator[list[str]]:
    """The beginning of a command to a tmux of its own, with a shell in a window."""
    if shutil.which("tmux") is None:
        pytest.skip("needs tmux")
    (tmp_path / "tmux.conf").write_text("set -g history-limit 100000\n", encoding="utf-8")  # an answer may be long
    command = ["tmux", "-S", str(tmp_path / "socket"), "-f", str(tmp_path / "tmux.conf")]
    begin = [*command, "new-session", "-d", "-x", "80", "-y", "24", "env", "PS1=shell: ", "bash", "--norc", "-i"]
    subprocess.run(begin, check=True, env=environment(XDG_STATE_HOME=str(tmp_path / "state")))
    yield command
    subprocess.run([*command, "kill-server"], check=False)


def test_ctrl_z_and_back(tmux: list[str], model: Path, tmp_path: Path) -> None:
    """In a shell with jobs, while a message is typed and while an answer is written."""
    script = tmp_path / "talk.sh"
    words = " ".join(f"'{word}'" for word in (*COMMAND[:-1], COMMAND[-1].replace("'", "")))
    script.write_text(f"exec {words} chat '{model}' --temp 0 -c 32768\n", encoding="utf-8")

    def keys(*names: str) -> None:
        subprocess.run([*tmux, "send-keys", *names], check=True)

    def wait_for(pattern: str) -> str:
        end = time.monotonic() + SECONDS
        while True:
            seen = subprocess.run(
                [*tmux, "capture-pane", "-p", "-S", "-"], check=True, capture_output=True, text=True
            ).stdout
            if re.search(pattern, seen):
                return seen
            assert time.monotonic() < end, seen
            time.sleep(0.05)

    mark = uuid.uuid4().hex[:8]
    wait_for("shell:")
    keys(f"sh {script}", "Enter")
    wait_for(r"\n> *\n")
    keys("half a mess")
    wait_for("> half a mess")
    keys("C-z")
    wait_for(r"Stopped")
    keys(f"echo {mark[:4]}''{mark[4:]}", "Enter")
    wait_for(mark)
    keys("fg", "Enter")
    wait_for(rf"{mark}(.|\n)*> half a mess")
    keys("age", "Enter")
    wait_for(r"> half a message\n(?!\s*0 of )\s*\S(.|\n){40}")  # the answer, and not the meter
    keys("C-z")
    wait_for(r"Stopped(.|\n)*Stopped")
    keys("fg", "Enter")
    wait_for(r"Stopped(.|\n)*Stopped(.|\n)*shell: fg\nsh /.*\n(.|\n)*\S")  # it goes on
    keys("C-c")
    wait_for(r"\(stopped\)\n>")
    keys("/exit", "Enter")
    assert "^C" not in wait_for(r"in memory\nshell:"), "keys are echoed between the words of an answer"
