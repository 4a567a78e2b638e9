"""What this process has of the machine: the memory it takes and may still take, locks, room on the disk.

Every call of Python that is not the same on all operating systems is named here, once: Linux and macOS are what is
written, another system is another module with these names.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import secrets
import stat
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

ROOT = Path("/")  # where /proc and /sys lie
GRAPHICS = ("dri/renderD*", "nvidia[0-9]*", "dxg", "kgsl-*", "mali[0-9]*")  # under /dev

CANNOT = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)  # a file system that lacks a call
READERS, READ_BYTES, DIRECT_ALIGN = 4, 1 << 20, 4096  # as memory/readers.h and base/os.h have them
NO_LOCKS = (errno.ENOLCK, *CANNOT)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
HUGE_PAGE = 2 << 20  # as base/os.h has it


def resident_bytes() -> int:
    """Physical memory of this process now; its peak where the system does not tell."""
    import resource  # noqa: PLC0415 - no Windows has it

    try:
        return int(Path("/proc/self/statm").read_bytes().split()[1]) * resource.getpagesize()
    except (OSError, ValueError, IndexError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def own_bytes() -> int | None:
    """Physical memory of this process that is no file's; None where the system does not tell."""
    told = dict(_pairs(_read(Path("/proc/self/status")).replace(":", " ").replace(" kB", "")))
    return 1024 * told["RssAnon"] if "RssAnon" in told else None


def has_graphics(root: Path = ROOT) -> bool:
    """Whether the system may have a GPU: on Linux, whether a driver has made a device file for one, which takes no time
    to see where asking Vulkan takes a tenth of a second; elsewhere it may."""
    if not sys.platform.startswith("linux"):
        return True
    devices = root / "dev"
    return any(next(devices.glob(pattern), None) is not None for pattern in GRAPHICS)


def free_bytes(root: Path = ROOT, *, swap: bool = True) -> int | None:
    """Memory that this process can take before something is killed; None where the system does not tell.

    It is what the system can free at once, and swap, but no more than each of the process's cgroups leaves it. Without
    swap: before something is swapped out, or held up by a cgroup's high mark.
    """
    told = dict(_pairs(_read(root / "proc/meminfo").replace(":", " ").replace("kB", "")))
    if "MemAvailable" not in told:
        return None
    free = 1024 * (told["MemAvailable"] + (told.get("SwapFree", 0) if swap else 0))
    return max(0, min([free, *_left_in_cgroups(root, high=not swap)]))


def memory_limit(root: Path = ROOT) -> int | None:
    """The least that any of this process's cgroups allows; None where none is limited below the machine's memory."""
    told = dict(_pairs(_read(root / "proc/meminfo").replace(":", " ").replace("kB", "")))
    whole = 1024 * told.get("MemTotal", 1 << 50)
    limits = [most for _, most, _ in _memory_cgroups(root, high=False) if most < whole]
    return min(limits, default=None)


def cpu_quota(root: Path = ROOT) -> float | None:
    """Processors' worth of time that this process's cgroups give it; None where they do not limit it."""
    given = []
    for folder, is_first in _cgroups(root, "cpu"):
        if is_first:
            words = _read(folder / "cpu.cfs_quota_us").split() + _read(folder / "cpu.cfs_period_us").split()
        else:
            words = _read(folder / "cpu.max").split()
        if len(words) == 2 and all(word.isdigit() for word in words) and int(words[1]):  # no limit: "max", or -1
            given.append(int(words[0]) / int(words[1]))
    return min(given, default=None)


