"""dsv2 download looks before it fetches: what cannot be quantised or run is refused before its weights."""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support import checkpoints as make
from support import families as made
from support import gguf_bytes as gb
from support.cli import assert_fails, dsv2
from support.hub import Hub

from cext import Gguf
from dsv2cli.hub import gguf_header

REPO = "owner/model"
FILLING = random.Random(3).randbytes(3_000_000)  # a model's bytes, none of which are to be asked for


def gguf(kind: int = gb.TYPE_Q8_0, architecture: str = "deepseek2", n_tokens: int = 2000) -> bytes:
    """A GGUF of one large tensor of a type behind a vocabulary, its data cut short: only its header is right."""
    kvs = [
        gb.kv("general.architecture", gb.STRING, architecture),
        gb.kv_array("tokenizer.ggml.tokens", gb.STRING, [f"token {i}" for i in range(n_tokens)]),
        gb.kv_array("tokenizer.ggml.token_type", gb.I32, [1] * n_tokens),
    ]
    tensors = [gb.Tensor("output_norm.weight", (32,)), gb.Tensor("blk.0.ffn_up_exps.weight", (256, 64, 4), kind)]
    return gb.gguf(kvs, tensors, FILLING)


# GGUFs.


def test_a_gguf_that_runs_is_fetched_after_a_look(hub: Hub, env: dict[str, str]) -> None:
    files = {f"M-{t}.gguf": gguf(k) for t, k in (("Q8_0", 8), ("Q4_K_M", 12), ("IQ4_XS", 23))}
    hub.add(REPO, files)
    result = dsv2("download", f"{REPO}:iq4_xs", **env)
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()).read_bytes() == files["M-IQ4_XS.gguf"]
    assert "M-IQ4_XS.gguf, 1 file" in result.stderr
    assert not hub.downloads("M-Q8_0.gguf")
    hub.requests.clear()
    assert dsv2("download", f"{REPO}:iq4_xs", **env).stdout == result.stdout
    assert not hub.downloads("M-IQ4_XS.gguf")  # what is there is not looked at again


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("M-IQ4_KS.gguf", 144, ["blk.0.ffn_up_exps.weight", "type 144"]),
        ("M-Q4_K_M.gguf", 31, ["type 31"]),  # a name that promises something else
    ],
)
def test_a_type_that_does_not_run_is_refused_by_its_header(
    hub: Hub, env: dict[str, str], name: str, kind: int, words: list[str]
) -> None:
    hub.add(REPO, {name: gguf(kind)})
    assert_fails(
        dsv2("download", REPO, **env), 1, name, "which neither dsv2 nor llama.cpp runs", "Q4_K", "--no-check", *words
    )
    assert all(r.range and not r.range.endswith("-") for r in hub.downloads(name)) and len(hub.downloads(name)) == 1
    assert dsv2("download", REPO, "--no-check", **env).returncode == 0


def test_a_part_of_a_split_file_is_looked_at_too(hub: Hub, env: dict[str, str]) -> None:
    names = [f"M-Q4_K_M-0000{i}-of-00002.gguf" for i in (1, 2)]
    hub.add(REPO, {names[0]: gguf(12), names[1]: gb.gguf([], [gb.Tensor("blk.9.x.weight", (256, 4), 31)], FILLING)})
    assert_fails(dsv2("download", REPO, **env), 1, "blk.9.x.weight", "type 31")


@pytest.mark.parametrize(
    ("name", "kind", "architecture", "words"),
    [
        ("M-Q4_K_M.gguf", 12, "llama", "architecture `llama`"),
        ("M-Q4_K_M.gguf", 12, "runes", "architecture `runes`"),
        ("M-TQ1_0.gguf", 34, "deepseek2", "tensors in TQ1_0"),
        ("M-Q4_K_M.gguf", 39, "deepseek2", "tensors in MXFP4"),
        ("M-IQ1_S.gguf", 19, "qwen3", "architecture `qwen3`"),
    ],
)
def test_what_llama_cpp_runs_is_fetched_and_told(
    hub: Hub, env: dict[str, str], name: str, kind: int, architecture: str, words: str
) -> None:
    hub.add(REPO, {name: gguf(kind, architecture)})
    result = dsv2("download", f"{REPO}:{name[2:-5]}", **env)
    assert result.returncode == 0 and Path(result.stdout.strip()).name == name, result.stderr
    assert f"({words}: llama.cpp will run it)" in result.stderr
    assert "llama.cpp" not in dsv2("download", f"{REPO}:{name[2:-5]}", "-q", **env).stderr


