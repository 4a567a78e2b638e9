"""quantize.recipe against llama.cpp's own quantiser, tensor by tensor, and against V2-Lite's known mix."""

from __future__ import annotations

import ctypes
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as Type
from support import checkpoints as make
from support import llama

import quantize
from quantize import recipe
from quantize.source.arch import parse
from quantize.source.tensors import model_tensors

# 27 layers, so that llama.cpp takes it for V2-Lite; rows of every kind: 256 divides some, 32 others, nothing some.
LITE = {
    **make.V2_LITE,
    "num_hidden_layers": 27,
    "hidden_size": 256,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 32,
    "v_head_dim": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 40,
    "n_routed_experts": 2,
    "num_experts_per_tok": 1,
    "n_shared_experts": 4,
}
V2_LITE_16B = {
    **make.V2_LITE,
    "vocab_size": 102400,
    "hidden_size": 2048,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "n_routed_experts": 64,
    "num_experts_per_tok": 6,
}
EIGHT_LAYERS = {
    **make.V2,
    "num_hidden_layers": 8,
    "hidden_size": 256,
    "q_lora_rank": 288,
    "kv_lora_rank": 256,
    "v_head_dim": 64,
    "intermediate_size": 512,
    "moe_intermediate_size": 256,
    "n_routed_experts": 2,
    "n_shared_experts": 1,
    "num_experts_per_tok": 1,
}
SHAPES = {
    "lite, tails": LITE,
    "eight layers": EIGHT_LAYERS,
    "eight experts": {**EIGHT_LAYERS, "n_routed_experts": 8, "moe_intermediate_size": 64},
    "odd rows, tied": {**EIGHT_LAYERS, "hidden_size": 80, "moe_intermediate_size": 40, "tie_word_embeddings": True},
}
# Importance matters to two of them; the float types have no rules at all.
CASES = [
    (shape, name, weighted)
    for shape in SHAPES
    for name, chosen in recipe.RECIPES.items()
    for weighted in (False, True)
    if (not weighted or name in ("iq4_xs", "q4_0", "q4_k_m")) and (not chosen.is_float or shape == "odd rows, tied")
]


@pytest.fixture(scope="module")
def f16_file(tmp_path_factory: pytest.TempPathFactory):
    """``f16_file(shape)``: a checkpoint of that shape as an f16 GGUF."""
    folder = tmp_path_factory.mktemp("recipe")
    written: dict[str, Path] = {}

    def path(shape: str) -> Path:
        if shape not in written:
            make.write_checkpoint(folder / shape, SHAPES[shape])
            written[shape] = folder / f"{shape}.gguf"
            quantize.quantize(folder / shape, written[shape], quantize.Options(type="f16", threads=1))
        return written[shape]

    return path


def llama_types(source: Path, target: Path, name: str, weighted: bool) -> dict[str, Type]:
    """The types that llama.cpp's quantiser chooses. weighted: it is handed an importance matrix, of one tensor."""
    llama.silence()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = int(recipe.RECIPES[name].file_type), 1
    values = np.ones(256, np.float32)
    entries = (llama_cpp.llama_model_imatrix_data * 2)()  # ends with one that has no name
    entries[0].name, entries[0].size = b"not.a.tensor", values.size
    entries[0].data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    if weighted:
        params.imatrix = entries
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)) == 0
    return {t.name: t.tensor_type for t in gguf.GGUFReader(target).tensors}


@pytest.mark.parametrize(("shape", "name", "weighted"), CASES)
def test_types_are_llama_cpp_s(tmp_path: Path, f16_file, shape: str, name: str, weighted: bool) -> None:
    arch = parse(SHAPES[shape])
    ours = {t.name: recipe.type_of(recipe.find(name), arch, t, weighted) for t in model_tensors(arch)}
    assert ours == llama_types(f16_file(shape), tmp_path / "q.gguf", name, weighted)


def test_v2_lite_q4_k_m() -> None:
    """The mix of the real V2-Lite: Q4_K where 256 divides, Q5_0 and Q8_0 for the downs of 1408 and 10944."""
    arch = parse(V2_LITE_16B)
    heavy = {1, 2, 5, 8, 11, 14, 17, 20, 23, 24, 25, 26}
    total = 0
    for tensor in model_tensors(arch):
        got = recipe.type_of(recipe.find("Q4_K_M"), arch, tensor, weighted=True)
        expected = {
            "output": Type.Q6_K,
            "attn_k_b": Type.Q5_0,
            "ffn_down_exps": Type.Q8_0 if tensor.il in heavy else Type.Q5_0,
            "ffn_down_shexp": Type.Q6_K if tensor.il in heavy else Type.Q4_K,
            "ffn_down": Type.Q8_0,
            "ffn_gate_inp": Type.F32,
        }.get(tensor.role, Type.F32 if tensor.role.endswith("norm") else Type.Q4_K)
        assert got == expected, tensor.name
        total += recipe.nbytes(tensor, got)
    assert round(total / 1e9, 2) == 10.36  # what the published files of this mix weigh


def test_unknown_type() -> None:
    with pytest.raises(quantize.QuantizeError, match="unknown type `q9`") as error:
        recipe.find("q9")
    assert "q4_k_m" in error.value.hint
