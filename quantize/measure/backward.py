"""backward.py: gradients through one decoder block, with respect to activations, in numpy.

Given the block's input x and gradients dy at its output, ``Block.backward`` runs the block forward again and then
backwards, hands every matrix's (inputs, gradients at its outputs) to a visitor and returns the gradients at x. No
gradient of a weight is ever formed: sensitivity.py needs only what meets at a matrix. dy stacks the gradients of
several scalars over the same tokens, (n_grad, m, n_embd), which share the forward pass. A gradient goes through the
chosen experts' weights; the gradient of the choice itself a caller adds through on_route. Equations: DeepSeek-V2
(arXiv 2405.04434).

Memory, float32, for m tokens and 2 gradients: (m, n_embd) nine times; queries, heads and their gradients; one head's
scores or one expert's matrices at a time. 236B (n_embd 5120, 128 heads of 192, dense width 12288), m = 8192: 1.5 GB of
hidden states, 2.4 GB of queries, 1.6 GB of heads, a head's scores and an expert's matrices 0.1 GB: under 6 GB. The
dense layer's hidden channels come later and take less: 6 x 0.4 GB. Half of it with half the tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from quantize.measure.attention import attention
from quantize.measure.gradients import Floats, ReadWeight, Visit, norm, norm_backward, sigmoid
from quantize.source.arch import Arch


class Routing(NamedTuple):
    """Which experts the tokens go to, and what the router's backward pass needs."""

    experts: NDArray[np.intp]  # (m, n_used)
    weights: Floats  # (m, n_used)
    scores: Floats  # (m, n_expert), before normalisation
    choice: Floats  # (m, n_expert) what the experts are ranked by, -inf outside the chosen groups
    bias: Floats | None  # (n_expert,) added to the scores for the choice


# Mass of each expert (n_grad, n_expert) -> its chance (n_expert,) to be visited, 0 where it is not.
Pick = Callable[[NDArray[np.float64]], NDArray[np.float64]]
# (routing, logits (m, n_expert), gradients at the chosen weights (n_grad, m, n_used)) -> more gradients at the logits
OnRoute = Callable[[Routing, Floats, Floats], Floats]


def route(arch: Arch, logits: Floats, bias: Floats | None) -> Routing:
    """The experts of each token from the router's logits (m, n_expert): V2 (21) to (22), V3 (13) to (16)."""
    if arch.gating == "sigmoid":
        scores = sigmoid(logits)
    else:
        scores = np.exp(logits - logits.max(-1, keepdims=True))
        scores /= scores.sum(-1, keepdims=True)
    choice = scores if bias is None else scores + bias
    if arch.n_group_used < arch.n_group:
        grouped = choice.reshape(len(choice), arch.n_group, -1)
        best = np.sort(grouped, -1)[..., -2:].sum(-1) if arch.gating == "sigmoid" else grouped.max(-1)
        order = np.argsort(-best, -1, kind="stable")
        dropped = np.zeros(best.shape, bool)
        np.put_along_axis(dropped, order[:, arch.n_group_used :], True, -1)
        choice = np.where(dropped[..., None], -np.inf, grouped).reshape(choice.shape)
    experts = np.argsort(-choice, -1, kind="stable")[:, : arch.n_expert_used]
    weights = np.take_along_axis(scores, experts, -1)
    if arch.expert_norm:
        weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)
    return Routing(experts, weights * scores.dtype.type(arch.expert_scale), scores, choice, bias)


def route_backward(arch: Arch, routing: Routing, dweights: Floats) -> Floats:
    """The gradients at the logits (n_grad, m, n_expert) from those at the chosen weights (n_grad, m, n_used)."""
    chosen = np.take_along_axis(routing.scores, routing.experts, -1)
    dchosen = dweights * arch.expert_scale
    if arch.expert_norm:
        total = chosen.sum(-1, keepdims=True) + 1e-20
        dchosen = (dchosen - (dchosen * chosen).sum(-1, keepdims=True) / total) / total
    dscores = np.zeros((len(dweights), *routing.scores.shape), dweights.dtype)
    np.put_along_axis(dscores, np.broadcast_to(routing.experts, dchosen.shape), dchosen, -1)
    if arch.gating == "sigmoid":
        return dscores * routing.scores * (1 - routing.scores)
    out: Floats = routing.scores * (dscores - (dscores * routing.scores).sum(-1, keepdims=True))
    return out


