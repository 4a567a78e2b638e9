"""What a step tells of its sequences."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from dsv2cli.scheduler.sampling import Logprobs
    from dsv2cli.scheduler.sequence import Sequence

# An end token came; a stop string; as many tokens as asked for; no room; somebody cancelled; something failed.
Reason = Literal["end", "stop", "length", "context", "cancelled", "error"]


class Read(NamedTuple):
    """So many of the prompt's tokens that were not in the cache have been read."""

    sequence: Sequence
    done: int
    n: int


class Token(NamedTuple):
    """A token of the answer. Its text may be empty: half a character, or what may become a stop string, waits."""

    sequence: Sequence
    id: int
    text: str
    logprobs: Logprobs | None


class End(NamedTuple):
    """The last event of a sequence, with the text that waited. ``error`` where the reason is "error"."""

    sequence: Sequence
    reason: Reason
    text: str
    error: Exception | None


Event = Read | Token | End
