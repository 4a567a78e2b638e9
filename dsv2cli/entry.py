"""entry.py: where dsv2 begins. A shell that completes a model's name is answered before anything else is imported."""

from __future__ import annotations

import os


def main() -> None:
    if "_DSV2_COMPLETE" in os.environ:
        from dsv2cli import completing

        if completing.answered(os.environ):
            return
    from dsv2cli.app import main as run

    run()
