"""cext.system and cext.cores: locks between processes and descriptors, room on the disk, folders that last."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

import cext
from cext import system

LOCK = "import os, sys; from cext import system; print(system.try_lock(os.open(sys.argv[1], os.O_RDWR)))"


def locked_elsewhere(path: Path) -> bool:
    """Whether another process finds it locked."""
    command = [sys.executable, "-P", "-c", LOCK, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.strip() == "False"


@pytest.mark.parametrize("missing", ["", "flock"])
def test_a_lock_keeps_other_processes_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    """By flock, and by fcntl where a file system has no flock."""
    path = tmp_path / "lock"
    fd = os.open(path, os.O_RDWR | os.O_CREAT)

    def refuse(fd: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    if missing:
        monkeypatch.setattr(fcntl, "flock", refuse)
        command = LOCK.replace("; from", "; import fcntl; fcntl.flock = fcntl.lockf; from")
        monkeypatch.setitem(globals(), "LOCK", command)
    assert system.try_lock(fd) and locked_elsewhere(path)
    os.close(fd)
    assert not locked_elsewhere(path)


def test_no_locks_at_all_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(fcntl, "lockf", refuse)
    with (tmp_path / "lock").open("w") as file, pytest.raises(OSError, match="No locks"):
        system.try_lock(file.fileno())


def test_reserving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "file").open("w+b") as file:
        file.write(b"abc")
        file.flush()
        system.reserve(file.fileno(), 1 << 20)
        assert os.fstat(file.fileno()).st_size == 1 << 20
        assert os.pread(file.fileno(), 6, 0) == b"abc\0\0\0"
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
        assert not system.reserve(file.fileno(), 2 << 20)
        assert os.fstat(file.fileno()).st_size == 2 << 20


def test_a_new_folder_lasts_with_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    sync = os.fsync

    def note(fd: int) -> None:
        synced.append(str(Path(f"/proc/self/fd/{fd}").readlink()) if sys.platform == "linux" else str(tmp_path))
        sync(fd)

    monkeypatch.setattr(os, "fsync", note)
    system.make_folder(tmp_path / "new")
    assert synced == [str(tmp_path)] and (tmp_path / "new").is_dir()
    system.make_folder(tmp_path / "new")
    assert len(synced) == 1
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        system.make_folder(tmp_path / "file")


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs affinity masks, as Linux has them")
def test_cores_follow_the_affinity_mask() -> None:
    code = "import os, cext; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); print(cext.cores())"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert int(done.stdout) == 1
    assert 1 <= cext.cores() <= len(os.sched_getaffinity(0))
