"""What the teacher is asked: a system message, the user's words, and sometimes how the answer begins."""

import random
from dataclasses import dataclass, field

import stories
from words import ADJECTIVES, ANIMALS, FRIENDS, PEOPLE, PLACES, THINGS, a, split

CONCEPTS = split(
    "gravity, the water cycle, photosynthesis, electricity, magnetism, the solar system, the moon, the sun, stars, black holes, rainbows, thunder, "
    "lightning, clouds, snow, wind, earthquakes, volcanoes, tides, oceans, rivers, deserts, forests, rain, fossils, dinosaurs, evolution, DNA, cells, "
    "bacteria, viruses, the heart, the brain, lungs, bones, muscles, sleep, dreams, memory, vitamins, sugar, bread, cheese, salt, chocolate, coffee, tea, "
    "democracy, money, a bank, inflation, a budget, insurance, taxes, a computer, a program, an algorithm, the internet, a search engine, artificial "
    "intelligence, a neural network, machine learning, a robot, a database, encryption, a password, open source software, recycling, climate change, "
    "solar power, wind power, a battery, an engine, a bicycle, an airplane, a submarine, a rocket, a telescope, a microscope, a compass, a clock, "
    "a calendar, a map, a poem, a novel, a metaphor, grammar, a verb, an adjective, a fraction, a triangle, a circle, prime numbers, probability, "
    "an average, geometry, algebra, music, rhythm, a symphony, a violin, painting, sculpture, photography, a museum, history, the Roman Empire, "
    "ancient Egypt, the Middle Ages, the Renaissance, the printing press, the steam engine, vaccines, penicillin, a bee, honey, a spider web, bird "
    "migration, hibernation, camouflage, a food chain, an ecosystem, coral reefs, whales, bats, penguins, a seed, a flower, a tree, soil, a glacier, "
    "a tsunami, the atmosphere, oxygen, carbon dioxide, water, ice, steam, fire, light, sound, heat, color, a mirror, a lens, an atom, a molecule, "
    "energy, friction, speed, friendship, happiness, honesty, courage, patience, a holiday, a birthday, a family, school, a garden, a kitchen, a train, "
    "a bridge, a lighthouse, a ship, winter, summer, spring, autumn, the night, breakfast, soup, pasta, rice, a sandwich, chess, soccer, swimming, yoga, a friend, an enemy, a teacher, a doctor, a market, a letter, a story, a joke, a language, a computer game, a phone, a camera, a river, an island, fire fighters, the police, a king, a farm, a forest, sleep, a holiday"
)
WHY = split(
    "do cats purr, do birds sing, do we dream, does ice float, do stars twinkle, do we yawn, do bees make honey, is exercise good for you, do dogs wag "
    "their tails, does the moon change shape, do we need water, is reading important, do people laugh, do plants need sunlight, do we have seasons, does "
    "bread rise, do onions make you cry, do we cook food, is the grass green, does metal rust, do boats float, do we need friends, do airplanes fly, do "
    "we have bones, is sleep important, do people sing, do we celebrate birthdays, is music nice, do children play, are bees important, do volcanoes erupt"
)
TASKS = split(
    "bake bread, brew good tea, grow tomatoes, plant a tree, learn to swim, ride a bicycle, learn the guitar, draw a face, write a poem, write a letter, "
    "read faster, remember names, study for a test, sleep better, save money, make friends, say sorry, be more patient, start running, clean a kitchen, "
    "fold a shirt, pack a suitcase, train a dog, care for a cat, feed birds in winter, take a good photo, tell a story, give a speech, learn a language, "
    "stay calm, wake up early, drink more water, cook rice, make soup, make a salad, fix a flat tire, keep plants alive, organize a desk, plan a trip, "
    "build a snowman, choose a book, listen better, relax after work, plan a birthday party, learn to code, write a good email, be happy, eat healthier"
)
TO = split(
    "my friend, my grandmother, my teacher, my neighbor, my boss, my mother, my brother, a new colleague, an old friend, a pen pal"
)
ABOUT = split(
    "a birthday, a holiday by the sea, a new job, moving to a new house, a lost cat, a rainy weekend, a good book, thanks for a gift, a garden party, "
    "being late, a school play, an invitation to dinner, the first snow, a train journey, learning to cook"
)
SAYINGS = split(
    "I got a new dog., I made a mistake., I am learning to cook., I miss my friend., It is raining., I am going on a trip., I started a new job., I like music., "
    "I want to read more., My cat is ill., I moved to a new city., It is cold today., I love the sea., I had a fight with my brother., I want to learn something new., "
    "What do you think about books?, What makes a good friend?, Do you like music?, What should I do today?, Let's talk., Ask me a question., Say something kind."
)
OPENINGS = split(
    "How, What, Why, Can you, Explain, Tell me, Write, Describe, Give me, I want to, What is the best way to, How can I, Who, When, Where, Is it, Do, Could you"
)
PLAIN = "You are a helpful assistant. You answer in simple, clear words and short sentences. You give short answers of two to five sentences."
TELLER = "You are a wonderful storyteller for children. You use simple words and tell short, complete stories with a happy ending."
FRIEND = "You are a warm, friendly person. You answer in one to three short sentences."
BEGIN = (
    "Once upon a time, there was {x}",
    "Once there was {x}",
    "There was once {x}",
    "In {p}, there lived {x}",
    "One day, {x}",
    "Long ago, {x} lived in {p}",
    "It was a sunny morning when {x}",
)


