"""dsv2 download: plan, check the disk, fetch, print where it is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from dsv2cli import console

if TYPE_CHECKING:
    from dsv2cli.hub import Plan
    from dsv2cli.transfer import Transfer

HELP = "Fetch a model from the Hugging Face hub; prints where it is."
EXAMPLES = ("download lite-chat", "download lite --to models/lite", "download OWNER/NAME-GGUF --type iq4_xs")
KIND = typer.Option(help="Which of the repository's files; its safetensors where it has both.")
TYPE = typer.Option("--type", metavar="TYPE", help="Type of the GGUF to fetch; Q4_K_M where there are several.")


def download(
    repo: Annotated[
        str, typer.Argument(metavar="REPO|ALIAS", help="owner/name, or lite, lite-chat, coder-lite, v2.5 ...")
    ],
    revision: Annotated[str, typer.Option(metavar="R", help="Branch, tag or commit.")] = "main",
    to: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder to put the files in, not the shared cache.")
    ] = None,
    only: Annotated[Literal["safetensors", "gguf"] | None, KIND] = None,
    gguf_type: Annotated[str | None, TYPE] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print commit, files and hashes as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No progress.")] = False,
) -> None:
    from dsv2cli import hub, transfer

    plan = hub.plan(hub.resolve(repo), revision, only, gguf_type)
    job = transfer.Transfer(plan, to)
    if not quiet:
        tell_plan(plan, job)
    try:
        path = fetch(job, quiet)
    except KeyboardInterrupt:
        console.note("stopped; the same command resumes", "dim")
        raise
    if as_json:
        console.print_json(describe(plan, path, to))
    else:
        print(path)


def tell_plan(plan: Plan, job: Transfer) -> None:
    from dsv2cli import hub

    commit = f"{plan.revision} = {plan.commit[:12]}" if plan.revision != plan.commit else plan.commit[:12]
    here = f"{console.format_bytes(job.present_bytes)} here already" if job.present_bytes else "none here yet"
    console.note(
        f"{plan.repo} ({commit}): {len(plan.files)} file{'s' if len(plan.files) != 1 else ''},"
        f" {console.format_bytes(plan.nbytes)}; {'offline, from the cache' if plan.offline else here};"
        f" {console.format_bytes(hub.free_bytes(job.where))} free in {job.where}"
    )


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
    from dsv2cli import hub

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
                "path": str(t.link or t.final),
            }
            for t in hub.targets(plan, to)
        ],
    }
