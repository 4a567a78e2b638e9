"""Many sequences in one loop: each answers as it would alone, none waits long, none falls with another."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support.sequences import Letters, Scripted, Watched, alone, said, sequence
from support.tiny import spec_named, tokens, variant, write_gguf

import cext
from dsv2cli.scheduler import Budget, Context, End, Event, Lookup, Read, Scheduler, Text, Token
from dsv2cli.scheduler import Sequence as Answer
from dsv2cli.scheduler.sampling import logprobs

SPEC = variant(spec_named("lite"), n_ctx=4096, n_vocab=300)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[cext.Model]:
    with cext.Model(write_gguf(tmp_path_factory.mktemp("loop") / "tiny.gguf", SPEC), threads=2) as opened:
        yield opened


def session_of(model: cext.Model, n_ctx: int = 256) -> cext.Session:
    """With an exact cache: an answer then does not depend on how its prompt was cut into evaluations."""
    return model.session(n_ctx, "f32")


def prompt(n: int, seed: int) -> list[int]:
    return [int(i) for i in tokens(SPEC, n, seed=seed)]


def ends(events: Sequence[Event]) -> dict[Answer, str]:
    return {e.sequence: e.reason for e in events if isinstance(e, End)}


def run(*answers: Answer, evaluate: Any = cext.eval_batch, budget: Budget | None = None) -> list[Event]:
    """The events of sequences that begin together."""
    scheduler = Scheduler(evaluate, budget)
    for answer in answers:
        scheduler.add(answer)
    events = list(scheduler.run())
    assert scheduler.idle and scheduler.step() == []
    return events


# Each as alone.

PROMPTS = [prompt(n, seed) for seed, n in enumerate((3, 40, 1, 150, 17, 90))]


def settings(i: int, temperature: float, n_draft: int) -> dict[str, Any]:
    return {
        "sampler": cext.Sampler(temperature, top_k=5, repeat_penalty=1 + i % 2 / 10, seed=100 + i),
        "drafter": Lookup(n_draft) if n_draft else None,
        "limit": 20 + i,
    }


@pytest.mark.parametrize("n_draft", [0, 3])
@pytest.mark.parametrize("temperature", [0, 1.0], ids=["greedy", "sampled"])
def test_together_as_alone(model: cext.Model, temperature: float, n_draft: int) -> None:
    expected = [alone(session_of(model), p, **settings(i, temperature, 0)) for i, p in enumerate(PROMPTS)]
    answers = [sequence(session_of(model), p, **settings(i, temperature, n_draft)) for i, p in enumerate(PROMPTS)]
    events = run(*answers, budget=Budget(alone=64, beside=16))
    assert [said(events, answer) for answer in answers] == expected == [answer.answer for answer in answers]
    assert set(ends(events).values()) == {"length"} and len(ends(events)) == len(answers)


@pytest.mark.parametrize("n_neighbours", [1, 4, 16])
def test_an_answer_does_not_depend_on_its_neighbours(model: cext.Model, n_neighbours: int) -> None:
    chosen = settings(0, 1.0, 0)
    expected = alone(session_of(model), PROMPTS[1], **settings(0, 1.0, 0))
    mine = sequence(session_of(model), PROMPTS[1], **chosen)
    others = [sequence(session_of(model), prompt(7 + i, 50 + i), limit=30) for i in range(n_neighbours)]
    assert said(run(mine, *others), mine) == expected


def test_joining_and_leaving(model: cext.Model) -> None:
    expected = [alone(session_of(model), p, limit=20) for p in PROMPTS]
    scheduler = Scheduler(budget=Budget(alone=64, beside=16))
    answers, events = [], list[Event]()
    for p in PROMPTS:
        answers.append(sequence(session_of(model), p, limit=20))
        scheduler.add(answers[-1])
        for _ in range(7):
            events += scheduler.step()
    events += scheduler.run()
    assert [said(events, answer) for answer in answers] == expected


@pytest.mark.parametrize("victim", [0, 1, 2])
@pytest.mark.parametrize("after", [0, 1, 5])
def test_cancelled_midway(model: cext.Model, victim: int, after: int) -> None:
    """Where it reads, where it decodes, before the first step: it leaves at once, and the others do not notice."""
    prompts = [prompt(5, 0), prompt(200, 1), prompt(9, 2)]
    expected = [alone(session_of(model), p, limit=15) for p in prompts]
    answers = [sequence(session_of(model), p, limit=15) for p in prompts]
    scheduler = Scheduler(budget=Budget(alone=64, beside=16))
    for answer in answers:
        scheduler.add(answer)
    events = list(itertools.chain.from_iterable(scheduler.step() for _ in range(1 + after)))
    answers[victim].cancel()
    n_before = len(said(events, answers[victim]))
    events += scheduler.run()
    for i, answer in enumerate(answers):
        wanted = expected[i] if i != victim else expected[i][:n_before]
        assert said(events, answer) == wanted
    assert ends(events)[answers[victim]] == answers[victim].stats.stop == "cancelled"


def test_cancelled_while_it_waits_for_its_turn(model: cext.Model) -> None:
    scheduler = Scheduler(budget=Budget(alone=4, beside=1, step=4))
    decoding = [sequence(session_of(model), [i], limit=20) for i in range(6)]
    reading = [sequence(session_of(model), prompt(50, i), limit=1) for i in range(3)]
    for answer in (*decoding, *reading):
        scheduler.add(answer)
    for _ in range(4):
        scheduler.step()
    gone = [*decoding[::2], *reading[::2]]
    for answer in gone:
        answer.cancel()
    assert ends(scheduler.step()) == dict.fromkeys(gone, "cancelled")
    assert set(ends(list(scheduler.run())).values()) == {"length"}


def test_cancelled_while_it_is_evaluated(model: cext.Model) -> None:
    watched, answer = Watched(), sequence(session_of(model), [1, 2, 3])
    watched.raises[4] = "after", answer.cancel
    events = run(answer, evaluate=watched)
    assert len(said(events, answer)) == 3 and ends(events) == {answer: "cancelled"} and watched.calls == 4


def test_removed_without_a_word(model: cext.Model) -> None:
    scheduler, mine, other = Scheduler(), sequence(session_of(model), [1], limit=3), sequence(session_of(model), [2])
    scheduler.add(mine)
    scheduler.add(other)
    scheduler.remove(other)
    scheduler.remove(other)
    assert {event.sequence for event in scheduler.run()} == {mine}


def test_a_full_context_ends_one_and_not_the_others(model: cext.Model) -> None:
    small, large = sequence(session_of(model, 20), prompt(10, 0)), sequence(session_of(model), prompt(10, 1), limit=40)
    events = run(small, large)
    assert len(said(events, small)) == 11  # the last one is sampled from a full context
    assert ends(events) == {small: "context", large: "length"}
    assert said(events, large) == alone(session_of(model), prompt(10, 1), limit=40)


@pytest.mark.parametrize("n_draft", [0, 3])
def test_an_answer_goes_on_from_another_prompt(model: cext.Model, n_draft: int) -> None:
    kept = prompt(4, 9)
    drafter = Lookup(n_draft) if n_draft else None
    context = Context(session_of(model, 24))
    answer = sequence(
        context.session,
        prompt(18, 0),
        context=context,
        refill=lambda said: [*kept, *said[-3:]],
        limit=40,
        drafter=drafter,
    )
    events = run(answer)
    assert ends(events) == {answer: "length"} and answer.stats.n_answer == 40 and answer.stats.n_prompt == 18
    first, rest = answer.answer[:7], answer.answer[7:]
    assert first == alone(session_of(model), prompt(18, 0), limit=7)
    assert rest[:18] == alone(session_of(model), [*kept, *first[-3:]], limit=18)


# What a context keeps.


def test_a_prompt_that_begins_alike_is_not_read_again(model: cext.Model) -> None:
    context, watched = Context(session_of(model)), Watched()
    first = sequence(context.session, prompt(30, 0), context=context, limit=5)
    run(first)
    asked = [*prompt(30, 0), *first.answer, 7, 8]
    second = sequence(context.session, asked, context=context, limit=5)
    events = run(second, evaluate=watched)
    assert second.stats.n_reused == 34 and watched.evaluated[:3] == [first.answer[-1], 7, 8]
    assert said(events, second) == alone(session_of(model), asked, limit=5)


@pytest.mark.parametrize("temperature", [0, 1.0], ids=["greedy", "sampled"])
def test_several_answers_to_one_prompt(model: cext.Model, temperature: float) -> None:
    """The prompt is read once; each answer begins from it with a seed of its own."""
    asked, watched = prompt(100, 0), Watched()
    first = Context(session_of(model))
    run(sequence(first.session, asked, context=first, limit=1))
    answers = [
        sequence(first.session.fork(), asked, sampler=cext.Sampler(temperature, seed=i), limit=10) for i in range(4)
    ]
    events = run(*answers, evaluate=watched)
    assert len(watched.evaluated) == 4 * 10 and {answer.stats.n_reused for answer in answers} == {99}
    for i, answer in enumerate(answers):
        sampler = cext.Sampler(temperature, seed=i)
        assert said(events, answer) == alone(session_of(model), asked, sampler=sampler, limit=10)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("call", [1, 2, 3, 6])
def test_a_step_that_was_interrupted_is_done_again(model: cext.Model, call: int, when: str) -> None:
    """Nothing is believed that the session does not confirm: a scheduler whose step was broken off goes on."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    watched = Watched()
    watched.raises[call] = when, interrupt
    answers = [sequence(session_of(model), p, limit=12) for p in PROMPTS]
    scheduler = Scheduler(watched, Budget(alone=64, beside=16))
    for answer in answers:
        scheduler.add(answer)
    events = list[Event]()
    with pytest.raises(KeyboardInterrupt):
        while not scheduler.idle:
            events += scheduler.step()
    events += scheduler.run()
    assert [said(events, a) for a in answers] == [alone(session_of(model), p, limit=12) for p in PROMPTS]


