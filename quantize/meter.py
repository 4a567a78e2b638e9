"""meter.py: how far a run is, for whoever shows it. Turns steps of stages into shares of the whole and times left."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

Phase = Literal["survey", "write", "evaluate"]
Stage = Literal["read", "survey", "allocate", "calibrate", "search", "encode", "evaluate", "finish"]


@dataclass(frozen=True)
class Progress:
    """One step of a run. layer is -1 outside the layers; fraction is of the whole run, for a bar and the time left."""

    stage: Stage
    layer: int
    n_layer: int
    fraction: float
    bytes_written: int
    bytes_total: int
    n_values: int  # weights of the file
    seconds: float  # since this run began, or went on
    seconds_left: float  # at the pace so far; infinite before there is one
    layer_seconds_left: float  # of this layer in this phase
    values_per_second: float  # weights written, in this phase of this run


OnProgress = Callable[[Progress], None]


class Meter:
    """Tells on_progress how far the run is. phases: those that the run will go through, in order, and what they take
    next to each other.
    """

    def __init__(
        self, on_progress: OnProgress | None, phases: Mapping[Phase, float], n_layer: int, n_values: int
    ) -> None:
        whole = sum(phases.values())
        self._shares = {phase: effort / whole for phase, effort in phases.items()}
        self._on_progress = on_progress
        self._n_layer, self._n_values = n_layer, n_values
        self.started = time.monotonic()
        self.bytes_written = self.bytes_total = 0
        self._before = self._share = 0.0  # of the whole: phases done, this phase
        self._within = 0.0  # of this phase
        self._skipped = 0.0  # of the whole: done by an earlier run
        self._n_written, self._phase_began = 0, 0.0
        self._layer = (-1, 0.0, 0.0)  # number, when it began, how far the phase was

    @property
    def seconds(self) -> float:
        """Since the run began, or went on."""
        return time.monotonic() - self.started

    def begin(self, phase: Phase, done: float = 0.0) -> None:
        """A phase begins; done: the fraction of it that an earlier run did already."""
        phases = list(self._shares)
        self._before = sum(self._shares[p] for p in phases[: phases.index(phase)])
        self._share = self._shares[phase]
        self._skipped += self._share * done
        self._within = done
        self._n_written, self._phase_began = 0, self.seconds
        self._layer = (-1, self.seconds, done)

    def skip(self, phase: Phase) -> None:
        """An earlier run did the whole phase."""
        self.begin(phase, 1.0)

    def wrote(self, n_bytes: int, n_values: int) -> None:
        """So many bytes of the file, that many weights, were written."""
        self.bytes_written += n_bytes
        self._n_written += n_values

    def tell(self, stage: Stage, il: int = -1, within: float | None = None, layer_share: float = 0.0) -> None:
        """within: how far the phase is; None: as far as before. layer_share: what layer il is of the phase."""
        if self._on_progress is None:
            return
        self._within = max(self._within, min(1.0, within)) if within is not None else self._within
        if il != self._layer[0]:
            self._layer = (il, self.seconds, self._within)
        fraction = 1.0 if stage == "finish" else min(1.0, self._before + self._share * self._within)
        self._on_progress(
            Progress(
                stage,
                il,
                self._n_layer,
                fraction,
                self.bytes_written,
                self.bytes_total,
                self._n_values,
                self.seconds,
                _left(self.seconds, fraction - self._skipped, 1.0 - self._skipped),
                _left(self.seconds - self._layer[1], self._within - self._layer[2], layer_share),
                self._n_written / max(self.seconds - self._phase_began, 1e-9),
            )
        )


def _left(seconds: float, done: float, whole: float) -> float:
    """Time left of what took seconds for a part done of the whole."""
    return seconds * max(0.0, whole / done - 1) if done > 1e-9 else float("inf")
