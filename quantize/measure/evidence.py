"""evidence.py: what one layer's calibration says about each of its matrices, part by part.

A part is what shares one set of input statistics: an expert of a stack, a head of k_b and v_b, or the whole matrix.
Experts that saw few tokens are blended with what they would have seen of the whole layer's, so every importance is
finite and positive somewhere, however rarely a router picks an expert.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from quantize.base.blas import MAX_COLUMNS, pieces, spread
from quantize.encode.feedback import Covariance
from quantize.measure.calibrate import FEW_TOKENS, SublayerStats
from quantize.measure.gradients import sigmoid
from quantize.source.arch import Arch
from quantize.source.tensors import Tensor

F32 = NDArray[np.float32]

# role -> the tap that feeds it
FEEDS = {
    "attn_q": "attn_norm",
    "attn_q_a": "attn_norm",
    "attn_kv_a_mqa": "attn_norm",
    "attn_k": "attn_norm",
    "attn_v": "attn_norm",
    "attn_q_b": "q_a_norm",
    "attn_v_b": "kv_a_norm",
    "attn_output": "attn_heads",
    "ffn_gate_inp": "ffn_norm",
    "ffn_gate": "ffn_norm",
    "ffn_up": "ffn_norm",
    "ffn_down": "dense_hidden",
    "ffn_gate_shexp": "ffn_norm",
    "ffn_up_shexp": "ffn_norm",
    "ffn_down_shexp": "shared_hidden",
    "ffn_gate_exps": "ffn_norm",
    "ffn_up_exps": "ffn_norm",
}
EXPERT_ROLES = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
ReadPart = Callable[[Tensor, int], F32]  # a part of a tensor of this layer, original weights, float32


def n_parts(tensor: Tensor) -> int:
    """Experts of a stack, heads of k_b and v_b, else 1."""
    return tensor.shape[0] if tensor.in_parts else 1


# An expert's covariance needs as many tokens as it has channels; with fewer it is drawn towards the layer's, and that
# of its hidden channels, which are hardly correlated, towards its diagonal. In tokens a channel.
PRIOR_TOKENS = 0.1


Bundle = list[tuple[Tensor, int]]  # parts that are encoded one after the other


def bundles(layer: Sequence[Tensor]) -> Iterator[list[Bundle]]:
    """Every part of a layer's tensors, those of one tensor in order: sets of bundles that do not know of each other,
    each set after the one before. An expert is a bundle: its gate and up share an input and so a covariance, and their
    output is its down's input.
    """
    experts = [t for t in layer if t.role in EXPERT_ROLES]
    for tensor in layer:
        if tensor.role not in EXPERT_ROLES:
            yield from ([[(tensor, part)]] for part in range(n_parts(tensor)))
        elif tensor is experts[0]:
            yield [[(one, part) for one in experts] for part in range(n_parts(tensor))]


class Last(threading.local):
    """The last covariance that a thread asked for, which parts that share it want in turn."""

    key: object = None
    made: Covariance | None = None

    def of(self, key: object, make: Callable[[], Covariance | None]) -> Covariance | None:
        """The one of this key, made unless it is the last."""
        if key != self.key:
            self.drop()  # its memory first
            self.made = make()
            self.key = key
        return self.made

    def drop(self) -> None:
        """Nobody will ask for it again."""
        self.key = self.made = None


class Evidence:
    """Statistics of one sublayer's inputs. tensors: its own, by role; read: their original weights.

    weighted False says nothing about importance, for encoders that shall weigh every column alike.
    """

    def __init__(
        self, arch: Arch, tensors: dict[str, Tensor], stats: SublayerStats, read: ReadPart, weighted: bool = True
    ) -> None:
        self.arch = arch
        self.tensors = tensors
        self.stats = stats
        self.weighted = weighted
        self._read = read
        self._q_square: F32 | None = None  # (n_head, nope)
        self._expected: dict[int, tuple[F32, F32]] = {}
        self._queries: F32 | None = None
        self._last = Last()

    def importance(self, role: str, part: int) -> F32 | None:
        """(n,) mean x^2 of each input channel of a part; None where columns shall count alike."""
        if not self.weighted:
            return None
        if role == "attn_k_b":
            per_head: F32 = self._query_square()[part]
            return per_head
        routed = self.stats.routed
        if routed and role in ("ffn_gate_exps", "ffn_up_exps"):
            return self._blend(part, routed.input_square[part], lambda: self.stats.inputs["ffn_norm"].mean_square)
        if routed and role == "ffn_down_exps":
            return self._blend(part, routed.hidden_square[part], lambda: self._hidden_if_chosen(part)[1])
        return self.stats.inputs[FEEDS[role]].mean_square

    def covariance(self, role: str, part: int) -> Covariance | None:
        """Of the inputs of a part; None where none was collected."""
        key = self._covariance_key(role, part)
        return self._last.of(key, lambda: self._covariance(*key))

    def _covariance_key(self, role: str, part: int) -> tuple[str, int]:
        """What a covariance is of: a tap, and a part where that matters."""
        if self.stats.routed and role.endswith("_exps"):
            return ("expert_hidden" if role == "ffn_down_exps" else "expert_input"), part
        return ("queries", part) if role == "attn_k_b" else (FEEDS[role], 0)

    def _covariance(self, tap: str, part: int) -> Covariance | None:
        source = {"queries": "attn_norm", "expert_input": "ffn_norm", "expert_hidden": "ffn_norm"}.get(tap, tap)
        whole = self.stats.inputs[source].covariance
        if whole is None:
            return None
        if tap == "queries":
            return Covariance.of(np.ascontiguousarray(self._query_rows()[:, part]))
        routed = self.stats.routed
        if routed is None or routed.rows is None or not tap.startswith("expert_"):
            return whole
        count = int(routed.counts[part])
        if tap == "expert_input":
            mine = Covariance.of(routed.rows.inputs_of(part))
            return mine.blend(whole, prior_share(mine.n, count))
        rows = routed.rows.hidden_of(part) if count else self._hidden_rows(part)
        hidden = Covariance.of(rows)
        return hidden.diagonal_blend(prior_share(hidden.n, len(rows)))

    def magnitude(self, role: str, part: int) -> F32:
        """(n,) mean |x| of each input channel, with which a fold's scales grow. Experts differ only in their downs."""
        routed = self.stats.routed
        if routed and role == "ffn_down_exps":
            return self._blend(part, routed.hidden_abs[part], lambda: self._hidden_if_chosen(part)[0])
        return self.stats.inputs[FEEDS[role]].mean_abs

    def sample(self, role: str, part: int) -> F32:
        """(m, n) inputs that sampled tokens gave a part; m is 0 for an expert that none of them chose."""
        routed = self.stats.routed
        if routed and role == "ffn_down_exps":
            hidden: F32 = routed.sample_hidden[routed.sample_experts == part]
            return hidden
        rows: F32 = self.stats.inputs[FEEDS[role]].sample
        if routed and role in ("ffn_gate_exps", "ffn_up_exps"):
            rows = rows[(routed.sample_experts == part).any(1)]
        return rows

    def _blend(self, expert: int, seen: F32, expected: Callable[[], F32]) -> F32:
        """seen where the expert saw FEW_TOKENS or more, the layer's expectation where it saw none, a mix between."""
        assert self.stats.routed is not None
        share = min(1.0, int(self.stats.routed.counts[expert]) / FEW_TOKENS)
        if share == 1.0:
            return seen
        return np.float32(share) * seen + np.float32(1.0 - share) * expected()

    def _hidden_if_chosen(self, expert: int) -> tuple[F32, F32]:
        """Mean |h| and h^2 of an expert's hidden channels had it seen the layer's sampled tokens."""
        if expert not in self._expected:
            hidden = self._hidden_rows(expert)
            self._expected[expert] = np.abs(hidden).mean(0), np.square(hidden).mean(0)
        return self._expected[expert]

    def _hidden_rows(self, expert: int) -> F32:
        """(n_sample, n_ff) hidden channels of an expert for the layer's sampled tokens."""
        x = self.stats.inputs["ffn_norm"].sample
        gate, up = (self._read(self.tensors[role], expert) for role in ("ffn_gate_exps", "ffn_up_exps"))
        return hidden_channels(x, gate, up)

    def _query_square(self) -> F32:
        """Mean q_nope^2 a head, (n_head, nope): k_b multiplies the queries, score = (q_nope W_k) . c."""
        if self._q_square is None:
            self._q_square = np.square(self._query_rows()).mean(0)
        return self._q_square

    def _query_rows(self) -> F32:
        """(n_sample, n_head, nope) queries of the sampled tokens."""
        if self._queries is None:
            role = "attn_q_b" if self.arch.q_lora_rank else "attn_q"
            q = self.sample(role, 0) @ self._read(self.tensors[role], 0).T
            self._queries = q.reshape(len(q), self.arch.n_head, -1)[:, :, : self.arch.nope]
        return self._queries


def prior_share(n: int, count: int, prior_tokens: float = PRIOR_TOKENS) -> float:
    """How much of a covariance of n channels is the prior's, where count tokens were seen."""
    return prior_tokens * n / (prior_tokens * n + count)


def hidden_channels(x: F32, gate: F32, up: F32) -> F32:
    """(m, n_ff) silu(x gate^T) * x up^T, for inputs x (m, n)."""
    out = np.empty((len(x), len(gate)), np.float32)

    def fill(rows: slice, channels: slice) -> None:
        hidden = x[rows] @ gate[channels].T
        hidden *= sigmoid(hidden)
        np.multiply(hidden, x[rows] @ up[channels].T, out=out[rows, channels])

    columns = pieces(len(gate), MAX_COLUMNS)
    spread([partial(fill, rows, channels) for rows in pieces(len(x)) for channels in columns])
    return out
