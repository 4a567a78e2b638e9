"""What a request is refused with, in the form that the clients of its dialect read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

ANTHROPIC_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
}


@dataclass
class ApiError(Exception):
    """A refusal: HTTP status, a sentence, and what program code can branch on. more: further fields of the error."""

    status: int
    message: str
    kind: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None
    more: dict[str, Any] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)

    def body(self, path: str = "") -> dict[str, Any]:
        """As the dialect of a path has it; OpenAI's where it is nobody's."""
        if path.startswith("/v1/messages"):
            kind = ANTHROPIC_KINDS.get(self.status, "api_error")
            return {"type": "error", "error": {"type": kind, "message": self.message}}
        if path.startswith("/api/"):
            return {"error": self.message}
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code or self.status}
        return {"error": error | self.more}


def bad_field(name: str, what: str) -> ApiError:
    return ApiError(400, f"{name}: {what}", param=name)


def no_such_model(name: str) -> ApiError:
    return ApiError(404, f"the model `{name[:200]}` is not served here", param="model", code="model_not_found")


def too_long(n_prompt: int, n_ctx: int, *, counted: bool = True) -> ApiError:
    """A prompt that the context does not hold. counted: else it has so many tokens at least. llama-server's names and
    words beside OpenAI's code: agents look for them before they shorten a conversation."""
    least = "" if counted else "at least "
    return ApiError(
        400,
        f"the prompt has {least}{n_prompt} tokens, which exceeds the available context size of {n_ctx}: shorten"
        " it, or serve with a larger --ctx",
        kind="exceed_context_size_error",
        code="context_length_exceeded",
        more={"n_prompt_tokens": n_prompt, "n_ctx": n_ctx},
    )


def busy(n_waiting: int) -> ApiError:
    return ApiError(
        429,
        f"{n_waiting} requests are waiting already",
        kind="rate_limit_error",
        code="queue_full",
        headers={"Retry-After": "5"},
    )


def loading() -> ApiError:
    return ApiError(503, "the model is being loaded", kind="unavailable_error", headers={"Retry-After": "1"})


def stopping() -> ApiError:
    return ApiError(503, "the server is shutting down", kind="unavailable_error")
