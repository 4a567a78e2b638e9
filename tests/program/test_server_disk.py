"""What has been read, on disk: found after a restart, whole or not at all, and never more than was asked for."""

from __future__ import annotations

import dataclasses
import errno
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from support import forks
from support.cli import PACKAGES, SECONDS, wait_until
from support.serving import RUN, USUAL, Served, running, served
from support.tiny import spec_named, variant
from support.vocab import write_model

import cext
from cext import SESSION_BLOCK
from dsv2cli.commands.serve import rules_of
from dsv2cli.server import blockfiles, disk
from dsv2cli.server.blockfiles import Folder, file_bytes, name_of

COMPLETION = "/completion"
PROMPT = [int(i) for i in np.random.default_rng(3).integers(0, 256, 3 * SESSION_BLOCK + 1)]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = variant(spec_named("lite"), n_ctx=4096)
    return write_model(tmp_path_factory.mktemp("disk") / "tiny.gguf", spec, endless=True)


def kept_in(folder: Path, budget: int = 1 << 30, **more: Any) -> Any:
    return dataclasses.replace(USUAL, disk=(folder, budget), **more)


def asked(server: Served, prompt: list[int] = PROMPT, **more: Any) -> Any:
    body = {"prompt": prompt, "n_predict": 3, "temperature": 0, "n_probs": 5}
    answer = server.asked(COMPLETION, **body | more)
    settle(server)
    return answer


def settle(server: Served) -> None:
    """Until all that waits has been written."""
    server.settle()
    wait_until(lambda: server.engine.disk is not None and server.engine.disk.held_bytes == 0)


def n_cached(answer: Any) -> int:
    return int(answer["timings"]["cache_n"])


def blocks_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.kv"))


def test_a_restart_finds_what_was_read_to_the_bit(path: Path, tmp_path: Path) -> None:
    with served(path, kept_in(tmp_path)) as first:
        assert n_cached(asked(first)) == 0
        from_memory = asked(first)
        assert n_cached(from_memory) == len(PROMPT) - 1
        assert first.engine.disk is not None and first.engine.disk.n_fetched == 0
    assert len(blocks_in(tmp_path)) == 3
    with served(path, kept_in(tmp_path)) as second:
        from_disk = asked(second)
        assert second.engine.disk is not None and second.engine.disk.n_fetched == n_cached(from_disk) == len(PROMPT) - 1
        usage = second.asked("/v1/completions", prompt=PROMPT[:150], max_tokens=1)["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] >= 128
        assert "llamacpp:cache_disk_tokens_total 192" in second.client.get("/metrics").text
    assert from_disk["completion_probabilities"] == from_memory["completion_probabilities"]


def test_what_was_loaded_is_the_session_that_was_stored(path: Path) -> None:
    with cext.Model(path, threads=2) as model, cext.Model(path, threads=1) as other:
        assert model.identity() == other.identity()
        for kv in ("f16", "q8_0", "f32"):
            session, copy = model.session(512, kv), other.session(300, kv)
            session.eval(PROMPT)
            for i in range(3):
                copy.append_block(session.block(i))
            assert list(copy.ids) == PROMPT[:-1]
            session.rewind(len(PROMPT) - 1)
            assert np.array_equal(session.eval(PROMPT[-1:]), copy.eval(PROMPT[-1:]))
            with pytest.raises(cext.ArgumentError):
                session.block(3)
            with pytest.raises(cext.ArgumentError):
                copy.append_block(session.block(0))  # it holds a part of a block
            with pytest.raises(ValueError, match="bytes"):
                model.session(64, kv).append_block(b"short")


def test_what_memory_has_no_room_for_is_found_on_disk(path: Path, tmp_path: Path) -> None:
    with served(path, kept_in(tmp_path, cache_bytes=1)) as server:
        asked(server)
        asked(server, [9] * 100)
        assert len(server.engine.prefixes) == 0
        assert n_cached(asked(server)) == 3 * SESSION_BLOCK
        longer = [*PROMPT, *range(100)]
        assert n_cached(asked(server, longer)) == 3 * SESSION_BLOCK
        assert n_cached(asked(server, longer)) == (len(longer) - 1) // SESSION_BLOCK * SESSION_BLOCK


def test_memory_s_beginning_is_gone_on_from(path: Path, tmp_path: Path) -> None:
    with served(path, kept_in(tmp_path)) as server:
        asked(server)
    with served(path, kept_in(tmp_path)) as server:
        asked(server, PROMPT[:100])  # a block is fetched, 36 tokens are read
        assert n_cached(asked(server)) == 3 * SESSION_BLOCK
        assert server.engine.disk is not None and server.engine.disk.n_fetched == 64 + (192 - 100)


def test_many_at_once_fetch_it_once(path: Path, tmp_path: Path) -> None:
    with served(path, kept_in(tmp_path)) as server:
        asked(server)
    with served(path, kept_in(tmp_path)) as server, ThreadPoolExecutor(8) as pool:
        body = {"prompt": PROMPT, "n_predict": 2, "temperature": 0}
        answers = list(pool.map(lambda _: server.asked(COMPLETION, **body), range(8)))
        assert len({answer["content"] for answer in answers}) == 1
        assert {n_cached(answer) for answer in answers} == {192}
        assert server.engine.disk is not None and server.engine.disk.n_fetched == 192


def test_keys_share_nothing_on_disk(path: Path, tmp_path: Path) -> None:
    rules = rules_of("127.0.0.1", ["sesame", "mustard"], [], [])
    found = []
    for key in ("sesame", "sesame", "mustard"):
        with served(path, kept_in(tmp_path), rules) as server:
            body = {"prompt": PROMPT, "n_predict": 1}
            answer = server.client.post(COMPLETION, json=body, headers={"authorization": f"Bearer {key}"}).json()
            found.append(n_cached(answer))
    assert found == [0, 192, 0]
    assert all(file.stat().st_mode & 0o77 == 0 for file in tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["flipped", "short", "empty", "another's"])
def test_damaged_files_are_removed_and_made_anew(path: Path, tmp_path: Path, damage: str) -> None:
    with served(path, kept_in(tmp_path)) as server:
        asked(server)
    first, second, _ = blocks_in(tmp_path)
    whole = second.read_bytes()
    bad = {
        "flipped": whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:],
        "short": whole[:-1],
        "empty": b"",
        "another's": first.read_bytes(),
    }[damage]
    second.write_bytes(bad)
    with served(path, kept_in(tmp_path)) as server:
        assert n_cached(asked(server)) == SESSION_BLOCK
    assert second.read_bytes() == whole or second.read_bytes()[:8] == whole[:8]
    with served(path, kept_in(tmp_path)) as server:
        assert n_cached(asked(server)) == 3 * SESSION_BLOCK


