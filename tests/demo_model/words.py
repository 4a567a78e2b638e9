"""Word lists, written for this project (CC0): what stories are about, what lists of five may hold."""


def split(text: str) -> tuple[str, ...]:
    return tuple(" ".join(word.split()) for word in text.split(","))


ANIMALS = split(
    "dog, cat, horse, bird, fox, wolf, bear, lion, mouse, rabbit, fish, snake, duck, goose, hen, frog, bee, spider, cow, sheep, "
    "goat, pig, donkey, elephant, monkey, tiger, whale, owl, turtle, penguin, dolphin, squirrel, hedgehog, crow, butterfly, octopus, "
    "giraffe, kangaroo, camel, seal, crab, ant, snail, deer, otter, parrot, swan, bat, puppy, kitten, dragon, unicorn, raven, beaver"
)
PEOPLE = split(
    "princess, prince, king, queen, knight, soldier, sailor, captain, pirate, doctor, teacher, farmer, miller, baker, tailor, shepherd, "
    "thief, detective, giant, wizard, ghost, boy, girl, grandmother, grandfather, astronaut, painter, musician, inventor, fisherman, "
    "librarian, cook, nurse, scientist, gardener, clockmaker, dancer, explorer, fairy, witch, mermaid, student, child, carpenter, "
    "postman, woman, man"
)
THINGS = split(
    "ship, boat, castle, lamp, robot, clock, train, kite, bicycle, balloon, bell, lighthouse, candle, umbrella, snowman, rocket, "
    "piano, tree, cloud, star, river, mountain, moon, book, car, teapot, mirror, bridge, windmill, toy, key, lantern, computer, house, "
    "violin, island, flower, pumpkin, stone, hat"
)
ADJECTIVES = split(
    "happy, sad, brave, lonely, curious, kind, lazy, clever, shy, proud, grumpy, tiny, lost, hungry, sleepy, forgetful, magical, funny, "
    "quiet, wise, stubborn, generous, honest, young, old, little, big, small, friendly, poor"
)
PLACES = split(
    "a quiet village, a small town by the sea, a green valley, a house under a high mountain, a busy harbor, an old castle, "
    "a little farm, a wide meadow, a sunny island, a house by the river, a big city, a snowy land, a garden full of flowers"
)
FINDS = split(
    "a golden key, an old map, a silver bell, a small blue stone, a letter in a bottle, a wooden box, a red scarf, a broken lantern, "
    "a tiny seed, a strange egg, a silver coin, a music box, a brass compass, a red balloon"
)
FRIENDS = split(
    "an old owl, a small mouse, a gray cat, a young rabbit, a friendly dog, a tired donkey, a little girl, a kind old woman, a fisherman, "
    "a wise turtle, a blue bird, a boy with a lamp, a hedgehog, a baker, a shy deer, a cheerful frog"
)
LISTS: dict[str, tuple[str, ...]] = {
    "fruits": split(
        "apple, banana, orange, pear, grape, cherry, peach, plum, mango, lemon, strawberry, kiwi, melon, pineapple"
    ),
    "vegetables": split(
        "carrot, potato, onion, tomato, cabbage, spinach, broccoli, cucumber, pea, bean, beet, celery, pumpkin"
    ),
    "animals": split(
        "dog, cat, horse, cow, sheep, elephant, lion, tiger, bear, rabbit, fox, wolf, monkey, giraffe, zebra"
    ),
    "farm animals": split("cow, sheep, pig, horse, goat, hen, duck, goose, donkey, turkey"),
    "wild animals": split("lion, tiger, bear, wolf, fox, elephant, giraffe, zebra, deer, monkey, leopard"),
    "sea animals": split("whale, dolphin, shark, octopus, crab, seal, jellyfish, turtle, lobster, starfish, squid"),
    "birds": split("eagle, owl, sparrow, robin, crow, parrot, swan, duck, penguin, pigeon, gull, stork, hawk"),
    "insects": split(
        "ant, bee, butterfly, beetle, fly, mosquito, wasp, moth, grasshopper, dragonfly, ladybug, cricket"
    ),
    "pets": split("dog, cat, rabbit, hamster, goldfish, parrot, turtle, guinea pig, canary, mouse"),
    "colors": split("red, blue, green, yellow, orange, purple, pink, brown, black, white, gray"),
    "planets": split("Mercury, Venus, Earth, Mars, Jupiter, Saturn, Uranus, Neptune"),
    "musical instruments": split(
        "piano, guitar, violin, drum, flute, trumpet, cello, harp, clarinet, saxophone, trombone"
    ),
    "sports": split(
        "soccer, tennis, basketball, swimming, running, baseball, cycling, hockey, golf, volleyball, rugby, skiing"
    ),
    "flowers": split("rose, tulip, daisy, lily, sunflower, violet, daffodil, orchid, poppy, iris, carnation"),
    "trees": split("oak, pine, birch, maple, willow, beech, ash, elm, cedar, fir, apple tree, chestnut"),
    "rivers": split("Nile, Amazon, Danube, Rhine, Thames, Mississippi, Ganges, Volga, Seine, Yangtze"),
    "oceans": split("Atlantic Ocean, Pacific Ocean, Indian Ocean, Arctic Ocean, Southern Ocean"),
    "continents": split("Africa, Asia, Europe, North America, South America, Australia, Antarctica"),
    "mountains": split(
        "Mount Everest, Kilimanjaro, Mont Blanc, Matterhorn, Mount Fuji, Denali, K2, Mount Etna, Aconcagua"
    ),
    "cities": split("London, Paris, Rome, Berlin, Madrid, Tokyo, New York, Cairo, Moscow, Sydney, Vienna, Lisbon"),
    "languages": split(
        "English, French, Spanish, German, Italian, Chinese, Japanese, Arabic, Russian, Portuguese, Hindi, Greek"
    ),
    "countries in Europe": split(
        "France, Germany, Italy, Spain, Portugal, Poland, Greece, Norway, Sweden, Austria, Belgium, Ireland"
    ),
    "countries in Africa": split(
        "Egypt, Kenya, Nigeria, Morocco, Ghana, Ethiopia, Tunisia, Senegal, Uganda, Tanzania, Algeria"
    ),
    "countries in Asia": split(
        "China, Japan, India, Thailand, Vietnam, Nepal, Indonesia, Malaysia, Mongolia, Philippines"
    ),
    "jobs": split(
        "teacher, doctor, nurse, farmer, baker, carpenter, engineer, pilot, cook, painter, lawyer, plumber, driver"
    ),
    "school subjects": split(
        "mathematics, history, geography, biology, physics, chemistry, music, art, English, sports"
    ),
    "hobbies": split(
        "reading, painting, gardening, cooking, fishing, hiking, knitting, dancing, singing, photography, chess"
    ),
    "tools": split("hammer, saw, screwdriver, drill, wrench, pliers, axe, shovel, knife, ruler, chisel"),
    "pieces of furniture": split("table, chair, bed, sofa, desk, shelf, wardrobe, stool, bench, cupboard, armchair"),
    "clothes": split("shirt, coat, hat, scarf, dress, skirt, sock, glove, jacket, sweater, trousers, belt"),
    "drinks": split("water, tea, coffee, milk, orange juice, apple juice, lemonade, hot chocolate, cola, soda"),
    "desserts": split(
        "ice cream, apple pie, chocolate cake, pudding, cookies, cheesecake, pancakes, fruit salad, brownies"
    ),
    "breakfast foods": split("toast, eggs, porridge, pancakes, cereal, yogurt, fruit, bread with jam, cheese, bacon"),
    "kinds of weather": split("sunshine, rain, snow, wind, fog, storm, hail, thunder, clouds, frost"),
    "seasons and months": split("spring, summer, autumn, winter, January, March, May, July, October, December"),
    "parts of the body": split("head, hand, foot, arm, leg, eye, ear, nose, mouth, knee, finger, shoulder"),
    "vehicles": split("car, bus, train, bicycle, ship, airplane, truck, motorcycle, boat, tram, helicopter"),
    "metals": split("iron, gold, silver, copper, lead, tin, zinc, aluminum, nickel, platinum"),
    "shapes": split("circle, square, triangle, rectangle, oval, star, diamond, pentagon, hexagon"),
    "spices": split("pepper, cinnamon, ginger, paprika, nutmeg, turmeric, cumin, vanilla, cloves, saffron"),
    "board games": split(
        "chess, checkers, go, backgammon, dominoes, ludo, snakes and ladders, memory, nine men's morris"
    ),
    "programming languages": split("Python, C, Java, Rust, Go, JavaScript, Ruby, Haskell, Swift, Lisp, Fortran"),
    "emotions": split("joy, sadness, anger, fear, surprise, love, pride, hope, shame, disgust, curiosity"),
    "things in a kitchen": split("pot, pan, knife, fork, spoon, plate, cup, oven, kettle, bowl, fridge"),
    "reptiles": split("snake, lizard, turtle, crocodile, alligator, gecko, chameleon, iguana, tortoise"),
    "kinds of bread": split(
        "rye bread, baguette, white bread, pita, sourdough, cornbread, ciabatta, naan, whole wheat bread"
    ),
}


def a(noun: str) -> str:
    """The noun with its indefinite article."""
    return ("an " if noun[0] in "aeiou" and not noun.startswith(("unicorn", "one")) else "a ") + noun
