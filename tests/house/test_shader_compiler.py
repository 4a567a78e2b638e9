"""The build's choice of a compiler of shaders: one that knows fill.comp only, as an old one does, is passed over."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[2] / "cext"
OLD = """#!/bin/sh
case "$*" in *mul_coop*|*DDOT*) exit 2;; esac
while [ $# -gt 1 ]; do [ "$1" = -o ] && : > "$2"; shift; done
"""


@pytest.mark.skipif(sys.platform == "win32", reason="the compiler is a script")
def test_a_compiler_that_does_not_know_all_of_the_language_is_passed_over(tmp_path: Path) -> None:
    if not shutil.which("cmake") or not (SOURCES / "CMakeLists.txt").is_file():
        pytest.skip("nothing to build with, or no sources")
    old = tmp_path / "cmeel.prefix" / "bin" / "glslang"
    old.parent.mkdir(parents=True)
    old.write_text(OLD)
    old.chmod(0o755)
    done = subprocess.run(
        ["cmake", "-S", SOURCES, "-B", tmp_path / "build", f"-DPython_EXECUTABLE={sys.executable}"],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"no build can be made here: {done.stderr[-300:]}")
    said = [line for line in done.stdout.splitlines() if "Shaders: " in line]
    assert any(str(old) in line and line.endswith("is passed over") for line in said), done.stdout
    assert str(old) not in said[-1]
