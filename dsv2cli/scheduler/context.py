"""A session together with the tokens in it, so that a prompt which begins alike is not read again."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cext import Session


class Context:
    """The cache of one sequence at a time.

    Ctrl-C may come anywhere, so nothing here is believed that the session does not confirm: the tokens are noted before
    they are evaluated, and ``n_past`` says how many of them were.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self.n_ctx = session.n_ctx
        self._ids: list[int] = []

    @property
    def ids(self) -> list[int]:
        """The tokens in the cache, in order."""
        return self._ids[: self.session.n_past]

    def reusable(self, ids: list[int]) -> int:
        """How many of the first ``ids`` are in the cache already; never all of them, since logits are wanted."""
        n = 0
        for mine, wanted in zip(self.ids, ids[:-1], strict=False):
            if mine != wanted:
                break
            n += 1
        return n

    def expect(self, n: int, ids: list[int]) -> None:
        """Keep the first n tokens and forget the others; ``ids`` are evaluated next."""
        if self.session.n_past != n:
            self.session.rewind(n)
        self._ids[n:] = ids
