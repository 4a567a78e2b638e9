"""Damaged headers of safetensors and tables of tiktoken: refused in a line, whatever bytes are changed.

Deterministic: seeds of each format, changed byte by byte and number by number. DSV2_FUZZ_CASES=100000 runs more.
"""

from __future__ import annotations

import base64
import json
import os
import random
import re
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from support import checkpoints as make
from support import stored as forms

from quantize.base.errors import QuantizeError
from quantize.source import tiktoken
from quantize.source.checkpoint import Checkpoint
from quantize.source.safetensors import parse_header, read_header

CASES = int(os.environ.get("DSV2_FUZZ_CASES", "3000"))
MOST_BYTES = 32 << 20  # of memory that a small damaged file may take
NUMBERS = ("0", "-1", "1e9", "18446744073709551615", "9" * 30, "null", "true", '"4"', "[]", "{}", "1.5", "NaN")
WORDS = (b'"dtype"', b'"shape"', b'"data_offsets"', b'"BF16"', b'"F8_E4M3"', b'"I32"', b"[", b"]", b"{", b"}", b",")


def changed(rng: random.Random, data: bytes) -> bytes:
    """One to three changes: bytes, numbers, words; pieces cut, doubled or swapped."""
    for _ in range(rng.randint(1, 3)):
        at, n = rng.randrange(len(data) + 1), rng.choice((1, 1, 2, 8, 40))
        match rng.randrange(7):
            case 0:
                data = data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
            case 1:
                data = data[:at] + data[at + n :]
            case 2:
                data = data[:at] + data[at : at + n] * 2 + data[at + n :]
            case 3:
                data = data[:at] + rng.choice(WORDS) + data[at:]
            case 4:
                data = data[:at]
            case 5:
                numbers = list(re.finditer(rb"\d+", data))
                if numbers:
                    one = rng.choice(numbers)
                    data = data[: one.start()] + rng.choice(NUMBERS).encode() + data[one.end() :]
            case _:
                other = rng.randrange(len(data) + 1)
                data = data[:at] + data[other : other + n] + data[at + n :]
    return data


def told(read: Callable[[], object]) -> bool:
    """Whether it was refused; in one line if so."""
    try:
        read()
    except QuantizeError as error:
        assert str(error) and "\n" not in str(error) + error.hint
        return True
    return False


def test_damaged_headers_are_refused_in_a_line(tmp_path: Path) -> None:
    """The length before the header is mended as often as not, so that the damage is read."""
    rng, refused, path = random.Random(1), 0, tmp_path / "m.safetensors"
    make.write_safetensors(
        path, {**forms.to_int("a.weight", np.ones((8, 32), np.float32))[0], "b": ("BF16", np.ones(6, np.uint16))}
    )
    whole = path.read_bytes()
    n = int.from_bytes(whole[:8], "little")
    header, data = whole[8 : 8 + n], whole[8 + n :]
    tracemalloc.start()
    for _ in range(CASES):
        if rng.random() < 0.2:
            damaged = changed(rng, whole)
        else:
            text = changed(rng, header)
            damaged = len(text).to_bytes(8, "little") + text + data
        path.write_bytes(damaged)
        refused += told(lambda: read_header(path))
        told(partial(parse_header, path, damaged[: rng.randrange(len(damaged) + 1)], len(damaged)))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert refused > CASES // 2 and most < MOST_BYTES


def test_damaged_checkpoints_are_refused_in_a_line(tmp_path: Path) -> None:
    """Past the header too: forms, scales, shapes and configuration that do not fit each other."""
    rng, refused = random.Random(2), 0
    stored = {}
    for i, form in enumerate(("int4", "int4 asymmetric", "fp8 channel", "fp8 tensor")):
        stored |= forms.in_form(
            form, f"m{i}.weight", np.random.default_rng(i).standard_normal((32, 32)).astype(np.float32)
        )[0]
    stored["m.experts.gate_up_proj"] = ("BF16", np.ones((3, 8, 4), np.uint16))
    make.write_safetensors(tmp_path / "model.safetensors", stored)
    whole = (tmp_path / "model.safetensors").read_bytes()
    n = int.from_bytes(whole[:8], "little")
    config = json.dumps({"quantization_config": forms.scheme()})
    names = [
        *(f"m{i}.weight" for i in range(4)),
        *(f"m.experts.{i}.{k}_proj.weight" for i in (0, 2) for k in ("gate", "up")),
    ]

    def read() -> None:
        with Checkpoint(tmp_path) as checkpoint:
            for name in names:
                told(lambda name=name: checkpoint.verify(name, (32, 32) if name[1] != "." else (4, 4), 3))  # type: ignore[misc]
                told(lambda name=name: checkpoint.verify_told(name, (32, 32)))  # type: ignore[misc]
                told(lambda name=name: checkpoint.read_f32(name))  # type: ignore[misc]

    tracemalloc.start()
    for _ in range(CASES // 10):
        text = whole[8 : 8 + n] if rng.random() < 0.3 else changed(rng, whole[8 : 8 + n])
        (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + n :])
        said = changed(rng, config.encode()) if rng.random() < 0.5 else config.encode()
        (tmp_path / "config.json").write_bytes(said)
        refused += told(read)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert refused and most < MOST_BYTES


def test_forged_sizes_take_no_memory(tmp_path: Path) -> None:
    """A shape of 2**60 over no bytes, a stack of as many, a header of 100 MB that is not there."""
    for shape in ([1 << 30, 1 << 30], [1 << 62], [0, 1 << 62], [1 << 20] * 8):
        header = json.dumps({"w": {"dtype": "BF16", "shape": shape, "data_offsets": [0, 0]}}).encode()
        (tmp_path / "config.json").write_text("{}")
        (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
        tracemalloc.start()

        def read() -> None:
            with Checkpoint(tmp_path) as checkpoint:
                checkpoint.verify("w", (4, 4))
                checkpoint.read_f32("w")

        assert told(read)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert most < MOST_BYTES


def test_damaged_tiktoken_files_are_refused_in_a_line(tmp_path: Path) -> None:
    rng, refused, path = random.Random(3), 0, tmp_path / "tiktoken.model"
    tokens = [*(bytes([b]) for b in range(256)), b"th", b"the", b" the", b"in", b"er", b"ether"]
    lines = b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))
    for _ in range(CASES // 3):
        path.write_bytes(changed(rng, lines))
        refused += told(lambda: tiktoken.merges(tiktoken.read_ranks(path)))
    assert refused > CASES // 6


@pytest.mark.parametrize(
    "line", [b"AA== 99999999999999999999", b"AA== -1", b"AA== 0x1", b"!! 0", b"AA==", b"", b"AA== 1 2"]
)
def test_forged_ranks_are_refused(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "tiktoken.model").write_bytes(line + b"\n")
    assert told(lambda: tiktoken.read_ranks(tmp_path / "tiktoken.model"))
