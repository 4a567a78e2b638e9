"""The trained models beside the repository, and how their perplexity is measured.

The measure is that of the quality figures: the held-out text cut into windows of 512 tokens, the first 128 of each not
scored, 24 windows: 9,192 tokens.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from support.scoring import token_losses

MODELS = ("storyteller-52m", "fixture-12m")
WINDOW, UNSCORED, N_WINDOWS = 512, 128, 24
Logits = Callable[[NDArray[np.int32]], NDArray[np.float32]]  # ids (n,) -> (n, n_vocab)


def golden_path(name: str) -> Path:
    return Path(__file__).parent.parent / "golden" / "trained" / f"{name}.npz"


def windows(ids: NDArray[np.int32], n_windows: int = N_WINDOWS) -> NDArray[np.int32]:
    """The first windows of a text's ids, (n_windows, WINDOW)."""
    return ids[: n_windows * WINDOW].reshape(n_windows, WINDOW)


def losses(logits: Logits, text: NDArray[np.int32]) -> NDArray[np.float64]:
    """Nats for each scored token, (windows, WINDOW - 1 - UNSCORED)."""
    return np.stack([token_losses(logits(ids), ids)[UNSCORED:] for ids in text])


def fingerprint(folder: Path) -> str:
    """A hash of a checkpoint's weights."""
    digest = hashlib.sha256()
    for shard in sorted(folder.glob("*.safetensors")):
        digest.update(shard.read_bytes())
    return digest.hexdigest()
