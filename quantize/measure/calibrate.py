"""calibrate.py: runs calibration text through the model a layer at a time and keeps what the encoders need to know.

Per linear layer: the mean |x| and mean x^2 of every input channel, and the inputs of a fixed sample of tokens. Experts
are counted one by one, and those that see few tokens borrow from the whole layer. Only the original weights run here:
what a fold or an encoder does to them never feeds back into the statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from quantize.base.blas import by_rows, pieces, spread
from quantize.encode.feedback import Covariance, Sums
from quantize.source.arch import Arch
from quantize.source.corpus import WINDOW
from quantize.source.forms import bf16_to_f32, f32_to_bf16

F32 = NDArray[np.float32]
OnChunk = Callable[[float], None]

CHUNK_WINDOWS = 2  # windows a forward call, fewer where attention is wide: bounds what engine and taps hold at once
CHUNK_VALUES = 1 << 25  # of queries, expanded keys and values, and heads' outputs in a call
SAMPLE_TOKENS = 1024  # tokens whose inputs are kept whole, for measuring output error
# Tokens an expert must see before its own statistics outweigh the layer's. Below it they are blended.
FEW_TOKENS = 64

EXPERT_TAPS = ("experts", "expert_weights", "expert_hidden")


class Layer(Protocol):
    """What calibration needs of ``cext.Layer``."""

    def forward(self, x: F32, n_seq: int, tap: Iterable[str] = ()) -> tuple[F32, dict[str, NDArray[Any]]]:
        """Output of x (n_seq * n_tok, n_embd), and the tapped arrays by name."""


@dataclass(frozen=True)
class Inputs:
    """The inputs of one group of linear layers: (n,) over all tokens, and (n_sample, n) rows of some."""

    mean_abs: F32
    mean_square: F32
    sample: F32
    covariance: Covariance | None = None  # over all tokens, where it was asked for


@dataclass(frozen=True)
class RoutedRows:
    """All tokens' inputs of the routed experts, in bfloat16: an expert's covariance is made of them when it is encoded,
    for those of all experts are far larger. Each counts as the router weighs its expert, squared, for so much does the
    layer's output feel of its error.
    """

    input: NDArray[np.uint16]  # (n_tokens, n_embd)
    experts: NDArray[np.int32]  # (n_tokens, n_used)
    weights: F32  # (n_tokens, n_used)
    hidden: NDArray[np.uint16]  # (n_tokens, n_used, n_ff)

    def inputs_of(self, expert: int) -> F32:
        """(m, n_embd) the inputs of an expert's gate and up, times the router's weight."""
        token, slot = np.nonzero(self.experts == expert)
        return bf16_to_f32(self.input[token]) * self.weights[token, slot][:, None]

    def hidden_of(self, expert: int) -> F32:
        """(m, n_ff) those of its down, likewise."""
        token, slot = np.nonzero(self.experts == expert)
        return bf16_to_f32(self.hidden[token, slot]) * self.weights[token, slot][:, None]


@dataclass(frozen=True)
class Routed:
    """Statistics of the routed experts' inputs. Those of all tokens together: ``SublayerStats.inputs["ffn_norm"]``."""

    counts: NDArray[np.int64]  # (n_expert,) tokens that chose each
    input_square: F32  # (n_expert, n_embd) mean x^2 of gate's and up's input, 0 where no token came
    hidden_abs: F32  # (n_expert, n_ff) mean |h| of down's input
    hidden_square: F32  # (n_expert, n_ff)
    sample_experts: NDArray[np.int32]  # (n_sample, n_used) the sampled tokens' choices
    sample_hidden: F32  # (n_sample, n_used, n_ff)
    rows: RoutedRows | None = None  # where covariances were asked for


@dataclass(frozen=True)
class SublayerStats:
    """Everything collected from a sublayer. inputs is keyed by tap: "attn_norm", "q_a_norm", "ffn_norm", ..."""

    inputs: dict[str, Inputs]
    routed: Routed | None = None
    exact: NDArray[np.uint16] | None = None  # (n_tokens, n_embd) "ffn_norm" of all tokens, where the stream has drifted


class _Moments:
    """Running sums over tokens of |x| and x^2, of x^T x where that is wanted, and the sampled rows; of x^T (exact - x)
    where the original's inputs are another stream's, and of x^T lacking for what the outputs lack.
    """

    def __init__(self, squares: bool) -> None:
        self.n = 0
        self.covariance = Sums() if squares else None
        self.abs = np.zeros(0)
        self.square = np.zeros(0)
        self.rows: list[F32] = []

    def add(self, x: F32, sampled: NDArray[np.intp], exact: F32 | None = None, lacking: F32 | None = None) -> None:
        if self.n == 0:
            self.abs, self.square = np.zeros(x.shape[1]), np.zeros(x.shape[1])
        self.n += len(x)
        by_rows(lambda channels: self._add_channels(channels, x[:, channels]), x.shape[1])
        self.rows.append(x[sampled])
        if self.covariance is not None:
            self.covariance.add(x, None if exact is None else exact - x, lacking)

    def _add_channels(self, channels: slice, x: F32) -> None:
        self.abs[channels] += np.abs(x).sum(0, dtype=np.float64)
        self.square[channels] += np.square(x).sum(0, dtype=np.float64)

    def done(self) -> Inputs:
        scale = 1.0 / self.n
        return Inputs(
            (self.abs * scale).astype(np.float32),
            (self.square * scale).astype(np.float32),
            np.concatenate(self.rows),
            self.covariance.done() if self.covariance is not None else None,
        )


