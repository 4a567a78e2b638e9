"""Responses of the past, in memory, for clients that go on from one by its id.

A conversation is a chain of turns, which the responses along it share. Each API key has its own responses and its own
bounds; the ones that were not used for the longest time are forgotten first. Only the event loop changes anything here.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import msgspec

MAX_COUNT = 1000  # responses of a key
MAX_BYTES = 64 << 20  # of a key
ROW, ROW_OF_ITEM = 1024, 256  # bytes, about, of an entry and of an item beside their texts


Item = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Turn:
    """What was asked and what was answered: items as JSON by their ids, the first ``n_input`` of them asked."""

    json: dict[str, bytes]
    n_input: int

    @staticmethod
    def of(asked: Iterable[Item]) -> Turn:
        json = {str(item["id"]): msgspec.json.encode(item) for item in asked}
        return Turn(json, len(json))

    def answered(self, items: Iterable[Item]) -> Turn:
        return Turn(self.json | Turn.of(items).json, self.n_input)

    def items(self) -> list[Item]:
        return [msgspec.json.decode(item) for item in self.json.values()]

    @property
    def nbytes(self) -> int:
        return ROW + sum(len(item) + ROW_OF_ITEM for item in self.json.values())


@dataclass(frozen=True, eq=False)
class Kept:
    """A response as it was told, as JSON, and the turns up to it, its own included."""

    json: bytes
    turns: tuple[Turn, ...]

    def input_items(self) -> list[Item]:
        """Everything that it answered, the oldest first."""
        before = [item for turn in self.turns[:-1] for item in turn.items()]
        return before + self.turns[-1].items()[: self.turns[-1].n_input]

    @property
    def nbytes(self) -> int:
        """Without the turns, which are shared."""
        return len(self.json) + ROW + 8 * len(self.turns)


@dataclass
class _OfKey:
    kept: OrderedDict[str, Kept] = field(default_factory=OrderedDict)
    uses: Counter[Turn] = field(default_factory=Counter)
    turn_of: dict[str, Turn] = field(default_factory=dict)  # by the id of an item
    nbytes: int = 0

    def add(self, name: str, kept: Kept) -> None:
        self.kept[name] = kept
        self.nbytes += kept.nbytes
        for turn in kept.turns:
            self.uses[turn] += 1
            if self.uses[turn] == 1:
                self.nbytes += turn.nbytes
                self.turn_of.update(dict.fromkeys(turn.json, turn))

    def remove(self, name: str) -> None:
        kept = self.kept.pop(name)
        self.nbytes -= kept.nbytes
        for turn in kept.turns:
            self.uses[turn] -= 1
            if not self.uses[turn]:
                del self.uses[turn]
                self.nbytes -= turn.nbytes
                for item in turn.json:
                    if self.turn_of.get(item) is turn:
                        del self.turn_of[item]


class Store:
    """max_count, max_bytes: of each key."""

    def __init__(self, max_count: int = MAX_COUNT, max_bytes: int = MAX_BYTES) -> None:
        self._max_count, self._max_bytes = max_count, max_bytes
        self._keys: defaultdict[bytes, _OfKey] = defaultdict(_OfKey)

    def keep(self, key: bytes, name: str, kept: Kept) -> bool:
        """False where it is larger than all that may be kept."""
        if kept.nbytes + sum(turn.nbytes for turn in kept.turns) > self._max_bytes:
            return False
        mine = self._keys[key]
        mine.add(name, kept)
        while len(mine.kept) > self._max_count or mine.nbytes > self._max_bytes:
            mine.remove(next(iter(mine.kept)))
        return True

    def find(self, key: bytes, name: str) -> Kept | None:
        """A response that was kept, which is now the last to be forgotten."""
        mine = self._keys[key]
        if name in mine.kept:
            mine.kept.move_to_end(name)
        return mine.kept.get(name)

    def forget(self, key: bytes, name: str) -> None:
        self._keys[key].remove(name)

    def item(self, key: bytes, name: str) -> Item | None:
        """An item of any turn that is kept. From any thread."""
        turn = mine.turn_of.get(name) if (mine := self._keys.get(key)) else None
        return msgspec.json.decode(turn.json[name]) if turn else None

    def nbytes(self, key: bytes) -> int:
        return self._keys[key].nbytes
