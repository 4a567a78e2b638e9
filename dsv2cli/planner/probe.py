"""probe.py: how fast this machine runs a model's layers, measured in a few seconds without the model.

The hollow files of hollow.py are run: the first layer with the head, and a few layers. What a layer of each kind takes
of a decoded token is told from the two, of a prompt from some layers at a time, and scaled to all of that kind that the
model has: by bytes where it decodes, by products where it reads a prompt.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from dsv2cli.planner.hollow import FREE_SHARE, PROMPT, SEED, Small, Work

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from cext import Model, Reading
    from cext.model import KvType
    from dsv2cli.anatomy import Anatomy

LARGE_CACHE = 64 << 20  # what is read here would stay in a cache that is larger, as no larger model does
DEPTH, LEAST_DEPTH = 1 << 15, 1 << 12  # tokens of context where attention is measured
CACHE_BYTES = 512 << 20  # of that context at most, as of attention that is not latent
BLOCK_TOKENS = 256  # that a cache grows by
ROUNDS, STEPS, DEEP_STEPS = 5, 4, 2
SECONDS = 2.0  # after which no further round begins
HEAD = "head"  # a part of an anatomy
UNSAFE_SHARE = 0.5  # of the free memory, that a probe may touch
PROBE = "probe{}.gguf"
ROOM = 16 << 20  # beside what is touched, of the header and embeddings; tmpfs allots a hole's pages once they are read
MOST_FIXED = 0.9  # of a layer's time, that is not its experts'


@dataclass(frozen=True)
class Rates:
    """This machine on this model. Bytes a second of all its weights while decoding, multiply-adds a second of all its
    layers while reading a prompt, seconds that a layer's attention takes for each token of context; spread: of the
    rounds, relative to their median."""

    threads: int
    isa: str
    bandwidth: float
    products: float
    attention: float
    spread: float
    seconds: float  # that measuring took
    scratch: int | None  # bytes of memory that steps of PROMPT tokens touched; None where the system does not tell
    slowed: float = 1.0  # by what small pages of the file that is here, which bandwidth is of, make decoding longer
    small_pages: float = 0.0  # the share of it that lies in such, and would not if it were read anew


@dataclass(frozen=True)
class Prompt:
    """Seconds of a prompt: in the first layer, in those between, in the last with the head. Of all tokens but its last
    the last layer computes keys and values alone, as a model's does: that is no measure of the others."""

    first: float
    between: float
    last: float

    @property
    def seconds(self) -> float:
        return self.first + self.between + self.last


@dataclass(frozen=True)
class Times:
    """Seconds, of one round: a step of the first layer with the head and of all layers that are here, the latter in a
    long context too; a prompt in them, in the first layer also of PROMPT tokens where the others have fewer."""

    first_step: float
    step: float
    deep_step: float
    prompt: Prompt
    first_whole: float


