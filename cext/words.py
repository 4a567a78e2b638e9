"""words.py: vocabularies whose splitting rules llama.cpp only approximates, read by the rules themselves.

Its expressions for rules that go by the case of letters know A to Z alone, and no marks: a Hindi, Thai or vocalised
Arabic word falls into pieces that the model never saw. Texts of ASCII are split alike, and stay llama.cpp's; the others
are split and merged here.
"""

from __future__ import annotations

import heapq
import itertools
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, lru_cache

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
UPPER, LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"


def by_case(ending: str, numbers: str) -> str:
    """OpenAI's o200k rule, as published: a word has its capitals in front. ending: what may follow one."""
    word = rf"[^\r\n\p{{L}}\p{{N}}]?[{UPPER}]*[{LOWER}]+{ending}|[^\r\n\p{{L}}\p{{N}}]?[{UPPER}]+[{LOWER}]*{ending}"
    return rf"{word}|{numbers}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def kimi() -> str:
    """Kimi's and Moonlight's, as their tokenizer's code has it: o200k's words without Han, whose runs are words."""
    upper, lower = rf"[{UPPER}&&[^\p{{Han}}]]", rf"[{LOWER}&&[^\p{{Han}}]]"
    word = (
        rf"[^\r\n\p{{L}}\p{{N}}]?{upper}*{lower}+{CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?{upper}+{lower}*{CONTRACTIONS}?"
    )
    return rf"[\p{{Han}}]+|{word}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


# GGUF's name of the rules (tokenizer.ggml.pre) -> the rule.
RULES: Mapping[str, str] = {
    "tekken": by_case("", r"\p{N}"),
    "kanana2": by_case(f"{CONTRACTIONS}?", r"\p{N}{1,3}"),
    "gpt-4o": by_case(f"{CONTRACTIONS}?", r"\p{N}{1,3}"),
    "youtu": by_case(f"{CONTRACTIONS}?", r"\p{N}"),
    "kimi-k2": kimi(),
}
# What is cut out of a text before that.
FIRST: Mapping[str, str] = {
    "youtu": "[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|[一-龥\u3040-ゟ゠-ヿ]+",
}
WHOLE = ("tekken", "youtu", "kimi-k2")  # here a word that is a token is one, whatever its merges would make of it
# White space as Unicode has it; Python's \s holds four separators of ASCII more.
_SPACE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
# The script Han, which Python does not tell: from, to.
HAN = (
    (0x2E80, 0x2E99), (0x2E9B, 0x2EF3), (0x2F00, 0x2FD5), (0x3005, 0x3005), (0x3007, 0x3007), (0x3021, 0x3029),
    (0x3038, 0x303B), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFA6D), (0xFA70, 0xFAD9), (0x16FE2, 0x16FE3),
    (0x16FF0, 0x16FF1), (0x20000, 0x2A6DF), (0x2A700, 0x2EE5D), (0x2F800, 0x2FA1D), (0x30000, 0x323AF),
)  # fmt: skip
N_CACHED = 1 << 15  # words


