"""preview.py: what the first bytes of a model tell: whether it can be quantised or run, before the rest is fetched.

A checkpoint's configuration, tokenizer and index come whole, and of its weights the headers of two shards; of a GGUF
the header of each part. What is refused here is what the quantiser or the engine would refuse, in their words.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, TypeVar, cast

from dsv2cli.engines.choice import architecture_of, no_chat_model, not_ours
from dsv2cli.errors import CliError
from dsv2cli.hub import cache, client, gguf_header, transfer
from dsv2cli.hub.labels import label_of
from dsv2cli.hub.listing import Listing, Plan, RemoteFile

T = TypeVar("T")
FIRST_BYTES = 1 << 18  # looked at first, twice as many each time they are too few


def settle(
    plan: Plan,
    listing: Listing,
    to: Path | None,
    fetch: Callable[[Plan], Path],
    *,
    checks: bool = True,
    told: Callable[[str], None] = lambda line: None,
) -> Plan:
    """The plan with the weights that the index names. Fetches what tells about the model; refuses what cannot be used.

    fetch brings a plan's files and returns where they are; told hears what is to be known before. Raises CliError, and
    what quantize raises.
    """
    if plan.kind == "gguf":
        if checks and not plan.offline:
            check_gguf(plan, to, told)
        return plan
    from quantize.source import files

    weights = [f for f in plan.files if not files.is_companion(f.path)]
    small = tuple(f for f in plan.files if files.is_companion(f.path))
    if not small:
        return plan
    folder = fetch(replace(plan, files=small))
    index = named_by_index(folder / files.INDEX)
    if index:
        listed = {f.path: f for f in listing.files}
        if missing := sorted(set(index.values()) - listed.keys()):
            where = "the cache" if plan.offline else plan.repo
            hint = cache.ONLINE_HINT if plan.offline else "the upload is incomplete: another revision may be whole"
            raise CliError(f"{where} lacks {len(missing)} of the shards of {plan.repo} (`{missing[0]}`)", hint)
        weights = [listed[path] for path in sorted(set(index.values()))]
    if checks and not plan.offline:
        check_checkpoint(plan, folder, weights, index)
    return replace(plan, files=small + tuple(weights))


def named_by_index(path: Path) -> dict[str, str]:
    """Tensor name to shard, of a checkpoint's index; empty where there is none."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        return {str(tensor): str(shard) for tensor, shard in found.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CliError(f"`{path}`: not a checkpoint index ({error})", "see what the repository's page shows") from error


def check_checkpoint(plan: Plan, folder: Path, weights: list[RemoteFile], index: dict[str, str]) -> None:
    """Refuse a checkpoint that could not be quantised. Raises what quantize raises, CliError."""
    from quantize.source.preflight import preflight
    from quantize.source.safetensors import parse_header
    from quantize.source.stored import StoredTensor

    experts = next((shard for tensor, shard in index.items() if ".experts." in tensor), "")
    looked_at = {f.path: f for f in weights if f.path in (weights[0].path, experts)}
    tensors: dict[str, StoredTensor] = {}
    for file in looked_at.values():

        def parse(data: bytes, file: RemoteFile = file) -> dict[str, StoredTensor] | None:
            return parse_header(folder / file.path, data, file.nbytes)

        tensors |= first_bytes(plan, file, parse) or {}
    whole = len(looked_at) == len(weights)
    preflight(folder, tensors, set(index) or (set(tensors) if whole and tensors else None))


def check_gguf(plan: Plan, to: Path | None, told: Callable[[str], None] = lambda line: None) -> None:
    """Refuse a GGUF that no engine runs: by its header, or where that cannot be had, by its name. Tell of one that is
    llama.cpp's to run."""
    if all(target.is_complete() for target in cache.targets(plan, to)):
        return
    types: dict[str, int] = {}
    values: dict[str, object] = {}
    for file in plan.files[:1] if plan.joined else plan.files:

        def parse(data: bytes) -> gguf_header.Header | None:
            try:
                return gguf_header.parse(data)
            except gguf_header.IncompleteError:
                return None

        try:
            header = first_bytes(plan, file, parse)
        except gguf_header.HeaderError as error:
            raise CliError(
                f"`{file.path}` of {plan.repo} is no GGUF that can be read ({error})",
                "see what the repository's page says of it, or take another type",
            ) from error
        if header is not None:
            types |= header.tensors
            values |= header.values
    from cext import architectures

    name = str(plan.joined or plan.files[0].path)
    if not types:
        if (label := label_of(name)) is not None and (lacking := unrun_label(label.base)):
            if not _is_llamas(lacking):
                raise _refusal(plan, name, f"is {label.name}", lacking)
            told(f"({lacking} is no type of dsv2's own engine: llama.cpp will run it)")
        return
    _check_header(plan, name, values, types)
    if reason := not_ours(architecture_of(values, architectures()[0]), (_type_name(kind) for kind in types.values())):
        told(f"({reason}: llama.cpp will run it)")


