"""dsv2 rm: take models off this machine."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from dsv2cli import console
from dsv2cli.errors import UsageError

HELP = (
    "Remove models of the hub's cache (owner/name, owner/name:TYPE, an alias), GGUF files and checkpoints; asks first."
)
EXAMPLES = ("rm lite", "rm OWNER/NAME-GGUF:Q4_K_M", "rm model.gguf --yes")
NAMES = typer.Argument(metavar="MODEL", help="As dsv2 list has it: a repository, one of its types, or a path.")


def rm(
    names: Annotated[list[str], NAMES],
    yes: Annotated[bool, typer.Option("-y", "--yes", help="Do not ask.")] = False,
) -> None:
    from dsv2cli import shelf

    found = list(dict.fromkeys(held for name in names for held in shelf.find(name)))
    for held in found:
        console.note(f"{held.name}: {held.kind}, {console.format_bytes(held.nbytes)}, {len(held.files)} files")
        if held.where == "folder":
            console.note(f"  {', '.join(console.printable(path.name) for path in held.files)}")
    if not yes and not confirmed(len(found)):
        console.note("nothing was removed")
        raise typer.Exit(1)
    freed = sum(shelf.remove(held) for held in found)
    console.note(f"removed: {console.format_bytes(freed)} more on the disk")


def confirmed(n: int) -> bool:
    """Whether the person at the terminal says yes. UsageError where nobody sits there."""
    if not console.is_terminal(sys.stdin):
        raise UsageError("nobody can be asked whether to remove this", "--yes removes it without asking")
    console.prompt(f"remove {'it' if n == 1 else f'these {n}'}? [y/N] ")
    return sys.stdin.readline().strip().lower() in ("y", "yes")
