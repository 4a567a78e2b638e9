"""cext.system, cext.cores, os_posix.c: pages, locks of processes and descriptors, room on disk, folders that last."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from support.page_cache import is_dropped, read_in_small_pages, skip_unless_dropped

import cext
from cext import system
from cext.system import resident_bytes

COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
CEXT = Path(__file__).parents[2] / "cext"
LOCK = "import os, sys; from cext import system; print(system.try_lock(os.open(sys.argv[1], os.O_RDWR)))"


def locked_elsewhere(path: Path) -> bool:
    """Whether another process finds it locked."""
    command = [sys.executable, "-P", "-c", LOCK, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
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
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=600, check=True)
    assert int(done.stdout) == 1
    assert 1 <= cext.cores() <= len(os.sched_getaffinity(0))


@pytest.mark.skipif(COMPILER is None, reason="needs a C compiler")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts pages in /proc")
@pytest.mark.parametrize("flags", [(), ("-U__linux__",)], ids=["linux", "others"])
def test_forgotten_pages_are_the_systems_again(tmp_path: Path, flags: tuple[str, ...]) -> None:
    """By the advice that Linux follows, and by mapping anew where a system does not; they can be written again."""
    built, size, kept = tmp_path / "os.so", 64 << 20, 1 << 20
    command = [str(COMPILER), "-std=gnu11", "-shared", "-fPIC", *flags, f"-I{CEXT}", str(CEXT / "base/os_posix.c")]
    subprocess.run([*command, "-pthread", "-o", str(built)], check=True, timeout=600)
    pages = ctypes.CDLL(str(built))
    pages.ds_pages_new_small.restype = ctypes.c_void_p
    pages.ds_pages_new_small.argtypes = [ctypes.c_size_t]
    pages.ds_pages_forget.argtypes = pages.ds_pages_release.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    start = pages.ds_pages_new_small(size)
    ctypes.memset(start, 7, size)
    full = resident_bytes()
    pages.ds_pages_forget(start + kept, size - 2 * kept)
    assert full - resident_bytes() > size // 2
    ctypes.memset(start + kept, 5, kept)
    found = [ctypes.string_at(at, 1) for at in (start, start + kept, start + size - kept)]
    pages.ds_pages_release(start, size)
    assert found == [b"\7", b"\5", b"\7"]


def test_the_largest_cache(tmp_path: Path) -> None:
    assert system.cache_bytes(tmp_path) is None
    for index, size in enumerate(("48K", "32K", "2048K", "491520K", "")):
        folder = tmp_path / f"sys/devices/system/cpu/cpu0/cache/index{index}"
        folder.mkdir(parents=True)
        (folder / "size").write_text(f"{size}\n", encoding="ascii")
    assert system.cache_bytes(tmp_path) == 480 << 20


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    with system.replaced(path) as file:
        file.write(b"one")
        assert not path.exists() and [p.name[:3] for p in tmp_path.iterdir()] == [".a."]
    assert path.read_bytes() == b"one" and stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o640)
    with system.replaced(path, prefix="x-", suffix=".part", lasting=False) as file:
        file.write(b"two")
        [unfinished] = [p.name for p in tmp_path.iterdir() if p != path]
        assert unfinished.startswith("x-") and unfinished.endswith(".part") and path.read_bytes() == b"one"
    assert path.read_bytes() == b"two" and stat.S_IMODE(path.stat().st_mode) == 0o640
    with pytest.raises(ZeroDivisionError), system.replaced(path) as file:
        file.write(b"three" * 100_000)
        raise ZeroDivisionError

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"), system.replaced(path) as file:
        file.write(b"four")
    assert [p.name for p in tmp_path.iterdir()] == ["a"] and path.read_bytes() == b"two"


def test_two_that_replace_a_file_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with system.replaced(path) as one, system.replaced(path) as other:
        one.write(b"one")
        other.write(b"other")
    assert path.read_bytes() == b"one" and [p.name for p in tmp_path.iterdir()] == ["a"]


def cold(path: Path) -> None:
    with path.open("rb") as file:
        system.sync_and_drop(file.fileno())


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A file of some huge pages, where the system drops files."""
    skip_unless_dropped(tmp_path)
    path = tmp_path / "large"
    path.write_bytes(os.urandom(10 * system.HUGE_PAGE + 12345))
    return path


def test_the_pages_that_a_file_lies_in_are_told(large: Path) -> None:
    """Where it can lie in huge ones; skipped elsewhere."""
    cold(large)
    with large.open("rb") as file, system._mapped(file) as pages:
        for at in range(0, len(pages), system.HUGE_PAGE):
            pages[at]
    held, huge = system.cached_pages(large) or (0.0, 0.0)
    if huge < 0.9:
        pytest.skip(f"huge pages hold {huge} of a file here")
    assert held == 1
    read_in_small_pages(large)
    assert system.cached_pages(large) == (1.0, 0.0)


def test_what_is_on_the_disk_leaves_the_cache(large: Path) -> None:
    assert not is_dropped(large)  # just written
    cold(large)
    assert is_dropped(large)


@pytest.mark.parametrize("lacks", ["call", "file system"])
def test_a_system_that_does_not_drop_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lacks: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(3 << 20))

    def refuse(*_: int) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    if lacks == "call":
        monkeypatch.delattr(os, "posix_fadvise", raising=False)
    else:
        monkeypatch.setattr(os, "posix_fadvise", refuse, raising=False)
        monkeypatch.setattr(os, "POSIX_FADV_DONTNEED", 4, raising=False)
    cold(path)
    assert path.read_bytes() == bytes(3 << 20)


def test_a_disk_that_is_full_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    (tmp_path / "file").write_bytes(bytes(3 << 20))
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        cold(tmp_path / "file")


@pytest.mark.parametrize(
    ("told", "small"),
    [
        ("Rss: 100 kB\nAnonymous: 30 kB\nFilePmdMapped: 60 kB\n", 10 << 10),
        ("Rss: 100 kB\nAnonymous: 30 kB\n", None),
        ("", None),
    ],
)
def test_bytes_of_files_in_small_pages(tmp_path: Path, told: str, small: int | None) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/smaps_rollup").write_text(f"00400000-7fff0000 ---p 00000000 00:00 0 [rollup]\n{told}")
    assert system.small_file_bytes(tmp_path) == small
