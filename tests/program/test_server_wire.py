"""Large bodies are read in pieces, to the values that they are."""

from __future__ import annotations

import json
import random
from typing import Any

import msgspec
import pytest

from dsv2cli.server import wire

LETTERS = ["a", "\\", '"', "\n", "é", "中", "🦙", "\x01", "/", "u", "d", "D", "8", " "]


def value(draw: random.Random, depth: int) -> Any:
    kind = draw.randrange(6 if depth else 4)
    if kind == 4:
        return [value(draw, depth - 1) for _ in range(draw.randrange(4))]
    if kind == 5:
        return {text(draw): value(draw, depth - 1) for _ in range(draw.randrange(4))}
    return draw.choice([1, -5, 1.5, None, True, False, 1e300]) if kind == 3 else text(draw)


def text(draw: random.Random) -> str:
    return "".join(draw.choice(LETTERS) for _ in range(draw.randrange(300)))


def broken(draw: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.randrange(1, 3)):
        changed[draw.randrange(len(changed))] = draw.choice(b'\x80"\\{0\xff')
    return bytes(changed)


def read(decode: Any, data: bytes) -> Any:
    """What comes of it; None of what is no JSON."""
    try:
        return repr(decode(data))
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def test_pieces_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever a text is cut: no escape, no pair of surrogates and no character in two."""
    monkeypatch.setattr(wire, "PIECE", 40)
    draw = random.Random(1)
    for _ in range(2000):
        wanted = value(draw, 3)
        data = json.dumps(wanted, ensure_ascii=draw.random() < 0.5, indent=draw.choice([None, 2])).encode()
        data = b" " * draw.randrange(3) + data + b" " * draw.randrange(3)
        assert wire.decoded(data) == wanted, data
        wrong = broken(draw, data)
        assert read(wire.decoded, wrong) == read(msgspec.json.decode, wrong), wrong


def test_no_more_than_a_piece_is_decoded_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the decoder holds the interpreter for as long as it takes; it goes through the rest without decoding it."""
    sizes: list[int] = []
    decode = msgspec.json.decode

    def watched(data: bytes, *, type: Any = Any) -> Any:
        if type in (Any, str):
            sizes.append(len(data))
        return decode(data, type=type)

    body = json.dumps({"messages": [{"role": "user", "content": "a\nb🦙" * (wire.PIECE // 4)}] * 2}).encode()
    assert len(body) > 4 * wire.PIECE
    monkeypatch.setattr("msgspec.json.decode", watched)
    assert wire.parse(body, dict) == json.loads(body)  # type: ignore[comparison-overlap]
    assert max(sizes) <= wire.PIECE + 2 and sum(sizes) > 0.9 * len(body)
