"""A model on several devices: the same logits wherever its parts are computed, and counts of the experts' use.

The second device is the processor once more, with a team of threads of its own, behind the same table of operations:
with the scalar kernels, the reference for every other."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.logits import assert_close, firm_prompt, reference
from support.tiny import SPECS, Spec, spec_named, tokens

import cext
from cext import ArgumentError, Device, Model, Place, Tap

LITE, PRO, V3, MOE = SPECS[0], SPECS[1], spec_named("v3"), spec_named("moe_shared")
LAYERS = range(LITE.n_layer)
BEST = cext.isas()[0]

Open = Callable[..., Model]


def moe_layers(spec: Spec) -> range:
    return range(spec.n_layer_dense, spec.n_layer)


def spread(spec: Spec) -> dict[str, list[Place]]:
    """Ways to place a model of three layers or more on devices 0, 1 and 2."""
    moe, last = moe_layers(spec), spec.n_layer - 1
    half, third = range(spec.n_expert // 2), range(spec.n_expert // 3)
    return {
        "attention of a layer": [Place("attention", 1, range(1, 2))],
        "attention of the last": [Place("attention", 1, range(last, last + 1))],
        "the ends": [Place("ends", 1)],
        "all of the feed-forward": [Place("feed_forward", 1, range(spec.n_layer))],
        "experts of a layer, another's attention": [
            Place("experts", 1, range(last, last + 1), range(spec.n_expert)),
            Place("attention", 1, range(1, 2)),
        ],
        "half of the experts": [Place("experts", 1, moe, half)],
        "all experts of all layers": [Place("experts", 1, moe, range(spec.n_expert))],
        "all but half of the experts": [
            Place("ends", 1),
            Place("attention", 1, range(spec.n_layer)),
            Place("feed_forward", 1, range(spec.n_layer)),
            Place("experts", 0, moe, half),
        ],
        "three": [
            Place("experts", 1, moe, half),
            Place("experts", 2, moe, third),
            Place("attention", 2, range(last, last + 1)),
        ],
    }


@pytest.fixture
def open_model(tiny_gguf: Callable[[Spec], Path]) -> Iterator[Open]:
    opened: list[Model] = []

    def open_one(spec: Spec, **options: Any) -> Model:
        opened.append(Model(tiny_gguf(spec), **options))
        return opened[-1]

    yield open_one
    for model in opened:
        model.close()


def points(spec: Spec) -> list[str]:
    """Every intermediate of the expert layers that the devices share out, and what comes before and after."""
    names = ["router_logits", "experts", "expert_weights", "expert_hidden", "shared_hidden", "l_out"]
    each = [f"{name}-{il}" for il in moe_layers(spec) for name in names]
    return [*each, *(f"{name}-{il}" for il in LAYERS for name in ("attn_out", "ffn_inp")), "inp_embd", "result_norm"]


def run(model: Model, spec: Spec, kv_type: Any) -> dict[str, np.ndarray[Any, Any]]:
    """A prompt in pieces, decoding, a batch, and intermediates of one token and of several."""
    ids = tokens(spec, 90)
    session = model.session(128, kv_type)
    out = {f"{at}": session.eval(ids[at:end]) for at, end in ((0, 40), (40, 41), (41, 77))}
    out["all"] = session.eval(ids[77:86], "all")
    out |= {f"{at}": session.eval(ids[at : at + 1]) for at in range(86, 90)}
    out["batch"] = cext.eval_batch([(session, ids[:3]), (model.session(16, kv_type), ids[:7])], [0, 2])
    for n in (1, 19):
        tap = Tap(dict.fromkeys(points(spec)))
        model.session(32, kv_type).eval(ids[:n], tap=tap)
        out |= {f"{name} of {n}": tap[name] for name in tap}
    return out


def assert_same(got: dict[str, np.ndarray[Any, Any]], expected: dict[str, np.ndarray[Any, Any]]) -> None:
    assert got.keys() == expected.keys()
    assert [name for name in got if got[name].tobytes() != expected[name].tobytes()] == []


@pytest.mark.parametrize("how", spread(LITE))
@pytest.mark.parametrize("spec", [LITE, PRO, V3, MOE], ids=lambda s: s.name)
def test_devices_of_one_kind_give_the_same_bits(open_model: Open, spec: Spec, how: str) -> None:
    expected = run(open_model(spec, threads=2), spec, "f16")
    devices = [Device(threads=1), Device(threads=2)]
    assert_same(run(open_model(spec, threads=2, devices=devices, placement=spread(spec)[how]), spec, "f16"), expected)


@pytest.mark.parametrize("kv_type", ["f32", "q8_0"])
@pytest.mark.parametrize("threads", [1, 3])
def test_other_caches_and_teams(open_model: Open, kv_type: str, threads: int) -> None:
    expected = run(open_model(PRO, threads=threads), PRO, kv_type)
    placed = open_model(
        PRO, threads=threads, devices=[Device(threads=3), Device(threads=1)], placement=spread(PRO)["three"]
    )
    assert_same(run(placed, PRO, kv_type), expected)


@pytest.mark.skipif(BEST == "scalar", reason="this machine has the scalar kernels alone")
def test_work_is_done_where_it_is_placed(open_model: Open) -> None:
    """All of a model on another device is that device's model, to the bit, and not the processor's."""
    parts = [Place("ends", 1), Place("attention", 1, LAYERS), Place("feed_forward", 1, LAYERS)]
    got = run(open_model(LITE, devices=[Device(threads=2, isa="scalar")], placement=parts), LITE, "f16")
    assert_same(got, run(open_model(LITE, isa="scalar", threads=1), LITE, "f16"))
    default = run(open_model(LITE, isa=BEST), LITE, "f16")
    assert got["all"].tobytes() != default["all"].tobytes()


@pytest.mark.parametrize("how", spread(LITE))
@pytest.mark.parametrize("spec", [LITE, PRO, V3, MOE], ids=lambda s: s.name)
def test_the_reference_beside_the_best(open_model: Open, spec: Spec, how: str) -> None:
    """Scalar kernels and the best share one model, which stays as near to float64 as either alone."""
    ids, expected = firm_prompt(reference(spec), spec, 20, 7)
    devices = [Device(threads=1, isa="scalar"), Device(threads=1)]
    model = open_model(spec, threads=2, devices=devices, placement=spread(spec)[how])
    assert_close(model.session(64, "f32").eval(ids, "all"), expected)
    one_by_one = model.session(64, "f32")
    assert_close(np.stack([one_by_one.eval([i]) for i in ids]), expected)


@pytest.mark.parametrize("placement", [[], spread(PRO)["three"]], ids=["one device", "three"])
def test_uses_are_counted_once_each(open_model: Open, placement: list[Place]) -> None:
    model = open_model(PRO, threads=2, devices=[Device(threads=1)] * 2, placement=placement)
    assert not model.expert_uses().any()
    expected = np.zeros((PRO.n_layer, PRO.n_expert), np.uint64)
    session = model.session(64)
    for n in (30, 1, 1, 5):
        tap = Tap({f"experts-{il}": None for il in moe_layers(PRO)})
        session.eval(tokens(PRO, n), tap=tap)
        for il in moe_layers(PRO):
            expected[il] += np.bincount(tap[f"experts-{il}"].ravel(), minlength=PRO.n_expert).astype(np.uint64)
    np.testing.assert_array_equal(model.expert_uses(), expected)


@pytest.mark.parametrize(
    ("place", "words"),
    [
        (Place("ends", 2), "device 2, expected 0 to 1"),
        (Place("ends", -1), "device -1"),
        (Place("attention", 1, range(2, 4)), "attention of layers 2 to 3, the model has them in 0 to 2"),
        (Place("attention", 1, range(-1, 1)), "layers -1 to 0"),
        (Place("feed_forward", 1, range(2, 2)), "names no layers"),
        (Place("experts", 1, range(0, 2), range(1)), "experts of layers 0 to 1, the model has them in 1 to 2"),
        (Place("experts", 1, range(1, 2), range(9)), "experts 0 to 8 of a layer, expected some of 0 to 7"),
        (Place("experts", 1, range(1, 2)), "names no experts"),
    ],
    ids=str,
)
def test_a_place_that_is_not_in_the_model(open_model: Open, place: Place, words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        open_model(LITE, devices=[Device(threads=1)], placement=[place])


def test_a_device_that_is_not_there(open_model: Open) -> None:
    with pytest.raises(ArgumentError, match="device 1 is of kind `abacus`"):
        open_model(LITE, devices=[Device("abacus")])
    with pytest.raises(ArgumentError, match="`z80`"):
        open_model(LITE, devices=[Device(isa="z80")])
    with pytest.raises(ArgumentError, match="17 devices"):
        open_model(LITE, devices=[Device(threads=1)] * 16)
    with pytest.raises(ValueError, match="threads is 0"):
        open_model(LITE, devices=[Device(threads=0)])
    with pytest.raises(ValueError, match="part is 'head'"):
        open_model(LITE, placement=[Place("head", 0)])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="step of 1"):
        open_model(LITE, placement=[Place("attention", 0, range(0, 3, 2))])


def test_taps_are_filled_on_success_alone(open_model: Open) -> None:
    session = open_model(LITE).session(8)
    tap = Tap({"l_out-0": None, "l_out-99": None})
    with pytest.raises(ValueError, match="l_out-99"):
        session.eval([1, 2], tap=tap)
    assert tap == {"l_out-0": None, "l_out-99": None}
