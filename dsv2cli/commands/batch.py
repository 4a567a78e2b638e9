"""dsv2 batch: a file of requests answered into a file."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsv2cli import options
from dsv2cli.errors import CliError, UsageError
from dsv2cli.options import Range, number

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from dsv2cli.batch.ledger import Ledger
    from dsv2cli.batch.lines import Bad, Line
    from dsv2cli.server.cluster import Opening
    from dsv2cli.server.offline import Answerer

HELP = "Answer a file of requests, as OpenAI's batches have them. Killed at any time, the same command goes on."
EXAMPLES = (
    "batch requests.jsonl -o answers.jsonl model.gguf",
    'batch reviews.csv -o answers.jsonl --template "Is this praise or blame? {review}" --max-tokens 5',
    "batch texts.txt -o answers.jsonl --template request.json --parallel 32",
    "batch requests.jsonl -o part2.jsonl model.gguf --shard 2/4",
)
IN_HELP = (
    "Lines of JSON with custom_id, url and body; with --template a CSV (its first line names the columns) or a text."
)
OUT_HELP = "Where answers go, a line each as they come; goes on with what is there."
ERRORS_HELP = "Where refusals go; OUT with .errors before its suffix if left out."
TEMPLATE_HELP = "A message with {column} in it ({text} of a text), or a .json file: a whole body with them."
SEED_HELP = "Lines that name no seed get one of their own, from this and their custom_id."
SHARD_HELP = "Answer the i-th of n parts only, as 2/4, for several machines. Each has an OUT of its own."
RAY_HELP = (
    "Answer on a Ray cluster, whose machines have dsv2 and the model's file under the same name: its address, auto for"
    " the one that this machine is part of, local for one of its own."
)
ACTORS_HELP = "Models that are opened there; one a machine if left out."
SKIP_HELP = "Lines that cannot be answered go to the errors, and the others are answered."
RETRY_HELP = "Ask again what failed before."
RESTART_HELP = "Throw away what OUT holds and start over."
SAME_HELP = (
    "The same answer to the bit whatever else is answered beside it. Slower: every sequence alone, nothing kept."
)
LARGEST_QUEUE = 1 << 20  # the run itself says how many wait


def batch(
    requests: Annotated[str, typer.Argument(metavar="IN", help=IN_HELP)],
    model: options.Model = None,
    out: Annotated[Path | None, options.place("-o", "--output", metavar="OUT.jsonl", help=OUT_HELP)] = None,
    errors: Annotated[Path | None, options.place("--errors", metavar="FILE", help=ERRORS_HELP)] = None,
    template: Annotated[str | None, typer.Option("--template", metavar="TEXT|FILE.json", help=TEMPLATE_HELP)] = None,
    limit: Annotated[
        int | None,
        number("-n", "--max-tokens", within=options.COUNT, help="Most tokens of an answer whose line names no number."),
    ] = None,
    temperature: Annotated[
        float,
        number("--temp", metavar="X", within=Range(0, options.LARGEST), help="Of lines that name none."),
    ] = options.TEMPERATURE,
    seed: Annotated[int, number("--seed", within=Range(0, options.MAX_SEED), help=SEED_HELP)] = 0,
    parallel: options.Parallel = 16,
    context: options.RequestContext = None,
    kv: options.Kv = "f16",
    cache: options.Cache = "2G",
    threads: options.Threads = None,
    engine: options.Engine = "auto",
    rpc: options.Rpc = None,
    gpu_layers: options.GpuLayers = 0,
    ram: options.Ram = "auto",
    gpu: options.Gpu = "auto",
    vram: options.Vram = None,
    shard: Annotated[str, typer.Option("--shard", metavar="I/N", help=SHARD_HELP)] = "1/1",
    ray: Annotated[str | None, typer.Option("--ray", metavar="ADDRESS", help=RAY_HELP)] = None,
    ray_actors: Annotated[int | None, number("--ray-actors", within=Range(1, 4096), help=ACTORS_HELP)] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help=SKIP_HELP)] = False,
    retry: Annotated[bool, typer.Option("--retry", help=RETRY_HELP)] = False,
    restart: Annotated[bool, typer.Option("--restart", help=RESTART_HELP)] = False,
    deterministic: Annotated[bool, typer.Option("--deterministic", help=SAME_HELP)] = False,
    quiet: options.Quiet = False,
) -> None:
    if out is None:
        raise UsageError("-o is missing", "it names the file that the answers go to")
    if ray_actors is not None and ray is None:
        raise UsageError("--ray-actors counts models on a Ray cluster, and none is asked", "--ray names one")
    cache_bytes = options.cache_bytes(cache)

    from dsv2cli import locate
    from dsv2cli.batch.ledger import places
    from dsv2cli.batch.shards import Shard
    from dsv2cli.server import offline, process
    from dsv2cli.server.generation import Params

    settings = process.Settings(
        context, parallel, LARGEST_QUEUE, cache_bytes, kv, None, deterministic, Params(temperature=temperature), limit
    )
    wishes = settings.wishes(engine, rpc, gpu_layers, told=not quiet, ram=ram, gpu=gpu, vram=vram)
    part = Shard.parse(shard)
    path = locate.model(model)
    out, errors = places(out, errors, [path, *_files_of(requests, template)])
    data = _read(requests)
    lines, bad = _lines(data, requests, template)
    if not lines and not bad:
        raise CliError(f"`{requests}` holds no line")
    mine = part.numbers(lines, bad)
    origin = {
        "the input": f"{len(data)} bytes, sha256 {hashlib.sha256(data).hexdigest()}",
        "--template": _read(template).decode(errors="replace") if template and template.endswith(".json") else template,
        "--max-tokens": limit,
        "--temp": temperature,
        "--seed": seed,
        "--ctx": context,
        "--kv": kv,
        "--deterministic": deterministic,
        "--shard": str(part),
    }
    offline.run(
        offline.Plan(
            [line for line in lines if line.number in mine],
            [one for one in bad if one.number in mine],
            _answerer((path, threads, settings, wishes), ray, ray_actors),
            _ledger(out, errors, origin, restart=restart),
            seed,
            skip_bad,
            retry,
            quiet,
        )
    )


def _answerer(opening: Opening, ray: str | None, n: int | None) -> AbstractContextManager[Answerer]:
    from dsv2cli.server import offline, process

    if ray is None:
        return offline.here(process.load(*opening))
    from dsv2cli.server import cluster

    return cluster.there(ray, n, opening)


def _ledger(out: Path, errors: Path, origin: dict[str, Any], *, restart: bool) -> Callable[[str], Ledger]:
    from dsv2cli.batch.ledger import Ledger

    return lambda model: Ledger(out, errors, {**origin, "the model": model}, restart=restart)


def _files_of(requests: str, template: str | None) -> list[Path]:
    """The files that a run reads."""
    found = [] if requests == "-" else [Path(requests)]
    return [*found, Path(template)] if template and template.endswith(".json") else found


def _read(name: str) -> bytes:
    if name == "-":
        return sys.stdin.buffer.read()
    try:
        return Path(name).read_bytes()
    except OSError as error:
        raise CliError(f"`{name}`: {error.strerror or error}") from None


def _lines(data: bytes, name: str, template: str | None) -> tuple[list[Line], list[Bad]]:
    from dsv2cli.batch import table
    from dsv2cli.batch.lines import check, numbered
    from dsv2cli.server.desk import JOBS

    suffix = Path(name).suffix.lower()
    if template is None:
        if suffix in table.DELIMITERS:
            raise UsageError(f"`{name}` is a table", "--template says what is asked of each row")
        return check(numbered(data), JOBS)
    return check(table.requests(data, suffix, name, table.Template.parse(template)), JOBS)
