"""The commands as processes: help, misuse, what is not there; quantising; what the MODEL argument may name."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from support.checkpoints import V2, write_checkpoint
from support.cli import COMMAND, assert_fails, dsv2, environment, processor_seconds
from support.vocab import write_vocab

from dsv2cli import locate
from dsv2cli.commands import export
from dsv2cli.commands.quantize import Type
from dsv2cli.errors import CliError, UsageError
from quantize import GROUPS, RECIPES
from quantize.exporter import FORMATS

VERBS = [
    "plan",
    "list",
    "rm",
    "config",
    "doctor",
    "download",
    "quantize",
    "export",
    "chat",
    "inspect",
    "perplexity",
    "bench",
]


@pytest.fixture(scope="module")
def text(folder: Path) -> Path:
    path = folder / "text.txt"
    path.write_text("The User asks the Assistant and the Assistant answers the User. " * 20, encoding="utf-8")
    return path


# Help and misuse.


def test_help_lists_the_verbs() -> None:
    result = dsv2("--help")
    assert result.returncode == 0 and result.stderr == ""
    assert all(f"\n  {verb} " in result.stdout for verb in VERBS)
    assert dsv2().stdout == result.stdout


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_has_help_with_examples(verb: str) -> None:
    result = dsv2(verb, "-h")
    assert result.returncode == 0 and f"\n    dsv2 {verb}" in result.stdout


def test_help_imports_nothing_heavy() -> None:
    """What makes --help fast; the next test measures it."""
    script = "import sys; from dsv2cli.app import run; run(['--help']); print(*sys.modules, file=sys.stderr)"
    run = [sys.executable, "-P", "-c", script]
    result = subprocess.run(run, env=environment(), capture_output=True, text=True, check=True)
    loaded = set(result.stderr.split())
    assert "typer" in loaded
    heavy = {"numpy", "rich", "cext", "quantize", "llama_cpp", "gguf", "huggingface_hub", "jinja2"}
    assert not loaded & (heavy | {"asyncio", "prompt_toolkit", "tomlkit"})


def test_help_is_fast() -> None:
    """0.3 s are promised, of which typer's own import is a quarter; that takes longer too where others compute."""
    known = processor_seconds([*COMMAND[:-1], "import typer"], environment(), 0.06, n=5)
    enough = max(0.3, 4 * known)
    assert processor_seconds([*COMMAND, "--help"], environment(), enough) < enough


