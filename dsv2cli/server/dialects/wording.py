"""What OpenAI's dialects and llama-server's say alike of an answer: how it ended, what it cost, how likely it was."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from typing import Any

from dsv2cli.scheduler import Logprobs, Stats
from dsv2cli.server.generation import Began, Ended, Generation, Heard, Piece
from dsv2cli.server.marked import Marked, plain, spelt
from dsv2cli.server.service import Service
from dsv2cli.server.wire import Sampled

FINISH = {"end": "stop", "stop": "stop", "length": "length", "context": "length", "cancelled": "stop", "error": "stop"}
DONE = b"data: [DONE]\n\n"
NO_LIMIT = -1


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


class Watch:
    """A stream's first answer while it is written, for clients that ask to be told: how far its prompt is, and its
    timings so far."""

    def __init__(self, body: Sampled) -> None:
        self._tells_progress, self._tells_timings = bool(body.return_progress), bool(body.timings_per_token)
        self._stats = Stats()
        self._began: float | None = None  # when its prompt began to be read
        self._first: float | None = None  # and its first token came

    def told(self, event: Heard) -> dict[str, Any]:
        """The fields that belong to an event; none where nobody asked."""
        now = time.perf_counter()
        if isinstance(event, Began):
            self._began = now if self._began is None else self._began
            self._stats.n_prompt, self._stats.n_reused = event.cached + event.done, event.cached
            self._stats.prefill_seconds = now - self._began
            if not self._tells_progress:
                return {}
            return {"prompt_progress": self._progress(event)} | self._timings()
        if isinstance(event, Piece) and event.choice == 0:
            self._first = now if self._first is None else self._first
            self._stats.n_answer += 1
            self._stats.decode_seconds = now - self._first
            return self._timings()
        return {}

    def _progress(self, event: Began) -> dict[str, Any]:
        processed, ms = event.cached + event.done, round(self._stats.prefill_seconds * 1e3)
        return {"total": event.cached + event.n, "cache": event.cached, "processed": processed, "time_ms": ms}

    def _timings(self) -> dict[str, Any]:
        return {"timings": timings(self._stats)} if self._tells_timings else {}


def settings(service: Service, asked: Generation) -> dict[str, Any]:
    """Sampling as it was, in llama-server's names."""
    params = asked.params
    biases = [{"token": t, "bias": b if math.isfinite(b) else None} for t, b in _all_biases(service, asked).items()]
    return {
        "seed": params.seed if params.seed is not None else service.seed,
        "temperature": params.temperature,
        "top_k": params.top_k,
        "top_p": params.top_p,
        "min_p": params.min_p,
        "repeat_last_n": params.repeat_last_n,
        "repeat_penalty": params.repeat_penalty,
        "presence_penalty": params.presence_penalty,
        "frequency_penalty": params.frequency_penalty,
        "stop": list(asked.stops),
        "max_tokens": NO_LIMIT if asked.limit is None else asked.limit,
        "n_predict": NO_LIMIT if asked.limit is None else asked.limit,
        "n_probs": asked.n_top or 0,
        "post_sampling_probs": asked.drawn,
        "ignore_eos": asked.ignore_end,
        "logit_bias": biases,
        "samplers": ["penalties", "top_k", "top_p", "min_p", "temperature"],
    }


def _all_biases(service: Service, asked: Generation) -> dict[int, float]:
    ends = dict.fromkeys(service.engine.end_ids, float("-inf")) if asked.ignore_end else {}
    return asked.params.bias | ends


def chat_logprob(service: Service, event: Piece) -> dict[str, Any]:
    found = event.logprobs
    assert found is not None

    def entry(token: int, value: float) -> dict[str, Any]:
        raw = service.engine.runtime.tokenizer.token_bytes(token)
        return {"id": token, "token": service.token_text(token), "logprob": _finite(value), "bytes": list(raw)}

    return entry(event.id, found.chosen) | {"top_logprobs": [entry(token, value) for token, value in found.top]}


def text_logprobs(
    service: Service, tokens: Sequence[tuple[int, Logprobs | None]], n_top: int, offset: int = 0, n_echoed: int = 0
) -> dict[str, Any]:
    """OpenAI's older form. A token's figure is the same number where it stands among the likeliest as where it stands
    alone, which lm-eval compares. Offsets count characters of the text, in which the first token is at ``offset`` and a
    part of a character where the character begins; a control token has some among the first ``n_echoed`` alone."""
    stream = Marked(service.engine.runtime.tokenizer)
    found: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for i, (token, logprobs) in enumerate(tokens):
        text = service.token_text(token)
        found["tokens"].append(text)
        found["text_offset"].append(max(offset, 0))
        offset += len((spelt if i < n_echoed else plain)(stream.feed(token)))
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
