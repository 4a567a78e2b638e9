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

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from quantize.source.arch import Arch

Floats = NDArray[np.floating[Any]]  # float32 in use; float64 where tests want its precision
ReadWeight = Callable[[str, int], Floats]  # (role, part) -> a matrix (n_row, n), a norm (n,); part: expert or head
# (role, part, weights (n_row, n), inputs (m, n), gradients (n_grad, m, n_row)): output = inputs @ weights.T
Visit = Callable[[str, int, Floats, Floats, Floats], None]


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


def norm(x: Floats, weight: Floats, eps: float) -> Floats:
    """RMSNorm over the last axis."""
    out: Floats = x * _rms(x, eps) * weight
    return out


def norm_backward(x: Floats, weight: Floats, eps: float, dy: Floats) -> Floats:
    """The gradient at norm's x: with r = rms(x)^-1, r w dy - x r^3 mean(w dy x)."""
    r = _rms(x, eps)
    scaled = dy * weight
    scaled -= x * (r * r * (scaled * x).mean(-1, keepdims=True))
    scaled *= r
    return scaled


def _rms(x: Floats, eps: float) -> Floats:
    inverse: Floats = 1.0 / np.sqrt(np.square(x).mean(-1, keepdims=True) + eps)
    return inverse


def sigmoid(x: Floats) -> Floats:
    """1 / (1 + exp(-x)), without overflow."""
    out: Floats = 0.5 * (1.0 + np.tanh(0.5 * x))
    return out


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


