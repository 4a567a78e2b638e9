"""What this process has of the machine: the memory it takes, and the memory it may still take."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")  # where /proc and /sys lie


def resident_bytes() -> int:
    """Physical memory of this process now; its peak where the system does not tell."""
    import resource  # noqa: PLC0415 - no Windows has it

    try:
        return int(Path("/proc/self/statm").read_bytes().split()[1]) * resource.getpagesize()
    except (OSError, ValueError, IndexError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def free_bytes(root: Path = ROOT) -> int | None:
    """Memory that this process can take before something is killed; None where the system does not tell.

    It is what the system can free at once, and swap, but no more than each of the process's cgroups leaves it.
    """
    told = dict(_pairs(_read(root / "proc/meminfo").replace(":", " ").replace("kB", "")))
    if "MemAvailable" not in told:
        return None
    free = 1024 * (told["MemAvailable"] + told.get("SwapFree", 0))
    return max(0, min([free, *_left_in_cgroups(root)]))


def _left_in_cgroups(root: Path) -> Iterator[int]:
    """What each cgroup with a limit leaves, from the process's own up to the root's; without its swap."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, controllers, group = line.split(":", 2)
        if number == "0":
            mount, limit, used, prefix = "sys/fs/cgroup", "memory.max", "memory.current", ""
        elif "memory" in controllers.split(","):
            mount, limit, used = "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            prefix = "total_"  # with what is below it
        else:
            continue
        for folder in _upwards(root / mount, group):
            most, taken = _number(folder / limit), _number(folder / used)
            if most is not None and taken is not None:
                # Pages of files count as used, and go when memory is wanted: the mapped weights among them.
                told = dict(_pairs(_read(folder / "memory.stat")))
                yield most - taken + sum(told.get(f"{prefix}{kind}_file", 0) for kind in ("active", "inactive"))


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
