"""Which engine runs a file, from its header alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

from dsv2cli.errors import CliError

Engine = Literal["dsv2", "llama.cpp"]
Wanted = Literal["auto", "dsv2", "llama.cpp"]
OURS: Engine = "dsv2"
LLAMA: Engine = "llama.cpp"

# Architectures of llama.cpp's that write no text by themselves: what they are.
ENCODER = "an encoder: it makes vectors of texts and writes none"
DIFFUSION = "a diffusion model: it fills a whole text in, not word after word"
DRAFT = "a draft head: it guesses ahead for another model and is none by itself"
OTHERS = {
    **dict.fromkeys(("bert", "modern-bert", "nomic-bert", "nomic-bert-moe", "neo-bert", "jina-bert-v2"), ENCODER),
    **dict.fromkeys(("jina-bert-v3", "eurobert", "gemma-embedding", "llama-embed", "t5encoder"), ENCODER),
    **dict.fromkeys(("dream", "llada", "llada-moe", "rnd1"), DIFFUSION),
    **dict.fromkeys(("eagle3", "dflash", "gemma4-assistant"), DRAFT),
    "t5": "an encoder with a decoder: it translates a text into another and continues none",
    "wavtokenizer-dec": "a vocoder: it makes sound",
    "clip": "a multimodal projector (mmproj): the part that sees or hears for a model, without the model",
    "imatrix": "an importance matrix: statistics for a quantiser, without the model",
}
# general.type of files that go with a model.
KINDS = {
    "mmproj": OTHERS["clip"],
    "imatrix": OTHERS["imatrix"],
    "adapter": "an adapter (LoRA): a change to a model, without the model",
}
POOLED = {1: "an embedding model", 2: "an embedding model", 3: "an embedding model", 4: "a reranker"}
MODEL_HINT = "give the model's own GGUF"


def architecture_of(values: Mapping[str, object], otherwise: str = "unknown") -> str:
    """general.architecture, where the file says it."""
    named = values.get("general.architecture")
    return named if isinstance(named, str) and named else otherwise


def no_chat_model(values: Mapping[str, object], n_tensors: int) -> str | None:
    """What a file is that writes no text: "a multimodal projector ..."; None for a model that does."""
    kind, architecture = values.get("general.type"), architecture_of(values)
    if isinstance(kind, str) and kind in KINDS:
        return KINDS[kind]
    if architecture in OTHERS:
        return OTHERS[architecture]
    if values.get(f"{architecture}.attention.causal") is False:
        return ENCODER
    pooled = values.get(f"{architecture}.pooling_type")
    if isinstance(pooled, int) and pooled in POOLED:
        return f"{POOLED[pooled]}: it makes vectors of texts and writes none"
    if not n_tensors:
        return "a vocabulary, without the model"
    return None


def not_ours(architecture: str, type_names: Iterable[str]) -> str | None:
    """Why dsv2's own engine does not run such a file; None where it does."""
    from cext import architectures, formats

    if architecture not in architectures():
        return f"architecture `{architecture}`"
    known = {f["name"] for f in formats()}
    lacking = [name for name in dict.fromkeys(type_names) if name not in known]
    return f"tensors in {', '.join(name.upper() for name in lacking[:4])}" if lacking else None


def why_not_ours(path: Path) -> str | None:
    """Why a file is llama.cpp's to run; None where it is dsv2's own engine's. FormatError and FileError; CliError that
    says by name what a file is which writes no text."""
    from cext import Gguf

    with Gguf(path) as gguf:
        if (what := no_chat_model(gguf.metadata, len(gguf.tensors))) is not None:
            raise CliError(f"`{path}` is {what}", MODEL_HINT)
        return not_ours(architecture_of(gguf.metadata), (tensor.type_name for tensor in gguf.tensors))
