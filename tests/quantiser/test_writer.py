"""quantize.writer: the bytes of a GGUF as gguf-py and the engine read them, and that half a file is never seen."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as Type
from support.page_cache import is_dropped, skip_unless_dropped

import cext
from quantize.base.errors import OutputError
from quantize.write.writer import Writer, write_vocab_only

METADATA: dict[str, object] = {
    "general.architecture": "deepseek2",
    "n": 7,
    "big": 4294967295,
    "x": 0.25,
    "yes": True,
    "no": False,
    "text": "grüße｜",
    "empty": "",
    "words": ["a", "", "ｂ"],
    "ids": [1, -2, 3],
    "usage": np.arange(5, dtype=np.uint32),
    "curve": np.array([0.5, 1.5], np.float32),
}
TENSORS = [
    ("a.weight", (3, 64), Type.Q4_0),
    ("b.weight", (5,), Type.F32),
    ("c.weight", (2, 3, 256), Type.Q6_K),
    ("d.weight", (1, 1), Type.F16),
]


def fill(writer: Writer) -> dict[str, np.ndarray]:
    """Random bytes in every tensor, written back to front, c in two halves with others between."""
    rng = np.random.default_rng(0)
    data = {name: rng.integers(0, 256, slot.nbytes, np.uint8) for name, slot in writer.slots.items()}
    half = len(data["c.weight"]) // 2
    for name in reversed(data):
        writer.append(name, data[name][: half if name == "c.weight" else None])
    writer.append("c.weight", data["c.weight"][half:])
    return data


def test_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    with Writer(path, tmp_path / "part", METADATA, TENSORS) as writer:
        data = fill(writer)
        assert not path.exists()
        writer.finish()
        writer.commit()
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]
    reader = gguf.GGUFReader(path)
    for key, value in METADATA.items():
        got = reader.fields[key].contents()
        assert got == pytest.approx(value.tolist() if isinstance(value, np.ndarray) else value), key
    assert [(t.name, tuple(t.shape[::-1]), t.tensor_type) for t in reader.tensors] == TENSORS
    for tensor in reader.tensors:
        np.testing.assert_array_equal(tensor.data.reshape(-1).view(np.uint8), data[tensor.name], err_msg=tensor.name)
        assert tensor.data_offset % 32 == 0
    ours = cext.Gguf(path)
    assert ours.metadata["words"] == METADATA["words"] and ours.metadata["text"] == METADATA["text"]
    for name, expected in data.items():
        np.testing.assert_array_equal(ours.raw(name), expected, err_msg=name)


def test_a_finished_file_leaves_the_cache(tmp_path: Path) -> None:
    """Where it would lie in small pages; what is read of it before it has its name is read anew as well."""
    skip_unless_dropped(tmp_path)
    path = tmp_path / "m.gguf"
    with Writer(path, tmp_path / "part", METADATA, [("w.weight", (1024, 4096), Type.Q8_0)]) as writer:
        fill_one = np.random.default_rng(0).integers(0, 256, writer.slots["w.weight"].nbytes, np.uint8)
        writer.append("w.weight", fill_one)
        writer.sync()
        writer.finish()
        assert is_dropped(tmp_path / "part")
        writer.commit()
    assert is_dropped(path)
    np.testing.assert_array_equal(cext.Gguf(path).raw("w.weight"), fill_one)


def test_metadata_alone(tmp_path: Path) -> None:
    write_vocab_only(tmp_path / "v.gguf", METADATA)
    assert set(METADATA) <= set(gguf.GGUFReader(tmp_path / "v.gguf").fields)


def test_values_that_come_later(tmp_path: Path) -> None:
    with Writer(tmp_path / "m.gguf", tmp_path / "part", METADATA, TENSORS) as writer:
        fill(writer)
        with pytest.raises(ValueError, match="header grew"):
            writer.finish({**METADATA, "more": 1})
        writer.finish({**METADATA, "usage": np.full(5, 9, np.uint32)})
        writer.commit()
    assert cext.Gguf(tmp_path / "m.gguf").metadata["usage"] == [9] * 5


def test_an_unfinished_file_is_gone_on_with(tmp_path: Path) -> None:
    path, part = tmp_path / "m.gguf", tmp_path / "part"
    path.write_text("what was there before")
    with Writer(tmp_path / "whole.gguf", part, METADATA, TENSORS) as writer:
        fill(writer)
        writer.finish()
        writer.commit()
    with pytest.raises(ZeroDivisionError), Writer(path, part, METADATA, TENSORS) as writer:
        data = fill(writer)
        raise ZeroDivisionError
    assert path.read_text() == "what was there before"
    with Writer(path, part, METADATA, TENSORS, done=["b.weight", "c.weight", "d.weight"]) as writer:
        assert writer.n_done == sum(slot.nbytes for slot in writer.slots.values()) - writer.slots["a.weight"].nbytes
        with pytest.raises(ValueError, match=r"1 tensors .* `a\.weight`"):
            writer.finish()
        writer.append("a.weight", data["a.weight"])
        writer.finish()
        writer.commit()
    assert path.read_bytes() == (tmp_path / "whole.gguf").read_bytes()


def test_a_part_of_another_length(tmp_path: Path) -> None:
    (tmp_path / "part").write_bytes(b"GGUF")
    with pytest.raises(OutputError, match="has 4 bytes"):
        Writer(tmp_path / "m.gguf", tmp_path / "part", METADATA, TENSORS, done=["b.weight"])
    with Writer(tmp_path / "m.gguf", tmp_path / "part", METADATA, TENSORS) as writer:
        assert writer.n_done == 0


def test_a_missing_tensor_is_not_committed(tmp_path: Path) -> None:
    with Writer(tmp_path / "m.gguf", tmp_path / "part", METADATA, TENSORS) as writer:
        writer.append("b.weight", np.ones(5, np.float32))
        with pytest.raises(ValueError, match=r"3 tensors .* `a\.weight`"):
            writer.finish()
    assert not (tmp_path / "m.gguf").exists()


@pytest.mark.parametrize(("first", "then"), [(0, 6), (1, 5), (5, 1)])
def test_writes_stay_inside_their_tensor(tmp_path: Path, first: int, then: int) -> None:
    with Writer(tmp_path / "m.gguf", tmp_path / "part", METADATA, TENSORS) as writer:
        writer.append("b.weight", np.ones(first, np.float32))
        with pytest.raises(ValueError, match=r"b\.weight"):
            writer.append("b.weight", np.ones(then, np.float32))


def test_names(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="longer than 63"):
        Writer(tmp_path / "m.gguf", tmp_path / "part", {}, [("x" * 64, (1,), Type.F32)])
    with pytest.raises(ValueError, match="same name"):
        Writer(tmp_path / "m.gguf", tmp_path / "part", {}, [("x", (1,), Type.F32)] * 2)


def test_a_part_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "part").mkdir()
    with pytest.raises(OutputError, match="Is a directory"):
        Writer(tmp_path / "m.gguf", tmp_path / "part", METADATA, TENSORS)


@pytest.mark.parametrize("call", [*(["posix_fallocate"] if hasattr(os, "posix_fallocate") else []), "pwrite", "fsync"])
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with (
        pytest.raises(OutputError, match=r"No space left on device: it takes .* GB, .* GB are free"),
        Writer(tmp_path / "m.gguf", tmp_path / "part", METADATA, TENSORS) as writer,
    ):
        fill(writer)
        writer.finish()
    assert not (tmp_path / "m.gguf").exists()


def test_a_file_system_that_cannot_reserve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(os, "posix_fallocate", refuse, raising=False)
    with Writer(tmp_path / "m.gguf", tmp_path / "part", METADATA, TENSORS) as writer:
        fill(writer)
        writer.finish()
        writer.commit()
    assert len(gguf.GGUFReader(tmp_path / "m.gguf").tensors) == len(TENSORS)


def test_short_writes_are_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: whole(fd, data[:7], at))
    with Writer(tmp_path / "m.gguf", tmp_path / "part", METADATA, TENSORS) as writer:
        data = fill(writer)
        writer.finish()
        writer.commit()
    np.testing.assert_array_equal(cext.Gguf(tmp_path / "m.gguf").raw("c.weight"), data["c.weight"])


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_FSIZE as Linux has it")
def test_the_kernel_s_own_limit(tmp_path: Path) -> None:
    """A real refusal by the kernel, in a process of its own: a limit on file size."""
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))\n"
        "from quantize.base.errors import OutputError; from quantize.write.writer import Writer\n"
        "from gguf.constants import GGMLQuantizationType as Type\n"
        "try: Writer(sys.argv[1], sys.argv[1] + '.part', {}, [('x', (100_000,), Type.F32)])\n"
        "except OutputError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, str(tmp_path / "m.gguf")], capture_output=True, text=True, check=True
    )
    assert "File too large" in done.stdout and done.stderr == ""
    assert not (tmp_path / "m.gguf").exists()
