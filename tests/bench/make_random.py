"""Write a GGUF of a published model's shape with random weights in llama.cpp's Q4_K_M mix, for measurements of speed.

    python tests/bench/make_random.py --shape moe16b vocabulary.gguf out.gguf [--layers N] [--experts IQ3_S]
    dsv2 bench out.gguf --against llama.cpp --threads 2 --depths 0,4096 --prefill 512 --decode 64 --rounds 3

Weights are cut from pools of quantised gaussian numbers, so that blocks have scales as real ones do; the vocabulary is
that of another GGUF. Nothing of what such a model says means anything. --shape v2 --layers 16 --experts IQ3_S is a file
of 24 GB with the 236B model's layers: what does not fit in memory.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as T

from quantize.encode.encoder import Encoder

POOL_ROWS, POOL_WIDTH = 1 << 12, 2048


@dataclass(frozen=True)
class Shape:
    """What a model's tensors follow from. Widths are numbers of elements of a row."""

    arch: str
    n_layer: int
    width: int
    n_head: int
    n_dense: int  # of the first layer's feed-forward
    n_expert: int
    n_ff: int  # of an expert
    keys: dict[str, Any]
    attention: tuple[tuple[str, tuple[int, ...]], ...]  # of a layer, between its norm and the output's projection


N_VOCAB, N_SHARED, N_USED = 102400, 2, 6
LATENT: dict[str, Any] = {
    "context_length": 163840, "attention.head_count_kv": 1, "attention.kv_lora_rank": 512,
    "attention.key_length": 576, "attention.value_length": 512, "attention.key_length_mla": 192,
    "attention.value_length_mla": 128, "rope.dimension_count": 64, "rope.scaling.type": "yarn",
    "rope.scaling.factor": 40.0, "rope.scaling.original_context_length": 4096,
}  # fmt: skip
SHAPES = {
    "v2lite": Shape(
        "deepseek2", 27, 2048, 16, 10944, 64, 1408,
        LATENT | {"expert_weights_scale": 1.0, "rope.scaling.yarn_log_multiplier": 0.0707},
        (
            ("attn_q", (3072, 2048)), ("attn_kv_a_mqa", (576, 2048)), ("attn_kv_a_norm", (512,)),
            ("attn_k_b", (16, 512, 128)), ("attn_v_b", (16, 128, 512)),
        ),
    ),
    "v2": Shape(
        "deepseek2", 60, 5120, 128, 12288, 160, 1536,
        LATENT | {
            "expert_weights_scale": 16.0, "rope.scaling.yarn_log_multiplier": 0.1, "attention.q_lora_rank": 1536,
            "expert_group_count": 8, "expert_group_used_count": 3,
        },
        (
            ("attn_q_a", (1536, 5120)), ("attn_q_a_norm", (1536,)), ("attn_q_b", (24576, 1536)),
            ("attn_kv_a_mqa", (576, 5120)), ("attn_kv_a_norm", (512,)),
            ("attn_k_b", (128, 512, 128)), ("attn_v_b", (128, 128, 512)),
        ),
    ),
    "moe16b": Shape(
        "deepseek", 28, 2048, 16, 10944, 64, 1408,
        {
            "context_length": 4096, "attention.head_count_kv": 16, "rope.dimension_count": 128,
            "expert_weights_scale": 1.0,
        },
        tuple((f"attn_{part}", (2048, 2048)) for part in "qkv"),
    ),
}  # fmt: skip


def tensors(shape: Shape, n_layer: int) -> dict[str, tuple[int, ...]]:
    """Shapes in numpy's order, in the order of the file."""
    width, heads = shape.width, shape.n_head * 128
    out: dict[str, tuple[int, ...]] = {"token_embd": (N_VOCAB, width), "output_norm": (width,)}
    out["output"] = (N_VOCAB, width)
    for il in range(n_layer):
        layer = {"attn_norm": (width,), **dict(shape.attention), "attn_output": (width, heads), "ffn_norm": (width,)}
        if il == 0:
            dense = shape.n_dense
            layer |= {"ffn_gate": (dense, width), "ffn_up": (dense, width), "ffn_down": (width, dense)}
        else:
            layer["ffn_gate_inp"] = (shape.n_expert, width)
            for suffix, lead, n_ff in (("exps", (shape.n_expert,), shape.n_ff), ("shexp", (), N_SHARED * shape.n_ff)):
                for part in ("gate", "up"):
                    layer[f"ffn_{part}_{suffix}"] = (*lead, n_ff, width)
                layer[f"ffn_down_{suffix}"] = (*lead, width, n_ff)
        out |= {f"blk.{il}.{name}": size for name, size in layer.items()}
    return out


