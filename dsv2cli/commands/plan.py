"""dsv2 plan: what a model will take and give, from its headers alone."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, Annotated

import typer

from dsv2cli import console, options
from dsv2cli.commands.inspect import parts_table
from dsv2cli.errors import CliError, UsageError
from dsv2cli.options import Range, number

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dsv2cli.planner.forecast import Forecast, Speed
    from dsv2cli.planner.trial import Compared

HELP = (
    "Tell what a model will take and give before it is fetched: bytes, disk, memory, speed. From its headers alone;"
    " speeds from some seconds of measuring this machine."
)
EXAMPLES = (
    "plan lite-chat",
    "plan v3 --type q2_k --ctx 32768",
    "plan lite --size 9.5G --kv q8_0 --json",
    "plan OWNER/NAME-GGUF:Q4_K_M",
    "plan model.gguf --check",
)
NAME = typer.Argument(
    metavar="REPO|ALIAS|FILE",
    help="owner/name, owner/name:TYPE, a link or an alias on the hub; a GGUF or a checkpoint's folder here; the small"
    " model in the package if left out.",
    show_default=False,
)
CONTEXT = number(
    "-c", "--ctx", within=options.CONTEXT, help="Tokens of context; 4096 if left out, 0: what it was trained for."
)
TYPE = typer.Option("--type", metavar="TYPE", help="What it is to be quantised to; q4_k_m if left out.")
SIZE = typer.Option("--size", metavar="SIZE", help="Instead: the size of the whole file, as 9.5G or 9.5GiB.")
RAM = typer.Option("--ram", metavar="SIZE", help="Weights in so much memory, and the rest read from the drive.")
SPEED = typer.Option("--speed/--no-speed", help="Measure this machine for some seconds and tell how fast it will be.")
CHECK = typer.Option("--check", help="Run the file, which must be here, and print predicted beside measured.")


VERDICTS = {"holds": "", "fails": "more than {allowed:.0%}", "unsettled": "drifted by {drift:.0%}"}


def plan(
    model: Annotated[str | None, NAME] = None,
    context: Annotated[int | None, CONTEXT] = None,
    kind: Annotated[str | None, TYPE] = None,
    size: Annotated[str | None, SIZE] = None,
    kv: options.Kv = "f16",
    ram: Annotated[str | None, RAM] = None,
    threads: options.Threads = None,
    measure: Annotated[bool, SPEED] = True,
    check: Annotated[bool, CHECK] = False,
    rounds: Annotated[int, number("-r", "--rounds", within=Range(1, 100), help="Of --check.")] = 3,
    as_json: options.Json = False,
) -> None:
    if kind is not None and size is not None:
        raise UsageError("--type and --size both say how small", "give one of them")
    if check and (kind or size or not measure):
        raise UsageError("--check runs a file as it is", "leave out --type, --size and --no-speed")
    from cext.system import free_bytes
    from dsv2cli.planner import forecast, probe, subject
    from quantize import parse_size

    asked = subject.Asked(model, kind, parse_size(size) if size is not None else None)
    n_ram = options.size("--ram", ram, "as in --ram 12G") if ram is not None else None
    with subject.opened(asked) as found:
        if check and not (found.is_here and found.found.engine == "dsv2"):
            raise UsageError("--check wants a GGUF that is here and that dsv2's own engine runs")
        free = free_bytes(swap=False)  # as --ram auto counts
        rates: probe.Rates | str = "not measured"
        if measure and found.found.engine == "dsv2":
            rates = probe.measure(found.found, kv, threads, free)
        elif measure:
            rates = "llama.cpp runs it, whose speed is not foretold" if found.found.engine else "no engine runs it"
        made = forecast.forecast(found, n_ctx=context, kv_type=kv, ram=n_ram, threads=threads, free=free, rates=rates)
        if check and made.rates is None:
            raise CliError(made.why_no_speed, "--check compares what is foretold from that: without it, nothing is run")
        compared = checked(made, threads, rounds) if check else ()
    if as_json:
        console.print_json(forecast.describe(made) | ({"check": describe(compared)} if check else {}))
        return
    show(made)
    if compared:
        console.say()
        console.show(check_table(compared))
        console.say_fields(check_lines(compared), 14)


def checked(made: Forecast, threads: int | None, rounds: int) -> tuple[Compared, ...]:
    from dsv2cli.planner import trial

    with console.progress() as display:
        bar = display.add_task("check", total=None, detail="")
        return trial.run(
            made, threads, rounds, lambda what, done, n: display.update(bar, completed=done, total=n, detail=what)
        )


def show(made: Forecast) -> None:
    found = made.subject.found
    for remark in (*made.subject.remarks, *found.remarks):
        console.warn(console.printable(remark))
    console.say_fields(headline(made), 14)
    if made.subject.steps:
        console.say()
        console.show(steps_table(made))
    console.say()
    console.show(parts_table(found))
    console.say()
    console.show(memory_table(made))
    if made.decode or made.prefill:
        console.say()
        console.show(speed_table(made))
    if made.subject.ladder:
        console.say()
        console.show(ladder_table(made))
    console.say()
    console.say_fields(verdict(made), 14)


def headline(made: Forecast) -> list[tuple[str, str]]:
    subject, found = made.subject, made.subject.found
    lines = [("model", subject.label), ("architecture", found.architecture)]
    if not subject.is_here and subject.n_whole:
        lines.append(
            (
                "looked at",
                f"{console.format_bytes(subject.n_fetched)} of {console.format_bytes(subject.n_whole)},"
                f" {subject.n_fetched / subject.n_whole:.2%}",
            )
        )
    lines.append(("engine", found.engine or f"none{f': it is {found.kind}' if found.kind else ''}"))
    lines.append(("cache a token", ", ".join(f"{nbytes} bytes in {kv}" for kv, nbytes in found.kv_bytes.items())))
    if (rates := made.rates) is not None:
        lines.append(
            (
                "this machine",
                f"{rates.threads} threads, {rates.isa}: decodes at {rates.bandwidth / 1e9:.1f} GB/s of weights, reads"
                f" prompts at {rates.products / 1e9:.0f} billion multiply-adds a second"
                f" (measured in {rates.seconds:.1f} s, rounds within {rates.spread:.0%})"
                + (f"; small pages make decoding take {rates.slowed:.2f} times as long" if rates.slowed > 1 else ""),
            )
        )
    elif made.why_no_speed:
        lines.append(("speed", made.why_no_speed))
    return lines


def steps_table(made: Forecast) -> console.Table:
    table = console.Table("Before it runs", ("step", "over the network", "on the disk", "more meanwhile", "free there"))
    for step in made.subject.steps:
        table.add(
            step.name,
            console.format_bytes(step.fetched) if step.fetched else "",
            console.format_bytes(step.disk),
            console.format_bytes(step.work) if step.work else "",
            console.format_bytes(step.free) + ("" if step.disk + step.work <= step.free else ": too little"),
        )
    return table


def memory_table(made: Forecast) -> console.Table:
    memory = made.memory
    table = console.Table(f"Memory at {memory.n_ctx} tokens of context", ("part", "size"))
    table.add("weights, pages of the file", console.format_bytes(memory.weights))
    table.add(f"cache in {memory.kv_type}", console.format_bytes(memory.cache))
    measured = made.rates is not None and made.rates.scratch is not None
    table.add("scratch of steps" if measured else "scratch of steps, at most", console.format_bytes(memory.scratch))
    table.add("the program and its vocabulary", console.format_bytes(memory.program))
    table.add_line()
    table.add("together, within 5 %" if measured else "together", console.format_bytes(memory.total))
    if (drive := made.drive) is not None and drive.runs:
        table.add("from the drive: weights held", console.format_bytes(drive.ram))
        table.add("longer steps then, at most", console.format_bytes(drive.long_step))
        table.add("together then", console.format_bytes(drive.total))
    if memory.free is not None:
        table.add("free here", console.format_bytes(memory.free))
    return table


def speed_table(made: Forecast) -> console.Table:
    table = console.Table("Speed", ("", "tokens a second", "likely between"))
    if made.prefill is not None:
        table.add("prompts of 512", *speed_cells(made.prefill))
    for speed in made.decode:
        table.add("answers, empty context" if not speed.depth else f"answers at {speed.depth}", *speed_cells(speed))
    return table


def speed_cells(speed: Speed) -> tuple[str, str]:
    return f"{speed.rate:.3g}", f"{speed.low:.3g} and {speed.high:.3g}"


def ladder_table(made: Forecast) -> console.Table:
    from dsv2cli.planner import quality
    from dsv2cli.planner.forecast import rung_memory

    memory, ladder = made.memory, made.subject.ladder
    known = any(rung.kld is not None for rung in ladder)  # of a small model, and so it is called
    named = (f"KLD of {quality.MODEL}",) if known else ()
    table = console.Table("Sizes", ("type", "file", "bits/weight", "read a token", "memory", *named, ""))
    for rung in ladder:
        needed = rung_memory(rung, memory)
        table.add(
            rung.name,
            console.format_bytes(rung.nbytes),
            f"{rung.bits:.2f}" if rung.bits is not None else "",
            console.format_bytes(rung.read) if rung.read is not None else "",
            console.format_bytes(needed),
            *(("" if rung.kld is None else f"{rung.kld:.3f}",) if known else ()),
            "" if memory.free is None else "fits" if needed <= memory.free else "does not fit",
        )
    return table


def verdict(made: Forecast) -> list[tuple[str, str]]:
    memory, lines = made.memory, []
    if memory.free is not None:
        short = console.format_bytes(memory.total - memory.free)
        lines.append(("fits", "yes" if memory.fits else f"no: {short} of memory are missing"))
    if made.longest is not None:
        lines.append(
            ("context", f"up to {made.longest} tokens fit in {memory.kv_type}" if made.longest else "none fits")
        )
    if made.drive is not None:
        lines.append(("from the drive", drive_line(made)))
    if made.advice:
        lines.append(("what helps", made.advice))
    return lines


def drive_line(made: Forecast) -> str:
    from dsv2cli.planner.forecast import DRIVES

    drive = made.drive
    assert drive is not None
    held = console.format_bytes(drive.ram)
    if not drive.runs:
        return f"{held} for weights is too little: {console.format_bytes(drive.least)} are needed at least"
    told = f"with {held} for weights {drive.held:.0%} of the experts are held, up to"
    told += f" {console.format_bytes(drive.missed)} are read a token"
    rates = [
        f"{rate:.2g} at {console.format_bytes(pace)}/s"
        for rate, pace in zip(drive.rates, DRIVES, strict=True)
        if rate is not None
    ]
    return told + (f": tokens a second {', '.join(rates)}" if rates else "")


def check_table(compared: Sequence[Compared]) -> console.Table:
    table = console.Table("Check", ("", "predicted", "measured", "off by", "rounds between", ""))
    for row in compared:
        as_text = console.format_bytes if row.name.startswith("memory") else "{:.4g} tok/s".format
        table.add(
            row.name,
            as_text(median(row.predicted)),
            as_text(median(row.measured)),
            f"{row.error:+.1%}",
            f"{min(row.errors):+.1%} and {max(row.errors):+.1%}" if len(row.errors) > 1 else "",
            VERDICTS[row.verdict].format(allowed=row.allowed, drift=row.drift),
        )
    return table


def check_lines(compared: Sequence[Compared]) -> list[tuple[str, str]]:
    """How far to trust the table."""
    rounds = max(len(row.measured) for row in compared)
    worst = max(compared, key=lambda row: row.drift)
    held, unsettled = (sum(row.verdict == verdict for row in compared) for verdict in ("holds", "unsettled"))
    told = f"{held} of {len(compared)} forecasts hold"
    if unsettled:
        told += f", {unsettled} cannot be told from drift: more rounds (-r), or a machine with nothing else to do"
    return [
        (
            "in turns",
            f"the machine measured before and after each of {rounds}; off by: the median of the rounds' ratios",
        ),
        ("drift", f"the machine's own, from measurement to measurement: up to {worst.drift:.0%} ({worst.name})"),
        ("verdict", told),
    ]


def describe(compared: Sequence[Compared]) -> list[dict[str, object]]:
    return [
        {
            "figure": row.name,
            "predicted": median(row.predicted),
            "measured": median(row.measured),
            "error": round(row.error, 4),
            "errors": [round(error, 4) for error in row.errors],
            "spread": round(row.spread, 4),
            "drift": round(row.drift, 4),
            "allowed": row.allowed,
            "holds": row.holds,
            "verdict": row.verdict,
        }
        for row in compared
    ]
