"""quantize.measure.backward through whole models against PyTorch's autograd in transformers' own code."""

import numpy as np
import pytest
from ref.model import Model
from support.calibrated import reader
from support.tiny import SPECS, Checkpoint, gguf_tensors, pairs_together, tokens

from quantize.measure.backward import Block
from quantize.measure.gradients import norm, norm_backward
from quantize.source import arch as arch_of

hf = pytest.importorskip("support.hf", reason="needs PyTorch and transformers", exc_type=ImportError)
torch = pytest.importorskip("torch", reason="needs PyTorch")
pytestmark = pytest.mark.oracle

N_TOKENS = 24
FLOAT32 = 2e-4  # transformers normalises and routes in float32 whatever the weights' precision
# checkpoint name -> GGUF role, of matrices that are one tensor on both sides
SAME = {
    "self_attn.v_proj": "attn_v",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
}


def autograd(spec, folder, ids, labels):
    """Gradients of the summed loss of labels: by parameter name, and at every layer's input."""
    checkpoint = Checkpoint(spec)
    model = hf.load_moe(checkpoint) if spec.n_head_kv else hf.load(checkpoint.write(folder), spec.eps)
    inputs = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0]) or args[0].retain_grad())
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    logits = model(torch.tensor(ids)[None]).logits[0]
    torch.nn.functional.cross_entropy(logits, torch.tensor(labels), reduction="sum").backward()
    return {name: p.grad.numpy() for name, p in model.named_parameters()}, [x.grad[0].numpy() for x in inputs]


def assert_close(got, expected, what):
    error = np.linalg.norm(got - expected) / max(np.linalg.norm(expected), 1e-12)
    assert error < FLOAT32, f"{what}: off by {error:.1e}"


@pytest.mark.parametrize("spec", [s for s in SPECS if not s.tied], ids=lambda s: s.name)
def test_gradients_of_whole_models(tmp_path, spec):
    ids = tokens(spec, N_TOKENS).astype(np.int64)
    labels = np.random.default_rng(0).integers(0, spec.n_vocab, N_TOKENS)
    parameters, at_inputs = autograd(spec, tmp_path, ids, labels)
    arch = arch_of.parse(Checkpoint(spec).config())
    weights = {name: w.astype(np.float64) for name, w in gguf_tensors(Checkpoint(spec)).items()}
    x = [weights["token_embd.weight"][ids]]
    model = Model(spec.hparams, weights)
    for il in range(spec.n_layer):
        x.append(model.block(il, x[-1]))
    final = weights["output_norm.weight"]
    logits = norm(x[-1], final, spec.eps) @ weights["output.weight"].T
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    p[np.arange(N_TOKENS), labels] -= 1
    g = norm_backward(x[-1], final, spec.eps, p @ weights["output.weight"])[None]
    for il in reversed(range(spec.n_layer)):
        met = {}

        def visit(role, part, weight, inputs, gradients, met=met):
            met.setdefault(role, {})[part] = gradients[0].T @ inputs

        g = Block(arch, il, reader(weights, il), 1).backward(x[il], g, visit)
        assert_close(g[0], at_inputs[il], f"layer {il}'s input")
        for name, role in SAME.items():
            if role in met:
                assert_close(met[role][0], parameters[f"model.layers.{il}.{name}.weight"], f"layer {il}: {role}")
        if spec.n_head_kv:
            for part, n_head in (("q", spec.n_head), ("k", spec.n_head_kv)):
                gradient = parameters[f"model.layers.{il}.self_attn.{part}_proj.weight"]
                assert_close(met[f"attn_{part}"][0], pairs_together(gradient, n_head), f"layer {il}: {part}")
        else:
            if "attn_q" in met:
                q = parameters[f"model.layers.{il}.self_attn.q_proj.weight"]
                assert_close(met["attn_q"][0], q, f"layer {il}: q")
            kv_b = parameters[f"model.layers.{il}.self_attn.kv_b_proj.weight"]
            for head, rows in enumerate(kv_b.reshape(spec.n_head, spec.nope + spec.v, -1)):
                assert_close(met["attn_k_b"][head], rows[: spec.nope].T, f"layer {il}: k_b {head}")
                assert_close(met["attn_v_b"][head], rows[spec.nope :], f"layer {il}: v_b {head}")
        for expert, down in met.get("ffn_down_exps", {}).items():
            both = np.concatenate([met["ffn_gate_exps"][expert], met["ffn_up_exps"][expert]])
            prefix = f"model.layers.{il}.mlp.experts."
            assert_close(both, parameters[prefix + "gate_up_proj"][expert], f"layer {il}: gate and up {expert}")
            assert_close(down, parameters[prefix + "down_proj"][expert], f"layer {il}: down {expert}")
