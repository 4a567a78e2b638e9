"""dsv2 download against a small hub, through the real hub client: resume, verify, refuse, explain."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import cli
from support.cli import assert_fails
from support.hub import Hub, Refusal, git_blob_id, serve
from support.page_cache import is_dropped, skip_unless_dropped

from dsv2cli import hub as hub_module
from dsv2cli.errors import CliError
from dsv2cli.hub import RemoteFile

REPO = "deepseek-ai/DeepSeek-V2-Lite"
SHARD = "model-00001-of-00002.safetensors"
OTHER = "model-00002-of-00002.safetensors"
INDEX = json.dumps({"weight_map": {"a": SHARD, "b": OTHER}}).encode()
BYTES = random.Random(7)
CHECKPOINT = {
    "config.json": b'{"model_type": "deepseek_v2"}',
    "tokenizer.json": b"{}",
    "model.safetensors.index.json": INDEX,
    SHARD: BYTES.randbytes(3_500_000),
    OTHER: BYTES.randbytes(1_300_000),
    "modeling_deepseek.py": b"print('never fetched')",
    "figures/benchmark.json": b"{}",
}
# These are about bytes on their way, not about what they mean.
FETCH = ("download", "--no-check")
WANTED = {"config.json", "tokenizer.json", "model.safetensors.index.json", SHARD, OTHER}


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve() as served:
        served.add(REPO, CHECKPOINT)
        yield served


def dsv2(env: dict[str, str], *args: str, **extra: str) -> subprocess.CompletedProcess[str]:
    return cli.dsv2(*args, **{**env, **extra})


def cache(tmp_path: Path) -> Path:
    return tmp_path / "hf" / "hub" / f"models--{REPO.replace('/', '--')}" / "blobs"


def blobs(tmp_path: Path) -> list[Path]:
    return list(cache(tmp_path).iterdir())


def assert_complete(folder: Path) -> None:
    for name in WANTED:
        assert (folder / name).read_bytes() == CHECKPOINT[name], name


def test_fetches_a_checkpoint_into_the_shared_cache(hub: Hub, env: dict[str, str]) -> None:
    result = dsv2(env, *FETCH, "lite")
    assert result.returncode == 0, result.stderr
    folder = Path(result.stdout.strip())
    assert {p.name for p in folder.rglob("*")} == WANTED  # no code, nothing from subfolders
    assert_complete(folder)
    assert "here already" in result.stderr and "free" in result.stderr


def test_the_hub_clients_own_cache_reader_finds_it(hub: Hub, env: dict[str, str]) -> None:
    folder = dsv2(env, *FETCH, "lite").stdout.strip()
    script = f"from huggingface_hub import snapshot_download as s; print(s({REPO!r}, local_files_only=True))"
    command = [sys.executable, "-P", "-c", script]
    found = subprocess.run(command, env=cli.environment(**env), capture_output=True, text=True, check=True)
    assert found.stdout.strip() == folder


def test_fetches_nothing_twice(hub: Hub, env: dict[str, str]) -> None:
    first = dsv2(env, *FETCH, "lite")
    hub.requests.clear()
    again = dsv2(env, *FETCH, "lite")
    assert again.stdout == first.stdout
    assert not [r for r in hub.requests if "/resolve/" in r.path or "/cdn/" in r.path]


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
def test_a_dropped_connection_resumes(hub: Hub, env: dict[str, str], reset: bool) -> None:
    hub.drops[SHARD] = [1_200_000, 1_200_000]
    hub.drop_with_reset = reset
    result = dsv2(env, *FETCH, "lite")
    assert result.returncode == 0, result.stderr
    assert_complete(Path(result.stdout.strip()))
    starts = [int(r.range.removeprefix("bytes=").rstrip("-")) if r.range else 0 for r in hub.downloads(SHARD)]
    assert len(starts) == 3 and starts == sorted(set(starts)) and starts[1] > 0


def test_a_killed_download_resumes_in_the_next_run(hub: Hub, env: dict[str, str], tmp_path: Path) -> None:
    hub.drops[SHARD], hub.hold = [2_200_000], threading.Event()  # bytes, and then silence
    process = subprocess.Popen([*cli.COMMAND, *FETCH, "lite"], env=cli.environment(**env), stderr=subprocess.DEVNULL)
    partial = cache(tmp_path) / f"{hashlib.sha256(CHECKPOINT[SHARD]).hexdigest()}.incomplete"
    cli.wait_until(lambda: partial.exists() and partial.stat().st_size > 1_000_000)
    process.kill()
    process.wait()
    hub.hold.set()
    hub.requests.clear()
    result = dsv2(env, *FETCH, "lite")
    assert result.returncode == 0, result.stderr
    assert_complete(Path(result.stdout.strip()))
    (request,) = hub.downloads(SHARD)
    assert request.range is not None and int(request.range[6:-1]) > 1_000_000
    assert not [p for p in blobs(tmp_path) if p.suffix == ".incomplete"]


def test_a_server_that_ignores_ranges_is_read_from_the_start(hub: Hub, env: dict[str, str]) -> None:
    hub.drops[SHARD] = [1_200_000]
    hub.ignore_ranges = True
    result = dsv2(env, *FETCH, "lite")
    assert result.returncode == 0, result.stderr
    assert_complete(Path(result.stdout.strip()))


def test_no_progress_gives_up_and_keeps_what_came(hub: Hub, env: dict[str, str], tmp_path: Path) -> None:
    """Retries in a row without a byte end in one line; seconds of pauses are cut short by patching the limits."""
    hub.drops[SHARD] = [1_500_000] + [0] * 50
    script = "import dsv2cli.hub.transfer as t; t.RETRIES = 1; import time; time.sleep = lambda s: None"
    result = cli.dsv2_after(script, *FETCH, "lite", **env)
    assert_fails(result, 1, "cannot reach", "resumes")
    (left,) = [p for p in blobs(tmp_path) if p.suffix == ".incomplete"]
    assert CHECKPOINT[SHARD].startswith(left.read_bytes()) and left.stat().st_size >= 1_048_576


@pytest.mark.parametrize("name", [SHARD, "config.json"], ids=["lfs sha256", "git sha1"])
@pytest.mark.parametrize("to_folder", [False, True], ids=["cache", "folder"])
def test_corrupt_bytes_are_refused(hub: Hub, env: dict[str, str], tmp_path: Path, name: str, to_folder: bool) -> None:
    hub.corrupt.add(name)
    to = ["--to", str(tmp_path / "model")] if to_folder else []
    hashes = (git_blob_id(CHECKPOINT[name]), hashlib.sha256(CHECKPOINT[name]).hexdigest())
    assert_fails(dsv2(env, *FETCH, "lite", *to), 1, name, "not those the hub lists")
    for path in tmp_path.rglob("*"):  # neither under its name nor waiting to be resumed
        assert path.name not in (name, *hashes), path
        assert not (path.name.endswith(".incomplete") and any(h in path.name for h in hashes)), path
    hub.corrupt.clear()
    result = dsv2(env, *FETCH, "lite", *to)
    assert result.returncode == 0, result.stderr
    assert_complete(Path(result.stdout.strip()))


def test_a_damaged_partial_file_is_fetched_again(hub: Hub, env: dict[str, str], tmp_path: Path) -> None:
    result = dsv2(env, *FETCH, "lite")
    folder = Path(result.stdout.strip())
    blob = (folder / SHARD).resolve()
    blob.rename(blob.with_name(f"{blob.name}.incomplete"))
    with blob.with_name(f"{blob.name}.incomplete").open("r+b") as file:
        file.truncate(2_000_000)
        file.write(b"not what the server sent")
    again = dsv2(env, *FETCH, "lite")
    assert again.returncode == 0, again.stderr
    assert "do not make the whole" in again.stderr
    assert_complete(folder)


@pytest.mark.parametrize(
    ("refusal", "words"),
    [
        (Refusal(401, None, "Invalid credentials in Authorization header"), ("token", "HF_TOKEN")),
        (Refusal(401, "RepoNotFound"), ("no model", "private", "HF_TOKEN")),
        (Refusal(403, "GatedRepo", "Access is restricted"), ("gated", "accept", "HF_TOKEN")),
        (Refusal(403), ("forbids", "403")),
        (Refusal(404, "RepoNotFound"), ("no model", "check the name")),
        (Refusal(429), ("too many requests", "wait")),
        (Refusal(503), ("in trouble", "503", "try again")),
    ],
    ids=lambda value: f"{value.status} {value.code or ''}".strip() if isinstance(value, Refusal) else "",
)
def test_refusals_say_what_to_do(hub: Hub, env: dict[str, str], refusal: Refusal, words: tuple[str, ...]) -> None:
    hub.refuse["/api/models/"] = refusal
    assert_fails(dsv2(env, *FETCH, "lite", HF_TOKEN="hf_wrong"), 1, *words)


def test_a_refused_file_says_what_to_do(hub: Hub, env: dict[str, str]) -> None:
    hub.refuse["/cdn/"] = Refusal(403)
    assert_fails(dsv2(env, *FETCH, "lite"), 1, "403")


def test_the_token_goes_to_the_hub_and_not_to_the_cdn(hub: Hub, env: dict[str, str]) -> None:
    assert dsv2(env, *FETCH, "lite", HF_TOKEN="hf_secret").returncode == 0
    to_hub = [r for r in hub.requests if "/resolve/" in r.path]
    assert to_hub and all(r.authorization == "Bearer hf_secret" for r in to_hub)
    assert all(r.authorization is None for r in hub.requests if r.path.startswith("/cdn/"))


def test_what_no_repository_holds_is_told_first(hub: Hub, env: dict[str, str], tmp_path: Path) -> None:
    """Before the hub is asked, and before the cache is missed."""
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    for more in ({}, {"HF_HUB_OFFLINE": "1"}):
        for name in ("lite", "lite:Q4_K_M"):
            wishes = ["--only", "safetensors"] + (["--type", "Q4_K_M"] if name == "lite" else [])
            assert_fails(dsv2(env, *FETCH, name, *wishes, **more), 2, "--only safetensors leaves them out")
        assert_fails(dsv2(env, *FETCH, "lite", "--to", str(tmp_path / "file"), **more), 2, "is a file", "folder")
        assert_fails(dsv2(env, *FETCH, "lite", "--to", str(tmp_path / "pipe"), **more), 2, "is a pipe", "folder")
    assert hub.requests == []


def test_offline_uses_the_cache(hub: Hub, env: dict[str, str], tmp_path: Path) -> None:
    assert_fails(dsv2(env, *FETCH, "lite", HF_HUB_OFFLINE="1"), 1, "not in the cache", "HF_HUB_OFFLINE")
    online = dsv2(env, *FETCH, "lite")
    hub.requests.clear()
    offline = dsv2(env, *FETCH, "lite", HF_HUB_OFFLINE="1")
    assert (offline.returncode, offline.stdout) == (0, online.stdout)
    to = tmp_path / "copy"
    assert dsv2(env, *FETCH, "lite", "--to", str(to), HF_HUB_OFFLINE="1").returncode == 0
    assert_complete(to)
    (Path(online.stdout.strip()) / OTHER).unlink()
    assert_fails(dsv2(env, *FETCH, "lite", HF_HUB_OFFLINE="1"), 1, "lacks", OTHER)
    assert hub.requests == []


def test_to_a_folder(hub: Hub, env: dict[str, str], tmp_path: Path) -> None:
    to = tmp_path / "model"
    result = dsv2(env, *FETCH, REPO, "--to", str(to))
    assert (result.returncode, result.stdout.strip()) == (0, str(to))
    assert_complete(to)
    assert not (tmp_path / "hf" / "hub").exists()
    hub.requests.clear()
    (to / "config.json").write_bytes(b"edited")
    assert dsv2(env, *FETCH, REPO, "--to", str(to)).returncode == 0
    assert_complete(to)
    assert [r.path.rsplit("/", 1)[1] for r in hub.requests if "/resolve/" in r.path] == ["config.json"]


@pytest.mark.parametrize("is_there", [False, True], ids=["fetched", "verified"])
@pytest.mark.parametrize("to_folder", [False, True], ids=["cache", "folder"])
def test_weights_that_were_fetched_leave_the_cache(
    hub: Hub, env: dict[str, str], tmp_path: Path, to_folder: bool, is_there: bool
) -> None:
    """Where they would lie in small pages."""
    skip_unless_dropped(tmp_path)
    to = tmp_path / "model"
    to.mkdir()
    if is_there:
        (to / SHARD).write_bytes(CHECKPOINT[SHARD])
        with (to / SHARD).open("rb") as file:
            os.fsync(file.fileno())
    result = dsv2(env, *FETCH, "lite", *(["--to", str(to)] if to_folder else []))
    assert result.returncode == 0, result.stderr
    shard = Path(result.stdout.strip()) / SHARD
    assert is_dropped(shard)
    assert shard.read_bytes() == CHECKPOINT[SHARD]


def test_files_that_are_there_already_are_adopted(hub: Hub, env: dict[str, str], tmp_path: Path) -> None:
    to = tmp_path / "model"
    to.mkdir()
    (to / SHARD).write_bytes(CHECKPOINT[SHARD])
    assert dsv2(env, *FETCH, "lite", "--to", str(to)).returncode == 0
    assert_complete(to)
    assert hub.downloads(SHARD) == []


def test_more_than_the_disk_holds_is_refused_before_the_first_byte(hub: Hub, env: dict[str, str]) -> None:
    hub.listed_size[SHARD] = 10**18
    assert_fails(dsv2(env, *FETCH, "lite"), 1, "free", "--to")
    assert not hub.downloads(SHARD)


def test_a_revision(hub: Hub, env: dict[str, str]) -> None:
    hub.add(REPO, {**CHECKPOINT, "config.json": b"older"}, revision="v1")
    folder = Path(dsv2(env, *FETCH, "lite", "--revision", "v1").stdout.strip())
    assert (folder / "config.json").read_bytes() == b"older"
    commit = hub.repos[REPO].commit("v1")
    assert folder.name == commit
    assert dsv2(env, *FETCH, "lite", "--revision", str(commit)).stdout.strip() == str(folder)
    assert_fails(dsv2(env, *FETCH, "lite", "--revision", "v9"), 1, "no revision `v9`")


def test_json_lists_what_was_verified(hub: Hub, env: dict[str, str]) -> None:
    told = json.loads(dsv2(env, *FETCH, "lite", "--json", "-q").stdout)
    assert {f["name"] for f in told["files"]} == WANTED
    assert told["nbytes"] == sum(len(CHECKPOINT[name]) for name in WANTED)
    for file in told["files"]:
        assert Path(file["path"]).read_bytes() == CHECKPOINT[file["name"]]
        assert ("sha256" in file) == file["name"].endswith(".safetensors")


def test_an_unreachable_hub(env: dict[str, str]) -> None:
    assert_fails(dsv2(env, *FETCH, "lite", HF_ENDPOINT="http://127.0.0.1:9"), 1, "cannot reach http://127.0.0.1:9")


def test_a_full_disk_keeps_what_came(hub: Hub, env: dict[str, str], tmp_path: Path) -> None:
    """A file-size limit stands for the disk: writes fail the same way, in the middle of a file."""
    script = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)"
    script += "; resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))"
    result = cli.dsv2_after(script, *FETCH, "lite", **env)
    assert_fails(result, 1, SHARD, "File too large", "--to")
    digest = hashlib.sha256(CHECKPOINT[SHARD]).hexdigest()
    (left,) = [p for p in blobs(tmp_path) if p.name == f"{digest}.incomplete"]
    assert left.stat().st_size > 1_000_000 and CHECKPOINT[SHARD].startswith(left.read_bytes())


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["download"], ["REPO|ALIAS"]),
        (["download", "lit"], ["did you mean lite"]),
        (["download", "a/b/c"], ["neither owner/name nor a known alias"]),
        (["download", "lite", "--only", "pickle"], ["pickle", "--help"]),
        (["download", "lite", "--only", "safetensors", "--type", "q4_k_m"], ["--type"]),
    ],
)
def test_misuse(env: dict[str, str], args: list[str], words: list[str]) -> None:
    assert_fails(dsv2(env, *args), 2, *words)


# Which files.


def listed(*names: str) -> list[RemoteFile]:
    return [RemoteFile(name, 10, "0" * 64, sha256=True) for name in names]


SEVERAL = listed(
    "README.md",
    "V2-Lite.Q2_K.gguf",
    "V2-Lite.Q4_K_M.gguf",
    "V2-Lite.IQ4_XS.gguf",
    "V2-Lite.f16.gguf",
    "Q8_0/V2-Lite-Q8_0-00001-of-00002.gguf",
    "Q8_0/V2-Lite-Q8_0-00002-of-00002.gguf",
)


@pytest.mark.parametrize(
    ("gguf_type", "chosen"),
    [
        (None, ["V2-Lite.Q4_K_M.gguf"]),
        ("iq4_xs", ["V2-Lite.IQ4_XS.gguf"]),
        ("F16", ["V2-Lite.f16.gguf"]),
        ("Q8_0", ["Q8_0/V2-Lite-Q8_0-00001-of-00002.gguf", "Q8_0/V2-Lite-Q8_0-00002-of-00002.gguf"]),
    ],
)
def test_the_gguf_of_a_type(gguf_type: str | None, chosen: list[str]) -> None:
    kind, files = hub_module.select("a/b", SEVERAL, None, gguf_type)
    assert (kind, [f.path for f in files]) == ("gguf", chosen)


@pytest.mark.parametrize(
    ("files", "gguf_type", "message"),
    [
        (SEVERAL, "Q6_K", "no GGUF of type Q6_K"),
        (listed("a-Q2_K.gguf", "a-Q3_K_M.gguf"), None, "2 GGUFs, none of them Q4_K_M"),
        (listed("a-Q2_K.gguf", "b-Q2_K.gguf"), "Q2_K", "2 models"),
        (listed("model.safetensors"), "Q2_K", "no GGUF"),
        (listed("README.md"), None, "neither safetensors weights nor GGUF"),
    ],
)
def test_no_such_gguf(files: list[RemoteFile], gguf_type: str | None, message: str) -> None:
    with pytest.raises(CliError, match=message):
        hub_module.select("a/b", files, None, gguf_type)


@pytest.mark.parametrize("path", ["../up.json", "/etc/x.json", "a/../../x.json", "..", "a\\..\\b.json", "C:/x.json"])
def test_a_path_that_leaves_its_folder_is_refused(hub: Hub, env: dict[str, str], path: str) -> None:
    hub.add("evil/model", {path: b"x" * 10, "model.safetensors": b"w"})
    assert_fails(dsv2(env, *FETCH, "evil/model"), 1, "outside its folder")
