"""subject.py: what is planned for: a model here or on the hub, known by its headers alone.

Of a model that is not here a hollow file is made: its header, then a hole as long as its weights. What studies files
(anatomy.py, the engine itself) then says of it what it would say of the real one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from dsv2cli import anatomy, hub, locate
from dsv2cli.anatomy import Anatomy
from dsv2cli.errors import CliError, UsageError
from dsv2cli.hub import cache, choice, gguf_header, preview
from dsv2cli.planner import quality

if TYPE_CHECKING:
    from gguf.constants import GGMLQuantizationType as Type

    from dsv2cli.hub.listing import Kind
    from quantize.recipe import Recipe
    from quantize.source.arch import Arch
    from quantize.source.tensors import Tensor

MAX_FILE_BYTES = 1 << 44  # of a model's file that is believed: 17 TB
MAX_CONFIG_BYTES = 1 << 20
OTHER_BYTES = 0.02  # of a listing, that its header need not explain
VOCABULARY_BYTES = 48  # of a file's header for each token: its text, score and kind, and the merge that makes it
LIES_HINT = "do not trust what serves it: HF_ENDPOINT, a proxy or a mirror may stand between"


@dataclass(frozen=True)
class Step:
    """Something to be done before the model runs. fetched: bytes over the network; disk: bytes of it that stay;
    work: more of it that go when it is done; folder: on which disk."""

    name: str
    fetched: int
    disk: int
    work: int
    folder: Path

    @property
    def free(self) -> int:
        """Of the disk."""
        return cache.free_bytes(self.folder)


@dataclass(frozen=True)
class Rung:
    """A size that the model comes in, or can be quantised to. read: bytes a decoded token; None where only the file's
    size is listed. kld: what quality.py knows of the type; None where it was not measured, or others made the file."""

    name: str
    nbytes: int
    read: int | None
    bits: float | None
    kld: float | None = None


@dataclass(frozen=True)
class Subject:
    """A model as it will be run. found: of its file, which may be hollow. n_fetched: bytes that knowing this took;
    n_whole: bytes that the model has where that was fetched from."""

    label: str
    found: Anatomy
    steps: tuple[Step, ...] = ()
    ladder: tuple[Rung, ...] = ()
    type: str | None = None
    remarks: tuple[str, ...] = ()
    n_fetched: int = 0
    n_whole: int = 0
    is_here: bool = True


@dataclass
class Asked:
    """What a person named, and how small it is to be. fetched: counts the bytes of what was looked at."""

    name: str | None
    type: str | None = None
    size: int | None = None
    fetched: int = field(default=0, init=False)

    @property
    def is_to_be_made(self) -> bool:
        return self.type is not None or self.size is not None

    @property
    def label(self) -> str:
        from quantize.allocate import format_size

        return f"{format_size(self.size)}B" if self.size is not None else (self.type or "q4_k_m")


@contextmanager
def opened(asked: Asked) -> Iterator[Subject]:
    """The subject that is meant; its hollow file goes with the block. CliError, UsageError, and what quantize and the
    engine raise for a model that they would refuse."""
    with TemporaryDirectory(prefix="dsv2-plan-") as folder:
        yield _find(asked, Path(folder))


def _find(asked: Asked, folder: Path) -> Subject:
    if asked.name is None or locate.expanded(asked.name).exists():
        return _local(asked, folder)
    try:
        reference = hub.resolve(asked.name)
    except UsageError as error:
        told = f"`{asked.name}` is no file, no alias and no owner/name"
        raise UsageError(str(error) if "://" in asked.name else told, error.hint) from error
    listing = hub.list_files(reference.repo, reference.revision or "main")
    if (reference.gguf_type or reference.glob) and asked.is_to_be_made:
        raise UsageError(
            f"`{asked.name}` names a GGUF that is made already", "leave out --type and --size, or give the checkpoint"
        )
    kind = _kind(listing, asked)
    wanted = reference.gguf_type or (asked.type if kind == "gguf" else None)
    if kind == "gguf" and asked.size is not None:
        raise UsageError(f"{reference.repo} holds GGUFs, which have sizes of their own", "--type names one of them")
    plan = hub.choose(listing, kind, wanted, reference.glob)
    for file in plan.files:
        if not 0 < file.nbytes <= MAX_FILE_BYTES:
            raise CliError(f"the hub lists `{file.path}` of {plan.repo} with {file.nbytes} bytes", LIES_HINT)
    return (
        _remote_gguf(asked, listing, plan, folder) if plan.kind == "gguf" else _remote_checkpoint(asked, plan, folder)
    )


def _kind(listing: hub.Listing, asked: Asked) -> Kind | None:
    """Which kind of a repository's files a --type means: a GGUF's own where it has no checkpoint."""
    from quantize.source import files

    has_weights = bool(files.weights([f.path for f in listing.files]))
    return "safetensors" if has_weights and asked.is_to_be_made else "gguf" if not has_weights else None


# What is here.


def _local(asked: Asked, folder: Path) -> Subject:
    from quantize.source.source import open_source
    from quantize.source.tensors import check, model_tensors

    place = None if asked.name is None else locate.expanded(asked.name)
    is_checkpoint = place is not None and place.is_dir() and (place / "config.json").is_file()
    if place is not None and (is_checkpoint or asked.is_to_be_made):
        source = locate.checkpoint(str(place))
        with open_source(source) as model:
            arch, name = model.arch, locate.model_name(str(place), source)
            check(arch, model.store, model_tensors(arch))
        return _to_be_made(asked, arch, name, folder, Path.cwd())
    found = anatomy.study(locate.model(asked.name))
    return Subject(found.name, found, n_whole=found.file_bytes)


# On the hub.


def _steps(plan: hub.Plan) -> tuple[Step, ...]:
    targets = cache.targets(plan, None)
    missing = plan.nbytes - sum(t.present_bytes for t in targets)
    joining = max((t.file.nbytes for t in targets if t.joined is not None), default=0)
    return (Step("download", missing, missing, joining, cache.cache_root()),)


def _remote_gguf(asked: Asked, listing: hub.Listing, plan: hub.Plan, folder: Path) -> Subject:
    if plan.joined:
        raise CliError(
            f"{plan.repo} has {plan.joined} in raw pieces, which only tell together what they are",
            f"dsv2 download joins them ({len(plan.files)} files, {plan.nbytes} bytes); plan takes the file then",
        )
    headers = sum(_hollow_of(asked, plan, file, folder / Path(file.path).name) for file in plan.files)
    try:
        found = anatomy.study(folder / Path(plan.files[0].path).name)
    except CliError:
        raise
    except Exception as error:
        if not hasattr(error, "hint"):
            raise
        told = str(error).replace(f"{folder}/", "")
        raise CliError(f"{plan.repo}: {told}", "its header and the length that the hub lists do not agree") from error
    if plan.nbytes > (1 + OTHER_BYTES) * (found.tensor_bytes + headers):
        raise CliError(
            f"the hub lists {plan.nbytes} bytes for `{plan.files[0].path}` of {plan.repo}, and its header tells of"
            f" {found.tensor_bytes + headers}",
            LIES_HINT,
        )
    label = f"{plan.repo}, {Path(plan.files[0].path).name}"
    among = choice.models([c for c in choice.candidates(listing.files) if not c.missing])
    rungs = [Rung(c.label.name if c.label else c.stem, c.nbytes, None, None) for c in among]
    return Subject(
        label, found, _steps(plan), tuple(sorted(rungs, key=lambda r: r.nbytes)), None, (), asked.fetched, plan.nbytes,
        is_here=False,
    )  # fmt: skip


def _hollow_of(asked: Asked, plan: hub.Plan, file: hub.RemoteFile, path: Path) -> int:
    """Write a GGUF's header, and as long a hole as the hub says that there are weights; bytes of the header."""
    here = _cached(plan, file)

    def parse(data: bytes) -> tuple[gguf_header.Header, bytes] | None:
        asked.fetched += max(0, len(data) - seen[0]) if here is None else 0
        seen[0] = len(data)
        try:
            header = gguf_header.parse(data)
        except gguf_header.IncompleteError:
            return None
        return header, data[: header.nbytes]

    seen = [0]
    try:
        if here is not None:
            with here.open("rb") as stream:
                found = parse(stream.read(min(file.nbytes, gguf_header.MAX_BYTES)))
        else:
            found = preview.first_bytes(plan, file, parse)
    except gguf_header.HeaderError as error:
        raise CliError(f"`{file.path}` of {plan.repo} is no GGUF that can be read ({error})", LIES_HINT) from error
    if found is None:
        raise CliError(
            f"`{file.path}` of {plan.repo}: its header does not end within the {file.nbytes} bytes that the hub lists",
            LIES_HINT,
        )
    try:
        path.write_bytes(found[1])
        os.truncate(path, file.nbytes)
    except OSError as error:
        raise CliError(
            f"no file of {file.nbytes} bytes can be laid in `{path.parent}`, empty as it is: {error.strerror}",
            "TMPDIR names another folder",
        ) from error
    return found[0].nbytes


