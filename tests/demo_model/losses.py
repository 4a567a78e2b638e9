"""Held-out loss a byte of a model and of another, on the answers that were set apart from training.

usage: losses.py HELDOUT.jsonl N MODEL.gguf...   (N: conversations)
"""

import json
import math
import sys
from pathlib import Path

import numpy as np

import cext
from cext.tokenizer import Message, Tokenizer


def bits(path: Path, conversations: list[list[dict[str, str]]]) -> float:
    """Bits a byte of the last answer of each conversation, under the model's own template, given what comes before."""
    model, tokenizer = cext.Model(path), Tokenizer(path)
    nats, n_bytes = 0.0, 0
    for messages in conversations:
        *before, answer = [Message(m["role"], m["content"]) for m in messages]
        prompt = tokenizer.chat(before)
        ids = tokenizer.encode(messages[-1]["content"])
        session = model.session(n_ctx=2048)
        rows = session.eval(prompt + ids[:-1], logits="all")[len(prompt) - 1 :].astype(np.float64)
        rows -= rows.max(-1, keepdims=True)
        nats += float((np.log(np.exp(rows).sum(-1)) - rows[np.arange(len(ids)), ids]).sum())
        n_bytes += len(answer.content.encode() if isinstance(answer.content, str) else b"")
    return nats / n_bytes / math.log(2)


def main(heldout: Path, n: int, paths: list[Path]) -> None:
    conversations = [json.loads(line)["messages"] for line in heldout.read_text().splitlines()[:n]]
    for path in paths:
        print(f"{path.name}: {bits(path, conversations):.4f} bits a byte of {len(conversations)} answers")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), [Path(x) for x in sys.argv[3:]])
