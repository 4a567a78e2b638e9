"""Short stories from a small grammar of plots (written for this project, CC0).

A story has a hero (a noun and perhaps an adjective), a place, a want, a trouble, a turn and an end; each beat is drawn from
several sentences. {h} is the hero with "the", {s} {o} {p} its pronouns.
"""

import random

from words import ADJECTIVES, ANIMALS, FINDS, FRIENDS, PEOPLE, PLACES, THINGS, a

HE = {
    "prince",
    "king",
    "knight",
    "soldier",
    "sailor",
    "captain",
    "pirate",
    "farmer",
    "miller",
    "tailor",
    "shepherd",
    "wizard",
    "boy",
    "grandfather",
    "fisherman",
    "man",
    "postman",
}
SHE = {"princess", "queen", "girl", "grandmother", "nurse", "fairy", "witch", "mermaid", "woman", "dancer"}

OPENINGS = [
    "Once upon a time, there was {a} who lived in {place}.",
    "Once there was {a} in {place}.",
    "Long ago, in {place}, there lived {a}.",
    "In {place}, there was {a}.",
    "Far away, in {place}, {a} lived all alone.",
    "There was once {a}, and {s} lived in {place}.",
]
TRAITS = {
    "happy": ["{H} sang every morning and smiled at everyone.", "Nothing could make {h} frown, not even the rain."],
    "sad": ["{H} had not smiled since the autumn.", "{H} often sighed, and nobody knew why."],
    "brave": ["{H} was not afraid of storms, or of the dark.", "When others ran away, {h} stayed."],
    "lonely": ["{H} had nobody to talk to in the evening.", "{H} watched the others play and wished for a friend."],
    "curious": ["{H} wanted to know how everything worked.", "{H} asked a hundred questions a day."],
    "kind": ["{H} always shared what {s} had.", "{H} helped everyone who came by."],
    "lazy": ["{H} liked to sleep until noon.", "{H} always said, \"I will do it tomorrow.\""],
    "clever": ["{H} could solve any riddle.", "{H} always had a good idea when one was needed."],
    "shy": ["{H} hid whenever a stranger came by.", "{H} spoke so softly that few had ever heard {o}."],
    "proud": ["{H} thought that nobody was better than {o}.", "{H} never asked anyone for help."],
    "grumpy": ["{H} complained about the sun, and then about the rain.", "{H} never said good morning to anyone."],
    "tiny": ["{H} was so small that nobody noticed {o}.", "{H} could hide behind a teacup."],
    "small": ["{H} was smaller than all the others.", "Many laughed because {h} was so small."],
    "little": ["{H} was small, but {s} had big dreams.", "Everyone said that {h} was too little to help."],
    "big": ["{H} was so big that the ground shook.", "{H} was big, and everyone was a little afraid of {o}."],
    "lost": ["{H} did not know the way home.", "{H} had taken a wrong turn in the fog."],
    "hungry": ["{H} had not eaten since yesterday.", "{H} thought of nothing but soup and bread."],
    "sleepy": ["{H} yawned all day long.", "{H} could fall asleep anywhere."],
    "forgetful": ["{H} forgot everything, even {p} own name.", "{H} tied knots in a string to remember things."],
    "magical": ["At night, {h} glowed with a soft light.", "Whatever {h} touched began to shine."],
    "funny": ["{H} made everyone laugh.", "{H} knew more jokes than anyone else."],
    "quiet": ["{H} never made a sound.", "{H} liked to listen more than to talk."],
    "wise": ["Everyone came to {h} for advice.", "{H} had seen many winters and knew many things."],
    "stubborn": ["{H} never changed {p} mind.", "When {h} said no, it stayed no."],
    "generous": ["{H} gave away whatever {s} had.", "{H} kept nothing for {o}self."],
    "honest": ["{H} had never told a lie.", "{H} always told the truth, even when it was hard."],
    "young": ["{H} had never left home before.", "{H} still had much to learn."],
    "old": ["{H} had seen many summers come and go.", "{H} moved slowly now, but {s} remembered everything."],
    "friendly": ["{H} greeted everyone with a smile.", "{H} made new friends every day."],
    "poor": ["{H} had only one coin and a piece of bread.", "{H} had little, but {s} never complained."],
    "": ["Everyone in that place knew {h} well.", "{H} dreamed of seeing the world.", "Every day was the same for {h}."],
}  # fmt: skip

