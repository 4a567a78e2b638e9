"""dsv2 list and rm: what is here, and that nothing else goes with what is removed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.inprocess import Ran, run

from dsv2cli import shelf
from dsv2cli.hub import cache

COMMIT, LATER = "a" * 40, "b" * 40


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub's, and an empty folder to work in."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(cache, "cache_root", lambda: tmp_path / "hub")
    (tmp_path / "hub").mkdir()
    return tmp_path / "hub"


def put(root: Path, repo: str, path: str, content: bytes, commit: str = COMMIT) -> Path:
    """A file in the cache as the hub's client lays it: a blob, and a link of a snapshot."""
    folder = root / f"models--{repo.replace('/', '--')}"
    blob = folder / "blobs" / f"{abs(hash(content)):064x}"
    name = folder / "snapshots" / commit / path
    for place in (blob, name):
        place.parent.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(content)
    name.symlink_to(blob)
    return name


def listed(*args: str) -> dict[str, tuple[str, int]]:
    ran = run("list", "--json", *args)
    assert ran.code == 0, ran.told
    return {row["name"]: (row["kind"], row["nbytes"]) for row in json.loads(ran.out) if row["where"] != "package"}


def rm(*args: str) -> Ran:
    return run("rm", *args)


@pytest.mark.parametrize(("columns", "in_columns"), [(30, False), (60, False), (100, True)])
def test_names_are_whole_on_a_narrow_terminal(root: Path, columns: int, in_columns: bool) -> None:
    """What does not fit beside its size stands above it."""
    name = "an-owner/A-Model-Of-A-Long-Name-GGUF"
    put(root, name, "M-Q4_K_M.gguf", b"q" * 1000)
    narrow = {"COLUMNS": str(columns), "TERM": "xterm", "NO_COLOR": "1"}
    lines = run("list", terminal=True, env=narrow).out.decode().splitlines()
    at = next(i for i, line in enumerate(lines) if name in line)
    assert ("1.00 kB" in lines[at]) is in_columns
    if not in_columns:
        assert lines[at : at + 3] == [f"{name}:Q4_K_M", "  kind: gguf", "  size: 1.00 kB"]


def test_all_kinds_are_listed(root: Path) -> None:
    put(root, "owner/M-GGUF", "M-Q4_K_M.gguf", b"q" * 1000)
    put(root, "owner/M-GGUF", "M-Q8_0-00001-of-00002.gguf", b"r" * 600)
    put(root, "owner/M-GGUF", "M-Q8_0-00002-of-00002.gguf", b"s" * 700)
    put(root, "owner/M-GGUF", "mmproj-F16.gguf", b"t" * 50)  # no model
    put(root, "owner/M", "model.safetensors", b"w" * 3000)
    put(root, "owner/M", "config.json", b"{}")
    partial = root / "models--owner--P" / "blobs" / f"x{cache.PARTIAL}"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(b"p" * 4096)
    Path("own-Q4_0.gguf").write_bytes(b"o" * 10)
    Path("deep/er").mkdir(parents=True)
    Path("deep/er/two.gguf").write_bytes(b"o" * 20)
    found = listed()
    assert found["owner/M-GGUF:Q4_K_M"] == ("gguf", 1000)
    assert found["owner/M-GGUF:Q8_0"] == ("gguf", 1300)
    assert found["owner/M"] == ("checkpoint", 3002)
    assert found["owner/P"][0] == "unfinished"
    assert found["own-Q4_0.gguf"] == ("gguf", 10) and found["deep/er/two.gguf"] == ("gguf", 20)
    assert not [name for name in found if "mmproj" in name]
    assert "own-Q4_0.gguf" not in listed("deep")
    shown = run("list")
    assert shown.code == 0 and b"owner/M-GGUF:Q8_0" in shown.out
    assert run("list", "no-such-folder").code == 2


