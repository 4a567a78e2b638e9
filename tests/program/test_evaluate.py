"""Scoring a text piece by piece: the figures of whole windows to the last bit, in bounded memory; and contexts that do
not fit in the memory that is free."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from support.tiny import spec_named, variant
from support.vocab import write_model

import cext
from dsv2cli import app, contender, evaluate, memory, runtime
from dsv2cli.errors import CliError
from quantize.measure import score

SPEC = variant(spec_named("lite"), n_ctx=8192)
LONG = 2 * evaluate.PIECE + 300


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("evaluate") / "tiny.gguf", SPEC)


@pytest.fixture(scope="module")
def opened(path: Path) -> Iterator[runtime.Runtime]:
    with runtime.open_model(path, 2) as made:
        yield made


@pytest.fixture(scope="module")
def text() -> str:
    return "".join("abcdefghijklmnopqrstuvwxyz"[i] for i in np.random.default_rng(3).integers(0, 26, 12000))


def whole(session: cext.Session, window: NDArray[np.int32], skip: int) -> tuple[list[NDArray[np.float64]], np.ndarray]:
    """(log-probabilities of ROWS scored positions at a time, targets), of a window whose logits are held at once."""
    session.rewind(0)
    logits = session.eval(window, "all")[skip:-1].astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return [logits[i : i + score.ROWS] for i in range(0, len(logits), score.ROWS)], window[skip + 1 :]


WINDOWS = [64, evaluate.PIECE, evaluate.PIECE + 1, LONG]
SKIPS = [0, 7, evaluate.PIECE - 1, evaluate.PIECE + 5, LONG - 2]


@pytest.mark.parametrize(("n_ctx", "skip"), [(n, skip) for n in WINDOWS for skip in SKIPS if skip < n - 1])
def test_the_figures_of_whole_windows(opened: runtime.Runtime, text: str, n_ctx: int, skip: int) -> None:
    found = evaluate.evaluate(opened, text, n_ctx, skip=skip, max_windows=2, reference=opened, reference_kv="f32")
    alone = evaluate.evaluate(opened, text, n_ctx, skip=skip, max_windows=2)
    sessions = [opened.model.session(n_ctx, kv_type) for kv_type in ("f16", "f32")]
    nll, kld, tops = [], [], []
    for window in evaluate.cut(opened, text, n_ctx)[:2]:
        (mine, targets), (theirs, _) = (whole(session, window, skip) for session in sessions)
        sums = [rows[np.arange(len(rows)), targets[i * 64 :][:64]].sum() for i, rows in enumerate(mine)]
        nll.append(-sum(float(s) for s in sums))
        kld += [x for p, q in zip(mine, theirs, strict=True) for x in (np.exp(q) * (q - p)).sum(axis=1).tolist()]
        tops += [x for p, q in zip(mine, theirs, strict=True) for x in (p.argmax(axis=1) == q.argmax(axis=1)).tolist()]
    assert found.n_scored == alone.n_scored == 2 * (n_ctx - skip - 1) == len(kld)
    assert found.nll == alone.nll == sum(nll) / len(kld)
    assert found.reference is not None and found.reference.kld_mean == np.mean(kld)
    assert found.reference.kld_max == max(kld) and found.reference.top1 == np.mean(tops)
    assert found.reference.routing is not None and 0.9 < found.reference.routing <= 1


def test_routing_counts_every_piece(opened: runtime.Runtime, text: str) -> None:
    """A model beside itself agrees with itself, over all layers and scored positions."""
    window = evaluate.cut(opened, text, LONG)[0]
    sessions = [opened.model.session(LONG) for _ in range(2)]
    found = evaluate._score(*sessions, window, 5)
    n_layers = SPEC.n_layer - SPEC.n_layer_dense
    assert found.n_routed == found.n_routed_alike == (LONG - 6) * n_layers * SPEC.n_used


@pytest.mark.parametrize("with_reference", [False, True])
def test_a_longer_window_takes_no_more_memory(opened: runtime.Runtime, text: str, with_reference: bool) -> None:
    def peak(n_ctx: int) -> int:
        tracemalloc.start()
        reference = opened if with_reference else None
        evaluate.evaluate(opened, text, n_ctx, max_windows=1, reference=reference, reference_kv="f16")
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(64)
    logits = 4 * opened.model.hparams["n_vocab"] * evaluate.PIECE
    assert peak(8 * evaluate.PIECE) < peak(2 * evaluate.PIECE) + 0.7 * logits


def test_values_that_are_no_numbers_late_in_a_window(
    opened: runtime.Runtime, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = cext.Session.eval

    def damaged(session: cext.Session, ids: NDArray[np.int32], *args: object, **options: object) -> object:
        logits = usual(session, ids, *args, **options)  # type: ignore[arg-type]
        if session.n_past > evaluate.PIECE:
            logits[3] = np.nan
        return logits

    monkeypatch.setattr(cext.Session, "eval", damaged)
    with pytest.raises(CliError, match="not numbers"):
        evaluate.evaluate(opened, text, LONG)


# Memory that is free.


def has_free(monkeypatch: pytest.MonkeyPatch, n_bytes: int | None) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda: n_bytes)


def test_what_fits_is_not_spoken_of(opened: runtime.Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    session = opened.model.session(4096)
    all_in_all = session.kv_bytes + opened.model.step_bytes(64) + 100
    for free in (None, all_in_all, 1 << 40):
        has_free(monkeypatch, free)
        assert memory.need([session], 64, 100) is None
    has_free(monkeypatch, all_in_all - 1)
    assert memory.need([session], 64, 100) is not None


@pytest.mark.parametrize("kv_type", ["f32", "f16", "q8_0"])
def test_the_context_that_is_proposed_fits(
    opened: runtime.Runtime, monkeypatch: pytest.MonkeyPatch, kv_type: cext.model.KvType
) -> None:
    sessions = [opened.model.session(4096, kv_type) for _ in range(2)]
    step = opened.model.step_bytes(512)  # once, however many sessions
    has_free(monkeypatch, sessions[0].kv_bytes + step + 5000)
    problem = memory.need(sessions, 512, 5000)
    assert problem is not None
    message, hint = problem
    assert "4096 tokens" in message and "are free" in message
    assert "a context of 2048 fits" in hint
    assert memory.need([opened.model.session(2048, kv_type) for _ in range(2)], 512, 5000) is None
    has_free(monkeypatch, 10)
    assert (memory.need(sessions, 512, 5000) or ("", ""))[1].startswith("a smaller context")


@pytest.mark.parametrize(("rank", "rope", "less"), [(512, 64, True), (SPEC.kv_lora_rank, SPEC.rope, False)])
def test_the_coarser_cache_is_proposed_where_it_takes_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int, rope: int, less: bool
) -> None:
    has_free(monkeypatch, 10)
    with cext.Model(write_model(tmp_path / "m.gguf", variant(SPEC, kv_lora_rank=rank, rope=rope))) as model:
        usual, coded = model.session(256), model.session(256, "q8_0")
        assert (coded.kv_bytes < usual.kv_bytes) == less
        problem, coarse = memory.need([usual], 1), memory.need([coded], 1)
    assert problem is not None and coarse is not None
    assert ("--kv q8_0 takes" in problem[1]) == less and "--kv" not in coarse[1]


def test_chat_warns_and_perplexity_refuses(
    path: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text(text)
    has_free(monkeypatch, 1000)
    assert app.run(["chat", str(path), "-p", "Hi", "-n", "1", "--json", "-c", "512"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["answer_tokens"] <= 1
    assert "a context of 512 tokens takes" in err and "1.00 kB of memory are free" in err
    assert app.run(["perplexity", str(path), "--text", str(tmp_path / "text.txt"), "-c", "512", "-q"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and "error: a context of 512 tokens takes" in err and "hint: " in err


def test_what_a_step_takes(opened: runtime.Runtime) -> None:
    """What the engine claims grows with the step, and covers what the rows of one step are known to be."""
    taken = [opened.model.step_bytes(n) for n in (1, 2, 64, 1000, cext.MAX_STEP)]
    assert taken == sorted(taken) and taken[3] == taken[4]  # by powers of two
    hparams = opened.model.hparams
    experts = hparams["n_expert_used"] * (2 * hparams["n_ff_expert"] + hparams["n_embd"])
    assert taken[4] > 4 * cext.MAX_STEP * (3 * hparams["n_embd"] + experts)
    for n in (0, -1, cext.MAX_STEP + 1):
        with pytest.raises(ValueError, match="a step of"):
            opened.model.step_bytes(n)


def test_bench_refuses(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, _ = contender.load("dsv2", path, 300, 1)
    for kv in ("f16", "q8_0"):
        has_free(monkeypatch, 1000)
        with pytest.raises(CliError, match="a context of 300 tokens takes"):
            engine.select(f"kv={kv}", 1)
        has_free(monkeypatch, 1 << 30)
        engine.select(f"kv={kv}", 2)
        engine.fill(np.zeros(300, np.int32))
