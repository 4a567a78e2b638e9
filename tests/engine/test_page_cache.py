"""Within a budget a model's file leaves next to nothing in the system's page cache, however it is read."""

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from support.page_cache import cached_bytes
from support.tiny import Spec, tokens, variant

from cext import Model

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mincore and the shim are Linux's")
SPEC = Spec("cached", seed=12, n_layer=4, n_embd=256, n_ff_expert=512, n_expert=32, n_used=4)
SMALL = 2 << 20  # the header, and what else the mapping is asked for

SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
/* A file system without reads past the cache: REFUSES "open" says so at once, "read" when it is read. */
static int refuses(const char *when) {
    const char *said = getenv("REFUSES");
    return said && !strcmp(said, when);
}
int fcntl64(int fd, int command, ...) {
    int (*real)(int, int, ...) = (int (*)(int, int, ...))dlsym(RTLD_NEXT, "fcntl64");
    va_list rest;
    va_start(rest, command);
    void *arg = va_arg(rest, void *);
    va_end(rest);
    if (command == F_SETFL && ((long)arg & O_DIRECT) && refuses("open")) return errno = EINVAL, -1;
    return real(fd, command, arg);
}
int fcntl(int fd, int command, ...) {
    va_list rest;
    va_start(rest, command);
    void *arg = va_arg(rest, void *);
    va_end(rest);
    return fcntl64(fd, command, arg);
}
ssize_t pread64(int fd, void *to, size_t n, off_t at) {
    ssize_t (*real)(int, void *, size_t, off_t) = (ssize_t (*)(int, void *, size_t, off_t))dlsym(RTLD_NEXT, "pread64");
    if (refuses("read") && (fcntl64(fd, F_GETFL, 0) & O_DIRECT)) return errno = EINVAL, -1;
    return real(fd, to, n, at);
}
ssize_t pread(int fd, void *to, size_t n, off_t at) { return pread64(fd, to, n, at); }
"""

RUN = """
    import sys
    import cext
    from support.page_cache import cached_bytes
    path, ram, ids = sys.argv[1], int(sys.argv[2]), eval(sys.argv[3])
    with cext.Model(path, threads=2, ram=ram) as model:
        session = model.session(256)
        session.eval(ids[:100])
        for token in ids[100:]:
            session.eval([token])
        print(cached_bytes(path), len(model.notes))
    print(cached_bytes(path))
"""


@pytest.fixture(scope="module")
def refusing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("refusing")
    (folder / "shim.c").write_text(SHIM)
    command = ["cc", "-shared", "-fPIC", "-o", folder / "shim.so", folder / "shim.c", "-ldl"]
    if subprocess.run(command, check=False).returncode:
        pytest.skip("no C compiler")
    return folder / "shim.so"


def cold(path: Path) -> None:
    """On the disk, and not in the cache; or skip where the file system keeps it there."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if cached_bytes(path) > SMALL:
        pytest.skip("this file system keeps files in memory")


@pytest.mark.parametrize("refuses", ["", "open", "read"])
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "in the cache before"])
def test_a_budget_leaves_the_page_cache_alone(
    tiny_gguf: Callable[[Spec], Path], refusing: Path, refuses: str, warm: bool
) -> None:
    path = tiny_gguf(SPEC)
    cold(path)
    with Model(path) as model:
        needs = model.needs()
        if warm and not any(path.read_bytes() and cached_bytes(path) > needs.all // 2 for _ in range(5)):
            pytest.skip("this system keeps nothing in memory")
    ram = needs.least + needs.slots // 3
    here = Path(__file__).resolve().parents[1]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(here)]), "REFUSES": refuses}
    env |= {"LD_PRELOAD": f"{os.environ.get('LD_PRELOAD', '')} {refusing}"}  # a sanitizer comes first
    ids = [int(i) for i in tokens(SPEC, 160)]
    command = [sys.executable, "-P", "-c", textwrap.dedent(RUN), str(path), str(ram), str(ids)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    during, n_notes, after = map(int, done.stdout.split())
    assert (n_notes > 0) == bool(refuses)
    assert during <= SMALL and after <= SMALL, (during, after, needs.all)


def test_the_mapping_is_what_fills_the_cache(tiny_gguf: Callable[[Spec], Path]) -> None:
    """What the test above would see without a budget."""
    path = tiny_gguf(variant(SPEC, name="cached_mapped"))
    cold(path)
    with Model(path, threads=2) as model:
        session = model.session(128)
        for _ in range(5):  # the system may take back what has not been used for a while
            session.rewind(0)
            session.eval(tokens(SPEC, 100))
            if cached_bytes(path) > model.nbytes // 2:
                return
    raise AssertionError("the weights are not in the cache")