@pytest.mark.parametrize("architecture", ["clip", "bert"])
def test_what_writes_no_text_is_refused(hub: Hub, env: dict[str, str], architecture: str) -> None:
    hub.add(REPO, {"M-Q4_K_M.gguf": gguf(12, architecture)})
    assert_fails(dsv2("download", REPO, **env), 1, "M-Q4_K_M.gguf", "is a", "--no-check")


@pytest.mark.parametrize(
    "data", [b"version https://git-lfs" * 9, b"GGUF" + b"\xff" * 60, b"GG", b"GGUF\x09" + b"\0" * 99]
)
def test_what_is_no_gguf_is_refused(hub: Hub, env: dict[str, str], data: bytes) -> None:
    hub.add(REPO, {"M-Q4_K_M.gguf": data})
    result = dsv2("download", REPO, **env)
    if len(data) < 4:  # nothing told by the header, nor against it by the name
        assert result.returncode == 0, result.stderr
    else:
        assert_fails(result, 1, "M-Q4_K_M.gguf", "no GGUF")


@pytest.mark.parametrize(
    ("name", "code"), [("M-IQ2_KS.gguf", 1), ("M-Q4_0_4_4.gguf", 1), ("M-UD-Q4_K_XL.gguf", 0), ("M-IQ1_M.gguf", 0)]
)
def test_the_name_tells_where_the_header_does_not(hub: Hub, env: dict[str, str], name: str, code: int) -> None:
    hub.add(REPO, {name: gguf(8)[:100]})
    result = dsv2("download", REPO, **env)
    assert result.returncode == code, result.stderr
    if code:
        assert_fails(result, 1, "which neither dsv2 nor llama.cpp runs")


def test_a_header_of_any_length_is_read(hub: Hub, env: dict[str, str]) -> None:
    hub.add(REPO, {"M-Q4_K_M.gguf": gguf(31, n_tokens=60_000)})
    assert_fails(dsv2("download", REPO, **env), 1, "type 31")
    hub.ignore_ranges = True  # a server that sends the whole is not read to its end
    assert_fails(dsv2("download", REPO, **env), 1, "type 31")


def test_headers_say_what_the_engine_reads_in_them(tmp_path: Path) -> None:
    data = gb.small_file()
    (tmp_path / "m.gguf").write_bytes(data)
    with Gguf(tmp_path / "m.gguf") as file:
        expected = [t.name for t in file.tensors]
    assert list(gguf_header.parse(data).tensors) == expected
    n_header = next(n for n in range(len(data)) if is_enough(data[:n]))
    assert 100 < n_header < len(data) and all(is_enough(data[:n]) for n in range(n_header, len(data), 50))


def is_enough(data: bytes) -> bool:
    try:
        return len(gguf_header.parse(data).tensors) > 0
    except gguf_header.IncompleteError:
        return False


def test_no_count_of_a_header_is_believed() -> None:
    rng = random.Random(1)
    data = gb.small_file()[:400]
    for _ in range(3000):
        bent = bytearray(data)
        for _ in range(rng.randrange(1, 6)):
            bent[rng.randrange(len(bent))] = rng.choice((0, 1, 127, 255, rng.randrange(256)))
        with contextlib.suppress(gguf_header.IncompleteError, gguf_header.HeaderError):
            gguf_header.parse(bytes(bent))


# Pieces.


