"""Sessions that share a past: what one does, no other sees; memory for what is held, and back when it is not."""

import gc
import resource
import subprocess
import sys
import textwrap
import threading
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from support.tiny import SPECS, Spec, spec_named, tokens, variant

import cext
from cext import _engine

LITE = SPECS[0]
WIDE = variant(spec_named("all_dense"), name="wide", kv_lora_rank=128)
BLOCK = _engine.SESSION_BLOCK
TYPES = ("f16", "q8_0", "f32")
# The cache of V2-Lite (27 layers of 512 + 64 values) under a model that is narrow everywhere else.
LITE_CACHE = Spec(
    "lite_cache",
    n_layer=27,
    n_layer_dense=27,
    n_embd=32,
    n_head=1,
    kv_lora_rank=512,
    nope=32,
    rope=64,
    v=32,
    n_ff_dense=32,
    n_ctx=8192,
)


@pytest.fixture
def model(tiny_gguf):
    with cext.Model(tiny_gguf(LITE), threads=2) as opened:
        yield opened


def fresh(model, ids, done, kv_type="f16"):
    """Logits of ids[done:] of a session that shares nothing, its first tokens in one piece."""
    session = model.session(len(ids), kv_type)
    if done:
        session.eval(ids[:done])
    return session.eval(ids[done:], "all")


def step(sessions, ids):
    """One token to each session, all in one step."""
    return cext.eval_batch([(session, [int(i)]) for session, i in zip(sessions, ids, strict=True)])


@pytest.mark.parametrize("kv_type", TYPES)
@pytest.mark.parametrize("spec", (LITE, WIDE, spec_named("moe_shared")), ids=lambda s: s.name)
@pytest.mark.parametrize("n", (0, 1, 63, 64, 65, 128, 200))
def test_a_fork_and_its_origin_go_their_own_ways(tiny_gguf, spec, n, kv_type):
    ids, others = tokens(spec, 330), tokens(spec, 330, seed=1)
    with cext.Model(tiny_gguf(spec), threads=2) as model:
        origin = model.session(400, kv_type)
        origin.eval(ids[:200])
        fork = origin.fork(n)
        assert (fork.n_past, fork.n_ctx, fork.kv_type) == (n, 400, kv_type)
        branch = np.concatenate([ids[:n], others[n:]])
        first, second = fork.eval(branch[n:280], "all"), origin.eval(ids[200:], "all")
        third = fork.eval(branch[280:], "all")
        want = model.session(400, kv_type)
        want.eval(ids[:200])
        want.rewind(n)
        np.testing.assert_array_equal(first, want.eval(branch[n:280], "all"))
        np.testing.assert_array_equal(third, want.eval(branch[280:], "all"))
        np.testing.assert_array_equal(second, fresh(model, ids, 200, kv_type))
        np.testing.assert_array_equal(fork.ids, branch)
        np.testing.assert_array_equal(origin.ids, ids)


@pytest.mark.parametrize("kv_type", TYPES)
def test_forks_in_one_step_write_apart(model, kv_type):
    """The origin and two forks of one partly filled block, all three in the same steps."""
    ids = tokens(LITE, 100)
    origin = model.session(200, kv_type)
    origin.eval(ids[:90])
    sessions = [origin, origin.fork(), origin.fork(70)]
    apart = [model.session(200, kv_type) for _ in sessions]
    for session, done in zip(apart, (90, 90, 70), strict=True):
        session.eval(ids[:90])
        session.rewind(done)
    for ids in np.stack([tokens(LITE, 6, seed=i) for i in range(3)], axis=1):
        np.testing.assert_array_equal(step(sessions, ids), step(apart, ids))


def test_forks_of_forks_outlive_their_origins(model):
    ids = tokens(LITE, 400)
    session = model.session(400)
    session.eval(ids[:50])
    for begin, end in pairwise(range(50, 400, 50)):
        session = session.fork()  # the last name of the origin goes
        gc.collect()
        session.eval(ids[begin:end])
    got = session.eval(ids[350:], "all")
    want = model.session(400)
    for begin, end in pairwise((0, *range(50, 400, 50))):
        want.eval(ids[begin:end])
    np.testing.assert_array_equal(got, want.eval(ids[350:], "all"))


