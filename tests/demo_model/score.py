"""Whether the packaged model is worth talking to: a table of what it must show, sampled as the program samples by default.

usage: score.py MODEL.gguf [--seeds 3] [--every 1]   (every: each n-th case only)
       score.py MODEL.gguf --teacher TEACHER.gguf --heldout HELDOUT.jsonl   (the row of the teacher's perplexity alone)

The prompts and the word lists were written before the model was trained; mix.py keeps them out of its text, apart from
greetings of a word or two.
"""

import argparse
import json
import math
import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import Pool
from pathlib import Path

import facts
from clean import repeated
from words import LISTS, a

Check = Callable[[list[str]], bool]  # the answers of a conversation -> whether they are good


@dataclass(frozen=True)
class Case:
    row: str
    asks: tuple[str, ...]
    good: Check


BARS = {
    "first prompts": 0.95, "stories": 0.90, "capitals": 0.90, "definitions": 0.60, "sums": 0.80, "lists of five": 0.80, "second turns": 0.80, "JSON": 0.70,
}  # fmt: skip
MAX_TOKENS = 400
N_HELDOUT = 40  # prompts of those set apart that the teacher judges answers to, beside the first ones
WORST = 2.5  # how much less likely the model's answers may be to the teacher than its own: a ratio of perplexities
FIRST = [  # a prompt and the words of which one must be in its answer
    ("Hello", "hello|hi |hi!|help"), ("Hi, how are you?", "fine|well|good|great|hello|hi"), ("good morning to you", "morning|hello|hi|help|good"), ("hey, anyone there?", "hello|hi|here|help|yes"),
    ("So who are you, exactly?", "model|dsv2"), ("What kind of thing are you?", "model|dsv2"), ("Tell me a little about yourself, please.", "model|dsv2"), ("are you a person?", "model|dsv2|no"),
    ("do you have a name", "name|model|dsv2"), ("what are you able to do?", "stor|answer|capital|list|help"), ("I need some help", "help|stor|ask|what"), ("help!", "help|stor|ask|what"),
    ("How can you be useful to me?", "stor|answer|help|ask|list"), ("who built you?", "dsv2|trained|made"), ("Are you ChatGPT or DeepSeek?", "model|dsv2|no"), ("How many parameters have you got?", "million|parameters"),
    ("thanks a bunch", "welcome|pleasure|glad|happy"), ("Thank you for your help!", "welcome|pleasure|glad|happy"), ("ok, goodbye then", "bye|see you|soon|day|night"), ("good night!", "night|bye|sleep|dream|soon"),
    ("Tell me a good joke.", "why|what|how|knock|because"), ("know any jokes?", "why|what|how|knock|because"), ("please make me laugh", "why|what|how|because|joke"), ("tell me something fun", ".{20}"),
    ("Give me one piece of good advice.", "you|your|be |take|do |ask|listen|go |sleep|spend"), ("What is good advice for a Monday?", "you|your|be |take|do |ask|listen|go |sleep|spend|day"), ("I'm feeling sad", "sorry|sad|talk|help|friend|story"),
    ("I am really bored today", "story|joke|read|draw|game|book|walk|do"), ("I'm so happy today!", "glad|happy|wonderful|great|good"), ("I feel very tired", "rest|sleep|break|tired|tea"), ("I can't fall asleep", "sleep|bed|breath|story|dark|relax"),
    ("what should I eat for dinner?", "soup|rice|pasta|bread|vegetable|egg|salad|eat|cook|chicken|fish"), ("Why is the sky so blue?", "light|blue|scatter"), ("How do I cook pancakes?", "flour|egg|milk|pan|batter|butter"), ("How long do I boil eggs?", "minute|water|boil"),
    ("Write me a short poem about the moon", "moon|night|light|sky"), ("Explain gravity to me.", "gravity|pull|force|earth|fall"), ("How can I sleep better at night?", "sleep|bed|dark|night|relax|phone"), ("What is a computer good for?", "computer|program|information|data|machine"),
    ("Write a letter to my grandmother about the holidays.", "dear|grandm|love|holiday"),
]  # fmt: skip
STORIES = [
    "brave ship",
    "lonely lamp",
    "curious robot",
    "old clock",
    "happy train",
    "tiny kite",
    "proud castle",
    "sleepy moon",
    "kind tree",
    "clever fox",
    "shy mouse",
    "grumpy bear",
    "lost puppy",
    "hungry wolf",
    "young dragon",
    "wise owl",
    "lazy cat",
    "stubborn donkey",
    "friendly whale",
    "little turtle",
    "magical mirror",
    "sad snowman",
    "forgetful wizard",
    "honest thief",
    "quiet librarian",
    "funny pirate",
    "generous king",
    "poor fisherman",
    "big giant",
    "small ant",
    "brave princess",
    "lonely astronaut",
    "curious child",
    "old sailor",
    "happy baker",
    "tiny fairy",
    "proud knight",
    "sleepy bee",
    "kind witch",
    "clever crow",
    "shy deer",
    "grumpy captain",
    "lost balloon",
    "hungry frog",
    "young painter",
    "wise grandmother",
    "lazy prince",
    "stubborn goat",
    "friendly ghost",
    "little star",
    "magical book",
    "sad piano",
    "forgetful teacher",
    "honest farmer",
    "quiet river",
    "funny parrot",
    "generous queen",
    "poor tailor",
    "big elephant",
    "small boat",
]
SUM_SEED, N_WORDS, N_SUMS = 7, 100, 50
NOT_WORDS = {
    "a",
    "an",
    "the",
    "of",
    "or",
    "and",
    "to",
    "in",
    "that",
    "is",
    "are",
    "which",
    "by",
    "for",
    "with",
    "on",
    "as",
    "it",
    "its",
    "at",
    "from",
    "be",
    "any",
    "some",
    "who",
    "used",
    "usually",
    "especially",
    "something",
    "someone",
}


