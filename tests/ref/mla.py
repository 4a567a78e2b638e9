"""Multi-head latent attention, DeepSeek-V2 section 2.1, in its two equal forms. Equation numbers are the V2 paper's."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from ref.hparams import Hparams

F64 = NDArray[np.float64]


class Queries(NamedTuple):
    """What asks, and the cache that answers: the last n of its n_kv positions are the queries' own."""

    q_nope: F64  # (n, n_head, qk_nope_head_dim)
    q_pe: F64  # (n, n_head, qk_rope_head_dim), rotated
    c_kv: F64  # (n_kv, kv_lora_rank), normalised
    k_pe: F64  # (n_kv, qk_rope_head_dim), rotated


class UpProjections(NamedTuple):
    """kv_b by head."""

    w_uk: F64  # (n_head, kv_lora_rank, qk_nope_head_dim): k^C = c_kv W_uk, equation (10)
    w_uv: F64  # (n_head, v_head_dim, kv_lora_rank): v^C = W_uv c_kv, equation (11)


def split_kv_b(hp: Hparams, kv_b: F64) -> UpProjections:
    """The legacy attn_kv_b (n_head * (nope + v), kv_lora_rank) as its two parts; head by head, keys before values."""
    per_head = kv_b.reshape(hp.n_head, hp.qk_nope_head_dim + hp.v_head_dim, hp.kv_lora_rank)
    w_uk = per_head[:, : hp.qk_nope_head_dim].transpose(0, 2, 1)
    return UpProjections(w_uk, per_head[:, hp.qk_nope_head_dim :])


def softmax(scores: F64) -> F64:
    shifted: F64 = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


def causal(scores: F64) -> F64:
    """Hide the future from (n_head, n, n_kv) scores: the last query sees all positions, the one before one fewer."""
    _, n, n_kv = scores.shape
    return np.where(np.arange(n_kv) <= n_kv - n + np.arange(n)[:, None], scores, -np.inf)


def mla_scores(hp: Hparams, x: Queries, w_uk: F64) -> F64:
    """Scores without keys, (n_head, n, n_kv): q^C . k^C = (q^C W_uk) . c_kv, so the latent itself is the key."""
    absorbed = np.einsum("thd,hcd->htc", x.q_nope, w_uk)
    scores: F64 = absorbed @ x.c_kv.T + np.einsum("thr,jr->htj", x.q_pe, x.k_pe)
    return scores * hp.attention_scale


def mla_absorbed(hp: Hparams, x: Queries, up: UpProjections) -> F64:
    """Heads (n, n_head * v): W_uv is applied after the mean of the latents, which is linear in them."""
    weights = softmax(causal(mla_scores(hp, x, up.w_uk)))
    latent = weights @ x.c_kv  # (n_head, n, kv_lora_rank)
    heads = np.einsum("htc,hvc->thv", latent, up.w_uv)
    return heads.reshape(len(heads), -1)


def mla_expanded(hp: Hparams, x: Queries, up: UpProjections) -> F64:
    """Heads (n, n_head * v) as the paper writes them, keys and values expanded from the latent: (16) to (18)."""
    k_nope = np.einsum("jc,hcd->jhd", x.c_kv, up.w_uk)  # (10)
    value = np.einsum("jc,hvc->jhv", x.c_kv, up.w_uv)  # (11)
    query = np.concatenate([x.q_nope, x.q_pe], axis=-1)  # (16)
    shared = np.broadcast_to(x.k_pe[:, None, :], (*k_nope.shape[:2], x.k_pe.shape[-1]))
    key = np.concatenate([k_nope, shared], axis=-1)  # (17): one k^R for all heads
    scores = np.einsum("thd,jhd->htj", query, key) * hp.attention_scale
    heads = np.einsum("htj,jhv->thv", softmax(causal(scores)), value)  # (18)
    return heads.reshape(len(heads), -1)