# Fairness.


def test_a_long_prompt_holds_nobody_up(model: cext.Model) -> None:
    """Whoever decodes gets a token in every step; and a step beside them has only so much of the prompt."""
    watched = Watched()
    scheduler = Scheduler(watched, Budget(alone=512, beside=64))
    decoding = [sequence(session_of(model, 512), prompt(3 + i, i), limit=60) for i in range(3)]
    for answer in decoding:
        scheduler.add(answer)
    while len(watched.steps) < 2:
        scheduler.step()
    long = sequence(session_of(model, 4096), prompt(2000, 5), limit=2)
    scheduler.add(long)
    events = list[Event]()
    while long.n_waiting > 1:
        told = scheduler.step()
        if not any(isinstance(e, Read) and e.done == 0 for e in told):
            assert {e.sequence for e in told if isinstance(e, Token)} >= set(decoding)
        events += told
    events += scheduler.run()
    assert [step for step in watched.steps if len(step) == 4][:31] == [[1, 1, 1, 64]] * 31
    progress = [e.done for e in events if isinstance(e, Read)]
    assert progress == [*range(0, 2000, 64), 2000]
    assert said(events, long) == alone(session_of(model, 4096), prompt(2000, 5), limit=2)


def test_prompts_are_read_in_turns(model: cext.Model) -> None:
    """A short one that comes late waits for one piece of a long one."""
    scheduler = Scheduler(budget=Budget(alone=100, beside=50))
    long = [sequence(session_of(model, 2048), prompt(1000, i), limit=1) for i in range(2)]
    short = sequence(session_of(model), prompt(20, 3), limit=1)
    for answer in (*long, short):
        scheduler.add(answer)
    events = list[Event]()
    for _ in range(4):  # the first tells what is to be read
        events += scheduler.step()
    assert ends(events) == {short: "length"}
    assert [answer.n_waiting for answer in long] == [820, 900]


