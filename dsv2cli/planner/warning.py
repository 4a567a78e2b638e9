"""warning.py: a line for who is about to fetch or make what will not fit here; nothing is measured for it."""

from __future__ import annotations

from pathlib import Path

from dsv2cli.console import format_bytes, printable
from dsv2cli.hub import cache


def of_weights(name: str, nbytes: int) -> str | None:
    """Where a file of so many bytes is larger than the memory that is free."""
    from cext.system import free_bytes

    free = free_bytes(swap=False)  # as --ram auto counts
    if free is None or nbytes <= free:
        return None
    return printable(
        f"{name} takes {format_bytes(nbytes)} of memory where all of it is held, and {format_bytes(free)} are free:"
        f" dsv2 plan tells what fits, --ram reads the rest from the drive"
    )


def of_checkpoint(config: Path, kind: str, out: Path) -> str | None:
    """Where what quantising a checkpoint of this config.json makes, or needs meanwhile, will not fit. None too where
    the shape is not understood: others say why."""
    import json

    from quantize import QuantizeError, disk, recipe
    from quantize.source import arch as arch_of
    from quantize.source.tensors import model_tensors

    try:
        described = json.loads(config.read_text(encoding="utf-8"))
        arch = arch_of.parse(described)
    except (OSError, ValueError, QuantizeError, TypeError, AttributeError):
        return None
    tensors, mix = model_tensors(arch), recipe.find(kind)
    types = (recipe.type_of(mix, arch, t, mix.wants_calibration) for t in tensors)
    nbytes = sum(recipe.nbytes(t, type_) for t, type_ in zip(tensors, types, strict=True))
    room, free = disk.foreseen(arch, tensors, mix, nbytes), cache.free_bytes(out)
    if room.file + room.work > free:
        return printable(
            f"quantising it to {kind} takes {format_bytes(room.file + room.work)} of the disk, and `{out}` has"
            f" {format_bytes(free)} free beside this"
        )
    return of_weights(f"in {kind} it", nbytes)