class _Experts:
    """Running sums of the routed experts, and all rows where those are wanted."""

    def __init__(self, arch: Arch, n_tokens: int, n_sampled: int, keep_rows: bool) -> None:
        e, d, f, used = arch.n_expert, arch.n_embd, arch.n_ff_expert, arch.n_expert_used
        self.n = 0
        self.rows = None
        if keep_rows:
            self.rows = RoutedRows(
                np.empty((n_tokens, d), np.uint16),
                np.empty((n_tokens, used), np.int32),
                np.empty((n_tokens, used), np.float32),
                np.empty((n_tokens, used, f), np.uint16),
            )
        self.counts = np.zeros(e, np.int64)
        self.input_square = np.zeros((e, d))
        self.hidden_abs, self.hidden_square = np.zeros((e, f)), np.zeros((e, f))
        self.n_sampled = 0
        self.chosen, self.hidden = np.empty((n_sampled, used), np.int32), np.empty((n_sampled, used, f), np.float32)

    def add(self, tapped: Mapping[str, NDArray[Any]], sampled: NDArray[np.intp]) -> None:
        x, chosen, hidden = tapped["ffn_norm"], tapped["experts"], tapped["expert_hidden"]
        n_expert = len(self.counts)
        member = np.zeros((n_expert, len(x)), np.float32)
        member[chosen.T, np.arange(len(x))] = 1.0
        self.counts += np.bincount(chosen.reshape(-1), minlength=n_expert)
        self.input_square += member @ np.square(x)
        flat, order = hidden.reshape(-1, hidden.shape[-1]), np.argsort(chosen.reshape(-1), kind="stable")
        bounds = np.searchsorted(chosen.reshape(-1)[order], np.arange(n_expert + 1))

        def add_hidden(e: int) -> None:
            rows = flat[order[bounds[e] : bounds[e + 1]]]
            self.hidden_abs[e] += np.abs(rows).sum(0, dtype=np.float64)
            self.hidden_square[e] += np.square(rows).sum(0, dtype=np.float64)

        spread([partial(add_hidden, e) for e in range(n_expert)])
        at = slice(self.n_sampled, self.n_sampled + len(sampled))
        self.chosen[at], self.hidden[at] = chosen[sampled], hidden[sampled]
        self.n_sampled += len(sampled)
        if self.rows is not None:
            at = slice(self.n, self.n + len(x))
            self.rows.input[at], self.rows.experts[at] = f32_to_bf16(x), chosen
            self.rows.weights[at], self.rows.hidden[at] = tapped["expert_weights"], f32_to_bf16(hidden)
        self.n += len(x)

    def done(self) -> Routed:
        scale = 1.0 / np.maximum(self.counts, 1)[:, None]
        return Routed(
            self.counts,
            (self.input_square * scale).astype(np.float32),
            (self.hidden_abs * scale).astype(np.float32),
            (self.hidden_square * scale).astype(np.float32),
            self.chosen,
            self.hidden,
            self.rows,
        )


def _attention_taps(arch: Arch) -> list[str]:
    """The inputs of attention's matrices."""
    taps = ["attn_norm", "attn_heads"] if arch.attention == "plain" else ["attn_norm", "kv_a_norm", "attn_heads"]
    return [*taps, "q_a_norm"] if arch.q_lora_rank else taps


def _attention_width(arch: Arch) -> int:
    """Values a token of a layer's queries, expanded keys and values, and heads' outputs."""
    return arch.n_head * (2 * (arch.nope + arch.rope) + 2 * arch.v_dim)