def test_one_type_goes_and_the_rest_stays(root: Path) -> None:
    gone = put(root, "owner/M-GGUF", "M-Q4_K_M.gguf", b"q" * 1000)
    stays = put(root, "owner/M-GGUF", "M-Q8_0.gguf", b"r" * 600)
    blob = gone.resolve()
    ran = rm("owner/M-GGUF:q4_k_m", "-y")
    assert ran.code == 0 and "1.00 kB more" in ran.told, ran.told
    assert not gone.is_symlink() and not blob.exists()
    assert stays.read_bytes() == b"r" * 600
    assert rm("owner/M-GGUF", "-y").code == 0
    assert list(root.iterdir()) == []  # nothing is left of it


def test_a_blob_that_another_revision_names_stays(root: Path) -> None:
    first = put(root, "owner/M", "M-Q4_K_M.gguf", b"q" * 1000)
    put(root, "owner/M", "M-Q8_0.gguf", b"e" * 10)
    blob = first.resolve()
    other = root / "models--owner--M" / "snapshots" / LATER / "M-old.gguf"
    other.parent.mkdir()
    other.symlink_to(blob)
    assert rm("owner/M:Q4_K_M", "-y").code == 0
    assert blob.exists()


def test_a_link_that_leads_out_of_the_cache_is_not_followed(root: Path, tmp_path: Path) -> None:
    outside = tmp_path / "precious.gguf"
    outside.write_bytes(b"precious")
    name = root / "models--owner--M" / "snapshots" / COMMIT / "M-Q4_K_M.gguf"
    name.parent.mkdir(parents=True)
    name.symlink_to(outside)
    assert rm("owner/M", "-y").code == 0
    assert outside.read_bytes() == b"precious" and not name.is_symlink()
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "snapshots" / COMMIT).mkdir(parents=True)
    (elsewhere / "snapshots" / COMMIT / "M-Q4_K_M.gguf").write_bytes(b"x")
    (root / "models--owner--linked").symlink_to(elsewhere)
    ran = rm("owner/linked", "-y")
    assert ran.code == 1 and (elsewhere / "snapshots" / COMMIT / "M-Q4_K_M.gguf").exists()


def test_files_and_folders_by_their_paths(root: Path) -> None:
    for name in ("a-00001-of-00002.gguf", "a-00002-of-00002.gguf", "b.gguf", "b.gguf.report.json", "notes.txt"):
        Path(name).write_bytes(b"x")
    folder = Path("checkpoint")
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "mine.txt"):
        (folder / name).write_bytes(b"{}")
    assert rm("a-00001-of-00002.gguf", "b.gguf", "checkpoint", "-y").code == 0
    assert sorted(p.name for p in Path().iterdir()) == ["checkpoint", "notes.txt"]
    assert [p.name for p in folder.iterdir()] == ["mine.txt"]  # nobody's of the checkpoint


def test_what_is_no_model_is_not_removed(root: Path) -> None:
    Path("notes.txt").write_bytes(b"x")
    Path("folder").mkdir()
    Path("folder/any.json").write_bytes(b"{}")
    Path("real.gguf").write_bytes(b"x")
    Path("link.gguf").symlink_to("real.gguf")
    inside = put(root, "owner/M", "M-Q4_K_M.gguf", b"q")
    from dsv2cli.locate import PACKAGED  # noqa: PLC0415

    packaged = sorted(PACKAGED.glob("*.gguf"))[0]
    for name in ("notes.txt", "folder", "link.gguf", str(inside.parent / "M-Q4_K_M.gguf"), str(packaged), ".", "/"):
        ran = rm(name, "-y")
        assert ran.code == 2, (name, ran.told)
    assert rm("owner/absent", "-y").code == 1
    nothing, ours = rm("lite-cha", "-y"), rm(packaged.stem, "-y")
    assert (nothing.code, ours.code) == (2, 2) and "package's own model" in ours.told
    assert "`lite-cha` is nothing that is here" in nothing.told and "dsv2 list" in nothing.told
    assert inside.exists() and packaged.exists() and Path("real.gguf").exists() and Path("notes.txt").exists()


