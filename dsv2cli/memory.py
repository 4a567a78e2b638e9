"""Whether a context fits in the memory that is free, told before it is an OOM kill."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cext.system import free_bytes
from dsv2cli import console
from dsv2cli.errors import CliError

if TYPE_CHECKING:
    from dsv2cli.engines.protocol import Session

ROUND = 256  # tokens: a context that is proposed is a multiple of it


def need(sessions: Sequence[Session], n_step: int, other: int = 0) -> tuple[str, str] | None:
    """(what is wrong, a hint) where the sessions' caches, full, take more memory than is free, with what their models
    need for steps of n_step tokens, and ``other`` bytes.

    None where they fit, or the system does not tell. Caches and steps take their memory as they are used: ask before.
    """
    free = free_bytes()
    other += sum(model.step_bytes(n_step) for model in {session.model for session in sessions})
    caches = sum(session.growth for session in sessions)
    if free is None or caches + other <= free:
        return None
    n_ctx = max(session.n_ctx for session in sessions)
    message = (
        f"a context of {n_ctx} tokens takes {console.format_bytes(caches)}, reading and writing it"
        f" {console.format_bytes(other)}, and {console.format_bytes(free)} of memory are free"
    )
    fits = int(n_ctx * max(0, free - other) / max(caches, 1)) // ROUND * ROUND
    hints = [f"a context of {fits} fits" if fits else "a smaller context"]
    growing = [session for session in sessions if session.growth]
    coded = sum(session.model.session(session.n_ctx, "q8_0").kv_bytes for session in growing)
    if coded < caches:  # narrow rows do not gain
        hints.append(f"--kv q8_0 takes {console.format_bytes(coded)}")
    return message, "; ".join(hints)


def warn(sessions: Sequence[Session], n_step: int, other: int = 0) -> None:
    """For what may never fill its context."""
    if problem := need(sessions, n_step, other):
        console.warn("{}: it may end before it is full ({})".format(*problem))


def refuse(sessions: Sequence[Session], n_step: int, other: int = 0) -> None:
    """For what fills its context. CliError."""
    if problem := need(sessions, n_step, other):
        raise CliError(*problem)
