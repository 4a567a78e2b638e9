"""A grammar is prepared in a process of its own first: llguidance cannot be stopped on its way, a process can be ended.

What takes a server's threads for minutes, or its memory, ends there. The trial's vocabulary is the bytes: how long a
grammar takes depends little on the words that it is asked about.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
from typing import Any, Literal

import llguidance
from llguidance.gbnf_to_lark import gbnf_to_lark

CPU_SECONDS = 2
PATIENCE = 20.0  # seconds, on however busy a machine
MEMORY = 4 << 30  # bytes of address space
TOKEN_ID = re.compile(r"<\[[0-9]+\]>")
RUN = "from dsv2cli.server.trial import main; main()"
LIMITS = llguidance.LLParserLimits(verbose_errors=False)


class TooMuchError(Exception):
    """A grammar takes more time or memory than it is given."""


def tried(kind: Literal["gbnf", "grammar"], text: str) -> tuple[str, str]:
    """(the grammar as llguidance takes it, why it cannot be followed or ""). gbnf: llama.cpp's form. ValueError where
    that cannot be read; TooMuchError."""
    command = [sys.executable, "-P", "-c", RUN]
    given = json.dumps([kind, text]).encode()
    try:
        ran = subprocess.run(command, input=given, capture_output=True, timeout=PATIENCE, check=False)
    except subprocess.TimeoutExpired:
        raise TooMuchError from None
    if ran.returncode < 0:  # a signal: of the limit of time, or where no memory is left
        raise TooMuchError
    if ran.returncode:
        raise RuntimeError(f"the trial of a grammar failed: {ran.stderr.decode(errors='replace')[-300:]}")
    grammar, error, unread = json.loads(ran.stdout)
    if unread:
        raise ValueError(unread)
    return grammar, error


def main() -> None:
    _limit()
    kind, text = json.load(sys.stdin)
    json.dump(_outcome(kind, text), sys.stdout)


def _outcome(kind: str, text: str) -> tuple[str, str, str]:
    """(grammar, why it cannot be followed, why it cannot be read)."""
    grammar = text
    if kind == "gbnf":
        try:
            grammar = llguidance.LLMatcher.grammar_from_lark(gbnf_to_lark(text))
        except Exception as error:  # its parser raises what it likes
            return "", "", str(error)[:1000] or type(error).__name__
    # the bytes have none of the model's tokens
    matcher = llguidance.LLMatcher(
        llguidance.LLTokenizer("byte"), TOKEN_ID.sub("<[0]>", grammar), log_level=0, limits=LIMITS
    )
    return grammar, first_error(matcher), ""


def first_error(matcher: llguidance.LLMatcher) -> str:
    """Why a grammar cannot be followed, with what only the first mask shows: a schema that refers to itself without
    end. "" where it can."""
    if error := matcher.get_error():
        return error
    trial = matcher.deep_copy()
    trial.compute_bitmask()
    return trial.get_error() if trial.is_error() else ""


def _limit() -> None:
    """The system ends this process where it takes more. Where it has no such limits PATIENCE is left."""
    with contextlib.suppress(ImportError):
        import resource

        wanted: list[tuple[Any, int]] = [(resource.RLIMIT_CPU, CPU_SECONDS), (resource.RLIMIT_AS, MEMORY)]
        for which, n in wanted:
            with contextlib.suppress(ValueError, OSError):
                resource.setrlimit(which, (n, resource.getrlimit(which)[1]))
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