def _cached(plan: hub.Plan, file: hub.RemoteFile) -> Path | None:
    """Where the file is already, of the right length."""
    folder = cache.cache_folder(plan.repo)
    for path in (folder / "blobs" / file.etag, folder / "snapshots" / plan.commit / file.path):
        if file.etag and path.is_file() and path.stat().st_size == file.nbytes:
            return path
    snapshot = folder / "snapshots" / plan.commit / file.path
    return snapshot if snapshot.is_file() and snapshot.stat().st_size == file.nbytes else None


def _remote_checkpoint(asked: Asked, plan: hub.Plan, folder: Path) -> Subject:
    from quantize.source import arch as arch_of
    from quantize.source import files

    config = next((f for f in plan.files if f.path == files.CONFIG), None)
    if config is None or config.nbytes > MAX_CONFIG_BYTES:
        what = "no config.json" if config is None else f"a config.json of {config.nbytes} bytes"
        raise CliError(f"{plan.repo} has {what}", "another revision may be whole")
    try:
        described = json.loads(_whole(asked, plan, config))
    except (ValueError, RecursionError) as error:
        raise CliError(f"{plan.repo}: config.json is not JSON ({error})", LIES_HINT) from error
    if not isinstance(described, dict):
        raise CliError(f"{plan.repo}: config.json is not an object", LIES_HINT)
    arch = arch_of.parse(described)
    weights = [f for f in plan.files if not files.is_companion(f.path)]
    remarks = _check_shards(asked, plan, weights, arch)
    made = _to_be_made(asked, arch, plan.repo.split("/")[1], folder, Path.cwd())
    return replace(
        made,
        label=f"{plan.repo}, as {asked.label}",
        steps=_steps(plan) + made.steps,
        remarks=remarks,
        n_fetched=asked.fetched,
        n_whole=plan.nbytes,
        is_here=False,
    )


