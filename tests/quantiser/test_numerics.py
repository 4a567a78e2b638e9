"""quantize.identity.NUMERICS: the bytes of a tiny model under known arithmetic, as they were recorded.

A failure means that bytes changed: where that is meant, raise NUMERICS, so that no run is gone on with that began under
the old one, and record anew: python tests/quantiser/test_numerics.py. Other libraries or another processor may give
other bytes, which says nothing: each kind of arithmetic has a record of its own, and those without one are skipped.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

RECORDS = Path(__file__).parents[1] / "golden" / "numerics.json"
ROOT = Path(__file__).resolve().parents[2]
CASES: dict[str, dict[str, Any]] = {
    "types by survey": {"type": "q3_k_m"},
    "a plain mix": {"type": "q4_k_m", "plain_mix": True, "sequential": False},
    "ggml's encoders": {"type": "q2_k", "plain_mix": True, "feedback": False},
}
MAKE = """
import hashlib, json, sys
from pathlib import Path
from support import checkpoints
import cext, quantize
from quantize import identity
folder, cases, made = Path(sys.argv[1]), json.loads(sys.argv[2]), {}
config = {**checkpoints.V2, "num_hidden_layers": 2, "n_routed_experts": 4, "hidden_size": 256}
checkpoints.write_checkpoint(folder / "hf", config)
text = checkpoints.write_text(folder / "text.txt", 1100)
for name, options in cases.items():
    asked = quantize.Options(**options, calibration=(text,), evaluate=False, threads=1)
    quantize.quantize(folder / "hf", folder / "m.gguf", asked)
    digest = hashlib.sha256()
    with cext.Gguf(folder / "m.gguf") as file:
        for tensor in file.tensors:
            digest.update(f"{tensor.name} {tensor.type}".encode() + bytes(file.raw(tensor.name)))
    made[name] = digest.hexdigest()
print(json.dumps({"numerics": identity.numerics(), "sha256": made}))
"""


def make() -> dict[str, Any]:
    """The bytes' hashes and what they depend on, with what any x86-64 of today has: AVX2."""
    found = np.show_config(mode="dicts")["SIMD Extensions"].get("found", [])
    wide = [name for name in found if "512" in name or name == "X86_V4"]
    arithmetic = {"OPENBLAS_CORETYPE": "Haswell", "DSV2_ISA": "avx2", "NPY_DISABLE_CPU_FEATURES": " ".join(wide)}
    path = os.pathsep.join(filter(None, [str(ROOT / "tests"), os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-P", "-c", MAKE, folder, json.dumps(CASES)]
        env = {**os.environ, **arithmetic, "PYTHONPATH": path}
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def without_version(numerics: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in numerics.items() if name != "the numerics version"}


def key(numerics: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(without_version(numerics), sort_keys=True).encode()).hexdigest()[:16]


def known() -> dict[str, Any]:
    return dict(json.loads(RECORDS.read_text(encoding="utf-8"))) if RECORDS.exists() else {}


def test_bytes_are_those_of_their_version() -> None:
    import cext  # noqa: PLC0415  (recording does without it)

    if "avx2" not in cext.isas():
        pytest.skip("recorded for x86-64 with AVX2")
    made = make()
    recorded = known().get(key(made["numerics"]))
    if recorded is None:
        pytest.skip(f"nothing is recorded for this arithmetic: {without_version(made['numerics'])}")
    assert made["numerics"] == recorded["numerics"], f"NUMERICS was raised: record anew, python {__file__}"
    assert made["sha256"] == recorded["sha256"], "bytes changed: raise NUMERICS"


if __name__ == "__main__":
    made = make()
    every = {**known(), key(made["numerics"]): made}
    RECORDS.write_text(json.dumps(every, indent=1, sort_keys=True) + "\n", encoding="utf-8")
