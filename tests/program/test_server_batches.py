"""Files and batches over HTTP: whose they are, what comes of them, and whom they wait for."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from support.batches import CHAT, TEXT, line, short
from support.cli import SECONDS, wait_until
from support.serving import USUAL, Served, served
from support.tiny import spec_named, variant
from support.vocab import V25_TEMPLATE, write_model

from dsv2cli.commands.serve import rules_of
from dsv2cli.errors import CliError
from dsv2cli.server import files, guard
from dsv2cli.server.desk import Desk
from dsv2cli.server.errors import ApiError
from dsv2cli.server.files import Files, Limits, owner_name
from dsv2cli.server.multipart import boundary_of, read_form

FILES, BATCHES = "/v1/files", "/v1/batches"
LONG = {"max_tokens": 400, "temperature": 0}
MANY = [line(i, TEXT, prompt=f"{i}", **LONG) for i in range(2000)]  # more than are answered within a test
OWNER, OTHER = owner_name(b""), owner_name(b"other")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = variant(spec_named("lite"), n_ctx=4096)
    return write_model(tmp_path_factory.mktemp("batches") / "tiny.gguf", spec, V25_TEMPLATE, endless=True)


@pytest.fixture(scope="module")
def server(path: Path) -> Iterator[Served]:
    with served(path) as running:
        yield running


def jsonl(lines: list[Any]) -> bytes:
    return "".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in lines).encode()


def upload(client: httpx.Client, held: bytes, **more: Any) -> httpx.Response:
    form: dict[str, Any] = {"data": {"purpose": "batch"}, "files": {"file": ("in.jsonl", held)}} | more
    return client.post(FILES, **form)


def begin(client: httpx.Client, lines: list[Any], endpoint: str, **more: Any) -> dict[str, Any]:
    brought = upload(client, jsonl(lines)).json()
    asked = {"input_file_id": brought["id"], "endpoint": endpoint, "completion_window": "24h"} | more
    response = client.post(BATCHES, json=asked)
    assert response.status_code == 200, response.text
    made: dict[str, Any] = response.json()
    return made


def ended(client: httpx.Client, name: str, until: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """The batch when it has ended, or is as wanted."""
    while True:
        batch: dict[str, Any] = client.get(f"{BATCHES}/{name}").json()
        if until(batch) if until else batch["status"] in ("completed", "failed", "cancelled"):
            return batch
        time.sleep(0.02)


def content(client: httpx.Client, name: str) -> list[Any]:
    return [json.loads(one) for one in client.get(f"{FILES}/{name}/content").text.splitlines()]


def texts(found: list[Any]) -> dict[str, str]:
    return {result["custom_id"]: result["response"]["body"]["choices"][0]["text"] for result in found}


# Files.


def test_a_file_comes_back_as_it_was(server: Served) -> None:
    data = bytes(range(256)) * 1000 + b"\r\n--boundary\r\n"
    made = upload(server.client, data).json()
    assert made["object"] == "file" and made["bytes"] == len(data) and made["filename"] == "in.jsonl"
    assert server.client.get(f"{FILES}/{made['id']}").json() == made
    assert server.client.get(f"{FILES}/{made['id']}/content").content == data
    assert server.client.get(FILES, params={"limit": 1, "purpose": "batch"}).json()["data"] == [made]
    assert server.client.delete(f"{FILES}/{made['id']}").json() == {"id": made["id"], "object": "file", "deleted": True}
    for url in (f"{FILES}/{made['id']}", f"{FILES}/{made['id']}/content"):
        assert server.client.get(url).status_code == 404
    assert server.client.delete(f"{FILES}/{made['id']}").status_code == 404


@pytest.mark.parametrize(
    "name", ["../../../../etc/passwd", "..%2f..%2fetc%2fpasswd", "/etc/passwd", "", ".", "\0", "%c3%a9"]
)
def test_a_name_is_no_path(server: Served, name: str) -> None:
    made = upload(server.client, b"x", files={"file": (name or "x", b"x")}).json()
    assert server.client.get(f"{FILES}/{made['id']}/content").content == b"x"
    for url in (f"{FILES}/{name}", f"{FILES}/{name}/content", f"{BATCHES}/{name}"):
        response = server.client.get(
            httpx.URL(server.client.base_url).copy_with(raw_path=url.encode().replace(b"\0", b"%00"))
        )
        assert response.status_code in (200, 404) and (response.status_code == 404 or "data" in response.json())
    batch = {"input_file_id": name, "endpoint": CHAT, "completion_window": "24h"}
    assert server.post(BATCHES, **batch).status_code == 404


@pytest.mark.parametrize(
    ("more", "status", "says"),
    [
        ({"data": {"purpose": "fine-tune"}}, 400, "purpose"),
        ({"data": {}}, 400, "purpose"),
        ({"files": {"other": ("a", b"x")}}, 400, "file"),
        ({"files": [("file", ("a", b"x")), ("file", ("b", b"x"))]}, 400, "more than one"),
        ({"data": {"purpose": "x" * 5000}}, 400, "4096"),
        ({"data": {f"f{i}": "x" for i in range(40)}}, 400, "16 parts"),
    ],
)
def test_forms_that_are_refused(server: Served, more: Any, status: int, says: str) -> None:
    before = server.client.get(FILES).json()["data"]
    response = upload(server.client, b"x", **more)
    assert response.status_code == status and says in response.json()["error"]["message"]
    assert server.client.get(FILES).json()["data"] == before


@pytest.mark.parametrize(
    "kind", ["application/json", "text/plain", "multipart/form-data", "multipart/mixed; boundary=a"]
)
def test_only_forms_are_heard(server: Served, kind: str) -> None:
    assert server.client.post(FILES, content=b"--a--", headers={"content-type": kind}).status_code == 415


def test_a_page_of_another_origin_brings_no_file(server: Served) -> None:
    """A browser sends a form to any address without asking, and says from where."""
    response = upload(server.client, b"x", headers={"origin": "http://evil.example"})
    assert response.status_code == 403


def test_a_file_that_does_not_come(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.2)
    head = f"POST {FILES} HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=a\r\n".encode()
    begun = b'--a\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    assert b" 408 " in server.begun(head + b"Content-Length: 1000\r\n\r\n" + begun)


def test_files_have_bounds(tmp_path: Path) -> None:
    kept = Files(tmp_path, Limits(file_bytes=100, key_files=3, key_bytes=150))

    def bring(n: int, owner: str = OWNER) -> None:
        with kept.upload(owner) as coming:
            coming.write(b"x" * n)
            kept.keep(owner, coming, "x", "batch")

    with pytest.raises(ApiError, match="larger"):
        bring(101)
    bring(100)
    with pytest.raises(ApiError, match="larger"):
        bring(51)
    bring(25)
    bring(25)
    with pytest.raises(ApiError, match="delete some"):
        bring(1)
    bring(100, OTHER)
    assert len(Files(tmp_path, Limits()).all(OWNER)) == 3
    assert sorted(path.suffix for path in tmp_path.glob(f"{OWNER}/*")) == [".data"] * 3 + [".json"] * 3


def test_uploads_at_once_have_the_same_bounds(tmp_path: Path) -> None:
    kept = Files(tmp_path, Limits(file_bytes=100, key_files=3, key_bytes=150))
    with kept.upload(OWNER) as one, kept.upload(OWNER) as two, kept.upload(OWNER) as three, kept.upload(OWNER) as four:
        for coming, n in ((one, 100), (two, 51), (three, 25), (four, 25)):
            coming.write(b"x" * n)
        with pytest.raises(ApiError, match="already"), kept.upload(OWNER):
            pass
        with kept.upload(OTHER) as theirs:
            kept.keep(OTHER, theirs, "x", "batch")
        kept.keep(OWNER, one, "x", "batch")
        with pytest.raises(ApiError, match="larger"):
            kept.keep(OWNER, two, "x", "batch")
        kept.keep(OWNER, three, "x", "batch")
        kept.keep(OWNER, four, "x", "batch")
    with pytest.raises(ApiError, match="delete some"), kept.upload(OWNER):
        pass
    assert sum(path.stat().st_size for path in tmp_path.glob(f"{OWNER}/*.data")) == 150


def test_the_newest_is_first_within_a_second_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 1e9)
    kept = Files(tmp_path)
    made = []
    for _ in range(8):
        with kept.upload(OWNER) as coming:
            made.append(kept.keep(OWNER, coming, "x", "batch"))
    assert kept.all(OWNER) == made[::-1]


def test_what_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    theirs, ours = tmp_path / "Downloads", tmp_path / OWNER
    for folder in (theirs, ours):
        (folder / "folder.part").mkdir(parents=True)
        (folder / "film.part").write_text("half")
    Files(tmp_path)
    assert {p.name for p in theirs.iterdir()} == {"folder.part", "film.part"}
    assert {p.name for p in ours.iterdir()} == {"folder.part"}


def test_content_that_is_not_listed_takes_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Files(tmp_path)
    with kept.upload(OWNER) as coming:
        whole = kept.keep(OWNER, coming, "x", "batch")
    unlisted, result = tmp_path / OWNER / f"file-{'0' * 24}.data", tmp_path / OWNER / f"file-{'0' * 24}-output.data"
    for path in (unlisted, result):  # a result's batch goes on with it
        path.write_text("killed before it was listed")
    assert Files(tmp_path).all(OWNER) == [whole]
    assert not unlisted.exists() and result.exists()

    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "no room")

    monkeypatch.setattr(files, "write_whole", full)
    with pytest.raises(OSError, match="no room"), kept.upload(OWNER) as coming:
        kept.keep(OWNER, coming, "y", "batch")
    assert sorted(path.name for path in (tmp_path / OWNER).iterdir()) == sorted(
        [f"{whole.id}.data", f"{whole.id}.json", result.name]
    )


def test_a_folder_has_one_server(tmp_path: Path) -> None:
    with (
        files.opened(tmp_path / "kept", Limits()),
        pytest.raises(CliError, match="another server"),
        files.opened(tmp_path / "kept", Limits()),
    ):
        pass
    with files.opened(tmp_path / "kept", Limits()):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(CliError, match="file"), files.opened(tmp_path / "file", Limits()):
        pass


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_a_form_in_any_pieces(size: int) -> None:
    data = b"\r\n--b\r--bb\r\n--bo\r\n" * 3
    form = b"".join(
        [
            b'--bound\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n',
            b'--bound\r\nContent-Disposition: form-data; name="file"; filename="a;b.jsonl"\r\n',
            b"Content-Type: x/y\r\n\r\n" + data + b"\r\n--bound--\r\n",
        ]
    )
    got: list[bytes] = []

    async def pieces(whole: bytes) -> AsyncIterator[bytes]:
        for i in range(0, len(whole), size):
            yield whole[i : i + size]

    found = asyncio.run(read_form(pieces(form), boundary_of('multipart/form-data; boundary="bound"'), got.append))
    assert b"".join(got) == data and found.fields == {"purpose": "batch"} and found.filename == "a;b.jsonl"
    for n in range(len(form) - len(b"--\r\n")):
        with pytest.raises(ApiError):
            asyncio.run(read_form(pieces(form[:n]), b"bound", lambda piece: None))


# Batches.


def test_a_batch_is_answered(server: Served) -> None:
    lines = [one for one in short(12) if one["url"] == TEXT]
    lines.append(line(99, TEXT, prompt=[-1]))
    made = begin(server.client, lines, TEXT, metadata={"of": "mine"})
    assert made["object"] == "batch" and made["status"] in ("validating", "in_progress", "finalizing", "completed")
    batch = ended(server.client, made["id"])
    assert batch["status"] == "completed" and batch["request_counts"] == {"total": 7, "completed": 6, "failed": 1}
    assert (
        batch["metadata"] == {"of": "mine"} and batch["completed_at"] >= batch["in_progress_at"] >= batch["created_at"]
    )
    found = texts(content(server.client, batch["output_file_id"]))
    assert found == {
        one["custom_id"]: server.asked(TEXT, **one["body"])["choices"][0]["text"]
        for one in lines
        if one["custom_id"] != "r99"
    }
    [failed] = content(server.client, batch["error_file_id"])
    assert failed["custom_id"] == "r99" and failed["response"]["status_code"] == 400
    told = server.client.get(f"{FILES}/{batch['output_file_id']}").json()
    assert told["purpose"] == "batch_output"
    assert server.client.get(BATCHES, params={"limit": 1}).json()["data"][0]["id"] == made["id"]
    assert server.client.post(f"{BATCHES}/{made['id']}/cancel").status_code == 409


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([line(1, TEXT, prompt="a"), "nonsense", line(1, TEXT, prompt="b")], ["no JSON", "line 1 too"]),
        ([line(1)], ["url"]),
        ([], ["no line"]),
    ],
)
def test_a_batch_that_cannot_be_read(server: Served, lines: list[Any], says: list[str]) -> None:
    batch = ended(server.client, begin(server.client, lines, TEXT)["id"])
    assert batch["status"] == "failed" and batch["output_file_id"] is None
    errors = batch["errors"]["data"]
    assert len(errors) == len(says) and all(text in error["message"] for text, error in zip(says, errors, strict=True))


def test_the_newest_batch_is_first_within_a_second_too(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 4e9)
    made = [begin(server.client, short(1), CHAT)["id"] for _ in range(4)]
    assert [one["id"] for one in server.client.get(BATCHES).json()["data"]][:4] == made[::-1]


@pytest.mark.parametrize(
    ("asked", "status", "says"),
    [
        ({}, 400, "input_file_id"),
        ({"input_file_id": "file-none", "endpoint": CHAT}, 404, "file-none"),
        ({"endpoint": "/v1/embeddings"}, 400, "endpoint"),
        ({"endpoint": CHAT, "metadata": {"a": 5}}, 400, "metadata"),
        ({"endpoint": CHAT, "completion_window": 3}, 400, "completion_window"),
    ],
)
def test_batches_that_are_refused(server: Served, asked: dict[str, Any], status: int, says: str) -> None:
    mine = upload(server.client, b"x").json()["id"]
    response = server.post(BATCHES, **({"input_file_id": mine} if asked else {}) | asked)
    assert response.status_code == status and says in response.json()["error"]["message"]


def test_each_key_has_its_own(path: Path) -> None:
    with served(path, rules=rules_of("127.0.0.1", ["one", "two"], [], [])) as server:
        one, two = (
            httpx.Client(base_url=server.client.base_url, headers={"authorization": f"Bearer {key}"}, timeout=SECONDS)
            for key in ("one", "two")
        )
        assert upload(server.client, b"x").status_code == 401
        batch = ended(one, begin(one, short(1), CHAT)["id"])
        assert batch["status"] == "completed"
        for name in (batch["input_file_id"], batch["output_file_id"]):
            assert one.get(f"{FILES}/{name}/content").status_code == 200
            assert two.get(f"{FILES}/{name}/content").status_code == two.delete(f"{FILES}/{name}").status_code == 404
        assert two.get(FILES).json()["data"] == two.get(BATCHES).json()["data"] == []
        assert two.get(f"{BATCHES}/{batch['id']}").status_code == 404
        asked = {"input_file_id": batch["input_file_id"], "endpoint": CHAT, "completion_window": "24h"}
        assert two.post(BATCHES, json=asked).status_code == 404


def test_a_batch_is_cancelled(path: Path, tmp_path: Path) -> None:
    with served(path, files=tmp_path / "kept") as server:
        first = begin(server.client, MANY, TEXT)
        waits = begin(server.client, short(1), CHAT)
        assert server.client.delete(f"{FILES}/{first['input_file_id']}").status_code == 409
        ended(server.client, first["id"], lambda batch: batch["request_counts"]["completed"] > 0)
        assert server.client.post(f"{BATCHES}/{waits['id']}/cancel").json()["status"] == "cancelled"
        assert server.client.post(f"{BATCHES}/{first['id']}/cancel").json()["status"] == "cancelling"
        batch = ended(server.client, first["id"])
        assert batch["status"] == "cancelled" and batch["cancelled_at"]
        found = content(server.client, batch["output_file_id"])
        assert 0 < len(found) == batch["request_counts"]["completed"] < len(MANY)
        assert all(one["response"]["body"]["usage"]["completion_tokens"] == 400 for one in found)
        assert ended(server.client, begin(server.client, short(1), CHAT)["id"])["status"] == "completed"
        assert server.client.delete(f"{FILES}/{first['input_file_id']}").status_code == 200


def test_a_batch_goes_on_after_a_restart(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [line(i, TEXT, prompt=f"{i}", max_tokens=40, temperature=0) for i in range(40)]
    usual = Desk.answer

    async def halfway(self: Desk, url: str, body: bytes, seed: int) -> Any:
        """The later ones wait until they are cut off."""
        if int(json.loads(body)["prompt"]) >= 20:
            await asyncio.Event().wait()
        return await usual(self, url, body, seed)

    with monkeypatch.context() as patch, served(path, files=tmp_path / "kept") as server:
        patch.setattr(Desk, "answer", halfway)
        made = begin(server.client, lines, TEXT)
        ended(server.client, made["id"], lambda batch: batch["request_counts"]["completed"] > 2)
    [out] = (tmp_path / "kept").glob(f"*/{made['id']}.out")
    before = out.read_bytes()
    assert before.endswith(b"\n") and 2 < before.count(b"\n") < 40
    with served(path, files=tmp_path / "kept") as server:
        batch = ended(server.client, made["id"])
        assert batch["status"] == "completed" and batch["request_counts"]["completed"] == 40
        data = server.client.get(f"{FILES}/{batch['output_file_id']}/content").content
        assert data.startswith(before) and len(texts(content(server.client, batch["output_file_id"]))) == 40
        assert {p.suffix for p in out.parent.iterdir()} == {".data", ".json"}


def test_results_have_bounds_too(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [line(i, TEXT, prompt=f"{i}", **LONG) for i in range(40)]
    bounds = Limits(key_bytes=len(jsonl(lines)) + 12_000)
    monkeypatch.setattr(files, "Limits", lambda: bounds)
    with served(path, files=tmp_path / "kept") as server:
        batch = ended(server.client, begin(server.client, lines, TEXT)["id"])
        assert batch["status"] == "failed" and "delete some" in batch["errors"]["data"][0]["message"]
        found = texts(content(server.client, batch["output_file_id"]))
        assert 0 < len(found) == batch["request_counts"]["completed"] < 40
        asked = {"input_file_id": batch["input_file_id"], "endpoint": TEXT, "completion_window": "24h"}
        assert server.post(BATCHES, **asked).status_code == 413
        server.client.delete(f"{FILES}/{batch['output_file_id']}")
        assert ended(server.client, server.post(BATCHES, **asked).json()["id"])["request_counts"]["completed"] > 0


def test_a_batch_is_not_gone_on_with_by_another_model(path: Path, tmp_path: Path) -> None:
    with served(path, files=tmp_path / "kept") as server:
        made = begin(server.client, MANY, TEXT)
        ended(server.client, made["id"], lambda batch: batch["request_counts"]["completed"] > 0)
    other = write_model(tmp_path / "other.gguf", spec_named("v3"), V25_TEMPLATE)
    with served(other, files=tmp_path / "kept") as server:
        batch = ended(server.client, made["id"])
        assert batch["status"] == "failed" and "the model" in batch["errors"]["data"][0]["message"]
        assert content(server.client, batch["output_file_id"])  # what was answered is there
        assert str(tmp_path) not in json.dumps(batch)


def test_batches_wait_for_those_who_wait(path: Path) -> None:
    """While anybody is answered no line of a batch is in a step; afterwards it goes on as if nothing had been."""
    settings = dataclasses.replace(USUAL, parallel=2, n_ctx=1024)
    lines = [line(i, TEXT, prompt=f"the ant {i}", seed=i, max_tokens=400) for i in range(6)]
    with served(path, settings) as server:
        batch = ended(server.client, begin(server.client, lines, TEXT)["id"])
        alone = texts(content(server.client, batch["output_file_id"]))
        engine = server.engine
        steps: list[tuple[int, int]] = []  # (answers that somebody waits for, lines of a batch)
        usual = engine._scheduler._evaluate

        is_midway, are_there = threading.Event(), threading.Event()

        def noted(shares: list[Any], n_logits: list[int]) -> Any:
            background = [ticket.asked.background for ticket, _ in engine._tickets.values()]
            steps.append((background.count(False), background.count(True)))
            if len(steps) == 600:  # of 1200
                is_midway.set()
                are_there.wait(SECONDS)
            return usual(shares, n_logits)

        engine._scheduler._evaluate = noted
        made = begin(server.client, lines, TEXT)
        ended(server.client, made["id"], lambda batch: batch["request_counts"]["completed"] >= 1)
        assert is_midway.wait(SECONDS)
        with ThreadPoolExecutor(3) as pool:
            asked = {"prompt": "Hi", "max_tokens": 60, "temperature": 0}
            asking = [pool.submit(server.asked, TEXT, **asked) for _ in range(3)]
            wait_until(lambda: engine.n_waiting == 3)
            are_there.set()
            answered = [one.result() for one in asking]
        assert len({one["choices"][0]["text"] for one in answered}) == 1
        assert sum(waited for waited, _ in steps) >= 3 * 60
        assert not [step for step in steps if step[0] and step[1]]
        batch = ended(server.client, made["id"])
        assert batch["request_counts"]["completed"] == 6
        assert steps[-1][1]
        again = texts(content(server.client, batch["output_file_id"]))
        assert again.keys() == alone.keys()
        assert np.mean([again[name] == alone[name] for name in alone]) > 0.5  # seeds are the lines' own
