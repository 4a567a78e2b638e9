"""Responses that are kept: within their bounds, whatever is kept, followed and forgotten."""

from __future__ import annotations

import random

import pytest

from dsv2cli.server.kept import Kept, Store, Turn


def kept(name: str, turns: tuple[Turn, ...], size: int = 10) -> Kept:
    turn = Turn.of([{"id": f"in-{name}", "text": "x" * size}]).answered([{"id": f"out-{name}"}])
    return Kept(b"r" * size, (*turns, turn))


def weight(store: Store, key: bytes) -> int:
    """Counted again, from what is there."""
    entries = list(store._keys[key].kept.values())
    turns = {turn for entry in entries for turn in entry.turns}
    return sum(entry.nbytes for entry in entries) + sum(turn.nbytes for turn in turns)


def test_the_count_is_bounded_and_the_longest_unused_go_first() -> None:
    store = Store(max_count=3)
    for name in "abc":
        assert store.keep(b"k", name, kept(name, ()))
    assert store.find(b"k", "a")
    store.keep(b"k", "d", kept("d", ()))
    assert store.find(b"k", "b") is None and all(store.find(b"k", name) for name in "acd")


def test_a_conversation_lives_as_long_as_its_last_response() -> None:
    store = Store(max_count=2)
    turns: tuple[Turn, ...] = ()
    for i in range(20):
        response = kept(str(i), turns)
        store.keep(b"k", str(i), response)
        turns = response.turns
    found = store.find(b"k", "19")
    assert found is not None and len(found.turns) == 20 and store.find(b"k", "0") is None
    assert [item["id"] for item in found.input_items()][:3] == ["in-0", "out-0", "in-1"]
    assert store.item(b"k", "out-0") == {"id": "out-0"} and found.input_items()[-1]["id"] == "in-19"
    store.forget(b"k", "19")
    store.forget(b"k", "18")
    assert store.nbytes(b"k") == 0 and store.item(b"k", "out-0") is None


def test_bytes_are_bounded_and_counted_once() -> None:
    store = Store(max_bytes=40_000)
    rng = random.Random(1)
    names: list[str] = []
    for i in range(400):
        before = store.find(b"k", rng.choice(names)) if names and rng.random() < 0.7 else None
        assert store.keep(b"k", str(i), kept(str(i), before.turns[-8:] if before else (), rng.randrange(3000)))
        names.append(str(i))
        if rng.random() < 0.2 and store.find(b"k", name := rng.choice(names)):
            store.forget(b"k", name)
        assert store.nbytes(b"k") == weight(store, b"k") <= 40_000
    assert sum(store.find(b"k", name) is not None for name in names) > 3


def test_what_is_larger_than_everything_drives_nothing_out() -> None:
    store = Store(max_bytes=10_000)
    store.keep(b"k", "small", kept("small", ()))
    assert not store.keep(b"k", "large", kept("large", (), 20_000))
    assert store.find(b"k", "small") and store.find(b"k", "large") is None


def test_keys_know_nothing_of_each_other() -> None:
    store = Store(max_count=2)
    store.keep(b"a", "mine", kept("mine", ()))
    for i in range(9):
        store.keep(b"b", str(i), kept(str(i), ()))
    assert store.find(b"a", "mine") and store.find(b"b", "mine") is None and store.item(b"b", "in-mine") is None
    with pytest.raises(KeyError):
        store.forget(b"b", "mine")
