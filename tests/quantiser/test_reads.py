"""How often a run reads each tensor of the checkpoint, and what it holds of them."""

from __future__ import annotations

import gc
import mmap
import sys
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import checkpoints as make
from support import stored as forms
from support.page_cache import resident_bytes

import quantize
from cext import system
from quantize import Options
from quantize.source import tensors
from quantize.source.arch import parse
from quantize.source.checkpoint import Checkpoint
from quantize.source.stored import Files, StoredTensor

SMALL = {**make.V2, "num_hidden_layers": 2}
RUNS: dict[str, dict[str, Any]] = {
    "the default": {"type": "q4_k_m"},
    "folds": {"type": "q4_k_m", "awq": True},
    "a plain mix": {"type": "q4_k_m", "plain_mix": True},
    "not calibrated": {"type": "f16"},
}
MOST = {"the default": 3, "folds": 3, "a plain mix": 1, "not calibrated": 1}


FORMS = [*((run, "BF16") for run in RUNS), ("the default", "F8_E4M3"), ("the default", "int4"), ("folds", "F8_E4M3")]


@pytest.mark.parametrize(("run", "form"), FORMS)
def test_weights_are_read_few_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: str, form: str) -> None:
    """Once to survey forwards, once backwards, once to write: experts, which are nearly all, and kv_b, which is two.

    Those too that the engine gets rounded: fp8 and packed integers are told by what they were rounded to.
    """
    if form == "int4":
        forms.write(tmp_path / "hf", {**SMALL, "q_lora_rank": 64}, "int4")
    else:
        make.write_checkpoint(tmp_path / "hf", SMALL, dtype=form)
    text = make.write_text(tmp_path / "text.txt", 1300)
    counts: Counter[str] = Counter()
    read = Files.read_into

    def counting(self: Files, tensor: StoredTensor, out: Any) -> None:
        counts[tensor.name] += 1
        read(self, tensor, out)

    monkeypatch.setattr(Files, "read_into", counting)
    options = Options(**RUNS[run], threads=1, calibration=(text,))
    quantize.quantize(tmp_path / "hf", tmp_path / "m.gguf", options)
    counted = {name: n for name, n in counts.items() if ".mlp.experts." in name or "kv_b_proj" in name}
    weights = {name for name in counted if name.endswith(("weight", "packed"))}
    assert len(weights) == 2 + 8 * 3 and len(counted) == len(weights) * {"BF16": 1, "F8_E4M3": 2, "int4": 3}[form]
    assert max(counted.values()) <= MOST[run], Counter(counted).most_common(3)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "F8_E4M3"])
def test_weights_in_memory_are_those_of_the_checkpoint(tmp_path: Path, dtype: str) -> None:
    """Bit for bit, released parts aside; fp8 too, which the engine gets rounded."""
    config = {**SMALL, "quantization_config": make.FP8} if dtype == "F8_E4M3" else SMALL
    make.write_checkpoint(tmp_path / "hf", config, dtype=dtype)
    with Checkpoint(tmp_path / "hf") as checkpoint:
        arch = parse(checkpoint.config)
        layer = tensors.layer_tensors(arch, 1)
        weights, reader = tensors.Weights(arch, checkpoint, layer), tensors.PartReader(arch, checkpoint)
        for tensor in layer:
            whole = tensors.read(arch, checkpoint, tensor)
            for part in range(1 if tensor.form is tensors.Form.WHOLE else tensor.shape[0]):
                expected = whole if tensor.form is tensors.Form.WHOLE else whole[part]
                np.testing.assert_array_equal(weights(tensor, part), expected)
                np.testing.assert_array_equal(reader(tensor, part), expected)
                weights.release(tensor, part)


@pytest.mark.parametrize("dtype", ["BF16", "F8_E4M3"])
def test_weights_go_with_their_last_user(tmp_path: Path, dtype: str) -> None:
    """Not when the collector comes round: the next layer's would be in memory beside them."""
    config = {**SMALL, "quantization_config": make.FP8} if dtype == "F8_E4M3" else SMALL
    make.write_checkpoint(tmp_path / "hf", config, dtype=dtype)
    with Checkpoint(tmp_path / "hf") as checkpoint:
        arch = parse(checkpoint.config)
        layer = tensors.layer_tensors(arch, 1)
        held = [tensors.Weights(arch, checkpoint, layer), tensors.PartReader(arch, checkpoint)]
        for tensor in layer:
            assert all(part(tensor, 0).size for part in held)
        left = [weakref.ref(part) for part in held]
        gc.collect()
        gc.disable()
        try:
            del held
            assert [ref() for ref in left] == [None, None]
        finally:
            gc.enable()


def test_pages_are_given_back() -> None:
    """Whole ones inside the bytes that are named; what lies beside them stays."""
    page = 1 << 16  # or larger: of any system
    pages = system.Pages(8 * page)
    array = np.frombuffer(pages.memory, np.uint8)
    array[:] = 7
    pages.release(page + 1, 5 * page)
    if sys.platform.startswith("linux"):
        assert resident_bytes(array[2 * page : 5 * page]) == 0
    assert (array[: page + 1] == 7).all() and (array[5 * page :] == 7).all()
    if hasattr(mmap, "MADV_DONTNEED"):
        assert (array[2 * page : 5 * page] == 0).all()
