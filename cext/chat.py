"""chat.py: a chat to token ids: what the template is shown, and what of its text becomes which token.

The template sees the real messages, as transformers shows them, so that it can trim, cut, test and count them. What it
writes is Traced (traced.py): each character is the template's own, or came in with a message, or is of unknown origin.
From that the one rule follows that keeps structure out of people's hands: a control token is a spelling whose every
character is the template's own. A message cannot bring such a character along, whatever it says and wherever it is put.

An answer that was sampled is shown as its text and comes back as the tokens it was sampled as, as far as the template
lets it stand: so the cache of one turn is the beginning of the next turn's prompt.
"""

from __future__ import annotations

import bisect
import codecs
import datetime
import itertools
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from cext.errors import TemplateError, TokenizerError
from cext.template import HINT, free_variables, render
from cext.traced import FIRST_SOURCE, TEMPLATE, UNKNOWN, Traced, origins_of, written

if TYPE_CHECKING:
    from cext.tokenizer import Tokenizer

# A role is no text that a person types: one of these names (transformers' chats, OpenAI's) is the template's to write.
ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})
THINK_TAGS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("◁think▷", "◁/think▷"))  # V3 and GLM, Mistral, Kimi-VL
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")  # transformers': names of the same thing
SWITCHES = {"enable_thinking": (False, True), "thinking": (False, True), "reasoning_effort": ("none", "high")}
DATES = {"date_string": "%d %b %Y", "datetime": "%b %d %Y"}  # llama.cpp's: templates' names of today
FUNCTIONS = "functions"  # what Firefunction's template writes of tools, as text: they are told in another way
MAX_OPENING = 8  # tokens of an opening tag with its line break

Content = str | Sequence[int] | Sequence[Mapping[str, Any]] | None


@dataclass(frozen=True)
class Message:
    """One message of a chat.

    content: text; or OpenAI's parts ({"type": "text", "text": ...}); or the ids that an answer was sampled as, which
    are kept as they are; or None beside tool calls. fields: what else the template may look at: name, tool_calls,
    tool_call_id, reasoning_content ...
    """

    role: str
    content: Content
    fields: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def parse(value: object) -> Message:
        """A message in OpenAI's form, as JSON has it. ValueError says what is wrong with it."""
        if not isinstance(value, Mapping):
            raise ValueError(f"a message is an object, not {type(value).__name__}")
        role, content = value.get("role"), value.get("content")
        if not isinstance(role, str):
            raise ValueError("a message without a role")
        if isinstance(content, list):
            for part in content:
                if not isinstance(part, Mapping) or part.get("type", "text") != "text":
                    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
                    raise ValueError(f"content with a part of type {kind}: only text is read")
        elif content is None:
            if not value.get("tool_calls"):
                raise ValueError(f"the {role} message has no content")
        elif not isinstance(content, str):
            raise ValueError(f"content is neither text nor parts but {type(content).__name__}")
        return Message(role, content, {k: v for k, v in value.items() if k not in ("role", "content")})


@dataclass(frozen=True)
class Answer:
    """A sampled answer in its two parts. reasoning: None where there is none; both without the tags around it."""

    reasoning: str | None
    content: str


def chat_ids(
    tokenizer: Tokenizer,
    source: str,
    messages: Sequence[Message],
    *,
    answer: bool,
    tools: Sequence[Mapping[str, Any]] | None,
    thinking: bool | None,
    continues: bool = False,
) -> list[int]:
    """The ids of a chat as the template ``source`` writes it, ended where the answer begins if ``answer``, or where the
    last message's text does if it ``continues``.

    TemplateError where the template cannot or will not write it; TokenizerError where it leaves out a message that a
    person wrote, or writes a control token in a way that cannot be told from what a person wrote.
    """
    given = _Given(tokenizer)
    shown = [given.message(i, message, "reasoning_content" in source) for i, message in enumerate(messages)]
    variables: dict[str, Any] = {f"{name}_token": written(text) for name, text in tokenizer.named_spellings.items()}
    variables |= {
        "messages": shown,
        "tools": given.data(list(tools)) if tools is not None else None,
        "documents": None,
        "add_generation_prompt": answer and not continues,
    }
    try:
        variables |= switches(source, thinking) | _dates(source) | _functions(source)
        text = render(source, variables)
        if continues:
            text = _up_to(text, given.content(len(messages) - 1))
    except TemplateError as error:
        raise TemplateError(f"`{tokenizer.path}`: {error}", error.hint) from error
    ids = _Assembly(tokenizer, given).ids(text)
    _check_left_out(tokenizer, messages, given, text)
    return ids


