"""The number of workers by default: physical cores of the affinity mask, of the fast kind, never more than the cgroup's
quota."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.cli import environment
from support.gguf_bytes import tiny_model

COUNT = "import os, sys, cext; os.sched_setaffinity(0, map(int, sys.argv[2:])); print(cext.Model(sys.argv[1]).threads)"
TOPOLOGY = Path("/sys/devices/system/cpu")
CPUS = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []

pytestmark = pytest.mark.skipif(not CPUS, reason="needs affinity masks, as Linux has them")


def capacity(cpu: int) -> int:
    path = TOPOLOGY / f"cpu{cpu}" / "cpu_capacity"
    return int(path.read_text(encoding="utf-8")) if path.is_file() else 0


def cores(cpus: list[int]) -> int:
    """Physical cores: how many different sets of siblings the processors at least half as fast as the fastest have."""
    siblings = set()
    fastest = max(map(capacity, cpus))
    for cpu in (cpu for cpu in cpus if 2 * capacity(cpu) >= fastest):
        path = TOPOLOGY / f"cpu{cpu}" / "topology" / "thread_siblings_list"
        siblings.add(path.read_text(encoding="utf-8") if path.is_file() else str(cpu))
    return len(siblings)


def quota() -> float:
    """Cores that this process's cgroups (v2) allow; infinite where they set no limit."""
    least = float("inf")
    for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
        number, _, group = line.split(":", 2)
        folder = Path("/sys/fs/cgroup") / group.lstrip("/") if number == "0" else Path("/sys/fs/cgroup")
        for place in (folder, *folder.parents):
            file = place / "cpu.max"
            if file.is_file() and not (text := file.read_text(encoding="utf-8")).startswith("max"):
                allowed, period = map(float, text.split())
                least = min(least, allowed / period)
    return least


@pytest.mark.parametrize("cpus", [CPUS, CPUS[:1], CPUS[-1:], CPUS[::2], CPUS[: len(CPUS) // 2 + 1]], ids=str)
def test_default(tmp_path: Path, cpus: list[int]) -> None:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(tiny_model().content())
    command = [sys.executable, "-P", "-c", COUNT, str(path), *map(str, cpus)]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    assert int(result.stdout) == max(1, int(min(cores(cpus), quota())))
