"""Which experts to keep in memory, and which to read ahead: policies on recorded traces beside Belady's bound, as CSV.

    python tests/bench/bench_residency.py TEXT MODEL.gguf [MODEL.gguf]... [--skew 0,0.5] [--tokens N] [--prompt N]
        [--answer N] [--slots 0.15,0.3,0.5,0.7] [--recall recall.csv] [-o policies.csv]

A trace is what a model's routers chose over the text, cut into conversations: a prompt read in one step, and an answer
token by token. --skew adds random models of 12 layers of 64 experts that read the same tokens, whose routers' rows have
norms spread so far (the sigma of their logarithms): the larger, the fewer experts do most of the work.

A policy is simulated with slots for a share of all experts, all slots of one size: a hit is an expert of a decoded
token that was there before. turn-64 is what slots.c does; belady knows the future and gives the slot that is needed
the latest; static knows how often each expert is used in the whole trace, and keeps those. --recall: by layer, how
many of the experts that a token needs are told by the routers of layers to come from a residual stream one or two
layers ahead, where as many are told as are needed, and where twice as many.
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np
from numpy.typing import NDArray
from ref.router import route_sigmoid, route_softmax
from support.tiny import Checkpoint, Spec, gguf_metadata, gguf_tensors, gguf_vocabulary, write_tensors

import cext
from cext.tokenizer import Tokenizer

F64 = NDArray[np.float64]
POLICY_COLUMNS = ("model", "slots", "n_slots", "policy", "hit", "below_belady", "read_a_token", "read_a_prompt")
RECALL_COLUMNS = ("model", "ahead", "layer", "recall", "recall_twice")
LAYERS, EXPERTS, USED = 12, 64, 6  # of a random model


# ---- Traces ----


@dataclass(frozen=True)
class Step:
    """What one step needs: of each layer with experts their numbers, in order, and how many tokens chose each."""

    n_tok: int
    layers: list[tuple[NDArray[np.int64], NDArray[np.int64]]]


@dataclass(frozen=True)
class Trace:
    """recall: (ahead, layer) -> the share of needed experts told, and told where twice as many are."""

    name: str
    n_expert: int
    n_used: int
    steps: list[Step]
    recall: dict[tuple[int, int], tuple[float, float]]

    @property
    def n_layer(self) -> int:
        return len(self.steps[0].layers)

    @property
    def size(self) -> int:
        return self.n_layer * self.n_expert


class Forecasts:
    """What the routers of layers to come make of a residual stream, as backend/cpu/forecast.c does it."""

    def __init__(self, path: Path, hparams: Any) -> None:
        self.hp = SimpleNamespace(**hparams)
        with cext.Gguf(path) as gguf:
            names = {t.name for t in gguf.tensors}
            layers = range(hparams["n_layer_dense"], hparams["n_layer"])
            self.norm = {il: gguf.read(f"blk.{il}.ffn_norm.weight") for il in layers}
            self.router = {il: gguf.read(f"blk.{il}.ffn_gate_inp.weight") for il in layers}
            biases = {il: f"blk.{il}.exp_probs_b.bias" for il in layers}
            self.bias = {il: gguf.read(name) if name in names else np.float32(0) for il, name in biases.items()}
        self.found: dict[tuple[int, int], list[tuple[float, float]]] = {}

    def add(self, ahead: int, il: int, x: NDArray[np.float32], needed: NDArray[np.int32]) -> None:
        """x (n, n_embd) in layer il - ahead, and the experts (n, n_used) that layer il chose."""
        wide = x.astype(np.float64)
        wide *= self.norm[il] / np.sqrt(np.mean(wide**2, axis=1, keepdims=True) + self.hp.rms_norm_eps)
        logits = wide @ self.router[il].T.astype(np.float64)
        if self.hp.expert_gating == "softmax":
            told, scores = route_softmax(self.hp, logits).experts, logits  # type: ignore[arg-type]
        else:
            told = route_sigmoid(self.hp, logits, self.bias[il]).experts  # type: ignore[arg-type]
            scores = 1 / (1 + np.exp(-logits)) + self.bias[il]
        twice = np.argsort(-scores, axis=1)[:, : 2 * needed.shape[1]]
        shares = ((needed[:, :, None] == some[:, None, :]).any(2).mean(1) for some in (told, twice))
        self.found.setdefault((ahead, il), []).extend(zip(*shares, strict=True))

    def recall(self) -> dict[tuple[int, int], tuple[float, float]]:
        means = {key: np.mean(rows, axis=0) for key, rows in self.found.items()}
        return {key: (float(mean[0]), float(mean[1])) for key, mean in means.items()}


def step_of(chosen: list[NDArray[np.int32]], begin: int, end: int) -> Step:
    """Of tokens [begin, end); chosen: (n, n_used) of each layer."""
    return Step(end - begin, [np.unique(of_one[begin:end], return_counts=True) for of_one in chosen])


def record(path: Path, name: str, ids: Sequence[int], options: argparse.Namespace) -> Trace:
    """Routing does not depend on how a text is cut into steps: each conversation is evaluated in one."""
    steps: list[Step] = []
    length = options.prompt + options.answer
    with cext.Model(path, options.threads) as model:
        shape = model.hparams
        layers = range(shape["n_layer_dense"], shape["n_layer"])
        forecasts = Forecasts(path, shape)
        names = [f"{point}-{il}" for il in layers for point in ("ffn_inp", "experts")]
        for at in range(0, len(ids) - length + 1, length):
            tap = cext.Tap(dict.fromkeys(names))
            model.session(length).eval(np.asarray(ids[at : at + length]), tap=tap)
            chosen = [tap[f"experts-{il}"] for il in layers]
            steps.append(step_of(chosen, 0, options.prompt))
            steps += [step_of(chosen, t, t + 1) for t in range(options.prompt, length)]
            for ahead in (1, 2):
                for il in layers[ahead:]:
                    x, needed = tap[f"ffn_inp-{il - ahead}"], tap[f"experts-{il}"]
                    forecasts.add(ahead, il, x[options.prompt :], needed[options.prompt :])
        return Trace(name, shape["n_expert"], shape["n_expert_used"], steps, forecasts.recall())


def write_skewed(path: Path, n_vocab: int, skew: float) -> Path:
    spec = Spec("skewed", seed=5, n_layer=LAYERS + 1, n_expert=EXPERTS, n_used=USED, n_vocab=n_vocab)
    tensors = gguf_tensors(Checkpoint(spec))
    rng = np.random.default_rng(6)
    for il in spec.moe_layers:
        norms = np.exp(rng.standard_normal((EXPERTS, 1)) * skew)
        tensors[f"blk.{il}.ffn_gate_inp.weight"] = (tensors[f"blk.{il}.ffn_gate_inp.weight"] * norms).astype(np.float32)
    return write_tensors(path, gguf_metadata(spec) | gguf_vocabulary(n_vocab), tensors)


# ---- Policies ----


class Policy:
    """What each expert, layer by layer in one row (size,), is worth keeping: the least goes."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.value = np.zeros(trace.size)

    def begin(self, n_tok: int) -> None:
        """A step begins."""

    def use(self, layer: int, row: NDArray[np.int64], counts: NDArray[np.int64], n_tok: int) -> None:
        """Of its tokens so many chose each of some experts of a layer."""

    def worth(self, layer: int) -> F64:
        """While a layer's experts are read."""
        return self.value


