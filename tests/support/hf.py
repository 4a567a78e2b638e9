"""transformers as an oracle: a tiny checkpoint's logits in float32 on the CPU. Import only where PyTorch may be."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import ArrayLike, NDArray
from support.tiny import Checkpoint


def load(folder: Path, eps: float | None = None) -> Any:
    """A Hugging Face folder as a float32 model with eager attention; every tensor of it must be used, and be enough.

    eps: for all norms. transformers gives the two latent norms 1e-6 whatever the config says; a GGUF has one key.
    """
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",  # the grouped product refuses rows that are not multiples of 16 bytes
        output_loading_info=True,
    )
    unmatched = {key: value for key, value in info.items() if value}
    if unmatched:
        raise ValueError(f"{folder}: checkpoint and model do not match: {unmatched}")
    if eps is not None:
        for module in model.modules():
            if hasattr(module, "variance_epsilon"):
                module.variance_epsilon = eps
    return model.eval()


def logits(model: Any, ids: ArrayLike) -> NDArray[np.float32]:
    """Logits after each token, (n, n_vocab)."""
    with torch.no_grad():
        out: NDArray[np.float32] = model(torch.tensor(np.asarray(ids, dtype=np.int64))[None]).logits[0].numpy()
    return out


def tiny_logits(checkpoint: Checkpoint, ids: ArrayLike) -> NDArray[np.float32]:
    with tempfile.TemporaryDirectory() as folder:
        return logits(load(checkpoint.write(Path(folder)), checkpoint.spec.eps), ids)


def versions() -> str:
    return f"transformers {transformers.__version__}, torch {torch.__version__}"
