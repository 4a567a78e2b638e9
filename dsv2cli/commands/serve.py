"""dsv2 serve: a model for other programs, over HTTP."""

from __future__ import annotations

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
ORIGIN_HELP = (
    "Answer web pages of this origin too, as https://chat.example.org; localhost: all that this machine serves (may be"
    " repeated)."
)
HOST_NAME_HELP = "Answer requests for this host name beside localhost and addresses (may be repeated)."
ALIAS_HELP = "The model's name, in place of its own, and further names that it answers to."
TAGS_HELP = "Words that the list of models tells of this one, for programs that choose by them."
LIMIT_HELP = "Most tokens of an answer that asks for no number."
VERBOSE_HELP = 'Tell with a chat\'s answer the prompt that it was written from; "verbose": true asks for one.'
TEMPLATE_HELP = (
    "How chats are written, in place of what the model's file says: a Jinja template, or a name (chatml, llama3)."
)
SAME_HELP = "The same answer to the bit whoever else is served: every sequence alone, nothing kept. Slower."
DISK_HELP = "A folder where what has been read is kept too: found again after a restart, and where --cache is full."
DISK_SIZE_HELP = "Most bytes in --cache-dir; what was used least recently goes first."
SLOTS_HELP = "A folder where clients may save what a slot has read, and restore it (POST /slots/0?action=save)."
FILES_HELP = (
    "Where files and batches of clients are kept, and gone on with after a restart; else they go with the server."
)


def serve(
    model: options.Model = None,
    host: Annotated[str, typer.Option("--host", metavar="ADDRESS,...", help="Where to listen.")] = "127.0.0.1",
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
    temperature: options.Temperature = options.TEMPERATURE,
    top_k: options.TopK = options.TOP_K,
    top_p: options.TopP = options.TOP_P,
    min_p: options.MinP = options.MIN_P,
    repeat_penalty: options.RepeatPenalty = options.REPEAT_PENALTY,
    seed: options.Seed = None,
    limit: Annotated[int | None, number("-n", "--max-tokens", within=options.COUNT, help=LIMIT_HELP)] = None,
    think: options.Think = "auto",
    template: Annotated[str | None, typer.Option("--chat-template", metavar="JINJA", help=TEMPLATE_HELP)] = None,
    template_file: Annotated[
        Path | None, options.place("--chat-template-file", metavar="FILE", help="The same from a file.")
    ] = None,
    threads: options.Threads = None,
    engine: options.Engine = "auto",
    rpc: options.Rpc = None,
    gpu_layers: options.GpuLayers = 0,
    ram: options.Ram = "auto",
    gpu: options.Gpu = "auto",
    vram: options.Vram = None,
    alias: Annotated[str | None, typer.Option("--alias", metavar="NAME,...", help=ALIAS_HELP)] = None,
    tags: Annotated[str | None, typer.Option("--tags", metavar="WORD,...", help=TAGS_HELP)] = None,
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
    slots: Annotated[bool, typer.Option("--slots/--no-slots", help="Tell what is being answered (/slots).")] = True,
    metrics: Annotated[bool, typer.Option("--metrics/--no-metrics", help="Counters for Prometheus.")] = True,
    page: Annotated[bool, typer.Option("--page/--no-page", help="The page at /.")] = True,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help=VERBOSE_HELP)] = False,
    quiet: options.Quiet = False,
) -> None:
    from dsv2cli.server.guard import is_loopback

    hosts = hosts_in(host)
    cache_bytes = options.cache_bytes(cache)
    disk = None if cache_dir is None else (cache_dir, options.size("--cache-disk", cache_disk, "as 20G or 500M"))
    for option, given in (("--cache-dir", cache_dir), ("--slot-save-path", slot_save_path)):
        if given is not None and (deterministic or not cache_bytes):
            raise UsageError(f"{option}, but {'--deterministic' if deterministic else '--cache 0'} keeps nothing")
    if slot_save_path is not None and not slot_save_path.is_dir():
        raise CliError(f"--slot-save-path: `{slot_save_path}` is no folder")
    keys = [*(api_key or []), *keys_in(api_key_file)]
    rules = rules_of(host, keys, allowed_host or [], cors_origin or [])
    if rules.keys and no_auth:
        raise UsageError(
            "--no-auth asks nobody for a key, and there is one",
            "leave out --no-auth, or --api-key, --api-key-file and DSV2_API_KEY",
        )
    if not rules.keys and not no_auth and (reachable := [name for name in hosts if not is_loopback(name)]):
        raise UsageError(
            f"{', '.join(reachable)} can be reached from other machines, and no key is asked for",
            "--api-key asks for one; --no-auth lets anybody in",
        )

    from dsv2cli import locate
    from dsv2cli.server import app, process
    from dsv2cli.server.generation import Params

    names = names_in("--alias", alias)
    settings = process.Settings(
        context,
        parallel,
        queue,
        cache_bytes,
        kv,
        names[0] if names else None,
        deterministic,
        params=Params(temperature, top_k, top_p, min_p, repeat_penalty, seed=seed),
        n_predict=limit,
        disk=disk,
        slot_folder=slot_save_path,
        aliases=tuple(names[1:]),
        tags=tuple(names_in("--tags", tags)),
        thinking=options.THINKING[think],
        template=template_in(template, template_file),
        verbose=verbose,
    )
    wishes = settings.wishes(engine, rpc, gpu_layers, told=not quiet, ram=ram, gpu=gpu, vram=vram)
    path = locate.model(model)
    listening = process.listen_all(hosts, port)
    if not quiet:
        console.note(", ".join(f"http://{process.address(one)}/v1" for one in listening) + " (Ctrl-C stops)")
    is_open = {"slots": slots, "metrics": metrics, app.PAGE: page}
    closed = frozenset(part for part in app.CLOSABLE if not is_open[part])
    plan = process.Plan(process.load(path, threads, settings, wishes), rules, files=files_dir, closed=closed)
    process.Serving(plan).run_alone(*listening)


