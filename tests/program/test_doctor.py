"""dsv2 doctor on machines that lack something: what it says, and its exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
from support.cli import environment
from support.hub import serve
from support.inprocess import Ran, run

from cext.system import cpu_quota, memory_limit
from dsv2cli import health
from dsv2cli.hub import cache

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def env(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    root = tmp_path / "hub"
    monkeypatch.setattr(cache, "cache_root", lambda: root)
    return {"XDG_STATE_HOME": str(tmp_path / "state"), "HOME": str(tmp_path)}


def findings(ran: Ran) -> dict[str, dict[str, str]]:
    return {one["name"]: one for one in json.loads(ran.out)["findings"]}


def test_a_machine_that_is_well(env: dict[str, str | None]) -> None:
    ran = run("doctor", "--json", env=env)
    found = findings(ran)
    assert ran.code == 0 and json.loads(ran.out)["broken"] == 0, ran.out
    assert {"python", "engine", "instructions", "cores", "memory", "settings", "llama.cpp", "left over"} <= found.keys()
    assert not [one for one in found.values() if one["state"] == "note" and not one["hint"]]
    shown = run("doctor", env=env)
    assert shown.code == 0 and b"BROKEN" not in shown.out and b"engine" in shown.out


def words(text: str) -> list[str]:
    return text.split()


@pytest.mark.parametrize("columns", [30, 40])
def test_lines_break_between_words_of_a_narrow_terminal(env: dict[str, str | None], columns: int) -> None:
    """Below the first word of a finding; nothing is lost, and only words that are wider are the terminal's to break."""
    narrow = {"COLUMNS": str(columns), "TERM": "xterm", "NO_COLOR": "1"}
    shown = run("doctor", terminal=True, env=env | narrow).out.decode()
    found = findings(run("doctor", "--json", env=env))
    for line in shown.splitlines():
        assert len(line) <= columns or len(words(line)) == 1, line
        assert line[:8].strip() in ("ok", "note", "BROKEN", ""), line
    for name, one in found.items():
        told = words(f"{name} {one['text']}" + (f" -> {one['hint']}" if one["hint"] else ""))
        if "measured" not in told and name != "memory":  # what is free changes
            assert " ".join(told) in " ".join(words(shown)), name


def test_no_compiler_is_no_fault_of_what_is_installed(env: dict[str, str | None], tmp_path: Path) -> None:
    ran = run("doctor", "--json", env=env | {"PATH": str(tmp_path / "nothing")})
    assert ran.code == 0
    told = findings(ran)["compilers"]
    assert told["state"] == "note" and "no cc and no c++" in told["text"] and "from source" in told["hint"]


def test_a_full_disk_is(env: dict[str, str | None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: Usage(10**12, 10**12, 1 << 20))
    ran = run("doctor", env=env)
    assert ran.code == 1 and b"BROKEN  disk of models" in ran.out and b"HF_HOME" in ran.out
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: Usage(10**12, 10**12, 1 << 30))
    assert run("doctor", env=env).code == 0  # tight, which it notes


