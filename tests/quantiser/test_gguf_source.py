"""quantize.source.gguf_source: a GGUF in F32, F16, BF16 gives what its checkpoint gives; others are refused by name."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as Type
from support import checkpoints as make

import cext
import quantize
from quantize import Options
from quantize.base.errors import ArgumentError, CheckpointError, QuantizeError, UnsupportedError
from quantize.source.source import open_source
from quantize.source.stored import Files, StoredTensor
from quantize.write.writer import Writer

YARN = {**make.V2["rope_scaling"], "mscale": 1.0, "mscale_all_dim": 1.0, "rope_type": "yarn", "rope_theta": 10000.0}
ORIGINAL = {"original_max_position_embeddings": 128}
SMALL = {**make.V2_GROUPED, "num_hidden_layers": 2}
MOE = {**make.MOE_SHARED, "num_hidden_layers": 2}
SMALL4 = {  # Mistral Small 4's keys that V2's checkpoints have otherwise
    **make.V2,
    "model_type": "mistral4",
    "num_hidden_layers": 2,
    "first_k_dense_replace": 0,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "rope_scaling": None,
    "rope_parameters": {**YARN, "llama_4_scaling_beta": 0.1},
}
CARD = "---\nlicense: mit\nbase_model: owner/Base\n---\n"
Tensors = dict[str, tuple[Type, np.ndarray]]
Edit = Callable[[dict[str, Any], Tensors], object]


def plain(type_: str) -> Options:
    return Options(type=type_, threads=1, evaluate=False)


def rewrite(source: Path, out: Path, edit: Edit) -> Path:
    """A GGUF with other keys and tensors; of a tensor its type and its bytes as (..., row bytes) or values."""
    with cext.Gguf(source) as file:
        keys = {key: as_written(file.metadata[key]) for key in file.metadata}
        tensors = {t.name: (Type(t.type), file.read(t.name)) for t in file.tensors}
    edit(keys, tensors)
    encoded = {name: gguf.quants.quantize(values, type_) for name, (type_, values) in tensors.items()}
    infos = [(name, tensors[name][1].shape, tensors[name][0]) for name in tensors]
    with Writer(out, out.with_suffix(".part"), keys, infos) as writer:
        for name, data in encoded.items():
            writer.append(name, data)
        writer.finish(keys)
        writer.commit()
    return out


def as_written(value: Any) -> Any:
    return np.array(value, np.float32) if isinstance(value, list) and value and isinstance(value[0], float) else value


def retype(type_: Type) -> Edit:
    """Every matrix in another type."""
    return lambda keys, tensors: tensors.update(
        {n: (type_, v) for n, (_, v) in tensors.items() if v.ndim > 1 and v.shape[-1] % 32 == 0}
    )


def same_tensors(a: Path, b: Path) -> None:
    with cext.Gguf(a) as one, cext.Gguf(b) as other:
        assert [t[:4] for t in one.tensors] == [t[:4] for t in other.tensors]
        for tensor in one.tensors:
            np.testing.assert_array_equal(one.raw(tensor.name), other.raw(tensor.name), err_msg=tensor.name)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hf/ (bf16), its text.txt, and bf16.gguf and f32.gguf of it."""
    folder = tmp_path_factory.mktemp("source")
    make.write_checkpoint(folder / "hf", SMALL)
    (folder / "hf" / "README.md").write_text(CARD)
    make.write_text(folder / "text.txt", 1300)
    for type_ in ("bf16", "f32"):
        quantize.quantize(folder / "hf", folder / f"{type_}.gguf", plain(type_))
    return folder


