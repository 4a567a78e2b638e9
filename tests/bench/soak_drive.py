"""An hour of random prompts within a budget: memory stays flat, and every logit is the mapped run's, bit for bit.

    python tests/bench/soak_drive.py MODEL.gguf --ram 1.5 --minutes 60 -o soak.csv

The model is opened twice in this process: with its experts within --ram GiB, and mapped whole. Both read the same
random prompt of 1 to 1,000 tokens and decode a few tokens; now and then two conversations decode in one step, a
conversation is a fork of the one before, and a step is stopped while it waits for the drive, and made again. A row a
minute: the process's own memory (slots and caches, not the file's pages), the hit rate of the decoded tokens' experts,
differences. Ends with 1 where anything differed or memory grew by more than 1 % after the first tenth of the time.
"""

import argparse
import random
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import bench_rows
import numpy as np

from cext import Model, Session, StoppedError, eval_batch
from cext.system import own_bytes, resident_bytes

GIB = 1 << 30
N_CTX, MOST_PROMPT, MOST_DECODED = 2048, 1000, 24
FLAT = 0.01


@dataclass(frozen=True)
class Row:
    minute: float
    prompts: int
    tokens: int
    stopped: int  # steps
    different: int  # rows of logits
    own_bytes: int
    resident_bytes: int
    hit: float  # of the decoded tokens' experts so far


@dataclass
class Pair:
    """The same conversation within a budget and mapped."""

    ours: Session
    mapped: Session

    @property
    def n_past(self) -> int:
        return self.mapped.n_past

    def fork(self, n: int) -> "Pair":
        return Pair(self.ours.fork(n), self.mapped.fork(n))


class Soak:
    def __init__(self, ours: Model, mapped: Model, seed: int) -> None:
        self.ours, self.mapped = ours, mapped
        self.random, self.rng = random.Random(seed), np.random.default_rng(seed)
        self.prompts = self.tokens = self.stopped = self.different = 0
        self.last: Pair | None = None

    def ids(self, n: int) -> np.ndarray:
        self.tokens += n
        return self.rng.integers(0, self.mapped.hparams["n_vocab"], n, np.int32)

    def step(self, work: list[tuple[Pair, np.ndarray]]) -> None:
        """Of one or several conversations; counts rows of logits that differ."""
        begun = [pair.ours.n_past for pair, _ in work]
        while True:
            try:
                ours = eval_batch([(pair.ours, ids) for pair, ids in work])
                break
            except StoppedError:
                self.stopped += 1
                for (pair, _), n in zip(work, begun, strict=True):
                    pair.ours.rewind(n)
        mapped = eval_batch([(pair.mapped, ids) for pair, ids in work])
        self.different += sum(not np.array_equal(a, b) for a, b in zip(ours, mapped, strict=True))

    def begin(self) -> Pair:
        if self.last is not None and self.random.random() < 0.3:
            return self.last.fork(self.random.randint(1, self.last.n_past))
        return Pair(self.ours.session(N_CTX), self.mapped.session(N_CTX))

    def conversation(self) -> None:
        pair = self.begin()
        most = min(MOST_PROMPT, N_CTX - 2 * MOST_DECODED - 2 - pair.n_past)
        stop = threading.Timer(2 * self.random.random(), self.ours.stop)
        if self.random.random() < 0.2:
            stop.start()
        if most > 0:
            self.step([(pair, self.ids(int(most ** self.random.random())))])
        for _ in range(self.random.randint(1, MOST_DECODED)):
            beside = self.last if self.last and self.random.random() < 0.3 and self.last.n_past < N_CTX - 1 else None
            self.step([(each, self.ids(1)) for each in (pair, beside) if each])
        stop.cancel()
        self.prompts += 1
        self.last = pair


def rows(soak: Soak, seconds: float) -> Iterator[Row]:
    begun = time.monotonic()
    told = begun
    while (now := time.monotonic()) - begun < seconds:
        soak.conversation()
        if now - told < 60:
            continue
        told = now
        counts = soak.ours.drive_counts()
        hit = counts[0].ready / max(1, counts[0].needed) if counts else 1.0
        row = Row(
            (now - begun) / 60, soak.prompts, soak.tokens, soak.stopped, soak.different,
            own_bytes() or -1, resident_bytes(), hit,
        )  # fmt: skip
        print(f"{row.minute:.0f} min: {row}", file=sys.stderr)
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--ram", type=float, required=True, metavar="GIB", help="for weights")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("-o", "--output", type=Path, help="CSV; stdout if left out")
    asked = parser.parse_args()
    ram = int(asked.ram * GIB)
    with Model(asked.model, asked.threads, ram=ram) as ours, Model(asked.model, asked.threads) as mapped:
        made = bench_rows.write(Row, rows(Soak(ours, mapped, asked.seed), 60 * asked.minutes), asked.output)
    if not made:
        sys.exit("error: a row takes a minute")
    first, last = made[len(made) // 10], made[-1]
    grown = last.own_bytes / first.own_bytes - 1
    print(
        f"{last.prompts} prompts, {last.tokens} tokens, {last.stopped} steps stopped: {last.different} rows differ;"
        f" own memory {first.own_bytes / 1e6:.1f} to {last.own_bytes / 1e6:.1f} MB ({grown:+.2%}), hit {last.hit:.3f}"
    )
    sys.exit(last.different > 0 or grown > FLAT)


if __name__ == "__main__":
    main()