def test_it_asks(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("a.gguf").write_bytes(b"x")
    ran = rm("a.gguf")
    assert ran.code == 2 and "--yes" in ran.told and Path("a.gguf").exists()  # nobody is there
    from dsv2cli.commands import rm as command  # noqa: PLC0415

    monkeypatch.setattr(command.console, "is_terminal", lambda stream: True)
    assert run("rm", "a.gguf", stdin=b"n\n").code == 1 and Path("a.gguf").exists()
    assert run("rm", "a.gguf", stdin=b"\n").code == 1 and Path("a.gguf").exists()
    assert run("rm", "a.gguf", stdin=b"y\n").code == 0 and not Path("a.gguf").exists()


def test_a_name_is_looked_at_again_before_it_goes(root: Path) -> None:
    held = shelf.Held("owner/M", "gguf", 1, root / "x", "cache", (root / ".." / "here" / "x.gguf",))
    with pytest.raises(Exception, match="not where the hub's cache"):
        shelf.remove(held)


def files_in(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir())


def test_a_whole_file_and_splits_of_other_counts_are_models_of_their_own(root: Path) -> None:
    sets = {
        2: [f"m-0000{i}-of-00002.gguf" for i in (1, 2)],
        3: [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)],
        0: ["m.gguf"],
        1: ["m-00001-of-00001.gguf"],
    }
    for name in (name for names in sets.values() for name in names):
        Path(name).write_bytes(b"x" * 10)
    assert sorted(n for _, n in listed().values()) == [10, 10, 20, 30]
    for count in (0, 2, 1, 3):
        ran = rm(sets.pop(count)[0], "-y")
        assert ran.code == 0, ran.told
        assert files_in(Path()) == sorted(name for names in sets.values() for name in names)


def test_what_may_be_a_person_s_own_stays_beside_a_checkpoint(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Downloaded into a home: its own notes, another model's weights, and the hub's whole cache lie beside."""
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = {"weight_map": {f"t{i}": name for i, name in enumerate([*shards, "notes.json"])}}
    Path("model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    for name in (*shards, "config.json", "tokenizer.json", "tiktoken.model"):
        Path(name).write_bytes(b"{}")
    own = ["README.md", "LICENSE", "notes.json", "other.safetensors", "x.gguf.report.json", "spam.model"]
    own += [
        f".cache/huggingface/{name}" for name in ("token", "hub/models--o--m/blobs/1", "download/other.json.metadata")
    ]
    records = Path(".cache/huggingface/download")
    records.mkdir(parents=True)
    Path(".cache/huggingface/hub/models--o--m/blobs").mkdir(parents=True)
    for name in own:
        Path(name).write_bytes(b"mine")
    for name in (*shards, "LICENSE.txt", "config.json"):
        Path(name).write_bytes(b"{}")
        (records / f"{name}.metadata").write_text(f"{COMMIT}\n{'e' * 40}\n{Path(name).stat().st_mtime}\n", "utf-8")
    asked = rm(".")
    assert asked.code == 2 and all(f"{name}" in asked.told for name in (*shards, "LICENSE.txt", "tiktoken.model"))
    assert rm(".", "-y").code == 0
    assert files_in(Path()) == sorted(own)


def test_records_go_with_a_download_and_no_link_is_followed(root: Path, tmp_path: Path) -> None:
    for name in ("plain", "linked"):
        Path(name).mkdir()
        for file in ("config.json", "model.safetensors"):
            Path(name, file).write_bytes(b"{}")
    cached = tmp_path / "precious"
    records = cached / "huggingface" / "download"
    records.mkdir(parents=True)
    (records / "config.json.metadata").write_bytes(b"x")
    Path("linked/.cache").symlink_to(cached)
    records = Path("plain/.cache/huggingface/download")
    records.mkdir(parents=True)
    for name in ("config.json.metadata", "config.json.lock", f"model.safetensors.e{cache.PARTIAL}", "../.gitignore"):
        (records / name).write_bytes(b"x")
    assert rm("plain", "linked", "-y").code == 0
    assert not Path("plain").exists()  # nothing was left in it
    assert files_in(cached) == ["huggingface/download/config.json.metadata"]


def test_named_templates_go_with_a_checkpoint(root: Path, tmp_path: Path) -> None:
    """Their folder too, unless a person has put something there; what a link leads to stays."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine.jinja").write_bytes(b"x")
    for name in ("whole", "shared", "linked"):
        Path(name).mkdir()
        for file in ("config.json", "model.safetensors"):
            Path(name, file).write_bytes(b"{}")
        templates = Path(name, "additional_chat_templates")
        templates.symlink_to(elsewhere) if name == "linked" else templates.mkdir()
        if name != "linked":
            (templates / "tool_use.jinja").write_bytes(b"x")
    Path("shared/additional_chat_templates/notes.txt").write_bytes(b"x")
    records = Path("whole/.cache/huggingface/download/additional_chat_templates")
    records.mkdir(parents=True)
    (records / "tool_use.jinja.metadata").write_bytes(b"x")
    assert listed()["whole"] == ("checkpoint", 5)
    assert rm("whole", "shared", "linked", "-y").code == 0
    assert not Path("whole").exists()
    assert files_in(Path("shared")) == ["additional_chat_templates/notes.txt"]
    assert files_in(elsewhere) == ["mine.jinja"]


