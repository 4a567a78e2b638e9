"""trial.py: the forecast of a file that is here, beside what is then measured."""

from __future__ import annotations

import itertools
import json
import math
import statistics
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cext import Gguf
from cext.system import HUGE_PAGE, cached_pages, free_bytes
from dsv2cli import benchmark, console
from dsv2cli.benchmark import Test
from dsv2cli.engines.cache import count
from dsv2cli.engines.choice import OURS
from dsv2cli.errors import CliError
from dsv2cli.planner import probe
from dsv2cli.planner.forecast import speeds
from dsv2cli.planner.hollow import PROMPT, Work, work_of
from dsv2cli.planner.probe import BLOCK_TOKENS, HEAD

if TYPE_CHECKING:
    from collections.abc import Callable

    from dsv2cli.anatomy import Anatomy
    from dsv2cli.benchmark import Contender
    from dsv2cli.planner.forecast import Forecast

N_DECODE = 24
LEAST_SECONDS, MOST_RUNS = 0.5, 5  # of a test in a round: one of some milliseconds tells little by itself
AROUND = 64 << 10  # bytes that Linux maps with a page of a file that is touched, where they are in the cache
CONTEXT, TEXT_CHARACTERS = 1024, 2500  # of the answer whose memory is measured: some 600 tokens
ANSWERS = 4  # tokens for each expert of the last layer that one of them chooses
MOST_DEPTH = 16384  # of what is measured: the rest takes its time
CHECKED = {"decode": 0.15, "prefill": 0.15, "memory": 0.05}  # by how much a forecast may be off


@dataclass(frozen=True)
class Compared:
    """A figure of both: bytes, or tokens a second. predicted, measured: of each round; allowed: by which the forecast
    may be off, relative to what was measured. A machine drifts from minute to minute, so a round's two are compared
    with one another; steps: by how much the forecasts before and after each round differ, relative to the lesser."""

    name: str
    predicted: tuple[float, ...]
    measured: tuple[float, ...]
    allowed: float
    steps: tuple[float, ...] = ()

    @property
    def errors(self) -> tuple[float, ...]:
        """Of each round."""
        pairs = zip(self.predicted, self.measured, strict=True)
        return tuple(predicted / measured - 1 if measured else 0.0 for predicted, measured in pairs)

    @property
    def error(self) -> float:
        return statistics.median(self.errors)

    @property
    def spread(self) -> float:
        """Of what was measured, relative to its median: what the machine drifted by."""
        return (max(self.measured) - min(self.measured)) / (statistics.median(self.measured) or 1.0)

    @property
    def drift(self) -> float:
        """What the machine drifted by while it was compared, as both tell."""
        return max(self.spread, *self.steps, 0.0)

    @property
    def holds(self) -> bool:
        return abs(self.error) <= self.allowed

    @property
    def verdict(self) -> str:
        """ "holds"; "unsettled" where it does not, and the machine drifted by more than what is allowed; "fails"."""
        return "holds" if self.holds else "unsettled" if self.drift > self.allowed else "fails"


def run(
    made: Forecast, threads: int | None, rounds: int, told: Callable[[str, int, int], None]
) -> tuple[Compared, ...]:
    """Measure this machine and the model in turns, the latter as dsv2 bench does; a round's forecast is the geometric
    mean of what was measured before it and after it. CliError."""
    found, kv = made.subject.found, made.memory.kv_type
    depths = [s.depth for s in made.decode if s.depth <= MOST_DEPTH]
    tests = [Test("prefill", PROMPT), *(Test("decode", N_DECODE, depth) for depth in depths)]
    n_ctx = max(test.depth + test.n for test in tests)
    total, done = (rounds + 1) * (len(tests) + 1), 0
    with Gguf(found.path) as gguf:
        work = work_of(list(gguf.tensors), found.keys)
    foretold: list[list[float]] = []
    measured: list[list[float]] = []
    with benchmark.contender(OURS, found.path, n_ctx, threads) as runs:
        for i in range(rounds + 1):
            rates = []
            for test in tests:
                told(test.name, done, total)
                done += 1
                rates.append(_rate(runs, test, f"kv={kv}"))
            if i:  # the first warms up
                measured.append(rates)
            told("this machine", done, total)
            done += 1
            foretold.append(_foretold(made, work, threads, len(depths)))
    pairs = [list(zip(*pair, strict=True)) for pair in itertools.pairwise(foretold)]
    compared = [
        Compared(
            f"decode at {test.depth}" if test.kind == "decode" else test.name,
            tuple(math.sqrt(pair[i][0] * pair[i][1]) for pair in pairs), tuple(row[i] for row in measured),
            CHECKED[test.kind], tuple(max(pair[i]) / min(pair[i]) - 1 for pair in pairs),
        )
        for i, test in enumerate(tests)
    ]  # fmt: skip
    told("memory", total, total)
    return (*compared, _memory(made, threads))


