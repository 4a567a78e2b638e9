"""dsv2 inspect: a GGUF's header, laid out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsv2cli import console
from dsv2cli.commands.chat import MODEL_HELP

if TYPE_CHECKING:
    from rich.table import Table

    from dsv2cli.anatomy import Anatomy

HELP = "Show what a GGUF is made of and what it needs."
EXAMPLES = ("inspect model.gguf", "inspect model.gguf --ctx 32768 --json")
SHOWN_ITEMS = 4  # of a list among the metadata


def inspect(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help=MODEL_HELP, show_default=False)] = None,
    context: Annotated[
        int | None, typer.Option("-c", "--ctx", metavar="N", min=1, help="Memory at this context, not a few.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Everything as JSON.")] = False,
) -> None:
    from dsv2cli import anatomy, locate

    found = anatomy.study(locate.model(model))
    contexts = (context,) if context else found.contexts
    if as_json:
        console.print_json(describe(found, contexts))
    else:
        show(found, contexts)


def show(found: Anatomy, contexts: tuple[int, ...]) -> None:
    out = console.stdout_console()
    for label, value in headline(found):
        out.print(f"[bold]{label:<13}[/bold] {console.printable(value)}", markup=True, soft_wrap=True)
    if found.types:
        out.print()
        out.print(types_table(found))
    if found.parts:
        out.print()
        out.print(parts_table(found))
        out.print()
        out.print(memory_table(found, contexts))
    if found.notes:
        out.print()
        for key, value in found.notes.items():
            out.print(f"{key}: {console.printable(brief(value))}", markup=False, soft_wrap=True)


def headline(found: Anatomy) -> list[tuple[str, str]]:
    keys, vocabulary = found.keys, found.vocabulary
    bits = 8 * found.tensor_bytes / max(found.n_values, 1)
    lines = [
        ("name", found.name),
        ("file", f"{found.path} ({console.format_bytes(found.file_bytes)})"),
        ("architecture", found.architecture),
        ("weights", f"{found.n_values / 1e9:.3f} billion, {bits:.2f} bits each" if found.types else "none"),
    ]
    if found.parts:
        q_rank = keys.get("attention.q_lora_rank", 0)
        groups = keys.get("expert_group_count", 1)
        lines += [
            (
                "layers",
                f"{keys.get('block_count')} of width {keys.get('embedding_length')},"
                f" the first {keys.get('leading_dense_block_count', 0)} dense",
            ),
            (
                "attention",
                f"{keys.get('attention.head_count')} heads over a latent of {keys.get('attention.kv_lora_rank')}"
                f" + {keys.get('rope.dimension_count')}, {f'queries through {q_rank}' if q_rank else 'queries direct'}",
            ),
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


def table(title: str, *columns: str) -> Table:
    """Left-aligned first column, right-aligned figures."""
    from rich import box
    from rich.table import Table

    made = Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False
    )
    for i, column in enumerate(columns):
        made.add_column(column, justify="right" if i else "left")
    return made


def types_table(found: Anatomy) -> Table:
    made = table("Tensors by type", "type", "tensors", "size", "share", "bits/weight", "")
    for row in found.types:
        made.add_row(
            row.name,
            str(row.n_tensors),
            console.format_bytes(row.nbytes),
            share(row.nbytes, found.tensor_bytes),
            f"{row.bits_per_weight:.2f}",
            "" if row.runs else "not run by this build",
        )
    return made


def parts_table(found: Anatomy) -> Table:
    made = table("What a decoded token reads", "part", "tensors", "size", "read a token", "share")
    for row in found.parts:
        made.add_row(
            row.name,
            str(row.n_tensors),
            console.format_bytes(row.nbytes),
            console.format_bytes(row.token_bytes),
            share(row.token_bytes, found.token_bytes),
        )
    made.add_section()
    made.add_row("all", "", console.format_bytes(found.tensor_bytes), console.format_bytes(found.token_bytes), "")
    return made


def memory_table(found: Anatomy, contexts: tuple[int, ...]) -> Table:
    made = table("Memory", "context", "weights", "cache, f16", "together", "cache, q8_0", "together")
    for n_ctx in contexts:
        made.add_row(
            str(n_ctx),
            console.format_bytes(found.tensor_bytes),
            *(
                console.format_bytes(n)
                for kv in ("f16", "q8_0")
                for n in (found.kv_bytes[kv] * n_ctx, found.memory(n_ctx, kv))
            ),
        )
    return made


def share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else ""


def brief(value: Any) -> str:
    """A metadata value in a line."""
    if isinstance(value, list) and len(value) > SHOWN_ITEMS:
        return f"{', '.join(map(str, value[:SHOWN_ITEMS]))}, ... ({len(value)} values)"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def describe(found: Anatomy, contexts: tuple[int, ...]) -> dict[str, Any]:
    return {
        "path": str(found.path),
        "name": found.name,
        "architecture": found.architecture,
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
    }
