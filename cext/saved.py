"""Sessions in files: token ids and cache, block by block, for the model and the cache type that made them.

A file is a header and the session's blocks, each with a digest behind it that covers all digests before: a block that
is damaged, missing, or another file's is seen. Digests guard against accidents; who can write the file can forge it.

header  magic "DSV2SESS", version u32, tokens of a block u32, bytes of a block u64, n_ctx u32, n_past u32, cache type
        (8 bytes, padded with zeros), the model's identity (32 bytes); all little-endian
digest  blake2b of the header, 16 bytes
blocks  ceil(n_past / tokens of a block) times: the bytes of a block as memory/kv.h lays it out, and a digest of 16
        bytes over the digest before and these bytes
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from io import BufferedReader
from os import PathLike, fspath
from pathlib import Path
from typing import IO, TYPE_CHECKING

from cext import _engine, system
from cext.errors import ArgumentError, ContextFullError, FileError, FormatError, MismatchError, UnsupportedError

if TYPE_CHECKING:
    from cext.model import Model, Session

MAGIC = b"DSV2SESS"
VERSION = 1
"""Of the file, of how a block's bytes lie, and of what a cache's numbers mean: another is refused."""
DIGEST_BYTES = 16
HEADER = struct.Struct("<8sIIQII8s32s")


@dataclass(frozen=True)
class Header:
    """What stands before the blocks."""

    block_tokens: int
    block_bytes: int
    n_ctx: int
    n_past: int
    kv_type: str
    model: bytes

    def pack(self) -> bytes:
        sizes = self.block_tokens, self.block_bytes, self.n_ctx, self.n_past
        return HEADER.pack(MAGIC, VERSION, *sizes, self.kv_type.encode(), self.model)

    @property
    def n_blocks(self) -> int:
        return -(-self.n_past // self.block_tokens)

    @property
    def file_bytes(self) -> int:
        return HEADER.size + DIGEST_BYTES + self.n_blocks * (self.block_bytes + DIGEST_BYTES)


def digest(*parts: bytes | bytearray | memoryview) -> bytes:
    """blake2b of the parts in order, DIGEST_BYTES long."""
    whole = blake2b(digest_size=DIGEST_BYTES)
    for part in parts:
        whole.update(part)
    return whole.digest()


def identity(model: Model) -> bytes:
    """32 bytes that tell the model from others: its shape, and of every tensor name, type, shape and a sample."""
    whole = blake2b(digest_size=32)
    _engine.model_identity(model._handle, whole.update)
    return whole.digest()


def family(model: Model) -> bytes:
    """See ``Model.identity``: the model's, and VERSION, which says what a cache's numbers mean."""
    return blake2b(identity(model) + VERSION.to_bytes(4, "little"), digest_size=32).digest()


def save(session: Session, path: str | PathLike[str]) -> None:
    """See ``Session.save``."""
    target = Path(fspath(path))
    with session._alone():
        header = Header(
            _engine.SESSION_BLOCK,
            _engine.session_block_bytes(session._handle),
            session.n_ctx,
            session.n_past,
            session.kv_type,
            identity(session.model),
        )
        try:
            with system.replaced(target) as file:
                _write(file, header, session)
        except OSError as error:
            raise FileError(f"cannot write the session to `{target}`: {error.strerror or error}") from error


def _write(file: IO[bytes], header: Header, session: Session) -> None:
    seal = digest(header.pack())
    file.write(header.pack() + seal)
    block = bytearray(header.block_bytes)
    for i in range(header.n_blocks):
        _engine.session_block_save(session._handle, i, block)
        seal = digest(seal, block)
        file.write(block)
        file.write(seal)


def load(model: Model, path: str | PathLike[str], n_ctx: int | None, kv_type: str | None) -> Session:
    """See ``Model.load_session``."""
    source = fspath(path)
    try:
        with Path(source).open("rb") as file:
            header, seal = _read_header(file, source)
            _check(header, model, source, kv_type, os.fstat(file.fileno()).st_size)
            room = header.n_ctx if n_ctx is None else n_ctx
            if room < header.n_past:
                raise ContextFullError(
                    f"`{source}`: {header.n_past} tokens do not fit into a context of {room}", "ask for a larger n_ctx"
                )
            session = model._hold(_open(model, room, header.kv_type, source, asked=n_ctx is not None))
            if header.block_bytes != _engine.session_block_bytes(session._handle):
                raise FormatError(f"`{source}`: blocks of {header.block_bytes} bytes are not this model's")
            for n, block in _blocks(file, source, header, seal):
                _engine.session_block_load(session._handle, block, n)
    except OSError as error:
        raise FileError(f"cannot read the session `{source}`: {error.strerror or error}") from error
    return session


def _open(model: Model, n_ctx: int, kv_type: str, source: str, *, asked: bool) -> object:
    """An empty session as the header wants it; what the engine refuses of it is the file's fault, unless asked for."""
    try:
        return _engine.session_open(model._handle, n_ctx, kv_type)
    except (ArgumentError, ValueError) as error:
        if asked:
            raise
        raise FormatError(f"`{source}`: {error}") from error


