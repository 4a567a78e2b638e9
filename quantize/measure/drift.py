"""drift.py: a layer's feed-forward half under sequential calibration.

Two streams of the same tokens run through the layer: the original's, and what the file computes, which has drifted from
it by all that was encoded before. A matrix is encoded for the inputs that the file will give it, and for the outputs
that the original had: its weights are moved by the regression of what is missing on its inputs first (feedback.py's
Covariance.corrected). Here that runs matrix by matrix, so that a down sees what its encoded gate and up give, and
the last matrices to be encoded make up for what is missing at the layer's output. Attention's half is calibrate.py's.

Experts are encoded side by side, and give their outputs in turn.

Memory: two inputs of all tokens in bfloat16, CHUNK_TOKENS times the widest hidden layer, a few times over, and
``expert_bytes`` for each expert in the making.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from quantize.base.blas import by_rows, from_rows, pieces, product
from quantize.encode.feedback import Covariance, Sums
from quantize.measure.awq import Scales
from quantize.measure.backward import Routing, route
from quantize.measure.calibrate import Stream
from quantize.measure.evidence import Last, ReadPart, hidden_channels, prior_share
from quantize.source.arch import Arch
from quantize.source.forms import bf16_to_f32
from quantize.source.tensors import Tensor

F32 = NDArray[np.float32]

CHUNK_TOKENS = 2048
DOWNS = {
    "ffn_down": ("ffn_gate", "ffn_up"),
    "ffn_down_shexp": ("ffn_gate_shexp", "ffn_up_shexp"),
    "ffn_down_exps": ("ffn_gate_exps", "ffn_up_exps"),
}
ROUTER = "ffn_gate_inp"


def expert_bytes(arch: Arch) -> int:
    """An expert in the making: covariance, drift, factor and the encoder's tables; its inputs in both streams."""
    return 4 * arch.n_embd * (8 * arch.n_embd + 4 * CHUNK_TOKENS)


class Tokens(NamedTuple):
    """What reaches a matrix, and how much of its output counts."""

    rows: NDArray[np.intp]  # (m,) of the stream
    weights: F32  # (m,)


class Inputs(NamedTuple):
    """Normed inputs of a feed-forward network, (n_tokens, n_embd) as bfloat16 bits."""

    exact: NDArray[np.uint16]
    drifted: NDArray[np.uint16]
    scale: F32 | None  # (n_embd,) what a fold divides both by, if one does

    def of(self, rows: NDArray[np.intp]) -> F32:
        """(m, n_embd) what the file computes."""
        return self._folded(self.drifted, rows)

    def exactly(self, rows: NDArray[np.intp]) -> F32:
        """(m, n_embd) what the original does, folded."""
        return self._folded(self.exact, rows)

    def _folded(self, inputs: NDArray[np.uint16], rows: NDArray[np.intp]) -> F32:
        def make(at: slice) -> F32:
            values = bf16_to_f32(inputs[rows[at]])
            return values if self.scale is None else values / self.scale

        return from_rows(make, len(rows), inputs.shape[1])


