"""dsv2 perplexity: how well a model predicts a text, alone or beside a reference."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsv2cli import console, options
from dsv2cli.options import number

if TYPE_CHECKING:
    from dsv2cli.evaluate import Evaluation

HELP = "Measure how well a model predicts a text, and its distance from a reference."
EXAMPLES = (
    "perplexity model.gguf --text held-out.txt",
    "perplexity model.gguf --text - < held-out.txt",
    "perplexity q4.gguf --text held-out.txt --reference f16.gguf --json",
    "perplexity model.gguf --text held-out.txt -c 4096 --kv q8_0 --reference-kv f32",
)
REFERENCE_KV = typer.Option(help="The reference's; without --reference, this model with that cache is the reference.")
SKIP = number(
    "--skip",
    within=options.FROM_ZERO,
    help="Positions at a window's beginning that are not scored; a quarter if left out.",
)
CONTEXT = number("-c", "--ctx", within=options.CONTEXT, help="Tokens of a window; 0: what the model was trained for.")


def perplexity(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A GGUF file.")],
    text: Annotated[Path, options.place("--text", metavar="FILE", help="UTF-8 text to predict; - reads stdin.")],
    context: Annotated[int, CONTEXT] = 512,
    reference: Annotated[
        str | None, typer.Option(metavar="GGUF", help="The same model in a finer type: KLD and agreement with it.")
    ] = None,
    kv: options.Kv = "f16",
    reference_kv: Annotated[options.KvType | None, REFERENCE_KV] = None,
    skip: Annotated[int | None, SKIP] = None,
    windows: Annotated[
        int | None, number("--windows", within=options.COUNT, help="Score only the first so many windows.")
    ] = None,
    threads: options.Threads = None,
    engine: options.Engine = "auto",
    rpc: options.Rpc = None,
    gpu_layers: options.GpuLayers = 0,
    ram: options.Ram = "auto",
    gpu: options.Gpu = "auto",
    vram: options.Vram = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    from dsv2cli import locate, runtime
    from dsv2cli.evaluate import beside_each, evaluate
    from dsv2cli.text import read, read_stdin

    options.wishes(
        engine, rpc, gpu_layers, told=not quiet, ram=ram, gpu=gpu, vram=vram
    )  # refused before a file is opened
    paths = [locate.model(name) for name in (model, reference) if name is not None]
    wished = [
        options.wishes(engine, rpc, gpu_layers, told=not quiet, ram=ram, beside=beside, gpu=gpu, vram=vram)
        for beside in beside_each(paths, context, kv, reference_kv)
    ]
    content = read_stdin(waits=quiet) if str(text) == "-" else read(text)
    with ExitStack() as opened, console.progress(quiet=quiet) as display:
        models = [
            opened.enter_context(runtime.open_model(path, threads, wishes))
            for path, wishes in zip(paths, wished, strict=True)
        ]
        bar = display.add_task("scoring", total=None, detail="")
        found = evaluate(
            models[0],
            content,
            models[0].context(context),
            skip=skip,
            max_windows=windows,
            kv_type=kv,
            reference=models[-1] if reference or reference_kv else None,
            reference_kv=reference_kv or "f16",
            told=lambda done, n, ppl: display.update(
                bar, completed=done, total=n, detail=f"{done} of {n} windows, perplexity {ppl:.4f}"
            ),
        )
    if as_json:
        console.print_json(describe(found, paths, text))
    else:
        show(found)


def show(found: Evaluation) -> None:
    def error(value: float | None, digits: int) -> str:
        return f" +- {value:.{digits}f}" if value is not None else ""

    console.say(f"perplexity {found.perplexity:.4f}{error(found.perplexity_error, 4)}")
    if (against := found.reference) is not None:
        console.say(f"reference perplexity {against.perplexity_reference:.4f}, ratio {against.perplexity_ratio:.4f}")
        console.say(f"mean KLD {against.kld_mean:.5f}{error(against.kld_error, 5)}")
        console.say(f"p99 KLD {against.kld_p99:.4f}, max {against.kld_max:.4f}")
        console.say(f"top-1 agreement {100 * against.top1:.2f} %")
        if against.routing is not None:
            console.say(f"router agreement {100 * against.routing:.2f} %")
    console.note(
        f"({found.n_scored} tokens in {found.n_windows} windows of {found.n_ctx}, the first {found.skip} positions not"
        " scored; +- is one standard error over windows)",
        "dim",
    )


def describe(found: Evaluation, paths: list[Path], text: Path) -> dict[str, Any]:
    from dataclasses import asdict

    figures = {name: value for name, value in asdict(found).items() if name != "reference"}
    against = None
    if (distance := found.reference) is not None:
        names = ("kld_mean", "kld_error", "kld_p99", "kld_max", "top1", "routing", "perplexity_ratio")
        against = {"path": str(paths[-1]), "perplexity": distance.perplexity_reference}
        against |= {name: getattr(distance, name) for name in names}
    return {"model": str(paths[0]), "text": str(text), **figures, "reference": against}