def test_more_answers_than_a_step_holds(model: cext.Model) -> None:
    """They take turns, and a prompt beside them is still read."""
    watched = Watched()
    prompts = [prompt(1, i) for i in range(7)]
    answers = [sequence(session_of(model), p, limit=6) for p in prompts]
    long = sequence(session_of(model), prompt(30, 8), limit=6)
    events = run(*answers, long, evaluate=watched, budget=Budget(alone=4, beside=1, step=4))
    assert max(sum(step) for step in watched.steps) == 4
    order = [answers.index(e.sequence) for e in events if isinstance(e, Token) and e.sequence in answers]
    for i in range(0, 35, 7):
        assert sorted(order[i : i + 7]) == list(range(7))
    for answer, p in zip((*answers, long), (*prompts, prompt(30, 8)), strict=True):
        assert said(events, answer) == alone(session_of(model), p, limit=6)


@pytest.mark.parametrize(
    "figures", [{"beside": 0}, {"alone": 0}, {"step": cext.MAX_STEP + 1}, {"beside": 8, "step": 8}], ids=str
)
def test_budgets_that_starve_or_overflow(figures: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="beside"):
        Budget(**figures)


# Faults.


class Failing:
    """``cext.eval_batch`` on a machine where one session's step fails, or computes values that are no numbers."""

    def __init__(self, victim: cext.Session, at: int, how: str) -> None:
        self.victim, self.at, self.how = victim, at, how

    def __call__(self, batch: list[tuple[cext.Session, list[int]]], n_logits: list[int]) -> NDArray[np.float32]:
        sessions = [session for session, _ in batch]
        hit = self.victim in sessions and self.victim.n_past >= self.at
        if hit and self.how == "raises":
            raise cext.FileError("a page could not be read")
        logits = cext.eval_batch(batch, n_logits)
        if hit and self.how == "nan":
            first = sum(n_logits[: sessions.index(self.victim)])
            logits[first : first + n_logits[sessions.index(self.victim)]] = np.nan
        return logits


