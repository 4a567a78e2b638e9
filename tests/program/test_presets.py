"""Presets: sets of chat's settings under a name, from files, taken by the line or in a conversation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.cli import terminal
from support.config import home, put
from support.inprocess import done, run
from support.tiny import spec_named
from support.vocab import write_model

from dsv2cli import settings
from dsv2cli.chat import journal, store

CODER = '[presets.coder]\nsystem = "You write C."\ntemp = 0.25\nmax-tokens = 3\n'


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("presets") / "endless.gguf", spec_named("lite"), endless=True)


@pytest.fixture
def env(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    project = tmp_path / "home" / "project"
    project.mkdir(parents=True)
    monkeypatch.chdir(project)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return home(tmp_path)


def n_answered(model: Path, env: dict[str, str | None], *options: str) -> int:
    told = json.loads(done(run("chat", model, "-p", "Hi", "--json", "-c", "64", *options, env=env)).out)
    n: int = told["answer_tokens"]
    return n


def test_it_comes_after_the_line_and_before_everything_else(
    model: Path, env: dict[str, str | None], tmp_path: Path
) -> None:
    put(tmp_path, f"max-tokens = 5\n[chat]\nmax-tokens = 6\n{CODER}[presets.short]\nmax-tokens = 2\n")
    assert n_answered(model, env) == 6
    assert n_answered(model, env, "--preset", "coder") == 3
    assert n_answered(model, env, "--preset=short") == 2
    assert n_answered(model, env | {"DSV2_MAX_TOKENS": "7"}, "--preset", "coder") == 3
    assert n_answered(model, env, "--preset", "coder", "-n", "4") == n_answered(
        model, env, "-n", "4", "--preset", "coder"
    )
    assert n_answered(model, env, "-n", "4", "--preset", "coder") == 4
    assert n_answered(model, env | {"DSV2_CHAT_PRESET": "short"}) == 2
    assert n_answered(model, env | {"DSV2_CHAT_PRESET": "short"}, "--preset", "coder") == 3
    assert n_answered(model, env | {"DSV2_CHAT_PRESET": "coder"}, "--raw") == 6, "a system message has no place there"
    ran = run("chat", model, "-p", "Hi", "--preset", "code", env=env)
    assert ran.code == 2 and "there is no preset `code`" in ran.told and "coder, short" in ran.told


def test_a_project_s_keys_come_before_the_user_s(model: Path, env: dict[str, str | None], tmp_path: Path) -> None:
    mine = put(tmp_path, CODER)
    project = Path.cwd() / settings.PROJECT_FILE
    done(run("config", "set", "--project", "presets.coder.max-tokens", "4", env=env))
    assert n_answered(model, env, "--preset", "coder") == 4
    rows = {row["key"]: row for row in json.loads(done(run("config", "--json", env=env)).out)}
    assert rows["presets.coder.temp"] == {"key": "presets.coder.temp", "value": 0.25, "origin": str(mine)}
    assert rows["presets.coder.max-tokens"]["origin"] == str(project)
    assert "presets.coder.system" in done(run("config", "--all", env=env)).out.decode()


def test_it_is_set_and_unset_like_others(env: dict[str, str | None], tmp_path: Path) -> None:
    path = put(tmp_path, "# mine\ntemp = 0.5\n")
    done(run("config", "set", "presets.a-b.temp", "0.125", env=env))
    done(run("config", "set", "presets.a-b.system", "Say: {no} [more].", env=env))
    done(run("config", "set", "presets.c.think", "off", env=env))
    assert path.read_text(encoding="utf-8") == (
        '# mine\ntemp = 0.5\n\n[presets.a-b]\ntemp = 0.125\nsystem = "Say: {no} [more]."\n\n'
        '[presets.c]\nthink = "off"\n'
    )
    assert done(run("config", "get", "presets.a-b.temp", env=env)).out == b"0.125\n"
    assert run("config", "get", "presets.c.temp", env=env).code == 2  # what is set for all is not the preset's
    done(run("config", "unset", "presets.c.think", env=env))
    done(run("config", "unset", "presets.none.temp", env=env))
    assert "think" not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[presets.a]\ntempo = 1", ["`presets.a.tempo`", "temp"]),
        ("[presets.a]\nkv = 'f16'", ["`presets.a.kv`"]),
        ("[presets.a]\ntemp = -1", ["`presets.a.temp`", "range"]),
        ("[presets.a]\nsystem = ['x']", ["`presets.a.system`"]),
        ("[presets.'a b']\ntemp = 1", ["`presets.a b.temp`"]),
        ("[presets]\na = 1", ["`presets.a`"]),
        ("presets = 1", ["`presets`"]),
        ("[presets.a.b]\ntemp = 1", ["`presets.a.b`"]),
    ],
)
def test_a_file_that_says_what_it_may_not(
    env: dict[str, str | None], tmp_path: Path, text: str, words: list[str]
) -> None:
    put(tmp_path, text)
    ran = run("chat", "-p", "x", "-n", "1", env=env)
    assert ran.code == 2 and ran.out == b"" and "internal" not in ran.told, ran.told
    assert all(word in ran.told for word in words), ran.told


def test_in_a_conversation(model: Path, env: dict[str, str | None], tmp_path: Path) -> None:
    put(tmp_path, f"{CODER}[presets.cool]\ntemp = 0\nmax-tokens = 4\n")
    with terminal("chat", model, "--preset", "coder", XDG_STATE_HOME=str(tmp_path / "state"), **env) as screen:
        at = screen.wait_for("> $")
        for typed, until in (
            ("Hi\n", r"after 3 tokens: -n\)\n> $"),
            (
                "/preset\n",
                r"\* coder  system You write C\., temp 0\.25, max-tokens 3\n  cool  temp 0\.0, max-tokens 4\n> $",
            ),
            ("/preset nope\n", r"error: there is no preset `nope`\n(.|\n)*> $"),
            ("/preset coo\t", "/preset cool$"),
            ("\n", "> $"),
            ("Hi\n", r"after 4 tokens: -n\)\n> $"),
            ("/exit\n", ""),
        ):
            screen.type(typed)
            at = screen.wait_for(until, at)
        assert screen.exit_code() == 0, screen.text
    nodes = journal.read(store.existing(store.latest())).tree.nodes
    assert [(n.setting.system, n.setting.sampling["temperature"]) for n in nodes] == [
        ("You write C.", 0.25), ("You write C.", 0),
    ]  # fmt: skip
