"""Write the golden logits beside this file: transformers in float32 on the CPU, for every spec of support/tiny.py.

    python tests/golden/make_golden.py [SHARED]          (needs pip install '.[oracle]')

SHARED is the folder of trained models and texts (../shared); given it, trained/MODEL.npz are written too: the ids of
the held-out text as the checkpoint's tokenizer cuts it, and the loss of each scored token (see support/trained.py).

Each NAME.npz holds ids (n,), logits (n, n_vocab), the hash of the weights they hold for, the seed and the versions that
made them. It refuses a spec whose routing is a near tie somewhere: float32 would decide it differently on each machine.
"""

import sys
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

GOLDEN = Path(__file__).resolve().parent
sys.path.insert(0, str(GOLDEN.parent))

from ref.model import Model  # noqa: E402
from support import hf, trained  # noqa: E402
from support.tiny import SPECS, TWO_MSCALES, Checkpoint, gguf_tensors, tokens  # noqa: E402

N_TOKENS = 32
LEAST_MARGIN = 5e-4  # of a routing score; float32 errs by 1e-6 here, a float16 cache by 1e-4


def main() -> None:
    tiny()
    if len(sys.argv) > 1:
        trained_models(Path(sys.argv[1]))


def tiny() -> None:
    for spec in (*SPECS, TWO_MSCALES):
        checkpoint = Checkpoint(spec)
        ids = tokens(spec, N_TOKENS)
        logits = hf.tiny_logits(checkpoint, ids)
        ref = Model(spec.hparams, gguf_tensors(checkpoint))
        difference = float(np.abs(ref.forward(ids) - logits).max() / np.ptp(logits))
        margin = min((float(m.min()) for m in ref.margins), default=float("inf"))
        print(f"{spec.name:14} range {np.ptp(logits):7.3f} numpy differs {difference:.1e} margin {margin:.1e}")
        if margin < LEAST_MARGIN:
            sys.exit(f"error: {spec.name}: routing margin {margin:.1e} is a near tie; choose another seed")
        np.savez_compressed(
            GOLDEN / f"{spec.name}.npz",
            ids=ids,
            logits=logits,
            weights_sha256=checkpoint.fingerprint(),
            seed=spec.seed,
            versions=hf.versions(),
        )


def trained_models(shared: Path) -> None:
    text = (shared / "text" / "heldout.txt").read_text(encoding="utf-8")
    for name in trained.MODELS:
        folder = shared / "models" / name
        ids = AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False).input_ids
        windows = trained.windows(np.array(ids, dtype=np.int32))
        model = hf.load(folder)
        losses = trained.losses(lambda window, model=model: hf.logits(model, window), windows)
        print(f"{name:16} perplexity {np.exp(losses.mean()):.4f} over {losses.size} tokens")
        path = trained.golden_path(name)
        path.parent.mkdir(exist_ok=True)
        np.savez_compressed(
            path,
            ids=windows.astype(np.int16),
            losses=losses.astype(np.float32),
            weights_sha256=trained.fingerprint(folder),
            versions=hf.versions(),
        )


if __name__ == "__main__":
    main()