def test_version() -> None:
    assert re.fullmatch(r"dsv2( \d+\.\d+\S*|, not installed as a package)\n", dsv2("--version").stdout)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["frobnicate"], ["frobnicate", "dsv2 --help"]),
        (["chat", "--temp", "hot"], ["--temp", "dsv2 chat --help"]),
        (["chat", "--nonsense"], ["--nonsense"]),
        (["chat", "--kv", "q4_0", "-p", "x"], ["--kv", "q8_0"]),
        (["chat", "--lookup", "99", "-p", "x"], ["--lookup"]),
        (["chat", "-p", ""], ["prompt is empty"]),
        (["chat", "-p", "x", "-c", "1"], ["--ctx"]),
        (["chat", "-p", "x", "-c", "99999999999999999999"], ["--ctx"]),
        (["chat", "--raw", "-s", "x", "-p", "y"], ["--raw"]),
        (["chat", "no-such-model", "-p", "x"], ["no-such-model", "alias"]),
        (["perplexity"], ["MODEL"]),
        (["perplexity", "x.gguf"], ["--text"]),
        (["bench", "-d", "0,x"], ["0,x", "-d 0,4096"]),
        (["bench", "-d", "-5"], ["-5"]),
        (["bench", "-p", "0", "-n", "0"], ["nothing to measure"]),
        (["bench", "--json", "--csv"], ["--json"]),
        (["bench", "--against", "vllm"], ["--against"]),
        (["quantize", ".", "--type", "q9_z"], ["--type': 'q9_z' is not one of 'f32'"]),
        (["chat", "--kv", "q4_0"], ["--kv': 'q4_0' is not one of 'f16', 'q8_0', 'f32'."]),
        (["chat", "--think", "maybe"], ["--think': 'maybe' is not one of 'auto', 'on', 'off'."]),
        (["download", "lite", "--only", "pt"], ["--only': 'pt' is not one of 'safetensors', 'gguf'."]),
        (["bench", "--against", "x"], ["--against takes llama.cpp or ik=PATH, got `x`"]),
        (["chat", "--seed", "1.5"], ["--seed': '1.5' is not a whole number.", "dsv2 chat --help"]),
        (["chat", "--min-p", "1,5"], ["--min-p': '1,5' is not a number."]),
        (["chat", "--fim", "a"], ["--fim", "2 arguments", "dsv2 chat --help"]),
        (["inspect", "-c"], ["requires an argument", "dsv2 inspect --help"]),
        (["quantize", "lite", "--size", "abc"], ["`abc` is not a size"]),
        (["quantize", "lite", "-o", ""], ["--out': the name is empty"]),
        (["quantize", "lite", "--calibration", ""], ["--calibration': the name is empty"]),
        (["inspect", "--heatmap", ""], ["--heatmap': the name is empty"]),
        (["perplexity", "x.gguf", "--text", ""], ["--text': the name is empty"]),
        (["download", "lite", "--to", ""], ["--to': the name is empty"]),
    ],
)
def test_misuse(args: list[str], words: list[str]) -> None:
    result = dsv2(*args)
    assert_fails(result, 2, *words)
    assert "Value error" not in result.stderr


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["chat", "missing.gguf", "-p", "x"], ["missing.gguf", "no such file"]),
        (["inspect", "lite"], ["DeepSeek-V2-Lite", "dsv2 download lite"]),
        (["quantize", "lite"], ["DeepSeek-V2-Lite", "dsv2 download lite"]),
    ],
)
def test_what_is_not_there(args: list[str], words: list[str], tmp_path: Path) -> None:
    assert_fails(dsv2(*args, HF_HOME=str(tmp_path)), 1, *words)


def test_what_is_there_and_no_file(tmp_path: Path, model: Path) -> None:
    """A pipe would be waited for without end, a device read without end; each is told by what it is."""
    pipe, socket_name = tmp_path / "pipe.gguf", tmp_path / "socket"
    os.mkfifo(pipe)
    os.mknod(socket_name, stat.S_IFSOCK | 0o600)  # to be bound its name might be too long
    for name, what in ((pipe, "a pipe"), (socket_name, "a socket"), (Path("/dev/zero"), "a device")):
        for verb, more, wanted in (
            ("inspect", [], "not a GGUF"),
            ("chat", ["-p", "x"], "not a GGUF"),
            ("bench", [], "not a GGUF"),
            ("quantize", [], "not a checkpoint"),
        ):
            assert_fails(dsv2(verb, name, *more), 2, f"`{name}` is {what}, {wanted}")
    for name, what in ((socket_name, "a socket"), (Path("/dev/zero"), "a device")):
        assert_fails(dsv2("perplexity", model, "--text", name), 2, f"`{name}` is {what}, not a text file")


