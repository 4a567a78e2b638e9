"""Arguments of the Python face that mean nothing: a clear ValueError or TypeError, whatever C would make of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.tiny import spec_named, variant
from support.vocab import write_model

import cext
from cext import Device, Place, Sampler
from cext.tokenizer import Tokenizer, TokenizerError

SPEC = variant(spec_named("lite"), n_ctx=64)
HUGE = [1 << 31, 1 << 64, -(1 << 70), 10**5000]
LAYERS = range(1, 2)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("arguments") / "tiny.gguf", SPEC)


@pytest.fixture(scope="module")
def model(path: Path) -> cext.Model:
    return cext.Model(path, threads=1)


NUMBERS: dict[str, Callable[[cext.Model, Any], Any]] = {
    "n_ctx": lambda m, n: m.session(n),
    "threads": lambda m, n: cext.Model(m.path, threads=n),
    "threads of a device": lambda m, n: cext.Model(m.path, devices=[Device(threads=n)]),
    "device": lambda m, n: cext.Model(m.path, devices=[Device()], placement=[Place("attention", n, LAYERS)]),
    "n_ctx of a saved session": lambda m, n: m.load_session("none.session", n_ctx=n),
    "fork": lambda m, n: m.session(8).fork(n),
    "rewind": lambda m, n: m.session(8).rewind(n),
    "repeat": lambda m, n: m.session(8).repeat(n),
    "step_bytes": lambda m, n: m.step_bytes(n),
    "n_logits": lambda m, n: cext.eval_batch([(m.session(8), [1])], [n]),
    "token ids": lambda m, n: m.session(8).eval([n]),
    "top_k": lambda m, n: Sampler(top_k=n),
    "repeat_last_n": lambda m, n: Sampler(repeat_last_n=n),
    "accept": lambda m, n: Sampler().accept([n]),
}


@pytest.mark.parametrize("use", NUMBERS)
@pytest.mark.parametrize("number", HUGE, ids=("2^31", "2^64", "-2^70", "10^5000"))
def test_numbers_that_c_has_no_room_for(model: cext.Model, use: str, number: int) -> None:
    with pytest.raises(ValueError, match="expected") as error:
        NUMBERS[use](model, number)
    assert len(str(error.value)) < 200


@pytest.mark.parametrize("use", [use for use in NUMBERS if use != "token ids"])
@pytest.mark.parametrize("number", [1.5, "1", [1]])
def test_what_is_no_whole_number(model: cext.Model, use: str, number: object) -> None:
    with pytest.raises(TypeError, match="expected a whole number"):
        NUMBERS[use](model, number)


@pytest.mark.parametrize("ids", [[1.5], ["a"], [[1], [2, 3]], [[1], [2]], 3, None, [-1], [1 << 40], []])
def test_what_is_no_token_ids(model: cext.Model, ids: Any) -> None:
    session = model.session(8)
    for use in (lambda: session.eval(ids), lambda: cext.eval_batch([(session, ids)])):
        with pytest.raises(ValueError, match="token"):
            use()
    assert session.n_past == 0


@pytest.mark.parametrize(
    ("n_logits", "told"),
    [
        ([1], "n_logits holds 1 numbers for 2 sequences"),
        ([1, 1, 1], "n_logits holds 3 numbers"),
        ([], "n_logits holds 0"),
        ([1, 3], "the logits of 3 tokens, where 2 are evaluated"),
        ([1, -1], "at least 0"),
    ],
)
def test_a_batch_with_other_numbers_of_logits(model: cext.Model, n_logits: list[int], told: str) -> None:
    sessions = [model.session(8), model.session(8)]
    with pytest.raises(ValueError, match=told):
        cext.eval_batch([(session, [1, 2]) for session in sessions], n_logits)
    assert [session.n_past for session in sessions] == [0, 0]


@pytest.mark.parametrize("entry", [lambda m, s: s, lambda m, s: (s, [1], 1), lambda m, s: (m, [1]), lambda m, s: (s,)])
def test_a_batch_of_something_else(model: cext.Model, entry: Callable[[Any, Any], Any]) -> None:
    session = model.session(8)
    with pytest.raises(TypeError, match="a pair of a session and its tokens"):
        cext.eval_batch([entry(model, session)])


@pytest.mark.parametrize(
    ("place", "told"),
    [
        (Place("attention", 1), r"a place for attention names no layers: layers=range"),
        (Place("feed_forward", 1, range(2, 2)), "a place for feed_forward names no layers"),
        (Place("experts", 1, LAYERS), "a place for experts names no experts: experts=range"),
        (Place("experts", 1, experts=range(2)), "a place for experts names no layers"),
        (Place("ends", 1, LAYERS), "a place for ends has no layers"),
        (Place("attention", 1, LAYERS, range(2)), "a place for attention has no experts"),
        (Place("attention", 1, range(1, 1 << 40)), "the end of a range"),
    ],
)
def test_places_that_are_none(model: cext.Model, place: Place, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        cext.Model(model.path, devices=[Device()], placement=[place])


def test_logits_of_other_kinds() -> None:
    logits = [0.5, 3.0, -1.0]
    for given in (logits, tuple(logits), np.array(logits), np.array(logits, np.float16), [0, 3, -1]):
        assert Sampler(temperature=0).sample(given) == 1
    for empty in ([], np.zeros(0, np.float32), np.zeros((1, 3)), 3.0):
        with pytest.raises(ValueError, match="logits have shape"):
            Sampler().sample(empty)
    for other in (["a", "b"], [1j, 2], [None, 1], np.array([True, False])):
        with pytest.raises(TypeError, match="expected numbers"):
            Sampler().sample(other)


@pytest.mark.parametrize("name", ["temperature", "top_p", "min_p", "repeat_penalty"])
def test_sampling_by_no_numbers(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is too large"):
        Sampler(**{name: 10**400})  # type: ignore[arg-type]
    for other in ("1", None, [1]):
        with pytest.raises(TypeError, match=f"{name} is .*, expected a number"):
            Sampler(**{name: other})  # type: ignore[arg-type]


def test_seeds_that_are_no_whole_numbers() -> None:
    with pytest.raises(TypeError, match=r"seed is 1\.5"):
        Sampler(seed=1.5)  # type: ignore[arg-type]
    assert Sampler(seed=int(np.int64(3))).seed == 3


def test_where_one_id_is_none_the_others_do_not_count() -> None:
    sampler = Sampler(temperature=0, repeat_penalty=1e9)
    with pytest.raises(ValueError, match="less than"):
        sampler.accept([1, 1 << 40])
    assert sampler.sample([1.0, 2.0]) == 1


def test_what_is_closed_is_not_entered(path: Path) -> None:
    for opened, error in (
        (cext.Model(path), ValueError),
        (cext.Gguf(path), ValueError),
        (Tokenizer(path), TokenizerError),
    ):
        opened.close()
        with pytest.raises(error, match="closed"), opened:
            pytest.fail("it was entered")