# Each plot: beats in order, each a list of alternatives.
PLOTS: list[list[list[str]]] = [
    [  # something is found, and given back
        ["One morning, {h} found {find} on the ground.", "One day, {h} went for a walk and saw {find} under a bush."],
        ["\"Whose is this?\" {s} asked.", "\"Somebody must miss this,\" said {h}.", "It was beautiful, and {h} wanted to keep it."],
        ["{H} asked everyone on the road, but nobody knew.", "{H} carried it from door to door, and all shook their heads."],
        ["At last {s} met {friend}, who was crying. \"I lost {find},\" said the stranger.", "In the evening {s} met {friend}. \"I have looked for {find} all day,\" said the stranger."],
        ["{H} gave it back at once.", "For a moment {h} wanted to keep it. Then {s} held it out and said, \"Here it is.\""],
        ["\"Thank you,\" said the stranger, and the two shared a warm supper.", "The stranger smiled and danced for joy."],
        ["From that day on, they were friends, and {h} was never alone again.", "{H} went home with empty hands and a full heart."],
    ],
    [  # a storm
        ["One night, a great storm came.", "One evening the sky turned black, and the wind began to howl."],
        ["The rain fell hard, and the river rose.", "Trees bent, and roofs flew away like leaves."],
        ["{H} heard a cry for help. It was {friend}!", "Through the noise, {h} heard somebody call. {Friend} was caught in the flood."],
        ["{H} was afraid, but {s} did not wait.", "\"Hold on!\" called {h}. \"I am coming!\""],
        ["{H} found a long rope and threw one end across the water.", "Step by step, {h} fought against the wind until {s} was there."],
        ["Together they reached dry ground.", "They held on to each other until the storm was over."],
        ["In the morning the sun came out. Everyone thanked {h}, who had been so brave.", "When the sun rose, all the neighbors came and cheered for {h}."],
    ],
    [  # a wish for a friend
        ["{H} wanted a friend more than anything.", "\"I wish I had a friend,\" {h} said to the moon every night."],
        ["So one day {s} set out to look for one.", "One spring morning, {h} left home to find one."],
        ["First {s} asked the wind, but the wind was in a hurry.", "{S} asked the birds, but they were flying south."],
        ["Then {s} met {friend}, who had fallen into a hole.", "Behind a hill {s} heard {friend} calling for help."],
        ["{H} stopped and helped. It took all afternoon.", "{H} pulled and pulled until the stranger was free."],
        ["\"Will you stay for tea?\" asked the stranger.", "\"Nobody has ever been so kind to me,\" said the stranger."],
        ["They talked until the stars came out. {H} had found a friend at last.", "And so {h} learned that the best way to find a friend is to be one."],
    ],
    [  # a broken thing is mended
        ["In the middle of the town stood a big clock, and one day it stopped.", "One day, the old bell that everybody loved cracked and fell silent."],
        ["Nobody knew what time it was. Bread burned, and children came late to school.", "Without it the days felt empty, and people began to quarrel."],
        ["Many tried to mend it, and all of them failed.", "The mayor sent for experts, but they only shook their heads."],
        ["\"Let me try,\" said {h}. Everybody laughed.", "{H} looked at it for a long time. \"I think I can mend it,\" {s} said."],
        ["{H} worked all night by the light of a candle.", "For three days {h} worked and hardly slept. {Friend} brought {o} soup."],
        ["Inside, {s} found a small leaf that had blocked everything. {S} took it out.", "At last {s} saw the fault. One tiny screw was missing, and {h} made a new one."],
        ["Then the sound rang out over the roofs, and everybody cheered for {h}.", "From then on, nobody laughed at {h} any more."],
    ],
    [  # a race
        ["Every year there was a great race around the hill.", "One summer there was a race, and the prize was {find}."],
        ["\"You will never win,\" the others said to {h}.", "Nobody believed that {h} could even reach the end."],
        ["{H} practiced every morning before sunrise.", "{H} only smiled and went to the start."],
        ["When the race began, {h} was the last of all.", "The others were fast, and soon {h} was far behind."],
        ["But halfway around, {s} saw {friend} lying in the grass with a hurt foot.", "Then {h} saw that {friend} had fallen. The others just ran past."],
        ["{H} stopped, bandaged the foot, and helped the stranger walk.", "\"Lean on me,\" said {h}, and they went on together, slowly."],
        ["They came in last, but the crowd cheered louder for {h} than for the winner.", "The winner gave the prize to {h}. \"You ran the better race,\" he said."],
    ],
    [  # a garden
        ["One spring, {h} planted a small seed.", "One day, {friend} gave {h} a single seed."],
        ["{H} watered it every day, but nothing happened.", "A week went by, and the earth stayed bare."],
        ["\"Give up,\" said the neighbors. \"It is only a stone.\"", "Others laughed, but {h} kept watering it."],
        ["{H} waited through sun and wind and rain.", "{H} sang to it in the evening and told it stories."],
        ["Then, one morning, a green leaf looked out of the earth.", "At last a thin green stem came up."],
        ["It grew and grew until it was taller than the roof, and it was full of sweet red apples.", "By summer it was a tree, and birds came to live in it."],
        ["{H} shared the fruit with everyone, even with those who had laughed.", "Whenever somebody wanted to give up, {h} showed them the tree."],
    ],
    [  # a dark place
        ["Near that place was a cave that everyone feared.", "In the forest stood a house where a light burned every night, and nobody dared to go near."],
        ["\"A monster lives there,\" people said.", "Some said a ghost lived there, and some said a dragon."],
        ["One night {h} heard somebody crying inside.", "{H} wanted to know the truth, so {s} took a lantern and went."],
        ["It was dark and cold. {P} heart beat fast, but {h} went on.", "At the door {h} stopped and took a deep breath."],
        ["Inside sat {friend}, all alone. \"I am afraid of the dark,\" said the stranger.", "There was no monster at all. There was only {friend}, who was lost."],
        ["\"Then we will be afraid together,\" said {h}, and lit the lantern.", "{H} laughed. \"Come with me,\" {s} said. \"I know the way.\""],
        ["Since that night nobody fears the place, and {h} goes there for tea.", "Hand in hand they went home, and {h} told everyone what {s} had seen."],
    ],
    [  # a journey to the sea
        ["{H} had always wanted to see the sea.", "All {p} life, {h} had heard stories about the sea."],
        ["One day {s} packed some bread and an apple and left.", "\"Now or never,\" said {h}, and off {s} went."],
        ["The road was long, and the first night was cold.", "After three days {h} was tired and wanted to turn back."],
        ["On a bridge {s} met {friend}. \"Follow the river,\" said the stranger.", "There {s} met {friend}, who was going the same way."],
        ["{H} shared the last piece of bread, and they walked on together.", "They told each other jokes, and the road felt short."],
        ["Over the last hill, they saw it: blue water as far as the eye could see.", "Then they heard a deep sound, and there was the sea, shining like silver."],
        ["{H} sat down in the sand and laughed for joy.", "{H} stayed until the sun went down, and took a small shell home."],
    ],
    [  # a lesson about a lie or a boast
        ["One day {h} told everyone that {s} could talk to the moon.", "One day, {h} boasted, \"I am not afraid of anything.\""],
        ["It was not true, but everybody believed it.", "The others were amazed, and {h} liked that very much."],
        ["\"Show us!\" they said. \"Tonight, on the hill.\"", "\"Then come with us to the dark forest tonight,\" they said."],
        ["{H} could not sleep. What should {s} do?", "All day {h} worried, and {p} supper tasted of nothing."],
        ["At last {h} went to {friend} and told the truth.", "In the evening {h} asked {friend} for advice."],
        ["\"A small truth is better than a big lie,\" said the friend.", "\"Just say that you are sorry,\" said the friend. \"It is easier than you think.\""],
        ["So {h} told everyone the truth. They were quiet for a moment. Then they laughed and forgave {o}.", "{H} said sorry, and nobody was angry. That night {h} slept well again."],
    ],
    [  # winter and sharing
        ["Then came the coldest winter that anyone remembered.", "That winter the snow was as high as the windows."],
        ["{H} had only a little bread and one blanket.", "There was little wood, and even less to eat."],
        ["One night there was a knock at the door.", "Late in the evening, {h} heard a soft knock."],
        ["Outside stood {friend}, cold and hungry.", "It was {friend}, shaking with cold."],
        ["\"Come in,\" said {h}. \"What I have is enough for two.\"", "{H} gave the stranger the blanket and half of the bread."],
        ["In the morning more neighbors came, and each brought something: a carrot, an onion, a bit of salt.", "They made a small fire and told stories until the morning."],
        ["They cooked a big soup, and {h} was warm the whole winter.", "When spring came, the stranger returned with {find} for {h}, who had been so good."],
    ],
    [  # music
        ["{H} had one secret: {s} loved to sing.", "Every night, when all were asleep, {h} made music."],
        ["But {s} had never dared to let anybody hear it.", "\"What if they laugh?\" {s} thought."],
        ["One evening {friend} was ill and could not sleep.", "One night {friend} sat outside the window and wept."],
        ["{H} thought for a long time. Then {s} began, very softly.", "So {h} took a deep breath and began to play."],
        ["The song was like rain on leaves, and the stranger grew calm.", "The sound went through the night like a warm wind."],
        ["Windows opened, and people stood still to listen.", "One by one, the neighbors came out to hear it."],
        ["When it was over, they asked for more. Since then {h} sings every evening.", "Nobody laughed. \"Thank you,\" they said, and {h} was not afraid any more."],
    ],
    [  # a map and a treasure
        ["One rainy day, {h} found an old map behind a wall.", "One day {friend} gave {h} an old map. \"I am too tired for it,\" said the friend."],
        ["A red cross showed a place on the hill.", "There was a cross on it, and the words: the greatest treasure of all."],
        ["{H} took a shovel and set out at once.", "\"I will find it,\" said {h}, and packed a bag."],
        ["The way led over a broken bridge and through a swamp.", "{S} climbed over rocks and swam through a cold river."],
        ["At the cross {h} dug until the sun went down. There was a box!", "In the evening {s} stood at the cross and dug out an iron box."],
        ["Inside there was no gold, only {find} and a letter. \"Share this with a friend,\" it said.", "In it lay a note: \"The treasure is the way that you have come.\""],
        ["{H} laughed, went home, and told the story for many years.", "{H} read it twice and smiled. Then {s} went home, a little wiser than before."],
    ],
]  # fmt: skip
ENDS = ["", "", "", " The end.", " And that is how it was.", " And they all lived happily."]
ASKS = [
    "Tell me a story about {x}.", "Tell me a short story about {x}.", "Write a story about {x}.", "Can you tell me a story about {x}?",
    "Please tell me a story about {x}.", "I want a story about {x}.", "tell me a story about {x}", "Write a short story about {x}.",
    "story about {x}", "A story about {x}, please.", "Could you write a story about {x}?", "Tell me a bedtime story about {x}.",
    "Make up a story about {x}.", "I would like to hear a story about {x}.", "Give me a story with {x} in it.", "a short story about {x} please",
]  # fmt: skip
OPEN_ASKS = [
    "Tell me a story.", "Tell me a bedtime story.", "Write me a short story.", "tell me a story", "A story, please.", "Can you tell me a story?",
    "Please tell me a short story.", "Read me a story.", "I want to hear a story.", "Tell me something nice.",
]  # fmt: skip


