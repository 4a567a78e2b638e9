"""Files of DeepSeekMoE's architecture that are not what they claim: one clear error each, never a crash or a guess."""

import numpy as np
import pytest
from ref.model import Model as Reference
from support.tiny import Checkpoint, gguf_metadata, gguf_tensors, spec_named, variant, write_tensors

import cext

MOE = spec_named("moe")
SHARED = spec_named("moe_shared")
KEYS = {
    "attention.head_count": (1, 2, 3, 5, 1 << 20),
    "attention.head_count_kv": (1, 2, 3, 8, 1 << 20),
    "attention.key_length": (1, 2, 8, 15, 1 << 16),
    "attention.value_length": (1, 8, 17, 1 << 16),
    "rope.dimension_count": (1, 2, 8, 15, 32),
    "embedding_length": (1, 3, 48, 1 << 20),
    "expert_count": (0, 7, 9),
    "expert_used_count": (0, 9),
    "leading_dense_block_count": (0, 2, 3),
}


def written(folder, spec, put=(), drop=(), tensors=None, name="m"):
    keys = {k: v for k, v in gguf_metadata(spec).items() if k.removeprefix("deepseek.") not in drop}
    keys |= {f"deepseek.{key}": value for key, value in dict(put).items()}
    return write_tensors(folder / f"{name}.gguf", keys, tensors or gguf_tensors(Checkpoint(spec)), "deepseek")


@pytest.mark.parametrize("key", KEYS)
def test_other_shapes_are_refused(tmp_path, key):
    """Every one of them differs from what the tensors are; none may be run as if it did not."""
    for value in (*KEYS[key], 0, 2**32 - 1, 1.5, float("nan"), True, "16", [4, 4, 4]):
        with pytest.raises(cext.EngineError, match=r"m\.gguf") as caught:
            cext.Model(written(tmp_path, MOE, {key: value}))
        assert len(str(caught.value)) < 300


@pytest.mark.parametrize("key", ("attention.head_count_kv", "rope.dimension_count"))
def test_what_may_be_left_unsaid(tmp_path, key):
    """As many heads of keys as of queries, all of a head rotated: the defaults of llama.cpp's loader."""
    ids = [1, 2, 3, 4]
    paths = written(tmp_path, MOE), written(tmp_path, MOE, drop=[key], name="unsaid")
    with cext.Model(paths[0]) as said, cext.Model(paths[1]) as unsaid:
        np.testing.assert_array_equal(unsaid.session(4).eval(ids), said.session(4).eval(ids))


def test_shared_heads_must_be_said(tmp_path):
    """Left unsaid, the matrices of keys and values are too small."""
    with pytest.raises(cext.FormatError, match=r"blk\.0\.attn_k\.weight"):
        cext.Model(written(tmp_path, SHARED, drop=["attention.head_count_kv"]))


def test_heads_that_do_not_share_evenly(tmp_path):
    with pytest.raises(cext.FormatError, match="6 heads cannot share 4 heads of keys and values"):
        cext.Model(written(tmp_path, SHARED, {"attention.head_count_kv": 4}))


def test_a_part_of_the_head_rotated(tmp_path):
    with pytest.raises(cext.UnsupportedError, match="8 of a key's 16 values are rotated"):
        cext.Model(written(tmp_path, MOE, {"rope.dimension_count": 8}))


@pytest.mark.parametrize(
    "name", ("attn_q.bias", "attn_k.bias", "attn_output.bias", "attn_q_norm.weight", "attn_k_b.weight")
)
def test_tensors_without_a_place(tmp_path, name):
    """Biases and norms of other models' attention: left out, they would change the answers."""
    tensors = gguf_tensors(Checkpoint(MOE)) | {f"blk.1.{name}": np.ones(64, np.float32)}
    with pytest.raises(cext.UnsupportedError, match=rf"blk\.1\.{name}"):
        cext.Model(written(tmp_path, MOE, tensors=tensors))


@pytest.mark.parametrize("part", "qkv")
def test_a_missing_matrix_is_named(tmp_path, part):
    tensors = gguf_tensors(Checkpoint(MOE))
    del tensors[f"blk.2.attn_{part}.weight"]
    with pytest.raises(cext.FormatError, match=rf"blk\.2\.attn_{part}\.weight"):
        cext.Model(written(tmp_path, MOE, tensors=tensors))


def test_yarns_temperature_of_latent_attention_is_refused(tmp_path):
    """The scale of plain attention's scores carries none: a file that asks for it means another model."""
    for value in (0.0707, -1.0, float("inf")):
        with pytest.raises(cext.FormatError, match="yarn_log_multiplier"):
            cext.Model(written(tmp_path, SHARED, {"rope.scaling.yarn_log_multiplier": value}))


def test_v2s_groups_are_not_assumed(tmp_path):
    """160 experts of which 6 are used have groups in DeepSeek-V2, not in a model of another architecture."""
    spec = variant(MOE, name="many", n_layer=2, n_expert=160, n_used=6, n_ff_expert=4)
    with cext.Model(written(tmp_path, spec)) as model:
        assert model.hparams["n_expert_group"] == 1
        assert not model.notes


def test_wide_values_and_heads_of_one_key(tmp_path):
    """A value wider than its key, which no published model has: the shapes are the file's to say."""
    spec = variant(MOE, name="wide_values", v=40, rope=6, n_head=3, n_head_kv=1)
    keys = {"attention.key_length": spec.rope, "attention.value_length": spec.v}
    ids = list(range(20))
    expected = Reference(spec.hparams, gguf_tensors(Checkpoint(spec))).forward(ids)
    for kv_type, most in (("f32", 1.2e-5), ("f16", 2e-3), ("q8_0", 8e-2)):
        with cext.Model(written(tmp_path, spec, keys)) as model:
            got = model.session(20, kv_type=kv_type).eval(ids, "all")
        assert np.median(np.abs(got - expected).max(axis=-1)) / np.ptp(expected) < most


@pytest.mark.parametrize("seed", range(60))
def test_damaged_files(tmp_path, seed):
    """Any byte of the metadata changed: refused, or run as another model would be."""
    whole = bytearray(written(tmp_path, variant(MOE, n_layer=1)).read_bytes())
    with cext.Gguf(tmp_path / "m.gguf") as file:
        end = len(whole) - sum(t.nbytes for t in file.tensors)
    rng = np.random.default_rng(seed)
    for place in rng.integers(0, end, 3):
        whole[place] = rng.integers(256)
    (tmp_path / "bad.gguf").write_bytes(whole)
    try:
        with cext.Model(tmp_path / "bad.gguf", threads=1) as model:
            model.session(8).eval([0, 1, 2])
    except (cext.EngineError, ValueError):
        pass
