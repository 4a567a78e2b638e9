"""paging.py: how much slower a file that is here is read than the probe's, for the pages that it lies in.

The system's cache holds a file in huge pages or in small ones, as it was read: cold through the engine's own mapping,
in huge ones where kernel and file system have them; by other programs, or just written, often in small ones. To find a
small page takes a walk through tables, so that weights in them come slower, by more the more memory they span: no small
file of holes tells by how much. Where they lie in other pages than the probe's, a few tokens are decoded from the file
itself, in turns with the probe.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cext import system
from dsv2cli.planner.hollow import PROMPT, SEED

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from cext import Model

FEW = 0.05  # of a file's pages, that are not looked into
ROUNDS, TOKENS = 3, 8


@dataclass(frozen=True)
class Cached:
    """In which pages the system's cache holds a model's file: shares of all of it that are held, and held in small ones
    though the probe's file lies in huge ones."""

    held: float
    small: float

    @property
    def matters(self) -> bool:
        """Whether it can be read as it is, and not as the probe's is."""
        return self.held > 1 - FEW and self.small > FEW


def cached(model: Path, probe: Path) -> Cached | None:
    """Of two files, the probe's after it was run. None where the system does not tell."""
    of_probe, of_model = system.cached_pages(probe), system.cached_pages(model)
    if of_probe is None or of_model is None or not of_probe[0]:
        return None
    held, huge = of_model
    return Cached(held, held - huge if of_probe[1] > of_probe[0] / 2 else 0.0)


def slowdown(path: Path, token_bytes: int, probe: Model, probe_bytes: int) -> float:
    """Seconds of a byte decoded from a file, relative to one of the probe's: the median of rounds in turns, at least 1.
    token_bytes, probe_bytes: what a token reads of each."""
    from cext import Model

    with Model(path, probe.threads) as model:
        n = min(PROMPT, *(m.hparams["n_vocab"] for m in (model, probe)))
        ids = np.random.default_rng(SEED).integers(0, n, TOKENS + 1, np.int32)
        theirs, ours = probe.session(TOKENS + 1), model.session(TOKENS + 1)
        ratios = []
        for i in range(ROUNDS + 1):  # the first maps the pages
            beside, own = decode_seconds(theirs, ids) / probe_bytes, decode_seconds(ours, ids) / token_bytes
            if i:
                ratios.append(own / beside)
    return max(1.0, statistics.median(ratios))


def decode_seconds(session: Any, ids: NDArray[np.int32]) -> float:
    """Of a token, each another than before: they choose experts from all of them."""
    session.rewind(0)
    session.eval(ids[:1])  # wakes the workers
    begun = time.perf_counter()
    for i in range(1, len(ids)):
        session.eval(ids[i : i + 1])
    return (time.perf_counter() - begun) / (len(ids) - 1)