@pytest.mark.parametrize("verb", ["chat", "inspect", "perplexity", "bench"])
@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\3\0\0\0" + b"\xff" * 16, b"no model at all " * 100])
def test_files_that_are_no_models(verb: str, content: bytes, tmp_path: Path, text: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    more = {"chat": ["-p", "x"], "perplexity": ["--text", str(text)]}.get(verb, [])
    assert_fails(dsv2(verb, path, *more), 1, "bad.gguf")


def test_a_vocabulary_without_a_model(tmp_path: Path) -> None:
    assert_fails(dsv2("chat", write_vocab(tmp_path / "v.gguf"), "-p", "x"), 1, "v.gguf")


def test_an_internal_error_is_a_line_and_a_traceback_on_request(model: Path) -> None:
    script = "import dsv2cli.anatomy as a; a.study = None; from dsv2cli.app import main; main()"
    command = [sys.executable, "-P", "-c", script, "inspect", str(model)]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert_fails(result, 1, "internal error: TypeError", "DSV2_DEBUG=1")
    result = subprocess.run(command, env=environment(DSV2_DEBUG="1"), capture_output=True, text=True, check=False)
    assert "Traceback" in result.stderr


# quantize.


def test_quantize(tmp_path: Path) -> None:
    folder = tmp_path / "My-Model"
    write_checkpoint(folder, V2)
    out = tmp_path / "out.gguf"
    result = dsv2("quantize", folder, "-o", out, "--type", "q8_0", "--no-awq")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(out)
    assert "bits/weight" in result.stderr and "ffn_down_exps" in result.stderr
    shown = json.loads(dsv2("inspect", out, "--json").stdout)
    assert shown["types"][0]["type"] == "q8_0"
    assert_fails(dsv2("quantize", folder, "-o", out), 2, "exists", "--force")
    told = json.loads(dsv2("quantize", folder, "-o", out, "--type", "f16", "--force", "--json", "-q").stdout)
    assert told["path"] == str(out) and told["nbytes"] == out.stat().st_size and told["type"] == "f16"


def test_quantize_names_its_output_after_the_model(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "My-Model", V2)
    command = [*COMMAND, "quantize", "My-Model", "--type", "Q8_0", "-q", "--no-awq"]
    result = subprocess.run(command, env=environment(), cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "My-Model-Q8_0.gguf\n" and (tmp_path / "My-Model-Q8_0.gguf").is_file()


def test_quantize_refuses(tmp_path: Path, model: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert_fails(dsv2("quantize", tmp_path / "empty", "-o", tmp_path / "o.gguf"), 1, "config.json")
    (tmp_path / "model.txt").touch()
    assert_fails(dsv2("quantize", tmp_path / "model.txt", "-o", tmp_path / "o.gguf"), 2, "no checkpoint", "GGUF")
    assert_fails(dsv2("quantize", model, "-o", model, "--force"), 2, "reads")
    assert_fails(dsv2("quantize", tmp_path / "empty", "-o", tmp_path), 2, "is a folder")
    assert not (tmp_path / "o.gguf").exists()


def test_the_types_are_the_librarys() -> None:
    assert [t.value for t in Type] == list(RECIPES)
    assert [f.value for f in export.Format] == list(FORMATS)
    assert {int(g.value) for g in export.Group} == {*GROUPS}


def test_export_hands_its_options_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def seen(*given: object, **named: object) -> None:
        raise ZeroDivisionError(f"{named['format']} {named['group']}")

    monkeypatch.setattr("quantize.export", seen)
    with pytest.raises(ZeroDivisionError, match=r"^compressed-tensors 64$"):
        export.export(str(tmp_path), tmp_path / "out", group=export.Group.g64, quiet=True)


# The MODEL argument.


def test_a_folder_with_one_gguf(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").touch()
    assert locate.model(str(tmp_path)) == tmp_path / "a.gguf"
    (tmp_path / "b.gguf").touch()
    with pytest.raises(UsageError, match="2 GGUF files to choose from"):
        locate.model(str(tmp_path))


def test_an_alias_is_what_was_quantised_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = tmp_path / "DeepSeek-V2-Lite-Q4_K_M.gguf"
    made.touch()
    (tmp_path / "DeepSeek-V2-Lite-Chat-Q4_K_M.gguf").touch()
    assert locate.model("lite") == made


def test_a_checkpoint_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    for name in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(UsageError, match="not a GGUF") as caught:
            locate.model(str(name))
        assert "dsv2 quantize" in caught.value.hint


def test_nothing_means_the_packaged_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locate, "PACKAGED", tmp_path)
    with pytest.raises(CliError, match="ships no model"):
        locate.model(None)
    (tmp_path / "story.gguf").touch()
    assert locate.model(None) == tmp_path / "story.gguf"
