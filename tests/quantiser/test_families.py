"""Every kind of checkpoint: quantised, run, and the same as transformers; its vocabulary and its end tokens."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from support import checkpoints as make
from support import families as made
from support import scripts, stored, templates

import cext
import quantize
from cext.gguf import Gguf
from cext.tokenizer import Message, Tokenizer
from quantize import Options
from quantize.source.vocab import read_vocab
from quantize.write.writer import write_vocab_only

F32 = Options(type="f32", threads=1, evaluate=False)


def metadata(path: Path) -> dict[str, object]:
    with Gguf(path) as gguf:
        return {key: gguf.metadata[key] for key in gguf.metadata}


@pytest.mark.oracle
@pytest.mark.parametrize("name", made.FAMILIES)
def test_a_family_is_transformers(tmp_path: Path, name: str) -> None:
    """Float32 on both sides: 1e-6 of the range as measured."""
    hf = pytest.importorskip("support.hf", reason="needs PyTorch and transformers", exc_type=ImportError)
    family = made.FAMILIES[name]
    weights = made.write(tmp_path / "hf", name)
    report = quantize.quantize(tmp_path / "hf", tmp_path / "m.gguf", F32)
    ids = np.random.default_rng(1).integers(0, family.text["vocab_size"], 48)
    true = hf.logits(hf.load(made.write_reference(tmp_path / "ref", name, weights), family.text["rms_norm_eps"]), ids)
    with cext.Model(tmp_path / "m.gguf", threads=1) as model:
        got = model.session(len(ids), kv_type="f32").eval(ids, "all")
    error = np.abs(got - true).max() / np.ptp(true)
    assert error < 1e-5, error
    drafts = family.text.get("num_nextn_predict_layers", 0)
    assert any("multi-token prediction" in note for note in report.notes) == bool(drafts)
    assert any("2 tensors of vision" in note for note in report.notes) == bool(family.beside)


@pytest.mark.oracle
def test_packed_experts_of_a_part_of_a_larger_model_are_transformers(tmp_path: Path) -> None:
    """Kimi-K2.5 as published: experts in int4 groups of 32 under its language model, which config.json tells there."""
    hf = pytest.importorskip("support.hf", reason="needs PyTorch and transformers", exc_type=ImportError)
    family, folder = made.FAMILIES["kimi-k2.5"], tmp_path / "hf"
    exact = made.write(folder, "kimi-k2.5")
    tensors: stored.Stored = {name: ("F32", np.ones((4, 4), np.float32)) for name in family.beside}
    for name, values in exact.items():
        if ".experts." in name:
            packed, exact[name] = stored.to_int(family.prefix + name, values)
            tensors |= packed
        else:
            tensors[family.prefix + name] = ("F32", values)
    make.write_safetensors(folder / "model.safetensors", tensors)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["quantization_config"] = stored.scheme()
    (folder / "config.json").write_text(json.dumps(config))
    quantize.quantize(folder, tmp_path / "m.gguf", F32)
    ids = np.random.default_rng(1).integers(0, family.text["vocab_size"], 48)
    true = hf.logits(hf.load(made.write_reference(tmp_path / "ref", "kimi-k2.5", exact), 1e-5), ids)
    with cext.Model(tmp_path / "m.gguf", threads=1) as model:
        got = model.session(len(ids), kv_type="f32").eval(ids, "all")
    assert np.abs(got - true).max() < 1e-5 * np.ptp(true)


def vocabulary(folder: Path, name: str, template: str | None = None) -> tuple[made.Family, Tokenizer]:
    """The tokenizer of a checkpoint as a file made of it has it."""
    family = made.FAMILIES[name]
    made.write(folder, name, template)
    vocab = read_vocab(folder, family.text["vocab_size"])
    assert vocab.pre == family.pre
    write_vocab_only(folder / "v.gguf", {"general.architecture": "deepseek2", **vocab.keys()})
    return family, Tokenizer(folder / "v.gguf")


@pytest.mark.parametrize("name", made.FAMILIES)
def test_tokens_are_the_checkpoints_own(tmp_path: Path, name: str) -> None:
    family, tokenizer = vocabulary(tmp_path, name)
    theirs = made.Reference(tmp_path, family)
    n_joined = 0
    for text in scripts.mixed(400, seed=2):
        expected = theirs.encode(text)
        n_joined += len(text.encode()) > len(expected)
        assert tokenizer.encode(text) == expected, text
        assert tokenizer.decode(expected) == text
    assert n_joined > 400  # so that rules that cut otherwise would show


@pytest.mark.parametrize("name", made.FAMILIES)
def test_every_end_token_ends_an_answer(tmp_path: Path, name: str) -> None:
    family, tokenizer = vocabulary(tmp_path, name)
    ends = {i for i in range(tokenizer.n_vocab) if tokenizer.is_end(i)}
    assert ends >= {
        made.n_base(family.pre) + family.specials.index(text) for text in (*family.ends, family.specials[1])
    }
    with_keys = metadata(tmp_path / "v.gguf")
    named = [with_keys[f"tokenizer.ggml.{role}_token_id"] for role in ("eos", "eot", "eom")[: len(family.ends)]]
    if len(family.ends) > 1:
        assert named == family.end_ids


TEMPLATES = {
    "glm-4.7-flash": "glm", "moonlight": "moonlight", "kimi-k2": "k2", "kimi-vl": "moonlight",
    "kimi-k2.5": "k2-thinking", "gigachat3": "gigachat", "joyai": "v3.1",
}  # fmt: skip
SYSTEM = {"role": "system", "content": "Be brief: नमस्ते."}
TURNS = [
    {"role": "user", "content": "Hi  there's 1234"},
    {"role": "assistant", "content": "Привет, 本は!"},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "So.", "reasoning_content": "They ask."},
    {"role": "user", "content": "Good"},
]
SWITCHES = {"glm": "enable_thinking", "v3.1": "thinking"}  # the variable that turns reasoning on and off
PROMPTS = [
    (name, n_turns, thinking)
    for name, template in TEMPLATES.items()
    for n_turns in (1, 2, 3)
    for thinking in ((None, True, False) if template in SWITCHES else (None,))
]


@pytest.mark.oracle
@pytest.mark.parametrize(("name", "n_turns", "thinking"), PROMPTS)
def test_a_prompt_is_transformers(tmp_path: Path, name: str, n_turns: int, thinking: bool | None) -> None:
    utils = pytest.importorskip("transformers.utils.chat_template_utils", reason="needs transformers")
    template = templates.FAMILIES[TEMPLATES[name]]
    switch = {} if thinking is None else {SWITCHES[TEMPLATES[name]]: thinking}
    family, tokenizer = vocabulary(tmp_path, name, template)
    theirs = made.Reference(tmp_path, family)
    turns = TURNS[: 2 * n_turns - 1]
    for chat in (turns, [SYSTEM, *turns]):
        (text,), _ = utils.render_jinja_template(
            conversations=[chat],
            chat_template=template,
            add_generation_prompt=True,
            bos_token=family.specials[0],
            eos_token=family.specials[1],
            **switch,
        )
        messages = [Message(m["role"], m["content"], {k: m[k] for k in m.keys() - {"role", "content"}}) for m in chat]
        assert tokenizer.chat(messages, thinking=thinking) == theirs.encode(text, special=True)
