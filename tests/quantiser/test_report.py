"""What a run measures and writes down: the distance from the original, per-tensor errors, the report, the metadata."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as Type
from support import checkpoints as make

import cext
import quantize
from quantize import Options, QuantizeError
from quantize.evaluate import SKIPPED
from quantize.job import make_plan
from quantize.measure import score
from quantize.measure.loss import LossMeter, measure
from quantize.report import Report
from quantize.source import corpus
from quantize.source.corpus import WINDOW
from quantize.source.source import open_source

SMALL = {**make.V2, "num_hidden_layers": 3}
# Of the difference of two logits by int8 activations, as a share of the logits' deviation: a block's largest is about
# 2.2 times its deviation, so that rounding to 1/127 of it has one of 2.2 / 127 / sqrt(12), 0.5 %; two logits, twice.
ROUNDING = 0.015


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "hf"
    make.write_checkpoint(folder, SMALL)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of some 20 windows."""
    return make.write_text(tmp_path_factory.mktemp("text") / "text.txt", 3000)


def held(source: Path, text: Path) -> np.ndarray:
    with open_source(source) as checkpoint:
        found = make_plan(checkpoint, Options(calibration=(text,))).corpus
    assert found is not None
    return found.held


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_held_windows_are_not_calibrated_with(source: Path, text: Path) -> None:
    with open_source(source) as checkpoint:
        every = make_plan(checkpoint, Options(calibration=(text,), max_tokens=1 << 20)).corpus
        thinned = make_plan(checkpoint, Options(calibration=(text,), max_tokens=2048)).corpus
    assert every is not None and thinned is not None
    n = len(every.windows) + len(every.held)
    assert len(every.held) == n // corpus.HELD_SHARE >= 2
    seen = {window.tobytes() for window in every.windows}
    assert len(seen) == len(every.windows) and not any(window.tobytes() in seen for window in every.held)
    np.testing.assert_array_equal(thinned.held, every.held)
    assert len(thinned.windows) == 4 and {window.tobytes() for window in thinned.windows} <= seen


def test_narrow_models_are_calibrated_with_more(monkeypatch: pytest.MonkeyPatch, source: Path, text: Path) -> None:
    assert [corpus.enough(n) for n in (64, 512, 1024, 2048, 5120)] == [262_144, 262_144, 131_072, 65_536, 65_536]
    assert [corpus.enough_to_survey(n) for n in (64, 512, 1024, 2048, 5120)] == [24_576, 24_576, 16_384, 8192, 8192]
    monkeypatch.setattr(corpus, "enough", lambda n_embd: 1536)
    with open_source(source) as checkpoint:
        plan = make_plan(checkpoint, Options(calibration=(text,)))
    assert plan.corpus is not None and plan.corpus.n_tokens == 1536


def test_the_distance_is_that_of_two_models(tmp_path: Path, source: Path, text: Path) -> None:
    """An exact float32 file of the same checkpoint takes the streamed reference's place: the figures must agree."""
    report = quantize.quantize(
        source, tmp_path / "q.gguf", Options(type="q4_0", calibration=(text,), threads=1, sequential=False)
    )
    plain = Options(type="f32", calibration=(text,), threads=1, evaluate=False)
    quantize.quantize(source, tmp_path / "f.gguf", plain)
    taps = {f"experts-{il}": None for il in (1, 2)}
    klds, same, close, alike, nll = [], [], [], [], np.zeros(2)
    with cext.Model(tmp_path / "q.gguf", 1) as mine, cext.Model(tmp_path / "f.gguf", 1) as theirs:
        for window in held(source, text):
            tap = cext.Tap(taps), cext.Tap(taps)
            pair = [
                model.session(WINDOW, "f32").eval(window, "all", tap=t)[SKIPPED:-1]
                for model, t in zip((mine, theirs), tap, strict=True)
            ]
            q, p = map(log_softmax, pair)
            klds.append((np.exp(p) * (p - q)).sum(-1))
            same.append(q.argmax(-1) == p.argmax(-1))
            second, first = np.sort(q, -1)[:, -2:].T
            close.append(first - second < ROUNDING * q.std(-1))
            rows = np.arange(len(p))
            nll += [-q[rows, window[SKIPPED + 1 :]].sum(), -p[rows, window[SKIPPED + 1 :]].sum()]
            for name in taps:
                a, b = (np.asarray(t[name])[SKIPPED:-1] for t in tap)
                alike.append([len({*x} & {*y}) / len(y) for x, y in zip(a, b, strict=True)])
    found = report.evaluation
    assert found is not None and found.n_windows == len(klds) and found.n_scored == np.concatenate(klds).size
    # The session rounds the activations of the head to int8, a percent of the figures; the rest is the same bits.
    assert found.kld_mean == pytest.approx(np.concatenate(klds).mean(), rel=1e-2)
    assert found.kld_p99 == pytest.approx(np.percentile(np.concatenate(klds), 99), rel=2e-2)
    assert found.perplexity == pytest.approx(np.exp(nll[0] / found.n_scored), rel=1e-3)
    assert found.perplexity_reference == pytest.approx(np.exp(nll[1] / found.n_scored), rel=1e-5)
    # A first choice moves only where the two best are as near as the rounding.
    assert np.concatenate(close).mean() < 0.04
    assert abs(found.top1 - np.concatenate(same).mean()) <= np.concatenate(close).mean()
    assert found.routing == pytest.approx(np.mean(alike), abs=1e-12)
    assert found.kld_mean > 1e-3 and found.routing is not None and found.routing < 0.999


