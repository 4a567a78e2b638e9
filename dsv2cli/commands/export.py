"""dsv2 export: a checkpoint for the engines of clusters, made as quantize makes a GGUF."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from dsv2cli import console, options
from dsv2cli.commands import quantize as quantizing
from dsv2cli.errors import UsageError

HELP = (
    "Make a calibrated 4-bit checkpoint of a checkpoint, for vLLM and SGLang; prints its folder. What does not take"
    " groups of columns, and what they want whole, stays in 16 bits."
)
EXAMPLES = (
    "export lite-chat -o lite-chat-w4a16",
    "export path/to/checkpoint -o small --group-size 32 --calibration my.txt",
)


class Format(StrEnum):
    """quantize.exporter.FORMATS."""

    compressed_tensors = "compressed-tensors"


class Group(StrEnum):
    """quantize.GROUPS, written out so that --help need not import them."""

    g128, g64, g32 = "128", "64", "32"


GROUP_HELP = (
    "Columns that share a scale. 128 is what kernels like best; 64 and 32 are truer, and 0.13 and 0.38 bits more."
)


SOURCE = typer.Argument(
    metavar="SRC", help="A folder with config.json and *.safetensors, or an alias that was downloaded."
)


def export(
    source: Annotated[str, SOURCE],
    out: Annotated[
        Path | None, options.place("-o", "--out", metavar="FOLDER", help="The folder to make.", show_default=False)
    ] = None,
    kind: Annotated[
        Format, typer.Option("--format", help="How it is stored: W4A16, packed.")
    ] = Format.compressed_tensors,
    group: Annotated[Group, typer.Option("--group-size", help=GROUP_HELP)] = Group.g128,
    calibration: Annotated[list[Path] | None, quantizing.CALIBRATION] = None,
    calibration_tokens: Annotated[int | None, quantizing.TOKENS] = None,
    sequential: Annotated[bool, quantizing.SEQUENTIAL] = True,
    evaluate: Annotated[bool, quantizing.EVALUATE] = True,
    threads: options.Threads = None,
    restart: Annotated[bool, typer.Option("--restart", help="Throw away the work of an earlier run.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The report as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No progress, no table.")] = False,
) -> None:
    if out is None:
        raise UsageError("-o is missing", "it names the folder that is made")
    if threads is not None:
        # numpy's BLAS reads it when it is loaded, which is now or never.
        os.environ["OPENBLAS_NUM_THREADS"] = str(threads)

    from dsv2cli import locate
    from quantize import Options
    from quantize import export as run
    from quantize.exporter import GGUF, work_folder

    chosen = Options(
        calibration=tuple(calibration or ()),
        max_tokens=calibration_tokens,
        sequential=sequential,
        evaluate=evaluate,
        threads=threads,
    )
    folder = locate.checkpoint(source)
    with quantizing.keeping_work(work_folder(out) / GGUF), quantizing.Display(quiet=quiet) as display:
        report = run(
            folder,
            out,
            chosen,
            display.progress,
            format=kind.value,
            group=int(group),
            say=display.say,
            restart=restart,
        )
    if as_json:
        console.print_json(report.as_json())
        return
    if not quiet:
        quantizing.show(report)
    console.say_path(report.path)
