"""dsv2 inspect as a process: what it tells of a file, against the file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support import vocab
from support.cli import dsv2
from support.tiny import (
    Checkpoint,
    Spec,
    gguf_metadata,
    gguf_tensors,
    spec_named,
    variant,
    write_tensors,
)
from support.vocab import N_VOCAB, write_model

import cext

SPEC = variant(spec_named("lite"), n_ctx=4096)


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