def _up_to(text: Traced, leaf: _Leaf) -> Traced:
    """What was written up to the end of a message's text: the template closes a message that is to go on. Spaces that
    it trimmed off the end come back. TemplateError where that end does not stand there."""
    origins = origins_of(text)
    each = np.asarray(origins)
    shown = np.flatnonzero((each >= leaf.start) & (each < leaf.start + len(leaf.text)))
    n = int(each[shown[-1]]) - leaf.start + 1 if len(shown) else 0
    if not n or leaf.text[n:].strip():
        raise TemplateError(
            "the chat template does not show the end of the last message, which is to be continued", HINT
        )
    rest = array("I", range(leaf.start + n, leaf.start + len(leaf.text)))
    return Traced(str.__str__(text)[: shown[-1] + 1] + leaf.text[n:], origins[: shown[-1] + 1] + rest)


def has_switch(source: str) -> bool:
    """Whether a template can be told to reason, or not to."""
    return not SWITCHES.keys().isdisjoint(free_variables(source))


def switches(source: str, thinking: bool | None) -> dict[str, Any]:
    """The template's own variables for ``thinking``. TemplateError where it has none and goes the other way."""
    if thinking is None:
        return {}
    found = {name: values[thinking] for name, values in SWITCHES.items() if name in free_variables(source)}
    if not found and thinking != any(opening in source for opening, _ in THINK_TAGS):
        word = "on: it knows no reasoning" if thinking else "off: it has no variable for that"
        raise TemplateError(
            f"the chat template cannot switch reasoning {word}", "--think auto leaves that to the template"
        )
    return found


def _dates(source: str) -> dict[str, Traced]:
    """Today, under the names that a template asks for: else Llama's say that it is in July 2024, others nothing."""
    today = datetime.date.today()
    return {name: written(today.strftime(form)) for name, form in DATES.items() if name in free_variables(source)}


def _functions(source: str) -> dict[str, Traced]:
    """No tools, for a template that fails where nobody names them."""
    return {FUNCTIONS: written("[]")} if FUNCTIONS in free_variables(source) else {}


# What the template is shown.


@dataclass
class _Leaf:
    """A text that was given, and the origins [start, start + len(text)] that its characters have."""

    start: int
    text: str
    message: int  # its index; -1 in a tool's description
    ids: Sequence[int] = ()  # of a sampled answer
    cuts: Sequence[tuple[int, int]] = ()  # (characters, ids) before each place where an answer can be cut

    def tokens(self, begin: int, end: int) -> tuple[str, Sequence[int], str]:
        """text[begin:end] as whole tokens, and what is left of cut ones before and after them."""
        i = bisect.bisect_left(self.cuts, (begin, -1))
        j = bisect.bisect_right(self.cuts, (end, len(self.ids))) - 1
        if i > j:
            return self.text[begin:end], (), ""
        (a, first), (b, last) = self.cuts[i], self.cuts[j]
        return self.text[begin:a], self.ids[first:last], self.text[b:end]