def in_pieces(data: bytes, name: str, n: int) -> dict[str, bytes]:
    step = -(-len(data) // n)
    return {f"{name}.part{i + 1}of{n}": data[i * step : (i + 1) * step] for i in range(n)}


@pytest.mark.parametrize("to_folder", [False, True], ids=["cache", "folder"])
def test_pieces_become_one_file(hub: Hub, env: dict[str, str], tmp_path: Path, to_folder: bool) -> None:
    data = gguf(12)
    split = in_pieces(data, "V2.5.i1-Q4_K_M.gguf", 3)
    hub.add(REPO, {"V2.5.i1-IQ1_S.gguf": gguf(19), **split})
    args = ["download", REPO, *(["--to", str(tmp_path / "m")] if to_folder else [])]
    result = dsv2(*args, **env)
    assert result.returncode == 0, result.stderr
    whole = Path(result.stdout.strip())
    assert whole.name == "V2.5.i1-Q4_K_M.gguf" and whole.read_bytes() == data
    large = [p for p in tmp_path.rglob("*") if p.is_file() and p.stat().st_size > 1000]
    assert large == [whole]  # no piece stays: the disk holds the model once
    hub.requests.clear()
    again = dsv2(*args, "--json", **env)
    assert json.loads(again.stdout)["path"] == str(whole) and not [r for r in hub.requests if "/cdn/" in r.path]


def test_joining_goes_on_where_it_was_stopped(hub: Hub, env: dict[str, str], tmp_path: Path) -> None:
    """Stopped with one piece in, the second half copied: neither is fetched again, the copied half is not believed."""
    data = gguf(12)
    split = in_pieces(data, "M-Q4_K_M.gguf", 3)
    hub.add(REPO, split)
    whole = Path(dsv2("download", REPO, **env).stdout.strip())
    first, second, third = split.values()
    blobs = whole.parents[2] / "blobs"
    whole.with_name(f"{whole.name}.incomplete").write_bytes(first + b"\xff" * (len(second) // 2))
    for piece in (second, third):
        (blobs / hashlib.sha256(piece).hexdigest()).write_bytes(piece)
    whole.unlink()
    hub.requests.clear()
    result = dsv2("download", REPO, "--no-check", **env)
    assert result.returncode == 0, result.stderr
    assert whole.read_bytes() == data
    assert not [r for r in hub.requests if "/cdn/" in r.path]
    assert [p.name for p in blobs.iterdir()] == []


def test_pieces_of_another_revision_are_not_taken_for_these(hub: Hub, env: dict[str, str], tmp_path: Path) -> None:
    older, newer = gguf(12), gguf(13)
    hub.add(REPO, in_pieces(older, "M-Q4_K_M.gguf", 2), "v1")
    hub.add(REPO, in_pieces(newer, "M-Q4_K_M.gguf", 2))
    for revision, data in (("v1", older), ("main", newer)):
        done = dsv2("download", REPO, "--to", str(tmp_path / "m"), "--revision", revision, **env)
        assert Path(done.stdout.strip()).read_bytes() == data, done.stderr


# Checkpoints.

WEIGHTS = "model.safetensors"
Change = Callable[[dict[str, bytes]], None]


def checkpoint(tmp_path: Path, config: dict[str, object] | None = None, n_shards: int = 1) -> dict[str, bytes]:
    make.write_checkpoint(tmp_path / "hf-source", {**make.V2, **(config or {})}, n_shards=n_shards)
    return {p.name: p.read_bytes() for p in (tmp_path / "hf-source").iterdir()}


def refused(hub: Hub, env: dict[str, str], files: dict[str, bytes], *words: str) -> None:
    """With the words, and without more of the weights than their header."""
    hub.add(REPO, files)
    assert_fails(dsv2("download", REPO, **env), 1, *words)
    for path in files:
        if path.endswith(".safetensors"):
            assert all(r.range for r in hub.downloads(path)), path
    assert not list(Path(env["HF_HOME"]).rglob("*.safetensors"))


def test_a_checkpoint_with_all_that_belongs_to_it(hub: Hub, env: dict[str, str], tmp_path: Path) -> None:
    files = checkpoint(tmp_path, n_shards=3)
    beside = {
        "chat_template.jinja": b"{{ 1 }}",
        "generation_config.json": b"{}",
        "additional_chat_templates/tool_use.jinja": b"{{ 2 }}",
    }
    left_out = {"consolidated.safetensors": FILLING, "modeling.py": b"1", "model-extra.safetensors": FILLING[:2000]}
    hub.add(REPO, {**files, **beside, **left_out})
    result = dsv2("download", REPO, **env)
    assert result.returncode == 0, result.stderr
    folder = Path(result.stdout.strip())
    assert {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} == {*files, *beside}
    for name in left_out:
        assert not hub.downloads(name)


@pytest.mark.parametrize("name", made.FAMILIES)
def test_a_family_that_quantises_is_fetched(hub: Hub, env: dict[str, str], tmp_path: Path, name: str) -> None:
    """With the vocabulary in the form that its repository has it, without code."""
    made.write(tmp_path / "hf-source", name)
    files = {p.name: p.read_bytes() for p in (tmp_path / "hf-source").iterdir()}
    hub.add(REPO, {**files, "tokenization_kimi.py": b"1"})
    result = dsv2("download", REPO, **env)
    assert result.returncode == 0, result.stderr
    assert {p.name for p in Path(result.stdout.strip()).iterdir()} == set(files)


@pytest.mark.parametrize("name", ["kimi-vl", "glm-4.7-flash"])
def test_a_families_vocabulary_is_refused_first(hub: Hub, env: dict[str, str], tmp_path: Path, name: str) -> None:
    made.write(tmp_path / "hf-source", name)
    files = {p.name: p.read_bytes() for p in (tmp_path / "hf-source").iterdir()}
    vocabulary = next(file for file in ("tiktoken.model", "tokenizer.json") if file in files)
    refused(hub, env, files | {vocabulary: files[vocabulary][:-40]}, vocabulary)


def test_small_files_come_first(hub: Hub, env: dict[str, str], tmp_path: Path) -> None:
    hub.add(REPO, checkpoint(tmp_path, n_shards=2))
    assert dsv2("download", REPO, **env).returncode == 0
    order = [r.path for r in hub.requests if r.method == "GET" and ("/resolve/" in r.path or "/cdn/" in r.path)]
    last_small = max(i for i, path in enumerate(order) if path.endswith(".json"))
    assert all("safetensors" in path or "/cdn/" in path for path in order[last_small + 1 :])
    assert not [path for path in order[:last_small] if path.endswith(".safetensors")]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "kimi_k9", "architectures": ["DeepseekV3ForCausalLM"]}, ["kimi_k9", "DeepseekV3ForCausalLM"]),
        ({"model_type": "llama"}, ["llama", "deepseek_v2"]),
        ({"hidden_act": "gelu"}, ["hidden_act"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["already quantised", "gptq"]),
        ({"hidden_size": 128}, ["config.json makes it"]),
    ],
)
def test_a_configuration_is_refused_first(
    hub: Hub, env: dict[str, str], tmp_path: Path, config: dict[str, object], words: list[str]
) -> None:
    files = checkpoint(tmp_path)
    files["config.json"] = json.dumps({**make.V2, **config}).encode()
    refused(hub, env, files, *words)


