"""Which file of a repository is taken: listings as uploaders lay them out, and what people ask of them.

Each layout is a repository's own (uploader and model named), shortened in the number of its types and parts.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from dsv2cli import hub
from dsv2cli.errors import CliError
from dsv2cli.hub.labels import label_of, made_as, part_of


@dataclass(frozen=True)
class Layout:
    """files: a listing; picks: what is asked -> what it takes, in order (None: no --type)."""

    files: tuple[str, ...]
    picks: dict[str | None, tuple[str, ...]]
    beside: tuple[str, ...] = ("README.md", "config.json")


def one(name: str, *types: str) -> tuple[str, ...]:
    """A file a type: {} stands for it."""
    return tuple(name.format(t) for t in types)


def parts(name: str, n: int) -> tuple[str, ...]:
    return tuple(f"{name}-{i:05}-of-{n:05}.gguf" for i in range(1, n + 1))


def pieces(name: str, n: int) -> tuple[str, ...]:
    return tuple(f"{name}.part{i}of{n}" for i in range(1, n + 1))


COMMON = ("Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0")
LAYOUTS: dict[str, Layout] = {
    "unsloth, flat, GLM-4.7-Flash": Layout(
        one("GLM-4.7-Flash-{}.gguf", *COMMON, "UD-Q2_K_XL", "UD-Q4_K_XL", "UD-Q6_K_XL", "UD-TQ1_0", "IQ4_XS", "BF16"),
        {
            None: ("GLM-4.7-Flash-Q4_K_M.gguf",),
            "Q2_K": ("GLM-4.7-Flash-Q2_K.gguf",),
            "Q6_K": ("GLM-4.7-Flash-Q6_K.gguf",),
            "ud-q4_k_xl": ("GLM-4.7-Flash-UD-Q4_K_XL.gguf",),
            "Q4_K_XL": ("GLM-4.7-Flash-UD-Q4_K_XL.gguf",),
            "TQ1_0": ("GLM-4.7-Flash-UD-TQ1_0.gguf",),
        },
        ("README.md", "imatrix_unsloth.gguf_file", "config.json"),
    ),
    "unsloth, folders of parts, DeepSeek-V3.1": Layout(
        parts("Q4_K_M/DeepSeek-V3.1-Q4_K_M", 3)
        + parts("UD-Q4_K_XL/DeepSeek-V3.1-UD-Q4_K_XL", 2)
        + parts("UD-Q2_K_XL/DeepSeek-V3.1-UD-Q2_K_XL", 2)
        + ("DeepSeek-V3.1-UD-TQ1_0.gguf",),
        {
            None: parts("Q4_K_M/DeepSeek-V3.1-Q4_K_M", 3),
            "UD-Q2_K_XL": parts("UD-Q2_K_XL/DeepSeek-V3.1-UD-Q2_K_XL", 2),
            "UD-TQ1_0": ("DeepSeek-V3.1-UD-TQ1_0.gguf",),
        },
    ),
    "unsloth, UD alone": Layout(
        one("Kimi-K2-{}.gguf", "UD-TQ1_0", "UD-IQ2_XXS", "UD-Q4_K_XL", "UD-Q8_K_XL"),
        {None: ("Kimi-K2-UD-Q4_K_XL.gguf",), "IQ2_XXS": ("Kimi-K2-UD-IQ2_XXS.gguf",)},
    ),
    "bartowski, _L and _XL": Layout(
        one("DeepSeek-Coder-V2-Lite-Instruct-{}.gguf", *COMMON, "Q3_K_L", "Q3_K_XL", "Q4_K_L", "Q8_0_L", "Q6_K_L"),
        {
            None: ("DeepSeek-Coder-V2-Lite-Instruct-Q4_K_M.gguf",),
            "Q8_0": ("DeepSeek-Coder-V2-Lite-Instruct-Q8_0.gguf",),
            "Q8_0_L": ("DeepSeek-Coder-V2-Lite-Instruct-Q8_0_L.gguf",),
            "Q3_K_XL": ("DeepSeek-Coder-V2-Lite-Instruct-Q3_K_XL.gguf",),
        },
        ("README.md", "DeepSeek-Coder-V2-Lite-Instruct.imatrix"),
    ),
    "bartowski, _4_4 and its kin": Layout(
        one("DeepSeek-V2.5-{}.gguf", "Q4_0", "Q4_0_4_4", "Q4_0_4_8", "Q4_0_8_8", "Q4_K_S"),
        {
            None: ("DeepSeek-V2.5-Q4_K_S.gguf",),
            "Q4_0": ("DeepSeek-V2.5-Q4_0.gguf",),
            "Q4_0_4_4": ("DeepSeek-V2.5-Q4_0_4_4.gguf",),
        },
    ),
    "bartowski, a folder a large model": Layout(
        parts("deepseek-ai_DeepSeek-R1-0528-Q4_K_M/deepseek-ai_DeepSeek-R1-0528-Q4_K_M", 3)
        + parts("deepseek-ai_DeepSeek-R1-0528-Q8_0/deepseek-ai_DeepSeek-R1-0528-Q8_0", 2),
        {"q8_0": parts("deepseek-ai_DeepSeek-R1-0528-Q8_0/deepseek-ai_DeepSeek-R1-0528-Q8_0", 2)},
    ),
    "mradermacher, static": Layout(
        one("Moonlight-16B-A3B-Instruct.{}.gguf", *COMMON, "Q4_K_S", "IQ4_XS", "f16"),
        {
            None: ("Moonlight-16B-A3B-Instruct.Q4_K_M.gguf",),
            "IQ4_XS": ("Moonlight-16B-A3B-Instruct.IQ4_XS.gguf",),
            "F16": ("Moonlight-16B-A3B-Instruct.f16.gguf",),
        },
    ),
    "mradermacher, i1": Layout(
        (
            *one("kanana-2-30b-a3b.i1-{}.gguf", "IQ1_S", "IQ4_XS", "Q4_K_M", "Q4_0"),
            "kanana-2-30b-a3b.imatrix.gguf",
            "imatrix.dat",
        ),
        {
            None: ("kanana-2-30b-a3b.i1-Q4_K_M.gguf",),
            "i1-IQ1_S": ("kanana-2-30b-a3b.i1-IQ1_S.gguf",),
            "iq4_xs": ("kanana-2-30b-a3b.i1-IQ4_XS.gguf",),
        },
    ),
    "mradermacher, pieces": Layout(
        ("DeepSeek-V2.5.i1-IQ1_S.gguf", *pieces("DeepSeek-V2.5.i1-Q4_K_M.gguf", 3), "DeepSeek-V2.5.i1-Q2_K.gguf"),
        {
            None: pieces("DeepSeek-V2.5.i1-Q4_K_M.gguf", 3),
            "Q4_K_M": pieces("DeepSeek-V2.5.i1-Q4_K_M.gguf", 3),
            "IQ1_S": ("DeepSeek-V2.5.i1-IQ1_S.gguf",),
        },
    ),
    "pieces in tens are in order": Layout(pieces("R1.Q8_0.gguf", 12), {None: pieces("R1.Q8_0.gguf", 12)}),
    "pieces of old": Layout(
        ("m.Q6_K.gguf-split-a", "m.Q6_K.gguf-split-b", "m.Q2_K.gguf"),
        {"Q6_K": ("m.Q6_K.gguf-split-a", "m.Q6_K.gguf-split-b"), "Q2_K": ("m.Q2_K.gguf",)},
    ),
    "ubergarm, ik types": Layout(
        parts("IQ4_KS/Kimi-K2-Instruct-IQ4_KS", 2)
        + parts("smol-IQ2_KS/Kimi-K2-Instruct-smol-IQ2_KS", 2)
        + parts("IQ2_KS/Kimi-K2-Instruct-IQ2_KS", 2)
        + parts("IQ4_K_R4/Kimi-K2-Instruct-IQ4_K_R4", 2),
        {
            "IQ4_KS": parts("IQ4_KS/Kimi-K2-Instruct-IQ4_KS", 2),
            "IQ2_KS": parts("IQ2_KS/Kimi-K2-Instruct-IQ2_KS", 2),
            "smol-iq2_ks": parts("smol-IQ2_KS/Kimi-K2-Instruct-smol-IQ2_KS", 2),
            "IQ4_K_R4": parts("IQ4_K_R4/Kimi-K2-Instruct-IQ4_K_R4", 2),
        },
    ),
    "lmstudio-community, with a projector of the same type": Layout(
        (*one("Kimi-VL-A3B-Thinking-2506-{}.gguf", "Q4_K_M", "Q8_0"), "mmproj-Kimi-VL-A3B-Thinking-2506-Q8_0.gguf"),
        {None: ("Kimi-VL-A3B-Thinking-2506-Q4_K_M.gguf",), "Q8_0": ("Kimi-VL-A3B-Thinking-2506-Q8_0.gguf",)},
    ),
    "one model and its projector, no types": Layout(
        ("youtu-vl-4b.gguf", "mmproj.gguf"), {None: ("youtu-vl-4b.gguf",), "youtu-vl-4b": ("youtu-vl-4b.gguf",)}
    ),
    "official, GigaChat3": Layout(
        one("GigaChat3-10B-A1.8B-{}.gguf", "q4_0", "q8_0", "bf16"),
        {"Q4_0": ("GigaChat3-10B-A1.8B-q4_0.gguf",), "BF16": ("GigaChat3-10B-A1.8B-bf16.gguf",)},
    ),
    "official, one file": Layout(("Youtu-LLM-2B-Q8_0.gguf",), {None: ("Youtu-LLM-2B-Q8_0.gguf",)}),
    "a folder in BF16": Layout(
        (*one("GLM-4.7-Flash-{}.gguf", "Q4_K_M", "Q8_0"), *parts("BF16/GLM-4.7-Flash-BF16", 2)),
        {None: ("GLM-4.7-Flash-Q4_K_M.gguf",), "bf16": parts("BF16/GLM-4.7-Flash-BF16", 2)},
    ),
    "types in the folder's name alone": Layout(
        ("Q4_K_M/ggml-model.gguf", "Q8_0/ggml-model.gguf", "fp16/ggml-model.gguf"),
        {
            None: ("Q4_K_M/ggml-model.gguf",),
            "Q8_0": ("Q8_0/ggml-model.gguf",),
            "Q8_0/ggml-model": ("Q8_0/ggml-model.gguf",),
            "F16": ("fp16/ggml-model.gguf",),
        },
    ),
    "a draft beside the model": Layout(
        ("DeepSeek-R1-Q4_K_M.gguf", "mtp-DeepSeek-R1-Q4_K_M.gguf", "MTP/DeepSeek-R1-Q4_K_M.gguf", "imatrix.gguf"),
        {None: ("DeepSeek-R1-Q4_K_M.gguf",), "Q4_K_M": ("DeepSeek-R1-Q4_K_M.gguf",)},
    ),
    "drafts alone": Layout(
        one("DeepSeek-R1-DRAFT-0.6B-{}.gguf", "Q4_0", "F16"), {"Q4_0": ("DeepSeek-R1-DRAFT-0.6B-Q4_0.gguf",)}
    ),
    "MXFP4, NVFP4 and fp16": Layout(
        one("GLM-4.7-Flash-{}.gguf", "MXFP4_MOE", "NVFP4", "FP16"),
        {
            "mxfp4_moe": ("GLM-4.7-Flash-MXFP4_MOE.gguf",),
            "fp16": ("GLM-4.7-Flash-FP16.gguf",),
            "F16": ("GLM-4.7-Flash-FP16.gguf",),
        },
    ),
    "two models of a type, one of them a second version": Layout(
        parts("D-Q4_K_M-V2/D-Q4_K_M-V2", 2) + parts("D-Q4_K_M/D-Q4_K_M", 2),
        {
            None: parts("D-Q4_K_M/D-Q4_K_M", 2),
            "Q4_K_M": parts("D-Q4_K_M/D-Q4_K_M", 2),
            "Q4_K_M-V2": parts("D-Q4_K_M-V2/D-Q4_K_M-V2", 2),
        },
    ),
}


def listed(*names: str) -> list[hub.RemoteFile]:
    return [hub.RemoteFile(name, 10, "0" * 64, sha256=True) for name in names]


def pick(files: tuple[str, ...], asked: str | None = None, glob: str | None = None) -> tuple[str, ...]:
    kind, chosen = hub.select("owner/name", listed(*files), None, asked, glob)
    assert kind == "gguf"
    return tuple(f.path for f in chosen)


@pytest.mark.parametrize(
    ("name", "asked"), [(name, asked) for name, layout in LAYOUTS.items() for asked in layout.picks], ids=str
)
def test_a_layout(name: str, asked: str | None) -> None:
    layout = LAYOUTS[name]
    assert pick(layout.beside + layout.files[::-1], asked) == layout.picks[asked]


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_file_of_a_layout_can_be_named(name: str) -> None:
    """By its path as --file, whatever its type is: a part of a split file means the whole."""
    for path in LAYOUTS[name].files:
        if part_of(path) is not None:
            assert path in pick(LAYOUTS[name].files, glob=path)


R1 = parts("R1-Q4_K_M/R1-Q4_K_M", 2) + parts("R1-Q4_K_M/R1-Zero-Q4_K_M", 2)


@pytest.mark.parametrize(
    ("files", "asked", "words"),
    [
        (one("G-{}.gguf", "UD-Q2_K_XL", "Q4_K_M"), "Q2_K", ["no GGUF of type Q2_K", "mean --type UD-Q2_K_XL"]),
        (one("G-{}.gguf", "Q4_K_S", "Q8_0"), "Q4_K", ["no GGUF of type Q4_K", "Q4_K_S"]),
        (one("G-{}.gguf", "Q8_0", "Q2_K"), None, ["2 GGUFs, none of them Q4_K_M", "--type takes one of: Q2_K, Q8_0"]),
        (R1, None, ["2 models", "R1-Zero-Q4_K_M", "--file 'R1-Q4_K_M/R1-Q4_K_M'"]),
        (("mmproj-F16.gguf", "imatrix.gguf"), None, ["no model, only", "mmproj-F16"]),
        (parts("M-Q4_K_M", 3)[:2], None, ["without its part 3 of 3"]),
        (pieces("M-Q4_K_M.gguf", 3)[1:], None, ["without its part 1 of 3"]),
        (("a.gguf-split-b", "a.gguf-split-c"), None, ["without its part 1"]),
        ((), None, ["is empty"]),
        (("README.md", "pytorch_model.bin"), None, ["only as `.bin`", "save_pretrained"]),
        (("config.json", "text_model/model.safetensors"), None, ["only in folders of it (text_model)"]),
        (("adapter_config.json", "adapter_model.safetensors"), None, ["holds an adapter"]),
        (("README.md", "modeling.py"), None, ["neither safetensors weights nor GGUF"]),
    ],
)
def test_what_cannot_be_chosen_is_told_with_a_way(files: tuple[str, ...], asked: str | None, words: list[str]) -> None:
    with pytest.raises(CliError) as error:
        pick(files, asked)
    for word in words:
        assert word in f"{error.value} | {error.value.hint}"


def test_the_hints_own_words_work() -> None:
    with pytest.raises(CliError) as error:
        pick(R1)
    assert pick(R1, glob=error.value.hint.split("'")[1]) == R1[:2]


@pytest.mark.parametrize(
    ("glob", "taken"),
    [("*r1-zero*", R1[2:]), ("R1-Q4_K_M-00002-of-00002.gguf", R1[:2]), ("R1-Zero-Q4_K_M", R1[2:])],
)
def test_a_glob_names_one_of_two(glob: str, taken: tuple[str, ...]) -> None:
    assert pick(R1, glob=glob) == taken


def test_what_is_no_model_can_be_named_outright() -> None:
    files = ("M-Q8_0.gguf", "mmproj-M-F16.gguf")
    assert pick(files, glob="mmproj*") == ("mmproj-M-F16.gguf",)
    assert pick(files, glob="*M-*") == ("M-Q8_0.gguf",)


CHECKPOINT = ("config.json", "tokenizer.json", "model.safetensors.index.json")


@pytest.mark.parametrize(
    ("files", "left_out"),
    [
        (("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"), ("consolidated.safetensors",)),
        (("model.safetensors", "chat_template.jinja", "tiktoken.model", "generation_config.json"), ("x.py", "y.pt")),
        (("pytorch_model.safetensors", "additional_chat_templates/tool_use.jinja"), ("figures/a.json",)),
        (("model-1-of-2.safetensors", "model-2-of-2.safetensors", "LICENSE"), ("model.fp16.safetensors",)),
        (("weights.safetensors", "chat_template.json"), ("adapter_model.safetensors", "onnx/model.onnx")),
    ],
)
def test_the_files_of_a_checkpoint(files: tuple[str, ...], left_out: tuple[str, ...]) -> None:
    kind, chosen = hub.select("owner/name", listed(*CHECKPOINT, *files, *left_out))
    assert kind == "safetensors"
    assert {f.path for f in chosen} == {*CHECKPOINT, *files}


@pytest.mark.parametrize(
    ("path", "name", "rest"),
    [
        ("x/DeepSeek-V3-UD-IQ2_XXS.gguf", "UD-IQ2_XXS", ""),
        ("m.I1-iq3_m.gguf", "i1-IQ3_M", ""),
        ("a-Q4_K_M-imat.gguf", "Q4_K_M", "-imat"),
        ("a-Q4_K_M_fixed.gguf", "Q4_K_M", "_fixed"),
        ("Qwen3-Q4.gguf", "Q4", ""),
        ("BF16/x-Q5_1.gguf", "Q5_1", ""),
        ("a-IQ5_KS.gguf", "IQ5_KS", ""),
        ("a-IQ2_KT.gguf", "IQ2_KT", ""),
    ],
)
def test_labels(path: str, name: str, rest: str) -> None:
    label = label_of(path)
    assert label is not None and (label.name, label.rest) == (name, rest)


@pytest.mark.parametrize(
    "path", ["DeepSeek-V2-Lite.gguf", "Qwen3-30B.gguf", "model.gguf", "IQ-test.gguf", "GLM-4.7.gguf"]
)
def test_names_without_a_label(path: str) -> None:
    assert label_of(path) is None


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("X-Q4_K_M.gguf", "Q4_K_M"),
        ("X-9.5G.gguf", "9.5G"),
        ("X-4.25BPW.gguf", "4.25BPW"),
        ("X-700MIB.gguf", "700MIB"),
        ("X-Chat-Q4_K_M.gguf", None),
        ("X-0628.gguf", None),
        ("XY-Q4_K_M.gguf", None),
    ],
)
def test_names_that_the_quantiser_gives(name: str, what: str | None) -> None:
    assert made_as("X", name) == what


@pytest.mark.parametrize(
    ("letters", "number"), [("a", 1), ("c", 3), ("z", 26), ("aa", 1), ("ab", 2), ("az", 26), ("ba", 27), ("dc", 81)]
)
def test_pieces_by_letters_are_in_their_order(letters: str, number: int) -> None:
    """As split(1) names them, with as many letters as all of them take."""
    for name in (f"m-Q4_K_M.gguf-split-{letters}", f"m-Q4_K_M.gguf.part-{letters.upper()}"):
        part = part_of(name)
        assert part is not None and (part.whole, part.number, part.raw) == ("m-Q4_K_M.gguf", number, True)