class _Given:
    """Everything that comes from outside, each character with an origin of its own."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.leaves: list[_Leaf] = []
        self.used: set[int] = set()  # messages of which a character stands in the text
        self._next = FIRST_SOURCE
        self._message = -1

    def leaf_of(self, origin: int) -> _Leaf:
        return self.leaves[bisect.bisect_right(self.leaves, origin, key=lambda leaf: leaf.start) - 1]

    def content(self, index: int) -> _Leaf:
        """The text of message ``index``, whose content is one."""
        return next(leaf for leaf in self.leaves if leaf.message == index)

    def message(self, index: int, message: Message, takes_reasoning: bool) -> dict[str, Any]:
        """A message as transformers gives it to templates: what is None is left out, reasoning has all its names."""
        self._message = index
        fields = {str(key): value for key, value in message.fields.items() if value is not None}
        reasoning = next((fields[key] for key in REASONING_FIELDS if key in fields), None)
        content = message.content
        shown: dict[str, Any] = {}
        if content is not None and not isinstance(content, str) and all(isinstance(part, int) for part in content):
            text = self._answer([part for part in content if isinstance(part, int)])
            if takes_reasoning and reasoning is None:
                reasoning, text = split_answer(self._tokenizer, self.leaves[-1].ids, text)
            shown["content"] = text
        elif content is not None:
            shown["content"] = self.data(content)
        shown = {"role": self._role(message.role)} | shown | {k: self.data(v) for k, v in fields.items()}
        if reasoning is not None:
            reasoning = reasoning if isinstance(reasoning, Traced) else self.data(reasoning)
            shown = {"thinking": reasoning, **shown, "reasoning_content": reasoning}
        self._message = -1
        return shown

    def data(self, value: Any) -> Any:
        """JSON-like data with every string in it marked as given."""
        if value is None or isinstance(value, (bool, int, float)):
            return value
        if isinstance(value, str):
            return self._add(str.__str__(value))
        if isinstance(value, Mapping):
            return {self.data(key): self.data(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.data(item) for item in value]
        raise TokenizerError(f"a message holds a {type(value).__name__}, which is no data that a template can show")

    def _role(self, role: str) -> Traced:
        return written(role) if role in ROLES else self._add(role)

    def _answer(self, ids: Sequence[int]) -> Traced:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        texts: list[str] = []
        cuts, n = [(0, 0)], 0
        for i, token in enumerate(ids):
            texts.append(decoder.decode(self._tokenizer.token_bytes(token)))
            n += len(texts[-1])
            if not decoder.getstate()[0]:
                cuts.append((n, i + 1))
        rest = decoder.decode(b"", True)
        if rest:
            cuts.append((n + len(rest), len(ids)))
        return self._add("".join(texts) + rest, ids, cuts)

    def _add(self, text: str, ids: Sequence[int] = (), cuts: Sequence[tuple[int, int]] = ()) -> Traced:
        self.leaves.append(_Leaf(self._next, text, self._message, ids, cuts))
        origins = array("I", np.arange(self._next, self._next + len(text), dtype=np.uint32).tobytes())
        self._next += len(text) + 1  # so that the end of one text and the beginning of the next are no neighbours
        return Traced(text, origins)


def split_answer(tokenizer: Tokenizer, ids: Sequence[int], text: Traced) -> tuple[Traced | None, Traced]:
    """(reasoning or None, content) of an answer. Where a tag is a token, only that token counts."""
    for opening, closing in THINK_TAGS:
        rest = text.lstrip()
        opens = rest.startswith(opening)
        begin = len(text) - len(rest) + len(opening) if opens else 0
        end = _find_tag(tokenizer, ids, text, closing)
        if end >= 0:
            return _part(text, min(begin, end), end), _part(text, end + len(closing), len(text))
        if opens:
            return _part(text, begin, len(text)), _part(text, len(text), len(text))
    return None, text


def _part(text: Traced, begin: int, end: int) -> Traced:
    return Traced(str.__str__(text)[begin:end], origins_of(text)[begin:end])


def _find_tag(tokenizer: Tokenizer, ids: Sequence[int], text: str, tag: str) -> int:
    """Where the first ``tag`` begins; -1 where there is none."""
    token = tokenizer.control_id(tag)
    if token is None:
        return text.find(tag)
    before = b"".join(map(tokenizer.token_bytes, ids[: ids.index(token)])) if token in ids else None
    return -1 if before is None else len(before.decode("utf-8", "replace"))


# What its text becomes.


class _Assembly:
    """Traced text to ids. Text between control tokens is tokenised in one piece, since words join across it."""

    def __init__(self, tokenizer: Tokenizer, given: _Given) -> None:
        self._tokenizer = tokenizer
        self._given = given
        self._ids: list[int] = []
        self._text = ""  # plain text not tokenised yet,
        self._origins = array("I")  # and where it is from

    def ids(self, text: Traced) -> list[int]:
        plain, origins = str.__str__(text), origins_of(text)
        for begin, end in _runs(origins):
            run, origin = plain[begin:end], origins[begin]
            leaf = self._given.leaf_of(origin) if origin >= FIRST_SOURCE else None
            if leaf is not None:
                self._given.used.add(leaf.message)
            if origin == TEMPLATE:
                self._own(run)
            elif leaf is not None and leaf.cuts and leaf.text.startswith(run, at := origin - leaf.start):
                self._sampled(leaf, at, at + len(run))
            else:
                self._plain(run, origins[begin:end])
        self._flush()
        return self._ids

    def _own(self, run: str) -> None:
        """The template's own text, cut at every special token, the longest first."""
        at = 0
        for match in self._tokenizer.markers.finditer(run):
            self._plain(run[at : match.start()], array("I", [TEMPLATE]) * (match.start() - at))
            self._flush()
            self._ids.append(self._tokenizer.marker_ids[match[0]])
            at = match.end()
        self._plain(run[at:], array("I", [TEMPLATE]) * (len(run) - at))

    def _sampled(self, leaf: _Leaf, begin: int, end: int) -> None:
        if begin == 0:  # A sampled answer begins with its own space, where the template has one for text.
            while self._text.endswith(" ") and self._origins[-1] == TEMPLATE:
                self._text = self._text[:-1]
                del self._origins[-1:]
        head, ids, tail = leaf.tokens(begin, end)
        self._plain(head, array("I", range(leaf.start + begin, leaf.start + begin + len(head))))
        if ids:
            self._flush()
            self._ids += ids
        self._plain(tail, array("I", range(leaf.start + end - len(tail), leaf.start + end)))

    def _plain(self, text: str, origins: array[int]) -> None:
        self._text += text
        self._origins.extend(origins)

    def _flush(self) -> None:
        """Tokenise what is plain. Refuses a spelt control token that a template may have meant as one.

        A character of unknown origin went through something that Traced does not follow. Where a message spells the
        token too, the text is taken for that message's; where none does, it can only be the template's (or put together
        from several messages): a prompt without it would be wrong, and one with it might not be safe.
        """
        if self._text and UNKNOWN in np.frombuffer(self._origins, np.uint32):
            for match in self._tokenizer.markers.finditer(self._text):
                origins = self._origins[match.start() : match.end()]
                is_lost = UNKNOWN in origins and max(origins) < FIRST_SOURCE
                if is_lost and not any(match[0] in leaf.text for leaf in self._given.leaves):
                    raise TokenizerError(
                        f"`{self._tokenizer.path}`: the chat template makes the control token {match[0]} in a way that"
                        " cannot be told from typed text",
                        "the template is part of the file: another file of the model may have one that can be followed",
                    )
        continues = bool(self._ids) and self._tokenizer.special_text(self._ids[-1]) is None
        self._ids += self._tokenizer.encode(self._text, continues=continues)
        self._text, self._origins = "", array("I")


def _runs(origins: array[int]) -> Iterator[tuple[int, int]]:
    """[begin, end) of each longest stretch that is of one kind, or of characters that stood side by side."""
    if not origins:
        return
    each = np.frombuffer(origins, np.uint32).astype(np.int64)
    step = np.diff(each)
    goes_on = np.where(each[:-1] < FIRST_SOURCE, step == 0, step == 1)
    edges = [0, *(np.flatnonzero(~goes_on) + 1).tolist(), len(each)]
    yield from itertools.pairwise(edges)


def _check_left_out(tokenizer: Tokenizer, messages: Sequence[Message], given: _Given, text: Traced) -> None:
    """Refuse to drop what a person wrote. What an assistant or a tool said is the template's to keep or drop.

    Text of unknown origin may be the message, changed in a way that is not followed (another case, JSON).
    """
    n_unknown = origins_of(text).count(UNKNOWN)
    for i, message in enumerate(messages):
        if message.role not in ("system", "developer", "user") or i in given.used:
            continue
        said = sum(len(leaf.text.strip()) for leaf in given.leaves if leaf.message == i)
        if said > n_unknown:
            raise TokenizerError(
                f"`{tokenizer.path}`: the chat template leaves out the {message.role} message", "chat without it"
            )
