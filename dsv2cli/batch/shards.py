"""A batch in parts, for several machines: each line is in one of them, the same wherever it is asked."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from dsv2cli.batch.lines import Bad, Line
from dsv2cli.errors import UsageError

RUN = 64  # lines that stay together at most: neighbours often begin alike
MOST = 10_000


@dataclass(frozen=True)
class Shard:
    """Part ``index`` (from 1) of ``count``."""

    index: int = 1
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        """i/n. UsageError."""
        found = re.fullmatch(r"([0-9]{1,5})/([0-9]{1,5})", text)
        shard = cls(int(found[1]), int(found[2])) if found else cls(0, 0)
        if not 1 <= shard.index <= shard.count <= MOST:
            raise UsageError(f"--shard {text!r} is no part", "as 2/4, the second of four")
        return shard

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def numbers(self, lines: Sequence[Line], bad: Sequence[Bad]) -> set[int]:
        """The numbers of this part's lines, of all that there are: runs of lines, dealt in turns."""
        numbers = sorted([line.number for line in lines] + [one.number for one in bad])
        run = min(max(len(numbers) // (16 * self.count), 1), RUN)
        return {number for i, number in enumerate(numbers) if i // run % self.count == self.index - 1}
