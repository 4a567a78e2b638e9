"""A conversation's file: what is written is read, or refused in a line."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import stat
from pathlib import Path

import pytest
from support.journals import MODEL, shape, written

from cext.tokenizer import Answer
from dsv2cli.chat import journal
from dsv2cli.chat.conversation import Turn
from dsv2cli.chat.journal import Journal, JournalError, Model
from dsv2cli.chat.tree import Setting


def test_what_is_written_is_read(tmp_path: Path) -> None:
    tree = written(tmp_path / "a.jsonl")
    contents = journal.read(tmp_path / "a.jsonl")
    assert shape(contents.tree) == shape(tree) and contents.tree.head == tree.head == 3
    assert contents.model == MODEL and contents.n_torn == 0
    assert contents.tree.nodes[2].setting == Setting("s", None, {"seed": 2**64 - 1})
    assert [node.number for node in contents.tree.path()] == [1, 3]
    assert [node.number for node in contents.tree.tips()] == [2, 3]
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line.get("answer") for line in lines[1:]] == ["answer 0", "answer 1", "answer 2"]
    assert stat.S_IMODE((tmp_path / "a.jsonl").stat().st_mode) == 0o600


def test_a_file_tells_where_its_model_lies_now(tmp_path: Path) -> None:
    """With the next turn; a cut before it leaves the place before. Not what has another identity."""
    path, now = tmp_path / "a.jsonl", dataclasses.replace(MODEL, path="/elsewhere.gguf")
    written(path)
    before = path.read_bytes()
    for model in (now, now, MODEL, now):  # told and left, told again: the last one counts
        kept = Journal.reopen(path)
        kept.go_on_with(model)
        kept.close()
    assert path.read_bytes() == before
    kept = Journal.reopen(path)
    kept.go_on_with(now)
    kept.add(kept.tree.add(Turn("more", [1]), Setting("s"), "end"), Answer(None, "x"))
    kept.close()
    assert journal.read(path).model == now and journal.read(path).tree.nodes[-1].turn.user == "more"
    data = path.read_bytes()
    for n in range(len(before), len(data)):
        path.write_bytes(data[:n])
        contents = journal.read(path)
        assert contents.model == (now if b"\n" in data[len(before) : n + 1] else MODEL)
        assert len(contents.tree.nodes) == 3 + (n == len(data) - 1)
    path.write_bytes(data)
    kept = Journal.reopen(path)
    kept.write({"model": {"identity": "f" * 64, "name": "m", "path": "/other.gguf"}})
    kept.close()
    with pytest.raises(JournalError, match="no part of a conversation"):
        journal.read(path)


@pytest.mark.parametrize("links", [True, False])
def test_a_new_file_is_seen_when_it_is_locked_and_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    """Else another conversation could lock it first, or read nothing in it."""
    path, write = tmp_path / "a.jsonl", Journal.write

    def watched(kept: Journal, line: dict[str, object]) -> None:
        assert not path.exists()
        write(kept, line)

    def refused(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", refused)
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "write", watched)
        kept = Journal.create(path, MODEL)
    with pytest.raises(JournalError, match="open in another"):
        Journal.reopen(path)
    kept.close()
    assert journal.read(path).model == MODEL and [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]
    with pytest.raises(FileExistsError):
        Journal.create(path, MODEL)
    assert journal.read(path).model == MODEL and [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize("code", [errno.ENOENT, errno.EIO, errno.ENOSPC, errno.EPERM])
def test_a_file_that_cannot_be_named_leaves_none(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is it named in the way of a file system without links where that is not what it is."""
    replaced: list[Path] = []

    def no_link(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    def no_replace(before: Path, path: Path) -> Path:
        replaced.append(path)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "link", no_link)
    monkeypatch.setattr(Path, "replace", no_replace)
    with pytest.raises(OSError):
        Journal.create(tmp_path / "a.jsonl", MODEL)
    assert not list(tmp_path.iterdir()) and bool(replaced) == (code == errno.EPERM)