@pytest.mark.parametrize("source", ["bf16", "f32"])
def test_a_gguf_gives_the_file_that_its_checkpoint_gives(made: Path, tmp_path: Path, source: str) -> None:
    """Survey, allocation, feedback and all: tensors bit for bit, and keys; figures of the source's run are not kept."""
    options = Options(type="q4_k_m", threads=1, calibration=(made / "text.txt",))
    first = made / "first.gguf"
    if not first.exists():
        quantize.quantize(made / "hf", first, options)
    quantize.quantize(made / f"{source}.gguf", tmp_path / "m.gguf", options)
    same_tensors(first, tmp_path / "m.gguf")
    with cext.Gguf(first) as one, cext.Gguf(tmp_path / "m.gguf") as other:
        keys = {key: one.metadata[key] for key in one.metadata}
        assert {key: other.metadata[key] for key in other.metadata} == keys
    assert keys["general.license"] == "mit" and keys["general.base_model.0.name"] == "Base"
    assert keys["tokenizer.chat_template"] == make.CHAT_TEMPLATE


@pytest.mark.parametrize(
    "config",
    [
        {**make.V3, "num_hidden_layers": 2},
        make.V2_LITE,
        {**make.V2, "first_k_dense_replace": 0, "tie_word_embeddings": True},
        MOE,
        {**make.MOE, "first_k_dense_replace": 0, "rope_scaling": {"type": "yarn", "factor": 4.0, **ORIGINAL}},
        SMALL4,
    ],
    ids=["v3", "lite", "tied", "plain", "plain yarn", "mistral4"],
)
def test_shapes_of_the_family_come_back(tmp_path: Path, config: dict[str, Any]) -> None:
    make.write_checkpoint(tmp_path / "hf", config, dtype="F16")
    quantize.quantize(tmp_path / "hf", tmp_path / "f16.gguf", plain("f16"))
    with open_source(tmp_path / "f16.gguf") as source, open_source(tmp_path / "hf") as checkpoint:
        assert source.arch.keys() == checkpoint.arch.keys()
        assert source.arch.has_router_bias == checkpoint.arch.has_router_bias
    quantize.quantize(tmp_path / "hf", tmp_path / "a.gguf", plain("q8_0"))
    quantize.quantize(tmp_path / "f16.gguf", tmp_path / "b.gguf", plain("q8_0"))
    same_tensors(tmp_path / "a.gguf", tmp_path / "b.gguf")


def kv_b(keys: dict[str, Any], tensors: Tensors) -> None:
    """The older form: attn_kv_b alone."""
    for il in range(2):
        type_, k = tensors.pop(f"blk.{il}.attn_k_b.weight")
        _, v = tensors.pop(f"blk.{il}.attn_v_b.weight")
        both = np.concatenate([k.transpose(0, 2, 1), v], 1)
        tensors[f"blk.{il}.attn_kv_b.weight"] = (type_, both.reshape(-1, both.shape[-1]))


def beside(keys: dict[str, Any], tensors: Tensors) -> None:
    """ik_llama.cpp's: attn_kv_b beside a folded attn_k_b."""
    k = {il: tensors[f"blk.{il}.attn_k_b.weight"] for il in range(2)}
    kv_b(keys, tensors)
    for il, (type_, values) in k.items():
        tensors[f"blk.{il}.attn_k_b.weight"] = (type_, values.reshape(-1, values.shape[-1]))


def folded(keys: dict[str, Any], tensors: Tensors) -> None:
    for il in range(2):
        for name in (f"blk.{il}.attn_k_b.weight", f"blk.{il}.attn_v_b.weight"):
            type_, values = tensors[name]
            tensors[name] = (type_, values.reshape(-1, values.shape[-1]))


def mixed(keys: dict[str, Any], tensors: Tensors) -> None:
    """One half of kv_b in another type."""
    name = "blk.1.attn_k_b.weight"
    tensors[name] = (Type.F32, tensors[name][1])


def draft(keys: dict[str, Any], tensors: Tensors) -> None:
    keys |= {"deepseek2.block_count": 3, "deepseek2.nextn_predict_layers": 1}
    tensors |= {"blk.2.nextn.eh_proj.weight": (Type.F32, np.zeros((64, 128), np.float32))}
    tensors |= {"blk.2.attn_norm.weight": (Type.F32, np.ones(64, np.float32))}


