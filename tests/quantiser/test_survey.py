"""quantize.survey, sensitivity and flips: costs in nats, the same however the work is cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as Type
from support import checkpoints as make

import quantize
from quantize import Options, job
from quantize.budget import allowed_types, budget_bytes, padded_bytes, spend
from quantize.encode.encoder import FED_BACK, Encoder
from quantize.encode.objective import Objective
from quantize.job import Job, make_plan
from quantize.measure import outputs
from quantize.measure.backward import Routing, route
from quantize.measure.flips import Flips
from quantize.measure.sensitivity import (
    CANDIDATES,
    SAMPLED_EXPERTS,
    SMALL_BLOCKS,
    CostMeter,
    candidates,
    pick_experts,
    pick_rows,
)
from quantize.meter import Meter
from quantize.source import arch as arch_of
from quantize.source.source import open_source
from quantize.survey import SurveyStage

CONFIG = {
    **make.V2_GROUPED,
    "num_hidden_layers": 2,
    "hidden_size": 256,
    "q_lora_rank": 256,
    "kv_lora_rank": 256,
    "v_head_dim": 64,
    "intermediate_size": 256,
    "moe_intermediate_size": 256,
    "routed_scaling_factor": 2.0,
}
TYPES = (Type.Q4_K, Type.Q2_K, Type.Q8_0, Type.IQ4_NL, Type.BF16)


@dataclass
class Records:
    """A journal in memory. It dies at the given number of records."""

    kept: dict[str, Any] = field(default_factory=dict)
    dies_at: int = -1

    def put(self, key: str, value: Any) -> None:
        self.dies_at -= 1
        if self.dies_at == 0:
            raise KeyboardInterrupt
        self.kept[key] = value

    def put_arrays(self, key: str, arrays: dict[str, Any]) -> None:
        self.put(key, {name: array.copy() for name, array in arrays.items()})

    def get(self, key: str) -> Any:
        return self.kept.get(key)

    def get_arrays(self, key: str) -> Any:
        arrays = self.kept.get(key)
        return None if arrays is None else {name: array.copy() for name, array in arrays.items()}

    def drop(self, key: str) -> None:
        self.kept.pop(key, None)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("survey") / "hf"
    make.write_checkpoint(folder, CONFIG)
    words = " ".join(f"word {i} and {i * i % 97}," for i in range(400))
    (folder / "text.txt").write_text(words)
    return folder


def made(
    source: Path,
    records: Records,
    options: Options | None = None,
    threads: int = 1,
    types: Sequence[Type] = TYPES,
) -> SurveyStage:
    asked = options or Options(type="q3_k_m", calibration=(source / "text.txt",), threads=1)
    options = replace(asked, survey_tokens=512)
    plan = make_plan(open_source(source), options)
    whole: Any = records
    work = Job(
        plan,
        whole,
        Encoder(threads),
        Meter(None, {"survey": 1.0, "write": 1.0}, plan.arch.n_layer, 1),
        lambda line: None,
    )
    return SurveyStage(work, types)


def test_the_same_after_any_interruption(source: Path) -> None:
    records, types = Records(), (Type.Q2_K, Type.BF16)
    expected = made(source, records, types=types).run()
    n_records = -records.dies_at - 1
    left = {f"survey/costs-{il}" for il in (-1, 0, 1, 2)}  # arrays go as soon as they can, but what the encoder needs
    assert set(records.kept) == left | {f"survey/outputs-{what}" for what in (0, 1, "embeddings")}
    for dies_at in range(1, n_records + 1):
        again = Records(dies_at=dies_at)
        with pytest.raises(KeyboardInterrupt):
            made(source, again, types=types).run()
        assert made(source, again, types=types).run() == expected


def test_the_same_in_any_slabs(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for rounding: of two scales that are as good, another may be chosen, in one type of one tensor."""
    expected = made(source, Records()).run()
    monkeypatch.setattr(job, "SLAB_VALUES", 256 * 50)
    got = made(source, Records()).run()
    assert got.flips == pytest.approx(expected.flips, rel=1e-3)
    apart = []
    for name, types in expected.costs.items():
        assert got.costs[name].keys() == types.keys()
        for type_, cost in types.items():
            here = got.costs[name][type_].fisher
            assert here == pytest.approx(cost.fisher, rel=0.05, abs=1e-9), (name, type_)
            if here != pytest.approx(cost.fisher, rel=1e-2, abs=1e-9):
                apart.append((name, type_))
    assert len(apart) <= 1, apart


