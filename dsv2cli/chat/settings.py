"""What /set changes while a conversation goes on: the figures of sampling, each within its option's range."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from dsv2cli import options
from dsv2cli.errors import UsageError
from dsv2cli.options import Range

if TYPE_CHECKING:
    from cext import Sampler


@dataclass(frozen=True)
class Sampling:
    """See ``cext.Sampler``; max_tokens: most tokens of an answer, None: no bound. said: what a person has set, where a
    server answers: it has settings of its own, and is told of these alone."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repeat_penalty: float
    seed: int
    max_tokens: int | None = None
    said: frozenset[str] | None = None

    def sampler(self) -> Sampler:
        from cext import Sampler

        return Sampler(self.temperature, self.top_k, self.top_p, self.min_p, self.repeat_penalty, seed=self.seed)

    def figures(self) -> dict[str, float | int | None]:
        """By name, to be kept with a turn, or told to a server."""
        fields = (setting.field for setting in SETTINGS.values())
        return {field: getattr(self, field) for field in fields if self.said is None or field in self.said}


class Setting(NamedTuple):
    """field: of ``Sampling``; parse: from a word."""

    field: str
    parse: Callable[[str], float]
    within: Range


SETTINGS = {
    "temp": Setting("temperature", float, Range(0, options.LARGEST)),
    "top-k": Setting("top_k", int, options.FROM_ZERO),
    "top-p": Setting("top_p", float, Range(0, 1, open_low=True)),
    "min-p": Setting("min_p", float, options.SHARE),
    "repeat-penalty": Setting("repeat_penalty", float, Range(0.01, options.LARGEST)),
    "seed": Setting("seed", int, Range(0, options.MAX_SEED)),
    "max-tokens": Setting("max_tokens", int, Range(1, options.C_INT, or_zero=True)),
}


def changed(sampling: Sampling, name: str, word: str) -> Sampling:
    """With one figure changed. UsageError where there is no such one, or it is out of its range."""
    setting = SETTINGS.get(name)
    if setting is None:
        raise unknown(name)
    try:
        value = setting.parse(word)
        if value not in setting.within:
            raise ValueError
    except (ValueError, OverflowError):
        what = "whole number" if setting.parse is int else "number"
        raise UsageError(f"`{name}` takes a {what} in the range {setting.within}, and not `{word}`") from None
    made: dict[str, Any] = {setting.field: (value or None) if name == "max-tokens" else value}
    if sampling.said is not None:
        made["said"] = sampling.said | {setting.field}
    return replace(sampling, **made)


def unknown(name: str) -> UsageError:
    return UsageError(f"there is no setting `{name}`", f"there are {', '.join(SETTINGS)} and markdown")


def shown(sampling: Sampling) -> list[str]:
    """A line a setting."""
    figures = sampling.figures()
    lines = []
    for name, setting in SETTINGS.items():
        value = figures.get(setting.field)
        unset = "as many as there is room for" if setting.field in figures else "as the server has it"
        lines.append(f"  {name:<15} {unset if value is None else f'{value:.12g}'}")
    return lines
