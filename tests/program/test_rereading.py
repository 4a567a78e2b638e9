"""A model's file is read again where it lies in small pages and that is worth it, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.page_cache import read_in_small_pages, skip_unless_dropped
from support.tiny import Spec, tokens

from cext import Model, system
from dsv2cli import benchmark, rereading, residency
from dsv2cli.residency import Beside

SPEC = Spec("rereading", seed=31, n_layer=4, n_embd=256, n_ff_expert=256, n_expert=12, n_used=4)
MB = 1 << 20


@pytest.fixture
def path(tiny_gguf: Callable[[Spec], Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model that is large enough."""
    monkeypatch.setattr(rereading, "LEAST_BYTES", MB)
    return tiny_gguf(SPEC)


@pytest.fixture
def again(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """What is read again: nothing truly is."""
    read: list[Path] = []
    monkeypatch.setattr(system, "read_again", read.append)
    return read


@pytest.mark.parametrize(
    ("pages", "rate", "room", "is_read"),
    [
        ((1.0, 0.0), 1e9, None, True),
        ((1.0, 0.4), 1e9, 1 << 40, True),
        ((0.2, 0.0), 1e9, 1 << 40, True),
        ((1.0, 0.6), 1e9, 1 << 40, False),  # half the gain at the whole cost
        ((0.05, 0.0), 1e9, 1 << 40, False),  # what is not there comes as it is to
        ((0.0, 0.0), 1e9, 1 << 40, False),
        (None, 1e9, 1 << 40, False),
        ((1.0, 0.0), None, 1 << 40, False),  # no huge pages here, or another program has it mapped
        ((1.0, 0.0), 1e5, 1 << 40, False),  # a minute and more
        ((1.0, 0.0), 1e9, MB, False),  # it would not stay
    ],
)
def test_where_it_is_worth_it(
    path: Path,
    again: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    pages: tuple[float, float] | None,
    rate: float | None,
    room: int | None,
    is_read: bool,
) -> None:
    monkeypatch.setattr(system, "cached_pages", lambda path, most: pages)
    monkeypatch.setattr(system, "reread_rate", lambda path: rate)
    rereading.renew(path, room)
    said = capsys.readouterr()
    assert again == ([path] if is_read else []) and not said.out
    assert said.err.count("\n") == is_read and (str(path) in said.err) == is_read


def test_a_small_model_is_not_looked_into(path: Path, again: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rereading, "LEAST_BYTES", path.stat().st_size + 1)
    monkeypatch.setattr(system, "cached_pages", lambda path, most: 1 / 0)
    rereading.renew(path, None)
    assert not again


@pytest.mark.parametrize("data", [b"", b"GGUF", b"no model" * 100, None])
def test_who_opens_a_file_tells_what_is_wrong_with_it(tmp_path: Path, data: bytes | None) -> None:
    if data is not None:
        (tmp_path / "m.gguf").write_bytes(data)
    rereading.renew(tmp_path / "m.gguf", None)


def test_parts_that_lie_in_small_pages_are_read(
    path: Path, again: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Those alone, and of their sizes is what is told."""
    parts = [tmp_path / f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    for i, part in enumerate(parts):
        part.write_bytes(bytes(MB << i))
    monkeypatch.setattr("cext.gguf.Gguf.paths", property(lambda _: list(map(str, parts))))
    monkeypatch.setattr(system, "cached_pages", lambda path, most: (1.0, float(path == parts[1])))
    tried: list[Path] = []
    monkeypatch.setattr(system, "reread_rate", lambda path: tried.append(path) or 1e9)
    rereading.renew(path, None)
    assert again == [parts[0], parts[2]] and tried == [parts[2]]
    assert "5.24 MB" in capsys.readouterr().err


@pytest.mark.parametrize("error", [OSError("an input/output error"), KeyboardInterrupt()])
def test_a_model_is_opened_where_reading_fails_and_closed_where_it_is_stopped(
    path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fails(path: Path) -> None:
        raise error

    closed: list[Model] = []
    close = Model.close
    monkeypatch.setattr(Model, "close", lambda self: (closed.append(self), close(self))[1])
    monkeypatch.setattr(system, "cached_pages", lambda path, most: (1.0, 0.0))
    monkeypatch.setattr(system, "reread_rate", lambda path: 1e9)
    monkeypatch.setattr(system, "read_again", fails)
    if isinstance(error, OSError):
        residency.open_within(path, 2, "all", Beside(256))[0].close()
    else:
        with pytest.raises(KeyboardInterrupt):
            residency.open_within(path, 2, "all", Beside(256))
    assert len(closed) == 1


def test_within_a_budget_nothing_is_read_again(path: Path, again: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache is not where weights come from."""
    monkeypatch.setattr(system, "cached_pages", lambda path, most: (1.0, 0.0))
    monkeypatch.setattr(system, "reread_rate", lambda path: 1e9)
    with Model(path) as model:
        least = model.needs().least
    residency.open_within(path, 2, least, Beside(256))[0].close()
    assert not again
    residency.open_within(path, 2, "all", Beside(256))[0].close()
    assert again == [path]


@pytest.mark.parametrize(
    ("engine", "ram", "gpu", "n"),
    [("dsv2", "all", "off", 1), ("dsv2", "auto", "off", 1), ("dsv2", "1G", "off", 0), ("dsv2", "all", "auto", 0),
     ("llama.cpp", "all", "off", 0)],
)  # fmt: skip
def test_bench_reads_again_before_it_measures_loading(
    path: Path, monkeypatch: pytest.MonkeyPatch, engine: str, ram: str, gpu: str, n: int
) -> None:
    """And where its line is seen: what its processes say is not."""
    seen: list[Path] = []

    def begins(*_: object, **__: object) -> None:
        raise RuntimeError("a process begins")

    monkeypatch.setattr(rereading, "renew", lambda path, room: seen.append(path))
    monkeypatch.setattr(benchmark, "contender", begins)
    with pytest.raises(RuntimeError, match="begins"):
        benchmark.run(path, benchmark.tests(0, 4, [0]), threads=1, rounds=1, engine=engine, ram=ram, gpu=gpu)
    assert len(seen) == n


def test_a_model_in_small_pages_is_opened_in_huge_ones(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Truly, where kernel and file system have them; and it is told once."""
    skip_unless_dropped(path.parent)
    with path.open("rb") as file:
        system.sync_and_drop(file.fileno())
    system.read_again(path)
    if (system.cached_pages(path) or (0.0, 0.0))[1] < 0.9:
        pytest.skip("huge pages do not hold a file here")
    with Model(path) as model:
        expected = model.session(64).eval(tokens(SPEC, 40))
    read_in_small_pages(path)
    assert rereading.is_slow(path)
    for n in (1, 0):
        model, _ = residency.open_within(path, 2, "auto", Beside(256))
        with model:
            assert not rereading.is_slow(path)
            np.testing.assert_array_equal(model.session(64).eval(tokens(SPEC, 40)), expected)
        assert capsys.readouterr().err.count("small pages") == n
