"""dsv2 batch over a Ray cluster of this machine's own: pip install '.[ray]', pytest -m heavy."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from support.batches import answers, save, short
from support.inprocess import run
from support.serving import USUAL
from support.tiny import spec_named, variant
from support.vocab import V25_TEMPLATE, write_model

from dsv2cli.batch import runner
from dsv2cli.batch.ledger import Ledger
from dsv2cli.batch.lines import check, numbered
from dsv2cli.runtime import Wishes
from dsv2cli.server import cluster
from dsv2cli.server.desk import JOBS

pytestmark = pytest.mark.heavy
ray: Any = pytest.importorskip("ray")
OPTIONS = ("-c", "512", "--kv", "f32", "-t", "1", "-q", "--deterministic")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = variant(spec_named("lite"), n_ctx=4096)
    return write_model(tmp_path_factory.mktemp("ray") / "tiny.gguf", spec, V25_TEMPLATE, endless=True)


def test_a_cluster_gives_the_same_answers(path: Path, tmp_path: Path) -> None:
    given = save(tmp_path / "in.jsonl", [*short(20, temperature=1.0), "no line"])
    args = ["batch", given, path, *OPTIONS, "--skip-bad"]
    assert run(*args, "-o", tmp_path / "here").code == 1
    ran = run(*args, "-o", tmp_path / "there", "--ray", "local", "--ray-actors", "2")
    assert ran.code == 1 and "1 line of 21 failed" in ran.told, ran.told
    assert answers(tmp_path / "there") == answers(tmp_path / "here")
    assert (tmp_path / "there.batch.json").read_bytes() == (tmp_path / "here.batch.json").read_bytes()


def test_no_cluster(path: Path, tmp_path: Path) -> None:
    given = save(tmp_path / "in.jsonl", short(1))
    ran = run("batch", given, path, "-o", tmp_path / "out", *OPTIONS, "--ray", "127.0.0.1:1")
    assert ran.code == 1 and "no Ray cluster at" in ran.told


def pid_when_there(actor: Any) -> int:
    """The other actor may have answered all that was left before this one is back."""
    while True:
        with contextlib.suppress(ray.exceptions.RayActorError):
            return int(ray.get(actor.about.remote())[2])
        time.sleep(0.05)


def test_an_actor_is_killed(path: Path, tmp_path: Path) -> None:
    """Of two, in the middle: every line is answered once all the same."""
    lines, _ = check(numbered(save(tmp_path / "in.jsonl", short(60, max_tokens=100)).read_bytes()), JOBS)
    killed: list[int] = []
    with (
        cluster.there("local", 2, (path, 1, USUAL, Wishes(told=False))) as answerer,
        Ledger(tmp_path / "out", tmp_path / "errors", {}) as ledger,
    ):
        spread = answerer.desk
        assert isinstance(spread, cluster.Spread)
        [(_, _, victim), (_, _, other)] = ray.get([actor.about.remote() for actor in spread.actors])
        assert victim != other

        def told() -> None:
            if len(ledger.done) == 10:
                assert spread.under_way[0] > 0
                os.kill(victim, signal.SIGKILL)
                killed.append(victim)

        ledger.begin()
        asyncio.run(runner.run(spread, lines, ledger, at_once=answerer.n_parallel * 2, told=told))
        assert killed and ledger.n_failed == 0
        assert victim not in [pid_when_there(actor) for actor in spread.actors]
    assert len(answers(tmp_path / "out")) == 60
