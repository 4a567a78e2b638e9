"""What each part of the quantiser gives: size, perplexity and divergence of a checkpoint's files, as CSV.

    python tests/bench/bench_quality.py CHECKPOINT TEXT [-o FILE] [--type q4_k_m]... [--windows 24] [--variant NAME]...

Each file is decoded by gguf-py into transformers' model and compared with the checkpoint itself on the first windows of
512 tokens of TEXT, each begun with BOS, its first 128 tokens not scored: KLD in nats a token, with its standard error
over tokens. TEXT must not be what was calibrated on. Needs PyTorch and transformers (pip install '.[oracle]').
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantize import Options, quantize
from quantize.encode import feedback

WINDOW, SKIP = 512, 128
FEWER = {"max_tokens": 53_760}  # the parts are compared on less calibration text than the default takes
OFF = {
    **FEWER, "importance": False, "awq": False, "feedback": False, "sequential": False, "follow_outputs": False,
    "plain_mix": True,
}  # fmt: skip
FIELDS = (
    "model", "type", "variant", "bytes", "bits_per_weight", "ppl_ratio",
    "kld", "kld_error", "kld_p99", "same_top", "n_tokens", "seconds",
)  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """A way to quantise: options beside the type, and settings of quantize.encode.feedback."""

    options: dict[str, Any]
    search: dict[str, int] = field(default_factory=dict)


VARIANTS = {
    "plain": Variant(OFF),
    "importance": Variant({**OFF, "importance": True}),
    "importance+awq": Variant({**OFF, "importance": True, "awq": True}),
    "gptq": Variant({**OFF, "feedback": True}, {"ROUNDS": 1, "POLISH": 0, "SWEEPS": 1}),
    "feedback": Variant({**OFF, "importance": True, "feedback": True}),
    "feedback+awq": Variant({**OFF, "importance": True, "feedback": True, "awq": True}),
    "allocation": Variant({**OFF, "importance": True, "plain_mix": False}),
    "allocation+feedback": Variant({**OFF, "importance": True, "feedback": True, "plain_mix": False}),
    "sequential": Variant({**FEWER, "follow_outputs": False}),
    "more text": Variant({"follow_outputs": False}),
    "all": Variant({}),
    "all+awq": Variant({"awq": True}),
}
"""gptq: each column chosen once, scales from one pass; feedback: with scales refitted and codes polished, twice.
sequential: and allocation, feedback, sequential calibration; more text: and the default's calibration text.
all: the default, where rows follow what outputs are worth too.
"""


@contextlib.contextmanager
def searching(settings: dict[str, int]) -> Iterator[None]:
    """quantize.encode.feedback with other settings."""
    before = {name: getattr(feedback, name) for name in settings}
    for name, value in settings.items():
        setattr(feedback, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(feedback, name, value)


def windows_of(checkpoint: Path, text: Path, n: int) -> NDArray[np.int64]:
    """(n, WINDOW) token ids, BOS first. SystemExit where the text is too short."""
    import transformers  # noqa: PLC0415 - needs PyTorch, which --help does not

    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(checkpoint / "tokenizer.json"))
    config = transformers.AutoConfig.from_pretrained(checkpoint)
    ids = tokenizer(text.read_text("utf-8"), add_special_tokens=False)["input_ids"]
    step = WINDOW - 1
    if len(ids) < n * step:
        sys.exit(f"{text}: {len(ids)} tokens, {n * step} are needed for {n} windows")
    return np.array([[config.bos_token_id, *ids[i * step : (i + 1) * step]] for i in range(n)], np.int64)


def log_probabilities(model: Any, windows: NDArray[np.int64]) -> Any:
    """(n, WINDOW - 1 - SKIP, n_vocab) of the tokens that are scored, a torch tensor."""
    import torch  # noqa: PLC0415

    rows = []
    with torch.no_grad():
        for some in np.array_split(windows, -(-len(windows) // 4)):
            logits = model(torch.from_numpy(some)).logits[:, SKIP : WINDOW - 1]
            rows.append(torch.log_softmax(logits.float(), -1))
    return torch.cat(rows)


def compare(reference: Any, other: Any, windows: NDArray[np.int64]) -> dict[str, float | int]:
    """The columns that measure a file."""
    import torch  # noqa: PLC0415

    targets = torch.from_numpy(windows[:, SKIP + 1 :])[..., None]
    kld = (reference.exp() * (reference - other)).sum(-1).flatten()
    worse = (reference - other).gather(-1, targets).mean()
    return {
        "ppl_ratio": round(float(worse.exp()), 5),
        "kld": round(float(kld.mean()), 5),
        "kld_error": round(float(kld.std() / len(kld) ** 0.5), 5),
        "kld_p99": round(float(kld.quantile(0.99)), 4),
        "same_top": round(float((reference.argmax(-1) == other.argmax(-1)).float().mean()), 4),
        "n_tokens": len(kld),
    }


def rows_of(args: argparse.Namespace) -> Iterator[dict[str, object]]:
    """A row for each type and variant."""
    from support import hf  # noqa: PLC0415 - imports PyTorch

    windows = windows_of(args.checkpoint, args.text, args.windows)
    reference = log_probabilities(hf.load(args.checkpoint), windows)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        out = Path(folder) / "model.gguf"
        for type_ in args.type or ["q4_k_m", "iq4_xs", "q3_k_m", "q2_k"]:
            for name in args.variant or VARIANTS:
                variant = VARIANTS[name]
                with searching(variant.search):
                    options = Options(type=type_, evaluate=False, **variant.options)
                    report = quantize(args.checkpoint, out, options, restart=True)
                measured = compare(reference, log_probabilities(hf.from_gguf(args.checkpoint, out), windows), windows)
                yield {
                    "model": args.checkpoint.name,
                    "type": type_,
                    "variant": name,
                    "bytes": report.nbytes,
                    "bits_per_weight": round(report.bits_per_weight, 4),
                    **measured,
                    "seconds": round(report.seconds, 1),
                }
                out.unlink()


def main() -> None:
    """Print or write the rows as they come."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--type", action="append", help="repeatable; the default is four of them")
    parser.add_argument("--variant", action="append", choices=VARIANTS, help="repeatable; the default is all")
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--folder", type=Path, help="for the files while they are measured; the default is temporary")
    args = parser.parse_args()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    with args.output.open("w", newline="") if args.output else contextlib.nullcontext(sys.stdout) as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        for row in rows_of(args):
            writer.writerow(row)
            file.flush()


if __name__ == "__main__":
    main()
