"""How well a model predicts answers: those that were set apart from training, or what another model says.

usage: losses.py HELDOUT.jsonl N MODEL.gguf...   (N: conversations; prints bits a byte of each model)
"""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cext.tokenizer import Message
from dsv2cli.runtime import Runtime, open_model


def nats(opened: Runtime, before: Sequence[Message], answer: str) -> NDArray[np.float64]:
    """-log p of each token of an answer, (n,), under the model's own template, given what comes before."""
    prompt, ids = opened.tokenizer.chat(before), opened.tokenizer.encode(answer)
    if not ids:
        return np.zeros(0)
    session = opened.session(2048)
    rows = session.eval(prompt + ids[:-1], logits="all")[len(prompt) - 1 :].astype(np.float64)
    rows -= rows.max(-1, keepdims=True)
    return np.asarray(np.log(np.exp(rows).sum(-1)) - rows[np.arange(len(ids)), ids])


def mean_nats(opened: Runtime, asked: Sequence[tuple[str, str]]) -> float:
    """Of answers to prompts, (prompt, answer) each, over all their tokens, so that a long answer counts for more."""
    return float(np.concatenate([nats(opened, [Message("user", ask)], answer) for ask, answer in asked]).mean())


def bits(opened: Runtime, conversations: Sequence[Sequence[dict[str, str]]]) -> float:
    """Bits a byte of the last answer of each conversation."""
    total, n_bytes = 0.0, 0
    for *before, last in conversations:
        total += nats(opened, [Message(m["role"], m["content"]) for m in before], last["content"]).sum()
        n_bytes += len(last["content"].encode())
    return total / n_bytes / math.log(2)


def main(heldout: Path, n: int, paths: Sequence[Path]) -> None:
    conversations = [json.loads(line)["messages"] for line in heldout.read_text().splitlines()[:n]]
    for path in paths:
        with open_model(path, None) as opened:
            print(f"{path.name}: {bits(opened, conversations):.4f} bits a byte of {len(conversations)} answers")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), [Path(x) for x in sys.argv[3:]])