def test_the_same_on_any_number_of_threads(source: Path) -> None:
    """Encoding on several gives the same costs, and the types in the same order."""
    expected, got = made(source, Records()).run(), made(source, Records(), threads=3).run()
    assert got.flips == pytest.approx(expected.flips, rel=1e-3)
    for name, types in expected.costs.items():
        assert list(got.costs[name]) == list(types)
        for type_, cost in types.items():
            assert got.costs[name][type_].fisher == pytest.approx(cost.fisher, rel=1e-2, abs=1e-9), (name, type_)


def test_what_follows_its_outputs_costs_less(source: Path) -> None:
    """In the types that errors are fed back in; the rest costs what it did."""
    records, asked = Records(), Options(type="q3_k_m", calibration=(source / "text.txt",), threads=1)
    alone = made(source, records, replace(asked, follow_outputs=False)).run()
    assert not any("outputs" in key for key in records.kept)
    stage = made(source, Records(), asked)
    followed = stage.run()
    for tensor in (t for t in stage.plan.tensors if t.name in alone.costs):
        for type_, before in alone.costs[tensor.name].items():
            after = followed.costs[tensor.name][type_]
            follows = type_ in FED_BACK and tensor.role in outputs.ROLES
            if follows:
                assert 0.05 * before.fisher < after.fisher < before.fisher, (tensor.name, type_)
                assert after.routing <= before.routing
            elif tensor.role != "token_embd" or type_ not in FED_BACK:
                assert after == before, (tensor.name, type_)
    embeddings = (found.costs["token_embd.weight"][Type.Q2_K].fisher for found in (followed, alone))
    assert next(embeddings) < next(embeddings)


def test_every_matrix_costs_less_with_more_bits(source: Path) -> None:
    stage = made(source, Records())
    found = stage.run()
    assert found.flips > 0
    names = {t.name for t in stage.plan.tensors if len(t.shape) > 1 and t.role != "ffn_gate_inp"}
    assert set(found.costs) == names
    for name, types in found.costs.items():
        assert all(np.isfinite([c.fisher, c.routing]).all() and c.fisher >= 0 for c in types.values())
        if Type.Q2_K in types:
            assert types[Type.Q2_K].fisher > types[Type.Q4_K].fisher > types[Type.Q8_0].fisher, name
    # Nothing downstream of the last router, or of the only one's layer, reaches a router.
    assert found.costs["output.weight"][Type.Q2_K].routing == 0
    assert found.costs["blk.1.ffn_down_exps.weight"][Type.Q2_K].routing == 0
    assert found.costs["blk.0.attn_output.weight"][Type.Q2_K].routing > 0


def test_a_sample_of_rows_stands_for_all() -> None:
    """Sampled costs near those of all rows, though a few rows carry most of the gradient."""
    rng = np.random.default_rng(1)
    weights = rng.standard_normal((512, 256)).astype(np.float32)
    inputs = rng.standard_normal((300, 256)).astype(np.float32)
    gradients = (rng.standard_normal((2, 300, 512)) * rng.lognormal(0, 1.5, 512)).astype(np.float32)
    with Encoder(1) as encoder:
        every = CostMeter(encoder, 300, lambda role: 1, (Type.Q3_K,), sampled_values=1 << 20)
        some = CostMeter(encoder, 300, lambda role: 1, (Type.Q3_K,), sampled_values=64 * 256)
        for meter in (every, some):
            meter.visit("attn_q", 0, weights, inputs, gradients)
        data = encoder.encode(weights, Type.Q3_K, Objective(np.square(inputs).mean(0)))
        error = encoder.decode(data, Type.Q3_K, 256) - weights
    exact = 0.5 * np.square(gradients * (inputs @ error.T)).sum((1, 2)) / 300
    cost = every.costs["attn_q"][Type.Q3_K]
    assert (cost.fisher, cost.routing) == pytest.approx(tuple(exact), rel=1e-2)
    assert some.costs["attn_q"][Type.Q3_K].fisher == pytest.approx(cost.fisher, rel=0.1)


