"""Counters in Prometheus' text format, under llama-server's names."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from dsv2cli.server.service import Service

TEXT = "text/plain; version=0.0.4"


async def metrics(service: Service, request: Request) -> Response:
    engine, f = service.engine, service.engine.figures
    disk = engine.disk
    usage = engine.runtime.model.cache_usage()
    rows = (
        ("prompt_tokens_total", "counter", "Prompt tokens read.", f.prompt_tokens),
        ("prompt_tokens_cached_total", "counter", "Prompt tokens found in the cache.", f.cached_tokens),
        ("prompt_seconds_total", "counter", "Seconds until first logits.", f.prompt_seconds),
        ("tokens_predicted_total", "counter", "Tokens written.", f.answer_tokens),
        ("tokens_predicted_seconds_total", "counter", "Seconds of writing.", f.answer_seconds),
        ("n_decode_total", "counter", "Steps of the engine.", f.steps),
        ("step_seconds_total", "counter", "Seconds in steps.", f.step_seconds),
        ("step_seconds_max", "gauge", "The longest step.", f.longest_step),
        ("requests_total", "counter", "Requests taken on.", f.requests),
        ("answers_finished_total", "counter", "Answers that came to their end.", f.finished),
        ("answers_cancelled_total", "counter", "Answers whose client went.", f.cancelled),
        ("answers_failed_total", "counter", "Answers that failed.", f.failed),
        ("prompt_tokens_seconds", "gauge", "Prompt tokens a second.", _rate(f.prompt_tokens, f.prompt_seconds)),
        ("predicted_tokens_seconds", "gauge", "Tokens a second.", _rate(f.answer_tokens, f.answer_seconds)),
        ("requests_processing", "gauge", "Answers being written.", engine.n_running),
        ("requests_deferred", "gauge", "Requests that wait.", engine.n_waiting),
        ("kv_cache_bytes", "gauge", "Memory of all caches.", usage.nbytes),
        ("cache_disk_bytes", "gauge", "Disk that kept prefixes take.", disk.folder.nbytes if disk else 0),
        ("cache_disk_tokens_total", "counter", "Prompt tokens found on disk.", disk.n_fetched if disk else 0),
        ("kept_prefixes", "gauge", "Prefixes kept for requests that begin alike.", len(engine.prefixes)),
    )
    lines = [
        f"# HELP llamacpp:{name} {what}\n# TYPE llamacpp:{name} {kind}\nllamacpp:{name} {value:g}\n"
        for name, kind, what, value in rows
    ]
    return Response("".join(lines), media_type=TEXT, headers={"Process-Start-Time-Unix": str(int(f.began))})


def _rate(n: int, seconds: float) -> float:
    return n / seconds if seconds > 0 else 0.0
