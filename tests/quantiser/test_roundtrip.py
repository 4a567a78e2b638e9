"""Checkpoint to GGUF to logits, all of it the project's own: against the numpy oracle, and in llama.cpp."""

from pathlib import Path

import numpy as np
import pytest
from ref.model import Model as Reference
from support import llama
from support.checkpoints import write_tokenizer
from support.scoring import perplexity, relative_error
from support.tiny import SPECS, WIDE, Checkpoint, gguf_tensors, spec_named, tokens, variant

import cext
import quantize

FLOAT32 = 1.2e-5  # see test_model.py
# The tokenizer that the checkpoints are given has 260 entries.
WITH_VOCABULARY = [variant(spec, n_vocab=288) for spec in (*SPECS, spec_named("all_odd"))]


def convert(folder: Path, spec, **options) -> Path:
    """The spec's checkpoint by dsv2's quantiser."""
    checkpoint = Checkpoint(spec).write(folder / "hf")
    write_tokenizer(checkpoint)
    out = folder / f"{spec.name}.gguf"
    quantize.quantize(checkpoint, out, quantize.Options(threads=1, max_tokens=1024, evaluate=False, **options))
    return out


@pytest.mark.parametrize("spec", WITH_VOCABULARY, ids=lambda s: s.name)
def test_f32_file_holds_the_checkpoint(tmp_path, spec):
    path = convert(tmp_path, spec, type="f32")
    file, expected = cext.Gguf(path), gguf_tensors(Checkpoint(spec))
    assert {t.name for t in file.tensors} == set(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(file.read(name), value, err_msg=name)
    ids = tokens(spec, 32)
    logits = Reference.from_gguf(file.metadata, expected).forward(ids)
    true = Reference(spec.hparams, expected).forward(ids)
    np.testing.assert_allclose(logits, true, rtol=0, atol=1e-6 * np.ptp(true))  # the keys are float32
    with cext.Model(path, threads=1) as model:
        got = model.session(32, kv_type="f32").eval(ids, "all")
    assert np.abs(got - true).max() < FLOAT32 * np.ptp(true)


@pytest.mark.parametrize("name", quantize.RECIPES)
def test_files_written_here_run_in_llamacpp(tmp_path, name):
    """With the same perplexity within 0.3 %, though each engine rounds activations in its own way."""
    options = {"type": name, "awq": False, "importance": False, "plain_mix": True}
    path, ids = convert(tmp_path, WIDE, **options), tokens(WIDE, 512)
    with cext.Model(path, threads=2) as model:
        here = model.session(len(ids)).eval(ids, "all")
    there = llama.logits(path, ids, kv_type="f16")
    assert perplexity(here, ids) == pytest.approx(perplexity(there, ids), rel=3e-3)
    assert np.median(relative_error(here, there)) < 0.05  # rounded activations part them by 0.015 or so
