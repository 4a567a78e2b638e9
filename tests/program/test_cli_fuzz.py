"""Random command lines: options, values, variables, names and files, right and wrong. Whatever is typed, set or put on
the disk, a command ends with an exit code of its own, a line that says why, and nothing that a terminal would obey.

DSV2_FUZZ_SEED and DSV2_FUZZ_RUNS choose the cases of the long run; a failure names the seed of its own case.
"""

from __future__ import annotations

import os
import random
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.checkpoints import V2, write_checkpoint
from support.gguf_bytes import BOOL, F32, I32, STRING, U32, U64, gguf, kv, kv_array, tiny_model
from support.inprocess import Ran, run
from support.tiny import spec_named, variant
from support.vocab import write_model

RUNS = 300
LONG_RUNS = int(os.environ.get("DSV2_FUZZ_RUNS", "10000"))
SEED = int(os.environ.get("DSV2_FUZZ_SEED", "1"))
SHARDS = 4
NASTY = [
    b"[bold]x", b"[/INST]", b"\x1b]0;t\x07", b"\x9b31m", b"\xff\xfe", "\u202e".encode(), b"a\nb", b"\xed\xa0\x80",
    "né 模型".encode(), b"%s{0}", b"x" * 300, b" ", b"-", b"--", b"~", b"~nobody", b"~root/x", b".", b"..", b"/", b"",
]  # fmt: skip
NUMBERS = [
    "0", "1", "2", "3", "16", "-1", "-0", "007", "+5", "1_0", "٣", "²", "1e3", "1.5", "nan", "-nan", "inf", "-inf",
    "1e400",
    "1e-400", "1e39", "0x10", "", " ", "4096", "512", "513", "65536", "2147483647", "2147483648", "4294967296",
    "9223372036854775807", "18446744073709551615", "18446744073709551616", "9" * 30, "9" * 5000, "-" + "9" * 30, "1,2",
]  # fmt: skip
VARIABLES: dict[str, list[str | None]] = {
    "TERM": [None, "", "dumb", "unknown", "xterm", "xterm-256color", "\x1b[31m", "é", "x" * 999],
    "COLUMNS": [None, "", "0", "1", "-5", "²", "abc", "40", "9" * 30, "1e9"],
    "LINES": [None, "", "0", "²", "9" * 30],
    "NO_COLOR": [None, "", "1"],
    "FORCE_COLOR": [None, "1", "x"],
    "COLORTERM": [None, "truecolor", "\x1b"],
    "TTY_COMPATIBLE": [None, "1", "x"],
    "HOME": [None, "", "/nonexistent", "~", "/dev/null"],
    "XDG_STATE_HOME": [None, "", "/nonexistent", "/dev/null", "~"],
    "LC_ALL": [None, "", "C", "xx_YY.nothing"],
    "LANG": [None, "C", "\x07"],
    "DSV2_ISA": [None, "", "scalar", "avx9", "\x1b[31m"],
    "OPENBLAS_NUM_THREADS": [None, "", "x", "-1"],
    "_DSV2_COMPLETE": [*[None] * 7, "", "x", "bash_source", "complete_bash", "source_x", "_"],
}  # fmt: skip


@dataclass(frozen=True)
class Command:
    """A verb, its options that take a value (by what they take) and its flags; ``always``: what keeps it short."""

    verb: str
    argument: str  # the kind of its argument
    values: dict[str, str]
    flags: tuple[str, ...]
    always: tuple[str, ...] = ()


