"""memory_cap.py: processes that get so much memory and no more, page cache included: a control group of their own.

Ways, the first that works: a group of version 2 (``memory.max``) below the mount's root, for root; one of version 1
(``memory.limit_in_bytes``) below the group that this process is in; ``systemd-run --scope``. None swaps.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

MOUNT = Path("/sys/fs/cgroup")
ENTER = "import os, sys; open(sys.argv[1], 'w').write(str(os.getpid())); os.execvp(sys.argv[2], sys.argv[2:])"
NONE = (
    "no memory limit can be set here: it takes root, or a systemd that lets this user run scopes"
    " (systemd-run --user --scope -p MemoryMax=1G true)"
)


class NoCapError(Exception):
    """There is no way to limit memory here."""


@dataclass(frozen=True)
class Cap:
    """A limit under which commands run that begin with ``launcher``. how: in words, for the record."""

    launcher: tuple[str, ...]
    how: str
    group: Path | None = None

    def peak(self) -> int:
        """Most bytes that were used at once, page cache included; 0 where that is not told."""
        for name in ("memory.peak", "memory.max_usage_in_bytes"):
            with suppress(OSError, ValueError):
                return int((self.group / name).read_text()) if self.group else 0
        return 0


@contextmanager
def capped(nbytes: int | None) -> Iterator[Cap]:
    """A cap for one process after another; None: without limit. NoCapError."""
    if nbytes is None:
        yield Cap((), "no limit")
        return
    if (group := _group_v2() or _group_v1()) is not None:
        try:
            how = _limit(group, nbytes)
            yield Cap((sys.executable, "-P", "-c", ENTER, str(group / "cgroup.procs")), how, group)
        finally:
            with suppress(OSError):
                group.rmdir()
        return
    yield Cap(tuple(_scope(nbytes)), "systemd-run --scope, MemoryMax")


def _name() -> str:
    return f"dsv2-bench-{os.getpid()}"


def _group_v2() -> Path | None:
    """A new group with the memory controller; None where this process may not make one."""
    if not (MOUNT / "cgroup.controllers").exists():
        return None
    group = MOUNT / _name()
    try:
        if "memory" not in (MOUNT / "cgroup.subtree_control").read_text().split():
            (MOUNT / "cgroup.subtree_control").write_text("+memory")
        group.mkdir()
    except OSError:
        return None
    if (group / "memory.max").exists():
        return group
    group.rmdir()
    return None


def _group_v1() -> Path | None:
    """The same, below this process's own."""
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    own = next((line.split(":", 2)[2] for line in lines if "memory" in line.split(":")[1].split(",")), None)
    if own is None:
        return None
    for folder in (MOUNT / "memory" / own.lstrip("/"), MOUNT / "memory"):  # a container may see its own as the root
        with suppress(OSError):
            (folder / _name()).mkdir()
            return folder / _name()
    return None


def _limit(group: Path, nbytes: int) -> str:
    """Set a group's limit, and no swap where there is a say. What was set. OSError."""
    name, swap = "memory.max", ("memory.swap.max", "0")
    if not (group / name).exists():
        name, swap = "memory.limit_in_bytes", ("memory.swappiness", "0")
    (group / name).write_text(str(nbytes))
    with suppress(OSError):
        (group / swap[0]).write_text(swap[1])
    return f"cgroup, {name}"


def _scope(nbytes: int) -> list[str]:
    tool = shutil.which("systemd-run")
    user = [] if os.geteuid() == 0 else ["--user"]
    command = [tool or "", *user, "--scope", "--quiet", "-p", f"MemoryMax={nbytes}", "-p", "MemorySwapMax=0", "--"]
    if tool is None or subprocess.run([*command, "true"], capture_output=True, check=False).returncode:
        raise NoCapError(NONE)
    return command
