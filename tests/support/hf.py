"""transformers as an oracle: a tiny checkpoint's logits in float32 on the CPU. Import only where PyTorch may be."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from numpy.typing import ArrayLike, NDArray
from support.tiny import GLOBAL_NAMES, LAYER_NAMES, Checkpoint
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe


def load(folder: Path, eps: float | None = None, kind: Any = transformers.AutoModelForCausalLM) -> Any:
    """A Hugging Face folder as a float32 model with eager attention; every tensor of it must be used, and be enough.

    kind: the class, where transformers does not tell it by the config. eps: for all norms. transformers gives the two
    latent norms 1e-6 whatever the config says; a GGUF has one key.
    """
    model, info = kind.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",  # the grouped product refuses rows that are not multiples of 16 bytes
        output_loading_info=True,
    )
    unmatched = {key: value for key, value in info.items() if value}
    if unmatched:
        raise ValueError(f"{folder}: checkpoint and model do not match: {unmatched}")
    if eps is not None:
        for module in model.modules():
            if hasattr(module, "variance_epsilon"):
                module.variance_epsilon = eps
    return model.eval()


def from_gguf(folder: Path, path: Path) -> Any:
    """transformers' model of a Hugging Face folder's config, with the weights of a GGUF as gguf-py decodes them."""
    config = transformers.AutoConfig.from_pretrained(folder)
    config._attn_implementation = config._experts_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tensors = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}
    state = {to: tensors[name] for to, name in GLOBAL_NAMES.items() if name in tensors}
    for il in range(config.num_hidden_layers):
        state |= {f"model.layers.{il}.{name}": value for name, value in _layer_state(tensors, f"blk.{il}.")}
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict({name: torch.from_numpy(np.array(value, order="C")) for name, value in state.items()})
    return model.eval()


def _layer_state(tensors: dict[str, NDArray[np.float32]], blk: str) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """A block's tensors under transformers' names: kv_b in one piece, experts stacked, gate and up together."""
    for to, name in LAYER_NAMES.items():
        if blk + name in tensors:
            yield to, tensors[blk + name]
    w_uk, w_uv = tensors[f"{blk}attn_k_b.weight"].transpose(0, 2, 1), tensors[f"{blk}attn_v_b.weight"]
    yield "self_attn.kv_b_proj.weight", np.concatenate([w_uk, w_uv], axis=1).reshape(-1, w_uv.shape[-1])
    if f"{blk}ffn_gate_exps.weight" in tensors:
        gate, up = tensors[f"{blk}ffn_gate_exps.weight"], tensors[f"{blk}ffn_up_exps.weight"]
        yield "mlp.experts.gate_up_proj", np.concatenate([gate, up], axis=1)
        yield "mlp.experts.down_proj", tensors[f"{blk}ffn_down_exps.weight"]


def logits(model: Any, ids: ArrayLike) -> NDArray[np.float32]:
    """Logits after each token, (n, n_vocab)."""
    with torch.no_grad():
        out: NDArray[np.float32] = model(torch.tensor(np.asarray(ids, dtype=np.int64))[None]).logits[0].numpy()
    return out


def load_moe(checkpoint: Checkpoint) -> Any:
    """DeepSeekMoE, which transformers lacks, of what it has: Llama with the experts of DeepSeek-V2 without groups.

    The published modelling file (deepseek-ai/deepseek-moe-16b-base) is the same: Llama's attention and norms, a softmax
    router whose chosen weights are not normalised, and the shared experts as one feed-forward.
    """
    s, source = checkpoint.spec, checkpoint.config()
    shared = ("hidden_size", "intermediate_size", "vocab_size", "rms_norm_eps", "num_hidden_layers")
    common = {name: source[name] for name in (*shared, "num_attention_heads", "num_key_value_heads")}
    rope = {"rope_type": "default", "rope_theta": s.rope_base}
    if s.yarn:
        rope |= {
            "rope_type": "yarn",
            "factor": s.yarn.factor,
            "original_max_position_embeddings": s.yarn.orig_ctx,
        }
    config = transformers.LlamaConfig(
        **common,
        max_position_embeddings=s.n_ctx,
        rope_parameters=rope,
        tie_word_embeddings=s.tied,
        attn_implementation="eager",
    )
    experts = transformers.DeepseekV2Config(
        **common,
        moe_intermediate_size=s.n_ff_expert,
        n_routed_experts=s.n_expert,
        num_experts_per_tok=s.n_used,
        n_shared_experts=s.n_shared,
        routed_scaling_factor=1.0,
        topk_method="greedy",
        experts_implementation="eager",
    )
    model = transformers.LlamaForCausalLM(config)
    for il in s.moe_layers:
        model.model.layers[il].mlp = DeepseekV2Moe(experts)
    model.load_state_dict(dict(_moe_state(checkpoint)), strict=not s.tied)
    model.tie_weights()
    return model.float().eval()


def _moe_state(checkpoint: Checkpoint) -> Iterator[tuple[str, torch.Tensor]]:
    """The checkpoint's tensors under the names of ``load_moe``'s modules: experts stacked, gate and up together."""
    s, tensors = checkpoint.spec, checkpoint.tensors
    for name, value in tensors.items():
        if ".mlp.experts." not in name:
            yield name, torch.from_numpy(value)
    for il in s.moe_layers:
        at = f"model.layers.{il}.mlp.experts."
        gate, up, down = (
            np.stack([tensors[f"{at}{e}.{part}_proj.weight"] for e in range(s.n_expert)])
            for part in ("gate", "up", "down")
        )
        yield f"{at}gate_up_proj", torch.from_numpy(np.concatenate([gate, up], axis=1))
        yield f"{at}down_proj", torch.from_numpy(down)


def tiny_logits(checkpoint: Checkpoint, ids: ArrayLike) -> NDArray[np.float32]:
    if checkpoint.spec.n_head_kv:
        return logits(load_moe(checkpoint), ids)
    with tempfile.TemporaryDirectory() as folder:
        return logits(load(checkpoint.write(Path(folder)), checkpoint.spec.eps), ids)


def versions() -> str:
    return f"transformers {transformers.__version__}, torch {torch.__version__}"
