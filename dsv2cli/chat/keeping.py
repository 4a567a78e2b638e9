"""A conversation and what is kept of it, in step: the tree of all its turns, its file, and its cache beside that."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cext.errors import EngineError
from dsv2cli import console, interrupts
from dsv2cli.chat import store
from dsv2cli.chat.conversation import Conversation
from dsv2cli.chat.journal import Journal, JournalError, Model
from dsv2cli.chat.tree import Node, Setting, Tree
from dsv2cli.errors import CliError, UsageError

if TYPE_CHECKING:
    from dsv2cli.engines.protocol import Session
    from dsv2cli.runtime import Runtime

LEAST_GROWTH = 512  # tokens after which the cache is kept again while the conversation goes on, or half of it if more


@dataclass
class Keeping:
    """Turns go into the tree when they are closed, and into the file at once, which the first one makes.

    keeps: whether there is a file at all. What cannot be written is told once and tried again with the next turn.
    sampling: the figures that turns are answered with.
    """

    runtime: Runtime
    conversation: Conversation
    sampling: Mapping[str, float | int | None] = field(default_factory=dict)
    keeps: bool = True
    tree: Tree = field(default_factory=Tree)
    journal: Journal | None = None
    _n_cached: int = 0  # tokens of the cache beside the file
    _warned: bool = False

    @property
    def name(self) -> str:
        """The conversation's; "" as long as it has no file."""
        return self.journal.path.name.removesuffix(store.SUFFIX) if self.journal is not None else ""

    # Turns.

    def close_turn(self, stop: str) -> None:
        """Keep the conversation's last turn, which follows the tree's head; where it is none, or one that is kept
        already, stand there again. Ctrl-C changes nothing of that: a turn is in the tree and in the file."""
        turns = self.conversation.turns
        with interrupts.heard(lambda: True):
            if not turns or any(node.turn is turns[-1] for node in self.tree.nodes):
                self._stand_at(self.tree.head)
                return
            said = self.conversation.said()
            setting = Setting(self.conversation.system, self.conversation.thinking, self.sampling)
            node = self.tree.add(turns[-1], setting, stop)
            with self._warning():
                if self.keeps and self.journal is None:
                    self._create()
                if self.journal is not None:
                    self.journal.add(node, said)
        n_past = self.conversation.n_used
        if n_past - self._n_cached >= max(LEAST_GROWTH, self._n_cached // 2):
            self.keep_cache()

    def go_to(self, number: int) -> None:
        """Go on from a turn of the tree; 0: from the beginning."""
        self._stand_at(number)
        if self.journal is not None:
            with self._warning():
                self.journal.move()

    @contextlib.contextmanager
    def answering_at(self, number: int) -> Iterator[None]:
        """Stand at a turn for what is asked now, and where it was before if nothing came of that."""
        before, n = self.tree.head, len(self.tree.nodes)
        self._stand_at(number)
        try:
            yield
        finally:
            if len(self.tree.nodes) == n:
                self._stand_at(before)

    def last(self) -> Node | None:
        """The turn that the conversation stands at."""
        return self.tree.node(self.tree.head) if self.tree.head else None

    def _stand_at(self, number: int) -> None:
        path = self.tree.path(number)
        self.tree.head = number
        self.conversation.turns[:] = [node.turn for node in path]

    # The file.

    def _create(self) -> None:
        runtime = self.runtime
        model = Model(store.identity(runtime.path), runtime.name, str(runtime.path.resolve()))
        while self.journal is None:
            path = store.path_of(store.free_name())
            with contextlib.suppress(FileExistsError):  # another conversation took the name since it was free
                self.journal = Journal.create(path, model)
        self.journal.contents.tree = self.tree

    def reopen(self, name: str) -> None:
        """Go on with the conversation ``name`` instead. CliError, OSError: then nothing has changed."""
        if name == self.name:
            raise UsageError(f"this is `{name}`")
        journal = Journal.reopen(store.existing(name))
        try:
            store.check_model(journal.path, journal.contents.model, self.runtime.path)
            n_vocab = self.runtime.tokenizer.n_vocab
            turns = [node.turn for node in journal.tree.nodes]
            if any(token >= n_vocab for turn in turns for token in (*turn.answer, *turn.opening)):
                raise JournalError(f"`{journal.path}` has tokens that the model's vocabulary of {n_vocab} lacks")
            self._keep_new_cache()
        except BaseException:
            journal.close()
            raise
        with interrupts.heard(lambda: True):
            self.leave()
            self.journal, self.tree = journal, journal.tree
            self._stand_at(self.tree.head)
            self._empty_session()
        if (last := self.last()) is not None:
            self.conversation.system = last.setting.system
            with contextlib.suppress(EngineError):  # a template that cannot any more
                self.conversation.thinking = last.setting.thinking
        if journal.contents.n_torn:
            console.warn(f"{name}: the last turn was not whole, and is gone ({journal.contents.n_torn} bytes)")
        self._reopen_cache()

    def rename(self, name: str) -> None:
        """Call the conversation ``name``. CliError, OSError."""
        if self.journal is None:
            raise UsageError("there is nothing to keep yet" if self.keeps else "this conversation is not kept")
        path = store.path_of(name)
        before = self.journal.path
        try:
            self.journal.rename(path)
        except FileExistsError:
            raise UsageError(
                f"there is a conversation `{name}` already", f"/load {name} goes on with it; /save takes another name"
            ) from None
        with contextlib.suppress(OSError):
            store.cache_of(before).replace(store.cache_of(path))

    def begin_anew(self) -> None:
        """Leave this conversation and begin another."""
        self._keep_new_cache()
        with interrupts.heard(lambda: True):
            self.leave()
            self.tree = Tree()
            self.conversation.clear()

    def leave(self) -> None:
        """Keep the cache and let go of the file."""
        self._keep_new_cache()
        if self.journal is not None:
            self.journal.close()
        self.journal, self._n_cached = None, 0

    # The cache.

    def _keep_new_cache(self) -> None:
        """Keep the cache unless it is kept as it is."""
        if self.conversation.n_used != self._n_cached:
            self.keep_cache()

    def keep_cache(self) -> None:
        """Write the session beside the file, where the engine can; what stands in the way is told."""
        from cext import Session as Ours

        session = self.conversation.session
        if self.journal is None or not isinstance(session, Ours) or not session.n_past:
            return
        path = store.cache_of(self.journal.path)
        try:
            if why := store.why_no_room(path, session.kv_bytes * session.n_past // session.n_ctx):
                console.note(f"(the cache is not kept, and reopening reads the text again: {why})", "dim")
            else:
                session.save(path)
                store.prune(path)
        except (EngineError, OSError) as error:
            console.note(f"(the cache is not kept, and reopening reads the text again: {error})", "dim")
        self._n_cached = session.n_past

    def _empty_session(self) -> None:
        """What it holds is another conversation's, and must not be kept as this one's."""
        if (session := self.conversation.session).n_past:
            session.rewind(0)

    def _reopen_cache(self) -> None:
        """Take the session beside the file for the conversation's own; where it cannot be used, say so."""
        from cext import Model as Ours

        model, session = self.runtime.model, self.conversation.session
        if self.journal is None or not isinstance(model, Ours) or not self.tree.head:
            return
        path = store.cache_of(self.journal.path)
        try:
            kept: Session = model.load_session(path, session.n_ctx, session.kv_type)  # type: ignore[arg-type]
        except EngineError as error:
            why = "it has no cache" if not path.exists() else f"its cache is of no use: {error}"
            console.note(f"({self.name}: {why}; the text will be read again)", "dim")
            return
        self.conversation.session = kept
        self._n_cached = kept.n_past

    @contextlib.contextmanager
    def _warning(self) -> Iterator[None]:
        """What cannot be kept does not end a conversation."""
        try:
            yield
        except (OSError, CliError) as error:
            if not self._warned:
                why = (
                    f"`{error.filename}`: {error.strerror}" if isinstance(error, OSError) and error.filename else error
                )
                console.warn(f"the conversation is not kept: {why}")
                self._warned = True
            if self.journal is None:
                self.keeps = False
