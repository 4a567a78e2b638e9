"""dsv2 perplexity as a process: its figures against those reckoned a token at a time."""

from __future__ import annotations

import json
import math
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from support import vocab
from support.cli import assert_fails, dsv2
from support.tiny import (
    Checkpoint,
    gguf_metadata,
    gguf_tensors,
    spec_named,
    variant,
    write_tensors,
)
from support.vocab import N_VOCAB, write_model

import cext
from cext.tokenizer import Tokenizer

SPEC = variant(spec_named("lite"), n_ctx=4096)


@pytest.fixture(scope="module")
def half(folder: Path) -> Path:
    """The same model in f16."""
    return write_model(folder / "half.gguf", SPEC, dtype=np.float16)


@pytest.fixture(scope="module")
def text(folder: Path) -> Path:
    path = folder / "text.txt"
    path.write_text("The User asks the Assistant and the Assistant answers the User. " * 20, encoding="utf-8")
    return path


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
