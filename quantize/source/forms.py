"""forms.py: the forms that a weight is stored in, a row of FORMS each, and how it becomes float32.

A form tells how a row of stored values becomes codes, in float32. In some the codes are the weight; in others a block
of rows and columns shares a scale, and some formats subtract a zero point first: w = (code - zero) * scale. Blocks may
be a tensor, a row, a group of a row's columns, or rows by columns: one grid says all of these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantize.base.errors import CheckpointError
from quantize.source.stored import Files, StoredTensor

F32 = NDArray[np.float32]
Restore = Callable[[NDArray[Any]], F32]
"""The exact weight of what read_half made of it."""

ROUNDED_AT_ONCE = 1 << 18  # values: their five copies stay in the cache, and are not five copies of everything
# Between these, a product of a code and a scale rounds to bfloat16 as any number does, and tells its code.
LEAST_SCALE, MOST_SCALE = 2.0**-100, 2.0**100
DAMAGED_HINT = "the shard is damaged or the training diverged: fetch it again, or use another revision"


def _e4m3_values() -> F32:
    """All 256 values of fp8 e4m3 (bias 7, no infinity, 0x7f and 0xff NaN), by code."""
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, code & 7
    magnitude = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    values = np.where(code & 0x80, -magnitude, magnitude)
    values[[0x7F, 0xFF]] = np.nan
    return values.astype(np.float32)


E4M3_VALUES = _e4m3_values()


def bf16_to_f32(bits: NDArray[np.uint16]) -> F32:
    """bfloat16 bit patterns to float32, exactly."""
    wide = bits.astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


def f32_to_bf16(values: F32) -> NDArray[np.uint16]:
    """float32 to bfloat16 bits, round to nearest even; NaN stays NaN."""
    source = np.ascontiguousarray(values, np.float32).reshape(-1).view(np.uint32)
    out = np.empty(source.size, np.uint16)
    for start in range(0, source.size, ROUNDED_AT_ONCE):
        bits = source[start : start + ROUNDED_AT_ONCE]
        rounded = (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16
        quiet = (bits >> 16) | np.uint32(0x40)  # rounding could carry a NaN's mantissa into infinity
        is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
        out[start : start + len(bits)] = np.where(is_nan, quiet, rounded)
    return out.reshape(values.shape)


def nearest_e4m3(values: F32) -> F32:
    """The fp8 e4m3 value next to each, for |value| up to 448."""
    bits = values.view(np.uint32)
    # Three bits of the significand stay; the smallest values are 2**-9 apart.
    normal = ((bits + np.uint32(1 << 19)) & np.uint32(0xFFF00000)).view(np.float32)
    return np.where(np.abs(values) < 2.0**-6, np.rint(values * np.float32(512)) / np.float32(512), normal)


def _packed(bits: int, words: NDArray[np.int32], n: int) -> F32:
    """Codes of so many bits, lowest first in 32-bit words, offset by half their range: (rows, n) float32."""
    mask, shifts = np.uint32((1 << bits) - 1), np.arange(0, 32, bits, dtype=np.uint32)
    out = np.empty((len(words), n), np.float32)
    step = max(1, ROUNDED_AT_ONCE // max(1, n))
    for at in range(0, len(words), step):
        codes = (words[at : at + step].view(np.uint32)[:, :, None] >> shifts) & mask
        out[at : at + step] = codes.reshape(len(codes), -1)[:, :n]
    out -= np.float32(1 << (bits - 1))
    return out


def _q8_0(blocks: NDArray[np.uint8], n: int) -> F32:
    """GGUF's blocks of a float16 scale and 32 int8: (..., n) float32."""
    parts = np.ascontiguousarray(blocks).reshape(*blocks.shape[:-1], -1, 34)
    scale = np.ascontiguousarray(parts[..., :2]).view("<f2").astype(np.float32)
    return (parts[..., 2:].view(np.int8) * scale).reshape(*blocks.shape[:-1], n)


