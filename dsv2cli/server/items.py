"""The items of OpenAI's Responses: a client's, read and checked, and a conversation of them as a chat."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from dsv2cli.server.errors import bad_field
from dsv2cli.server.service import new_id

ROLES = ("user", "assistant", "system", "developer")
TEXTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}
MAX_ID = 256
Item = dict[str, Any]
Find = Callable[[str], Item | None]


def read_input(given: str | list[Any] | None, find: Find) -> list[Item]:
    """A request's input as items, each with an id of its own. find: an item of an earlier response by its id."""
    if not given:
        return []
    if isinstance(given, str):
        return [_message({"role": "user", "content": given}, "input")]
    items: list[Item] = []
    ids: set[str] = set()
    for i, value in enumerate(given):
        item = _read(value, f"input[{i}]", find)
        if item["id"] in ids:
            raise bad_field(f"input[{i}].id", f"{item['id'][:100]!r} is the id of an item before it")
        items.append(item)
        ids.add(item["id"])
    return items


def _read(value: Any, where: str, find: Find) -> Item:
    if not isinstance(value, Mapping):
        raise bad_field(where, "is no item")
    kind = value.get("type") or ("message" if "role" in value else "item_reference")
    if kind == "message":
        return _message(value, where)
    if kind == "function_call":
        named = {name: _text(value, name, where) for name in ("call_id", "name", "arguments")}
        return {"type": kind, "id": _id(value, "fc"), "status": "completed"} | named
    if kind == "function_call_output":
        output = _output(value.get("output"), f"{where}.output")
        head = {"type": kind, "id": _id(value, "fco"), "status": "completed"}
        return head | {"call_id": _text(value, "call_id", where), "output": output}
    if kind == "reasoning":
        parts = {name: _parts(value.get(name) or [], f"{where}.{name}") for name in ("summary", "content")}
        return {"type": kind, "id": _id(value, "rs")} | parts
    if kind == "item_reference":
        found = find(_text(value, "id", where))
        if found is None:
            raise bad_field(f"{where}.id", "names no item of a response that is kept here")
        return found
    raise bad_field(
        where, f"is of type {str(kind)[:50]!r}: messages, function calls, their outputs and reasoning are read"
    )


def _message(value: Mapping[str, Any], where: str) -> Item:
    role, content = value.get("role"), value.get("content")
    if role not in ROLES:
        raise bad_field(f"{where}.role", f"is none of {', '.join(ROLES)}")
    kind = "output_text" if role == "assistant" else "input_text"
    if isinstance(content, str):
        texts = [content]
    elif isinstance(content, list):
        texts = [_part_text(part, f"{where}.content[{j}]") for j, part in enumerate(content)]
    else:
        raise bad_field(f"{where}.content", "is neither text nor parts")
    more: Item = {"annotations": [], "logprobs": []} if role == "assistant" else {}
    status = value.get("status")
    return {
        "type": "message",
        "id": _id(value, "msg"),
        "status": status if status in ("in_progress", "incomplete") else "completed",
        "role": role,
        "content": [{"type": kind, "text": text} | more for text in texts],
    }


def _part_text(part: Any, where: str) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if not isinstance(kind, str) or kind not in TEXTS:
        raise bad_field(where, f"is of type {str(kind)[:50]!r}: only text is read")
    return _text(part, TEXTS[kind], where)


def _output(given: Any, where: str) -> str | list[Item]:
    """Of a function: text, or parts of it."""
    if isinstance(given, str):
        return given
    if not isinstance(given, list):
        raise bad_field(where, "is neither text nor parts")
    return [{"type": "input_text", "text": _part_text(part, f"{where}[{j}]")} for j, part in enumerate(given)]


def _parts(given: Any, where: str) -> list[Item]:
    """Of reasoning: their types stay as they are."""
    if not isinstance(given, list):
        raise bad_field(where, "is no list of parts")
    for j, part in enumerate(given):
        if not isinstance(part, Mapping):
            raise bad_field(f"{where}[{j}]", "is no part")
    return [
        {"type": str(part.get("type")), "text": _text(part, "text", f"{where}[{j}]")} for j, part in enumerate(given)
    ]


def _text(value: Mapping[str, Any], name: str, where: str) -> str:
    text = value.get(name)
    if not isinstance(text, str):
        raise bad_field(f"{where}.{name}", "is no text")
    return text


def _id(value: Mapping[str, Any], kind: str) -> str:
    given = value.get("id")
    return given if isinstance(given, str) and 0 < len(given) <= MAX_ID else new_id(kind, "_")


def as_messages(items: Iterable[Item]) -> list[dict[str, Any]]:
    """A conversation as OpenAI's chat has it: what an assistant thought, said and called stands in one message there.
    ApiError for an output that belongs to no call."""
    messages: list[dict[str, Any]] = []
    names: dict[str, str] = {}  # of the functions, by the id of the call
    thought, is_open = "", False  # is_open: the last message may get calls
    for item in items:
        kind = item["type"]
        if kind == "reasoning":
            thought += "".join(part["text"] for part in item["content"] or item["summary"])
            is_open = False
            continue
        if kind == "message":
            messages.append({"role": item["role"], "content": "\n".join(part["text"] for part in item["content"])})
            is_open = item["role"] == "assistant"
        elif kind == "function_call":
            if not is_open:
                messages.append({"role": "assistant", "content": None})
            call = {"name": item["name"], "arguments": item["arguments"]}
            called = {"id": item["call_id"], "type": "function", "function": call}
            messages[-1].setdefault("tool_calls", []).append(called)
            names[item["call_id"]], is_open = item["name"], True
        else:
            messages.append(_result(item, names))
            is_open = False
        if thought and messages[-1]["role"] == "assistant":
            messages[-1]["reasoning_content"] = thought
        thought = ""
    return messages


def _result(item: Item, names: Mapping[str, str]) -> dict[str, Any]:
    name = names.get(item["call_id"])
    if name is None:
        raise bad_field("input", f"the output of call {item['call_id'][:100]!r} belongs to no function_call before it")
    output = item["output"]
    text = output if isinstance(output, str) else "\n".join(part["text"] for part in output)
    return {"role": "tool", "tool_call_id": item["call_id"], "name": name, "content": text}
