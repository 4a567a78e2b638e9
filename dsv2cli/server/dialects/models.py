"""OpenAI's list of models: the one that is served."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from dsv2cli.server import answering
from dsv2cli.server.service import Service
from dsv2cli.server.wire import dump


def model_entry(service: Service) -> dict[str, Any]:
    runtime, limits = service.engine.runtime, service.engine.limits
    hparams = runtime.model.hparams
    return {
        "id": service.name,
        "aliases": [service.name, *service.aliases],
        "tags": list(service.tags),
        "object": "model",
        "created": service.began,
        "owned_by": "dsv2",
        "max_model_len": limits.n_ctx,
        "meta": {
            "n_vocab": hparams["n_vocab"],
            "n_ctx_train": hparams["n_ctx_train"],
            "n_ctx": limits.n_ctx,
            "n_embd": hparams["n_embd"],
            "size": runtime.model.nbytes,
        },
    }


async def models(service: Service, request: Request) -> Response:
    entry = model_entry(service)
    listed = {"name": service.name, "model": service.name, "capabilities": ["completion"]}
    return Response(dump({"object": "list", "data": [entry], "models": [listed]}), media_type=answering.JSON_TYPE)


async def model(service: Service, request: Request) -> Response:
    service.check_model(request.path_params["name"])
    return Response(dump(model_entry(service)), media_type=answering.JSON_TYPE)
