"""What a caller may do wrong with models and sessions, and that nothing is lost or broken after it."""

import signal
import threading
import time

import numpy as np
import pytest
from support.tiny import SPECS, Checkpoint, gguf_metadata, gguf_tensors, spec_named, tokens, variant, write_tensors

import cext

LITE, PRO, V3 = SPECS[0], SPECS[1], spec_named("v3")


@pytest.fixture
def model(tiny_gguf):
    with cext.Model(tiny_gguf(LITE), threads=2) as opened:
        yield opened


@pytest.mark.parametrize("ids", ([-1], [LITE.n_vocab], [3, 1 << 20, 4], [1 << 31], [-(1 << 40)]), ids=str)
def test_id_out_of_range(model, ids):
    session = model.session(8)
    with pytest.raises(ValueError, match=str(next(i for i in ids if not 0 <= i < LITE.n_vocab))):
        session.eval(ids)
    assert session.n_past == 0


def test_no_ids(model):
    session = model.session(8)
    for nothing in ([], np.empty(0, np.int32)):
        with pytest.raises(ValueError):
            session.eval(nothing)
    assert session.n_past == 0


@pytest.mark.parametrize("ids", ("abc", [1.5], None, 7, np.ones(3, np.float32), np.ones((2, 2), np.int32)), ids=repr)
def test_ids_of_another_type(model, ids):
    with pytest.raises((TypeError, ValueError)):
        model.session(8).eval(ids)


@pytest.mark.parametrize("ids", (np.arange(5, dtype=np.int32), np.arange(10, dtype=np.int32)[::2], (1, 2, 3)), ids=str)
def test_ids_as_arrays_and_sequences(model, ids):
    as_list = model.session(8).eval([int(i) for i in ids], "all")
    np.testing.assert_array_equal(model.session(8).eval(ids, "all"), as_list)


def test_logits_argument(model):
    with pytest.raises(ValueError, match="some"):
        model.session(8).eval([1], "some")


def test_context_full_evaluates_nothing(model):
    session, ids = model.session(8), tokens(LITE, 9)
    session.eval(ids[:5])
    with pytest.raises(cext.ContextFullError, match="8"):
        session.eval(ids[5:])
    assert session.n_past == 5
    np.testing.assert_array_equal(session.eval(ids[5:8]), refilled(model, ids[:5], ids[5:8]))
    with pytest.raises(cext.ContextFullError):
        session.eval(ids[8:])
    assert session.n_past == session.n_ctx == 8


def refilled(model, first, second):
    session = model.session(8)
    session.eval(first)
    return session.eval(second)


def test_context_full_in_a_batch_evaluates_nothing(model):
    roomy, full = model.session(8), model.session(2)
    full.eval([1, 2])
    with pytest.raises(cext.ContextFullError):
        cext.eval_batch([(roomy, [1]), (full, [3])])
    assert (roomy.n_past, full.n_past) == (0, 2)


@pytest.mark.parametrize("n", (-1, 4, 1 << 40))
def test_rewind_out_of_range(model, n):
    session = model.session(8)
    session.eval([1, 2, 3])
    with pytest.raises((ValueError, OverflowError)):
        session.rewind(n)
    assert session.n_past == 3


@pytest.mark.parametrize("kv_type", ("f16", "q8_0", "f32"))
def test_repeated_context(model, kv_type):
    """However a context is lengthened, its rows are the first ones in turn; and these stay as they are."""
    once, twice, plain = (model.session(24, kv_type=kv_type) for _ in range(3))
    for session in (once, twice, plain):
        session.eval([1, 2, 3, 4])
    once.repeat(22)
    twice.repeat(8)
    twice.repeat(22)
    assert once.n_past == twice.n_past == 22
    long = once.eval([5])
    np.testing.assert_array_equal(twice.eval([5]), long)
    short = plain.eval([5])
    assert np.abs(long - short).max() > 0.01 * np.abs(short).max()
    once.rewind(4)
    np.testing.assert_array_equal(once.eval([5]), short)


@pytest.mark.parametrize("n", (-1, 2, 9, 1 << 40))
def test_repeat_out_of_range(model, n):
    session = model.session(8)
    with pytest.raises((ValueError, OverflowError)):
        session.repeat(4)
    session.eval([1, 2, 3])
    with pytest.raises((ValueError, OverflowError)):
        session.repeat(n)
    assert session.n_past == 3


