"""quantize.vocab: the tokenizer of a checkpoint as GGUF keeps it, and as llama.cpp then tokenises."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import checkpoints as make

from cext.tokenizer import Tokenizer
from quantize.base.errors import CheckpointError, QuantizeError, UnsupportedError
from quantize.source.arch import parse
from quantize.source.bpe import CONTROL, NORMAL, UNUSED, USER_DEFINED
from quantize.source.vocab import read_vocab
from quantize.write.writer import write_vocab_only


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make.write_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(make.V2))
    return tmp_path


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(path.read_text(encoding="utf-8"))
    change(value)
    path.write_text(json.dumps(value), encoding="utf-8")


def test_keys(folder: Path) -> None:
    vocab = read_vocab(folder, 320)
    keys = vocab.keys()
    assert keys["tokenizer.ggml.model"] == "gpt2" and keys["tokenizer.ggml.pre"] == "deepseek-llm"
    assert len(vocab.tokens) == len(vocab.types) == 320
    assert vocab.tokens[256:261] == (make.BOS, make.EOS, "<｜fim▁hole｜>", "<tab>", "th")
    assert vocab.tokens[319] == "[PAD319]"
    assert vocab.types[255:261] == (NORMAL, CONTROL, CONTROL, CONTROL, USER_DEFINED, NORMAL)
    assert set(vocab.types[265:]) == {UNUSED}
    assert {k: keys[f"tokenizer.ggml.{k}_token_id"] for k in ("bos", "eos", "padding")} == {
        "bos": 256,
        "eos": 257,
        "padding": 257,
    }
    assert keys["tokenizer.ggml.add_bos_token"] is True and keys["tokenizer.ggml.add_eos_token"] is False
    assert keys["tokenizer.chat_template"] == make.CHAT_TEMPLATE
    assert vocab.merges[:2] == ("t h", "th e")


@pytest.mark.parametrize("pre", make.PRE_TOKENIZERS)
def test_pre_tokenizers_are_recognised_and_load(tmp_path: Path, pre: str) -> None:
    make.write_tokenizer(tmp_path, pre)
    (tmp_path / "config.json").write_text(json.dumps(make.V2))
    vocab = read_vocab(tmp_path, 320)
    assert vocab.pre == pre
    keys = {"general.architecture": "deepseek2", **parse(make.V2).keys(), **vocab.keys()}
    write_vocab_only(tmp_path / "v.gguf", keys)
    with Tokenizer(tmp_path / "v.gguf") as tokenizer:
        ids = tokenizer.encode("the in er")
        assert tokenizer.decode(ids) == "the in er"
        assert ids[0] == vocab.tokens.index("the")
        assert tokenizer.bos == 256 and tokenizer.eos == 257


def test_real_tokenizer(shared: Path) -> None:
    """A tokenizer that was trained with DeepSeek-V2's rules, with transformers' own merges."""
    vocab = read_vocab(shared / "models" / "storyteller-52m", 8192)
    assert vocab.pre == "deepseek-llm" and len(vocab.merges) == 7934
    assert vocab.special_ids == {"bos": 8190, "eos": 8191, "padding": 8191}
    assert vocab.types[8189:] == (NORMAL, CONTROL, CONTROL)


def test_merges_as_pairs(folder: Path) -> None:
    plain = read_vocab(folder, 320)
    edit(folder / "tokenizer.json", lambda t: t["model"].update(merges=[m.split(" ") for m in t["model"]["merges"]]))
    assert read_vocab(folder, 320) == plain


def test_template_in_its_own_file_or_named(folder: Path) -> None:
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    edit(folder / "tokenizer_config.json", lambda s: s.update(chat_template=named))
    assert read_vocab(folder, 320).chat_template == "yes"
    (folder / "chat_template.jinja").write_text("{{ bos_token }}｜", encoding="utf-8")
    assert read_vocab(folder, 320).chat_template == "{{ bos_token }}｜"


def test_ids_from_config_where_no_settings_are(folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink()
    vocab = read_vocab(folder, 320)
    assert vocab.special_ids == {"bos": 256, "eos": 257}
    keys = vocab.keys()
    assert vocab.chat_template == "" and "tokenizer.chat_template" not in keys


def rules(tokenizer: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = tokenizer["pre_tokenizer"]["pretokenizers"]
    return found


BAD: dict[str, tuple[str, Callable[[dict[str, Any]], object], type[QuantizeError], str]] = {
    "unigram": ("tokenizer.json", lambda t: t["model"].update(type="Unigram"), UnsupportedError, "not byte-level BPE"),
    "no vocabulary": ("tokenizer.json", lambda t: t["model"].pop("vocab"), UnsupportedError, "not byte-level BPE"),
    "one rule changed": (
        "tokenizer.json",
        lambda t: rules(t)[1].update(pattern={"Regex": "\\s?[A-Z]+"}),
        UnsupportedError,
        "match none",
    ),
    "one rule more": (
        "tokenizer.json",
        lambda t: rules(t).insert(0, dict(rules(t)[0])),
        UnsupportedError,
        "match none",
    ),
    "rules swapped": ("tokenizer.json", lambda t: rules(t).reverse(), UnsupportedError, "match none"),
    "no rules": ("tokenizer.json", lambda t: t.update(pre_tokenizer=None), UnsupportedError, "match none"),
    "id past the embedding": ("tokenizer.json", lambda t: t["model"]["vocab"].update(x=320), CheckpointError, "id 320"),
    "negative id": ("tokenizer.json", lambda t: t["model"]["vocab"].update(x=-1), CheckpointError, "id -1"),
    "id that is text": ("tokenizer.json", lambda t: t["model"]["vocab"].update(x="3"), CheckpointError, "id '3'"),
    "two tokens, one id": ("tokenizer.json", lambda t: t["model"]["vocab"].update(x=0), CheckpointError, "share id 0"),
    "added token is text": ("tokenizer.json", lambda t: t["added_tokens"].append("x"), CheckpointError, "added token"),
    "no merges": ("tokenizer.json", lambda t: t["model"].update(merges=[]), CheckpointError, "no merges"),
    "merge of three": ("tokenizer.json", lambda t: t["model"]["merges"].append("a b c"), CheckpointError, "not a pair"),
    "eos unknown": ("tokenizer_config.json", lambda s: s.update(eos_token="<end>"), CheckpointError, "'<end>'"),
    "not an object": ("tokenizer.json", lambda t: t.update(model=3), UnsupportedError, "not byte-level BPE"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_tokenizers(folder: Path, case: str) -> None:
    name, change, kind, expected = BAD[case]
    edit(folder / name, change)
    with pytest.raises(kind, match=expected) as error:
        read_vocab(folder, 320)
    assert "\n" not in str(error.value)


def test_no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UnsupportedError, match=r"neither tokenizer\.json nor tiktoken\.model"):
        read_vocab(folder, 320)


def test_no_eos_anywhere(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", lambda s: s.pop("eos_token"))
    edit(folder / "config.json", lambda c: c.pop("eos_token_id"))
    with pytest.raises(CheckpointError, match="no end-of-sequence token"):
        read_vocab(folder, 320)
