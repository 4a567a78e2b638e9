"""Hostile variants of what families brought along, keys, vocabularies, special tokens: a line, never a traceback."""

from __future__ import annotations

import base64
import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import checkpoints as make
from support import families as made

from quantize.base.errors import CheckpointError, QuantizeError, UnsupportedError
from quantize.source import tiktoken
from quantize.source.arch import parse
from quantize.source.vocab import read_vocab


def tiny(name: str, **changes: Any) -> dict[str, Any]:
    return {**made.FAMILIES[name].tiny, **changes}


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    **{
        f"text_config {value!r}": (tiny("kimi-vl", text_config=value), "`text_config` is")
        for value in (None, [], [{}], "deepseek_v3", 7)
    },
    "text_config empty": (tiny("kimi-vl", text_config={}), "`num_hidden_layers` is None"),
    "text_config nested": (tiny("kimi-k2.5", text_config={"text_config": tiny("kimi-k2")}), "`num_hidden_layers`"),
    **{
        f"mlp_layer_types {value!r}": (tiny("glm-4.7-flash", mlp_layer_types=value), "`mlp_layer_types`")
        for value in (
            "dense",
            [],
            ["dense"],
            ["dense", "sparse", "else"],
            [["dense"]] * 3,
            ["sparse", "dense", "sparse"],
        )
    },
    "rotary in part": (tiny("glm-4.7-flash", partial_rotary_factor=0.5), "`partial_rotary_factor` is 0.5"),
    "rotary in part, below": (
        tiny("youtu", rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5}),
        "`partial_rotary_factor` is 0.5",
    ),
    "rope_parameters a list": (tiny("youtu", rope_parameters=[1]), "`rope_scaling` is"),
    "draft layers": (tiny("joyai", num_mtp_layers=-1), "`num_mtp_layers` is -1"),
    "tied by a word": (tiny("youtu", tie_word_embeddings="yes"), "`tie_word_embeddings` is 'yes'"),
    "groups that cannot be": (tiny("moonlight", n_group=3), "cannot be chosen"),
    "scores by another rule": (tiny("glm-4.7-flash", scoring_func="sqrtsoftplus"), "`scoring_func` is"),
    "halves interleaved": (tiny("kanana-2", rope_interleave=False), "`rope_interleave` is False"),
    "model_type a list": (tiny("youtu", model_type=["youtu"]), "model_type"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_hostile_configuration_is_refused(case: str) -> None:
    config, expected = CONFIGS[case]
    with pytest.raises((CheckpointError, UnsupportedError)) as error:
        parse(config)
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_listed_kinds_of_layers_are_counted() -> None:
    config = tiny("glm-4.7-flash", mlp_layer_types=["dense", "dense", "sparse"], first_k_dense_replace=None)
    assert parse(config).n_layer_dense == 2
    assert parse(tiny("glm-4.7-flash", first_k_dense_replace=None)).n_layer_dense == 1


def line(token: bytes, rank: object) -> bytes:
    return base64.b64encode(token) + f" {rank}\n".encode()


BYTES = b"".join(line(bytes([b]), b) for b in range(256))
RANKS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "no token is the byte 0"),
    "cut in a line": (BYTES[:-6], "no token is the byte 255|line 256"),
    "cut in base64": (BYTES + b"aGVsb", "line 257"),
    "not base64": (BYTES + b"hel!o= 256\n", "line 257"),
    "base64 of nothing": (BYTES + b"= 256\n", "line 257"),
    "no rank": (BYTES + b"aGVs\n", "line 257"),
    "a rank of words": (BYTES + b"aGVs two\n", "line 257"),
    "a negative rank": (BYTES + b"aGVs -1\n", "line 257"),
    "a rank of many digits": (BYTES + b"aGVs " + b"9" * 5000 + b"\n", "line 257"),
    "three words": (BYTES + b"aGVs 256 1\n", "line 257"),
    "a rank twice": (BYTES + line(b"th", 255), "line 257: rank 255 is there twice"),
    "a token twice": (BYTES + line(b"a", 256), "line 257: b'a' has rank 97 already"),
    "a gap": (BYTES + line(b"th", 257), "rank 256 is missing, and 257 is there"),
    "a byte lacking": (b"".join(line(bytes([b]) * (1 + (b == 65)), b) for b in range(256)), "no token is the byte 65"),
    "a token too long": (BYTES + line(b"x" * 5000, 256), "a token of 5000 bytes"),
    "tokens too long together": (
        BYTES + b"".join(line(bytes([i % 251, i // 251]) + b"x" * 1000, 256 + i) for i in range(300)),
        "longer than those of any vocabulary",
    ),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS pointer"),
    "a zip file": (b"PK\x03\x04" + bytes(range(256)) * 4, "line 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", RANKS)
def test_a_hostile_tiktoken_file_is_refused(tmp_path: Path, case: str) -> None:
    data, expected = RANKS[case]
    made.write_vocabulary(tmp_path, made.FAMILIES["moonlight"])
    (tmp_path / "config.json").write_text(json.dumps(tiny("moonlight")))
    (tmp_path / "tiktoken.model").write_bytes(data)
    with pytest.raises(CheckpointError, match=expected) as error:
        read_vocab(tmp_path, 900)
    assert "tiktoken.model" in str(error.value) and "\n" not in str(error.value)


def test_a_large_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "tiktoken.model"
    with path.open("wb") as file:
        file.truncate(tiktoken.MAX_FILE_BYTES + 1)
    with pytest.raises(CheckpointError, match="at most"):
        tiktoken.read_ranks(path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(CheckpointError, match="directory"):
        tiktoken.read_ranks(tmp_path / "folder")


N_RANKED = made.n_base("kimi-k2")
SPECIALS: dict[str, tuple[object, str]] = {
    "past the vocabulary": ({"900": {"content": "<|x|>"}}, "id 900, config.json's vocab_size is 900"),
    "of a ranked token": ({"65": {"content": "<|x|>"}}, "share id 65"),
    "one text, two ids": (
        {str(N_RANKED): {"content": "<|x|>"}, str(N_RANKED + 1): {"content": "<|x|>"}},
        "has the ids",
    ),
    "a text that is ranked": ({str(N_RANKED): {"content": "the"}}, "has the ids"),
    "a reserved one's text": ({str(N_RANKED): {"content": f"<|reserved_token_{N_RANKED + 3}|>"}}, "has the ids"),
    "an id of words": ({"first": {"content": "<|x|>"}}, "'first'"),
    "an id below": ({"-1": {"content": "<|x|>"}}, "'-1'"),
    "a list": ([{"content": "<|x|>"}], "not an object"),
    "a text": ({str(N_RANKED): "<|x|>"}, "expected a number and an object"),
    "no content": ({str(N_RANKED): {}}, "expected a text and a number"),
    "content nested": ({str(N_RANKED): {"content": ["<|x|>"]}}, "expected a text and a number"),
}


@pytest.mark.parametrize("case", SPECIALS)
def test_hostile_special_tokens_are_refused(tmp_path: Path, case: str) -> None:
    named, expected = SPECIALS[case]
    made.write_vocabulary(tmp_path, made.FAMILIES["moonlight"])
    (tmp_path / "config.json").write_text(json.dumps(tiny("moonlight")))
    path = tmp_path / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"added_tokens_decoder": named}
    path.write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=expected) as error:
        read_vocab(tmp_path, 900)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("named", [None, "GPT2Tokenizer", ["TikTokenTokenizer"], {"a": 1}, 3])
def test_rules_in_unknown_code_are_refused(tmp_path: Path, named: object) -> None:
    made.write_vocabulary(tmp_path, made.FAMILIES["moonlight"])
    (tmp_path / "config.json").write_text(json.dumps(tiny("moonlight")))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": named, "eos_token": "[EOS]"}))
    with pytest.raises(UnsupportedError, match="is not read") as error:
        read_vocab(tmp_path, 900)
    assert "TikTokenTokenizer" in error.value.hint


def test_of_two_vocabularies_tiktokens_is_read(tmp_path: Path) -> None:
    """A tokenizer.json that a conversion left beside it may have other rules."""
    make.write_tokenizer(tmp_path)
    made.write_vocabulary(tmp_path, made.FAMILIES["moonlight"])
    (tmp_path / "config.json").write_text(json.dumps(tiny("moonlight")))
    assert read_vocab(tmp_path, 900).pre == "kimi-k2"


Bend = Callable[[random.Random, Any], Any]
VALUES: list[Any] = [None, True, -1, 0, 1, 2**70, 1.5, float("1e400"), "", "x", [], [[]], [1], {}, {"a": {"b": []}}]


def bend(rng: random.Random, value: Any) -> Any:
    """The value with something inside replaced, dropped, or wrapped."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(sorted(value))
        changed = dict(value)
        if rng.random() < 0.15:
            del changed[key]
        else:
            changed[key] = bend(rng, value[key])
        return changed
    if isinstance(value, list) and value and rng.random() < 0.7:
        at = rng.randrange(len(value))
        return [*value[:at], bend(rng, value[at]), *value[at + 1 :]]
    return rng.choice([*VALUES, [value], {"x": value}])


@pytest.mark.parametrize("name", ["glm-4.7-flash", "kimi-vl", "youtu"])
def test_bent_files_are_refused_or_read_and_never_a_traceback(tmp_path: Path, name: str) -> None:
    rng = random.Random(name)
    family = made.FAMILIES[name]
    made.write_vocabulary(tmp_path, family, "{{ messages }}")
    (tmp_path / "config.json").write_text(json.dumps(family.tiny))
    paths = sorted(tmp_path.glob("*.json"))
    good = {p: json.loads(p.read_text()) for p in paths}
    n_refused = 0
    for _ in range(250):
        path = rng.choice(paths)
        path.write_text(json.dumps(bend(rng, copy.deepcopy(good[path]))))
        try:
            config = json.loads((tmp_path / "config.json").read_text())
            if isinstance(config, dict):
                read_vocab(tmp_path, min(parse(config).n_vocab, 4096))
        except QuantizeError as error:
            n_refused += 1
            assert "\n" not in str(error)
        path.write_text(json.dumps(good[path]))
    assert n_refused > 50
