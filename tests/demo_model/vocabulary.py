"""The vocabulary: byte-level BPE of 8,192 entries with DeepSeek's pre-tokenizer, made for this text, and its control tokens.

usage: vocabulary.py ANSWERS.jsonl... OUT.json
"""

import json
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import mix
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

CONTROL = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>")
# DeepSeek-V2's words, in the order in which they are split off: GGUF's pre-tokenizer `deepseek-llm`.
LETTERS = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώᾀ"
    "-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰"
    "-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
WORDS = ("[\r\n]", rf"\s?[{LETTERS}]+", r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", r"[一-龥ࠀ-一가-퟿]+")
N_VOCAB = 8192
BOS, EOS, USER, ASSISTANT = range(N_VOCAB - len(CONTROL), N_VOCAB)


def conversation_ids(tokenizer: Tokenizer, turns: Sequence[tuple[str, str]], answering: bool = False) -> list[int]:
    """A conversation as the chat template writes it; answering: an answer is to follow."""
    ids = [BOS]
    for role, text in turns:
        if role == "user":
            ids.append(USER)
        if role == "assistant":
            ids.append(ASSISTANT)
        ids += tokenizer.encode(text, add_special_tokens=False).ids
        if role == "assistant":
            ids.append(EOS)
    return [*ids, ASSISTANT] if answering else ids


def _texts(answers: Sequence[Path]) -> Iterator[str]:
    rng = random.Random(3)
    for path in answers:
        for line in path.open():
            row = json.loads(line)
            yield row["answer"]
    for _ in range(40_000):
        for _, text in mix.written(rng):
            yield text


def blank() -> Tokenizer:
    """A tokenizer that splits text as DeepSeek-V2's does, and has no vocabulary yet."""
    tokenizer = Tokenizer(models.BPE())
    splits = [pre_tokenizers.Split(Regex(word), "isolated") for word in WORDS]
    digits, level = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, digits, level])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def main(answers: Sequence[Path], out: Path) -> None:
    tokenizer = blank()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=N_VOCAB - len(CONTROL), initial_alphabet=alphabet, show_progress=False, special_tokens=[]
    )
    tokenizer.train_from_iterator(_texts(answers), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL])
    if [tokenizer.token_to_id(token) for token in CONTROL] != [BOS, EOS, USER, ASSISTANT]:
        raise SystemExit("the text is too short for a vocabulary of this size")
    tokenizer.save(str(out))


if __name__ == "__main__":
    main([Path(x) for x in sys.argv[1:-1]], Path(sys.argv[-1]))
