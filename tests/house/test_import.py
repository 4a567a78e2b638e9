"""Python run in a clone finds the source tree before the installed package."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The Python packages as git has them: no engine is compiled."""
    for room in ("cext", "dsv2cli", "quantize"):
        ignored = shutil.ignore_patterns("*.so", "*.pyd", "*.dylib", "*.gguf", "__pycache__")
        shutil.copytree(ROOT / room, tmp_path / room, ignore=ignored)
    return tmp_path


def python(clone: Path, code: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=clone, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    "code", ["import cext", "from cext import Model", "import cext.gguf", "import cext.tokenizer", "import quantize"]
)
def test_a_clone_says_in_a_line_what_to_do(clone: Path, code: str) -> None:
    run = python(clone, f"{code}\nimport cext")
    last = run.stderr.strip().splitlines()[-1]
    assert run.returncode == 1 and "NoEngineError" in last and "`pip install .`" in last and str(clone) in last
    assert "During handling" not in run.stderr


def test_the_command_line_says_it_too(clone: Path) -> None:
    run = python(clone, "from dsv2cli.app import run; raise SystemExit(run(['inspect', 'cext/errors.py']))")
    assert run.returncode == 1
    assert run.stderr.startswith("error: ") and "`pip install .`" in run.stderr and "Traceback" not in run.stderr


def test_another_module_that_is_missing_is_told_as_it_is(clone: Path) -> None:
    (clone / "cext" / "_engine.py").write_text("import no_such_module\n")
    run = python(clone, "import cext")
    assert "No module named 'no_such_module'" in run.stderr and "pip install" not in run.stderr