@dataclass(frozen=True)
class Form:
    """One way to store a weight."""

    name: str  # for people
    dtype: np.dtype[Any]  # of its stored elements,
    width: Callable[[int], int]  # and how many make a row of n values
    decode: Callable[[NDArray[Any], int], F32]  # (rows, width) stored -> (rows, n) codes
    half: np.dtype[Any]  # of the copy that the engine gets; uint16 is bfloat16
    is_scaled: bool = False
    nearest: Callable[[F32], F32] | None = None  # of a scaled form: the code that a rounded one was, if that tells
    exponent: int = 0  # of a plain form: the bits that are all set in infinity and NaN

    @property
    def is_plain(self) -> bool:
        """Whether the engine takes the stored values as they are."""
        return self.exponent != 0


_BF16 = np.dtype("<u2")


def _same(n: int) -> int:
    return n


FORMS = {
    form.name: form
    for form in (
        Form("F32", np.dtype("<f4"), _same, lambda v, n: v, np.dtype("<f4"), exponent=0x7F800000),
        Form("F16", np.dtype("<f2"), _same, lambda v, n: v.astype(np.float32), np.dtype("<f2"), exponent=0x7C00),
        Form("BF16", _BF16, _same, lambda v, n: bf16_to_f32(v), _BF16, exponent=0x7F80),
        Form("F8_E4M3", np.dtype("u1"), _same, lambda v, n: E4M3_VALUES[v], _BF16, True, nearest_e4m3),
        Form("int4", np.dtype("<i4"), lambda n: -(-n // 8), partial(_packed, 4), _BF16, True, np.rint),
        # Of 256 codes and a zero point, a bfloat16 does not tell all apart.
        Form("int8", np.dtype("<i4"), lambda n: -(-n // 4), partial(_packed, 8), _BF16, True),
        Form("Q8_0", np.dtype("u1"), lambda n: n // 32 * 34, _q8_0, _BF16),
    )
}
SCALES: dict[str, Callable[[NDArray[Any]], F32]] = {
    "F32": lambda v: v,
    "F16": lambda v: v.astype(np.float32),
    "BF16": bf16_to_f32,
    "F8_E8M0": lambda v: np.exp2(v.astype(np.float32) - 127),  # 255 is NaN, and inf here: refused either way
}
"""How scales of a dtype become float32."""
SCALE_DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": _BF16,
    "F8_E8M0": np.dtype("u1"),
}


@dataclass(frozen=True)
class Weight:
    """A matrix or vector of the model, as it is stored."""

    name: str  # as the model calls it
    shape: tuple[int, ...]
    form: Form
    values: StoredTensor  # its rows alone, in elements of the form
    scale: StoredTensor | None = None  # of blocks; dtype one of SCALES
    zero: StoredTensor | None = None  # packed as values are, along the rows
    block: tuple[int, int] = (1, 1)  # rows and columns that share a scale
    offset: int = 0  # rows of the first block that come before this weight's first

    @property
    def half(self) -> np.dtype[Any]:
        """Of the copy that the engine gets."""
        return self.form.half

    def read(self, files: Files, start: int = 0, stop: int | None = None) -> F32:
        """Rows start to stop in float32. CheckpointError names a weight that holds NaN or infinity."""
        return self._decoded(files, self.grid(files), start, self.shape[0] if stop is None else stop)

    def _decoded(self, files: Files, grid: Grid | None, start: int, stop: int) -> F32:
        values = self.form.decode(self.read_stored(files, start, stop), self.shape[-1])
        if grid is not None:
            grid.apply(values, start)
        self._check(values, start)
        return values

    def read_stored(self, files: Files, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Rows start to stop as they are stored."""
        whole = stop is None or (start, stop) == (0, self.shape[0])
        part = self.values if whole else self.values.rows(start, self.shape[0] if stop is None else stop)
        stored = np.empty(part.shape, self.form.dtype)
        files.read_into(part, stored)
        return stored

    def read_half(self, files: Files, out: NDArray[Any]) -> Restore:
        """The weight into out, of its shape and the form's half dtype: rounded, unless the form is plain."""
        if self.form.is_plain:
            files.read_into(self.values, out)
            bits: NDArray[Any] = out.view(np.uint32 if out.dtype.itemsize == 4 else np.uint16)
            if np.any((bits & self.form.exponent) == self.form.exponent):
                self._check(self.form.decode(out, self.shape[-1]), 0)
            return lambda half: self.form.decode(half, self.shape[-1])
        grid = self.grid(files)
        out[...] = f32_to_bf16(self._decoded(files, grid, 0, self.shape[0]))
        if grid is not None and grid.is_moderate and self.form.nearest is not None:
            return partial(_restore, self.form.nearest, grid)
        return lambda half: self.read(files)

    def grid(self, files: Files) -> Grid | None:
        """The scales; None in a form without. CheckpointError where one is no positive number."""
        if self.scale is None:
            return None
        stored = np.empty(self.scale.shape, SCALE_DTYPES[self.scale.dtype])
        files.read_into(self.scale, stored)
        n_columns = -(-self.shape[-1] // self.block[1])
        scale = SCALES[self.scale.dtype](stored).reshape(-1, n_columns)
        bad = ~(np.isfinite(scale) & (scale > 0))
        if bad.any():
            first = tuple(int(i) for i in np.argwhere(bad)[0])
            raise CheckpointError(
                f"tensor `{self.scale.name}`: {np.count_nonzero(bad)} of {scale.size} scales are no positive numbers,"
                f" the first at {first}: {scale[first]:g}",
                DAMAGED_HINT,
            )
        return Grid(scale, self._zeros(files, scale.shape), self.block, self.offset)

    def _zeros(self, files: Files, shape: tuple[int, ...]) -> F32 | None:
        if self.zero is None:
            return None
        packed = np.empty(self.zero.shape, self.form.dtype)
        files.read_into(self.zero, packed)
        return np.ascontiguousarray(self.form.decode(np.ascontiguousarray(packed.T), shape[0]).T)

    def _check(self, values: F32, first_row: int) -> None:
        finite = np.isfinite(values)
        if finite.all():
            return
        first = np.argwhere(~finite)[0]
        worst = (int(first[0]) + first_row, *(int(i) for i in first[1:]))
        raise CheckpointError(
            f"tensor `{self.name}`: {np.count_nonzero(~finite)} of {values.size} values not finite, first at {worst}",
            DAMAGED_HINT,
        )


@dataclass(frozen=True)
class Grid:
    """The scales of a weight's blocks."""

    scale: F32  # (rows of blocks, columns of blocks)
    zero: F32 | None  # likewise; blocks are then of one row
    block: tuple[int, int]
    offset: int

    @property
    def is_moderate(self) -> bool:
        """Whether products with codes round as numbers that are neither huge nor tiny do."""
        return bool((self.scale > LEAST_SCALE).all() and (self.scale < MOST_SCALE).all())

    def apply(self, values: F32, first: int) -> None:
        """Codes of rows from first on to weights, in place."""
        for rows, scale, zero in self._blocks(values, first):
            if zero is not None:
                np.subtract(rows, zero, out=rows)
            np.multiply(rows, scale, out=rows)

    def divide(self, values: F32, first: int) -> None:
        """Weights to codes, less their zero points; as exact as a division."""
        for rows, scale, _ in self._blocks(values, first):
            np.divide(rows, scale, out=rows)

    def multiply(self, values: F32, first: int) -> None:
        """Codes that are less their zero points already to weights."""
        for rows, scale, _ in self._blocks(values, first):
            np.multiply(rows, scale, out=rows)

    def _blocks(self, values: F32, first: int) -> Iterator[tuple[F32, F32, F32 | None]]:
        """Views of rows of values, with their scales and zero points to match."""
        n_rows, n = values.shape
        height, width = self.block
        at = first + self.offset
        if height == 1:
            rows = slice(at, at + n_rows)
            zero = None if self.zero is None else self.zero[rows, :, None]
            yield values.reshape(n_rows, -1, width), self.scale[rows, :, None], zero
            return
        done = 0
        while done < n_rows:
            i = (at + done) // height
            stop = min(n_rows, (i + 1) * height - at)
            yield values[done:stop], np.repeat(self.scale[i], width)[:n], None
            done = stop


def _restore(nearest: Callable[[F32], F32], grid: Grid, half: NDArray[Any]) -> F32:
    """Rounded to bfloat16, a product of a code and its scale still tells the code: codes lie further apart."""
    out = np.empty(half.shape, np.float32)
    step = max(1, ROUNDED_AT_ONCE // half.shape[1])
    for at in range(0, len(half), step):
        values = bf16_to_f32(half[at : at + step])
        grid.divide(values, at)
        values = nearest(values)
        grid.multiply(values, at)
        out[at : at + step] = values
    return out
