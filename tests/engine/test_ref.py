"""The numpy oracle itself: equal to transformers' golden logits, its two attention forms and two file forms equal."""

from pathlib import Path

import gguf
import numpy as np
import pytest
from ref.hparams import Yarn, from_metadata
from ref.model import Model
from ref.rope import frequencies, rotate, yarn_ramp
from ref.router import route_sigmoid, route_softmax
from support.tiny import SPECS, TWO_MSCALES, Checkpoint, gguf_metadata, gguf_tensors, tokens, variant, write_gguf

GOLDEN = Path(__file__).parents[1] / "golden"
# transformers works in float32: 2^-24 a rounding, a few hundred roundings deep, relative to the logits' range.
FLOAT32 = 3e-6


@pytest.mark.parametrize("spec", (*SPECS, TWO_MSCALES), ids=lambda s: s.name)
def test_equals_transformers(spec):
    golden = np.load(GOLDEN / f"{spec.name}.npz")
    checkpoint = Checkpoint(spec)
    assert checkpoint.fingerprint() == golden["weights_sha256"], "the weights have drifted: rerun golden/make_golden.py"
    logits = Model(spec.hparams, gguf_tensors(checkpoint)).forward(golden["ids"])
    difference = np.abs(logits - golden["logits"]) / np.ptp(golden["logits"])
    assert difference.max() < FLOAT32, f"worst at (token, logit) {np.unravel_index(difference.argmax(), logits.shape)}"


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
def test_absorbed_and_legacy_forms_are_equal(spec):
    """Absorbing W_uk and W_uv, and reading kv_b whole, changes the order of the sums only."""
    checkpoint, ids = Checkpoint(spec), tokens(spec, 12)
    expanded = Model.from_gguf(gguf_metadata(spec), gguf_tensors(checkpoint)).forward(ids)
    legacy = Model.from_gguf(gguf_metadata(spec, legacy=True), gguf_tensors(checkpoint, legacy=True), absorbed=True)
    np.testing.assert_allclose(legacy.forward(ids), expanded, rtol=0, atol=1e-12 * np.ptp(expanded))


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
def test_keys_say_the_whole_shape(spec):
    for legacy in (False, True):
        read = from_metadata(gguf_metadata(spec, legacy))
        assert {k: v for k, v in vars(read).items() if k != "yarn"} == {
            k: v for k, v in vars(spec.hparams).items() if k != "yarn"
        }
        assert read.attention_scale == pytest.approx(spec.hparams.attention_scale, rel=1e-15)
        np.testing.assert_allclose(frequencies(read), frequencies(spec.hparams), rtol=1e-15)


def test_future_does_not_matter():
    spec = SPECS[0]
    model, ids = Model(spec.hparams, gguf_tensors(Checkpoint(spec))), tokens(spec, 9)
    logits = model.forward(ids)
    np.testing.assert_allclose(logits[:4], model.forward(ids[:4]), rtol=0, atol=1e-13 * np.ptp(logits))


def test_v2_lite_softmax_scale():
    """The figure that the design quotes: 192^-1/2 (1 + 0.0707 ln 40)^2."""
    spec = variant(SPECS[0], nope=128, rope=64, yarn=Yarn(40.0, 4096, 0.707))
    assert spec.hparams.attention_scale == pytest.approx(0.11472, abs=5e-6)


def test_yarn_ramp_of_v2():
    """V2's own numbers: pairs up to 10 keep their frequency, pairs from 23 on are interpolated by the factor."""
    ramp = yarn_ramp(Yarn(40.0, 4096, 0.707), dim=64, base=10000.0)
    assert (ramp[:11] == 0).all() and (ramp[23:] == 1).all()
    np.testing.assert_allclose(ramp[10:24], np.arange(14) / 13)


def test_rotation_pairs_neighbours():
    hp = variant(SPECS[0], rope=4, yarn=None).hparams
    turned = rotate(hp, np.array([[1.0, 0.0, 0.0, 1.0]]), np.array([3]))
    slow = 3 * 10000.0**-0.5
    np.testing.assert_allclose(turned[0], [np.cos(3), np.sin(3), -np.sin(slow), np.cos(slow)])


def test_routers_differ_in_how_they_score_a_group():
    """One strong expert wins its group for V2's maximum; two middling ones beat it for V3's sum of two."""
    hp = variant(SPECS[0], n_expert=6, n_used=1, n_group=2, n_group_used=1, scale=2.0).hparams
    logits = np.array([[2.0, -9.0, -9.0, 1.5, 1.5, -9.0]])
    by_max, by_sum = route_softmax(hp, logits), route_sigmoid(hp, logits, np.zeros(6))
    assert by_max.experts.tolist() == [[0]] and by_sum.experts.tolist() == [[3]]
    np.testing.assert_allclose(by_max.weights, 2 * np.exp(2) / np.exp(logits).sum())
    np.testing.assert_allclose(by_sum.weights, 2 / (1 + np.exp(-1.5)))


def test_bias_selects_but_does_not_weigh():
    hp = variant(SPECS[0], n_expert=4, n_used=2, norm_topk=True, scale=3.0).hparams
    routing = route_sigmoid(hp, np.zeros((1, 4)), np.array([0.0, 0.3, 0.1, 0.2]))
    assert routing.experts.tolist() == [[1, 3]]
    np.testing.assert_allclose(routing.weights, [[1.5, 1.5]])


def test_gguf_holds_what_was_meant(tmp_path):
    """gguf-py's reader gives back every tensor and key of the files that the other tests run."""
    spec = SPECS[0]
    for legacy in (False, True):
        reader = gguf.GGUFReader(write_gguf(tmp_path / "m.gguf", spec, legacy=legacy))
        tensors = gguf_tensors(Checkpoint(spec), legacy)
        assert {t.name for t in reader.tensors} == set(tensors)
        for t in reader.tensors:
            np.testing.assert_array_equal(t.data, tensors[t.name])
        metadata = gguf_metadata(spec, legacy)
        for key, value in metadata.items():
            assert reader.fields[key].contents() == (np.float32(value) if isinstance(value, float) else value), key
