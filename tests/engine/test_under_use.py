"""While a model is in use another thread closes it, the process forks, the file is rewritten, the thread has little
stack, the caller's arrays change. Each is told or harmless; none is a crash, a hang or a wrong answer."""

import multiprocessing
import os
import resource
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from weakref import WeakValueDictionary

import numpy as np
import pytest
from support.gguf_bytes import U32, Tensor, gguf, tiny_model
from support.tiny import Checkpoint, gguf_metadata, gguf_tensors, spec_named, variant, write_gguf

import cext
from cext import EngineError, _engine

SPEC = variant(spec_named("lite"), n_layer=2)
SECONDS = float(os.environ.get("STRESS_SECONDS", "1.0"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "m.gguf", SPEC)


# Closing under use.


class OpenGguf:
    def __init__(self, path: Path) -> None:
        self.file = cext.Gguf(path)

    def use(self) -> None:
        assert self.file.read("token_embd.weight").shape == (SPEC.n_vocab, SPEC.n_embd)
        assert self.file.raw("output_norm.weight").size == 4 * SPEC.n_embd
        assert self.file.metadata["deepseek2.block_count"] == SPEC.n_layer

    def close(self) -> None:
        self.file.close()


class OpenSession:
    """A model with a session per thread, made as they come."""

    def __init__(self, path: Path) -> None:
        self.model = cext.Model(path, threads=2)

    def use(self) -> None:
        session = self.model.session(64)
        assert np.isfinite(session.eval(np.arange(40), "all")).all()
        session.rewind(3)
        assert session.eval([5]).shape == (SPEC.n_vocab,)

    def close(self) -> None:
        self.model.close()


class OpenLayer:
    def __init__(self, path: Path) -> None:
        tensors = {name: t for name, t in gguf_tensors(Checkpoint(SPEC)).items() if name.startswith("blk.1.")}
        self.layer = cext.Layer({"general.architecture": "deepseek2"} | gguf_metadata(SPEC), 1, tensors, threads=2)

    def use(self) -> None:
        out, taps = self.layer.forward(np.ones((64, SPEC.n_embd), np.float32), 2, ("ffn_norm",))
        assert np.isfinite(out).all()
        assert taps["ffn_norm"].shape == (64, SPEC.n_embd)

    def close(self) -> None:
        self.layer.close()


@pytest.mark.parametrize("kind", [OpenGguf, OpenSession, OpenLayer])
def test_closing_under_use(path: Path, kind: Callable[[Path], OpenGguf | OpenSession | OpenLayer]) -> None:
    """Calls that began end on memory that is still there; calls after close are told. STRESS_SECONDS: longer, under a
    sanitizer."""
    deadline, n_closed, wrong = time.monotonic() + SECONDS, 0, []

    def work(opened: OpenGguf | OpenSession | OpenLayer) -> None:
        try:
            while True:
                opened.use()
        except EngineError as error:
            if "is closed" not in str(error):
                wrong.append(error)
        except BaseException as error:
            wrong.append(error)

    while time.monotonic() < deadline or not n_closed:
        opened = kind(path)
        threads = [threading.Thread(target=work, args=(opened,)) for _ in range(3)]
        for thread in threads:
            thread.start()
        time.sleep(0.001 * (n_closed % 5))
        opened.close()
        opened.close()  # again: nothing
        for thread in threads:
            thread.join()
        n_closed += 1
    assert not wrong


@pytest.mark.parametrize("what", ["session", "model"])
def test_a_step_under_way_ends_as_it_began(path: Path, what: str) -> None:
    ids = np.arange(1024) % SPEC.n_vocab
    with cext.Model(path, threads=1) as model:
        expected = model.session(1024).eval(ids)
    for i in range(200):
        model, answers = cext.Model(path, threads=1), []
        session = model.session(1024)

        def evaluate(session: cext.Session, answers: list[object]) -> None:
            try:
                answers.append(session.eval(ids))
            except EngineError as error:
                answers.append(error)

        thread = threading.Thread(target=evaluate, args=(session, answers))
        thread.start()
        time.sleep(0.0005 * (i % 8))
        under_way = thread.is_alive()
        _engine.session_close(session._handle) if what == "session" else model.close()
        thread.join()
        model.close()
        with pytest.raises(EngineError, match="is closed"):
            session.eval([1])
        if under_way and isinstance(answers[0], np.ndarray):
            assert np.array_equal(answers[0], expected)
            return
        assert not isinstance(answers[0], Exception) or "is closed" in str(answers[0])
    raise AssertionError("no step was met")


# A forked process.


def in_child(work: Callable[[], str]) -> str:
    """What work returns in a forked child; one that hangs is killed."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        with suppress(BaseException):
            try:
                said = work()
            except BaseException as error:
                said = f"{type(error).__name__}: {error}"
            os.write(write, said.encode())
        os._exit(0)
    os.close(write)
    killer = threading.Timer(300, os.kill, (child, 9))
    killer.start()
    with os.fdopen(read, "rb") as pipe:
        said = pipe.read().decode()
    killer.cancel()
    os.waitpid(child, 0)
    return said


needs_fork = pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")


@needs_fork
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("devices", [(), (cext.Device(threads=2),)], ids=["one device", "two"])
def test_a_model_after_a_fork_is_refused(path: Path, devices: tuple[cext.Device, ...], tmp_path: Path) -> None:
    model = cext.Model(path, threads=2, devices=devices)
    session = model.session(16)
    expected = session.eval([1, 2, 3])
    assert "ArgumentError: the model was opened in process" in in_child(lambda: str(session.eval([4])))

    def open_again() -> str:
        model.close()
        with cext.Model(path, threads=2) as own:
            return str(np.array_equal(own.session(16).eval([1, 2, 3]), expected))

    def use(call: str, *args: int) -> None:
        said = in_child(lambda: str(getattr(session, call)(*args)))
        assert said.startswith("ArgumentError: the model was opened in process"), call
        assert session.n_past == 3

    use("fork")
    use("rewind", 1)
    use("repeat", 10)
    session.save(tmp_path / "session")
    assert "the model was opened in process" in in_child(lambda: str(model.load_session(tmp_path / "session", 16)))
    assert in_child(open_again) == "True"
    assert session.eval([4]).shape == (SPEC.n_vocab,)


@needs_fork
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_child_forked_while_a_session_opens_can_close_the_model(path: Path) -> None:
    """There the other thread is gone in the midst of it: what it would have released, nobody may wait for."""
    opening, forked = threading.Event(), threading.Event()

    class Slow(WeakValueDictionary[int, cext.Session]):
        def __setitem__(self, key: int, session: cext.Session) -> None:
            opening.set()
            forked.wait()
            super().__setitem__(key, session)

    model = cext.Model(path, threads=1)
    model._sessions = Slow()
    opener = threading.Thread(target=model.session, args=(16,))
    opener.start()
    opening.wait()
    said = in_child(lambda: str(model.close()))
    forked.set()
    opener.join()
    assert said == "None"


@needs_fork
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_layer_after_a_fork_is_refused(path: Path) -> None:
    opened = OpenLayer(path)
    opened.use()
    assert "ArgumentError: the model was opened in process" in in_child(lambda: str(opened.use()))
    opened.use()


# A file that changes.


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def write_into(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-100, os.SEEK_END)
        file.write(b"\0" * 8)


@pytest.mark.parametrize(("change", "words"), [(cut, "bytes long"), (grow, "bytes long"), (write_into, "written to")])
def test_a_file_that_changes_under_a_model_is_told(path: Path, change: Callable[[Path], None], words: str) -> None:
    os.utime(path, (0, 0))  # a clock of the file system may tick slower than a test writes
    with cext.Model(path, threads=2) as model, cext.Gguf(path) as file:
        session = model.session(16)
        session.eval([1, 2])
        change(path)
        for call in (
            lambda: session.eval([3]),
            lambda: file.read("token_embd.weight"),
            lambda: file.raw("output_norm.weight"),
            lambda: file.metadata["tokenizer.ggml.tokens"],
        ):
            with pytest.raises(cext.FileError, match=rf"m\.gguf.*{words}") as raised:
                call()
            assert "open it again" in raised.value.hint
        assert session.n_past == 2


def test_a_file_that_is_replaced_by_name_goes_on(path: Path, tmp_path: Path) -> None:
    with cext.Model(path, threads=1) as model:
        session = model.session(16)
        before = session.eval([1, 2])
        other = tmp_path / "new.gguf"
        other.write_bytes(b"not a model")
        other.replace(path)
        session.rewind(0)
        assert np.array_equal(session.eval([1, 2]), before)


# Little stack, and arrays that change.


@pytest.fixture
def small_stack() -> Iterator[None]:
    before = threading.stack_size(128 << 10)
    yield
    threading.stack_size(before)


@pytest.mark.usefixtures("small_stack")
@pytest.mark.parametrize("kind", ["f16", "q8_0", "f32"])
def test_evaluating_in_a_thread_of_128_kb(path: Path, kind: str) -> None:
    with cext.Model(path, threads=1) as model:
        results: list[object] = []

        def evaluate() -> None:
            try:
                sessions = [model.session(1200, kind) for _ in range(64)]  # type: ignore[arg-type]
                cext.eval_batch([(s, [1, 2, 3]) for s in sessions])
                results.append(sessions[0].eval(np.arange(1100) % SPEC.n_vocab))
            except BaseException as error:
                results.append(error)

        thread = threading.Thread(target=evaluate)
        thread.start()
        thread.join()
        assert isinstance(results[0], np.ndarray), results


def test_ids_that_change_under_a_check_never_leave_the_vocabulary(path: Path) -> None:
    """The engine checks the ids that it copied: an id that is out of range is told or is not there."""
    ids = np.zeros(512, np.int32)
    stop = threading.Event()

    def flip() -> None:
        while not stop.is_set():
            ids[::7] = 1 << 30
            ids[::7] = 0

    thread = threading.Thread(target=flip)
    thread.start()
    try:
        with cext.Model(path, threads=1) as model:
            session = model.session(512)
            deadline = time.monotonic() + SECONDS
            while time.monotonic() < deadline:
                with suppress(ValueError):
                    assert np.isfinite(session.eval(ids)).all()
                session.rewind(0)
    finally:
        stop.set()
        thread.join()


def test_taps_are_filled_on_success_only(path: Path) -> None:
    with cext.Model(path, threads=1) as model:
        session = model.session(8)
        tap = cext.Tap({"l_out-0": None, "no_such": None})
        with pytest.raises(ValueError, match="no_such"):
            session.eval([1, 2], tap=tap)
        assert tap == {"l_out-0": None, "no_such": None}
        grow(path)
        tap = cext.Tap({"l_out-0": None})
        with pytest.raises(cext.FileError):
            session.eval([1, 2], tap=tap)
        assert tap == {"l_out-0": None}


# Numbers.


@pytest.mark.parametrize("seed", [-1, 1 << 64, 1 << 80])
def test_a_seed_that_does_not_fit_is_refused(seed: int) -> None:
    with pytest.raises(cext.ArgumentError, match=f"seed is {seed}"):
        cext.Sampler(seed=seed)


def test_the_largest_seed_is_taken() -> None:
    assert cext.Sampler(seed=(1 << 64) - 1).seed == (1 << 64) - 1


def test_a_tensor_larger_than_memory_of_an_unknown_type_is_refused_first(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf([], [Tensor("x", (1 << 30, 1 << 30), kind=200)], bytes(64)))
    with cext.Gguf(path) as file, pytest.raises(cext.UnsupportedError, match="`x` is type 200"):
        file.read("x")


@pytest.mark.parametrize(
    "key", ["embedding_length", "feed_forward_length", "expert_feed_forward_length", "attention.q_lora_rank"]
)
def test_widths_that_overflow_with_a_steps_tokens_are_refused(tmp_path: Path, key: str) -> None:
    tiny = tiny_model()
    tiny.values[key] = (U32, (1 << 20) + 1)
    path = tmp_path / "m.gguf"
    path.write_bytes(tiny.content())
    with pytest.raises(cext.FormatError, match=rf"`deepseek2\.{key}` is 1048577, expected . to 1048576"):
        cext.Model(path)


def test_opening_and_closing_keeps_no_descriptor(path: Path) -> None:
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    for _ in range(min(soft, 1024) + 8):
        cext.Gguf(path).close()
