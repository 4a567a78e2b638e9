"""dsv2 quantize: options to the library, its progress to the screen, its report to a short table."""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dsv2cli import console, options
from dsv2cli.errors import UsageError
from dsv2cli.options import Range, number

if TYPE_CHECKING:
    from quantize import Progress, Report

HELP = "Turn a checkpoint (safetensors), or a GGUF in BF16, F16 or F32, into a calibrated GGUF; prints its path."
EXAMPLES = (
    "quantize lite-chat",
    "quantize path/to/checkpoint --type iq4_xs -o model.gguf",
    "quantize model-BF16.gguf --type q4_k_m -o model-q4.gguf",
    "quantize lite --size 9.5G",
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
    metavar="SRC",
    help="A folder with config.json and *.safetensors, a GGUF in BF16, F16 or F32, or an alias that was downloaded.",
)
CALIBRATION = options.place(
    "--calibration",
    metavar="FILE",
    help="Text, or chats as .jsonl, to calibrate with; repeatable. A text ships with dsv2.",
)
TOKENS = number(
    "--calibration-tokens",
    within=Range(1024, options.C_INT),
    help="Of the calibration text, evenly thinned: fewer take less time and memory.",
    show_default="65536, more for narrow models",
)
SEQUENTIAL = typer.Option(
    "--sequential/--no-sequential",
    help="Encode each layer for what the file's layers before it give: truer, for about twice the time.",
)
BPW = typer.Option("--bpw", metavar="BITS", help="How small: bits a weight, as 4.25.")
SIZE = typer.Option("--size", metavar="SIZE", help="How small: the whole file, as 9.5G (10^9 bytes) or 9.5GiB.")
PLAIN_MIX = typer.Option("--plain-mix", help="The fixed types of --type's mix, not those that this model needs.")
EVALUATE = typer.Option(
    "--evaluate/--no-evaluate", help="Measure the file against the original on text held back from calibration."
)
SHOWN_SHARE = 0.02  # of the file's bytes that a role must have for a line of its own
STAGES = {
    "read": "reading",
    "survey": "surveying",
    "calibrate": "calibrating",
    "search": "searching scales",
    "encode": "encoding",
    "evaluate": "measuring",
    "finish": "finishing",
}
BAR_ROOM = 52  # columns of a line of progress before its detail
LOG_SECONDS = 30.0  # between lines of progress where there is no terminal


def quantize(
    source: Annotated[str, SOURCE],
    out: Annotated[
        Path | None, options.place("-o", "--out", metavar="GGUF", help="NAME-TYPE.gguf here if left out.")
    ] = None,
    kind: Annotated[
        Type | None,
        typer.Option("--type", case_sensitive=False, help="How small: the size of that mix.", show_default="q4_k_m"),
    ] = None,
    bpw: Annotated[str | None, BPW] = None,
    size: Annotated[str | None, SIZE] = None,
    plain_mix: Annotated[bool, PLAIN_MIX] = False,
    calibration: Annotated[list[Path] | None, CALIBRATION] = None,
    calibration_tokens: Annotated[int | None, TOKENS] = None,
    sequential: Annotated[bool, SEQUENTIAL] = True,
    awq: Annotated[bool, typer.Option("--awq/--no-awq", help="Search and fold activation-aware scales.")] = False,
    evaluate: Annotated[bool, EVALUATE] = True,
    threads: options.Threads = None,
    restart: Annotated[
        bool,
        typer.Option("--restart", help="Throw away the work of an earlier run, but for a survey that still holds."),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The report as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No progress, no table.")] = False,
) -> None:
    from dsv2cli import locate

    check_budget(kind, bpw, size, plain_mix)
    if threads is not None:
        # numpy's BLAS reads it when it is loaded, which is now or never.
        os.environ["OPENBLAS_NUM_THREADS"] = str(threads)

    from quantize import Options, parse_size
    from quantize import quantize as run

    options = Options(
        type=(kind or Type.q4_k_m).value,
        bpw=float(bpw) if bpw is not None else None,
        size=parse_size(size) if size is not None else None,
        plain_mix=plain_mix,
        calibration=tuple(calibration or ()),
        max_tokens=calibration_tokens,
        sequential=sequential,
        awq=awq,
        evaluate=evaluate,
        threads=threads,
    )
    folder = locate.checkpoint(source)
    target = out or Path(default_name(source, folder, bpw_name(bpw) or size_name(size) or (kind or Type.q4_k_m).value))
    check_target(target, force)
    if (
        not quiet
        and bpw is None
        and (told := forewarned(folder, size, (kind or Type.q4_k_m).value, target)) is not None
    ):
        console.warn(told)
    with keeping_work(target), Display(quiet=quiet) as display:
        report = run(folder, target, options, display.progress, say=display.say, restart=restart)
    if as_json:
        console.print_json(report.as_json())
        return
    if not quiet:
        show(report)
    console.say_path(report.path)


def check_budget(kind: Type | None, bpw: str | None, size: str | None, plain_mix: bool) -> None:
    """One way to say how small. Sizes are checked where they are parsed."""
    given = [name for name, value in (("--type", kind), ("--bpw", bpw), ("--size", size)) if value is not None]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} both say how small", "give one of them")
    if plain_mix and (bpw is not None or size is not None):
        raise UsageError(f"--plain-mix has the size of its --type, {given[0]} asks for another", "give one of them")
    if bpw is not None and not re.fullmatch(r"\d+\.?\d*|\.\d+", bpw):
        raise UsageError(f"--bpw: `{bpw}` is not a number of bits", "as in --bpw 4.25")