def _whole(asked: Asked, plan: hub.Plan, file: hub.RemoteFile) -> bytes:
    if (here := _cached(plan, file)) is not None:
        return here.read_bytes()
    got: list[bytes] = []

    def keep(data: bytes) -> bytes | None:
        got[:] = [data]
        return data if len(data) >= file.nbytes else None

    preview.first_bytes(plan, file, keep)
    data = got[0] if got else b""
    asked.fetched += len(data)
    if len(data) != file.nbytes:
        raise CliError(
            f"`{file.path}` of {plan.repo} has {len(data)} bytes or more, and the hub lists {file.nbytes}", LIES_HINT
        )
    return data


def _check_shards(asked: Asked, plan: hub.Plan, weights: list[hub.RemoteFile], arch: Arch) -> tuple[str, ...]:
    """Hold the listing against a shard's own header and the shape that config.json describes. CliError where the shard
    cannot be so long; a remark where all are another model's size."""
    from quantize.source.safetensors import parse_header
    from quantize.source.stored import StoredTensor
    from quantize.source.tensors import model_tensors

    shard, seen = min(weights, key=lambda f: f.nbytes), [0]
    here = _cached(plan, shard)

    def parse(data: bytes) -> dict[str, StoredTensor] | None:
        asked.fetched += max(0, len(data) - seen[0]) if here is None else 0
        seen[0] = max(seen[0], len(data))
        return parse_header(Path(shard.path), data, shard.nbytes)

    if here is not None:
        with here.open("rb") as stream:
            stored = parse(stream.read(min(shard.nbytes, gguf_header.MAX_BYTES)))
    else:
        stored = preview.first_bytes(plan, shard, parse)
    if not stored:
        raise CliError(
            f"`{shard.path}` of {plan.repo}: no header within the {shard.nbytes} bytes that the hub lists", LIES_HINT
        )
    # The least that the shapes of config.json can take is four bits a value, the most four bytes and a draft head.
    n_values, listed = sum(t.size for t in model_tensors(arch)), sum(f.nbytes for f in weights)
    if n_values * 0.45 <= listed <= n_values * 5:
        return ()
    return (
        f"the hub lists {listed} bytes of weights and config.json describes {n_values} of them: one is another model's",
    )


