"""The shape of a deepseek2 or deepseek model, read from its GGUF keys, independently of the engine: an oracle."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Yarn:
    """YaRN's numbers (arXiv 2309.00071)."""

    factor: float  # s: how much longer the context has become
    orig_ctx: int  # L: the context before
    mscale_all_dim: float = 0.0  # 0: the softmax scale carries nothing, cos and sin carry it all
    mscale: float | None = None  # None: equal to mscale_all_dim, as in every released model
    beta_fast: float = 32.0  # dimensions that turn more often than this over L keep their frequency
    beta_slow: float = 1.0  # dimensions that turn less often are interpolated by s

    def temperature(self, mscale: float) -> float:
        """0.1 mscale ln(s) + 1: the square root of YaRN's 1/t (section 3.4), scaled as DeepSeek does."""
        return 0.1 * mscale * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

    @property
    def softmax_factor(self) -> float:
        return self.temperature(self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0

    @property
    def rotation_factor(self) -> float:
        """What cos and sin are multiplied by."""
        if not self.mscale_all_dim:
            return self.temperature(1.0)
        mscale = self.mscale_all_dim if self.mscale is None else self.mscale
        return self.temperature(mscale) / self.temperature(self.mscale_all_dim)


@dataclass(frozen=True)
class Hparams:
    """Widths in values. Letters in brackets are those of the DeepSeek-V2 paper, arXiv 2405.04434."""

    n_layer: int
    n_embd: int  # (d)
    n_head: int  # (n_h)
    n_head_kv: int  # heads of keys and values; 1 where a latent serves all
    q_lora_rank: int  # (d_c'), 0 where the query is not compressed
    kv_lora_rank: int  # (d_c)
    qk_nope_head_dim: int  # (d_h)
    qk_rope_head_dim: int  # (d_h^R)
    v_head_dim: int  # (d_h)
    n_layer_dense: int
    n_expert: int  # (N_r)
    n_expert_used: int  # (K_r)
    n_expert_shared: int  # (N_s)
    n_expert_group: int
    n_expert_group_used: int
    expert_weights_scale: float
    expert_weights_norm: bool
    sigmoid: bool  # the V3 router
    plain: bool  # multi-head attention as in DeepSeekMoE (arXiv 2401.06066), no latent
    rms_norm_eps: float
    rope_freq_base: float
    yarn: Yarn | None
    temperature_scale: float = 0.0  # Llama 4's rule for long contexts: 0 leaves all queries alike
    temperature_length: int = 0

    def query_scale(self, positions: NDArray[np.int64]) -> NDArray[np.float64]:
        """What queries at these positions are multiplied by, (n,)."""
        if not self.temperature_scale:
            return np.ones(len(positions))
        return 1 + self.temperature_scale * np.log1p(positions // self.temperature_length)

    @property
    def attention_scale(self) -> float:
        scale = (self.qk_nope_head_dim + self.qk_rope_head_dim) ** -0.5
        return scale * self.yarn.softmax_factor if self.yarn else scale


def from_metadata(metadata: Mapping[str, Any]) -> Hparams:
    """The shape that the GGUF keys ``deepseek2.*`` (kv_b split or in the legacy form) or ``deepseek.*`` describe."""
    arch = "deepseek2" if "deepseek2.block_count" in metadata else "deepseek"
    plain = arch == "deepseek"

    def key(name: str, default: Any = None) -> Any:
        value = metadata.get(f"{arch}.{name}", default)
        if value is None:
            raise KeyError(f"{arch}.{name}")
        return value

    def head(name: str) -> int:
        if plain:
            return int(key(name, key("embedding_length") // key("attention.head_count")))
        return int(key(f"{name}_mla", metadata[f"deepseek2.{name}"]))

    qk_dim = head("attention.key_length")
    yarn = None
    if key("rope.scaling.type", "none") == "yarn":
        log_multiplier = key("rope.scaling.yarn_log_multiplier", 0.0)
        yarn = Yarn(
            factor=key("rope.scaling.factor"),
            orig_ctx=key("rope.scaling.original_context_length"),
            mscale_all_dim=log_multiplier / 0.1,
            beta_fast=key("rope.scaling.yarn_beta_fast", 32.0),
            beta_slow=key("rope.scaling.yarn_beta_slow", 1.0),
        )
    return Hparams(
        n_layer=key("block_count"),
        n_embd=key("embedding_length"),
        n_head=key("attention.head_count"),
        n_head_kv=key("attention.head_count_kv") if plain else 1,
        plain=plain,
        q_lora_rank=key("attention.q_lora_rank", 0),
        kv_lora_rank=0 if plain else key("attention.kv_lora_rank"),
        qk_nope_head_dim=qk_dim - key("rope.dimension_count"),
        qk_rope_head_dim=key("rope.dimension_count"),
        v_head_dim=head("attention.value_length"),
        n_layer_dense=key("leading_dense_block_count", 0),
        n_expert=key("expert_count", 0),
        n_expert_used=key("expert_used_count", 0),
        n_expert_shared=key("expert_shared_count", 0),
        n_expert_group=key("expert_group_count", 1),
        n_expert_group_used=key("expert_group_used_count", 1),
        expert_weights_scale=key("expert_weights_scale", 1.0),
        expert_weights_norm=key("expert_weights_norm", False),
        sigmoid=key("expert_gating_func", 1) == 2,
        rms_norm_eps=key("attention.layer_norm_rms_epsilon"),
        rope_freq_base=key("rope.freq_base", 10000.0),
        yarn=yarn,
        temperature_scale=key("attention.temperature_scale", 0.0),
        temperature_length=key("attention.temperature_length", 0),
    )
