"""dsv2 doctor: what stands in the way, and what helps."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer

from dsv2cli import console, options

HELP = "Look at this machine and installation; exits with 1 where something is broken."
EXAMPLES = ("doctor", "doctor --online", "doctor --json")
NARROW = 70  # columns of a terminal in which names have no column of their own
MARKS = {"fine": "ok", "note": "note", "broken": "BROKEN"}


def doctor(
    context: typer.Context,
    online: Annotated[bool, typer.Option("--online", help="Ask the hub too.")] = False,
    as_json: options.Json = False,
) -> int:
    from dsv2cli import health

    root: Any = context.find_root().command
    found = health.check(root, online=online)
    broken = sum(one.state == "broken" for one in found)
    if as_json:
        console.print_json({"broken": broken, "findings": [asdict(one) for one in found]})
        return int(broken > 0)
    width = max(len(one.name) for one in found)
    if console.width() < NARROW:
        width = 0
    for one in found:
        console.say_broken(f"{MARKS[one.state]:<7} {one.name:<{width}}  {one.text}")
        if one.hint:
            console.say_broken(f"{'':<7} {'':<{width}}  -> {one.hint}")
    return int(broken > 0)
