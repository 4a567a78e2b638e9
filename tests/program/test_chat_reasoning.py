"""Reasoning in conversations and on the command line; prompts with control tokens; what a file leaves out, told."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from support.cli import dsv2, terminal
from support.templates import MARKERS, family_keys
from support.tiny import Checkpoint, gguf_metadata, gguf_tensors, spec_named, variant, write_tensors
from support.vocab import BOS, N_VOCAB, V2_TEMPLATE

import cext
from cext.tokenizer import Message, Tokenizer
from dsv2cli.chat.conversation import Conversation, Turn
from dsv2cli.chat.reasoning import Reasoning

SWITCHED = (  # R1's way with reasoning, and V3.1's switch
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|user|>' + m['content'] }}{% else %}"
    "{{ '<|assistant|>' + m['content'].split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% if not thinking is defined or thinking %}{{ '<think>\n' }}"
    "{% else %}{{ '</think>' }}{% endif %}{% endif %}"
)


def write(path: Path, template: str | None, **changes: object) -> Path:
    spec = variant(spec_named("lite"), n_ctx=4096, n_vocab=N_VOCAB + len(MARKERS))
    keys = gguf_metadata(spec) | family_keys(template, **changes)
    return write_tensors(path, keys, gguf_tensors(Checkpoint(spec)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reasoning")


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    return write(folder / "switched.gguf", SWITCHED)


def test_a_conversation_keeps_the_opening_tag_with_its_answer(model: Path) -> None:
    with cext.Model(model, threads=1) as opened, Tokenizer(model) as tokenizer:
        talk = Conversation(opened.session(512, "f32"), tokenizer)
        list(talk.reply("Hi", cext.Sampler(temperature=0), 5))
        (turn,) = talk.turns
        assert talk.opening == "<think>\n" and tokenizer.decode(turn.opening) == "<think>\n"
        said = talk.said()
        assert said.content == "" and said.reasoning == tokenizer.decode(turn.answer).strip()
        end = tokenizer.control_id("</think>") or 0
        talk.turns = [Turn("Hi", [*tokenizer.encode("because"), end, *tokenizer.encode("Yes")], turn.opening)]
        talk.turns.append(Turn("And?"))
        said_next = tokenizer.decode(talk._make_room([], 1))
        assert "because" not in said_next and "Yes" in said_next
        assert talk.turns[-1].opening == turn.opening
        talk.thinking = False
        talk._make_room([], 1)
        assert talk.turns[-1].opening == [] and talk._make_room([], 1)[-1] == end


def test_reasoning_is_a_part_of_its_own_in_json(model: Path) -> None:
    on = json.loads(dsv2("chat", model, "-p", "Hi", "--json", "-n", "4", "--temp", "0").stdout)
    assert on["reasoning"] and on["answer"] == ""
    off = json.loads(dsv2("chat", model, "-p", "Hi", "--json", "-n", "4", "--temp", "0", "--think", "off").stdout)
    assert off["reasoning"] is None and off["answer"] and off["prompt_tokens"] == on["prompt_tokens"] - 1


def test_the_opening_tag_is_not_lost_from_the_text(model: Path) -> None:
    ask = ("chat", model, "-p", "Hi", "-q", "-n", "4", "--temp", "0")
    assert dsv2(*ask).stdout.startswith("<think>\n")
    assert "think>" not in dsv2(*ask, "--raw").stdout


def pieces(tokenizer: Tokenizer, ids: list[int], opening: str = "") -> tuple[str, str, int]:
    """(reasoning, content, tokens of reasoning) of an answer that comes token by token."""
    reasoning, stream = Reasoning(tokenizer), tokenizer.stream()
    came = [piece for id in ids for piece in reasoning.feed(opening * (id == ids[0]) + stream.feed(id), id)]
    came += reasoning.finish()
    kinds = [piece.reasoning for piece in came]
    assert kinds == sorted(kinds, reverse=True) and all(piece.text for piece in came)
    said, rest = ("".join(p.text for p in came if p.reasoning == kind) for kind in (True, False))
    return said, rest, reasoning.n_tokens


def test_reasoning_as_it_comes(model: Path) -> None:
    with Tokenizer(model) as tokenizer:
        opens, closes = (tokenizer.control_id(tag) or 0 for tag in ("<think>", "</think>"))
        plain = tokenizer.encode
        spelt = plain("</think>")  # letters, which are no tag where the tag is a token
        assert closes not in spelt
        ids = [opens, *plain("why"), *spelt, *plain("not"), closes, *plain("\n\nYes </think>")]
        expected = ("<think>why</think>not</think>", "\n\nYes </think>", ids.index(closes) + 1)
        assert pieces(tokenizer, ids) == expected
        assert pieces(tokenizer, ids[1:], "<think>\n") == ("<think>\n" + expected[0][7:], expected[1], expected[2] - 1)
        assert pieces(tokenizer, [opens, *plain("on and on")])[:2] == ("<think>on and on", "")
        for text in ("No tag.", "<thin air>", "<thi", "a <think> in the middle</think>"):
            assert pieces(tokenizer, plain(text)) == ("", text, 0)
        letters = plain("[THINK] so [/THIN] or [/THINK]done")  # of a vocabulary that has no such tokens
        assert pieces(tokenizer, letters)[:2] == ("[THINK] so [/THIN] or [/THINK]", "done")
        assert pieces(tokenizer, plain("[THINK] so [/THI"))[:2] == ("[THINK] so [/THI", "")


def test_reasoning_is_dim_or_folded_on_a_terminal_and_plain_in_a_pipe(model: Path, tmp_path: Path) -> None:
    with terminal("chat", model, "-n", "4", "--temp", "0", XDG_STATE_HOME=str(tmp_path)) as screen:
        at = screen.wait_for("> $")
        screen.type("Hi\n")
        at = screen.wait_for(r"Hi\n<think>\n\S+(.|\n)*-n\)\n> $", at)
        assert b"\x1b[2m<think>" in screen.raw
        screen.type("/think hide\n/think\n")
        at = screen.wait_for(r"auto, hidden\n> $", at)
        screen.type("/retry\n")
        end = screen.wait_for(r"-n\)\n> $", at)
        assert re.search(r"\(thought for [\d.]+ s, 4 tokens; /think show shows it\)\n", screen.text[at:end])
        assert "<think>" not in screen.text[at:end]
        screen.type("/think off\n/retry\n")  # content: nothing to fold
        at = screen.wait_for(r"/retry\n(.|\n)*-n\)\n> $", end)
        assert "thought" not in screen.text[end:at]
        screen.type("/think auto\n/think show\n/retry\n")
        screen.wait_for(r"/retry\n<think>\n(.|\n)*-n\)\n> $", at)
    with terminal("chat", model, "-n", "4", "--temp", "0", "-p", "Hi", "-q", NO_COLOR="1") as screen:
        assert screen.exit_code() == 0 and b"\x1b" not in screen.raw and "<think>" in screen.text
    assert "\x1b" not in dsv2("chat", model, "-n", "4", "--temp", "0", "-p", "Hi", "-q").stdout


def test_a_model_without_the_switch_says_so(folder: Path) -> None:
    plain = write(folder / "plain.gguf", V2_TEMPLATE)
    result = dsv2("chat", plain, "-p", "Hi", "-n", "2", "--think", "on")
    assert result.returncode == 1 and "cannot switch reasoning on: it knows no reasoning" in result.stderr
    assert "hint: --think auto leaves that to the template" in result.stderr and "template" in result.stderr
    assert dsv2("chat", plain, "-p", "Hi", "-n", "2", "--think", "off").returncode == 0


def test_control_tokens_in_a_raw_prompt(model: Path) -> None:
    def n_tokens(*options: str) -> int:
        result = dsv2("chat", model, "-p", f"{BOS}<|user|>", "--raw", "--json", "-n", "1", *options)
        n: int = json.loads(result.stdout)["prompt_tokens"]
        return n

    assert n_tokens("--special") == 2 and n_tokens() > 10


def test_filling_in_from_the_command_line(model: Path, folder: Path) -> None:
    result = dsv2("chat", model, "--fim", "a", "b", "--json", "-n", "1")
    report = json.loads(result.stdout)
    assert report["prompt_tokens"] == 6 and report["reasoning"] is None  # BOS, begin, a, hole, b, end
    tokens = [text.replace("fim▁", "nothing▁") for text in family_keys(None)["tokenizer.ggml.tokens"]]
    without = write(folder / "without.gguf", V2_TEMPLATE, ggml__tokens=tokens)
    refused = dsv2("chat", without, "--fim", "a", "b", "-n", "1")
    assert refused.returncode == 1 and "has no tokens for filling in" in refused.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--special", "-p", "x"], "--special is for --raw"),
        (["--fim", "a", "b", "-p", "x"], "--fim is a whole prompt"),
        (["--raw", "--think", "on", "-p", "x"], "--think needs the chat template"),
        (["--think", "maybe", "-p", "x"], "--think"),
    ],
)
def test_options_that_do_not_go_together(options: list[str], message: str) -> None:
    result = dsv2("chat", *options)
    assert result.returncode == 2 and message in result.stderr and result.stdout == ""


def test_what_a_file_leaves_out_is_told_once(folder: Path) -> None:
    bare = write(folder / "bare.gguf", None, ggml__pre=None)
    for command in (["chat", bare, "-p", "Hi", "-n", "1"], ["perplexity", bare, "--ctx", "64"]):
        (folder / "text.txt").write_text("The User and the Assistant. " * 40, encoding="utf-8")
        more = ["--text", folder / "text.txt"] if command[0] == "perplexity" else []
        result = dsv2(*command, *more)
        told = " ".join(result.stderr.split())
        assert told.count("tokenizer.ggml.pre") == 1 and told.count("tokenizer.chat_template") == 1, result.stderr
        assert result.returncode == 0 and told.count("warning:") >= 2 and "warning" not in result.stdout


def test_a_message_that_the_template_refuses(folder: Path) -> None:
    refusing = "{% if 'bad' in messages[-1].content %}{{ raise_exception('no bad words') }}{% endif %}" + V2_TEMPLATE
    path = write(folder / "refusing.gguf", refusing)
    result = dsv2("chat", path, "-p", "bad", "-n", "1")
    assert result.returncode == 1 and "refuses this conversation: no bad words" in " ".join(result.stderr.split())
    with Tokenizer(path) as tokenizer:
        assert tokenizer.chat([Message("user", "good")])
