"""quantize.heap: what was freed goes back, whatever else was allocated beside it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from quantize.base import heap

SCRIPT = """
import sys
from pathlib import Path
import numpy as np
from quantize.base import heap

def resident():
    return 4096 * int(Path("/proc/self/statm").read_text().split()[1])

if sys.argv[1] == "map":
    heap.map_large()
first = np.ones(3 << 20)  # of up to its size, glibc learns to keep what is freed
del first
before, kept, large = resident(), [], []
for _ in range(10):
    large.append(np.ones(1 << 20))
    kept.append(bytearray(100_000))  # so that what lies below it cannot go
large = None
if sys.argv[1] == "trim":
    heap.trim()
print(resident() - before)
"""


@pytest.mark.skipif(heap._call("mallopt") is None or sys.platform != "linux", reason="glibc on Linux")
@pytest.mark.parametrize("how", ["map", "trim"])
def test_freed_memory_goes(how: str, tmp_path: Path) -> None:
    """80 MB of arrays with small ones between them."""
    command = [sys.executable, "-P", "-c", SCRIPT, how]
    done = subprocess.run(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True, check=True)
    assert int(done.stdout) < 8 << 20