def bpw_name(bpw: str | None) -> str:
    """What a file of so many bits a weight is called by."""
    return f"{bpw}bpw" if bpw is not None else ""


def size_name(size: str | None) -> str:
    """What a file of so many bytes is called by."""
    return "".join(size.split()) if size is not None else ""


def forewarned(folder: Path, size: str | None, kind: str, target: Path) -> str | None:
    """What is worth knowing before hours of work: a file that will not fit in this machine's memory or disk."""
    from dsv2cli.planner import warning
    from quantize import parse_size
    from quantize.source.files import CONFIG

    if size is not None:
        return warning.of_weights(target.name, parse_size(size))
    return warning.of_checkpoint(folder / CONFIG, kind, target.parent) if folder.is_dir() else None


def check_target(target: Path, force: bool) -> None:
    from quantize import check_output, is_finished

    check_output(target, ())
    if target.exists() and not force and not is_finished(target):
        raise UsageError(f"`{target}` exists", "--force replaces it, -o names another")


def default_name(source: str, folder: Path, kind: str) -> str:
    """The model's name and the type."""
    from dsv2cli import locate

    return f"{locate.model_name(source, folder)}-{kind.upper()}.gguf"


@contextmanager
def keeping_work(target: Path) -> Iterator[None]:
    """Where a run ends early and left something to go on from, says so."""
    try:
        yield
    except BaseException as error:
        from quantize import OtherRunError, work_folder

        folder = work_folder(target)
        if (folder / "identity.json").exists() and not isinstance(error, OtherRunError):
            console.note(f"what was done is kept in {folder}: the same command goes on from there")
        raise


class Display:
    """Progress on a terminal, a line now and then elsewhere, nothing where quiet."""

    def __init__(self, *, quiet: bool) -> None:
        self._bar = console.progress(quiet=quiet, time_left=False)
        self._quiet = quiet
        self._logs = not quiet and self._bar.disable
        self._logged = 0.0

    def __enter__(self) -> Display:
        self._bar.start()
        self._task = self._bar.add_task("reading", total=1.0, detail="")
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()

    def say(self, line: str) -> None:
        if not self._quiet:
            console.note_above(self._bar, line)

    def progress(self, step: Progress) -> None:
        parts = pace(step)
        if self._logs and step.seconds - self._logged >= LOG_SECONDS:
            self._logged = step.seconds
            console.note(f"{where(step)}: {100 * step.fraction:.0f} %, {', '.join(parts)}")
        room = self._bar.console.width - BAR_ROOM
        while len(", ".join(parts)) > room and len(parts) > 1:
            parts.pop()
        self._bar.update(self._task, completed=step.fraction, description=where(step), detail=", ".join(parts))


