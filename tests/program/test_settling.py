"""settling.py: when weights move to huge pages of memory, and that the thread which does so ends with the model."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.tiny import spec_named, variant
from support.vocab import write_model

from cext import FileError, UnsupportedError, system
from cext.model import WeightNeeds
from dsv2cli import contender, runtime, settling
from dsv2cli.engines.choice import OURS
from dsv2cli.runtime import Wishes

GB = 10**9


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("settling") / "tiny.gguf", variant(spec_named("lite"), n_layer=2))


@dataclass
class Weights:
    """Of 10 GB, a piece each until it is stopped."""

    fault: Exception | None = None
    moved: int = 0

    def needs(self) -> WeightNeeds:
        return WeightNeeds(10 * GB, 0, 0, 0, 0, 0)

    def settle(self, stop: object) -> int:
        if self.fault is not None:
            raise self.fault
        self.moved += 1
        assert callable(stop)
        while not stop():
            threading.Event().wait(0.01)
        return GB


def machine(monkeypatch: pytest.MonkeyPatch, free: int | None, small: int | None) -> None:
    monkeypatch.setattr(system, "free_bytes", lambda swap: free)
    monkeypatch.setattr(system, "small_file_bytes", lambda: small)


@pytest.mark.parametrize(
    ("free", "small", "pays"),
    [
        (24 * GB, 2 * GB, True),
        (24 * GB, GB // 4, False),  # its pages are huge
        (21 * GB, 2 * GB, False),  # the copy would push the file out, or others
        (None, 2 * GB, False),
        (24 * GB, None, False),
    ],
)
def test_when_it_pays(monkeypatch: pytest.MonkeyPatch, free: int | None, small: int | None, pays: bool) -> None:
    machine(monkeypatch, free, small)
    assert settling.pays(Weights()) == pays  # type: ignore[arg-type]
    monkeypatch.setattr(settling, "LEAST", 11 * GB)
    assert not settling.pays(Weights())  # type: ignore[arg-type]


def test_a_thread_that_is_begun_once_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, 24 * GB, 2 * GB)
    model = Weights()
    thread = settling.Settling(model)  # type: ignore[arg-type]
    thread.begin()
    thread.begin()
    thread.end()
    assert model.moved == 1
    assert not any(t.name == "settling" for t in threading.enumerate())
    settling.Settling(model).end()  # type: ignore[arg-type]
    assert model.moved == 1


@pytest.mark.parametrize("fault", [UnsupportedError("no"), FileError("changed")])
def test_what_cannot_be_moved_stays(monkeypatch: pytest.MonkeyPatch, fault: Exception) -> None:
    machine(monkeypatch, 24 * GB, 2 * GB)
    model = Weights(fault)
    thread = settling.Settling(model)  # type: ignore[arg-type]
    thread.begin()
    thread.end()
    if isinstance(fault, UnsupportedError):
        assert settling.settle(model) == 0  # type: ignore[arg-type]
    else:
        with pytest.raises(FileError):
            settling.settle(model)  # type: ignore[arg-type]


@pytest.mark.parametrize(("wishes", "settles"), [(Wishes(OURS, ram="auto"), True), (Wishes(OURS, ram="all"), False)])
def test_asked_for_the_mapping_it_stays(path: Path, wishes: Wishes, settles: bool) -> None:
    with runtime.open_model(path, 1, wishes) as opened:
        assert (opened.settling is not None) == settles
        opened.settle()


def test_a_benchmark_settles_first(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settling, "pays", lambda model: True)
    engine, _ = contender.load("dsv2", path, 64, 1, "auto")
    assert engine.settle() in (path.stat().st_size, 0)  # 0: a system without a way to
