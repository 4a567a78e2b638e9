"""Questions with answers that are right: countries, meanings of words, sums, units, lists."""

import json
import random
from pathlib import Path

from talk import ANOTHER, Turns
from words import LISTS, a

TABLES = json.loads(Path(__file__).with_name("tables.json").read_text())
COUNTRIES: dict[str, dict[str, str]] = TABLES["countries"]
WORDS: dict[str, str] = TABLES["words"]
THE = ("United", "Netherlands", "Philippines", "Bahamas", "Maldives", "Czech Republic", "Dominican Republic", "Central")
_FAMOUS = [
    "France",
    "Germany",
    "Italy",
    "Spain",
    "Portugal",
    "Ireland",
    "Norway",
    "Sweden",
    "Finland",
    "Denmark",
    "Poland",
    "Greece",
    "Turkey",
    "Russia",
    "China",
    "Japan",
    "India",
    "Egypt",
    "Kenya",
    "Nigeria",
    "Morocco",
    "Brazil",
    "Argentina",
    "Chile",
    "Peru",
    "Mexico",
    "Canada",
    "United States",
    "Australia",
    "New Zealand",
    "Austria",
    "Belgium",
    "Netherlands",
    "Hungary",
    "Cuba",
    "Thailand",
    "Vietnam",
    "South Korea",
    "Iceland",
    "United Kingdom",
    "Ukraine",
    "Romania",
    "Bulgaria",
    "Croatia",
    "Serbia",
    "Iraq",
    "Iran",
    "Saudi Arabia",
    "Pakistan",
    "Nepal",
    "Indonesia",
    "Philippines",
    "Ghana",
    "Ethiopia",
    "Senegal",
    "Tunisia",
    "Algeria",
    "Colombia",
    "Ecuador",
    "Venezuela",
]
KNOWN = [name for name in _FAMOUS if name in COUNTRIES]


def the(country: str) -> str:
    return f"the {country}" if country.startswith(THE) else country


def country(rng: random.Random) -> Turns:
    """The capital, language, money or continent of a country; sometimes a second question."""
    turns: Turns = []
    name = rng.choice(KNOWN if rng.random() < 0.6 else list(COUNTRIES))
    for n in range(rng.choice((1, 1, 1, 2, 2, 3))):
        row, x = COUNTRIES[name], the(name)
        kind = "capital" if rng.random() < 0.6 else rng.choice(("continent", "language", "currency", "city", "about"))
        if n and kind == "capital" and rng.random() < 0.8:
            asks = [
                "And of {x}?",
                "And the capital of {x}?",
                "What about {x}?",
                "and {x}?",
                "And what is the capital of {x}?",
            ]
            if turns[-1][1].find("capital") < 0:
                asks = asks[1:2] + asks[4:]
        else:
            asks = {
                "capital": ["What is the capital of {x}?", "what is the capital of {x}", "What's the capital of {x}?", "Name the capital of {x}.", "Which city is the capital of {x}?", "capital of {x}", "Tell me the capital of {x}.", "Do you know the capital of {x}?", "What is {x}'s capital?", "The capital of {x}?", "Which is the capital city of {x}?"],
                "continent": ["Where is {x}?", "On which continent is {x}?", "In which part of the world is {x}?", "where is {x}"],
                "language": ["What language do people speak in {x}?", "Which language is spoken in {x}?", "language of {x}", "What do they speak in {x}?"],
                "currency": ["What is the currency of {x}?", "What money do they use in {x}?", "currency of {x}", "How do people pay in {x}?"],
                "about": ["Tell me about {x}.", "What do you know about {x}?", "Describe {x}.", "tell me about {x}", "What is {x}?", "Tell me something about {x}."],
                "city": ["Where is {c}?", "Which country has {c} as its capital?", "{c} is the capital of which country?"],
            }[kind]  # fmt: skip
        big = x[0].upper() + x[1:]
        answers = {
            "capital": [
                "The capital of {x} is {capital}.",
                "The capital of {x} is {capital}.",
                "{capital} is the capital of {x}.",
            ],
            "continent": ["{X} is in {continent}.", "{X} is in {continent}. Its capital is {capital}."],
            "language": ["People in {x} speak {language}.", "The main language of {x} is {language}."],
            "currency": ["The currency of {x} is the {currency}.", "People in {x} pay with the {currency}."],
            "about": [
                "{X} is a country in {continent}. Its capital is {capital}. People there speak {language} and pay with the {currency}.",
                "{X} is in {continent}. The capital is {capital}, and the main language is {language}.",
            ],
            "city": ["{capital} is the capital of {x}.", "{capital} is in {x}, in {continent}."],
        }[kind]
        turns.append(("user", rng.choice(asks).format(x=x, c=row["capital"])))
        turns.append(("assistant", rng.choice(answers).format(x=x, X=big, **row).replace("..", ".")))
        name = rng.choice(KNOWN)
    return turns