def test_a_layer_of_a_file_s_own_bytes_is_the_model_s(tmp_path: Path, source: Path, text: Path) -> None:
    quantize.quantize(source, tmp_path / "q.gguf", Options(type="q4_0", calibration=(text,), evaluate=False))
    window = held(source, text)[0]
    tap = cext.Tap({f"l_out-{il}": None for il in range(3)})
    with cext.Model(tmp_path / "q.gguf", 1) as model, cext.Gguf(tmp_path / "q.gguf") as file:
        model.session(WINDOW, "f32").eval(window, tap=tap)
        keys = {key: file.metadata[key] for key in file.metadata if key.startswith(("general.arch", "deepseek2."))}
        for il in (1, 2):
            tensors = {t.name: cext.Encoded(t.type, t.shape, file.raw(t.name)) for t in file.tensors}
            mine = {name: tensor for name, tensor in tensors.items() if name.startswith(f"blk.{il}.")}
            with cext.Layer(keys, il, mine, 1) as layer:
                out, _ = layer.forward(tap[f"l_out-{il - 1}"], 1)
            np.testing.assert_array_equal(out, tap[f"l_out-{il}"])
    wrong = {**mine, "blk.2.attn_output.weight": cext.Encoded(12, (64, 64), np.zeros(2304, np.uint8))}
    with pytest.raises(ValueError, match=r"attn_output.*not whole blocks of q4_k"):
        cext.Layer(keys, 2, wrong)


def test_a_float_file_is_at_no_distance(tmp_path: Path, source: Path, text: Path) -> None:
    report = quantize.quantize(source, tmp_path / "f.gguf", Options(type="f32", calibration=(text,), threads=1))
    found = report.evaluation
    assert found is not None and abs(found.kld_mean) < 1e-8 and found.routing == 1.0
    assert found.perplexity_ratio == pytest.approx(1.0, abs=1e-6)
    assert report.calibration_tokens == 0 and report.layer_errors == (0.0, 0.0, 0.0)


def test_report_and_metadata(tmp_path: Path, source: Path, text: Path) -> None:
    options = Options(type="q4_0", calibration=(text,), threads=1)
    report = quantize.quantize(source, tmp_path / "q.gguf", options)
    told = json.loads((tmp_path / "q.gguf.report.json").read_text(encoding="utf-8"))
    assert told == json.loads(json.dumps(report.as_json()))
    assert Report.of(json.loads(json.dumps(report.record()))) == replace(
        report, options=json.loads(json.dumps(report.options))
    )
    assert told["nbytes"] == (tmp_path / "q.gguf").stat().st_size
    assert told["options"]["type"] == "q4_0" and told["options"]["calibration"] == [str(text)]
    metadata = cext.Gguf(tmp_path / "q.gguf").metadata
    for name in ("kld_mean", "kld_p99", "top1", "routing", "perplexity_ratio"):
        assert metadata[f"dsv2.evaluation.{name}"] == pytest.approx(told["evaluation"][name], rel=1e-6), name
    assert metadata["dsv2.evaluation.tokens"] == told["evaluation"]["n_scored"]
    assert metadata["dsv2.layer_error"] == pytest.approx(told["layer_errors"], rel=1e-6)
    assert {t["name"]: t["type"] for t in told["tensors"]} == {
        t.name: t.type_name.upper() for t in cext.Gguf(tmp_path / "q.gguf").tensors
    }
    assert all(0 < error < 0.1 for error in told["layer_errors"])
    for tensor in told["tensors"]:
        least, most = {"F32": (0, 0), "F16": (0, 2**-22)}.get(tensor["type"], (1e-6, 0.1))
        assert least <= tensor["error"] <= most, tensor
    assert all(len(layer["counts"]) == SMALL["n_routed_experts"] for layer in told["expert_coverage"])


