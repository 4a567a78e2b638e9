"""Checkpoints in every form that is published: end tokens, templates, scalings, dtypes; others told what they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import checkpoints as make

import cext
import quantize
from cext.tokenizer import Tokenizer
from quantize import Options
from quantize.allocate import format_size, parse_size
from quantize.base.errors import CheckpointError, QuantizeError, UnsupportedError
from quantize.measure.attention import Rotary
from quantize.source import files, templates
from quantize.source.arch import parse
from quantize.source.checkpoint import Checkpoint
from quantize.source.vocab import Vocab, read_vocab
from quantize.write.writer import write_vocab_only

F32 = Options(type="f32", threads=1, evaluate=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Configuration and tokenizer alone."""
    place = tmp_path / "hf"
    place.mkdir()
    make.write_tokenizer(place)
    (place / "config.json").write_text(json.dumps(make.V2))
    return place


def edit(path: Path, **changes: Any) -> None:
    """Keys of a JSON file; "remove" takes one away."""
    value = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps({k: v for k, v in {**value, **changes}.items() if v != "remove"}), encoding="utf-8")


def vocab(folder: Path) -> Vocab:
    return read_vocab(folder, 320)


# End tokens.


@pytest.mark.parametrize(
    ("settings", "config", "generation", "expected"),
    [
        (make.EOS, None, None, [257]),
        (make.EOS, 257, [257, 258], [257, 258]),
        ("remove", [258, 257, 261], None, [258, 257, 261]),
        ("remove", None, [259, 258], [259, 258]),
        ("remove", 258, [257, 258], [258, 257]),
        (make.EOS, [258], 262, [257, 258, 262]),
        ("remove", [257, 100_000], [-1], [257]),  # past a vocabulary that was cut down, and transformers' "none"
    ],
)
def test_all_named_tokens_end_and_the_first_is_eos(
    folder: Path, settings: object, config: object, generation: object, expected: list[int]
) -> None:
    edit(folder / "tokenizer_config.json", eos_token=settings)
    edit(folder / "config.json", eos_token_id=config)
    edit(folder / "generation_config.json", eos_token_id=generation)
    made = vocab(folder)
    assert [made.special_ids[role] for role in ("eos", "eot", "eom") if role in made.special_ids] == expected
    assert made.notes == ()
    path = folder / "v.gguf"
    write_vocab_only(path, {"general.architecture": "deepseek2", **made.keys()})
    tokenizer = Tokenizer(path)
    ends = {id_ for id_ in range(256, 270) if tokenizer.is_end(id_)}
    assert ends == {*expected, 257}  # which llama.cpp knows by its text


def test_more_end_tokens_than_a_gguf_names_are_told(folder: Path) -> None:
    edit(folder / "generation_config.json", eos_token_id=[257, 258, 259, 261, 262])
    (note,) = vocab(folder).notes
    assert "'the'" in note and "'Ġthe'" in note and "<tab>" not in note


@pytest.mark.parametrize("value", ["257", [257, "x"], [True], {"id": 257}, 1.5])
def test_end_tokens_of_another_kind_are_refused(folder: Path, value: object) -> None:
    edit(folder / "config.json", eos_token_id=value)
    with pytest.raises(CheckpointError, match="eos_token_id"):
        vocab(folder)


def test_no_end_token_says_where_to_name_one(folder: Path) -> None:
    edit(folder / "config.json", eos_token_id="remove")
    edit(folder / "tokenizer_config.json", eos_token="remove")
    with pytest.raises(CheckpointError, match=r"generation_config\.json") as error:
        vocab(folder)
    assert "eos_token_id" in error.value.hint


# Chat templates.

T, OTHER = "{{ messages }} é", "{{ tools }}"
Place = Callable[[Path], object]
TEMPLATES: dict[str, Place] = {
    "tokenizer_config": lambda p: edit(p / "tokenizer_config.json", chat_template=T),
    "with a mark": lambda p: edit(p / "tokenizer_config.json", chat_template="\ufeff" + T),
    "list with a default": lambda p: edit(
        p / "tokenizer_config.json",
        chat_template=[{"name": "tool_use", "template": OTHER}, {"name": "default", "template": T}],
    ),
    "list of one": lambda p: edit(p / "tokenizer_config.json", chat_template=[{"name": "rag", "template": T}]),
    "object": lambda p: edit(p / "tokenizer_config.json", chat_template={"rag": OTHER, "default": T}),
    "chat_template.json": lambda p: edit(p / "chat_template.json", chat_template=T),
    "chat_template.json of names": lambda p: edit(p / "chat_template.json", default=T, other=OTHER),
    "jinja": lambda p: (p / "chat_template.jinja").write_text(T, encoding="utf-8"),
    "jinja with a mark": lambda p: (p / "chat_template.jinja").write_text(T, encoding="utf-8-sig"),
    "jinja of another name": lambda p: (p / "template.jinja").write_text(T, encoding="utf-8"),
    "jinja before the rest": lambda p: (
        edit(p / "tokenizer_config.json", chat_template=OTHER),
        (p / "chat_template.jinja").write_text(T, encoding="utf-8"),
    ),
    "additional ones beside": lambda p: (
        (p / "chat_template.jinja").write_text(T, encoding="utf-8"),
        (p / "additional_chat_templates").mkdir(),
        (p / "additional_chat_templates" / "tool_use.jinja").write_text(OTHER),
    ),
}


