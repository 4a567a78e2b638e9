"""What OpenAI's dialects and llama-server's say alike of an answer: how it ended, what it cost, how likely it was."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from dsv2cli.scheduler import Logprobs, Stats
from dsv2cli.server.generation import Ended, Piece
from dsv2cli.server.service import Service

FINISH = {"end": "stop", "stop": "stop", "length": "length", "context": "length", "cancelled": "stop", "error": "stop"}
DONE = b"data: [DONE]\n\n"


def usage(answers: Iterable[Ended], n_reasoning: int = 0) -> dict[str, Any]:
    ended = list(answers)
    first = [e.stats for e in ended if e.choice == 0]
    n_prompt = sum(stats.n_prompt for stats in first)
    n_answer = sum(e.stats.n_answer for e in ended)
    return {
        "prompt_tokens": n_prompt,
        "completion_tokens": n_answer,
        "total_tokens": n_prompt + n_answer,
        "prompt_tokens_details": {"cached_tokens": sum(stats.n_reused for stats in first)},
        "completion_tokens_details": {"reasoning_tokens": n_reasoning},
    }


def timings(stats: Stats) -> dict[str, Any]:
    """llama-server's."""
    n_prompt = stats.n_prompt - stats.n_reused
    prompt_ms, answer_ms = stats.prefill_seconds * 1e3, stats.decode_seconds * 1e3
    return {
        "cache_n": stats.n_reused,
        "prompt_n": n_prompt,
        "prompt_ms": prompt_ms,
        "prompt_per_token_ms": prompt_ms / max(n_prompt, 1),
        "prompt_per_second": stats.prefill_rate,
        "predicted_n": stats.n_answer,
        "predicted_ms": answer_ms,
        "predicted_per_token_ms": answer_ms / max(stats.n_answer, 1),
        "predicted_per_second": stats.decode_rate,
    }


def chat_logprob(service: Service, event: Piece) -> dict[str, Any]:
    found = event.logprobs
    assert found is not None

    def entry(token: int, value: float) -> dict[str, Any]:
        raw = service.engine.runtime.tokenizer.token_bytes(token)
        return {"id": token, "token": service.token_text(token), "logprob": _finite(value), "bytes": list(raw)}

    return entry(event.id, found.chosen) | {"top_logprobs": [entry(token, value) for token, value in found.top]}


def text_logprobs(
    service: Service, tokens: Sequence[tuple[int, Logprobs | None]], n_top: int, offset: int = 0
) -> dict[str, Any]:
    """OpenAI's older form. A token's figure is the same number where it stands among the likeliest as where it stands
    alone, which lm-eval compares."""
    found: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token, logprobs in tokens:
        text = service.token_text(token)
        found["tokens"].append(text)
        found["text_offset"].append(offset)
        offset += len(text)
        found["token_logprobs"].append(None if logprobs is None else _finite(logprobs.chosen))
        if logprobs is None:
            found["top_logprobs"].append(None)
            continue
        top: dict[str, float] = {}
        for other, value in logprobs.top[:n_top]:
            top.setdefault(service.token_text(other), _finite(value))
        top.setdefault(text, _finite(logprobs.chosen))
        found["top_logprobs"].append(top)
    return found


def _finite(value: float) -> float:
    """JSON has no infinity; OpenAI writes -9999 for what cannot come."""
    return value if value > -9999.0 else -9999.0