def test_measuring_changes_no_tensor(tmp_path: Path, source: Path, text: Path) -> None:
    for evaluate in (True, False):
        options = Options(type="q4_0", calibration=(text,), threads=1, evaluate=evaluate)
        report = quantize.quantize(source, tmp_path / f"{evaluate}.gguf", options)
        assert (report.evaluation is not None) == evaluate
    one, two = (cext.Gguf(tmp_path / f"{evaluate}.gguf") for evaluate in (True, False))
    assert "dsv2.evaluation.kld_mean" not in two.metadata
    for tensor in one.tensors:
        np.testing.assert_array_equal(one.raw(tensor.name), two.raw(tensor.name), err_msg=tensor.name)


def test_a_text_too_short_to_hold_some_back(tmp_path: Path, source: Path) -> None:
    (tmp_path / "t.txt").write_text("the tin in the ether " * 130)
    report = quantize.quantize(source, tmp_path / "q.gguf", Options(calibration=(tmp_path / "t.txt",), threads=1))
    assert report.evaluation is None and report.calibration_tokens > 0
    assert any("too short to hold" in note for note in report.notes)


# The parts.


def test_loss_of_outputs_and_weights() -> None:
    rng = np.random.default_rng(0)
    exact = rng.standard_normal((2, 6, 8)).astype(np.float32)
    lossy = (exact + 0.1 * rng.standard_normal(exact.shape)).astype(np.float32)
    x = rng.standard_normal((5, 8)).astype(np.float32)
    weights = rng.random(8).astype(np.float32)
    meter = LossMeter("t", Type.Q4_K)
    meter.add(measure("t", Type.Q4_K, exact[0], lossy[0], x, weights))
    meter.add(measure("t", Type.Q4_K, exact[1], lossy[1], None, weights))
    lost = np.square(x @ (lossy[0] - exact[0]).T).sum() + (np.square(lossy[1] - exact[1]) * weights).sum()
    whole = np.square(x @ exact[0].T).sum() + (np.square(exact[1]) * weights).sum()
    assert meter.done().error == pytest.approx(lost / whole, rel=1e-5)
    nothing = LossMeter("z", Type.Q4_K)
    zeros = np.zeros((1, 8), np.float32)
    nothing.add(measure("z", Type.Q4_K, zeros, zeros, None, None))
    assert nothing.done().error == 0.0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_does_not_leave(bad: float) -> None:
    decoded = np.zeros((2, 8), np.float32)
    decoded[1, 3] = bad
    with pytest.raises(QuantizeError, match=r"blk\.7\.ffn_up\.weight.*Q4_K.*not finite"):
        measure("blk.7.ffn_up.weight", Type.Q4_K, np.zeros((2, 8), np.float32), decoded, None, None)


@pytest.mark.parametrize("n", [1, 63, 64, 65])
def test_score_by_hand(n: int) -> None:
    rng = np.random.default_rng(n)
    mine, theirs = rng.standard_normal((2, n, 11)).astype(np.float32)
    targets = rng.integers(0, 11, n).astype(np.int32)
    found = score.score(mine, theirs, targets, 6, 3)
    q, p = log_softmax(mine), log_softmax(theirs)
    np.testing.assert_allclose(found.kld, (np.exp(p) * (p - q)).sum(-1), rtol=1e-12)
    assert found.nll == pytest.approx(-q[np.arange(n), targets].sum(), rel=1e-12)
    assert found.nll_reference == pytest.approx(-p[np.arange(n), targets].sum(), rel=1e-12)
    assert found.n_top1 == (q.argmax(-1) == p.argmax(-1)).sum()
    summary = score.summary([found, found])
    assert summary.routing == 0.5 and summary.kld_error == 0.0 and summary.n_scored == 2 * n
    assert score.summary([found]).kld_error is None


def test_alike_ignores_order() -> None:
    assert score.alike(np.array([[1, 2, 3], [4, 5, 6]]), np.array([[3, 1, 9], [6, 5, 4]])) == 5
