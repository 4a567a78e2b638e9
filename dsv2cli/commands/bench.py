"""dsv2 bench: prefill and decode speed, alone or beside llama.cpp and ik_llama.cpp."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from dsv2cli import console, options
from dsv2cli.errors import UsageError
from dsv2cli.options import MAX_CONTEXT, Range, number

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dsv2cli.benchmark import Result, Row
    from dsv2cli.engines.choice import Engine, Wanted
    from dsv2cli.llama_bench import LlamaBench
    from dsv2cli.planner.share import Measuring, Yardstick

HELP = "Measure speed: prefill and decode, at depths, beside llama.cpp or ik_llama.cpp if asked."
EXAMPLES = (
    "bench model.gguf",
    "bench model.gguf --watts 65 --price 0.30",
    "bench model.gguf -d 0,4096,16384 --against llama.cpp --csv > speed.csv",
    "bench model.gguf --against llama.cpp --against ik=ik_llama.cpp/build/bin/llama-bench",
)
TOKENS = Range(0, MAX_CONTEXT)
POWER, PRICES = Range(0, 1e6, open_low=True), Range(0, 1e6)
SHARE_HELP = "Tell what share of this machine that is: of its bandwidth and of its dots, measured before and after."
WATTS_HELP = "What the machine draws while it works, as its meter says: tells the energy of a million tokens."
PRICE_HELP = "With --watts: of a kWh, in any money; tells what a million tokens cost."
JOULES = 3.6e6  # of a kWh
IK_PATH = "ik="
AGAINST = typer.Option(
    metavar="llama.cpp|ik=LLAMA-BENCH",
    help="Run it too, in turns, and give the ratio; several times for several. ik: ik_llama.cpp, by the path of its"
    " llama-bench, with the flags that are its fastest (-fmoe 1 -mla 3 -fa 1), its weights repacked (-rtr 1) and not.",
    show_default=False,
)


def bench(
    model: options.Model = None,
    n_prefill: Annotated[int, number("-p", "--prefill", within=TOKENS, help="Tokens to read at once; 0: none.")] = 512,
    n_decode: Annotated[
        int, number("-n", "--decode", within=TOKENS, help="Tokens to decode one by one; 0: none.")
    ] = 128,
    depths: Annotated[
        str, typer.Option("-d", "--depths", metavar="N,N,...", help="Tokens of context before, as 0,4096,16384.")
    ] = "0",
    rounds: Annotated[
        int, number("-r", "--rounds", within=Range(1, 10_000), help="Measured rounds; one more warms up.")
    ] = 3,
    threads: options.Threads = None,
    kv: options.Kv = "f16",
    against: Annotated[list[str] | None, AGAINST] = None,
    engine: options.Engine = "auto",
    ram: options.Ram = "auto",
    gpu: options.Gpu = "auto",
    vram: options.Vram = None,
    share: Annotated[bool, typer.Option("--share/--no-share", help=SHARE_HELP)] = True,
    watts: Annotated[float | None, number("--watts", metavar="W", within=POWER, help=WATTS_HELP)] = None,
    price: Annotated[float | None, number("--price", metavar="P", within=PRICES, help=PRICE_HELP)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Every sample, as JSON.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Every sample, as CSV.")] = False,
    quiet: options.Quiet = False,
) -> None:
    refuse_together(as_json=as_json, as_csv=as_csv, watts=watts, price=price)
    from dsv2cli import benchmark, locate

    wanted = benchmark.tests(n_prefill, n_decode, parse_depths(depths))
    if not wanted:
        raise UsageError("-p 0 and -n 0 leave nothing to measure", "give one of them")
    if (longest := max(test.depth + test.n for test in wanted)) > MAX_CONTEXT:
        raise UsageError(f"{longest} tokens are asked for together", f"a context holds {MAX_CONTEXT} at most")
    wished = options.wishes(engine, None, 0, told=not quiet, ram=ram, gpu=gpu, vram=vram)  # refuses what cannot be
    peers = parse_peers(against or [], kv)
    path = locate.model(model)
    runs = engine_for(path, engine, quiet=quiet)
    if runs == "llama.cpp":
        options.refuse_budget(ram)
        options.refuse_gpu(gpu)
    if runs in peers:
        raise UsageError(f"llama.cpp runs `{path}`: there is nothing to compare it with", "leave out --against")
    beside = None
    if share and runs == "dsv2" and not as_csv:
        from dsv2cli.planner.share import Measuring

        beside = Measuring(path, kv, threads)
    with console.progress(quiet=quiet) as display:
        bar = display.add_task("bench", total=None, detail="measuring the machine")

        def measure() -> Result:
            return benchmark.run(
                path,
                wanted,
                threads=threads,
                rounds=rounds,
                engine=runs,
                against=peers,
                kv_type=kv,
                ram=ram,
                gpu=gpu,
                vram=vram,
                told=lambda what, done, n: display.update(bar, completed=done, total=n, detail=what),
            )

        result = measure() if beside is None else beside.around(measure)
    for note in result.notes:
        console.note(f"({note})", "dim")
    if wished.gpu.is_asked and wished.gpu.which == "auto" and not result.is_on_gpu:
        console.note("(no GPU is used: dsv2 doctor lists what is here)", "dim")
    yardstick = beside_it(beside, result)
    if as_json:
        console.print_json(describe(result, yardstick, Energy(watts, price)))
    elif as_csv:
        print_csv(result)
    else:
        show(result, yardstick, Energy(watts, price))


def refuse_together(*, as_json: bool, as_csv: bool, watts: float | None, price: float | None) -> None:
    """UsageError."""
    if as_json and as_csv:
        raise UsageError("--json and --csv are two forms of one output", "choose one")
    if as_csv and watts is not None:
        raise UsageError("--csv has the samples alone, and no room for what --watts tells", "--json has both")
    if price is not None and watts is None:
        raise UsageError("--price is of a kWh, and how many are used is not known", "--watts says what is drawn")


def beside_it(beside: Measuring | None, result: Result) -> Yardstick | None:
    """What this machine gives; None, with a line that says why, where that is not known or not what the model used."""
    drive = result.footprints[result.engines[0]].drive
    if beside is None or drive is not None:
        return None
    if result.is_on_gpu:
        console.note("(no share of the machine: what a GPU gives is not measured)", "dim")
        return None
    if beside.why_not:
        console.note(f"(no share of the machine: {beside.why_not})", "dim")
    return beside.yardstick()


class Energy(NamedTuple):
    """watts: that the machine draws; price: of a kWh."""

    watts: float | None = None
    price: float | None = None

    def kwh(self, rate: float) -> float | None:
        """Of a million tokens, at so many a second."""
        return None if self.watts is None else 1e6 / rate * self.watts / JOULES

    def cost(self, rate: float) -> float | None:
        kwh = self.kwh(rate)
        return None if kwh is None or self.price is None else kwh * self.price

    @property
    def column(self) -> str:
        return "kWh a million" if self.price is None else "cost a million"

    def cell(self, rate: float) -> str:
        figure = self.kwh(rate) if self.price is None else self.cost(rate)
        return "" if figure is None else f"{figure:.3g}"


def parse_peers(asked: Sequence[str], kv_type: str) -> list[str | LlamaBench]:
    """["llama.cpp", "ik=PATH"], each once: llama.cpp's name, and both settings of ik_llama.cpp."""
    from dsv2cli import llama_bench
    from dsv2cli.engines.choice import LLAMA

    peers: list[str | LlamaBench] = []
    for name in dict.fromkeys(asked):
        if name == LLAMA:
            peers.append(name)
        elif name.startswith(IK_PATH) and name != IK_PATH:
            if any(not isinstance(peer, str) for peer in peers):
                raise UsageError("--against ik= is given twice, with two programs", "measure one after the other")
            peers += llama_bench.settings(Path(name.removeprefix(IK_PATH)), kv_type)
        else:
            hint = "ik=PATH takes ik_llama.cpp's llama-bench" if name.startswith("ik") else ""
            raise UsageError(f"--against takes llama.cpp or ik=PATH, got `{name}`", hint)
    return peers


