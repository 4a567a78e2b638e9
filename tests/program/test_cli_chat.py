"""dsv2 chat as a process: one answer by every way that it can be asked for, and a conversation in a terminal."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
from support import vocab
from support.cli import COMMAND, SECONDS, assert_fails, dsv2, dsv2_after, environment, processor_seconds, terminal
from support.tiny import (
    Checkpoint,
    spec_named,
    variant,
)
from support.vocab import write_model

import cext
from cext.tokenizer import Tokenizer
from dsv2cli import locate

SPEC = variant(spec_named("lite"), n_ctx=4096)
LONG = ("-c", "200000", "--temp", "0")  # of the endless model's answers: none that is stopped has ended before


@pytest.fixture(scope="module")
def endless(folder: Path) -> Path:
    """A model whose greedy answers go on until something else ends them, for however long it says it was trained."""
    return write_model(folder / "endless.gguf", variant(SPEC, n_ctx=1 << 20), endless=True)


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
@pytest.mark.parametrize("unbuffered", [None, "1"])
def test_stdout_on_a_full_disk(model: Path, unbuffered: str | None) -> None:
    with Path("/dev/full").open("w") as full:
        command, env = [*COMMAND, "inspect", str(model)], environment(PYTHONUNBUFFERED=unbuffered)
        result = subprocess.run(command, env=env, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
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
