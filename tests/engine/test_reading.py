"""A step that is computed some layers at a time: the same numbers, and nothing before its end."""

import gc

import numpy as np
import pytest
from support.tiny import SPECS, tokens

import cext

LITE = SPECS[0]


@pytest.fixture(params=SPECS, ids=lambda spec: spec.name)
def spec(request):
    return request.param


@pytest.fixture
def model(tiny_gguf):
    with cext.Model(tiny_gguf(LITE), threads=2) as opened:
        yield opened


def run(reading, n_layers, between=lambda: None):
    """Its logits, so many layers at a time."""
    while True:
        logits = reading.run(n_layers)
        if logits is not None:
            return logits
        between()


@pytest.mark.parametrize("n_layers", [1, 2, 100])
@pytest.mark.parametrize("kv_type", ["f16", "q8_0", "f32"])
def test_the_same_numbers_whatever_comes_between(tiny_gguf, spec, n_layers, kv_type):
    """Two prompts behind what is held, logits of all, some or none of the tokens, and answers of others meanwhile."""
    ids, more = tokens(spec, 70, seed=3), tokens(spec, 40, seed=4)
    with cext.Model(tiny_gguf(spec), threads=2) as model:
        for n_logits in ([1, 0], [3, 40], [0, 0]):
            sessions, expected = [], []
            for _ in range(2):
                one, two, other = (model.session(256, kv_type) for _ in range(3))
                one.eval(ids[:20])
                other.eval(ids[:3])
                sessions.append((one, two, other))
            batch = [[(one, ids[20:]), (two, more)] for one, two, _ in sessions]
            expected = cext.eval_batch(batch[0], n_logits)
            beside = sessions[1][2]
            found = run(cext.Reading(batch[1], n_logits), n_layers, lambda: beside.eval([1]))  # noqa: B023
            np.testing.assert_array_equal(found, expected)
            for whole, parts in zip(sessions[0][:2], sessions[1][:2], strict=True):
                np.testing.assert_array_equal(parts.ids, whole.ids)
                np.testing.assert_array_equal(parts.eval([7]), whole.eval([7]))


def test_its_sessions_hold_what_they_held_and_may_be_forked(model):
    """A fork inside a block that is being filled, which goes on before and after the rest is computed."""
    ids = tokens(LITE, 150, seed=5)
    session, alone = model.session(256), model.session(256)
    session.eval(ids[:70])
    reading = cext.Reading([(session, ids[70:])])
    assert reading.left == LITE.n_layer and reading.run(1) is None and session.n_past == 70
    forks = [session.fork(), session.fork(65)]
    alone.eval(ids[:70])
    np.testing.assert_array_equal(forks[0].eval(ids[100:110]), alone.eval(ids[100:110]))
    logits = run(reading, 1)
    np.testing.assert_array_equal(forks[0].ids, np.concatenate([ids[:70], ids[100:110]]))
    alone.rewind(70)
    np.testing.assert_array_equal(logits, [alone.eval(ids[70:])])
    assert session.n_past == 150
    alone.rewind(65)
    np.testing.assert_array_equal(forks[1].eval(ids[:9]), alone.eval(ids[:9]))
    session.rewind(0)  # it may be changed again


@pytest.mark.parametrize("n_run", [0, 1])
@pytest.mark.parametrize("ends", ["close", "gone"])
def test_what_was_not_computed_was_never_begun(model, n_run, ends):
    ids = tokens(LITE, 100, seed=6)
    session, alone = model.session(128), model.session(128)
    session.eval(ids[:10])
    alone.eval(ids[:10])
    n_blocks = model.cache_usage().blocks
    reading = cext.Reading([(session, ids[10:])])
    for _ in range(n_run):
        reading.run(1)
    for changes in (lambda: session.rewind(3), lambda: session.eval([1]), lambda: session.repeat(20)):
        with pytest.raises(cext.ArgumentError, match="being read"):
            changes()
    with pytest.raises(cext.ArgumentError, match="being read"):
        cext.Reading([(session, [1])])
    if ends == "close":
        reading.close()
        with pytest.raises(cext.ArgumentError, match="closed"):
            reading.run(1)
    else:
        del reading
        gc.collect()
    assert session.n_past == 10 and model.cache_usage().blocks == n_blocks
    np.testing.assert_array_equal(session.eval(ids[10:20]), alone.eval(ids[10:20]))


def test_a_step_goes_on_when_its_model_is_closed(tiny_gguf):
    """As one that is under way does: what it holds is let go with it."""
    model = cext.Model(tiny_gguf(LITE), threads=2)
    session = model.session(64)
    reading = cext.Reading([(session, [1, 2, 3])])
    reading.run(1)
    model.close()
    assert run(reading, 1).shape == (1, LITE.n_vocab)
    with pytest.raises(cext.ArgumentError):
        reading.run(1)  # no layer is left
    reading.close()
    with pytest.raises(cext.ArgumentError, match="closed"):
        session.eval([1])


def test_what_cannot_be_begun(model, tiny_gguf):
    session = model.session(3000)
    session.eval([1, 2])
    n_blocks = model.cache_usage().blocks
    with cext.Model(tiny_gguf(LITE)) as another:
        batches = [
            ([], ValueError),
            ([(session, [])], ValueError),
            ([(session, [1]), (session, [2])], cext.ArgumentError),
            ([(session, [LITE.n_vocab])], (ValueError, cext.ArgumentError)),
            ([(session, [1] * (cext.MAX_STEP + 1))], (ValueError, cext.ArgumentError)),
            ([(session, [1]), (another.session(8), [1])], cext.ArgumentError),
            ([(session, [1] * 5), (model.session(4), [1] * 5)], cext.ContextFullError),
        ]
        for batch, error in batches:
            with pytest.raises(error):
                cext.Reading(batch)
    assert session.n_past == 2 and model.cache_usage().blocks == n_blocks
    reading = cext.Reading([(session, [3])])
    for n in (0, -1):
        with pytest.raises((ValueError, cext.ArgumentError)):
            reading.run(n)
    assert run(reading, 1) is not None


def test_experts_on_a_drive_are_read_for_all_layers(tiny_gguf):
    path = tiny_gguf(LITE)
    with cext.Model(path) as model:
        least = model.needs().least
    with cext.Model(path, ram=least) as model, pytest.raises(cext.UnsupportedError):
        cext.Reading([(model.session(8), [1])])


@pytest.mark.parametrize("how", ["attention", "feed-forward", "ends", "experts"])
def test_layers_on_other_devices(tiny_gguf, how):
    """What goes on between devices begins anew with each part: a part ends where the residual stream is."""
    spec, last = LITE, LITE.n_layer - 1
    place = {
        "attention": cext.Place("attention", 1, range(1, last + 1)),
        "feed-forward": cext.Place("feed_forward", 1, range(spec.n_layer)),
        "ends": cext.Place("ends", 1),
        "experts": cext.Place("experts", 1, range(spec.n_layer_dense, spec.n_layer), range(spec.n_expert // 2)),
    }[how]
    ids = tokens(spec, 90, seed=8)
    with cext.Model(tiny_gguf(spec), threads=2, devices=[cext.Device(threads=2)], placement=[place]) as model:
        whole, parts, beside = (model.session(128) for _ in range(3))
        expected = cext.eval_batch([(whole, ids)], [5])
        np.testing.assert_array_equal(run(cext.Reading([(parts, ids)], [5]), 1, lambda: beside.eval([1])), expected)
        np.testing.assert_array_equal(parts.eval([7]), whole.eval([7]))
