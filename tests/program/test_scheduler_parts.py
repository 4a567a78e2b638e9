"""Prompts that are read some layers at a time beside answers: what these wait, and that nothing else is different."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support.sequences import Watched, alone, said, sequence
from support.tiny import spec_named, tokens, variant, write_gguf

import cext
from dsv2cli.scheduler import Budget, End, Event, Parts, Scheduler
from dsv2cli.scheduler import Sequence as Answer

SPEC = variant(spec_named("lite"), n_ctx=4096, n_vocab=300)
TURN = 0.25


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[cext.Model]:
    with cext.Model(write_gguf(tmp_path_factory.mktemp("parts") / "tiny.gguf", SPEC), threads=2) as opened:
        yield opened


def prompt(n: int, seed: int) -> list[int]:
    return [int(i) for i in tokens(SPEC, n, seed=seed)]


def answer(model: cext.Model, n: int, seed: int, **options: Any) -> Answer:
    return sequence(model.session(1024, "f32"), prompt(n, seed), **options)


class Slowly:
    """Time that passes only in layers, and steps of answers: a turn has one layer."""

    def __init__(self) -> None:
        self.now, self.readings = 0.0, list[Slowly.Reading]()
        self.fails: Callable[[list[Any]], None] = lambda batch: None

    def clock(self) -> float:
        return self.now

    def evaluate(self, batch: list[Any], n_logits: list[int]) -> NDArray[np.float32]:
        self.now += TURN
        return cext.eval_batch(batch, n_logits)

    class Reading:
        def __init__(self, time: Slowly, batch: list[Any], n_logits: list[int]) -> None:
            self.time, self.batch, self.closed = time, batch, False
            self.of = cext.Reading(batch, n_logits)
            self.left = self.of.left

        def run(self, n_layers: int) -> NDArray[np.float32] | None:
            self.time.fails(self.batch)
            self.time.now += TURN * n_layers
            logits = self.of.run(n_layers)
            self.left = self.of.left
            return logits

        def close(self) -> None:
            self.closed = True
            self.of.close()

    def begin(self, batch: list[Any], n_logits: list[int]) -> Reading:
        self.readings.append(self.Reading(self, batch, n_logits))
        return self.readings[-1]

    def scheduler(self) -> Scheduler:
        return Scheduler(self.evaluate, Budget(), Parts(self.begin, TURN, self.clock))


def begun(scheduler: Scheduler, first: Answer) -> list[Event]:
    """Until the first answer is being written."""
    scheduler.add(first)
    events = list[Event]()
    while not said(events, first):
        events += scheduler.step()
    return events


def reasons(events: list[Event]) -> dict[Answer, str]:
    return {event.sequence: event.reason for event in events if isinstance(event, End)}


@pytest.mark.parametrize("rows", [False, True])
def test_each_answers_as_alone(model: cext.Model, rows: bool) -> None:
    lengths = (3, 40, 700, 17, 90, 2)
    expected = [alone(model.session(1024, "f32"), prompt(n, n), limit=200) for n in lengths]
    slowly = Slowly()
    scheduler = slowly.scheduler()
    answers = [answer(model, n, n, limit=200) for n in lengths]
    events = begun(scheduler, answers[0])
    for one in answers[1:]:
        scheduler.add(one)
        for _ in range(3):
            events += scheduler.step()
    events += scheduler.run()
    assert [said(events, one) for one in answers] == expected
    assert slowly.readings


def test_answers_have_a_step_between_any_two_layers(model: cext.Model) -> None:
    slowly = Slowly()
    scheduler = slowly.scheduler()
    first, second = answer(model, 3, 1, limit=400), answer(model, 300, 2, limit=1)
    begun(scheduler, first)
    scheduler.add(second)
    scheduler.step()
    while not second.ended:
        before = len(first.answer)
        scheduler.step()
        scheduler.step()
        assert len(first.answer) == before + 1
    assert len(slowly.readings) > 1  # several pieces


def test_a_short_prompt_does_not_wait_for_a_long_one(model: cext.Model) -> None:
    slowly = Slowly()
    scheduler = slowly.scheduler()
    first, long, short = answer(model, 3, 1, limit=900), answer(model, 900, 2, limit=1), answer(model, 9, 3, limit=1)
    begun(scheduler, first)
    scheduler.add(long)
    for _ in range(6):
        scheduler.step()
    scheduler.add(short)
    while not short.ended:
        scheduler.step()
    assert not long.ended and len(slowly.readings[-1].batch) == 1
    while not long.ended:
        scheduler.step()


def test_two_long_prompts_have_their_turns(model: cext.Model) -> None:
    slowly = Slowly()
    scheduler = slowly.scheduler()
    first = answer(model, 3, 1, limit=900)
    long = [answer(model, 800, i, limit=1) for i in (2, 3)]
    begun(scheduler, first)
    for one in long:
        scheduler.add(one)
    while not all(one.ended for one in long):
        scheduler.step()
    turns = [[one.context.session for one in long].index(reading.batch[0][0]) for reading in slowly.readings]
    assert turns[:6] == [0, 1, 0, 1, 0, 1] and all(len(reading.batch) == 1 for reading in slowly.readings)


@pytest.mark.parametrize("how", ["cancelled", "removed"])
def test_who_goes_while_a_piece_is_read(model: cext.Model, how: str) -> None:
    """Its piece ends with it, unless another has a part in that."""
    expected = alone(model.session(1024, "f32"), prompt(30, 3), limit=5)
    slowly = Slowly()
    scheduler = slowly.scheduler()
    first, goes, stays = answer(model, 3, 1, limit=900), answer(model, 20, 2), answer(model, 30, 3, limit=5)
    events = begun(scheduler, first)
    scheduler.add(goes)
    scheduler.add(stays)
    while not slowly.readings:
        events += scheduler.step()
    assert len(slowly.readings[0].batch) == 2
    if how == "cancelled":
        goes.cancel()
        told = scheduler.step()  # at once, before anything is computed
        assert reasons(told) == {goes: "cancelled"} and not slowly.readings[0].closed
    else:
        scheduler.remove(goes)
    while not stays.ended:
        events += scheduler.step()
    assert said(events, stays) == expected and not said(events, goes) and len(slowly.readings) == 1

    other = answer(model, 500, 4)
    scheduler.add(other)
    while len(slowly.readings) == 1:
        scheduler.step()
    other.cancel()
    scheduler.step()
    assert slowly.readings[1].closed and other.context.session.n_past == 0


def test_who_was_removed_goes_on_where_it_was(model: cext.Model) -> None:
    """Though its piece was read to the end meanwhile, for another's sake, or not."""
    lengths = (20, 400)
    expected = [alone(model.session(1024, "f32"), prompt(n, n), limit=5) for n in lengths]
    slowly = Slowly()
    scheduler = slowly.scheduler()
    first, other = answer(model, 3, 1, limit=900), answer(model, 30, 3, limit=1)
    begun(scheduler, first)
    paused = [answer(model, n, n, limit=5) for n in lengths]
    for one in (*paused, other):
        scheduler.add(one)
    while not slowly.readings:
        scheduler.step()
    for one in paused:
        scheduler.remove(one)
    for _ in range(20):
        scheduler.step()
    events = list[Event]()
    for one in paused:
        scheduler.add(one)
    while not all(one.ended for one in paused):
        events += scheduler.step()
    assert [said(events, one) for one in paused] == expected


