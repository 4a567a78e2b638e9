"""Every kind of checkpoint: quantised, run, and the same as transformers; its vocabulary and its end tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support import families as made

import cext
import quantize
from cext.gguf import Gguf
from quantize import Options

F32 = Options(type="f32", threads=1, evaluate=False)


def metadata(path: Path) -> dict[str, object]:
    with Gguf(path) as gguf:
        return {key: gguf.metadata[key] for key in gguf.metadata}


@pytest.mark.oracle
@pytest.mark.parametrize("name", made.FAMILIES)
def test_a_family_is_transformers(tmp_path: Path, name: str) -> None:
    """Float32 on both sides: 1e-6 of the range as measured."""
    hf = pytest.importorskip("support.hf", reason="needs PyTorch and transformers", exc_type=ImportError)
    family = made.FAMILIES[name]
    weights = made.write(tmp_path / "hf", name)
    report = quantize.quantize(tmp_path / "hf", tmp_path / "m.gguf", F32)
    ids = np.random.default_rng(1).integers(0, family.text["vocab_size"], 48)
    true = hf.logits(hf.load(made.write_reference(tmp_path / "ref", name, weights), family.text["rms_norm_eps"]), ids)
    with cext.Model(tmp_path / "m.gguf", threads=1) as model:
        got = model.session(len(ids), kv_type="f32").eval(ids, "all")
    error = np.abs(got - true).max() / np.ptp(true)
    assert error < 1e-5, error
    drafts = family.text.get("num_nextn_predict_layers", 0)
    assert any("multi-token prediction" in note for note in report.notes) == bool(drafts)
    assert any("2 tensors of vision" in note for note in report.notes) == bool(family.beside)