# What is to be made.


def _to_be_made(asked: Asked, arch: Arch, name: str, folder: Path, out: Path) -> Subject:
    """The file that dsv2 quantize would make. Where types are to be chosen by a survey, those of the nearest mix stand
    for them: all together they come to as many bytes."""
    from quantize import budget, disk, recipe
    from quantize.allocate import format_size
    from quantize.source.tensors import model_tensors
    from quantize.write.writer import write_hollow

    tensors = model_tensors(arch)
    vocabulary = VOCABULARY_BYTES * arch.n_vocab
    chosen = recipe.find(asked.type or "q4_k_m")
    if asked.size is not None:
        budget.check_size(tensors, asked.size - vocabulary, vocabulary, f"--size {format_size(asked.size)}")
        chosen = recipe.nearest(arch, tensors, asked.size - vocabulary)
    types = _types(chosen, arch, tensors)
    path = folder / f"{name}.gguf"
    keys: dict[str, object] = {"general.architecture": arch.family.architecture, "general.name": name, **arch.keys()}
    write_hollow(path, keys, [(t.name, t.shape, types[t.name]) for t in tensors])
    found = anatomy.study(path)
    if asked.size is not None:
        found = _scaled(found, (asked.size - vocabulary) / found.tensor_bytes)
    nbytes = found.tensor_bytes + vocabulary
    found = replace(found, file_bytes=nbytes)
    room = disk.foreseen(arch, tensors, chosen, nbytes)
    bits = f"{8 * found.tensor_bytes / found.n_values:.2f} bits"
    rungs = [_rung(r.name, arch, tensors, _types(r, arch, tensors), found) for r in recipe.RECIPES.values()]
    step = Step("quantise", 0, room.file, room.work, out)
    return Subject(
        f"{name}, as {asked.label} ({bits})", found, (step,), tuple(sorted(rungs, key=lambda r: r.nbytes)),
        None if asked.size is not None else chosen.name, is_here=False,
    )  # fmt: skip


def _types(mix: Recipe, arch: Arch, tensors: list[Tensor]) -> dict[str, Type]:
    from quantize import recipe

    return {t.name: recipe.type_of(mix, arch, t, mix.wants_calibration) for t in tensors}


def _rung(name: str, arch: Arch, tensors: list[Tensor], types: dict[str, Type], found: Anatomy) -> Rung:
    from cext import TensorInfo
    from quantize.budget import padded_bytes

    sizes = {t.name: padded_bytes(t, types[t.name]) for t in tensors}
    infos = [
        TensorInfo(t.name, types[t.name].value, types[t.name].name.lower(), t.shape[::-1], 0, sizes[t.name])
        for t in tensors
    ]
    nbytes = sum(sizes.values())
    read = sum(part.token_bytes for part in anatomy.parts_of(infos, found.keys))
    bits = 8 * nbytes / sum(t.size for t in tensors)
    return Rung(name, nbytes + VOCABULARY_BYTES * arch.n_vocab, read, bits, quality.KLD.get(name))


def _scaled(found: Anatomy, ratio: float) -> Anatomy:
    """All weights so much smaller or larger: of a size between two mixes."""
    return replace(
        found,
        types=tuple(replace(t, nbytes=round(t.nbytes * ratio)) for t in found.types),
        parts=tuple(
            replace(p, nbytes=round(p.nbytes * ratio), token_bytes=round(p.token_bytes * ratio)) for p in found.parts
        ),
    )