@pytest.mark.parametrize("how", ["raises", "nan"])
@pytest.mark.parametrize("at", [0, 50, 160])
def test_a_sequence_that_fails_harms_no_other(model: cext.Model, at: int, how: str) -> None:
    answers = [sequence(session_of(model), p, limit=20) for p in PROMPTS]
    victim = answers[3]
    events = run(*answers, evaluate=Failing(victim.context.session, at, how), budget=Budget(alone=64, beside=16))
    for answer, p in zip(answers, PROMPTS, strict=True):
        whole = alone(session_of(model), p, limit=20)
        got = said(events, answer)
        assert got == (whole if answer is not victim else whole[: len(got)])
    (end,) = (e for e in events if isinstance(e, End) and e.sequence is victim)
    assert end.reason == "error" and isinstance(end.error, cext.EngineError)
    assert len(said(events, victim)) == (11 if at == 160 else 0)


def test_a_prompt_longer_than_its_context(model: cext.Model) -> None:
    long, other = sequence(session_of(model, 8), prompt(9, 0)), sequence(session_of(model), [1, 2], limit=5)
    events = run(long, other)
    (end,) = (e for e in events if isinstance(e, End) and e.sequence is long)
    assert isinstance(end.error, cext.ContextFullError) and ends(events)[other] == "length"


def test_a_session_that_is_closed_under_it(tmp_path: Path) -> None:
    with cext.Model(write_gguf(tmp_path / "m.gguf", SPEC), threads=1) as model:
        answer = sequence(model.session(64), [1, 2, 3])
        scheduler = Scheduler()
        scheduler.add(answer)
        events = list(itertools.chain.from_iterable(scheduler.step() for _ in range(4)))
    events += scheduler.run()
    assert ends(events) == {answer: "error"} and len(said(events, answer)) == 3


@pytest.mark.parametrize("wrong", [{"prompt": []}, {"limit": 0}, {"limit": -1}], ids=str)
def test_a_sequence_of_nothing(model: cext.Model, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"no tokens|answer of"):
        sequence(session_of(model), **{"prompt": [1], **wrong})


# Drafts.

QUOTED = [7 * i % 251 for i in range(40)]  # what the prompt says once


def quoting(model: cext.Model, script: Sequence[int], n_draft: int, n_ctx: int = 256, end: int = -1) -> Answer:
    """An answer that was dictated, after a prompt that holds QUOTED; its sampler has the logits it was shown."""
    answer = sequence(
        session_of(model, n_ctx),
        [*QUOTED, 252, 253],
        sampler=Scripted(script),
        is_end=end.__eq__,
        limit=len(script),
        drafter=Lookup(n_draft) if n_draft else None,
    )
    run(answer)
    return answer