@pytest.mark.parametrize("options", ({"n_ctx": 0}, {"n_ctx": -5}, {"kv_type": "q3"}, {"n_ctx": 1 << 40}), ids=str)
def test_session_arguments(model, options):
    with pytest.raises((ValueError, OverflowError)):
        model.session(**options)


def test_a_cache_beyond_all_memory(model):
    with pytest.raises((MemoryError, ValueError)):
        model.session((1 << 31) - 1).eval([1])


@pytest.mark.parametrize("options", ({"threads": 0}, {"threads": -1}, {"threads": 100000}, {"isa": "z80"}), ids=str)
def test_model_arguments(tiny_gguf, options):
    with pytest.raises(ValueError):
        cext.Model(tiny_gguf(LITE), **options)


def test_missing_file(tmp_path):
    with pytest.raises(OSError, match=r"absent\.gguf"):
        cext.Model(tmp_path / "absent.gguf")


def test_unknown_tap(model):
    for name in ("no_such_thing-0", "l_out", "l_out-99", "dense_hidden-1", "router_logits-0", "q_a_norm-0"):
        session = model.session(8)
        with pytest.raises((ValueError, KeyError), match=name):
            session.eval([1], tap=cext.Tap({name: None}))
        assert session.n_past == 0


def test_batch_arguments(model, tiny_gguf):
    session = model.session(8)
    with pytest.raises(ValueError):
        cext.eval_batch([])
    with pytest.raises(ValueError):
        cext.eval_batch([(session, [])])
    with pytest.raises(ValueError):
        cext.eval_batch([(session, [1]), (session, [2])])
    with cext.Model(tiny_gguf(PRO), threads=1) as other, pytest.raises(ValueError):
        cext.eval_batch([(session, [1]), (other.session(8), [1])])
    assert session.n_past == 0


def test_nothing_of_a_bad_batch_is_evaluated(model):
    first, second = model.session(600), model.session(600)
    for bad in ([(first, [1]), (second, [LITE.n_vocab])], [(first, [1] * 600), (second, [1] * 600)]):
        with pytest.raises(ValueError):
            cext.eval_batch(bad)
        assert (first.n_past, second.n_past) == (0, 0)


def test_interrupt_between_chunks(model):
    """Ctrl-C stops a long prompt; what was evaluated before it stays, and the session goes on."""
    ids = tokens(LITE, 1 << 15)
    session = model.session(len(ids))
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            session.eval(ids)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    done = session.n_past
    assert done % 512 == 0 and done < len(ids)
    fresh = model.session(len(ids))
    if done:
        fresh.eval(ids[:done])
    np.testing.assert_array_equal(session.eval(ids[done : done + 3]), fresh.eval(ids[done : done + 3]))


def test_use_after_close(tiny_gguf):
    model = cext.Model(tiny_gguf(LITE), threads=2)
    session = model.session(8)
    session.eval([1])
    model.close()
    model.close()
    for use in (lambda: session.eval([1]), lambda: model.session(8), lambda: cext.eval_batch([(session, [1])])):
        with pytest.raises(cext.EngineError, match="closed"):
            use()


def test_session_outlives_the_names_of_its_model(tiny_gguf):
    session = cext.Model(tiny_gguf(LITE), threads=2).session(8)
    assert np.isfinite(session.eval([1, 2, 3])).all()
    assert session.model.hparams["name"] == "lite"


def test_two_threads_in_one_session(model):
    """Whoever comes second is refused at once; the first is not disturbed."""
    session, ids = model.session(512), tokens(LITE, 512)
    expected = model.session(512).eval(ids)
    refused, stop = [], time.monotonic() + 300

    def work():
        while not refused and time.monotonic() < stop:
            try:
                session.rewind(0)
                np.testing.assert_array_equal(session.eval(ids), expected)
            except cext.ContextFullError:
                pass  # the other has come and gone between the two calls
            except cext.EngineError as error:
                refused.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert refused and "thread" in str(refused[0])
    session.rewind(0)
    np.testing.assert_array_equal(session.eval(ids), expected)


