"""Text from a file, a path or an error is plain text on the screen: never rich's markup, never a control sequence."""

from __future__ import annotations

import json
import os
import re
import struct
from pathlib import Path

import pytest
from support.checkpoints import V2, write_checkpoint
from support.cli import terminal
from support.gguf_bytes import STRING, U32, gguf, kv, kv_array
from support.inprocess import Ran, run
from support.tiny import spec_named, variant
from support.vocab import write_model

from dsv2cli import console

SPEC = variant(spec_named("lite"), n_ctx=4096)
NAMES: dict[str, bytes] = {
    "style": b"[bold red]x[/bold red]",
    "closing": b"x [/INST] y",
    "link": b"[link=http://example.org]x[/link]",
    "emoji and layout": b":smile: {task.description} {0} %s %(x)d \\x1b",
    "title and colour": b"x\x1b]0;pwned\x07\x1b[38;5;213mred",
    "device control": b"x\x1bP+q544e\x1b\\y\x1b_a\x1b\\",
    "eight bits": "x\x9b38;5;213my\x90z".encode(),
    "bell": b"x\x07\x08\x7f\x00\x0b\x0c",
    "lines": b"x\ny\r\nz\rw\t\xe2\x80\xa8v",
    "turned round": "x\u202egnp.exe\u2066y\u2069".encode(),
    "half a pair": b"x\xed\xa0\x80y",
    "no utf-8": b"x\xff\xfe\xe9",
    "long": b"x" * (1 << 20),
}
CONTROL = re.compile(rb"[\x00-\x09\x0b-\x1f\x7f]")
OURS = re.compile(  # colours, a cursor hidden, lines erased
    rb"\x1b\[(?!38;5;213)[0-9;]*m|\x1b\[\?25[lh]|\r?\x1b\[(2K|1A)|\r(?=\n|$)"
)
OTHERS = [chr(c) for c in (*range(0x80, 0xA0), 0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A))]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("The User asks the Assistant. " * 30, encoding="utf-8")
    return path


def named(folder: Path, name: bytes) -> Path:
    """A model whose general.name is these bytes."""
    stand_in = "N" * len(name)
    data = write_model(folder / "m.gguf", variant(SPEC, name=stand_in)).read_bytes()
    before = b"general.name" + struct.pack("<IQ", STRING, len(name))
    assert data.count(before) == 1
    (folder / "m.gguf").write_bytes(data.replace(before + stand_in.encode(), before + name))
    return folder / "m.gguf"


def assert_harmless(ran: Ran, *, coloured: bool = False) -> None:
    assert b"internal error" not in ran.err and b"Traceback" not in ran.err, ran.told
    for stream in (ran.out, ran.err):
        shown = stream
        if coloured:  # ours: colours and the bars of progress, which are these and no others
            shown = OURS.sub(b"", shown)
        found = CONTROL.search(shown)
        assert found is None, shown[max(0, found.start() - 40) : found.end() + 40]
        assert not [c for c in OTHERS if c in shown.decode("utf-8", "replace")]


@pytest.mark.parametrize("which", NAMES)
@pytest.mark.parametrize("env", [{"TERM": "dumb"}, {"TERM": "xterm-256color"}], ids=["dumb", "colours"])
def test_a_models_name(which: str, env: dict[str, str], tmp_path: Path, text: Path) -> None:
    path = named(tmp_path, NAMES[which])
    for args in (
        ["inspect", path],
        ["inspect", path, "--json"],
        ["chat", path, "-p", "x", "-n", "1", "--raw"],
        ["chat", path, "-p", "z" * 5000],
        ["perplexity", path, "--text", text, "-c", "32", "--windows", "1"],
        ["inspect", path, "--heatmap", tmp_path / "u.png"],
    ):
        ran = run(*args, terminal=True, env=env)
        assert_harmless(ran, coloured=env["TERM"] != "dumb")
        assert len(ran.out) < 20_000 or "--json" in args
    shown = run("inspect", path, terminal=True, env=env).out.decode()
    assert "[bold red]x[/bold red]" in shown or which != "style"
    assert "x [/INST] y" in shown or which != "closing"
    assert ":smile: {task.description} {0} %s" in shown or which != "emoji and layout"


@pytest.mark.parametrize("which", NAMES)
def test_names_as_json(which: str, tmp_path: Path) -> None:
    path = named(tmp_path, NAMES[which])
    for encoding in ("utf-8", "ascii", "latin-1"):
        told = json.loads(run("inspect", path, "--json", terminal=True, encoding=encoding).out.decode(encoding))
        assert told["name"] == NAMES[which].decode("utf-8", "replace")