def shown(answer: Answer) -> NDArray[np.float32]:
    sampler = answer._sampler
    assert isinstance(sampler, Scripted)
    return np.array(sampler.shown)


@pytest.mark.parametrize("n_draft", [1, 2, 3])
@pytest.mark.parametrize(
    "script", [QUOTED, [*QUOTED[:11], 99, *QUOTED[12:30]], [*QUOTED[5:25], *range(30)], [*QUOTED[:20], *QUOTED[:20]]]
)
def test_drafts_change_no_logit(model: cext.Model, script: list[int], n_draft: int) -> None:
    plain, drafted = quoting(model, script, 0), quoting(model, script, n_draft)
    assert drafted.answer == plain.answer == script
    np.testing.assert_array_equal(shown(drafted), shown(plain))
    assert plain.stats.n_drafted == plain.stats.n_taken == 0
    assert drafted.stats.n_drafted >= drafted.stats.n_taken > 0


def test_a_quotation_is_drafted(model: cext.Model) -> None:
    """The first MATCHED tokens of it are read one by one, and then 3 in a step beside the one that was chosen."""
    script = QUOTED[: Lookup.MATCHED + 12]
    answer = quoting(model, script, 3)
    assert (answer.stats.n_drafted, answer.stats.n_taken) == (9, 9)
    assert answer.context.ids == [*QUOTED, 252, 253, *script[:-1]]
    assert answer.stats.n_answer == len(script)


def test_drafts_that_were_wrong_leave_no_trace(model: cext.Model) -> None:
    script = [*QUOTED[: Lookup.MATCHED + 2], 99, 98, 97]
    drafted, plain = quoting(model, script, 3), quoting(model, script, 0)
    assert (drafted.stats.n_drafted, drafted.stats.n_taken) == (3, 2)
    assert drafted.context.ids == plain.context.ids == [*QUOTED, 252, 253, *script[:-1]]
    np.testing.assert_array_equal(*(answer.context.session.eval([97]) for answer in (drafted, plain)))


@pytest.mark.parametrize("n_ctx", range(51, 56))
def test_drafts_fit_in_the_context(model: cext.Model, n_ctx: int) -> None:
    plain, drafted = quoting(model, QUOTED, 0, n_ctx), quoting(model, QUOTED, 3, n_ctx)
    assert drafted.answer == plain.answer and len(plain.answer) == n_ctx - 42 + 1
    assert drafted.stats.stop == plain.stats.stop == "context"
    assert drafted.stats.n_drafted > 0


def test_no_draft_reaches_past_the_limit(model: cext.Model) -> None:
    answer = quoting(model, QUOTED[: Lookup.MATCHED + 3], 3)
    assert (answer.stats.n_drafted, answer.stats.n_taken) == (2, 2)


def test_a_prompt_is_read_without_drafts(model: cext.Model) -> None:
    """They would change what else the step computes, by the order in which it adds."""
    watched = Watched()
    asked = [*QUOTED, *QUOTED[: Lookup.MATCHED]]
    run(sequence(session_of(model), asked, limit=8, drafter=Lookup(3)), evaluate=watched)
    assert watched.steps[0] == [len(asked)]


def test_drafts_share_a_step(model: cext.Model) -> None:
    watched, script = Watched(), QUOTED[:30]
    contexts = [Context(session_of(model)) for _ in range(5)]
    for context in contexts:  # so that all decode from the first step on
        run(sequence(context.session, QUOTED, context=context, limit=1))
    answers = [
        sequence(c.session, QUOTED, context=c, sampler=Scripted(script), limit=30, drafter=Lookup(15)) for c in contexts
    ]
    run(*answers, evaluate=watched, budget=Budget(alone=40, beside=1, step=40))
    assert all(answer.answer == script for answer in answers)
    assert max(watched.steps, key=sum) == [8] * 5