MODEL = {"-t": "threads", "--threads": "threads"}
COMMANDS = (
    Command(
        "chat", "model",
        {**MODEL, "-p": "text", "-s": "text", "-n": "few", "--temp": "number", "--top-k": "number", "--top-p": "number",
         "--min-p": "number", "--repeat-penalty": "number", "--seed": "number", "-c": "context", "--kv": "word",
         "--lookup": "number"},
        ("--raw", "--json", "-q"), ("-n", "2", "-t", "1"),
    ),
    Command("inspect", "model", {"-c": "number", "--heatmap": "out"}, ("--json",)),
    Command(
        "perplexity", "model",
        {**MODEL, "--text": "file", "-c": "context", "--reference": "model", "--kv": "word", "--reference-kv": "word",
         "--skip": "number", "--windows": "few"},
        ("--json", "-q"), ("--windows", "1", "-t", "1"),
    ),
    Command(
        "bench", "file",
        {**MODEL, "-p": "few", "-n": "few", "-d": "few", "-r": "few", "--kv": "word", "--against": "word"},
        ("--json", "--csv", "-q"), ("-p", "2", "-n", "1", "-r", "1", "-t", "1"),
    ),
    Command(
        "quantize", "checkpoint",
        {"-t": "threads", "-o": "out", "--type": "word", "--bpw": "number", "--size": "number", "--calibration": "file",
         "--calibration-tokens": "number"},
        ("--plain-mix", "--no-sequential", "--awq", "--restart", "--force", "--json", "-q"),
        ("--no-evaluate", "--type", "q8_0", "-t", "1", "--calibration", "latin.txt"),  # refused, where it is needed
    ),
    Command(
        "download", "repo",
        {"--revision": "text", "--to": "out", "--only": "word", "--type": "text", "--file": "text"}, ("--json", "-q"),
    ),
)  # fmt: skip
WORDS = [
    "f16",
    "q8_0",
    "f32",
    "q4_0",
    "Q8_0",
    "bf16",
    "llama.cpp",
    "gguf",
    "safetensors",
    "q4_k_m",
    "\x1b[31m",
    "",
    "é",
]
REPOS = [
    "lite",
    "LITE",
    "owner/name",
    "owner/name:Q4_K_M",
    "a/b/c",
    "https://huggingface.co/a/b",
    "hf.co/a/b",
    "a//b",
    "v2",
]


