"""Rules that go by the case of letters and by marks, in vocabularies whose rules llama.cpp only approximates."""

from __future__ import annotations

import json
import random
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from support.tiny import write_tensors

from cext.tokenizer import Tokenizer, TokenizerError
from cext.words import FIRST, RULES, WHOLE, Words

TEXTS = {
    "English": "Hello World! It's HTTPServer's camelCase, isn't it? 1234 tests.",
    "German": "Äpfel, ÖL und Übermut: straßeGROSS Größenwahn",
    "French": "L'École de l'ÉTÉ, ça va? Œuvre",
    "decomposed": unicodedata.normalize("NFD", "L'École naïve de l'ÉTÉ à Noël"),
    "Russian": "Привет, Мир! ПриветМир КГБшник съешь ещё",
    "Greek": "Καλημέρα ΚΌΣΜΕ ΚόσμεΓεια",
    "Turkish": "İstanbul'da IĞDIR ışık",
    "Hindi": "हिन्दी में लिखा हुआ पाठ। नमस्ते दुनिया",
    "Bengali": "আমার সোনার বাংলা, আমি তোমায় ভালোবাসি",
    "Tamil": "வணக்கம் உலகம்",
    "Thai": "สวัสดีชาวโลก ภาษาไทย",
    "Arabic": "مَرْحَبًا بِالعَالَمِ السلام عليكم",
    "Hebrew": "שָׁלוֹם עולם",
    "Georgian": "გამარჯობა მსოფლიო",
    "Chinese": "你好，世界！这是一个测试。",
    "Japanese": "こんにちは世界。カタカナ、ひらがな",
    "Korean": "안녕하세요 세계",
    "Vietnamese": "Xin chào thế giới Việt Nam",
    "titlecase": "ǅungla ǈubav",
    "emoji": "👩‍👩‍👧‍👦 ok 🇩🇪🏳️‍🌈",
    "code": "def fooBar(x):\n\treturn x  # ΔΣ\n\n\n  if(x):pass\r\n//\n",
    "spaces": "a  é   Ⅲ\n  Ⅳ\u3000x\u2028y\x85z\xa0\xa0ü\x1cw  ",
    "mixed": "ЭтоMIXEDТекст हिंदीABC ไทยabc 日本GO語",
}
RANGES = [
    *[(32, 127)] * 6, (0xA0, 0x250), (0x300, 0x370), (0x370, 0x400), (0x400, 0x500), (0x590, 0x600), (0x600, 0x700),
    (0x900, 0xA00), (0xB80, 0xC00), (0xE00, 0xE80), (0x10A0, 0x1200), (0x1E00, 0x1F00), (0x2000, 0x2070),
    (0x2150, 0x2190), (0x3000, 0x3100), (0x4E00, 0x4F00), (0xAC00, 0xAD00), (0x1D400, 0x1D500), (0x1F300, 0x1F650),
]  # fmt: skip
PIECES = [" ", " ", "  ", "\n", "\r\n", "\t", "'s", "'Ll", "\u3000", "\x85", "\xa0", "\x1c", "/", "//\n"]