def test_an_answer_that_ends_inside_a_draft(model: cext.Model) -> None:
    answer = quoting(model, QUOTED, 3, end=QUOTED[10])
    assert answer.answer == QUOTED[:10] and answer.stats.stop == "end"
    assert answer.stats.n_drafted > answer.stats.n_taken > 0


def test_drafts_of_many(model: cext.Model) -> None:
    """Each has its own; rows of logits find their owners whoever's draft was right."""
    scripts = [QUOTED[:30], [*range(30)], [*QUOTED[:13], 99, *QUOTED[14:30]], QUOTED[5:35]]
    plain = [quoting(model, script, 0) for script in scripts]
    drafted = [
        sequence(session_of(model), [*QUOTED, 252, 253], sampler=Scripted(script), limit=len(script), drafter=Lookup(3))
        for script in scripts
    ]
    run(*drafted)
    assert [answer.answer for answer in drafted] == scripts
    assert sum(answer.stats.n_taken for answer in drafted) > 30
    for mine, wanted in zip(drafted, plain, strict=True):
        a, b = shown(mine), shown(wanted)
        np.testing.assert_allclose(a, b, rtol=0, atol=1.2e-5 * np.ptp(b))


@pytest.mark.parametrize("n_draft", [0, 3])
def test_a_token_takes_little_work_of_python(model: cext.Model, n_draft: int) -> None:
    """Calls of Python functions that one more token costs: steps of small models are tens of microseconds."""

    def calls(limit: int) -> int:
        counted = 0

        def count(frame: object, event: str, arg: object) -> None:
            nonlocal counted
            counted += event == "call"

        drafter = Lookup(n_draft) if n_draft else None
        answer = sequence(session_of(model), [1, 2, 3], sampler=Scripted(range(200)), limit=limit, drafter=drafter)
        scheduler = Scheduler()
        scheduler.add(answer)
        before = sys.getprofile()
        sys.setprofile(count)
        try:
            for _ in scheduler.run():
                pass
        finally:
            sys.setprofile(before)
        return counted

    assert (calls(150) - calls(50)) / 100 <= 25 + (2 if n_draft else 0)


# Text.


