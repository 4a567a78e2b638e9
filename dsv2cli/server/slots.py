"""llama-server's numbers for what is stepped together, and what each of them has read last.

Sessions are not bound to numbers here: what an answer leaves goes among the kept prefixes, where every request finds
it. A slot knows the tokens of its last one, so that it can be saved, restored and erased by number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dsv2cli.scheduler import Sequence


@dataclass(frozen=True)
class Held:
    """What a slot has read: whose, and the tokens."""

    salt: bytes
    ids: NDArray[np.int32]


class Slots:
    """n numbers from 0. Changed by the engine's thread alone."""

    def __init__(self, n: int) -> None:
        self.n = n
        self._taken: dict[Sequence, int] = {}
        self._held: dict[int, Held] = {}

    def take(self, sequence: Sequence, wanted: int | None) -> int:
        """A number that is free, the wanted one if it is."""
        free = [i for i in range(self.n) if i not in self._taken.values()]
        slot = wanted if wanted in free else free[0]
        self._taken[sequence] = slot
        return slot

    def give_back(self, sequence: Sequence, salt: bytes | None) -> None:
        """It has ended, with a slot or without. salt None: what it had read is not held."""
        slot = self._taken.pop(sequence, None)
        if slot is not None and salt is not None:
            self._held[slot] = Held(salt, sequence.context.session.ids)

    def hold(self, slot: int, held: Held) -> None:
        """What has been read elsewhere is this slot's now."""
        self._held[slot] = held

    def held(self, slot: int, salt: bytes) -> NDArray[np.int32]:
        """The tokens that it has read last; none of another's."""
        held = self._held.get(slot)
        return held.ids if held is not None and held.salt == salt else np.empty(0, np.int32)

    def erase(self, slot: int) -> None:
        self._held.pop(slot, None)

    def running(self) -> dict[int, Sequence]:
        """Those that answer now, by number."""
        return {slot: sequence for sequence, slot in list(self._taken.items())}
