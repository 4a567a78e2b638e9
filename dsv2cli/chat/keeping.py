"""A conversation and what is kept of it, in step: the tree of all its turns, its file, and what lies beside that."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from cext.errors import EngineError
from dsv2cli import console, interrupts
from dsv2cli.chat import store
from dsv2cli.chat.conversation import Talk
from dsv2cli.chat.journal import Journal, Model
from dsv2cli.chat.tree import Node, Setting, Tree
from dsv2cli.errors import CliError, UsageError


class Partner(Protocol):
    """Whom a conversation is with. What it keeps beside the conversation's file is a copy of work, and may be lost."""

    def model(self) -> Model:
        """As a new file names it. OSError."""

    def check(self, journal: Journal) -> None:
        """JournalError unless the conversation may go on with it."""

    def keep(self, journal: Journal, *, grown: bool = False) -> None:
        """Keep what there is beside the file, unless it is kept as it is; grown: unless it has hardly grown either."""

    def take(self, journal: Journal) -> None:
        """Take what is kept beside the file."""

    def let_go(self, *, empty: bool = False) -> None:
        """Another conversation begins; empty: one that has a past, with which nothing that there is must be kept."""


@dataclass
class Keeping:
    """Turns go into the tree when they are closed, and into the file at once, which the first one makes.

    keeps: whether there is a file at all. What cannot be written is told once and tried again with the next turn.
    sampling: the figures that turns are answered with.
    """

    partner: Partner
    conversation: Talk
    sampling: Mapping[str, float | int | None] = field(default_factory=dict)
    keeps: bool = True
    tree: Tree = field(default_factory=Tree)
    journal: Journal | None = None
    _warned: bool = False

    @property
    def name(self) -> str:
        """The conversation's; "" as long as it has no file."""
        return self.journal.path.name.removesuffix(store.SUFFIX) if self.journal is not None else ""

    # Turns.

    def close_turn(self, stop: str) -> None:
        """Keep the conversation's last turn, which follows the tree's head; where it is none, or one that is kept
        already, stand there again. Ctrl-C is heard when that is done: a turn is in the tree and in the file."""
        turns = self.conversation.turns
        with interrupts.held():
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
        if self.journal is not None:
            self.partner.keep(self.journal, grown=True)

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
        model = self.partner.model()
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
            self.partner.check(journal)
            journal.go_on_with(self.partner.model())
            self._keep_more()
        except BaseException:
            journal.close()
            raise
        with interrupts.held():
            self.leave()
            self.journal, self.tree = journal, journal.tree
            self._stand_at(self.tree.head)
            self.partner.let_go(empty=True)
            if (last := self.last()) is not None:
                self.conversation.system = last.setting.system
                with contextlib.suppress(EngineError):  # a template that cannot any more
                    self.conversation.thinking = last.setting.thinking
            if journal.contents.n_torn:
                console.warn(f"{name}: the last turn was not whole, and is gone ({journal.contents.n_torn} bytes)")
            self.partner.take(journal)  # else the next keep would put an empty session in the place of the kept one

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
        self._keep_more()
        with interrupts.held():
            self.leave()
            self.tree = Tree()
            self.conversation.clear()

    def leave(self) -> None:
        """Keep what is to be kept and let go of the file."""
        self._keep_more()
        if self.journal is not None:
            self.journal.close()
        self.journal = None
        self.partner.let_go()

    def _keep_more(self) -> None:
        if self.journal is not None:
            self.partner.keep(self.journal)

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
