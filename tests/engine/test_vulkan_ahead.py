"""Prompts whose routed experts lie in the host's memory: copied to the device, computed by the processor, or both."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.gpu import number
from support.logits import assert_close, firm_prompt, reference
from support.tiny import SPECS, Spec, spec_named, tokens, variant

import cext
from cext import Device, Model, Place, _engine

LITE, PRO, V3 = SPECS[0], SPECS[1], spec_named("v3")
DEEP = variant(LITE, n_layer=6)  # more layers with experts than slots
BAR = 1e-4  # of the logits' range

Open = Callable[..., Model]


def apart(spec: Spec, experts: range | None = None) -> list[Place]:
    """All on the device but routed experts."""
    layers, moe = range(spec.n_layer), range(spec.n_layer_dense, spec.n_layer)
    on = [Place("ends", 1), Place("attention", 1, layers), Place("feed_forward", 1, layers)]
    return [*on, Place("experts", 0, moe, experts or range(spec.n_expert))]


@pytest.fixture
def open_model(tiny_gguf: Callable[[Spec], Path]) -> Iterator[Open]:
    opened: list[Model] = []

    def open_one(spec: Spec, copies: Any, *, experts: range | None = None, memory: int | None = None) -> Model:
        gpu = Device("vulkan", name=number(), copies=copies, memory=memory)
        model = Model(tiny_gguf(spec), threads=2, devices=[gpu], placement=apart(spec, experts))
        model.watch(1, times=False)
        opened.append(model)
        return model

    yield open_one
    for model in opened:
        model.close()


@pytest.mark.parametrize("copies", ["auto", "never", "always"])
@pytest.mark.parametrize("spec", [LITE, PRO, V3, DEEP], ids=["lite", "pro", "v3", "deep"])
def test_a_prompt_is_the_reference_s_wherever_experts_are_computed(open_model: Open, spec: Spec, copies: Any) -> None:
    ids, expected = firm_prompt(reference(spec), spec, 40, 7)
    model = open_model(spec, copies)
    for _ in range(3):  # calibrated from nothing, and by what was measured; over slots that hold another layer
        assert_close(model.session(64, "f32").eval(ids, "all"), expected, BAR)
    session = model.session(64, "f32")
    session.eval(ids[:23])
    assert_close(session.eval(ids[23:]), expected[-1], BAR)  # the others stop before the last block


def test_what_was_copied_is_counted(open_model: Open) -> None:
    ids, moe = tokens(DEEP, 400), DEEP.n_layer - DEEP.n_layer_dense
    opened = {copies: open_model(DEEP, copies) for copies in ("never", "always", "auto")}
    for model in opened.values():
        model.session(512, "f32").eval(ids, "all")
    never, always, auto = (model.watched(1) for model in opened.values())
    assert (never.copied_bytes, never.copied_experts, never.kept_experts, never.slot_bytes) == (0, 0, 0, 0)
    assert always.copied_experts == moe * DEEP.n_expert and always.kept_experts == 0
    assert 0 < always.copied_bytes <= moe * always.slot_bytes / 2 and always.copy_ns > 0
    opened["always"].watch(1, times=False)
    opened["always"].session(512, "f32").eval(ids, "all")
    assert opened["always"].watched(1).copied_bytes == always.copied_bytes  # by then other layers had the slots
    assert auto.copied_experts + auto.kept_experts == moe * DEEP.n_expert
    assert auto.copied_experts > 0 and auto.kept_experts > 0  # half of the first layer's: nothing was known


def test_a_step_that_copies_all_waits_once(open_model: Open) -> None:
    """Each layer's experts are a list that runs behind its copies, and the host waits for the last alone."""
    ids, moe = tokens(DEEP, 60), DEEP.n_layer - DEEP.n_layer_dense
    model = open_model(DEEP, "always")
    model.session(64, "f32").eval(ids, "all")
    once = model.watched(1)
    assert (once.submissions, once.waits) == (1 + moe, 1)
    model.watch(1, times=True)
    model.session(64, "f32").eval(ids, "all")
    timed = model.watched(1)
    assert sum(n for n, _ in timed.times.values()) == timed.dispatches == once.dispatches
    shared = open_model(DEEP, "never")
    shared.session(64, "f32").eval(ids, "all")
    assert shared.watched(1).waits > moe


