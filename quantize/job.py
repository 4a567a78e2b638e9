"""job.py: what all stages of a run share: its options, the source, the plan of the file, the calibration, the tools."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import cext
from quantize import recipe
from quantize.base.blas import padded
from quantize.base.errors import ArgumentError
from quantize.encode.encoder import Encoder
from quantize.meter import Meter
from quantize.recipe import Recipe
from quantize.source import corpus, tensors
from quantize.source.arch import Arch
from quantize.source.corpus import Corpus
from quantize.source.source import Source
from quantize.source.store import Store
from quantize.source.tensors import Tensor, Weights
from quantize.write.journal import Journal

F32 = NDArray[np.float32]

SLAB_VALUES = 1 << 25  # of an embedding or head at a time: 128 MB in float32


@dataclass(frozen=True)
class Options:
    """How to quantise. The defaults are what most people want."""

    type: str = "q4_k_m"  # a name of recipe.RECIPES: its bytes are the budget
    bpw: float | None = None  # instead: bits a weight, over all tensors
    size: int | None = None  # instead: bytes of the whole file
    plain_mix: bool = False  # the fixed types of the mix that type names, whatever they cost
    survey_tokens: int | None = None  # of calibration, that types are chosen on; None: corpus.enough_to_survey
    calibration: tuple[Path, ...] = ()  # text and .jsonl chat; none: the text that ships
    max_tokens: int | None = None  # of calibration, evenly thinned; None: corpus.enough
    importance: bool = True  # weigh the encoders' errors by the calibrated inputs
    awq: bool = False  # search and fold activation-aware scales: slow, and feedback leaves little for them
    feedback: bool = True  # encode under the inputs' covariances, with error feedback
    sequential: bool = True  # with feedback: for the inputs that the file's own layers give, see drift.py
    follow_outputs: bool = True  # with feedback, no plain mix: row by row under the covariance G of its gradients
    evaluate: bool = True  # measure the file against the original on text held back from calibration
    threads: int | None = None  # None: every core this process may use

    @property
    def calibrates(self) -> bool:
        """Whether anything that is asked for needs calibration."""
        return self.importance or self.awq or self.feedback

    def __post_init__(self) -> None:
        if self.bpw is not None and self.size is not None:
            raise ArgumentError("both bits a weight and a size are given", "give --bpw or --size")
        if self.plain_mix and (self.bpw is not None or self.size is not None):
            raise ArgumentError("a plain mix has a size of its own", "give --plain-mix with --type alone")
        if self.bpw is not None and not 0 < self.bpw < math.inf:
            raise ArgumentError(f"bits a weight are {self.bpw}, expected a positive number")
        if self.size is not None and self.size < 1:
            raise ArgumentError(f"size is {self.size} bytes, expected at least 1")
        if self.threads is not None and self.threads < 1:
            raise ArgumentError(f"threads is {self.threads}, expected at least 1")


@dataclass(frozen=True)
class Plan:
    """All that is known before a weight is read."""

    source: Source
    options: Options
    recipe: Recipe
    arch: Arch
    tensors: tuple[Tensor, ...]  # in the order of the file
    left_out: tuple[str, ...]  # stored tensors that GGUF has no use for
    keys: Mapping[str, Any]  # the architecture's
    tokenizer: Mapping[str, Any]  # its keys
    provenance: Mapping[str, object]  # keys: licence and origin, as the checkpoint tells them
    corpus: Corpus | None  # None: neither calibrated nor evaluated
    notes: tuple[str, ...] = ()  # what reading the source found that a person should know

    @property
    def store(self) -> Store:
        """The source's weights."""
        return self.source.store

    @property
    def label(self) -> str:
        """What was asked for, in a word or two."""
        if self.options.size is not None:
            return f"{self.options.size / 1e9:.4g} GB"
        if self.options.bpw is not None:
            return f"{self.options.bpw:g} bpw"
        return f"{self.recipe.name} (plain mix)" if self.options.plain_mix else self.recipe.name

    @property
    def allocates(self) -> bool:
        """Whether types are chosen by measured sensitivity."""
        return self.recipe.is_budget and not self.options.plain_mix

    @property
    def calibrated(self) -> bool:
        """Whether the bytes depend on calibration."""
        return self.recipe.wants_calibration and self.options.calibrates

    @property
    def evaluated(self) -> bool:
        """Whether the file will be measured: the text must be long enough to hold some of it back."""
        return self.options.evaluate and self.corpus is not None and len(self.corpus.held) > 0

    @property
    def survey_tokens(self) -> int:
        """Calibration tokens to be surveyed, whole windows."""
        asked = self.options.survey_tokens
        n_tokens = corpus.enough_to_survey(self.arch.n_embd) if asked is None else asked
        n_windows = len(self.corpus.windows) if self.corpus is not None else 0
        return corpus.WINDOW * min(n_windows, max(1, n_tokens // corpus.WINDOW))

    @property
    def survey_windows(self) -> NDArray[np.int32]:
        """(n, WINDOW) what is surveyed, evenly spread over the calibration windows."""
        assert self.corpus is not None
        windows = self.corpus.windows
        picked: NDArray[np.int32] = windows[
            np.linspace(0, len(windows) - 1, self.survey_tokens // corpus.WINDOW).round().astype(int)
        ]
        return picked

    @property
    def sequential(self) -> bool:
        """Whether layers are calibrated on what the file's own layers before them give."""
        return self.calibrated and self.options.feedback and self.options.sequential

    @property
    def follows_outputs(self) -> bool:
        """Whether the survey finds the covariances G of outputs' gradients, for the encoder to go by."""
        return self.allocates and self.calibrated and self.options.feedback and self.options.follow_outputs

    @property
    def weighted(self) -> bool:
        """Whether importance weights will be at hand."""
        return self.recipe.wants_calibration and self.options.importance

    @cached_property
    def layers(self) -> dict[int, tuple[Tensor, ...]]:
        """The tensors of each layer."""
        return {il: tuple(t for t in self.tensors if t.il == il) for il in range(self.arch.n_layer)}

    @cached_property
    def outside(self) -> dict[str, Tensor]:
        """The tensors outside the layers, by role."""
        return {t.role: t for t in self.tensors if t.il < 0}


def make_plan(source: Source, options: Options) -> Plan:
    """Check the options, the source's headers and the calibration text. QuantizeError, of one of its kinds."""
    chosen = recipe.find(options.type)
    arch = source.arch
    plan = tensors.model_tensors(arch)
    if options.bpw is not None or options.size is not None:
        n_values = sum(t.size for t in plan)
        chosen = recipe.nearest(arch, plan, options.size or int((options.bpw or 0) * n_values / 8))
    tensors.check(arch, source.store, plan)
    left_out = tuple(source.left_out([name for tensor in plan for name in tensor.sources]))
    keys = {"general.architecture": arch.family.architecture, **arch.keys()}
    tokenizer, origin = source.tokenizer, source.provenance
    notes = tuple(source.notes)
    made = Plan(source, options, chosen, arch, tuple(plan), left_out, keys, tokenizer, origin, None, notes)
    if not (made.calibrated or made.allocates or options.evaluate):
        return made
    max_tokens = corpus.enough(arch.n_embd) if options.max_tokens is None else options.max_tokens
    text = corpus.load(options.calibration or corpus.DEFAULT_FILES, {**keys, **tokenizer}, max_tokens)
    return replace(made, corpus=text)


@dataclass(frozen=True)
class Job:
    """A plan under way: stages take it, and leave what they made in its journal."""

    plan: Plan
    journal: Journal
    encoder: Encoder
    meter: Meter
    say: Callable[[str], None]  # a line for the person who waits

    def load(
        self, il: int, sublayer: cext.Sublayer | None = None, on_tensor: Callable[[], None] = lambda: None
    ) -> Weights:
        """The original weights of layer il, or of one sublayer of it; on_tensor before each is read."""
        mine = [t for t in self.plan.layers[il] if sublayer in (None, t.sublayer) or t.role == "ffn_norm"]
        return Weights(self.plan.arch, self.plan.store, mine, on_tensor)

    def engine(self, il: int, weights: Weights, sublayer: cext.Sublayer | None = None) -> cext.Layer:
        """Layer il, or one sublayer of it, over weights that were loaded for it."""
        return cext.Layer(self.plan.keys, il, weights.arrays, self.plan.options.threads, sublayer)

    def slabs(self, tensor: Tensor) -> Iterator[tuple[int, F32]]:
        """(first row, rows) of a matrix outside the layers, whole pieces: a vocabulary can be larger than a layer."""
        n_rows = padded(max(1, SLAB_VALUES // tensor.shape[1]))
        for start in range(0, tensor.shape[0], n_rows):
            stop = min(start + n_rows, tensor.shape[0])
            yield start, self.plan.store.read_rows(tensor.sources[0], start, stop)

    def rows(self, tensor: Tensor, ids: NDArray[Any]) -> F32:
        """(len(ids), n): these rows of a matrix outside the layers, in the order asked for."""
        out = np.empty((len(ids), tensor.shape[1]), np.float32)
        for first, values in self.slabs(tensor):
            mine = (ids >= first) & (ids < first + len(values))
            out[mine] = values[ids[mine] - first]
        return out
