"""Models larger than their budget of memory: the mapping's logits to the bit, whatever the drive does."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.tiny import MOE, Spec, tokens, variant

import cext
from cext import ArgumentError, Device, FileError, Model, Place

# Experts that are large beside the blocks of a drive; the second kind has two sizes, one a layer.
PLAIN = Spec("disk", seed=11, n_layer=4, n_ff_expert=160, n_expert=16, n_used=4)
V3 = variant(PLAIN, name="disk_v3", v3=True, n_group=4, n_group_used=2, norm_topk=True)
KINDS = (PLAIN, V3, variant(PLAIN, name="disk_one", n_used=1, n_shared=1))

SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>
/* A drive that takes DRIVE_MS for a read of the model, which makes the file DRIVE_READS, and fails where the file
 * DRIVE_BROKEN is there. */
ssize_t pread64(int fd, void *to, size_t n, off_t at) {
    ssize_t (*real)(int, void *, size_t, off_t) = (ssize_t (*)(int, void *, size_t, off_t))dlsym(RTLD_NEXT, "pread64");
    const char *ms = getenv("DRIVE_MS"), *reads = getenv("DRIVE_READS"), *broken = getenv("DRIVE_BROKEN");
    if (ms) {
        long t = atol(ms);
        if (reads) close(open(reads, O_CREAT | O_WRONLY, 0600));
        nanosleep(&(struct timespec){t / 1000, t % 1000 * 1000000}, NULL);
    }
    if (broken && access(broken, F_OK) == 0) return errno = EIO, -1;
    return real(fd, to, n, at);
}
ssize_t pread(int fd, void *to, size_t n, off_t at) { return pread64(fd, to, n, at); }
"""


@pytest.fixture(scope="module")
def slow_drive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not sys.platform.startswith("linux"):
        pytest.skip("the shim is preloaded as Linux does it")
    folder = tmp_path_factory.mktemp("drive")
    (folder / "drive.c").write_text(SHIM)
    made = subprocess.run(
        ["cc", "-shared", "-fPIC", "-o", folder / "drive.so", folder / "drive.c", "-ldl"], check=False
    )
    if made.returncode:
        pytest.skip("no C compiler")
    return folder / "drive.so"


def least(path: Path) -> int:
    """The smallest budget that the model opens with, as its error says."""
    with pytest.raises(ArgumentError, match="expected at least") as caught:
        Model(path, ram=1)
    return int(str(caught.value).split("at least ")[1].split(",")[0])


