"""Conversations' files: one that is written, and what its tree holds."""

from __future__ import annotations

from pathlib import Path

from cext.tokenizer import Answer
from dsv2cli.chat.conversation import Turn
from dsv2cli.chat.journal import Journal, Model
from dsv2cli.chat.tree import Setting, Tree

MODEL = Model("ab" * 32, "a model", "/models/a.gguf")


def shape(tree: Tree) -> list[tuple[object, ...]]:
    """All that a tree holds, but for where it stands."""
    return [
        (n.number, n.parent, n.turn.user, tuple(n.turn.answer), tuple(n.turn.opening), n.setting.system, n.stop)
        for n in tree.nodes
    ]


def written(place: Path, n: int = 3) -> Tree:
    """A file of n turns, of which the last is a branch of the first."""
    kept = Journal.create(place, MODEL)
    tree = kept.tree
    for i in range(n):
        tree.head = 1 if i == n - 1 else tree.head
        node = tree.add(Turn(f"né {i}\n\x00", [i, 7], [3]), Setting("s", None, {"seed": 2**64 - 1}), "end")
        kept.add(node, Answer(None, f"answer {i}"))
    kept.close()
    return tree
