"""The GGUF reader: what it reads equals gguf-py's reading, and what it must refuse it refuses by name."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize, quantize
from support import gguf_bytes as gb
from support.gguf_bytes import Tensor, gguf, kv, kv_array
from support.gguf_hostile import HOSTILE, UNRUN, Hostile

from cext import EngineError, FormatError, Gguf, UnsupportedError, formats

ERRORS = {"format": FormatError, "unsupported": UnsupportedError}


def write(folder: Path, content: bytes) -> Path:
    path = folder / "file.gguf"
    path.write_bytes(content)
    return path


def read_everything(path: Path) -> None:
    """Touch all that a view lends; what is out of bounds shows as a crash, or under AddressSanitizer."""
    view = Gguf(path)
    dict(view.metadata)
    known = {row["gguf_type"] for row in formats()}
    for tensor in view.tensors:
        assert view.raw(tensor.name).nbytes == tensor.nbytes
        if tensor.type in known:
            assert view.read(tensor.name).shape == tensor.shape[::-1]


# Golden: written by gguf-py, read by both.

QUANTS = [
    GGMLQuantizationType.F32,
    GGMLQuantizationType.F16,
    GGMLQuantizationType.BF16,
    GGMLQuantizationType.Q4_0,
    GGMLQuantizationType.Q4_1,
    GGMLQuantizationType.Q5_0,
    GGMLQuantizationType.Q5_1,
    GGMLQuantizationType.Q8_0,
]
SHAPES = [(32,), (3, 64), (2, 5, 32), (2, 1, 3, 32)]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "golden.gguf"
    writer = GGUFWriter(path, "deepseek2")
    writer.add_uint8("v.u8", 255)
    writer.add_int8("v.i8", -128)
    writer.add_uint16("v.u16", 65535)
    writer.add_int16("v.i16", -32768)
    writer.add_uint32("v.u32", 2**32 - 1)
    writer.add_int32("v.i32", -(2**31))
    writer.add_uint64("v.u64", 2**64 - 1)
    writer.add_int64("v.i64", -(2**63))
    writer.add_float32("v.f32", 0.1)
    writer.add_float64("v.f64", 0.1)
    writer.add_bool("v.true", True)
    writer.add_bool("v.false", False)
    writer.add_string("v.text", "zwölf Boxkämpfer 猫")
    writer.add_array("v.words", [f"token {i}" for i in range(1000)])
    writer.add_array("v.ints", list(range(-5, 5)))
    writer.add_array("v.floats", [0.5, -1.25])
    writer.add_array("v.flags", [True, False, True])
    rng = np.random.default_rng(7)
    for quant in QUANTS:
        for shape in SHAPES:
            values = rng.standard_normal(shape, dtype=np.float32)
            writer.add_tensor(f"{quant.name}.{len(shape)}", quantize(values, quant), raw_dtype=quant)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def reference_value(reader: GGUFReader, key: str) -> Any:
    field = reader.fields[key]
    if field.types[0] == GGUFValueType.ARRAY:
        return [field.contents(i) for i in range(len(field.data))]
    return field.contents()


def test_metadata_equals_gguf_py(written: Path) -> None:
    reader = GGUFReader(written)
    keys = [key for key in reader.fields if not key.startswith("GGUF.")]
    view = Gguf(written)
    assert list(view.metadata) == keys
    found, expected = dict(view.metadata), {key: reference_value(reader, key) for key in keys}
    assert found == expected
    assert {key: type(value) for key, value in found.items()} == {key: type(value) for key, value in expected.items()}
    assert view.path == str(written)


def test_directory_equals_gguf_py(written: Path) -> None:
    reader = GGUFReader(written)
    expected = [
        (t.name, int(t.tensor_type), t.tensor_type.name.lower(), tuple(t.shape.tolist()), t.data_offset, t.n_bytes)
        for t in reader.tensors
    ]
    rows = Gguf(written).tensors
    found = [(t.name, t.type, t.type_name, t.shape, t.offset, t.nbytes) for t in rows]
    assert found == expected


def test_tensors_equal_gguf_py(written: Path) -> None:
    view = Gguf(written)
    for t in GGUFReader(written).tensors:
        np.testing.assert_array_equal(view.raw(t.name), t.data.view(np.uint8).reshape(-1), err_msg=t.name)
        values = dequantize(t.data, t.tensor_type).reshape(tuple(map(int, t.shape[::-1])))
        np.testing.assert_array_equal(view.read(t.name), values, err_msg=t.name)


def test_unknown_tensor_name(written: Path) -> None:
    view = Gguf(written)
    with pytest.raises(KeyError, match="no_such"):
        view.read("no_such")
    with pytest.raises(KeyError, match="no_such"):
        view.raw("no_such")


def test_a_view_outlives_the_name_of_its_file(tmp_path: Path) -> None:
    path = write(tmp_path, gb.small_file())
    view = Gguf(path)
    path.unlink()
    assert view.read("x.weight").shape == (2, 8)


# Well-formed oddities.


@pytest.mark.parametrize("version", [2, 3])
def test_small_file(tmp_path: Path, version: int) -> None:
    view = Gguf(write(tmp_path, gb.small_file(version)))
    assert view.metadata["a.u64"] == 2**63 + 1
    assert view.metadata["a.words"] == ["one", "", "drei ö"]
    assert view.metadata["a.flags"] == [True, False]
    assert view.metadata["a.none"] == []
    assert [t.shape for t in view.tensors] == [(8, 2), (3,), (64, 1, 2, 1)]
    assert view.read("z").shape == (1, 2, 1, 64)


def test_a_file_of_keys_needs_no_padding(tmp_path: Path) -> None:
    content = gguf([kv("a", gb.U8, 1)], alignment=1)
    assert len(content) % 32 != 0
    assert Gguf(write(tmp_path, content)).metadata["a"] == 1


def test_nothing_at_all(tmp_path: Path) -> None:
    view = Gguf(write(tmp_path, gguf(alignment=1)))
    assert (dict(view.metadata), view.tensors) == ({}, [])


@pytest.mark.parametrize("alignment", [8, 32, 4096, 65536])
def test_alignment(tmp_path: Path, alignment: int) -> None:
    tensors, end = gb.place([Tensor("a", (3,)), Tensor("b", (5,))], alignment)
    content = gguf([kv("general.alignment", gb.U32, alignment)], tensors, b"\1" * end, alignment=alignment)
    rows = Gguf(write(tmp_path, content)).tensors
    assert [t.offset % alignment for t in rows] == [0, 0]
    assert rows[1].offset - rows[0].offset == tensors[1].offset


def test_tensors_in_any_order_with_gaps(tmp_path: Path) -> None:
    tensors = [Tensor("b", (8,), offset=128), Tensor("a", (8,), offset=0)]
    data = np.arange(40, dtype=np.float32)
    view = Gguf(write(tmp_path, gguf([], tensors, data.tobytes())))
    np.testing.assert_array_equal(view.read("b"), data[32:40])
    np.testing.assert_array_equal(view.read("a"), data[:8])


# ggml's block_q8_1 is two halves and 32 bytes; gguf-py's table still counts two floats. No file holds one.
SIZES = GGML_QUANT_SIZES | {GGMLQuantizationType.Q8_1: (32, 36)}


@pytest.mark.parametrize("quant", list(SIZES), ids=lambda q: q.name)
def test_every_type_is_sized_whether_it_runs_or_not(tmp_path: Path, quant: GGMLQuantizationType) -> None:
    elements, nbytes = SIZES[quant]
    content = gguf([], [Tensor("t", (2 * elements, 3), int(quant))], b"\0" * (6 * nbytes))
    view = Gguf(write(tmp_path, content))
    row = view.tensors[0]
    assert (row.nbytes, row.type_name) == (6 * nbytes, quant.name.lower())
    assert view.raw("t").nbytes == 6 * nbytes
    if int(quant) not in {f["gguf_type"] for f in formats()}:
        with pytest.raises(UnsupportedError, match=f"`t`.*{quant.name.lower()}"):
            view.read("t")


def test_an_unknown_type_is_listed_but_not_read(tmp_path: Path) -> None:
    view = Gguf(write(tmp_path, gguf([], [Tensor("t", (7,), 999)], b"\0" * 64)))
    row = view.tensors[0]
    assert (row.type, row.type_name, row.nbytes) == (999, "type 999", 0)
    with pytest.raises(UnsupportedError, match=r"`t`.*999"):
        view.read("t")


def test_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    content = gguf([kv("s", gb.STRING, b"a\xff\xfeb"), kv_array("list", gb.STRING, [b"\xc3", b"ok"])])
    metadata = Gguf(write(tmp_path, content)).metadata
    assert metadata["s"].startswith("a") and metadata["s"].endswith("b")
    assert metadata["list"][1] == "ok"


def test_a_large_vocabulary(tmp_path: Path) -> None:
    words = [f"w{i}" for i in range(150_000)]
    content = gguf([kv_array("tokens", gb.STRING, words)])
    assert Gguf(write(tmp_path, content)).metadata["tokens"] == words


# Refusals.


@pytest.mark.parametrize("case", HOSTILE, ids=lambda case: case.name)
def test_hostile_file(tmp_path: Path, case: Hostile) -> None:
    path = write(tmp_path, case.content)
    with pytest.raises(ERRORS[case.error]) as raised:
        Gguf(path)
    message = str(raised.value)
    assert path.name in message
    assert all(word in message for word in case.words), message
    assert "\n" not in message and "\x1b" not in message
    assert raised.value.hint


def test_hostile_names_are_distinct() -> None:
    assert len({case.name for case in HOSTILE}) == len(HOSTILE)
    assert UNRUN not in {row["gguf_type"] for row in formats()}, "choose another type that does not run"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: folder / "missing.gguf", "missing.gguf.*No such file"),
        (lambda folder: folder, "directory"),
        (lambda _: Path("/dev/null"), "device"),
    ],
    ids=["missing", "directory", "device"],
)
def test_not_a_file(tmp_path: Path, make: Any, words: str) -> None:
    with pytest.raises(OSError, match=words):
        Gguf(make(tmp_path))


def test_a_long_path_leaves_room_for_the_fault(tmp_path: Path) -> None:
    folder = tmp_path.joinpath(*["ö" * 100] * 8)
    folder.mkdir(parents=True)
    with pytest.raises(FormatError, match=r"file.gguf.*power of two"):
        Gguf(write(folder, gguf([kv("general.alignment", gb.U32, 3)])))


@pytest.mark.parametrize("content", [gb.small_file(), gb.tiny_model().content()], ids=["small", "model"])
def test_every_truncation_is_refused(tmp_path: Path, content: bytes) -> None:
    step = max(1, len(content) // 1000)
    for size in range(0, len(content), step):
        path = write(tmp_path, content[:size])
        with pytest.raises(FormatError):
            Gguf(path)
    read_everything(write(tmp_path, content))


@pytest.mark.parametrize("seed", range(4))
def test_mutations_never_crash(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    base = gb.small_file()
    n_refused = 0
    for _ in range(1000):
        content = bytearray(base)
        for _ in range(rng.choice([1, 1, 1, 2, 4, 16])):
            at = rng.randrange(len(content))
            content[at] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, content[at] ^ (1 << rng.randrange(8))])
        if rng.random() < 0.2:
            del content[rng.randrange(len(content)) :]
        try:
            read_everything(write(tmp_path, bytes(content)))
        except (EngineError, OSError) as error:
            assert "file.gguf" in str(error)
            n_refused += 1
    assert 0 < n_refused < 1000
