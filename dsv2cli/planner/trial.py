"""trial.py: the forecast of a file that is here, beside what is then measured."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dsv2cli import benchmark, console
from dsv2cli.benchmark import Test
from dsv2cli.engines.choice import OURS
from dsv2cli.errors import CliError
from dsv2cli.planner.probe import BLOCK_TOKENS, EMBEDDINGS, HEAD, PROMPT

if TYPE_CHECKING:
    from collections.abc import Callable

    from dsv2cli.planner.forecast import Forecast

N_DECODE = 24
PAGE = 4096  # bytes
CONTEXT, TEXT_CHARACTERS = 1024, 2500  # of the answer whose memory is measured: some 600 tokens
MOST_DEPTH = 16384  # of what is measured: the rest takes its time
CHECKED = {"decode": 0.15, "prefill": 0.15, "memory": 0.05}  # by how much a forecast may be off


@dataclass(frozen=True)
class Compared:
    """A figure of both: bytes, or tokens a second. allowed: by which it may be off, relative to what was measured."""

    name: str
    predicted: float
    measured: float
    allowed: float

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1 if self.measured else 0.0

    @property
    def holds(self) -> bool:
        return abs(self.error) <= self.allowed


def run(
    made: Forecast, threads: int | None, rounds: int, told: Callable[[str, int, int], None]
) -> tuple[Compared, ...]:
    """Measure as dsv2 bench does. CliError."""
    depths = [s.depth for s in made.decode if s.depth <= MOST_DEPTH]
    tests = [Test("prefill", PROMPT), *(Test("decode", N_DECODE, depth) for depth in depths)]
    result = benchmark.run(
        made.subject.found.path, tests, threads=threads, rounds=rounds, kv_type=made.memory.kv_type, told=told
    )
    rates = {row.test: row.median(OURS) for row in result.rows}
    compared = []
    if made.prefill is not None:
        compared.append(Compared(f"prefill {PROMPT}", made.prefill.rate, rates[tests[0]], CHECKED["prefill"]))
    for speed, test in zip(made.decode, tests[1:], strict=False):
        compared.append(Compared(f"decode at {speed.depth}", speed.rate, rates[test], CHECKED["decode"]))
    compared.append(_memory(made, threads))
    return tuple(compared)


def _memory(made: Forecast, threads: int | None) -> Compared:
    """Of a process that chats: it reads a text, which makes it touch the weights, and answers."""
    from quantize.source.corpus import DEFAULT_FILES

    text = DEFAULT_FILES[0].read_text(encoding="utf-8")[:TEXT_CHARACTERS]
    kv = made.memory.kv_type
    asked = ["chat", str(made.subject.found.path), "--raw", "-p", text, "-n", "2", "-c", str(CONTEXT), "--kv", kv]
    command = [sys.executable, "-P", "-c", "from dsv2cli.app import main; main()", *asked, "--json"]
    command += ["-t", str(threads)] if threads else []
    done = subprocess.run(command, env=benchmark.environment(), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CliError("dsv2 chat failed where its memory was to be measured", console.fold(done.stderr[-200:]))
    answer = json.loads(done.stdout)
    n_held = -(-(answer["prompt_tokens"] + answer["answer_tokens"]) // BLOCK_TOKENS) * BLOCK_TOKENS
    cache = made.subject.found.kv_bytes[kv] * n_held
    # A text touches the rows of its own tokens among the embeddings, a page each at most.
    unread = sum(p.nbytes - min(p.nbytes, PAGE * n_held) for p in made.subject.found.parts if p.name == EMBEDDINGS)
    if any(p.name == HEAD for p in made.subject.found.parts):  # else they are read whole as the head
        cache -= unread
    predicted = made.memory.total - made.memory.cache + cache
    return Compared("memory", predicted, answer["resident_bytes"], CHECKED["memory"])
