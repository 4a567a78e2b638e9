"""What an answer cost."""

from __future__ import annotations

from dataclasses import dataclass

from dsv2cli.scheduler.events import Reason


@dataclass
class Stats:
    """What one answer cost. Times in seconds."""

    n_prompt: int = 0  # tokens of the whole prompt
    n_reused: int = 0  # of them, those that were in the cache
    n_answer: int = 0
    n_drafted: int = 0  # tokens evaluated on the guess that they would be chosen
    n_taken: int = 0  # of them, those that were
    prefill_seconds: float = 0.0  # from joining the scheduler to the first logits
    decode_seconds: float = 0.0  # all tokens after the first
    stop: Reason = "cancelled"  # until it ends in another way

    @property
    def prefill_rate(self) -> float:
        return _rate(self.n_prompt - self.n_reused, self.prefill_seconds)

    @property
    def decode_rate(self) -> float:
        return _rate(self.n_answer - 1, self.decode_seconds)


def _rate(n: int, seconds: float) -> float:
    return n / seconds if n > 0 and seconds > 0 else 0.0
