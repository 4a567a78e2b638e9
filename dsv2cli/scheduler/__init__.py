"""The token loop: any number of sequences, stepped together in one evaluation after another.

A sequence is a state: it says what it wants evaluated next, and turns the logits it gets into tokens, text and events.
The scheduler asks them all, evaluates one step, and hands out what came of it. A chat is a scheduler with one sequence.
"""

from dsv2cli.scheduler.context import Context
from dsv2cli.scheduler.drafts import Drafter, Lookup
from dsv2cli.scheduler.events import End, Event, Read, Reason, Token
from dsv2cli.scheduler.parts import Begin, Parts
from dsv2cli.scheduler.sampling import Logprobs, PromptRows, Sampling
from dsv2cli.scheduler.scheduler import Budget, Evaluate, Scheduler
from dsv2cli.scheduler.sequence import Sequence
from dsv2cli.scheduler.stats import Stats
from dsv2cli.scheduler.text import Text

__all__ = [
    "Begin",
    "Budget",
    "Context",
    "Drafter",
    "End",
    "Evaluate",
    "Event",
    "Logprobs",
    "Lookup",
    "Parts",
    "PromptRows",
    "Read",
    "Reason",
    "Sampling",
    "Scheduler",
    "Sequence",
    "Stats",
    "Text",
    "Token",
]
