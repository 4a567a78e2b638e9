"""dsv2 chat: one answer for -p or a pipe, a conversation in a terminal."""

from __future__ import annotations

import contextlib
import os
import stat
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from dsv2cli import console, options, residency, text
from dsv2cli.errors import UsageError
from dsv2cli.options import Range, number

if TYPE_CHECKING:
    from dsv2cli.chat.answering import Chat
    from dsv2cli.chat.journal import Model as KeptModel
    from dsv2cli.chat.keeping import Keeping, Partner
    from dsv2cli.chat.settings import Sampling
    from dsv2cli.residency import Beside
    from dsv2cli.runtime import Wishes

HELP = "Talk to a model: a conversation in a terminal, or one answer for -p or a pipe."
EXAMPLES = (
    "chat",
    'chat model.gguf -s "Answer in one sentence."',
    'chat -p "Tell me a story about a ship." --seed 1',
    "chat model.gguf -n 200 < question.txt > answer.txt",
    'chat model.gguf -p "What does it do?" < program.py',
    'chat coder.gguf --fim "def area(r):" "    return x"',
    "chat model.gguf --kv q8_0 -c 32768 --lookup 7 < edit-this.txt",
    "chat model.gguf --preset coder",
    "chat --server http://127.0.0.1:8080/v1",
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
SERVER_HELP = (
    "Talk to a server that speaks OpenAI's chat completions, dsv2 serve's or another; MODEL is its name there. What is"
    " not set here is as the server has it."
)
KEY_HELP = "The environment's variable that holds the server's key; DSV2_API_KEY if left out."
PRESET_HELP = (
    "A set of settings from your config.toml or a project's .dsv2.toml: [presets.NAME] with system, temp and others. It"
    " comes before what they and the environment set, and after what this line says."
)
RUNS_HERE = (
    *("context", "kv", "threads", "engine", "rpc", "gpu_layers", "ram", "gpu", "vram"),
    *("lookup", "raw", "special", "fim"),
)
"""Parameters that say how a model runs here."""
SAMPLED = {"limit": "max_tokens"} | {
    name: name for name in ("temperature", "top_k", "top_p", "min_p", "repeat_penalty", "seed")
}
"""Parameters, and what ``Sampling`` calls them."""
CONTEXT_HELP = "Tokens of context; 4096 if left out, 0: as many as the model was trained for."


def _take_preset(line: typer.Context, parameter: typer.CallbackParam, name: str | None) -> str | None:
    """Let a preset's settings stand for what the line does not say: this is called before other options are looked at.
    UsageError."""
    from dsv2cli import settings

    if name is None or line.resilient_parsing or line.parent is None:  # without a command line: a setting is looked at
        return name
    root: Any = line.find_root().command
    mine = settings.options_of(root)["chat"]
    taken = {mine[key].name: value.value for key, value in settings.preset(root, name).items()}
    line.default_map = {**(line.default_map or {}), **taken}
    return name


def chat(
    line: typer.Context,
    model: options.Model = None,
    prompt: Annotated[str | None, typer.Option("-p", "--prompt", help=PROMPT_HELP)] = None,
    system: Annotated[str | None, typer.Option("-s", "--system", help="System message.")] = None,
    limit: Annotated[
        int | None, number("-n", "--max-tokens", within=options.COUNT, help="Most tokens of an answer.")
    ] = None,
    temperature: options.Temperature = options.TEMPERATURE,
    top_k: options.TopK = options.TOP_K,
    top_p: options.TopP = options.TOP_P,
    min_p: options.MinP = options.MIN_P,
    repeat_penalty: options.RepeatPenalty = options.REPEAT_PENALTY,
    seed: options.Seed = None,
    context: Annotated[int | None, number("-c", "--ctx", within=options.CONTEXT, help=CONTEXT_HELP)] = None,
    kv: options.Kv = "f16",
    threads: options.Threads = None,
    engine: options.Engine = "auto",
    rpc: options.Rpc = None,
    gpu_layers: options.GpuLayers = 0,
    ram: options.Ram = "auto",
    gpu: options.Gpu = "auto",
    vram: options.Vram = None,
    lookup: Annotated[int, number("--lookup", within=Range(0, options.MAX_DRAFT), help=LOOKUP_HELP)] = 0,
    think: options.Think = "auto",
    raw: Annotated[bool, typer.Option("--raw", help="No chat template: continue the text as it is.")] = False,
    special: Annotated[
        bool, typer.Option("--special", help="With --raw: control tokens spelt in the prompt are control tokens.")
    ] = False,
    fim: Annotated[
        tuple[str, str] | None, typer.Option("--fim", metavar="PREFIX SUFFIX", help=FIM_HELP, show_default=False)
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            "--preset", metavar="NAME", help=PRESET_HELP, show_default=False, is_eager=True, callback=_take_preset
        ),
    ] = None,
    resume: Annotated[
        str | None, typer.Option("-r", "--resume", metavar="NAME", help=RESUME_HELP, show_default=False)
    ] = None,
    go_on: Annotated[bool, typer.Option("-C", "--continue", help="The same with the last conversation.")] = False,
    server: Annotated[str | None, typer.Option("--server", metavar="URL", help=SERVER_HELP, show_default=False)] = None,
    key_env: Annotated[
        str | None, typer.Option("--key-env", metavar="VARIABLE", help=KEY_HELP, show_default=False)
    ] = None,
    no_save: Annotated[bool, typer.Option("--no-save", help="Keep nothing of this conversation on the disk.")] = False,
    plain: Annotated[bool, typer.Option("--plain", help="Show an answer's Markdown as it is written.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With -p or a pipe: answer and statistics as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Nothing but the answer.")] = False,
) -> None:
    beside = residency.Beside(context, kv)
    wishes = options.wishes(engine, rpc, gpu_layers, told=not quiet, ram=ram, beside=beside, gpu=gpu, vram=vram)
    refuse_together(prompt, system, think, raw=raw, special=special, fim=fim)
    if (resume is not None or go_on) and (raw or fim is not None or no_save or (resume is not None and go_on)):
        raise UsageError("--resume and --continue go on with one kept chat: --raw, --fim and --no-save do not")
    if system is not None:
        system = text.typed(system, "the system message")
    asked = given_text(prompt, raw=raw, quiet=quiet) if fim is None else text.typed(fim[0], "the text before")
    suffix = None if fim is None else text.typed(fim[1], "the text after")
    if asked is None and as_json:
        raise UsageError("--json is for one answer, and there is no prompt", "give one with -p, or pipe it in")

    from dsv2cli import locate
    from dsv2cli.chat import store, terminal

    if asked is None:
        terminal.prepare()
    resume = store.latest() if go_on else resume
    kept = kept_server(resume) if server is None and resume is not None and model is None else None
    if kept is not None:
        server, model = kept.path, kept.name
    refuse_beside_server(line, server, key_env)
    with contextlib.ExitStack() as stack:
        from cext import Sampler
        from dsv2cli.chat.keeping import Keeping
        from dsv2cli.chat.repl import Repl
        from dsv2cli.chat.settings import Sampling

        random = Sampler(seed=seed).seed
        sampling = Sampling(temperature, top_k, top_p, min_p, repeat_penalty, random, limit)
        if server is not None:
            said = frozenset(field for name, field in SAMPLED.items() if is_given(line, name))
            talk, partner = there(
                server,
                kept_key(kept, key_env),
                model,
                replace(sampling, said=said),
                resume if kept is not None or is_typed(line, "server") else None,
                quiet=quiet,
            )
            talk.conversation.system = system
            talk.conversation.thinking = options.THINKING[think]
        else:
            path = kept_model(model, resume) or locate.model(model)
            turns: dict[str, Any] = {"raw": raw, "special": special, "suffix": suffix, "n_draft": lookup}
            turns |= {"system": system, "thinking": options.THINKING[think]}
            talk, partner = stack.enter_context(here(path, threads, wishes, beside, sampling, turns, quiet=quiet))
        talk.markdown = not plain
        keeps = not (no_save or talk.raw) and (asked is None or resume is not None)
        keeping = Keeping(partner, talk.conversation, talk.sampling.figures(), keeps)
        if resume is not None:
            keeping.reopen(resume)
            talk.conversation.system = system or talk.conversation.system
            talk.conversation.thinking = talk.conversation.thinking if think == "auto" else options.THINKING[think]
        if asked is None:
            from dsv2cli import settings

            root = line.find_root().command
            Repl(talk, keeping, lambda: settings.presets(root), preset, remembers=not no_save).run()
        else:
            answer_once(talk, keeping, asked, as_json=as_json)