LAYOUTS: dict[str, Edit] = {"kv_b": kv_b, "ik": beside, "folded": folded, "mixed": mixed, "draft": draft}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_files_of_other_converters(made: Path, tmp_path: Path, layout: str) -> None:
    source = rewrite(made / "bf16.gguf", tmp_path / "other.gguf", LAYOUTS[layout])
    report = quantize.quantize(source, tmp_path / "m.gguf", plain("f32"))
    same_tensors(made / "f32.gguf", tmp_path / "m.gguf")
    assert any("multi-token prediction" in note for note in report.notes) == (layout == "draft")


def one_qkv(keys: dict[str, Any], tensors: Tensors) -> None:
    for il in range(2):
        parts = [tensors.pop(f"blk.{il}.attn_{part}.weight") for part in "qkv"]
        tensors[f"blk.{il}.attn_qkv.weight"] = (parts[0][0], np.concatenate([values for _, values in parts]))


def one_gate_up(keys: dict[str, Any], tensors: Tensors) -> None:
    """As llama.cpp's converter keeps transformers 5's stacks."""
    for il in range(2):
        parts = [tensors.pop(f"blk.{il}.ffn_{part}_exps.weight") for part in ("gate", "up")]
        tensors[f"blk.{il}.ffn_gate_up_exps.weight"] = (parts[0][0], np.concatenate([v for _, v in parts], axis=1))
    del keys["mistral4.attention.temperature_scale"], keys["mistral4.attention.temperature_length"]


