"""The whole model in numpy: token ids to logits, from a GGUF's keys and its tensors in numpy's order.

Plain on purpose: one sequence, no cache but the one it returns, every product written out. float64 throughout, so that
its own error is nothing beside the engine's float32. Taps carry the engine's names (cext/_engine.pyi, Tap).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from ref.hparams import Hparams, from_metadata
from ref.mha import heads_of
from ref.mla import Queries, UpProjections, mla_absorbed, mla_expanded, split_kv_b
from ref.rope import rotate
from ref.router import Routing, route_sigmoid, route_softmax

F64 = NDArray[np.float64]


def rms_norm(x: F64, weight: F64, eps: float) -> F64:
    """x / sqrt(mean(x^2) + eps) * weight (arXiv 1910.07467), over the last axis."""
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight


def silu(x: F64) -> F64:
    return x / (1 + np.exp(-x))


@dataclass
class Model:
    """hp and tensors by GGUF name."""

    hp: Hparams
    tensors: Mapping[str, NDArray[Any]]
    absorbed: bool = False
    taps: dict[str, NDArray[Any]] = field(default_factory=dict)
    margins: list[F64] = field(default_factory=list)  # of every routing decision, (n,) a layer

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]], **kwargs: Any) -> "Model":
        return cls(from_metadata(metadata), tensors, **kwargs)

    def weight(self, name: str) -> F64:
        return np.asarray(self.tensors[f"{name}.weight"], dtype=np.float64)

    def norm(self, name: str, x: F64) -> F64:
        return rms_norm(x, self.weight(name), self.hp.rms_norm_eps)

    def linear(self, name: str, x: F64) -> F64:
        return x @ self.weight(name).T

    def forward(self, ids: ArrayLike) -> F64:
        """Logits after each token, (n, n_vocab)."""
        x = self.weight("token_embd")[np.asarray(ids)]
        self.margins.clear()
        self.taps = {"inp_embd": x}
        for il in range(self.hp.n_layer):
            x = self.block(il, x)
        x = self.taps["result_norm"] = self.norm("output_norm", x)
        return self.linear("output" if "output.weight" in self.tensors else "token_embd", x)

    def block(self, il: int, x: F64) -> F64:
        """One transformer block over x (n, n_embd), a sequence from position 0."""
        taps, blk = self.taps, f"blk.{il}"
        h = taps[f"attn_norm-{il}"] = self.norm(f"{blk}.attn_norm", x)
        heads = taps[f"attn_heads-{il}"] = self.plain(il, h) if self.hp.plain else self.latent(il, h)
        attn_out = taps[f"attn_out-{il}"] = self.linear(f"{blk}.attn_output", heads)  # (19)
        x = taps[f"ffn_inp-{il}"] = x + attn_out
        h = taps[f"ffn_norm-{il}"] = self.norm(f"{blk}.ffn_norm", x)
        x = taps[f"l_out-{il}"] = x + (self.dense(il, h) if il < self.hp.n_layer_dense else self.experts(il, h))
        return x

    def plain(self, il: int, h: F64) -> F64:
        """Heads of plain attention over h (n, n_embd); q, k and v may be one matrix."""
        hp, n = self.hp, len(h)
        widths = np.array([hp.n_head * hp.qk_rope_head_dim, hp.n_head_kv * hp.qk_rope_head_dim])
        if f"blk.{il}.attn_qkv.weight" in self.tensors:
            parts = np.split(self.linear(f"blk.{il}.attn_qkv", h), np.cumsum(widths), axis=1)
        else:
            parts = [self.linear(f"blk.{il}.attn_{part}", h) for part in "qkv"]
        q, k, v = (
            part.reshape(n, heads, -1) for part, heads in zip(parts, (hp.n_head, *[hp.n_head_kv] * 2), strict=True)
        )
        positions = np.arange(n)
        k, v = self.cached(rotate(hp, k, positions), v)
        return heads_of(hp, rotate(hp, q, positions), k, v)

    def latent(self, il: int, h: F64) -> F64:
        """Heads of latent attention, V2 equations (9) to (18), over h (n, n_embd)."""
        hp, taps, blk, n = self.hp, self.taps, f"blk.{il}", len(h)
        if hp.q_lora_rank:
            c_q = taps[f"q_a_norm-{il}"] = self.norm(f"{blk}.attn_q_a_norm", self.linear(f"{blk}.attn_q_a", h))  # (12)
            q = self.linear(f"{blk}.attn_q_b", c_q)  # (13)
        else:
            q = self.linear(f"{blk}.attn_q", h)
        positions = np.arange(n)
        q = q.reshape(n, hp.n_head, hp.qk_nope_head_dim + hp.qk_rope_head_dim)
        q = q * hp.query_scale(positions)[:, None, None]
        q_nope, q_pe = q[..., : hp.qk_nope_head_dim], rotate(hp, q[..., hp.qk_nope_head_dim :], positions)  # (14)
        kv = self.linear(f"{blk}.attn_kv_a_mqa", h)  # (9), and the shared key before its rotation
        c_kv = taps[f"kv_a_norm-{il}"] = self.norm(f"{blk}.attn_kv_a_norm", kv[:, : hp.kv_lora_rank])
        k_pe = rotate(hp, kv[:, hp.kv_lora_rank :], positions)  # (15)
        c_kv, k_pe = self.cached(c_kv, k_pe)
        attend = mla_absorbed if self.absorbed else mla_expanded
        return attend(hp, Queries(q_nope, q_pe, c_kv, k_pe), self.up_projections(il))

    def cached(self, first: F64, second: F64) -> tuple[F64, F64]:
        """What the cache gives back of the rows it is given (latents and rotary keys, or keys and values): a place to
        round as the engine's caches do.
        """
        return first, second

    def up_projections(self, il: int) -> UpProjections:
        if f"blk.{il}.attn_kv_b.weight" in self.tensors:
            return split_kv_b(self.hp, self.weight(f"blk.{il}.attn_kv_b"))
        return UpProjections(self.weight(f"blk.{il}.attn_k_b"), self.weight(f"blk.{il}.attn_v_b"))

    def dense(self, il: int, h: F64) -> F64:
        hidden = silu(self.linear(f"blk.{il}.ffn_gate", h)) * self.linear(f"blk.{il}.ffn_up", h)
        self.taps[f"dense_hidden-{il}"] = hidden
        return self.linear(f"blk.{il}.ffn_down", hidden)

    def route(self, il: int, h: F64) -> Routing:
        logits = self.taps[f"router_logits-{il}"] = self.linear(f"blk.{il}.ffn_gate_inp", h)
        if self.hp.sigmoid:
            bias = self.tensors.get(f"blk.{il}.exp_probs_b.bias", np.zeros(self.hp.n_expert))
            return route_sigmoid(self.hp, logits, np.asarray(bias, dtype=np.float64))
        return route_softmax(self.hp, logits)

    def experts(self, il: int, h: F64) -> F64:
        """Routed plus shared experts, V2 equation (20), for h (n, n_embd)."""
        taps, blk = self.taps, f"blk.{il}"
        routing = self.route(il, h)
        self.margins.append(routing.margin)
        taps[f"experts-{il}"], taps[f"expert_weights-{il}"] = routing.experts, routing.weights
        gate, up, down = (self.weight(f"{blk}.ffn_{part}_exps") for part in ("gate", "up", "down"))
        hidden = np.empty((*routing.experts.shape, gate.shape[1]))
        out = np.zeros_like(h)
        for e in np.unique(routing.experts):
            t, k = np.nonzero(routing.experts == e)  # its tokens, and which of their choices it is
            hidden[t, k] = silu(h[t] @ gate[e].T) * (h[t] @ up[e].T)
            out[t] += routing.weights[t, k, None] * (hidden[t, k] @ down[e].T)
        taps[f"expert_hidden-{il}"] = hidden
        if self.hp.n_expert_shared:
            shared = silu(self.linear(f"{blk}.ffn_gate_shexp", h)) * self.linear(f"{blk}.ffn_up_shexp", h)
            taps[f"shared_hidden-{il}"] = shared
            out += self.linear(f"{blk}.ffn_down_shexp", shared)
        return out
