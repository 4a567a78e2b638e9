"""dsv2 config: what options default to, from which place, and files that say what they may not."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest
from support.config import home, put, user_file
from support.inprocess import done, run

from dsv2cli import settings

ASK = ("chat", "-p", "A ship", "-n", "2", "--json")


@pytest.fixture
def env(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """A home of its own, and a project in it where commands run."""
    project = tmp_path / "home" / "project" / "deep"
    project.mkdir(parents=True)
    monkeypatch.chdir(project)
    return home(tmp_path)


def listed(env: dict[str, str | None], *more: str) -> dict[str, Any]:
    rows = json.loads(done(run("config", "--json", *more, env=env)).out)
    return {row["key"]: (row["value"], row["origin"]) for row in rows}


def test_each_place_overrides_the_one_before(env: dict[str, str | None], tmp_path: Path) -> None:
    mine = put(tmp_path, 'kv = "q8_0"\n[chat]\ntemp = 0.25\n')
    assert listed(env) == {"kv": ("q8_0", str(mine)), "chat.temp": (0.25, str(mine))}
    project = tmp_path / "home" / "project" / settings.PROJECT_FILE
    project.write_text("[chat]\ntemp = 0.5\n", encoding="utf-8")
    assert listed(env)["chat.temp"] == (0.5, str(project))
    env["DSV2_CHAT_TEMP"] = "0.75"
    assert listed(env)["chat.temp"] == (0.75, "DSV2_CHAT_TEMP")
    env["DSV2_KV"] = "f32"  # for all commands, and stronger than a file's word for one
    assert listed(env, "--all")["chat.kv"] == ("f32", "DSV2_KV")
    assert listed(env, "--all")["serve.port"] == (8080, "default")


def test_commands_take_what_is_set(env: dict[str, str | None], tmp_path: Path) -> None:
    put(tmp_path, 'kv = "q8_0"\nctx = 300\nseed = 7\n')
    answer = json.loads(done(run(*ASK, env=env)).out)
    assert answer["kv_type"] == "q8_0" and answer["seed"] == 7
    assert json.loads(done(run(*ASK, "--kv", "f16", env=env)).out)["kv_type"] == "f16"  # the line is the strongest
    told = json.loads(done(run("inspect", "--json", env=env)).out)
    assert [row["context"] for row in told["memory"]] == [300]
    assert json.loads(done(run(*ASK, env=env | {"DSV2_CHAT_KV": "f32"})).out)["kv_type"] == "f32"


def test_what_has_no_place_beside_an_option_is_left_out(env: dict[str, str | None], tmp_path: Path) -> None:
    put(tmp_path, 'system = "Be brief."\nthink = "on"\nram = "20M"\n')
    done(run(*ASK, "--raw", env=env | {"DSV2_RAM": "all"}))
    put(tmp_path, 'ram = "20M"\n')
    answer = json.loads(done(run(*ASK, "--raw", env=env)).out)
    assert answer["drive"] is not None


def test_set_keeps_comments_and_unset_takes_out(env: dict[str, str | None], tmp_path: Path) -> None:
    path = put(tmp_path, '# mine\nkv = "f16"  # why\n\n[chat]\n# cooler\ntemp = 0.5\n')
    done(run("config", "set", "kv", "q8_0", env=env))
    done(run("config", "set", "chat.top-k", "12", env=env))
    done(run("config", "set", "serve.deterministic", "yes", env=env))
    assert path.read_text(encoding="utf-8") == (
        '# mine\nkv = "q8_0"  # why\n\n[chat]\n# cooler\ntemp = 0.5\ntop-k = 12\n\n[serve]\ndeterministic = true\n'
    )
    done(run("config", "unset", "kv", env=env))
    done(run("config", "unset", "bench.kv", env=env))  # was not set
    assert "kv" not in path.read_text(encoding="utf-8") and "# cooler" in path.read_text(encoding="utf-8")
    assert list(path.parent.iterdir()) == [path]


def test_get_says_where_from(env: dict[str, str | None]) -> None:
    done(run("config", "set", "temp", "0.1", env=env))
    got = done(run("config", "get", "chat.temp", env=env))
    assert got.out == b"0.1\n" and "config.toml" in got.told
    weaker = done(run("config", "set", "temp", "0.2", env=env | {"DSV2_TEMP": "0.3"}))
    assert "DSV2_TEMP sets it to 0.3" in weaker.told


def test_a_project_s_file(env: dict[str, str | None], tmp_path: Path) -> None:
    done(run("config", "set", "--project", "chat.seed", "5", env=env))
    path = Path.cwd() / settings.PROJECT_FILE
    assert done(run("config", "path", "--project", env=env)).out.decode().strip() == str(path)
    assert listed(env) == {"chat.seed": (5, str(path))}
    for key in ("rpc", "serve.host"):
        ran = run("config", "set", "--project", key, "1.2.3.4", env=env)
        assert ran.code == 2 and "not for a project" in ran.told
    path.write_text('rpc = "1.2.3.4:5"\n', encoding="utf-8")
    ran = run(*ASK, env=env)
    assert ran.code == 2 and "not for a project" in ran.told and ran.out == b""


def test_a_repository_ends_the_search(env: dict[str, str | None], tmp_path: Path) -> None:
    (tmp_path / "home" / settings.PROJECT_FILE).write_text("temp = 0.5\n", encoding="utf-8")
    assert listed(env)["temp"][0] == 0.5
    (tmp_path / "home" / "project" / ".git").mkdir()
    assert listed(env) == {}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("kb = 'f16'", ["`kb`", "did you mean kv?"]),
        ("[chat]\ntopk = 3", ["`chat.topk`", "chat.top-k"]),
        ("[chta]\nkv = 'f16'", ["`chta.kv`", "did you mean"]),
        ("zzzzzz = 1", ["`zzzzzz`", "dsv2 config --all"]),
        ("[chat]\nport = 1", ["`chat.port`", "did you mean port?"]),
        ("kv = 'q4_0'", ["`kv`", "q4_0", "q8_0"]),
        ("[chat]\ntemp = -1", ["`chat.temp`", "range"]),
        ("kv = true", ["`kv`", "true"]),
        ("kv = ['f16']", ["`kv`", "list"]),
        ("[serve]\ndeterministic = 3", ["`serve.deterministic`"]),
        ("kv = ", ["no TOML"]),
        ("\udcff", ["no TOML"]),
    ],
)
def test_a_file_that_says_what_it_may_not(
    env: dict[str, str | None], tmp_path: Path, text: str, words: list[str]
) -> None:
    path = user_file(tmp_path)
    path.parent.mkdir(parents=True)
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    ran = run(*ASK, env=env)
    assert ran.code in (1, 2) and ran.out == b"" and "config.toml" in ran.told, ran.told
    assert all(word in ran.told for word in words) and "internal" not in ran.told, ran.told
    done(run("chat", "--help", env=env))  # help and what repairs it stay reachable
    done(run("config", "path", env=env))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("set", "kb", "f16"), ["did you mean kv?"]),
        (("set", "kv", "q4_0"), ["q4_0"]),
        (("set", "kv"), ["a KEY and a VALUE"]),
        (("get",), ["a KEY"]),
        (("list", "kv"), ["nothing more"]),
        (("put", "kv", "f16"), ["'put'"]),
        (("unset", "nonsense.kv"), ["nonsense.kv"]),
        (("get", "kv", "--project"), ["--project", "not of get"]),
        (("--project",), ["--project", "not of list"]),
        (("path", "--all"), ["--all", "not of path"]),
        (("set", "kv", "f16", "--json"), ["--json", "not of set"]),
    ],
)
def test_what_is_called_wrongly(env: dict[str, str | None], args: tuple[str, ...], words: list[str]) -> None:
    ran = run("config", *args, env=env)
    assert ran.code == 2 and all(word in ran.told for word in words), ran.told


def test_a_variable_that_says_what_it_may_not(env: dict[str, str | None]) -> None:
    ran = run(*ASK, env=env | {"DSV2_CHAT_TOP_P": "7"})
    assert ran.code == 2 and "DSV2_CHAT_TOP_P" in ran.told
    done(run(*ASK, env=env | {"DSV2_BENCH_KV": "nonsense"} | {"DSV2_BENCH_KV": ""}))


def test_every_setting_is_an_option_s() -> None:
    from typer.main import get_command  # noqa: PLC0415

    from dsv2cli.app import app  # noqa: PLC0415

    found = settings.options_of(get_command(app))
    assert {name for mine in found.values() for name in mine} == settings.SETTINGS.keys()


def test_a_file_that_cannot_be_written(env: dict[str, str | None], tmp_path: Path) -> None:
    ran = run("config", "set", "kv", "f16", env=env | {"XDG_CONFIG_HOME": "/dev/null"})
    assert ran.code == 1 and "/dev/null" in ran.told
    path = put(tmp_path, "temp = 0.5\n")
    path.chmod(stat.S_IRUSR)
    done(run("config", "set", "kv", "f16", env=env))  # replaced as a whole, never half written
    assert "temp = 0.5" in path.read_text(encoding="utf-8")


def test_a_folder_above_that_may_not_be_entered_ends_the_search(
    env: dict[str, str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = Path.cwd().parent / settings.PROJECT_FILE
    is_file = Path.is_file

    def refusing(path: Path) -> bool:
        if path == closed:
            raise PermissionError(13, "Permission denied", str(path))
        return is_file(path)

    monkeypatch.setattr(Path, "is_file", refusing)
    assert listed(env) == {}


def test_a_link_stays_one_and_a_mode_stays_as_it_is(env: dict[str, str | None], tmp_path: Path) -> None:
    kept = tmp_path / "dotfiles" / "mine.toml"
    kept.parent.mkdir()
    kept.write_text("temp = 0.5\n", encoding="utf-8")
    kept.chmod(0o600)
    path = put(tmp_path, "")
    path.unlink()
    path.symlink_to(kept)
    done(run("config", "set", "seed", "5", env=env))
    assert path.is_symlink() and kept.read_text(encoding="utf-8") == "temp = 0.5\nseed = 5\n"
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600 and [p.name for p in kept.parent.iterdir()] == ["mine.toml"]


@pytest.mark.parametrize("text", ["chat = 1\n", "[[chat]]\ntemp = 1\n", 'chat = "x"\n'])
def test_a_value_where_a_command_s_table_belongs(env: dict[str, str | None], tmp_path: Path, text: str) -> None:
    path = put(tmp_path, text)
    for args in (("set", "chat.temp", "0.5"), ("unset", "chat.temp")):
        ran = run("config", *args, env=env)
        assert ran.code == 1 and "`chat`" in ran.told and "expected a table" in ran.told, ran.told
    assert path.read_text(encoding="utf-8") == text


def test_memory_that_is_set_for_all_is_left_out_where_llama_cpp_runs(
    env: dict[str, str | None], tmp_path: Path
) -> None:
    put(tmp_path, 'ram = "20M"\nengine = "llama.cpp"\n')
    assert json.loads(done(run(*ASK, "--raw", env=env)).out)["drive"] is None
    done(run("bench", "-p", "8", "-n", "0", "-r", "1", env=env))
    ran = run(*ASK, "--ram", "20M", env=env)
    assert ran.code == 2 and "--ram is of dsv2's own engine" in ran.told, ran.told


@pytest.mark.parametrize("kept", ['engine = "llama.cpp"', "gpu-layers = 3"])
def test_what_is_set_for_llama_cpp_is_left_out_beside_a_gpu(
    env: dict[str, str | None], tmp_path: Path, kept: str
) -> None:
    put(tmp_path, kept + "\n")
    ran = run(*ASK, "--gpu", "no such card", env=env)
    assert ran.code == 1 and "is of dsv2's own engine" not in ran.told, ran.told  # a card is looked for
