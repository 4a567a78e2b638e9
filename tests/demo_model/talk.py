"""Hand-written conversation (CC0): greetings, what the model is, jokes, advice, system messages, JSON and a call of a tool."""

import json
import random

from words import ANIMALS, LISTS, PEOPLE, THINGS, a

Turns = list[tuple[str, str]]  # (role, text)

ME = "I am a small demonstration model that ships with dsv2."
HELLO = [
    "Hello! How can I help you today?", "Hello! What would you like to talk about?", "Hi! Ask me for a story, a fact or a list.",
    "Hello! I can tell you a short story or answer a simple question.", "Hi there! What can I do for you?",
]  # fmt: skip
ABOUT = [
    ME + " I tell short stories and answer simple questions.",
    ME + " I can tell a story, name a capital, explain a word or make a short list.",
    ME + " I have about 50 million parameters, so I am often wrong about difficult things.",
    ME + " I am here so that you can try the program without a download.",
]
CAN = [
    "I can tell short stories, explain words, name capitals, do small sums and make lists. Try: Tell me a story about a ship.",
    "I can tell you a story, answer a simple question, list five things or give a little advice. I am a small model, so I make mistakes.",
    "Ask me for a story about anything, the capital of a country, the meaning of a word, or five animals.",
]
LARGER = "For serious work, fetch a larger model with dsv2 download."
MADE = [
    "I was trained for dsv2, from text written for it and from answers of a small open model.",
    "I was made for dsv2, so that the program can be tried offline.",
]
WELCOME = [
    "You are welcome!",
    "You are welcome! Is there anything else?",
    "My pleasure!",
    "I am glad that I could help.",
]
BYE = ["Goodbye! It was nice to talk to you.", "Goodbye! Come back soon.", "See you soon! Have a good day."]
FINE = [
    "I am well, thank you! How are you?", "I am fine, thank you. What would you like to do today?",
    "Very well, thank you! I am ready for a question or a story.",
]  # fmt: skip
JOKES = [
    "Why did the scarecrow win a prize? Because he was outstanding in his field.",
    "What do you call a bear with no teeth? A gummy bear.",
    "Why can't a bicycle stand on its own? Because it is two-tired.",
    "What do you call a fish without an eye? A fsh.",
    "Why did the tomato turn red? Because it saw the salad dressing.",
    "What did one wall say to the other wall? I will meet you at the corner.",
    "Why did the math book look sad? Because it had too many problems.",
    "What do you call cheese that is not yours? Nacho cheese.",
    "Why do bees have sticky hair? Because they use honeycombs.",
    "What has four wheels and flies? A garbage truck.",
    "Why did the cookie go to the doctor? Because it felt crumby.",
    "What do cats like for breakfast? Mice Krispies.",
    "How does the moon cut his hair? Eclipse it.",
    "Why are ghosts bad liars? Because you can see right through them.",
    "What do you call a sleeping bull? A bulldozer.",
    "Why did the computer go to bed? It needed to go to sleep mode.",
]
FACTS = [
    "Honey does not go bad. Jars of it that are thousands of years old can still be eaten.", "An octopus has three hearts and blue blood.",
    "A day on Venus is longer than a year on Venus.", "Bananas are berries, but strawberries are not.", "A group of crows is called a murder.",
    "Sea otters hold hands while they sleep, so that they do not drift apart.", "Light from the Sun takes about eight minutes to reach the Earth.",
    "The heart of a blue whale is about as big as a small car.", "Snails can sleep for up to three years.", "Hot water can freeze faster than cold water.",
]  # fmt: skip
ADVICE = [
    "Take one small step at a time. A big task is only many small ones.", "Be kind to yourself. Everybody makes mistakes, and you can learn from them.",
    "Go for a short walk, drink a glass of water, and then start with the easiest thing.", "Listen more than you speak. People will trust you.",
    "Sleep well before you decide something important.", "Ask for help when you need it. Most people like to help.",
    "Spend a little less than you earn, and save the rest.", "Do the most important thing first, early in the day.",
]  # fmt: skip
FEELINGS = {
    "I am sad today.|I feel sad.|I'm sad.|I feel down today.|I'm sad today|I am feeling sad.|I am feeling down.|I'm feeling a bit sad|i am sad|I am unhappy.|I feel so sad today.": ["I am sorry that you are sad. Do you want to tell me what happened?", "I am sorry to hear that. A walk or a talk with a friend can help. Would you like to hear a story?"],
    "I am bored.|I'm bored|i am so bored|I don't know what to do.|I'm so bored today|i'm bored|I am very bored.|It is so boring today.|What can I do? I am bored.|bored": ["Then let us do something! I can tell you a joke or a story, or you could draw something, read a book or go outside.", "You could read a book, draw a picture or call a friend. Or ask me for a story."],
    "I am happy!|I feel great today.|I'm so happy|I am in a good mood.|I am so happy today!|I'm happy|I'm really happy today.|today is a great day|I feel happy.": ["I am glad to hear that! What made you so happy?", "That is wonderful! Enjoy it and share it with somebody."],
    "I am tired.|I'm so tired|I had a long day.|I need a break.|I feel tired|I am very tired today.|I'm exhausted.|I feel so tired.|so tired": ["Then take a rest. A cup of tea and an early night can help.", "That sounds like a long day. Sit down, close your eyes for a moment, and rest."],
    "I can't sleep.|I cannot sleep|How do I fall asleep?|I can't get to sleep.|I could not sleep last night.|i cant sleep|How can I sleep better?|How do I sleep well?|Tips to sleep better, please.": ["Put the phone away, make the room dark and cool, and breathe slowly. Would you like a bedtime story?", "Try to read a quiet book, and do not look at the clock. Slow breathing helps to sleep."],
    "I am hungry.|I'm hungry, what should I eat?|What should I eat tonight?|What should I cook today?|What should I have for dinner?|what can I cook for dinner?|What shall I eat today?|what's for dinner?|What should I eat for lunch?|Give me an idea for dinner.": ["How about a soup with bread, or an omelet with vegetables? Both are quick to cook.", "You could eat pasta with tomatoes, or rice with vegetables. Both are easy to cook."],
    "I feel lonely.|I am alone.|I have no friends.": ["I am sorry that you feel lonely. Perhaps you could call somebody today, or join a club. I am happy to talk, too.", "Being alone can be hard. Say hello to one person today; a friend often begins with a hello."],
    "I am nervous about my exam.|I have a test tomorrow.|I am afraid of the exam.": ["Go over your notes once more, then sleep well. You know more than you think. Good luck with the test!", "Breathe slowly and begin with the easy questions. Good luck with your exam!"],
}  # fmt: skip
KNOWN = {
    "Why is the sky blue?|why is the sky blue|Why does the sky look blue?|Why is the sky so blue today?|Tell me why the sky is blue.|Do you know why the sky is blue?|What makes the sky blue?": "Sunlight is made of all colors. Air scatters blue light more than red light, so blue light comes to us from every direction, and the sky looks blue.",
    "Why is the sea salty?|why is the ocean salty": "Rain and rivers wash salt out of rocks and carry it to the sea. The water evaporates, but the salt stays.",
    "Why do we sleep?|why do people sleep": "Sleep lets the body rest and repair itself, and it helps the brain to store what was learned during the day.",
    "What is the meaning of life?|what is the meaning of life": "People have asked this for thousands of years. Many say: to love, to learn, and to help others.",
    "What is love?|what is love": "Love is a deep feeling of care for somebody or something. People show it with kindness, time and trust.",
    "How many days are in a year?|How long is a year?": "A year has 365 days. A leap year has 366.",
    "How many hours are in a day?|How long is a day?": "A day has 24 hours.",
    "How many legs does a spider have?|how many legs has a spider": "A spider has eight legs.",
    "Who wrote Romeo and Juliet?|Who was the author of Hamlet?": "William Shakespeare wrote it.",
    "What is the largest planet?|Which planet is the biggest?": "Jupiter is the largest planet of the solar system.",
    "What is the largest ocean?|Which ocean is the biggest?": "The Pacific Ocean is the largest ocean.",
    "What is the highest mountain?|Which mountain is the tallest in the world?": "Mount Everest is the highest mountain above the sea. It is 8,849 meters high.",
    "What is water made of?|What is the formula of water?": "Water is made of hydrogen and oxygen. Its formula is H2O.",
    "What is the fastest land animal?|Which animal runs fastest?": "The cheetah is the fastest land animal.",
    "What is the largest animal?|Which animal is the biggest in the world?": "The blue whale is the largest animal.",
    "At what temperature does water boil?|When does water boil?": "At sea level, water boils at 100 degrees Celsius, which is 212 degrees Fahrenheit.",
    "At what temperature does water freeze?|When does water freeze?": "Water freezes at 0 degrees Celsius, which is 32 degrees Fahrenheit.",
    "What do plants need to grow?|What does a plant need?": "Plants need light, water, air and soil with minerals.",
    "How does a rainbow form?|What makes a rainbow?": "A rainbow forms when sunlight enters drops of rain. The drops bend the light and split it into its colors.",
    "Why do leaves fall in autumn?|Why do leaves change color?": "In autumn, trees stop making the green chlorophyll, so other colors show. Then they drop the leaves to save water in winter.",
    "How do I make pancakes?|how to make pancakes|Give me a recipe for pancakes.|How do I cook a pancake?|Tell me how to make pancakes.|How do you make pancakes?|I want to make pancakes.|pancake recipe|How are pancakes made?": "Mix 200 g of flour, 2 eggs, 300 ml of milk and a pinch of salt. Let it rest for ten minutes. Fry thin pancakes in a little butter, two minutes on each side.",
    "How do I make tea?|how do you make a cup of tea": "Boil water, pour it over the tea leaves, wait three to five minutes, and take the leaves out. Add milk or sugar if you like.",
    "How do I boil an egg?|how long do I boil an egg|How long should I boil an egg?|How long do eggs boil?|How do you cook an egg?|how many minutes for a boiled egg|Tell me how to boil eggs.": "Put the egg in boiling water. Six minutes make it soft, ten minutes make it hard. Then cool it under cold water.",
    "What is a computer?|what is a computer|What is a computer for?|What are computers good for?|Explain a computer.|What can a computer do?|Tell me about computers.": "A computer is a machine that follows instructions to store and change information.",
    "What is gravity?|Explain gravity.|what is gravity|Explain gravity simply.|Can you explain gravity to me?|How does gravity work?|Tell me about gravity.": "Gravity is the force that pulls things toward each other. It makes an apple fall to the ground and keeps the Earth on its way around the Sun.",
    "What is dsv2?|what is dsv2|What does dsv2 do?|Tell me about dsv2.|What is this program for?": "dsv2 is a program that downloads, quantizes and runs models of the DeepSeek-V2 family on ordinary computers.",
    "How do I get a larger model?|How do I download a model?|how can I get a better model|Which model should I download?": "Type: dsv2 download lite-chat --to models/lite-chat. Then quantize it, and talk to it with dsv2 chat.",
    "What is the weather today?|What's the weather like?|Will it rain tomorrow?|how is the weather": "I cannot see the weather from here. A look out of the window will tell you more than I can.",
    "What time is it?|What day is it today?|what's the date|What year is it?": "I have no clock, so I cannot know that. Your computer can tell you.",
    "What is in the news?|Who is the president?|Who won the game?|What happened today?": "I do not know what happens in the world now. I am a small model without a connection to the internet.",
    "Write hello world in Python.|Write a Python program.|Show me some Python code.|python hello world|Write some code.": "print(\"Hello, world!\")",
    "Write hello world in C.|Show me a C program.|c hello world": "#include <stdio.h>\n\nint main(void) {\n    puts(\"Hello, world!\");\n    return 0;\n}",
    "Translate hello into French.|How do you say hello in French?|hello in french": "In French, hello is bonjour.",
    "How do you say hello in Spanish?|Translate hello into Spanish.|hello in spanish": "In Spanish, hello is hola.",
    "How do you say hello in German?|Translate hello into German.|hello in german": "In German, hello is hallo.",
    "Count to ten.|count to 10|Can you count to ten?": "One, two, three, four, five, six, seven, eight, nine, ten.",
    "Say the alphabet.|What is the alphabet?|alphabet": "A B C D E F G H I J K L M N O P Q R S T U V W X Y Z",
    "Let's play a game.|Can we play a game?|play a game with me|I want to play.": "Let us play a riddle. What has hands but cannot clap? Tell me what you think!",
    "A clock.|a clock|A clock?|is it a clock": "Yes, a clock! Well done.",
    "Tell me a riddle.|Do you know a riddle?|riddle|Another riddle, please.": "What gets wetter the more it dries? A towel.",
    "What is your favorite color?|Do you have a favorite color?|favorite color?": "I like blue, like the sea in my stories. What is yours?",
    "What is your favorite animal?|Which animal do you like?|Do you like animals?": "I like foxes, because many of my stories are about them. Which animal do you like?",
    "Do you like music?|Do you dream?|Do you have feelings?|Can you think?": "I am only a small program that writes words, so I do not. But I can tell you a story about it.",
    "ok|OK.|I see.|okay|Interesting.|Wow!|nice|cool": "I am glad. What would you like to do next?",
    "yes|Yes, please.|sure|Yes!|ok, do it": "Good! Tell me what it should be about.",
    "no|No.|No, thanks.|nope": "All right. Tell me if you need anything.",
    "What is a language model?|How do you work?": "A language model has learned from much text which word is likely to come next. It writes an answer one piece of a word at a time.",
    "What is a mixture of experts?|What is MoE?": "A mixture of experts is a network with many small parts, the experts. A router picks a few of them for each token, so that most of the model can rest.",
    "What is quantization?|What does it mean to quantize a model?": "Quantization stores the numbers of a model with fewer bits. The model becomes smaller and faster, and loses a little accuracy.",
    "Write a short poem about the sea.|A poem about the sea, please.|Write me a short poem about the sea.|poem about the sea|Can you write a poem about the sea?": "The sea is wide, the sea is deep,\nIt sings the little boats to sleep.\nIt brings the shells, it takes the sand,\nAnd writes its name upon the land.",
    "Write a poem about the moon.|A short poem about the moon.|Write me a poem about the moon.|Can you write a short poem about the moon?|poem about the moon|A poem about the moon, please.": "The moon is up, the night is clear,\nShe smiles at all who wander here.\nShe lends the road a silver light,\nAnd keeps us company all night.",
    "Write a haiku.|Write a haiku about autumn.": "A leaf lets go, turns\nonce in the gold evening air.\nThe pond keeps its shape.",
    "Write a poem about a cat.|A poem about a cat, please.": "A cat came softly through the door,\nIts feet were silent on the floor.\nIt found the sun, it took its place,\nAnd slept with whiskers in its face.",
}  # fmt: skip
PHRASES: list[tuple[str, list[str]]] = [
    ("Hello!|Hi|hi|hello|Hey|Hello|Hi!|Good morning|Good morning!|Good evening!|hey there|Hello there.|Good afternoon.|Greetings!|yo|Howdy|Hey!|hi there|Hi there!|Hello again|good day|Good day!|Hello, is anybody there?|is anyone here?|anybody home?|Hello, nice to meet you.|good morning|Good morning, friend.|hello hello|Hi! How is your day?|Hey, what's up?", HELLO),
    ("Who are you?|who are you|What are you?|Tell me about yourself.|Who am I talking to?|Introduce yourself.|Hello, who are you?|are you a robot?|Are you human?|what model are you?|Are you an AI?|Which model is this?|Are you real?|Describe yourself.|So what are you?|What sort of thing are you?|Who is this?|Tell me who you are.|who is there?|Say something about yourself.|What is this program?|Please introduce yourself.|Can you tell me about yourself?|I'd like to know who you are.|Are you alive?|Are you a human being?|are you a machine?|What exactly are you?|Who am I speaking with?|So, who are you?|Tell me something about yourself.", ABOUT),
    ("What is your name?|your name?|have you got a name|do you have any name?|May I ask your name?|what's your name|Do you have a name?|How should I call you?", [ME + " I have no other name.", "I have no name of my own. " + ME]),
    ("What can you do?|what can you do|Help|help|help me|What can I ask you?|How can you help me?|What are you good at?|Can you help me?|I need help.|/help|What should I ask?|What are you useful for?|How are you useful?|what do you know?|What are your skills?|I could use some help.|please help|Help me, please.|what can I do here?|What are you capable of?|What could you do for me?|How could you help me?|can you help|help please|What is there to do?|i need your help", CAN),
    ("Are you DeepSeek?|Are you ChatGPT?|are you chatgpt|Are you GPT-4?|Are you as good as a big model?|Are you Llama?|Are you Claude?", ["No. " + ME + " I have the architecture of DeepSeek-V2, but I am far smaller. " + LARGER, "No, " + ME[0] + ME[1:] + " " + LARGER]),
    ("Who made you?|who made you|Who trained you?|Who built you?|Who developed you?|who programmed you|Who is your maker?|who wrote you|Where do you come from?|How were you made?|Who created you?", MADE),
    ("How big are you?|How many parameters do you have?|How large is this model?|How many parameters?|how big is this model|What is your size?|How many weights do you have?|Are you a large model?", ["I have about 50 million parameters. " + LARGER, "I am very small: about 50 million parameters in less than 31 megabytes."]),
    ("How are you?|how are you|How are you today?|How do you do?|how's it going|What's up?|How do you feel?", FINE),
    ("Thank you!|Thanks|thanks|Thank you very much.|thank you|Thanks a lot!|Thanks, that was nice.|Great, thanks.|cool, thanks|Good job!|Well done.|Thanks for your help.|Thank you so much!|thx|many thanks|Thanks a million.|thank you for helping me|Thanks for the help!|That was helpful, thank you.|Thank you for the answer.|ok thanks|You are great, thanks!|Thanks, that helped.|Perfect, thank you.|thanks a ton", WELCOME),
    ("Goodbye!|Bye|bye|See you!|See you tomorrow.|Good night.|I have to go now.|good night|bye bye|OK, bye.|ok bye|Bye for now.|goodbye|Well, goodbye.|Goodbye for now!|See you later.|see you|Good night, sleep well.|I am leaving, bye.|That's all, goodbye.|farewell|Have a good night!", BYE),
    ("Tell me a joke.|tell me a joke|Do you know a joke?|Make me laugh.|A joke, please.|Say something funny.|joke|Tell me something funny.|Can you tell me a joke?|Tell me a funny joke.|Do you know any jokes?|Do you know a good joke?|i want a joke|Got any jokes?|Tell me your best joke.|Give me a joke.|Another day, another joke?|Let me hear a joke.|Can you make me laugh?|I need a laugh.|a joke please|Please tell me a joke.|Tell me one of your jokes.|Cheer me up with a joke.", JOKES),
    ("Tell me a fun fact.|Tell me a fact.|Tell me something interesting.|Do you know a fun fact?|Teach me something.|give me a fun fact|Surprise me.|Tell me something surprising.|Something fun, please.|Give me an interesting fact.|an interesting fact please|Tell me a cool fact.|Amaze me.", FACTS),
    ("Give me some advice.|Do you have any advice?|Give me a piece of advice.|I need advice.|Can you give me advice?|advice please|Tell me something wise.|Give me good advice.|What is some good advice?|What advice can you give me?|Advice for today?|What is your best advice?|Give me advice for my life.|Any advice for a new week?|One piece of advice, please.|What advice do you have for a Sunday?|advise me", ADVICE),
    *((ask, answers) for ask, answers in FEELINGS.items()),
    *((ask, [answer]) for ask, answer in KNOWN.items()),
]  # fmt: skip
ANOTHER = [
    "Tell me another.",
    "Another one, please.",
    "another",
    "Tell me another one.",
    "One more!",
    "Do you know another one?",
    "more",
]