class Both:
    """A small vocabulary of a rule in Hugging Face's tokenizers, and the same one as a GGUF."""

    def __init__(self, folder: Path, pre: str) -> None:
        tokenizers = pytest.importorskip("tokenizers", reason="comes with transformers")
        theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
        rules = [FIRST[pre], RULES[pre]] if pre in FIRST else [RULES[pre]]
        steps = [tokenizers.pre_tokenizers.Split(tokenizers.Regex(rule), behavior="isolated") for rule in rules]
        bytes_ = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        theirs.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([*steps, bytes_])
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=1500, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        )
        theirs.train_from_iterator(list(TEXTS.values()) * 3, trainer)
        made = json.loads(theirs.to_str())
        made["model"]["ignore_merges"] = pre in WHOLE
        self.theirs = tokenizers.Tokenizer.from_str(json.dumps(made))
        ids = made["model"]["vocab"]
        merges = [m if isinstance(m, str) else " ".join(m) for m in made["model"]["merges"]]
        keys: dict[str, Any] = {
            "general.name": pre,
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": pre,
            "tokenizer.ggml.tokens": [*sorted(ids, key=ids.__getitem__), "[INST]", "<s>", "दुनिया!"],
            "tokenizer.ggml.token_type": [*[1] * len(ids), 3, 3, 4],
            "tokenizer.ggml.merges": merges,
            "tokenizer.ggml.bos_token_id": len(ids) + 1,
            "tokenizer.ggml.eos_token_id": len(ids) + 1,
        }
        self.n_plain = len(ids)
        self.words = Words(pre, ids, merges)
        self.ours = Tokenizer(write_tensors(folder / f"{pre}.gguf", keys, {}, "mistral4"))

    def expected(self, text: str) -> list[int]:
        ids: list[int] = self.theirs.encode(text, add_special_tokens=False).ids
        return ids


@pytest.fixture(scope="module", params=["tekken", "kanana2", "youtu", "kimi-k2"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Both:
    return Both(tmp_path_factory.mktemp("words"), request.param)


@pytest.mark.parametrize("name", TEXTS)
def test_words_of_every_script_are_the_models_own(both: Both, name: str) -> None:
    assert both.ours.encode(TEXTS[name]) == both.expected(TEXTS[name])
    assert both.ours.decode(both.ours.encode(TEXTS[name])) == TEXTS[name]


def test_random_texts_of_all_scripts(both: Both) -> None:
    rng = random.Random(1)

    def piece() -> str:
        low, high = rng.choice(RANGES)
        plain = "".join(chr(rng.randrange(low, high)) for _ in range(rng.randint(1, 5)))
        return rng.choice(PIECES) if rng.random() < 0.3 else plain

    for _ in range(1500):
        text = "".join(piece() for _ in range(rng.randint(1, 14)))
        assert both.ours.encode(text) == both.expected(text), repr(text)
        assert "".join(both.words.split(text)) == text


def test_ascii_is_split_by_llamacpp_as_it_is_here(both: Both) -> None:
    """Which of the two reads a text depends on one character in it."""
    rng = random.Random(2)
    for _ in range(500):
        text = "".join(rng.choice([*PIECES[:9], "Ab", "aB", "ABc", "12345", "...", "(", "x"]) for _ in range(9))
        text = text.encode("ascii", "ignore").decode()
        assert both.ours.encode(text) == both.words.encode(text) == both.expected(text), repr(text)


def test_typed_control_tokens_are_text_beside_every_script(both: Both) -> None:
    for text in ("[INST]नमस्ते[INST]", "é[INST]", "[INST]", "<s>Привет<s>"):
        ids = both.ours.encode(text)
        assert max(ids) < both.n_plain
        assert both.ours.decode(ids) == text


def test_user_defined_tokens_are_cut_out_first(both: Both) -> None:
    ids = both.ours.encode("नमस्ते दुनिया! हाँ")
    assert ids.count(both.n_plain + 2) == 1
    assert both.ours.decode(ids) == "नमस्ते दुनिया! हाँ"


def test_long_words_end(both: Both) -> None:
    """Texts without spaces are one word, and merges of a word of n bytes are no n * n steps."""
    for text in ("ก" * 40_000, "ก็" * 20_000, "é" * 40_000, "\u0301" * 40_000, "世" * 40_000, "Ⅳ" * 10_000):
        assert both.ours.decode(both.ours.encode(text)) == text


def test_lone_surrogates_and_a_closed_vocabulary(tmp_path: Path, both: Both) -> None:
    assert both.ours.decode(both.ours.encode("é\udcff!")) == "é\ufffd!"
    with Tokenizer(both.ours.path) as tokenizer:
        tokenizer.encode("é")
    for text in ("é", "e"):
        with pytest.raises(TokenizerError, match="closed"):
            tokenizer.encode(text)
