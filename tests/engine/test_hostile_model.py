"""Well-formed GGUF files that are no model, or not the model they claim: one clear error, never a crash."""

import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support import gguf_bytes as gb
from support.gguf_bytes import TINY_VALUES, Tensor, tiny_mistral4, tiny_model

from cext import EngineError, FormatError, Gguf, Model, UnsupportedError

TINY = tiny_model()
MISTRAL = tiny_mistral4()
REQUIRED = {
    "block_count",
    "context_length",
    "embedding_length",
    "vocab_size",
    "feed_forward_length",
    "attention.head_count",
    "attention.kv_lora_rank",
    "attention.value_length_mla",
    "rope.dimension_count",
    "expert_count",
    "expert_used_count",
    "expert_feed_forward_length",
}
"""Keys without which nothing can be run. The others have defaults, which then may not fit the tensors."""

STRANGE: list[tuple[int, object]] = [
    (gb.U32, 0),
    (gb.U32, 1),
    (gb.U32, 3),
    (gb.U32, 1 << 20),
    (gb.U32, 2**32 - 1),
    (gb.I32, -1),
    (gb.I64, -(2**63)),
    (gb.U64, 2**64 - 1),
    (gb.F32, 0.0),
    (gb.F32, -1.0),
    (gb.F32, 1e38),
    (gb.F32, float("nan")),
    (gb.F64, float("inf")),
    (gb.BOOL, True),
    (gb.STRING, "x" * 5000),
]


def write(folder: Path, model: gb.Model, data: bytes | None = None) -> Path:
    path = folder / "model.gguf"
    path.write_bytes(model.content(data))
    return path


def run(path: Path) -> np.ndarray:
    with Model(path, threads=1) as model:
        session = model.session(8)
        session.eval([0, 1, 2])
        return session.eval([3])


def with_value(key: str, kind: int, item: object) -> gb.Model:
    return replace(TINY, values=TINY.values | {key: (kind, item)})


def with_tensor(name: str, *instead: Tensor) -> gb.Model:
    kept = [t for t in TINY.tensors if t.name != name]
    return replace(TINY, tensors=[*kept, *instead])


def test_the_model_runs_as_it_is(tmp_path: Path) -> None:
    logits = run(write(tmp_path, TINY))
    assert logits.shape == (8,)
    assert np.isfinite(logits).all()
    assert np.ptp(logits) > 0


@pytest.mark.parametrize("key", sorted(REQUIRED))
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    path = write(tmp_path, replace(TINY, values={k: v for k, v in TINY.values.items() if k != key}))
    with pytest.raises(FormatError, match=rf"model\.gguf.*deepseek2\.{key}"):
        Model(path)


def n_refused(tmp_path: Path, key: str) -> int:
    """How many of the strange values of a key are refused, in one line that names the file; with the others it runs."""
    n = 0
    for kind, item in STRANGE:
        try:
            run(write(tmp_path, with_value(key, kind, item)))
        except EngineError as error:
            assert "model.gguf" in str(error) and str(error).isprintable()
            n += 1
    return n


@pytest.mark.parametrize("key", TINY_VALUES)
def test_strange_values_are_refused_or_run(tmp_path: Path, key: str) -> None:
    assert n_refused(tmp_path, key) > 0 or key in {
        "attention.head_count_kv",
        "attention.key_length",
        "attention.value_length",
    }


@pytest.mark.parametrize(
    "key",
    [
        "nextn_predict_layers",
        "expert_shared_feed_forward_length",
        "attention.temperature_scale",
        "attention.temperature_length",
        "attention.causal",
        "attention.indexer.top_k",
        "rope.scaling.yarn_ext_factor",
        "swiglu_clamp_exp",
        "hidden_activation",
        "ssm.",
        "expert_weights_norm",
    ],
)
def test_keys_that_change_the_arithmetic_may_hold_anything(tmp_path: Path, key: str) -> None:
    assert n_refused(tmp_path, key) > 0 or key == "ssm."  # which is no key of that family: it is told, and left


@pytest.mark.parametrize("key", MISTRAL.values)
def test_mistral4s_values_are_refused_or_run(tmp_path: Path, key: str) -> None:
    n_refused = 0
    for kind, item in STRANGE:
        try:
            assert np.isfinite(
                run(write(tmp_path, replace(MISTRAL, values=MISTRAL.values | {key: (kind, item)})))
            ).all()
        except EngineError as error:
            assert "model.gguf" in str(error)
            n_refused += 1
    assert n_refused > 0 or key in {"attention.head_count_kv", "attention.key_length", "attention.value_length"}


@pytest.mark.parametrize("shape", [(32, 4, 2), (32, 9, 2), (32, 8, 3), (8, 32, 2), (32, 8)])
def test_a_fused_tensor_of_another_shape(tmp_path: Path, shape: tuple[int, ...]) -> None:
    tensors = [replace(t, shape=shape) if "gate_up" in t.name else t for t in MISTRAL.tensors]
    with pytest.raises(EngineError, match=r"model\.gguf.*ffn_gate_up_exps"):
        Model(write(tmp_path, replace(MISTRAL, tensors=tensors)))


def test_a_draft_head_larger_than_the_model(tmp_path: Path) -> None:
    for n in (2, 3, 1024):
        with pytest.raises(EngineError, match=r"model\.gguf"):
            Model(write(tmp_path, with_value("nextn_predict_layers", gb.U32, n)))