def refuse_together(
    prompt: str | None, system: str | None, think: str, *, raw: bool, special: bool, fim: tuple[str, str] | None
) -> None:
    """UsageError where what is asked has no chat template, and something of it is wanted."""
    if special and not raw:
        raise UsageError("--special is for --raw: a chat's control tokens come from its template alone", "add --raw")
    if fim is not None and (raw or prompt is not None or system or think != "auto"):
        raise UsageError("--fim is a whole prompt: -p, --system, --think and --raw have no place in it")
    if raw and think != "auto":
        raise UsageError("--think needs the chat template, which --raw leaves out", "put the tag into the prompt")
    if raw and system:
        raise UsageError("--system needs the chat template, which --raw leaves out", "put it into the prompt")


@contextlib.contextmanager
def here(
    path: Path,
    threads: int | None,
    wishes: Wishes,
    beside: Beside,
    sampling: Sampling,
    turns: dict[str, Any],
    *,
    quiet: bool,
) -> Iterator[tuple[Chat, Partner]]:
    """With a model that runs here. turns: see ``Conversation``."""
    from dsv2cli import memory, runtime
    from dsv2cli.chat.answering import LocalChat, tell_dropped
    from dsv2cli.chat.caching import Caching
    from dsv2cli.chat.conversation import Conversation
    from dsv2cli.scheduler import Budget, Scheduler

    with runtime.open_model(path, threads, wishes) as opened:
        session = opened.session(beside.n_ctx, beside.kv)
        memory.warn([session], min(session.n_ctx, Budget().prompt_step(opened.model.max_step)))
        conversation = Conversation(
            session,
            opened.tokenizer,
            n_ctx_train=opened.n_ctx_train,
            dropped=lambda n: None if quiet else tell_dropped(n),
            interrupt=opened.interrupt,
            scheduler=Scheduler(opened.evaluate),
            **turns,
        )
        raw = turns["raw"] or turns["suffix"] is not None
        yield LocalChat(opened, conversation, sampling, quiet=quiet, raw=raw), Caching(opened, conversation)