class Lru(Policy):
    now = 0

    def use(self, layer: int, row: NDArray[np.int64], counts: NDArray[np.int64], n_tok: int) -> None:
        self.now += 1
        self.value[row] = self.now


class Lfu(Policy):
    """Uses a token, each worth half of one so many tokens later."""

    def __init__(self, trace: Trace, half_life: int) -> None:
        super().__init__(trace)
        self.fade = 2 ** (-1 / half_life)

    def begin(self, n_tok: int) -> None:
        self.value *= self.fade**n_tok

    def use(self, layer: int, row: NDArray[np.int64], counts: NDArray[np.int64], n_tok: int) -> None:
        self.value[row] += counts / n_tok * (1 - self.fade**n_tok) / (1 - self.fade)


class Turn(Lfu):
    """The same as a chance of each token to choose it, less the usual chance for a whole round of layers until the
    expert's own has its turn: what slots.c does."""

    def worth(self, layer: int) -> F64:
        n = self.trace.n_layer
        ahead = np.repeat((np.arange(n) - layer - 1) % n + 1, self.trace.n_expert)
        return self.value * (1 - self.fade) - self.trace.n_used / self.trace.n_expert * ahead / n


class Soonest(Lfu):
    """The least tokens until it is needed, as if tokens chose by chance: 1 / chance, and the layers in between."""

    def worth(self, layer: int) -> F64:
        n = self.trace.n_layer
        chance = np.clip(self.value * (1 - self.fade), 1e-6, 1)
        ahead = np.repeat((np.arange(n) - layer - 1) % n + 1, self.trace.n_expert)
        return -(ahead / n + 1 / chance)


class EvenShares(Lfu):
    """Every layer has as many slots: the layer that has more than its share gives one."""

    def __init__(self, trace: Trace, half_life: int, resident: NDArray[np.bool_]) -> None:
        super().__init__(trace, half_life)
        self.resident = resident

    def worth(self, layer: int) -> F64:
        n = self.resident.reshape(self.trace.n_layer, -1).sum(1)
        n[layer] += 1  # it will have one more
        return self.value - 1e9 * np.repeat(n, self.trace.n_expert)


class Static(Policy):
    def __init__(self, trace: Trace) -> None:
        super().__init__(trace)
        for step in trace.steps:
            if step.n_tok > 1:
                continue
            for layer, (experts, counts) in enumerate(step.layers):
                self.value[layer * trace.n_expert + experts] += counts


