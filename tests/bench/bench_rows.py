"""A benchmark's rows, of a dataclass of str, int and float, in a CSV: written as they come, read again for a plot."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any


def read(kind: Any, path: Path) -> list[Any]:
    """The rows of a CSV that ``write`` made."""
    with path.open(encoding="utf-8", newline="") as file:
        return [kind(**{f.name: f.type(line[f.name]) for f in fields(kind)}) for line in csv.DictReader(file)]


def write(kind: Any, rows: Iterable[Any], path: Path | None) -> list[Any]:
    """The rows, each in the CSV (None: stdout) as soon as it is there."""
    written = []
    out = path.open("w", encoding="utf-8", newline="") if path else sys.stdout
    table = csv.writer(out, lineterminator="\n")
    table.writerow([f.name for f in fields(kind)])
    for row in rows:
        table.writerow(astuple(row))
        out.flush()
        written.append(row)
    return written