def engine_for(path: Path, wanted: Wanted, *, quiet: bool) -> Engine:
    """The engine that is measured. What ``why_not_ours`` raises."""
    from dsv2cli.engines.choice import LLAMA, OURS, why_not_ours

    if wanted != "auto":
        return wanted
    if (reason := why_not_ours(path)) is None:
        return OURS
    if not quiet:
        console.note(f"({reason}: llama.cpp runs this file)", "dim")
    return LLAMA


def parse_depths(text: str) -> list[int]:
    """ "0,4096" -> [0, 4096], each once, shallow first: a deeper context begins with the shallower one."""
    try:
        depths = sorted({int(part) for part in text.split(",")})
    except ValueError as error:
        raise UsageError(f"-d takes numbers with commas between, got `{text}`", "-d 0,4096,16384") from error
    if wrong := [depth for depth in depths if depth not in TOKENS]:
        raise UsageError(f"-d takes numbers of tokens up to {MAX_CONTEXT}, got {wrong[0]}", "-d 0,4096,16384")
    return depths


def show(result: Result, yardstick: Yardstick | None, energy: Energy) -> None:
    from dsv2cli.engines.choice import LLAMA

    engine, *peers = result.engines
    columns = ["test", f"{engine} tok/s"]
    for peer in peers:
        columns += [f"{peer} tok/s", "ratio", *(["its setting"] if peer == LLAMA else [])]
    columns += ["of this machine"] if yardstick else []
    columns += [f"{name}: {energy.column}" if peers else energy.column for name in result.engines if energy.watts]
    made = console.Table("", tuple(columns))
    for row in result.rows:
        cells = [row.test.name, spread(row.rates[engine], 1)]
        for peer in peers:
            figures = [spread(row.rates[peer], 1), spread(row.ratios(peer), 2)] if peer in row.rates else ["-", "-"]
            cells += [*figures, *([row.variants[peer]] if peer == LLAMA else [])]
        if yardstick:
            what = "bandwidth" if row.test.kind == "decode" else "dots"
            cells.append(f"{yardstick.share(row.test, row.median(engine)):.0%} of the {what}")
        costed = [name for name in result.engines if energy.watts]
        made.add(*cells, *(energy.cell(row.median(name)) if name in row.rates else "-" for name in costed))
    setting = result.rows[0].variants[engine]
    console.say(f"{result.model.name}: {result.threads} threads, {result.isa}, {setting}, {result.machine}")
    console.show(made)
    for name, footprint in result.footprints.items():
        console.say(
            f"{name}: first logits {footprint.load_seconds:.2f} s after opening the file;"
            f" {console.format_bytes(footprint.anonymous_bytes)} of memory and"
            f" {console.format_bytes(footprint.file_bytes)} of the file's pages"
        )
        if footprint.drive is not None:
            console.say(f"{name}: {drive_line(footprint.drive)}")
    if yardstick:
        console.say(
            f"this machine, before and after: {yardstick.bandwidth / 1e9:.1f} GB/s of weights and context,"
            f" {yardstick.products / 1e9:.0f} billion multiply-adds a second"
        )
    if not result.rounds > 1:
        return
    console.note(f"(median of {result.rounds} rounds, least and most in brackets; ratios round by round)", "dim")