@pytest.mark.parametrize("form", TEMPLATES)
def test_a_template_is_found_in_any_form(folder: Path, form: str) -> None:
    edit(folder / "tokenizer_config.json", chat_template="remove")
    TEMPLATES[form](folder)
    made = vocab(folder)
    assert made.chat_template == T and made.notes == ()


def test_several_templates_without_a_default_are_told(folder: Path) -> None:
    named = [{"name": "tool_use", "template": OTHER}, {"name": "chat", "template": T}]
    edit(folder / "tokenizer_config.json", chat_template=named)
    made = vocab(folder)
    assert made.chat_template == T and "`chat` was taken, and not tool_use" in made.notes[0]


@pytest.mark.parametrize("value", [7, [{"name": "x"}], ["x"], {"default": 3}])
def test_a_template_of_another_kind_is_refused(folder: Path, value: object) -> None:
    edit(folder / "tokenizer_config.json", chat_template=value)
    with pytest.raises(CheckpointError, match="chat_template"):
        vocab(folder)


def test_a_template_that_is_not_utf8_is_refused(folder: Path) -> None:
    (folder / "chat_template.jinja").write_bytes(b"\xff\xfe{{")
    with pytest.raises(CheckpointError, match="not UTF-8"):
        vocab(folder)


def test_json_with_a_mark_is_read(folder: Path) -> None:
    for path in folder.glob("*.json"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert vocab(folder).special_ids["eos"] == 257


def test_no_template_is_told_in_the_report(tmp_path: Path) -> None:
    make.write_checkpoint(tmp_path / "hf", make.V2)
    assert templates.NO_TEMPLATE not in quantize.quantize(tmp_path / "hf", tmp_path / "a.gguf", F32).notes
    edit(tmp_path / "hf" / "tokenizer_config.json", chat_template="remove")
    assert templates.NO_TEMPLATE in quantize.quantize(tmp_path / "hf", tmp_path / "b.gguf", F32).notes


# Weights.


def stored(config: dict[str, Any] = make.V2) -> dict[str, tuple[str, np.ndarray]]:
    return {name: ("BF16", make.bf16_bits(values)) for name, values in make.random_weights(config).items()}


def write(tmp_path: Path, tensors: dict[str, tuple[str, np.ndarray]], name: str = "model.safetensors") -> Path:
    """A checkpoint of those tensors."""
    folder = tmp_path / "hf"
    folder.mkdir()
    make.write_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(make.V2))
    make.write_safetensors(folder / name, tensors)
    return folder


def refusal(folder: Path) -> QuantizeError:
    with pytest.raises(QuantizeError) as error:
        quantize.quantize(folder, folder.parent / "m.gguf", F32)
    return error.value


@pytest.mark.parametrize("name", ["pytorch_model.safetensors", "weights.safetensors", "consolidated.safetensors"])
def test_weights_of_any_name_are_read(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path, stored(), name)
    with Checkpoint(folder) as checkpoint:
        assert {t.shard.name for t in checkpoint.tensors.values()} == {name}


def test_what_is_read_is_what_is_fetched(tmp_path: Path) -> None:
    """Of several sets the same one: the copy in another form is left alone."""
    folder = write(tmp_path, stored())
    make.write_safetensors(folder / "consolidated.safetensors", {"x": ("F32", np.zeros(4, np.float32))})
    with Checkpoint(folder) as checkpoint:
        assert {t.shard.name for t in checkpoint.tensors.values()} == {"model.safetensors"}
    assert files.weights(p.name for p in folder.iterdir()) == ["model.safetensors"]