def streamed(ids: Sequence[int], stops: Sequence[str], cut: int = 1) -> tuple[list[str], bool]:
    """The pieces that a stream of one letter a token gives, fed cut letters at a time."""

    class Chunks(Letters):
        def feed(self, token: int) -> str:
            return "".join(chr(0x61 + i) for i in ids[token * cut : token * cut + cut])

    text, pieces = Text(Chunks(), stops), list[str]()
    for i in range(-(-len(ids) // cut)):
        pieces.append(text.feed(i))
        if text.stop is not None:
            break
    return [*pieces, text.finish()], (text.stop is not None)


def test_what_may_be_a_stop_string_waits() -> None:
    letters = [ord(c) - 0x61 for c in "xabaaby"]
    assert streamed(letters, ["aabz", "zz"]) == (["x", "", "ab", "", "", "", "aaby", ""], False)


@pytest.mark.parametrize("stops", [["ab"], ["aab", "ba"], ["abcd", "c"], ["aaaa"], ["a", "aa"], ["cab", "abc", "bb"]])
def test_stop_strings_do_not_depend_on_tokens(stops: list[str]) -> None:
    """However the text is cut into tokens, it ends before the stop string that is complete first."""
    rng = np.random.default_rng(7)
    for _ in range(300):
        ids = rng.integers(0, 4, rng.integers(1, 15)).tolist()
        whole = "".join(chr(0x61 + i) for i in ids)
        firsts = [(at + len(s), at) for s in stops if (at := whole.find(s)) >= 0]
        expected = whole[: min(firsts)[1]] if firsts else whole
        for cut in (1, 2, 3, len(ids)):
            pieces, stopped = streamed(ids, stops, cut)
            assert ("".join(pieces), stopped) == (expected, bool(firsts))


def test_nothing_waits_longer_than_it_must() -> None:
    rng = np.random.default_rng(8)
    for _ in range(300):
        ids = rng.integers(0, 3, 12).tolist()
        whole = "".join(chr(0x61 + i) for i in ids)
        text = ""
        for n, piece in enumerate(streamed(ids, ["abcab"])[0][: len(ids)], 1):
            text += piece
            held = whole[len(text) : n]
            assert "abcab" in whole[:n] or held == "" or "abcab".startswith(held)


def test_an_empty_stop_string() -> None:
    with pytest.raises(ValueError, match="empty"):
        Text(Letters(), ["a", ""])


def test_a_stop_string_ends_the_answer(model: cext.Model) -> None:
    script = [1, 2, 3, 4, 5, 6]
    stop = "".join(Letters().feed(i) for i in (3, 4))
    answer = sequence(session_of(model), [9], sampler=Scripted(script), text=Text(Letters(), [stop]))
    events = run(answer)
    text = "".join(e.text for e in events if isinstance(e, Token | End))
    assert text == "".join(map(Letters().feed, [1, 2])) and answer.answer == [1, 2, 3, 4]
    assert ends(events) == {answer: "stop"}


def test_text_that_waited_comes_with_the_end(model: cext.Model) -> None:
    stop = "".join(map(Letters().feed, [3, 4]))
    answer = sequence(session_of(model), [9], sampler=Scripted([1, 3]), text=Text(Letters(), [stop]), limit=2)
    events = run(answer)
    assert [e.text for e in events if isinstance(e, Token | End)] == [*map(Letters().feed, [1]), "", Letters().feed(3)]


# Log-probabilities.


@pytest.mark.parametrize("n_top", [0, 1, 5, 400])
def test_log_probabilities(n_top: int) -> None:
    logits = np.random.default_rng(1).normal(size=300).astype(np.float32) * 9
    exact = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum())
    got = logprobs(logits, 17, n_top)
    assert got.chosen == pytest.approx(exact[17], abs=1e-12)
    order = np.argsort(-exact, kind="stable")[:n_top].tolist()
    assert [token for token, _ in got.top] == order
    assert [p for _, p in got.top] == pytest.approx(exact[order].tolist(), abs=1e-12)
    assert dict(got.top).get(17, got.chosen) == got.chosen


def test_log_probabilities_come_with_tokens(model: cext.Model) -> None:
    answer = sequence(session_of(model), [9], n_top=3, limit=4)
    for event in run(answer):
        if isinstance(event, Token):
            assert event.logprobs is not None
            assert (event.id, event.logprobs.chosen) == event.logprobs.top[0]  # it is greedy


def test_samplers_remember_the_prompt(model: cext.Model) -> None:
    """What was in the cache counts towards the repeat penalty as much as what was read."""
    heard: list[list[int]] = []

    class Hearing(Scripted):
        def accept(self, ids: Sequence[int]) -> None:
            heard.append(list(ids))

    context = Context(session_of(model))
    for _ in range(2):
        run(sequence(context.session, prompt(9, 0), context=context, sampler=Hearing([5]), limit=1))
    assert heard == [prompt(9, 0)] * 2


def test_only_the_latest_tokens_count_towards_the_penalty() -> None:
    logits = np.zeros(8, np.float32)
    logits[3], logits[5] = 2, 1.5
    for said_before, chosen in (([3, 1, 1], 3), ([1, 1, 3], 5), ([3, 1], 5)):
        sampler = cext.Sampler(0, repeat_penalty=2.0, repeat_last_n=2)
        sampler.accept(said_before)
        assert sampler.sample(logits) == chosen


def test_a_step_that_fails_half_done_is_taken_back(model: cext.Model) -> None:
    """An evaluation that did some sequences before it failed: each is evaluated once more, from where it was."""
    failures = iter([True])

    def one_by_one(batch: Any, n_logits: Any) -> Any:
        rows = [cext.eval_batch([item], [n]) for item, n in zip(batch, n_logits, strict=True)]
        if len(batch) > 1 and next(failures, False):
            raise MemoryError
        return np.concatenate(rows)

    expected = [alone(session_of(model), p, limit=5) for p in PROMPTS[:3]]
    answers = [sequence(session_of(model), p, limit=5) for p in PROMPTS[:3]]
    events = run(*answers, evaluate=one_by_one)
    assert [said(events, answer) for answer in answers] == expected
