"""Routed experts that come and go on a GPU: which ones are there, what that costs, and that answers are the same."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.gpu import device, number
from support.logits import assert_close
from support.tiny import SPECS, Checkpoint, Spec, gguf_metadata, gguf_tensors, gguf_vocabulary, variant, write_tensors

import cext
from cext import Device, Model, Place
from cext.model import HotExperts

SPEC = variant(SPECS[0], n_layer=4, n_expert=32, n_used=4, n_vocab=200)
MOE = range(SPEC.n_layer_dense, SPEC.n_layer)
SLOT = 3 * 16384  # bytes: matrices of 10,240, rounded as reads of a drive are
BAR = 1e-4  # of the logits' range
INSERTS = 2  # a step


def skewed(path: Path, sigma: float, spec: Spec = SPEC) -> Path:
    """A model whose routers prefer some experts, as trained ones do: tests/bench/skew_routers.py."""
    tensors, rng = gguf_tensors(Checkpoint(spec)), np.random.default_rng(3)
    for name, w in tensors.items():
        if "ffn_gate_inp" in name:
            tensors[name] = (w * np.exp(sigma * rng.standard_normal((len(w), 1)))).astype(np.float32)
    return write_tensors(path, gguf_metadata(spec) | gguf_vocabulary(spec.n_vocab), tensors)


@contextmanager
def opened(path: Path, slots: int, spec: Spec = SPEC, **options: Any) -> Iterator[Model]:
    layers, moe = range(spec.n_layer), range(spec.n_layer_dense, spec.n_layer)
    placement = [Place("ends", 1), Place("attention", 1, layers), Place("feed_forward", 1, layers)]
    placement += [Place("experts", 0, moe, range(spec.n_expert))]
    given = {name: options.pop(name) for name in ("memory", "copies") if name in options}
    gpu = Device("vulkan", name=number(), hot=slots * SLOT, **given)
    with Model(path, threads=2, devices=[gpu], placement=placement, **options) as model:
        yield model


def decode(model: Model, session: cext.Session, ids: Any) -> tuple[list[Any], HotExperts]:
    """The logits of tokens one by one, and what became of experts meanwhile; the last one's are not counted yet."""
    model.watch(1, times=False)
    logits = [session.eval([i]) for i in ids]
    return logits, model.watched(1).hot


def tokens(n: int, seed: int = 1) -> Any:
    return np.random.default_rng(seed).integers(0, SPEC.n_vocab, n)


def test_experts_that_are_chosen_often_come_and_stay(tmp_path: Path) -> None:
    """From the first ones of each layer to those that skewed routers prefer; even ones leave little to gain."""
    rates = {}
    for name, sigma in (("skewed", 1.5), ("even", 0.0)):
        with opened(skewed(tmp_path / f"{name}.gguf", sigma), 24) as model:
            session = model.session(512)
            _, first = decode(model, session, tokens(12))
            decode(model, session, tokens(130, 2))
            _, last = decode(model, session, tokens(60, 3))
        assert first.slots == 24 and first.chosen == 11 * len(MOE) * SPEC.n_used  # the last token is not looked at yet
        assert 0 < first.uploads <= INSERTS * 12 and first.nbytes == SLOT * first.uploads
        assert first.rate is not None and last.rate is not None
        rates[name] = (first.rate, last.rate, last.uploads / last.tokens)
    assert rates["skewed"][1] > rates["skewed"][0] + 0.2 and rates["skewed"][1] > 0.6
    assert rates["skewed"][1] > rates["even"][1] + 0.2
    assert rates["skewed"][2] < 1  # what is good stays


def test_answers_are_the_processors_wherever_experts_are(tmp_path: Path) -> None:
    path, ids = skewed(tmp_path / "m.gguf", 1.0), tokens(140)
    with Model(path, threads=2) as processor, opened(path, 20) as model:
        exact, session = processor.session(400, "f32"), model.session(400, "f32")
        assert_close(session.eval(ids[:30], "all"), exact.eval(ids[:30], "all"), BAR)
        for i in range(30, 90):
            assert_close(session.eval(ids[i : i + 1]), exact.eval(ids[i : i + 1]), BAR)
        assert model.watched(1).hot.uploads > 10
        for n in (2, 16, 17, 9):  # drafts, and pieces of prompts
            assert_close(session.eval(ids[90 : 90 + n], "all"), exact.eval(ids[90 : 90 + n], "all"), BAR)
        both = [(s.fork(50), ids[3:4]) for s in (session, session)], [(s.fork(50), ids[3:4]) for s in (exact, exact)]
        assert_close(cext.eval_batch(both[0]), cext.eval_batch(both[1]), BAR)
        uses, expected = model.expert_uses().astype(int), processor.expert_uses().astype(int)
    assert (uses.sum(1) == expected.sum(1)).all()
    assert np.abs(uses - expected).sum() <= 8  # near choices may go either way


