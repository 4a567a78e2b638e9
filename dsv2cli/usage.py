"""usage.py: which experts of a model were used, remembered from run to run: what to keep in memory where not all fit.

Counts begin with those of the file's calibration, where it has them, and go on with what each run adds. They change
what is read and never what is computed: where they cannot be read or written, are damaged or another model's, a run
begins without them and nobody complains.

A file: magic "DSV2USES", version u32, layers u32, experts u32, tokens u64, the counts (u64 each), and blake2b of all
that, 16 bytes; all little-endian. Its name is the model's identity.
"""

from __future__ import annotations

import contextlib
import os
import struct
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv2cli import state

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from cext import Model

    Counts = NDArray[np.uint64]

MAGIC, VERSION = b"DSV2USES", 1
HEADER = struct.Struct("<8sIIIQ")
DIGEST_BYTES = 16
SAMPLES, SAMPLE_BYTES = 16, 1 << 12
PRIOR_TOKENS = 2048  # that a calibration counts for, however long it was
MOST_TOKENS = 1 << 16  # beyond them all counts are halved: what is of late counts more
KEPT = 64  # models that are remembered, the latest


@dataclass(frozen=True)
class Usage:
    """What is known of a model before it is opened. learnt: (n_layer, n_expert), of ``tokens`` tokens in runs before;
    counts: the same with the calibration's."""

    file: Path | None
    learnt: Counts
    tokens: int
    counts: Counts


def known(path: Path) -> Usage | None:
    """Of a GGUF, or the first part of one; None where it is not one that the engine runs, or has no experts."""
    import numpy as np

    from cext import EngineError, Gguf
    from cext.model import shape_of

    try:
        with Gguf(path) as gguf:
            shape, _ = shape_of(gguf)
            told = gguf.metadata.get("dsv2.expert_usage")
            name = _identity(path)
    except (EngineError, OSError):
        return None
    size = shape["n_layer"], shape["n_expert"]
    if not size[1]:
        return None
    place = state.folder()
    file = place / "usage" / name if place else None
    learnt, tokens = _read(file, size)
    prior = _prior(told, size, shape["n_expert_used"])
    return Usage(file, learnt, tokens, learnt + prior if prior is not None else np.array(learnt))


def calibrated(path: Path) -> Counts | None:
    """What a GGUF says of its calibration alone, the same in every run; None where it says nothing that is sound."""
    from cext import EngineError, Gguf
    from cext.model import shape_of

    try:
        with Gguf(path) as gguf:
            shape, _ = shape_of(gguf)
            told = gguf.metadata.get("dsv2.expert_usage")
    except EngineError:
        return None
    return _prior(told, (shape["n_layer"], shape["n_expert"]), shape["n_expert_used"])


def learn(usage: Usage | None, model: Model) -> None:
    """Add what a model that reads its experts from the drive counted; for when it is about to be closed."""
    from cext import EngineError

    if usage is None or usage.file is None:
        return
    with contextlib.suppress(OSError, EngineError, ValueError):
        counted = model.drive_counts()
        tokens = sum(counts.tokens for counts in counted or ())
        if tokens:
            # Another run may have written since.
            learnt, before = _read(usage.file, usage.learnt.shape)
            _write(usage.file, learnt + model.expert_uses(), before + tokens)
            _forget(usage.file.parent)


def _identity(path: Path) -> str:
    """Of its size, and pieces from all over it: a copy has the same."""
    size = path.stat().st_size
    whole = blake2b(struct.pack("<Q", size), digest_size=DIGEST_BYTES)
    with path.open("rb") as file:
        for i in range(SAMPLES):
            file.seek(max(0, size - SAMPLE_BYTES) * i // (SAMPLES - 1))
            whole.update(file.read(SAMPLE_BYTES))
    return whole.hexdigest()


def _prior(told: Any, size: tuple[int, int], n_used: int) -> Counts | None:
    """A calibration's counts, scaled to PRIOR_TOKENS in each layer; None where the file has none that are sound."""
    import numpy as np

    if not isinstance(told, list) or len(told) != size[0] * size[1]:
        return None
    if not all(isinstance(n, int) and 0 <= n < 1 << 48 for n in told):
        return None
    counts = np.array(told, np.float64).reshape(size)
    scaled: Counts = np.rint(counts * (PRIOR_TOKENS * n_used) / np.maximum(counts.sum(1, keepdims=True), 1)).astype(
        np.uint64
    )
    return scaled


def _read(file: Path | None, size: tuple[int, ...]) -> tuple[Counts, int]:
    """Counts and their tokens; zeros where there is nothing sound."""
    import numpy as np

    with contextlib.suppress(OSError):
        content = file.read_bytes() if file else b""
        packed, seal = content[:-DIGEST_BYTES], content[-DIGEST_BYTES:]
        if len(content) == HEADER.size + 8 * size[0] * size[1] + DIGEST_BYTES and seal == _seal(packed):
            magic, version, *shape, tokens = HEADER.unpack(packed[: HEADER.size])
            if (magic, version, *shape) == (MAGIC, VERSION, *size):
                counts = np.frombuffer(packed, "<u8", offset=HEADER.size).reshape(size)
                return counts.astype(np.uint64), int(tokens)
    return np.zeros(size, np.uint64), 0


def _write(file: Path, counts: Counts, tokens: int) -> None:
    """The whole file or none of it. OSError."""
    while tokens > MOST_TOKENS:
        counts, tokens = counts // 2, tokens // 2
    packed = HEADER.pack(MAGIC, VERSION, *counts.shape, tokens) + counts.astype("<u8").tobytes()
    file.parent.mkdir(parents=True, exist_ok=True)
    from cext import system

    with system.replaced(file, lasting=False) as out:
        out.write(packed + _seal(packed))


def _forget(folder: Path) -> None:
    """All but the latest files, with what killed runs left. OSError."""
    files = [(entry.stat().st_mtime_ns, entry.path) for entry in os.scandir(folder) if entry.is_file()]
    for _, path in sorted(files, reverse=True)[KEPT:]:
        Path(path).unlink(missing_ok=True)


def _seal(packed: bytes) -> bytes:
    return blake2b(packed, digest_size=DIGEST_BYTES).digest()
