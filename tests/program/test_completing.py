"""Completion of models' names: what each shell is told, that nothing foreign is evaluated, that it takes no time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support.cli import environment, processor_seconds

ENTRY = [sys.executable, "-P", "-c", "from dsv2cli.entry import main; main()"]


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    """A cache with three repositories, and a folder with models in it."""
    for name in ("deepseek-ai--DeepSeek-V2-Lite", "owner--a--b", "owner--$(touch gone)"):
        (tmp_path / "hf" / "hub" / f"models--{name}").mkdir(parents=True)
    (tmp_path / "here" / "models").mkdir(parents=True)
    for name in ("lite-Q4_K_M.gguf", "notes.txt", "$(touch gone).gguf", "models/deep.gguf", ".hidden.gguf"):
        (tmp_path / "here" / name).write_bytes(b"")
    return {"HF_HOME": str(tmp_path / "hf"), "HERE": str(tmp_path / "here")}


def complete(env: dict[str, str], line: str, shell: str = "bash") -> list[str]:
    words = line.split(" ")
    asked = {
        "_DSV2_COMPLETE": f"complete_{shell}", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1),
        "_TYPER_COMPLETE_ARGS": line, "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }  # fmt: skip
    done = subprocess.run(
        ENTRY, env=environment(**env, **asked), cwd=env["HERE"], capture_output=True, text=True, check=False
    )
    assert done.stderr == "", done.stderr
    return done.stdout.splitlines()


def test_a_model_is_a_file_a_folder_a_repository_or_an_alias(env: dict[str, str]) -> None:
    found = complete(env, "dsv2 chat ")
    assert {"lite-Q4_K_M.gguf", "models/", "deepseek-ai/DeepSeek-V2-Lite", "owner/a--b", "lite"} <= set(found)
    assert not {"notes.txt", ".hidden.gguf", "v3"} & set(found)  # v3 is not here
    assert complete(env, "dsv2 chat models/") == ["models/deep.gguf"]
    assert complete(env, "dsv2 chat owner/") == ["owner/a--b"]
    assert complete(env, "dsv2 chat nothing-begins-so") == []
    assert "v3" in complete(env, "dsv2 plan v") and "v3" in complete(env, "dsv2 download v")
    assert "lite-Q4_K_M.gguf" not in complete(env, "dsv2 download ")


@pytest.mark.parametrize(
    "line", ["dsv2 chat --kv q8_0 li", "dsv2 chat -q li", "dsv2 inspect --ctx=99 li", "dsv2 rm x li"]
)
def test_options_before_it_do_not_matter(env: dict[str, str], line: str) -> None:
    assert "lite-Q4_K_M.gguf" in complete(env, line)


def test_what_is_no_model_is_left_to_typer(env: dict[str, str]) -> None:
    assert "--kv" in complete(env, "dsv2 chat --k")
    assert "chat" in complete(env, "dsv2 ch")
    assert "q8_0" in complete(env, "dsv2 chat --kv ")
    assert "lite-Q4_K_M.gguf" not in complete(env, "dsv2 chat x.gguf ")


def test_conversations_and_presets_are_named(env: dict[str, str], tmp_path: Path) -> None:
    kept = tmp_path / "state" / "dsv2" / "conversations"
    kept.mkdir(parents=True)
    for name in ("rome.jsonl", "rome.cache", "paris.jsonl", ".x.jsonl.7", "$(touch gone).jsonl"):
        (kept / name).touch()
    (tmp_path / "xdg" / "dsv2").mkdir(parents=True)
    (tmp_path / "xdg" / "dsv2" / "config.toml").write_text("[presets.coder]\ntemp = 0\n[presets.cook]\n", "utf-8")
    more = env | {"XDG_STATE_HOME": str(tmp_path / "state"), "XDG_CONFIG_HOME": str(tmp_path / "xdg")}
    assert complete(more, "dsv2 chat -r ") == ["paris", "rome"]
    assert complete(more, "dsv2 chat model.gguf --resume r") == ["rome"]
    assert complete(more, "dsv2 chat --preset co", "fish") == ["coder", "cook"]
    assert complete(env | {"XDG_STATE_HOME": "/dev/null"}, "dsv2 chat -r ") == []
    (tmp_path / "xdg" / "dsv2" / "config.toml").write_text("no TOML", "utf-8")
    assert complete(more, "dsv2 chat --preset ") == []


def test_each_shell_has_its_form(env: dict[str, str]) -> None:
    assert complete(env, "dsv2 chat owner/", "fish") == ["owner/a--b"]
    assert complete(env, "dsv2 chat owner/", "zsh") == ["_arguments '*: :((\"owner/a--b\"))'"]
    assert complete(env, "dsv2 chat nothing-begins-so", "zsh") == ["_files"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_names_that_a_shell_would_run_are_left_out(env: dict[str, str], shell: str) -> None:
    assert "touch" not in "".join(complete(env, "dsv2 chat ", shell))


def test_an_open_quotation_ends_quietly(env: dict[str, str]) -> None:
    complete(env, "dsv2 chat 'li")


def test_it_imports_little(env: dict[str, str]) -> None:
    """What makes it fast; the next test measures it."""
    script = "import sys; from dsv2cli.entry import main; main(); print(*sys.modules, file=sys.stderr)"
    asked = environment(**env, _DSV2_COMPLETE="complete_bash", COMP_WORDS="dsv2 plan li", COMP_CWORD="2")
    done = subprocess.run([sys.executable, "-P", "-c", script], env=asked, capture_output=True, text=True, check=True)
    assert "lite" in done.stdout.splitlines()
    assert not {"typer", "numpy", "rich", "dsv2cli.app", "dsv2cli.hub", "dataclasses"} & set(done.stderr.split())


def test_it_is_fast(env: dict[str, str]) -> None:
    """Within 0.1 s, and as much for a machine that is busy with other things."""
    asked = environment(**env, _DSV2_COMPLETE="complete_bash", COMP_WORDS="dsv2 plan li", COMP_CWORD="2")
    assert processor_seconds(ENTRY, asked, 0.2) < 0.2
