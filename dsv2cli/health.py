"""health.py: what of this machine and installation stands in the way, each with what helps."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dsv2cli.console import format_bytes

State = Literal["fine", "note", "broken"]
LEAST_PYTHON = (3, 11)
COMPILERS = (("cc", "gcc", "clang"), ("c++", "g++", "clang++"))
FULL_BYTES, TIGHT_BYTES = 64 << 20, 5 << 30  # of a disk: nothing goes on; a small model fills it
LITTLE_MEMORY = 1 << 30
STALE_SECONDS = 24 * 3600.0
ROOT = Path("/")
HERE = "this folder"
NEED_ENGINE = ("instructions", "cores", "memory", "GPU", "llama.cpp")
SHOWN = 4


@dataclass(frozen=True)
class Finding:
    """broken: something does not work; note: something is worth knowing."""

    name: str
    state: State
    text: str
    hint: str = ""


def check(root: Any, *, online: bool = False, system: Path = ROOT) -> list[Finding]:
    """Everything, in order. root: the command line, whose settings are read; system: where /proc and /sys lie."""
    checks: dict[str, Callable[[], Iterator[Finding]]] = {
        "python": python,
        "engine": engine,
        "instructions": processor,
        "cores": lambda: cores(system),
        "memory": lambda: memory(system),
        "GPU": graphics,
        "disk": disks,
        "settings": lambda: settings(root),
        "compilers": compilers,
        "llama.cpp": llama,
        "packaged model": models,
        "left over": leftovers,
        "hub's settings": hub_variables,
    }
    if online:
        checks["hub"] = hub
    found: list[Finding] = []
    for name, one in checks.items():
        if name in NEED_ENGINE and any(f.name == "engine" and f.state == "broken" for f in found):
            continue
        try:
            found += one()
        except Exception as error:  # what is broken must not keep the rest from being told
            found.append(Finding(name, "broken", str(error), getattr(error, "hint", "")))
    return found


def python() -> Iterator[Finding]:
    version = platform.python_version()
    told = f"{version} at {sys.executable}"
    if sys.version_info < LEAST_PYTHON:
        yield Finding("python", "broken", told, "dsv2 wants 3.11 or newer")
    else:
        yield Finding("python", "fine", told)


def engine() -> Iterator[Finding]:
    from importlib.metadata import PackageNotFoundError, version

    import dsv2cli

    where = Path(dsv2cli.__file__).parent
    try:
        yield Finding("package", "fine", f"dsv2 {version('dsv2')} in {where}")
    except PackageNotFoundError:
        yield Finding("package", "note", f"not installed as a package: run from {where}", "pip install . installs it")
    try:
        import cext
    except ImportError as error:
        hint = getattr(error, "hint", "") or "pip install . in the clone compiles it"
        yield Finding("engine", "broken", str(error), hint)
        return
    yield Finding(
        "engine", "fine", f"loaded, {len(cext.formats())} tensor types, {len(cext.architectures())} kinds of model"
    )


def processor() -> Iterator[Finding]:
    import cext

    used, best = cext.isa(), cext.isas()[0]
    if used != best:
        yield Finding(
            "instructions", "note", f"{used} is used, {best} would be faster",
            "unset DSV2_ISA" if os.environ.get("DSV2_ISA") else "",
        )  # fmt: skip
    elif best == "scalar":
        yield Finding(
            "instructions", "note", "none of the fast instruction sets is here", "expect a few tokens a second"
        )
    else:
        yield Finding("instructions", "fine", f"{used}, the best of {', '.join(cext.isas())}")


def cores(system: Path) -> Iterator[Finding]:
    import cext
    from cext.system import cpu_quota

    n_cores, quota = cext.cores(), cpu_quota(system)
    if quota is not None and quota < n_cores:
        yield Finding(
            "cores", "note", f"{n_cores}, of which a cgroup gives {quota:.1f}",
            f"threads beyond that wait for each other: dsv2 config set threads {max(1, int(quota))}",
        )  # fmt: skip
    else:
        yield Finding("cores", "fine", f"{n_cores} for this process, {os.cpu_count()} in the machine")


def graphics() -> Iterator[Finding]:
    import cext
    from dsv2cli.gpu import TAKEN

    try:
        devices = cext.gpus()
    except cext.DeviceError as error:
        yield Finding("GPU", "fine", f"none is used: {error}", error.hint)
        return
    for gpu in devices:
        can = [*(["int8 dots"] if gpu.int_dot else []), *(["halves"] if gpu.float16 else [])]
        text = f"{gpu.number}: {gpu.name}, {gpu.driver}, Vulkan {gpu.api}, {format_bytes(gpu.free)} of"
        text += f" {format_bytes(gpu.memory)} free, subgroups of {gpu.subgroup}{''.join(f', {word}' for word in can)}"
        if gpu.missing:
            yield Finding("GPU", "note", f"{gpu.number}: {gpu.name}: {gpu.missing}")
        else:
            what = "the processor in software" if gpu.software else f"{gpu.kind}, not measured"
            unasked = "chat and others use it; --gpu off leaves it out"
            alone = f"used where it is named alone: --gpu {gpu.number}"
            is_taken = gpu.kind == TAKEN
            yield Finding("GPU", "fine", text if is_taken else f"{text}; {what}", unasked if is_taken else alone)
    if not devices:
        yield Finding("GPU", "fine", "Vulkan knows none here")


def memory(system: Path) -> Iterator[Finding]:
    from cext.system import free_bytes, memory_limit

    free, limit = free_bytes(system), memory_limit(system)
    if free is None:
        yield Finding("memory", "note", "the system does not tell what is free", "dsv2 plan then cannot say what fits")
        return
    told = f"{format_bytes(free)} can be taken"
    if limit is not None:
        told += f", of the {format_bytes(limit)} that a cgroup allows"
    hint = "" if limit is None else "the container's or the service's limit (memory.max) can be raised"
    if free < LITTLE_MEMORY:
        yield Finding("memory", "note", told, hint or "close other programs, or take small models")
    else:
        yield Finding("memory", "fine" if limit is None else "note", told, hint)


def folders() -> list[tuple[str, Path, str]]:
    """Where things go: what, which folder, what moves it."""
    import tempfile

    from dsv2cli.hub.cache import cache_root

    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    return [
        ("models", cache_root(), "HF_HOME moves the hub's cache"),
        ("state", state / "dsv2", "XDG_STATE_HOME moves it"),
        ("temporary files", Path(tempfile.gettempdir()), "TMPDIR moves them"),
        (HERE, Path.cwd(), "-o puts files elsewhere"),
    ]


def disks() -> Iterator[Finding]:
    from dsv2cli.hub.cache import free_bytes

    for what, folder, moves in folders():
        there = folder
        while not there.exists() and there != there.parent:
            there = there.parent
        free = free_bytes(there)
        name, told = f"disk of {what}", f"{format_bytes(free)} free in {folder}"
        if not os.access(there, os.W_OK | os.X_OK):
            state: State = "note" if what == HERE else "broken"  # a command may be called from anywhere
            yield Finding(name, state, f"{there} cannot be written", f"its owner can allow it; {moves}")
        elif free < FULL_BYTES:
            yield Finding(name, "broken", f"full: {told}", f"free some space; {moves}")
        elif free < TIGHT_BYTES:
            yield Finding(name, "note", told, f"a model of 16 billion weights takes 10 GB; {moves}")
        else:
            yield Finding(name, "fine", told)


def settings(root: Any) -> Iterator[Finding]:
    from dsv2cli import settings as kept

    files = [str(p) for p in (kept.user_file(), kept.project_file()) if p is not None and p.exists()]
    found = kept.values(root)
    yield Finding("settings", "fine", f"{len(found)} set" + (f", by {', '.join(files)}" if files else ""))


def compilers() -> Iterator[Finding]:
    missing = [names[0] for names in COMPILERS if not any(map(shutil.which, names))]
    if missing:
        yield Finding(
            "compilers", "note", f"no {' and no '.join(missing)} on PATH",
            "what is installed works without; installing or upgrading from source needs C and C++",
        )  # fmt: skip
    else:
        yield Finding("compilers", "fine", "C and C++ are here, should it be built again")


def llama() -> Iterator[Finding]:
    try:
        from dsv2cli.engines.llamacpp import library

        told, rpc, gpu = library.features()
    except Exception as error:
        yield Finding(
            "llama.cpp", "broken", f"its library does not load: {error}",
            "pip install --force-reinstall --no-cache-dir llama-cpp-python; tokenizers need it",
        )  # fmt: skip
        return
    more = f"{'with' if gpu else 'without'} GPUs, {'with' if rpc else 'without'} RPC"
    yield Finding("llama.cpp", "fine", f"llama-cpp-python {library.version()}, {more}{f' ({told})' if told else ''}")


def models() -> Iterator[Finding]:
    from dsv2cli.locate import PACKAGED

    packaged = sorted(PACKAGED.glob("*.gguf"))
    if packaged:
        yield Finding("packaged model", "fine", packaged[0].name)
    else:
        yield Finding("packaged model", "note", "this installation ships none", "dsv2 chat wants a MODEL")


def leftovers() -> Iterator[Finding]:
    """Of downloads and quantisations that nobody went on with."""
    from dsv2cli.hub.cache import PARTIAL, cache_root

    now = time.time()
    partial = [p for p in cache_root().glob(f"models--*/**/*{PARTIAL}") if p.is_file()]
    stale = [p for p in partial if now - p.stat().st_mtime > STALE_SECONDS]
    if stale:
        nbytes = sum(p.stat().st_blocks * 512 for p in stale)
        repos = sorted({_repo_of(p, cache_root()) for p in stale})
        yield Finding(
            "partial downloads", "note", f"{len(stale)}, {format_bytes(nbytes)}, of {_some(repos)}",
            f"dsv2 download {repos[0]} goes on with it; dsv2 rm {repos[0]} removes it",
        )  # fmt: skip
    works = [p.parent for p in Path.cwd().glob("*.work/identity.json")]
    if works:
        nbytes = sum(f.stat().st_blocks * 512 for w in works for f in w.rglob("*") if f.is_file())
        yield Finding(
            "work folders", "note", f"{_some([w.name for w in works])}, {format_bytes(nbytes)}",
            "the same dsv2 quantize goes on with one; else remove it",
        )  # fmt: skip
    if not stale and not works:
        yield Finding("left over", "fine", "no partial downloads older than a day, no work folders here")


def _repo_of(path: Path, root: Path) -> str:
    return path.relative_to(root).parts[0].removeprefix("models--").replace("--", "/", 1)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def hub_variables() -> Iterator[Finding]:
    from dsv2cli.hub import client

    if (wrong := client.misset()) is not None:
        yield Finding("hub's settings", "broken", str(wrong), wrong.hint)
        return
    settings = client.constants()
    offline = " (HF_HUB_OFFLINE: it is not asked)" if settings.HF_HUB_OFFLINE else ""
    token = "with a token" if client.has_token() else "without a token"
    yield Finding("hub's settings", "fine", f"{settings.ENDPOINT}, {token}{offline}")


def hub() -> Iterator[Finding]:
    from dsv2cli.hub import client

    begun = time.perf_counter()
    client.ask_whether_there()
    yield Finding("hub", "fine", f"answers within {time.perf_counter() - begun:.1f} s")