def test_nothing_is_copied_for_a_few_tokens(open_model: Open) -> None:
    model = open_model(LITE, "always")
    session = model.session(64, "f32")
    for n in (1, 16, 2):
        session.eval(tokens(LITE, n), "all")
    work = model.watched(1)
    assert work.copied_bytes == work.copied_experts == work.kept_experts == 0
    session.eval(tokens(LITE, 17), "all")
    assert model.watched(1).copied_experts > 0


def test_only_chosen_experts_are_copied_where_few_are(open_model: Open) -> None:
    """A batch too small to choose nearly all: not ahead of its router."""
    spec = variant(LITE, n_expert=48, n_used=2)
    model, counts = open_model(spec, "always"), []
    for n in (17, 24):
        before, earlier = model.expert_uses(), model.watched(1)
        model.session(64, "f32").eval(tokens(spec, n, n), "all")
        chosen, work = int(((model.expert_uses() - before) > 0).sum()), model.watched(1)
        assert work.copied_experts - earlier.copied_experts == chosen
        counts.append((work.copied_bytes - earlier.copied_bytes, chosen))
    assert all(nbytes <= chosen * model.watched(1).slot_bytes / 2 / spec.n_expert for nbytes, chosen in counts)
    assert max(chosen for _, chosen in counts) < spec.n_expert * (spec.n_layer - spec.n_layer_dense)


def test_slots_take_of_the_memory_that_is_given(open_model: Open) -> None:
    """And leave what caches and steps take of it: with a byte less there are none, and it goes as without."""
    ids, expected = firm_prompt(reference(LITE), LITE, 40, 7)
    slots = open_model(LITE, "always").watched(1).slot_bytes
    low, least = 0, 1 << 28
    while least - low > 1:
        middle = (low + least) // 2
        try:
            with open_model(LITE, "always", memory=middle) as model:
                enough = model.watched(1).slot_bytes > 0
        except cext.OutOfMemoryError:  # not even for the weights
            enough = False
        low, least = (low, middle) if enough else (middle, least)
    for memory, there in ((least - slots, 0), (least - 1, 0), (least, slots)):
        model = open_model(LITE, "always", memory=memory)
        assert_close(model.session(64, "f32").eval(ids, "all"), expected, BAR)
        work = model.watched(1)
        assert work.slot_bytes == there and (work.copied_experts > 0) == (there > 0)


