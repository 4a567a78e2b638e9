"""How near the engine's logits are to the reference's, and prompts on which both route alike."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from ref.model import Model
from support.tiny import Checkpoint, Spec, gguf_tensors, tokens

# The engine works in float32. A product of k terms errs by about sqrt(k) 2^-24 of its size; k is at most 128 here and
# the longest path to a logit has 3 layers of 6 products: 18 sqrt(128) 2^-24 = 1.2e-5 of the logits' range.
FLOAT32 = 1.2e-5


def assert_close(got: ArrayLike, expected: ArrayLike, tolerance: float = FLOAT32) -> None:
    """Within tolerance of the expected values' range; a failure names the worst place."""
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.shape == expected.shape
    error = np.abs(got - expected) / np.ptp(expected)
    worst = np.unravel_index(error.argmax(), error.shape)
    assert error.max() <= tolerance, (
        f"{error.max():.2e} of the range at {worst}: {got[worst]}, expected {expected[worst]}"
    )


def reference(spec: Spec, kind: Any = Model) -> Any:
    """The reference in numpy of a spec's model."""
    return kind(spec.hparams, gguf_tensors(Checkpoint(spec)))


def firm_prompt(ref: Any, spec: Spec, n: int, seed: int) -> tuple[Any, NDArray[Any]]:
    """(ids, logits) of a prompt in which no routing decision is so near that float32 may settle it otherwise."""
    for attempt in range(seed, seed + 1000, 100):
        ids = tokens(spec, n, attempt)
        logits = ref.forward(ids)
        if min((margin.min() for margin in ref.margins), default=1) > FLOAT32:
            return ids, logits
    raise AssertionError("every prompt has a near tie")