def _read_header(file: BufferedReader, source: str) -> tuple[Header, bytes]:
    """The header, its digest checked."""
    packed, seal = file.read(HEADER.size), file.read(DIGEST_BYTES)
    if packed[: len(MAGIC)] != MAGIC:
        raise FormatError(f"`{source}` holds no session", "give a file that Session.save wrote")
    if len(seal) < DIGEST_BYTES:
        raise FormatError(f"`{source}` is cut short: {len(packed) + len(seal)} bytes are not a header")
    _, version, block_tokens, block_bytes, n_ctx, n_past, kv_type, model = HEADER.unpack(packed)
    if version != VERSION:
        raise UnsupportedError(
            f"`{source}` is of version {version}, and this program reads {VERSION}", "evaluate the text again"
        )
    if digest(packed) != seal:
        raise FormatError(f"`{source}` is damaged: its header has changed")
    return Header(
        block_tokens, block_bytes, n_ctx, n_past, kv_type.rstrip(b"\0").decode("ascii", "replace"), model
    ), seal


def _check(header: Header, model: Model, source: str, kv_type: str | None, size: int) -> None:
    """Whether the session is this model's, of the cache type asked for, and whole by its size."""
    if header.model != identity(model):
        raise MismatchError(f"`{source}` was saved with another model than `{model.path}`", "open the model it is of")
    if kv_type is not None and header.kv_type != kv_type:
        raise MismatchError(
            f"`{source}` has a cache of type {header.kv_type}, not {kv_type}", f"ask for {header.kv_type}"
        )
    if header.block_tokens != _engine.SESSION_BLOCK:
        raise UnsupportedError(f"`{source}`: blocks of {header.block_tokens} tokens", "evaluate the text again")
    if not 1 <= header.n_ctx < 1 << 31:
        raise FormatError(f"`{source}`: a context of {header.n_ctx} tokens")
    if size != header.file_bytes:
        what = "cut short" if size < header.file_bytes else "too long"
        raise FormatError(f"`{source}` is {what}: {size} bytes, expected {header.file_bytes}")


def _blocks(file: BufferedReader, source: str, header: Header, seal: bytes) -> Iterator[tuple[int, bytearray]]:
    """(tokens, bytes) of each block, its digest checked; the bytes are good until the next."""
    block = bytearray(header.block_bytes)
    for i in range(header.n_blocks):
        if file.readinto(block) != len(block):
            raise FormatError(f"`{source}` is cut short: it ends in block {i}")
        seal = digest(seal, block)
        if file.read(DIGEST_BYTES) != seal:
            raise FormatError(f"`{source}` is damaged: block {i} has changed")
        yield min(header.n_past - i * header.block_tokens, header.block_tokens), block
