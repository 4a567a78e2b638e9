"""DeepSeek-V2 in miniature, for training: every expert is computed and the unchosen are masked, exact and simple at this size."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

N_LAYERS, WIDTH, HEADS, Q_RANK, KV_RANK, NOPE, ROPE, VALUE = 6, 512, 8, 256, 256, 64, 32, 64
DENSE, EXPERTS, CHOSEN, GROUPS, CHOSEN_GROUPS, SHARED, EXPERT, SCALE = 1536, 16, 4, 4, 2, 2, 256, 4.0
EPS, BASE = 1e-6, 10000.0
YARN = {
    "factor": 4.0,
    "original_max_position_embeddings": 1024,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
}
CONTEXT = 4096


def rope_table(length: int) -> tuple[Tensor, Tensor]:
    """cos and sin of YaRN's angles, (length, ROPE / 2). The paper's ramp between interpolated and plain frequencies."""
    plain = BASE ** -(torch.arange(0, ROPE, 2) / ROPE)
    edges = [
        ROPE * math.log(1024 / (turns * 2 * math.pi)) / (2 * math.log(BASE))
        for turns in (YARN["beta_fast"], YARN["beta_slow"])
    ]
    low, high = max(math.floor(edges[0]), 0), min(math.ceil(edges[1]), ROPE - 1)
    ramp = ((torch.arange(ROPE // 2) - low) / (high - low)).clamp(0, 1)
    angles = torch.outer(torch.arange(length), plain / YARN["factor"] * ramp + plain * (1 - ramp))
    return angles.cos(), angles.sin()


def softmax_scale() -> float:
    mscale = 0.1 * YARN["mscale_all_dim"] * math.log(YARN["factor"]) + 1
    return float((NOPE + ROPE) ** -0.5 * mscale**2)


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the interleaved pairs of x (..., length, ROPE)."""
    even, odd = x[..., 0::2].float(), x[..., 1::2].float()
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x.dtype)


class Norm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), EPS)


def linear(n_in: int, n_out: int) -> nn.Linear:
    return nn.Linear(n_in, n_out, bias=False)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_a_proj, self.q_a_layernorm, self.q_b_proj = (
            linear(WIDTH, Q_RANK),
            Norm(Q_RANK),
            linear(Q_RANK, HEADS * (NOPE + ROPE)),
        )
        self.kv_a_proj_with_mqa, self.kv_a_layernorm = linear(WIDTH, KV_RANK + ROPE), Norm(KV_RANK)
        self.kv_b_proj, self.o_proj = linear(KV_RANK, HEADS * (NOPE + VALUE)), linear(HEADS * VALUE, WIDTH)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x (batch, length, WIDTH)."""
        shape = (*x.shape[:2], HEADS, -1)
        q_nope, q_rope = (
            self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))).view(shape).transpose(1, 2).split((NOPE, ROPE), -1)
        )
        latent, k_rope = self.kv_a_proj_with_mqa(x).split((KV_RANK, ROPE), -1)
        k_nope, v = self.kv_b_proj(self.kv_a_layernorm(latent)).view(shape).transpose(1, 2).split((NOPE, VALUE), -1)
        q = torch.cat((q_nope, turn(q_rope, cos, sin)), -1)
        k = torch.cat((k_nope, turn(k_rope[:, None], cos, sin).expand(-1, HEADS, -1, -1)), -1)
        v = F.pad(v, (0, NOPE + ROPE - VALUE))  # flash attention wants one width
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=softmax_scale())[..., :VALUE]
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, inner: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = linear(WIDTH, inner), linear(WIDTH, inner), linear(inner, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.Module):
    """Group-limited greedy choice by a softmax router; gate, up and down hold the experts one after another."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Parameter(torch.empty(EXPERTS, WIDTH))
        self.gate, self.up, self.down = (nn.Parameter(torch.empty(EXPERTS * EXPERT, WIDTH)) for _ in range(3))
        self.shared_experts = Mlp(SHARED * EXPERT)

    def choose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities and the chosen as ones, both (..., EXPERTS), float32."""
        with torch.autocast(x.device.type, enabled=False):
            p = F.linear(x.float(), self.router.float()).softmax(-1)
        best = p.unflatten(-1, (GROUPS, -1)).amax(-1)
        allowed = torch.zeros_like(best).scatter_(-1, best.topk(CHOSEN_GROUPS, -1).indices, 1.0)
        chosen = (p * allowed.repeat_interleave(EXPERTS // GROUPS, -1)).topk(CHOSEN, -1).indices
        return p, torch.zeros_like(p).scatter_(-1, chosen, 1.0)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The mixture, and the load balancing loss: 1 where every expert gets its share."""
        p, chosen = self.choose(x)
        share = chosen.flatten(0, -2).mean(0) * EXPERTS / CHOSEN
        balance = (share.detach() * p.flatten(0, -2).mean(0)).sum()
        inner = F.silu(F.linear(x, self.gate.to(x.dtype))) * F.linear(x, self.up.to(x.dtype))
        inner = inner.unflatten(-1, (EXPERTS, EXPERT)) * (p * chosen * SCALE).to(x.dtype)[..., None]
        return F.linear(inner.flatten(-2), self.down.to(x.dtype).t()) + self.shared_experts(x), balance


