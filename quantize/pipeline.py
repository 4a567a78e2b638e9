"""pipeline.py: checkpoint in, GGUF out, one layer in memory at a time. Read this first.

For each layer: load it, run the calibration tokens through it, search its folds, encode its tensors part by part, write
each at its place, drop it. Every tensor's type, and with it the file's whole layout, is settled before the first weight
is read.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import cext
from quantize import arch as arch_of
from quantize import corpus, recipe, report, tensors
from quantize.arch import ARCHITECTURE, Arch
from quantize.awq import FoldResult, Scales, Searcher
from quantize.calibrate import FEW_TOKENS, LayerStats, Stream
from quantize.checkpoint import Checkpoint
from quantize.encode import Encoder
from quantize.errors import QuantizeError
from quantize.evidence import Evidence, n_parts
from quantize.report import OnProgress, Progress, Report, Stage
from quantize.tensors import Form, Tensor
from quantize.vocab import read_vocab
from quantize.writer import Writer

F32 = NDArray[np.float32]

SLAB_VALUES = 1 << 25  # of an embedding or head at a time: 128 MB in float32
# Of a calibrated layer's time, for the progress bar: measured on storyteller-52m, near enough elsewhere.
STAGE_SHARES: dict[Stage, tuple[float, float]] = {"calibrate": (0.0, 0.5), "search": (0.5, 0.3), "encode": (0.8, 0.2)}


@dataclass(frozen=True)
class Options:
    """How to quantise. The defaults are what most people want."""

    type: str = "q4_k_m"  # a name of recipe.RECIPES
    calibration: tuple[Path, ...] = ()  # text and .jsonl chat; none: the text that ships
    max_tokens: int = 65_536  # of calibration, evenly thinned
    importance: bool = True  # weigh the encoders' errors by the calibrated inputs
    awq: bool = True  # search and fold activation-aware scales
    threads: int | None = None  # None: every core this process may use


def quantize(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    options: Options | None = None,
    progress: OnProgress | None = None,
) -> Report:
    """Turn the checkpoint folder source into the GGUF file out.

    out appears only when it is complete; an exception, Ctrl-C or a full disk leaves what was there before. progress is
    called often, from this thread. Raises QuantizeError, of one of its kinds.
    """
    options = options or Options()
    if options.threads is not None and options.threads < 1:
        raise QuantizeError(f"threads is {options.threads}, expected at least 1")
    with Checkpoint(source) as checkpoint, Encoder(options.threads) as encoder:
        return _Run(checkpoint, Path(out), options, encoder, progress).run()


class _Run:
    """One run: the plan, and the state that its layers hand on."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        out: Path,
        options: Options,
        encoder: Encoder,
        progress: OnProgress | None,
    ) -> None:
        self.started = time.monotonic()
        self.checkpoint, self.out, self.options = checkpoint, out, options
        self.recipe = recipe.find(options.type)
        self.encoder, self.progress = encoder, progress
        self.arch = arch_of.parse(checkpoint.config)
        self.plan = tensors.model_tensors(self.arch)
        self.left_out = tensors.check(self.arch, checkpoint, self.plan)
        weighted = self.recipe.wants_calibration and options.importance
        self.calibrated = weighted or (self.recipe.wants_calibration and options.awq)
        self.types = {t.name: recipe.type_of(self.recipe, self.arch, t, weighted) for t in self.plan}
        self.nbytes = sum(recipe.nbytes(t, self.types[t.name]) for t in self.plan)
        self.keys = {"general.architecture": ARCHITECTURE, **self.arch.keys()}
        self.tokenizer = read_vocab(checkpoint.path, self.arch.n_vocab).keys()
        self.calibration: corpus.Corpus | None = None
        self.stream: Stream | None = None
        self.folds: list[FoldResult] = []
        self.coverage: list[report.Coverage] = []
        self.written = self.done = 0  # bytes of the file; bytes of the file's share of the work

    def run(self) -> Report:
        """Everything, in order."""
        self._tell("read", -1, 0.0)
        if self.calibrated:
            files = self.options.calibration or corpus.DEFAULT_FILES
            self.calibration = corpus.load(files, {**self.keys, **self.tokenizer}, self.options.max_tokens)
        infos = [(t.name, t.shape, self.types[t.name]) for t in self.plan]
        with Writer(self.out, self._metadata(), infos) as writer:
            self.writer = writer
            by_layer: dict[int, list[Tensor]] = {}
            for tensor in self.plan:
                by_layer.setdefault(tensor.il, []).append(tensor)
            outside = {t.role: t for t in by_layer.pop(-1)}
            self._embed(outside["token_embd"])
            for il, layer in by_layer.items():
                self._layer(il, layer)
            self._head(outside)
            self._tell("finish", -1, 1.0)
            writer.commit(self._metadata())
            return self._report()

    def _embed(self, tensor: Tensor) -> None:
        """Encode the embeddings, and start the calibration stream with those of its tokens."""
        ids = self.calibration.windows.reshape(-1) if self.calibration else np.zeros(0, np.int32)
        x = np.empty((len(ids), self.arch.n_embd), np.float32)
        for start, values in self._slabs(tensor):
            mine = (ids >= start) & (ids < start + len(values))
            x[mine] = values[ids[mine] - start]
            self._write(tensor, values, None)
        if self.calibration is not None:
            self.stream = Stream(self.arch, x)

    def _slabs(self, tensor: Tensor) -> Iterator[tuple[int, F32]]:
        """A matrix outside the layers, some rows at a time: a vocabulary can be larger than a layer."""
        n_rows = max(1, SLAB_VALUES // tensor.shape[1])
        for start in range(0, tensor.shape[0], n_rows):
            stop = min(start + n_rows, tensor.shape[0])
            yield start, self.checkpoint.read_rows(tensor.sources[0], start, stop)

    def _layer(self, il: int, layer: list[Tensor]) -> None:
        by_role = {t.role: t for t in layer}
        nbytes = sum(recipe.nbytes(t, self.types[t.name]) for t in layer)
        read = _PartReader(self.arch, self.checkpoint)
        evidence, scales = None, Scales()
        if self.stream is not None:
            stats = self._calibrate(il, layer, nbytes)
            evidence = Evidence(self.arch, by_role, stats, read, self.options.importance)
            if self.options.awq:
                begin, share = STAGE_SHARES["search"]
                types = {t.role: self.types[t.name] for t in layer}
                scales, results = Searcher(evidence, types, read, self.encoder).run(
                    il, lambda f: self._tell("search", il, nbytes * (begin + f * share))
                )
                self.folds += results
        start, share = STAGE_SHARES["encode"] if evidence else (0.0, 1.0)
        encoded = 0
        for tensor in layer:
            for part in range(n_parts(tensor)):
                self._tell("encode", il, nbytes * start + share * encoded)
                weights = None
                if evidence is not None and recipe.is_matrix(tensor):
                    weights = scales.importance(tensor.role, part, evidence.importance(tensor.role, part))
                encoded += self._write(tensor, scales.apply(tensor.role, part, read(tensor, part)), weights)
        self.done += nbytes

    def _calibrate(self, il: int, layer: list[Tensor], nbytes: int) -> LayerStats:
        """Run the stream through the layer's original weights; they are dropped on return."""
        assert self.stream is not None
        weights = {}
        for tensor in layer:
            self._tell("calibrate", il, 0.0)
            weights[tensor.name] = tensors.read_half(self.arch, self.checkpoint, tensor)
        length = STAGE_SHARES["calibrate"][1]
        with cext.Layer(self.keys, il, weights, self.options.threads) as engine:
            stats = self.stream.advance(engine, il, lambda f: self._tell("calibrate", il, f * length * nbytes))
        if stats.routed is not None:
            self.coverage.append(report.coverage_of(il, stats.routed.counts, FEW_TOKENS))
        return stats

    def _head(self, outside: Mapping[str, Tensor]) -> None:
        norm = tensors.read(self.arch, self.checkpoint, outside["output_norm"])
        self._write(outside["output_norm"], norm, None)
        if "output" in outside:
            weights = None
            if self.stream is not None and self.options.importance:
                weights = self.stream.final_inputs(norm).mean_square
            for _, values in self._slabs(outside["output"]):
                self._write(outside["output"], values, weights)

    def _write(self, tensor: Tensor, values: F32, importance: F32 | None) -> int:
        """Encode the next rows of a tensor and put them after those before; returns their bytes."""
        try:
            data = self.encoder.encode(values, self.types[tensor.name], importance)
        except QuantizeError as error:
            raise QuantizeError(f"tensor `{tensor.name}`: {error}", error.hint) from error
        self.writer.append(tensor.name, data)
        self.written += data.nbytes
        if tensor.il < 0:
            self.done += data.nbytes
            self._tell("encode", -1, 0.0)
        return data.nbytes

    def _tell(self, stage: Stage, il: int, inside: float) -> None:
        """inside: how far into layer il, in its encoded bytes."""
        if self.progress is None:
            return
        fraction = min(1.0, (self.done + inside) / self.nbytes)
        seconds = time.monotonic() - self.started
        self.progress(Progress(stage, il, self.arch.n_layer, fraction, self.written, self.nbytes, seconds))

    def _metadata(self) -> dict[str, object]:
        """Every key of the file. Its length never changes during a run: counts that come later are zeros at first."""
        keys: dict[str, object] = {
            **self.keys,
            "general.type": "model",
            "general.name": _model_name(self.checkpoint.path),
            "general.file_type": int(self.recipe.file_type),
            "general.quantization_version": 2,
            **self.tokenizer,
        }
        if self.calibration is not None:
            usage = np.zeros((self.arch.n_layer, self.arch.n_expert), np.uint32)
            for layer in self.coverage:
                usage[layer.il] = layer.counts
            keys |= {
                "dsv2.calibration.sources": list(self.calibration.sources),
                "dsv2.calibration.sha256": self.calibration.sha256,
                "dsv2.calibration.tokens": self.calibration.n_tokens,
                # Tokens that chose each expert, (block_count, expert_count): which ones to keep near.
                "dsv2.expert_usage": usage.reshape(-1),
            }
        return keys

    def _report(self) -> Report:
        sizes = [(t, self.types[t.name], recipe.nbytes(t, self.types[t.name])) for t in self.plan]
        notes = report.coverage_notes(self.coverage, FEW_TOKENS)
        if self.left_out and self.arch.n_nextn:
            notes.insert(
                0, f"{self.arch.n_nextn} multi-token prediction layer(s) left out: GGUF runs the model without"
            )
        return Report(
            path=self.out,
            recipe=self.recipe.name,
            nbytes=self.out.stat().st_size,
            source_nbytes=self.checkpoint.nbytes,
            n_values=sum(t.size for t in self.plan),
            roles=report.role_sizes(sizes),
            folds=tuple(self.folds),
            coverage=tuple(self.coverage),
            calibration_tokens=self.calibration.n_tokens if self.calibration else 0,
            calibration_sources=self.calibration.sources if self.calibration else (),
            calibration_sha256=self.calibration.sha256 if self.calibration else "",
            left_out=tuple(self.left_out),
            notes=tuple(notes),
            seconds=time.monotonic() - self.started,
        )


def _model_name(folder: Path) -> str:
    """The folder's name; the repository's where the folder is a snapshot in Hugging Face's cache."""
    folder = folder.resolve()
    if folder.parent.name == "snapshots":
        return folder.parent.parent.name.split("--")[-1]
    return folder.name


class _PartReader:
    """Parts of a layer's tensors in float32, experts one by one. Keeps the last whole tensor: heads share one."""

    def __init__(self, arch: Arch, checkpoint: Checkpoint) -> None:
        self.arch, self.checkpoint = arch, checkpoint
        self._whole = lru_cache(maxsize=1)(lambda tensor: tensors.read(arch, checkpoint, tensor))

    def __call__(self, tensor: Tensor, part: int) -> F32:
        if tensor.form is Form.STACK:
            return self.checkpoint.read_f32(tensor.sources[part])
        whole: F32 = self._whole(tensor)
        return whole if tensor.form is Form.WHOLE else whole[part]