def test_experts_that_lie_on_the_device_stay_there(open_model: Open) -> None:
    """Half of them for good, half in memory."""
    ids, expected = firm_prompt(reference(PRO), PRO, 40, 7)
    half = range(PRO.n_expert // 2)
    model = open_model(PRO, "always", experts=half)
    session = model.session(64, "f32")
    assert_close(session.eval(ids, "all"), expected, BAR)
    work = model.watched(1)
    assert work.copied_experts <= len(half) * (PRO.n_layer - PRO.n_layer_dense)
    one_by_one = model.session(64, "f32")
    assert_close(np.stack([one_by_one.eval([i]) for i in ids]), expected, BAR)


@pytest.mark.parametrize("copies", ["auto", "always"])
def test_several_sequences_and_odd_pieces(open_model: Open, tiny_gguf: Callable[[Spec], Path], copies: Any) -> None:
    prompts = [tokens(LITE, n, seed) for seed, n in enumerate((1, 17, 33, 2, 65, 5))]
    sizes = (3, 37, 1, 129, 40, 18, 64)

    def run(model: Model) -> list[Any]:
        sessions = [model.session(128, "f32") for _ in prompts]
        out = [cext.eval_batch(list(zip(sessions, prompts, strict=True)))]
        out.append(cext.eval_batch([(session, [3 + i]) for i, session in enumerate(sessions)]))
        long, ids, at = model.session(400, "f32"), tokens(LITE, sum(sizes), 9), 0
        for n in sizes:
            out.append(long.eval(ids[at : at + n]))
            at += n
        out.append(cext.eval_batch([(sessions[0], prompts[4]), (long, [1]), (long.fork(100), prompts[2])]))
        return out

    with Model(tiny_gguf(DEEP), threads=2) as processor:
        expected = run(processor)
    model = open_model(DEEP, copies)
    for _ in range(2):
        for got, want in zip(run(model), expected, strict=True):
            assert_close(got, want, BAR)
    assert model.watched(1).copied_experts > 0


@pytest.mark.parametrize("n_layers", [1, 2])
def test_steps_that_come_between_the_layers_of_another(open_model: Open, n_layers: int) -> None:
    """Answers, and prompts, which take the slots: a step whose layers are computed a few at a time goes on."""
    ids = tokens(DEEP, 120, seed=3)
    expected = open_model(DEEP, "never").session(128, "f32").eval(ids, "all")
    for copies in ("always", "auto"):
        model = open_model(DEEP, copies)
        for _ in range(2):
            session, beside = model.session(128, "f32"), model.session(512, "f32")
            reading, n, found = cext.Reading([(session, ids)], [len(ids)]), 0, None
            while found is None:
                found = reading.run(n_layers)
                beside.eval(ids[: (1, 40, 60)[n % 3]])
                n += 1
            assert_close(found, expected, BAR)


def test_a_step_that_fails_leaves_nothing_behind(open_model: Open) -> None:
    """By a tap that a device does not have: behind copies that are ordered."""
    ids, expected = firm_prompt(reference(LITE), LITE, 40, 7)
    model = open_model(LITE, "always")
    for _ in range(3):
        with pytest.raises(cext.UnsupportedError, match="only the experts' choice"):
            model.session(64, "f32").eval(ids, tap=cext.Tap({"l_out-0": None}))
        assert_close(model.session(64, "f32").eval(ids, "all"), expected, BAR)


@pytest.mark.parametrize(("threads", "piece"), [(1, 256), (3, 1000), (16, 4096), (2, 4 << 20)])
def test_pieces_of_many_threads_make_the_whole(threads: int, piece: int) -> None:
    """Arrays of all sizes, three to a copy, far smaller than a piece and of many; the order changes on the way."""
    rng = np.random.default_rng(piece)
    sizes = [1, 255, 256, 257, 4096, 4097, 3, 70_001, 12_288, 65_536, 2, 999, 200_000, *rng.integers(1, 9000, 40)]
    arrays = [rng.integers(0, 256, size, np.uint8) for size in sizes]
    places = [-(-size // 256) * 256 for size in sizes]
    out = np.zeros(sum(places), np.uint8)
    gpu = _engine.gpu_open(number())
    try:
        for _ in range(3):
            out[:] = 0
            _engine.gpu_copies(gpu, list(arrays), threads, piece, out)
            at = 0
            for array, place in zip(arrays, places, strict=True):
                np.testing.assert_array_equal(out[at : at + len(array)], array)
                at += place
    finally:
        _engine.gpu_close(gpu)


def share(
    counts: list[int],
    *,
    byte_ns: float = 1.0,
    slot_ns: int = 0,
    processor: tuple[int, int] = (5000, 500),
    under_way: int = 0,
    slots: int = 0,
) -> tuple[int, float]:
    """Of experts of 1,000 bytes; a processor that takes so many ns an expert and a slot, measured over three runs."""
    runs = [(e, n, e * processor[0] + n * processor[1]) for e, n in ((10, 300), (7, 90), (12, 150))]
    device = [(1000, 1000 * slot_ns, True)] if slot_ns else []
    return _engine.gpu_share((10**6, int(byte_ns * 10**6)), device, runs, counts, 1000, under_way, slots)


def test_both_end_together() -> None:
    """Four copies of 1,000 ns and one expert of 4 tokens at 2,000 + 4 x 500: the fifth stays; and so on."""
    assert share([4] * 5, processor=(2000, 500))[0] == 4
    assert share([4] * 10, processor=(2000, 500))[0] == 8
    assert share([100, 1, 1, 1], processor=(10, 5))[0] == 0  # all together take 555 ns, one copy 1,000
    assert share([400, 1, 1, 1], processor=(10, 5))[0] == 1
    assert share([4] * 5, processor=(2000, 500), under_way=6000)[0] == 3  # 9,000; with two 12,000, with four 10,000
    assert share([4] * 5, processor=(2000, 500), under_way=3000, slots=20, slot_ns=500)[0] == 1


def test_the_slower_gets_nothing() -> None:
    assert share([6] * 8, byte_ns=1e3)[0] == 0  # a link that is worth nothing
    assert share([6] * 8, byte_ns=1e-3)[0] == 8
    assert share([6] * 8, byte_ns=1e-3, slot_ns=10**6)[0] == 0  # a device that is none
    assert share([])[0] == 0


def test_the_crossing_is_where_a_copy_takes_as_long() -> None:
    assert share([1], byte_ns=10.0)[1] == pytest.approx((10_000 - 5000) / 500, rel=1e-3)
    assert share([1], byte_ns=10.0, slot_ns=400)[1] == pytest.approx((10_000 - 5000) / 100, rel=1e-3)
    assert share([1], byte_ns=1.0)[1] == 1  # never worth leaving it where it lies


def test_half_where_nothing_is_known() -> None:
    assert _engine.gpu_share((0, 0), [], [], [3] * 7, 1000, 0, 0) == (4, 0)
    assert _engine.gpu_share((1000, 1000), [], [], [3] * 6, 1000, 0, 0) == (3, 0)
    assert _engine.gpu_share((0, 0), [], [(3, 9, 10)], [3], 1000, 0, 0) == (1, 0)


def test_runs_that_are_alike_tell_one_rate() -> None:
    """Of experts and tokens in one proportion, the processor's time is by tokens; no runs make a time below nothing."""
    _, crossing = _engine.gpu_share((1000, 1000), [], [(4, 40, 4000)] * 9, [1], 1000, 0, 0)
    assert crossing == pytest.approx(10)
    odd = [(1, 100, 1000), (10, 100, 500), (20, 100, 100)]  # more experts in less time
    chosen, crossing = _engine.gpu_share((1000, 1000), [], odd, [9] * 5, 1000, 0, 0)
    assert 0 <= chosen <= 5 and crossing > 0


def ways(steps: list[tuple[int, int, int]], *, byte_ns: int = 1) -> list[int]:
    """Of steps of (tokens, ns shared out, ns where all is copied), with 64 experts of 1,000 bytes and a processor that
    takes 2,000 ns an expert and 10 a slot: which had all copied."""
    return list(_engine.gpu_share_ways(byte_ns, 2000, 10, 64, 1000, steps))


def test_all_is_copied_where_that_took_less() -> None:
    """Each way once, then the faster; sizes are told apart."""
    assert ways([(2048, 300, 200)] * 9) == [0] + 8 * [1]
    assert ways([(2048, 200, 300)] * 9) == [0, 1] + 7 * [0]
    assert ways([(512, 200, 300), (2048, 300, 200)] * 4) == [0, 0, 1, 1, 0, 1, 0, 1]
    assert ways([(2048, 200, 210)] * 40).count(1) == 2  # and the slower again, once in 32
    assert ways([(2048, 200, 300)] * 90).count(1) == 1  # unless it is much slower
    changed = [(2048, 200, 210)] * 20 + [(2048, 200, 100)] * 300
    assert sum(ways(changed)[-60:]) > 55


def test_a_link_slower_than_the_processor_is_not_tried() -> None:
    assert ways([(2048, 300, 200)] * 9, byte_ns=10) == [0] * 9
    assert ways([(2048, 300, 200)] * 9, byte_ns=0) == [0] * 9  # nothing was copied yet: not known


def test_other_copies_are_refused() -> None:
    with pytest.raises(ValueError, match="copies is 'some'"):
        Device("vulkan", copies="some").record()  # type: ignore[arg-type]


def test_models_are_closed_while_experts_are_copied(open_model: Open) -> None:
    """A prompt's step orders the copies of its next layers; a decoded token does not wait for them."""
    for n in (0, 1, 2, 4):
        model = open_model(PRO, "always")
        session = model.session(64, "f32")
        session.eval(tokens(PRO, 60))
        for i in range(n):
            session.eval([i])
        model.close()
        with pytest.raises(cext.ArgumentError):
            session.eval([1])
