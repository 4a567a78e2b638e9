"""Counters in Prometheus' text format, under llama-server's names."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import Response

from dsv2cli.runtime import Runtime
from dsv2cli.server.service import Service

if TYPE_CHECKING:
    from cext.model import DeviceWork

Row = tuple[str, str, str, float]  # name, kind, what it is, value
DRAFTS = ("drafts", "draft_tokens", "accepted_tokens")  # dashboards of llama-server's ask for them
TEXT = "text/plain; version=0.0.4"


async def metrics(service: Service, request: Request) -> Response:
    engine, f = service.engine, service.engine.figures
    disk = engine.disk
    usage = engine.runtime.model.cache_usage()
    rows: tuple[Row, ...] = (
        ("prompt_tokens_total", "counter", "Prompt tokens read.", f.prompt_tokens),
        ("prompt_tokens_cached_total", "counter", "Prompt tokens found in the cache.", f.cached_tokens),
        ("prompt_seconds_total", "counter", "Seconds until first logits.", f.prompt_seconds),
        ("tokens_predicted_total", "counter", "Tokens written.", f.answer_tokens),
        ("tokens_predicted_seconds_total", "counter", "Seconds of writing.", f.answer_seconds),
        ("n_decode_total", "counter", "Steps of the engine.", f.steps),
        ("n_tokens_max", "counter", "The longest prompt and answer together.", f.longest),
        ("n_busy_slots_per_decode", "gauge", "Answers in a step, on average.", f.in_steps / max(f.steps, 1)),
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
    rows += tuple((f"spec_decode_num_{what}_total", "counter", "Nothing is drafted here.", 0) for what in DRAFTS)
    rows += drive_rows(engine.runtime) + gpu_rows(await asyncio.to_thread(engine.runtime.device_work))
    lines = [
        f"# HELP llamacpp:{name} {what}\n# TYPE llamacpp:{name} {kind}\nllamacpp:{name} {value:g}\n"
        for name, kind, what, value in rows
    ]
    response = Response("".join(lines), media_type=TEXT)
    response.raw_headers.append((b"Process-Start-Time-Unix", str(int(f.began)).encode()))  # spelt as llama-server does
    return response


def drive_rows(runtime: Runtime) -> tuple[Row, ...]:
    """Of experts that are read from the file; none where all weights are in memory."""
    counts = runtime.drive_counts()
    if counts is None or runtime.plan is None:
        return ()
    needed, ready, read, waited, told, right = (
        sum(getattr(part, name) for part in counts)
        for name in ("needed", "ready", "bytes_read", "wait_ns", "told", "right")
    )
    return (
        ("weights_budget_bytes", "gauge", "Memory for weights.", runtime.plan.ram or 0),
        ("experts_needed_total", "counter", "Routed experts that steps needed, once a layer and step.", needed),
        ("experts_ready_total", "counter", "Of these, in memory when they were needed.", ready),
        ("experts_guessed_total", "counter", "Experts guessed ahead.", told),
        ("experts_guessed_right_total", "counter", "Of these, needed.", right),
        ("drive_bytes_total", "counter", "Bytes read from the model's file.", read),
        ("drive_wait_seconds_total", "counter", "Seconds that steps waited for the drive.", waited / 1e9),
        (
            "drive_bytes_per_token",
            "gauge",
            "Bytes read a token, writing.",
            _rate(counts[0].bytes_read, counts[0].tokens),
        ),
    )


def gpu_rows(work: DeviceWork | None) -> tuple[Row, ...]:
    """Of a part on a GPU; none without."""
    if work is None:
        return ()
    rows: tuple[Row, ...] = (("gpu_bytes", "gauge", "Memory that the model takes on its GPU.", work.memory),)
    if not work.hot.slots:
        return rows
    return (
        *rows,
        ("gpu_experts", "gauge", "Routed experts that the GPU has room for.", work.hot.slots),
        ("gpu_experts_chosen_total", "counter", "Choices of decoded tokens.", work.hot.chosen),
        ("gpu_experts_held_total", "counter", "Of these, of experts that were on the GPU.", work.hot.held),
        ("gpu_upload_bytes_total", "counter", "Bytes of experts copied to the GPU.", work.hot.nbytes),
    )


def _rate(n: int, seconds: float) -> float:
    return n / seconds if seconds > 0 else 0.0