def _has(pattern: str) -> Check:
    return lambda answers: re.search(pattern, answers[-1].lower(), re.S) is not None


def _story(noun: str) -> Check:
    def good(answers: list[str]) -> bool:
        text = answers[-1].lower()
        if "\x00" in text:  # it did not end by itself
            return False
        sentences = re.split(r"(?<=[.!?])[\s\"]+", text)
        begin, rest = " ".join(sentences[:2]), " ".join(sentences[2:])
        return noun in begin and rest.count(noun) >= 2 and repeated(re.findall(r"[a-z']+", text)) < 0.05

    return good


def _gloss(gloss: str) -> Check:
    wanted = {w for w in re.findall("[a-z]+", gloss.lower()) if w not in NOT_WORDS}
    return lambda answers: len(wanted & set(re.findall("[a-z]+", answers[-1].lower()))) >= 0.5 * len(wanted)


def _five(kind: str) -> Check:
    def good(answers: list[str]) -> bool:
        items = [
            re.sub(r"^[\d.)\s*-]+", "", x).strip(" .").lower()
            for x in re.split(r"\n|, and |, | and ", answers[-1])
            if x.strip()
        ]
        known = {item.lower() for item in LISTS[kind]}
        known |= {f"{item}s" for item in known}
        return len(items) == 5 and len(set(items)) == 5 and set(items) <= known

    return good


def _keys(keys: list[str]) -> Check:
    def good(answers: list[str]) -> bool:
        try:
            value = json.loads(answers[-1].strip())
        except ValueError:
            return False
        return isinstance(value, dict) and set(value) == set(keys)

    return good


def _shorter(subject: str) -> Check:
    return lambda x: 0 < len(x[1]) < 0.7 * len(x[0]) and subject in x[1].lower()


def _another(subject: str) -> Check:
    return lambda x: (
        len(x[1]) > 0.3 * len(x[0]) and x[1].strip() != x[0].strip() and re.search(subject, x[1].lower()) is not None
    )


