"""A conversation's file: a line for all that happens to its tree, appended when it has happened and never changed.

Each line is a JSON object that ends in a seal over the seal before it and the line itself, so that a line that is
changed, lost or moved is seen. Only the last one may be torn, by a power cut or a kill: it is dropped, and told.

first  {"format": "dsv2 conversation", "version": 1, "model": {"identity": hex, "name": text, "path": text}}
turn   {"parent": n, "user": text, "reasoning": text or null, "answer": text, "ids": [token, ...], "opening": [...],
       "system": text or null, "thinking": true, false or null, "sampling": {...}, "stop": text, "time": seconds}
       Turns count from 1; "system" stands where it is not the parent's. The ids are what the model sees again; the
       texts are what people read and search.
head   {"head": n}: the next turn follows turn n
model  {"model": {...}}: it goes on with another server, or with the same model, which lies elsewhere now

Where it was with a server, the model's identity is "server", its path the server's address, and there are no ids: the
texts are all that there is; "key_env" names the variable of the environment that held the key, where one was sent: the
key itself is in no file.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

from cext import system
from cext.tokenizer import Answer
from dsv2cli.chat.conversation import Turn
from dsv2cli.chat.tree import Node, Setting, Tree
from dsv2cli.errors import CliError

FORMAT, VERSION = "dsv2 conversation", 1
SEAL_BYTES = 16
LINE = re.compile(rb'(\{.*),"seal":"([0-9a-f]{%d})"\}' % (2 * SEAL_BYTES), re.DOTALL)
MAX_BYTES = 1 << 30  # of a file
MAX_FIRST = 1 << 16  # of its first line
MAX_ID = 2**31 - 1
SERVER = "server"
WITHOUT_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)  # what such file systems say to a link


class JournalError(CliError):
    """A conversation's file that cannot be gone on with."""


@dataclass(frozen=True)
class Model:
    """Whose tokens a conversation is made of. identity: see ``store.identity``, or SERVER; path: where it lay; key_env:
    the environment's variable that holds the server's key, "" where none was sent."""

    identity: str
    name: str
    path: str
    key_env: str = ""

    @property
    def is_server(self) -> bool:
        return self.identity == SERVER


@dataclass
class Contents:
    """What a file holds. end: bytes of it that are whole; seal: of its last line; n_torn: bytes after them."""

    model: Model
    tree: Tree = field(default_factory=Tree)
    end: int = 0
    seal: bytes = b""
    n_torn: int = 0


def read(path: Path) -> Contents:
    """What the file at ``path`` holds. JournalError, OSError."""
    if (size := path.stat().st_size) > MAX_BYTES:
        raise JournalError(f"`{path}` has {size} bytes: no conversation is that long")
    data = path.read_bytes()
    contents: Contents | None = None
    start, seal, number = 0, b"", 0
    while start < len(data):
        number += 1
        end = data.find(b"\n", start)
        line = data[start:] if end < 0 else data[start:end]
        found = LINE.fullmatch(line)
        sealed = found is not None and _seal(seal, found[1]).hex().encode() == found[2]
        if end < 0 and not sealed:
            break
        if number == 1:
            contents = Contents(_first(path, line, sealed=sealed))
        elif found is None or not sealed or contents is None:
            raise JournalError(f"`{path}` is damaged: line {number} has changed", _hint(path, number))
        else:
            try:
                _take(contents, json.loads(found[1] + b"}"))
            except (AttributeError, ValueError, KeyError, TypeError, RecursionError) as error:
                raise JournalError(
                    f"`{path}`: line {number} is no part of a conversation", _hint(path, number)
                ) from error
        seal = bytes.fromhex(found[2].decode()) if found else b""
        start = len(data) if end < 0 else end + 1
    if contents is None:
        raise JournalError(f"`{path}` holds no conversation", "the file is empty, or its first line was cut")
    contents.end, contents.seal, contents.n_torn = start, seal, len(data) - start
    return contents


