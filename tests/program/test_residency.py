"""The choice of a budget: what is free is kept to, what fits is mapped, and what is told is what the engine does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.tiny import Spec, tokens

import cext
import cext.system
from cext import ArgumentError, Device, Model, Place, WeightNeeds
from dsv2cli import residency
from dsv2cli.errors import UsageError
from dsv2cli.gpu import Layout, Wish
from dsv2cli.residency import Beside, Plan
from dsv2cli.scheduler import Budget
from dsv2cli.usage import Usage
from quantize import parse_size

SPEC = Spec("residency", seed=21, n_layer=4, n_ff_expert=160, n_expert=16, n_used=4)
NEEDS = WeightNeeds(all=1000, shared=200, slots=810, experts=800, least=240, long_step=7)
GB = 1 << 30


def has_free(monkeypatch: pytest.MonkeyPatch, nbytes: int | None) -> None:
    monkeypatch.setattr(cext.system, "free_bytes", lambda swap=True: nbytes)


def free_for(room: int) -> int:
    """So much that is free that this is left beside the margin."""
    return next(free for free in range(room, 2 * room + 100) if free - residency.margin(free) >= room)


@pytest.mark.parametrize(
    ("left", "kept", "chosen"),
    [
        (1000, 0, None),
        (5000, 100, None),
        (999, 0, 992),
        (1000, 1, 992),
        (500, 100, 393),
        (300, 100, 240),
        (240, 100, 240),
        (239, 0, None),
        (-5, 0, None),
    ],
)
def test_a_budget_is_what_is_left_where_not_all_fits(left: int, kept: int, chosen: int | None) -> None:
    assert residency.choose(NEEDS, left, kept) == chosen


def test_a_draft_head_that_is_not_read_needs_no_room() -> None:
    needs = replace(NEEDS, all=1500)
    assert residency.choose(needs, 1000, 0) is None and residency.choose(needs, 999, 0) == 992


@pytest.mark.parametrize("free", [0, 1000, 100 << 20, GB, 16 * GB, 512 * GB])
def test_the_margin_leaves_most(free: int) -> None:
    kept = residency.margin(free)
    assert free // 16 <= kept <= max(free // 4, 0)
    if free >= GB:
        assert kept >= 256 << 20


def plan_of(counts: Any = None, ram: int | None = 605) -> Plan:
    shape = {"n_expert": 8, "n_expert_used": 2, "n_layer": 3, "n_layer_dense": 1}
    usage = None
    if counts is not None:
        counts = np.vstack([np.zeros((1, 8)), counts]).astype(np.uint64)
        usage = Usage(None, counts, 0, counts)
    return Plan(NEEDS, shape, 10, 700, ram, usage)  # type: ignore[arg-type]


def test_what_a_budget_holds() -> None:
    plan = plan_of()
    assert [plan.held(ram) for ram in (0, 200, 605, 1000, 5000)] == [0, 0, 0.5, 1, 1]
    assert [plan.token_bytes(ram) for ram in (200, 605, 1000)] == [200, 100, 0]
    budgets = plan.budgets()
    assert budgets == sorted(set(budgets)) and budgets[0] == NEEDS.least and budgets[-1] == NEEDS.all


def test_experts_that_are_used_most_count_for_more() -> None:
    usage = np.array([[90, 10, 0, 0, 0, 0, 0, 0], [30, 30, 30, 10, 0, 0, 0, 0]])
    plan = plan_of(usage)
    quarter = NEEDS.shared + NEEDS.slots / 4  # 4 of 16: 0.9 + 0.3 + 0.3 + 0.3 of 2
    assert plan.hits(int(quarter + 1)) == pytest.approx(0.9)
    assert plan.hits(605) == pytest.approx(1.0) and plan.hits(NEEDS.all) == pytest.approx(1.0)
    assert plan_of(np.zeros((2, 8))).hits(605) == 0.5


def test_the_sentence_tells_a_rate_only_where_it_was_measured() -> None:
    plan = plan_of()
    assert "a second" not in plan.sentence(None)
    line = plan.sentence(250.0)
    assert "2.5 times a second" in line and "50 % of the experts" in line and "\n" not in line
    assert "as they were so far" in plan_of(np.ones((2, 8))).sentence(None)


@pytest.mark.parametrize("nbytes", [1, 9999, 10_000, 999_999_999, 10**9, 1_234_567_890, 850_061_234, 77 * 10**9 + 1])
def test_a_size_that_is_told_holds_as_much(nbytes: int) -> None:
    assert nbytes <= parse_size(residency.spelt(nbytes)) <= nbytes * 1.01 + 10**4


def test_where_all_fits_it_is_mapped_and_nothing_is_said(
    tiny_gguf: Callable[[Spec], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, beside = tiny_gguf(SPEC), Beside(256)
    with Model(path) as model:
        taken, needs = beside.nbytes(model), model.needs()
    for free in (None, 1 << 40, free_for(needs.all + taken)):
        has_free(monkeypatch, free)
        model, plan = residency.open_within(path, 2, "auto", beside)
        with model:
            assert plan is None and model.drive_counts() is None
    assert capsys.readouterr().err == ""


def test_what_does_not_fit_gets_what_is_left(
    tiny_gguf: Callable[[Spec], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, beside = tiny_gguf(SPEC), Beside(256)
    with Model(path) as model:
        taken, needs = beside.nbytes(model), model.needs()
        expected = model.session(64).eval(tokens(SPEC, 40)).tobytes()
    free = free_for(taken + needs.long_step + (needs.least + needs.all) // 2)
    has_free(monkeypatch, free)
    model, plan = residency.open_within(path, 2, "auto", beside)
    with model:
        assert plan is not None and plan.ram is not None and needs.least <= plan.ram < needs.all
        assert plan.ram + taken + needs.long_step + residency.margin(free) <= free
        session = model.session(64)
        assert session.eval(tokens(SPEC, 40)).tobytes() == expected
        assert model.drive_counts() is not None
    half, plan = residency.open_within(path, 2, "auto", Beside(256, share=0.999))
    half.close()
    assert plan is not None and plan.free is not None and plan.free < free


def test_what_not_even_the_least_fits_is_mapped_and_said(
    tiny_gguf: Callable[[Spec], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tiny_gguf(SPEC)
    has_free(monkeypatch, 100_000)
    model, plan = residency.open_within(path, 2, "auto", Beside(256))
    with model:
        assert plan is None and model.drive_counts() is None
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "do not fit" in said and "100.00 kB are free" in said


def test_a_budget_of_ones_own(
    tiny_gguf: Callable[[Spec], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, beside = tiny_gguf(SPEC), Beside(256)
    with Model(path) as model:
        needs = model.needs()
    has_free(monkeypatch, 1 << 40)
    with pytest.raises(UsageError, match="at least") as caught:
        residency.open_within(path, 2, needs.least - 1, beside)
    named = parse_size(str(caught.value).split("at least ")[1].split(",")[0])
    with pytest.raises(ArgumentError):
        Model(path, ram=needs.least - 1)
    model, plan = residency.open_within(path, 2, named, beside)
    with model:
        assert plan is not None and plan.ram == named
    for ram in (needs.all, 1 << 50):
        model, plan = residency.open_within(path, 2, ram, beside)
        with model:
            assert plan is None and model.drive_counts() is None
    assert capsys.readouterr().err == ""
    has_free(monkeypatch, needs.least)
    residency.open_within(path, 2, needs.least, beside)[0].close()
    assert "more than the" in capsys.readouterr().err


def test_what_a_gpu_does_not_take_is_opened_once_more_and_never_twice_at_a_time(
    tiny_gguf: Callable[[Spec], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, beside, opened = tiny_gguf(SPEC), Beside(256), list[Model]()

    class Counted(Model):
        def __init__(self, *args: Any, **options: Any) -> None:
            assert not opened, "two are open"
            super().__init__(*args, **options)
            opened.append(self)

        def close(self) -> None:
            super().close()
            if self in opened:
                opened.remove(self)

    with Model(path) as model:
        least = model.needs().least
    nowhere = Layout(Device("vulkan", name="no such card"), (Place("ends", 1),), "nowhere")
    monkeypatch.setattr(residency, "on_gpu", lambda *_, **__: nowhere)
    monkeypatch.setattr(cext, "Model", Counted)
    has_free(monkeypatch, 1 << 40)
    for ram in (least, "all"):
        model, plan, layout = residency.open_placed(path, 2, ram, beside, Wish("auto"))
        with model:
            assert layout is None and (plan.ram if plan else "all") == ram
            assert model.session(64).eval(tokens(SPEC, 5)).shape
    assert capsys.readouterr().err.count("no GPU is used") == 2
    has_free(monkeypatch, least)  # which is scarce, and told once
    residency.open_placed(path, 2, least, beside, Wish("auto"))[0].close()
    said = capsys.readouterr().err
    assert said.count("more than the") == said.count("no GPU is used") == 1


def test_models_together_share_what_is_free(tiny_gguf: Callable[[Spec], Path], tmp_path: Path) -> None:
    first = tiny_gguf(SPEC)
    second = tiny_gguf(Spec("residency_small"))
    one, two = residency.shared_out([first, second], [Beside(), Beside()])
    assert one.share + two.share == pytest.approx(1) and one.share > two.share
    assert residency.shared_out([first], [Beside()])[0].share == 1
    (tmp_path / "none.gguf").write_bytes(b"nothing")
    residency.shared_out([first, tmp_path / "none.gguf"], [Beside(), Beside()])


def test_steps_are_reckoned_as_long_as_chat_makes_them() -> None:
    assert Budget().alone == residency.USUAL_STEP