def type_of(name: str, size: tuple[int, ...], n_layer: int) -> T:
    """The type that the mix gives a tensor, with its fallbacks for rows that 256 does not divide."""
    if name.endswith("_norm") or "ffn_gate_inp" in name:
        return T.F32
    if name == "output":
        return T.Q6_K
    il = int(name.split(".")[1]) if name.startswith("blk.") else 0
    eighth = n_layer // 8
    heavy = "ffn_down" in name and (il < eighth or il >= 7 * n_layer // 8 or (il - eighth) % 3 == 2)
    if size[-1] % 256:
        return T.Q8_0 if heavy else T.Q5_0
    return T.Q6_K if heavy else T.Q4_K


def written(writer: gguf.GGUFWriter, sizes: dict[str, tuple[int, ...]], types: dict[str, T]) -> None:
    """The file, a tensor at a time: it may be larger than memory."""
    for name, size in sizes.items():
        elements, nbytes = gguf.GGML_QUANT_SIZES[types[name]]
        total = int(np.prod(size)) // elements * nbytes
        stored = (*size[:-1], size[-1] // elements * nbytes) if types[name] != T.F32 else size
        dtype = np.dtype(np.float32 if types[name] == T.F32 else np.uint8)
        writer.add_tensor_info(f"{name}.weight", stored, dtype, total, None if types[name] == T.F32 else types[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    rng = np.random.default_rng(1234)
    gauss = rng.standard_normal((POOL_ROWS, POOL_WIDTH), dtype=np.float32) * np.float32(0.02)
    with Encoder(2) as encoder:
        pools = {kind: encoder.encode(gauss, kind).reshape(-1) for kind in set(types.values()) - {T.F32}}
    for name, size in sizes.items():
        if types[name] == T.F32:
            ones = name.endswith("_norm")
            data = np.ones(size, np.float32) if ones else rng.standard_normal(size, dtype=np.float32) * 0.04
            writer.write_tensor_data(data.astype(np.float32))
            continue
        elements, nbytes = gguf.GGML_QUANT_SIZES[types[name]]
        at = int(rng.integers(pools[types[name]].size // nbytes)) * nbytes
        total = int(np.prod(size)) // elements * nbytes
        writer.write_tensor_data(np.resize(np.roll(pools[types[name]], -at), total))
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vocabulary", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="v2lite")
    parser.add_argument("--layers", type=int, help="fewer than the model has")
    parser.add_argument("--experts", metavar="TYPE", help="the type of the routed experts, in place of the mix's")
    asked = parser.parse_args()
    shape = SHAPES[asked.shape]
    n_layer = asked.layers or shape.n_layer
    writer = gguf.GGUFWriter(asked.out, shape.arch)
    keys = {
        "block_count": n_layer, "embedding_length": shape.width, "feed_forward_length": shape.n_dense,
        "vocab_size": N_VOCAB, "attention.head_count": shape.n_head, "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.freq_base": 10000.0, "leading_dense_block_count": 1, "expert_count": shape.n_expert,
        "expert_used_count": N_USED, "expert_shared_count": N_SHARED, "expert_feed_forward_length": shape.n_ff,
        **shape.keys,
    }  # fmt: skip
    for key, value in keys.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(f"{shape.arch}.{key}", value)
    for key, field in gguf.GGUFReader(asked.vocabulary).fields.items():
        if key.startswith("tokenizer.") and field.types[0] == gguf.GGUFValueType.ARRAY:
            writer.add_array(key, field.contents())
        elif key.startswith("tokenizer."):
            writer.add_key_value(key, field.contents(), field.types[0])
    sizes = tensors(shape, n_layer)
    types = {name: type_of(name, size, n_layer) for name, size in sizes.items()}
    if asked.experts:
        types |= {name: T[asked.experts] for name in types if name.endswith("_exps")}
    written(writer, sizes, types)


if __name__ == "__main__":
    main()
