"""quantize.effort and meter: what the time left is told from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as Type
from support import checkpoints as make

from quantize import Options, Progress, quantize
from quantize.effort import Effort, forward
from quantize.job import Plan, make_plan
from quantize.meter import Meter
from quantize.source.source import open_source
from quantize.source.tensors import SUBLAYERS

CONFIG = {**make.V2_LITE, "num_hidden_layers": 2, "hidden_size": 256, "moe_intermediate_size": 256}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("effort") / "hf"
    make.write_checkpoint(folder, CONFIG)
    (folder / "text.txt").write_text(" ".join(f"word {i} and {i * i % 97}," for i in range(700)))
    return folder


def planned(source: Path, **options: Any) -> Plan:
    return make_plan(open_source(source), Options(calibration=(source / "text.txt",), threads=2, **options))


def test_phases_are_those_of_the_plan(source: Path) -> None:
    assert list(Effort(planned(source)).phases()) == ["survey", "write", "evaluate"]
    assert list(Effort(planned(source, plain_mix=True, evaluate=False)).phases()) == ["write"]
    assert all(effort > 0 for effort in Effort(planned(source)).phases().values())


def test_steps_grow_with_their_work(source: Path) -> None:
    plan = planned(source, awq=True)
    arch = plan.arch
    few = replace(arch, n_expert_used=1)
    assert forward(arch, arch.n_layer - 1) > forward(few, arch.n_layer - 1) and forward(arch, 0) == forward(few, 0)
    plain, grids, floats = (
        Effort(plan, {t.name: type_ for t in plan.tensors}).write() for type_ in (Type.Q4_K, Type.IQ2_S, Type.BF16)
    )
    assert [(work.il, work.sublayer) for work in plain] == [
        (-1, None), *((il, sublayer) for il in range(arch.n_layer) for sublayer in SUBLAYERS), (arch.n_layer, None),
    ]  # fmt: skip
    for more, usual, less in zip(grids, plain, floats, strict=True):
        assert more.encode > usual.encode > less.encode > 0
        assert (usual.calibrate > 0) == (usual.search > 0) == (usual.sublayer is not None)
    alone = Effort(planned(source, importance=False, awq=False, feedback=False, evaluate=False)).write()
    assert all(work.search == work.calibrate == 0 for work in alone)
    assert Effort(planned(source, bpw=3.0)).phases()["write"] > Effort(planned(source, bpw=5.0)).phases()["write"]


def test_time_left_follows_the_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    """A phase of three quarters that is half done took 30 s: 50 s are left."""
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    seen: list[Progress] = []
    meter = Meter(seen.append, {"survey": 3.0, "write": 1.0}, 2, 100)
    meter.begin("survey")
    clock[0] = 30.0
    meter.tell("survey", 0, 0.5)
    assert (seen[-1].fraction, seen[-1].seconds_left) == (pytest.approx(0.375), pytest.approx(50.0))
    meter.begin("write")
    clock[0] = 70.0
    meter.wrote(50, 80)
    meter.tell("encode", 1, 0.5)
    assert (seen[-1].fraction, seen[-1].seconds_left) == (pytest.approx(0.875), pytest.approx(10.0))
    assert seen[-1].values_per_second == pytest.approx(2.0)
    meter.begin("survey")
    clock[0] = 71.0
    meter.tell("survey", 0, 0.5)
    assert (seen[-1].values_per_second, seen[-1].bytes_written) == (0, 50)  # the rate is a phase's


def test_progress_only_grows(source: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    options = Options(calibration=(source / "text.txt",), threads=2, survey_tokens=512, max_tokens=1024, awq=True)
    quantize(source, tmp_path / "m.gguf", options, seen.append)
    fractions = np.array([step.fraction for step in seen])
    assert (np.diff(fractions) >= 0).all() and fractions[-1] == 1
    assert np.diff(fractions).max() < 0.5  # no stage goes by unseen
    assert {step.stage for step in seen} >= {"calibrate", "search", "encode", "evaluate", "finish"}
