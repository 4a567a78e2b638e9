"""Which experts a token goes to, and with what weights: both routers of the family."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from ref.hparams import Hparams
from ref.mla import softmax

F64 = NDArray[np.float64]


class Routing(NamedTuple):
    experts: NDArray[np.int64]  # (n, n_expert_used), best first
    weights: F64  # (n, n_expert_used)
    margin: F64  # (n,) how far the choice is from another one: the least gap at the border of groups or experts


def top_k(scores: F64, k: int) -> tuple[NDArray[np.int64], F64]:
    """Indices of the k largest of each row (n, k), and the gap to the next one (n,), infinite where there is none."""
    order = np.argsort(-scores, axis=-1, kind="stable")
    ranked = np.take_along_axis(scores, order, axis=-1)
    with np.errstate(invalid="ignore"):
        gap = ranked[:, k - 1] - ranked[:, k] if k < scores.shape[-1] else np.full(len(scores), np.inf)
    return order[:, :k], gap


def keep_groups(hp: Hparams, scores: F64, group_scores: F64) -> tuple[F64, F64]:
    """Scores with those outside the best n_expert_group_used groups at minus infinity, and the gap between groups."""
    kept, gap = top_k(group_scores, hp.n_expert_group_used)
    in_kept = np.zeros(group_scores.shape, dtype=bool)
    np.put_along_axis(in_kept, kept, True, axis=-1)
    return np.where(np.repeat(in_kept, hp.n_expert // hp.n_expert_group, axis=-1), scores, -np.inf), gap


def by_group(hp: Hparams, scores: F64) -> F64:
    """(n, n_expert) -> (n, n_expert_group, experts of a group)."""
    return scores.reshape(len(scores), hp.n_expert_group, -1)


def route_softmax(hp: Hparams, logits: F64) -> Routing:
    """V2: s = softmax(u . e), V2 equations (21) and (22); a group is as good as its best expert (section 2.2.2)."""
    scores = softmax(logits)
    choice, group_gap = keep_groups(hp, scores, by_group(hp, scores).max(axis=-1))
    return weigh(hp, scores, choice, group_gap)


def route_sigmoid(hp: Hparams, logits: F64, bias: F64) -> Routing:
    """V3: s = sigmoid(u . e), V3 (arXiv 2412.19437) equation (15); chosen by s + b (16), a group by its two best."""
    scores = 1 / (1 + np.exp(-logits))
    biased = scores + bias
    group_scores = np.sort(by_group(hp, biased), axis=-1)[..., -2:].sum(axis=-1)
    choice, group_gap = keep_groups(hp, biased, group_scores)
    return weigh(hp, scores, choice, group_gap)


def weigh(hp: Hparams, scores: F64, choice: F64, group_gap: F64) -> Routing:
    """The chosen experts' own scores, normalised where the model asks (V3 equation (13)), times the routed scale."""
    experts, expert_gap = top_k(choice, hp.n_expert_used)
    weights = np.take_along_axis(scores, experts, axis=-1)
    if hp.expert_weights_norm:
        weights = weights / weights.sum(axis=-1, keepdims=True)
    return Routing(experts, weights * hp.expert_weights_scale, np.minimum(group_gap, expert_gap))
