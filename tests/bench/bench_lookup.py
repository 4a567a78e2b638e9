"""Prompt lookup on real edits: the time to write a file anew after its old version, with drafts and without, as CSV.

    python tests/bench/bench_lookup.py MODEL.gguf OLD:NEW [OLD:NEW]... [--lookup 0,3,7] [--limit N]
        [--rounds N] [-o FILE]

What is written is given: the engine evaluates the steps that a model would which writes exactly NEW, so the figure is
of the engine and of the text, whatever the weights. The settings take turns, round by round; a ratio is to the first
setting in the same round.
"""

import argparse
import csv
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cext
from cext.tokenizer import Tokenizer
from dsv2cli.scheduler import Context, Lookup, Scheduler, Stats, Text
from dsv2cli.scheduler import Sequence as Answer

COLUMNS = ("edit", "lookup", "tokens", "drafted", "taken", "tok_s_median", "ratio_min", "ratio_median", "ratio_max")


class Dictated:
    """A sampler that chooses what it was told."""

    def __init__(self, ids: Sequence[int]) -> None:
        self._ids = iter(ids)

    def sample(self, logits: object) -> int:
        return next(self._ids)

    def accept(self, ids: Sequence[int]) -> None:
        pass


def write(tokenizer: Tokenizer, context: Context, old: list[int], new: list[int], lookup: int) -> Stats:
    """Read ``old`` if it is not in the cache yet, then write ``new``."""
    answer = Answer(
        context,
        old,
        Dictated(new),
        Text(tokenizer.stream()),
        lambda token: False,
        limit=len(new),
        drafter=Lookup(lookup) if lookup else None,
    )
    scheduler = Scheduler()
    scheduler.add(answer)
    for _ in scheduler.run():
        pass
    return answer.stats


def run(options: argparse.Namespace, pair: str) -> list[dict[str, Any]]:
    texts = [Path(name).read_text(encoding="utf-8") for name in pair.split(":", 1)]
    tokenizer = Tokenizer(options.model)
    old, new = (list(tokenizer.encode(text))[: options.limit] for text in texts)
    context = Context(options.opened.session(len(old) + len(new) + 8))
    rounds: list[dict[int, Stats]] = []
    for number in range(options.rounds + 1):
        rounds.append({k: write(tokenizer, context, old, new, k) for k in options.lookup})
        print(
            f"{pair}, round {number}: {[round(s.decode_rate, 2) for s in rounds[-1].values()]} tok/s", file=sys.stderr
        )
    del rounds[0]  # it warms up
    rows = []
    for k in options.lookup:
        ratios = [r[k].decode_rate / r[options.lookup[0]].decode_rate for r in rounds]
        figures = (
            statistics.median(r[k].decode_rate for r in rounds),
            min(ratios),
            statistics.median(ratios),
            max(ratios),
        )
        counts = (pair, k, len(new), rounds[0][k].n_drafted, rounds[0][k].n_taken)
        rows.append(dict(zip(COLUMNS, (*counts, *(round(x, 3) for x in figures)), strict=True)))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("pairs", nargs="+", metavar="OLD:NEW")
    parser.add_argument("--lookup", type=lambda s: [int(x) for x in s.split(",")], default=[0, 3, 7])
    parser.add_argument("--limit", type=int, default=1000, help="tokens of each text")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    options.opened = cext.Model(options.model, options.threads)
    with options.output.open("w", newline="") if options.output else sys.stdout as file:
        out = csv.DictWriter(file, COLUMNS)
        out.writeheader()
        for pair in options.pairs:
            out.writerows(run(options, pair))


if __name__ == "__main__":
    main()
