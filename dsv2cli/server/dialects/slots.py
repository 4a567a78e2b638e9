"""llama-server's slots: what they do, and what they have read, saved to files, taken from them, forgotten.

Off unless the server was told a folder. A file has a plain name in that folder, or, where there are keys, in a folder
of the key's own: whoever knows a name reads no other one's text.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from msgspec import Struct
from starlette.requests import Request
from starlette.responses import Response

from cext import ContextFullError, EngineError, FormatError, MismatchError, UnsupportedError
from dsv2cli.server import answering
from dsv2cli.server.errors import ApiError, bad_field
from dsv2cli.server.service import Service
from dsv2cli.server.slots import Held
from dsv2cli.server.wire import dump, parse

NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")
UNFINISHED = re.compile(rf"\.{NAME.pattern}\.[0-9a-f]{{8}}")
UNFINISHED_SECONDS = 3600  # no file is written for so long
MAGIC = b"DSV2SESS"
MAX_FILES = 256  # of one key


class FileRequest(Struct):
    filename: str = ""


async def slots(service: Service, request: Request) -> Response:
    """What is stepped together, a line each. No prompt is shown."""
    engine = service.engine
    running = {slot: sequence.progress for slot, sequence in engine.slots.running().items()}
    lines = []
    for i in range(engine.limits.parallel):
        line = {"id": i, "n_ctx": engine.limits.n_ctx, "speculative": False, "is_processing": i in running}
        if i in running:
            line |= {"n_prompt_tokens_processed": running[i].done, "n_prompt_tokens": running[i].n}
        lines.append(line)
    return Response(dump(lines), media_type=answering.JSON_TYPE)


async def act(service: Service, request: Request) -> Response:
    """POST /slots/{slot}?action=save, restore or erase."""
    if service.slot_folder is None or not hasattr(service.engine.runtime.model, "load_session"):
        raise ApiError(501, "slots are not saved here: start the server with --slot-save-path", "not_supported_error")
    given = request.path_params["slot"]
    if not re.fullmatch("[0-9]{1,9}", given) or int(given) >= service.engine.limits.parallel:
        raise bad_field("slot", f"there are slots 0 to {service.engine.limits.parallel - 1}")
    action = ACTIONS.get(request.query_params.get("action", ""))
    if action is None:
        raise bad_field("action", f"is none of {', '.join(ACTIONS)}")
    body = await request.body()
    slot, salt = int(given), request.state.salt
    answer = await answering.aside(action, service, slot, salt, body)
    return Response(dump({"id_slot": slot} | answer), media_type=answering.JSON_TYPE)


def _save(service: Service, slot: int, salt: bytes, body: bytes) -> dict[str, Any]:
    engine = service.engine
    path = _path(service, salt, body)
    begun = time.perf_counter()
    ids = engine.slots.held(slot, salt)
    if not len(ids):
        raise bad_field("slot", "has read nothing that could be saved")
    session: Any = engine.call(lambda: engine.prefixes.forked(ids, salt)).result()
    if session is None:
        raise bad_field("slot", "what it had read has been let go of; a larger --cache keeps more")
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        _tidy(path.parent)
        if not path.exists() and sum(1 for _ in path.parent.iterdir()) >= MAX_FILES:
            raise bad_field("filename", f"{MAX_FILES} files are saved already")
        if path.exists() and not (path.is_file() and _is_session(path)):
            raise bad_field("filename", "there is something of this name that holds no session")
        session.save(path)
        n_written = path.stat().st_size
    except (OSError, EngineError) as error:
        raise ApiError(500, _without(path, error), "server_error") from None
    timings = {"save_ms": 1e3 * (time.perf_counter() - begun)}
    return {"filename": path.name, "n_saved": len(ids), "n_written": n_written, "timings": timings}


def _restore(service: Service, slot: int, salt: bytes, body: bytes) -> dict[str, Any]:
    engine = service.engine
    path = _path(service, salt, body)
    begun = time.perf_counter()
    model: Any = engine.runtime.model
    try:
        session = model.load_session(path, engine.limits.n_ctx, engine.kv)
        n_read = path.stat().st_size
    except (FormatError, MismatchError, UnsupportedError, ContextFullError, OSError) as error:
        raise bad_field("filename", _without(path, error)) from None
    held = Held(salt, session.ids)

    def take() -> None:
        engine.prefixes.keep(session, salt, [], 0)
        engine.slots.hold(slot, held)

    engine.call(take).result()
    timings = {"restore_ms": 1e3 * (time.perf_counter() - begun)}
    return {"filename": path.name, "n_restored": len(held.ids), "n_read": n_read, "timings": timings}


def _erase(service: Service, slot: int, salt: bytes, body: bytes) -> dict[str, Any]:
    engine = service.engine
    ids = engine.slots.held(slot, salt)

    def forget() -> None:
        engine.prefixes.forget(ids, salt)
        engine.slots.erase(slot)

    if len(ids):
        engine.call(forget).result()
    return {"n_erased": len(ids)}


ACTIONS: dict[str, Callable[[Service, int, bytes, bytes], dict[str, Any]]] = {
    "save": _save,
    "restore": _restore,
    "erase": _erase,
}


def _path(service: Service, salt: bytes, body: bytes) -> Path:
    """Where the file of that name is. ApiError for what is no plain name."""
    name = parse(body, FileRequest).filename
    if not NAME.fullmatch(name):
        raise bad_field("filename", "is no plain name: letters, digits, '.', '_' and '-', at most 128, no '.' first")
    assert service.slot_folder is not None
    return (service.slot_folder / salt.hex()[:32] if salt else service.slot_folder) / name


def _tidy(folder: Path) -> None:
    """Take away what servers that were killed have left half written."""
    long_ago = time.time() - UNFINISHED_SECONDS
    for path in folder.iterdir():
        if UNFINISHED.fullmatch(path.name):
            with suppress(FileNotFoundError):  # another server was here first
                about = path.stat()
                if about.st_mtime < long_ago and (not about.st_size or _is_session(path)):
                    path.unlink()


def _is_session(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def _without(path: Path, error: Exception) -> str:
    """A message about a file, without where it lies."""
    if isinstance(error, OSError) and not isinstance(error, EngineError):
        return f"`{path.name}`: {error.strerror or type(error).__name__}"
    return str(error).replace(str(path), path.name)
