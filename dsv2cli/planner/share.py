"""share.py: what part of this machine a measured speed uses: of the bandwidth where a model decodes, of the dots where
it reads a prompt, each as ``probe`` measures them beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from dsv2cli.planner.hollow import Work, work_of
from dsv2cli.planner.probe import Rates, measure

if TYPE_CHECKING:
    from cext.model import KvType
    from dsv2cli.anatomy import Anatomy
    from dsv2cli.benchmark import Test

T = TypeVar("T")


@dataclass(frozen=True)
class Yardstick:
    """A model's bytes and products beside a machine's. bandwidth: bytes a second of weights and context; products:
    multiply-adds a second; each the mean of what was measured before and after."""

    bandwidth: float
    products: float
    token_bytes: int  # of weights
    context_bytes: int  # of a token of context
    layer_products: int  # of a token

    def share(self, test: Test, rate: float) -> float:
        """What ``rate`` tokens a second are of what the machine gives: of the bandwidth where the test decodes, its
        context as long as in the middle of the test, else of the dots of its layers' weights."""
        if test.kind == "decode":
            return rate * (self.token_bytes + self.context_bytes * (test.depth + test.n / 2)) / self.bandwidth
        return rate * self.layer_products / self.products


class Measuring:
    """Measures before and after something else. why_not: "" as long as it can."""

    def __init__(self, path: Path, kv_type: KvType, threads: int | None) -> None:
        from dsv2cli import anatomy

        self._found: Anatomy = anatomy.study(path)
        self._kv: KvType = kv_type
        self._threads = threads
        self._rates: list[Rates] = []
        self.why_not = ""

    def around(self, run: Callable[[], T]) -> T:
        """What ``run`` returns."""
        self._once()
        done = run()
        self._once()
        return done

    def _once(self) -> None:
        from cext.system import free_bytes

        rates = measure(self._found, self._kv, self._threads, free_bytes(swap=False))
        if isinstance(rates, Rates):
            self._rates.append(rates)
        else:
            self.why_not = rates

    def yardstick(self) -> Yardstick | None:
        from cext import Gguf

        if self.why_not or not self._rates:
            return None
        with Gguf(self._found.path) as gguf:
            work: Work = work_of(list(gguf.tensors), self._found.keys)
        n = len(self._rates)
        return Yardstick(
            bandwidth=sum(r.bandwidth for r in self._rates) / n,
            products=sum(r.products for r in self._rates) / n,
            token_bytes=work.token_bytes,
            context_bytes=self._found.kv_bytes[self._kv],
            layer_products=work.layer_products,
        )
