"""effort.py: how long the steps of a run take next to each other, so that the time left can be told from the start.

Everything is counted in multiply-adds of one core at the engine's pace; work of other kinds is counted as what was
measured beside it (Zen 4, V2-Lite's widths). Only ratios matter: the pace itself shows as the run goes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gguf.constants import GGMLQuantizationType as Type

import cext
from cext import Sublayer
from quantize import recipe
from quantize.encode.encoder import FED_BACK, FLOAT_TYPES, GRID_TYPES
from quantize.job import Plan
from quantize.measure import outputs
from quantize.measure.sensitivity import SAMPLED_VALUES
from quantize.meter import Phase
from quantize.source.arch import Arch
from quantize.source.corpus import WINDOW
from quantize.source.tensors import SUBLAYERS, Tensor

READ = 150.0  # a weight of a layer, into memory
BACKWARD = 3.2  # a token's gradients, of its way forward
PRICE = 3e5  # a sampled weight of the survey, in all types
FEW_CORES = 2.5  # that many the steps between wide products keep busy: 16 of a Xeon take half as long as 2
STATISTICS = 1.5e3  # a hidden channel of an expert and a token, counted and kept
SEARCH = 3e11  # the folds of a layer
FLOAT, PLAIN, PLAIN_GRID = 2e2, 5e3, 5e4  # a weight encoded by ggml
FED, FED_GRID = 4e3, 2.1e4  # and under a covariance,
FED_COLUMN = 1.5  # with as much for each column beside it
FOLLOWED = 2.5  # times that, where rows follow each other: the tables are read for few at a time
# Bits a weight at which grid types begin to be chosen, and where most are.
FEW_GRIDS, MOST_GRIDS = 3.9, 3.0


@dataclass(frozen=True)
class Work:
    """A piece of the write stage: a layer's sublayer, the embeddings (il -1) or the head (il n_layer)."""

    il: int
    sublayer: Sublayer | None
    calibrate: float = 0.0
    search: float = 0.0
    encode: float = 0.0

    @property
    def all(self) -> float:
        """The whole piece."""
        return self.calibrate + self.search + self.encode


@dataclass(frozen=True)
class Effort:
    """Of a plan's steps. types: by tensor name, as far as they are settled."""

    plan: Plan
    types: Mapping[str, Type] | None = None

    @property
    def threads(self) -> int:
        """That compute."""
        return self.plan.options.threads or cext.cores()

    @property
    def cores(self) -> float:
        """That steps of many small pieces make use of."""
        return min(self.threads, FEW_CORES)

    def phases(self) -> dict[Phase, float]:
        """The phases that the plan has, in order."""
        found: dict[Phase, float] = {}
        if self.plan.allocates:
            found["survey"] = sum(self.survey_forward()) + sum(self.survey_back())
        found["write"] = sum(work.all for work in self.write())
        if self.plan.evaluated:
            found["evaluate"] = self._evaluate()
        return found

    def survey_forward(self) -> list[float]:
        """Layer by layer."""
        n, arch = self.plan.survey_tokens, self.plan.arch
        return [n * forward(arch, il) / self.threads + self._read(il) for il in range(arch.n_layer)]

    def survey_back(self) -> list[float]:
        """The embeddings, layer by layer, the head."""
        arch, n = self.plan.arch, self.plan.survey_tokens
        price = PRICE * SAMPLED_VALUES * (1 + self._grids())
        layers = [
            n * BACKWARD * forward(arch, il) + price * sum(tensor.is_matrix for tensor in self.plan.layers[il])
            for il in range(arch.n_layer)
        ]
        head = 3.0 * n * arch.n_vocab * arch.n_embd + price
        return [effort / self.cores for effort in (price, *layers, head)]

    def write(self) -> list[Work]:
        """All pieces, in order."""
        n_layer = self.plan.arch.n_layer
        layers = [self._sublayer(il, sublayer) for il in range(n_layer) for sublayer in SUBLAYERS]
        return [self._outside(-1, "token_embd"), *layers, self._outside(n_layer, "output")]

    def _outside(self, il: int, role: str) -> Work:
        tensor = self.plan.outside.get(role)
        return Work(il, None, encode=self._encode(tensor) / self.threads if tensor else 0.0)

    def _sublayer(self, il: int, sublayer: Sublayer) -> Work:
        plan, arch = self.plan, self.plan.arch
        layer = [t for t in plan.layers[il] if t.sublayer == sublayer]
        through = _attention(arch) if sublayer == "attention" else _feed_forward(arch, il)
        n_held = plan.corpus.held.size if plan.corpus is not None and plan.evaluated else 0
        calibrate, search, prepare = n_held * through / self.threads, 0.0, 0.0
        if plan.corpus is not None and plan.calibrated:
            n_tokens, feedback = plan.corpus.windows.size, plan.options.feedback
            calibrate += n_tokens * through / self.threads + READ * sum(t.size for t in layer)
            if sublayer == "feed_forward" and not arch.is_dense(il):
                calibrate += STATISTICS * n_tokens * arch.n_expert_used * arch.n_ff_expert / self.cores
            calibrate += n_tokens * _taps(arch, il, sublayer) / self.threads if feedback else 0.0
            search = SEARCH / len(SUBLAYERS) / self.threads if plan.options.awq else 0.0
            prepare = _prepare(arch, il, sublayer, n_tokens) / self.cores if feedback else 0.0
            if plan.sequential and sublayer == "attention":
                calibrate += n_tokens * _attention(arch) / self.threads
                prepare += n_tokens * _attention(arch) / self.threads
            elif plan.sequential:
                prepare += n_tokens * _drift(arch, il) / self.cores
        return Work(il, sublayer, calibrate, search, prepare + sum(map(self._encode, layer)) / self.cores)

    def _read(self, il: int) -> float:
        return READ * sum(t.size for t in self.plan.layers[il])

    def _encode(self, tensor: Tensor) -> float:
        type_ = self._type(tensor)
        if type_ in FLOAT_TYPES:
            return FLOAT * tensor.size
        fed_back = self.plan.calibrated and self.plan.options.feedback and type_ in FED_BACK
        codes, grids = (FED, FED_GRID) if fed_back else (PLAIN, PLAIN_GRID)
        share = float(type_ in GRID_TYPES) if self.types is not None or not self.plan.allocates else self._grids()
        cost = codes + share * (grids - codes) + (FED_COLUMN * tensor.shape[-1] if fed_back else 0.0)
        follows = fed_back and self.plan.follows_outputs and tensor.role in outputs.ROLES
        return tensor.size * cost * (FOLLOWED if follows else 1.0)

    def _type(self, tensor: Tensor) -> Type:
        if self.types is not None:
            return self.types[tensor.name]
        return recipe.type_of(self.plan.recipe, self.plan.arch, tensor, self.plan.weighted)

    def _grids(self) -> float:
        """The share of weights that will come out in grid types, before they are chosen."""
        options, n_values = self.plan.options, sum(t.size for t in self.plan.tensors)
        if options.bpw is not None:
            bits = options.bpw
        elif options.size is not None:
            bits = 8 * options.size / n_values
        else:
            bits = 8 * sum(recipe.nbytes(t, self._type(t)) for t in self.plan.tensors) / n_values
        return min(1.0, max(0.0, (FEW_GRIDS - bits) / (FEW_GRIDS - MOST_GRIDS)))

    def _evaluate(self) -> float:
        assert self.plan.corpus is not None
        arch, n = self.plan.arch, self.plan.corpus.held.size
        layers = sum(forward(arch, il) for il in range(arch.n_layer))
        return n * (layers + 2.0 * arch.n_vocab * arch.n_embd) / self.threads


