"""Made-up inputs of a matrix, as a model's are: correlated, and of channels that differ in size."""

import numpy as np


def correlated(rng: np.random.Generator, n_tokens: int, n: int, rank: int, spread: float) -> np.ndarray:
    """(n_tokens, n) float32: rank common directions, noise, and channels whose log sizes have a deviation of spread."""
    common = rng.standard_normal((n_tokens, rank)) @ rng.standard_normal((rank, n))
    return ((common + rng.standard_normal((n_tokens, n))) * np.exp(rng.normal(0, spread, n))).astype(np.float32)