def hero(rng: random.Random) -> tuple[str, str]:
    """An adjective (perhaps none) and a noun."""
    return rng.choice(ADJECTIVES) if rng.random() < 0.75 else "", rng.choice(rng.choice((ANIMALS, PEOPLE, THINGS)))


def story(rng: random.Random, adjective: str, noun: str) -> list[str]:
    """A story as paragraphs."""
    he = noun in HE or (noun in PEOPLE and noun not in SHE and rng.random() < 0.5)
    s, o, p = ("he", "him", "his") if he else ("she", "her", "her") if noun in PEOPLE else ("it", "it", "its")
    friend, find = rng.choice([f for f in FRIENDS if noun not in f]), rng.choice([f for f in FINDS if noun not in f])
    short = f"the {noun}"
    full = f"the {adjective} {noun}".replace("the  ", "the ")
    slots = {
        "s": s,
        "o": o,
        "p": p,
        "S": s.capitalize(),
        "P": p.capitalize(),
        "place": rng.choice([x for x in PLACES if noun not in x]),
    }
    slots |= {
        "a": a(f"{adjective} {noun}".strip()),
        "friend": friend,
        "Friend": friend[0].upper() + friend[1:],
        "find": find,
    }

    def say(options: list[str]) -> str:
        h = full if rng.random() < 0.3 else short
        return rng.choice(options).format(h=h, H=h[0].upper() + h[1:], **slots)

    beats = [say(beat) for beat in rng.choice(PLOTS)]
    first = f"{say(OPENINGS)} {say(TRAITS.get(adjective, TRAITS['']))}"
    cut = rng.choice((2, 3))
    paragraphs = [f"{first} {' '.join(beats[:1])}", " ".join(beats[1 : cut + 2]), " ".join(beats[cut + 2 :])]
    paragraphs[-1] += rng.choice(ENDS)
    return (
        paragraphs
        if rng.random() < 0.7
        else [" ".join(paragraphs)]
        if rng.random() < 0.5
        else [paragraphs[0], " ".join(paragraphs[1:])]
    )


def shorter(paragraphs: list[str]) -> str:
    """The same story in a few sentences: its opening and its end."""
    text = " ".join(paragraphs).split(". ")
    return ". ".join([text[0], *text[-2:]])
