"""The number of workers by default: physical cores of the affinity mask, of the fast kind, never more than the cgroup's
quota. The machines are made up, so that what each has is known.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from support.cli import environment
from support.gguf_bytes import tiny_model

COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
SHIM = Path(__file__).parents[1] / "support" / "machine.c"
COUNT = "import sys, cext; print(cext.cores(), cext.Model(sys.argv[1]).threads)"

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="processors as Linux tells them"),
    pytest.mark.skipif(COMPILER is None, reason="needs a C compiler, to make machines up"),
]


@dataclass(frozen=True)
class Machine:
    """What its files tell. siblings: by processor; none told where it is left out, as of speed."""

    cpus: str
    cores: int  # what is right
    siblings: dict[int, str] = field(default_factory=dict)
    speed: dict[int, int] = field(default_factory=dict)
    groups: str = "0::/\n"  # /proc/self/cgroup
    quotas: dict[str, str] = field(default_factory=dict)  # by path under /sys/fs/cgroup

    def write(self, root: Path) -> None:
        files = {"proc/self/cgroup": self.groups}
        cpu = "sys/devices/system/cpu/cpu"
        files |= {f"{cpu}{i}/topology/thread_siblings_list": f"{text}\n" for i, text in self.siblings.items()}
        files |= {f"{cpu}{i}/cpu_capacity": f"{n}\n" for i, n in self.speed.items()}
        files |= {f"sys/fs/cgroup/{name}": f"{text}\n" for name, text in self.quotas.items()}
        for name, text in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text, encoding="utf-8")


PAIRS = {i: f"{i % 4},{i % 4 + 4}" for i in range(8)}  # 4 cores of 2 threads, as x86 counts them
RUNS = {i: f"{i & ~1}-{i | 1}" for i in range(8)}  # the same, as others do
ALL = "0,1,2,3,4,5,6,7"
BIG_LITTLE = dict(zip(range(8), [1024] * 3 + [900] + [300] * 4, strict=True))
MACHINES = {
    "nothing told": Machine("0,1,2", 3),
    "one processor": Machine("5", 1, PAIRS),
    "two threads a core": Machine(ALL, 4, PAIRS),
    "neighbours share a core": Machine(ALL, 4, RUNS),
    "halves of two cores": Machine("1,6", 2, PAIRS),
    "both halves of one": Machine("2,6", 1, PAIRS),
    "fast and slow": Machine(ALL, 4, speed=BIG_LITTLE),
    "only slow ones allowed": Machine("4,5,6", 3, speed=BIG_LITTLE),
    "a quota": Machine(ALL, 2, PAIRS, quotas={"cpu.max": "250000 100000"}),
    "a quota above the cores": Machine(ALL, 4, PAIRS, quotas={"cpu.max": "600000 100000"}),
    "less than a core": Machine(ALL, 1, PAIRS, quotas={"cpu.max": "50000 100000"}),
    "no limit": Machine(ALL, 4, PAIRS, quotas={"cpu.max": "max 100000"}),
    "a quota above its group": Machine(
        ALL, 3, groups="0::/a/b\n", quotas={"a/cpu.max": "300000 100000", "a/b/cpu.max": "max 100000"}
    ),
    "the least of several": Machine(
        ALL, 2, groups="0::/a/b\n", quotas={"a/cpu.max": "500000 100000", "a/b/cpu.max": "200000 100000"}
    ),
    "version 1": Machine(
        ALL, 2, PAIRS, groups="4:memory:/x\n3:cpu,cpuacct:/d\n0::/\n",
        quotas={"cpu/d/cpu.cfs_quota_us": "200000", "cpu/d/cpu.cfs_period_us": "100000"},
    ),
    "version 1 without a limit": Machine(
        ALL, 4, PAIRS, groups="3:cpu,cpuacct:/d\n",
        quotas={"cpu/d/cpu.cfs_quota_us": "-1", "cpu/d/cpu.cfs_period_us": "100000"},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shim") / "machine.so"
    subprocess.run([str(COMPILER), "-shared", "-fPIC", "-o", str(path), str(SHIM), "-ldl"], check=True)
    return path


@pytest.mark.parametrize("name", MACHINES)
def test_default(tmp_path: Path, shim: Path, name: str) -> None:
    machine = MACHINES[name]
    machine.write(tmp_path / "root")
    (tmp_path / "tiny.gguf").write_bytes(tiny_model().content())
    told = {"LD_PRELOAD": str(shim), "MACHINE_ROOT": str(tmp_path / "root"), "MACHINE_CPUS": machine.cpus}
    command = [sys.executable, "-P", "-c", COUNT, str(tmp_path / "tiny.gguf")]
    env = {**environment(), **told}
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert result.stdout.split() == [str(machine.cores)] * 2