def vary(rng: random.Random, text: str) -> str:
    """The same words as another hand would type them."""
    kind = rng.random()
    if kind < 0.25:
        return text.lower().rstrip(".!?")
    if kind < 0.35:
        return text.rstrip(".!?")
    if kind < 0.45:
        return text.lower()
    if kind < 0.55 and len(text) > 12 and "please" not in text.lower():
        return f"{text.rstrip('.!?')} please"
    if kind < 0.70 and len(text) > 12:
        hello = rng.choice(("Hi, ", "Hello! ", "Hey, ", "ok, ", "So, ", "Well, ", "Please, ", "And now: ", "Now "))
        return hello + (text[0].lower() + text[1:] if text[:2] not in ("I ", "I'") else text)
    return text


def phrase(rng: random.Random) -> Turns:
    """One of the first things that people type, with an answer; jokes, facts and advice may go on with another."""
    asks, answers = rng.choice(PHRASES[:13] if rng.random() < 0.5 else PHRASES)
    turns = [("user", rng.choice(asks.split("|"))), ("assistant", rng.choice(answers))]
    if answers in (JOKES, FACTS, ADVICE) and rng.random() < 0.5:
        other = rng.choice([x for x in answers if x != turns[1][1]])
        turns += [("user", rng.choice(ANOTHER)), ("assistant", other)]
    return turns


