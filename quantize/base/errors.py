"""What can go wrong when a checkpoint becomes a GGUF. Errors name the thing and the value; hints the remedy."""

from __future__ import annotations

from pathlib import Path

from cext import system


class QuantizeError(Exception):
    """Base of the family; str() is one line, and ``hint`` is what to do about it ("" where there is nothing to add)."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class ArgumentError(QuantizeError, ValueError):
    """An option that means nothing, is out of its range or does not go with another; a place that no file can have."""


class CheckpointError(QuantizeError):
    """The checkpoint is not what it claims to be: truncated, overlapping, missing a shard or a tensor, not finite."""


class UnsupportedError(QuantizeError):
    """The checkpoint is well formed, but deepseek2 GGUF (or this release) has no way to say it."""


class CalibrationError(QuantizeError):
    """The calibration text cannot be used: unreadable, malformed or too short."""


class OutputError(QuantizeError):
    """The GGUF cannot be written: disk full, no permission."""


class OtherRunError(OutputError):
    """The work folder is another run's: one at work on the same file, or one whose bytes depend on something else."""


def disk_error(place: Path, error: OSError, needed: int = 0) -> OutputError:
    """What an OSError while writing at place means. needed: bytes of what was to be written, where that is known."""
    if error.errno not in system.FULL:
        return OutputError(f"`{place}`: {error.strerror}")
    free = system.free_disk(place if place.is_dir() else place.parent)
    takes = f" it takes {needed / 1e9:.2f} GB," if needed else ""
    return OutputError(
        f"`{place}`: {error.strerror}:{takes} {free / 1e9:.2f} GB are free there",
        "free some space and run the same command again, or choose another place with -o or a smaller --type",
    )