def _rate(runs: Contender, test: Test, variant: str) -> float:
    """The median of as many as take LEAST_SECONDS, at most MOST_RUNS."""
    rates: list[float] = []
    while len(rates) < MOST_RUNS and sum(test.n / rate for rate in rates) < LEAST_SECONDS:
        rates.append(runs.rate(test, variant))
    return statistics.median(rates)


def _foretold(made: Forecast, work: Work, threads: int | None, n_depths: int) -> list[float]:
    """Of each test, from this machine as it is now. CliError."""
    found = made.subject.found
    rates = probe.measure(found, made.memory.kv_type, threads, free_bytes(swap=False))
    if isinstance(rates, str):
        raise CliError(rates, "it could be measured before: something else takes what was free")
    decode, prefill = speeds(found, work, rates)
    return [prefill.rate, *(speed.rate for speed in decode[:n_depths])]


def _text(found: Anatomy, n_most: int) -> str:
    """Of fewer tokens than so many, in the model's own vocabulary."""
    from cext.tokenizer import Tokenizer
    from quantize.source.corpus import DEFAULT_FILES

    text = DEFAULT_FILES[0].read_text(encoding="utf-8")[:TEXT_CHARACTERS]
    with Tokenizer(found.path) as tokenizer:
        while text and len(tokenizer.prompt(text)) >= n_most:
            text = text[: len(text) // 2]
    return text


def _memory(made: Forecast, threads: int | None) -> Compared:
    """Of a process that chats: it reads a text, which makes it touch the weights, and answers. Of a prompt the last
    layer computes the last token alone: its experts are touched by the answer, nearly all of them by so long a one."""
    found, kv = made.subject.found, made.memory.kv_type
    trained, n_expert = count(found.keys, "context_length"), count(found.keys, "expert_count")
    n_ctx = min(CONTEXT, trained or CONTEXT)
    n_answer = min(n_ctx // 2, 2 + ANSWERS * n_expert // max(1, count(found.keys, "expert_used_count")))
    text = _text(found, n_ctx - n_answer)
    asked = ["chat", str(found.path), "--raw", "-p", text]
    asked += ["-n", str(n_answer), "-c", str(n_ctx), "--kv", kv]
    command = [sys.executable, "-P", "-c", "from dsv2cli.app import main; main()", *asked, "--json"]
    command += ["-t", str(threads)] if threads else []
    done = subprocess.run(command, env=benchmark.environment(), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CliError("dsv2 chat failed where its memory was to be measured", console.fold(done.stderr[-200:]))
    answer = json.loads(done.stdout)
    n_held = -(-(answer["prompt_tokens"] + answer["answer_tokens"]) // BLOCK_TOKENS) * BLOCK_TOKENS
    cache = found.kv_bytes[kv] * n_held
    predicted = made.memory.total - made.memory.cache + cache
    if any(p.name == HEAD for p in found.parts):  # else the embeddings are read whole as the head
        predicted -= _untouched(found, text + answer["answer"])
    return Compared("memory", (predicted,), (answer["resident_bytes"],), CHECKED["memory"])


def _untouched(found: Anatomy, text: str) -> int:
    """Bytes of the embeddings that lie in other pages than the rows of a text's tokens, as the system's cache holds
    the file."""
    from cext.tokenizer import Tokenizer

    with Tokenizer(found.path) as tokenizer:
        ids = set(tokenizer.prompt(text))
    with Gguf(found.path) as gguf:
        rows = next(t for t in gguf.tensors if t.name == "token_embd.weight")
    held, huge = cached_pages(found.path) or (0.0, 0.0)
    page, row = HUGE_PAGE if huge > held / 2 else AROUND, rows.nbytes // rows.shape[-1]
    pages = {at // page for i in ids for at in (rows.offset + i * row, rows.offset + (i + 1) * row - 1)}
    return max(0, rows.nbytes - page * len(pages))
