"""A session as a place to read prompts in, so that one which begins like what it holds is not read again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Model(Protocol):
    """What is needed of a session's model."""

    @property
    def max_step(self) -> int: ...


class Session(Protocol):
    """What is needed of a ``cext.Session``, or of another engine's."""

    @property
    def model(self) -> Model: ...
    @property
    def n_ctx(self) -> int: ...
    @property
    def n_past(self) -> int: ...
    @property
    def ids(self) -> NDArray[np.int32]: ...
    def rewind(self, n: int) -> None: ...
    def fork(self, n: int | None = None) -> Session: ...


class Context:
    """The cache of one sequence at a time: fresh, forked from another that has read the same beginning, or loaded.

    Ctrl-C may come anywhere, so nothing is noted here that the session does not know better.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self.n_ctx = session.n_ctx

    @property
    def ids(self) -> list[int]:
        """The tokens in the cache, in order."""
        return [int(token) for token in self.session.ids]

    def reusable(self, ids: list[int]) -> int:
        """How many of the first ``ids`` are in the cache already; never all of them, since logits are wanted."""
        n = 0
        for mine, wanted in zip(self.ids, ids[:-1], strict=False):
            if mine != wanted:
                break
            n += 1
        return n

    def keep(self, n: int) -> None:
        """Forget all but the first n tokens: drafts that were wrong, an interrupted step, another prompt."""
        if self.session.n_past != n:
            self.session.rewind(n)