def test_a_folder_that_cannot_be_written(env: dict[str, str | None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health.os, "access", lambda path, mode: False)
    ran = run("doctor", "--json", env=env)
    assert ran.code == 1 and "cannot be written" in findings(ran)["disk of state"]["text"]


def test_a_stale_cache_is_told_with_its_size(env: dict[str, str | None], tmp_path: Path) -> None:
    blobs = tmp_path / "hub" / "models--owner--some--name" / "blobs"
    blobs.mkdir(parents=True)
    for name in ("old", "new"):
        (blobs / f"{name}{cache.PARTIAL}").write_bytes(b"x" * 100_000)
    os.utime(blobs / f"old{cache.PARTIAL}", (0, 0))
    work = tmp_path / "here" / "lite-Q4_K_M.gguf.work"
    work.mkdir()
    (work / "identity.json").write_bytes(b"{}")
    ran = run("doctor", "--json", env=env)
    found = findings(ran)
    assert ran.code == 0
    told = found["partial downloads"]
    assert told["text"].startswith("1, ") and "owner/some--name" in told["text"] and "dsv2 rm" in told["hint"]
    assert "lite-Q4_K_M.gguf.work" in found["work folders"]["text"] and "left over" not in found


def limited(root: Path, **files: str) -> Path:
    """A machine of 16 GB in a container's cgroup."""
    texts = {
        "proc/meminfo": "MemTotal: 16000000 kB\nMemAvailable: 12000000 kB\nSwapFree: 0 kB\n",
        "proc/self/cgroup": "0::/box\n",
        **{f"sys/fs/cgroup/box/{name.replace('__', '.')}": text for name, text in files.items()},
    }
    for name, text in texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


def test_a_cgroup_s_limits(tmp_path: Path) -> None:
    root = limited(
        tmp_path, memory__max="2000000000\n", memory__current="1500000000\n", memory__stat="", cpu__max="50000 100000\n"
    )
    assert memory_limit(root) == 2_000_000_000 and cpu_quota(root) == 0.5
    told = {one.name: one for one in (*health.memory(root), *health.cores(root))}
    assert told["memory"].state == "note" and "500.00 MB" in told["memory"].text and "2.00 GB" in told["memory"].text
    assert told["cores"].state == "note" and "config set threads 1" in told["cores"].hint
    free = limited(tmp_path / "free", memory__max="max\n", cpu__max="max 100000\n")
    assert memory_limit(free) is None and cpu_quota(free) is None
    assert [one.state for one in health.memory(free)] == ["fine"]
    huge = limited(tmp_path / "huge", memory__max=f"{1 << 60}\n", cpu__max="garbage")
    assert memory_limit(huge) is None and cpu_quota(huge) is None


def test_an_older_cgroup_s_limits(tmp_path: Path) -> None:
    root = limited(tmp_path)
    (root / "proc/self/cgroup").write_text("4:cpu,cpuacct:/box\n3:memory:/box\n", encoding="utf-8")
    for name, text in (
        ("memory/box/memory.limit_in_bytes", "3000000000"),
        ("cpu/box/cpu.cfs_quota_us", "150000"),
        ("cpu/box/cpu.cfs_period_us", "100000"),
        ("cpu/cpu.cfs_quota_us", "-1"),
        ("cpu/cpu.cfs_period_us", "100000"),
    ):
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert memory_limit(root) == 3_000_000_000 and cpu_quota(root) == 1.5


def test_an_engine_that_is_missing_is_told_once(tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "class Gone:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'cext._engine': raise ModuleNotFoundError('no engine', name='cext._engine')\n"
        "sys.meta_path.insert(0, Gone())\n"
        "from dsv2cli.app import run\n"
        "sys.exit(run(['doctor', '--json']))"
    )
    env = environment(HF_HOME=str(tmp_path), XDG_STATE_HOME=str(tmp_path))
    command = [sys.executable, "-P", "-c", script]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 1, done.stderr
    told: list[dict[str, Any]] = json.loads(done.stdout)["findings"]
    broken = [one for one in told if one["state"] == "broken"]
    assert [one["name"] for one in broken] == ["engine"] and "pip install" in broken[0]["text"] + broken[0]["hint"]


def test_settings_and_variables_that_are_wrong_are_told(env: dict[str, str | None], tmp_path: Path) -> None:
    (tmp_path / "xdg" / "dsv2").mkdir(parents=True)
    (tmp_path / "xdg" / "dsv2" / "config.toml").write_text("kb = 1\n", encoding="utf-8")
    ran = run("doctor", "--json", env=env | {"XDG_CONFIG_HOME": str(tmp_path / "xdg"), "HF_TOKEN": "hf_\u00e4"})
    found = findings(ran)
    assert ran.code == 1 and json.loads(ran.out)["broken"] == 2
    assert "`kb`" in found["settings"]["text"] and "did you mean kv" in found["settings"]["hint"]
    assert "HF_TOKEN" in found["hub's settings"]["text"] and "hf_" not in found["hub's settings"]["text"]


def test_a_slower_instruction_set_is_noted(env: dict[str, str | None]) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-c", "from dsv2cli.app import main; main()", "doctor", "--json"],
        env=environment(DSV2_ISA="scalar", XDG_STATE_HOME=str(env["XDG_STATE_HOME"])),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    told = {one["name"]: one for one in json.loads(done.stdout)["findings"]}["instructions"]
    assert told["state"] == "note" and told["hint"] == "unset DSV2_ISA"


def test_the_hub_is_asked_only_if_it_is_to_be() -> None:
    command = [sys.executable, "-P", "-c", "from dsv2cli.app import main; main()", "doctor", "--json"]
    with serve() as hub:
        env = environment(HF_ENDPOINT=hub.url)
        subprocess.run(command, env=env, capture_output=True, check=False)
        assert not hub.requests
        done = subprocess.run([*command, "--online"], env=env, capture_output=True, text=True, check=False)
        assert hub.requests  # this small hub has no listing of models, which is an answer too
        assert {one["name"] for one in json.loads(done.stdout)["findings"]} >= {"hub"}
    done = subprocess.run([*command, "--online"], env=env, capture_output=True, text=True, check=False)
    told = {one["name"]: one for one in json.loads(done.stdout)["findings"]}["hub"]
    assert done.returncode == 1 and told["state"] == "broken" and "cannot reach" in told["text"]


def test_a_working_folder_that_cannot_be_written_is_no_fault(
    env: dict[str, str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health.os, "access", lambda path, mode: path != Path.cwd())
    ran = run("doctor", "--json", env=env)
    assert ran.code == 0 and findings(ran)["disk of this folder"]["state"] == "note"