@pytest.mark.parametrize(
    "name",
    [
        "https://huggingface.co/owner/M-GGUF/blob/main/M-Q4_K_M.gguf",
        "https://huggingface.co/owner/M-GGUF/tree/main",
        "owner/M-GGUF:latest",
    ],
)
def test_a_part_of_a_repository_is_not_the_repository(root: Path, name: str) -> None:
    paths = [put(root, "owner/M-GGUF", f"M-{kind}.gguf", kind.encode()) for kind in ("Q4_K_M", "Q8_0")]
    ran = rm(name, "-y")
    assert ran.code == 2 and "owner/M-GGUF:TYPE" in ran.told, ran.told
    assert all(path.exists() for path in paths)


def test_a_snapshot_that_leads_nowhere_is_passed_over(root: Path) -> None:
    put(root, "owner/M", "M-Q4_K_M.gguf", b"q" * 1000)
    (root / "models--owner--M" / "snapshots" / LATER).symlink_to(root / "nowhere")
    assert listed()["owner/M:Q4_K_M"] == ("gguf", 1000)
    assert rm("owner/M:Q4_K_M", "-y").code == 0


def test_a_file_goes_from_every_snapshot(root: Path) -> None:
    paths = [
        put(root, "owner/M", path, path.encode() + commit.encode(), commit)
        for commit in (COMMIT, LATER)
        for path in ("M-Q4_K_M.gguf", "model.safetensors")
    ]
    assert set(listed()) == {"owner/M:Q4_K_M", "owner/M"}
    assert rm("owner/M:Q4_K_M", "-y").code == 0
    assert set(listed()) == {"owner/M"} and [path.exists() for path in paths] == [False, True, False, True]
    assert rm("owner/M", "-y").code == 0 and list(root.iterdir()) == []


def test_a_folder_that_may_not_be_entered_is_passed_over(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("closed", "open"):
        Path(name).mkdir()
        Path(name, "m.gguf").write_bytes(b"x")
    is_file = Path.is_file

    def refusing(path: Path) -> bool:
        if path.parent.name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return is_file(path)

    monkeypatch.setattr(Path, "is_file", refusing)
    assert list(listed()) == ["open/m.gguf"]
