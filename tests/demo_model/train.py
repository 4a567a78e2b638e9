"""Trains the demonstration model from nothing on the tokens of mix.py; the state of the least held-out loss is kept.

usage: train.py DATA_FOLDER TOKENIZER.json OUT_FOLDER SECONDS [--muon] [--lr X] [--seed N] [--toy]
"""

import argparse
import json
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from model import EXPERTS, Experts, Model, checkpoint, config, rope_table
from safetensors.torch import save_file
from torch import Tensor
from vocabulary import BOS, EOS, N_VOCAB

TOKENS_A_STEP, LONG_FROM, BALANCE = 65536, 0.86, 0.01


def optimizers(model: Model, lr: float, muon: bool, device: str) -> list[torch.optim.Optimizer]:
    """AdamW; with muon the matrices inside the layers go by Muon."""
    named = list(model.named_parameters())
    inner = [p for n, p in named if muon and p.ndim == 2 and n.startswith("layers.") and not n.endswith("router")]
    taken = {id(p) for p in inner}
    rest = [p for _, p in named if id(p) not in taken]
    groups = [
        {"params": [p for p in rest if p.ndim == 2], "weight_decay": 0.1},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    out: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=device == "cuda")]
    if inner:
        out.append(torch.optim.Muon(inner, lr=lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"))
    return out


def rate(progress: float, step: int) -> float:
    """The share of the learning rate: 100 steps of warming up, flat for 40 %, then down to nothing."""
    return min(1.0, (step + 1) / 100) * (1.0 if progress < 0.4 else max(0.0, (1 - progress) / 0.6))


class Trainer:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, "cuda" if torch.cuda.is_available() else "cpu"
        torch.manual_seed(args.seed)
        torch.set_float32_matmul_precision("high")
        self.tokens = torch.from_numpy(np.load(args.data / "train.npy").astype(np.int32)).to(self.device)
        self.held = torch.from_numpy(np.load(args.data / "held.npy").astype(np.int64)).to(self.device)
        self.model = Model(N_VOCAB, 2 if args.toy else 6).to(self.device)
        self.fast = self.model if args.toy else torch.compile(self.model, dynamic=False)
        self.optimizers = optimizers(self.model, args.lr, args.muon, self.device)
        self.tables = {t: tuple(x.to(self.device) for x in rope_table(t)) for t in (1024, 4096)}

    def losses(self, model: torch.nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy in nats a token, and the balancing loss, of windows (batch, length + 1)."""
        with torch.autocast(self.device, torch.bfloat16):
            logits, balance = model(ids[:, :-1], *self.tables[ids.shape[1] - 1])
        return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten()), balance

    def batch(self, length: int) -> Tensor:
        n = max(1, (2048 if self.args.toy else TOKENS_A_STEP) // length)
        begin = torch.randint(0, len(self.tokens) - length - 1, (n, 1), device=self.device)
        return self.tokens[begin + torch.arange(length + 1, device=self.device)].long()

    @torch.no_grad()
    def held_out(self) -> float:
        rows = self.held.unfold(0, 1025, 1024)[:256]
        parts = [self.losses(self.model, part)[0].item() * len(part) for part in rows.split(16)]
        return sum(parts) / len(rows)

    def run(self) -> None:
        best, kept, step, told = float("inf"), self.model.state_dict(), 0, time.time()
        begun, seconds = time.time(), self.args.seconds
        while True:
            if step == 4:  # compiled by now, for both lengths
                begun = told = time.time()
            progress = (time.time() - begun) / seconds if step > 4 else 0.0
            last = progress >= 1
            if last or (step > 4 and time.time() - told > seconds / 8):
                told, held = time.time(), self.held_out()
                print(
                    f"{step} steps, {progress:.2f}, {step * TOKENS_A_STEP / (time.time() - begun):.0f} tokens a second, held-out {held:.4f}",
                    flush=True,
                )
                if held < best:
                    best, kept = held, {k: v.clone() for k, v in self.model.state_dict().items()}
            if last:
                break
            share = rate(progress, step)
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = self.args.lr * share
            loss, balance = self.losses(self.fast, self.batch(4096 if progress > LONG_FROM or step in (2, 3) else 1024))
            (loss + BALANCE * balance).backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            step += 1
            if step % 250 == 1:
                print(f"step {step}: {loss.item():.4f}, balance {balance.item():.3f}", flush=True)
        self.model.load_state_dict(kept)
        print(
            f"least held-out loss {best:.4f} nats a token after {step} steps of {TOKENS_A_STEP} tokens, {len(self.tokens)} different",
            flush=True,
        )

    @torch.no_grad()
    def usage(self) -> list[list[float]]:
        """Each expert's share of the held-out tokens, a row a layer; 1 / EXPERTS is even."""
        rows: list[list[float]] = []
        hooks = []
        for layer in self.model.layers:
            if isinstance(layer.mlp, Experts):
                mlp = layer.mlp
                hooks.append(
                    mlp.register_forward_pre_hook(
                        lambda m, x: rows.append((m.choose(x[0])[1].flatten(0, -2).mean(0) / 4).tolist())
                    )
                )
        self.losses(self.model, self.held.unfold(0, 1025, 1024)[:16])
        for hook in hooks:
            hook.remove()
        return rows

    def save(self) -> None:
        out: Path = self.args.out
        out.mkdir(exist_ok=True, parents=True)
        save_file(checkpoint(self.model), out / "model.safetensors", metadata={"format": "pt"})
        (out / "config.json").write_text(json.dumps(config(N_VOCAB, BOS, EOS), indent=1))
        usage = self.usage()
        least = Counter({i: min(row) * EXPERTS for i, row in enumerate(usage)})
        print("least used expert of each layer, 1 is even:", {i: round(x, 2) for i, x in least.items()}, flush=True)
        (out / "usage.json").write_text(json.dumps(usage))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("seconds", type=float)
    parser.add_argument("--muon", action="store_true")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--toy", action="store_true")
    args = parser.parse_args()
    trainer = Trainer(args)
    trainer.run()
    trainer.save()
    from tryout import try_out

    try_out(trainer.model, args.tokenizer, args.out, trainer.device, few=args.toy)


if __name__ == "__main__":
    main()
