"""Copy a GGUF of random weights with routers that prefer some experts, as trained ones do: for bench_drive.py --skewed.

    python tests/bench/skew_routers.py v2lite.gguf v2lite-skewed.gguf [--sigma 0.5]

Each expert's row of a layer's router is multiplied by exp(sigma * z) with z normal: experts of long rows have logits of
wide spread, and are among the best more often. What that does to usage is told, reckoned with random inputs.
"""

import argparse
import shutil
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

SAMPLES = 4096
SHARES = (0.25, 0.5, 0.75)


def coverage(router: NDArray[np.float32], n_used: int, rng: np.random.Generator) -> list[float]:
    """How many of the choices fall on the most used quarter, half and three quarters of the experts."""
    logits = rng.standard_normal((SAMPLES, router.shape[1]), np.float32) @ router.T
    chosen = np.argpartition(-logits, n_used - 1, axis=1)[:, :n_used]
    counts = np.sort(np.bincount(chosen.reshape(-1), minlength=len(router)))[::-1]
    return [float(counts[: int(share * len(router))].sum() / counts.sum()) for share in SHARES]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--sigma", type=float, default=0.5)
    options = parser.parse_args()
    shutil.copyfile(options.model, options.out)
    reader = gguf.GGUFReader(options.out, "r+")
    arch = str(reader.fields["general.architecture"].contents())
    n_used = int(reader.fields[f"{arch}.expert_used_count"].contents())
    rng, found = np.random.default_rng(7), []
    for tensor in reader.tensors:
        if tensor.name.endswith("ffn_gate_inp.weight"):
            if tensor.tensor_type != gguf.GGMLQuantizationType.F32:
                raise SystemExit(f"error: {tensor.name} is {tensor.tensor_type.name}, expected F32")
            rows = tensor.data  # of the file
            rows *= np.exp(options.sigma * rng.standard_normal((len(rows), 1))).astype(np.float32)
            found.append(coverage(np.array(rows), n_used, rng))
    reader.data.flush()
    told = zip(SHARES, np.mean(found, axis=0), strict=True)
    print("of the choices, the most used experts have: " + ", ".join(f"{s:.0%} of them {c:.0%}" for s, c in told))


if __name__ == "__main__":
    main()