def test_files_of_other_tokens_under_a_name(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names are digests; what decides is the tokens."""
    monkeypatch.setattr(
        disk.Disk, "_names", lambda self, ids, salt: [name_of(i, bytes(32)) for i in range(len(ids) // 64)]
    )
    with served(path, kept_in(tmp_path)) as server:
        asked(server)
    with served(path, kept_in(tmp_path)) as server:
        assert n_cached(asked(server, [*PROMPT[:64], *[7] * 129])) == 64
        assert len(blocks_in(tmp_path)) == 3


def test_another_model_s_and_another_type_s_are_left_alone(path: Path, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other.gguf", variant(spec_named("lite"), n_ctx=4096, seed=99), endless=True)
    folder = tmp_path / "cache"
    for which, kv in ((path, "f32"), (path, "q8_0"), (other, "f32"), (path, "f32")):
        with served(which, kept_in(folder, kv=kv)) as server:
            n = n_cached(asked(server))
    assert n == 192 and len(blocks_in(folder)) == 9


def test_two_servers_on_one_folder(path: Path, tmp_path: Path) -> None:
    size = file_bytes(block_bytes(path))
    settings = kept_in(tmp_path, 5 * size)
    with served(path, settings) as one, served(path, settings) as two, ThreadPoolExecutor(4) as pool:
        asked(one)
        assert n_cached(asked(two)) == 192
        prompts = [[i] * 150 for i in range(24)]
        jobs = [pool.submit(asked, server, prompt) for prompt in prompts for server in (one, two)]
        watched = Folder(tmp_path, 5 * size)
        while not all(job.done() for job in jobs):
            assert taken_in(watched) <= 5 * size
        assert all(job.result()["stop"] for job in jobs)
        assert len(blocks_in(tmp_path)) in (4, 5)  # 2 a prompt
    assert {file.name for file in tmp_path.iterdir()} - {file.name for file in blocks_in(tmp_path)} == {".lock"}


def block_bytes(path: Path) -> int:
    with cext.Model(path, threads=1) as model:
        return model.session(64, "f32").block_bytes


def taken_in(folder: Folder) -> int:
    """Bytes of disk, between two writers."""
    time.sleep(0.01)
    with folder._alone():
        return sum(file.stat().st_blocks * 512 for file in folder.path.iterdir())


def test_a_full_disk_is_told_once(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(disk.console, "warn", told.append)

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(blockfiles.os, "fsync", full)
    with served(path, kept_in(tmp_path)) as server:
        for start in range(3):
            asked(server, [start, *PROMPT])
        assert n_cached(asked(server, [0, *PROMPT])) == 193  # from memory
    assert len(told) == 1 and "No space left" in told[0]
    assert [file.name for file in tmp_path.iterdir()] == [".lock"]


def test_what_ends_while_it_is_fetched(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with served(path, kept_in(tmp_path)) as server:
        asked(server)
    usual, may_read = Folder.read, threading.Event()
    monkeypatch.setattr(Folder, "read", lambda self, name: (may_read.wait(SECONDS), usual(self, name))[1])
    with served(path, kept_in(tmp_path)) as server:
        with pytest.raises(httpx.ReadTimeout):
            server.client.post(COMPLETION, json={"prompt": PROMPT}, timeout=0.1)
        assert server.asked(COMPLETION, prompt=[3] * 10, n_predict=1)  # others do not wait
        wait_until(lambda: server.engine.n_waiting == 0)
        may_read.set()
        assert n_cached(asked(server)) == 192
        stream = server.client.stream("POST", COMPLETION, json={"prompt": [1, *PROMPT], "stream": True})
        with stream as response:
            next(response.iter_bytes())  # and the server is stopped with one under way


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_process_that_ends(path: Path, tmp_path: Path, number: int) -> None:
    body = {"prompt": PROMPT, "n_predict": 1}
    options = ("--kv", "f32", "--cache-dir", str(tmp_path / "new" / "cache"), "--cache-disk", "1G")
    found = []
    for _ in range(2):
        with running(path, *options) as (process, address):
            found.append(n_cached(httpx.post(f"{address}{COMPLETION}", json=body, timeout=SECONDS).json()))
            if number == signal.SIGKILL:  # what was read is there soon, not only at the end
                wait_until(lambda: len(blocks_in(tmp_path / "new" / "cache")) == 3)
            process.send_signal(number)
            assert process.wait(SECONDS) == (0 if number == signal.SIGTERM else -number)
    assert found == [0, 192]


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (["--cache-dir", "{}", "--deterministic"], 2, "keeps nothing"),
        (["--cache-dir", "{}", "--cache", "0"], 2, "keeps nothing"),
        (["--cache-dir", "{}", "--cache-disk", "lots"], 2, "no size"),
        (["--cache-dir", "{}/file/below"], 1, "cannot keep what is read"),
        (["--slot-save-path", "{}/nowhere"], 1, "no folder"),
    ],
)
def test_what_does_not_start(path: Path, tmp_path: Path, options: list[str], code: int, says: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    given = [option.format(tmp_path) for option in options]
    command = [sys.executable, "-P", "-c", RUN, "serve", str(path), "--port", "0", *given]
    ended = forks.run(command, os.environ, SECONDS, text=True, cwd=PACKAGES)
    assert ended.returncode == code and says in ended.stderr, ended.stderr


# The folder.


def names(n: int, of: int = 0) -> list[str]:
    return [name_of(i, bytes([of]) * 31 + bytes([i])) for i in range(n)]


def test_the_oldest_and_deepest_go_first(tmp_path: Path) -> None:
    size = file_bytes(5000)
    folder = Folder(tmp_path, 4 * size)
    first, second = names(3), names(2, of=1)
    assert folder.write(first, lambda i: bytes(5000)) == 3
    assert folder.write(second, lambda i: bytes(5000)) == 2
    assert [folder.has(name) for name in (*first, *second)] == [True, True, False, True, True]
    folder.touch(first)
    assert folder.write(names(1, of=2), lambda i: bytes(5000)) == 1
    assert [folder.has(name) for name in (*first[:2], *second)] == [True, True, True, False]
    assert folder.nbytes == 4 * size == taken_in(folder)


def test_a_prefix_that_does_not_fit_is_kept_as_far_as_it_does(tmp_path: Path) -> None:
    folder = Folder(tmp_path, 2 * file_bytes(5000))
    assert folder.write(names(3), lambda i: bytes(5000)) == 2
    assert Folder(tmp_path, 1).nbytes == 0 and not blocks_in(tmp_path)  # and a smaller budget makes room at once


def test_nothing_else_in_the_folder_is_touched(tmp_path: Path) -> None:
    for name in ("letter.txt", "000000-ab.kv", "model.kv"):
        (tmp_path / name).write_bytes(bytes(9000))
    (tmp_path / ".unfinished-1").write_bytes(bytes(9000))
    folder = Folder(tmp_path, 1)
    folder.write(names(1), lambda i: bytes(10))
    assert sorted(file.name for file in tmp_path.iterdir()) == [".lock", "000000-ab.kv", "letter.txt", "model.kv"]


WRITER = """
import sys
from pathlib import Path
from dsv2cli.server.blockfiles import Folder, name_of
folder = Folder(Path(sys.argv[1]), 40 * 8192)
for round in range(60):
    folder.write([name_of(i, bytes([round % 7]) * 31 + bytes([i])) for i in range(6)], lambda i: bytes([i]) * 5000)
"""


def test_processes_that_write_and_one_that_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-c", WRITER, str(tmp_path)]
    writers = [subprocess.Popen(command, cwd=PACKAGES) for _ in range(3)]
    wait_until(lambda: len(blocks_in(tmp_path)) > 3)
    writers[0].kill()
    folder = Folder(tmp_path, 40 * 8192)
    while any(writer.poll() is None for writer in writers):
        assert taken_in(folder) <= 40 * 8192 + 8192  # and what the killed one had begun
    assert [writer.wait() for writer in writers[1:]] == [0, 0]
    folder = Folder(tmp_path, 40 * 8192)  # removes it
    assert all((content := folder.read(file.name)) and content[0] == int(file.name[:6]) for file in blocks_in(tmp_path))
    assert not list(tmp_path.glob(".unfinished*"))
