"""The tokenizer: the real vocabulary's vectors, control tokens that cannot be typed, text that must not break it."""

from __future__ import annotations

import itertools
import os
import random
import re
import threading
import time
from pathlib import Path

import llama_cpp
import pytest
from gguf import GGUFValueType, GGUFWriter
from support.vocab import ASSISTANT, BOS, EOS, IDS, N_VOCAB, SPECIALS, vocabulary, write_vocab

from cext import FormatError
from cext import tokenizer as module
from cext.tokenizer import MAX_RUN, Tokenizer, TokenizerError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_vocab(tmp_path_factory.mktemp("vocab") / "vocab.gguf"))


@pytest.fixture(scope="module")
def real(shared: Path) -> Tokenizer:
    """DeepSeek-V2's own vocabulary."""
    return Tokenizer(shared / "tokenizer" / "ggml-vocab-deepseek-llm.gguf")


def spelt(tokenizer: Tokenizer, text: str) -> list[str]:
    return [tokenizer.token_bytes(i).decode("utf-8", "replace") for i in tokenizer.encode(text)]


def test_the_real_vocabularys_vectors(real: Tokenizer, shared: Path) -> None:
    path = shared / "tokenizer" / "ggml-vocab-deepseek-llm.gguf"
    texts = Path(f"{path}.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    lines = Path(f"{path}.out").read_text(encoding="utf-8").split("\n")
    assert len(texts) == len(lines) > 40
    wrong = [text for text, line in zip(texts, lines, strict=True) if real.encode(text) != list(map(int, line.split()))]
    assert not wrong


def test_the_real_vocabularys_facts(real: Tokenizer) -> None:
    assert (real.n_vocab, real.bos, real.eos, real.add_bos) == (102400, 100000, 100001, True)
    assert real.prompt("Hi")[0] == 100000
    assert real.is_end(100001) and not real.is_end(100000) and not real.is_end(-1) and not real.is_end(10**6)
    special = {i: text for i in range(real.n_vocab) if (text := real.special_text(i))}
    padding = {i: text for i, text in special.items() if text == f"[PAD{i}]"}  # ids that the vocabulary leaves free
    assert special.keys() - padding.keys() == {100000, 100001} and (special[100000], special[100001]) == (BOS, EOS)


@pytest.mark.parametrize("text", ["User: hi\n\nAssistant:", "naïve — 🦙 你好\n\t ", "", " ", "\0\x1b[31m", "a" * 5000])
def test_round_trip(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_closing_under_use(tmp_path: Path) -> None:
    """Calls under way in other threads end on a vocabulary that is still there; calls after it are told."""
    path, wrong = write_vocab(tmp_path / "vocab.gguf"), []
    text = "User: Hi Assistant, and the rest of it. " * 40

    def work(tokenizer: Tokenizer) -> None:
        try:
            while True:
                assert tokenizer.decode(tokenizer.encode(text)) == text
        except TokenizerError as error:
            if "was closed" not in str(error):
                wrong.append(error)
        except BaseException as error:
            wrong.append(error)

    for i in range(20):
        tokenizer = Tokenizer(path)
        threads = [threading.Thread(target=work, args=(tokenizer,)) for _ in range(3)]
        for thread in threads:
            thread.start()
        time.sleep(0.002 * (i % 5))
        tokenizer.close()
        tokenizer.close()
        for thread in threads:
            thread.join()
    assert not wrong


def test_merges_apply_across_words(tokenizer: Tokenizer) -> None:
    assert spelt(tokenizer, "User: Hi") == ["User", ":", " Hi"]


# Control tokens cannot be typed.

ATTACKS = [
    lambda s: s,
    lambda s: f"before {s} after",
    lambda s: s * 3,
    lambda s: s[:3] + s + s[3:],  # what is left when the inner one is taken out spells another
    lambda s: s[:1] + s,
    lambda s: s + s[:-1],
    lambda s: f"{s[0]}{s}{s[1:]}",
    lambda s: f" {s}\n{s}",
]


@pytest.mark.parametrize(("spelling", "kind"), SPECIALS)
@pytest.mark.parametrize("attack", ATTACKS)
def test_typed_text_never_becomes_a_control_token(tokenizer: Tokenizer, spelling: str, kind: int, attack) -> None:
    text = attack(spelling)
    ids = tokenizer.encode(text)
    assert not set(ids) & set(IDS.values())
    assert tokenizer.decode(ids) == text


def test_no_pair_of_markers_slips_through(tokenizer: Tokenizer) -> None:
    for a, b in itertools.product([s for s, _ in SPECIALS], repeat=2):
        for cut in range(len(a)):
            text = a[:cut] + b + a[cut:]
            ids = tokenizer.encode(text)
            assert not set(ids) & set(IDS.values()), text
            assert tokenizer.decode(ids) == text


def test_the_real_vocabularys_markers_cannot_be_typed(real: Tokenizer) -> None:
    for text in (BOS, EOS, f"{BOS}User: {EOS}{EOS}", EOS[:2] + EOS + EOS[2:], "<|EOT|>", "<｜User｜>"):
        ids = real.encode(text)
        assert max(ids) < 100000 and real.decode(ids) == text


def test_control_tokens_are_known_by_spelling(tokenizer: Tokenizer) -> None:
    assert {s: tokenizer.control_id(s) for s, _ in SPECIALS} == IDS
    assert tokenizer.control_id("User") is None and tokenizer.control_id(BOS + EOS) is None
    assert tokenizer.token_bytes(IDS[BOS]) == tokenizer.token_bytes(IDS[EOS]) == b""


def test_a_vocabulary_that_marks_common_text_as_control_is_refused(tmp_path: Path) -> None:
    types = list(vocabulary()["tokenizer.ggml.token_type"])
    types[vocabulary()["tokenizer.ggml.tokens"].index("a")] = 3
    made = Tokenizer(write_vocab(tmp_path / "v.gguf", ggml__token_type=types))
    assert made.encode("xyz")
    with pytest.raises(TokenizerError, match="marks 'a', ordinary text, as control"):
        made.encode("banana")


# Text that breaks other tokenizers.


@pytest.mark.parametrize("unit", ["a", "!", " ", "\n", "7", "中", "é", "🦙", "\u3000", "ab", "x "])
def test_runs_of_any_length(tokenizer: Tokenizer, unit: str) -> None:
    """llama.cpp's word splitter overflows the stack on 30,000 letters in a row."""
    text = unit * 100_000
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_in_a_thread_with_a_small_stack(tokenizer: Tokenizer) -> None:
    """512 KB is what other systems give to threads."""
    result: list[int] = []
    before = threading.stack_size(512 * 1024)
    try:
        thread = threading.Thread(target=lambda: result.extend(tokenizer.encode("a" * 50_000)))
        thread.start()
        thread.join()
    finally:
        threading.stack_size(before)
    assert tokenizer.decode(result) == "a" * 50_000


@pytest.mark.parametrize("unit", ["configuration(", "今天天气很好，", "x+y*z-"])
def test_long_runs_are_cut_where_words_end(real: Tokenizer, unit: str) -> None:
    """So the ids are those of the pieces, as they would be without a cut."""
    n = 3 * MAX_RUN // len(unit)
    assert real.encode(unit * n) == real.encode(unit) * n


@pytest.mark.parametrize(("text", "shown"), [("a\udcffb", "a\ufffdb"), ("\ud83e\udd99", "🦙"), ("\ud83e", "\ufffd")])
def test_lone_surrogates(tokenizer: Tokenizer, text: str, shown: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == shown


# Streaming.


def test_half_a_character_waits_for_the_rest(tokenizer: Tokenizer) -> None:
    stream = tokenizer.stream()
    pieces = [stream.feed(i) for i in tokenizer.encode("é🦙x")] + [stream.finish()]
    assert "".join(pieces) == "é🦙x"
    assert all("\ufffd" not in piece for piece in pieces)
    assert pieces == ["", "é", "", "", "", "🦙", "x", ""]


def test_a_character_that_never_ends(tokenizer: Tokenizer) -> None:
    stream = tokenizer.stream()
    assert [stream.feed(i) for i in tokenizer.encode("🦙")[:3]] == ["", "", ""]
    assert stream.finish() == "\ufffd"


def test_ids_outside_the_vocabulary_spell_nothing(tokenizer: Tokenizer) -> None:
    assert tokenizer.token_bytes(N_VOCAB) == tokenizer.token_bytes(-1) == b""


# Files.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ggml__model": None}, "has no vocabulary"),
        ({"ggml__model": "none"}, "has no vocabulary"),
        ({"ggml__model": "runes"}, "cannot load the vocabulary: unknown tokenizer: 'runes'"),
        ({"ggml__tokens": None}, "tokens is missing"),
        ({"ggml__tokens": ["a", "b", "a"]}, "there twice"),
        ({"ggml__tokens": [1, 2]}, "not a list of strings"),
        ({"ggml__pre": "no-such-rules"}, "cannot load the vocabulary: unknown pre-tokenizer type: 'no-such-rules'"),
        ({"ggml__merges": None}, "cannot load the vocabulary: cannot find tokenizer merges"),
        ({"ggml__token_type": [1, 1]}, "cannot load the vocabulary: Index out of array bounds"),
    ],
)
def test_unusable_vocabularies(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        Tokenizer(write_vocab(tmp_path / "v.gguf", **changes))


def test_ids_that_the_file_does_not_name_are_not_guessed(tmp_path: Path) -> None:
    """llama.cpp takes token 11 for BOS and EOS where the file says nothing."""
    made = Tokenizer(write_vocab(tmp_path / "v.gguf", ggml__bos_token_id=None, ggml__eos_token_id=10**6))
    assert (made.bos, made.eos, made.add_bos) == (None, None, False)
    assert made.prompt("a") == made.encode("a")


def test_no_file_and_no_gguf(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"nothing\.gguf"):
        Tokenizer(tmp_path / "nothing.gguf")
    (tmp_path / "text.gguf").write_text("not a model", encoding="utf-8")
    with pytest.raises(FormatError):
        Tokenizer(tmp_path / "text.gguf")


def test_a_closed_tokenizer_says_so(tmp_path: Path) -> None:
    with Tokenizer(write_vocab(tmp_path / "v.gguf")) as made:
        assert made.encode("a")
    with pytest.raises(TokenizerError, match="closed"):
        made.encode("a")
    made.close()


# What a file leaves out, and types that llama.cpp does not expect.


def write_typed(path: Path, types: dict[str, GGUFValueType], **changes: object) -> Path:
    """The vocabulary with some keys written in other types."""
    writer = GGUFWriter(path, "deepseek2")
    for key, value in vocabulary(**changes).items():
        kind = types.get(key.rpartition(".")[2])
        if isinstance(value, list):
            item = GGUFValueType.STRING if isinstance(value[0], str) else kind or GGUFValueType.INT32
            writer.add_key_value(key, value, GGUFValueType.ARRAY, item)
        elif isinstance(value, bool):
            writer.add_key_value(key, int(value) if kind else value, kind or GGUFValueType.BOOL)
        elif isinstance(value, int):
            writer.add_key_value(key, value, kind or GGUFValueType.UINT32)
        else:
            writer.add_string(key, str(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", ["INT8", "UINT8", "INT16", "UINT16", "INT32", "UINT32", "INT64", "UINT64"])
@pytest.mark.parametrize("keys", [("bos_token_id", "eos_token_id"), ("add_bos_token",), ("token_type",)])
def test_integers_of_any_width(tmp_path: Path, tokenizer: Tokenizer, keys: tuple[str, ...], kind: str) -> None:
    """llama.cpp refuses all but one type a key, though the engine reads the file."""
    small = kind.endswith("INT8")
    changes = {"ggml__bos_token_id": 65, "ggml__eos_token_id": 66} if small else {}
    made = Tokenizer(write_typed(tmp_path / "v.gguf", dict.fromkeys(keys, GGUFValueType[kind]), **changes))
    assert (made.bos, made.eos, made.add_bos) == ((65, 66, True) if small else (IDS[BOS], IDS[EOS], True))
    assert made.encode(f"Hi {ASSISTANT} the User") == tokenizer.encode(f"Hi {ASSISTANT} the User")
    assert made.notes == () and made.is_end(made.eos or 0)


def test_paths_in_any_bytes(tmp_path: Path) -> None:
    path = write_vocab(Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xe9.gguf")))
    assert Tokenizer(path).encode("Hi") and Tokenizer(os.fspath(path)).notes == ()


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"ggml__pre": None}, "does not say how text is split into words"),
        ({"ggml__eos_token_id": None}, f"names no token that ends an answer .*: answers end at {EOS}"),
        ({"chat_template": None}, "has no chat template"),
        ({"ggml__eos_token_id": 4}, None),
        ({"chat_template": " \n"}, "has no chat template"),
    ],
)
def test_what_is_missing_is_told_once(tmp_path: Path, changes: dict[str, object], note: str | None) -> None:
    notes = Tokenizer(write_vocab(tmp_path / "v.gguf", **changes)).notes
    assert len(notes) == (note is not None), notes
    assert note is None or re.search(note, notes[0])


def test_llamacpps_other_warnings_are_told(tmp_path: Path) -> None:
    """It knows some ends by their spelling, and sets their type itself."""
    types = [1 if kind == 3 else kind for kind in vocabulary()["tokenizer.ggml.token_type"]]
    (note,) = Tokenizer(write_vocab(tmp_path / "v.gguf", ggml__token_type=types)).notes
    assert "llama.cpp says of its vocabulary: control-looking token" in note and EOS in note


def test_no_ordinary_token_ends_an_answer(tmp_path: Path) -> None:
    """llama.cpp's own end is 11 where a file names none: a comma in V2's vocabulary."""
    tokens = [text.replace("｜end▁of", "｜stop▁of") for text in vocabulary()["tokenizer.ggml.tokens"]]
    made = Tokenizer(write_vocab(tmp_path / "v.gguf", ggml__tokens=tokens, ggml__eos_token_id=None))
    assert llama_cpp.llama_vocab_is_eog(made._vocab, 11)
    assert not any(made.is_end(token) for token in range(made.n_vocab))
    assert "nothing but -n or a full context ends an answer" in made.notes[0]
    named = Tokenizer(write_vocab(tmp_path / "w.gguf", ggml__tokens=tokens, ggml__eos_token_id=11))
    assert [token for token in range(named.n_vocab) if named.is_end(token)] == [11]


@pytest.mark.parametrize("piece", [MAX_RUN + 1, MAX_RUN + 2, 2 * MAX_RUN, 1 << 16])
def test_long_runs_are_found_wherever_a_search_begins(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE", piece)
    rng = random.Random(piece)
    lengths = (1, 5, MAX_RUN - 1, MAX_RUN, MAX_RUN + 1, 2 * MAX_RUN, 3 * MAX_RUN + 7)
    for _ in range(40):
        text = "".join(rng.choice(("a", " ", "\n", "é")) * rng.choice(lengths) for _ in range(rng.randrange(12)))
        found = [run.span() for run in module._long_runs(text)]
        assert found == [run.span() for run in module.LONG_RUN.finditer(text)]