def meaning(rng: random.Random) -> Turns:
    word = rng.choice(list(WORDS))
    gloss, x = WORDS[word], a(word)
    ask = rng.choice((
        f"What does {word} mean?", f"What does the word {word} mean?", f"Define {word}.", f"What is the meaning of {word}?", f"define {word}",
        f"What is {x}?", f"what is {word}", f"Explain the word {word}.", f"meaning of {word}", f"Give me a definition of {word}.", f"What's the definition of {word}?", f"Define the word {word}.",
    ))  # fmt: skip
    answer = rng.choice(
        (f"{word.capitalize()} means {gloss}.", f"{word.capitalize()}: {gloss}.", f"The word {word} means {gloss}.")
    )
    turns = [("user", ask), ("assistant", answer)]
    if rng.random() < 0.15:
        turns += [("user", rng.choice(("Thanks!", "Thank you!"))), ("assistant", "You are welcome!")]
    return turns


NUMBERS = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
    "twenty",
]
NOUNS = ["apple", "book", "coin", "egg", "pen", "stone", "cookie", "ball", "flower", "button", "card", "fish"]


def total(rng: random.Random) -> Turns:
    """A sum, a difference or a product of small numbers, as figures, in words or in a tale."""
    turns: Turns = []
    for _ in range(rng.choice((1, 1, 2))):
        kind = rng.random()
        x, y = rng.randint(0, 19), rng.randint(0, 19)
        if kind < 0.55:
            y = rng.randint(0, 19 - x) if rng.random() < 0.7 else y
            z, sign, word, verb = x + y, "+", "plus", "add"
        elif kind < 0.8:
            x, y = max(x, y), min(x, y)
            z, sign, word, verb = x - y, "-", "minus", "subtract"
        else:
            x, y = rng.randint(0, 10), rng.randint(0, 10)
            z, sign, word, verb = x * y, "*", "times", "multiply"
        ask = rng.choice((
            f"What is {x} {sign} {y}?", f"What is {x} {word} {y}?", f"{x} {sign} {y}", f"{x} {sign} {y} = ?", f"How much is {x} {word} {y}?", f"{x}{sign}{y}", f"Calculate {x} {sign} {y}.",
            f"what is {x} {sign} {y}", f"What do you get when you {verb} {x} and {y}?" if verb == "add" else f"How much is {x} {sign} {y}?",
            f"What is {NUMBERS[x]} {word} {NUMBERS[y]}?", f"Can you tell me what {x} {word} {y} is?", f"{x} {word} {y}", f"What is the sum of {x} and {y}?" if verb == "add" else f"What's {x} {word} {y}?",
        ))  # fmt: skip
        answer = rng.choice((f"{x} {sign} {y} = {z}", f"{x} {word} {y} is {z}.", f"{x} {sign} {y} = {z}."))
        if kind < 0.12 and x + y < 20:
            thing = rng.choice(NOUNS)
            ask = rng.choice(
                (
                    f"I have {x} {thing}s and get {y} more. How many {thing}s do I have?",
                    f"Tom has {x} {thing}s and Ana has {y}. How many do they have together?",
                )
            )
            answer = f"{x} + {y} = {z}."
        turns += [("user", ask), ("assistant", answer)]
    return turns


