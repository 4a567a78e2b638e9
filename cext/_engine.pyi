"""Types of the C extension. Shapes are row-major; n_vocab, n_embd and the other names are those of ``Model.hparams``."""

from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from typing import Any, Literal, TypedDict, final

import numpy as np
from numpy.typing import NDArray

class EngineError(Exception):
    """The engine refused; ``hint`` says what to do about it ("" where there is nothing to add)."""

    hint: str

class FormatError(EngineError):
    """A file is not what it claims: truncated, overlapping, overflowing, a tensor of the wrong shape or type."""

class UnsupportedError(EngineError):
    """The file is well formed, but this build does not run it."""

class ContextFullError(EngineError):
    """More tokens than the session's context holds; nothing was evaluated."""

class FormatInfo(TypedDict):
    """One row of cext/quant/formats.def."""

    name: str  # "q4_k"
    gguf_type: int
    block_elements: int
    block_bytes: int

def formats() -> list[FormatInfo]:
    """Every tensor format the engine runs."""

def isas() -> list[str]:
    """The instruction sets this build can use on this machine, best first; DSV2_ISA in the environment picks one."""

class TensorInfo(TypedDict):
    name: str
    type: int  # the GGUF (ggml) type id
    type_name: str  # "q4_k"; "type 29" where the engine does not know it
    shape: tuple[int, ...]  # ggml's order: ne0 (the row) first
    offset: int  # bytes from the start of the file
    nbytes: int

@final
class Gguf:
    """A GGUF file, mapped read-only; every count, offset and shape in it is checked before use.

    Raises OSError, FormatError.
    """

    def __init__(self, path: str | PathLike[str]) -> None: ...
    path: str
    metadata: dict[str, Any]  # scalars, str, and lists of them, by key
    tensors: list[TensorInfo]
    def read(self, name: str) -> NDArray[np.float32]:
        """A tensor decoded to float32, numpy's order (ggml's shape reversed). KeyError, UnsupportedError."""
    def raw(self, name: str) -> NDArray[np.uint8]:
        """A copy of a tensor's bytes as they are in the file."""

class Hparams(TypedDict):
    """A deepseek2 model's shape. Widths in values; 0 where a part is absent."""

    arch: str  # "deepseek2"
    name: str
    n_layer: int
    n_ctx_train: int
    n_embd: int
    n_vocab: int
    n_head: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    n_ff_dense: int
    n_layer_dense: int
    n_expert: int
    n_expert_used: int
    n_expert_shared: int
    n_ff_expert: int
    n_expert_group: int
    n_expert_group_used: int
    expert_weights_scale: float
    expert_weights_norm: bool
    expert_gating: Literal["softmax", "sigmoid"]
    rms_norm_eps: float
    rope_freq_base: float
    rope_scaling_factor: float  # 1.0 without YaRN
    rope_orig_ctx: int
    attention_scale: float

@final
class Model:
    """A model ready to run: weights mapped from the GGUF, not copied.

    threads: workers in the pool; None takes the fastest number for this machine. isa: a name from ``isas()``; None takes
    DSV2_ISA or the best. Raises OSError, FormatError, UnsupportedError, ValueError.
    """

    def __init__(self, path: str | PathLike[str], threads: int | None = None, isa: str | None = None) -> None: ...
    path: str
    hparams: Hparams
    threads: int
    isa: str
    nbytes: int  # of all weights in the file
    def session(self, n_ctx: int = 4096, kv_type: Literal["f16"] = "f16") -> Session:
        """A fresh sequence with room for n_ctx tokens of latent cache."""
    def close(self) -> None:
        """Release the file and the threads; its sessions raise from then on. Also a context manager."""
    def __enter__(self) -> Model: ...
    def __exit__(self, *exc: object) -> None: ...

@final
class Session:
    """One sequence: its latent cache and position. Two threads in one session raise EngineError."""

    model: Model
    n_ctx: int
    n_past: int
    kv_bytes: int  # the cache's size at n_ctx
    kv_type: str
    def eval(self, ids: Sequence[int] | NDArray[np.int32], logits: Literal["last", "all"] = "last", *, tap: Tap | None = None) -> NDArray[np.float32]:
        """Append tokens and return the logits after the last, (n_vocab,), or after each, (n, n_vocab).

        Runs in chunks of at most 512 tokens with the GIL released, and answers Ctrl-C between chunks (the chunks before
        it stay evaluated: see n_past). ValueError for an id out of range or no ids; ContextFullError past n_ctx.
        """
    def rewind(self, n: int) -> None:
        """Forget all but the first n tokens; ValueError unless 0 <= n <= n_past."""

class Tap(dict[str, Any]):
    """Names of intermediates to record: ``{"l_out-3": None}``; eval replaces the values with float32 (or int32) arrays.

    Names are llama.cpp's: "inp_embd", and per layer il "attn_norm-il", "q_a_norm-il" (n, q_lora_rank), "kv_a_norm-il"
    (n, kv_lora_rank), "attn_heads-il" (n, n_head * v_head_dim: the input of the output projection), "attn_out-il",
    "ffn_inp-il" (the residual stream after attention), "ffn_norm-il" (n, n_embd), "router_logits-il" (n, n_expert),
    "experts-il" (n, n_expert_used) int32, "expert_weights-il" (n, n_expert_used), "expert_hidden-il"
    (n, n_expert_used, n_ff_expert: the input of each chosen expert's down projection), "shared_hidden-il"
    (n, n_expert_shared * n_ff_expert), "dense_hidden-il" (n, n_ff_dense), "l_out-il" (n, n_embd), and "result_norm".
    """

@final
class Layer:
    """One transformer block run from arrays, for calibration: a checkpoint streams through it a layer at a time.

    metadata: the GGUF keys of the whole model (deepseek2.*), as they would stand in the file. il: which block (it decides
    dense or experts). tensors: by GGUF name ("blk.3.attn_norm.weight"), numpy arrays in numpy's order (ggml's shape
    reversed): float32, float16, or uint16 holding bfloat16 bits. The arrays are borrowed, not copied, and kept alive.
    """

    def __init__(self, metadata: Mapping[str, Any], il: int, tensors: Mapping[str, NDArray[Any]], threads: int | None = None) -> None: ...
    def forward(self, x: NDArray[np.float32], n_seq: int, tap: Iterable[str] = ()) -> tuple[NDArray[np.float32], dict[str, NDArray[Any]]]:
        """The block's output for x (n_seq * n_tok, n_embd), n_seq independent windows of equal length from position 0.

        Returns (output of x's shape, {name: array} for the tapped names, given without their "-il").
        """

@final
class Sampler:
    """Chooses the next token: repeat penalty, then top-k, top-p, min-p, temperature, then a seeded draw.

    temperature 0 is greedy; top_k 0, top_p 1, min_p 0 and repeat_penalty 1 switch a stage off. ValueError out of range.
    """

    def __init__(self, temperature: float = 0.8, top_k: int = 40, top_p: float = 0.95, min_p: float = 0.05, repeat_penalty: float = 1.0, repeat_last_n: int = 64, seed: int | None = None) -> None: ...
    def sample(self, logits: NDArray[np.float32]) -> int:
        """Draw from (n_vocab,) logits, which are left as they are, and remember the token for the repeat penalty."""
    def accept(self, ids: Iterable[int]) -> None:
        """Count tokens that were not sampled here (the prompt's) towards the repeat penalty."""

def eval_batch(batch: Sequence[tuple[Session, Sequence[int]]]) -> NDArray[np.float32]:
    """Append to several sessions of one model in one step; returns the logits after each one's last token, (n, n_vocab)."""