@dataclass(frozen=True)
class Ask:
    kind: str
    system: str
    turns: tuple[tuple[str, str], ...]
    opening: str = ""  # how the next speaker's words begin
    role: str = "assistant"
    about: tuple[str, ...] = field(default=())  # words that the answer should hold


def draw(rng: random.Random) -> Ask:
    kind = rng.random()
    if kind < 0.14:
        adjective, noun = stories.hero(rng)
        x = a(f"{adjective} {noun}".strip())
        with_ = rng.random()
        ask = rng.choice(stories.ASKS)
        if with_ < 0.4:
            x2 = rng.choice(
                (
                    f"{x} and {rng.choice(FRIENDS)}",
                    f"{x} who finds {rng.choice(stories.FINDS)}",
                    f"{x} who lives in {rng.choice(PLACES)}",
                    f"{x} who loses {rng.choice(stories.FINDS)}",
                )
            )
        else:
            x2 = x
        opening = rng.choice(BEGIN).format(x=x, p=rng.choice(PLACES))
        return Ask("story", TELLER, (("user", ask.format(x=x2)),), opening, about=(noun,))
    if kind < 0.47:
        what = rng.choice(CONCEPTS)
        ask = rng.choice(("What is {}?", "Explain {} simply.", "Explain {} to a child.", "Tell me about {}.", "How would you describe {}?", "What do you know about {}?", "Can you explain {} in a few sentences?", "what is {}", "Give me a short explanation of {}.", "Why is {} important?", "Tell me something about {}.", "Write a paragraph about {}.", "Say a few words about {}.", "Talk about {}.", "Why do people need {}?", "What is {} good for?"))  # fmt: skip
        return Ask("explain", PLAIN, (("user", ask.format(what)),), about=(what.split()[-1].rstrip("s"),))
    if kind < 0.53:
        return Ask("why", PLAIN, (("user", f"Why {rng.choice(WHY)}?"),))
    if kind < 0.66:
        what = rng.choice(TASKS)
        ask = rng.choice(("How do I {}?", "How can I {}?", "Give me three tips to {}.", "What is the best way to {}?", "Teach me to {}.", "I want to {}. Where do I start?", "Tell me how to {}.", "how to {}", "Do you have advice? I want to {}."))  # fmt: skip
        return Ask("howto", PLAIN, (("user", ask.format(what)),))
    if kind < 0.72:
        ask = rng.choice(
            (
                "Write a short letter to {} about {}.",
                "Write an email to {} about {}.",
                "Help me write a note to {} about {}.",
            )
        )
        return Ask("letter", PLAIN, (("user", ask.format(rng.choice(TO), rng.choice(ABOUT))),), "Dear ")
    if kind < 0.82:
        what = rng.choice((rng.choice(PLACES), a(rng.choice(ANIMALS)), a(rng.choice(THINGS)), a(rng.choice(PEOPLE))))
        ask = rng.choice(
            (
                "Describe {}.",
                "Describe {} in three sentences.",
                "Write a sentence about {}.",
                "Write a few sentences about {}.",
                "What does {} look like?",
                "Write about {}.",
            )
        )
        return Ask("describe", PLAIN, (("user", ask.format(what)),), about=(what.split()[-1],))
    if kind < 0.85:
        said = rng.choice(
            (
                *SAYINGS,
                f"I saw {a(rng.choice(ANIMALS))} today.",
                f"I am afraid of {a(rng.choice(ANIMALS))}.",
                f"I want to be {a(rng.choice(PEOPLE))}.",
                f"I feel {rng.choice(ADJECTIVES)} today.",
            )
        )
        return Ask("talk", FRIEND, (("user", said),))
    return Ask("question", PLAIN, (), rng.choice(OPENINGS), role="user")


FOLLOW = {
    "explain": (
        "Can you give an example?",
        "Tell me more.",
        "Why is that important?",
        "Thank you! Anything else I should know?",
        "Why?",
    ),
    "why": ("Why?", "Tell me more.", "Is that always so?"),
    "howto": ("What if it does not work?", "Tell me more.", "What do I need?", "How long does it take?"),
    "talk": ("Why?", "Tell me more.", "What else?", "Do you think so?", "What should I do?"),
    "question": ("Tell me more.", "Why?", "Can you give an example?"),
    "describe": ("Tell me more.", "What else?"),
}


def follow(rng: random.Random, ask: Ask, answer: str) -> Ask:
    """The next question of a conversation."""
    said = rng.choice(FOLLOW[ask.kind])
    return Ask(ask.kind, ask.system, (*ask.turns, ("assistant", answer), ("user", said)), about=ask.about)