@pytest.mark.parametrize("when", ["begins", "runs"])
def test_an_error_ends_who_causes_it(model: cext.Model, when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = alone(model.session(1024, "f32"), prompt(30, 3), limit=5)
    slowly = Slowly()
    scheduler = slowly.scheduler()
    first, bad, good = answer(model, 3, 1, limit=900), answer(model, 20, 2), answer(model, 30, 3, limit=5)
    events = begun(scheduler, first)

    def fails(batch: list[Any]) -> None:
        if any(session is bad.context.session for session, _ in batch):
            raise cext.EngineError("the device is on fire", "")

    if when == "runs":
        slowly.fails = fails
    else:
        begin = slowly.begin

        def begin_or_fail(batch: list[Any], n_logits: list[int]) -> Slowly.Reading:
            fails(batch)
            return begin(batch, n_logits)

        slowly.begin = begin_or_fail  # type: ignore[method-assign]
        scheduler._parts = Parts(slowly.begin, TURN, slowly.clock)
    scheduler.add(bad)
    scheduler.add(good)
    while not good.ended:
        events += scheduler.step()
    assert reasons(events)[bad] == "error" and said(events, good) == expected and not first.ended


def test_alone_again_what_was_begun_is_read_to_the_end(model: cext.Model) -> None:
    expected = alone(model.session(1024, "f32"), prompt(300, 3), limit=5)
    slowly, watched = Slowly(), Watched()
    scheduler = Scheduler(watched, Budget(), Parts(slowly.begin, TURN, slowly.clock))
    first, second = answer(model, 3, 1, limit=900), answer(model, 300, 3, limit=5)
    events = begun(scheduler, first)
    scheduler.add(second)
    while not slowly.readings:
        events += scheduler.step()
    first.cancel()
    events += scheduler.run()
    assert said(events, second) == expected and len(slowly.readings) == 1
    assert max(n for step in watched.steps for n in step) > 200  # and the rest as where nothing is beside it


# What answers wait, on machines whose layers and steps take what they are said to.


class Machine:
    """A model of 27 layers. step: seconds of a step of the answers; fixed, token: of a layer, and of each of its
    tokens. slow: by how much it is slower at a time."""

    N_LAYERS = 27

    def __init__(self, step: float, fixed: float, token: float, slow: Callable[[float], float]) -> None:
        self.step, self.fixed, self.token, self.slow, self.now = step, fixed, token, slow, 0.0
        self.parts = Parts(self.begin, TURN, lambda: self.now)
        self.n_read = 0

    def passes(self, seconds: float) -> None:
        self.now += seconds * self.slow(self.now)

    def begin(self, batch: list[Any], n_logits: list[int]) -> Any:
        machine, n_tok = self, sum(len(ids) for _, ids in batch)

        class Layers:
            left = Machine.N_LAYERS

            def run(self, n_layers: int) -> object:
                for _ in range(n_layers):  # the first is dense: a tenth
                    share = 0.1 if self.left == Machine.N_LAYERS else 1.0
                    machine.passes(share * (machine.fixed + machine.token * n_tok))
                    self.left -= 1
                machine.n_read += 0 if self.left else n_tok
                return None if self.left else ()

            def close(self) -> None: ...

        return Layers()

    def read(self, n: int) -> list[float]:
        """Seconds between the answers' tokens until a prompt of n tokens is read."""
        waits, told, parts = list[float](), 0.0, self.parts
        whose: Any = type("Whose", (), {"context": type("Context", (), {"session": None})})
        while self.n_read < n:
            begun = self.now
            self.passes(self.step)
            parts.answered(begun)
            waits.append(self.now - told)
            told = self.now
            parts.begin_turn()
            while self.n_read < n:
                if not parts.under_way:
                    parts.begin([(whose, [0] * min(parts.n_tok, n - self.n_read), 0)])
                part = parts.under_way[0]
                if not (n_layers := parts.fits(part)):
                    break
                if parts.run(part, n_layers) is not None:
                    parts.under_way.popleft()
        return waits


def never(now: float) -> float:
    return 1.0


def at_times(now: float) -> float:
    """Twice as slow for seven seconds of ten, from one step to the next."""
    return 2.0 if now % 10 > 3 else 1.0


def often(now: float) -> float:
    return 2.0 if now % 0.7 > 0.35 else 1.0


# V2-Lite on two cores, as measured: 94 ms a token, 200 tokens a second; and in an hour in which all takes twice that.
USUAL, SLOW_HOUR = (0.094, 0.012, 0.00016), (0.194, 0.024, 0.00032)


@pytest.mark.parametrize("slow", [never, at_times, often])
@pytest.mark.parametrize(
    ("machine", "longest", "most"),
    [
        (USUAL, 0.3, 120),
        (SLOW_HOUR, 0.3, 1000),
        ((0.005, 0.0001, 0.00001), 0.3, 10),  # a fast one
        ((0.02, 0.0, 0.00005), 0.3, 30),
    ],
)
def test_what_an_answer_waits(
    machine: tuple[float, float, float], longest: float, most: float, slow: Callable[[float], float]
) -> None:
    """Under half a second beside a prompt of 8,000 tokens, though it becomes twice as slow at any time; and that is
    read in not much more time than the turns leave it."""
    simulated = Machine(*machine, slow)
    waits = simulated.read(8000)
    assert max(waits) < (longest if slow is never else 0.5), max(waits)
    assert simulated.now < most * (1 if slow is never else 2.5), simulated.now


@pytest.mark.parametrize("step", [0.6, 2.0])
def test_prompts_have_their_share_beside_answers_that_are_slow(step: float) -> None:
    """Of sixteen streams, or of a model that is too large for the machine: no prompt waits for ever."""
    simulated = Machine(step, step / 20, step / 2000, never)
    waits = simulated.read(2000)
    assert max(waits) < 1.4 * step and simulated.now < 400 * step, (max(waits), simulated.now)
