"""A response of OpenAI's Responses as it grows: its items, and the events that tell a client of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from dsv2cli.server import errors
from dsv2cli.server.answering import sse
from dsv2cli.server.dialects.chat import Answer, Asked
from dsv2cli.server.dialects.wording import DONE, Watch, timings
from dsv2cli.server.errors import ApiError
from dsv2cli.server.generation import Ended, Heard, Piece, take_all
from dsv2cli.server.service import Service, new_id

Event = dict[str, Any]
CUT = ("length", "context")
CODES = {400: "invalid_prompt", 429: "rate_limit_exceeded"}


class Progress:
    """One response. head: what it says from beginning to end; finished: is given it when it is complete, and says
    whether it is kept; watch: of a stream."""

    def __init__(
        self,
        service: Service,
        asked: Asked,
        head: dict[str, Any],
        finished: Callable[[dict[str, Any]], bool],
        watch: Watch,
    ) -> None:
        self._service, self._asked, self._finished, self._watch = service, asked, finished, watch
        self._answer = Answer(service, asked)
        self._response = head | {
            "status": "in_progress",
            "completed_at": None,
            "error": None,
            "incomplete_details": None,
            "output": [],
            "usage": None,
        }
        self._open: _Item | None = None
        self._logprobs: list[dict[str, Any]] = []  # of tokens whose text has not been told
        self._n_told = 0
        self._ended: Ended | None = None

    # Streamed.

    def first(self) -> bytes:
        told = dict(self._response)
        return self._sse({"type": "response.created", "response": told}) + self._sse(
            {"type": "response.in_progress", "response": told}
        )

    def say(self, event: Heard) -> Iterable[bytes]:
        more = self._watch.told(event)
        if isinstance(event, Piece | Ended):
            for told in self._events(event):
                yield self._sse(told | more if told["type"].endswith("_text.delta") else told)
        elif more:
            yield self._sse({"type": "response.in_progress", "response": dict(self._response)} | more)

    def last(self) -> Iterable[bytes]:
        if self._is_cancelled:
            yield self.failed(errors.stopping())
            return
        self._finish()
        assert self._ended is not None
        kind = f"response.{self._response['status']}"
        yield self._sse({"type": kind, "response": self._response, "timings": timings(self._ended.stats)})
        yield DONE

    def failed(self, error: ApiError) -> bytes:
        told = {"code": CODES.get(error.status, "server_error"), "message": error.message}
        self._response |= {"status": "failed", "error": told}
        return self._sse({"type": "response.failed", "response": self._response}) + DONE

    def _sse(self, event: Event) -> bytes:
        event["sequence_number"] = self._n_told
        self._n_told += 1
        return sse(event, event["type"])

    # Whole.

    def whole(self, heard: list[Heard]) -> dict[str, Any]:
        take_all(heard, lambda event: list(self._events(event)))
        if self._is_cancelled:
            raise errors.stopping()
        self._finish()
        return self._response

    @property
    def _is_cancelled(self) -> bool:
        """The server is being stopped: nobody else ends an answer whose client is still there."""
        return self._ended is not None and self._ended.reason == "cancelled"

    # Both.

    def _events(self, event: Piece | Ended) -> Iterator[Event]:
        parts, calls = self._answer.feed(event)
        if isinstance(event, Piece) and event.logprobs is not None and self._is_text(event.id):
            self._logprobs.append(_logprob(self._answer.logprobs[-1]))
        for part in parts:
            if part.kind == "reasoning":
                yield from self._text("reasoning", part.text)
                self._logprobs.clear()
            elif part.kind == "content":
                yield from self._text("message", part.text)
        for call in calls:
            yield from self._call(call)
            self._logprobs.clear()
        if isinstance(event, Ended):
            self._ended = event
            if not self._open and not self._response["output"]:
                yield from self._text("message", "")
            yield from self._close("incomplete" if event.reason in CUT else "completed")

    def _is_text(self, token: int) -> bool:
        return self._service.engine.runtime.tokenizer.special_text(token) is None

    def _text(self, kind: str, text: str) -> Iterator[Event]:
        if self._open is None or self._open.kind != kind:
            yield from self._close()
            self._open = _Item(kind, len(self._response["output"]))
            yield from self._open.opened()
        logprobs = self._logprobs if kind == "message" else []
        self._logprobs = []
        if text:
            yield self._open.more(text, logprobs)

    def _call(self, call: dict[str, Any]) -> Iterator[Event]:
        yield from self._close()
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        index, item_id = len(self._response["output"]), new_id("fc", "_")
        item = {"type": "function_call", "id": item_id, "call_id": call["id"], "name": name}
        where = {"item_id": item_id, "output_index": index}
        begun = item | {"arguments": "", "status": "in_progress"}
        yield {"type": "response.output_item.added", "output_index": index, "item": begun}
        yield {"type": "response.function_call_arguments.delta", "delta": arguments} | where
        yield {"type": "response.function_call_arguments.done", "arguments": arguments, "name": name} | where
        item |= {"arguments": arguments, "status": "completed"}
        yield {"type": "response.output_item.done", "output_index": index, "item": item}
        self._response["output"].append(item)

    def _close(self, status: str = "completed") -> Iterator[Event]:
        if self._open is None:
            return
        yield from self._open.closed(status)
        self._response["output"].append(self._open.item(status))
        self._open = None

    def _finish(self) -> None:
        """What a response says at its end."""
        assert self._ended is not None
        stats, is_cut = self._ended.stats, self._ended.reason in CUT
        self._response |= {
            "status": "incomplete" if is_cut else "completed",
            "completed_at": None if is_cut else int(time.time()),
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "usage": {
                "input_tokens": stats.n_prompt,
                "input_tokens_details": {"cached_tokens": stats.n_reused, "cache_write_tokens": 0},
                "output_tokens": stats.n_answer,
                "output_tokens_details": {"reasoning_tokens": self._answer.n_reasoning},
                "total_tokens": stats.n_prompt + stats.n_answer,
            },
        }
        self._response["store"] = self._finished(self._response)


class _Item:
    """A message, or reasoning: one text, told bit by bit."""

    def __init__(self, kind: str, index: int) -> None:
        self.kind = kind
        self._id = new_id("msg" if kind == "message" else "rs", "_")
        self._index = index
        self._texts: list[str] = []
        self._logprobs: list[dict[str, Any]] = []
        self._event = "response.output_text" if kind == "message" else "response.reasoning_text"
        self._where = {"item_id": self._id, "output_index": index, "content_index": 0}

    def item(self, status: str) -> dict[str, Any]:
        head = {"type": self.kind, "id": self._id, "status": status}
        content = [] if status == "in_progress" else [self._part()]
        if self.kind == "message":
            return head | {"role": "assistant", "content": content}
        return head | {"summary": [], "content": content}

    def _part(self) -> dict[str, Any]:
        text = "".join(self._texts)
        if self.kind == "message":
            return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(self._logprobs)}
        return {"type": "reasoning_text", "text": text}

    def opened(self) -> Iterator[Event]:
        yield {"type": "response.output_item.added", "output_index": self._index, "item": self.item("in_progress")}
        yield {"type": "response.content_part.added", "part": self._part()} | self._where

    def more(self, text: str, logprobs: list[dict[str, Any]]) -> Event:
        self._texts.append(text)
        self._logprobs += logprobs
        told = {"type": f"{self._event}.delta", "delta": text} | self._where
        return told | ({"logprobs": logprobs} if self.kind == "message" else {})

    def closed(self, status: str) -> Iterator[Event]:
        part = self._part()
        told = {"type": f"{self._event}.done", "text": part["text"]} | self._where
        yield told | ({"logprobs": part["logprobs"]} if self.kind == "message" else {})
        yield {"type": "response.content_part.done", "part": part} | self._where
        yield {"type": "response.output_item.done", "output_index": self._index, "item": self.item(status)}


def _logprob(entry: dict[str, Any]) -> dict[str, Any]:
    """A chat's entry without what only llama-server tells."""
    told = {name: value for name, value in entry.items() if name != "id"}
    if "top_logprobs" in told:
        told["top_logprobs"] = [_logprob(other) for other in told["top_logprobs"]]
    return told