OTHERS: dict[str, tuple[dict[str, Any], Edit]] = {
    "plain": (MOE, lambda keys, tensors: None),
    "one qkv": (MOE, one_qkv),
    "one gate and up": (SMALL4, one_gate_up),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_architectures_give_what_their_checkpoints_give(tmp_path: Path, case: str) -> None:
    """Survey, allocation and all."""
    config, edit = OTHERS[case]
    make.write_checkpoint(tmp_path / "hf", config)
    quantize.quantize(tmp_path / "hf", tmp_path / "bf16.gguf", plain("bf16"))
    source = rewrite(tmp_path / "bf16.gguf", tmp_path / "s.gguf", edit)
    options = Options(type="q4_k_m", threads=1, calibration=(make.write_text(tmp_path / "text.txt", 700),))
    quantize.quantize(tmp_path / "hf", tmp_path / "a.gguf", options)
    quantize.quantize(source, tmp_path / "b.gguf", options)
    same_tensors(tmp_path / "a.gguf", tmp_path / "b.gguf")
    with cext.Gguf(tmp_path / "a.gguf") as one, cext.Gguf(tmp_path / "b.gguf") as other:
        assert {**one.metadata} == {**other.metadata}


@pytest.mark.parametrize("config", [MOE, SMALL4], ids=["plain", "mistral4"])
def test_q8_0_of_other_architectures(tmp_path: Path, config: dict[str, Any]) -> None:
    make.write_checkpoint(tmp_path / "hf", config)
    quantize.quantize(tmp_path / "hf", tmp_path / "f32.gguf", plain("f32"))
    source = rewrite(tmp_path / "f32.gguf", tmp_path / "q8.gguf", retype(Type.Q8_0))
    quantize.quantize(source, tmp_path / "m.gguf", plain("f32"))
    with cext.Gguf(source) as file, cext.Gguf(tmp_path / "m.gguf") as out:
        assert any(tensor.type_name == "q8_0" and "attn" in tensor.name for tensor in file.tensors)
        for tensor in out.tensors:
            np.testing.assert_array_equal(out.read(tensor.name), file.read(tensor.name), err_msg=tensor.name)


def without(*suffixes: str) -> Edit:
    """Keys under the architecture's name that a converter does not write."""

    def edit(keys: dict[str, Any], tensors: Tensors) -> None:
        for suffix in suffixes:
            del keys[f"deepseek2.{suffix}"]

    return edit


def before_latent_cache(keys: dict[str, Any], tensors: Tensors) -> None:
    """As converters wrote the architecture until spring 2025: kv_b_proj whole, widths of heads, every head its own."""
    kv_b(keys, tensors)
    keys |= {
        "deepseek2.attention.head_count_kv": 4,
        "deepseek2.attention.key_length": keys.pop("deepseek2.attention.key_length_mla"),
        "deepseek2.attention.value_length": keys.pop("deepseek2.attention.value_length_mla"),
    }
    for suffix in ("expert_gating_func", "expert_weights_norm", "expert_group_count", "expert_group_used_count"):
        del keys[f"deepseek2.{suffix}"]


V2_FEW = {**make.V2, "num_hidden_layers": 2}
V3_FEW = {**make.V3, "num_hidden_layers": 2, "num_nextn_predict_layers": 0}
V2_LARGE = {
    **V2_FEW, "n_routed_experts": 160, "num_experts_per_tok": 6, "topk_method": "group_limited_greedy", "n_group": 8,
    "topk_group": 3, "moe_intermediate_size": 8, "routed_scaling_factor": 16.0,
}  # fmt: skip
LEFT_UNSAID: dict[str, tuple[dict[str, Any], Edit, str]] = {
    "sigmoid": (V3_FEW, without("expert_gating_func"), "sigmoid, because the router has a bias"),
    "softmax": (V2_FEW, without("expert_gating_func", "expert_weights_norm", "expert_group_count"), ""),
    "groups": (V2_LARGE, without("expert_group_count", "expert_group_used_count"), "3 of 8 groups"),
    "normed": (V3_FEW, without("expert_weights_norm"), "expert_weights_norm` is missing: true"),
    "epsilon": (V2_FEW, without("attention.layer_norm_rms_epsilon"), "1e-6"),
    "shared": (V2_FEW, without("expert_shared_count"), "by the shape of ffn_gate_shexp"),
    "vocabulary": (V2_FEW, without("vocab_size"), ""),
    "yarn's betas": (V2_FEW, without("rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow"), ""),
    "older": (V2_FEW, before_latent_cache, ""),
}


@pytest.mark.parametrize("case", LEFT_UNSAID)
def test_what_a_converter_leaves_unsaid_is_told(tmp_path: Path, case: str) -> None:
    """The same tensors and the same keys as from the checkpoint, and a word where it was a guess."""
    config, edit, words = LEFT_UNSAID[case]
    make.write_checkpoint(tmp_path / "hf", config)
    quantize.quantize(tmp_path / "hf", tmp_path / "bf16.gguf", plain("bf16"))
    source = rewrite(tmp_path / "bf16.gguf", tmp_path / "s.gguf", edit)
    report = quantize.quantize(source, tmp_path / "m.gguf", plain("bf16"))
    same_tensors(tmp_path / "bf16.gguf", tmp_path / "m.gguf")
    with cext.Gguf(tmp_path / "bf16.gguf") as one, cext.Gguf(tmp_path / "m.gguf") as other:
        assert {**one.metadata} == {**other.metadata}
    assert any(words in note for note in report.notes) == bool(words), report.notes


def split(source: Path, folder: Path, n: int) -> Path:
    """As llama.cpp's gguf-split names and numbers parts; the metadata in the first."""
    with cext.Gguf(source) as file:
        keys = {key: as_written(file.metadata[key]) for key in file.metadata}
        tensors = {t.name: (Type(t.type), file.raw(t.name), t.shape[::-1]) for t in file.tensors}
    names = list(tensors)
    for i in range(n):
        path = folder / f"m-{i + 1:05d}-of-{n:05d}.gguf"
        mine = names[i * len(names) // n : (i + 1) * len(names) // n]
        writer = gguf.GGUFWriter(path, "deepseek2")
        writer.add_uint16("split.no", i)
        writer.add_uint16("split.count", n)
        writer.add_int32("split.tensors.count", len(names))
        for key, value in keys.items() if i == 0 else ():
            if key != "general.architecture":
                add(writer, key, value)
        for name in mine:
            type_, raw, shape = tensors[name]
            writer.add_tensor(name, raw.reshape(*shape[:-1], -1), raw_dtype=type_)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return folder / f"m-00001-of-{n:05d}.gguf"


def add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    adders.get(type(value), writer.add_array)(key, value.tolist() if isinstance(value, np.ndarray) else value)


def test_a_split_file_is_read_where_its_parts_are(made: Path, tmp_path: Path) -> None:
    first = split(made / "bf16.gguf", tmp_path, 3)
    with open_source(first) as source:
        assert [path.name for path in source.files()] == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    quantize.quantize(first, tmp_path / "out.gguf", plain("f32"))
    same_tensors(made / "f32.gguf", tmp_path / "out.gguf")
    with pytest.raises(ArgumentError, match="this run reads"):
        quantize.quantize(first, tmp_path / "m-00002-of-00003.gguf", plain("f32"))
    with pytest.raises(UnsupportedError, match="part 2 of 3"):
        quantize.quantize(tmp_path / "m-00002-of-00003.gguf", tmp_path / "o.gguf", plain("f32"))


def test_the_source_is_never_written_over(made: Path, tmp_path: Path) -> None:
    before = (made / "bf16.gguf").read_bytes()
    (tmp_path / "link.gguf").symlink_to(made / "bf16.gguf")
    for out in (made / "bf16.gguf", tmp_path / "link.gguf"):
        with pytest.raises(ArgumentError, match="this run reads"):
            quantize.quantize(made / "bf16.gguf", out, plain("q8_0"))
    assert (made / "bf16.gguf").read_bytes() == before


def test_experts_are_read_alone(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three times a run, and never a stack."""
    most: Counter[str] = Counter()
    times: Counter[tuple[str, int]] = Counter()
    read = Files.read_into

    def watching(self: Files, tensor: StoredTensor, out: Any) -> None:
        most[tensor.name] = max(most[tensor.name], out.nbytes)
        times[tensor.name, tensor.offset] += 1
        read(self, tensor, out)

    monkeypatch.setattr(Files, "read_into", watching)
    options = Options(type="q4_k_m", threads=1, calibration=(made / "text.txt",))
    quantize.quantize(made / "bf16.gguf", tmp_path / "m.gguf", options)
    stacks = {name: n for name, n in most.items() if "_exps" in name}
    assert len(stacks) == 3 and set(stacks.values()) == {32 * 64 * 2}
    assert max(n for (name, _), n in times.items() if "_exps" in name) <= 3


def test_q8_0_is_read_with_a_warning(made: Path, tmp_path: Path) -> None:
    source = rewrite(made / "bf16.gguf", tmp_path / "q8.gguf", retype(Type.Q8_0))
    report = quantize.quantize(source, tmp_path / "m.gguf", plain("f32"))
    assert any("Q8_0" in note and "stays lost" in note for note in report.notes)
    with cext.Gguf(source) as file, cext.Gguf(tmp_path / "m.gguf") as out:
        for tensor in out.tensors:
            np.testing.assert_array_equal(out.read(tensor.name), file.read(tensor.name), err_msg=tensor.name)


def renamed(old: str, new: str) -> Edit:
    return lambda keys, tensors: tensors.update({new: tensors.pop(old)})


def cut(name: str, shape: tuple[int, ...]) -> Edit:
    return lambda keys, tensors: tensors.update({name: (Type.F32, np.zeros(shape, np.float32))})


EXPS = "blk.1.ffn_up_exps.weight"
REFUSED: dict[str, tuple[Edit, tuple[str, ...]]] = {
    "another type": (lambda k, t: t.update({EXPS: (Type.Q4_0, t[EXPS][1])}), (EXPS, "Q4_0")),
    "a tensor that is missing": (lambda k, t: t.pop(EXPS), (EXPS, "missing")),
    "a stack cut short": (cut(EXPS, (7, 32, 64)), (EXPS, "stack of 8")),
    "experts of another width": (cut(EXPS, (8, 30, 64)), (EXPS, "(30, 64)")),
    "a stack that is none": (cut(EXPS, (8 * 32, 64)), (EXPS, "stack")),
    "heads of another width": (cut("blk.1.attn_k_b.weight", (4, 32, 15)), ("attn_k_b", "(4, 32, 15)")),
    "heads in part": (lambda k, t: t.pop("blk.1.attn_v_b.weight"), ("attn_v_b", "missing")),
    "a tensor of no place": (cut("blk.1.extra.weight", (4,)), ("blk.1.extra.weight", "no place")),
    "factors of positions": (cut("rope_freqs.weight", (4,)), ("rope_freqs.weight", "no place")),
    "another architecture": (lambda k, t: k.update({"general.architecture": "llama"}), ("llama",)),
    "a key that changes the arithmetic": (lambda k, t: k.update({"deepseek2.logit_scale": 2.0}), ("logit_scale",)),
    "a scale of attention": (
        lambda k, t: k.update({"deepseek2.rope.scaling.attn_factor": 1.5}),
        ("rope.scaling.attn_factor",),
    ),
    "a draft head alone": (
        lambda k, t: [draft(k, t), *(t.pop(n) for n in list(t) if n.startswith(("blk.0.", "blk.1.")))],
        ("draft head alone",),
    ),
    "a scale that is not told": (lambda k, t: k.pop("deepseek2.expert_weights_scale"), ("expert_weights_scale",)),
    "no vocabulary": (lambda k, t: k.pop("tokenizer.ggml.tokens"), ("tokens",)),
    "a value that is not finite": (
        lambda k, t: t.update({"output_norm.weight": (Type.F32, np.full(64, np.nan, np.float32))}),
        ("model.norm.weight", "not finite"),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_refused_by_name(made: Path, tmp_path: Path, case: str) -> None:
    edit, words = REFUSED[case]
    source = rewrite(made / "bf16.gguf", tmp_path / "bad.gguf", edit)
    with pytest.raises((CheckpointError, UnsupportedError)) as error:
        quantize.quantize(source, tmp_path / "m.gguf", plain("f32"))
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message
    assert not (tmp_path / "m.gguf").exists()


def test_a_source_that_shrinks_is_told(made: Path, tmp_path: Path) -> None:
    source = tmp_path / "s.gguf"
    source.write_bytes((made / "bf16.gguf").read_bytes())
    with open_source(source) as opened:
        source.write_bytes(source.read_bytes()[:-100])
        with pytest.raises(CheckpointError, match="ends inside tensor"):
            opened.store.read_f32("lm_head.weight")


@pytest.mark.parametrize("seed", range(60))
def test_damaged_files_are_refused_in_a_line(made: Path, tmp_path: Path, seed: int) -> None:
    """Bytes of the head changed: another model, or one line."""
    rng = random.Random(seed)
    data = bytearray((made / "bf16.gguf").read_bytes())
    source = tmp_path / "s.gguf"
    for _ in range(20):
        damaged = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(4, 30_000)
            damaged[at] = rng.choice((0, 1, 0x7F, 0xFF, rng.randrange(256)))
        source.write_bytes(damaged)
        try:
            with open_source(source) as opened:
                assert opened.tokenizer and opened.name is not None and opened.provenance is not None
                assert opened.files()
        except QuantizeError as error:
            assert str(error) and "\n" not in str(error)