class Rotary:
    """Rotation of adjacent pairs by position, (14) and (15), with YaRN's frequencies (arXiv 2309.00071)."""

    def __init__(self, arch: Arch, n_positions: int, dtype: np.dtype[Any]) -> None:
        dim = arch.rope
        theta = arch.rope_base ** (-np.arange(0, dim, 2) / dim)
        scale, length = np.full((1, 1), (arch.nope + dim) ** -0.5), 1.0
        if arch.yarn is not None:
            y, turn = arch.yarn, 2 * math.log(arch.rope_base)
            ends = [dim * math.log(y.original_context / (2 * math.pi * b)) / turn for b in (y.beta_fast, y.beta_slow)]
            low, high = max(math.floor(ends[0]), 0), min(math.ceil(ends[1]), dim - 1)
            ramp = np.clip((np.arange(dim // 2) - low) / (high - low or 0.001), 0, 1)
            theta = theta * (1 - ramp) + theta / y.factor * ramp
            if y.factor > 1 and y.mscale_all_dim is not None:
                scale *= (0.1 * y.mscale_all_dim * math.log(y.factor) + 1) ** 2
            elif y.factor > 1:
                length = 0.1 * math.log(y.factor) + 1
            if y.temperature:
                scale = scale * (1 + y.temperature * np.log1p(np.arange(n_positions) // y.original_context)[:, None])
        self.scale: Floats = scale.astype(dtype)  # of q . k by query: (n_positions, 1), or (1, 1) where all have one
        angle = np.arange(n_positions)[:, None] * theta
        self.cos, self.sin = (length * np.cos(angle)).astype(dtype), (length * np.sin(angle)).astype(dtype)

    def turn(self, x: Floats, back: bool = False) -> Floats:
        """x (..., n_positions, dim) rotated; back carries gradients the other way."""
        even, odd, sin = x[..., 0::2], x[..., 1::2], -self.sin if back else self.sin
        out = np.empty_like(x)
        out[..., 0::2] = even * self.cos - odd * sin
        out[..., 1::2] = even * sin + odd * self.cos
        return out


class _Heads(NamedTuple):
    """What all heads of a block's attention share. Rows are tokens, m = n_seq * n_tok."""

    h: Floats  # (m, n_embd) the normed input
    q_latent: Floats | None  # (m, q_lora_rank) before its norm
    q: Floats  # (m, n_head, nope + rope), not rotated
    kv: Floats  # (m, kv_lora_rank + rope), as kv_a gives it
    c: Floats  # (n_seq, n_tok, kv_lora_rank), normed
    k_pe: Floats  # (n_seq, n_tok, rope), rotated


class _Head(NamedTuple):
    """One head, forward. Shapes begin with (n_seq, n_tok)."""

    q_nope: Floats
    q_pe: Floats
    k_nope: Floats
    v: Floats
    probs: Floats  # (n_seq, n_tok, n_tok)
    out: Floats


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
        shared = self._project(x)
        rotary = Rotary(arch, len(x) // self.n_seq, x.dtype)
        heads = np.empty((len(x), arch.n_head, arch.v_dim), x.dtype)
        for i in range(arch.n_head):
            heads[:, i] = self._head(shared, rotary, i).out.reshape(len(x), -1)
        joined = heads.reshape(len(x), -1)
        output = self.read("attn_output", 0)
        middle = x + joined @ output.T
        ffn_norm = self.read("ffn_norm", 0)
        h = norm(middle, ffn_norm, arch.rms_eps)
        dh = self._dense(h, dy, visit) if arch.is_dense(self.il) else self._experts(h, dy, visit)
        dmiddle = dy + norm_backward(middle, ffn_norm, arch.rms_eps, dh)
        visit("attn_output", 0, output, joined, dmiddle)
        dheads = (dmiddle @ output).reshape(*dy.shape[:2], arch.n_head, arch.v_dim)
        dh = self._attention_backward(shared, rotary, dheads, visit)
        return dmiddle + norm_backward(x, self.read("attn_norm", 0), arch.rms_eps, dh)

    def _project(self, x: Floats) -> _Heads:
        """Queries and latents of all heads: (9), (12), (13), (15)."""
        arch = self.arch
        h = norm(x, self.read("attn_norm", 0), arch.rms_eps)
        q_latent = None
        if arch.q_lora_rank:
            q_latent = h @ self.read("attn_q_a", 0).T
            q = norm(q_latent, self.read("attn_q_a_norm", 0), arch.rms_eps) @ self.read("attn_q_b", 0).T
        else:
            q = h @ self.read("attn_q", 0).T
        kv = h @ self.read("attn_kv_a_mqa", 0).T
        latent = norm(kv[:, : arch.kv_lora_rank], self.read("attn_kv_a_norm", 0), arch.rms_eps)
        c, k_pe = self._windows(latent), self._windows(kv[:, arch.kv_lora_rank :])
        k_pe = Rotary(arch, k_pe.shape[1], x.dtype).turn(k_pe)
        return _Heads(h, q_latent, q.reshape(len(x), arch.n_head, -1), kv, c, k_pe)

    def _windows(self, x: Floats) -> Floats:
        """(..., m, n) -> (..., n_seq, n_tok, n)."""
        return x.reshape(*x.shape[:-2], self.n_seq, -1, x.shape[-1])

    def _head(self, shared: _Heads, rotary: Rotary, i: int) -> _Head:
        """Attention of head i, keys and values expanded from the latent: (10), (11), (16) to (18)."""
        nope = self.arch.nope
        q = self._windows(shared.q[:, i])
        q_nope, q_pe = np.ascontiguousarray(q[..., :nope]), rotary.turn(q[..., nope:])
        k_nope, v = shared.c @ self.read("attn_k_b", i), shared.c @ self.read("attn_v_b", i).T
        scores = q_nope @ k_nope.swapaxes(1, 2)
        scores += q_pe @ shared.k_pe.swapaxes(1, 2)
        scores *= rotary.scale
        scores += _future(scores.shape[-1]).astype(scores.dtype, copy=False)
        scores -= scores.max(-1, keepdims=True)
        probs = np.exp(scores, out=scores)
        probs /= probs.sum(-1, keepdims=True)
        return _Head(q_nope, q_pe, k_nope, v, probs, probs @ v)

    def _attention_backward(self, shared: _Heads, rotary: Rotary, dheads: Floats, visit: Visit) -> Floats:
        """The gradients at the normed input from dheads (n_grad, m, n_head, v_dim)."""
        arch, (n_grad, m) = self.arch, dheads.shape[:2]
        flat = (n_grad, m, -1)
        dc = np.zeros((n_grad, *shared.c.shape), dheads.dtype)
        dk_pe = np.zeros((n_grad, *shared.k_pe.shape), dheads.dtype)
        dq = np.empty((n_grad, *shared.q.shape), dheads.dtype)
        for i in range(arch.n_head):
            head = self._head(shared, rotary, i)
            k_b, v_b = self.read("attn_k_b", i), self.read("attn_v_b", i)
            dout = self._windows(dheads[:, :, i])
            dv = head.probs.swapaxes(-1, -2) @ dout
            dscores = dout @ head.v.swapaxes(-1, -2)
            dscores -= (dout * head.out).sum(-1, keepdims=True)
            dscores *= head.probs
            dscores *= rotary.scale
            dk_nope = dscores.swapaxes(-1, -2) @ head.q_nope
            dk_pe += dscores.swapaxes(-1, -2) @ head.q_pe
            dc += dk_nope @ k_b.T + dv @ v_b
            # Both as the absorbed form has them, by query: score = (W_uk q_nope) . c, head = W_uv (probs c).
            visit("attn_k_b", i, k_b, head.q_nope.reshape(m, -1), (dscores @ shared.c).reshape(flat))
            visit("attn_v_b", i, v_b, (head.probs @ shared.c).reshape(m, -1), dout.reshape(flat))
            dq[:, :, i, : arch.nope] = (dscores @ head.k_nope).reshape(flat)
            dq[:, :, i, arch.nope :] = rotary.turn(dscores @ shared.k_pe, back=True).reshape(flat)
        dkv = np.empty((n_grad, *shared.kv.shape), dheads.dtype)
        dkv[..., : arch.kv_lora_rank] = norm_backward(
            shared.kv[:, : arch.kv_lora_rank], self.read("attn_kv_a_norm", 0), arch.rms_eps, dc.reshape(flat)
        )
        dkv[..., arch.kv_lora_rank :] = rotary.turn(dk_pe, back=True).reshape(flat)
        kv_a = self.read("attn_kv_a_mqa", 0)
        visit("attn_kv_a_mqa", 0, kv_a, shared.h, dkv)
        dh: Floats = dkv @ kv_a + self._queries_backward(shared, dq.reshape(flat), visit)
        return dh

    def _queries_backward(self, shared: _Heads, dq: Floats, visit: Visit) -> Floats:
        if shared.q_latent is None:
            q = self.read("attn_q", 0)
            visit("attn_q", 0, q, shared.h, dq)
            return dq @ q
        weight, q_b, q_a = self.read("attn_q_a_norm", 0), self.read("attn_q_b", 0), self.read("attn_q_a", 0)
        visit("attn_q_b", 0, q_b, norm(shared.q_latent, weight, self.arch.rms_eps), dq)
        dlatent = norm_backward(shared.q_latent, weight, self.arch.rms_eps, dq @ q_b)
        visit("attn_q_a", 0, q_a, shared.h, dlatent)
        return dlatent @ q_a

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


@lru_cache(maxsize=1)
def _future(n_tok: int) -> NDArray[np.float32]:
    """(n_tok, n_tok) what scores get for tokens to come, so that their probability is 0."""
    return np.triu(np.full((n_tok, n_tok), -np.inf, np.float32), 1)


def _with_chance(visit: Visit, chance: float) -> Visit:
    """visit, for a part that is in a sample with a chance; nothing where that is 0."""
    if chance == 1:
        return visit
    scale = chance**-0.5 if chance > 0 else 0.0

    def scaled(role: str, part: int, weights: Floats, inputs: Floats, gradients: Floats) -> None:
        if scale > 0:
            visit(role, part, weights, inputs, gradients * gradients.dtype.type(scale))

    return scaled
