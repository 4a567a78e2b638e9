"""The trained models converted, quantised and run by the engine: perplexity on held-out text against transformers."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
from ref.model import Model as Reference
from support import trained
from support.scoring import divergence, token_losses
from support.trained import MODELS, N_WINDOWS, UNSCORED

import cext
import quantize
from cext.tokenizer import Tokenizer

QUANTISED = [name for name, recipe in quantize.RECIPES.items() if not recipe.is_float]


@pytest.fixture(scope="session")
def convert(shared, tmp_path_factory):
    """``convert(model, type, **options)``: the GGUF that dsv2 makes of it, once a session; plain unless asked."""
    folder, made = tmp_path_factory.mktemp("trained"), {}

    def path(name, type_, *, calibrated=False):
        key = (name, type_, calibrated)
        if key not in made:
            out = folder / f"{name}-{type_}{'-calibrated' * calibrated}.gguf"
            parts = {"awq": calibrated, "importance": calibrated, "feedback": calibrated, "max_tokens": 53_760}
            options = quantize.Options(type=type_, plain_mix=True, evaluate=False, **parts)
            quantize.quantize(shared / "models" / name, out, options)
            made[key] = out
        return made[key]

    return path


@pytest.fixture(scope="session")
def golden(shared):
    """``golden(model)``: the stored ids and losses of transformers on the checkpoint that is there."""

    def read(name):
        stored = np.load(trained.golden_path(name))
        assert trained.fingerprint(shared / "models" / name) == stored["weights_sha256"], "rerun golden/make_golden.py"
        return stored["ids"].astype(np.int32), stored["losses"]

    return read


def engine(path, **options):
    """The engine's logits as a function of ids, each call a fresh sequence."""
    model = cext.Model(path)

    def logits(ids):
        return model.session(len(ids), **options).eval(ids, "all")

    return logits


@pytest.mark.parametrize("name", MODELS)
def test_tokenizer_cuts_the_text_as_the_checkpoints_does(shared, convert, golden, name):
    text = (shared / "text" / "heldout.txt").read_text(encoding="utf-8")
    ids, _ = golden(name)
    with Tokenizer(convert(name, "bf16")) as tokenizer:
        got = tokenizer.encode(text)
    np.testing.assert_array_equal(trained.windows(np.array(got, np.int32)), ids)


@pytest.mark.parametrize(("name", "n_windows"), (("fixture-12m", 8), ("storyteller-52m", 3)))
@pytest.mark.parametrize("type_", ("bf16", "f32"))
@pytest.mark.parametrize(("kv_type", "mean", "most"), (("f32", 1e-5, 1e-3), ("f16", 1e-3, 0.1)))
def test_unquantised_token_by_token(convert, golden, name, n_windows, type_, kv_type, mean, most):
    """The same weights: the loss of every token. An exact cache gives it exactly; 16 bits move near ties of
    routers, and with one of them every later token of its window.
    """
    ids, losses = golden(name)
    got = trained.losses(engine(convert(name, type_), kv_type=kv_type), ids[:n_windows])
    assert got.mean() == pytest.approx(losses[:n_windows].mean(), abs=mean)
    off = np.abs(got - losses[:n_windows])
    assert np.quantile(off, 0.99) < most, f"worst at (window, token) {np.unravel_index(off.argmax(), off.shape)}"


@pytest.mark.heavy
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("kv_type", "rel"), (("f32", 1e-5), ("f16", 1e-3)))
def test_unquantised_perplexity(convert, golden, name, kv_type, rel):
    """The whole measure: exact with an exact cache; a half-precision one moves near ties of the router (4e-4 seen)."""
    ids, losses = golden(name)
    got = trained.losses(engine(convert(name, "bf16"), kv_type=kv_type), ids)
    assert np.exp(got.mean()) == pytest.approx(np.exp(losses.mean()), rel=rel)


@pytest.mark.parametrize(
    "name", ("fixture-12m", pytest.param("storyteller-52m", marks=pytest.mark.heavy, id="storyteller-52m"))
)
@pytest.mark.parametrize("type_", ("q4_k_m", "q2_k"))
def test_quantised_against_numpy(convert, golden, name, type_):
    """One window on the decoded weights in float64: all that differs is activations of 8 bits and a cache of 16.

    They must not bias the losses, and cost little of the 0.02 that the best 4-bit weights do.
    """
    path = convert(name, type_)
    window = golden(name)[0][0]
    tensors = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}
    expected = Reference.from_gguf(cext.Gguf(path).metadata, tensors).forward(window)
    got = engine(path)(window)
    difference = (token_losses(got, window) - token_losses(expected, window))[UNSCORED:]
    assert abs(difference.mean()) < 3 * difference.std() / len(difference) ** 0.5
    assert divergence(expected, got)[UNSCORED:].mean() < 5e-3


@pytest.mark.oracle
@pytest.mark.heavy
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("type_", QUANTISED)
def test_quantised_against_transformers(shared, convert, golden, name, type_):
    """All of the measure, files made with calibration: perplexity within 0.3 % of transformers' on the same weights."""
    hf = pytest.importorskip("support.hf", reason="needs PyTorch and transformers", exc_type=ImportError)
    path = convert(name, type_, calibrated=True)
    ids, plain = golden(name)
    model, here = hf.from_gguf(shared / "models" / name, path), engine(path)
    losses, divergences = [], []
    for window in ids:
        expected, got = hf.logits(model, window), here(window)
        losses.append([token_losses(x, window)[UNSCORED:].mean() for x in (got, expected)])
        divergences.append(divergence(expected, got)[UNSCORED:].mean())
    got, expected = np.mean(losses, axis=0)
    print(
        f"{name} {type_}: perplexity {np.exp(got):.4f}, transformers {np.exp(expected):.4f} on these weights, "
        f"{np.exp(plain.mean()):.4f} on the checkpoint's; divergence {np.mean(divergences):.1e}"
    )
    assert len(losses) == N_WINDOWS
    assert np.exp(got - expected) == pytest.approx(1, abs=3e-3)


def test_config_is_what_the_file_says(shared, convert):
    """The shape in the GGUF is the checkpoint's."""
    for name in MODELS:
        config = json.loads(Path(shared / "models" / name / "config.json").read_text(encoding="utf-8"))
        with cext.Model(convert(name, "bf16")) as model:
            hp = model.hparams
        assert hp["n_layer"] == config["num_hidden_layers"]
        assert hp["q_lora_rank"] == (config["q_lora_rank"] or 0)
        assert hp["n_expert_group"] == config["n_group"] and hp["n_expert_group_used"] == config["topk_group"]
        assert hp["expert_weights_scale"] == config["routed_scaling_factor"]
        assert hp["attention_scale"] == pytest.approx(0.123048911, rel=1e-6)  # 96^-1/2 (1 + 0.0707 ln 4)^2