@pytest.mark.parametrize(
    ("key", "kind", "item"),
    [
        ("block_count", gb.U32, 0),
        ("block_count", gb.STRING, "two"),
        ("block_count", gb.F32, 2.0),
        ("attention.head_count", gb.U32, 0),
        ("attention.head_count", gb.I32, -2),
        ("rope.dimension_count", gb.U32, 3),
        ("rope.freq_base", gb.F32, float("nan")),
        ("attention.layer_norm_rms_epsilon", gb.F32, -1.0),
        ("expert_used_count", gb.U32, 3),
        ("expert_gating_func", gb.U32, 7),
        ("vocab_size", gb.U64, 2**64 - 1),
    ],
)
def test_an_impossible_value_is_named(tmp_path: Path, key: str, kind: int, item: object) -> None:
    with pytest.raises(FormatError, match=r"model\.gguf"):
        Model(write(tmp_path, with_value(key, kind, item)))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"attention.head_count": 65536, "attention.key_length_mla": 65536}, "query width are 65536 x 65536"),
        ({"attention.head_count": 65536, "attention.value_length_mla": 65536}, "value width are 65536 x 65536"),
        ({"attention.head_count": 65536, "attention.kv_lora_rank": 65536}, "cached width are 65536 x 65538"),
        ({"expert_shared_count": 1024, "expert_feed_forward_length": 1 << 20}, "shared experts.* 1024 x 1048576"),
    ],
)
def test_widths_whose_product_overflows(tmp_path: Path, values: dict[str, int], words: str) -> None:
    """A sparse file could hold tensors of such shapes, so they cannot be left to the check of shapes."""
    model = replace(TINY, values=TINY.values | {key: (gb.U32, n) for key, n in values.items()})
    with pytest.raises(FormatError, match=words):
        Model(write(tmp_path, model))


@pytest.mark.parametrize("arch", ["llama", "", "deepseek2\n", "\x1b[2J", "\x7f" * 1000])
def test_another_architecture(tmp_path: Path, arch: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(gb.gguf([gb.kv("general.architecture", gb.STRING, arch)]))
    with pytest.raises(UnsupportedError, match="deepseek2") as raised:
        Model(path)
    assert raised.value.hint
    assert str(raised.value).isprintable()


def test_no_architecture(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(gb.gguf())
    with pytest.raises(UnsupportedError, match="architecture"):
        Model(path)


def test_another_scaling_of_positions(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="linear"):
        Model(write(tmp_path, with_value("rope.scaling.type", gb.STRING, "linear")))


each_tensor = pytest.mark.parametrize("tensor", TINY.tensors, ids=lambda t: t.name)


@each_tensor
def test_a_missing_tensor_is_named(tmp_path: Path, tensor: Tensor) -> None:
    path = write(tmp_path, with_tensor(str(tensor.name)))
    if tensor.name == "output.weight":  # the embeddings serve as the head
        assert np.isfinite(run(path)).all()
        return
    # Without the split form's first half the legacy form is looked for.
    name = str(tensor.name).replace("attn_k_b", "attn_kv_b")
    with pytest.raises(FormatError, match=rf"model\.gguf.*`{name}`.*missing"):
        Model(path)


@each_tensor
def test_a_tensor_of_another_shape_is_named(tmp_path: Path, tensor: Tensor) -> None:
    shapes = {(*tensor.shape[:-1], tensor.shape[-1] + 1), (*tensor.shape, 2), (tensor.shape[0] * 32, *tensor.shape[1:])}
    for shape in shapes:
        path = write(tmp_path, with_tensor(str(tensor.name), replace(tensor, shape=shape)))
        with pytest.raises(FormatError, match=rf"model\.gguf.*`{tensor.name}`"):
            Model(path)


@each_tensor
def test_a_tensor_of_a_type_that_does_not_run_is_named(tmp_path: Path, tensor: Tensor) -> None:
    path = write(tmp_path, with_tensor(str(tensor.name), replace(tensor, kind=26)))
    with pytest.raises(UnsupportedError, match=rf"model\.gguf.*`{tensor.name}`.*i32") as raised:
        Model(path)
    assert raised.value.hint


@pytest.mark.parametrize("data", [b"\xff", b"\x00", b"\x7f", b"\x00\x7c", b"\x00\x00\x80\x7f"])
@pytest.mark.parametrize("kind", [gb.TYPE_F32, gb.TYPE_F16, gb.TYPE_Q8_0])
def test_weights_may_hold_anything(tmp_path: Path, data: bytes, kind: int) -> None:
    """NaN, zero, infinity: the answer is no use, but it comes; or it is refused with a way out."""
    try:
        assert run(write(tmp_path, tiny_model(kind), data)).shape == (8,)
    except FormatError as error:
        assert "model.gguf" in str(error)
        assert "sha256" in error.hint


@pytest.mark.parametrize("name", [str(t.name) for t in TINY.tensors if len(t.shape) == 1])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_vector_with_a_value_that_is_no_number_is_named(tmp_path: Path, name: str, bad: float) -> None:
    content = bytearray(TINY.content())
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with Gguf(path) as file:
        tensor = next(t for t in file.tensors if t.name == name)
    struct.pack_into("<f", content, tensor.offset + 4 * 3, bad)
    path.write_bytes(content)
    with pytest.raises(FormatError, match=rf"model\.gguf.* 1 of tensor `{name}`'s .* value 3 ") as raised:
        Model(path)
    assert "sha256" in raised.value.hint
