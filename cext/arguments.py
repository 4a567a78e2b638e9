"""Arguments of the Python face: what C has no room for is refused in words, before it gets there."""

from __future__ import annotations

import operator
from typing import Any, SupportsFloat

from cext.errors import ArgumentError

LARGEST = 2**31 - 1  # of a C int


def whole(name: str, value: Any, low: int = -LARGEST - 1, high: int = LARGEST) -> int:
    """``value`` as an int from low to high; ArgumentError outside, TypeError where it is no whole number.

    The engine knows the range that has a meaning, and refuses the rest itself.
    """
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is {value!r}, expected a whole number") from None
    if not low <= number <= high:
        shown = number if abs(number) < 10**20 else f"{'-' if number < 0 else ''}10^20 or more"
        most = f"less than 2^{high.bit_length()}"
        raise ArgumentError(f"{name} is {shown}, expected {f'at least {low}' if number < low else most}")
    return number


def real(name: str, value: SupportsFloat) -> float:
    """``value`` as a float; ArgumentError where it is too large for one, TypeError where it is no number."""
    if isinstance(value, str | bytes):
        raise TypeError(f"{name} is {value!r}, expected a number")
    try:
        return float(value)
    except TypeError:
        raise TypeError(f"{name} is {value!r}, expected a number") from None
    except OverflowError:
        raise ArgumentError(f"{name} is too large") from None