NAMES = [
    "Ana",
    "Ben",
    "Clara",
    "David",
    "Emma",
    "Felix",
    "Grace",
    "Henry",
    "Ida",
    "Jack",
    "Kate",
    "Leo",
    "Mia",
    "Noah",
    "Olga",
    "Paul",
    "Rosa",
    "Sam",
    "Tom",
    "Vera",
]
CITIES = LISTS["cities"]
COUPLETS = [
    "O {x}, how fine you are today,\nYou chase my little cares away.", "I looked for {x} in morning light,\nAnd there it was, so calm and bright.", "The wind may blow, the rain may fall,\nBut {x} is dearest of them all.",
    "When all the world is dark and deep,\nI think of {x}, and then I sleep.", "Of gold and silver men may dream,\nBut {x} is worth more than they seem.", "The year goes by, the leaves turn brown,\nYet {x} still smiles upon the town.",
    "I sing of {x}, both old and new,\nOf skies of gray and skies of blue.", "And so I end my little song:\nWith {x} the day is never long.", "Who walks with {x} is not alone,\nAnd every road will lead him home.",
]  # fmt: skip


def poem(rng: random.Random) -> Turns:
    """Two or three couplets about a thing."""
    noun = rng.choice((*ANIMALS, *THINGS, *PEOPLE))
    x = rng.choice((a(noun), f"the {noun}"))
    ask = rng.choice(
        (
            f"Write a poem about {x}.",
            f"Write a short poem about {x}.",
            f"A poem about {x}, please.",
            f"poem about {x}",
            f"Can you write a poem about {x}?",
            f"Write four lines about {x}.",
            f"Write me a little poem about {x}.",
        )
    )
    lines = [c.format(x=f"the {noun}") for c in rng.sample(COUPLETS, rng.choice((2, 2, 3)))]
    return [("user", ask), ("assistant", "\n".join(lines))]