def test_an_unfinished_file_is_nobody_else_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a process with the same number in another container, which has the folder too."""
    link, made = os.link, []

    def another_first(before: Path, path: Path) -> None:
        monkeypatch.setattr(os, "link", link)
        made.append(Journal.create(tmp_path / path.name, Model("cd" * 32, "theirs", "/b")))
        link(before, path)

    monkeypatch.setattr(os, "link", another_first)
    with pytest.raises(FileExistsError):
        Journal.create(tmp_path / "a.jsonl", MODEL)
    made[0].close()
    assert journal.read(tmp_path / "a.jsonl").model.name == "theirs"
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_name_is_changed_without_links_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_link(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", no_link)
    kept = Journal.create(tmp_path / "a.jsonl", MODEL)
    kept.rename(tmp_path / "b.jsonl")
    kept.close()
    assert [path.name for path in tmp_path.iterdir()] == ["b.jsonl"] and journal.read(tmp_path / "b.jsonl").end


def test_cut_anywhere_it_holds_a_beginning(tmp_path: Path) -> None:
    """And goes on from there, with the torn line gone."""
    whole = shape(written(tmp_path / "a.jsonl"))
    data = (tmp_path / "a.jsonl").read_bytes()
    ends = [i + 1 for i, byte in enumerate(data) if byte == 10]
    for n in range(len(data)):
        place = tmp_path / "cut.jsonl"
        place.write_bytes(data[:n])
        n_lines = sum(n >= end - 1 for end in ends)  # a line that lacks its end alone is whole
        if not n_lines:
            with pytest.raises(JournalError, match="holds no conversation"):
                journal.read(place)
            continue
        assert shape(journal.read(place).tree) == whole[: n_lines - 1]
        if n % 37 == 0 or n + 1 in ends:
            kept = Journal.reopen(place)
            kept.add(kept.tree.add(Turn("more", [1]), Setting("s"), "end"), Answer(None, "x"))
            kept.close()
            found = journal.read(place)
            assert found.n_torn == 0 and found.tree.nodes[-1].turn.user == "more"
            assert shape(found.tree)[:-1] == whole[: n_lines - 1]


def test_a_flipped_bit_is_never_believed(tmp_path: Path) -> None:
    whole = shape(written(tmp_path / "a.jsonl"))
    data = (tmp_path / "a.jsonl").read_bytes()
    place = tmp_path / "flipped.jsonl"
    for at in range(len(data)):
        for bit in range(8) if at % 16 == 0 else (at % 8,):
            place.write_bytes(data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :])
            try:
                contents = journal.read(place)
            except JournalError as error:
                assert "\n" not in str(error)
                continue
            assert at == len(data) - 1 and contents.n_torn, f"byte {at}, bit {bit} passed"
            assert shape(contents.tree) == whole[:-1]


@pytest.mark.parametrize("change", ["swapped", "lost", "twice", "of another file"])
def test_lines_that_moved_are_refused(change: str, tmp_path: Path) -> None:
    written(tmp_path / "a.jsonl", 4)
    written(tmp_path / "b.jsonl", 5)
    a, b = ((tmp_path / name).read_bytes().splitlines(keepends=True) for name in ("a.jsonl", "b.jsonl"))
    lines = {
        "swapped": [*a[:2], a[3], a[2], a[4]],
        "lost": [*a[:2], *a[3:]],
        "twice": [*a[:3], a[2], *a[3:]],
        "of another file": [*a[:3], b[5]],
    }[change]
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines))
    with pytest.raises(JournalError, match=r"damaged: line \d has changed") as refused:
        Journal.reopen(tmp_path / "a.jsonl")
    n = int(re.search(r"head -n (\d)", refused.value.hint)[1])
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines[:n]))  # as the hint says
    assert journal.read(tmp_path / "a.jsonl").tree.nodes


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"format": "dsv2 conversation", "version": 2, "model": None}, "of version 2, and this program reads 1"),
        ({"format": "a book", "version": 1}, "holds no conversation"),
        ([1], "holds no conversation"),
        ({"format": "dsv2 conversation", "version": 1, "model": {}}, "damaged: line 1"),
    ],
)
def test_other_files_and_versions(line: object, said: str, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")
    with pytest.raises(JournalError, match=said):
        journal.read(tmp_path / "x.jsonl")


FORGED = [
    {"head": 9}, {"head": True}, {"head": -1}, {"parent": 1, "user": 3}, {}, {"parent": 5}, {"parent": 0, "user": "a"},
    {"parent": 1, "user": "a", "ids": [-1], "opening": [], "thinking": None, "sampling": {}, "stop": "end"},
    {"parent": 1, "user": "a", "ids": [True], "opening": [], "thinking": None, "sampling": {}, "stop": "end"},
]  # fmt: skip


@pytest.mark.parametrize("line", FORGED)
def test_lines_that_are_no_turns(line: dict[str, object], tmp_path: Path) -> None:
    """With a right seal, by whoever wrote them."""
    written(tmp_path / "a.jsonl")
    kept = Journal.reopen(tmp_path / "a.jsonl")
    kept.write(line)
    kept.close()
    with pytest.raises(JournalError, match="line 5 is no part of a conversation"):
        journal.read(tmp_path / "a.jsonl")


def test_a_conversation_has_one_writer(tmp_path: Path) -> None:
    written(tmp_path / "a.jsonl")
    kept = Journal.reopen(tmp_path / "a.jsonl")
    with pytest.raises(JournalError, match="open in another conversation"):
        Journal.reopen(tmp_path / "a.jsonl")
    kept.close()
    Journal.reopen(tmp_path / "a.jsonl").close()