def test_the_same_steps_give_the_same_bits(tmp_path: Path) -> None:
    """Where what prompts have copied is not chosen by the time that it takes."""
    path, ids = skewed(tmp_path / "m.gguf", 1.5), tokens(80)
    runs = []
    for _ in range(2):
        with opened(path, 16, copies="never") as model:
            session = model.session(200)
            session.eval(ids[:20])
            logits, hot = decode(model, session, ids[20:])
            runs.append((np.stack(logits), hot))
    assert runs[0][1] == runs[1][1] and runs[0][1].uploads > 5
    np.testing.assert_array_equal(runs[0][0], runs[1][0])


def test_prompts_move_nothing(tmp_path: Path) -> None:
    with opened(skewed(tmp_path / "m.gguf", 1.5), 16) as model:
        session = model.session(600)
        model.watch(1, times=False)
        for seed in range(4):
            session.eval(tokens(100, seed))
        hot = model.watched(1).hot
        assert (hot.tokens, hot.chosen, hot.uploads) == (0, 0, 0)
        _, hot = decode(model, session, tokens(9))
        assert (hot.tokens, hot.chosen) == (8, 8 * len(MOE) * SPEC.n_used) and hot.uploads <= INSERTS * 9


def test_it_begins_with_those_that_were_used(tmp_path: Path) -> None:
    """What a token chose, told beforehand, is all there; told otherwise, none of it is."""
    path = skewed(tmp_path / "m.gguf", 0.5)
    with Model(path, threads=2) as model:
        model.session(8).eval([7])
        uses = model.expert_uses()
    chosen = int(uses.sum())
    unused = np.zeros_like(uses)
    unused[list(MOE)] = uses[list(MOE)] == 0
    assert chosen == len(MOE) * SPEC.n_used
    for told, held in ((uses, chosen), (unused, 0)):
        with opened(path, chosen, uses=told) as model:
            _, hot = decode(model, model.session(8), [7, 7])
            assert (hot.chosen, hot.held) == (chosen, held)


def test_all_of_it_is_within_the_budget(tmp_path: Path) -> None:
    path = skewed(tmp_path / "m.gguf", 1.0)
    with opened(path, 40, copies="never") as model:
        session = model.session(600)
        session.eval(tokens(500))
        decode(model, session, tokens(20))
        most = model.watched(1).memory_most
    with opened(path, 40, copies="never", memory=most) as model:
        session = model.session(600)
        session.eval(tokens(500))
        decode(model, session, tokens(20))
        assert model.watched(1).memory_most == most
    with pytest.raises(cext.OutOfMemoryError, match="it was given"), opened(path, 40, memory=30 * SLOT):
        pass


def test_it_is_closed_while_experts_are_on_their_way(tmp_path: Path) -> None:
    path = skewed(tmp_path / "m.gguf", 1.5)
    for n in (1, 2, 3, 4):
        with opened(path, 4) as model:
            decode(model, model.session(8), tokens(n))


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    path, layers = skewed(tmp_path / "m.gguf", 1.0), range(SPEC.n_layer)
    experts = Place("experts", 0, MOE, range(SPEC.n_expert))
    gpu, whole = Device("vulkan", name=number(), hot=8 * SLOT), [Place("feed_forward", 1, layers), experts]
    for placement in ([], [Place("feed_forward", 1, layers)], [Place("feed_forward", 1, range(2)), experts]):
        with pytest.raises(cext.ArgumentError, match="come and go on a GPU"):
            Model(path, devices=[gpu], placement=placement)
    with Model(path) as model:
        least = model.needs().least
    with pytest.raises(cext.EngineError, match=r"come and go on a GPU|from the drive"):
        Model(path, devices=[gpu], placement=whole, ram=least)
    with pytest.raises(cext.ArgumentError, match="bytes for routed experts"):
        Model(path, devices=[Device("vulkan", name=number(), hot=100)], placement=whole)
    with pytest.raises(cext.ArgumentError, match="uses of 3 experts"), opened(path, 8, uses=np.ones(3, np.uint64)):
        pass


def test_more_room_than_there_are_experts(tmp_path: Path) -> None:
    with opened(skewed(tmp_path / "m.gguf", 1.0), 1000) as model:
        _, hot = decode(model, model.session(32), tokens(12))
        assert hot.slots == len(MOE) * SPEC.n_expert and hot.rate == 1 and hot.uploads == 0


def test_experts_of_two_sizes(tmp_path: Path) -> None:
    """Each size has slots of its own."""
    if device()["kind"] != "software":
        pytest.skip("what is held is the same on any device")
    tensors = gguf_tensors(Checkpoint(SPEC))
    tensors = {name: w.astype(np.float16) if "blk.2." in name and "_exps" in name else w for name, w in tensors.items()}
    path = write_tensors(tmp_path / "m.gguf", gguf_metadata(SPEC) | gguf_vocabulary(SPEC.n_vocab), tensors)
    ids = tokens(60)
    with Model(path, threads=2) as processor, opened(path, 12) as model:
        exact, session = processor.session(100, "f32"), model.session(100, "f32")
        for i in range(60):
            assert_close(session.eval(ids[i : i + 1]), exact.eval(ids[i : i + 1]), BAR)
        assert model.watched(1).hot.uploads > 0