@pytest.mark.parametrize(
    ("mass", "n", "certain"),
    [
        ([1.0] * 8, 3, []),
        ([100.0, 1, 1, 1, 1], 2, [0]),
        ([100.0, 50.0, 1e-6, 1e-6, 0], 3, [0, 1]),
        ([0.0, 0.0, 5.0], 2, [2]),
        ([0.0, 0.0], 2, []),
        ([1.0, 2.0], 9, [0, 1]),
    ],
)
def test_picked_rows(mass: list[float], n: int, certain: list[int]) -> None:
    rows, chance = pick_rows(np.array(mass), n)
    assert len(rows) == min(n, np.count_nonzero(mass)) and len(set(rows)) == len(rows)
    assert set(certain) <= set(rows) and all(chance[list(rows).index(i)] == 1 for i in certain)
    assert ((chance > 0) & (chance <= 1)).all() and all(mass[i] > 0 for i in rows)


def test_some_experts_of_many_are_looked_at() -> None:
    rng = np.random.default_rng(0)
    mass = rng.lognormal(0, 1, (2, 64))
    mass[:, 5] = 0
    mass[:, 7] = 1000
    chance = pick_experts(mass)
    assert np.count_nonzero(chance) == SAMPLED_EXPERTS and chance[5] == 0 and chance[7] == 1
    estimate = (mass[:, chance > 0] / chance[chance > 0]).sum(1)
    assert estimate == pytest.approx(mass.sum(1), rel=0.1)
    assert (pick_experts(mass[:, 8 : 8 + SAMPLED_EXPERTS]) == 1).all()  # few: all of them


def test_feedback_lowers_costs_by_what_some_parts_show() -> None:
    rng = np.random.default_rng(1)
    common = rng.standard_normal((400, 8)) @ rng.standard_normal((8, 256))
    inputs = (common + 0.3 * rng.standard_normal((400, 256))).astype(np.float32)
    costs = {}
    with Encoder(1) as encoder:
        for feedback in (False, True):
            meter = CostMeter(encoder, 400, lambda role: 8, (Type.Q3_K, Type.BF16), feedback=feedback)
            for part in range(8):
                weights = np.random.default_rng(part).standard_normal((64, 256)).astype(np.float32)
                gradients = np.random.default_rng(part).standard_normal((2, 400, 64)).astype(np.float32)
                meter.visit("ffn_up_exps", part, weights, inputs, gradients)
            costs[feedback] = meter.costs["ffn_up_exps"]
    assert costs[True][Type.Q3_K].fisher < 0.8 * costs[False][Type.Q3_K].fisher
    assert costs[True][Type.BF16] == costs[False][Type.BF16]


def test_flips_go_along_margins() -> None:
    """Between the last chosen expert and the next, of opposite signs; nothing where every expert is used."""
    config = {**make.V2, "n_routed_experts": 6, "num_experts_per_tok": 2}
    arch = arch_of.parse(config)
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((64, 6))
    routing = route(arch, logits, None)
    dweights = rng.standard_normal((2, 64, 2))
    flips = Flips(arch, np.random.default_rng(1))
    added = flips(routing, logits, dweights)
    ranked = np.argsort(-logits, -1)
    token = np.arange(64)
    assert not added[0].any() and flips.total > 0
    assert np.allclose(added[1].sum(-1), 0) and (np.count_nonzero(added[1], axis=-1) == 2).all()
    assert added[1][token, ranked[:, 1]].all() and added[1][token, ranked[:, 2]].all()
    every = replace(arch, n_expert_used=6)
    all_of_them = Flips(every, np.random.default_rng(1))
    with np.errstate(invalid="ignore"):
        assert not all_of_them(route(every, logits, None), logits, np.ones((2, 64, 6))).any()
    assert all_of_them.total == 0


def test_flips_between_groups() -> None:
    config = {**make.V3, "n_routed_experts": 8, "num_experts_per_tok": 2}
    arch = arch_of.parse(config)
    logits = np.random.default_rng(0).standard_normal((64, 8))
    routing: Routing = route(arch, logits, np.zeros(8))
    added = Flips(arch, np.random.default_rng(1))(routing, logits, np.ones((2, 64, 2)))
    kept = np.isfinite(routing.choice)
    assert (np.where(kept, 0, added[1]) != 0).any()  # towards groups that were not used
    assert np.isfinite(added).all()