def measure(found: Anatomy, kv_type: KvType, threads: int | None, free: int | None) -> Rates | str:
    """Rates for a model that dsv2's own engine runs; why there are none where they cannot be measured."""
    from cext import EngineError, Gguf
    from cext.system import free_disk

    begun = time.perf_counter()
    try:
        with Gguf(found.path) as gguf, TemporaryDirectory(prefix="dsv2-probe-") as folder:
            small = Small(list(gguf.tensors), found, free)
            token_bytes = found.kv_bytes[kv_type] * small.all.work.n_layer // max(1, small.whole.n_layer)
            depth = depth_of(token_bytes, CACHE_BYTES if free is None else min(CACHE_BYTES, free // FREE_SHARE))
            caches = token_bytes * (depth + 2 * PROMPT)
            files = small.all.touched + (small.first.touched if small.first else 0)
            touched = files + caches
            if free is not None and touched > UNSAFE_SHARE * free:
                return "too little memory is free to measure in"
            if free_disk(Path(folder)) < files + ROOM:
                return f"too little is free in {Path(folder).parent} to measure in: TMPDIR names another folder"
            cold = _Cold(None if free is None else free - touched, found.tensor_bytes)
            with contextlib.ExitStack() as stack:
                models = [_opened(stack, Path(folder), small, i, threads) for i in range(2 if small.first else 1)]
                rates = _rates(models, small, depth, kv_type, cold, begun)
                rates = _of_its_pages(rates, found, small, models[0], Path(folder) / PROBE.format(0))
                return replace(rates, seconds=time.perf_counter() - begun)
    except (OSError, EngineError) as error:
        return f"this machine could not be measured: {error}"


def _opened(stack: contextlib.ExitStack, folder: Path, small: Small, i: int, threads: int | None) -> Model:
    """All layers that are here, or (1) the first of them."""
    from cext import Model

    path = folder / PROBE.format(i)
    hollow = small.first if i else small.all
    assert hollow is not None
    hollow.write(path)
    return stack.enter_context(Model(path, threads))


def _of_its_pages(rates: Rates, found: Anatomy, small: Small, probe: Model, path: Path) -> Rates:
    """The rates of what lies in such pages as the model's file, where that is here."""
    from dsv2cli.planner import paging

    pages = paging.cached(found.path, path)
    if pages is None or not pages.matters:
        return rates
    slowed = paging.slowdown(found.path, small.whole.token_bytes, probe, small.all.work.token_bytes)
    return replace(rates, bandwidth=rates.bandwidth / slowed, slowed=slowed, small_pages=pages.small)


class _Cold:
    """Drives the probe's weights out of a large cache, before what is timed, where the model's would not stay there."""

    def __init__(self, free: int | None, model_bytes: int) -> None:
        import numpy as np

        from cext.system import cache_bytes

        nbytes = cache_bytes() or 0
        is_needed = LARGE_CACHE < nbytes < model_bytes and (free is None or nbytes <= UNSAFE_SHARE * free)
        self._words = np.ones(nbytes // 8 if is_needed else 0, np.int64)

    def __call__(self) -> None:
        self._words[::8].sum()  # of each line a word


def depth_of(token_bytes: int, most: float) -> int:
    """Tokens of context, each of so many bytes of cache, where attention is measured."""
    depth = DEPTH
    while depth > LEAST_DEPTH and depth * token_bytes > most:
        depth //= 2
    return depth


def _rates(models: list[Model], small: Small, depth: int, kv_type: KvType, cold: _Cold, begun: float) -> Rates:
    import numpy as np

    from cext.system import own_bytes

    rng = np.random.default_rng(SEED)
    ids = rng.integers(0, min(PROMPT, models[0].hparams["n_vocab"]), PROMPT, np.int32)
    shallow, deep = models[0].session(PROMPT + 1, kv_type), models[0].session(depth + 1, kv_type)
    first = models[1].session(PROMPT + 1, kv_type) if small.first else None
    before = own_bytes()
    deep.eval(ids)
    after, cache = own_bytes(), deep.kv_bytes * -(-PROMPT // BLOCK_TOKENS) * BLOCK_TOKENS // (depth + 1)
    scratch = None if before is None or after is None else max(0, after - before - cache)
    deep.rewind(small.n_prompt)
    deep.repeat(depth)
    rounds: list[Times] = []
    for i in range(ROUNDS + 1):  # the first touches every page
        prompt = ids[: small.n_prompt]
        read = _prompt_times(shallow, prompt, cold)
        times = Times(
            first_step=_step_seconds(first, 0, ids, STEPS, cold) if first else 0.0,
            step=_step_seconds(shallow, 0, ids, STEPS, cold),
            deep_step=_step_seconds(deep, depth, ids, DEEP_STEPS, cold),
            prompt=read,
            first_whole=_first_seconds(shallow, ids, cold) if len(prompt) < PROMPT else read.first,
        )
        if i:
            rounds.append(times)
        if len(rounds) >= 2 and time.perf_counter() - begun > SECONDS:
            break
    whole, here = small.whole, small.all.work
    step = statistics.median(step_of_whole(small, t) for t in rounds)
    bandwidth = whole.token_bytes / step
    prompt_seconds = statistics.median(prompt_of_whole(small, t) for t in rounds)
    deeper = statistics.median(t.deep_step - t.step for t in rounds)
    return Rates(
        threads=models[0].threads,
        isa=models[0].isa,
        bandwidth=bandwidth,
        products=PROMPT * whole.layer_products / without_head(prompt_seconds, whole, bandwidth),
        attention=max(0.0, deeper) / depth / max(1, here.n_layer),
        spread=max(_spread([t.step for t in rounds]), _spread([t.prompt.seconds for t in rounds])),
        seconds=time.perf_counter() - begun,
        scratch=scratch,
    )


def _spread(samples: list[float]) -> float:
    return (max(samples) - min(samples)) / statistics.median(samples)


def without_head(prompt: float, work: Work, bandwidth: float) -> float:
    """Of a prompt's seconds, those of the layers."""
    return max(prompt - work.head_bytes / bandwidth, prompt / 2)


def step_of_whole(small: Small, t: Times) -> float:
    """Seconds of a step of the model: a token's, in an empty context."""
    if small.first is None:
        return t.step * small.whole.token_bytes / small.all.work.token_bytes
    first, alike = small.part(small.chosen[:1]), small.part(small.like_first)
    here, others = small.part(small.chosen[1:]), small.part(small.like_others)
    pace = t.first_step / (first.layer_bytes + small.whole.head_bytes)  # seconds a byte
    more = pace * (alike.layer_bytes - first.layer_bytes)
    return t.first_step + more + max(0.0, t.step - t.first_step) * others.layer_bytes / here.layer_bytes


def prompt_of_whole(small: Small, t: Times) -> float:
    """Seconds of PROMPT tokens read by the model into an empty context."""
    longer, read = PROMPT / small.n_prompt, t.prompt
    if small.first is None:
        return read.seconds * longer * small.whole.layer_products / small.all.work.layer_products
    first, alike = small.part(small.chosen[:1]), small.part(small.like_first)
    here, others = small.part(small.chosen[1:-1]), small.part(small.like_others[:-1])
    whole, between = read.first * longer, read.between * longer
    if small.begins_dense and longer > 1:
        # What is not routed experts' runs as the dense layer does, of PROMPT tokens as of fewer; the experts have as
        # many tokens each, and are more.
        fixed = min(MOST_FIXED * read.between, read.first * here.fixed_products / first.layer_products)
        whole = t.first_whole
        between = (read.between - fixed) * longer + fixed * whole / read.first
    same = whole * alike.layer_products / first.layer_products
    return same + between * others.layer_products / max(1, here.layer_products) + read.last


def _step_seconds(session: Any, depth: int, ids: NDArray[np.int32], n: int, cold: _Cold) -> float:
    """Of one token decoded after ``depth`` others, the median of n."""
    session.rewind(depth)
    session.eval(ids[:1])  # wakes the workers
    times = []
    for i in range(n):
        session.rewind(depth)
        cold()
        begun = time.perf_counter()
        session.eval(ids[i + 1 : i + 2])
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def _prompt_times(session: Any, prompt: NDArray[np.int32], cold: _Cold) -> Prompt:
    with _begun(session, prompt, cold) as reading:
        first = _seconds(reading, 1) if reading.left > 1 else 0.0
        between = _seconds(reading, reading.left - 1) if reading.left > 1 else 0.0
        return Prompt(first, between, _seconds(reading, 1))


def _first_seconds(session: Any, prompt: NDArray[np.int32], cold: _Cold) -> float:
    """Of a prompt in the first layer."""
    with _begun(session, prompt, cold) as reading:
        return _seconds(reading, 1)


def _begun(session: Any, prompt: NDArray[np.int32], cold: _Cold) -> contextlib.closing[Reading]:
    """A prompt of which no layer is computed yet."""
    from cext import Reading

    session.rewind(0)
    reading = Reading([(session, prompt)])
    cold()
    return contextlib.closing(reading)


def _seconds(reading: Reading, n_layers: int) -> float:
    begun = time.perf_counter()
    reading.run(n_layers)
    return time.perf_counter() - begun
