"""reading.py: how fast a GPU and the processor read memory: whether a card pays where none is named, since decoding
waits for little else. Both are measured once, a card in well under a tenth of a second, and kept."""

from __future__ import annotations

import contextlib
import json
import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dsv2cli import state

if TYPE_CHECKING:
    from pathlib import Path

    from cext import Gpu

FILE = "reading.json"
CARD_BYTES = 64 << 20
LEAST_BYTES, MOST_BYTES = 64 << 20, 1 << 30  # of the processor's memory: twice its cache, within these
FREE_SHARE = 8  # of the memory that is free at most
ROUNDS = 3  # of which the best counts


@dataclass(frozen=True)
class Reading:
    """Bytes a second that a card reads of its own memory, and the processor of its."""

    card: float
    processor: float

    @property
    def pays(self) -> bool:
        return self.card > self.processor


def measured(gpu: Gpu, threads: int) -> Reading | None:
    """Of a device and of so many threads, as kept or measured now; None where the device cannot be read."""
    from cext import EngineError
    from dsv2cli.benchmark import machine

    file = place / FILE if (place := state.folder()) else None
    kept = _kept(file)
    names = f"{gpu.name}; {gpu.driver}", f"{machine()}; {threads} threads"
    found = {name: kept[name] for name in names if name in kept}
    try:
        if names[0] not in found:
            found[names[0]] = card_rate(gpu)
    except EngineError:
        return None
    if names[1] not in found:
        found[names[1]] = processor_rate(threads)
    if file is not None and not found.keys() <= kept.keys():
        _keep(file, kept | found)
    return Reading(found[names[0]], found[names[1]])


def card_rate(gpu: Gpu) -> float:
    """Bytes a second that a shader reads of its own memory. DeviceError and others of ``cext``."""
    from cext import _engine

    handle = _engine.gpu_open(str(gpu.number))
    try:
        return _engine.gpu_reads(handle, CARD_BYTES)
    finally:
        _engine.gpu_close(handle)


def processor_rate(threads: int) -> float:
    """Bytes a second that so many threads read of what no cache holds."""
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np

    from cext import system

    nbytes = min(max(2 * (system.cache_bytes() or 0), LEAST_BYTES), MOST_BYTES)
    if (free := system.free_bytes(swap=False)) is not None:
        nbytes = min(nbytes, free // FREE_SHARE)
    words = np.ones(max(nbytes // 8, threads), np.int64)
    parts = np.array_split(words, threads)
    best = math.inf
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(ROUNDS):
            begun = time.perf_counter()
            list(pool.map(np.sum, parts))
            best = min(best, time.perf_counter() - begun)
    return words.nbytes / max(best, 1e-9)


def _kept(file: Path | None) -> dict[str, float]:
    """What earlier runs measured; nothing where it is not there or not sound."""
    told: Any = None
    with contextlib.suppress(OSError, ValueError):
        told = json.loads(file.read_text(encoding="utf-8")) if file else None
    if not isinstance(told, dict):
        return {}
    return {name: float(rate) for name, rate in told.items() if isinstance(rate, (int, float)) and _is_rate(rate)}


def _is_rate(rate: float) -> bool:
    return 0 < rate < math.inf


def _keep(file: Path, rates: dict[str, float]) -> None:
    """Or not, where the disk does not take it: it is measured again then."""
    from cext import system

    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with system.replaced(file, lasting=False) as out:
            out.write(json.dumps(rates, indent=1).encode())