@pytest.mark.parametrize("which", [name for name in NAMES if name not in ("bell", "long")])
def test_paths(which: str, tmp_path: Path, text: Path) -> None:
    folder = tmp_path / os.fsdecode(NAMES[which].replace(b"/", b"|"))
    folder.mkdir()
    model = write_model(folder / "m.gguf", SPEC)
    written = folder / "t.txt"
    written.write_bytes(text.read_bytes())
    checkpoint, empty = folder / "ck", folder / "empty"
    empty.mkdir()
    write_checkpoint(checkpoint, V2)
    for args, code in (
        (["inspect", model], 0),
        (["chat", model, "-p", "x", "-n", "1", "--raw"], 0),
        (["perplexity", model, "--text", written, "-c", "32", "--windows", "1"], 0),
        (["perplexity", model, "--text", folder], 1),
        (["chat", folder / "no.gguf", "-p", "x"], 1),
        (["chat", folder.name, "-p", "x"], 2),
        (["quantize", model, "-o", model], 2),
        (["quantize", empty], 1),
        (["quantize", checkpoint, "-o", folder], 2),
        (["download", folder.name], 2),
    ):
        ran = run(*args, terminal=True, env={"TERM": "dumb", "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder)})
        assert_harmless(ran)
        assert ran.code == code or (ran.code in (1, 2) and folder.name in args), (args, ran)


def test_quantising_where_nothing_is_utf8(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"x\xe9\n[b]\x1b[31m")
    write_checkpoint(folder, V2)
    out = folder / os.fsdecode(b"\xff[bold].gguf")
    options = ("-o", out, "--type", "q8_0", "--no-evaluate", "-t", "1")
    shown = run("quantize", folder, *options, terminal=True, env={"TERM": "dumb"})
    assert_harmless(shown)
    assert rb"\xff[bold].gguf: " in shown.err and shown.code == 0
    piped = run("quantize", folder, *options, "--force", "-q")
    assert piped.out == os.fsencode(out) + b"\n" and piped.err == b""
    report = json.loads(out.with_name(out.name + ".report.json").read_text(encoding="utf-8"))
    assert report["path"] == str(out)
    assert "\ufffd" in json.loads(run("inspect", out, "--json").out)["name"]


def test_what_a_checkpoint_says(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "c", V2)
    config = tmp_path / "c" / "config.json"
    said = json.loads(config.read_text(encoding="utf-8"))
    for name in NAMES.values():
        for key in ("model_type", "torch_dtype", "hidden_act"):
            config.write_text(json.dumps({**said, key: name.decode("utf-8", "surrogateescape")}), encoding="utf-8")
            ran = run("quantize", tmp_path / "c", "-o", tmp_path / "no" / "o.gguf", terminal=True, env={"TERM": "dumb"})
            assert ran.code == 1
            assert_harmless(ran)
            assert len(ran.err) < 20_000


WRONG = {
    "a list": lambda key: kv_array(key, STRING, ["x", "y"]),
    "an empty list": lambda key: kv_array(key, STRING, []),
    "a list of numbers": lambda key: kv_array(key, U32, [1, 2]),
    "a number": lambda key: kv(key, U32, 7),
    "a text": lambda key: kv(key, STRING, "[/x]\x1b[31m"),
}
TEXTS = [
    "general.architecture",
    "general.name",
    "tokenizer.ggml.model",
    "tokenizer.ggml.pre",
    "tokenizer.chat_template",
]
COUNTS = ["block_count", "expert_count", "context_length", "embedding_length", "attention.head_count"]


KEYS = {  # with the kinds that they may be
    **dict.fromkeys(TEXTS, ("a text",)),
    "tokenizer.ggml.tokens": tuple(kind for kind in WRONG if "list" in kind),
    **dict.fromkeys((f"deepseek2.{name}" for name in COUNTS), ("a number",)),
}


@pytest.mark.parametrize(
    ("key", "wrong"), [(key, kind) for key, right in KEYS.items() for kind in WRONG if kind not in right]
)
def test_keys_of_another_type_are_named(key: str, wrong: str, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    head = [] if key == "general.architecture" else [kv("general.architecture", STRING, "deepseek2")]
    path.write_bytes(gguf([*head, WRONG[wrong](key)]))
    for options in ([], ["--json"]):
        ran = run("inspect", path, *options, terminal=True, env={"TERM": "dumb"})
        assert_harmless(ran)
        assert ran.code == 1 and f"`{key}` is " in ran.told and "expected" in ran.told, ran


def test_the_first_line_of_a_conversation(tmp_path: Path) -> None:
    """What repl.py says before the first prompt, on a real terminal."""
    path = named(tmp_path, NAMES["title and colour"])
    with terminal("chat", path, XDG_STATE_HOME=str(tmp_path)) as screen:
        screen.wait_for(r"/help lists the commands.*\n> $")
        screen.type("\x04")
        assert screen.exit_code() == 0
        assert b"\x1b]" not in screen.raw and b"38;5;213" not in screen.raw.replace(rb"\x1b[38;5;213m", b"")
        assert rb"x\x1b]0;pwned\x07\x1b[38;5;213mred" in screen.raw


def test_safe_text_is_left_alone() -> None:
    for line in ("né 模型 🦙 שלום", "[bold]x[/bold]", "a\\b"):
        assert console.printable(line) == console.printable_text(line) == line
    assert console.printable_text("a\tb\nc\r\n") == "a\tb\nc\n"
    assert console.printable("a\tb\n\x1b\udce9\ud800\u202e") == "a\\tb\\n\\x1b\\xe9\\ud800\\u202e"
