"""llama-server's slots: numbers, and what they have read saved, restored and erased."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support.cli import wait_until
from support.serving import ENDLESS, USUAL, Served, served
from support.tiny import spec_named, variant
from support.vocab import write_model

import cext
from dsv2cli.commands.serve import rules_of
from dsv2cli.server.dialects import slots

PROMPT = [int(i) % 256 for i in range(7, 150)]
BODY: dict[str, Any] = {"prompt": PROMPT, "n_predict": 8, "temperature": 0}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = variant(spec_named("lite"), n_ctx=4096)
    return write_model(tmp_path_factory.mktemp("slots") / "tiny.gguf", spec, endless=True)


@pytest.fixture
def server(path: Path, tmp_path: Path) -> Iterator[Served]:
    with served(path, dataclasses.replace(USUAL, slot_folder=tmp_path)) as running:
        yield running


def act(server: Served, slot: int, action: str, filename: str | None = None, **headers: str) -> Any:
    body = {} if filename is None else {"filename": filename}
    return server.client.post(f"/slots/{slot}?action={action}", json=body, headers=headers)


def test_saved_and_restored(server: Served, path: Path, tmp_path: Path) -> None:
    answer = server.asked("/completion", **BODY, id_slot=1, n_probs=4)
    assert answer["id_slot"] == 1
    saved = act(server, 1, "save", "one.bin").json()
    assert saved["n_saved"] == len(PROMPT) + 7 and saved["n_written"] == (tmp_path / "one.bin").stat().st_size
    assert saved["id_slot"] == 1 and saved["filename"] == "one.bin" and saved["timings"]["save_ms"] > 0
    again = server.asked("/completion", **BODY, n_probs=4)
    with served(path, dataclasses.replace(USUAL, slot_folder=tmp_path)) as other:
        restored = act(other, 3, "restore", "one.bin").json()
        assert restored["n_restored"] == saved["n_saved"] and restored["n_read"] == saved["n_written"]
        resumed = other.asked("/completion", **BODY, id_slot=3, n_probs=4)
    assert resumed["timings"]["cache_n"] == len(PROMPT) - 1 == again["timings"]["cache_n"]
    assert resumed["completion_probabilities"] == again["completion_probabilities"]


def test_erased(server: Served) -> None:
    server.asked("/completion", **BODY, id_slot=2)
    assert server.asked("/completion", **BODY, id_slot=2)["timings"]["cache_n"] == len(PROMPT) - 1
    assert act(server, 2, "erase").json() == {"id_slot": 2, "n_erased": len(PROMPT) + 7}
    assert server.asked("/completion", **BODY, id_slot=2)["timings"]["cache_n"] == 0
    assert server.client.post("/slots/0?action=erase").json() == {"id_slot": 0, "n_erased": 0}  # no body at all


def test_numbers_of_those_that_run_together(path: Path) -> None:
    with served(path, ENDLESS) as server, ThreadPoolExecutor(4) as pool:
        asked = BODY | {"n_predict": 99_000}
        jobs = [pool.submit(server.asked, "/completion", **asked, id_slot=i) for i in (3, 3, -1, 99)]
        wait_until(lambda: server.engine.n_running == 4)
        running = [line for line in server.client.get("/slots").json() if line["is_processing"]]
        assert sorted(line["id"] for line in running) == [0, 1, 2, 3]
        for sequence in server.engine.running():
            sequence.cancel()
        assert sorted(job.result()["id_slot"] for job in jobs) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x", "a/b", "/etc/x", ".hidden", "a\\b", "a b", "a\0b", "ä", "a" * 129, "a\n", "~", "C:x"],
)
def test_names_that_are_none(server: Served, name: str) -> None:
    server.asked("/completion", **BODY, id_slot=0)
    for action in ("save", "restore"):
        response = act(server, 0, action, name)
        assert response.status_code == 400 and response.json()["error"]["param"] == "filename", response.text


def test_what_is_refused(server: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert act(server, 0, "save", "x").status_code == 400  # nothing has been read
    server.asked("/completion", **BODY, id_slot=0)
    (tmp_path / "letter").write_bytes(b"Dear reader")
    (tmp_path / "folder").mkdir()
    for response in (
        act(server, 0, "save", "folder"),
        act(server, 0, "restore", "folder"),
        act(server, 0, "save", "letter"),  # no file of the owner's is overwritten
        act(server, 0, "restore", "letter"),
        act(server, 0, "restore", "missing"),
        act(server, 0, "copy", "x"),
        act(server, 4, "save", "x"),
        server.client.post("/slots/-1?action=erase", json={}),
        server.client.post("/slots/1e9?action=erase", json={}),
        server.client.post("/slots/0", json={}),
        server.client.post("/slots/0?action=save", json={"filename": 7}),
    ):
        assert response.status_code == 400 and response.json()["error"]["message"], response.text
        assert str(tmp_path) not in response.text
    assert (tmp_path / "letter").read_bytes() == b"Dear reader"
    (tmp_path / "folder").rmdir()
    monkeypatch.setattr(slots, "MAX_FILES", 2)
    assert act(server, 0, "save", "first").status_code == 200
    assert act(server, 0, "save", "second").status_code == 400
    assert act(server, 0, "save", "first").status_code == 200  # one that is there is replaced


def test_what_killed_servers_left_half_written(server: Served, tmp_path: Path) -> None:
    server.asked("/completion", **BODY, id_slot=0)
    assert act(server, 0, "save", "one.bin").status_code == 200
    whole = (tmp_path / "one.bin").read_bytes()
    kept = {".one.bin.0123abcd": whole[:99], ".letter.0123abcd": b"Dear reader", ".one.bin": whole}  # one is new
    left = {".one.bin.89abcdef": whole[:99], ".two.89abcdef": b""}
    for name, content in (kept | left).items():
        (tmp_path / name).write_bytes(content)
        if name != ".one.bin.0123abcd":
            os.utime(tmp_path / name, (1, 1))
    assert act(server, 0, "save", "one.bin").status_code == 200
    assert {file.name for file in tmp_path.iterdir()} == {"one.bin", *kept}


def test_files_of_another_type_and_damaged_ones(server: Served, path: Path, tmp_path: Path) -> None:
    with cext.Model(path, threads=1) as model:
        session = model.session(512, "f16")
        session.eval(PROMPT)
        session.save(tmp_path / "f16")
        longer = model.session(2048, "f32")
        longer.eval(PROMPT * 5)
        longer.save(tmp_path / "long")
    (tmp_path / "short").write_bytes((tmp_path / "long").read_bytes()[:-1])
    for name in ("f16", "long", "short"):
        response = act(server, 0, "restore", name)
        assert response.status_code == 400 and str(tmp_path) not in response.text, response.text


def test_off_unless_asked_for(path: Path) -> None:
    with served(path) as server:
        response = act(server, 0, "save", "x")
        assert response.status_code == 501 and response.json()["error"]["type"] == "not_supported_error"
        assert "--slot-save-path" in response.json()["error"]["message"]


def test_a_name_leads_to_nobody_else_s(path: Path, tmp_path: Path) -> None:
    rules = rules_of("127.0.0.1", ["sesame", "mustard"], [], [])
    with served(path, dataclasses.replace(USUAL, slot_folder=tmp_path), rules) as server:
        mine, theirs = ({"authorization": f"Bearer {key}"} for key in ("sesame", "mustard"))
        assert server.client.post("/completion", json=BODY | {"id_slot": 0}, headers=mine).status_code == 200
        assert act(server, 0, "save", "x", **theirs).status_code == 400
        assert act(server, 0, "erase", **theirs).json()["n_erased"] == 0
        assert act(server, 0, "save", "x", **mine).status_code == 200
        assert act(server, 0, "restore", "x", **theirs).status_code == 400
        assert act(server, 0, "restore", "x", **mine).status_code == 200
