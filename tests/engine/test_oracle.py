"""The engine against transformers, live: random models over every switch, beside the chosen few of the golden files."""

import numpy as np
import pytest
from ref.hparams import Yarn
from ref.model import Model as Reference
from support.tiny import Checkpoint, Spec, gguf_metadata, gguf_tensors, tokens, write_gguf, write_tensors

import cext

hf = pytest.importorskip("support.hf", reason="needs PyTorch and transformers", exc_type=ImportError)
pytestmark = pytest.mark.oracle

FLOAT32 = 2e-5  # test_model.py's bound for 4 layers, and transformers' own rounding
N_TOKENS = 40


def random_spec(seed):
    """Any shape that transformers accepts: heads divide the width, and rotated views are even (see tiny.ODD)."""
    rng = np.random.default_rng(seed)

    def pick(*values):
        return values[rng.integers(len(values))]

    def between(low, high):
        return int(rng.integers(low, high + 1))

    v3, n_head, group_size = pick(False, True), between(1, 6), between(2, 5)
    n_group = between(1, 4)
    n_group_used = between(1, n_group)
    n_layer = between(1, 4)
    yarn = Yarn(
        factor=pick(1.5, 4.0, 40.0),
        orig_ctx=pick(16, 64, 4096),
        mscale_all_dim=pick(0.707, 1.0),
        beta_fast=pick(32.0, 16.0),
        beta_slow=pick(1.0, 2.0),
    )
    return Spec(
        f"random_{seed}",
        seed=1000 + seed,
        v3=v3,
        n_layer=n_layer,
        n_layer_dense=between(0, n_layer),
        n_embd=n_head * between(8, 20),
        n_head=n_head,
        q_lora_rank=pick(0, between(8, 70)),
        kv_lora_rank=2 * between(4, 40),
        nope=2 * between(2, 20),
        rope=2 * between(1, 12),
        v=between(3, 40),
        n_ff_dense=between(5, 150),
        n_ff_expert=between(5, 70),
        n_expert=n_group * group_size,
        n_used=between(1, n_group_used * group_size),
        n_shared=between(1, 3),
        n_group=n_group,
        n_group_used=n_group_used,
        scale=pick(1.0, 2.5, 16.0),
        norm_topk=v3 and pick(False, True),
        n_vocab=between(100, 200),
        rope_base=pick(10000.0, 50000.0, 1e6),
        yarn=pick(None, yarn),
        eps=pick(1e-6, 1e-5),
        tied=pick(False, False, True),
        block_gain=pick(0.5, 1.0),
    )


def firm_ids(spec):
    """A prompt without near ties between experts, which float32 would settle differently here and there."""
    ref = Reference(spec.hparams, gguf_tensors(Checkpoint(spec)))
    for seed in range(200):
        ids = tokens(spec, N_TOKENS, seed)
        ref.forward(ids)
        if min((margin.min() for margin in ref.margins), default=1) > 5 * FLOAT32:
            return ids
    return pytest.skip(f"{spec.name}: every prompt has a near tie")


def assert_as_transformers(tmp_path, spec):
    """In both forms of a file, with the prompt read at once, and from a position on token by token."""
    ids = firm_ids(spec)
    expected = hf.tiny_logits(Checkpoint(spec), ids)
    for legacy in (False, True):
        with cext.Model(write_gguf(tmp_path / f"{legacy}.gguf", spec, legacy=legacy), threads=1) as model:
            session = model.session(N_TOKENS, kv_type="f32")
            prefill = session.eval(ids, "all")
            session.rewind(7)
            rest = np.concatenate([session.eval(ids[i : i + 1], "all") for i in range(7, N_TOKENS)])
        for logits, true in ((prefill, expected), (rest, expected[7:])):
            error = np.abs(logits - true) / np.ptp(true)
            worst = np.unravel_index(error.argmax(), error.shape)
            assert error.max() < FLOAT32, f"{spec}: off by {error.max():.1e} of the range at (token, logit) {worst}"


@pytest.mark.parametrize("seed", range(24))
def test_random_models(tmp_path, seed):
    assert_as_transformers(tmp_path, random_spec(seed))


