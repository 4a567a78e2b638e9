"""Shared fixtures. Helper modules live in tests/support and tests/ref: ``from support import tiny``.

A file's tests run one after another, in as many processes as there are cores (pytest-xdist, ``-n``): 0 runs all in one,
for a debugger and to see what they print (-s).
"""

import fcntl
import os
import random
import secrets
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.hub import Hub, serve
from support.tiny import Spec, write_gguf

TESTS = Path(__file__).parent
MOST = 8  # processes: tests have threads of their own, and hundreds of megabytes of modules and models


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    return min(os.cpu_count() or 1, MOST)


@pytest.fixture(scope="module", autouse=True)
def alone_on_a_gpu(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Of files that measure a device's memory, one at a time."""
    if not request.path.name.startswith(("test_vulkan_", "test_gpu")):
        yield
        return
    with (tmp_path_factory.getbasetemp().parent / "gpu.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session", autouse=True)
def hears_ctrl_c() -> None:
    """As what runs in a terminal does; pytest-xdist's processes, like a shell's background job, begin without."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def state_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the program remembers things of itself: not the person's own, which a run neither changes nor sees."""
    folder = tmp_path_factory.mktemp("state")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(folder))
        yield folder


@pytest.fixture(autouse=True)
def same_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is drawn without a seed is the same in every run of a test, as in the processes of support.cli."""
    monkeypatch.setattr(secrets, "randbits", random.Random(1).getrandbits)


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A hub on this machine, empty."""
    with serve() as served:
        yield served


@pytest.fixture
def env(hub: Hub, tmp_path: Path) -> dict[str, str]:
    """What makes a command ask that hub, with a cache of the test's own."""
    return {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf")}


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of models, texts and vocabularies beside the repository; the test is skipped where it is absent."""
    folder = TESTS.parent.parent / "shared"
    if not folder.is_dir():
        pytest.skip("needs the ../shared folder of models and texts")
    return folder


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory):
    """``tiny_gguf(spec, legacy=False)``: the path of a spec's f32 GGUF, written once a session."""
    folder = tmp_path_factory.mktemp("tiny")
    written: dict[tuple[Spec, bool], Path] = {}

    def path(spec: Spec, legacy: bool = False) -> Path:
        if (spec, legacy) not in written:
            written[spec, legacy] = write_gguf(folder / f"{spec.name}-{len(written)}.gguf", spec, legacy=legacy)
        return written[spec, legacy]

    return path
