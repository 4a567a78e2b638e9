"""Lists in pages, as OpenAI's clients turn them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dsv2cli.server.errors import bad_field


def page(newest_first: Sequence[dict[str, Any]], asked: Mapping[str, str], most: int = 100) -> dict[str, Any]:
    """A list as far as it is asked for: order, after (an item's id), limit. ApiError."""
    order, after, limit = asked.get("order", "desc"), asked.get("after"), asked.get("limit", "20")
    if order not in ("asc", "desc"):
        raise bad_field("order", "is neither asc nor desc")
    if not limit.isdecimal() or not 1 <= int(limit[:9]) <= most:
        raise bad_field("limit", f"is no number from 1 to {most}")
    items = list(newest_first) if order == "desc" else list(newest_first)[::-1]
    if after is not None:
        at = next((i for i, item in enumerate(items) if item["id"] == after), None)
        if at is None:
            raise bad_field("after", "is the id of nothing in this list")
        items = items[at + 1 :]
    found = items[: int(limit)]
    ends = {"first_id": found[0]["id"], "last_id": found[-1]["id"]} if found else {"first_id": None, "last_id": None}
    return {"object": "list", "data": found, "has_more": len(items) > len(found)} | ends
