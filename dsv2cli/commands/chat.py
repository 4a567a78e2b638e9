"""dsv2 chat: one answer for -p or a pipe, a conversation in a terminal."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from dsv2cli import console, options, residency, text
from dsv2cli.errors import UsageError
from dsv2cli.options import Range, number

if TYPE_CHECKING:
    from dsv2cli.chat.answering import Chat
    from dsv2cli.chat.keeping import Keeping

HELP = "Talk to a model: a conversation in a terminal, or one answer for -p or a pipe."
EXAMPLES = (
    "chat",
    'chat model.gguf -s "Answer in one sentence."',
    'chat -p "Tell me a story about a ship." --seed 1',
    "chat model.gguf -n 200 < question.txt > answer.txt",
    'chat model.gguf -p "What does it do?" < program.py',
    'chat coder.gguf --fim "def area(r):" "    return x"',
    "chat model.gguf --kv q8_0 -c 32768 --lookup 7 < edit-this.txt",
)
PROMPT_HELP = (
    "Answer this and exit; - reads stdin. With a pipe or a file on stdin both are read: its text, an empty line, this."
)
LOOKUP_HELP = (
    "Draft up to N tokens where the answer repeats what was said: for quoting and editing. Up to 3 the answer is the"
    " same to the bit; 0: off."
)
FIM_HELP = "Write what stands between two texts, for models that were trained for it (DeepSeek-Coder-V2)."
RESUME_HELP = (
    "Go on with the conversation NAME, with the model that it was with unless another path is given; conversations in a"
    " terminal are kept as they go, answers to -p where they go on with one."
)
CONTEXT_HELP = "Tokens of context; 4096 if left out, 0: as many as the model was trained for."


def chat(
    model: options.Model = None,
    prompt: Annotated[str | None, typer.Option("-p", "--prompt", help=PROMPT_HELP)] = None,
    system: Annotated[str | None, typer.Option("-s", "--system", help="System message.")] = None,
    limit: Annotated[
        int | None, number("-n", "--max-tokens", within=options.COUNT, help="Most tokens of an answer.")
    ] = None,
    temperature: options.Temperature = 0.7,
    top_k: options.TopK = 40,
    top_p: options.TopP = 0.95,
    min_p: options.MinP = 0.05,
    repeat_penalty: options.RepeatPenalty = 1.0,
    seed: options.Seed = None,
    context: Annotated[int | None, number("-c", "--ctx", within=options.CONTEXT, help=CONTEXT_HELP)] = None,
    kv: options.Kv = "f16",
    threads: options.Threads = None,
    engine: options.Engine = "auto",
    rpc: options.Rpc = None,
    gpu_layers: options.GpuLayers = 0,
    ram: options.Ram = "auto",
    lookup: Annotated[int, number("--lookup", within=Range(0, options.MAX_DRAFT), help=LOOKUP_HELP)] = 0,
    think: options.Think = "auto",
    raw: Annotated[bool, typer.Option("--raw", help="No chat template: continue the text as it is.")] = False,
    special: Annotated[
        bool, typer.Option("--special", help="With --raw: control tokens spelt in the prompt are control tokens.")
    ] = False,
    fim: Annotated[
        tuple[str, str] | None, typer.Option("--fim", metavar="PREFIX SUFFIX", help=FIM_HELP, show_default=False)
    ] = None,
    resume: Annotated[
        str | None, typer.Option("-r", "--resume", metavar="NAME", help=RESUME_HELP, show_default=False)
    ] = None,
    go_on: Annotated[bool, typer.Option("-C", "--continue", help="The same with the last conversation.")] = False,
    no_save: Annotated[bool, typer.Option("--no-save", help="Keep nothing of this conversation on the disk.")] = False,
    plain: Annotated[bool, typer.Option("--plain", help="Show an answer's Markdown as it is written.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With -p or a pipe: answer and statistics as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Nothing but the answer.")] = False,
) -> None:
    beside = residency.Beside(context, kv)
    wishes = options.wishes(engine, rpc, gpu_layers, told=not quiet, ram=ram, beside=beside)
    if special and not raw:
        raise UsageError("--special is for --raw: a chat's control tokens come from its template alone", "add --raw")
    if fim is not None and (raw or prompt is not None or system or think != "auto"):
        raise UsageError("--fim is a whole prompt: -p, --system, --think and --raw have no place in it")
    if raw and think != "auto":
        raise UsageError("--think needs the chat template, which --raw leaves out", "put the tag into the prompt")
    if raw and system:
        raise UsageError("--system needs the chat template, which --raw leaves out", "put it into the prompt")
    if (resume is not None or go_on) and (raw or fim is not None or no_save or (resume is not None and go_on)):
        raise UsageError("--resume and --continue go on with one kept chat: --raw, --fim and --no-save do not")
    if system is not None:
        system = text.typed(system, "the system message")
    asked = given_text(prompt, raw=raw, quiet=quiet) if fim is None else text.typed(fim[0], "the text before")
    if asked is None and as_json:
        raise UsageError("--json is for one answer, and there is no prompt", "give one with -p, or pipe it in")

    from dsv2cli import locate, memory, runtime
    from dsv2cli.chat import store, terminal

    if asked is None:
        terminal.prepare()
    resume = store.latest() if go_on else resume
    path = kept_model(model, resume) or locate.model(model)
    with runtime.open_model(path, threads, wishes) as opened:
        from cext import Sampler
        from dsv2cli.chat.answering import Chat, tell_dropped
        from dsv2cli.chat.conversation import Conversation
        from dsv2cli.chat.keeping import Keeping
        from dsv2cli.chat.repl import Repl
        from dsv2cli.chat.settings import Sampling
        from dsv2cli.scheduler import Budget, Scheduler

        session = opened.session(context, kv)
        memory.warn([session], Budget().alone)
        conversation = Conversation(
            session,
            opened.tokenizer,
            system,
            raw=raw,
            special=special,
            suffix=None if fim is None else text.typed(fim[1], "the text after"),
            thinking=options.THINKING[think],
            n_draft=lookup,
            n_ctx_train=opened.n_ctx_train,
            dropped=lambda n: None if quiet else tell_dropped(n),
            interrupt=opened.interrupt,
            scheduler=Scheduler(opened.evaluate),
        )
        sampler = Sampler(temperature, top_k, top_p, min_p, repeat_penalty, seed=seed)
        sampling = Sampling(temperature, top_k, top_p, min_p, repeat_penalty, sampler.seed, limit)
        talk = Chat(opened, conversation, sampler, sampling, quiet=quiet, raw=raw or fim is not None)
        talk.markdown = not plain
        keeps = not (no_save or talk.raw) and (asked is None or resume is not None)
        keeping = Keeping(opened, conversation, sampling.figures(), keeps)
        if resume is not None:
            keeping.reopen(resume)
            conversation.system = system or conversation.system
            conversation.thinking = conversation.thinking if think == "auto" else options.THINKING[think]
        if asked is None:
            Repl(talk, keeping, remembers=not no_save).run()
            return
        answer_once(talk, keeping, asked, as_json=as_json)
        if talk.last.stop == "cancelled":
            console.flush()
            raise KeyboardInterrupt


def kept_model(model: str | None, resume: str | None) -> Path | None:
    """The model of the conversation to go on with, where no other is named and it is still there."""
    from dsv2cli.chat import store

    if resume is None:
        return None
    store.existing(resume)
    return store.model_path(resume) if model is None else None


def answer_once(talk: Chat, keeping: Keeping, asked: str, *, as_json: bool) -> None:
    """One answer, as text or as JSON."""
    try:
        if as_json:
            answer = talk.collect(asked)
            console.print_json(report(talk, answer, talk.sampling.seed))
        else:
            talk.answer(asked)
    finally:
        if not as_json and not talk.quiet and talk.last.n_prompt:
            talk.tell_stats()
        keeping.close_turn(talk.last.stop or "cancelled")
        keeping.leave()


def given_text(prompt: str | None, *, raw: bool = False, quiet: bool = False) -> str | None:
    """The one text to answer: stdin's, -p's, or both; None where a person sits at a terminal.

    What is nothing but space is no prompt, but text to go on from where raw.
    """
    if prompt is None and console.is_terminal(sys.stdin):
        return None
    parts = []
    if prompt in (None, "-") or _is_document(sys.stdin):
        parts.append(text.read_stdin(waits=quiet or prompt in (None, "-")))
    if prompt not in (None, "-"):
        parts.append(text.typed(prompt, "the prompt"))
    asked = "\n\n".join(part for part in parts if (part if raw else part.strip()))
    if not asked:
        raise UsageError("the prompt is empty", "give one with -p, or run it in a terminal to talk")
    return asked


def _is_document(stream: TextIO) -> bool:
    """Whether something was piped in: not a terminal, nor /dev/null or another device."""
    try:
        mode = os.fstat(stream.fileno()).st_mode
    except (OSError, ValueError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode) or stat.S_ISSOCK(mode)


def report(talk: Chat, answer: str, seed: int) -> dict[str, object]:
    from cext.system import resident_bytes

    stats, said = talk.last, talk.conversation.said()
    return {
        "answer": answer if said.reasoning is None else said.content,
        "reasoning": said.reasoning,
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
        "engine": talk.runtime.engine,
        "kv_type": talk.session.kv_type,
        "kv_bytes": talk.session.kv_bytes,
        "resident_bytes": resident_bytes(),
        "drive": talk.runtime.drive(),
    }