class Layer(nn.Module):
    def __init__(self, dense: bool) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = Norm(WIDTH), Norm(WIDTH)
        self.self_attn = Attention()
        self.mlp: Mlp | Experts = Mlp(DENSE) if dense else Experts()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        y = self.mlp(self.post_attention_layernorm(x))
        return (x + y[0], y[1]) if isinstance(y, tuple) else (x + y, x.new_zeros((), dtype=torch.float32))


class Model(nn.Module):
    def __init__(self, n_vocab: int, n_layers: int = N_LAYERS) -> None:
        super().__init__()
        self.embed_tokens, self.lm_head, self.norm = nn.Embedding(n_vocab, WIDTH), linear(WIDTH, n_vocab), Norm(WIDTH)
        self.layers = nn.ModuleList(Layer(dense=i == 0) for i in range(n_layers))
        for name, p in self.named_parameters():
            if p.ndim == 2:
                ends_block = name.endswith(("o_proj.weight", "down_proj.weight", ".down"))
                nn.init.normal_(p, std=0.02 / (math.sqrt(2 * n_layers) if ends_block else 1))

    def forward(self, ids: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (batch, length, n_vocab), and the mean load balancing loss of the layers with experts."""
        x, balance = self.embed_tokens(ids), torch.zeros((), device=ids.device)
        for layer in self.layers:
            x, loss = layer(x, cos, sin)
            balance = balance + loss
        return self.lm_head(self.norm(x)), balance / max(1, len(self.layers) - 1)


def checkpoint(model: Model) -> dict[str, Tensor]:
    """The weights in bfloat16 under the names of a DeepSeek-V2 checkpoint."""
    out = {}
    for name, weight in model.state_dict().items():
        p = weight.detach().to("cpu", torch.bfloat16)
        base, _, leaf = name.rpartition(".")
        if leaf == "router":
            out[f"model.{base}.gate.weight"] = p.contiguous()
        elif leaf in ("gate", "up", "down"):
            for e, part in enumerate(p.split(EXPERT)):
                out[f"model.{base}.experts.{e}.{leaf}_proj.weight"] = (
                    part.t() if leaf == "down" else part
                ).contiguous()
        else:
            out[name if name == "lm_head.weight" else f"model.{name}"] = p.contiguous()
    return out


def config(n_vocab: int, bos: int, eos: int) -> dict[str, object]:
    return {
        "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "torch_dtype": "bfloat16", "hidden_act": "silu", "attention_bias": False,
        "attention_dropout": 0.0, "bos_token_id": bos, "eos_token_id": eos, "max_position_embeddings": CONTEXT, "vocab_size": n_vocab, "hidden_size": WIDTH,
        "num_hidden_layers": N_LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "q_lora_rank": Q_RANK, "kv_lora_rank": KV_RANK,
        "qk_nope_head_dim": NOPE, "qk_rope_head_dim": ROPE, "v_head_dim": VALUE, "intermediate_size": DENSE, "moe_intermediate_size": EXPERT,
        "n_routed_experts": EXPERTS, "num_experts_per_tok": CHOSEN, "n_shared_experts": SHARED, "n_group": GROUPS, "topk_group": CHOSEN_GROUPS,
        "routed_scaling_factor": SCALE, "first_k_dense_replace": 1, "moe_layer_freq": 1, "rms_norm_eps": EPS, "rope_theta": BASE, "scoring_func": "softmax",
        "topk_method": "group_limited_greedy", "norm_topk_prob": False, "aux_loss_alpha": 0.01, "seq_aux": True, "tie_word_embeddings": False,
        "use_cache": True, "initializer_range": 0.02, "rope_scaling": {"type": "yarn", **YARN},
    }  # fmt: skip
