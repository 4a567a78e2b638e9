"""The commands end to end, as processes: output, exit codes, error lines, pipes, and a conversation in a terminal."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import signal
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support import vocab
from support.checkpoints import V2, write_checkpoint
from support.cli import COMMAND, SECONDS, assert_fails, dsv2, dsv2_after, environment, processor_seconds, terminal
from support.tiny import (
    Checkpoint,
    Spec,
    gguf_metadata,
    gguf_tensors,
    spec_named,
    variant,
    write_tensors,
)
from support.vocab import N_VOCAB, write_model, write_vocab

import cext
from cext.tokenizer import Tokenizer
from dsv2cli import locate
from dsv2cli.commands import export
from dsv2cli.commands.bench import parse_depths
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
SPEC = variant(spec_named("lite"), n_ctx=4096)
LONG = ("-c", "200000", "--temp", "0")  # of the endless model's answers: none that is stopped has ended before


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    return write_model(folder / "tiny.gguf", SPEC)


@pytest.fixture(scope="module")
def endless(folder: Path) -> Path:
    """A model whose greedy answers go on until something else ends them, for however long it says it was trained."""
    return write_model(folder / "endless.gguf", variant(SPEC, n_ctx=1 << 20), endless=True)


@pytest.fixture(scope="module")
def half(folder: Path) -> Path:
    """The same model in f16."""
    return write_model(folder / "half.gguf", SPEC, dtype=np.float16)


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
    """0.3 s are promised."""
    assert processor_seconds([*COMMAND, "--help"], environment(), 0.3) < 0.3


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


# One answer.


def test_one_answer(model: Path) -> None:
    result = dsv2("chat", model, "-p", "Hi", "-n", "12", "--seed", "1")
    assert result.returncode == 0
    assert result.stdout.endswith("\n") and result.stdout.strip()
    assert "tok/s" in result.stderr and "first token" in result.stderr and "in memory" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_same_prompt_by_every_way(model: Path) -> None:
    options = ["-n", "12", "--seed", "1", "-q"]
    answers = [
        dsv2("chat", model, "-p", "Hi", *options),
        dsv2("chat", model, "-p", "-", *options, stdin="Hi"),
        dsv2("chat", model, *options, stdin="Hi\n"),
        dsv2("chat", model, "-p", "Hi", *options, stdin="\n"),
    ]
    assert len({a.stdout for a in answers}) == 1 and answers[0].stdout
    assert {a.stderr for a in answers} == {""}


def test_an_answer_as_json(model: Path) -> None:
    options = ["-p", "Hi", "-n", "9", "--seed", "4"]
    told = json.loads(dsv2("chat", model, "--json", *options).stdout)
    assert told["answer"].rstrip("\n") == dsv2("chat", model, "-q", *options).stdout.rstrip("\n")
    assert told["seed"] == 4 and told["answer_tokens"] <= 9 and told["stop"] in ("length", "end")
    assert told["resident_bytes"] > 1e6 and told["first_token_seconds"] > 0


def test_raw_is_the_plain_text(model: Path) -> None:
    with cext.Model(model) as opened, Tokenizer(model) as tokenizer:
        session = opened.session(64)
        ids, out = tokenizer.prompt("Once the"), []
        for _ in range(8):
            out.append(int(session.eval(ids).argmax()))
            ids = out[-1:]
        expected = tokenizer.decode(out)
    result = dsv2("chat", model, "--raw", "-p", "Once the", "-n", "8", "--temp", "0", "-q")
    assert result.stdout.rstrip("\n") == expected.rstrip("\n")


def test_lookup_changes_the_speed_alone(endless: Path) -> None:
    options = ["-p", "the User the User the User the User", "-n", "900", "--temp", "0", "--json"]
    plain, drafted = (json.loads(dsv2("chat", endless, *options, "--lookup", n).stdout) for n in ("0", "3"))
    assert drafted["answer"] == plain["answer"] and plain["drafted_tokens"] == plain["taken_tokens"] == 0
    assert drafted["drafted_tokens"] >= drafted["taken_tokens"] > 0


@pytest.mark.parametrize("kv", ["f16", "q8_0", "f32"])
def test_the_cache_that_was_asked_for(model: Path, kv: str) -> None:
    told = json.loads(dsv2("chat", model, "-p", "Hi", "-n", "3", "-c", "256", "--kv", kv, "--json").stdout)
    with cext.Model(model) as opened:
        assert (told["kv_type"], told["kv_bytes"]) == (kv, opened.session(256, kv).kv_bytes)


def test_a_prompt_longer_than_the_context(model: Path) -> None:
    assert_fails(dsv2("chat", model, "-p", "z" * 500, "-c", "128"), 1, "do not fit in a context of 128", "-c 1024")


def test_a_full_context_ends_the_answer(endless: Path) -> None:
    result = dsv2("chat", endless, "-p", "Hi", "-c", "48", "--temp", "0")
    assert result.returncode == 0
    assert "(the context of 48 tokens is full: -c makes it larger)" in result.stderr
    told = json.loads(dsv2("chat", endless, "-p", "Hi", "-c", "48", "--temp", "0", "--json").stdout)
    assert told["stop"] == "context" and told["prompt_tokens"] + told["answer_tokens"] == 48 + 1


def test_a_reader_that_leaves(endless: Path) -> None:
    """dsv2 chat | head -c 1. An answer that no pipe holds: it is not through when the reader leaves."""
    process = subprocess.Popen(
        [*COMMAND, "chat", str(endless), "-p", "Hi", "-q", *LONG],
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout and process.stderr
    process.stdout.read(1)
    process.stdout.close()
    told = process.stderr.read()
    assert process.wait(SECONDS) == 1 and told == ""


@pytest.mark.parametrize("stream", [0, 1, 2])
def test_closed_streams(model: Path, stream: int) -> None:
    command = [*COMMAND, "chat", str(model), "-p", "Hi", "-n", "3"]
    result = subprocess.run(
        ["/bin/sh", "-c", f'exec "$@" {stream}>&-', "sh", *command], env=environment(), capture_output=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_a_closed_stdin_without_a_prompt(model: Path) -> None:
    shell = ["/bin/sh", "-c", 'exec "$@" 0<&-', "sh", *COMMAND, "chat", str(model)]
    result = subprocess.run(shell, env=environment(), capture_output=True, text=True, check=False)
    assert_fails(result, 2, "prompt is empty")


def test_output_that_cannot_be_encoded(model: Path) -> None:
    result = dsv2(
        "chat", model, "--raw", "-p", "Hi — 你", "-n", "20", "--temp", "3", "--seed", "1", PYTHONIOENCODING="ascii"
    )
    assert result.returncode == 0 and "Traceback" not in result.stderr
    assert "?" in result.stdout and result.stdout.isascii()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a Linux device")
def test_stdout_on_a_full_disk(model: Path) -> None:
    with Path("/dev/full").open("w") as full:
        command = [*COMMAND, "inspect", str(model)]
        result = subprocess.run(command, env=environment(), stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert result.returncode == 1 and result.stderr == "error: cannot write the output: No space left on device\n"


def test_an_answer_on_a_full_disk(endless: Path, tmp_path: Path) -> None:
    """Of a file system's limit for one file, here."""
    limit = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64)); "
    with (tmp_path / "out").open("w") as out:
        command = [
            *COMMAND[:-1],
            limit + COMMAND[-1],
            "chat",
            str(endless),
            "-p",
            "Hi",
            "-q",
            "--temp",
            "0",
            "-n",
            "99",
        ]
        result = subprocess.run(command, env=environment(), stdout=out, stderr=subprocess.PIPE, text=True, check=False)
    assert result.returncode == 1 and result.stderr == "error: cannot write the output: File too large\n"
    assert 0 < (tmp_path / "out").stat().st_size <= 64