@pytest.mark.parametrize("keep", (0, 1, 63, 64, 65, 127, 128, 150))
def test_rewinding_into_what_is_shared(model, keep):
    ids, others = tokens(LITE, 220), tokens(LITE, 220, seed=3)
    origin = model.session(220)
    origin.eval(ids[:150])
    fork = origin.fork()
    fork.rewind(keep)
    branch = np.concatenate([ids[:keep], others[keep:]])
    want = model.session(220)
    want.eval(ids[:150])
    want.rewind(keep)
    np.testing.assert_array_equal(fork.eval(branch[keep:], "all"), want.eval(branch[keep:], "all"))
    np.testing.assert_array_equal(origin.eval(ids[150:], "all"), fresh(model, ids, 150))


def test_repeating_what_is_shared(model):
    """As long as asked for, in memory of its own: no block of the past stands for a later one."""
    ids = tokens(LITE, 77)
    origin = model.session(1000)
    origin.eval(ids)
    fork = origin.fork(70)
    fork.repeat(900)
    np.testing.assert_array_equal(fork.ids, np.resize(ids[:70], 900))
    assert model.cache_usage().blocks == 1 + 1 + 14  # the first is shared; the origin's second; the fork's others
    np.testing.assert_array_equal(origin.eval([5]), fresh(model, np.append(ids, 5), 77)[0])


def test_bounds_of_a_fork(model):
    session = model.session(10)
    session.eval([1, 2, 3])
    for n in (-1, 4):
        with pytest.raises(cext.ArgumentError, match=str(n)):
            session.fork(n)
    with session._alone():
        refused = []

        def other():
            with pytest.raises(cext.BusyError) as caught:
                session.fork()
            refused.append(caught.value)

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert refused


def test_blocks_are_counted(model):
    def usage():
        gc.collect()
        told = model.cache_usage()
        return told.blocks, told.shared

    assert usage() == (0, 0)
    session = model.session(1 << 20)
    assert usage() == (0, 0)
    session.eval(tokens(LITE, 2 * BLOCK + 1))
    assert usage() == (3, 0)
    one = model.cache_usage().nbytes // 3
    forks = [session.fork(), session.fork(BLOCK)]
    assert usage() == (3, 3) and model.cache_usage().nbytes == 3 * one
    forks[0].eval([1])
    assert usage() == (4, 2)
    del session
    assert usage() == (3, 1)
    forks[0].rewind(BLOCK)
    assert usage() == (1, 1)
    forks.pop()
    assert usage() == (1, 0)
    other = model.session(10, "f32")
    other.eval([1])
    assert usage() == (2, 0)
    forks.clear()
    del other
    assert usage() == (0, 0) and model.cache_usage().nbytes == 0