def drive_line(drive: dict[str, Any]) -> str:
    """What was read from the file, warming up included."""
    parts = []
    for name, verb in (("decoding", "decoding"), ("reading", "prefill")):
        part = drive[name]
        if part["needed"]:
            read = console.format_bytes(part["bytes_per_token"])
            parts.append(
                f"{verb} found {100 * part['ready_share']:.0f} % (kept, or read ahead) and read {read} a token"
            )
    return f"of the experts that it needed, {'; '.join(parts)}"


def spread(samples: list[float], digits: int) -> str:
    """ "25.1 [24.8 25.3]": median, least and most."""
    import statistics

    median = f"{statistics.median(samples):.{digits}f}"
    return median if len(samples) == 1 else f"{median} [{min(samples):.{digits}f} {max(samples):.{digits}f}]"


def describe(result: Result, yardstick: Yardstick | None, energy: Energy) -> dict[str, Any]:
    from dataclasses import asdict

    known = None
    if yardstick is not None:
        rates = yardstick.bandwidth, yardstick.products
        known = {"bytes_per_second": round(rates[0]), "multiply_adds_per_second": round(rates[1])}

    return {
        "model": str(result.model),
        "threads": result.threads,
        "isa": result.isa,
        "machine": result.machine,
        "rounds": result.rounds,
        "beside": known,
        "watts": energy.watts,
        "price": energy.price,
        "tests": [describe_row(row, yardstick, energy) for row in result.rows],
        "notes": result.notes,
        "engines": {name: asdict(footprint) for name, footprint in result.footprints.items()},
    }


def describe_row(row: Row, yardstick: Yardstick | None, energy: Energy) -> dict[str, Any]:
    import statistics

    ours, *peers = row.rates
    ratios = {peer: row.ratios(peer) for peer in peers}
    return {
        "kind": row.test.kind,
        "n": row.test.n,
        "depth": row.test.depth,
        "tokens_per_second": row.rates,
        "variants": row.variants,
        "ratios": ratios,
        "ratio": {peer: statistics.median(values) for peer, values in ratios.items()},
        "share": None if yardstick is None else round(yardstick.share(row.test, row.median(ours)), 4),
        "kwh_per_million": {name: energy.kwh(row.median(name)) for name in row.rates},
        "cost_per_million": {name: energy.cost(row.median(name)) for name in row.rates},
    }


def print_csv(result: Result) -> None:
    import csv
    import io

    text = io.StringIO()
    out = csv.writer(text, lineterminator="\n")
    out.writerow(["model", "engine", "variant", "threads", "kind", "n", "depth", "round", "tokens_per_second"])
    for row in result.rows:
        for engine, samples in row.rates.items():
            for i, rate in enumerate(samples):
                test = row.test
                fixed = [result.model.name, engine, row.variants[engine], result.threads, test.kind, test.n, test.depth]
                out.writerow([*fixed, i, f"{rate:.4f}"])
    console.say_data(text.getvalue())