def test_candidates_fit_their_rows() -> None:
    every = (*CANDIDATES, *SMALL_BLOCKS)
    assert Type.Q4_K in candidates(512, every) and Type.Q4_0 not in candidates(512, every)
    assert candidates(96, every) == SMALL_BLOCKS
    assert candidates(50, every) == (Type.BF16,)
    assert Type.IQ2_XXS not in candidates(512, every, weighted=False)
    assert Type.IQ2_XXS in allowed_types(3.2) and Type.IQ2_S not in allowed_types(4.9)
    assert {Type.Q4_K, Type.Q8_0, Type.BF16} <= set(allowed_types(15.0))


@pytest.mark.parametrize("asked", [{"type": "q3_k_m"}, {"bpw": 4.25}, {"size": 1_400_000}])
def test_budgets_are_kept_to_the_byte(source: Path, tmp_path: Path, asked: dict[str, Any]) -> None:
    """Never above; and below by no more than the smallest step there is."""
    options = Options(
        **asked, calibration=(source / "text.txt",), threads=1, awq=False, evaluate=False, survey_tokens=512
    )
    report = quantize.quantize(source, tmp_path / "m.gguf", options)
    size = (tmp_path / "m.gguf").stat().st_size
    tensor_bytes = sum(role.nbytes for role in report.roles)
    if "size" in asked:
        assert asked["size"] * 0.98 < size <= asked["size"]
    elif "bpw" in asked:
        assert asked["bpw"] * 0.98 < 8 * tensor_bytes / report.n_values <= asked["bpw"]
    else:
        mix = replace(options, plain_mix=True)
        plain = quantize.quantize(source, tmp_path / "mix.gguf", mix)
        assert 0.98 * plain.nbytes < size <= plain.nbytes


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"bpw": 0.5}, r"--bpw 0.5: the smallest types take \d"),
        ({"size": 20_000}, r"--size 20k: the smallest types take \d"),
        ({"bpw": 20.0}, "16 bits for every weight take only"),
        ({"size": 10**12}, "16 bits for every weight take only"),
        ({"bpw": -1.0}, "bits a weight are -1.0"),
        ({"bpw": float("nan")}, "bits a weight are nan"),
        ({"size": 0}, "size is 0 bytes"),
        ({"size": 10**6, "bpw": 4.0}, "both bits a weight and a size"),
        ({"plain_mix": True, "bpw": 4.0}, "a plain mix has a size of its own"),
    ],
)
def test_budgets_that_cannot_be(source: Path, tmp_path: Path, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(quantize.QuantizeError, match=message):
        quantize.quantize(source, tmp_path / "m.gguf", Options(**asked, calibration=(source / "text.txt",), threads=1))
    assert not (tmp_path / "m.gguf").exists()


def test_types_that_were_not_measured_are_not_chosen(source: Path) -> None:
    """Without importance weights, as for the embeddings, some types are not measured: that is no cost of zero."""
    stage = made(source, Records())
    types = (*TYPES, Type.IQ2_XXS)
    stage.types = types
    found = stage.run()
    assert Type.IQ2_XXS not in found.costs["token_embd.weight"]
    n_values = sum(t.size for t in stage.plan.tensors)
    assert spend(stage.plan, found, types, int(4.0 * n_values / 8))[0]["token_embd.weight"] != Type.IQ2_XXS


def test_more_bits_less_damage(source: Path) -> None:
    stage = made(source, Records())
    found = stage.run()
    n_values = sum(t.size for t in stage.plan.tensors)
    damage = [spend(stage.plan, found, TYPES, int(bits * n_values / 8))[1] for bits in np.arange(4.0, 9.0, 0.25)]
    assert all(b <= a * 1.03 for a, b in pairwise(damage)) and damage[-1] < damage[0] / 10
    plan = replace(stage.plan, options=replace(stage.plan.options, bpw=5.0))
    assert budget_bytes(plan, {}, lambda: 0) == 5 * n_values // 8
    assert padded_bytes(stage.plan.tensors[0], Type.Q4_K) % 32 == 0