class Stream:
    """The calibration tokens' hidden states between two sublayers, (n_windows * WINDOW, n_embd) float32: the
    original's, and those that the file computes, where calibration is sequential.
    """

    def __init__(self, arch: Arch, embeddings: F32, drifted: F32 | None = None) -> None:
        self.arch = arch
        self.x = embeddings
        self.drifted = drifted
        self.ffn_inputs: NDArray[np.uint16] | None = None  # (n_tokens, n_embd) normed, of the file's
        step = max(1, len(embeddings) // SAMPLE_TOKENS)
        self._sampled = np.arange(0, len(embeddings), step)[:SAMPLE_TOKENS]

    def attention(self, layer: Layer, on_chunk: OnChunk | None = None, covariances: bool = False) -> SublayerStats:
        """Run every token through a layer's attention, replacing x; returns the statistics of its matrices' inputs.

        on_chunk(fraction done) is called as it goes. covariances: collect those of the inputs too. Where states drift,
        the statistics are those of the drifted, which stay where they are.
        """
        taps = _attention_taps(self.arch)
        moments = {tap: _Moments(covariances) for tap in taps}
        drifted = self.drifted

        def run(at: slice) -> None:  # what is tapped of a chunk is gone before the next
            chunk, sampled = self.x[at], self._sampled_of(at)
            out, tapped = layer.forward(chunk, len(chunk) // WINDOW, taps)
            if drifted is None:
                for tap in taps:
                    moments[tap].add(tapped[tap], sampled)
            else:
                _, ours = layer.forward(drifted[at], len(chunk) // WINDOW, taps)
                for tap in taps:
                    lacking = chunk - drifted[at] if tap == "attn_heads" else None
                    moments[tap].add(ours[tap], sampled, tapped[tap], lacking)
            self.x[at] = out

        self._each_chunk(run, on_chunk)
        return SublayerStats({tap: m.done() for tap, m in moments.items()})

    def feed_forward(
        self, layer: Layer, il: int, on_chunk: OnChunk | None = None, covariances: bool = False
    ) -> SublayerStats:
        """Run every token on through layer il's feed-forward network, likewise. Where states drift, the statistics are
        the original's, without covariances: drift.py has those.
        """
        dense, covariances = self.arch.is_dense(il), covariances and self.drifted is None
        hidden = ("dense_hidden",) if dense else ("shared_hidden",) if self.arch.n_expert_shared else ()
        moments = {tap: _Moments(covariances) for tap in ("ffn_norm", *hidden)}
        experts = None if dense else _Experts(self.arch, len(self.x), len(self._sampled), covariances)
        taps = [*moments, *(EXPERT_TAPS if experts else ())]
        exact = None if self.drifted is None else np.empty(self.x.shape, np.uint16)

        def run(at: slice) -> None:
            chunk, sampled = self.x[at], self._sampled_of(at)
            self.x[at], tapped = layer.forward(chunk, len(chunk) // WINDOW, taps)
            if exact is not None:
                exact[at] = f32_to_bf16(tapped["ffn_norm"])
            for tap, sums in moments.items():
                sums.add(tapped[tap], sampled)
            if experts:
                experts.add(tapped, sampled)

        self._each_chunk(run, on_chunk)
        return SublayerStats({tap: m.done() for tap, m in moments.items()}, experts.done() if experts else None, exact)

    def attend(self, layer: Layer) -> None:
        """Run the drifted states through the file's attention, replacing them, and keep ``ffn_inputs``."""
        assert self.drifted is not None
        inputs = np.empty(self.drifted.shape, np.uint16)
        for at in pieces(len(inputs), self._chunk_tokens()):
            chunk = self.drifted[at]
            chunk[...], tapped = layer.forward(chunk, len(chunk) // WINDOW, ["ffn_norm"])
            inputs[at] = f32_to_bf16(tapped["ffn_norm"])
        self.ffn_inputs = inputs

    def _each_chunk(self, run: Callable[[slice], None], on_chunk: OnChunk | None) -> None:
        for at in pieces(len(self.x), self._chunk_tokens()):
            run(at)
            if on_chunk:
                on_chunk(at.stop / len(self.x))

    def _sampled_of(self, at: slice) -> NDArray[np.intp]:
        """The sampled tokens of a run, counted from its start."""
        inside = (self._sampled >= at.start) & (self._sampled < at.stop)
        counted: NDArray[np.intp] = self._sampled[inside] - at.start
        return counted

    def _chunk_tokens(self) -> int:
        return WINDOW * max(1, min(CHUNK_WINDOWS, CHUNK_VALUES // (WINDOW * _attention_width(self.arch))))

    def final_inputs(self, norm: F32, covariances: bool = False) -> Inputs:
        """The inputs of the output head: the last hidden states under the final norm, (n_embd,) weights."""
        moments = _Moments(covariances)
        for start in range(0, len(self.x), WINDOW):
            x = self._normed(self.x[start : start + WINDOW], norm)
            sampled = self._sampled_of(slice(start, start + WINDOW))
            if self.drifted is None:
                moments.add(x, sampled)
            else:
                moments.add(self._normed(self.drifted[start : start + WINDOW], norm), sampled, x)
        return moments.done()

    def _normed(self, x: F32, norm: F32) -> F32:
        scale = 1.0 / np.sqrt(np.square(x).mean(-1, dtype=np.float64, keepdims=True) + self.arch.rms_eps)
        out: F32 = (x * scale * norm).astype(np.float32)
        return out