def test_a_pointer_in_a_shards_place(tmp_path: Path) -> None:
    folder = write(tmp_path, stored())
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    error = refusal(folder)
    assert "Git LFS pointer" in str(error) and "git lfs pull" in error.hint
    (folder / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(CheckpointError, match="Git LFS pointer"):
        read_vocab(folder, 320)


def fused(stacked: str) -> dict[str, tuple[str, np.ndarray]]:
    """Experts stacked in one tensor a layer, under a name."""
    tensors = stored()
    for name in [n for n in tensors if ".mlp.experts." in n]:
        del tensors[name]
        tensors[f"{name.split('.experts.')[0]}.experts.{stacked}"] = ("BF16", np.zeros((8, 64, 64), np.uint16))
    return tensors


@pytest.mark.parametrize("name", ["gate_up_proj", "gate_up_proj_bias", "down_proj.weight"])
def test_fused_experts_are_called_so(tmp_path: Path, name: str) -> None:
    error = refusal(write(tmp_path, fused(name)))
    assert isinstance(error, UnsupportedError) and "fused" in str(error) and f"experts.{name}" in str(error)
    assert "fetch" not in error.hint


@pytest.mark.parametrize("prefix", ["language_model.", "model.language_model."])
def test_a_part_of_a_larger_model_is_called_so(tmp_path: Path, prefix: str) -> None:
    error = refusal(write(tmp_path, {prefix + name: t for name, t in stored().items()}))
    assert isinstance(error, UnsupportedError) and f"`{prefix}model." in str(error)


def test_what_is_only_missing_is_not_called_a_bad_download(tmp_path: Path) -> None:
    tensors = stored()
    del tensors["model.layers.2.mlp.experts.1.up_proj.weight"]
    error = refusal(write(tmp_path, tensors))
    assert "model.layers.2.mlp.experts.1.up_proj.weight" in str(error) and "config.json" in error.hint


@pytest.mark.parametrize("dtype", ["F8_E8M0", "F4", "F6_E2M3", "C64"])
def test_a_new_dtype_matters_only_where_it_is_needed(tmp_path: Path, dtype: str) -> None:
    unused = "model.layers.0.self_attn.rotary_emb.inv_freq"
    folder = write(tmp_path, {**stored(), unused: (dtype, np.zeros(16, np.uint8))})
    with Checkpoint(folder) as checkpoint:
        assert checkpoint.find(unused).nbytes == 16
    quantize.quantize(folder, tmp_path / "m.gguf", F32)
    make.write_safetensors(folder / "model.safetensors", {**stored(), "lm_head.weight": (dtype, np.zeros(9, np.uint8))})
    with Checkpoint(folder) as checkpoint, pytest.raises(UnsupportedError, match=f"{dtype}.*newer"):
        checkpoint.verify("lm_head.weight", (9,))


def test_fp8_without_scales_of_blocks_is_called_so(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.o_proj.weight"
    fp8 = ("F8_E4M3", np.zeros(make.random_weights(make.V2)[name].shape, np.uint8))
    folder = write(tmp_path, {**stored(), name: fp8})
    error = refusal(folder)
    assert f"`{name}` is fp8 and has no scales that are read" in str(error) and "start from the bf16" in error.hint
    scaled = {name: fp8, f"{name}_scale_inv": ("F32", np.ones((7, 7), np.float32))}
    make.write_safetensors(folder / "model.safetensors", {**stored(), **scaled})
    assert "weight_block_size" in refusal(folder).hint


def test_files_of_two_saves_are_called_so(tmp_path: Path) -> None:
    make.write_checkpoint(tmp_path / "hf", make.V2, n_shards=2)
    index = tmp_path / "hf" / "model.safetensors.index.json"
    shard, first = "model-00002-of-00002.safetensors", "model-00001-of-00002.safetensors"
    held = json.loads(index.read_text())["weight_map"]
    name = next(n for n, s in held.items() if s == shard)
    lost = {n: s for n, s in held.items() if n != name}
    for names in (lost, {**held, name: first}, {**held, "model.extra.weight": shard}):
        index.write_text(json.dumps({"weight_map": names}))
        assert "different saves" in refusal(tmp_path / "hf").hint


def test_what_other_quantisers_leave_is_called_so(tmp_path: Path) -> None:
    for name, dtype in (("x.weight_scale", "F8_E8M0"), ("x.weight_packed", "I32"), ("x.new", "F4")):
        folder = tmp_path / name
        folder.mkdir()
        extra = {name: (dtype, np.zeros(16, np.uint8 if dtype != "I32" else np.int32))}
        error = refusal(write(folder, {**stored(), **extra}))
        assert f"`{name}` ({dtype}) has no place" in str(error) and "quantised already" in error.hint


@pytest.mark.parametrize(
    ("name", "word"),
    [("adapter_model.safetensors", "merge it"), ("m-Q4_0.gguf", "dsv2 chat"), ("pytorch_model.bin", "save_pretrained")],
)
def test_a_folder_of_something_else_says_what_to_do(folder: Path, name: str, word: str) -> None:
    (folder / name).touch()
    assert word in refusal(folder).hint


# Configurations.


@pytest.mark.parametrize("type_", ["kimi_k9", "mixtral", None, ["x"]])
def test_the_model_type_is_what_is_named(type_: object) -> None:
    with pytest.raises(UnsupportedError) as error:
        parse({**make.V3, "model_type": type_})
    assert f"model_type {type_!r} (DeepseekV3ForCausalLM)" in str(error.value)
    assert "deepseek_v3" in error.value.hint


def test_a_text_model_inside_another_is_named() -> None:
    with pytest.raises(UnsupportedError, match="text_config is 'deepseek_v3'"):
        parse({"model_type": "kimi_vl9", "text_config": make.V3})


BARE_YARN = {k: v for k, v in make.V2["rope_scaling"].items() if not k.startswith("mscale")}
PLAIN = [BARE_YARN, {**BARE_YARN, "mscale": 1.0, "mscale_all_dim": 0}, {**BARE_YARN, "mscale": None}]


@pytest.mark.parametrize("scaling", PLAIN)
def test_yarn_without_mscale_is_ggufs_own_default(scaling: dict[str, Any]) -> None:
    keys = parse({**make.V2, "rope_scaling": scaling}).keys()
    assert keys["deepseek2.rope.scaling.type"] == "yarn"
    assert not [key for key in keys if "log_multiplier" in key]


@pytest.mark.parametrize("change", [{"mscale": 0.707}, {"mscale_all_dim": 0.707}, {"attention_factor": 1.2}])
def test_yarn_that_gguf_cannot_say_is_refused(change: dict[str, float]) -> None:
    with pytest.raises(UnsupportedError, match="rope_scaling has"):
        parse({**make.V2, "rope_scaling": {**BARE_YARN, **change}})


@pytest.mark.oracle
def test_yarn_without_mscale_is_the_references(tmp_path: Path) -> None:
    hf = pytest.importorskip("support.hf", reason="needs PyTorch and transformers", exc_type=ImportError)
    config = {**make.V2, "rope_scaling": {**BARE_YARN, "factor": 8.0, "original_max_position_embeddings": 16}}
    make.write_checkpoint(tmp_path / "hf", config, dtype="F32")
    quantize.quantize(tmp_path / "hf", tmp_path / "m.gguf", F32)
    ids = np.random.default_rng(2).integers(0, config["vocab_size"], 96)
    expected = hf.logits(hf.load(tmp_path / "hf", 1e-6), ids)
    with cext.Model(tmp_path / "m.gguf", threads=1) as model:
        got = model.session(96, kv_type="f32").eval(ids, "all")
    assert np.abs(got - expected).max() < 2e-5 * np.ptp(expected)
    # The survey's own attention rotates by the same, as long as transformers' cosines.
    model, arch = hf.load(tmp_path / "hf"), parse(config)
    cos, sin = Rotary(arch, 96, np.dtype(np.float64)).cos, Rotary(arch, 96, np.dtype(np.float64)).sin
    assert arch.yarn is not None
    inv_freq, length = model.model.rotary_emb.inv_freq.numpy(), model.model.rotary_emb.attention_scaling
    angle = np.arange(96)[:, None] * inv_freq.astype(np.float64)
    assert length > 1.2
    np.testing.assert_allclose(cos, length * np.cos(angle), atol=1e-5)
    np.testing.assert_allclose(sin, length * np.sin(angle), atol=1e-5)


# Outputs.


def test_a_link_is_written_through(tmp_path: Path) -> None:
    """The disk that it leads to is where the room is: the file and the work go there, and the link stays one."""
    make.write_checkpoint(tmp_path / "hf", make.V2)
    (tmp_path / "large-disk").mkdir()
    link, target = tmp_path / "m.gguf", tmp_path / "large-disk" / "real.gguf"
    link.symlink_to("large-disk/real.gguf")
    places: set[Path] = set()
    quantize.quantize(
        tmp_path / "hf",
        link,
        F32,
        lambda step: places.update(p.parent for p in tmp_path.rglob("*.part") if p.is_file()),
    )
    assert link.is_symlink() and target.is_file() and not target.is_symlink()
    assert places == {target.with_name("real.gguf.work")}
    quantize.quantize(tmp_path / "hf", link, Options(type="f16", threads=1, evaluate=False))
    assert link.is_symlink() and link.resolve() == target


@pytest.mark.parametrize("text", ["1k", "9.5G", "700M", "1.2T", "12", "31.4G"])
def test_sizes_are_echoed_as_they_are_written(text: str) -> None:
    assert format_size(parse_size(text)) == text
