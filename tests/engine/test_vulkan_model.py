"""Models whose parts a GPU computes: the reference's logits wherever that is, on whatever device Vulkan finds."""

import mmap
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf.quants import dequantize
from support.blocks import CODED_FORMATS, FLOAT_FORMATS, GRID_FORMATS, block_size, ggml_encode, type_of
from support.gpu import device, number
from support.logits import assert_close, firm_prompt, reference
from support.tiny import (
    SPECS,
    Checkpoint,
    Spec,
    gguf_metadata,
    gguf_tensors,
    gguf_vocabulary,
    spec_named,
    tokens,
    variant,
    write_tensors,
)

import cext
from cext import Device, Model, Place, Tap, system

LITE, PRO, V3, MOE = SPECS[0], SPECS[1], spec_named("v3"), spec_named("moe_shared")
BAR = 1e-4  # of the logits' range
HALVES_BAR = 1e-3  # where weights and activations are multiplied as halves, in cooperative matrices

Open = Callable[..., Model]


def whole(spec: Spec) -> list[Place]:
    layers = range(spec.n_layer)
    return [Place("ends", 1), Place("attention", 1, layers), Place("feed_forward", 1, layers)]


def spread(spec: Spec) -> dict[str, list[Place]]:
    """Ways to place a model of three layers on the processor (0), a GPU (1) and the processor once more (2)."""
    moe, last = range(spec.n_layer_dense, spec.n_layer), spec.n_layer - 1
    half = range(spec.n_expert // 2)
    return {
        "all": whole(spec),
        "attention of the last": [Place("attention", 1, range(last, last + 1))],
        "attention of a layer": [Place("attention", 1, range(1, 2))],
        "the ends": [Place("ends", 1)],
        "all of the feed-forward": [Place("feed_forward", 1, range(spec.n_layer))],
        "half of the experts": [Place("experts", 1, moe, half)],
        "all but half of the experts": [*whole(spec), Place("experts", 0, moe, half)],
        "all but the experts": [*whole(spec), Place("experts", 0, moe, range(spec.n_expert))],
        "three": [*whole(spec), Place("experts", 0, moe, half), Place("experts", 2, moe, range(1, 2))],
    }


@pytest.fixture(scope="module", autouse=True)
def there() -> None:
    """Skips where there is no device, before models are made for it."""
    number()


@pytest.fixture
def open_model(tiny_gguf: Callable[[Spec], Path]) -> Iterator[Open]:
    opened: list[Model] = []

    def open_one(spec: Spec, placement: list[Place], **options: Any) -> Model:
        devices = [Device("vulkan", name=number()), Device(threads=1)]
        opened.append(Model(tiny_gguf(spec), threads=2, devices=devices, placement=placement, **options))
        return opened[-1]

    yield open_one
    for model in opened:
        model.close()


@pytest.mark.parametrize("how", spread(LITE))
@pytest.mark.parametrize("spec", [LITE, PRO, V3, MOE], ids=lambda s: s.name)
def test_parts_of_a_model_on_a_gpu(open_model: Open, spec: Spec, how: str) -> None:
    placement = spread(spec)[how]
    if spec is MOE:
        placement = [place for place in placement if place.part != "attention"]
    ids, expected = firm_prompt(reference(spec), spec, 20, 7)
    model = open_model(spec, placement)
    assert_close(model.session(64, "f32").eval(ids, "all"), expected, BAR)
    one_by_one = model.session(64, "f32")
    assert_close(np.stack([one_by_one.eval([i]) for i in ids]), expected, BAR)
    session = model.session(64, "f32")
    session.eval(ids[:7])
    assert_close(session.eval(ids[7:]), expected[-1], BAR)  # the others stop before the last block


def has_latents(model: Path) -> bool:
    with Model(model) as opened:
        return opened.hparams["attention"] == "latent"


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
def test_every_kind_of_model(open_model: Open, tiny_gguf: Callable[[Spec], Path], spec: Spec) -> None:
    if not has_latents(tiny_gguf(spec)):
        with pytest.raises(cext.UnsupportedError, match="attention that is not latent"):
            open_model(spec, whole(spec))
        return
    ids, expected = firm_prompt(reference(spec), spec, 20, 7)
    model = open_model(spec, whole(spec))
    assert_close(model.session(64, "f32").eval(ids, "all"), expected, BAR)


@pytest.mark.parametrize("name", [*FLOAT_FORMATS, *CODED_FORMATS])
def test_every_format(tmp_path: Path, name: str) -> None:
    """Of every matrix of a model whose rows are whole blocks, against a model of what it decodes to."""
    spec = variant(LITE, n_embd=256, n_ff_dense=256, n_ff_expert=256, n_head=2, v=128, nope=32, kv_lora_rank=64)
    tensors = gguf_tensors(Checkpoint(spec))
    decoded, coded = dict(tensors), dict[str, Any](tensors)
    for key, w in tensors.items():
        if w.ndim == 1 or "ffn_gate_inp" in key or w.shape[-1] % block_size(name)[0]:
            continue
        if name in GRID_FORMATS and "blk.1." not in key:
            continue  # their encoders take seconds
        rows = ggml_encode(name, w.reshape(-1, w.shape[-1]))
        decoded[key] = dequantize(rows, type_of(name)).reshape(w.shape).astype(np.float32)
        coded[key] = (rows.reshape(*w.shape[:-1], -1), type_of(name))
    assert len([key for key in coded if isinstance(coded[key], tuple)]) > 5
    path = write_tensors(tmp_path / "m.gguf", gguf_metadata(spec) | gguf_vocabulary(spec.n_vocab), coded)
    write_tensors(tmp_path / "d.gguf", gguf_metadata(spec) | gguf_vocabulary(spec.n_vocab), decoded)
    ids = tokens(spec, 20)
    with Model(tmp_path / "d.gguf", threads=2) as exact:
        expected = exact.session(64, "f32").eval(ids, "all")
    with Model(path, threads=2, devices=[Device("vulkan", name=number())], placement=whole(spec)) as model:
        got = model.session(64, "f32").eval(ids, "all")
    bar = HALVES_BAR if device()["coop"] else BAR
    assert off({i: got[i] for i in range(20)}, {i: expected[i] for i in range(20)}) <= bar


def off(got: dict[str, Any], exact: dict[str, Any]) -> float:
    """How far logits are from those of an exact cache: of each output the root of the mean square, of its range; the
    median of all, as a routing decision that was near may go either way in one."""
    return float(np.median([np.sqrt(np.mean(np.square((got[k] - exact[k]) / np.ptp(exact[k])))) for k in exact]))


def steps(model: Model, spec: Spec, kv_type: Any) -> dict[str, np.ndarray[Any, Any]]:
    """A prompt in pieces, decoding, other sequences beside it, forks, a rewind and a repeat."""
    ids = tokens(spec, 200)
    session, other = model.session(300, kv_type), model.session(90, kv_type)
    out = {f"{at}": session.eval(ids[at:end]) for at, end in ((0, 40), (40, 41), (41, 130), (130, 131))}
    other.eval(ids[:3])
    fork = session.fork(70)
    out["two"] = cext.eval_batch([(session, ids[3:4]), (other, ids[4:9]), (fork, ids[9:11])], [1, 2, 1])
    out["fork"] = fork.eval(ids[11:13])
    session.rewind(65)
    out["rewound"] = session.eval(ids[20:22])
    session.repeat(140)
    out["repeated"] = session.eval(ids[23:24])
    return out


@pytest.mark.parametrize("spec", [LITE, PRO], ids=lambda s: s.name)
def test_caches_are_the_processors(open_model: Open, tiny_gguf: Callable[[Spec], Path], spec: Spec) -> None:
    """An exact cache gives the same; of the others, neither is farther from it than the other by much."""
    gpu = open_model(spec, whole(spec))
    with Model(tiny_gguf(spec), threads=2) as processor:
        exact = steps(processor, spec, "f32")
        for name, logits in steps(gpu, spec, "f32").items():
            assert_close(logits, exact[name], BAR)
        for kv_type in ("f16", "q8_0"):
            expected = off(steps(processor, spec, kv_type), exact)
            assert off(steps(gpu, spec, kv_type), exact) <= 1.5 * expected + BAR


@pytest.mark.parametrize("kv_type", ["f32", "f16", "q8_0"])
def test_a_cache_written_by_one_is_read_by_the_other(
    open_model: Open, tiny_gguf: Callable[[Spec], Path], tmp_path: Path, kv_type: Any
) -> None:
    ids = tokens(LITE, 150)
    gpu = open_model(LITE, whole(LITE))
    bar = {"f32": BAR, "f16": 5e-3, "q8_0": 0.1}[kv_type]
    with Model(tiny_gguf(LITE), threads=2) as processor:
        for first, second in ((gpu, processor), (processor, gpu)):
            session = first.session(200, kv_type)
            session.eval(ids[:130])
            session.save(tmp_path / "talk.session")
            expected = session.eval(ids[130:140], "all")
            got = second.load_session(tmp_path / "talk.session").eval(ids[130:140], "all")
            assert off({"": got}, {"": expected}) <= bar


@pytest.mark.parametrize("kv_type", ["f32", "f16", "q8_0"])
def test_a_step_is_the_same_whatever_came_before(open_model: Open, tmp_path: Path, kv_type: Any) -> None:
    """Bit for bit, after a long step and in a model that has seen none; many heads, so that their rows are."""
    spec = variant(LITE, n_head=16)
    ids = tokens(spec, 400)
    first, second = open_model(spec, whole(spec)), open_model(spec, whole(spec))
    session = first.session(500, kv_type)
    session.eval(ids[:350])
    session.save(tmp_path / "talk.session")
    restored = second.load_session(tmp_path / "talk.session")
    for begin, end in ((350, 370), (370, 371), (371, 374)):
        expected = session.eval(ids[begin:end], "all")
        assert restored.eval(ids[begin:end], "all").tobytes() == expected.tobytes()


def test_uses_are_counted_once_each(open_model: Open, tiny_gguf: Callable[[Spec], Path]) -> None:
    moe = range(PRO.n_layer_dense, PRO.n_layer)
    for placement in (whole(PRO), [*whole(PRO), Place("experts", 0, moe, range(2))]):
        model = open_model(PRO, placement)
        session = model.session(64, "f32")
        expected = np.zeros((PRO.n_layer, PRO.n_expert), np.uint64)
        for n in (30, 1, 5):
            tap = Tap({f"experts-{il}": None for il in moe})
            session.eval(tokens(PRO, n), tap=tap)
            for il in moe:
                expected[il] += np.bincount(tap[f"experts-{il}"].ravel(), minlength=PRO.n_expert).astype(np.uint64)
        np.testing.assert_array_equal(model.expert_uses(), expected)
        assert (expected[list(moe)].sum(axis=1) == 36 * PRO.n_used).all()


def test_many_sequences_and_mixed_caches_in_one_step(open_model: Open, tiny_gguf: Callable[[Spec], Path]) -> None:
    prompts = [tokens(LITE, n, seed) for seed, n in enumerate((1, 17, 2, 33, 64, 65, 5, 1))]
    types: list[Any] = ["f32", "f16", "f16", "q8_0", "f32", "f32", "f16", "q8_0"]

    def run(model: Model) -> np.ndarray[Any, Any]:
        sessions = [model.session(128, kv_type) for kv_type in types]
        cext.eval_batch(list(zip(sessions, prompts, strict=True)))
        return cext.eval_batch([(session, [3 + i]) for i, session in enumerate(sessions)])

    with Model(tiny_gguf(LITE), threads=2) as processor:
        expected = run(processor)
    got = run(open_model(LITE, whole(LITE)))
    for i, kv_type in enumerate(types):
        assert off({"": got[i]}, {"": expected[i]}) <= {"f32": BAR, "f16": 5e-3, "q8_0": 0.1}[kv_type]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_copies_of_caches_that_are_gone_are_given_up(open_model: Open) -> None:
    """Long conversations one after another: a device that lies in the process's own memory takes no more for them."""
    if device()["kind"] != "software":
        pytest.skip("what a device of its own memory holds cannot be seen from here")
    model = open_model(LITE, whole(LITE))

    def converse(n: int) -> int:
        for _ in range(n):
            session = model.session(1 << 16, "f32")
            session.eval([1, 2])
            session.repeat((1 << 16) - 2)
            session.eval([3])
            del session
        return int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE

    before = converse(2)
    assert converse(6) - before < 128 << 20


def test_a_tail_s_blocks_move_none_of_the_whole_s(open_model: Open, tiny_gguf: Callable[[Spec], Path]) -> None:
    """More blocks than the least table holds, but only once those of the tail, in the last layer, are in it too."""
    ids = tokens(LITE, 80)

    def run(model: Model) -> np.ndarray[Any, Any]:
        first = model.session(4400, "f32")
        first.eval(ids[:70])
        first.repeat(4200)
        forks = [first.fork(4200) for _ in range(64)]
        return cext.eval_batch([(fork, [ids[i], ids[i + 1]]) for i, fork in enumerate(forks)])

    with Model(tiny_gguf(LITE), threads=2) as processor:
        expected = run(processor)
    got = run(open_model(LITE, whole(LITE)))
    assert off(dict(enumerate(got)), dict(enumerate(expected))) <= BAR


def test_what_a_gpu_does_not_do_is_said(open_model: Open) -> None:
    with pytest.raises(cext.UnsupportedError, match="only the experts' choice"):
        open_model(LITE, whole(LITE)).session(8).eval([1], tap=Tap({"l_out-0": None}))
    with pytest.raises(cext.OutOfMemoryError, match=r"it was given 0\.0 MiB"):
        Model(open_model(LITE, []).path, devices=[Device("vulkan", name=number(), memory=4096)], placement=whole(LITE))
    with pytest.raises(cext.DeviceError, match="`no such card`"):
        Model(open_model(LITE, []).path, devices=[Device("vulkan", name="no such card")])


def but_experts(spec: Spec) -> list[Place]:
    return [*whole(spec), Place("experts", 0, range(spec.n_layer_dense, spec.n_layer), range(spec.n_expert))]


@pytest.mark.parametrize("spec", [LITE, PRO, V3], ids=lambda s: s.name)
def test_what_a_gpu_has_takes_nothing_of_a_budget(
    open_model: Open, tiny_gguf: Callable[[Spec], Path], spec: Spec
) -> None:
    """Experts come from the drive, and the memory of what was copied is theirs."""
    ids, expected = firm_prompt(reference(spec), spec, 20, 7)
    with Model(tiny_gguf(spec), threads=2) as model:
        needs = model.needs()
    found = [open_model(spec, how, ram=needs.least).needs() for how in ([], [Place("ends", 1)], but_experts(spec))]
    assert [n.shared for n in found] == sorted((n.shared for n in found), reverse=True)
    assert found[0].shared == needs.shared > found[1].shared > found[2].shared > 0
    assert all((n.all, n.slots) == (needs.all, needs.slots) for n in found)
    least = needs.least - needs.shared + found[2].shared
    assert found[2].least == least
    with pytest.raises(cext.ArgumentError, match=f"at least {least}"):
        open_model(spec, but_experts(spec), ram=least - 1)
    for ram in (least, needs.least):
        model = open_model(spec, but_experts(spec), ram=ram)
        assert_close(model.session(64, "f32").eval(ids, "all"), expected, BAR)
        session = model.session(64, "f32")
        assert_close(np.stack([session.eval([i]) for i in ids]), expected, BAR)


def test_another_processor_s_weights_stay(open_model: Open, tiny_gguf: Callable[[Spec], Path]) -> None:
    """It reads the host's memory, and has no copy of it."""
    ids, expected = firm_prompt(reference(LITE), LITE, 20, 7)
    places = [Place(p.part, 2, p.layers, p.experts) for p in whole(LITE)]
    with Model(tiny_gguf(LITE), threads=2) as model:
        needs = model.needs()
    model = open_model(LITE, [*whole(LITE), *places, Place("ends", 1)], ram=needs.least)
    assert needs.shared > model.needs().shared > needs.shared // 2
    assert_close(model.session(64, "f32").eval(ids, "all"), expected, BAR)


def test_the_memory_of_what_was_copied_is_given_back(open_model: Open, tiny_gguf: Callable[[Spec], Path]) -> None:
    spec = variant(LITE, name="wide_head", n_vocab=60_000)

    def taken(**options: Any) -> int:
        before = system.own_bytes()
        model = open_model(spec, but_experts(spec), **options)
        after = system.own_bytes()
        assert before is not None and after is not None
        model.close()
        return after - before

    with Model(tiny_gguf(spec), threads=2) as model:
        needs = model.needs()
    if system.own_bytes() is None:
        pytest.skip("the system does not tell what a process holds")
    taken()  # what is made once: shaders
    head = 4 * spec.n_vocab * spec.n_embd
    held = taken(ram=needs.least) - taken()
    assert needs.shared > 2 * head and held < needs.shared - head // 2
