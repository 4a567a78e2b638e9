"""Numbers as pictures: a line of bars, a heatmap on the terminal, and the same as a PNG.

The PNG is written here, with zlib: it takes two dozen lines for a matrix of flat cells, and no dependency draws.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from rich.text import Text

BARS = "▁▂▃▄▅▆▇█"
SHADES = " ░▒▓█"
# Dark to bright, evenly in lightness, readable without colour vision: black, violet, red, orange, pale yellow.
COLOURS = np.array([(0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164)], np.float64)
OCTAVES = 3  # an expert used 2**3 times as often as the layer's mean is brightest, 2**-3 times darkest
CELL_PIXELS, LARGEST_PIXELS = 12, 1 << 13  # a side
LABEL_WIDTH = 5  # of a layer's number before its row
F64 = NDArray[np.float64]


def spark(values: Sequence[float]) -> str:
    """A bar a value, from 0 to the largest."""
    top = max(values, default=0.0)
    if top <= 0:
        return BARS[0] * len(values)
    return "".join(BARS[min(len(BARS) - 1, int(len(BARS) * value / top))] for value in values)


def brightness(usage: NDArray[np.generic]) -> F64:
    """(n_layer, n_expert) counts -> 0 to 1: 0.5 is the mean of the layer, and each octave counts alike."""
    counts = np.asarray(usage, np.float64)
    mean = counts.mean(axis=1, keepdims=True)
    ratio = np.divide(counts, mean, out=np.zeros_like(counts), where=mean > 0)
    bright: F64 = np.clip(np.log2(np.maximum(ratio, 2.0**-OCTAVES)) / (2 * OCTAVES) + 0.5, 0.0, 1.0)
    return bright


def colours(bright: F64) -> NDArray[np.uint8]:
    """0 to 1 -> (..., 3) RGB."""
    at = bright * (len(COLOURS) - 1)
    low = np.minimum(at.astype(np.int64), len(COLOURS) - 2)
    part = (at - low)[..., None]
    rgb: NDArray[np.uint8] = (COLOURS[low] * (1 - part) + COLOURS[low + 1] * part).round().astype(np.uint8)
    return rgb


def fit(usage: NDArray[np.generic], width: int) -> F64:
    """Neighbouring experts averaged until a row takes no more than width columns."""
    n_layer, n_expert = usage.shape
    n_columns = min(n_expert, max(1, width))
    edges = np.arange(n_columns + 1) * n_expert // n_columns
    sums = np.add.reduceat(np.asarray(usage, np.float64), edges[:-1], axis=1)
    assert sums.shape == (n_layer, n_columns)
    mean: F64 = sums / np.diff(edges)
    return mean


def heatmap(usage: NDArray[np.generic], layers: Sequence[int], width: int, *, coloured: bool) -> list[Text]:
    """Rows of layers, columns of experts: two layers a line in half blocks where there is colour, else shades."""
    from rich.text import Text

    bright = brightness(fit(usage, width - LABEL_WIDTH))
    lines = []
    for i in range(0, len(bright), 2 if coloured else 1):
        line = Text(f"{layers[i]:>{LABEL_WIDTH - 1}} ", no_wrap=True)
        if not coloured:
            line.append("".join(SHADES[min(len(SHADES) - 1, int(len(SHADES) * value))] for value in bright[i]))
        else:
            upper = colours(bright[i])
            lower = colours(bright[i + 1]) if i + 1 < len(bright) else None
            for column, (r, g, b) in enumerate(upper):
                under = "" if lower is None else " on rgb({},{},{})".format(*lower[column])
                line.append("▀", f"rgb({r},{g},{b}){under}")
        lines.append(line)
    return lines


def write_png(path: Path, usage: NDArray[np.generic], title: str) -> None:
    """The heatmap as a PNG: rows of layers from the first down, columns of experts. OSError where it cannot be."""
    rgb = colours(brightness(usage))
    side = max(1, min(CELL_PIXELS, LARGEST_PIXELS // max(rgb.shape[:2])))
    pixels = rgb.repeat(side, axis=0).repeat(side, axis=1)
    height, width = pixels.shape[:2]
    # Every row begins with its filter: 1, the difference from the pixel before, which flat cells compress best.
    rows = np.diff(pixels, axis=1, prepend=np.zeros((height, 1, 3), np.uint8)).reshape(height, -1)
    data = np.concatenate([np.ones((height, 1), np.uint8), rows], axis=1).tobytes()
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits, RGB, nothing interlaced
    text = b"Title\0" + title.encode("latin-1", "replace")
    chunks = ((b"IHDR", header), (b"tEXt", text), (b"IDAT", zlib.compress(data, 9)), (b"IEND", b""))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, body) for kind, body in chunks))


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
