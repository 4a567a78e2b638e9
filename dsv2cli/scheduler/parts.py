"""Prompts beside answers: pieces of them are computed some layers at a time, between two steps of the answers.

Answers wait for all of a step that they share with a prompt. In a mixture of experts few tokens cost nearly as much as
many, since each takes experts of its own: steps short enough to share would read a long prompt for ten times as long as
it takes alone. Layers, of however many tokens, are as many as there is time for.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from cext import MAX_STEP

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from dsv2cli.scheduler.sequence import Sequence

LEAST_SHARE = 0.25  # of a step of answers that takes longer than a turn: what prompts have nevertheless
FEWEST, FIRST, MOST = 32, 64, MAX_STEP // 2  # tokens of a piece
LAYERS_A_TURN = 6  # at least, of a piece whose turn is a whole one: the time that a turn goes over is a layer's
CALL_SECONDS = 0.01  # quicker layers are computed together


class Layers(Protocol):
    """A step that is computed some layers at a time: a ``cext.Reading``."""

    left: int

    def run(self, n_layers: int) -> NDArray[np.float32] | None: ...
    def close(self) -> None: ...


# ``cext.Reading``: of tokens of several sessions, of how many of each one's last the logits are wanted.
Begin = Callable[[list[tuple[Any, list[int]]], list[int]], Layers]
# A sequence's part in a step: tokens, and of how many of the last ones the logits are wanted.
Share = tuple["Sequence", list[int], int]


@dataclass(eq=False)
class Part:
    """A piece under way."""

    shares: list[Share]
    layers: Layers
    n_tok: int
    seconds: float = 0.0
    n_run: int = 0


class Parts:
    """The pieces that are under way, and how much of them fits in a turn. A turn is a step of answers, which take what
    they take, and the layers after it, together of ``seconds``."""

    def __init__(self, begin: Begin, seconds: float, clock: Callable[[], float] = time.perf_counter) -> None:
        self._begin, self._seconds, self._clock = begin, seconds, clock
        self.under_way: deque[Part] = deque()
        self.n_tok = FIRST  # of the next piece
        self._answers: float | None = None  # seconds of the step before, where one was
        self._share = self._ends = 0.0  # of the turn: seconds of its layers, and when they end
        self._is_first = True
        self._layer = 0.0  # seconds, of the piece that was computed last, and how many tokens it has
        self._layer_tok = 1
        self._n_runs = 0

    @property
    def is_next(self) -> bool:
        """Answers have had their step."""
        return self._answers is not None

    def answered(self, begun: float | None) -> None:
        """A step of answers, begun then, is over; None: there was none."""
        self._answers = None if begun is None else self._clock() - begun

    def now(self) -> float:
        return self._clock()

    def begin(self, shares: list[Share]) -> None:
        batch = [(sequence.context.session, ids) for sequence, ids, _ in shares]
        layers = self._begin(batch, [n for _, _, n in shares])
        self.under_way.append(Part(shares, layers, sum(len(ids) for _, ids in batch)))

    def begin_turn(self) -> None:
        answers = self._answers or 0.0
        self._share = max(self._seconds - answers, LEAST_SHARE * answers)
        self._ends = self._clock() + self._share
        self._answers = None
        self._is_first = True

    def fits(self, part: Part) -> int:
        """How many layers of it are computed next in this turn; one of the turn's first piece in any case."""
        layer = self._layer * max(1.0, part.n_tok / self._layer_tok)
        known = self._n_runs > 1  # the first layer of a model may be smaller than the others
        n = max(1, int(CALL_SECONDS / max(layer, 1e-6))) if known else 1
        n = min(n, part.layers.left)
        return n if self._is_first or self._clock() + n * layer <= self._ends else 0

    def run(self, part: Part, n_layers: int) -> NDArray[np.float32] | None:
        """Compute so many layers; the logits with the last."""
        self._is_first = False
        begun = self._clock()
        logits = part.layers.run(n_layers)
        seconds = self._clock() - begun
        self._layer = max(seconds / n_layers, 0.9 * self._layer)  # what was slow may be so again
        self._layer_tok = part.n_tok
        self._n_runs += 1
        part.seconds, part.n_run = part.seconds + seconds, part.n_run + n_layers
        if logits is not None:
            self._size(part)
        return logits

    def _size(self, part: Part) -> None:
        """The next piece has as many tokens as keep a layer short; no more for one that had fewer than it might."""
        wanted = max(self._seconds / LAYERS_A_TURN, self._share / 2)
        factor = wanted / max(part.seconds / part.n_run, 1e-6)
        found = round(self.n_tok * min(2.0, max(0.5, factor)))
        if part.n_tok >= self.n_tok or found < self.n_tok:
            self.n_tok = min(max(FEWEST, found), MOST)

    def drop(self, is_there: Callable[[Sequence], bool]) -> None:
        """End the pieces of which no sequence is there any more."""
        for part in [p for p in self.under_way if not any(is_there(s) for s, _, _ in p.shares)]:
            self.under_way.remove(part)
            part.layers.close()
