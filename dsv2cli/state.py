"""state.py: where what the program remembers of itself lies between runs."""

from __future__ import annotations

import os
from pathlib import Path


def folder() -> Path | None:
    """This user's own; None where this user has no home. It may not exist yet."""
    state = os.environ.get("XDG_STATE_HOME")
    try:
        return (Path(state) if state else Path.home() / ".local" / "state") / "dsv2"
    except RuntimeError:
        return None
