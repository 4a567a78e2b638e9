"""The Typer application and ``main``: parse, run, and turn every failure into one line, one hint and an exit code.

Exit codes: 0 done, 1 failed, 2 called wrongly, 130 stopped with Ctrl-C.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import sys
import traceback
from collections.abc import Sequence
from types import ModuleType
from typing import Annotated, Any

import typer

from dsv2cli import console
from dsv2cli.commands import (
    batch,
    bench,
    chat,
    config,
    doctor,
    download,
    export,
    inspect,
    list_,
    perplexity,
    plan,
    quantize,
    rm,
    serve,
)
from dsv2cli.errors import FAILED, INTERRUPTED, MISUSED, CliError

NUMBERS = {"int_": "not a whole number", "float_": "not a number"}  # by the kind of a check of typer's
COMPLETING = "_DSV2_COMPLETE"
UNSET = ("config", "doctor")  # verbs that work whatever settings say: they tell what is wrong with them

app = typer.Typer(
    name="dsv2",
    help="Download, quantise and run DeepSeek-V2-family mixture-of-experts models on ordinary computers.",
    rich_markup_mode=None,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
VERBS: dict[str, tuple[ModuleType, str]] = {
    "plan": (plan, "Tell what a model takes and gives, before it is fetched."),
    "download": (download, "Fetch a model from the Hugging Face hub."),
    "quantize": (quantize, "Make a small GGUF of a checkpoint."),
    "export": (export, "Make a 4-bit checkpoint for vLLM and SGLang."),
    "chat": (chat, "Talk to a model."),
    "inspect": (inspect, "Show what a GGUF is made of and needs."),
    "perplexity": (perplexity, "Measure how well a model predicts a text."),
    "serve": (serve, "Serve a model to other programs over HTTP."),
    "batch": (batch, "Answer a file of requests; killed, it goes on."),
    "bench": (bench, "Measure speed, beside llama.cpp if asked."),
    "list": (list_, "List the models that are here, with their sizes."),
    "rm": (rm, "Remove models from this machine."),
    "config": (config, "Show and set what options default to, with its origin."),
    "doctor": (doctor, "Look for what stands in the way here."),
}
for verb, (command, summary) in VERBS.items():
    examples = "\b\nExamples:\n" + "\n".join(f"  dsv2 {example}" for example in command.EXAMPLES)
    function = list_.list_models if command is list_ else getattr(command, verb)
    app.command(verb, help=command.HELP, short_help=summary, epilog=examples)(function)


def print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            console.say(f"dsv2 {version('dsv2')}")
        except PackageNotFoundError:
            console.say("dsv2, not installed as a package")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def root(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", hidden=True, help="Show tracebacks.")] = False,
) -> None:
    if debug:
        os.environ["DSV2_DEBUG"] = "1"
    if ctx.invoked_subcommand is None:
        console.say_text(ctx.get_help())


def explain(error: BaseException, args: Sequence[str]) -> tuple[str, str, int]:
    """(message, hint, exit code) of a failure of the command line ``args``."""
    # A command line that typer refuses: its UsageError is BadParameter's parent, wherever it keeps its click.
    if isinstance(error, typer.BadParameter.__mro__[1]):
        context = getattr(error, "ctx", None)
        verb = args[0] if args and args[0] in VERBS else ""
        path = context.command_path if context is not None else f"dsv2 {verb}".rstrip()
        return refused(error), f"{path} --help lists what it takes", MISUSED
    if isinstance(error, CliError):
        return str(error), error.hint, error.exit_code
    hint = getattr(error, "hint", None)
    if isinstance(hint, str):  # the engine's and the quantiser's own errors; of values, those of arguments
        return str(error), hint, MISUSED if isinstance(error, ValueError) else FAILED
    if isinstance(error, OSError):
        where = f"`{_name(error.filename)}`: " if error.filename is not None else ""
        return f"{where}{error.strerror or error}", "", FAILED
    if isinstance(error, MemoryError):
        return "out of memory", "a shorter context (-c) or a smaller quantisation needs less", FAILED
    return f"internal error: {type(error).__name__}: {error}", "DSV2_DEBUG=1 shows where; please report it", FAILED


def refused(error: BaseException) -> str:
    """What typer has to say, without the words in which its own checks speak to programmers."""
    told = str(getattr(error, "format_message", error.__str__)())
    errors = getattr(error.__cause__, "errors", None)
    if errors is None:
        return told
    first = errors()[0]
    wanted = next((what for kind, what in NUMBERS.items() if str(first["type"]).startswith(kind)), None)
    said = str(first["msg"])
    return told.replace(
        said, said.removeprefix("Value error, ") if wanted is None else f"{first['input']!r} is {wanted}."
    )


def _name(file: object) -> str:
    return os.fsdecode(file) if isinstance(file, str | bytes | os.PathLike) else str(file)


def prepare_streams() -> None:
    """Streams closed by the caller lead nowhere, not into the next file opened; what cannot be encoded shows as ?.

    Bytes typed that the terminal's encoding lacks are kept, for text.typed to read or to refuse.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: PTH123, SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")


def close_quietly() -> None:
    """After a broken pipe: point stdout at nothing, so that the interpreter's last flush does not complain."""
    with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as nothing:  # noqa: PTH123
        os.dup2(nothing.fileno(), sys.stdout.fileno())


def defaults(root: Any, args: Sequence[str]) -> dict[str, Any]:
    """What options are set to elsewhere (settings.py). Help is shown, and settings are changed, whatever they hold."""
    verb = next((word for word in args if word in VERBS), None)
    if COMPLETING in os.environ or verb in (None, *UNSET) or {"-h", "--help"} & set(args):
        return {}
    from dsv2cli import settings

    return settings.defaults(root, args)


@functools.cache
def commands() -> Any:
    """The commands as typer makes them of their functions, which takes it a tenth of a second."""
    return typer.main.get_command(app)


def run(args: list[str] | None = None) -> int:
    """Run the command line on ``args`` (sys.argv) and return the exit code."""
    prepare_streams()
    try:
        words = sys.argv[1:] if args is None else args
        root = commands()
        result = root.main(args=words, prog_name="dsv2", standalone_mode=False, default_map=defaults(root, words))
        console.flush()
        return result if isinstance(result, int) else 0
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        close_quietly()
        return FAILED
    except console.OutputError as error:
        close_quietly()
        console.print_error(str(error), error.hint)
        return FAILED
    except SystemExit as stop:  # typer leaves this way when the reader of stdout has gone
        close_quietly()
        return stop.code if isinstance(stop.code, int) else FAILED
    except Exception as error:
        if os.environ.get("DSV2_DEBUG"):
            console.note_text(traceback.format_exc())
        message, hint, code = explain(error, sys.argv[1:] if args is None else args)
        if COMPLETING in os.environ:  # nothing but a shell's completion sets it, with more beside it
            message, hint, code = f"{COMPLETING} is set, and not by a shell's completion", "unset it", MISUSED
        console.print_error(message, hint)
        return code


def main() -> None:
    sys.exit(run())
