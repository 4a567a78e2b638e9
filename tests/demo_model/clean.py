"""Which of the teacher's answers are fit to learn from, and what is cut from them."""

import re

from prompts import Ask

FOREIGN = re.compile(
    r"SmolLM|Hugging ?Face|OpenAI|ChatGPT|GPT|language model|\bAI\b|as an assistant|I'm sorry, but|I cannot|I can't (help|assist)|user|prompt|http|\[|\]|\{|\}|[^\x00-\x7f]",
    re.I,
)
LIST = re.compile(r"^ *(\d+[.)]|[-*]) +", re.M)


def repeated(words: list[str], n: int = 4) -> float:
    """The share of n-grams that stood before."""
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def cut(text: str, finished: bool) -> str:
    """The answer up to its last whole paragraph, or sentence where there is but one."""
    text = re.sub(r"\n{3,}", "\n\n", text.strip())
    if finished:
        return text
    paragraphs = text.split("\n\n")
    if len(paragraphs) > 1:
        return "\n\n".join(paragraphs[:-1]).strip()
    return re.split(r"(?<=[.!?])\s+(?=[^.!?]*$)", text)[0]


def fit(ask: Ask, text: str) -> bool:
    """Whether an answer holds no loop, no refusal, no broken list, no other model's name, and its subject."""
    words = re.findall(r"[a-z']+", text.lower())
    if not 4 <= len(words) <= 330 or FOREIGN.search(text) or text[-1] not in '.!?"':
        return False
    if (
        repeated(words) > 0.04
        or repeated(words, 3) > 0.1
        or len(set(words)) < 0.3 * len(words)
        or re.search(r"(\b\w+\b)( \1){2}", text)
    ):
        return False
    numbers = [int(m) for m in re.findall(r"^ *(\d+)[.)] ", text, re.M)]
    if numbers != list(range(1, len(numbers) + 1)) or re.search(r"^ *\d+[.)] *\d+[.)]|:\s*$", text, re.M):
        return False
    marks = LIST.split(text)
    if len(marks) > 3 and len({m.strip().lower()[:24] for m in text.split("\n") if m.strip()}) < len(
        [m for m in text.split("\n") if m.strip()]
    ):
        return False
    if text.count('"') % 2 or "**" in text:
        return False
    before = [said for role, said in ask.turns if role == "assistant"]
    if any(said[:32] == text[:32] for said in before):
        return False
    joined = " ".join(words)
    if ask.kind == "story":
        return joined.count(ask.about[0].lower()) >= 3 and len(words) > 60
    return all(word.lower() in joined for word in ask.about)
