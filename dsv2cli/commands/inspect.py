"""dsv2 inspect: a GGUF's header, laid out."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsv2cli import console, gpu, options, residency
from dsv2cli.engines.cache import count
from dsv2cli.engines.choice import LLAMA, OURS
from dsv2cli.errors import UsageError
from dsv2cli.options import number

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from dsv2cli.anatomy import Anatomy
    from dsv2cli.residency import Plan

HELP = "Show what a GGUF is made of and what it needs."
EXAMPLES = ("inspect model.gguf", "inspect model.gguf --ctx 32768 --json", "inspect model.gguf --heatmap usage.png")
CONTEXT = number(
    "-c", "--ctx", within=options.CONTEXT, help="Memory at this context, not a few; 0: what the model was trained for."
)
SHOWN_ITEMS, SHOWN_CHARACTERS = 4, 200  # of a list, and of a text, among the metadata
SHOWN_NOTES = ("dsv2.evaluation.", "dsv2.calibration.", "dsv2.expert_usage", "dsv2.layer_error")
# label, layout, the keys under dsv2. that it shows and what they must be: a file may say anything
FIGURES: tuple[tuple[str, str, dict[str, type]], ...] = (
    ("perplexity ratio", "{:.4f}", {"evaluation.perplexity_ratio": float}),
    ("KL divergence", "mean {:.4f}, p99 {:.3f} nats", {"evaluation.kld_mean": float, "evaluation.kld_p99": float}),
    ("same top token", "{:.1%}", {"evaluation.top1": float}),
    ("same experts", "{:.1%}", {"evaluation.routing": float}),
    ("measured on", "{} tokens held back from calibration", {"evaluation.tokens": int}),
)


def inspect(
    model: options.Model = None,
    context: Annotated[int | None, CONTEXT] = None,
    heatmap: Annotated[
        Path | None, options.place("--heatmap", metavar="PNG", help="Write a picture of how often each expert is used.")
    ] = None,
    engine: options.Engine = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Everything as JSON.")] = False,
) -> None:
    from dsv2cli import anatomy, locate, runtime

    found = anatomy.study(locate.model(model), engine)
    if found.engine == LLAMA and found.reason:
        console.note(f"({found.reason}: llama.cpp runs this file)", "dim")
    runtime.tell(found.path, found.remarks)
    if heatmap is not None:
        draw(found, heatmap)
    plan = residency.look(found.path, residency.Beside(context)) if found.engine == OURS else None
    contexts = found.contexts if context is None else (context or found.contexts[-1],)
    offered = gpu.offers(found.path, found.kv_bytes["f16"], contexts[0]) if plan is not None else []
    if as_json:
        more = {"ram": None if plan is None else describe_plan(plan), "gpu": [sentence for _, sentence in offered]}
        console.print_json(finite(describe(found, contexts) | more))
    else:
        show(found, contexts, plan, offered)


def show(
    found: Anatomy, contexts: tuple[int, ...], plan: Plan | None = None, offered: Sequence[tuple[str, str]] = ()
) -> None:
    console.say_fields(headline(found), 13)
    if found.types:
        console.say()
        console.show(types_table(found))
    if found.parts:
        console.say()
        console.show(parts_table(found))
        console.say()
        console.show(memory_table(found, contexts))
    if plan is not None:
        console.say()
        console.show(budget_table(plan))
        console.say_fields([*budget_lines(plan), *offered], 13)
    if lines := quality(found.notes):
        console.say()
        console.say_fields(lines, 17)
    if (usage := found.expert_usage) is not None:
        console.say()
        show_usage(found, usage)
    if others := {key: value for key, value in found.notes.items() if not key.startswith(SHOWN_NOTES)}:
        console.say()
        for key, value in others.items():
            console.say(f"{key}: {brief(value)}")


def quality(notes: dict[str, Any]) -> list[tuple[str, str]]:
    """What our quantiser measured and wrote down: (label, value) lines."""
    from dsv2cli import figures

    lines = [
        (label, layout.format(*(notes[f"dsv2.{key}"] for key in keys)))
        for label, layout, keys in FIGURES
        if all(isinstance(notes.get(f"dsv2.{key}"), kind) for key, kind in keys.items())
    ]
    errors = notes.get("dsv2.layer_error")
    if isinstance(errors, list) and errors and all(isinstance(e, float) and 0 <= e < math.inf for e in errors):
        worst = max(range(len(errors)), key=lambda il: errors[il])
        lines.append(("layer errors", f"{figures.spark(errors)} worst {errors[worst]:.2g} (layer {worst + 1})"))
    sources, digest = notes.get("dsv2.calibration.sources"), notes.get("dsv2.calibration.sha256")
    if isinstance(sources, list) and isinstance(digest, str):
        tokens = notes.get("dsv2.calibration.tokens", "unknown")
        lines.append(("calibrated on", f"{tokens} tokens of {', '.join(map(str, sources))} (sha256 {digest[:12]})"))
    return lines


def show_usage(found: Anatomy, usage: NDArray[np.int64]) -> None:
    from dsv2cli import figures

    n_layer, n_expert = usage.shape
    first = found.keys.get("leading_dense_block_count", 0) + 1
    console.say_fields([("Experts used in calibration:", f"{n_layer} layers of {n_expert}, bright is often")], 0)
    coloured, width = console.wants_colour(sys.stdout), console.width()
    console.show_drawing(figures.heatmap(usage, range(first, first + n_layer), width, coloured=coloured))


def draw(found: Anatomy, path: Path) -> None:
    """The expert-usage heatmap as a PNG."""
    from dsv2cli import figures

    usage = found.expert_usage
    if usage is None:
        raise UsageError(
            f"`{found.path}` does not say how often its experts were used",
            "only files that dsv2 quantize calibrated do: heatmaps need the key dsv2.expert_usage",
        )
    if path.exists() and path.suffix.lower() != ".png":
        raise UsageError(f"`{path}` exists and is no PNG", "--heatmap takes the picture's name: --heatmap usage.png")
    figures.write_png(path, usage, f"{found.name}: tokens that chose each expert; rows are layers, columns experts")
    console.note(f"wrote {path}")


def _attention_line(keys: dict[str, Any]) -> str:
    n_head, q_rank = keys.get("attention.head_count"), keys.get("attention.q_lora_rank", 0)
    if "attention.kv_lora_rank" not in keys:
        return f"{n_head} heads over keys and values of {keys.get('attention.head_count_kv', n_head)}"
    return (
        f"{n_head} heads over a latent of {keys['attention.kv_lora_rank']} + {keys.get('rope.dimension_count')},"
        f" {f'queries through {q_rank}' if q_rank else 'queries direct'}"
    )


def headline(found: Anatomy) -> list[tuple[str, str]]:
    keys, vocabulary = found.keys, found.vocabulary
    bits = 8 * found.tensor_bytes / max(found.n_values, 1)
    lines = [
        ("name", found.name),
        ("file", f"{found.path} ({console.format_bytes(found.file_bytes)})"),
        ("architecture", found.architecture),
        ("weights", f"{found.n_values / 1e9:.3f} billion, {bits:.2f} bits each" if found.types else "none"),
        ("engine", found.engine or f"none{f': it is {found.kind}' if found.kind else ''}"),
    ]
    from dsv2cli.anatomy import is_known

    if found.parts and not is_known(found.architecture):
        lines += other_shape(found)
    elif found.parts:
        groups = keys.get("expert_group_count", 1)
        lines += [
            (
                "layers",
                f"{keys.get('block_count')} of width {keys.get('embedding_length')},"
                f" the first {keys.get('leading_dense_block_count', 0)} dense",
            ),
            ("attention", _attention_line(keys)),
            (
                "experts",
                f"{keys.get('expert_used_count')} of {keys.get('expert_count')}"
                f" + {keys.get('expert_shared_count', 0)} shared, width {keys.get('expert_feed_forward_length')}"
                + (f", the best {keys.get('expert_group_used_count')} of {groups} groups" if groups > 1 else ""),
            ),
            (
                "context",
                f"{keys.get('context_length')} tokens trained, {found.kv_bytes['f16']} bytes of cache each"
                f" ({found.kv_bytes['q8_0']} with --kv q8_0)",
            ),
        ]
    template = "with" if vocabulary["chat_template"] else "without"
    lines.append(("vocabulary", f"{vocabulary['size']} tokens ({vocabulary['pre']}), {template} a chat template"))
    return lines


def other_shape(found: Anatomy) -> list[tuple[str, str]]:
    """Of an architecture that llama.cpp runs, what its keys say."""
    keys = found.keys
    heads, kept = keys.get("attention.head_count"), keys.get("attention.head_count_kv")
    lines = [("layers", f"{count(keys, 'block_count')} of width {count(keys, 'embedding_length')}")]
    if heads is not None:
        lines.append(
            ("attention", f"{brief(heads)} heads, {brief(heads if kept is None else kept)} of keys and values")
        )
    if count(keys, "expert_count"):
        lines.append(("experts", f"{count(keys, 'expert_used_count')} of {count(keys, 'expert_count')}"))
    cache = f"{found.kv_bytes['f16']} bytes of cache each ({found.kv_bytes['q8_0']} with --kv q8_0)"
    lines.append(("context", f"{count(keys, 'context_length') or 'unknown'} tokens trained, {cache}"))
    return lines


def types_table(found: Anatomy) -> console.Table:
    made = console.Table("Tensors by type", ("type", "tensors", "size", "share", "bits/weight", ""))
    for row in found.types:
        made.add(
            row.name,
            str(row.n_tensors),
            console.format_bytes(row.nbytes),
            share(row.nbytes, found.tensor_bytes),
            f"{row.bits_per_weight:.2f}",
            "" if row.runs or found.engine == LLAMA else "not run by this build",
        )
    return made


def parts_table(found: Anatomy) -> console.Table:
    made = console.Table("What a decoded token reads", ("part", "tensors", "size", "read a token", "share"))
    for row in found.parts:
        made.add(
            row.name,
            str(row.n_tensors),
            console.format_bytes(row.nbytes),
            console.format_bytes(row.token_bytes),
            share(row.token_bytes, found.token_bytes),
        )
    made.add_line()
    made.add("all", "", console.format_bytes(found.tensor_bytes), console.format_bytes(found.token_bytes), "")
    return made


def memory_table(found: Anatomy, contexts: tuple[int, ...]) -> console.Table:
    made = console.Table("Memory", ("context", "weights", "cache, f16", "together", "cache, q8_0", "together"))
    for n_ctx in contexts:
        made.add(
            str(n_ctx),
            console.format_bytes(found.tensor_bytes),
            *(
                console.format_bytes(n)
                for kv in ("f16", "q8_0")
                for n in (found.kv_bytes[kv] * n_ctx, found.memory(n_ctx, kv))
            ),
        )
    return made


def budget_table(plan: Plan) -> console.Table:
    made = console.Table("Memory for weights", ("--ram", "experts held", "of a token's", "read a token"))
    for ram in plan.budgets():
        held, hits, read = plan.held(ram), plan.hits(ram), plan.token_bytes(ram)
        made.add(residency.spelt(ram), f"{100 * held:.0f} %", f"{100 * hits:.0f} %", console.format_bytes(read))
    return made


def budget_lines(plan: Plan) -> list[tuple[str, str]]:
    """What a budget must hold, what each figure goes by, and what is chosen here."""
    size, needs = console.format_bytes, plan.needs
    used = "the most used of them held" if plan.knows else "as if all were used alike"
    free = "" if plan.free is None else f"; {size(plan.free)} free, {size(plan.beside)} for context and steps"
    chosen = (
        "all is mapped" if plan.ram is None else f"{size(plan.ram)}, {100 * plan.held(plan.ram):.0f} % of the experts"
    )
    return [
        (
            "always held",
            f"{size(needs.shared)} that every token needs; {size(needs.experts)} of routed experts, {used}",
        ),
        ("the least", residency.spelt(needs.least)),
        ("--ram auto", f"{chosen} (now{free})"),
    ]


def describe_plan(plan: Plan) -> dict[str, Any]:
    return {
        "always_bytes": plan.needs.shared,
        "expert_bytes": plan.needs.experts,
        "least": plan.needs.least,
        "by_usage": plan.knows,
        "budgets": [
            {
                "ram": ram,
                "held_share": plan.held(ram),
                "hit_rate": plan.hits(ram),
                "bytes_per_token": plan.token_bytes(ram),
            }
            for ram in plan.budgets()
        ],
        "auto": {"ram": plan.ram, "free": plan.free, "beside": plan.beside},
    }


def share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else ""


def brief(value: Any) -> str:
    """A metadata value in a line."""
    if not isinstance(value, list):
        return console.cut(str(value), SHOWN_CHARACTERS)
    shown = ", ".join(map(brief, value[:SHOWN_ITEMS]))
    return shown if len(value) <= SHOWN_ITEMS else f"{shown}, ... ({len(value)} values)"


def finite(value: Any) -> Any:
    """The value with None for every NaN and infinity, which JSON lacks and a file may hold."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def describe(found: Anatomy, contexts: tuple[int, ...]) -> dict[str, Any]:
    return {
        "path": str(found.path),
        "name": found.name,
        "architecture": found.architecture,
        "engine": found.engine,
        "kind": found.kind,
        "file_bytes": found.file_bytes,
        "tensor_bytes": found.tensor_bytes,
        "n_values": found.n_values,
        "keys": found.keys,
        "vocabulary": found.vocabulary,
        "types": [
            {"type": t.name, "n_tensors": t.n_tensors, "n_values": t.n_values, "nbytes": t.nbytes, "runs": t.runs}
            for t in found.types
        ],
        "parts": [
            {"part": p.name, "n_tensors": p.n_tensors, "nbytes": p.nbytes, "token_bytes": p.token_bytes}
            for p in found.parts
        ],
        "token_bytes": found.token_bytes,
        "kv_bytes_per_token": found.kv_bytes,
        "memory": [{"context": n, "nbytes": {kv: found.memory(n, kv) for kv in found.kv_bytes}} for n in contexts],
        "metadata": found.notes,
        "remarks": list(found.remarks),
    }
