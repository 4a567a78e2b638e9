"""The program's own conversations over a GGUF, without the terminal: what score.py asks."""

from collections.abc import Sequence

import cext
from dsv2cli.chat.conversation import Conversation
from dsv2cli.runtime import Runtime
from dsv2cli.scheduler import End, Scheduler, Token


def converse(opened: Runtime, asks: Sequence[str], seed: int, limit: int, system: str | None = None) -> list[str]:
    """The answer to each ask, one after another, under the sampler's defaults; one cut at `limit` tokens ends in a NUL."""
    out = []
    talk = Conversation(opened.session(2048), opened.tokenizer, system, scheduler=Scheduler(opened.evaluate))
    sampler = cext.Sampler(seed=seed)
    for ask in asks:
        text = ""
        for event in talk.reply(ask, sampler, limit):
            if isinstance(event, Token | End):
                text += event.text
            if isinstance(event, End) and event.reason == "length":
                text += "\x00"
        out.append(text)
    return out
