"""The text to learn from: the teacher's answers, facts, stories and written talk, as conversations in token ids.

usage: mix.py TOKENIZER.json OUT_FOLDER WRITTEN ANSWERS.jsonl...   (WRITTEN: conversations made from the grammars)

One answer of the teacher in a hundred, and as many of the others, are set apart: heldout.jsonl and held.npy. learned.jsonl holds some of the rest, to calibrate a quantiser with.
"""

import json
import random
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import Pool
from pathlib import Path

import facts
import numpy as np
import score
import stories
import talk
from numpy.typing import NDArray
from talk import Turns
from words import a

PART = 2000  # conversations made by one call of a worker
SHORTER = (
    "Make it shorter.",
    "Shorter, please.",
    "Can you make it shorter?",
    "Make that shorter.",
    "Now in one sentence.",
    "Say it in one sentence.",
    "Summarize it.",
    "Too long, make it short.",
)
MORE_STORIES = (
    "Tell me another story.",
    "Another one, please.",
    "Tell me another one.",
    "Now another story.",
    "One more story!",
    "another",
    "one more",
    "one more please",
    "Another!",
    "more",
    "Do you know another one?",
    "And another one?",
    "Tell me one more story.",
    "another one please",
)


def told(rng: random.Random) -> Turns:
    """A story, and sometimes what is asked after one."""
    adjective, noun = stories.hero(rng)
    full = f"{adjective} {noun}".strip()
    text = stories.story(rng, adjective, noun)
    ask = rng.choice(stories.OPEN_ASKS) if rng.random() < 0.06 else rng.choice(stories.ASKS).format(x=a(full))
    turns: Turns = [("user", ask), ("assistant", "\n\n".join(text))]
    kind = rng.random()
    if kind < 0.14:
        turns += [("user", rng.choice(SHORTER)), ("assistant", stories.shorter(text))]
    elif kind < 0.28:
        adjective, other = stories.hero(rng)
        if rng.random() < 0.4:
            turns[-1] = ("assistant", stories.shorter(text))
        turns += [("user", rng.choice(MORE_STORIES)), ("assistant", "\n\n".join(stories.story(rng, adjective, other)))]
    elif kind < 0.33:
        turns += [
            ("user", rng.choice(("Give it a title.", "What is the title?", "Give the story a title."))),
            ("assistant", f"The {full.title()}"),
        ]
    elif kind < 0.38:
        turns += [
            ("user", rng.choice(("Who is the hero?", "Who is the story about?", "Who is the hero of the story?"))),
            ("assistant", f"The hero of the story is the {full}."),
        ]
    elif kind < 0.42:
        turns += [
            ("user", rng.choice(("Thank you!", "Thanks!", "Nice story!", "I liked it."))),
            ("assistant", rng.choice(talk.WELCOME)),
        ]
    return turns


MAKERS: tuple[tuple[float, Callable[[random.Random], Turns]], ...] = (
    (0.26, told), (0.12, facts.country), (0.15, facts.meaning), (0.07, facts.total), (0.02, facts.unit), (0.11, facts.listing), (0.14, talk.phrase),
    (0.07, talk.structured), (0.03, talk.tool), (0.03, talk.poem),
)  # fmt: skip


def written(rng: random.Random) -> Turns:
    """A conversation that no teacher answered; under a system message in one case of twelve."""
    maker = rng.choices([m for _, m in MAKERS], [w for w, _ in MAKERS])[0]
    turns = maker(rng)
    if turns[0][0] != "system" and maker is not talk.structured and rng.random() < 0.08:
        turns = talk.obedient(rng, turns)
    if maker in (talk.tool, talk.structured):
        return turns
    return [(role, talk.vary(rng, text) if role == "user" else text) for role, text in turns]


def taught(rng: random.Random, turns: Turns) -> Turns:
    """A teacher's answer, sometimes shortened on request to its first sentences."""
    sentences = re.split(r"(?<=[.!?])\s+", turns[-1][1])
    if len(sentences) >= 4 and rng.random() < 0.08:
        return [*turns, ("user", rng.choice(SHORTER)), ("assistant", sentences[0])]
    if len(sentences) >= 2 and len(turns) == 2 and rng.random() < 0.04:
        return [("system", rng.choice(talk.SYSTEMS["one"])), turns[0], ("assistant", sentences[0])]
    return turns


def allowed(turns: Turns, kept_out: set[str]) -> bool:
    return all(role != "user" or score.plain(text) not in kept_out for role, text in turns)


def _some(seed: int) -> list[Turns]:
    rng, kept_out = random.Random(seed), score.kept_out()
    return [turns for turns in (written(rng) for _ in range(PART)) if allowed(turns, kept_out)]


def _answers(paths: Sequence[Path]) -> Iterator[Turns]:
    rng, kept_out = random.Random(5), score.kept_out()
    for path in paths:
        for line in path.open():
            row = json.loads(line)
            turns: Turns = [(role, text) for role, text in row["turns"]]
            if allowed(turns, kept_out):
                yield taught(rng, turns)


def joined(rng: random.Random, items: list[Turns]) -> Iterator[Turns]:
    """Conversations: most are one item, some are several after one another, as people ask on."""
    i = 0
    while i < len(items):
        n = rng.choices((1, 2, 3, 6), (0.70, 0.18, 0.09, 0.03))[0]
        part = items[i : i + n]
        i += n
        first = part[0]
        yield first + [turn for more in part[1:] if more[0][0] != "system" and first[0][0] != "system" for turn in more]


def _ids(job: tuple[str, list[Turns]]) -> NDArray[np.uint16]:
    from tokenizers import Tokenizer
    from vocabulary import conversation_ids

    tokenizer = Tokenizer.from_file(job[0])
    return np.array([i for turns in job[1] for i in conversation_ids(tokenizer, turns)], np.uint16)


def _write(path: Path, conversations: list[Turns]) -> None:
    rows = [{"messages": [{"role": role, "content": text} for role, text in turns]} for turns in conversations]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def main(tokenizer: str, out: Path, n_written: int, answers: Sequence[Path]) -> None:
    rng = random.Random(1)
    out.mkdir(exist_ok=True)
    with Pool() as pool:
        made = [turns for part in pool.map(_some, range(n_written // PART)) for turns in part]
        heard = list(_answers(answers))
        rng.shuffle(heard)
        held = heard[: len(heard) // 100] + made[: len(heard) // 100]
        items = heard[len(heard) // 100 :] + made[len(heard) // 100 :]
        rng.shuffle(items)
        conversations = list(joined(rng, items))
        jobs = [(tokenizer, conversations[i : i + 5000]) for i in range(0, len(conversations), 5000)]
        train = np.concatenate(pool.map(_ids, jobs))
    apart = _ids((tokenizer, held))
    _write(out / "heldout.jsonl", held)
    _write(out / "learned.jsonl", conversations[:6000])
    np.save(out / "train.npy", train)
    np.save(out / "held.npy", apart)
    print(f"{len(heard)} answers of the teacher, {len(made)} written; {len(train)} tokens to learn, {len(apart)} apart")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), [Path(x) for x in sys.argv[4:]])
