"""The teacher answers until the time is over: a queue of prompts feeds the free slots of one batch.

usage: generate.py MODEL.gguf OUT.jsonl SECONDS SEED [SLOTS]
"""

import json
import random
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import prompts
import torch
from clean import cut, fit
from prompts import Ask
from teacher import Teacher

MAX_PROMPT, MAX_NEW, EVERY = 320, 352, 16


@dataclass
class Slot:
    ask: Ask
    ids: list[int] = field(default_factory=list)


class Questions:
    """Prompts: those that follow from earlier answers first, then new ones."""

    def __init__(self, seed: int) -> None:
        self.rng, self.next = random.Random(seed), deque[Ask]()

    def draw(self) -> Ask:
        return self.next.popleft() if self.next else prompts.draw(self.rng)

    def heard(self, ask: Ask, text: str, finished: bool) -> dict[str, object] | None:
        """What was said: a user's words are asked next, an answer is kept where it is fit and may be followed up."""
        if ask.role == "user":
            asked = f"{ask.opening}{text}".strip()
            if finished and 12 < len(asked) < 200 and asked.isascii() and "\n" not in asked and asked[-1] in ".?!":
                self.next.append(Ask("question", prompts.PLAIN, (("user", asked),)))
            return None
        answer = cut(f"{ask.opening}{text}", finished)
        if not answer or not fit(ask, answer):
            return None
        if ask.kind in prompts.FOLLOW and len(ask.turns) < 4 and len(answer) < 500 and self.rng.random() < 0.35:
            self.next.append(prompts.follow(self.rng, ask, answer))
        return {"kind": ask.kind, "turns": [*ask.turns, ("assistant", answer)]}


def run(model: Path, out: Path, seconds: float, seed: int, n_slots: int) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(seed)
    teacher = Teacher(model, n_slots, MAX_PROMPT + MAX_NEW, device, temperature=0.65, min_p=0.1)
    teacher.seed.fill_(seed * 100_000)
    questions, slots = Questions(seed), [Slot(prompts.draw(random.Random(seed)))] * n_slots
    free, begun = list(range(n_slots)), time.time()
    written = kept = heard = 0
    told = begun
    with out.open("w") as file:
        while time.time() - begun < seconds:
            for start in range(0, len(free), 512):
                part, rows = free[start : start + 512], []
                for i in part:
                    while True:
                        slots[i] = Slot(questions.draw())
                        ask = slots[i].ask
                        ids = teacher.prompt(ask.system, ask.turns, ask.role, ask.opening)
                        if len(ids) <= MAX_PROMPT:
                            break
                    rows.append(ids)
                teacher.begin(part, rows)
            columns = []
            for _ in range(EVERY):
                columns.append(teacher.token.clone())
                teacher.step()
            block, free = torch.stack(columns, 1).tolist(), []
            for i, new in enumerate(block):
                slot = slots[i]
                finished = teacher.end in new
                slot.ids += new[: new.index(teacher.end)] if finished else new
                if not finished and len(slot.ids) < MAX_NEW - EVERY:
                    continue
                free.append(i)
                written, heard = written + len(slot.ids), heard + 1
                row = questions.heard(slot.ask, teacher.tokenizer.decode(slot.ids), finished)
                if row:
                    kept += 1
                    file.write(json.dumps(row) + "\n")
            if time.time() - told > 20:
                told = time.time()
                print(f"{told - begun:.0f} s, {written} tokens, {heard} heard, {kept} kept", flush=True)
    print(
        f"{time.time() - begun:.0f} s, {written} tokens, {written / (time.time() - begun):.0f} a second, {heard} heard, {kept} kept",
        flush=True,
    )


if __name__ == "__main__":
    run(
        Path(sys.argv[1]),
        Path(sys.argv[2]),
        float(sys.argv[3]),
        int(sys.argv[4]),
        int(sys.argv[5]) if len(sys.argv) > 5 else 4096,
    )
