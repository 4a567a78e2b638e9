"""source.card: licence and origin of a checkpoint, into every file made of it; and what the package itself brings."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from support import checkpoints as make

import cext
import quantize
from quantize.source.card import front_matter, model_name, provenance

ROOT = Path(__file__).resolve().parents[2]
CARD = """---
license: other  # see below
license_name: "deepseek"
license_link: 'https://example.org/LICENSE'
base_model:
- deepseek-ai/DeepSeek-V2-Lite
  - someone/other.model
- ../../etc
tags: [a, "b"]
widget:
  - text: nested
summary: >
  folded
---
# A model
license: not-this
"""
TOLD = {
    "general.license": "other",
    "general.license.name": "deepseek",
    "general.license.link": "https://example.org/LICENSE",
    "general.base_model.count": 2,
    "general.base_model.0.name": "DeepSeek-V2-Lite",
    "general.base_model.0.organization": "deepseek-ai",
    "general.base_model.0.repo_url": "https://huggingface.co/deepseek-ai/DeepSeek-V2-Lite",
    "general.base_model.1.name": "other.model",
    "general.base_model.1.organization": "someone",
    "general.base_model.1.repo_url": "https://huggingface.co/someone/other.model",
}


def test_a_file_carries_its_licence_and_origin(tmp_path: Path) -> None:
    """In the layout of Hugging Face's cache, where the repository is told by the place."""
    folder = tmp_path / "models--me--Tiny" / "snapshots" / "0123abcd"
    make.write_checkpoint(folder, make.V2)
    (folder / "README.md").write_text(CARD, encoding="utf-8")
    quantize.quantize(folder, tmp_path / "m.gguf", quantize.Options(type="f16", threads=1, evaluate=False))
    with cext.Gguf(tmp_path / "m.gguf") as file:
        general = {key: value for key, value in file.metadata.items() if key.startswith("general.")}
    url = "https://huggingface.co/me/Tiny"
    expected = {**TOLD, "general.name": "Tiny", "general.source.url": url, "general.source.repo_url": url}
    assert {key: general.get(key) for key in expected} == expected
    assert general.keys() - expected.keys() <= {
        "general.architecture", "general.type", "general.file_type", "general.quantization_version",
        "general.alignment",
    }  # fmt: skip


CARDS: dict[str, tuple[str, dict[str, Any]]] = {
    "no card": ("", {}),
    "no front matter": ("# A model\nlicense: mit\n", {}),
    "never closed": ("---\nlicense: mit\n", {}),
    "one line": ("---\r\nlicense: mit\r\nbase_model: a/b\r\n---\r\n", {"license": "mit", "base_model": "a/b"}),
    "a list in a line": ("---\nbase_model: [a/b, 'c/d']\n---", {"base_model": ["a/b", "c/d"]}),
    "control characters": ("---\nlicense: m\x1b[31mit\x07\n---\n", {"license": "m[31mit"}),
    "endless": ("---\nlicense: " + "x" * 5000 + "\n---\n", {"license": "x" * 256}),
    "nothing behind it": ("---\nlicense:\nbase_model:\n---\n", {}),
}


@pytest.mark.parametrize("case", CARDS)
def test_front_matter(tmp_path: Path, case: str) -> None:
    text, expected = CARDS[case]
    if text:
        (tmp_path / "README.md").write_bytes(text.encode())
    assert front_matter(tmp_path / "README.md") == expected


def test_a_folder_of_ones_own_has_no_repository(tmp_path: Path) -> None:
    (tmp_path / "my--model").mkdir()
    assert provenance(tmp_path / "my--model") == {} and model_name(tmp_path / "my--model") == "my--model"


def test_bytes_that_are_not_text_are_no_card(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(b"---\nlicense: \xff\xfe\n---\n")
    assert front_matter(tmp_path / "README.md") == {"license": "\ufffd\ufffd"}


@pytest.mark.parametrize("name", ["dsv2cli/models/README.md", "quantize/source/CALIBRATION.md"])
def test_the_package_brings_what_its_data_is_under(name: str) -> None:
    path = ROOT / name
    assert "public" in path.read_text(encoding="utf-8")
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["scikit-build"]
    patterns = [*config.get("wheel", {}).get("exclude", []), *config.get("sdist", {}).get("exclude", [])]
    patterns += config.get("wheel.exclude", [])
    assert patterns and not [p for p in patterns if path.relative_to(ROOT).match(p)]