def cache_bytes(root: Path = ROOT) -> int | None:
    """The largest of the first processor's caches, which others may share; None where the system does not tell."""
    sizes = []
    for path in (root / "sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = _read(path).strip()
        if text.endswith("K") and text[:-1].isdigit():
            sizes.append(int(text[:-1]) << 10)
    return max(sizes, default=None)


def _left_in_cgroups(root: Path, *, high: bool) -> Iterator[int]:
    """What each cgroup with a limit leaves, from the process's own up to the root's; without its swap. high: the mark
    at which it is held up is a limit too."""
    for folder, most, is_first in _memory_cgroups(root, high=high):
        taken = _number(folder / ("memory.usage_in_bytes" if is_first else "memory.current"))
        if taken is not None:
            # Pages of files count as used, and go when memory is wanted: the mapped weights among them.
            told = dict(_pairs(_read(folder / "memory.stat")))
            prefix = "total_" if is_first else ""  # with what is below it
            yield most - taken + sum(told.get(f"{prefix}{kind}_file", 0) for kind in ("active", "inactive"))


def _memory_cgroups(root: Path, *, high: bool) -> Iterator[tuple[Path, int, bool]]:
    """Cgroups that limit memory: folder, limit, whether of the first version."""
    for folder, is_first in _cgroups(root, "memory"):
        names = ("memory.limit_in_bytes",) if is_first else ("memory.max", "memory.high") if high else ("memory.max",)
        marks = [most for most in (_number(folder / name) for name in names) if most is not None]
        if marks:
            yield folder, min(marks), is_first


def _cgroups(root: Path, controller: str) -> Iterator[tuple[Path, bool]]:
    """The folders of this process's cgroups with a controller, its own first, and whether they are of the first
    version."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if number == "0":
            folders, is_first = _upwards(root / "sys/fs/cgroup", group), False
        elif controller in controllers.split(","):
            folders, is_first = _upwards(root / "sys/fs/cgroup" / controller, group), True
        else:
            continue
        for folder in folders:
            yield folder, is_first


def _upwards(mount: Path, group: str) -> Iterator[Path]:
    """A cgroup's folder and those above it; the mount alone where a container shows its own cgroup as the root."""
    folder = mount / group.lstrip("/")
    while folder != mount and mount in folder.parents:
        yield folder
        folder = folder.parent
    yield mount


def _pairs(text: str) -> Iterator[tuple[str, int]]:
    for line in text.splitlines():
        words = line.split()
        if len(words) == 2 and words[1].isdigit():
            yield words[0], int(words[1])


def _number(path: Path) -> int | None:
    """None where there is none: "max", or no such file."""
    text = _read(path).strip()
    return int(text) if text.isdigit() else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def try_lock(fd: int) -> bool:
    """Lock a file, open to write, for this process until the descriptor is closed; False where another has it.

    flock first: NFS makes a lock of bytes of it, for which the file must be open to write. Where it is missing, fcntl's
    own. OSError where the file system knows no locks.
    """
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise
    return True


def reserve(fd: int, nbytes: int) -> bool:
    """Make a file nbytes long and claim the disk for all of it; False where the file system cannot claim. What is new
    reads as zeros. OSError where there is no room (one of FULL).
    """
    os.ftruncate(fd, nbytes)
    if not hasattr(os, "posix_fallocate") or nbytes == 0:
        return nbytes == 0
    try:
        os.posix_fallocate(fd, 0, nbytes)
    except OSError as error:
        if error.errno not in CANNOT:
            raise
        return False
    return True


def free_disk(folder: Path) -> int:
    """Bytes that may still be written in a folder."""
    stat = os.statvfs(folder)
    return stat.f_bavail * stat.f_frsize


def read_at(fd: int, view: memoryview, offset: int) -> int:
    """Read into view from an offset of the file; the number of bytes read, 0 at its end."""
    return os.preadv(fd, [view], offset)


def direct_read_rate(path: Path, pieces: Sequence[tuple[int, int]], seconds: float, most: int) -> float | None:
    """Bytes a second of a file's pieces (offset, bytes), read past the system's cache by READERS threads in their order
    for so long, or so many bytes; None where the system or the file system does not read past it.
    """
    if not hasattr(os, "O_DIRECT") or not pieces:
        return None
    try:
        file = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        return None
    n_begun, n_bytes, failed, lock = 0, 0, False, threading.Lock()
    end = time.perf_counter() + seconds

    def read() -> None:
        nonlocal n_begun, n_bytes, failed
        with mmap.mmap(-1, READ_BYTES) as room, memoryview(room) as view:
            view[:] = bytes(READ_BYTES)  # memory that is there: what finding it takes is not the drive's
            while True:
                with lock:
                    if failed or n_bytes >= most or time.perf_counter() >= end:
                        return
                    at, n = pieces[n_begun % len(pieces)]
                    n_begun += 1
                first, last = at // DIRECT_ALIGN * DIRECT_ALIGN, -(-(at + n) // DIRECT_ALIGN) * DIRECT_ALIGN
                for start in range(first, last, READ_BYTES):
                    try:
                        with view[: min(READ_BYTES, last - start)] as part:
                            got = os.preadv(file, [part], start)
                    except OSError:
                        failed = True
                        return
                    with lock:
                        n_bytes += got

    begun = time.perf_counter()
    readers = [threading.Thread(target=read) for _ in range(READERS)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    os.close(file)
    return None if failed or not n_bytes else n_bytes / (time.perf_counter() - begun)


def cached_pages(path: Path, most: int = 256) -> tuple[float, float] | None:
    """How the system's cache holds a file: the share of it that is held, and that in huge pages where it is mapped as
    the engine maps it. Of so many places at most, nothing of which is read from the drive; None where the system
    does not tell, as of another's files."""
    n_all = path.stat().st_size // HUGE_PAGE
    n, before = min(most, n_all), _in_huge_pages()
    if not n or before is None or not hasattr(mmap, "MADV_HUGEPAGE") or not os.access(path, os.W_OK):
        return None
    with path.open("rb") as file, _mapped(file) as pages:
        held = [at for at in (i * n_all // n * HUGE_PAGE for i in range(n)) if _is_held(pages, at)]
        for at in held:
            pages[at]  # maps it
        after = _in_huge_pages() or 0
    return len(held) / n, max(0, after - before) / HUGE_PAGE / n


@contextmanager
def _mapped(file: BinaryIO) -> Iterator[mmap.mmap]:
    """A file as the engine maps it."""
    with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ, flags=mmap.MAP_SHARED) as pages:
        with suppress(OSError):  # a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE)
        yield pages


def _is_held(pages: mmap.mmap, at: int) -> bool:
    """Whether the page at an offset is in memory, as far as the system tells."""
    import ctypes  # noqa: PLC0415 - not for a command that measures nothing

    import numpy as np  # noqa: PLC0415 - likewise

    first, told = int(np.frombuffer(pages, np.uint8).ctypes.data), ctypes.c_ubyte()
    failed = ctypes.CDLL(None).mincore(ctypes.c_void_p(first + at), ctypes.c_size_t(1), ctypes.byref(told))
    return not failed and bool(told.value & 1)


def _mappings(root: Path = ROOT) -> dict[str, int]:
    """KiB of this process's memory by kind; empty where the system does not tell."""
    return dict(_pairs(_read(root / "proc/self/smaps_rollup").replace(":", " ").replace(" kB", "")))


def _in_huge_pages() -> int | None:
    """Bytes of files that this process has mapped by huge pages."""
    told = _mappings()
    return 1024 * told["FilePmdMapped"] if "FilePmdMapped" in told else None


def small_file_bytes(root: Path = ROOT) -> int | None:
    """Bytes of files that this process has mapped, has read, and finds by small pages; None where the system does not
    tell."""
    told = _mappings(root)
    if not {"Rss", "Anonymous", "FilePmdMapped"} <= told.keys():
        return None
    return 1024 * max(0, told["Rss"] - told["Anonymous"] - told["FilePmdMapped"])


def drop_pages(fd: int) -> None:
    """Take a file out of the system's cache, but for what is not on the disk yet or a program has mapped. Nothing where
    the system has no such call."""
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def sync_and_drop(fd: int) -> None:
    """Return when all of a file is on the disk, and out of the system's cache where it is of weights' size: as it was
    written it lies there in small pages, and models would be read from these. OSError."""
    os.fsync(fd)
    if os.fstat(fd).st_size >= HUGE_PAGE:
        drop_pages(fd)


def write_at(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of data at an offset of the file."""
    view, done = memoryview(data), 0
    while done < len(view):
        done += os.pwrite(fd, view[done:], offset + done)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder outlive a power cut."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in CANNOT:  # the file is whole all the same
            raise
    finally:
        os.close(fd)


@contextmanager
def replaced(
    path: Path, *, mode: int = 0o600, prefix: str | None = None, suffix: str = "", lasting: bool = True
) -> Iterator[BinaryIO]:
    """A file to write that takes the place of ``path`` when the block ends: who reads sees the old one or the new one,
    whole, and where the block or the disk fails nothing has changed. OSError.

    mode: of a new file; one that is there keeps its own. Until then its name is ``prefix``, eight letters and
    ``suffix``, in the same folder, for who takes away what killed runs have left; prefix None: a point, the file's name
    and a point. lasting: it outlives a power cut.
    """
    begins = f".{path.name}." if prefix is None else prefix
    unfinished = path.with_name(f"{begins}{secrets.token_hex(4)}{suffix}")
    fd = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(fd, "wb") as file:
            with suppress(FileNotFoundError):
                os.fchmod(fd, stat.S_IMODE(path.stat().st_mode))
            yield file
            file.flush()
            if lasting:
                os.fsync(fd)
        unfinished.replace(path)
    except BaseException:
        with suppress(OSError):
            unfinished.unlink()
        raise
    if lasting:
        sync_folder(path.parent)


def make_folder(folder: Path) -> None:
    """Make a folder where it is missing, and its name in its parent outlive a power cut."""
    try:
        folder.mkdir()
    except FileExistsError:
        if not folder.is_dir():
            raise
        return
    sync_folder(folder.parent)


class Pages:
    """Memory of its own, of which a part can be given back while the rest stays. It goes with the last who uses it."""

    def __init__(self, nbytes: int) -> None:
        self.memory = mmap.mmap(-1, max(1, nbytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # a kernel without them
                self.memory.madvise(mmap.MADV_HUGEPAGE)

    def release(self, start: int, stop: int) -> None:
        """Give back the whole pages of these bytes, which read as zeros from now on."""
        first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, stop // mmap.PAGESIZE * mmap.PAGESIZE
        if hasattr(mmap, "MADV_DONTNEED") and first < last:
            self.memory.madvise(mmap.MADV_DONTNEED, first, last - first)
