"""The table of score.py for a model still in training's arithmetic: all cases at once, sampled as the program samples."""

import json
from collections.abc import Sequence
from pathlib import Path

import score
import torch
from model import Model, rope_table
from tokenizers import Tokenizer
from torch import Tensor
from vocabulary import EOS, conversation_ids


def sample(logits: Tensor) -> Tensor:
    """The program's default: top-k 40, top-p 0.95, min-p 0.05, temperature 0.8. logits (n, n_vocab) -> ids (n,)."""
    top = logits.float().topk(40, -1)
    p = top.values.softmax(-1)
    p = p.masked_fill(p.cumsum(-1) - p > 0.95, 0.0)
    p = p.masked_fill(p < 0.05 * p[:, :1], 0.0)
    p = (top.values / 0.8).softmax(-1) * (p > 0)
    return top.indices.gather(-1, torch.multinomial(p, 1))[:, 0]


@torch.no_grad()
def answers(
    model: Model, tokenizer: Tokenizer, turns: Sequence[list[tuple[str, str]]], device: str, limit: int
) -> list[str]:
    """The next answer of each conversation; one that does not end by itself gets a NUL."""
    rows = [conversation_ids(tokenizer, t, answering=True) for t in turns]
    begins = [len(r) for r in rows]
    length = torch.tensor(begins, device=device)
    most = max(begins) + limit
    ids = torch.zeros(len(rows), most, dtype=torch.long, device=device)
    for i, r in enumerate(rows):
        ids[i, : len(r)] = torch.tensor(r)
    cos, sin = (x.to(device) for x in rope_table(most))
    alive = torch.arange(len(rows), device=device)
    ended = torch.zeros(len(rows), dtype=torch.bool, device=device)
    for _ in range(limit):
        width = min(most, -(-int(length[alive].max()) // 32) * 32)
        with torch.autocast(device, torch.bfloat16):
            logits, _ = model(ids[alive, :width], cos[:width], sin[:width])
        new = sample(logits[torch.arange(len(alive), device=device), length[alive] - 1])
        ids[alive, length[alive]] = new
        length[alive] += 1
        ended[alive] = new == EOS
        alive = alive[new != EOS]
        if not len(alive):
            break
    out = []
    for row, begin, end, done in zip(ids.tolist(), begins, length.tolist(), ended.tolist(), strict=True):
        out.append(tokenizer.decode([x for x in row[begin:end] if x != EOS]) + ("" if done else "\x00"))
    return out


def try_out(model: Model, tokenizer_path: Path, out: Path, device: str, few: bool = False) -> None:
    tokenizer, model = Tokenizer.from_file(str(tokenizer_path)), model.eval()
    torch.manual_seed(1)
    cases = score.cases()[:: 40 if few else 1]
    limit = 8 if few else score.MAX_TOKENS
    talks: list[list[tuple[str, str]]] = [[] for _ in cases]
    for n in range(2):
        open_ = [i for i, case in enumerate(cases) if len(case.asks) > n]
        for i in open_:
            talks[i].append(("user", cases[i].asks[n]))
        said = answers(model, tokenizer, [talks[i] for i in open_], device, limit) if open_ else []
        for i, text in zip(open_, said, strict=True):
            talks[i].append(("assistant", text))
    results, lines = [], []
    for case, talk in zip(cases, talks, strict=True):
        results.append((case.row, case.good([text for role, text in talk if role == "assistant"])))
        lines.append(json.dumps({"row": case.row, "good": results[-1][1], "talk": talk}, ensure_ascii=False))
    (out / "said.jsonl").write_text("\n".join(lines))
    print(score.table(results), flush=True)
