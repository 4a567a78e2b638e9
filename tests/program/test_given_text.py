"""Text that is given: a prompt by every way, its bytes, marks and line ends; what cannot be read is refused by name."""

from __future__ import annotations

import codecs
import json
import os
import subprocess
from pathlib import Path

import pytest
from support.cli import COMMAND, environment
from support.inprocess import run
from support.tiny import spec_named, variant
from support.vocab import write_model

from cext.tokenizer import Message, Tokenizer
from dsv2cli import text
from dsv2cli.errors import UsageError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("given") / "tiny.gguf", variant(spec_named("lite"), n_ctx=4096))


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Tokenizer:
    return Tokenizer(model)


def n_tokens(model: Path, *args: str | bytes, stdin: bytes = b"", env: dict[str, str] | None = None) -> int:
    ran = run("chat", model, "-n", "1", "--json", *args, stdin=stdin, env=env or {})
    assert ran.code == 0, ran
    return int(json.loads(ran.out)["prompt_tokens"])


DOCUMENT, QUESTION = "The ship's name is né Marzipan.\n\n  indented", "What is its name?"


def test_a_document_and_a_question(model: Path, tokenizer: Tokenizer) -> None:
    expected = len(tokenizer.chat([Message("user", f"{DOCUMENT}\n\n{QUESTION}")]))
    for piped in (DOCUMENT, DOCUMENT + "\n", DOCUMENT.replace("\n", "\r\n"), "\ufeff" + DOCUMENT):
        assert n_tokens(model, "-p", QUESTION, stdin=piped.encode()) == expected
    command = [*COMMAND, "chat", str(model), "-p", QUESTION, "-n", "1", "--json"]
    piped = subprocess.run(command, env=environment(), input=DOCUMENT.encode(), capture_output=True, check=True)
    assert json.loads(piped.stdout)["prompt_tokens"] == expected
    with Path(os.devnull).open("rb") as nothing:
        alone = subprocess.run(command, env=environment(), stdin=nothing, capture_output=True, check=True)
    assert json.loads(alone.stdout)["prompt_tokens"] == len(tokenizer.chat([Message("user", QUESTION)]))


def test_space_is_a_prompt_where_the_text_is_raw(model: Path, tokenizer: Tokenizer) -> None:
    for words in ("  ", "\n\n", "\t", " \n"):
        assert n_tokens(model, "--raw", "-p", words) == len(tokenizer.prompt(words))
        assert n_tokens(model, "--raw", stdin=f"{words}\n".encode()) == len(tokenizer.prompt(words))
        assert n_tokens(model, "--raw", "-p", "x", stdin=words.encode()) == len(
            tokenizer.prompt("\n\n".join(part for part in (words.removesuffix("\n"), "x") if part))
        )
        for ran in (run("chat", model, "-p", words), run("chat", model, stdin=words.encode())):
            assert ran.code == 2 and "the prompt is empty" in ran.told
    for ran in (run("chat", model, "--raw", "-p", ""), run("chat", model, "--raw", stdin=b"\n")):
        assert ran.code == 2 and "the prompt is empty" in ran.told


def test_help_says_how_they_are_joined() -> None:
    assert "both are read: its text, an empty line, this" in " ".join(run("chat", "--help").out.decode().split())


GIVEN = [
    ("Hi there", "Hi there"),
    ("Hi there\n", "Hi there"),
    ("Hi there\r\n", "Hi there"),
    ("Hi there\n\n", "Hi there\n"),
    ("\ufeffHi there\n", "Hi there"),
    ("\ufeffa\r\nb\r\n", "a\nb"),
    ("\ufeff\ufeffa", "\ufeffa"),
    ("  a \t \n", "  a \t "),
    ("a\rb", "a\rb"),
    ("a\x00b é 模型 🦙", "a\x00b é 模型 🦙"),
    ("\n\n  x", "\n\n  x"),
]


@pytest.mark.parametrize(("given", "meant"), GIVEN)
def test_a_pipe_is_read_as_it_is(given: str, meant: str, model: Path, tokenizer: Tokenizer) -> None:
    expected = len(tokenizer.chat([Message("user", meant)]))
    assert n_tokens(model, stdin=given.encode()) == expected
    assert n_tokens(model, "-p", "-", stdin=given.encode()) == expected