def there(
    url: str, variable: str | None, model: str | None, sampling: Sampling, given: str | None, *, quiet: bool
) -> tuple[Chat, Partner]:
    """With a server. variable: see ``kept_key``; given: see ``remote.Texts``. UsageError,
    ServerError."""
    from dsv2cli.chat import client, remote

    address, key = client.address(url), None if variable == "" else client.key(variable)
    if key is not None and not address.is_secure and not address.is_here:
        console.warn(f"the key goes to {address.host} as it is: whoever is in between can read it")
    server = client.Server(address, key)
    conversation = remote.RemoteConversation(server, remote.choose(server, model))
    key_env = "" if key is None else variable or client.DEFAULT_KEY
    return remote.RemoteChat(conversation, sampling, quiet), remote.Texts(conversation, given, key_env)


def is_given(line: typer.Context, name: str) -> bool:
    """Whether a parameter is set, by the line or elsewhere."""
    source = line.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def is_typed(line: typer.Context, name: str) -> bool:
    """Whether a parameter is set by the line itself."""
    source = line.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def refuse_beside_server(line: typer.Context, server: str | None, key_env: str | None) -> None:
    """UsageError where what is asked for is done here and not by a server, or the other way round."""
    if server is None:
        if key_env is not None:
            raise UsageError("--key-env is of --server, and none is asked")
        return
    for option in line.command.params:
        if option.name in RUNS_HERE and is_typed(line, option.name):
            raise UsageError(f"{option.opts[-1]} says how a model runs here, and a server is asked", "leave it out")


def kept_server(resume: str) -> KeptModel | None:
    """The server that the conversation to go on with was with; None where it was none."""
    from dsv2cli.chat import store

    kept = store.model_of(resume)
    return kept if kept is not None and kept.is_server else None


def kept_key(kept: KeptModel | None, key_env: str | None) -> str | None:
    """The variable with the key, "" where none is to go; None: the usual one, if it is set. Where the address comes
    from a file nobody has said that the usual key is that server's: it goes to this machine alone, or where it went
    before. UsageError."""
    from dsv2cli.chat import client

    if kept is None or key_env is not None:
        return key_env
    if kept.key_env not in ("", client.DEFAULT_KEY):
        return kept.key_env
    address = client.address(kept.path)
    if kept.key_env or address.is_here:
        return None
    if os.environ.get(client.DEFAULT_KEY):
        hint = f"--key-env {client.DEFAULT_KEY} sends the one that is there"
        console.warn(f"no key goes to {address.host}, for the conversation names none: {hint}")
    return ""


def kept_model(model: str | None, resume: str | None) -> Path | None:
    """The model of the conversation to go on with, where no other is named and it is still there."""
    from dsv2cli.chat import store

    if resume is None:
        return None
    store.existing(resume)
    return store.model_path(resume) if model is None else None


def answer_once(talk: Chat, keeping: Keeping, asked: str, *, as_json: bool) -> None:
    """One answer, as text or as JSON. KeyboardInterrupt where Ctrl-C ended it."""
    try:
        if as_json:
            answer = talk.collect(asked)
            console.print_json(talk.report(answer))
        else:
            talk.answer(asked)
    finally:
        if not as_json and not talk.quiet and talk.last.n_prompt:
            talk.tell_stats()
        try:
            keeping.close_turn(talk.last.stop or "cancelled")
        finally:
            keeping.leave()
    if talk.last.stop == "cancelled":
        console.flush()
        raise KeyboardInterrupt


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
