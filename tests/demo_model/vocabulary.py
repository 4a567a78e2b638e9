"""The vocabulary: byte-level BPE of 8,192 entries with DeepSeek's pre-tokenizer, made for this text, and its control tokens.

usage: vocabulary.py STORYTELLER_TOKENIZER.json ANSWERS.jsonl... OUT.json   (the pre-tokenizer is taken from the first)
"""

import json
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import mix
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers

CONTROL = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>")
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


def main(model: Path, answers: Sequence[Path], out: Path) -> None:
    like, tokenizer = Tokenizer.from_file(str(model)), Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = like.pre_tokenizer, like.decoder
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
    main(Path(sys.argv[1]), [Path(x) for x in sys.argv[2:-1]], Path(sys.argv[-1]))