def where(step: Progress) -> str:
    return f"layer {step.layer + 1} of {step.n_layer}" if step.layer >= 0 else "all layers"


def pace(step: Progress) -> list[str]:
    """What is being done, times left, of all and of the layer, weights and bytes of the file a second."""
    parts = [STAGES.get(step.stage, step.stage)]
    if math.isfinite(step.seconds_left) and step.fraction < 1:
        parts.append(f"{console.format_seconds(step.seconds_left)} left")
        if math.isfinite(step.layer_seconds_left) and step.layer >= 0:
            parts[-1] += f" (layer {console.format_seconds(step.layer_seconds_left)})"
    if step.values_per_second > 0:
        bits = 8 * step.bytes_total / step.n_values
        rate = step.values_per_second
        parts += [f"{rate / 1e6:.1f} M weights/s", f"{console.format_bytes(rate * bits / 8)}/s"]
    return parts


def show(report: Report) -> None:
    """The summary, on stderr: stdout has the path."""
    console.show(roles_table(report), sys.stderr)
    console.note("")
    console.show(console.Table(rows=list(quality(report))), sys.stderr)
    for note in report.notes:
        console.warn(note)


def roles_table(report: Report) -> console.Table:
    title = f"{report.path.name}: {report.bits_per_weight:.2f} bits/weight"
    made = console.Table(title, ("role", "type", "size", "bits/weight"))
    large = [role for role in report.roles if role.nbytes >= report.nbytes * SHOWN_SHARE]
    for role in large:
        made.add(role.role, ", ".join(role.types), console.format_bytes(role.nbytes), f"{role.bits_per_weight:.2f}")
    if rest := [role for role in report.roles if role not in large]:
        nbytes, n_values = sum(role.nbytes for role in rest), sum(role.n_values for role in rest)
        made.add(f"{len(rest)} more", "", console.format_bytes(nbytes), f"{8 * nbytes / n_values:.2f}")
    return made


def quality(report: Report) -> list[tuple[str, str]]:
    """What was lost, and how it was made: (label, value) lines."""
    lines = [("size", f"{console.format_bytes(report.nbytes)} of {console.format_bytes(report.source_nbytes)}")]
    if (found := report.evaluation) is not None:
        spread = f" +- {found.kld_error:.4f}" if found.kld_error is not None else ""
        lines += [
            (
                "perplexity ratio",
                f"{found.perplexity_ratio:.4f} ({found.perplexity:.3f} from {found.perplexity_reference:.3f})",
            ),
            ("KL divergence", f"mean {found.kld_mean:.4f}{spread}, p99 {found.kld_p99:.3f} nats"),
            ("same top token", f"{100 * found.top1:.1f} %"),
        ]
        if found.routing is not None:
            lines.append(("same experts", f"{100 * found.routing:.1f} %"))
        lines.append(("measured on", f"{found.n_scored} tokens held back from calibration"))
    if report.calibration_tokens:
        sources = ", ".join(report.calibration_sources)
        digest = report.calibration_sha256[:12]
        lines.append(("calibrated on", f"{report.calibration_tokens} tokens of {sources} (sha256 {digest})"))
    if report.coverage:
        counts = [n for layer in report.coverage for n in layer.counts]
        few = sum(layer.few for layer in report.coverage)
        lines.append(("expert coverage", f"{min(counts)} to {max(counts)} tokens, {few} of {len(counts)} experts few"))
    if report.folds:
        lines.append(("scale folds", f"{sum(fold.kept for fold in report.folds)} of {len(report.folds)} kept"))
    from dsv2cli import figures

    worst = max(range(len(report.layer_errors)), key=lambda il: report.layer_errors[il])
    error = f"{figures.spark(report.layer_errors)} worst {report.layer_errors[worst]:.2g} (layer {worst + 1})"
    lines.append(("layer errors", error))
    rate = report.n_values / report.seconds / 1e6
    lines.append(("time", f"{console.format_seconds(report.seconds)}, {rate:.1f} M weights/s"))
    return lines
