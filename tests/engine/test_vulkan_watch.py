"""What a GPU is told to do, counted and timed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.gpu import number
from support.logits import assert_close
from support.tiny import SPECS, Spec, tokens

import cext
from cext import Device, Model, Place, _engine

LITE = SPECS[0]
BAR = 1e-4  # of the logits' range


def on_gpu(path: Path, *more: Place) -> Model:
    layers = range(LITE.n_layer)
    placement = [Place("ends", 1), Place("attention", 1, layers), Place("feed_forward", 1, layers), *more]
    return Model(path, threads=1, devices=[Device("vulkan", name=number())], placement=placement)


def test_a_step_is_counted_and_its_shaders_timed(tiny_gguf: Callable[[Spec], Path]) -> None:
    ids = tokens(LITE, 12)
    with on_gpu(tiny_gguf(LITE)) as model:
        session, unwatched = model.session(64), model.session(64)
        expected = [unwatched.eval(ids[:9]), unwatched.eval(ids[9:10]), unwatched.eval(ids[10:11])]
        model.watch(1, times=True)
        got = [session.eval(ids[:9]), session.eval(ids[9:10])]
        timed = model.watched(1)
        model.watch(1, times=False)
        got.append(session.eval(ids[10:11]))
        counted = model.watched(1)
    assert all((a == b).all() for a, b in zip(got, expected, strict=True))
    assert timed.submissions == timed.waits == 2 and timed.wait_ns > 0 and timed.record_ns > 0
    assert sum(n for n, _ in timed.times.values()) == timed.dispatches
    assert any(ns for _, ns in timed.times.values())
    assert "norm" in timed.times
    assert counted.submissions == 1 and 0 < counted.dispatches < timed.dispatches and not counted.times


@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
def test_what_a_token_is_told_as(tiny_gguf: Callable[[Spec], Path], kv_type: Any) -> None:
    """So many dispatches and barriers, and no more: each is waited for."""
    dense, moe = LITE.n_layer_dense, LITE.n_layer - LITE.n_layer_dense
    with on_gpu(tiny_gguf(LITE)) as model:
        session = model.session(64, kv_type)
        session.eval(tokens(LITE, 9))
        model.watch(1, times=False)
        session.eval([3])
        work = model.watched(1)
    assert work.dispatches == 2 + 7 * LITE.n_layer + 2 * dense + 6 * moe
    assert work.barriers == 1 + 5 * LITE.n_layer + 2 * dense + 4 * moe


def test_steps_alike_are_recorded_once(tiny_gguf: Callable[[Spec], Path]) -> None:
    """And others anew: of two tokens; over a part more of the positions; with the clock."""
    moe, ids = range(LITE.n_layer_dense, LITE.n_layer), tokens(LITE, 200)
    apart = Place("experts", 0, moe, range(LITE.n_expert))
    for extra, submissions in (([], 1), ([apart], len(moe) + 1)):
        with on_gpu(tiny_gguf(LITE), *extra) as model, Model(tiny_gguf(LITE), threads=1) as processor:
            session, exact = model.session(300, "f32"), processor.session(300, "f32")
            assert_close(session.eval(ids[:20]), exact.eval(ids[:20]), BAR)
            recordings = []
            for begin, end in ((20, 21), (21, 22), (22, 23), (23, 25), (25, 27), (27, 28), (28, 29)):
                model.watch(1, times=False)
                assert_close(session.eval(ids[begin:end]), exact.eval(ids[begin:end]), BAR)
                work = model.watched(1)
                assert work.submissions == work.waits == submissions
                recordings.append(work.recordings)
            assert recordings == [submissions, 0, 0, submissions, 0, submissions, 0]
            model.watch(1, times=True)
            session.eval(ids[29:30])
            assert model.watched(1).recordings == submissions


def test_a_device_that_counts_nothing(tiny_gguf: Callable[[Spec], Path]) -> None:
    with on_gpu(tiny_gguf(LITE)) as model:
        for device, why in ((0, "counts nothing"), (2, "there is no device 2"), (-1, "there is no device -1")):
            with pytest.raises(cext.ArgumentError, match=why):
                model.watch(device, times=False)
            with pytest.raises(cext.ArgumentError, match=why):
                model.watched(device)


def test_the_link_has_a_rate() -> None:
    gpu = _engine.gpu_open(number())
    try:
        assert min(_engine.gpu_link(gpu, 1 << 20)) > 0
    finally:
        _engine.gpu_close(gpu)


def test_a_device_reads_its_memory_at_a_rate() -> None:
    gpu = _engine.gpu_open(number())
    try:
        assert _engine.gpu_reads(gpu, 1 << 20) > 0 and _engine.gpu_reads(gpu, 48) > 0
        for nbytes in (0, 40, (1 << 30) + 16, 1 << 40):
            with pytest.raises(cext.ArgumentError, match="bytes to read"):
                _engine.gpu_reads(gpu, nbytes)
    finally:
        _engine.gpu_close(gpu)
