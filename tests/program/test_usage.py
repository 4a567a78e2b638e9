"""What a run learns of a model's experts seeds the next one, and is never in its way."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from numpy.typing import NDArray
from support.cli import dsv2
from support.tiny import Checkpoint, Spec, gguf_metadata, gguf_tensors, gguf_vocabulary, write_tensors

import cext
from dsv2cli import runtime, usage
from dsv2cli.runtime import Wishes

SPEC = Spec("usage", n_layer=3, n_expert=8, n_used=3, n_ff_expert=160)
SIZE = (SPEC.n_layer, SPEC.n_expert)


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state" / "dsv2" / "usage"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return calibrated(tmp_path / "model.gguf", [0] * 8 + [1] * 8 + [5, 0, 0, 0, 0, 0, 0, 10])


def calibrated(path: Path, counts: object) -> Path:
    keys = gguf_metadata(SPEC) | gguf_vocabulary(SPEC.n_vocab)
    if counts is not None:
        keys["dsv2.expert_usage"] = counts
    return write_tensors(path, keys, gguf_tensors(Checkpoint(SPEC)))


def run(path: Path, n: int = 20) -> NDArray[np.uint64]:
    """Tokens through a model whose experts do not all fit."""
    with cext.Model(path) as whole:
        ram = whole.nbytes - 1
    with runtime.open_model(path, 1, Wishes(ram=ram, told=False)) as opened:
        opened.model.session(64).eval(np.arange(n) % SPEC.n_vocab)
        counted = cast(cext.Model, opened.model).expert_uses()
    return counted


def test_what_was_learnt_adds_to_the_calibration(state: Path, model: Path) -> None:
    begun = usage.known(model)
    assert begun is not None and begun.tokens == 0 and not begun.learnt.any()
    prior = begun.counts.astype(float)
    assert prior[0].sum() == 0
    assert set(prior[1]) == {usage.PRIOR_TOKENS * SPEC.n_used / 8}
    assert prior[2, 7] == 2 * prior[2, 0] == pytest.approx(usage.PRIOR_TOKENS * SPEC.n_used * 2 / 3)
    first = run(model)
    second = run(model, 7)
    then = usage.known(model)
    assert then is not None and then.tokens == 27
    np.testing.assert_array_equal(then.learnt, first + second)
    np.testing.assert_array_equal(then.counts, then.learnt + begun.counts)
    [file] = state.iterdir()
    assert file.stat().st_mode & 0o077 == 0


def test_the_engine_is_given_it(state: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(model)
    known, given = usage.known(model), []

    class Seen(cext.Model):
        def __init__(self, *args: object, **options: object) -> None:
            given.append(options.get("uses"))
            super().__init__(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(cext, "Model", Seen)
    with runtime.open_model(model, 1, Wishes(told=False)):
        pass
    run(model)
    assert given[0] is None, "all weights are in memory"
    assert known is not None
    np.testing.assert_array_equal(given[-1], known.counts)


def test_a_copy_is_the_same_model_and_another_is_not(state: Path, model: Path, tmp_path: Path) -> None:
    run(model)
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(model.read_bytes())
    other = calibrated(tmp_path / "other.gguf", [0] * 8 + [1] * 8 + [5, 0, 0, 0, 0, 0, 1, 9])
    for path, tokens in ((copy, 20), (other, 0)):
        found = usage.known(path)
        assert found is not None and found.tokens == tokens


@pytest.mark.parametrize(
    "told", [None, "much", [1] * 23, [-1] * 24, ["a"] * 24, [1.5] * 24], ids=lambda told: str(told)[:12]
)
def test_a_calibration_that_says_nothing(state: Path, tmp_path: Path, told: object) -> None:
    found = usage.known(calibrated(tmp_path / "m.gguf", told))
    assert found is not None and not found.counts.any()


def test_what_is_no_model_of_experts_is_not_known(state: Path, tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("GGUF?")
    assert usage.known(tmp_path / "text.gguf") is None
    assert usage.known(tmp_path / "absent.gguf") is None


def flip(content: bytes) -> bytes:
    return content[:50] + bytes([content[50] ^ 1]) + content[51:]


@pytest.mark.parametrize(
    "damage", [flip, lambda c: c[:-1], lambda c: c + b"\0", lambda c: b"", lambda c: b"\0" * len(c)]
)
def test_damage_is_ignored_and_mended(state: Path, model: Path, damage: Callable[[bytes], bytes]) -> None:
    run(model)
    [file] = state.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    found = usage.known(model)
    assert found is not None and found.tokens == 0 and not found.learnt.any()
    run(model, 5)
    found = usage.known(model)
    assert found is not None and found.tokens == 5


def test_a_layout_of_another_size_is_not_read(state: Path, model: Path) -> None:
    run(model)
    [file] = state.iterdir()
    turned = np.ones(SIZE[::-1], np.uint64)
    usage._write(file, turned, 9)
    found = usage.known(model)
    assert found is not None and found.tokens == 0


@pytest.mark.parametrize("where", ["file", "home"])
def test_nowhere_to_write_fails_no_run(where: str, state: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if where == "file":
        state.parent.parent.mkdir(parents=True)
        state.parent.write_text("no folder")
    else:
        monkeypatch.delenv("XDG_STATE_HOME")
        monkeypatch.delenv("HOME", raising=False)
        monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    assert run(model).any()


def test_old_runs_fade_and_old_models_go(state: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage, "MOST_TOKENS", 30)
    monkeypatch.setattr(usage, "KEPT", 2)
    first, second = run(model), run(model)
    found = usage.known(model)
    assert found is not None and found.tokens == 20
    np.testing.assert_array_equal(found.learnt, (first + second) // 2)
    for name in ("a", "b", "c"):
        (state / name).write_bytes(b"")
    run(model)
    assert len(list(state.iterdir())) == 2
    assert (found.file or state).exists()


def test_a_chat_leaves_it_to_the_next(tmp_path: Path) -> None:
    ask = ("chat", "-p", "Tell me a story.", "-n", "4", "--seed", "3", "--json")
    answers = [json.loads(dsv2(*ask, "--ram", "20M", XDG_STATE_HOME=str(tmp_path)).stdout)["answer"] for _ in range(2)]
    assert answers[0] == answers[1]
    [file] = (tmp_path / "dsv2" / "usage").iterdir()
    dsv2(*ask, XDG_STATE_HOME=str(tmp_path))
    assert [file] == list((tmp_path / "dsv2" / "usage").iterdir())
