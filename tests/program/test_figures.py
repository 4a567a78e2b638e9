"""dsv2cli.figures: bars, heatmaps, and a PNG that a decoder written from the specification reads back."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest

from dsv2cli import figures

USAGE = np.array([[0, 8, 8, 16], [1, 1, 1, 1], [0, 0, 0, 0]])


def read_png(path: Path) -> tuple[np.ndarray, dict[bytes, bytes]]:
    """(height, width, 3) pixels and the chunks, by the PNG specification; filters 0 and 1 only."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = {}, 8
    while at < len(data):
        n, kind = struct.unpack_from(">I4s", data, at)
        body = data[at + 8 : at + 8 + n]
        assert struct.unpack_from(">I", data, at + 8 + n)[0] == zlib.crc32(kind + body)
        chunks[kind] = body
        at += 12 + n
    width, height, depth, colour, *rest = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert (depth, colour, rest) == (8, 2, [0, 0, 0])
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, 1 + 3 * width)
    pixels = rows[:, 1:].reshape(height, width, 3).astype(np.uint64)
    for row, kind in zip(pixels, rows[:, 0], strict=True):
        assert kind in (0, 1)
        if kind == 1:
            row[...] = np.cumsum(row, axis=0) % 256
    return pixels.astype(np.uint8), chunks


@pytest.mark.parametrize(("values", "shown"), [
    ([0.0, 1.0], "▁█"), ([1.0, 2.0, 4.0], "▃▅█"), ([0.0, 0.0], "▁▁"), ([], ""), ([3.0], "█"),
])  # fmt: skip
def test_spark(values: list[float], shown: str) -> None:
    assert figures.spark(values) == shown


def test_brightness_counts_octaves_from_the_layer_s_mean() -> None:
    bright = figures.brightness(USAGE)
    np.testing.assert_allclose(bright[0], [0.0, 0.5, 0.5, 0.5 + 1 / 6])
    np.testing.assert_allclose(bright[1], 0.5)
    np.testing.assert_allclose(bright[2], 0.0)


def test_colours_run_from_dark_to_bright() -> None:
    luma = figures.colours(np.linspace(0, 1, 64)) @ np.array([0.2126, 0.7152, 0.0722])
    assert (np.diff(luma) >= 0).all() and luma[0] < 2 and luma[-1] > 230


@pytest.mark.parametrize(("n", "width", "n_columns"), [(4, 10, 4), (4, 3, 3), (160, 75, 75), (4, 1, 1), (4, 0, 1)])
def test_fit_keeps_the_mean_of_what_it_joins(n: int, width: int, n_columns: int) -> None:
    usage = np.random.default_rng(0).integers(0, 99, (2, n))
    fitted = figures.fit(usage, width)
    assert fitted.shape == (2, n_columns)
    if n % n_columns == 0:
        np.testing.assert_allclose(fitted, usage.reshape(2, n_columns, -1).mean(-1))
    assert (fitted >= usage.min()).all() and (fitted <= usage.max()).all()


def test_heatmap_in_shades_and_half_blocks() -> None:
    plain = [line.plain for line in figures.heatmap(USAGE, [2, 3, 4], 80, coloured=False)]
    assert plain == ["   2  ▒▒▓", "   3 ▒▒▒▒", "   4     "]
    blocks = figures.heatmap(USAGE, [2, 3, 4], 80, coloured=True)
    assert [line.plain for line in blocks] == ["   2 ▀▀▀▀", "   4 ▀▀▀▀"]
    assert "on rgb" in str(blocks[0].spans[0].style) and "on" not in str(blocks[1].spans[0].style)
    assert all(len(line.plain) <= 7 for line in figures.heatmap(USAGE, [2, 3, 4], 7, coloured=True))


@pytest.mark.parametrize("shape", [(3, 4), (1, 1), (60, 160)])
def test_png(tmp_path: Path, shape: tuple[int, int]) -> None:
    usage = np.random.default_rng(1).integers(0, 1000, shape)
    figures.write_png(tmp_path / "u.png", usage, "Modell ü 模")
    pixels, chunks = read_png(tmp_path / "u.png")
    side = pixels.shape[0] // shape[0]
    assert pixels.shape[:2] == (shape[0] * side, shape[1] * side)
    expected = figures.colours(figures.brightness(usage))
    for offset in (0, side - 1):
        np.testing.assert_array_equal(pixels[offset::side, offset::side], expected)
    assert chunks[b"tEXt"] == b"Title\0Modell \xfc ?"