def drop_tokenizer(files: dict[str, bytes]) -> None:
    del files["tokenizer.json"]
    files["tiktoken.model"] = b"IQ== 0\n"


def fuse(files: dict[str, bytes]) -> None:
    index = json.loads(files["model.safetensors.index.json"])
    names = {
        n.split(".experts.")[0] + ".experts.gate_up_proj" if ".experts." in n else n: s
        for n, s in index["weight_map"].items()
    }
    files["model.safetensors.index.json"] = json.dumps({"weight_map": names}).encode()


def prefix(files: dict[str, bytes]) -> None:
    index = json.loads(files["model.safetensors.index.json"])
    names = {f"language_model.{n}": s for n, s in index["weight_map"].items()}
    files["model.safetensors.index.json"] = json.dumps({"weight_map": names}).encode()


def pack(files: dict[str, bytes]) -> None:
    index = json.loads(files["model.safetensors.index.json"])
    index["weight_map"]["model.layers.1.mlp.experts.0.up_proj.weight_packed"] = "model-00002-of-00002.safetensors"
    files["model.safetensors.index.json"] = json.dumps(index).encode()


def lose_a_shard(files: dict[str, bytes]) -> None:
    del files["model-00002-of-00002.safetensors"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop_tokenizer, ["tiktoken.model", "stands in the code", "tokenizer_class"]),
        (fuse, ["fused", "experts.gate_up_proj"]),
        (prefix, ["language_model.model"]),
        (pack, ["up_proj.weight_packed", "quantised already"]),
        (lose_a_shard, ["lacks 1 of the shards", "model-00002-of-00002"]),
    ],
)
def test_files_are_refused_first(
    hub: Hub, env: dict[str, str], tmp_path: Path, change: Change, words: list[str]
) -> None:
    files = checkpoint(tmp_path, n_shards=2)
    change(files)
    refused(hub, env, files, *words)


def test_a_dtype_is_refused_by_the_shards_header(hub: Hub, env: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "hf-source"
    make.write_checkpoint(folder, make.V2)
    weights = {name: ("BF16", make.bf16_bits(v)) for name, v in make.random_weights(make.V2).items()}
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    weights[name] = ("I32", np.zeros(weights[name][1].shape, np.int32))
    make.write_safetensors(folder / WEIGHTS, weights)
    refused(hub, env, {p.name: p.read_bytes() for p in folder.iterdir()}, name, "I32")


def test_no_check_fetches_it_all_the_same(hub: Hub, env: dict[str, str], tmp_path: Path) -> None:
    files = checkpoint(tmp_path)
    files["config.json"] = b'{"model_type": "llama"}'
    hub.add(REPO, files)
    assert dsv2("download", REPO, "--no-check", **env).returncode == 0
