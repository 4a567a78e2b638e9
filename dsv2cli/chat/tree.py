"""A conversation as a tree of turns: branches share their past, and nothing that was said is ever taken out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from dsv2cli.chat.conversation import Turn


@dataclass(frozen=True)
class Setting:
    """What held when a turn was answered. thinking: see ``Conversation``; sampling: figures to be told, not obeyed."""

    system: str | None = None
    thinking: bool | None = None
    sampling: Mapping[str, float | int | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Node:
    """A turn in its place. number: 1, 2, ... as they were answered; parent: the turn before it, 0 at a beginning;
    stop: why its answer ended."""

    number: int
    parent: int
    turn: Turn
    setting: Setting
    stop: str


@dataclass
class Tree:
    """Turns by number, and the one that the conversation stands at: the next one follows it; 0 at the beginning."""

    nodes: list[Node] = field(default_factory=list)
    head: int = 0

    def add(self, turn: Turn, setting: Setting, stop: str) -> Node:
        """A turn after the head, which is the head from now on."""
        node = Node(len(self.nodes) + 1, self.head, turn, setting, stop)
        self.nodes.append(node)
        self.head = node.number
        return node

    def __contains__(self, number: int) -> bool:
        return 1 <= number <= len(self.nodes)

    def node(self, number: int) -> Node:
        if number not in self:
            raise KeyError(number)
        return self.nodes[number - 1]

    def path(self, number: int | None = None) -> list[Node]:
        """From a beginning to a turn (the head)."""
        number = self.head if number is None else number
        found = []
        while number:
            found.append(self.node(number))
            number = found[-1].parent
        return found[::-1]

    def tips(self) -> list[Node]:
        """The last turn of each branch, oldest first."""
        parents = {node.parent for node in self.nodes}
        return [node for node in self.nodes if node.number not in parents]