def budgets(path: Path) -> list[int]:
    with Model(path) as model:
        whole = model.nbytes
    low = least(path)
    assert low < whole
    return [low, low + (whole - low) // 4, whole - 1]


def run(model: Model, spec: Spec, kv_type: Any = "f16") -> list[bytes]:
    """Prompts in pieces, decoding, all logits, a fork, a batch, taps."""
    ids = tokens(spec, 120)
    session = model.session(160, kv_type)
    out = [session.eval(ids[at:end]) for at, end in ((0, 50), (50, 51), (51, 77))]
    out.append(session.eval(ids[77:86], "all"))
    out += [session.eval(ids[at : at + 1]) for at in range(86, 100)]
    fork = session.fork(90)
    out.append(cext.eval_batch([(session, ids[:3]), (fork, ids[:1]), (model.session(16, kv_type), ids[:7])], [0, 1, 2]))
    for n in (1, 19):
        names = [f"{name}-{il}" for il in spec.moe_layers for name in ("experts", "expert_hidden", "l_out")]
        tap = cext.Tap(dict.fromkeys(names))
        model.session(32, kv_type).eval(ids[:n], tap=tap)
        out += [tap[name] for name in names]
    return [array.tobytes() for array in out]


@pytest.mark.parametrize("spec", KINDS, ids=lambda s: s.name)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_every_budget_gives_the_mapping_s_bits(tiny_gguf: Callable[[Spec], Path], spec: Spec, threads: int) -> None:
    path = tiny_gguf(spec)
    with Model(path, threads=threads) as model:
        expected = run(model, spec)
        assert model.drive_counts() is None
    for ram in budgets(path):
        with Model(path, threads=threads, ram=ram) as model:
            assert run(model, spec) == expected
            assert run(model, spec) == expected
            assert model.drive_counts() is not None


def prompt_and_answer(model: Model, ids: Any, logits: Any) -> list[bytes]:
    session = model.session(len(ids) + 8)
    return [session.eval(ids, logits).tobytes(), *(session.eval(ids[i : i + 1]).tobytes() for i in range(3))]


@pytest.mark.parametrize(
    "spec", (*KINDS, variant(PLAIN, name="disk_plain", **MOE, n_head_kv=2, rope=16, v=16)), ids=lambda s: s.name
)
@pytest.mark.parametrize(("n", "logits"), [(1025, "all"), (1024 + 13, "last"), (2048, "last"), (2500, "all")])
def test_a_long_step_is_its_pieces(tiny_gguf: Callable[[Spec], Path], spec: Spec, n: int, logits: str) -> None:
    """To the bit, whatever of a layer's experts stays until all pieces have had it."""
    path, ids = tiny_gguf(spec), tokens(spec, n)
    with Model(path, threads=2) as model:
        assert model.max_step == cext.MAX_STEP
        expected = prompt_and_answer(model, ids, logits)
    for ram in budgets(path):
        with Model(path, threads=2, ram=ram) as model:
            assert model.max_step >= 2500
            assert prompt_and_answer(model, ids, logits) == expected


@pytest.mark.parametrize("wanted", [(700, 900, 1500), (1, 0, 1500), (3, 600, 1)], ids=str)
def test_a_long_step_of_two_devices_and_three_sequences(
    tiny_gguf: Callable[[Spec], Path], wanted: tuple[int, ...]
) -> None:
    """What a piece has of each sequence, and of whose last rows the logits are wanted."""
    path, ids = tiny_gguf(PLAIN), tokens(PLAIN, 1500)
    places = [Place("experts", 1, range(1, 4), range(8)), Place("attention", 1, range(2, 3))]
    lengths, cuts = (700, 900, 1500), ((700, 324, 0), (0, 576, 448), (0, 0, 1024), (0, 0, 28))
    with Model(path, threads=2) as model:
        sessions, done = [model.session(1600) for _ in lengths], [0, 0, 0]
        rows: list[list[Any]] = [[], [], []]
        for cut in cuts:
            some = [i for i in range(3) if cut[i]]
            n_logits = [max(0, min(cut[i], wanted[i] - (lengths[i] - done[i] - cut[i]))) for i in some]
            logits = cext.eval_batch([(sessions[i], ids[done[i] : done[i] + cut[i]]) for i in some], n_logits)
            for i, n in zip(some, n_logits, strict=True):
                rows[i].append(logits[:n])
                logits, done[i] = logits[n:], done[i] + cut[i]
        expected = [np.concatenate([row for of_one in rows for row in of_one])]
        expected.append(cext.eval_batch([(session, ids[:1]) for session in sessions]))
    for ram in budgets(path):
        with Model(path, threads=2, devices=[Device(threads=2)], placement=places, ram=ram) as model:
            sessions = [model.session(1600) for _ in lengths]
            got = [cext.eval_batch([(s, ids[:n]) for s, n in zip(sessions, lengths, strict=True)], wanted)]
            got.append(cext.eval_batch([(session, ids[:1]) for session in sessions]))
            assert [array.tobytes() for array in got] == [array.tobytes() for array in expected]


def test_how_far_a_long_step_has_come(tiny_gguf: Callable[[Spec], Path]) -> None:
    """Told to another thread, from nothing to all of it; of a step of one piece, nothing."""
    path, ids = tiny_gguf(PLAIN), tokens(PLAIN, 300)
    with Model(path, threads=1, ram=least(path)) as model:
        session, shares = model.session(512), set[float]()
        session.eval(ids)
        assert model.step_share() == 0
        end = time.monotonic() + 300
        while not shares:  # until it is looked at within a step
            assert time.monotonic() < end
            session.rewind(0)
            step = threading.Thread(target=lambda: cext.eval_batch([(session, ids)], piece=1), daemon=True)
            step.start()
            before = 0.0
            while step.is_alive():
                share = model.step_share()
                assert before <= share <= 1 or share == 0
                before = share
                shares |= {share} if 0 < share < 1 else set()
            assert model.step_share() == 0


@pytest.mark.parametrize("piece", [1, 7, 64, 300])
@pytest.mark.parametrize("spec", KINDS, ids=lambda s: s.name)
def test_pieces_are_the_caller_s(tiny_gguf: Callable[[Spec], Path], spec: Spec, piece: int) -> None:
    """Whether weights are in memory or not: what they compute is what steps of so many do."""
    n = min(300, 40 * piece)
    path, ids = tiny_gguf(spec), tokens(spec, n)
    with Model(path, threads=2) as model:
        session = model.session(320)
        for at in range(0, n, piece):
            last = cext.eval_batch([(session, ids[at : at + piece])], [int(at + piece >= n)])
        expected = [last.tobytes(), session.eval(ids[:1]).tobytes()]
        uses = model.expert_uses()
    for ram in (None, *budgets(path)):
        with Model(path, threads=2, ram=ram) as model:
            session = model.session(320)
            got = [cext.eval_batch([(session, ids)], piece=piece).tobytes(), session.eval(ids[:1]).tobytes()]
            assert got == expected
            np.testing.assert_array_equal(model.expert_uses(), uses)


def test_each_expert_is_read_once_a_long_step(tiny_gguf: Callable[[Spec], Path]) -> None:
    spec = variant(PLAIN, name="disk_deep", n_layer=9, n_expert=8)
    path, ids = tiny_gguf(spec), tokens(spec, 3000)
    with Model(path) as model:
        whole = model.nbytes
    ram = least(path) + (whole - least(path)) * 6 // 10
    once = len(spec.moe_layers) * spec.n_expert * 3 * spec.n_embd * spec.n_ff_expert * 4
    read = []
    for step in (cext.MAX_STEP, len(ids)):
        with Model(path, ram=ram) as model:
            session = model.session(len(ids))
            for at in range(0, len(ids), step):
                session.eval(ids[at : at + step])
            decoding, reading = model.drive_counts() or pytest.fail("nothing is counted")
            assert (reading.tokens, decoding.tokens) == (len(ids), 0)
            read.append(reading.bytes_read)
    assert read[1] <= once < read[0]


def test_a_step_that_is_too_long(tiny_gguf: Callable[[Spec], Path]) -> None:
    path, ids = tiny_gguf(PLAIN), tokens(PLAIN, 4500)
    with Model(path, threads=2, ram=least(path)) as model:
        session = model.session(4096)
        for piece in (0, -1, cext.MAX_STEP + 1):
            with pytest.raises(ArgumentError, match="piece"):
                cext.eval_batch([(session, ids[:10])], piece=piece)
            with pytest.raises(ArgumentError, match="piece"):
                model.step_bytes(10, piece)
        assert model.step_bytes(1000, 100) < model.step_bytes(1000)
        with pytest.raises(ArgumentError, match=f"more than {model.max_step} tokens"):
            cext.eval_batch([(session, ids[:100]), (model.session(4096), ids[: model.max_step - 99])])
        with pytest.raises(cext.ContextFullError):
            session.eval(ids)
        assert session.n_past == 0
        assert model.step_bytes(model.max_step) > model.step_bytes(cext.MAX_STEP)
        with pytest.raises(ValueError):
            model.step_bytes(model.max_step + 1)
        tap = cext.Tap({"l_out-1": None})
        session.eval(ids[:1100], tap=tap)
        assert len(tap["l_out-1"]) == 1100
    with Model(path, threads=2) as model, pytest.raises(ArgumentError, match="more than 1024 tokens"):
        cext.eval_batch([(model.session(2048), ids[:1025])])


@pytest.mark.parametrize("kv_type", ["f32", "q8_0"])
def test_experts_of_two_devices(tiny_gguf: Callable[[Spec], Path], kv_type: str) -> None:
    path = tiny_gguf(PLAIN)
    places = [Place("experts", 1, range(1, 4), range(8)), Place("attention", 1, range(2, 3))]
    with Model(path, threads=2) as model:
        expected = run(model, PLAIN, kv_type)
    for ram in budgets(path):
        with Model(path, threads=2, devices=[Device(threads=2)], placement=places, ram=ram) as model:
            assert run(model, PLAIN, kv_type) == expected


def test_a_split_model_and_a_trained_one(tmp_path: Path) -> None:
    """The packaged model: groups of experts, tensors of three formats."""
    path = next((Path(cext.__file__).parents[1] / "dsv2cli" / "models").glob("*.gguf"))
    ids = np.arange(200) % 300 + 5
    with Model(path, threads=2) as model:
        session = model.session(256)
        expected = [session.eval(ids), *(session.eval(ids[i : i + 1]) for i in range(20))]
        whole = model.nbytes
    for ram in (least(path), whole * 2 // 3):
        with Model(path, threads=2, ram=ram) as model:
            session = model.session(256)
            got = [session.eval(ids), *(session.eval(ids[i : i + 1]) for i in range(20))]
            assert [a.tobytes() for a in got] == [a.tobytes() for a in expected]


def test_what_fits_is_mapped(tiny_gguf: Callable[[Spec], Path]) -> None:
    path = tiny_gguf(PLAIN)
    with Model(path) as model:
        whole = model.nbytes
    for ram in (whole, 1 << 62):
        with Model(path, ram=ram) as model:
            assert model.drive_counts() is None
    for ram in (0, -1, 1 << 63):
        with pytest.raises(ValueError, match="ram is"):
            Model(path, ram=ram)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("spec", KINDS, ids=lambda s: s.name)
def test_what_weights_need_is_told_alike_mapped_and_within_a_budget(
    tiny_gguf: Callable[..., Path], spec: Spec, legacy: bool
) -> None:
    path = tiny_gguf(spec, legacy)
    with Model(path) as model:
        mapped = model.needs()
        assert mapped.all == model.nbytes
    assert mapped.least == least(path)
    assert mapped.experts == len(spec.moe_layers) * spec.n_expert * 3 * spec.n_embd * spec.n_ff_expert * 4
    assert mapped.experts < mapped.slots and mapped.shared + mapped.slots >= mapped.all
    with Model(path, ram=mapped.least) as model:
        assert model.needs() == mapped


def test_counts_add_up(tiny_gguf: Callable[[Spec], Path]) -> None:
    path = tiny_gguf(PLAIN)
    ids = tokens(PLAIN, 100)
    with Model(path, ram=least(path)) as model:
        session = model.session(128)
        session.eval(ids[:80])
        for token in ids[80:]:
            session.eval([int(token)])
        decoding, reading = model.drive_counts() or pytest.fail("nothing is counted")
    layers = len(PLAIN.moe_layers)
    assert decoding.tokens == 20 and reading.tokens == 80
    assert decoding.needed == 20 * layers * PLAIN.n_used
    assert reading.needed <= layers * PLAIN.n_expert
    assert decoding.ready + decoding.late <= decoding.needed
    expert = 3 * PLAIN.n_embd * PLAIN.n_ff_expert * 4
    assert reading.bytes_read + decoding.bytes_read >= (decoding.needed - decoding.ready - decoding.late) * expert
    assert (decoding.bytes_read + reading.bytes_read) % expert == 0


def test_usage_tells_what_to_keep(tiny_gguf: Callable[[Spec], Path]) -> None:
    """Counts of a run before change what is read and not what is computed; those of another shape are refused."""
    path = tiny_gguf(PLAIN)
    with Model(path) as model:
        expected = run(model, PLAIN)
        uses = model.expert_uses()
    for given in (uses, np.zeros_like(uses), np.full_like(uses, 2**64 - 1)):
        with Model(path, ram=budgets(path)[1], uses=given) as model:
            assert run(model, PLAIN) == expected
    with pytest.raises(ArgumentError, match="uses of 3 experts"):
        Model(path, ram=budgets(path)[1], uses=uses.reshape(-1)[:3])


@pytest.mark.parametrize("how", ["written to", "cut short"])
def test_a_file_that_changes(tiny_gguf: Callable[[Spec], Path], tmp_path: Path, how: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(tiny_gguf(PLAIN).read_bytes())
    os.utime(path, (0, 0))  # a clock of the file system may tick slower than a test writes
    with Model(path, ram=least(path)) as model:
        session = model.session(64)
        session.eval([1, 2, 3])
        if how == "cut short":
            os.truncate(path, path.stat().st_size // 2)
        else:
            with path.open("r+b") as file:
                file.seek(-5000, 2)
                file.write(b"\0" * 100)
        for _ in range(3):
            with pytest.raises(FileError, match=r"when it was opened|after it was opened"):
                session.eval([4])
        assert session.n_past == 3


def test_a_file_that_is_replaced_is_still_the_old_one(tiny_gguf: Callable[[Spec], Path], tmp_path: Path) -> None:
    path, other = tmp_path / "model.gguf", tmp_path / "other.gguf"
    path.write_bytes(tiny_gguf(PLAIN).read_bytes())
    with Model(path, threads=2) as model:
        expected = run(model, PLAIN)
    with Model(path, threads=2, ram=least(path)) as model:
        other.write_bytes(b"something else")
        other.replace(path)
        assert run(model, PLAIN) == expected


def script(path: Path, shim: Path, code: str, **env: str) -> subprocess.Popen[str]:
    told = {**os.environ, "LD_PRELOAD": str(shim), **env}
    return subprocess.Popen(
        [sys.executable, "-P", "-c", textwrap.dedent(code), str(path), str(least(path))],
        env=told,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_drive_that_fails(tiny_gguf: Callable[[Spec], Path], slow_drive: Path, tmp_path: Path) -> None:
    """One error a step, and the model goes on when the drive does."""
    code = """
        import pathlib, sys
        import cext
        broken = pathlib.Path(__import__("os").environ["DRIVE_BROKEN"])
        with cext.Model(sys.argv[1], ram=int(sys.argv[2])) as model:
            session = model.session(64)
            first = model.session(64).eval([1, 2, 3]).tobytes()
            broken.touch()
            for _ in range(2):
                try:
                    session.eval([1, 2, 3])
                except cext.FileError as error:
                    print(error)
            broken.unlink()
            print(session.n_past, session.eval([1, 2, 3]).tobytes() == first)
    """
    process = script(tiny_gguf(PLAIN), slow_drive, code, DRIVE_BROKEN=str(tmp_path / "broken"))
    out, err = process.communicate(timeout=600)
    lines = out.splitlines()
    assert process.returncode == 0, err
    assert len(lines) == 3 and all("cannot read" in line and "nput/output" in line for line in lines[:2]), out
    assert lines[2] == "0 True"


INTERRUPTED = """
    import os, signal, sys, threading, time
    import cext
    from cext import Device, Place
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    placement = [Place("experts", 1, range(1, 4), range({apart}))] if {apart} else []
    devices = [Device(threads=1)] if {apart} else []
    model = cext.Model(sys.argv[1], ram=int(sys.argv[2]), devices=devices, placement=placement)
    session = model.session(2048)
    os.environ["DRIVE_MS"] = "{read_ms}"  # from here on: opening reads often
    def stop(*_):  # again and again: between two steps it stops nothing
        model.stop()
        signal.setitimer(signal.ITIMER_REAL, 0.02)
    if {stop}:
        signal.signal(signal.SIGINT, stop)
        signal.signal(signal.SIGALRM, stop)
    try:
        print("ready", flush=True)
        while True:
            session.eval([1, 2, 3] * {n})
            session.rewind(0)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    except cext.StoppedError:
        signal.setitimer(signal.ITIMER_REAL, 0)
        print("stopped", session.n_past, flush=True)
"""


@pytest.mark.parametrize(
    ("apart", "n"),
    [(0, 10), (8, 10), (16, 10), (0, 400)],
    ids=["one device", "two devices", "experts apart", "a long step"],
)
@pytest.mark.parametrize(("stop", "said"), [(False, "interrupted"), (True, "stopped 0")])
def test_ctrl_c_is_heard_while_the_drive_is_slow(
    tiny_gguf: Callable[[Spec], Path], slow_drive: Path, tmp_path: Path, apart: int, n: int, stop: bool, said: str
) -> None:
    """On the main thread, whichever thread waits for the experts: of `apart` of them a second device's. The first read
    does not end within the test: nothing waits for it."""
    code = INTERRUPTED.format(stop=stop, apart=apart, n=n, read_ms=1_000_000)
    process = script(tiny_gguf(PLAIN), slow_drive, code, DRIVE_READS=str(tmp_path / "reads"))
    assert process.stdout is not None
    limit = threading.Timer(300, process.kill)  # its lines end then
    limit.start()
    try:
        assert process.stdout.readline() == "ready\n"
        while not (tmp_path / "reads").exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == said + "\n"
    finally:
        limit.cancel()
        process.kill()
        process.communicate()


def test_a_step_that_comes_after_a_stop_leaves_it_to_the_one_under_way(
    tiny_gguf: Callable[[Spec], Path], slow_drive: Path
) -> None:
    code = """
        import os, sys, threading, time
        import cext
        model = cext.Model(sys.argv[1], ram=int(sys.argv[2]))
        os.environ["DRIVE_MS"] = "300"  # from here on: opening reads often
        first, second = model.session(256), model.session(256)
        def step():
            try:
                first.eval([1, 2, 3] * 10)
                print("not stopped", flush=True)
            except cext.StoppedError:
                print("stopped", flush=True)
        thread = threading.Thread(target=step)
        thread.start()
        while not model.drive_counts()[1].needed:  # it is under way
            time.sleep(0.01)
        model.stop()
        second.eval([4])
        thread.join()
        print(second.n_past)
    """
    process = script(tiny_gguf(PLAIN), slow_drive, code)
    out, err = process.communicate(timeout=600)
    assert (out, process.returncode) == ("stopped\n1\n", 0), err


def test_stop_without_a_step_stops_nothing(tiny_gguf: Callable[[Spec], Path]) -> None:
    path = tiny_gguf(PLAIN)
    with Model(path, ram=least(path)) as model:
        model.stop()
        session = model.session(32)
        assert np.isfinite(session.eval([1, 2, 3])).all()
    with pytest.raises(ArgumentError, match="closed"):
        model.stop()


def test_a_forked_child_lets_go_of_it(tiny_gguf: Callable[[Spec], Path]) -> None:
    path = tiny_gguf(PLAIN)
    with Model(path, threads=2, ram=least(path)) as model:
        session = model.session(32)
        session.eval([1, 2, 3])
        child = os.fork()
        if child == 0:
            try:
                session.eval([4])
            except ArgumentError:
                model.close()
                os._exit(0)
            os._exit(1)
        assert os.waitpid(child, 0)[1] == 0
        session.eval([4])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from /proc")
def test_it_stays_in_its_budget(tiny_gguf: Callable[[Spec], Path]) -> None:
    """What weights, steps and cache add to the process, whose memory the system tells."""
    spec = variant(PLAIN, name="disk_large", n_embd=256, n_ff_expert=512, n_expert=32)
    path = tiny_gguf(spec)
    with Model(path) as model:
        whole = model.nbytes
    ram = least(path) + (whole - least(path)) // 3
    code = f"""
        import cext
        from pathlib import Path
        from cext.system import resident_bytes
        def anonymous():  # of no file, which the system takes back from who has not used it for a while
            told = [line.split() for line in Path("/proc/self/status").read_text().splitlines()]
            return sum(int(line[1]) << 10 for line in told if line[0] in ("RssAnon:", "VmSwap:"))
        ids = {[int(i) for i in tokens(spec, 200)]}
        base, of_no_file = resident_bytes(), anonymous()
        with cext.Model({str(path)!r}, threads=2, ram={ram}) as model:
            session = model.session(512)
            for _ in range(3):
                session.rewind(0)
                session.eval(ids[:100])
                for token in ids[100:]:
                    session.eval([token])
            print(resident_bytes() - base, model.step_bytes(128) + session.kv_bytes, anonymous() - of_no_file)
    """
    command = [sys.executable, "-P", "-c", textwrap.dedent(code)]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    grown, beside, held = map(int, out.split())
    assert whole * 0.2 < held
    assert grown <= ram * 1.05 + beside + (4 << 20), "and the engine's code and tables"


def test_what_was_passed_goes_before_what_is_to_come(tiny_gguf: Callable[[Spec], Path]) -> None:
    """Of experts that every token needs, those of the layer whose turn is the farthest: else all go before theirs."""
    spec = variant(PLAIN, name="disk_round", n_layer=13, n_expert=4, n_used=4)
    path = tiny_gguf(spec)
    with Model(path) as model:
        whole = model.nbytes
    with Model(path, threads=1, ram=least(path) + (whole - least(path)) * 9 // 10) as model:
        session, counts = model.session(8), []
        for _ in range(100):
            session.rewind(0)
            session.eval([5])
            counts.append((model.drive_counts() or pytest.fail("nothing is counted"))[0])
    late = counts[-1] - counts[29]
    read = late.bytes_read / (3 * spec.n_embd * spec.n_ff_expert * 4)
    assert read / late.needed < 0.42, "0.38; 0.48 where all layers are alike"