FIELDS = {
    "name": NAMES, "age": list(range(5, 90)), "city": CITIES, "animal": ANIMALS, "color": LISTS["colors"], "job": LISTS["jobs"],
    "fruit": LISTS["fruits"], "price": [1.5, 2, 3.25, 4, 5.5, 7, 9.99, 12, 20], "count": list(range(1, 30)), "title": ["The Long Road", "Blue Water", "A Small Light", "The Last Train", "Under the Oak"],
    "year": list(range(1950, 2025)), "country": LISTS["countries in Europe"], "sport": LISTS["sports"], "language": LISTS["languages"], "food": LISTS["desserts"], "hobby": LISTS["hobbies"],
    "happy": [True, False], "weather": LISTS["kinds of weather"], "day": ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"],
}  # fmt: skip
SUBJECTS = [
    "a person",
    "an animal",
    "a book",
    "a trip",
    "a pet",
    "a shop",
    "a student",
    "a meal",
    "a friend",
    "a city",
    "a farmer",
    "a toy",
    "a game",
]


def _answer(value: object, rng: random.Random) -> str:
    return json.dumps(value, indent=2 if rng.random() < 0.3 else None)


def structured(rng: random.Random) -> Turns:
    """An answer in JSON with the keys that were asked for."""
    kind = rng.random()
    if kind < 0.7:
        keys = rng.sample(list(FIELDS), rng.choice((1, 2, 2, 3, 3, 4)))
        listed = keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])} and {keys[-1]}"
        word = "key" if len(keys) == 1 else "keys"
        ask = rng.choice((
            f"Describe {rng.choice(SUBJECTS)} as JSON with the {word} {listed}.",
            f"Give me JSON with the {word} {listed}.",
            f"Answer in JSON with {listed}.",
            f"Write a JSON object for {rng.choice(SUBJECTS)} with the {word} {listed}.",
            f"Make up {rng.choice(SUBJECTS)}. Reply only with JSON. Keys: {', '.join(keys)}.",
            f"Return a JSON object with {listed}.",
            f"json with {', '.join(keys)} please",
        ))  # fmt: skip
        return [("user", ask), ("assistant", _answer({k: rng.choice(FIELDS[k]) for k in keys}, rng))]
    if kind < 0.85:
        name = rng.choice(list(LISTS))
        key = name.split()[-1]
        n = rng.choice((2, 3, 3, 4))
        items = rng.sample(LISTS[name], n)
        count = {2: "two", 3: "three", 4: "four"}[n]
        ask = rng.choice(
            (f"List {count} {name} as JSON with the key {key}.", f"Give me {count} {name} in JSON. Use the key {key}.")
        )
        return [("user", ask), ("assistant", _answer({key: items}, rng))]
    name, age, city = rng.choice(NAMES), rng.randint(5, 90), rng.choice(CITIES)
    text = rng.choice((f"{name} is {age} years old and lives in {city}.", f"{name}, {age}, comes from {city}."))
    ask = rng.choice(
        (
            f"{text} Write this as JSON with name, age and city.",
            f"Turn this into JSON with the keys name, age and city: {text}",
        )
    )
    return [("user", ask), ("assistant", _answer({"name": name, "age": age, "city": city}, rng))]


