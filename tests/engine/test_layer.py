"""One block run from arrays (cext.Layer), as calibration does: equal to the numpy oracle's block."""

import numpy as np
import pytest
from ref.model import Model as Reference
from support.tiny import NUMPY_ONLY, SPECS, Checkpoint, gguf_tensors, spec_named
from support.tiny import gguf_metadata as keys_without_architecture

import cext

FLOAT32 = 1.2e-5  # see test_model.py


def to_bfloat16(value):
    """float32 to the nearest bfloat16, as its bits."""
    bits = value.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bfloat16(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


STORED_AS = {
    "f32": (lambda value: value, lambda value: value),
    "f16": (lambda value: value.astype(np.float16), lambda value: value.astype(np.float32)),
    "bf16": (to_bfloat16, from_bfloat16),
}


POINTS = ("attn_norm", "kv_a_norm", "attn_heads", "ffn_norm", "dense_hidden")


def hidden(spec, n, seed=0):
    return np.random.default_rng(seed).standard_normal((n, spec.n_embd), dtype=np.float32)


def layer_tensors(spec, il, legacy=False):
    return {k: v for k, v in gguf_tensors(Checkpoint(spec), legacy).items() if k.startswith(f"blk.{il}.")}


@pytest.mark.parametrize("spec", (*SPECS, *NUMPY_ONLY), ids=lambda s: s.name)
@pytest.mark.parametrize("stored", STORED_AS)
def test_block_equals_the_oracle(spec, stored):
    store, restore = STORED_AS[stored]
    n_seq, n_tok = 2, 17
    for il in range(spec.n_layer):
        tensors = {k: v if v.ndim == 1 else store(v) for k, v in layer_tensors(spec, il).items()}
        ref = Reference(spec.hparams, {k: v if v.ndim == 1 else restore(v) for k, v in tensors.items()})
        x = hidden(spec, n_seq * n_tok, seed=il)
        points = [
            p for p in ("attn_norm", "kv_a_norm", "attn_heads", "ffn_norm", "dense_hidden") if exists(spec, p, il)
        ]
        out, taps = cext.Layer(gguf_metadata(spec), il, tensors, threads=2).forward(x, n_seq, points)
        assert set(taps) == set(points)
        for seq in range(n_seq):
            rows = slice(seq * n_tok, (seq + 1) * n_tok)
            expected = ref.block(il, x[rows].astype(np.float64))
            for name, got, true in [
                ("out", out, expected),
                *((point, taps[point], ref.taps[f"{point}-{il}"]) for point in points),
            ]:
                error = np.abs(got[rows] - true).max() / np.ptp(true)
                assert error < FLOAT32, f"layer {il} {name}: off by {error:.1e} of its range"


def gguf_metadata(spec, legacy=False):
    return {"general.architecture": spec.arch} | keys_without_architecture(spec, legacy)


def exists(spec, point, il):
    if point == "kv_a_norm":
        return not spec.n_head_kv
    return point != "dense_hidden" or il < spec.n_layer_dense


@pytest.mark.parametrize("spec", (SPECS[0], spec_named("moe_shared")), ids=lambda s: s.name)
def test_legacy_kv_b(spec):
    """kv_b in one piece, or q, k and v."""
    x = hidden(spec, 10)
    split = cext.Layer(gguf_metadata(spec), 1, layer_tensors(spec, 1)).forward(x, 1)[0]
    legacy = cext.Layer(gguf_metadata(spec, legacy=True), 1, layer_tensors(spec, 1, legacy=True)).forward(x, 1)[0]
    np.testing.assert_allclose(legacy, split, rtol=0, atol=FLOAT32 * np.ptp(split))


@pytest.mark.parametrize("il", [0, 2])
def test_one_sublayer_after_the_other(il):
    """The same bits as both at once; neither needs the other's tensors, nor can they be tapped."""
    spec = spec_named("pro")
    tensors, x = layer_tensors(spec, il), hidden(spec, 2 * 17)
    first, second = ["attn_norm", "attn_heads", "ffn_inp", "ffn_norm"], ["ffn_norm", "l_out"]
    with cext.Layer(gguf_metadata(spec), il, tensors) as layer:
        expected, all_taps = layer.forward(x, 2, {*first, *second})
    for sublayer, points, own, alien, lacks in (
        ("attention", first, (".attn_", ".ffn_norm."), "l_out", "ffn_"),
        ("feed_forward", second, (".ffn_", ".exp_probs_b."), "attn_heads", "attn_"),
    ):
        mine = {name: array for name, array in tensors.items() if any(part in name for part in own)}
        with cext.Layer(gguf_metadata(spec), il, mine, sublayer=sublayer) as layer:
            x, taps = layer.forward(x, 2, points)
            with pytest.raises(ValueError, match="sublayer"):
                layer.forward(x, 2, [alien])
        for name, tapped in taps.items():
            np.testing.assert_array_equal(tapped, all_taps[name])
        with pytest.raises(cext.EngineError, match=rf"{lacks}.* is missing"):
            cext.Layer(gguf_metadata(spec), il, mine)
    np.testing.assert_array_equal(x, expected)
    with pytest.raises(ValueError):
        cext.Layer(gguf_metadata(spec), il, tensors, sublayer="both")


def test_arrays_are_kept_alive():
    spec = spec_named("pro")
    tensors = {name: value.copy() for name, value in layer_tensors(spec, 2).items()}
    x = hidden(spec, 8)
    layer = cext.Layer(gguf_metadata(spec), 2, tensors)
    expected = layer.forward(x, 1)[0]
    del tensors
    trash = [np.full(1 << 16, np.nan, np.float32) for _ in range(50)]
    np.testing.assert_array_equal(layer.forward(x, 1)[0], expected)
    del trash


def test_bad_arguments():
    spec = SPECS[0]
    tensors = layer_tensors(spec, 1)
    layer = cext.Layer(gguf_metadata(spec), 1, tensors)
    for x, n_seq in ((hidden(spec, 5), 2), (hidden(spec, 4)[:, :-1], 1), (hidden(spec, 4), 0), (hidden(spec, 0), 1)):
        with pytest.raises(ValueError):
            layer.forward(x, n_seq)
    with pytest.raises((ValueError, KeyError), match="nonsense"):
        layer.forward(hidden(spec, 4), 1, ["nonsense"])
    with pytest.raises((ValueError, cext.EngineError), match=r"blk\.1\.attn_output"):
        cext.Layer(gguf_metadata(spec), 1, {k: v for k, v in tensors.items() if "attn_output" not in k})
    with pytest.raises((ValueError, cext.EngineError)):
        cext.Layer(gguf_metadata(spec), spec.n_layer, tensors)
    with pytest.raises((ValueError, TypeError, cext.EngineError)):
        cext.Layer(gguf_metadata(spec), 1, tensors | {"blk.1.attn_norm.weight": tensors["blk.1.attn_norm.weight"][::2]})
    with pytest.raises((ValueError, TypeError, cext.EngineError)):
        cext.Layer(gguf_metadata(spec), 1, tensors | {"blk.1.ffn_norm.weight": np.ones(spec.n_embd, np.float64)})