UNITS = [
    ("kilometer", "meters", 1000), ("meter", "centimeters", 100), ("centimeter", "millimeters", 10), ("kilogram", "grams", 1000), ("hour", "minutes", 60),
    ("minute", "seconds", 60), ("day", "hours", 24), ("week", "days", 7), ("year", "months", 12), ("liter", "milliliters", 1000), ("dozen", "pieces", 12),
    ("foot", "inches", 12), ("yard", "feet", 3), ("ton", "kilograms", 1000), ("century", "years", 100), ("decade", "years", 10),
]  # fmt: skip


def unit(rng: random.Random) -> Turns:
    one, many, factor = rng.choice(UNITS)
    n = 1 if rng.random() < 0.5 else rng.randint(2, 9)
    plural = {"foot": "feet", "century": "centuries"}.get(one, one + "s")
    left = f"{'an' if one == 'hour' else 'a'} {one}" if n == 1 else f"{n} {plural}"
    ask = rng.choice(
        (
            f"How many {many} are in {left}?",
            f"how many {many} in {left}",
            f"Convert {n} {one if n == 1 else plural} to {many}.",
            f"How many {many} is {left}?",
        )
    )
    said = f"{n} {plural}" if n > 1 else f"{left[0].upper()}{left[1:]}"
    return [("user", ask), ("assistant", f"{said} {'are' if n > 1 else 'is'} {n * factor} {many}.")]


COUNTS = {3: "three", 4: "four", 5: "five"}


def listing(rng: random.Random) -> Turns:
    """Three to five different items of a kind; sometimes other ones, or one of them, next."""
    name = rng.choice(list(LISTS))
    items = list(LISTS[name])
    n = rng.choice((3, 4, 5, 5, 5, 5))
    # In the list's own order, so that a small model need not remember what it has named to name another.
    chosen = sorted(rng.sample(range(len(items)), n))
    items = [items[i] for i in chosen] + [item for i, item in enumerate(items) if i not in chosen]
    count = rng.choice((COUNTS[n], str(n)))
    ask = rng.choice((
        f"List {count} {name}.", f"Name {count} {name}.", f"Give me {count} {name}.", f"Tell me {count} {name}.", f"list {count} {name}", f"Can you name {count} {name}?",
        f"Give me a list of {count} {name}.", f"Write down {count} {name}.", f"{count} {name}", f"What are {count} {name}?", f"I need {count} {name}.", f"Please list {count} {name}.",
    ))  # fmt: skip
    style = rng.random()

    def show(part: list[str]) -> str:
        if style < 0.55:
            return "\n".join(f"{i}. {item[0].upper()}{item[1:]}" for i, item in enumerate(part, 1))
        if style < 0.8:
            return "\n".join(f"- {item}" for item in part)
        text = f"{', '.join(part[:-1])} and {part[-1]}."
        return text[0].upper() + text[1:]

    turns: Turns = [("user", ask), ("assistant", show(items[:n]))]
    rest = items[n:]
    if rng.random() < 0.35 and len(rest) >= 2:
        if rng.random() < 0.6:
            turns += [
                ("user", rng.choice((*ANOTHER[3:4], "Give me two more.", "Two more, please.", "two more"))),
                ("assistant", show(rest[:2])),
            ]
            if turns[-2][1] == ANOTHER[3]:
                turns[-1] = ("assistant", f"{rest[0][0].upper()}{rest[0][1:]}.")
        else:
            k = rng.randrange(n)
            which = ("first", "second", "third", "fourth", "fifth")[k]
            turns += [
                ("user", rng.choice((f"What was the {which} one?", f"Which one is {which}?"))),
                ("assistant", f"The {which} one is {items[k]}."),
            ]
    return turns
