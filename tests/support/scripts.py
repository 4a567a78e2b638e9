"""Texts in many scripts, with what tokenizers cut differently: case, marks, digits, signs, spaces, code, long runs."""

from __future__ import annotations

import random

TEXTS = {
    "latin": "A quick fox's tail, it's NASA's HTTPServer getHTTPResponse can't WON'T I'LL naïve Übergröße ÀBC 'ſ",
    "cyrillic": "Съешь же ещё этих мягких французских булок, да выпей ЧАЮ. ПРИветМир МГУ-шный",
    "greek": "Ξεσκεπάζω τὴν ψυχοφθόρα βδελυγμία ΑΒΓδε",
    "arabic": "نص حكيم له سر قاطع وذو شأن عظيم، اللُّغَةُ الْعَرَبِيَّةُ",
    "hebrew": "דג סקרן שט בים מאוכזב ולפתע מצא לו חברה שָׁלוֹם",
    "hindi": "ऋषियों को सताने वाले दुष्ट राक्षसों के राजा रावण का सर्वनाश नमस्ते",
    "thai": "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า กว่าบรรดาฝูงสัตว์เดรัจฉาน",
    "han": "天地玄黃宇宙洪荒，日月盈昃。中文abc混合English文字，測試！我想在apple工作1314151天 々〇⺀",
    "kana": "いろはにほへとちりぬるを ワカヨタレソツネナラム 東京タワーへ行きますー",
    "hangul": "키스의 고유조건은 입술끼리 만나야 하고 특별한 기술은 필요치 않다. ㄱㄴㄷ ㅋㅋㅋ",
    "tamil": "யாமறிந்த மொழிகளிலே தமிழ்மொழி போல் இனிதாவது எங்கும் காணோம்",
    "emoji": "🙂👨‍👩‍👧‍👦🏳️‍🌈 ok 👍🏽!! ❤️‍🔥",
    "digits": "0 12 123 1234 12345 3.14159 1,000,000 ½ ² ٣٤٥ १२३ Ⅷ",
    "code": "def f(x):\n    return x**2  # ok\n\n\n\tif (a&&b) { x->y; }\r\n\r\n//c++\nURL=https://a.b/c?d=e&f=g/\n",
    "spaces": "a  b   c    d\t\te\n \n  \n\n   x \u3000 y\u00a0z \x1c\x85\u2028  ",
    "signs": "!!! ?!... --- === ((())) [[]] \"q\" 'q' ‘q’ “q” …！？、。 $100 €5 #tag @me /// \n/x\n\n/ ",
    "long": "a" * 900 + " " + "漢" * 400 + " " * 300 + "-" * 200 + " " + "1" * 400 + " " + "न" * 300,
}


def mixed(n: int, seed: int = 0) -> list[str]:
    """The texts, n strings of characters from all of them, and n of two pieces."""
    rng = random.Random(seed)
    pool = "".join(text for name, text in TEXTS.items() if name != "long")
    found = list(TEXTS.values())
    for _ in range(n):
        found.append("".join(rng.choice(pool) for _ in range(rng.randrange(1, 40))))
        at, to = rng.randrange(len(pool)), rng.randrange(len(pool))
        found.append(pool[at : at + rng.randrange(30)] + pool[to : to + rng.randrange(30)])
    return found
