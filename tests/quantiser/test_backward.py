"""quantize.backward: gradients of one block against finite differences of the numpy reference."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from ref.model import Model
from support.calibrated import reader
from support.tiny import MISTRAL, NUMPY_ONLY, SPECS, Checkpoint, Spec, gguf_tensors

from quantize.measure.backward import Block
from quantize.source import arch as arch_of

N_SEQ, N_TOK = 2, 7
STEP = 1e-5
# Central differences in float64: truncation STEP^2 and rounding 1e-16 / STEP, times what a block amplifies.
TOLERANCE = 1e-6


def arch_and_weights(spec: Spec):
    """What the project makes of a spec's config, and its weights in float64 by GGUF name."""
    config = Checkpoint(spec).config()
    if spec.temperature:
        config |= {"model_type": "mistral4"}
        config["rope_scaling"]["llama_4_scaling_beta"] = spec.temperature
        arch = arch_of.parse(config)
    elif spec.norm_topk and not spec.v3:  # refused at the door, yet the numpy reference has it
        arch = replace(arch_of.parse(config | {"norm_topk_prob": False}), expert_norm=True)
    else:
        arch = arch_of.parse(config)
    return arch, {name: w.astype(np.float64) for name, w in gguf_tensors(Checkpoint(spec)).items()}


def loss(spec, weights, il, x, dy):
    """The scalar whose gradient at the block's output is dy."""
    model = Model(spec.hparams, weights)
    return sum(float((model.block(il, w) * d).sum()) for w, d in zip(x, dy, strict=True))


def slope(f, direction):
    return (f(STEP * direction) - f(-STEP * direction)) / (2 * STEP)


# Queries of three original contexts among the N_TOK of a window.
SHORT = replace(MISTRAL, name="mistral_short", yarn=replace(MISTRAL.yarn, orig_ctx=3), temperature=0.5)


@pytest.mark.parametrize("spec", [*SPECS, *NUMPY_ONLY, SHORT], ids=lambda s: s.name)
def test_gradients(spec):
    """At the block's input, and at every matrix: d loss / d W = g^T x, along random directions."""
    arch, weights = arch_and_weights(spec)
    for il in {0, spec.n_layer - 1}:
        rng = np.random.default_rng(il)
        x, dy, other = rng.standard_normal((3, N_SEQ, N_TOK, spec.n_embd))
        met = {}

        def visit(role, part, weight, inputs, gradients, met=met):
            assert gradients.shape == (2, len(inputs), len(weight))
            met.setdefault(role, {})[part] = gradients[1].T @ inputs

        block = Block(arch, il, reader(weights, il), N_SEQ)
        both = np.stack([other, dy]).reshape(2, -1, spec.n_embd)
        dx = block.backward(x.reshape(-1, spec.n_embd), both, visit)[1]
        direction = rng.standard_normal(x.shape)
        expected = slope(partial(lambda il, x, dy, d: loss(spec, weights, il, x + d, dy), il, x, dy), direction)
        size = np.linalg.norm(dx) * np.linalg.norm(direction)
        assert abs((dx.reshape(x.shape) * direction).sum() - expected) < TOLERANCE * size
        quantised = {n.split(".")[2] for n, w in weights.items() if n.startswith(f"blk.{il}.") and w.ndim > 1}
        assert set(met) == quantised - {"ffn_gate_inp"}
        for role, parts in met.items():
            name = f"blk.{il}.{role}.weight"
            direction = rng.standard_normal(weights[name].shape)
            moved = partial(
                lambda n, il, x, dy, d: loss(spec, weights | {n: weights[n] + d}, il, x, dy), name, il, x, dy
            )
            expected = slope(moved, direction)
            whole = direction if direction.ndim == 3 else direction[None]
            got = sum(float((gradient * whole[part]).sum()) for part, gradient in parts.items())
            size = np.sqrt(sum(float(np.square(g).sum()) for g in parts.values())) * np.linalg.norm(direction)
            assert abs(got - expected) < TOLERANCE * size, (il, role)


def test_picked_experts():
    """Those without a chance are not visited; the others' gradients come over its root. dx knows nothing of it."""
    spec = next(s for s in SPECS if s.n_expert > 3)
    arch, weights = arch_and_weights(spec)
    il = spec.n_layer - 1
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((N_SEQ * N_TOK, spec.n_embd)), rng.standard_normal((2, N_SEQ * N_TOK, spec.n_embd))
    met, masses = [], []

    def pick(mass):
        masses.append(mass)
        return np.array([0.25, 0.0, *([1.0] * (spec.n_expert - 2))])

    def run(pick):
        found = {}
        block = Block(arch, il, reader(weights, il), N_SEQ, None, pick)
        dx = block.backward(x, dy, lambda role, part, w, i, g: found.__setitem__((role, part), g))
        met.append(found)
        return dx

    np.testing.assert_array_equal(run(pick), run(None))
    some, every = met
    assert masses[0].shape == (2, spec.n_expert) and (masses[0] >= 0).all() and masses[0].any()
    for (role, part), gradients in every.items():
        if role.endswith("_exps") and part == 1:
            assert (role, part) not in some
        else:
            scale = 2.0 if role.endswith("_exps") and part == 0 else 1.0
            np.testing.assert_allclose(some[role, part], scale * gradients)
