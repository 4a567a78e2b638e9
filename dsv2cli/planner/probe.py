"""probe.py: how fast this machine runs a model's layers, measured in about a second without the model.

A few layers of the model's own shapes and types are laid as a hollow file and run by the engine: zeros take as long to
read and to multiply as weights do. The norms, the router and some embeddings are written, so that tokens choose experts
as they do in a model; there are fewer experts, and fewer tokens in a prompt by as much, so that an expert has as many
of them. What is measured is scaled to the model by the bytes, the products and the layers that it has more.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from dsv2cli.anatomy import BLOCK, Anatomy, parts_of
from dsv2cli.engines.cache import count

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from cext import Model, TensorInfo
    from cext.model import KvType

ENOUGH_BYTES = 160 << 20  # that a token of the probe reads: more than a share of most caches
LARGE_CACHE = 64 << 20  # what it reads would stay in a cache that is larger, as no model does
LAYER_BYTES = 128 << 20  # of the routed experts of a layer, all of which a prompt touches
MOST_BYTES = 768 << 20  # of all that is touched
DEPTH = 1 << 15  # tokens of context where attention is measured
PROMPT = 512  # tokens read at once, as chat does
LEAST_PROMPT = 32
BLOCK_TOKENS = 256  # that a cache grows by
ROUNDS, STEPS, DEEP_STEPS = 5, 4, 2
SECONDS = 1.5  # after which no further round begins
SEED = 20240507
EMBEDDINGS, HEAD = "embeddings", "head"  # parts of an anatomy
UNSAFE_SHARE = 0.5  # of the free memory, that a probe may touch
ROOM = 16 << 20  # beside what is touched, of the header and embeddings; tmpfs allots a hole's pages once they are read


@dataclass(frozen=True)
class Rates:
    """This machine on this model. Bytes a second while decoding, multiply-adds a second while reading a prompt, seconds
    that a layer's attention takes for each token of context; spread: of the rounds, relative to their median."""

    threads: int
    isa: str
    bandwidth: float
    products: float
    attention: float
    spread: float
    seconds: float  # that measuring took
    scratch: int | None  # bytes of memory that steps of PROMPT tokens touched; None where the system does not tell


@dataclass(frozen=True)
class Work:
    """What a token takes of a model or of a part of it: bytes read, multiply-adds of its layers, bytes of the head."""

    token_bytes: int
    layer_products: int
    head_bytes: int
    n_layer: int


def work_of(tensors: list[TensorInfo], keys: dict[str, Any]) -> Work:
    """Of all layers that these tensors make."""
    n_expert, n_used, n_layer = (count(keys, k) for k in ("expert_count", "expert_used_count", "block_count"))
    token_bytes = sum(part.token_bytes for part in parts_of(tensors, keys))
    tied = not any(t.name == "output.weight" for t in tensors)
    products = head = 0
    for t in tensors:
        block = BLOCK.match(t.name)
        if t.name == ("token_embd.weight" if tied else "output.weight"):
            head = t.nbytes
        elif block and int(block[1]) < n_layer and len(t.shape) > 1:
            n = 1
            for dim in t.shape:
                n *= dim
            products += n * n_used // n_expert if "_exps." in t.name and n_expert else n
    return Work(token_bytes, products, head, n_layer)


def measure(found: Anatomy, kv_type: KvType, threads: int | None, free: int | None) -> Rates | str:
    """Rates for a model that dsv2's own engine runs; why there are none where they cannot be measured."""
    from cext import EngineError, Gguf, Model
    from cext.system import free_disk

    begun = time.perf_counter()
    try:
        with Gguf(found.path) as gguf, TemporaryDirectory(prefix="dsv2-probe-") as folder:
            small = _Small(list(gguf.tensors), found)
            if free is not None and small.touched > UNSAFE_SHARE * free:
                return "too little memory is free to measure in"
            if free_disk(Path(folder)) < small.touched + ROOM:
                return f"too little is free in {Path(folder).parent} to measure in: TMPDIR names another folder"
            path = Path(folder) / "probe.gguf"
            small.write(path)
            with Model(path, threads) as model:
                return _rates(model, small, kv_type, _Cold(None if free is None else free - small.touched), begun)
    except (OSError, EngineError) as error:
        return f"this machine could not be measured: {error}"