class Belady(Policy):
    def __init__(self, trace: Trace) -> None:
        super().__init__(trace)
        later = np.full(trace.size, np.inf)
        self.next: list[F64] = []  # of each use of a layer, in the order of the trace
        for number in reversed(range(len(trace.steps) * trace.n_layer)):
            step, layer = divmod(number, trace.n_layer)
            row = layer * trace.n_expert + trace.steps[step].layers[layer][0]
            self.next.append(later[row])
            later[row] = number
        self.value[:] = -later

    def use(self, layer: int, row: NDArray[np.int64], counts: NDArray[np.int64], n_tok: int) -> None:
        self.value[row] = -self.next.pop()


def policies(trace: Trace, resident: NDArray[np.bool_]) -> Iterator[tuple[str, Policy]]:
    yield "belady", Belady(trace)
    yield "static", Static(trace)
    yield "lru", Lru(trace)
    for half_life in (16, 64, 256):
        yield f"lfu-{half_life}", Lfu(trace, half_life)
    yield "soonest-64", Soonest(trace, 64)
    yield "even-64", EvenShares(trace, 64, resident)
    for half_life in (16, 64):
        yield f"turn-{half_life}", Turn(trace, half_life)


def simulate(trace: Trace, policy: Policy, resident: NDArray[np.bool_], n_slots: int) -> tuple[float, float, float]:
    """The share of decoded tokens' experts that were there, experts read a decoded token, and read a prompt."""
    resident[:] = False
    n_resident = needed = hits = read = prompts = read_by_prompts = tokens = 0
    for step in trace.steps:
        policy.begin(step.n_tok)
        missed = 0
        for layer, (experts, counts) in enumerate(step.layers):
            row = layer * trace.n_expert + experts
            policy.use(layer, row, counts, step.n_tok)
            here = resident[row]
            for expert in row[~here]:  # of a prompt, those that were here are computed first and may go then
                if n_resident < n_slots:
                    n_resident += 1
                else:
                    may_go = resident.copy()
                    if step.n_tok == 1:
                        may_go[row] = False
                    where = np.flatnonzero(may_go if may_go.any() else resident)
                    resident[where[np.argmin(policy.worth(layer)[where])]] = False
                resident[expert] = True
            missed += int((~here).sum())
            if step.n_tok == 1:
                hits, needed = hits + int(here.sum()), needed + len(row)
        if step.n_tok == 1:
            read, tokens = read + missed, tokens + 1
        else:
            read_by_prompts, prompts = read_by_prompts + missed, prompts + 1
    return hits / needed, read / tokens, read_by_prompts / max(prompts, 1)


def compare(trace: Trace, share: float) -> list[dict[str, Any]]:
    n_slots = max(2 * trace.n_used, round(share * trace.size))
    resident = np.zeros(trace.size, np.bool_)
    rows = []
    for name, policy in policies(trace, resident):
        hit, read, read_by_prompts = simulate(trace, policy, resident, n_slots)
        bound = rows[0]["hit"] if rows else hit
        figures = (share, n_slots, name, round(hit, 4), round(100 * (bound - hit), 1), round(read, 2))
        rows.append(dict(zip(POLICY_COLUMNS, (trace.name, *figures, round(read_by_prompts, 1)), strict=True)))
        print(f"{trace.name}, {n_slots} slots: {name} {hit:.1%}", file=sys.stderr)
    return rows


def traces(options: argparse.Namespace) -> Iterator[Trace]:
    text = options.text.read_text(encoding="utf-8")
    for path in options.models:
        with Tokenizer(path) as tokenizer:
            ids = list(tokenizer.encode(text))[: options.tokens]
        yield record(path, path.stem, ids, options)
    with tempfile.TemporaryDirectory() as folder:
        for skew in options.skew:
            path = write_skewed(Path(folder) / f"skew-{skew}.gguf", max(ids) + 1, skew)
            yield record(path, path.stem, ids, options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--skew", type=lambda s: [float(x) for x in s.split(",")], default=[])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--answer", type=int, default=256)
    parser.add_argument("--slots", type=lambda s: [float(x) for x in s.split(",")], default=[0.15, 0.3, 0.5, 0.7])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--recall", type=Path, help="a CSV of how often the forecast was right")
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    recall: list[dict[str, Any]] = []
    with options.output.open("w", newline="") if options.output else sys.stdout as file:
        out = csv.DictWriter(file, POLICY_COLUMNS)
        out.writeheader()
        for trace in traces(options):
            for (ahead, il), shares in sorted(trace.recall.items()):
                figures = (trace.name, ahead, il, *(round(x, 4) for x in shares))
                recall.append(dict(zip(RECALL_COLUMNS, figures, strict=True)))
            for share in options.slots:
                out.writerows(compare(trace, share))
    if options.recall:
        with options.recall.open("w", newline="") as file:
            told = csv.DictWriter(file, RECALL_COLUMNS)
            told.writeheader()
            told.writerows(recall)


if __name__ == "__main__":
    main()
