"""``Model.settle``: weights that move from their file to huge pages of memory while they are read."""

from __future__ import annotations

import os
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.tiny import spec_named, variant, write_gguf

import cext
from cext import _engine, system
from cext.model import SETTLED

PACKAGED = next((Path(__file__).parents[2] / "dsv2cli/models").glob("*.gguf"))
IDS = np.arange(5, 37, dtype=np.int32)

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mremap is Linux's")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packaged model, in a file that may be changed; of many huge pages."""
    return Path(shutil.copy(PACKAGED, tmp_path_factory.mktemp("settle") / "demo.gguf"))


def mapped_bytes(path: Path) -> int:
    """Of a file, in this process."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    spans = [line.split()[0].split("-") for line in lines if line.endswith(str(path))]
    return sum(int(end, 16) - int(begin, 16) for begin, end in spans)


def test_the_same_sums_before_meanwhile_and_after(path: Path) -> None:
    with cext.Model(path, threads=2) as model:
        session, moved = model.session(64), list[int]()
        before = session.eval(IDS)
        thread = threading.Thread(target=lambda: moved.append(model.settle()))
        thread.start()
        for _ in range(3):
            session.rewind(0)
            assert np.array_equal(session.eval(IDS), before)
        thread.join()
        assert moved == [path.stat().st_size]
        assert mapped_bytes(path) < 2 * system.HUGE_PAGE  # what shares its huge page with something else
        session.rewind(0)
        assert np.array_equal(session.eval(IDS), before)
        assert model.settle() == path.stat().st_size  # once more changes nothing
        session.rewind(0)
        assert np.array_equal(session.eval(IDS), before)
    assert mapped_bytes(path) == 0


def test_it_is_in_memory_of_its_own(path: Path) -> None:
    with cext.Model(path, threads=1) as model:
        before = system.small_file_bytes()
        model.settle()
        own = dict(line.split()[:2] for line in Path("/proc/self/status").read_text().splitlines() if "Rss" in line)
        assert int(own["RssAnon:"]) << 10 > path.stat().st_size - 2 * system.HUGE_PAGE
        assert before is None or (system.small_file_bytes() or 0) <= before + system.HUGE_PAGE


def test_pieces(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as are asked for, and none after stop."""
    monkeypatch.setattr("cext.model.SETTLED", 3 * system.HUGE_PAGE)
    size = path.stat().st_size
    with cext.Model(path, threads=1) as model:
        asked: list[int] = []
        assert model.settle(lambda: len(asked) == 2 or bool(asked.append(1))) == 6 * system.HUGE_PAGE
        left = mapped_bytes(path)
        assert size - 6 * system.HUGE_PAGE <= left <= size - 5 * system.HUGE_PAGE + 4096
        assert model.settle() == size
        assert _engine.model_settle(model._handle, size, SETTLED) == size
        with pytest.raises(ValueError, match="-1"):
            _engine.model_settle(model._handle, -1, SETTLED)


def test_small_files_and_parts_of_them_stay(tmp_path: Path) -> None:
    small = write_gguf(tmp_path / "m.gguf", variant(spec_named("lite"), n_layer=2))
    with cext.Model(small, threads=1) as model:
        before = model.session(16).eval([1, 2])
        assert model.settle() == small.stat().st_size
        assert np.array_equal(model.session(16).eval([1, 2]), before)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def touch(path: Path) -> None:
    os.utime(path, (0, 0))


@pytest.mark.parametrize("change", [cut, touch])
def test_a_file_that_has_changed_is_told(path: Path, tmp_path: Path, change: Callable[[Path], None]) -> None:
    copy = Path(shutil.copy(path, tmp_path / "copy.gguf"))
    with cext.Model(copy, threads=1) as model:
        change(copy)
        with pytest.raises(cext.FileError, match=r"copy\.gguf"):
            model.settle()


def test_within_a_budget_nothing_is_mapped(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", variant(spec_named("lite"), n_layer=2))
    with cext.Model(path, threads=1) as model:
        least = model.needs().least
    with cext.Model(path, threads=1, ram=least) as model, pytest.raises(cext.UnsupportedError, match="not mapped"):
        model.settle()


def test_a_closed_model(path: Path) -> None:
    model = cext.Model(path, threads=1)
    model.close()
    with pytest.raises(cext.ArgumentError):
        model.settle()
