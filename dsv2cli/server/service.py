"""What the dialects share: the served model, and the way from their fields to a ``Generation``."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from cext.errors import TemplateError, TokenizerError
from cext.tokenizer import Message
from dsv2cli.server import errors
from dsv2cli.server.constraints import ANY_OBJECT, Grammars
from dsv2cli.server.errors import ApiError, bad_field
from dsv2cli.server.generation import Generation, Params
from dsv2cli.server.kept import Store
from dsv2cli.server.tools import History, check_calls, form_of, history_of
from dsv2cli.server.wire import Sampled, StructuredOutputs

if TYPE_CHECKING:
    from pathlib import Path

    from dsv2cli.server.batches import Batches
    from dsv2cli.server.engine import Engine, Ticket
    from dsv2cli.server.generation import Constraint

MAX_TOP = 20
MAX_BIAS = 1024
MAX_BIAS_VALUE = 1e4  # far above every logit
U64 = 1 << 64
NUMBER = re.compile(r"\s*-?[0-9]{1,19}\s*")


@dataclass(frozen=True)
class AskedForm:
    """The form of an answer as a request's field gives it. read: makes a grammar of value and field; ApiError."""

    field: str
    value: Any
    read: Callable[[Any, str], str]


@dataclass
class Service:
    """The model under the name that it answers to; requests may call it as they like, and mostly do."""

    engine: Engine
    name: str
    defaults: Params
    aliases: tuple[str, ...] = ()  # further names
    tags: tuple[str, ...] = ()  # told in the list of models
    verbose: bool = False  # every chat's answer tells its prompt
    thinking: bool | None = None  # of chats that say nothing about it; None: as the template has it
    fingerprint: str = "b1-dsv2"  # llama-server's form: clients look at its b
    n_predict: int | None = None  # most tokens of an answer that asks for no number
    slot_folder: Path | None = None  # where slots are saved
    seed: int = 2**32 - 1  # what llama-server tells where each answer draws its own
    batches: Batches | None = None  # where it serves
    began: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        tokenizer = self.engine.runtime.tokenizer
        self.grammars = Grammars(tokenizer, self.engine.end_ids)
        self.tool_form = form_of(tokenizer)
        self.responses = Store()

    @property
    def n_vocab(self) -> int:
        return self.engine.runtime.tokenizer.n_vocab

    def params(self, body: Sampled) -> Params:
        """The request's sampling over the server's defaults."""
        d = self.defaults

        def given(value: Any, default: Any) -> Any:
            return default if value is None else value

        top_k = given(body.top_k, d.top_k)
        last_n = given(body.repeat_last_n, d.repeat_last_n)
        top_p = given(body.top_p, d.top_p)
        return Params(
            temperature=given(body.temperature, d.temperature),
            top_k=max(top_k, 0),
            top_p=top_p if top_p > 0 else 1e-6,
            min_p=given(body.min_p, d.min_p),
            repeat_penalty=given(body.repeat_penalty, d.repeat_penalty),
            repeat_last_n=self.engine.limits.n_ctx if last_n < 0 else min(last_n, self.engine.limits.n_ctx),
            presence_penalty=given(body.presence_penalty, 0.0),
            frequency_penalty=given(body.frequency_penalty, 0.0),
            bias=self.bias(body.logit_bias),
            seed=d.seed if body.seed is None else body.seed % U64,
        )

    def form(self, body: Sampled, response_format: Mapping[str, Any] | None = None) -> AskedForm | None:
        """The form that an answer must have; None for any. ApiError."""
        vllm = body.structured_outputs or StructuredOutputs()
        grammars = self.grammars
        forms: list[tuple[str, Any, Callable[[Any, str], str]]] = [
            ("json_schema", body.json_schema, grammars.schema),
            ("guided_json", body.guided_json, grammars.schema),
            ("structured_outputs.json", vllm.json, grammars.schema),
            ("grammar", body.grammar, grammars.gbnf),
            ("guided_grammar", body.guided_grammar, grammars.gbnf),
            ("structured_outputs.grammar", vllm.grammar, grammars.gbnf),
            ("guided_regex", body.guided_regex, grammars.regex),
            ("structured_outputs.regex", vllm.regex, grammars.regex),
            ("guided_choice", body.guided_choice, grammars.choice),
            ("structured_outputs.choice", vllm.choice, grammars.choice),
        ]
        if response_format is not None:
            schema = schema_of(response_format)
            forms.append(("response_format", schema, grammars.schema))
        wanted = [(field, value, make) for field, value, make in forms if value is not None and value != ""]
        if len(wanted) > 1:
            raise bad_field(wanted[1][0], f"and {wanted[0][0]} each ask for a form of the answer: give one of them")
        return AskedForm(*wanted[0]) if wanted else None

    def constraint(self, form: AskedForm, opening: Sequence[int] = (), begun: str = "") -> Callable[[], Constraint]:
        """What makes a form's constraint for each answer. begun: how the answer begins, in the prompt. It may take
        seconds. ApiError."""
        grammar = form.read(form.value, form.field)
        opened = self.engine.runtime.tokenizer.decode(opening)
        return self.grammars.compiled(grammar, form.field, opened, begun=begun)

    def bias(self, given: Any) -> dict[int, float]:
        """OpenAI's object, or llama-server's pairs, in which a word stands for its tokens and false for never."""
        pairs = given.items() if isinstance(given, Mapping) else given or ()
        if len(pairs) > MAX_BIAS:
            raise bad_field("logit_bias", f"has more than {MAX_BIAS} entries")
        bias: dict[int, float] = {}
        for what, value in pairs:
            amount = (float("-inf") if not value else 0.0) if isinstance(value, bool) else float(value)
            for token in self._bias_ids(what):
                bias[token] = float("-inf") if amount <= -100 else min(amount, MAX_BIAS_VALUE)
        return bias

    def _bias_ids(self, what: int | str) -> list[int]:
        if isinstance(what, int) or NUMBER.fullmatch(what):
            return [token] if 0 <= (token := int(what)) < self.n_vocab else []
        return self.engine.runtime.tokenizer.encode(what)

    def stops(self, given: str | Sequence[str] | None) -> tuple[str, ...]:
        stops = (given,) if isinstance(given, str) else tuple(given or ())
        return tuple(stop for stop in stops if stop)

    def chat_prompt(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool | None = None,
        answer: bool = True,
        continues: bool = False,
    ) -> list[int]:
        """A chat as ids (``Tokenizer.chat``). ApiError 400 for what the template cannot write."""
        try:
            return self.engine.runtime.tokenizer.chat(
                messages, answer=answer, tools=tools, thinking=thinking, continues=continues
            )
        except (TemplateError, TokenizerError) as error:
            raise ApiError(400, self.without_path(error), param="messages") from None

    def without_path(self, error: Exception) -> str:
        """A message about the model's file, without where it lies."""
        return str(error).replace(f"`{self.engine.runtime.tokenizer.path}`: ", "")

    def messages(self, given: Sequence[Any]) -> list[Message]:
        if not given:
            raise bad_field("messages", "is empty")
        parsed = []
        for i, value in enumerate(given):
            try:
                parsed.append(self._known_role(_in_one_text(Message.parse(value))))
            except ValueError as error:
                raise bad_field(f"messages[{i}]", str(error)) from None
            check_calls(parsed[-1], f"messages[{i}]")
        return parsed

    @cached_property
    def history(self) -> History:
        """How the model's template takes the calls of a chat."""
        tokenizer = self.engine.runtime.tokenizer
        return history_of(lambda messages: self.spelt(tokenizer.chat(messages)))

    @cached_property
    def can_fill_in(self) -> bool:
        """Whether the model was trained to write what stands between two texts."""
        try:
            self.engine.runtime.tokenizer.fill_in("", "")
        except TokenizerError:
            return False
        return True

    def _known_role(self, message: Message) -> Message:
        """OpenAI's newer name of the system's role, for templates that were written before it."""
        template = self.engine.runtime.tokenizer.chat_template or ""
        return (
            replace(message, role="system") if message.role == "developer" and "developer" not in template else message
        )

    def opening(self, prompt: Sequence[int]) -> tuple[int, ...]:
        return tuple(self.engine.runtime.tokenizer.opening(prompt))

    def limit(self, *given: int | None) -> int | None:
        """The first limit that is given; None leaves it to the context, and so does llama-server's -1."""
        wanted = next((n for n in given if n is not None), None)
        return None if wanted is None or wanted < 0 else wanted

    def submit_all(self, asked: Sequence[Generation]) -> list[Ticket]:
        """All of a request's prompts, or none. ApiError."""
        tickets: list[Ticket] = []
        try:
            tickets = [self.engine.submit(one) for one in asked]
        except ApiError:
            for ticket in tickets:
                ticket.cancel()
            raise
        return tickets

    def check_ids(self, ids: Sequence[int], field: str) -> None:
        if not ids:
            raise bad_field(field, "holds no tokens")
        if min(ids) < 0 or max(ids) >= self.n_vocab:
            raise bad_field(field, f"token ids go from 0 to {self.n_vocab - 1}")

    def text_prompt(self, text: str, *, special: bool = True) -> list[int]:
        """A raw prompt. Whoever sends one owns all of it, control tokens too, unless told otherwise. ApiError."""
        self.check_length(len(text))
        ids = self.engine.runtime.tokenizer.prompt(text, special=special)
        return ids or self._begin()

    def begins(self, text: str, ids: Sequence[int], *, special: bool = True) -> bool:
        """Whether the first of a raw prompt's tokens was put before its text: nobody spelt it."""
        spelling = self.engine.runtime.tokenizer.special_text(ids[0])
        return not text or (spelling is not None and not (special and text.startswith(spelling)))

    def fill_in(self, before: str, after: str) -> list[int]:
        """A prompt that asks for what stands between two texts. ApiError, TokenizerError."""
        self.check_length(len(before) + len(after))
        return self.engine.runtime.tokenizer.fill_in(before, after)

    def check_length(self, n_characters: int) -> None:
        """ApiError where the context holds no text of so many characters: to tokenise it takes long."""
        fewest, n_ctx = -(-n_characters // self.engine.runtime.tokenizer.longest), self.engine.limits.n_ctx
        if fewest > n_ctx:
            raise errors.too_long(fewest, n_ctx, counted=False)

    def _begin(self) -> list[int]:
        """What an empty prompt is: the token that begins a text."""
        tokenizer = self.engine.runtime.tokenizer
        token = tokenizer.bos if tokenizer.bos is not None else tokenizer.eos
        if token is None:
            raise bad_field("prompt", "is empty, and the vocabulary has no token that begins a text")
        return [token]

    def check_model(self, name: str) -> None:
        if name not in (self.name, *self.aliases):
            raise errors.no_such_model(name)

    def spelt(self, ids: Sequence[int]) -> str:
        """The text of a sequence, its control tokens as they are spelt."""
        tokenizer = self.engine.runtime.tokenizer
        pieces = ((tokenizer.special_text(token) or "").encode() or tokenizer.token_bytes(token) for token in ids)
        return b"".join(pieces).decode("utf-8", "replace")

    def token_text(self, token: int) -> str:
        """A token alone: a control token's spelling; part of a character as OpenAI spells it, bytes:\\xf0."""
        tokenizer = self.engine.runtime.tokenizer
        raw = tokenizer.token_bytes(token)
        try:
            return tokenizer.special_text(token) or raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _in_one_text(message: Message) -> Message:
    """Parts as lines of one text, as vLLM joins them: the family's own templates take nothing but text."""
    content = message.content
    if content is None or isinstance(content, str):
        return message
    texts = [part.get("text", "") for part in content if isinstance(part, Mapping)]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("content with a part whose text is none")
    return replace(message, content="\n".join(texts))


def schema_of(response_format: Mapping[str, Any]) -> Any:
    """The schema of OpenAI's response_format, llama-server's variants included; None for text."""
    kind = response_format.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return response_format.get("schema") or ANY_OBJECT
    if kind == "json_schema":
        given = response_format.get("json_schema")
        schema = given.get("schema") if isinstance(given, Mapping) else response_format.get("schema")
        if schema is not None:
            return schema
        raise bad_field("response_format.json_schema.schema", "is missing")
    raise bad_field("response_format.type", f"{str(kind)[:50]!r} is none of text, json_object, json_schema")


def new_id(kind: str, joint: str = "-") -> str:
    return f"{kind}{joint}{secrets.token_urlsafe(18)}"