def beginning(path: Path) -> tuple[Model, str]:
    """With whom the conversation at ``path`` began, and its first message, if that is short. JournalError, OSError."""
    with path.open("rb") as file:
        line, following = (file.readline(MAX_FIRST).removesuffix(b"\n") for _ in range(2))
    found = LINE.fullmatch(line)
    model = _first(path, line, sealed=found is not None and _seal(b"", found[1]).hex().encode() == found[2])
    try:
        return model, _text(json.loads(following)["user"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return model, ""


def _first(path: Path, line: bytes, *, sealed: bool) -> Model:
    """The first line. Its version is looked at before its seal, which another version may make in another way."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise JournalError(f"`{path}` holds no conversation")
    if value.get("version") != VERSION:
        raise JournalError(f"`{path}` is of version {value.get('version')!r}, and this program reads {VERSION}")
    if not sealed:
        raise JournalError(f"`{path}` is damaged: line 1 has changed")
    try:
        return _model(value["model"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise JournalError(f"`{path}`: line 1 names no model") from error


def _model(value: Any) -> Model:
    key_env = _text(value.get("key_env", ""))
    return Model(_text(value["identity"]), _text(value["name"]), _text(value["path"]), key_env)


def _named(model: Model) -> dict[str, str]:
    named = {"identity": model.identity, "name": model.name, "path": model.path}
    return named | ({"key_env": model.key_env} if model.key_env else {})


def _hint(path: Path, number: int) -> str:
    return f"what stands before it is whole: head -n {number - 1} '{path}' > a-copy.jsonl" if number > 2 else ""


def _take(contents: Contents, value: Any) -> None:
    """Let a line happen to the tree. ValueError, KeyError, TypeError where it is none."""
    tree = contents.tree
    if "head" in value:
        tree.head = _place(tree, value["head"])
        return
    if "model" in value:
        model = _model(value["model"])
        if model.identity != contents.model.identity:
            raise ValueError("another model")
        contents.model = model
        return
    parent = _place(tree, value["parent"])
    system = _text_or_none(value["system"]) if "system" in value else tree.node(parent).setting.system
    thinking, sampling = value["thinking"], value["sampling"]
    if thinking not in (None, True, False) or not isinstance(sampling, dict):
        raise ValueError("settings")
    tree.head = parent
    turn = Turn(_text(value["user"]), _ids(value["ids"]), _ids(value["opening"]))
    if contents.model.is_server:
        turn.said = Answer(_text_or_none(value["reasoning"]), _text(value["answer"]))
    tree.add(turn, Setting(system, thinking, sampling), _text(value["stop"]))


def _place(tree: Tree, number: Any) -> int:
    if type(number) is not int or not (number == 0 or number in tree):
        raise ValueError("a turn that is not there")
    return number


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("no text")
    return value


def _text_or_none(value: Any) -> str | None:
    return None if value is None else _text(value)


def _ids(value: Any) -> list[int]:
    if not isinstance(value, list) or not all(type(i) is int and 0 <= i <= MAX_ID for i in value):
        raise ValueError("token ids")
    return value


def _seal(before: bytes, body: bytes) -> bytes:
    return blake2b(before + body, digest_size=SEAL_BYTES).digest()


class Journal:
    """A conversation's file, open for adding to it and locked against every other that would."""

    def __init__(self, path: Path, fd: int, contents: Contents) -> None:
        """Made by ``create`` and ``reopen``."""
        self.path, self.contents = path, contents
        self._fd = fd
        self._waiting: list[dict[str, Any]] = []  # what could not be written yet

    @property
    def tree(self) -> Tree:
        return self.contents.tree

    @classmethod
    def create(cls, path: Path, model: Model) -> Journal:
        """A file for a new conversation. FileExistsError where there is one; OSError.

        It gets its name when it is locked and has its first line, so that no other sees less of it."""
        unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        fd = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        journal = cls(path, fd, Contents(model))
        try:
            _lock(fd, path)
            journal.write({"format": FORMAT, "version": VERSION, "model": _named(model)})
            _name(unfinished, path)
        except BaseException:
            journal.close()
            raise
        finally:
            unfinished.unlink(missing_ok=True)
        return journal

    @classmethod
    def reopen(cls, path: Path) -> Journal:
        """The file of a conversation that goes on. JournalError, OSError."""
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            _lock(fd, path)
            contents = read(path)
            if contents.n_torn:
                os.ftruncate(fd, contents.end)
            elif os.pread(fd, 1, contents.end - 1) != b"\n":  # whole but for its end
                os.pwrite(fd, b"\n", contents.end)
                contents.end += 1
        except BaseException:
            os.close(fd)
            raise
        return cls(path, fd, contents)

    def go_on_with(self, model: Model) -> None:
        """Its next line is of this one, which is told with it: what is looked at only changes nothing."""
        before = self.contents.model
        if model != before and model != replace(before, key_env=""):  # a key that is missing today is no change
            self.contents.model = model
            self._waiting.append({"model": _named(model)})

    def add(self, node: Node, said: Answer) -> None:
        """A turn that the tree has got. OSError."""
        setting = node.setting
        line: dict[str, Any] = {"parent": node.parent, "user": node.turn.user}
        line |= {"reasoning": said.reasoning, "answer": said.content}
        line |= {"ids": node.turn.answer, "opening": node.turn.opening}
        if not node.parent or self.tree.node(node.parent).setting.system != setting.system:
            line["system"] = setting.system
        line |= {"thinking": setting.thinking, "sampling": dict(setting.sampling)}
        self.write(line | {"stop": node.stop, "time": round(time.time(), 3)})

    def move(self) -> None:
        """The tree's head has been moved. OSError."""
        self.write({"head": self.tree.head})

    def write(self, line: Mapping[str, Any]) -> None:
        """Add a line, and those that failed before it, and have them on the disk. OSError: then they wait."""
        self._waiting.append(dict(line))
        data, seal = b"", self.contents.seal
        for each in self._waiting:
            body = json.dumps(each, ensure_ascii=False, separators=(",", ":"))[:-1].encode("utf-8", "surrogatepass")
            seal = _seal(seal, body)
            data += body + b',"seal":"' + seal.hex().encode() + b'"}\n'
        end = self.contents.end
        try:
            system.write_at(self._fd, data, end)
            os.fsync(self._fd)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, end)
            raise
        self._waiting.clear()
        self.contents.end, self.contents.seal = end + len(data), seal

    def rename(self, path: Path) -> None:
        """Call the file ``path`` from now on. FileExistsError where there is one; OSError."""
        _name(self.path, path)
        self.path = path

    def close(self) -> None:
        """Leave it to others."""
        os.close(self._fd)


def _name(before: Path, path: Path) -> None:
    """Give a file the name ``path`` instead. FileExistsError where another has it; OSError."""
    try:
        os.link(before, path)
    except OSError as error:
        if error.errno not in WITHOUT_LINKS:
            raise
    else:
        before.unlink()
        return
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    try:
        before.replace(path)
    except OSError:
        path.unlink(missing_ok=True)
        raise


def _lock(fd: int, path: Path) -> None:
    """JournalError where another conversation has it. On a file system without locks there is none."""
    with contextlib.suppress(OSError):
        if not system.try_lock(fd):
            raise JournalError(f"`{path}` is open in another conversation", "go on there, or leave it first")
