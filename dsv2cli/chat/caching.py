"""A model that runs here, and the cache of its session beside a conversation's file, so that nothing is read again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cext.errors import EngineError
from dsv2cli import console
from dsv2cli.chat import store
from dsv2cli.chat.conversation import Conversation
from dsv2cli.chat.journal import Journal, JournalError, Model

if TYPE_CHECKING:
    from dsv2cli.engines.protocol import Session
    from dsv2cli.runtime import Runtime

LEAST_GROWTH = 512  # tokens after which the cache is kept again while the conversation goes on, or half of it if more


class Caching:
    """See ``keeping.Partner``."""

    def __init__(self, runtime: Runtime, conversation: Conversation) -> None:
        self._runtime, self._conversation = runtime, conversation
        self._n_kept = 0  # tokens of the cache beside the file

    def model(self) -> Model:
        path = self._runtime.path
        return Model(store.identity(path), self._runtime.name, str(path.resolve()))

    def check(self, journal: Journal) -> None:
        store.check_model(journal.path, journal.contents.model, self._runtime.path)
        n_vocab = self._runtime.tokenizer.n_vocab
        turns = [node.turn for node in journal.tree.nodes]
        if any(token >= n_vocab for turn in turns for token in (*turn.answer, *turn.opening)):
            raise JournalError(f"`{journal.path}` has tokens that the model's vocabulary of {n_vocab} lacks")

    def keep(self, journal: Journal, *, grown: bool = False) -> None:
        """Write the session, where the engine can; what stands in the way is told."""
        from cext import Session as Ours

        session = self._conversation.session
        least = max(LEAST_GROWTH, self._n_kept // 2)
        if session.n_past - self._n_kept < least if grown else session.n_past == self._n_kept:
            return
        if not isinstance(session, Ours) or not session.n_past:
            return
        path = store.cache_of(journal.path)
        try:
            if why := store.why_no_room(path, session.kv_bytes * session.n_past // session.n_ctx):
                console.note(f"(the cache is not kept, and reopening reads the text again: {why})", "dim")
            else:
                session.save(path)
                store.prune(path)
        except (EngineError, OSError) as error:
            console.note(f"(the cache is not kept, and reopening reads the text again: {error})", "dim")
        self._n_kept = session.n_past

    def take(self, journal: Journal) -> None:
        """Where the kept session cannot be used, say so."""
        from cext import Model as Ours

        model, session = self._runtime.model, self._conversation.session
        if not isinstance(model, Ours) or not journal.tree.head:
            return
        path = store.cache_of(journal.path)
        try:
            kept: Session = model.load_session(path, session.n_ctx, session.kv_type)  # type: ignore[arg-type]
        except EngineError as error:
            name = journal.path.name.removesuffix(store.SUFFIX)
            why = "it has no cache" if not path.exists() else f"its cache is of no use: {error}"
            console.note(f"({name}: {why}; the text will be read again)", "dim")
            return
        self._conversation.session = kept
        self._n_kept = kept.n_past

    def let_go(self, *, empty: bool = False) -> None:
        self._n_kept = 0
        if empty and (session := self._conversation.session).n_past:
            session.rewind(0)
