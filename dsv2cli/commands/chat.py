"""dsv2 chat: one answer for -p or a pipe, a conversation in a terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from dsv2cli import console
from dsv2cli.errors import UsageError

if TYPE_CHECKING:
    from dsv2cli.repl import Chat

HELP = "Talk to a model: a conversation in a terminal, or one answer for -p or a pipe."
EXAMPLES = (
    "chat",
    'chat model.gguf -s "Answer in one sentence."',
    'chat -p "Tell me a story about a ship." --seed 1',
    "chat model.gguf -n 200 < question.txt > answer.txt",
    "chat model.gguf --kv q8_0 -c 32768 --lookup 7 < edit-this.txt",
)
MAX_CONTEXT = 1 << 24
MODEL_HELP = "A GGUF file, or an alias that was quantised here; the small model in the package if left out."
KvType = Literal["f16", "q8_0", "f32"]
KV_HELP = (
    "What keeps the context. q8_0: 56 % of f16's memory and less time at depth, at a small cost in quality;"
    " f32: exact, twice the memory, slower."
)
MAX_DRAFT = 15
LOOKUP_HELP = (
    "Draft up to N tokens where the answer repeats what was said: for quoting and editing. Up to 3 the answer is the"
    " same to the bit; 0: off."
)


def chat(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help=MODEL_HELP, show_default=False)] = None,
    prompt: Annotated[str | None, typer.Option("-p", "--prompt", help="Answer this and exit; - reads stdin.")] = None,
    system: Annotated[str | None, typer.Option("-s", "--system", help="System message.")] = None,
    limit: Annotated[
        int | None, typer.Option("-n", "--max-tokens", metavar="N", min=1, help="Most tokens of an answer.")
    ] = None,
    temperature: Annotated[
        float, typer.Option("--temp", metavar="X", min=0, help="0 always takes the likeliest token.")
    ] = 0.7,
    top_k: Annotated[int, typer.Option(metavar="N", min=0, help="Only the k likeliest tokens; 0: all.")] = 40,
    top_p: Annotated[
        float, typer.Option(metavar="X", min=0, max=1, help="Only the likeliest that make up p; 1: all.")
    ] = 0.95,
    min_p: Annotated[
        float, typer.Option(metavar="X", min=0, max=1, help="Only those at least p times the likeliest.")
    ] = 0.05,
    repeat_penalty: Annotated[
        float, typer.Option(metavar="X", min=0.01, help="Above 1, what was said becomes less likely.")
    ] = 1.0,
    seed: Annotated[
        int | None, typer.Option(metavar="N", min=0, max=2**64 - 1, help="The same seed gives the same answer.")
    ] = None,
    context: Annotated[
        int | None,
        typer.Option("-c", "--ctx", metavar="N", min=2, max=MAX_CONTEXT, help="Tokens of context; 4096 if left out."),
    ] = None,
    kv: Annotated[KvType, typer.Option("--kv", help=KV_HELP)] = "f16",
    threads: Annotated[int | None, typer.Option("-t", "--threads", metavar="N", min=1, help="Worker threads.")] = None,
    lookup: Annotated[int, typer.Option("--lookup", metavar="N", min=0, max=MAX_DRAFT, help=LOOKUP_HELP)] = 0,
    raw: Annotated[bool, typer.Option("--raw", help="No chat template: continue the text as it is.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With -p or a pipe: answer and statistics as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Nothing but the answer.")] = False,
) -> None:
    if raw and system:
        raise UsageError("--system needs the chat template, which --raw leaves out", "put it into the prompt")
    text = given_text(prompt)
    if text is None and as_json:
        raise UsageError("--json is for one answer, and there is no prompt", "give one with -p, or pipe it in")

    from dsv2cli import locate, memory, runtime

    path = locate.model(model)
    with runtime.open_model(path, threads) as opened:
        from cext import Sampler
        from dsv2cli.conversation import Conversation
        from dsv2cli.repl import Chat, Repl, tell_dropped

        session = opened.session(context, kv)
        memory.warn([session])
        conversation = Conversation(
            session,
            opened.tokenizer,
            system,
            raw=raw,
            n_draft=lookup,
            dropped=lambda n: None if quiet else tell_dropped(n),
        )
        sampler = Sampler(temperature, top_k, top_p, min_p, repeat_penalty, seed=seed)
        talk = Chat(opened, session, conversation, sampler, limit, quiet=quiet, raw=raw)
        if text is None:
            Repl(talk).run()
        elif as_json:
            console.print_json(report(talk, talk.collect(text), sampler.seed))
        else:
            try:
                talk.answer(text)
            finally:
                if not quiet and talk.last.n_prompt:
                    talk.tell_stats()
            if talk.last.stop == "cancelled":
                raise KeyboardInterrupt


def given_text(prompt: str | None) -> str | None:
    """The one text to answer, from -p or stdin; None where a person sits at a terminal."""
    if prompt is not None and prompt != "-":
        text = prompt
    elif prompt is None and console.is_terminal(sys.stdin):
        return None
    else:
        text = sys.stdin.buffer.read().decode("utf-8", "replace").removesuffix("\n")
    if not text.strip():
        raise UsageError("the prompt is empty", "give one with -p, or run it in a terminal to talk")
    return text


def report(talk: Chat, answer: str, seed: int) -> dict[str, object]:
    from cext.system import resident_bytes

    stats = talk.last
    return {
        "answer": answer,
        "stop": stats.stop,
        "prompt_tokens": stats.n_prompt,
        "answer_tokens": stats.n_answer,
        "drafted_tokens": stats.n_drafted,
        "taken_tokens": stats.n_taken,
        "seed": seed,
        "load_seconds": round(talk.runtime.load_seconds, 4),
        "first_token_seconds": round(stats.prefill_seconds, 4),
        "prefill_tokens_per_second": round(stats.prefill_rate, 2),
        "decode_tokens_per_second": round(stats.decode_rate, 2),
        "kv_type": talk.session.kv_type,
        "kv_bytes": talk.session.kv_bytes,
        "resident_bytes": resident_bytes(),
    }
