"""Models in several files, as gguf-py writes them (its --split-max-tensors) and as people mislay them."""

import os
import resource
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter
from support.tiny import SPECS, write_gguf

import cext
from cext import Gguf
from dsv2cli import locate
from dsv2cli.anatomy import study

N_PARTS = 5


def copy_split(whole: Path, stem: Path) -> list[Path]:
    """The model again, in N_PARTS files."""
    reader = GGUFReader(whole)
    writer = GGUFWriter(stem, "deepseek2", split_max_tensors=-(-len(reader.tensors) // N_PARTS))
    for field in reader.fields.values():
        if not field.name.startswith(("GGUF.", "general.architecture")):
            kind = field.types[0]
            writer.add_key_value(field.name, field.contents(), kind, field.types[-1] if len(field.types) > 1 else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(stem.parent.glob(f"{stem.stem}-*.gguf"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "tiny.gguf"
    write_gguf(path, SPECS[0])
    return path


@pytest.fixture
def parts(whole: Path, tmp_path: Path) -> list[Path]:
    made = copy_split(whole, tmp_path / "tiny.gguf")
    assert len(made) == N_PARTS
    return made


def test_the_same_model(whole: Path, parts: list[Path]) -> None:
    with Gguf(whole) as one, Gguf(parts[0]) as many:
        assert [t.name for t in many.tensors] == [t.name for part in parts for t in GGUFReader(part).tensors]
        assert sorted(t.name for t in many.tensors) == sorted(t.name for t in one.tensors)
        for tensor in one.tensors:
            np.testing.assert_array_equal(many.raw(tensor.name), one.raw(tensor.name))
        assert {k: v for k, v in many.metadata.items() if not k.startswith("split.")} == dict(one.metadata)
        assert many.nbytes == sum(path.stat().st_size for path in parts) > one.nbytes
    ids = [3, 1, 4, 1, 5]
    logits = [cext.Model(path, threads=1).session(8).eval(ids) for path in (whole, parts[0])]
    np.testing.assert_array_equal(*logits)


def test_a_part_that_changes_under_use_is_told(parts: list[Path]) -> None:
    with Gguf(parts[0]) as many:
        many.read("output_norm.weight")
        with parts[3].open("ab") as part:
            part.write(b"more")
        with pytest.raises(cext.FileError, match=rf"{parts[3].name}.*bytes long"):
            many.read("output_norm.weight")


def test_found_by_its_folder(parts: list[Path]) -> None:
    assert locate.model(str(parts[0].parent)) == parts[0]
    assert study(parts[0]).file_bytes == sum(path.stat().st_size for path in parts)


def test_behind_links(parts: list[Path], tmp_path: Path) -> None:
    """The hub's cache keeps the bytes under other names, and links with the right ones."""
    links = tmp_path / "snapshot"
    links.mkdir()
    for i, path in enumerate(parts):
        (links / path.name).symlink_to(path.rename(tmp_path / f"blob{i}"))
    with Gguf(links / parts[0].name) as many:
        assert many.tensors


def lose(parts: list[Path]) -> Path:
    parts[2].unlink()
    return parts[0]


def put_a_folder(parts: list[Path]) -> Path:
    parts[2].unlink()
    parts[2].mkdir()
    return parts[0]


def link_in_a_circle(parts: list[Path]) -> Path:
    """What the system refuses for another reason than that the part is missing."""
    parts[2].unlink()
    parts[2].symlink_to(parts[2])
    return parts[0]


def cut(parts: list[Path]) -> Path:
    with parts[3].open("r+b") as file:
        file.truncate(parts[3].stat().st_size - 100)
    return parts[0]


def swap(parts: list[Path]) -> Path:
    shutil.copy(parts[2], parts[1])
    return parts[0]


def repeat(parts: list[Path]) -> Path:
    """The second part again as the third, with the third's number written in."""
    content = bytearray(parts[1].read_bytes())
    at = content.index(b"split.no") + len(b"split.no") + 4
    assert content[at : at + 2] == b"\1\0"
    content[at] = 2
    parts[2].write_bytes(content)
    return parts[0]


@pytest.mark.parametrize(
    ("spoil", "error", "message", "hint"),
    [
        (lose, OSError, "00003-of-00005.gguf.*No such file", "all parts must lie in one folder"),
        (put_a_folder, OSError, "00003-of-00005.gguf.*a directory", "all parts must lie in one folder"),
        (link_in_a_circle, OSError, "00003-of-00005.gguf.*symbolic links", ""),
        (cut, cext.FormatError, "00004-of-00005.gguf.*past its end", "incomplete"),
        (swap, cext.FormatError, "00002-of-00005.gguf.*part 3 of 5, expected 2 of 5", "one folder"),
        (repeat, cext.FormatError, "stands in two parts|parts hold", "one folder"),
        (lambda parts: parts[1], cext.UnsupportedError, "part 2 of 5", "open the first part"),
        (
            lambda parts: parts[0].rename(parts[0].with_name("x.gguf")),
            cext.UnsupportedError,
            "does not end in",
            "names",
        ),
    ],
    ids=("lost", "folder", "circle", "cut", "swapped", "repeated", "second", "renamed"),
)
def test_parts_that_do_not_fit(
    parts: list[Path], spoil: Callable[[list[Path]], Path], error: type[Exception], message: str, hint: str
) -> None:
    path = spoil(parts)
    with pytest.raises(error, match=message) as raised:
        Gguf(path)
    told = raised.value.hint  # type: ignore[attr-defined]
    assert hint in told and bool(hint) == bool(told)


def test_the_limit_of_open_files_is_told_of_a_part_too(parts: list[Path]) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))  # noqa: PTH208
    with ExitStack() as opened:
        while opened.enter_context(parts[0].open("rb")).fileno() < highest + 1:
            pass  # no number is free below
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 4, before[1]))
            with pytest.raises(cext.FileError, match=r"-0000[2-5]-of.*Too many open files") as raised:
                Gguf(parts[0])
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert "ulimit -n" in raised.value.hint