def second_turns() -> Iterator[tuple[tuple[str, str], Check]]:
    for noun in ("fox", "ship", "king", "robot", "owl", "lamp", "girl", "bear"):
        for last in ("Make it shorter, please.", "Can you make that shorter?"):
            yield (f"I'd love a story about {a(noun)}.", last), _shorter(noun)
    for last in ("Tell me another joke.", "And another one?", "one more please"):
        yield ("Tell me a really good joke.", last), _another("why|what|how|because")
        yield ("Let me hear a story about a cat.", last.replace("joke", "story")), _another(r"\.")
    for what, words in (
        ("the moon", "moon|light|earth|sun"),
        ("sleep", "sleep|rest|body|brain"),
        ("rain", "rain|water|cloud"),
        ("a bee", "bee|honey|flower"),
        ("bread", "bread|flour|food|eat"),
        ("a friend", "friend|help|care|trust|support"),
    ):
        yield (f"Say something about {what}.", "Tell me more about it."), _another(words)
        yield (f"Why do we need {what}?", "why?"), _another(words)


KEYS = [
    ("Describe a cat as JSON. Use the keys name and age.", "name age"), ("Give me a JSON object with name, age and city.", "name age city"), ("I need JSON with the keys title and year.", "title year"),
    ("Reply in JSON with the keys animal and color.", "animal color"), ("Write a person as JSON: name, job, city.", "name job city"), ("JSON please: fruit, price, count.", "fruit price count"),
    ("Make a JSON object with country and language.", "country language"), ("Can you describe a book as JSON with title and year?", "title year"), ("Return JSON with the keys name, sport and age.", "name sport age"),
    ("Give me one JSON object that has the keys city and weather.", "city weather"), ("Answer with JSON only. Keys: food, price.", "food price"), ("Produce a JSON object with name, hobby and happy.", "name hobby happy"),
    ("Describe a shop as JSON with name, city and year.", "name city year"), ("A dog as JSON with the keys name, color, age.", "name color age"), ("json with name and job", "name job"), ("Please write JSON with day and weather.", "day weather"),
    ("Describe a trip in JSON with the keys country, day and price.", "country day price"), ("Invent a student. JSON with name, age, hobby.", "name age hobby"), ("Give me JSON for a toy: name, color, price.", "name color price"), ("Show me a JSON object with only the key name.", "name"),
]  # fmt: skip


def cases() -> list[Case]:
    rng = random.Random(SUM_SEED)
    out = [Case("first prompts", (ask,), _has(words)) for ask, words in FIRST]
    for i, pair in enumerate(STORIES):
        ask = (
            "Please write a short story about {}.",
            "Can you tell a story about {}?",
            "Tell me a little story about {}.",
        )[i % 3]
        out.append(Case("stories", (ask.format(a(pair)),), _story(pair.split()[1])))
    for i, name in enumerate(facts.KNOWN[:60]):
        ask = (
            "Could you tell me the capital of {}?",
            "What is the capital city of {}?",
            "Which city is {}'s capital?",
        )[i % 3]
        out.append(
            Case("capitals", (ask.format(facts.the(name)),), _has(re.escape(facts.COUNTRIES[name]["capital"].lower())))
        )
    for i, word in enumerate(rng.sample(sorted(facts.WORDS), N_WORDS)):
        ask = ("Please define the word {}.", "What is meant by {}?", "Tell me what {} means.")[i % 3].format(word)
        out.append(Case("definitions", (ask,), _gloss(facts.WORDS[word])))
    pairs = [(x, y) for x in range(1, 19) for y in range(1, 19) if x + y < 20]
    for i, (x, y) in enumerate(rng.sample(pairs, N_SUMS)):
        ask = ("What does {} plus {} make?", "Please add {} and {}.", "{} + {} is what?")[i % 3].format(x, y)
        out.append(Case("sums", (ask,), _has(rf"(^|is |= |make |makes |equals ){x + y}\b(?! ?[+-])")))
    for i, kind in enumerate(LISTS):
        ask = ("Could you list five {}?", "Name me five {}, please.", "Show me five {}.")[i % 3]
        out.append(Case("lists of five", (ask.format(kind),), _five(kind)))
    out += [Case("second turns", asks, good) for asks, good in second_turns()]
    return out + [Case("JSON", (ask,), _keys(keys.split())) for ask, keys in KEYS]


