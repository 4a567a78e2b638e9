"""closing.py: what is closed where its with block ends."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Self


class Closing(ABC):
    """A context manager: leaving it closes."""

    @abstractmethod
    def close(self) -> None:
        """Let go of files, threads and locks. May be called again."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
