"""A V3 checkpoint as it is published: fp8 blocks with scales, sigmoid router with a bias, further-token layers.

Quantised from the fp8 files and run here, against transformers' DeepseekV3 on the values that the files stand for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import checkpoints as make
from support.scoring import divergence

import cext
import quantize
from quantize import Options, Report

hf = pytest.importorskip("support.hf", reason="needs PyTorch and transformers", exc_type=ImportError)
pytestmark = pytest.mark.oracle

# Several 128 x 128 blocks a matrix, some of them cut off at the edge.
CONFIG = {**make.V3, "hidden_size": 192, "q_lora_rank": 160, "kv_lora_rank": 64, "intermediate_size": 288,
          "moe_intermediate_size": 160}  # fmt: skip
IDS = np.random.default_rng(3).integers(3, 250, 48).astype(np.int32)
# float32 on both sides: 5e-7 of the range as measured; a wrong scale block, bias or group is off by 1e-2.
FLOAT32 = 2e-5


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(the fp8 checkpoint, the same values in float32 without the layer that predicts further tokens)."""
    folder = tmp_path_factory.mktemp("v3")
    weights = make.random_weights(CONFIG)
    for il in (1, 2):
        bias = f"model.layers.{il}.mlp.gate.e_score_correction_bias"
        weights[bias] = (0.3 * np.random.default_rng(il).standard_normal(8)).astype(np.float32)
    exact = make.write_checkpoint(folder / "fp8", CONFIG, weights, dtype="F8_E4M3", n_shards=2)
    plain: dict[str, Any] = {**CONFIG, "num_nextn_predict_layers": 0}
    kept = {name: value for name, value in exact.items() if not name.startswith("model.layers.3.")}
    make.write_checkpoint(folder / "f32", plain, kept, dtype="F32")
    return folder / "fp8", folder / "f32"


def converted(folder: Path, out: Path, **options: Any) -> tuple[np.ndarray, Report]:
    """The engine's logits of the checkpoint in folder, and the quantiser's report."""
    report = quantize.quantize(folder, out, Options(threads=1, **options))
    with cext.Model(out, threads=1) as model:
        return model.session(len(IDS), kv_type="f32").eval(IDS, "all"), report


def test_fp8_in_float32_is_the_checkpoint(tmp_path: Path, folders: tuple[Path, Path]) -> None:
    logits, report = converted(folders[0], tmp_path / "m.gguf", type="f32", evaluate=False)
    true = hf.logits(hf.load(folders[1], CONFIG["rms_norm_eps"]), IDS)
    assert np.abs(logits - true).max() < FLOAT32 * np.ptp(true)
    assert report.left_out and all(name.startswith("model.layers.3.") for name in report.left_out)
    assert any("1 multi-token prediction layer" in note for note in report.notes)


@pytest.mark.parametrize(("type_", "share"), [("q8_0", 0.7), ("q4_k_m", 0.3)])  # int8 activations: half of q8_0's loss
def test_quantised_fp8_runs_as_its_weights_say(
    tmp_path: Path, folders: tuple[Path, Path], type_: str, share: float
) -> None:
    """Against transformers on the decoded file: what is left between them is the engine's int8 activations."""
    words = np.random.default_rng(5).choice(["the", "inner", "ether", "there", "tin", "nether"], 1300)
    (tmp_path / "text.txt").write_text(" ".join(words))
    text = (tmp_path / "text.txt",)
    asked = {"type": type_, "calibration": text, "plain_mix": True, "awq": False, "sequential": False}
    logits, report = converted(folders[0], tmp_path / "m.gguf", **asked)
    decoded = hf.logits(hf.from_gguf(folders[1], tmp_path / "m.gguf"), IDS)
    true = hf.logits(hf.load(folders[1], CONFIG["rms_norm_eps"]), IDS)
    lost = divergence(true, logits)
    assert np.median(divergence(decoded, logits)) < share * np.median(lost)  # a flipped expert costs more than all else
    found = report.evaluation
    # On other tokens: only the order of size can be told, and with it that the streamed reference is the right one.
    assert found is not None and 0.1 * lost.mean() < found.kld_mean < 10 * lost.mean()
