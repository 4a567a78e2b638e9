"""What the program needs of a model, whichever engine runs it: ``cext.Model`` or ``llamacpp.Model``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypedDict

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from cext.model import CacheUsage, KvType


class Shape(TypedDict):
    """What every model has, of all that an engine knows of its own."""

    arch: str
    name: str
    n_layer: int
    n_ctx_train: int  # tokens; 0 where the file does not say
    n_vocab: int  # values of a row of logits
    n_embd: int


class Session(Protocol):
    """One sequence: its cache and position."""

    @property
    def model(self) -> Model: ...
    @property
    def n_ctx(self) -> int: ...
    @property
    def n_past(self) -> int: ...
    @property
    def ids(self) -> NDArray[np.int32]:
        """The tokens in the cache, (n_past,)."""

    @property
    def kv_type(self) -> str: ...
    @property
    def kv_bytes(self) -> int:
        """Memory of the cache when it is full."""

    @property
    def growth(self) -> int:
        """Bytes of it that are not taken from the system yet."""

    def eval(
        self, ids: Sequence[int] | NDArray[np.integer[Any]], logits: Literal["last", "all"] = "last"
    ) -> NDArray[np.float32]:
        """Append tokens; the logits after the last, (n_vocab,), or after each, (n, n_vocab)."""

    def rewind(self, n: int) -> None:
        """Forget all but the first n tokens."""

    def fork(self, n: int | None = None) -> Session:
        """A session that begins with the first n tokens of this one (None: all); each goes on alone."""


class Model(Protocol):
    """Weights that are ready. notes: sentences to tell once; isa: what computes, in a word."""

    @property
    def path(self) -> str: ...
    @property
    def hparams(self) -> Shape: ...
    @property
    def notes(self) -> Sequence[str]: ...
    @property
    def threads(self) -> int: ...
    @property
    def isa(self) -> str: ...
    @property
    def nbytes(self) -> int:
        """Of the weights."""

    @property
    def max_step(self) -> int:
        """Most tokens of one step; more than ``cext.MAX_STEP`` where a long one costs less by the token."""

    def session(self, n_ctx: int = ..., kv_type: KvType = ...) -> Session: ...
    def step_bytes(self, n_tok: int) -> int:
        """Memory that steps of n_tok tokens take beside weights and caches, and that is not taken yet."""

    def cache_usage(self) -> CacheUsage: ...
    def n_left(self) -> int | None:
        """Sequences that the caches made already have room for; None where a session takes but what it holds."""

    def excess(self, budget: int) -> int:
        """Bytes that caches take beyond the budget and would give back if sessions ended. What no session needs is
        given back first."""

    def close(self) -> None: ...