def test_one_thread_a_session_shares_a_model(model):
    """Sessions of one model in several threads take turns and get what they would get alone."""
    prompts = [tokens(LITE, 100, seed=i) for i in range(3)]
    expected = [model.session(100).eval(ids, "all") for ids in prompts]
    wrong = []

    def work(ids, logits):
        for _ in range(5):
            if not np.array_equal(model.session(100).eval(ids, "all"), logits):
                wrong.append(ids)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(prompts, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def every_tensor():
    """(spec, legacy, tensor) over the forms a block can take, one layer of each kind."""
    seen = set()
    for spec, legacy in ((LITE, False), (LITE, True), (PRO, False)):
        for name in gguf_tensors(Checkpoint(spec), legacy):
            part = name.split(".", 2)[-1] if name.startswith("blk.") else name
            if part not in seen:
                seen.add(part)
                yield pytest.param(spec, legacy, name, id=name)


@pytest.mark.parametrize(("spec", "legacy", "name"), list(every_tensor()))
def test_a_tensor_missing_or_misshapen_is_named(tmp_path, spec, legacy, name):
    metadata, tensors = gguf_metadata(spec, legacy), gguf_tensors(Checkpoint(spec), legacy)
    if name != "output.weight":  # without it the embeddings serve
        without = {key: value for key, value in tensors.items() if key != name}
        with pytest.raises(cext.FormatError, match=name.removesuffix("b.weight").removesuffix("_")):
            cext.Model(write_tensors(tmp_path / "missing.gguf", metadata, without))
    for axis in range(tensors[name].ndim):
        misshapen = tensors | {name: np.ascontiguousarray(np.delete(tensors[name], 0, axis))}
        with pytest.raises(cext.FormatError, match=name):
            cext.Model(write_tensors(tmp_path / f"shape{axis}.gguf", metadata, misshapen))


REQUIRED = (
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.kv_lora_rank",
    "rope.dimension_count",
    "expert_count",
    "expert_used_count",
    "expert_feed_forward_length",
)


@pytest.mark.parametrize("key", REQUIRED)
def test_a_missing_key_is_named(tmp_path, key):
    metadata = {k: v for k, v in gguf_metadata(LITE).items() if k != f"deepseek2.{key}"}
    with pytest.raises(cext.FormatError, match=key):
        cext.Model(write_tensors(tmp_path / "m.gguf", metadata, gguf_tensors(Checkpoint(LITE))))


@pytest.mark.parametrize(
    ("key", "value"),
    (
        ("block_count", 0),
        ("block_count", 4),
        ("attention.head_count", 0),
        ("rope.dimension_count", 7),
        ("rope.dimension_count", 24),
        ("expert_used_count", 9),
        ("expert_used_count", 0),
        ("expert_group_count", 3),
        ("attention.layer_norm_rms_epsilon", float("nan")),
        ("expert_weights_scale", float("inf")),
        ("embedding_length", 1 << 31),
        ("block_count", "three"),
    ),
)
def test_impossible_values_are_refused(tmp_path, key, value):
    metadata = gguf_metadata(LITE) | {f"deepseek2.{key}": value}
    with pytest.raises(cext.EngineError):
        cext.Model(write_tensors(tmp_path / "m.gguf", metadata, gguf_tensors(Checkpoint(LITE))))


def test_another_architecture(tmp_path):
    with pytest.raises(cext.UnsupportedError, match="llama") as caught:
        cext.Model(
            write_tensors(tmp_path / "m.gguf", {"llama.block_count": 1}, {"t": np.ones(4, np.float32)}, arch="llama")
        )
    assert caught.value.hint


def test_another_rope_scaling(tmp_path):
    metadata = gguf_metadata(LITE) | {"deepseek2.rope.scaling.type": "longrope"}
    with pytest.raises(cext.UnsupportedError, match="longrope"):
        cext.Model(write_tensors(tmp_path / "m.gguf", metadata, gguf_tensors(Checkpoint(LITE))))


def test_router_without_a_bias(tmp_path):
    """V3's selection bias is a tensor that a sigmoid router may do without."""
    spec = variant(V3, n_layer=2)
    tensors = {k: v for k, v in gguf_tensors(Checkpoint(spec)).items() if "exp_probs_b" not in k}
    with cext.Model(write_tensors(tmp_path / "m.gguf", gguf_metadata(spec), tensors)) as model:
        assert np.isfinite(model.session(4).eval([1, 2])).all()


def test_ctrl_c_at_the_lock_leaves_the_session_usable(model):
    """It can come when the lock is taken and nothing is begun: the thread goes on, others are told."""
    session, told = model.session(8), []
    session._alone().__enter__()
    assert session.eval([1, 2]).shape == (LITE.n_vocab,)

    def other():
        with pytest.raises(cext.BusyError) as caught:
            session.eval([3])
        told.append(caught.value)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert told and session.n_past == 2
