"""attention.py: attention of one block over windows, forward and back, a class for each kind (arch.Arch.attention).

Gradients are with respect to activations; every matrix's inputs and gradients at its outputs go to a visitor: see
backward.py, of which this is a part.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from quantize.measure.gradients import Floats, ReadWeight, Visit, norm, norm_backward
from quantize.source.arch import Arch


class Attention(Protocol):
    """A kind: made over the block's input, it gives the heads, and takes their gradients."""

    def heads(self) -> Floats:
        """(m, n_head * v_dim) what the output projection takes."""

    def backward(self, dheads: Floats, visit: Visit) -> Floats:
        """The gradients at the normed input from dheads (n_grad, m, n_head, v_dim)."""


def attention(arch: Arch, read: ReadWeight, n_seq: int, x: Floats) -> Attention:
    """That of a block over its input x (m = n_seq * n_tok, n_embd): n_seq windows of equal length."""
    return Latent(arch, read, n_seq, x) if arch.attention == "latent" else Plain(arch, read, n_seq, x)


def windows(x: Floats, n_seq: int) -> Floats:
    """(..., m, n) -> (..., n_seq, n_tok, n)."""
    return x.reshape(*x.shape[:-2], n_seq, -1, x.shape[-1])


@lru_cache(maxsize=1)
def _future(n_tok: int) -> NDArray[np.float32]:
    """(n_tok, n_tok) what scores get for tokens to come, so that their probability is 0."""
    return np.triu(np.full((n_tok, n_tok), -np.inf, np.float32), 1)


def _causal_softmax(scores: Floats, scale: Floats) -> Floats:
    """Probabilities (..., n_tok, n_tok), in the place of the scores."""
    scores *= scale
    scores += _future(scores.shape[-1]).astype(scores.dtype, copy=False)
    scores -= scores.max(-1, keepdims=True)
    probs = np.exp(scores, out=scores)
    probs /= probs.sum(-1, keepdims=True)
    return probs


def _softmax_backward(dout: Floats, v: Floats, out: Floats, probs: Floats, scale: Floats) -> Floats:
    """The gradients at q . k from those at a head's output, out = probs @ v."""
    dscores: Floats = dout @ v.swapaxes(-1, -2)
    dscores -= (dout * out).sum(-1, keepdims=True)
    dscores *= probs
    dscores *= scale
    return dscores


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


