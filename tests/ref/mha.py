"""Plain multi-head attention (Vaswani et al. 2017, section 3.2) with rotated queries and keys, as Llama has it.

Heads of queries may share heads of keys and values (arXiv 2305.13245).
"""

import numpy as np
from numpy.typing import NDArray
from ref.hparams import Hparams
from ref.mla import causal, softmax

F64 = NDArray[np.float64]


def heads_of(hp: Hparams, q: F64, k: F64, v: F64) -> F64:
    """Heads (n, n_head * v) of rotated q (n, n_head, d) over k (n_kv, n_head_kv, d) and v (n_kv, n_head_kv, v)."""
    share = hp.n_head // hp.n_head_kv
    key, value = np.repeat(k, share, axis=1), np.repeat(v, share, axis=1)
    scores = np.einsum("thd,jhd->htj", q, key) * hp.attention_scale
    heads = np.einsum("htj,jhv->thv", softmax(causal(scores)), value)
    return heads.reshape(len(heads), -1)
