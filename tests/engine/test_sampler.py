"""The sampler against a numpy model of its definition: which tokens can be drawn, how often, and which never."""

from dataclasses import asdict, dataclass, replace

import numpy as np
import pytest
from numpy.typing import NDArray

from cext import EngineError, Sampler

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Options:
    """All stages off, temperature 1."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repeat_penalty: float = 1.0
    repeat_last_n: int = 0

    def sampler(self, seed: int = 1) -> Sampler:
        return Sampler(**asdict(self), seed=seed)


def softmax(x: NDArray[np.float64]) -> NDArray[np.float64]:
    e = np.exp(x - x.max())
    return e / e.sum()


def probabilities(logits: Floats, options: Options, recent: tuple[int, ...] = ()) -> NDArray[np.float64]:
    """The distribution that a draw must follow, (n_vocab,): stage after stage, each on the survivors of the last."""
    x = logits.astype(np.float64)
    for token in set(recent[-options.repeat_last_n :] if options.repeat_last_n else ()):
        x[token] = x[token] / options.repeat_penalty if x[token] > 0 else x[token] * options.repeat_penalty
    order = np.lexsort((np.arange(len(x)), -x))
    if options.top_k:
        order = order[: options.top_k]
    p = softmax(x[order])
    if options.top_p < 1:
        order = order[: int(np.searchsorted(np.cumsum(p), options.top_p)) + 1]
    p = softmax(x[order])
    order = order[p >= options.min_p * p.max()]
    if options.temperature == 0:
        order = order[:1]
    result = np.zeros(len(x))
    result[order] = softmax(x[order] / (options.temperature or 1.0))
    return result


def counts(sampler: Sampler, logits: Floats, n: int) -> NDArray[np.int64]:
    return np.bincount([sampler.sample(logits) for _ in range(n)], minlength=len(logits))


def assert_follows(drawn: NDArray[np.int64], p: NDArray[np.float64]) -> None:
    """Nothing outside the support, and each count within 5 standard deviations (one run in 10^6 would stray by chance;
    seeds are fixed, so that a pass stays a pass)."""
    n = drawn.sum()
    assert not drawn[p == 0].any(), f"drew {np.flatnonzero(drawn * (p == 0))}, which have no probability"
    deviation = np.abs(drawn - n * p) / np.sqrt(np.maximum(n * p * (1 - p), 1.0))
    worst = int(deviation.argmax())
    assert deviation[worst] < 5, f"token {worst}: drawn {drawn[worst]} times of {n}, expected {n * p[worst]}"


LOGITS = np.array([0.0, 1.0, 2.5, -1.0, 2.0, 0.5, -3.0, 1.5], dtype=np.float32)
CASES = {
    "all-off": Options(),
    "cold": Options(temperature=0.3),
    "hot": Options(temperature=5.0),
    "top-k-3": Options(top_k=3),
    "top-k-1": Options(top_k=1),
    "top-k-beyond-vocab": Options(top_k=100),
    "top-p-half": Options(top_p=0.5),
    "top-p-tiny": Options(top_p=1e-6),
    "top-p-most": Options(top_p=0.97),
    "min-p": Options(min_p=0.2),
    "min-p-1": Options(min_p=1.0),
    "top-k-then-top-p": Options(top_k=4, top_p=0.6),
    "top-p-then-min-p": Options(top_p=0.9, min_p=0.3),
    "top-p-then-min-p-1": Options(top_p=0.9, min_p=1.0),  # the likeliest alone, which is as likely as itself
    "all-on": Options(0.7, 5, 0.9, 0.1, 1.3, 8),
    "penalty-up": Options(repeat_penalty=2.0, repeat_last_n=8),
    "penalty-down": Options(repeat_penalty=0.5, repeat_last_n=8),
}
RECENT = (2, 6, 2)  # a positive logit, a negative one, and a token that is there twice


@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_draws_follow_the_definition(options: Options) -> None:
    n = 4000
    drawn = np.zeros(len(LOGITS), dtype=np.int64)
    if options.repeat_penalty == 1:
        drawn = counts(options.sampler(), LOGITS, n)
    else:  # a draw enters the window, so that each needs a sampler of its own
        for seed in range(n):
            sampler = options.sampler(seed)
            sampler.accept(RECENT)
            drawn[sampler.sample(LOGITS)] += 1
    assert_follows(drawn, probabilities(LOGITS, options, RECENT))


@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_only_survivors_are_drawn_from_a_large_vocabulary(options: Options) -> None:
    rng = np.random.default_rng(3)
    logits = (3 * rng.standard_normal(5000)).astype(np.float32)
    sampler = replace(options, repeat_penalty=1.0).sampler()
    p = probabilities(logits, replace(options, repeat_penalty=1.0))
    drawn = counts(sampler, logits, 500)
    assert not drawn[p == 0].any()


def test_the_boundary_of_top_p_is_exact() -> None:
    """0.5 + 0.25 reaches 0.75 without the third token, and just misses 0.7500001."""
    logits = np.log2(np.array([4, 2, 1, 1]), dtype=np.float32) * np.float32(np.log(2.0))
    assert np.flatnonzero(counts(Options(top_p=0.7499).sampler(), logits, 300)).tolist() == [0, 1]
    assert np.flatnonzero(counts(Options(top_p=0.7501).sampler(), logits, 300)).tolist() == [0, 1, 2]


def test_ties_go_to_the_lower_token() -> None:
    logits = np.full(1000, 2.5, dtype=np.float32)
    assert counts(Options(top_k=3).sampler(), logits, 300)[:3].min() > 0
    assert counts(Options(top_k=3).sampler(), logits, 300)[3:].max() == 0
    assert Options(temperature=0.0).sampler().sample(logits) == 0


# Greedy.


def test_greedy_takes_the_largest() -> None:
    rng = np.random.default_rng(4)
    sampler = Options(temperature=0.0).sampler()
    for _ in range(50):
        logits = rng.standard_normal(777).astype(np.float32)
        assert sampler.sample(logits) == int(logits.argmax())


def test_greedy_with_penalty_moves_on() -> None:
    sampler = Options(temperature=0.0, repeat_penalty=10.0, repeat_last_n=2).sampler()
    logits = np.array([3.0, 2.0, 1.0], dtype=np.float32)
    assert [sampler.sample(logits) for _ in range(6)] == [0, 1, 2, 0, 1, 2]


def test_the_window_forgets() -> None:
    options = Options(temperature=0.0, repeat_penalty=10.0, repeat_last_n=3)
    for n_later, expected in [(2, 1), (3, 0)]:
        sampler = options.sampler()
        sampler.accept([0] + [2] * n_later)
        assert sampler.sample(np.array([3.0, 2.0, 1.0], dtype=np.float32)) == expected


def test_tokens_of_another_vocabulary_are_ignored() -> None:
    sampler = Options(temperature=0.0, repeat_penalty=10.0, repeat_last_n=8).sampler()
    sampler.accept([-1, 3, 2**31 - 1, -(2**31)])
    assert sampler.sample(np.array([3.0, 2.0, 1.0], dtype=np.float32)) == 0


def test_the_window_of_the_repeat_penalty_is_as_long_as_asked_for() -> None:
    """However many tokens came before, none that did not come is penalised, and none that left the window."""
    for window in (1, 2, 7):
        sampler = Options(temperature=0.0, repeat_penalty=10.0, repeat_last_n=window).sampler()
        for token in [2, *[1] * (2 * window + 1)]:  # one at a time: of many at once only the last are looked at
            sampler.accept([token])
        assert sampler.sample(np.array([3.0, 2.9, 2.8], dtype=np.float32)) == 0
        assert sampler.sample(np.array([0.0, 0.0, 2.8], dtype=np.float32)) == 2


# Seeds.


def test_a_seed_repeats() -> None:
    logits = np.zeros(100, dtype=np.float32)
    first, again, other = (Options().sampler(seed) for seed in (5, 5, 6))
    drawn = [first.sample(logits) for _ in range(50)]
    assert [again.sample(logits) for _ in range(50)] == drawn
    assert [other.sample(logits) for _ in range(50)] != drawn


def test_without_a_seed_samplers_differ() -> None:
    logits = np.zeros(1000, dtype=np.float32)
    a, b = Sampler(1.0, 0, 1.0, 0.0), Sampler(1.0, 0, 1.0, 0.0)
    assert [a.sample(logits) for _ in range(20)] != [b.sample(logits) for _ in range(20)]


@pytest.mark.parametrize("seed", [0, 1, 2**63, 2**64 - 1])
def test_every_seed_is_uniform(seed: int) -> None:
    assert_follows(counts(Options().sampler(seed), np.zeros(10, dtype=np.float32), 5000), np.full(10, 0.1))


# Numbers at the edges.


@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_nan_and_minus_infinity_are_never_drawn(options: Options) -> None:
    logits = np.concatenate([LOGITS, [np.nan, -np.inf, -np.nan]]).astype(np.float32)
    drawn = counts(options.sampler(), logits, 300)
    assert not drawn[len(LOGITS) :].any()


def test_plus_infinity_takes_all() -> None:
    logits = np.array([1.0, np.inf, 3e38, np.inf], dtype=np.float32)
    drawn = counts(Options().sampler(), logits, 1000)
    assert drawn[[0, 2]].tolist() == [0, 0]
    assert_follows(drawn, np.array([0, 0.5, 0, 0.5]))


@pytest.mark.parametrize("fill", [np.nan, -np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nothing_to_draw(fill: float, temperature: float) -> None:
    with pytest.raises((EngineError, ValueError), match="none of the 7 logits"):
        Options(temperature).sampler().sample(np.full(7, fill, dtype=np.float32))


def test_extreme_spreads_and_temperatures() -> None:
    logits = np.array([-3e38, 3e38, 0.0, 3e38], dtype=np.float32)
    for temperature in (1e-30, 1.0, 1e30):
        drawn = counts(Options(temperature).sampler(), logits, 200)
        assert drawn[[0, 2]].sum() == 0 and drawn[[1, 3]].min() > 0
    assert counts(Options(1e30).sampler(), LOGITS, 2000).min() > 150  # flat: 250 each


def test_a_penalty_never_forbids_the_only_token() -> None:
    sampler = Options(repeat_penalty=1e30, repeat_last_n=4).sampler()
    sampler.accept([0])
    assert sampler.sample(np.array([-3e38], dtype=np.float32)) == 0


def test_one_token() -> None:
    for options in CASES.values():
        assert options.sampler().sample(np.array([-7.0], dtype=np.float32)) == 0


def test_vocabularies_may_change_size() -> None:
    sampler = Options(top_k=2).sampler()
    for n in (10, 1000, 3, 5000, 1):
        assert 0 <= sampler.sample(np.linspace(0, 1, n, dtype=np.float32)) < n


def test_logits_are_left_as_they_are() -> None:
    logits = LOGITS.copy()
    sampler = CASES["all-on"].sampler()
    sampler.accept(RECENT)
    sampler.sample(logits)
    np.testing.assert_array_equal(logits, LOGITS)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", float("nan")),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("min_p", float("nan")),
        ("repeat_penalty", 0.0),
        ("repeat_penalty", -1.0),
        ("repeat_penalty", float("inf")),
        ("repeat_last_n", -1),
        ("repeat_last_n", 1 << 21),
    ],
)
def test_options_out_of_range(option: str, value: float) -> None:
    with pytest.raises(ValueError, match=option):
        Sampler(**{option: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(0,), (2, 3), ()])
def test_logits_of_a_wrong_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError):
        Options().sampler().sample(np.zeros(shape, dtype=np.float32))


@pytest.mark.parametrize(
    "options",
    [
        Options(temperature=0.7, top_k=9),
        Options(temperature=2.0, top_p=0.8),
        Options(temperature=1.3, top_p=0.95, min_p=0.02, top_k=30),
        Options(repeat_penalty=1.8, repeat_last_n=3, min_p=0.05),
        Options(temperature=0.001, top_k=5),  # all but one weigh nothing
        Options(),
    ],
)
def test_kept_is_what_was_drawn_from(options: Options) -> None:
    logits = np.random.default_rng(5).normal(0, 3, 60).astype(np.float32)
    logits[7] = -np.inf
    sampler = options.sampler()
    assert [len(part) for part in sampler.kept()] == [0, 0]
    sampler.accept([1, 2, 3])
    for recent in ((1, 2, 3), None):
        token = sampler.sample(logits)
        tokens, found = sampler.kept()
        assert token in tokens and (np.diff(found) <= 0).all() and (found > 0).all()
        if recent is not None:
            wanted = probabilities(logits, options, recent)
            assert set(tokens) == set(np.flatnonzero(wanted))
            np.testing.assert_allclose(found, wanted[tokens], rtol=1e-5)


def test_kept_of_a_greedy_draw_is_its_token() -> None:
    sampler = Options(temperature=0.0).sampler()
    assert sampler.sample(np.array([1, 5, 2], np.float32)) == 1
    tokens, found = sampler.kept()
    assert (tokens.tolist(), found.tolist()) == ([1], [1.0])