class Glm(Checkpoint):
    """GLM-4.7-Flash's configuration keys (config.json of zai-org/GLM-4.7-Flash), which name no scoring function."""

    def config(self):
        rope = {"rope_theta": self.spec.rope_base, "rope_type": "default", "partial_rotary_factor": 1.0}
        model = {"architectures": ["Glm4MoeLiteForCausalLM"], "model_type": "glm4_moe_lite", "rope_parameters": rope}
        unsaid = ("scoring_func", "rope_theta")
        return {key: value for key, value in super().config().items() if key not in unsaid} | model


def test_glm_flash_as_its_converter_writes_it(tmp_path):
    """No key for the router's scores, and a draft head's block counted among the model's and told by another key."""
    heads = {"nope": 24, "rope": 8, "v": 32, "n_head": 5, "q_lora_rank": 48}  # an eighth of its 192 + 64, 256
    spec = Spec(
        "glm", seed=3, v3=True, n_expert=16, n_used=4, n_shared=1, scale=1.8, norm_topk=True, eps=1e-5, yarn=None,
        rope_base=1e6, n_embd=60, **heads,
    )  # fmt: skip
    tensors, last = gguf_tensors(Checkpoint(spec)), f"blk.{spec.n_layer - 1}."
    head = {k.replace(last, f"blk.{spec.n_layer}."): v for k, v in tensors.items() if k.startswith(last)}
    head[f"blk.{spec.n_layer}.nextn.eh_proj.weight"] = np.ones((spec.n_embd, 2 * spec.n_embd), np.float32)
    keys = {key: value for key, value in gguf_metadata(spec).items() if not key.endswith("gating_func")}
    keys |= {"deepseek2.block_count": spec.n_layer + 1, "deepseek2.nextn_predict_layers": 1}
    ids = firm_ids(spec)
    expected = hf.logits(hf.load(Glm(spec).write(tmp_path / "hf"), spec.eps), ids)
    with cext.Model(write_tensors(tmp_path / "glm.gguf", keys, tensors | head), threads=1) as model:
        logits = model.session(N_TOKENS, kv_type="f32").eval(ids, "all")
    assert np.abs(logits - expected).max() / np.ptp(expected) < FLOAT32


def random_moe(seed):
    """DeepSeekMoE of any shape."""
    rng = np.random.default_rng(seed)
    n_head_kv, share, half = (int(rng.integers(1, high)) for high in (4, 4, 20))
    n_layer, n_expert = int(rng.integers(1, 4)), int(rng.integers(2, 12))
    width = 2 * half
    return Spec(
        f"random_moe_{seed}",
        seed=2000 + seed,
        n_layer=n_layer,
        n_layer_dense=int(rng.integers(0, n_layer + 1)),
        n_head=n_head_kv * share,
        n_head_kv=n_head_kv,
        n_embd=n_head_kv * share * width,
        nope=0,
        kv_lora_rank=0,
        rope=width,
        v=width,
        n_ff_dense=int(rng.integers(5, 150)),
        n_ff_expert=int(rng.integers(5, 70)),
        n_expert=n_expert,
        n_used=int(rng.integers(1, n_expert + 1)),
        n_shared=int(rng.integers(1, 4)),
        n_vocab=int(rng.integers(100, 200)),
        rope_base=float(rng.choice([10000.0, 1e6])),
        yarn=Yarn(float(rng.choice([1.5, 8.0])), int(rng.choice([16, 64]))) if rng.random() < 0.4 else None,
        eps=float(rng.choice([1e-6, 1e-5])),
        tied=bool(rng.random() < 0.3),
        block_gain=0.5,
    )


@pytest.mark.parametrize("seed", range(12))
def test_random_models_with_plain_attention(tmp_path, seed):
    assert_as_transformers(tmp_path, random_moe(seed))


@pytest.mark.parametrize("seed", range(100, 104))
def test_a_gguf_back_in_transformers(tmp_path, seed):
    """What the quantised files are measured with: decoded GGUF tensors in transformers give the checkpoint's logits."""
    spec = random_spec(seed)
    folder, ids = Checkpoint(spec).write(tmp_path / "hf"), tokens(spec, 16)
    model = hf.from_gguf(folder, write_gguf(tmp_path / "m.gguf", spec))
    np.testing.assert_array_equal(hf.logits(model, ids), hf.logits(hf.load(folder), ids))
