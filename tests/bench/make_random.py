"""Write a GGUF of a published model's shape with random weights in llama.cpp's Q4_K_M mix, for measurements of speed.

    python tests/bench/make_random.py --shape moe16b vocabulary.gguf out.gguf [--layers N]
    dsv2 bench out.gguf --against llama.cpp --threads 2 --depths 0,4096 --prefill 512 --decode 64 --rounds 3

Weights are cut from pools of quantised gaussian numbers, so that blocks have scales as real ones do; the vocabulary is
that of another GGUF. Nothing of what such a model says means anything.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as T
from numpy.typing import NDArray

from quantize.encode.encoder import Encoder

POOL_ROWS = 1 << 12  # of 2048 values
WIDTH = 2048


@dataclass(frozen=True)
class Shape:
    """What a model's tensors follow from; widths that both have are below."""

    arch: str
    n_layer: int
    keys: dict[str, Any]
    attention: tuple[tuple[str, tuple[int, ...]], ...]  # of a layer, between its norm and the output's projection


N_HEAD, N_VOCAB, N_DENSE, N_EXPERT, N_SHARED, N_FF = 16, 102400, 10944, 64, 2, 1408
SHAPES = {
    "v2lite": Shape(
        "deepseek2",
        27,
        {
            "context_length": 163840, "attention.head_count_kv": 1, "attention.kv_lora_rank": 512,
            "attention.key_length": 576, "attention.value_length": 512, "attention.key_length_mla": 192,
            "attention.value_length_mla": 128, "rope.dimension_count": 64, "rope.scaling.type": "yarn",
            "rope.scaling.factor": 40.0, "rope.scaling.original_context_length": 4096,
            "rope.scaling.yarn_log_multiplier": 0.0707,
        },
        (
            ("attn_q", (3072, WIDTH)), ("attn_kv_a_mqa", (576, WIDTH)), ("attn_kv_a_norm", (512,)),
            ("attn_k_b", (16, 512, 128)), ("attn_v_b", (16, 128, 512)),
        ),
    ),
    "moe16b": Shape(
        "deepseek",
        28,
        {"context_length": 4096, "attention.head_count_kv": 16, "rope.dimension_count": 128},
        tuple((f"attn_{part}", (WIDTH, WIDTH)) for part in "qkv"),
    ),
}  # fmt: skip


def tensors(shape: Shape, n_layer: int) -> dict[str, tuple[int, ...]]:
    """Shapes in numpy's order, in the order of the file."""
    out: dict[str, tuple[int, ...]] = {"token_embd": (N_VOCAB, WIDTH), "output_norm": (WIDTH,)}
    out["output"] = (N_VOCAB, WIDTH)
    for il in range(n_layer):
        layer = {"attn_norm": (WIDTH,), **dict(shape.attention), "attn_output": (WIDTH, WIDTH), "ffn_norm": (WIDTH,)}
        if il == 0:
            layer |= {"ffn_gate": (N_DENSE, WIDTH), "ffn_up": (N_DENSE, WIDTH), "ffn_down": (WIDTH, N_DENSE)}
        else:
            layer["ffn_gate_inp"] = (N_EXPERT, WIDTH)
            for suffix, lead, width in (("exps", (N_EXPERT,), N_FF), ("shexp", (), N_SHARED * N_FF)):
                for part in ("gate", "up"):
                    layer[f"ffn_{part}_{suffix}"] = (*lead, width, WIDTH)
                layer[f"ffn_down_{suffix}"] = (*lead, WIDTH, width)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vocabulary", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="v2lite")
    parser.add_argument("--layers", type=int, help="fewer than the model has")
    asked = parser.parse_args()
    shape = SHAPES[asked.shape]
    n_layer = asked.layers or shape.n_layer
    writer = gguf.GGUFWriter(asked.out, shape.arch)
    keys = {
        "block_count": n_layer, "embedding_length": WIDTH, "feed_forward_length": N_DENSE, "vocab_size": N_VOCAB,
        "attention.head_count": N_HEAD, "attention.layer_norm_rms_epsilon": 1e-6, "rope.freq_base": 10000.0,
        "leading_dense_block_count": 1, "expert_count": N_EXPERT, "expert_used_count": 6,
        "expert_shared_count": N_SHARED, "expert_feed_forward_length": N_FF, "expert_weights_scale": 1.0, **shape.keys,
    }  # fmt: skip
    for key, value in keys.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(f"{shape.arch}.{key}", value)
    for key, field in gguf.GGUFReader(asked.vocabulary).fields.items():
        if key.startswith("tokenizer.") and field.types[0] == gguf.GGUFValueType.ARRAY:
            writer.add_array(key, field.contents())
        elif key.startswith("tokenizer."):
            writer.add_key_value(key, field.contents(), field.types[0])
    rng = np.random.default_rng(1234)
    gauss = rng.standard_normal((POOL_ROWS, WIDTH), dtype=np.float32) * np.float32(0.02)
    pools: dict[T, NDArray[np.uint8]] = {}
    with Encoder(2) as encoder:
        for name, size in tensors(shape, n_layer).items():
            kind = type_of(name, size, n_layer)
            if kind == T.F32:
                ones = name.endswith("_norm")
                data = np.ones(size, np.float32) if ones else rng.standard_normal(size, dtype=np.float32) * 0.04
                writer.add_tensor(f"{name}.weight", data.astype(np.float32))
                continue
            if kind not in pools:
                pools[kind] = encoder.encode(gauss, kind).reshape(-1)
            elements, nbytes = gguf.GGML_QUANT_SIZES[kind]
            total = int(np.prod(size)) // elements * nbytes
            at = int(rng.integers(pools[kind].size // nbytes)) * nbytes
            data = np.resize(np.roll(pools[kind], -at), total).reshape(*size[:-1], size[-1] // elements * nbytes)
            writer.add_tensor(f"{name}.weight", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