def test_json_of_an_answer_that_was_stopped(endless: Path) -> None:
    """What there is of it, and why it ended: Ctrl-C comes before the twentieth step."""
    script = (
        "import os, signal; from dsv2cli.scheduler import Scheduler as S; step, n = S.step, iter(range(1, 99));"
        " S.step = lambda s: (next(n) == 20 and os.kill(os.getpid(), signal.SIGINT), step(s))[1]"
    )
    stopped = dsv2_after(script, "chat", str(endless), "-p", "Hi", *LONG, "--json", DSV2_DEBUG="1")
    assert stopped.returncode == 130 and "Traceback" not in stopped.stderr, stopped.stderr
    answer = json.loads(stopped.stdout)
    assert answer["stop"] == "cancelled" and answer["answer_tokens"] > 0 and answer["answer"]


def test_interrupted_from_outside(endless: Path) -> None:
    command = [*COMMAND, "chat", str(endless), "-p", "Hi", *LONG]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout and process.stderr
    process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=SECONDS)
    assert process.returncode == 130 and "Traceback" not in told


def test_a_model_whose_weights_are_no_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = vocab.gguf_tensors

    def damaged(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
        tensors = made(checkpoint)
        return {**tensors, "output_norm.weight": tensors["output_norm.weight"] * np.float32(np.nan)}

    monkeypatch.setattr(vocab, "gguf_tensors", damaged)
    path = write_model(tmp_path / "nan.gguf", SPEC)
    assert_fails(dsv2("chat", path, "-p", "Hi", "-n", "3"), 1, "damaged")
    (tmp_path / "t.txt").write_text("a text of some length " * 9, encoding="utf-8")
    assert_fails(dsv2("perplexity", path, "--text", tmp_path / "t.txt", "--ctx", "32"), 1, "nan.gguf", "damaged")


@pytest.mark.skipif(not list(locate.PACKAGED.glob("*.gguf")), reason="the packaged model is not here")
def test_the_packaged_model_answers_soon() -> None:
    """1.5 s from return to the first token are promised."""
    ask = ("chat", "-p", "Tell me a story about a ship.", "-n", "1", "-q")
    assert dsv2(*ask).stdout.strip()
    assert processor_seconds([*COMMAND, *ask], environment(), 1.5) < 1.5


# A conversation in a terminal.


def test_a_conversation(model: Path, tmp_path: Path) -> None:
    with terminal("chat", model, "--seed", "1", "-n", "8", XDG_STATE_HOME=str(tmp_path)) as screen:
        at = screen.wait_for("/help lists the commands.*\n> ")
        screen.type("Hi\n")
        at = screen.wait_for(r"\(stopped after 8 tokens: -n\)\n> |\n> ", at)
        screen.type("/nonsense\n")
        at = screen.wait_for(r"no command /nonsense.*\n> ", at)
        screen.type("/system Be brief.\n")
        at = screen.wait_for("\n> $", at)
        screen.type("/system\n")
        at = screen.wait_for("\nBe brief\\.\n> $", at)
        screen.type("/stats\n")
        at = screen.wait_for(r"1 turn, \d+ of 4096 tokens of context", at)
        at = screen.wait_for("\n> $", at)
        screen.type("/retry\n")
        at = screen.wait_for("\n> $", at)
        screen.type("/clear\n")
        at = screen.wait_for("\n> $", at)
        screen.type("/stats\n")
        at = screen.wait_for("0 turns, 0 of 4096 tokens of context\n> $", at)
        screen.type("/help\n")
        at = screen.wait_for("/retry +answer the last message again", at)
        screen.type("/exit\n")
        assert screen.exit_code() == 0, screen.text
    history = (tmp_path / "dsv2" / "history").read_text(encoding="utf-8")
    assert history.splitlines()[:2] == ["Hi", "/nonsense"]
    assert (tmp_path / "dsv2" / "history").stat().st_mode & 0o077 == 0


def test_ctrl_c_stops_the_answer_and_not_the_program(endless: Path) -> None:
    with terminal("chat", endless, *LONG) as screen:
        at = screen.wait_for("> $")
        screen.type("Hi\n")
        screen.wait_for(r"Hi\n(.|\n){40}", at)
        screen.type("\x03")
        at = screen.wait_for(r"\(stopped\)\n> $", at)
        screen.type("\x03")
        at = screen.wait_for(r"\(/exit or Ctrl-D leaves\)\n> $", at)
        screen.type("/stats\n")
        screen.wait_for(r"tokens of context\n> $", at)  # Ctrl-D before readline waits would be lost
        screen.type("\x04")
        assert screen.exit_code() == 0, screen.text


def test_a_message_that_does_not_fit_is_told_and_the_talk_goes_on(model: Path) -> None:
    with terminal("chat", model, "-c", "128", "-n", "4") as screen:
        at = screen.wait_for("> ")
        screen.type("z" * 300 + "\n")
        at = screen.wait_for(r"error:.*do not fit in a context of 128(.|\n)*hint:(.|\n)*> ", at)
        screen.type("Hi\n")
        at = screen.wait_for("\n> $", at)
        screen.type("\x04")
        assert screen.exit_code() == 0, screen.text


def test_colours_on_a_terminal_only_and_not_under_no_color(model: Path) -> None:
    for no_color in ("", "1"):
        read, write = os.openpty()
        env = environment(TERM="xterm", NO_COLOR=no_color)
        process = subprocess.Popen([*COMMAND, "chat", "--nonsense"], env=env, stderr=write, stdin=subprocess.DEVNULL)
        process.wait(SECONDS)
        os.close(write)
        assert (b"\x1b[" in os.read(read, 4096)) == (no_color == "")
        os.close(read)
    assert "\x1b" not in dsv2("chat", "--nonsense").stderr


# inspect.


def test_inspect_shows_the_shape(model: Path) -> None:
    shown = dsv2("inspect", model).stdout
    for words in (
        "deepseek2",
        "3 of width 64, the first 1 dense",
        "3 of 8 + 2 shared",
        "f32",
        "routed experts",
        "4096",
    ):
        assert words in shown
    assert "\x1b" not in shown


@pytest.mark.parametrize("name", ["lite", "pro", "v3", "tied", "all_dense"])
def test_inspect_counts_every_byte(name: str, tmp_path: Path) -> None:
    spec = spec_named(name)
    path = write_model(tmp_path / "m.gguf", spec)
    told = json.loads(dsv2("inspect", path, "--json", "--ctx", "100").stdout)
    with cext.Gguf(path) as gguf:
        sizes = {t.name: t.nbytes for t in gguf.tensors}
    assert told["tensor_bytes"] == sum(sizes.values()) == sum(t["nbytes"] for t in told["types"])
    assert sum(p["nbytes"] for p in told["parts"]) == told["tensor_bytes"]
    parts = {p["part"]: p["token_bytes"] for p in told["parts"]}
    routed = sum(n for t, n in sizes.items() if "_exps" in t)
    assert parts.get("routed experts", 0) == routed * spec.n_used // spec.n_expert
    row = sizes["token_embd.weight"] // N_VOCAB
    assert parts["embeddings"] == (sizes["token_embd.weight"] if spec.tied else row)
    cache = told["kv_bytes_per_token"]
    assert cache["f32"] == 4 * (spec.kv_lora_rank + spec.rope) * spec.n_layer
    assert told["memory"] == [
        {"context": 100, "nbytes": {kv: told["tensor_bytes"] + 100 * n for kv, n in cache.items()}}
    ]


def write_without(path: Path, spec: Spec, *missing: str, **put: int) -> Path:
    """The spec's model with a draft head's block behind its own, keys changed and left out."""
    keys = gguf_metadata(spec) | {f"deepseek2.{key}": value for key, value in put.items()}
    tensors, last = gguf_tensors(Checkpoint(spec)), f"blk.{spec.n_layer - 1}."
    tensors |= {k.replace(last, f"blk.{spec.n_layer}."): v for k, v in tensors.items() if k.startswith(last)}
    kept = {key: value for key, value in keys.items() if key.removeprefix("deepseek2.") not in missing}
    return write_tensors(path, kept | vocab.vocabulary(vocab.V2_TEMPLATE), tensors)


def test_what_a_file_leaves_unsaid_is_told_once(tmp_path: Path) -> None:
    spec = variant(spec_named("v3"), n_vocab=N_VOCAB)
    path = write_without(
        tmp_path / "old.gguf", spec, "expert_gating_func", block_count=spec.n_layer + 1, nextn_predict_layers=1
    )
    for command in (("inspect", path, "--json"), ("chat", path, "--raw", "-p", "a", "-n", "1")):
        told = dsv2(*command).stderr
        assert told.count("warning:") == 1, told
        assert "old.gguf`: `deepseek2.expert_gating_func` is missing: sigmoid" in told
    described = json.loads(dsv2("inspect", path, "--json").stdout)
    assert described["keys"]["block_count"] == spec.n_layer
    assert described["kv_bytes_per_token"]["f32"] == 4 * (spec.kv_lora_rank + spec.rope) * spec.n_layer
    assert next(p for p in described["parts"] if p["part"] == "draft head")["token_bytes"] == 0
    assert len(described["remarks"]) == 1


def test_inspect_says_why_a_file_does_not_run(tmp_path: Path) -> None:
    spec = variant(spec_named("lite"), n_vocab=N_VOCAB)
    shown = dsv2("inspect", write_without(tmp_path / "new.gguf", spec, final_logit_softcapping=30))
    assert "`deepseek2.final_logit_softcapping` is 30" in shown.stderr
    assert "does not run it" in shown.stderr
    assert "routed experts" in shown.stdout


@pytest.mark.parametrize(("rank", "rope"), [(512, 64), (256, 32), (SPEC.kv_lora_rank, SPEC.rope)])
def test_inspect_of_the_cache_is_what_a_session_takes(tmp_path: Path, rank: int, rope: int) -> None:
    path = write_model(tmp_path / "m.gguf", variant(SPEC, kv_lora_rank=rank, rope=rope))
    told = json.loads(dsv2("inspect", path, "--json").stdout)["kv_bytes_per_token"]
    with cext.Model(path) as opened:
        assert {kv: opened.session(256, kv).kv_bytes // 256 for kv in ("f16", "q8_0", "f32")} == told


# perplexity.


def by_hand(model: Path, text: str, n_ctx: int, skip: int) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities of the scored positions, (n, n_vocab), and their targets, one token at a time."""
    rows, targets = [], []
    with cext.Model(model) as opened, Tokenizer(model) as tokenizer:
        ids = tokenizer.encode(text)
        step = n_ctx - 1
        for start in range(0, len(ids) - step + 1, step):
            window = [tokenizer.bos, *ids[start : start + step]]
            session = opened.session(n_ctx)
            for i, token in enumerate(window[:-1]):
                logits = session.eval([token]).astype(np.longdouble)
                if i >= skip:
                    rows.append(logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max())
                    targets.append(window[i + 1])
    return np.array(rows), np.array(targets)


def test_perplexity(model: Path, text: Path) -> None:
    told = json.loads(dsv2("perplexity", model, "--text", text, "--ctx", "64", "--json").stdout)
    rows, targets = by_hand(model, text.read_text(encoding="utf-8"), 64, 16)
    assert told["n_scored"] == len(targets) == told["n_windows"] * 47 and told["skip"] == 16
    # float32 logits of two ways through the engine (a window at once, a token at a time), 1e-4 of their range apart
    nll = -float(rows[np.arange(len(targets)), targets].mean())
    assert told["nll"] == pytest.approx(nll, abs=2e-3)
    assert told["perplexity"] == pytest.approx(math.exp(told["nll"]))
    means = [-rows[i : i + 47][np.arange(47), targets[i : i + 47]].mean() for i in range(0, len(targets), 47)]
    error = told["perplexity"] * np.std(means, ddof=1) / len(means) ** 0.5
    assert told["perplexity_error"] == pytest.approx(float(error), rel=1e-2)


def test_distance_from_a_reference(model: Path, half: Path, text: Path) -> None:
    options = ["--text", text, "--ctx", "64", "--reference", model, "--json"]
    told = json.loads(dsv2("perplexity", half, *options).stdout)["reference"]
    content = text.read_text(encoding="utf-8")
    (mine, _), (theirs, _) = by_hand(half, content, 64, 16), by_hand(model, content, 64, 16)
    kld = (np.exp(theirs) * (theirs - mine)).sum(axis=1)
    assert 0 < told["kld_mean"] < 1e-2
    assert told["kld_mean"] == pytest.approx(float(kld.mean()), rel=0.05)
    assert told["kld_p99"] == pytest.approx(float(np.percentile(kld, 99)), rel=0.2)
    agree = float((mine.argmax(axis=1) == theirs.argmax(axis=1)).mean())
    assert told["top1"] == pytest.approx(agree, abs=2 / len(mine))
    assert 0.9 < told["routing"] <= 1


def test_a_model_is_its_own_reference(model: Path, text: Path) -> None:
    options = ["--text", text, "--ctx", "64", "--windows", "2", "--reference", model, "--json"]
    told = json.loads(dsv2("perplexity", model, *options).stdout)
    against = told["reference"]
    assert against["kld_mean"] == against["kld_max"] == 0
    assert against["top1"] == against["routing"] == against["perplexity_ratio"] == 1
    assert told["n_windows"] == 2


def test_a_cache_beside_an_exact_one(model: Path, text: Path) -> None:
    """--reference-kv alone compares two caches of one model; with --reference it is the other model's."""
    options = ["--text", text, "--ctx", "64", "--windows", "3", "--json"]

    def distance(*more: str | Path) -> float:
        return json.loads(dsv2("perplexity", model, *options, *more).stdout)["reference"]["kld_mean"]

    exact = distance("--kv", "f32", "--reference-kv", "f32")
    half, quantised = (distance("--kv", kv, "--reference-kv", "f32") for kv in ("f16", "q8_0"))
    assert exact == 0 < half < quantised < 1e-2
    assert distance("--kv", "q8_0", "--reference", model, "--reference-kv", "f32") == quantised


def test_perplexity_of_a_text_on_stdin(model: Path, text: Path) -> None:
    options = ["--ctx", "64", "--windows", "2", "--json"]
    piped = json.loads(dsv2("perplexity", model, "--text", "-", *options, stdin=text.read_bytes()).stdout)
    named = json.loads(dsv2("perplexity", model, "--text", text, *options).stdout)
    assert piped == {**named, "text": "-"}
    assert_fails(dsv2("perplexity", model, "--text", "-", stdin="né".encode("utf-16")), 2, "stdin", "UTF-16")


def test_perplexity_of_a_pipe_with_a_name(model: Path, text: Path, tmp_path: Path) -> None:
    """perplexity model.gguf --text <(...)"""
    os.mkfifo(tmp_path / "pipe")
    with subprocess.Popen(["/bin/sh", "-c", 'cat "$1" > "$2"', "sh", str(text), str(tmp_path / "pipe")]):
        options = ["--ctx", "64", "--windows", "2", "--json"]
        told = json.loads(dsv2("perplexity", model, "--text", tmp_path / "pipe", *options).stdout)
    assert told["n_windows"] == 2


def test_perplexity_for_people(model: Path, half: Path, text: Path) -> None:
    result = dsv2("perplexity", half, "--text", text, "--ctx", "64", "--windows", "2", "--reference", model)
    assert [line.split()[0] for line in result.stdout.splitlines()] == [
        "perplexity", "reference", "mean", "p99", "top-1", "router"
    ]  # fmt: skip
    assert "the first 16 positions not scored" in result.stderr


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["--text", "missing.txt"], 1, ["missing.txt", "No such file"]),
        (["--text", "TEXT", "--ctx", "4096"], 2, ["tokens, and a window takes 4095", "--ctx"]),
        (["--text", "TEXT", "--ctx", "16", "--skip", "15"], 2, ["--skip"]),
        (["--text", "MODEL"], 2, ["not UTF-8"]),
        (["--text", "TEXT", "--ctx", "16", "--reference", "OTHER"], 2, ["different vocabularies"]),
        (["--text", "TEXT", "--ctx", "16", "--reference", "PADDED"], 2, ["different vocabularies"]),
    ],
)
def test_perplexity_refuses(
    args: list[str], code: int, words: list[str], model: Path, text: Path, tmp_path: Path, tiny_gguf
) -> None:
    padded = variant(SPEC, n_vocab=N_VOCAB + 8)  # the same tokens, and a head of more rows
    keys = gguf_metadata(padded) | vocab.vocabulary(vocab.V2_TEMPLATE)
    named = {
        "TEXT": str(text),
        "MODEL": str(model),
        "OTHER": str(tiny_gguf(variant(SPEC, n_vocab=N_VOCAB))),
        "PADDED": str(write_tensors(tmp_path / "padded.gguf", keys, gguf_tensors(Checkpoint(padded)))),
    }
    assert_fails(dsv2("perplexity", model, *(named.get(a, a) for a in args)), code, *words)


