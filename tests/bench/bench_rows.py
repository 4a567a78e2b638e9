"""A benchmark's rows, of a dataclass of str, int and float, in a CSV: written as they come, read again for a plot."""

from __future__ import annotations

import argparse
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


def numbers(text: str) -> tuple[int, ...]:
    """Of an option that lists them."""
    return tuple(int(part) for part in text.split(","))


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Of a script that measures a model, or draws figures taken before: ``parse`` reads its options."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("model", type=Path, nargs="?")
    made.add_argument("-o", "--output", type=Path, help="CSV; stdout if left out")
    made.add_argument("--plot", type=Path, metavar="SVG")
    made.add_argument("--read", type=Path, metavar="CSV", help="figures taken before: measure nothing")
    return made


def parse(given: argparse.ArgumentParser) -> argparse.Namespace:
    """The options; it ends with an error unless there is either a model or figures."""
    options = given.parse_args()
    if (options.model is None) == (options.read is None):
        given.error("give a model to measure, or --read with figures taken before")
    return options