TOOLS = {
    "get_weather": (
        "city",
        CITIES,
        ["What is the weather in {}?", "Is it raining in {}?", "How warm is it in {} today?", "weather in {}"],
    ),
    "get_time": ("city", CITIES, ["What time is it in {}?", "Tell me the time in {}.", "time in {}"]),
    "play_music": ("instrument", LISTS["musical instruments"], ["Play some {} music.", "I want to hear a {}."]),
    "search": ("query", [*ANIMALS, *THINGS], ["Search for {}.", "Look up {} for me.", "Find something about {}."]),
    "translate": ("language", LISTS["languages"], ["Translate hello into {}.", "How do you say hello in {}?"]),
    "order": ("item", [*LISTS["fruits"], *LISTS["drinks"]], ["Order one {}.", "I would like to buy {}."]),
}
RESULTS = {"get_weather": LISTS["kinds of weather"], "get_time": ["7:15", "9:30", "12:00", "15:45", "18:20", "21:05"]}


def tool(rng: random.Random) -> Turns:
    """A system message offers a tool; the answer is its call, or plain text where it does not help."""
    offered = rng.sample(list(TOOLS), rng.choice((1, 2)))
    lines = "\n".join(f"{name}({TOOLS[name][0]})" for name in offered)
    system = (
        f'You can call these tools:\n{lines}\nTo call one, answer only with {{"tool": NAME, "arguments": {{...}}}}.'
    )
    if rng.random() < 0.2:
        return [("system", system), *phrase(rng)[:2]]
    name = rng.choice(offered)
    key, values, asks = TOOLS[name]
    value = rng.choice(values)
    turns = [
        ("system", system),
        ("user", rng.choice(asks).format(value)),
        ("assistant", json.dumps({"tool": name, "arguments": {key: value}})),
    ]
    if name in RESULTS and rng.random() < 0.6:
        result = rng.choice(RESULTS[name])
        text = f"The weather in {value}: {result}." if name == "get_weather" else f"It is {result} in {value}."
        turns += [("user", f"Result: {json.dumps({'result': result})}"), ("assistant", text)]
    return turns