class World:
    """The files that commands are pointed at."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        spec = variant(spec_named("lite"), n_ctx=256)
        self.model = write_model(folder / "model.gguf", spec)
        self.small = tiny_model().content()
        write_checkpoint(folder / "checkpoint", {**V2, "num_hidden_layers": 2})
        (folder / "folder.gguf").mkdir()
        (folder / "empty").mkdir()
        (folder / "empty.gguf").write_bytes(b"")
        (folder / "text.txt").write_text("The User asks the Assistant. " * 60, encoding="utf-8")
        (folder / "latin.txt").write_bytes("né ".encode("latin-1") * 99)
        (folder / "utf16.txt").write_bytes("The User asks. ".encode("utf-16") * 9)
        (folder / "chat.jsonl").write_text(
            '{"messages": [{"role": "user", "content": null}]}\n[[1]]\n{', encoding="utf-8"
        )
        (folder / "dangling").symlink_to("nowhere")
        (folder / "loop").symlink_to("loop")
        self.fixed = [*folder.iterdir()]

    def path(self, rng: random.Random, kind: str) -> str | bytes | Path:
        if rng.random() < 0.12:
            name = b"".join(rng.choices(NASTY, k=rng.randint(1, 2)))
            return name if rng.random() < 0.5 else os.fsencode(self.folder) + b"/" + name
        if kind == "out":
            return self.folder / "out" / rng.choice(["a.gguf", "b", "no/c.gguf"])
        if kind == "checkpoint" and rng.random() < 0.7:
            return self.checkpoint(rng)
        if kind == "model":
            return self.model if rng.random() < 0.4 else self.mutant(rng)
        return rng.choice(self.fixed)

    def mutant(self, rng: random.Random) -> Path:
        """A small GGUF with a few wrong bytes, keys or lengths, perhaps under a strange name."""
        name = rng.choice(NASTY).replace(b"/", b"|")[:200] or b"x"
        path = self.folder / "made" / os.fsdecode(b"m" + name + b".gguf")
        path.parent.mkdir(exist_ok=True)
        how = rng.random()
        if how < 0.4:
            data = bytearray(self.small)
            for _ in range(rng.randint(1, 6)):
                data[rng.randrange(len(data) // 3)] = rng.randrange(256)
            path.write_bytes(data[: rng.choice([len(data), rng.randrange(len(data))])])
        elif how < 0.8:
            path.write_bytes(gguf(list(self.keys(rng))))
        else:
            data = self.model.read_bytes()
            before = b"general.name" + STRING.to_bytes(4, "little") + (4).to_bytes(8, "little") + b"lite"
            name = (rng.choice(NASTY) + rng.choice(NASTY))[:4000]
            path.write_bytes(data.replace(before, before[:-12] + len(name).to_bytes(8, "little") + name, 1))
        return path

    def keys(self, rng: random.Random) -> Iterator[bytes]:
        architecture = rng.choice([b"deepseek2", b"deepseek2", b"llama", rng.choice(NASTY)])
        known = [
            b"general.name", b"general.architecture", b"tokenizer.ggml.model", b"tokenizer.ggml.pre",
            b"tokenizer.ggml.tokens", b"tokenizer.chat_template", b"dsv2.expert_usage", b"dsv2.layer_error",
            b"dsv2.calibration.sources", b"dsv2.calibration.sha256", b"dsv2.evaluation.kld_mean", b"dsv2.note",
            *(architecture + b"." + name for name in (
                b"block_count", b"expert_count", b"expert_used_count", b"context_length", b"embedding_length",
                b"attention.head_count", b"attention.kv_lora_rank", b"rope.dimension_count", b"expert_group_count",
                b"leading_dense_block_count")),
        ]  # fmt: skip
        yield kv("general.architecture", STRING, architecture)
        for key in {*rng.sample(known, rng.randint(0, 9))} - {b"general.architecture"}:
            text = rng.choice(NASTY)
            number = rng.choice([0, 1, 2, 27, 2**31 - 1, 2**32 - 1])
            yield rng.choice(
                [
                    kv(key, STRING, text), kv(key, U32, number), kv(key, I32, -number // 2), kv(key, U64, number << 32),
                    kv(key, F32, rng.choice([0.0, 1.5, float("nan"), float("inf"), -1e38])), kv(key, BOOL, True),
                    kv_array(key, STRING, [text] * rng.randint(0, 9)), kv_array(key, U32, [number] * rng.randint(0, 9)),
                    kv_array(key, F32, [float("nan"), 1.0]),
                ]
            )  # fmt: skip

    def checkpoint(self, rng: random.Random) -> Path:
        """A checkpoint with one file damaged."""
        made = self.folder / "made" / "checkpoint"
        shutil.rmtree(made, ignore_errors=True)
        shutil.copytree(self.folder / "checkpoint", made)
        path = rng.choice(sorted(p for p in made.iterdir()))
        data = bytearray(path.read_bytes())
        how = rng.random()
        if how < 0.5:
            for _ in range(rng.randint(1, 4)):
                data[rng.randrange(min(len(data), 4000))] = rng.randrange(256)
        elif how < 0.6:
            del data[rng.randrange(len(data)) :]
        elif how < 0.7:
            data[:] = b"[" * 100_000
        elif how < 0.8:
            at = data.find(b'"') + 1
            data[at:at] = rng.choice(NASTY).replace(b'"', b"")
        elif how < 0.9:
            data[:] = rng.choice([b"null", b"[]", b'"x"', b"7", b"{}", b"\xef\xbb\xbf{}", b"NaN"])
        path.write_bytes(data)
        return made


def value(world: World, rng: random.Random, kind: str) -> str | bytes | Path:
    if kind in ("file", "out", "model", "checkpoint"):
        return world.path(rng, kind)
    if kind == "word":
        return rng.choice(WORDS)
    if kind == "repo":
        return rng.choice(REPOS) if rng.random() < 0.6 else rng.choice(NASTY)
    if kind == "text":
        return rng.choice(NASTY) if rng.random() < 0.6 else rng.choice(["Hi", "z" * 2000, "main"])
    return number(rng, kind)


def number(rng: random.Random, kind: str) -> str:
    if rng.random() < 0.5:  # right
        return {"threads": "1", "few": "2", "context": rng.choice(["0", "64", "128"]), "number": "1"}[kind]
    chosen = rng.choice(NUMBERS)
    return "3" if kind == "few" and chosen.isdecimal() and int(chosen[:9]) > 9 else chosen


def command_line(world: World, rng: random.Random) -> list[str | bytes | Path]:
    if rng.random() < 0.04:
        return [rng.choice(["--version", "--help", "-h", "--debug", "", "frobnicate", *map(os.fsdecode, NASTY)])]
    command = rng.choices(COMMANDS, [30, 30, 14, 4, 8, 14])[0]
    words: list[str | bytes | Path] = [command.verb, *command.always]
    if rng.random() < 0.95 or command.verb == "bench":  # without one it is the packaged model's turn
        words.append(value(world, rng, command.argument))
    for option in rng.sample(sorted(command.values), min(len(command.values), int(rng.expovariate(0.5)))):
        words += [option, value(world, rng, command.values[option])]
    words += [flag for flag in command.flags if rng.random() < 0.2]
    if command.verb == "chat" and rng.random() < 0.7:
        words += ["-p", "Hi"]
    if command.verb == "perplexity" and rng.random() < 0.8:
        words += ["--text", world.folder / "text.txt", "-c", "32"]
    if rng.random() < 0.02:
        words.insert(rng.randrange(len(words) + 1), rng.choice(NASTY))
    return words


def check(words: list[str | bytes | Path], ran: Ran, *, terminal: bool, term: str | None, debug: bool) -> None:
    assert ran.code in (0, 1, 2, 130), ran.code
    assert b"internal error" not in ran.err, ran.told
    assert debug or b"Traceback" not in ran.err, ran.told
    assert ran.code not in (1, 2) or ran.err.strip(), "failed without a word"
    if terminal and term not in (None, "", "dumb", "unknown"):
        return
    assert not re.search(rb"[\x00-\x09\x0b-\x1f\x7f]", ran.err), ran.err
    data = words[:1] in (["chat"], ["quantize"], ["download"], ["bench"]) and "--json" not in words  # a text, a path
    assert data or not re.search(rb"[\x00-\x08\x0b-\x1f\x7f]", ran.out), ran.out


def one(world: World, seed: int) -> None:
    rng = random.Random(seed)
    words = command_line(world, rng)
    env = {name: rng.choice(values) for name, values in VARIABLES.items() if rng.random() < 0.15}
    env["TERM"] = rng.choice(VARIABLES["TERM"])
    stdin = rng.choice([b"", b"", b"Hi\n", b"\xff", b"\xef\xbb\xbfx\r\n", "é".encode("utf-16"), b"z" * 3000])
    terminal = rng.random() < 0.3
    encoding = rng.choice(["utf-8", "utf-8", "ascii", "latin-1"])
    words = [word for word in words if b"\0" not in os.fsencode(word)]
    debug = "--debug" in words
    try:
        ran = run(*words, stdin=stdin, terminal=terminal, encoding=encoding, env=env)
        check(words, ran, terminal=terminal, term=env.get("TERM"), debug=debug)
    except BaseException as error:
        error.add_note(f"case {seed}: dsv2 {' '.join(map(repr, words))}\nwith {env}, terminal {terminal}, {encoding}")
        raise
    finally:
        os.environ.pop("DSV2_DEBUG", None)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # state goes there without XDG_STATE_HOME
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)  # and without HOME nowhere
    (tmp_path / "world").mkdir()
    monkeypatch.chdir(tmp_path / "world")
    (tmp_path / "world" / "out").mkdir()
    return World(tmp_path / "world")


def test_random_command_lines(world: World) -> None:
    for seed in range(RUNS):
        one(world, seed)


@pytest.mark.heavy
@pytest.mark.parametrize("shard", range(SHARDS))
def test_many_random_command_lines(world: World, shard: int) -> None:
    for seed in range(SEED * 1_000_000 + shard, SEED * 1_000_000 + LONG_RUNS, SHARDS):
        one(world, seed)