def hosts_in(text: str) -> list[str]:
    """The addresses of --host. UsageError where there is none."""
    hosts = [host.strip().strip("[]") for host in text.split(",")]
    if not all(hosts) or len(set(hosts)) < len(hosts):
        raise UsageError(f"--host {text!r} is no list of addresses", "as 127.0.0.1, or 127.0.0.1,::1")
    return hosts


def names_in(option: str, text: str | None) -> list[str]:
    """The names that an option lists, each once. UsageError."""
    names = [] if text is None else list(dict.fromkeys(name.strip() for name in text.split(",")))
    if not all(names):
        raise UsageError(f"{option} {text!r} holds a name of nothing")
    return names


def template_in(text: str | None, file: Path | None) -> str | None:
    """The chat template in place of the model's. CliError, UsageError."""
    from dsv2cli.server.templates import NAMED

    if text is not None and file is not None:
        raise UsageError("--chat-template and --chat-template-file each name a template: give one of them")
    if text in NAMED:
        return NAMED[text].source
    if text is not None and "{" not in text:
        raise UsageError(f"--chat-template {text[:40]!r} is neither Jinja nor a name", "known: " + ", ".join(NAMED))
    if file is None:
        return text
    try:
        return file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CliError(f"cannot read the template in `{file}`: {getattr(error, 'strerror', None) or error}") from None


def keys_in(file: Path | None) -> list[str]:
    given = [key] if (key := os.environ.get("DSV2_API_KEY")) else []
    if file is None:
        return given
    try:
        lines = file.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CliError(f"cannot read the keys in `{file}`: {getattr(error, 'strerror', None) or error}") from None
    if not (found := [line.strip() for line in lines if line.strip()]):
        raise CliError(f"`{file}` holds no key", "--api-key-file names a file of keys, one a line")
    return given + found


def rules_of(host: str, keys: Iterable[str], hosts: Iterable[str], origins: Iterable[str]) -> Rules:
    """host: where it listens, as given; hosts: further names."""
    from dsv2cli.server.guard import Rules, digest

    keys = list(keys)
    if any(not key.strip() for key in keys):
        raise UsageError("an API key is empty")
    if "*" in (origins := list(origins)):
        raise UsageError("--cors-origin * would let every web page in", "name the origins that are meant")
    return Rules(
        frozenset(digest(os.fsencode(key.strip())) for key in keys),
        frozenset(name.lower() for name in (*hosts_in(host), *hosts)),
        frozenset(origin.rstrip("/").lower() for origin in origins),
    )
