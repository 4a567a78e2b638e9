"""llama_bench.py: ik_llama.cpp, measured by its own llama-bench in turns with the engines of benchmark.py.

Each measurement is a process that loads the model again, and with -rtr 1 copies all of it into other layouts, which its
clock leaves out. A context is read anew each time, too: a deep one takes its while.
"""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dsv2cli.errors import CliError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from dsv2cli.benchmark import Test

IK = "ik"
FASTEST = ("-fmoe", "1", "-mla", "3", "-fa", "1")  # for models with latent attention; repacking is a peer of its own
ANOTHER = "give the llama-bench of an ik_llama.cpp that was built with its llama-bench target"


@dataclass(frozen=True)
class LlamaBench:
    """One setting of one llama-bench: weights copied into its own layouts at the start, or as the file has them."""

    path: Path
    repacked: bool
    kv_type: str = "f16"

    @property
    def name(self) -> str:
        return f"{IK} -rtr {int(self.repacked)}"

    @property
    def setting(self) -> str:
        return " ".join(self._flags)

    @property
    def _flags(self) -> tuple[str, ...]:
        cache = ("-ctk", self.kv_type) if self.kv_type != "f16" else ()
        return (*FASTEST, *cache, "-rtr", str(int(self.repacked)))

    def measures(self, test: Test) -> bool:
        """One sequence; and its prefill begins with an empty context."""
        return test.sequences == 1 and (test.kind == "decode" or test.depth == 0)

    def rate(self, model: Path, threads: int, test: Test) -> float:
        """Tokens a second. CliError where llama-bench fails or prints something else."""
        command = [str(self.path), "-m", str(model), "-t", str(threads), *self._flags, "-r", "1", "-o", "json"]
        done = subprocess.run([*command, *_asked(test)], capture_output=True, text=True, errors="replace", check=False)
        if done.returncode != 0:
            from dsv2cli.benchmark import ending

            said = done.stderr.strip().splitlines()
            raise CliError(f"`{self.path}` {ending(done.returncode)}{f': {said[-1]}' if said else ''}", ANOTHER)
        for row in _rows(done.stdout):
            if (row.get("n_prompt"), row.get("n_gen")) == _counts(test) and row.get("repack") == self.repacked:
                rates = row.get("samples_ts")
                if isinstance(rates, list) and len(rates) == 1 and isinstance(rates[0], int | float) and rates[0] > 0:
                    return float(rates[0])
        raise CliError(f"`{self.path}` printed no result of {test.name}", ANOTHER)


def _counts(test: Test) -> tuple[int, int]:
    """As its rows have them: tokens of the prompt (the context before, where tokens are decoded), tokens decoded."""
    return (test.n, 0) if test.kind == "prefill" else (test.depth, test.n)


def _asked(test: Test) -> list[str]:
    """Of its three kinds of test the one wanted, and none of those that it runs unless told otherwise."""
    if test.kind == "prefill":
        return ["-p", str(test.n), "-n", "0"]
    if test.depth == 0:
        return ["-p", "0", "-n", str(test.n)]
    return ["-p", "0", "-n", "0", "-gp", f"{test.depth},{test.n}"]


def _rows(text: str) -> Sequence[dict[str, Any]]:
    """The rows in what it printed; a library may have printed lines before them."""
    start = text.find("[\n")
    try:
        rows = json.loads(text[start:]) if start >= 0 else []
    except ValueError:
        rows = []
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def settings(path: Path, kv_type: str) -> tuple[LlamaBench, LlamaBench]:
    """Repacked and in place. UsageError where the path is no program."""
    program = path.expanduser().absolute()  # a shell leaves the ~ of `ik=~/...`
    if not (program.is_file() and os.access(program, os.X_OK)):
        what = "is a folder" if program.is_dir() else "is no program" if program.exists() else "is not there"
        raise UsageError(f"--against {IK}: `{path}` {what}", ANOTHER)
    kept = kv_type if kv_type == "q8_0" else "f16"  # it has no faster one than f16 for f32
    return LlamaBench(program, True, kept), LlamaBench(program, False, kept)
