"""tiktoken.py: a tiktoken vocabulary (byte strings by rank) -> the tokens and merges of byte-level BPE.

tiktoken joins the neighbours that make the token of the lowest rank, whichever they are; GGUF lists pairs. The pair of
a token is what tiktoken has left of its bytes before the last join: it is the only one that ever makes it, because all
that was joined inside its bytes before came in the same order. So one merge a token, by rank, tokenises alike.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from cext.words import BYTE_CHARACTERS
from quantize.base.errors import CheckpointError, UnsupportedError
from quantize.source import files
from quantize.source.bpe import CONTROL, NORMAL, Bpe, Table, added_kind
from quantize.source.safetensors import LFS_POINTER

MAX_FILE_BYTES = 1 << 26
MAX_TOKEN_BYTES = 1 << 10
MAX_JOINING = 1 << 28  # sum of the squared lengths of all tokens: what finding their pairs takes
DAMAGED = "the file was edited, or cut short: the hub's copy replaces it"

# The class of a tokenizer -> GGUF's name for the rules in its code, which is not read: Moonlight's and Kimi's.
PRE_TOKENIZERS = {"TikTokenTokenizer": "kimi-k2"}
N_RESERVED = 256  # special tokens behind the ranked ones, as that class has it: those without a name are reserved


def read(path: Path, settings: Mapping[str, Any], n_vocab: int) -> Bpe:
    """The vocabulary, padded to n_vocab tokens. settings: tokenizer_config.json, which names the special tokens.

    Raises CheckpointError, UnsupportedError.
    """
    pre = rules(settings)
    if pre is None:
        raise UnsupportedError(
            f"`{path}`: how text is split stands in the code of {settings.get('tokenizer_class')!r}, which is not read",
            f"{files.TOKENIZER_CONFIG} names the class (tokenizer_class): {', '.join(PRE_TOKENIZERS)} is known",
        )
    ranked = read_ranks(path)
    table = Table(path, n_vocab)
    for id_, token in enumerate(ranked):
        table.put(spelt(token), id_, NORMAL)
    _put_special(table, len(ranked), settings)
    pairs, n_alone = merges(ranked)
    tokens, types = table.rows()
    alone = f"{n_alone} tokens of {path.name} are no two others joined: llama.cpp cuts a word that is one of them"
    return Bpe(
        pre=pre,
        tokens=tokens,
        types=types,
        merges=tuple(f"{spelt(left)} {spelt(right)}" for left, right in pairs),
        notes=(alone,) if n_alone else (),
    )


def spelt(token: bytes) -> str:
    """A token's bytes as byte-level BPE writes them."""
    return "".join(map(BYTE_CHARACTERS.__getitem__, token))


def rules(settings: Mapping[str, Any]) -> str | None:
    """GGUF's name for how text is split; None where that stands in code that is not known here."""
    named = settings.get("tokenizer_class")
    return PRE_TOKENIZERS.get(named) if isinstance(named, str) else None


def read_ranks(path: Path) -> list[bytes]:
    """The tokens of a file of lines "base64 rank", by rank: 0 to their number, without a gap. CheckpointError."""
    ranks: dict[bytes, int] = {}
    taken: set[int] = set()
    for number, line in enumerate(_lines(path), 1):
        token, rank = _parse(path, number, line)
        if rank in taken:
            raise CheckpointError(f"`{path}`, line {number}: rank {rank} is there twice", DAMAGED)
        if token in ranks:
            raise CheckpointError(f"`{path}`, line {number}: {token!r} has rank {ranks[token]} already", DAMAGED)
        ranks[token] = rank
        taken.add(rank)
    if taken and max(taken) >= len(taken):
        lacking = next(i for i in range(len(taken)) if i not in taken)
        raise CheckpointError(f"`{path}`: rank {lacking} is missing, and {max(taken)} is there", DAMAGED)
    if unspelt := [b for b in range(256) if bytes([b]) not in ranks]:
        raise CheckpointError(f"`{path}`: no token is the byte {unspelt[0]}: not every text can be spelt", DAMAGED)
    if sum(len(token) ** 2 for token in ranks) > MAX_JOINING:
        raise CheckpointError(f"`{path}`: its tokens are longer than those of any vocabulary", DAMAGED)
    return sorted(ranks, key=ranks.__getitem__)


def _lines(path: Path) -> list[bytes]:
    try:
        if (n_bytes := path.stat().st_size) > MAX_FILE_BYTES:
            raise CheckpointError(f"`{path}` has {n_bytes} bytes, a vocabulary has at most {MAX_FILE_BYTES}")
        return [line for line in path.read_bytes().splitlines() if line]
    except OSError as error:
        raise CheckpointError(f"`{path}`: {error.strerror}") from error


def _parse(path: Path, number: int, line: bytes) -> tuple[bytes, int]:
    parts = line.split()
    try:
        if len(parts) != 2 or not parts[1].isdigit() or len(parts[1]) > 9:
            raise ValueError("expected a token in base64 and its rank")
        token = base64.b64decode(parts[0], validate=True)
    except ValueError as error:  # binascii.Error is one
        pointer = line.startswith(LFS_POINTER)
        what = "a Git LFS pointer, not the file it stands for" if pointer else f"line {number}: {error}"
        raise CheckpointError(f"`{path}`: {what}", "git lfs pull fetches it" if pointer else DAMAGED) from error
    if not 1 <= len(token) <= MAX_TOKEN_BYTES:
        raise CheckpointError(f"`{path}`, line {number}: a token of {len(token)} bytes", DAMAGED)
    return token, int(parts[1])


def merges(ranked: Sequence[bytes]) -> tuple[list[tuple[bytes, bytes]], int]:
    """The pair that each longer token is joined of, by rank, and how many tokens no pair makes."""
    ranks = {token: rank for rank, token in enumerate(ranked)}
    pairs, n_alone = [], 0
    for token in ranked:
        if len(token) == 1:
            continue
        parts = _joined(ranks, token)
        if len(parts) == 2:
            pairs.append((parts[0], parts[1]))
        else:
            n_alone += 1
    return pairs, n_alone


def _joined(ranks: Mapping[bytes, int], token: bytes) -> list[bytes]:
    """What tiktoken has of a token's bytes before the last join."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        joins = [ranks.get(a + b, len(ranks)) for a, b in pairwise(parts)]
        best = min(joins)
        if best == len(ranks):
            break
        at = joins.index(best)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def _put_special(table: Table, n_ranked: int, settings: Mapping[str, Any]) -> None:
    """The tokens behind the ranked ones: those that tokenizer_config.json names, and reserved ones."""
    named = settings.get("added_tokens_decoder") or {}
    where = f"`{table.path.parent / files.TOKENIZER_CONFIG}`: added_tokens_decoder"
    if not isinstance(named, dict):
        raise CheckpointError(f"{where} is not an object of tokens by id")
    for key, token in named.items():
        if not isinstance(token, dict) or not key.isdecimal() or len(key) > 9:
            raise CheckpointError(f"{where} has {key!r}: {token!r}, expected a number and an object")
        table.put(token.get("content"), int(key), added_kind(token))
    for id_ in range(n_ranked, min(n_ranked + N_RESERVED, table.n_vocab)):
        if id_ not in table:
            table.put(f"<|reserved_token_{id_}|>", id_, CONTROL)