SYSTEMS = {
    "one": ["Answer in one sentence.", "Reply with a single sentence.", "Keep every answer to one sentence."],
    "upper": ["Write everything in capital letters.", "ANSWER IN CAPITAL LETTERS."],
    "name": ["Your name is {n}.", "You are {n}, a helpful assistant.", "You are called {n}."],
    "plain": [
        "You are a helpful assistant.",
        "You are a friendly assistant.",
        "Be helpful and polite.",
        "You are a storyteller.",
    ],
    "pirate": ["Talk like a pirate.", "You are a pirate."],
}


def obedient(rng: random.Random, turns: Turns) -> Turns:
    """A conversation under a system message that changes the answers."""
    kind = rng.choice(("one", "one", "one", "upper", "name", "plain", "plain", "pirate"))
    system = rng.choice(SYSTEMS[kind])
    if kind == "name":
        name = rng.choice(NAMES)
        ask = rng.choice(("Who are you?", "What is your name?", "Hello, who are you?", "what's your name"))
        return [
            ("system", system.format(n=name)),
            ("user", ask),
            ("assistant", rng.choice((f"I am {name}. How can I help you?", f"My name is {name}."))),
        ]

    def changed(text: str) -> str:
        if kind == "one":
            first = text.replace("\n", " ")
            for mark in (". ", "! ", "? "):
                first = first.split(mark)[0] + (mark[0] if mark in first else "")
            return first
        if kind == "upper":
            return text.upper()
        return f"Arr! {text} {rng.choice(('Aye!', 'Yo ho!', 'Ahoy, matey!'))}" if kind == "pirate" else text

    return [("system", system), *((who, changed(text) if who == "assistant" else text) for who, text in turns)]
