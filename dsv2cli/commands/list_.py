"""dsv2 list: the models that are here, with their sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dsv2cli import console, options

HELP = "List the models on this machine: of the hub's cache, the package, this folder and those that are named."
EXAMPLES = ("list", "list ~/models /data/gguf", "list --json")
FOLDERS = typer.Argument(metavar="FOLDER", help="Folders to look into, two deep; this one if left out.")


def list_models(folders: Annotated[list[Path] | None, FOLDERS] = None, as_json: options.Json = False) -> None:
    from dsv2cli import shelf
    from dsv2cli.errors import UsageError

    for folder in folders or ():
        if not folder.is_dir():
            raise UsageError(f"`{folder}` is no folder", "dsv2 list looks into folders")
    found = shelf.every(folders or [Path()])
    if as_json:
        rows = [
            {"name": h.name, "kind": h.kind, "nbytes": h.nbytes, "where": h.where, "path": str(h.path)} for h in found
        ]
        console.print_json(rows)
        return
    table = console.Table("", ("model", "kind", "size", "where"))
    for held in found:
        table.add(held.name, held.kind, console.format_bytes(held.nbytes), held.where)
    table.add_line()
    table.add("all", "", console.format_bytes(sum(held.nbytes for held in found)), "")
    console.show(table)