def test_spaces_of_a_prompt_stay(model: Path, tokenizer: Tokenizer) -> None:
    prompt = "    if x:\n        y = 1  \n"
    assert n_tokens(model, "-p", prompt) == len(tokenizer.chat([Message("user", prompt)]))


@pytest.mark.parametrize("locale", [{"LC_ALL": "C"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}])
def test_words_of_the_command_line_are_utf8_whatever_the_locale(locale: dict[str, str], model: Path) -> None:
    command = [*COMMAND, "chat", str(model), "-n", "1", "--json"]
    counts = []
    for extra in ({}, locale):
        done = subprocess.run(
            [*command, "-p", "né 模型", "-s", "é"],
            env=environment(**extra),
            input=b"",
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        counts.append(json.loads(done.stdout)["prompt_tokens"])
    assert counts[0] == counts[1]


REFUSED = {
    "latin-1": ("né".encode("latin-1"), "byte 1 is 0xe9"),
    "cut short": ("né".encode()[:-1], "byte 1 is 0xc3"),
    "after a mark": (codecs.BOM_UTF8 + b"a\xff", "byte 4 is 0xff"),
    "half a pair": (b"a\xed\xa0\x80", "byte 1 is 0xed"),
    "utf-16": ("Hi there".encode("utf-16"), "UTF-16"),
    "utf-16, big": (codecs.BOM_UTF16_BE + "né".encode("utf-16-be"), "UTF-16"),
    "utf-16, no mark": ("Hi there".encode("utf-16-le"), "UTF-16LE"),
    "utf-16, big, no mark": ("Hi there".encode("utf-16-be"), "UTF-16BE"),
    "utf-32, no mark": ("Hi there".encode("utf-32-be"), "UTF-32BE"),
    "a model": (b"GGUF\3\0\0\0" + bytes(range(200)), "is not UTF-8"),
    "utf-32": ("Hi there".encode("utf-32"), "UTF-32"),
}


@pytest.mark.parametrize("which", REFUSED)
def test_what_is_no_utf8_is_refused(which: str, model: Path, tmp_path: Path) -> None:
    data, words = REFUSED[which]
    path = tmp_path / "t.txt"
    path.write_bytes(data)
    runs = [
        run("chat", model, "-n", "1", stdin=data),
        run("chat", model, "-n", "1", "-p", "question", stdin=data),
        run("perplexity", model, "--text", path, "-c", "16"),
    ]
    if b"\0" not in data:
        runs += [run("chat", model, "-p", data), run("chat", model, "-p", "x", "-s", data)]
    for ran in runs:
        assert ran.code == 2 and ran.out == b"", ran
        assert "expected UTF-8" in ran.told or "is not UTF-8" in ran.told
        assert words in ran.told and "iconv" in ran.told


def test_chat_and_perplexity_read_alike(model: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    body = "The User asks é.\r\nThe Assistant answers.\r\n" * 9
    path = tmp_path / "t.txt"
    path.write_bytes(codecs.BOM_UTF8 + body.encode())
    meant = body.replace("\r\n", "\n")
    assert text.read(path) == meant
    n = len(tokenizer.encode(meant))
    ran = run("perplexity", model, "--text", path, "-c", str(n + 2), "--json")
    assert f"the text has {n} tokens" in ran.told


def test_an_empty_prompt_is_no_prompt(model: Path) -> None:
    for args, stdin in (
        ([], b""),
        ([], b"\n \n"),
        (["-p", ""], b""),
        (["-p", "-"], b"\xef\xbb\xbf\r\n"),
        (["-p", " "], b" "),
    ):
        ran = run("chat", model, *args, stdin=stdin)
        assert ran.code == 2 and "prompt is empty" in ran.told


def test_decoding_refuses_by_name() -> None:
    with pytest.raises(UsageError, match="`x` is UTF-16, expected UTF-8"):
        text.decode(codecs.BOM_UTF16_LE, "`x`")
    assert text.decode(b"", "`x`") == ""
    assert text.typed("né", "x") == "né"