class Words:
    """One vocabulary's rule and merges.

    pre: a name of RULES. ids: of ordinary tokens, by spelling. merges: "left right", the earlier the sooner. defined:
    tokens that are cut out of a text before it is split.
    """

    def __init__(
        self, pre: str, ids: Mapping[str, int], merges: Sequence[str], defined: Mapping[str, int] | None = None
    ) -> None:
        self._rule = _compiled(RULES[pre])
        self._first = re.compile(f"({FIRST[pre]})") if pre in FIRST else None
        self._ids = ids
        self._defined = {text: id_ for text, id_ in (defined or {}).items() if text}
        spellings = sorted(self._defined, key=len, reverse=True)
        self._apart = re.compile(f"({'|'.join(map(re.escape, spellings))})") if spellings else None
        self._ranks = {merge: i for i, merge in reversed(list(enumerate(merges)))}
        self._whole = pre in WHOLE
        self._of_word = lru_cache(N_CACHED)(self._merged)

    def encode(self, text: str) -> list[int]:
        """Ids of a text without control tokens."""
        ids: list[int] = []
        for i, piece in enumerate(self._apart.split(text) if self._apart else [text]):
            if i % 2:
                ids.append(self._defined[piece])
            else:
                ids += itertools.chain.from_iterable(map(self._of_word, self.split(piece)))
        return ids

    def split(self, text: str) -> Iterator[str]:
        """The words: they make up the text."""
        for piece in self._first.split(text) if self._first else [text]:
            yield from (match[0] for match in self._rule.finditer(piece))

    def _merged(self, word: str) -> tuple[int, ...]:
        spelt = "".join(map(BYTE_CHARACTERS.__getitem__, word.encode()))
        if self._whole and (whole := self._ids.get(spelt)) is not None:
            return (whole,)
        parts = merge(spelt, self._ranks)
        return tuple(itertools.chain.from_iterable(self._spelt(part) for part in parts))

    def _spelt(self, part: str) -> list[int]:
        """A part's token, or those of its bytes; a byte that no token spells is left out, as llama.cpp does."""
        if (id_ := self._ids.get(part)) is not None:
            return [id_]
        return [self._ids[c] for c in part if c in self._ids]


def merge(spelt: str, ranks: Mapping[str, int]) -> list[str]:
    """Byte-pair merges of a word: the pair of the lowest rank first, of equals the leftmost."""
    parts: list[str] = list(spelt)
    after = list(range(1, len(parts) + 1))
    before = list(range(-1, len(parts) - 1))
    queue: list[tuple[int, int, str]] = []

    def offer(left: int) -> None:
        if left >= 0 and after[left] < len(parts):
            pair = f"{parts[left]} {parts[after[left]]}"
            if (rank := ranks.get(pair)) is not None:
                heapq.heappush(queue, (rank, left, pair))

    for i in range(len(parts) - 1):
        offer(i)
    while queue:
        _, left, pair = heapq.heappop(queue)
        right = after[left]
        if not parts[left] or right >= len(parts) or f"{parts[left]} {parts[right]}" != pair:
            continue  # one of the two has been merged since
        parts[left] += parts[right]
        parts[right] = ""
        after[left] = after[right]
        if after[left] < len(parts):
            before[after[left]] = left
        offer(before[left])
        offer(left)
    return [part for part in parts if part]


def byte_characters() -> list[str]:
    """The characters that byte-level BPE writes bytes as, by byte: GPT-2's table."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spare = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(spare)) for b in range(256)]


BYTE_CHARACTERS = byte_characters()


@cache
def _compiled(rule: str) -> re.Pattern[str]:
    r"""A rule with \p{..} and Unicode's \s, which Python's expressions lack."""
    rule = re.sub(r"(\[[^][&]+)&&\[\^\\p\{Han\}\]\]", r"(?:(?!\\p{Han})\1])", rule)
    out, inside = [], False
    for piece in re.findall(r"\\p\{\w+\}|\\.|.", rule):
        inside = (inside or piece == "[") and piece != "]"
        characters = {r"\s": _SPACE, r"\S": f"^{_SPACE}"}.get(piece) or _classes().get(piece[3:-1])
        out.append(piece if characters is None else characters if inside else f"[{characters}]")
    return re.compile("".join(out))


@cache
def _classes() -> dict[str, str]:
    """The insides of character classes, by general category ("Lu"), by group of them ("L"), and Han."""
    runs: dict[str, list[list[int]]] = {}
    for code in itertools.chain(range(0x40000), range(0xE0000, 0xE1000)):  # the planes between hold no characters
        category = unicodedata.category(chr(code))
        for name in (category, category[0]):
            last = runs.setdefault(name, [])
            if last and last[-1][1] == code - 1:
                last[-1][1] = code
            else:
                last.append([code, code])
    runs["Han"] = [list(run) for run in HAN]
    return {name: "".join(f"\\U{low:08x}-\\U{high:08x}" for low, high in found) for name, found in runs.items()}
