"""What memory is free: the system's word, and the limits of every cgroup above this process."""

from __future__ import annotations

from pathlib import Path

import pytest

from cext.system import free_bytes, resident_bytes

GB = 1 << 30
KB = GB // 1024
MEMINFO = f"MemTotal: {16 * KB} kB\nMemAvailable: {8 * KB} kB\nSwapFree: {KB} kB\nHugePages_Total: 0\n"
V2, V1 = "sys/fs/cgroup", "sys/fs/cgroup/memory"


def machine(root: Path, files: dict[str, str]) -> Path:
    for name, text in {"proc/meminfo": MEMINFO, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def group(folder: str, limit: object, used: int, cache: int = 0) -> dict[str, str]:
    """A cgroup's files, v2 or v1 by where it lies."""
    if folder.startswith(V1):
        stat = f"inactive_file 7\ntotal_inactive_file {cache // 2}\ntotal_active_file {cache // 2}\n"
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
    else:
        stat = f"anon 5\nfile {2 * cache}\ninactive_file {cache // 2}\nactive_file {cache // 2}\n"
        names = ("memory.max", "memory.current")
    texts = (f"{limit}\n", f"{used}\n", stat)
    return {f"{folder}/{name}": text for name, text in zip((*names, "memory.stat"), texts, strict=True)}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 9 * GB),
        ({"proc/self/cgroup": "0::/\n"}, 9 * GB),
        ({"proc/self/cgroup": "0::/a\n", **group(f"{V2}/a", "max", GB)}, 9 * GB),
        ({"proc/self/cgroup": "0::/a\n", **group(f"{V2}/a", 3 * GB, GB)}, 2 * GB),
        ({"proc/self/cgroup": "0::/a\n", **group(f"{V2}/a", 3 * GB, 3 * GB, 2 * GB)}, 2 * GB),
        ({"proc/self/cgroup": "0::/a\n", **group(f"{V2}/a", 3 * GB, 4 * GB)}, 0),
        ({"proc/self/cgroup": "0::/a\n", **group(f"{V2}/a", 99 * GB, GB)}, 9 * GB),
        # The narrowest counts, wherever it lies; and a container's own is the mount.
        ({"proc/self/cgroup": "0::/a/b\n", **group(f"{V2}/a", 2 * GB, GB), **group(f"{V2}/a/b", 7 * GB, GB)}, GB),
        ({"proc/self/cgroup": "0::/../x\n", **group(V2, 2 * GB, GB)}, GB),
        ({"proc/self/cgroup": "5:cpu:/a\n4:memory:/a\n0::/\n", **group(f"{V1}/a", 4 * GB, 3 * GB, GB)}, 2 * GB),
        ({"proc/self/cgroup": "4:cpu:/a\n", **group(f"{V1}/a", GB, GB)}, 9 * GB),
        ({"proc/self/cgroup": "nonsense\n0::/a\n", **group(f"{V2}/a", 3 * GB, GB)}, 2 * GB),
    ],
)
def test_free_memory(tmp_path: Path, files: dict[str, str], expected: int) -> None:
    assert free_bytes(machine(tmp_path, files)) == expected


HIGH = {f"{V2}/a/memory.high": f"{2 * GB}\n"}


@pytest.mark.parametrize(
    ("files", "swap", "expected"),
    [
        ({}, False, 8 * GB),
        ({"proc/self/cgroup": "0::/a\n", **group(f"{V2}/a", 99 * GB, GB)}, False, 8 * GB),
        ({"proc/self/cgroup": "0::/a\n", **group(f"{V2}/a", 3 * GB, GB), **HIGH}, False, GB),
        ({"proc/self/cgroup": "0::/a\n", **group(f"{V2}/a", "max", GB), **HIGH}, False, GB),
        ({"proc/self/cgroup": "0::/a\n", **group(f"{V2}/a", 3 * GB, GB), **HIGH}, True, 2 * GB),
        ({"proc/self/cgroup": "4:memory:/a\n0::/\n", **group(f"{V1}/a", 4 * GB, 3 * GB, GB)}, False, 2 * GB),
    ],
)
def test_memory_that_is_free_without_swap(tmp_path: Path, files: dict[str, str], swap: bool, expected: int) -> None:
    assert free_bytes(machine(tmp_path, files), swap=swap) == expected


def test_a_system_that_does_not_tell(tmp_path: Path) -> None:
    assert free_bytes(tmp_path) is None
    assert free_bytes(machine(tmp_path, {"proc/meminfo": "MemTotal: 5 kB\n"})) is None


def test_this_machine() -> None:
    free, mine = free_bytes(), resident_bytes()
    assert mine > 1e6 and (free is None or free > 0)