class _Cold:
    """Drives the probe's weights out of a large cache, before what is timed."""

    def __init__(self, free: int | None) -> None:
        import numpy as np

        from cext.system import cache_bytes

        nbytes = cache_bytes() or 0
        is_needed = nbytes > LARGE_CACHE and (free is None or nbytes <= UNSAFE_SHARE * free)
        self._words = np.ones(nbytes // 8 if is_needed else 0, np.int64)

    def __call__(self) -> None:
        self._words[::8].sum()  # of each line a word


class _Small:
    """A few layers of a model: one dense where it has any, and such with experts from all its depth."""

    def __init__(self, tensors: list[TensorInfo], found: Anatomy) -> None:
        self.architecture = found.architecture
        self.whole = work_of(tensors, found.keys)
        by_layer: dict[int, list[TensorInfo]] = {}
        self._outside = []
        n_layer = count(found.keys, "block_count")
        for t in tensors:
            if (block := BLOCK.match(t.name)) is None:
                self._outside.append(t)
            elif int(block[1]) < n_layer:
                by_layer.setdefault(int(block[1]), []).append(t)
        n_dense = min(count(found.keys, "leading_dense_block_count"), n_layer)
        self._set_experts(by_layer, count(found.keys, "expert_count"), count(found.keys, "expert_used_count"))
        chosen = self._layers(by_layer, n_dense)
        self.n_prompt = max(LEAST_PROMPT, PROMPT * self.n_expert // self.n_all) if self.n_all else PROMPT
        self._tensors = [self._renamed(t, i) for i, il in enumerate(chosen) for t in by_layer[il]]
        changes = {
            "block_count": len(chosen), "leading_dense_block_count": sum(il < n_dense for il in chosen),
            "nextn_predict_layers": 0, "expert_count": self.n_expert, "expert_group_count": 1,
            "expert_group_used_count": 1,
        }  # fmt: skip
        self.keys = {**found.keys, **{k: v for k, v in changes.items() if k in found.keys}}
        self.keys["vocab_size"] = next(t.shape[1] for t in self._outside if t.name == "token_embd.weight")

    def _set_experts(self, by_layer: dict[int, list[TensorInfo]], n_all: int, n_used: int) -> None:
        """So many experts a layer that a prompt touches no more than it has to."""
        largest = max((sum(t.nbytes for t in ts if "_exps." in t.name) for ts in by_layer.values()), default=0)
        self.n_all = n_all
        self.n_expert = n_all
        if n_all and largest > LAYER_BYTES:
            self.n_expert = min(n_all, max(2 * n_used, n_all * LAYER_BYTES // largest))

    def _layers(self, by_layer: dict[int, list[TensorInfo]], n_dense: int) -> list[int]:
        outside = sum(t.nbytes for t in self._outside if t.name.startswith("output."))
        every = sorted(by_layer)
        if sum(self._touched(by_layer[il]) for il in every) + outside <= ENOUGH_BYTES:
            return every
        dense, sparse = [il for il in every if il < n_dense][:1], [il for il in every if il >= n_dense]
        chosen = dense or sparse[:1]
        if not sparse or sparse == chosen:
            sparse = [il for il in every if il not in chosen]
        read = outside + sum(self._read(by_layer[il]) for il in chosen)
        touched = outside + sum(self._touched(by_layer[il]) for il in chosen)
        n = 0
        while n < len(sparse) and (n < 2 or read < ENOUGH_BYTES):
            read, touched = read + self._read(by_layer[sparse[n]]), touched + self._touched(by_layer[sparse[n]])
            if n and touched > MOST_BYTES:
                break
            n += 1
        return sorted({*chosen, *(sparse[i * len(sparse) // n] for i in range(n))}) if n else chosen

    def _shrunk(self, t: TensorInfo) -> int:
        return t.nbytes * self.n_expert // self.n_all if "_exps." in t.name and self.n_all else t.nbytes

    def _touched(self, tensors: list[TensorInfo]) -> int:
        return sum(map(self._shrunk, tensors))

    def _read(self, tensors: list[TensorInfo]) -> int:
        return sum(t.nbytes // 10 if "_exps." in t.name else t.nbytes for t in tensors)

    def _renamed(self, t: TensorInfo, il: int) -> TensorInfo:
        """The tensor in layer il, of so many experts."""
        name, shape = BLOCK.sub(f"blk.{il}.", t.name, count=1), t.shape
        if self.n_all and ("_exps." in name or "ffn_gate_inp." in name or "exp_probs_b" in name):
            shape = (*shape[:-1], self.n_expert) if shape[-1] == self.n_all else shape
        return t._replace(name=name, shape=shape, nbytes=t.nbytes * shape[-1] // t.shape[-1])

    @property
    def infos(self) -> list[TensorInfo]:
        """All its tensors: a head of its own, and embeddings in halves, of which rows can be written."""
        embeddings = next(t for t in self._outside if t.name == "token_embd.weight")
        n = embeddings.shape[0] * embeddings.shape[1]
        made = [embeddings._replace(type=1, type_name="f16", nbytes=2 * n)]
        if not any(t.name == "output.weight" for t in self._outside):
            made.append(embeddings._replace(name="output.weight"))
        return made + [t for t in self._outside if t.name != "token_embd.weight"] + self._tensors

    @property
    def touched(self) -> int:
        return sum(t.nbytes for t in self.infos if t.name != "token_embd.weight")

    def write(self, path: Path) -> None:
        import numpy as np
        from gguf.constants import GGMLQuantizationType as Type

        from quantize.write.writer import write_hollow

        rng = np.random.default_rng(SEED)
        slots = write_hollow(
            path,
            {"general.architecture": self.architecture}
            | {f"{self.architecture}.{key}": value for key, value in self.keys.items()},
            [(t.name, t.shape[::-1], Type(t.type)) for t in self.infos],
        )
        with path.open("r+b") as file:
            for name, slot in slots.items():
                values = self._values(rng, name, slot.shape)
                if values is not None:
                    file.seek(slot.offset)
                    file.write(values)

    def _values(self, rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> bytes | None:
        import numpy as np

        if name.endswith("_norm.weight"):
            return np.ones(shape, "<f4").tobytes()
        if "ffn_gate_inp." in name:
            return rng.standard_normal(shape, np.float32).astype("<f4").tobytes()
        if name == "token_embd.weight":
            return rng.standard_normal((min(PROMPT, shape[0]), shape[1]), np.float32).astype("<f2").tobytes()
        return None


def _rates(model: Model, small: _Small, kv_type: KvType, cold: _Cold, begun: float) -> Rates:
    import numpy as np

    from cext.system import own_bytes

    rng = np.random.default_rng(SEED)
    ids = rng.integers(0, min(PROMPT, model.hparams["n_vocab"]), PROMPT, np.int32)
    shallow, deep = model.session(PROMPT + 1, kv_type), model.session(DEPTH + 1, kv_type)
    prompt = ids[: small.n_prompt]
    before = own_bytes()
    deep.eval(ids)
    after, cache = own_bytes(), deep.kv_bytes * -(-PROMPT // BLOCK_TOKENS) * BLOCK_TOKENS // (DEPTH + 1)
    scratch = None if before is None or after is None else max(0, after - before - cache)
    deep.rewind(small.n_prompt)
    deep.repeat(DEPTH)
    near: list[float] = []
    far: list[float] = []
    read: list[float] = []
    for i in range(ROUNDS + 1):  # the first touches every page
        times = (
            _step_seconds(shallow.eval, lambda: shallow.rewind(0), ids, STEPS, cold),
            _step_seconds(deep.eval, lambda: deep.rewind(DEPTH), ids, DEEP_STEPS, cold),
            _prompt_seconds(shallow, prompt, cold),
        )
        if i:
            for samples, seconds in zip((near, far, read), times, strict=True):
                samples.append(seconds)
        if len(near) >= 2 and time.perf_counter() - begun > SECONDS:
            break
    part = work_of(small.infos, small.keys)
    step, deeper, whole = (statistics.median(samples) for samples in (near, far, read))
    bandwidth = part.token_bytes / step
    layers = max(whole - part.head_bytes / bandwidth, whole / 2)
    return Rates(
        threads=model.threads,
        isa=model.isa,
        bandwidth=bandwidth,
        products=part.layer_products * len(prompt) / layers,
        attention=max(0.0, deeper - step) / DEPTH / max(1, part.n_layer),
        spread=max((max(s) - min(s)) / statistics.median(s) for s in (near, read)),
        seconds=time.perf_counter() - begun,
        scratch=scratch,
    )


def _step_seconds(
    evaluate: Callable[[NDArray[np.int32]], object],
    rewind: Callable[[], None],
    ids: NDArray[np.int32],
    n: int,
    cold: _Cold,
) -> float:
    """Of one token decoded, the median of n."""
    rewind()
    evaluate(ids[:1])  # wakes the workers
    times = []
    for i in range(n):
        rewind()
        cold()
        begun = time.perf_counter()
        evaluate(ids[i + 1 : i + 2])
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def _prompt_seconds(session: Any, prompt: NDArray[np.int32], cold: _Cold) -> float:
    session.rewind(0)
    cold()
    begun = time.perf_counter()
    session.eval(prompt)
    return time.perf_counter() - begun