class FeedForward:
    """One layer's, matrix by matrix as it is encoded. tensors: by role.

    The stream has come through the original's layer, and through the file's attention: to its drifted states, the
    residual, the file's networks are added. exact: (n_tokens, n_embd) the inputs of the original's, as bfloat16 bits.
    """

    def __init__(
        self,
        arch: Arch,
        tensors: Mapping[str, Tensor],
        stream: Stream,
        exact: NDArray[np.uint16],
        scales: Scales,
        read_part: ReadPart,
    ) -> None:
        assert stream.drifted is not None
        assert stream.ffn_inputs is not None, "attend comes first"
        self.arch, self.tensors, self._scales, self._read_part = arch, tensors, scales, read_part
        self._target, self._out = stream.x, stream.drifted
        scale = scales.columns.get("ffn_gate" if "ffn_gate" in tensors else "ffn_gate_exps")
        self._inputs = Inputs(exact, stream.ffn_inputs, scale)
        self._routing: Routing | None = None
        self._decoded: dict[tuple[str, int], F32] = {}
        self._last = Last()
        self._every = Tokens(np.arange(len(exact)), np.ones(len(exact), np.float32))
        self.whole = self._of_inputs(self._every)

    def covariance(self, role: str, part: int) -> Covariance | None:
        """Of a part's inputs, with what is to be made up for; None for an expert that no token reaches."""
        key = (role if role in DOWNS else "experts" if role.endswith("_exps") else "every"), part
        return self._last.of(key, lambda: self._covariance(role, part))

    def wrote(self, role: str, part: int, decoded: F32) -> None:
        """A part as the file has it. Experts may come side by side."""
        if role == ROUTER:
            self._route(decoded)
        if role in DOWNS:
            self._last.drop()
        self._decoded[role, part] = decoded

    def add(self, role: str, part: int) -> None:
        """A network's output to that of all, when its down is written: sums hang on the order, which is the file's."""
        if role not in DOWNS:
            return
        gate, up, down = (self._decoded.pop((name, part)) for name in (*DOWNS[role], role))
        for rows, weights in _chunks(self._tokens(role, part)):
            self._give(rows, weights, hidden_channels(self._inputs.of(rows), gate, up), down)

    def _give(self, rows: NDArray[np.intp], weights: F32, hidden: F32, down: F32) -> None:
        def add(at: slice) -> None:
            self._out[rows[at]] += weights[at, None] * (hidden[at] @ down.T)

        by_rows(add, len(rows))

    def _covariance(self, role: str, part: int) -> Covariance | None:
        tokens = self._tokens(role, part)
        if role in DOWNS:
            if len(tokens.rows) == 0:
                return None
            hidden = self._of_hidden(role, part, tokens)
            few = prior_share(hidden.n, len(tokens.rows))
            return hidden.diagonal_blend(few) if role.endswith("_exps") else hidden
        if not role.endswith("_exps"):
            return self.whole
        if len(tokens.rows) == 0:
            return self.whole
        inputs = self._of_inputs(tokens)
        return inputs.blend(self.whole, prior_share(inputs.n, len(tokens.rows)))

    def _tokens(self, role: str, part: int) -> Tokens:
        if not role.endswith("_exps"):
            return self._every
        assert self._routing is not None, "the router is written before its experts"
        rows, slot = np.nonzero(self._routing.experts == part)
        return Tokens(rows, self._routing.weights[rows, slot])

    def _route(self, router: F32) -> None:
        logits = np.empty((len(self._out), len(router)), np.float32)
        for rows, _ in _chunks(self._every):
            logits[rows] = product(self._inputs.of(rows), router.T)
        bias = self._read("exp_probs_b", 0) if "exp_probs_b" in self.tensors else None
        self._routing = route(self.arch, logits, bias)

    def _read(self, role: str, part: int) -> F32:
        """The original weights, folded as the file's are."""
        return self._scales.apply(role, part, self._read_part(self.tensors[role], part))

    def _of_inputs(self, tokens: Tokens) -> Covariance:
        sums = Sums()
        for rows, weights in _chunks(tokens):
            x = self._inputs.of(rows)
            sums.add(_weighted(x, weights), _weighted(self._inputs.exactly(rows), weights, less=x))
        return sums.done()

    def _of_hidden(self, role: str, part: int, tokens: Tokens) -> Covariance:
        """An expert's down makes up for its own hidden channels' drift, the others for all that is missing yet."""
        gate, up = (self._decoded[name, part] for name in DOWNS[role])
        exact = [self._read(name, part) for name in DOWNS[role]] if role.endswith("_exps") else None
        down = self._read(role, part) if exact is None else None
        sums = Sums()
        for rows, weights in _chunks(tokens):
            hidden = hidden_channels(self._inputs.of(rows), gate, up)
            weighted = _weighted(hidden, weights)
            if exact is not None:
                theirs = hidden_channels(self._inputs.exactly(rows), *exact)
                sums.add(weighted, _weighted(theirs, weights, less=hidden))
            else:
                assert down is not None
                sums.add(weighted, residual=self._lacking(rows, hidden, down))
        return sums.done()

    def _lacking(self, rows: NDArray[np.intp], hidden: F32, down: F32) -> F32:
        """(m, n_embd) what is missing at the output of these tokens, but for a down to come."""
        target, out = self._target, self._out
        return from_rows(lambda at: target[rows[at]] - out[rows[at]] - hidden[at] @ down.T, len(rows), out.shape[1])


def _weighted(values: F32, weights: F32, less: F32 | None = None) -> F32:
    """values (m, n), less those, a weight (m,) to a row."""

    def make(at: slice) -> F32:
        rows = values[at] if less is None else values[at] - less[at]
        return rows * weights[at, None]

    return from_rows(make, *values.shape)


def _chunks(tokens: Tokens) -> Iterator[Tokens]:
    for at in pieces(len(tokens.rows), CHUNK_TOKENS):
        yield Tokens(tokens.rows[at], tokens.weights[at])
