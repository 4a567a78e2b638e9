"""dsv2 quantize: options to the library, its progress to the screen, its report to a short table."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsv2cli import console
from dsv2cli.errors import UsageError

if TYPE_CHECKING:
    from quantize import Progress, Report

HELP = "Turn a checkpoint (safetensors) into a calibrated GGUF; prints its path."
EXAMPLES = (
    "quantize lite-chat",
    "quantize path/to/checkpoint --type iq4_xs -o model.gguf",
    "quantize lite --calibration my.txt --calibration chats.jsonl",
)


class Type(StrEnum):
    """The recipes of quantize.RECIPES, written out so that --help need not import them."""

    f32 = "f32"
    f16 = "f16"
    bf16 = "bf16"
    q8_0 = "q8_0"
    q6_k = "q6_k"
    q5_k_m = "q5_k_m"
    q4_k_m = "q4_k_m"
    iq4_xs = "iq4_xs"
    q3_k_m = "q3_k_m"
    q2_k = "q2_k"
    q4_0 = "q4_0"


SOURCE = typer.Argument(
    metavar="SRC", help="A folder with config.json and *.safetensors, or an alias that was downloaded."
)
CALIBRATION = typer.Option(
    "--calibration",
    metavar="FILE",
    help="Text, or chats as .jsonl, to calibrate with; repeatable. A text ships with dsv2.",
)
SHOWN_SHARE = 0.02  # of the file's bytes that a role must have for a line of its own
STAGES = {"read": "reading", "calibrate": "calibrating", "search": "searching scales", "encode": "encoding"}


def quantize(
    source: Annotated[str, SOURCE],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="GGUF", help="NAME-TYPE.gguf here if left out.")
    ] = None,
    kind: Annotated[Type, typer.Option("--type", case_sensitive=False, help="How small.")] = Type.q4_k_m,
    calibration: Annotated[list[Path] | None, CALIBRATION] = None,
    awq: Annotated[bool, typer.Option("--awq/--no-awq", help="Search and fold activation-aware scales.")] = True,
    threads: Annotated[int | None, typer.Option("-t", "--threads", metavar="N", min=1, help="Worker threads.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The report as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No progress, no table.")] = False,
) -> None:
    from dsv2cli import locate

    folder = locate.checkpoint(source)
    target = out or Path(default_name(source, folder, kind.value))
    if target.is_dir():
        raise UsageError(f"`{target}` is a folder", "-o takes the name of the file to write")
    if target.exists() and not force:
        raise UsageError(f"`{target}` exists", "--force replaces it, -o names another")

    from quantize import Options
    from quantize import quantize as run

    options = Options(type=kind.value, calibration=tuple(calibration or ()), awq=awq, threads=threads)
    with console.progress(quiet=quiet) as display:
        bar = display.add_task("quantising", total=1.0, detail="")
        report = run(folder, target, options, lambda p: display.update(bar, completed=p.fraction, detail=stage(p)))
    if as_json:
        console.print_json(describe(report))
        return
    if not quiet:
        show(report)
    print(report.path)


def default_name(source: str, folder: Path, kind: str) -> str:
    """The model's name and the type: the repository's for an alias, else the folder's."""
    from dsv2cli import hub

    name = folder.resolve().name
    if not Path(source).expanduser().exists():
        name = hub.resolve(source).split("/")[1]
    return f"{name}-{kind.upper()}.gguf"


def stage(progress: Progress) -> str:
    where = f"layer {progress.layer + 1} of {progress.n_layer}" if progress.layer >= 0 else ""
    doing = f"{where} {STAGES.get(progress.stage, progress.stage)}".strip()
    return f"{doing}, {console.format_bytes(progress.bytes_written)} written"


def show(report: Report) -> None:
    """The summary, on stderr: stdout has the path."""
    from dsv2cli.commands.inspect import table

    made = table(f"{report.path.name}: {report.bits_per_weight:.2f} bits/weight", "role", "type", "size", "bits/weight")
    large = [role for role in report.roles if role.nbytes >= report.nbytes * SHOWN_SHARE]
    for role in large:
        made.add_row(role.role, ", ".join(role.types), console.format_bytes(role.nbytes), f"{role.bits_per_weight:.2f}")
    if rest := [role for role in report.roles if role not in large]:
        nbytes, n_values = sum(role.nbytes for role in rest), sum(role.n_values for role in rest)
        made.add_row(f"{len(rest)} more", "", console.format_bytes(nbytes), f"{8 * nbytes / n_values:.2f}")
    out = console.stderr_console()
    out.print(made)
    kept = [fold for fold in report.folds if fold.kept]
    lines = [f"{console.format_bytes(report.source_nbytes)} -> {console.format_bytes(report.nbytes)}"]
    if report.calibration_tokens:
        lines.append(f"calibrated on {report.calibration_tokens} tokens of {', '.join(report.calibration_sources)}")
    if report.folds:
        lines.append(f"{len(kept)} of {len(report.folds)} scale folds kept")
    lines.append(f"{console.format_seconds(report.seconds)}")
    console.note("; ".join(lines))
    for note in report.notes:
        console.warn(note)


def describe(report: Report) -> dict[str, Any]:
    return {
        "path": str(report.path),
        "type": report.recipe,
        "nbytes": report.nbytes,
        "source_nbytes": report.source_nbytes,
        "n_values": report.n_values,
        "bits_per_weight": report.bits_per_weight,
        "roles": [
            {"role": r.role, "types": r.types, "nbytes": r.nbytes, "bits_per_weight": r.bits_per_weight}
            for r in report.roles
        ],
        "calibration": {
            "tokens": report.calibration_tokens,
            "sources": report.calibration_sources,
            "sha256": report.calibration_sha256,
        },
        "folds": {"tried": len(report.folds), "kept": sum(f.kept for f in report.folds)},
        "left_out": report.left_out,
        "notes": report.notes,
        "seconds": report.seconds,
    }
