"""How the tests judge logits: perplexity, divergence, error."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

F64 = NDArray[np.float64]


def log_softmax(logits: ArrayLike) -> F64:
    shifted: F64 = np.asarray(logits, dtype=np.float64)
    shifted = shifted - shifted.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def token_losses(logits: ArrayLike, ids: ArrayLike) -> F64:
    """Nats for each next token: logits (n, n_vocab) after ids (n,) give (n - 1,)."""
    ids = np.asarray(ids)
    return -log_softmax(logits)[np.arange(len(ids) - 1), ids[1:]]


def perplexity(logits: ArrayLike, ids: ArrayLike) -> float:
    return float(np.exp(token_losses(logits, ids).mean()))


def divergence(reference: ArrayLike, logits: ArrayLike) -> F64:
    """Kullback-Leibler divergence from the reference's distribution at each token, (n,)."""
    p, q = log_softmax(reference), log_softmax(logits)
    return (np.exp(p) * (p - q)).sum(axis=-1)


def relative_error(logits: ArrayLike, exact: F64) -> F64:
    """Root mean square over the vocabulary at each token, relative to the logits' spread, (n,)."""
    return np.sqrt(((np.asarray(logits) - exact) ** 2).mean(axis=1)) / exact.std()
