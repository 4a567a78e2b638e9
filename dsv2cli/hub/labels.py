"""labels.py: what a GGUF's name tells: the quantisation, as uploaders write it, and which part of a whole it is.

Knows names only. Whether a type runs is for the file's header to say (preview.py).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePosixPath

# Seen on the hub: UD-Q4_K_XL (unsloth), i1-IQ1_S (mradermacher), Q8_0_L, Q4_0_4_4 (bartowski), smol-IQ4_KSS, IQ4_KS_R4
# (ubergarm), MXFP4_MOE, TQ1_0, fp16, and Q8 alone.
_PREFIX = r"(?:(?:UD|i1|smol|pure)-)*"
_TYPE = (
    r"(?:(?:I?Q|TQ)\d{1,2}(?:_(?:[A-Z]{1,3}\d?|\d))*"  # a family, its bits, and how it is mixed, scaled or laid out
    r"|(?:MX|NV)FP4(?:_[A-Z]+)*|B?F(?:16|32|64)|FP(?:8|16|32))"
)
_LABEL = re.compile(rf"(?<![A-Z0-9])(?P<prefix>{_PREFIX})(?P<base>{_TYPE})(?![A-Z0-9])", re.IGNORECASE)
_SAME = {"FP16": "F16", "FP32": "F32"}

_SPLIT = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)
_PIECES = (  # of one file cut anywhere, that must be joined: mradermacher's, split(1)'s, and TheBloke's of old
    re.compile(r"(?P<stem>.+?)(?:\.gguf)?\.part(?P<number>\d+)of(?P<count>\d+)(?:\.gguf)?", re.IGNORECASE),
    re.compile(r"(?P<stem>.+)\.gguf[.-](?:part|split)[-_]?(?P<letters>[a-z]{1,2})", re.IGNORECASE),
)

# Files that our quantiser names after what was asked of it: --bpw 4.25, --size 9.5G.
_BUDGET = re.compile(r"(?:\d+\.?\d*|\.\d+)(?:BPW|[KMGT]I?B?)|\d{6,}B?", re.IGNORECASE)


@dataclass(frozen=True)
class Label:
    """A quantisation's name. prefix "UD-", base "Q4_K_XL", rest whatever the file's name goes on with ("-V2")."""

    prefix: str
    base: str
    rest: str = ""

    @property
    def name(self) -> str:
        return self.prefix + self.base

    @property
    def spellings(self) -> tuple[str, ...]:
        """What may be asked for to mean this, the most exact first."""
        return tuple(s.upper() for s in (self.name + self.rest, self.name, self.base))


@dataclass(frozen=True)
class Part:
    """A file's place in a whole. number counts from 1; count is 0 where the name does not tell it."""

    whole: str  # path of the whole, with .gguf
    number: int = 1
    count: int = 1
    raw: bool = False  # a piece that opens no better than half a file; parts as llama.cpp splits them do open


def normal(text: str) -> str:
    """A type as it is compared: upper case, fp16 as F16."""
    upper = text.strip().upper()
    return _SAME.get(upper, upper)


def label_of(path: str) -> Label | None:
    """The label in a model's path: the last one in the file's own name, or else in that of the nearest folder."""
    place = PurePosixPath(path)
    for name in (re.sub(r"\.gguf$", "", place.name, flags=re.IGNORECASE), *(p.name for p in place.parents)):
        if found := list(_LABEL.finditer(name)):
            last = found[-1]
            prefix = re.sub("ud-", "UD-", last["prefix"].lower())
            return Label(prefix, normal(last["base"]), name[last.end() :])
    return None


def part_of(path: str) -> Part | None:
    """Which part of which GGUF a file is; None for files that are none."""
    for pattern in _PIECES:
        if found := pattern.fullmatch(path):
            groups = found.groupdict()
            if letters := groups.get("letters"):
                number = 1
                for letter, place in zip(reversed(letters.lower()), (1, 26), strict=False):
                    number += (ord(letter) - ord("a")) * place
                return Part(f"{found['stem']}.gguf", number, 0, raw=True)
            return Part(f"{found['stem']}.gguf", int(found["number"]), int(found["count"]), raw=True)
    if found := _SPLIT.fullmatch(path):
        return Part(f"{found['stem']}.gguf", int(found["number"]), int(found["count"]))
    return Part(path) if path.lower().endswith(".gguf") else None


def made_as(stem: str, name: str) -> str | None:
    """What our quantiser was asked for when it made stem-WHAT.gguf: a type, 4.25BPW, 9.5G. None: not a name of its."""
    if not name.startswith(f"{stem}-") or not name.endswith(".gguf"):
        return None
    what = name.removeprefix(f"{stem}-").removesuffix(".gguf")
    return what if _LABEL.fullmatch(what) or _BUDGET.fullmatch(what) else None