# bench.


def test_bench_alone(model: Path) -> None:
    result = dsv2("bench", model, "-p", "16", "-n", "4", "-d", "0,32", "-r", "2", "-t", "1")
    assert result.returncode == 0, result.stderr
    for test in ("prefill 16 ", "decode 4 ", "prefill 16 at 32", "decode 4 at 32"):
        assert test in result.stdout
    assert "first logits" in result.stdout and "median of 2 rounds" in result.stderr


def test_bench_beside_llama_cpp(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf", variant(SPEC, n_layer=27))  # without q-LoRA it runs 26, 27 or 48 layers
    result = dsv2("bench", path, "-p", "16", "-n", "2", "-r", "2", "-t", "1", "--against", "llama.cpp", "--json", "-q")
    assert result.returncode == 0, result.stderr
    told = json.loads(result.stdout)
    assert set(told["engines"]) == {"dsv2", "llama.cpp"} and told["threads"] == 1
    for test in told["tests"]:
        ours, theirs = test["tokens_per_second"]["dsv2"], test["tokens_per_second"]["llama.cpp"]
        assert len(ours) == len(theirs) == 2 and min(ours + theirs) > 0
        assert test["ratios"] == {"llama.cpp": [a / b for a, b in zip(ours, theirs, strict=True)]}
        assert test["variants"]["llama.cpp"] in ("fa=0", "fa=1")
    assert all(e["load_seconds"] > 0 and e["anonymous_bytes"] > 0 for e in told["engines"].values())


def test_bench_as_csv(model: Path) -> None:
    result = dsv2("bench", model, "-p", "8", "-n", "2", "-r", "2", "-t", "1", "--csv", "-q")
    rows = list(csv.DictReader(io.StringIO(result.stdout)))
    assert [(r["kind"], r["n"], r["depth"], r["round"]) for r in rows] == [
        ("prefill", "8", "0", "0"), ("prefill", "8", "0", "1"), ("decode", "2", "0", "0"), ("decode", "2", "0", "1")
    ]  # fmt: skip
    assert all(float(r["tokens_per_second"]) > 0 for r in rows)


def test_a_model_that_llama_cpp_does_not_run(model: Path) -> None:
    result = dsv2("bench", model, "-p", "8", "-n", "0", "-r", "1", "--against", "llama.cpp")
    assert_fails(result, 1, "cannot load it")
    assert result.stderr.count("llama.cpp") == 1


def test_errors_of_the_engine_are_told_as_in_other_commands(model: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(model.read_bytes()[:-100])
    errors = {dsv2(verb, bad).stderr for verb in ("inspect", "bench")}
    assert len(errors) == 1 and errors.pop().startswith("error: `")


def test_depths_are_sorted_and_each_runs_once() -> None:
    assert parse_depths("4096, 0,4096") == [0, 4096]


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
