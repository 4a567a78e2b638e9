"""20 whole conversations with a model, seeds 1 to 20, none chosen: a story, a capital, a list and advice in turns.

usage: conversations.py MODEL.gguf > conversations.md
"""

import random
import sys
from pathlib import Path

import facts
import prompts
import words
from asking import converse
from score import MAX_TOKENS

from dsv2cli.runtime import open_model

ASKS = (
    ("Hello!", "Who are you?", "Tell me a story about {hero}.", "Make it shorter."),
    ("What is the capital of {country}?", "And of {other}?", "Tell me about {country}."),
    ("List five {kind}.", "Give me two more.", "Thank you!"),
    ("How do I {task}?", "Tell me more."),
)
N = 20


def asks(seed: int) -> list[str]:
    """What is asked with a seed: the words are drawn with it as well."""
    rng = random.Random(seed)
    country, other = (facts.the(name) for name in rng.sample(facts.KNOWN, 2))
    hero = words.a(f"{rng.choice(words.ADJECTIVES)} {rng.choice(words.ANIMALS + words.THINGS)}")
    kind, task = rng.choice(list(words.LISTS)), rng.choice(prompts.TASKS)
    return [
        ask.format(hero=hero, country=country, other=other, kind=kind, task=task)
        for ask in ASKS[(seed - 1) % len(ASKS)]
    ]


def main(path: Path) -> None:
    print(f"# {N} whole conversations with {path.stem}, seeds 1 to {N}, none chosen")
    with open_model(path, None) as opened:
        for seed in range(1, N + 1):
            print(f"\n## {seed}")
            said = asks(seed)
            for ask, answer in zip(said, converse(opened, said, seed, MAX_TOKENS), strict=True):
                print(f"\n> {ask}\n\n{answer.replace(chr(0), f' [cut: {MAX_TOKENS} tokens]')}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
