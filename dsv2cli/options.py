"""The options that several commands share, and the ranges of all: a number outside is refused before anything is read.

A range is what the engine behind takes (its integers are C's, its numbers float32), so that nothing that passes here
overflows there, and --help shows it.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from dsv2cli.gpu import Wish
    from dsv2cli.residency import Beside, Weights
    from dsv2cli.runtime import Wishes

C_INT = 2**31 - 1
SHOWN_LIMIT = 1 << 24  # a larger one is a machine's affair, and not in --help
MAX_CONTEXT = 1 << 24  # tokens: the engine's
MAX_THREADS = 512  # the engine's
MAX_SEED = 2**64 - 1
MAX_DRAFT = 15


@dataclass(frozen=True)
class Range:
    """Numbers from ``low`` (or above it, where ``open_low``) to ``high``, and 0 where it has a meaning of its own."""

    low: float
    high: float
    open_low: bool = False
    or_zero: bool = False

    def __contains__(self, number: float) -> bool:
        above = self.low < number if self.open_low else self.low <= number
        return (above and number <= self.high) or (self.or_zero and number == 0)

    def __str__(self) -> str:
        return self._spelt(f"<={self.high}" if self.high <= SHOWN_LIMIT else "")

    def _spelt(self, to: str) -> str:
        return f"{'0 or ' if self.or_zero else ''}{self.low:g}<{'' if self.open_low else '='}x{to}"

    def check(self, value: float | None) -> float | None:
        """The value of an option that has this range (a callback). typer.BadParameter outside."""
        if value is None or (value in self and (isinstance(value, int) or self._holds_as_float32(value))):
            return value
        shown = self._spelt(f"<={self.high}") if value > SHOWN_LIMIT else self
        raise typer.BadParameter(f"{value} is not in the range {shown}.")

    def _holds_as_float32(self, number: float) -> bool:
        """Whether the number that the engine would see is still finite, and above ``low`` where it must be."""
        try:
            seen: float = struct.unpack("f", struct.pack("f", number))[0]
        except OverflowError:
            return False
        return math.isfinite(seen) and not (self.open_low and seen <= self.low)


def number(*names: str, within: Range, help: str, metavar: str = "N", **more: Any) -> Any:
    """An option that takes a number of a range."""
    return typer.Option(*names, metavar=metavar, callback=within.check, help=f"{help} [{within}]", **more)


def place(*names: str, help: str, metavar: str, **more: Any) -> Any:
    """An option that takes the name of a file or folder."""
    return typer.Option(*names, metavar=metavar, parser=_path, help=help, **more)


def _path(name: str) -> Path:
    if not name:
        raise typer.BadParameter("the name is empty.")
    return Path(name)


COUNT = Range(1, C_INT)
FROM_ZERO = Range(0, C_INT)
SHARE = Range(0, 1)
LARGEST = 3.4028234e38  # of float32
CONTEXT = Range(2, MAX_CONTEXT, or_zero=True)

KvType = Literal["f16", "q8_0", "f32"]
KV_HELP = (
    "What keeps the context. q8_0: 56 % of f16's memory and less time at depth, at a small cost in quality;"
    " f32: exact, twice the memory, slower."
)
MODEL_HELP = "A GGUF file, or an alias that was quantised here; the small model in the package if left out."
"""What MODEL means in every command that may go without."""

Model = Annotated[str | None, typer.Argument(metavar="MODEL", help=MODEL_HELP, show_default=False)]
Threads = Annotated[
    int | None, number("-t", "--threads", within=Range(1, MAX_THREADS), help="Worker threads.", show_default=False)
]
Kv = Annotated[KvType, typer.Option("--kv", help=KV_HELP)]
Engine = Annotated[
    Literal["auto", "dsv2", "llama.cpp"],
    typer.Option("--engine", help="What runs it; auto: dsv2's own engine where it can, else llama.cpp."),
]
Rpc = Annotated[
    str | None,
    typer.Option(
        "--rpc",
        metavar="HOST:PORT,...",
        help="llama.cpp's RPC servers that hold the model's layers. Nothing is encrypted, nobody is checked: for a"
        " trusted network only.",
        show_default=False,
    ),
]
GpuLayers = Annotated[
    int,
    number("--gpu-layers", within=Range(0, C_INT), help="Layers for a GPU, where llama.cpp was built for one."),
]


class Kept(str):
    """What a file or the environment sets, or is so where nobody says, and no command line."""

    __slots__ = ()


def _kept(context: typer.Context, parameter: typer.CallbackParam, value: str | None) -> str | None:
    source = context.get_parameter_source(str(parameter.name))
    typed = source is None or source.name not in ("DEFAULT", "DEFAULT_MAP")
    return value if typed or value is None else Kept(value)


Ram = Annotated[
    str,
    typer.Option(
        "--ram",
        metavar="SIZE|auto|all",
        help="Memory for the weights, as 12G or 9.5GiB: what it does not hold is read from the file as it is needed."
        " The context takes its own beside it. auto: what is free, where that does not hold all; else the file is"
        " mapped, and where memory holds it twice a copy in huge pages, which are read faster than a file's small ones,"
        " takes its place after the first answer. all: map the file.",
        callback=_kept,
    ),
]
Gpu = Annotated[
    str,
    typer.Option(
        "--gpu",
        metavar="auto|off|NAME|INDEX",
        help="A GPU beside the processor, through Vulkan: auto takes a card with memory of its own, where there is"
        " one; others by number or letters of their names. It takes what each token needs first, then routed experts;"
        " the rest is computed on the processor at the same time.",
        callback=_kept,
    ),
]
Vram = Annotated[
    str | None,
    typer.Option(
        "--vram",
        metavar="SIZE",
        help="Of its memory at most so much, as 6G; what is free if left out.",
        show_default=False,
        callback=_kept,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="The figures as JSON.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="No progress.")]


# How tokens are drawn: of an answer, or of requests that say nothing of it. What all commands do unless told otherwise:
TEMPERATURE, TOP_K, TOP_P, MIN_P, REPEAT_PENALTY = 0.7, 40, 0.95, 0.05, 1.0
Temperature = Annotated[
    float, number("--temp", metavar="X", within=Range(0, LARGEST), help="0 always takes the likeliest token.")
]
TopK = Annotated[int, number("--top-k", within=FROM_ZERO, help="Only the k likeliest tokens; 0: all.")]
TopP = Annotated[
    float,
    number(
        "--top-p", metavar="X", within=Range(0, 1, open_low=True), help="Only the likeliest that make up p; 1: all."
    ),
]
MinP = Annotated[float, number("--min-p", metavar="X", within=SHARE, help="Only those at least p times the likeliest.")]
RepeatPenalty = Annotated[
    float,
    number(
        "--repeat-penalty",
        metavar="X",
        within=Range(0.01, LARGEST),
        help="Above 1, what was said becomes less likely.",
    ),
]
Seed = Annotated[int | None, number("--seed", within=Range(0, MAX_SEED), help="The same seed gives the same answer.")]
THINKING = {"auto": None, "on": True, "off": False}
THINK_HELP = "Whether the model reasons before it answers; auto: as its chat template has it."
Think = Annotated[Literal["auto", "on", "off"], typer.Option("--think", help=THINK_HELP)]


# Of the commands that answer many at once.
Parallel = Annotated[int, number("--parallel", within=Range(1, 64), help="Answers written at the same time.")]
RequestContext = Annotated[int | None, number("-c", "--ctx", within=CONTEXT, help="Tokens of context of each request.")]
CACHE_HELP = "Memory for what has been read, kept for requests that begin alike: 2G, 500M."
Cache = Annotated[str, typer.Option("--cache", metavar="SIZE", help=CACHE_HELP)]


def cache_bytes(text: str) -> int:
    """Of ``Cache``. UsageError."""
    return 0 if text == "0" else size("--cache", text, "0 to keep nothing")


def size(option: str, text: str, or_else: str) -> int:
    """Bytes of memory, of an option that may also be ``or_else``. UsageError."""
    from dsv2cli.errors import UsageError
    from quantize import ArgumentError, parse_size

    try:
        return parse_size(text)
    except ArgumentError as error:
        raise UsageError(f"{option} {text!r} is no size", f"{error.hint}; {or_else}") from error


def memory_for_weights(text: str) -> Weights:
    """What --ram says. UsageError."""
    words: dict[str, Weights] = {"auto": "auto", "all": "all"}
    return words[text] if text in words else size("--ram", text, "auto, or all for what the file has")


def gpu_wish(which: str, vram: str | None) -> Wish:
    """What --gpu and --vram say. UsageError."""
    from dsv2cli.errors import UsageError
    from dsv2cli.gpu import Wish

    if not which.strip():
        raise UsageError("--gpu is empty", "auto, off, a number or letters of a name; dsv2 doctor lists the devices")
    if vram is not None and which == "off" and not isinstance(vram, Kept):
        raise UsageError("--vram without a GPU", "--gpu auto takes a card that is there")
    memory = None if vram is None else size("--vram", vram, "leave it out for what is free")
    return Wish(which, memory, is_asked=not isinstance(which, Kept))


def refuse_budget(ram: str) -> None:
    """For a model that llama.cpp runs. UsageError where the command line gives it one: what is set for every model is
    left out."""
    from dsv2cli.errors import UsageError

    if not isinstance(ram, Kept) and isinstance(memory_for_weights(ram), int):
        raise UsageError("--ram is of dsv2's own engine", "leave it out: llama.cpp maps the file")


def refuse_gpu(which: str) -> None:
    """For a model that llama.cpp runs. UsageError where the command line names one: what is so without is left out."""
    from dsv2cli.errors import UsageError

    if not isinstance(which, Kept) and which != "off":
        raise UsageError("--gpu is of dsv2's own engine", "leave it out; llama.cpp's is --gpu-layers")


def wishes(
    engine: Literal["auto", "dsv2", "llama.cpp"],
    rpc: str | None,
    gpu_layers: int,
    *,
    n_seq: int = 1,
    told: bool,
    ram: str = "auto",
    beside: Beside | None = None,
    gpu: str = "off",
    vram: str | None = None,
    steady: bool = False,
) -> Wishes:
    """How a model is to be run, from the options above. UsageError."""
    from dsv2cli.errors import UsageError
    from dsv2cli.residency import Beside
    from dsv2cli.runtime import Wishes

    budget, wish = memory_for_weights(ram), replace(gpu_wish(gpu, vram), steady=steady)
    if rpc is not None or gpu_layers or engine == "llama.cpp":
        refuse_gpu(gpu)
    if engine == "dsv2" and (rpc is not None or gpu_layers):
        raise UsageError(f"{'--gpu-layers' if rpc is None else '--rpc'} is llama.cpp's", "leave out --engine dsv2")
    if rpc is not None or gpu_layers or engine == "llama.cpp":
        refuse_budget(ram)
    beside = beside or Beside()
    if rpc is None:
        return Wishes(engine, (), gpu_layers, n_seq, told, budget, beside, said=ram, gpu=wish)
    from dsv2cli.engines.llamacpp.rpc import parse

    return Wishes(engine, parse(rpc), gpu_layers, n_seq, told)