def _check_header(plan: Plan, name: str, values: dict[str, object], types: dict[str, int]) -> None:
    from cext import formats

    if (what := no_chat_model(values, len(types))) is not None:
        raise CliError(f"`{name}` of {plan.repo} is {what}", "--no-check fetches it all the same, for other programs")
    runs = {f["gguf_type"] for f in formats()}
    for tensor, kind in types.items():
        if kind not in runs and not _is_llamas(_type_name(kind)):
            more = sum(k == kind for k in types.values()) - 1
            raise _refusal(plan, name, f"holds `{tensor}` and {more} more in type {kind}")


def _type_name(kind: int) -> str:
    """A tensor type's name, as ``cext.TensorInfo`` has it."""
    from gguf.constants import GGMLQuantizationType

    known = kind in GGMLQuantizationType._value2member_map_
    return GGMLQuantizationType(kind).name.lower() if known else f"type {kind}"


def _is_llamas(name: str) -> bool:
    """Whether llama.cpp has a tensor type, or the type that a mix is called by."""
    from gguf.constants import GGMLQuantizationType

    return name.upper().removesuffix("_MOE") in GGMLQuantizationType.__members__


def _refusal(plan: Plan, name: str, what: str, lacking: str = "") -> CliError:
    from cext import formats

    runs = ", ".join(f["name"].upper() for f in formats() if f["block_elements"] > 1)
    because = f" ({lacking})" if lacking else ""
    return CliError(
        f"`{name}` of {plan.repo} {what}{because}, which neither dsv2 nor llama.cpp runs",
        f"dsv2 runs {runs}: --type picks one of those; --no-check fetches this all the same",
    )


# The ggml type that most tensors of a mix have, where the mix is not called by it.
_MIXES = {"IQ2_M": "IQ2_S", "IQ3_XS": "IQ3_S", "IQ3_M": "IQ3_S"}


def unrun_label(base: str) -> str:
    """The tensor type that a label promises and the engine lacks; "" where it has it, or the label does not tell."""
    from cext import formats

    name = _MIXES.get(base, base)
    runs = {f["name"].upper() for f in formats()}
    parts = name.split("_")
    for n in range(len(parts), 0, -1):
        if "_".join(parts[:n]) in runs:
            return "" if set(parts[n:]) <= {"S", "M", "L", "XL"} else name
    return "" if name.isalnum() and name.startswith("Q") else name  # "Q4" alone says too little


def first_bytes(plan: Plan, file: RemoteFile, parse: Callable[[bytes], T | None]) -> T | None:
    """What parse makes of the beginning of a file, given more until it makes something; None where it cannot be had."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    sink = _Beginning(parse)
    end = min(file.nbytes, gguf_header.MAX_BYTES)
    headers = {**build_hf_headers(), "Accept-Encoding": "identity", "Range": f"bytes=0-{end - 1}"}
    told = client.translated_errors(plan.repo, plan.revision)
    url = hf_hub_url(plan.repo, file.path, revision=plan.commit)
    try:
        with transfer.quiet_client(), told, contextlib.suppress(_EnoughError):
            http_get(url, cast(BinaryIO, sink), headers=headers)
    except OSError as error:
        if error.errno is not None:
            raise
        raise CliError(  # the client holds the file's length against the bytes that came
            f"`{file.path}` of {plan.repo}: the hub lists {file.nbytes} bytes, and sends a file of another length",
            "try again; if it persists, something on the way (a proxy, a mirror) alters what the hub says",
        ) from error
    if sink.error is not None:
        raise sink.error
    return cast("T | None", sink.found) or parse(bytes(sink.data))


class _EnoughError(Exception):
    """The beginning has told what it can: the rest is not to be sent."""


class _Beginning:
    """What the client writes a file's first bytes into."""

    def __init__(self, parse: Callable[[bytes], object]) -> None:
        self.data = bytearray()
        self.found: object = None
        self.error: Exception | None = None
        self._parse, self._next = parse, FIRST_BYTES

    def write(self, data: bytes) -> int:
        self.data += data
        if len(self.data) >= self._next:
            self._next *= 2
            try:
                self.found = self._parse(bytes(self.data))
            except Exception as error:  # not the client's own, which would be explained as such
                self.error = error
            if self.found is not None or self.error is not None or len(self.data) >= gguf_header.MAX_BYTES:
                raise _EnoughError
        return len(data)

    def tell(self) -> int:
        return len(self.data)