class Block:
    """One decoder block over n_seq windows of equal length. read gives its weights, a part at a time."""

    def __init__(
        self,
        arch: Arch,
        il: int,
        read: ReadWeight,
        n_seq: int,
        on_route: OnRoute | None = None,
        pick: Pick | None = None,
    ) -> None:
        self.arch, self.il, self.read, self.n_seq, self.on_route, self.pick = arch, il, read, n_seq, on_route, pick

    def backward(self, x: Floats, dy: Floats, visit: Visit) -> Floats:
        """The gradients at x (m = n_seq * n_tok, n_embd) from dy (n_grad, m, n_embd) at the block's output.

        Every matrix but the router is visited, k_b and v_b head by head, experts one by one if any token chose them, or
        those that were picked, with gradients over the root of their chance: squares add up as if all had been visited.
        """
        arch = self.arch
        attended = attention(arch, self.read, self.n_seq, x)
        joined = attended.heads()
        output = self.read("attn_output", 0)
        middle = x + joined @ output.T
        ffn_norm = self.read("ffn_norm", 0)
        h = norm(middle, ffn_norm, arch.rms_eps)
        dh = self._dense(h, dy, visit) if arch.is_dense(self.il) else self._experts(h, dy, visit)
        dmiddle = dy + norm_backward(middle, ffn_norm, arch.rms_eps, dh)
        visit("attn_output", 0, output, joined, dmiddle)
        dheads = (dmiddle @ output).reshape(*dy.shape[:2], arch.n_head, arch.v_dim)
        dh = attended.backward(dheads, visit)
        return dmiddle + norm_backward(x, self.read("attn_norm", 0), arch.rms_eps, dh)

    def _dense(self, h: Floats, dy: Floats, visit: Visit) -> Floats:
        return self._gated(("ffn_gate", "ffn_up", "ffn_down"), 0, h, dy, None, visit)[0]

    def _experts(self, h: Floats, dy: Floats, visit: Visit) -> Floats:
        """Routed plus shared experts, (20), backwards."""
        arch = self.arch
        router = self.read("ffn_gate_inp", 0)
        bias = self.read("exp_probs_b", 0) if arch.has_router_bias else None
        logits = h @ router.T
        routing = route(arch, logits, bias)
        dh = np.zeros_like(dy)
        dweights = np.zeros((len(dy), *routing.weights.shape), dy.dtype)
        roles = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
        chance = self._chances(routing, dy)
        for e in range(arch.n_expert):
            token, slot = np.nonzero(routing.experts == e)
            if len(token):
                met = _with_chance(visit, float(chance[e]))
                mine = self._gated(roles, e, h[token], dy[:, token], routing.weights[token, slot], met)
                dh[:, token] += mine[0]
                dweights[:, token, slot] = mine[1]
        if arch.n_expert_shared:
            dh += self._gated(("ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp"), 0, h, dy, None, visit)[0]
        dlogits = route_backward(arch, routing, dweights)
        if self.on_route:
            dlogits += self.on_route(routing, logits, dweights)
        dh += dlogits @ router
        return dh

    def _chances(self, routing: Routing, dy: Floats) -> NDArray[np.float64]:
        """Of the experts (n_expert,) to be visited; an expert's mass is what the tokens' gradients get from it."""
        n_expert = self.arch.n_expert
        if self.pick is None:
            return np.ones(n_expert)
        squares = np.einsum("gtn,gtn->gt", dy, dy)[:, :, None] * np.square(routing.weights)
        chosen = routing.experts.reshape(-1)
        return self.pick(np.stack([np.bincount(chosen, s.reshape(-1), n_expert) for s in squares]))

    def _gated(
        self, roles: tuple[str, str, str], part: int, x: Floats, dy: Floats, weights: Floats | None, visit: Visit
    ) -> tuple[Floats, Floats | None]:
        """down(silu(gate x) * up x), each token times weights (m,), backwards: the gradients at x and at weights."""
        gate, up, down = (self.read(role, part) for role in roles)
        # A wide layer's hidden channels of all tokens are large: no more of them at a time than it takes.
        silu, hidden = x @ gate.T, x @ up.T
        s = sigmoid(silu)
        silu *= s
        slope = 1 - s  # of silu: s (1 + a (1 - s)), times up's output
        slope *= silu
        slope += s
        del s
        slope *= hidden
        hidden *= silu
        weighted = dy if weights is None else dy * weights[:, None]
        visit(roles[2], part, down, hidden, weighted)
        dweights: Floats | None = None
        if weights is None:
            del hidden
            dhidden = dy @ down
        else:
            dhidden = dy @ down
            dweights = np.einsum("gmn,mn->gm", dhidden, hidden)
            del hidden
            dhidden *= weights[:, None]
        da = dhidden * slope
        del slope
        visit(roles[0], part, gate, x, da)
        dx: Floats = da @ gate
        del da
        dhidden *= silu
        visit(roles[1], part, up, x, dhidden)
        dx += dhidden @ up
        return dx, dweights


def _with_chance(visit: Visit, chance: float) -> Visit:
    """visit, for a part that is in a sample with a chance; nothing where that is 0."""
    if chance == 1:
        return visit
    scale = chance**-0.5 if chance > 0 else 0.0

    def scaled(role: str, part: int, weights: Floats, inputs: Floats, gradients: Floats) -> None:
        if scale > 0:
            visit(role, part, weights, inputs, gradients * gradients.dtype.type(scale))

    return scaled