def forward(arch: Arch, il: int) -> float:
    """Multiply-adds of a token through layer il, in the middle of a window."""
    return _attention(arch) + _feed_forward(arch, il)


def _feed_forward(arch: Arch, il: int) -> float:
    n_ff = arch.n_ff if arch.is_dense(il) else arch.n_ff_expert * (arch.n_expert_used + arch.n_expert_shared)
    return 3.0 * arch.n_embd * n_ff


def _attention(arch: Arch) -> float:
    head = arch.nope + arch.rope
    over_window = arch.n_head * (arch.v_dim * arch.n_embd + WINDOW // 2 * (head + arch.v_dim))
    if arch.attention == "plain":
        keys_and_values = arch.n_head_kv * (head + arch.v_dim)
        return float(arch.n_embd * (arch.n_head * head + keys_and_values) + over_window)
    queries = arch.q_lora_rank * (arch.n_embd + arch.n_head * head) or arch.n_embd * arch.n_head * head
    latent = arch.kv_lora_rank * arch.n_head * (arch.nope + arch.v_dim) + arch.n_embd * (arch.kv_lora_rank + arch.rope)
    return float(queries + latent + over_window)


def _drift(arch: Arch, il: int) -> float:
    """A token's way through drift.py: hidden channels three times, an output, and what inputs and hidden channels lack
    beside their covariances.
    """
    n = arch.n_embd

    def network(n_ff: int) -> float:
        return 7.0 * n * n_ff + n_ff * n_ff

    if arch.is_dense(il):
        return n * n + network(arch.n_ff)
    shared = network(arch.n_expert_shared * arch.n_ff_expert)
    return n * n + shared + arch.n_expert_used * (n * n + network(arch.n_ff_expert))


def _taps(arch: Arch, il: int, sublayer: Sublayer) -> float:
    """A token's share in the covariances of the inputs of a sublayer's matrices."""
    if sublayer == "attention":
        widths = [arch.n_embd, arch.q_lora_rank, arch.kv_lora_rank, arch.n_head * arch.v_dim]
    else:
        widths = [arch.n_embd, arch.n_ff if arch.is_dense(il) else arch.n_ff_expert * arch.n_expert_shared]
    return sum(n * n / 2 for n in widths)


def _prepare(arch: Arch, il: int, sublayer: Sublayer, n_tokens: int) -> float:
    """The covariances of a sublayer's matrices that have their own, and the factors of all."""
    if sublayer == "attention":
        return float(arch.n_embd**3 + (arch.n_head * arch.v_dim) ** 3 + arch.q_lora_rank**3)
    if arch.is_dense(il):
        return float(arch.n_embd**3 + arch.n_ff**3)
    n = arch.n_expert_used * n_tokens / arch.n_expert
    expert = sum(width**3 + n * width**2 / 2 for width in (arch.n_embd, arch.n_ff_expert))
    return float(arch.n_embd**3 + arch.n_expert * expert)
