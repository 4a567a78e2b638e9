"""quantize.drift: the file's hidden states beside the original's, and what weights make up for."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support import calibrated
from support import checkpoints as make

from quantize.encode import feedback
from quantize.encode.feedback import Covariance
from quantize.layers import attend
from quantize.measure.awq import Scales
from quantize.measure.calibrate import Stream
from quantize.measure.drift import FeedForward
from quantize.measure.evidence import Evidence, bundles
from quantize.source import tensors
from quantize.source.arch import parse
from quantize.source.checkpoint import Checkpoint
from quantize.source.corpus import WINDOW
from quantize.source.tensors import PartReader

CONFIGS = {"grouped": make.V2_GROUPED, "lite": make.V2_LITE, "v3": make.V3}
BF16 = 2.0**-8


def test_corrected_is_ridge_regression() -> None:
    """Half of the way from the weights to those that give, of x, what was wanted: normal equations in float64."""
    rng = np.random.default_rng(0)
    x, lacking = rng.standard_normal((500, 32)), rng.standard_normal((500, 7))
    drift = x @ rng.standard_normal((32, 32)) * 0.1
    w = rng.standard_normal((7, 32)).astype(np.float32)
    covariance = Covariance((np.float32(x.T @ x),), np.float32(x.T @ drift), np.float32(x.T @ lacking))
    h = x.T @ x
    damped = h + feedback.CORRECTION_DAMPING * np.trace(h) / 32 * np.eye(32)
    wanted = (drift @ w.T + lacking).T @ x
    expected = w + feedback.CORRECTION * wanted @ np.linalg.inv(damped)
    np.testing.assert_allclose(covariance.corrected(w), expected, rtol=0, atol=1e-4)
    assert Covariance(covariance.blocks).corrected(w) is w
    assert Covariance((np.zeros((32, 32), np.float32),), covariance.drift).corrected(w) is w


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> dict[str, Any]:
    return CONFIGS[request.param]


def run(config: dict[str, Any], folder: Path, il: int, noise: float, correct: bool = True) -> tuple[np.ndarray, ...]:
    """(original's output, the file's) of a layer whose weights are written with noise."""
    arch = parse(config)
    make.write_checkpoint(folder, config, dtype="F32")
    rng = np.random.default_rng(0)
    x = rng.standard_normal((6 * WINDOW, arch.n_embd)).astype(np.float32)
    drifted = x + noise * rng.standard_normal(x.shape).astype(np.float32)
    keys = {"general.architecture": "deepseek2", **arch.keys()}
    with Checkpoint(folder) as checkpoint:
        layer = {t.role: t for t in tensors.layer_tensors(arch, il)}
        plan = SimpleNamespace(
            arch=arch, keys=keys, options=SimpleNamespace(threads=1), layers={il: layer.values()}, store=checkpoint
        )
        job: Any = SimpleNamespace(plan=plan)
        weights = tensors.Weights(arch, checkpoint, layer.values()).arrays
        stream, read = Stream(arch, x, drifted), PartReader(arch, checkpoint)
        done: dict[tensors.Tensor, list[np.ndarray]] = {}
        for sublayer in tensors.SUBLAYERS:
            mine = {role: t for role, t in layer.items() if t.sublayer == sublayer}
            stats = getattr(calibrated, sublayer)(stream, keys, il, weights, covariances=True)
            evidence, drift = Evidence(arch, mine, stats, read), None
            if stats.exact is not None:
                drift = FeedForward(arch, mine, stream, stats.exact, Scales(), read)
            for tensor, part in (of for some in bundles(list(mine.values())) for bundle in some for of in bundle):
                values = read(tensor, part)
                if tensor.is_matrix:
                    covariance = drift.covariance(tensor.role, part) if drift else None
                    covariance = covariance or evidence.covariance(tensor.role, part)
                    if covariance is not None and correct:
                        values = covariance.corrected(values)
                    size = noise * float(values.std())
                    values = values + np.float32(size) * rng.standard_normal(values.shape).astype(np.float32)
                done.setdefault(tensor, []).append(values)
                if drift:
                    drift.wrote(tensor.role, part, values)
                    drift.add(tensor.role, part)
            if sublayer == "attention":
                attend(job, il, stream, done)
    assert stream.drifted is not None
    return stream.x, stream.drifted


@pytest.mark.parametrize("il", [0, 1])
def test_without_loss_nothing_drifts(config: dict[str, Any], il: int, tmp_path: Path) -> None:
    """Weights written as they are: what the file computes is what the engine does, and nothing is made up for."""
    x, drifted = run(config, tmp_path, il, noise=0.0)
    close = np.abs(drifted - x).max(1) <= 8 * BF16 * np.abs(x).max(1)
    assert close.mean() > 0.99  # all but tokens whose choice of experts hangs on the rounding


@pytest.mark.parametrize("il", [0, 1])
def test_what_is_lost_is_made_up_for(config: dict[str, Any], il: int, tmp_path: Path) -> None:
    """Noise in what comes in and in the weights: corrected layers put out less of it."""
    x, drifted = run(config, tmp_path / "a", il, noise=0.2)
    same, plain = run(config, tmp_path / "b", il, noise=0.2, correct=False)
    np.testing.assert_array_equal(same, x)
    assert np.square(drifted - x).sum() < 0.97 * np.square(plain - x).sum()