def test_a_prefix_shared_by_sixteen(tiny_gguf):
    """The memory of one prefix and sixteen tails, and what sixteen separate sessions answer."""
    n_prefix, n_tail = 4096, 3
    spec = variant(LITE, name="deep", n_layer=2)
    ids, tails = tokens(spec, n_prefix), [tokens(spec, n_tail, seed=i + 1) for i in range(16)]
    with cext.Model(tiny_gguf(spec), threads=2) as model:
        prefix = model.session(n_prefix + n_tail)
        prefix.eval(ids)
        sessions = [prefix.fork() for _ in tails]
        got = [step(sessions, ids) for ids in np.stack(tails, axis=1)]
        usage = model.cache_usage()
        assert (usage.blocks, usage.shared) == (n_prefix // BLOCK + 16, n_prefix // BLOCK)
        apart = [model.session(n_prefix + n_tail) for _ in tails]
        for session in apart:
            session.eval(ids)
        for ids, logits in zip(np.stack(tails, axis=1), got, strict=True):
            np.testing.assert_array_equal(logits, step(apart, ids))


def test_threads_fork_evaluate_and_close_at_once(model):
    """Forks of one past in several threads: each gets what it would get alone, and all memory comes back."""
    ids = tokens(LITE, 150)
    origin = model.session(300)
    origin.eval(ids[:130])
    tails = [tokens(LITE, 20, seed=i) for i in range(4)]
    want = [fresh(model, np.concatenate([ids[:130], tail]), 130) for tail in tails]
    forks = [[origin.fork() for _ in range(6)] for _ in tails]
    wrong = []

    def work(mine, tail, logits):
        while mine:
            session = mine.pop()
            if not np.array_equal(session.eval(tail, "all"), logits):
                wrong.append(tail)
            again = session.fork(130)
            session.rewind(64)
            if not np.array_equal(again.eval(tail, "all"), logits):
                wrong.append(tail)

    threads = [threading.Thread(target=work, args=args) for args in zip(forks, tails, want, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    gc.collect()
    assert model.cache_usage().blocks == 3 and model.cache_usage().shared == 0
    np.testing.assert_array_equal(origin.eval(ids[130:], "all"), fresh(model, ids, 130))


def anonymous_bytes():
    """Of this process, resident and of no file."""
    line = next(s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from /proc")
def test_a_one_token_session_of_v2_lite_is_small(tiny_gguf):
    with cext.Model(tiny_gguf(LITE_CACHE), threads=2) as model:
        model.session(8192).eval([1])  # scratch and code
        before = anonymous_bytes()
        sessions = [model.session(8192) for _ in range(8)]
        for session in sessions:
            session.eval([1])
        assert model.cache_usage().nbytes == 8 * (2 << 20)
        assert anonymous_bytes() - before < 8 * 4_000_000
        sessions.clear()
        gc.collect()
        assert anonymous_bytes() - before < 4_000_000
        # A long one gives back what a rewind drops.
        session = model.session(8192)
        session.eval(tokens(LITE_CACHE, 1000))
        long = anonymous_bytes()
        session.rewind(1)
        assert long - anonymous_bytes() > 14 * (2 << 20)


def test_no_memory_changes_nothing(tiny_gguf):
    """The system refuses a block: the error says so, and the session goes on when there is memory again."""
    program = """
        import resource, sys
        import cext
        model = cext.Model(sys.argv[1], threads=1)
        warm = model.session(100, "f32")
        warm.eval([1, 2])
        session, other = model.session(100), model.session(100, "f32")
        pages = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (pages + (16 << 20), hard))
        for refused in (lambda: session.eval([1, 2]), lambda: cext.eval_batch([(other, [1]), (session, [1])])):
            try:
                refused()
            except cext.OutOfMemoryError as error:
                print(error, error.hint)
        print(session.n_past, other.n_past, model.cache_usage().blocks)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        print(len(session.eval([1, 2])), len(other.eval([1])))
    """
    if sys.platform != "linux":
        pytest.skip("a limit on a process's memory is Linux's")
    done = subprocess.run(
        [sys.executable, "-P", "-c", textwrap.dedent(program), tiny_gguf(LITE)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, second, state, rest = done.stdout.splitlines()
    assert "64 tokens" in first and "smaller context" in first and second == first
    assert (state, rest) == ("0 0 1", f"{LITE.n_vocab} {LITE.n_vocab}")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/statm")
def test_what_sessions_had_is_unmapped(tiny_gguf):
    """Addresses too, which is all that a slab takes whose pages were never touched or were given back."""

    def mapped():
        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()

    with cext.Model(tiny_gguf(LITE_CACHE), threads=1) as model:
        model.session(64).eval([1])
        gc.collect()
        before = mapped()
        for _ in range(100):  # each makes a slab of 2 MiB or more, the only one
            model.session(64).eval([1])
        gc.collect()
        assert mapped() - before < 50 << 20