class Latent:
    """Multi-head latent attention of one block over n_seq windows of equal length (DeepSeek-V2, section 2.1)."""

    def __init__(self, arch: Arch, read: ReadWeight, n_seq: int, x: Floats) -> None:
        self.arch, self.read, self.n_seq = arch, read, n_seq
        self.rotary = Rotary(arch, len(x) // n_seq, x.dtype)
        self.shared = self._project(x)

    def heads(self) -> Floats:
        """(m, n_head * v_dim) what the output projection takes."""
        m = len(self.shared.h)
        heads = np.empty((m, self.arch.n_head, self.arch.v_dim), self.shared.h.dtype)
        for i in range(self.arch.n_head):
            heads[:, i] = self._head(i).out.reshape(m, -1)
        return heads.reshape(m, -1)

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
        c, k_pe = windows(latent, self.n_seq), windows(kv[:, arch.kv_lora_rank :], self.n_seq)
        k_pe = self.rotary.turn(k_pe)
        return _Heads(h, q_latent, q.reshape(len(x), arch.n_head, -1), kv, c, k_pe)

    def _head(self, i: int) -> _Head:
        """Attention of head i, keys and values expanded from the latent: (10), (11), (16) to (18)."""
        nope, shared, rotary = self.arch.nope, self.shared, self.rotary
        q = windows(shared.q[:, i], self.n_seq)
        q_nope, q_pe = np.ascontiguousarray(q[..., :nope]), rotary.turn(q[..., nope:])
        k_nope, v = shared.c @ self.read("attn_k_b", i), shared.c @ self.read("attn_v_b", i).T
        scores = q_nope @ k_nope.swapaxes(1, 2)
        scores += q_pe @ shared.k_pe.swapaxes(1, 2)
        probs = _causal_softmax(scores, rotary.scale)
        return _Head(q_nope, q_pe, k_nope, v, probs, probs @ v)

    def backward(self, dheads: Floats, visit: Visit) -> Floats:
        """The gradients at the normed input from dheads (n_grad, m, n_head, v_dim)."""
        arch, shared, rotary, (n_grad, m) = self.arch, self.shared, self.rotary, dheads.shape[:2]
        flat = (n_grad, m, -1)
        dc = np.zeros((n_grad, *shared.c.shape), dheads.dtype)
        dk_pe = np.zeros((n_grad, *shared.k_pe.shape), dheads.dtype)
        dq = np.empty((n_grad, *shared.q.shape), dheads.dtype)
        for i in range(arch.n_head):
            head = self._head(i)
            k_b, v_b = self.read("attn_k_b", i), self.read("attn_v_b", i)
            dout = windows(dheads[:, :, i], self.n_seq)
            dv = head.probs.swapaxes(-1, -2) @ dout
            dscores = _softmax_backward(dout, head.v, head.out, head.probs, rotary.scale)
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
        dh: Floats = dkv @ kv_a + self._queries_backward(dq.reshape(flat), visit)
        return dh

    def _queries_backward(self, dq: Floats, visit: Visit) -> Floats:
        shared = self.shared
        if shared.q_latent is None:
            q = self.read("attn_q", 0)
            visit("attn_q", 0, q, shared.h, dq)
            return dq @ q
        weight, q_b, q_a = self.read("attn_q_a_norm", 0), self.read("attn_q_b", 0), self.read("attn_q_a", 0)
        visit("attn_q_b", 0, q_b, norm(shared.q_latent, weight, self.arch.rms_eps), dq)
        dlatent = norm_backward(shared.q_latent, weight, self.arch.rms_eps, dq @ q_b)
        visit("attn_q_a", 0, q_a, shared.h, dlatent)
        return dlatent @ q_a


class _PlainHead(NamedTuple):
    """One head of queries, forward. Shapes begin with (n_seq, n_tok)."""

    q: Floats  # rotated
    k: Floats  # rotated
    v: Floats
    probs: Floats  # (n_seq, n_tok, n_tok)
    out: Floats


class Plain:
    """Plain multi-head attention: keys and values by head, or by group of heads that share them."""

    def __init__(self, arch: Arch, read: ReadWeight, n_seq: int, x: Floats) -> None:
        self.arch, self.read, self.n_seq = arch, read, n_seq
        self.rotary = Rotary(arch, len(x) // n_seq, x.dtype)
        self.h = norm(x, read("attn_norm", 0), arch.rms_eps)
        self.q, self.k, self.v = (  # (m, heads, width), not rotated
            (self.h @ read(role, 0).T).reshape(len(x), n, -1)
            for role, n in (("attn_q", arch.n_head), ("attn_k", arch.n_head_kv), ("attn_v", arch.n_head_kv))
        )

    def heads(self) -> Floats:
        """(m, n_head * v_dim) what the output projection takes."""
        heads = np.empty((len(self.h), self.arch.n_head, self.arch.v_dim), self.h.dtype)
        for i in range(self.arch.n_head):
            heads[:, i] = self._head(i).out.reshape(len(self.h), -1)
        return heads.reshape(len(self.h), -1)

    def _shared(self, i: int) -> int:
        """The head of keys and values that head i of queries takes."""
        return i // (self.arch.n_head // self.arch.n_head_kv)

    def _head(self, i: int) -> _PlainHead:
        at = self._shared(i)
        q = self.rotary.turn(windows(self.q[:, i], self.n_seq))
        k = self.rotary.turn(windows(self.k[:, at], self.n_seq))
        v = windows(self.v[:, at], self.n_seq)
        probs = _causal_softmax(q @ k.swapaxes(1, 2), self.rotary.scale)
        return _PlainHead(q, k, v, probs, probs @ v)

    def backward(self, dheads: Floats, visit: Visit) -> Floats:
        """The gradients at the normed input from dheads (n_grad, m, n_head, v_dim)."""
        n_grad, m = dheads.shape[:2]
        dq, dk, dv = (np.zeros((n_grad, *x.shape), dheads.dtype) for x in (self.q, self.k, self.v))
        for i in range(self.arch.n_head):
            head, at = self._head(i), self._shared(i)
            dout = windows(dheads[:, :, i], self.n_seq)
            dscores = _softmax_backward(dout, head.v, head.out, head.probs, self.rotary.scale)
            dq[:, :, i] = self.rotary.turn(dscores @ head.k, back=True).reshape(n_grad, m, -1)
            dk[:, :, at] += self.rotary.turn(dscores.swapaxes(-1, -2) @ head.q, back=True).reshape(n_grad, m, -1)
            dv[:, :, at] += (head.probs.swapaxes(-1, -2) @ dout).reshape(n_grad, m, -1)
        dh = np.zeros((n_grad, *self.h.shape), dheads.dtype)
        for role, gradients in (("attn_q", dq), ("attn_k", dk), ("attn_v", dv)):
            weights, flat = self.read(role, 0), gradients.reshape(n_grad, m, -1)
            visit(role, 0, weights, self.h, flat)
            dh += flat @ weights
        return dh
