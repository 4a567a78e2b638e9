"""dsv2 download: plan, check the disk, fetch, print where it is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from dsv2cli import console, options
from dsv2cli.errors import UsageError
from dsv2cli.text import kind_of

if TYPE_CHECKING:
    from dsv2cli.hub import Plan
    from dsv2cli.hub.transfer import Transfer

HELP = "Fetch a model from the Hugging Face hub; prints where it is."
EXAMPLES = (
    "download lite-chat",
    "download lite --to models/lite",
    "download OWNER/NAME-GGUF:IQ4_XS",
    "download OWNER/NAME-GGUF --file '*R1-Zero-Q4_K_M*'",
)
REPO = typer.Argument(
    metavar="REPO|ALIAS",
    help="owner/name, owner/name:TYPE, a link to the page or a file of it, or an alias: lite, glm-4.7-flash ...",
)
REVISION = typer.Option(metavar="R", help="Branch, tag or commit.", show_default="main")
KIND = typer.Option(help="Which of the repository's files; its safetensors where it has both.")
TYPE = typer.Option(
    "--type",
    metavar="TYPE",
    help="The GGUF to fetch, as its name has it: Q4_K_M, UD-Q4_K_XL ...",
    show_default="Q4_K_M",
)
FILE = typer.Option("--file", metavar="GLOB", help="The GGUF to fetch, by its path or name: '*Q4_K_M-V2*'.")
CHECK = typer.Option(
    "--check/--no-check", help="Refuse, before the weights, what dsv2 cannot quantise or no engine runs."
)


def print_aliases(wanted: bool) -> None:
    if wanted:
        from dsv2cli.hub import ALIASES

        width = max(map(len, ALIASES))
        console.say_text("\n".join(f"{alias:<{width}}  {repo}" for alias, repo in ALIASES.items()))
        raise typer.Exit


SHOW_ALIASES = typer.Option("--aliases", callback=print_aliases, is_eager=True, help="Print the short names and exit.")


def download(
    repo: Annotated[str, REPO],
    revision: Annotated[str | None, REVISION] = None,
    to: Annotated[
        Path | None, options.place("--to", metavar="DIR", help="Folder to put the files in, not the shared cache.")
    ] = None,
    only: Annotated[Literal["safetensors", "gguf"] | None, KIND] = None,
    gguf_type: Annotated[str | None, TYPE] = None,
    file: Annotated[str | None, FILE] = None,
    check: Annotated[bool, CHECK] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print commit, files and hashes as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No progress.")] = False,
    aliases: Annotated[bool, SHOW_ALIASES] = False,
) -> None:
    from dsv2cli import hub
    from dsv2cli.hub import preview, transfer

    named = hub.resolve(repo)
    hub.check_wishes(only, gguf_type or named.gguf_type, file or named.glob)
    if to is not None and (kind := kind_of(to)) not in ("", "a folder"):
        raise UsageError(f"`{to}` is {kind}", "--to takes a folder, which is made where there is none")
    listing = hub.list_files(named.repo, revision or named.revision or "main")
    plan = hub.choose(listing, only, gguf_type or named.gguf_type, file or named.glob)
    try:
        plan = preview.settle(
            plan,
            listing,
            to,
            lambda part: fetch(transfer.Transfer(part, to, keeps_ref=False), quiet),
            checks=check,
            told=lambda line: None if quiet else console.note(line, "dim"),
        )
        job = transfer.Transfer(plan, to)
        if not quiet:
            tell_plan(plan, job)
            warn_of(plan, job)
        path = fetch(job, quiet)
    except KeyboardInterrupt:
        console.note("stopped; the same command resumes", "dim")
        raise
    if as_json:
        console.print_json(describe(plan, path, to))
    else:
        console.say_path(path)


def tell_plan(plan: Plan, job: Transfer) -> None:
    from dsv2cli.hub import cache

    commit = f"{plan.revision} = {plan.commit[:12]}" if plan.revision != plan.commit else plan.commit[:12]
    here = f"{console.format_bytes(job.present_bytes)} here already" if job.present_bytes else "none here yet"
    console.note(
        f"{plan.repo} ({commit}): {name_of(plan)}{len(plan.files)} file{'s' if len(plan.files) != 1 else ''},"
        f" {console.format_bytes(plan.nbytes)}; {'offline, from the cache' if plan.offline else here};"
        f" {console.format_bytes(cache.free_bytes(job.where))} free in {job.where}"
    )


def warn_of(plan: Plan, job: Transfer) -> None:
    """A line, where what is fetched will not fit in this machine's memory, or cannot be quantised on its disk."""
    from dsv2cli.hub import cache
    from dsv2cli.planner import warning
    from quantize.source.files import CONFIG

    if plan.kind == "gguf":
        told = warning.of_weights(Path(plan.joined or plan.files[0].path).name, plan.nbytes)
    else:
        told = warning.of_checkpoint(cache.location(plan, job.to) / CONFIG, "q4_k_m", Path.cwd())
    if told is not None:
        console.warn(told)


def name_of(plan: Plan) -> str:
    """Which of a repository's GGUFs it is, since that was chosen."""
    return f"{Path(plan.joined or plan.files[0].path).name}, " if plan.kind == "gguf" else ""


def fetch(job: Transfer, quiet: bool) -> Path:
    """Run the transfer under a progress display: the whole, and each file that is moving."""
    from dsv2cli.hub import RemoteFile

    with console.progress(quiet=quiet, transfer=True) as display:
        whole = display.add_task("total", total=job.plan.nbytes, completed=job.present_bytes)
        bars = {}
        for target in job.targets:
            if not target.is_complete():
                name = Path(target.file.path).name
                bars[target.file] = display.add_task(
                    name if len(name) <= 40 else f"...{name[-37:]}",
                    total=target.file.nbytes,
                    completed=target.present_bytes,
                    visible=False,
                )

        def advanced(file: RemoteFile, n: int) -> None:
            display.advance(whole, n)
            if (bar := bars.get(file)) is not None:
                display.update(bar, advance=n)
                display.update(bar, visible=not display.tasks[bar].finished)

        job.advanced = advanced
        job.note = lambda message: None if quiet else console.note(message, "dim")
        return job.run()


def describe(plan: Plan, path: Path, to: Path | None) -> dict[str, object]:
    from dsv2cli.hub import cache

    return {
        "repo": plan.repo,
        "revision": plan.revision,
        "commit": plan.commit,
        "kind": plan.kind,
        "path": str(path),
        "nbytes": plan.nbytes,
        "files": [
            {
                "name": t.file.path,
                "nbytes": t.file.nbytes,
                "sha256" if t.file.sha256 else "git_sha1": t.file.etag,
                "path": str(path if t.joined else t.link or t.final),
            }
            for t in cache.targets(plan, to)
        ],
    }