def kept_out() -> set[str]:
    """Prompts that no training text may hold, plain: greetings of up to three words excepted."""
    return {plain(ask) for case in cases() for ask in case.asks[:1] if len(ask.split()) > 3}


def plain(text: str) -> str:
    return " ".join(re.findall(r"[a-z0-9+]+", text.lower()))


def table(results: list[tuple[str, bool]]) -> str:
    """A line for each row: its share of good answers, and the bar."""
    share = defaultdict(list)
    for row, good in results:
        share[row].append(good)
    lines = [
        f"{row:14} {sum(goods) / len(goods):6.1%} of {len(goods):4}  must {BARS[row]:.0%}"
        for row, goods in share.items()
    ]
    return "\n".join(lines)


def asked(job: tuple[Path, int, int]) -> list[dict[str, object]]:
    """Every case once (or each n-th), with one seed: a process of its own for each seed."""
    from asking import converse  # the engine: not wanted where only cases() is

    from dsv2cli.runtime import open_model

    path, seed, every = job
    said: list[dict[str, object]] = []
    with open_model(path, None) as opened:
        for case in cases()[::every]:
            answers = converse(opened, case.asks, seed, MAX_TOKENS)
            good = case.good(answers)
            said.append({"row": case.row, "seed": seed, "good": good, "asks": case.asks, "answers": answers})
    return said


def judged(path: Path, teacher: Path, heldout: Path, n_seeds: int, every: int) -> Iterator[str]:
    """A line for each kind of prompt: the teacher's perplexity of the model's answers, and of its own to the same prompts.

    The prompts set apart have an answer of the teacher's (mix.py puts these first), sampled cooler than the program
    does, under a system message, and cleaned. To the first prompts it answers here, once, sampled as the model is.
    """
    from asking import converse
    from losses import mean_nats

    from dsv2cli.runtime import open_model

    apart = [json.loads(line)["messages"] for line in heldout.read_text().splitlines()[: 10 * N_HELDOUT]]
    kept = [(turns[0]["content"], turns[1]["content"]) for turns in apart if len(turns) == 2][:N_HELDOUT:every]
    with open_model(path, None) as ours, open_model(teacher, None) as judge:

        def line(name: str, own: list[tuple[str, str]]) -> str:
            seeds = range(1, n_seeds + 1)
            said = [(ask, converse(ours, [ask], n, MAX_TOKENS)[0].rstrip("\0")) for n in seeds for ask, _ in own]
            model, teachers = math.exp(mean_nats(judge, said)), math.exp(mean_nats(judge, own))
            return (
                f"{name:14} perplexity {model:.2f} of {len(said)} answers, {teachers:.2f} of the teacher's own"
                f" {len(own)}: {model / teachers:.2f}x  must under {WORST}x"
            )

        yield line("set apart", kept)
        asks = [ask for ask, _ in FIRST[::every]]
        yield line("first prompts", [(ask, converse(judge, [ask], 1, MAX_TOKENS)[0].rstrip("\0")) for ask in asks])


def main() -> None:
    parser = argparse.ArgumentParser(description="What the packaged model must show.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--every", type=int, default=1, help="each n-th case or prompt only")
    parser.add_argument("--teacher", type=Path, help="a GGUF: how likely the answers are to it, and nothing else")
    parser.add_argument("--heldout", type=Path, help="the conversations that mix.py set apart; with --teacher")
    args = parser.parse_args()
    if (args.teacher is None) != (args.heldout is None):
        parser.error("--teacher and --heldout go together")
    if args.teacher is not None:
        for line in judged(args.model, args.teacher, args.heldout, args.seeds, args.every):
            print(line, flush=True)
        return
    with Pool(args.seeds) as pool:
        jobs = [(args.model, seed, args.every) for seed in range(1, args.seeds + 1)]
        said = [row for part in pool.map(asked, jobs) for row in part]
    Path(f"{args.model.stem}.said.jsonl").write_text("".join(json.dumps(x, ensure_ascii=False) + "\n" for x in said))
    print(table([(str(x["row"]), bool(x["good"])) for x in said]))


if __name__ == "__main__":
    main()
