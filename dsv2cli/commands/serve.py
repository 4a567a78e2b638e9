"""dsv2 serve: a model for other programs, over HTTP."""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dsv2cli import console, options
from dsv2cli.errors import CliError, UsageError
from dsv2cli.options import Range, number

if TYPE_CHECKING:
    from collections.abc import Iterable

    from dsv2cli.server.guard import Rules

HELP = "Serve a model to other programs: OpenAI's interface and others, on this machine alone unless told otherwise."
EXAMPLES = (
    "serve",
    "serve model.gguf --port 9000 --ctx 16384 --parallel 8",
    "serve model.gguf --host 0.0.0.0 --api-key-file keys.txt",
)
KEY_HELP = "Answer only who brings this key (may be repeated; DSV2_API_KEY likewise)."
ORIGIN_HELP = "Answer web pages of this origin too, as https://chat.example.org (may be repeated)."
HOST_NAME_HELP = "Answer requests for this host name beside localhost and addresses (may be repeated)."
SAME_HELP = "The same answer to the bit whoever else is served: every sequence alone, nothing kept. Slower."
DISK_HELP = "A folder where what has been read is kept too: found again after a restart, and where --cache is full."
DISK_SIZE_HELP = "Most bytes in --cache-dir; what was used least recently goes first."
SLOTS_HELP = "A folder where clients may save what a slot has read, and restore it (POST /slots/0?action=save)."
FILES_HELP = (
    "Where files and batches of clients are kept, and gone on with after a restart; else they go with the server."
)


def serve(
    model: options.Model = None,
    host: Annotated[str, typer.Option("--host", metavar="ADDRESS", help="Where to listen.")] = "127.0.0.1",
    port: Annotated[int, number("--port", within=Range(0, 65535), help="0: any that is free.")] = 8080,
    parallel: options.Parallel = 4,
    queue: Annotated[int, number("--queue", within=Range(1, 4096), help="Requests that may wait beside them.")] = 64,
    context: options.RequestContext = None,
    kv: options.Kv = "f16",
    cache: options.Cache = "2G",
    cache_dir: Annotated[
        Path | None, options.place("--cache-dir", metavar="FOLDER", help=DISK_HELP, show_default=False)
    ] = None,
    cache_disk: Annotated[str, typer.Option("--cache-disk", metavar="SIZE", help=DISK_SIZE_HELP)] = "20G",
    slot_save_path: Annotated[
        Path | None, options.place("--slot-save-path", metavar="FOLDER", help=SLOTS_HELP, show_default=False)
    ] = None,
    threads: options.Threads = None,
    engine: options.Engine = "auto",
    rpc: options.Rpc = None,
    gpu_layers: options.GpuLayers = 0,
    ram: options.Ram = "auto",
    alias: Annotated[str | None, typer.Option("--alias", help="The model's name, in place of its own.")] = None,
    api_key: Annotated[list[str] | None, typer.Option("--api-key", metavar="KEY", help=KEY_HELP)] = None,
    api_key_file: Annotated[
        Path | None, options.place("--api-key-file", metavar="FILE", help="Keys, one a line.")
    ] = None,
    no_auth: Annotated[bool, typer.Option("--no-auth", help="Other machines may ask without a key.")] = False,
    allowed_host: Annotated[
        list[str] | None, typer.Option("--allowed-host", metavar="NAME", help=HOST_NAME_HELP)
    ] = None,
    cors_origin: Annotated[list[str] | None, typer.Option("--cors-origin", metavar="ORIGIN", help=ORIGIN_HELP)] = None,
    files_dir: Annotated[Path | None, options.place("--files-dir", metavar="DIR", help=FILES_HELP)] = None,
    deterministic: Annotated[bool, typer.Option("--deterministic", help=SAME_HELP)] = False,
    quiet: options.Quiet = False,
) -> None:
    cache_bytes = options.cache_bytes(cache)
    disk = None if cache_dir is None else (cache_dir, options.size("--cache-disk", cache_disk, "as 20G or 500M"))
    for option, given in (("--cache-dir", cache_dir), ("--slot-save-path", slot_save_path)):
        if given is not None and (deterministic or not cache_bytes):
            raise UsageError(f"{option}, but {'--deterministic' if deterministic else '--cache 0'} keeps nothing")
    if slot_save_path is not None and not slot_save_path.is_dir():
        raise CliError(f"--slot-save-path: `{slot_save_path}` is no folder")
    rules = rules_of(host, [*(api_key or []), *keys_in(api_key_file)], allowed_host or [], cors_origin or [])
    if not rules.keys and not no_auth and not is_loopback(host):
        raise UsageError(
            f"{host} can be reached from other machines, and no key is asked for",
            "--api-key asks for one; --no-auth lets anybody in",
        )

    from cext import MAX_STEP
    from dsv2cli import locate
    from dsv2cli.residency import Beside
    from dsv2cli.server import process

    beside = Beside(context, kv, n_seq=parallel, caches=cache_bytes, n_step=MAX_STEP)
    wishes = options.wishes(engine, rpc, gpu_layers, n_seq=parallel, told=not quiet, ram=ram, beside=beside)
    settings = process.Settings(
        context, parallel, queue, cache_bytes, kv, alias, deterministic, disk=disk, slot_folder=slot_save_path
    )
    path = locate.model(model)
    listening = process.listen(host, port)
    if not quiet:
        console.note(f"http://{process.address(listening)}/v1 (Ctrl-C stops)")
    plan = process.Plan(process.load(path, threads, settings, wishes), rules, files=files_dir)
    process.Serving(plan).run_alone(listening)


def keys_in(file: Path | None) -> list[str]:
    given = [key] if (key := os.environ.get("DSV2_API_KEY")) else []
    if file is None:
        return given
    try:
        lines = file.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CliError(f"cannot read the keys in `{file}`: {getattr(error, 'strerror', None) or error}") from None
    return given + [line.strip() for line in lines if line.strip()]


def rules_of(host: str, keys: Iterable[str], hosts: Iterable[str], origins: Iterable[str]) -> Rules:
    from dsv2cli.server.guard import Rules, digest

    keys = list(keys)
    if any(not key.strip() for key in keys):
        raise UsageError("an API key is empty")
    if "*" in (origins := list(origins)):
        raise UsageError("--cors-origin * would let every web page in", "name the origins that are meant")
    return Rules(
        frozenset(digest(os.fsencode(key.strip())) for key in keys),
        frozenset({host.lower(), *(name.lower() for name in hosts)}),
        frozenset(origin.rstrip("/").lower() for origin in origins),
    )


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
