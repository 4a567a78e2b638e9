"""A conversation in a terminal, with commands. Ctrl-C stops the answer and not the program."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Mapping

from dsv2cli import console
from dsv2cli.chat import files, settings, store
from dsv2cli.chat.answering import Chat
from dsv2cli.chat.keeping import Keeping
from dsv2cli.chat.settings import Sampling
from dsv2cli.chat.terminal import LineReader, Reader, draws, terminating_in_order
from dsv2cli.chat.tree import Node
from dsv2cli.errors import CliError, UsageError
from dsv2cli.settings import PRESETS_HINT, Value

COMMAND = re.compile(r"/([A-Za-z]+)(?:[ \t]*\n|[ \t]+|$)(.*)", re.DOTALL)
HELP = {
    "/help": "this list",
    "/system TEXT": "set the system message (/system alone shows it, /system none removes it)",
    "/think on|off|auto": "whether the model reasons before it answers",
    "/think show|hide": "its reasoning, or a line in place of it",
    "/retry": "answer the last message again; the old answer stays as a branch",
    "/continue": "go on with the last answer",
    "/edit [N|answer]": "change your last message (or the Nth) and ask it again, or change the last answer",
    "/undo": "take the last turn back",
    "/branch": "list the branches; /branch N goes on with one",
    "/set [NAME VALUE]": "temp, top-k, top-p, min-p, repeat-penalty, seed, max-tokens, markdown",
    "/preset [NAME]": "take a preset's system message and settings (/preset alone lists them)",
    "/clear": "begin another conversation; the system message stays",
    "/save NAME": "give this conversation a name (it is kept as it goes)",
    "/load NAME": "go on with another",
    "/sessions": "list what is kept",
    "/stats": "speed, context and memory",
    "/exit": "leave (so does Ctrl-D)",
}
TAKING = {key.split()[0].removeprefix("/") for key in HELP if " " in key}  # commands that something may follow
Presets = Callable[[], Mapping[str, Mapping[str, Value]]]
SHOWN = 60  # characters of a message in a list


class Repl:
    """The conversation in a terminal. presets: those that there are, by name; taken: the one it begins with; remembers:
    whether what is typed goes into the history's file."""

    def __init__(
        self, chat: Chat, keeping: Keeping, presets: Presets, taken: str | None = None, *, remembers: bool = True
    ) -> None:
        self.chat, self.keeping, self.presets, self.taken, self.remembers = chat, keeping, presets, taken, remembers
        self.reader: Reader  # while it runs
        self.commands: dict[str, Callable[[str], bool]] = {
            "help": self.help,
            "system": self.system,
            "think": self.think,
            "retry": self.retry,
            "continue": self.go_on,
            "edit": self.edit,
            "undo": self.undo,
            "branch": self.branch,
            "set": self.set,
            "preset": self.preset,
            "clear": self.clear,
            "save": self.save,
            "load": self.load,
            "sessions": self.sessions,
            "stats": self.stats,
            "exit": self.leave,
            "quit": self.leave,
        }

    def run(self) -> None:
        """Read and answer until /exit or the end of input."""
        with console.breaking_lines():
            self._run()

    def _run(self) -> None:
        if not self.chat.quiet:
            console.note(f"{self.chat.headline()} /help lists the commands.", "dim")
        if self.keeping.tree.head:
            self._tell_where()
        with terminating_in_order(), contextlib.closing(self), self._make_reader() as reader:
            self.reader = reader
            while self._turn(reader):
                pass
        if not self.chat.quiet and self.chat.last.n_answer:
            self.chat.tell_stats()

    def _make_reader(self) -> Reader:
        """prompt-toolkit where the terminal obeys, else plain lines."""
        if not draws():
            return LineReader("> ", remembers=self.remembers)
        from dsv2cli.chat.prompt import Prompt

        return Prompt("> ", self.complete, self.meter, remembers=self.remembers)

    def _turn(self, reader: Reader) -> bool:
        """Read a message and do what it wants; False to leave."""
        try:
            text = reader.read()
            if text is None:
                return False
            with reader.away():
                return self.take(text)
        except KeyboardInterrupt:
            console.note("")
            console.note("(/exit or Ctrl-D leaves)", "dim")
        except (console.OutputError, BrokenPipeError):
            raise
        except CliError as error:  # what was typed is no text, or cannot be done
            console.print_error(str(error), error.hint)
        except OSError as error:
            place = f"`{error.filename}`: " if error.filename else ""
            console.print_error(f"{place}{error.strerror or error}")
        return True

    def complete(self, begun: str) -> Iterable[tuple[str, int, str]]:
        """What may stand before the cursor: commands and their words, and files after an @."""
        match = re.fullmatch(r"/(?:(\w+)[ \t]+)?(\S*)", begun)
        if match is None:
            yield from files.completions(begun)
            return
        words: dict[str | None, Iterable[str]] = {
            None: [f"/{name} " if name in TAKING else f"/{name}" for name in self.commands],
            "load": store.names(),
            "set": [*settings.SETTINGS, "markdown"],
            "think": ["on", "off", "auto", "show", "hide"],
            "edit": ["answer"],
        }
        if match[1] == "preset":
            with contextlib.suppress(CliError):  # a file that cannot be read
                words["preset"] = self.presets()
        wanted = match[2] if match[1] else begun
        for word in words.get(match[1], ()):
            if word.startswith(wanted):
                yield word, len(wanted), ""

    def meter(self, typed: str) -> str:
        """How full the context is, and what files that are named would add."""
        conversation = self.chat.conversation
        parts = [_share(conversation.n_used, conversation.n_ctx), *self.chat.sizes(typed), self.keeping.name]
        return console.printable(" | ".join(part for part in parts if part))

    def take(self, text: str) -> bool:
        """Run a command or answer a message; False to leave."""
        if not text.strip():
            return True
        command = COMMAND.fullmatch(text)
        if command is None:
            self.answer(self._with_files(text))
            return True
        run = self.commands.get(command[1].lower())
        if run is None:
            console.note(f"no command /{command[1]}: /help lists them; a space before it says it to the model")
            return True
        return run(command[2])

    def _with_files(self, message: str) -> str:
        """What goes to the model for a message that may name files."""
        whole, read = files.with_files(message)
        n_ctx = self.chat.conversation.n_ctx
        for path, content in read:
            n = self.chat.count(content)
            if n is not None and n_ctx and n >= n_ctx:
                raise UsageError(f"`{path}` has {n} tokens, and the context holds {n_ctx}", self.chat.room_hint(n))
            size = console.format_bytes(len(content.encode())) if n is None else _count(n, "token")
            console.note(f"({path}: {size})", "dim")
        return whole

    def close(self) -> None:
        """Keep what is to be kept."""
        self.keeping.leave()

    def answer(self, text: str | None) -> None:
        """Stream an answer, or more of the last one; Ctrl-C ends it, and what was written stays in the conversation."""
        from cext import ContextFullError
        from cext.tokenizer import TokenizerError

        try:
            self.chat.answer(text)
        except KeyboardInterrupt:
            console.note("(stopped)", "dim")
        except (ContextFullError, TokenizerError) as error:  # a template may refuse one message and take the next
            console.print_error(str(error), error.hint)
        finally:
            self.keeping.close_turn(self.chat.last.stop or "cancelled")
            self.chat.rest()

    def help(self, _: str) -> bool:
        width = max(map(len, HELP))
        for name, what in HELP.items():
            console.note(f"  {name:<{width}}  {what}")
        console.note(
            "  @FILE in a message gives its text too. A line that ends in \\ goes on in the next (so does Alt+Enter)."
        )
        console.note("  Ctrl+R searches what was typed, Ctrl+G opens an editor, Tab completes. Ctrl-C stops an answer.")
        return True

    def system(self, text: str) -> bool:
        conversation = self.chat.conversation
        if self.chat.raw:
            console.note("--raw has no system message")
        elif text.strip():
            conversation.system = None if text.strip().lower() == "none" else text
        else:
            console.note_text(conversation.system or "(no system message)")
        return True

    def think(self, text: str) -> bool:
        from cext.tokenizer import TokenizerError

        conversation, word = self.chat.conversation, text.strip().lower()
        if word in ("show", "hide"):
            self.chat.folded = word == "hide"
        elif self.chat.raw:
            console.note("--raw has no chat template, which is what switches reasoning")
        elif word in ("on", "off", "auto"):
            try:
                conversation.thinking = None if word == "auto" else word == "on"
            except TokenizerError as error:
                console.print_error(str(error), error.hint.replace("--think", "/think"))
        elif word:
            console.note(f"/think takes on, off, auto, show or hide, and not {text.strip()}")
        else:
            switch = {None: "auto", True: "on", False: "off"}[conversation.thinking]
            console.note(f"{switch}, {'hidden' if self.chat.folded else 'shown'}")
        return True

    def retry(self, _: str) -> bool:
        if (last := self.keeping.last()) is None:
            console.note("nothing to answer again yet")
        else:
            with self.keeping.answering_at(last.parent):
                self.answer(last.turn.user)
        return True

    def go_on(self, _: str) -> bool:
        last = self.keeping.last()
        if last is None or self.chat.raw:
            console.note("there is no answer to go on with")
            return True
        with self.keeping.answering_at(last.parent):
            self.chat.conversation.turns.append(last.turn)
            self.answer(None)
        if self.chat.last.stop == "end" and not self.chat.last.n_answer:
            console.note("(the answer had come to its end: there is no more of it)", "dim")
        return True

    def undo(self, _: str) -> bool:
        if (last := self.keeping.last()) is None:
            console.note("nothing to take back yet")
        else:
            self.keeping.go_to(last.parent)
            console.note(f"(taken back: {_first_line(last.turn.user)})", "dim")
        return True

    def edit(self, text: str) -> bool:
        path, word = self.keeping.tree.path(), text.strip().lower()
        if not path or self.chat.raw:
            console.note("nothing to edit yet")
        elif word == "answer":
            self._edit_answer(path[-1])
        elif word and not (word.isascii() and word.isdigit() and 1 <= int(word) <= len(path)):
            raise UsageError(f"/edit takes `answer` or a turn, 1 to {len(path)}, and not {text.strip()}")
        else:
            node = path[int(word or len(path)) - 1]
            changed = self.reader.edit(node.turn.user)
            if changed is not None and changed.strip():
                with self.keeping.answering_at(node.parent):
                    self.answer(self._with_files(changed))
        return True

    def _edit_answer(self, node: Node) -> None:
        """Another answer in a branch beside it, for the conversation to go on from."""
        conversation = self.chat.conversation
        said = conversation.said()
        if said.reasoning is not None:
            raise UsageError("an answer with reasoning cannot be changed", "/retry answers again")
        body = said.content.lstrip()
        changed = self.reader.edit(body)
        if changed is None or not changed.strip() or changed == body:
            return
        before = said.content[: len(said.content) - len(body)]
        with self.keeping.answering_at(node.parent):
            conversation.turns.append(conversation.changed(node.turn, before + changed))
            self.keeping.close_turn("edited")
        console.note("(changed; /continue goes on with it)", "dim")

    def set(self, text: str) -> bool:
        words = text.split()
        if words[:1] == ["markdown"] and words[1:] in (["on"], ["off"]):
            self.chat.markdown = words[1] == "on"
        elif len(words) == 2:
            self._set_sampling(settings.changed(self.chat.sampling, words[0].lower(), words[1]))
        elif len(words) > 2:
            raise UsageError("/set takes a name and a value", "/set alone shows what there is")
        else:
            there = settings.shown(self.chat.sampling)
            there.append(f"  markdown        {'on' if self.chat.markdown else 'off'}")
            lines = [line for line in there if not words or line.split()[0] == words[0].lower()]
            if not lines:
                raise settings.unknown(words[0])
            for line in lines:
                console.note(line)
        return True

    def _set_sampling(self, sampling: Sampling) -> None:
        self.chat.obey(sampling)
        self.keeping.sampling = sampling.figures()

    def preset(self, text: str) -> bool:
        found, name = self.presets(), text.strip()
        if not name:
            for each, values in found.items():
                told = ", ".join(f"{key} {_first_line(str(value.value))}" for key, value in values.items())
                console.note(f"{'*' if each == self.taken else ' '} {each}  {told}")
            if not found:
                console.note(f"no presets yet: {PRESETS_HINT}")
            return True
        if name not in found:
            raise UsageError(f"there is no preset `{name}`", "/preset lists them")
        words = {key: str(value.value) for key, value in found[name].items()}
        sampling = self.chat.sampling
        for key in words.keys() & settings.SETTINGS.keys():
            sampling = settings.changed(sampling, key, words[key])
        if "think" in words:
            self.think(words["think"])
        self.chat.conversation.system = words.get("system", self.chat.conversation.system)
        self._set_sampling(sampling)
        self.taken = name
        return True

    # Conversations that are kept.

    def branch(self, text: str) -> bool:
        tree, conversation = self.keeping.tree, self.chat.conversation
        tips = tree.tips()
        if not tips:
            console.note("no branches yet: /retry and /undo make them")
        elif word := text.strip():
            if not word.isascii() or not word.isdigit() or not 1 <= int(word) <= len(tips):
                raise UsageError(f"there is no branch `{word}`", f"/branch lists them: 1 to {len(tips)}")
            self.keeping.go_to(tips[int(word) - 1].number)
            self._tell_where()
        else:
            here = {node.number for node in tree.path()}
            for i, tip in enumerate(tips, 1):
                mark = "*" if tip.number in here else " "
                n = len(tree.path(tip.number))
                console.note(f"{mark} {i}  {_count(n, 'turn')}, the last: {_first_line(tip.turn.user)}")
                if answer := conversation.text_of(tip.turn).strip():  # which tells branches of one question apart
                    console.note(f"     {_first_line(answer)}", "dim")
        return True

    def clear(self, _: str) -> bool:
        self.keeping.begin_anew()
        return True

    def save(self, text: str) -> bool:
        if name := text.strip():
            self.keeping.rename(name)
        name = self.keeping.name
        console.note(f"(kept as {name}: dsv2 chat -r {name} goes on with it)" if name else "(not kept yet)", "dim")
        return True

    def load(self, text: str) -> bool:
        if not text.strip():
            raise UsageError("which one?", "/sessions lists them")
        self.keeping.reopen(text.strip())
        self._tell_where()
        return True

    def sessions(self, _: str) -> bool:
        found = store.summaries()
        if not found:
            console.note("no conversation is kept yet")
        for summary in found:
            mark = "*" if summary.name == self.keeping.name else " "
            console.note(f"{mark} {summary.name}  {summary.when}, {summary.model}: {_first_line(summary.begins)}")
        return True

    def _tell_where(self) -> None:
        """The end of the conversation that goes on."""
        tree, conversation = self.keeping.tree, self.chat.conversation
        if (last := self.keeping.last()) is None:
            console.note(f"({self.keeping.name}: at its beginning)", "dim")
            return
        console.note(f"({self.keeping.name}: {_count(len(tree.path()), 'turn')}; the last:)", "dim")
        console.note_text(f"> {last.turn.user}\n{conversation.text_of(last.turn).strip()}")

    def stats(self, _: str) -> bool:
        conversation = self.chat.conversation
        share = _share(conversation.n_used, conversation.n_ctx)
        self.chat.tell_stats()
        console.note(_count(len(conversation.turns), "turn") + (f", {share} of context" if share else ""), "dim")
        return True

    def leave(self, _: str) -> bool:
        return False


def _first_line(text: str) -> str:
    folded = console.fold(text)
    return folded if len(folded) <= SHOWN else f"{folded[: SHOWN - 3].rstrip()}..."


def _share(n: int | None, n_ctx: int) -> str:
    """ "" where it is not known."""
    if n is None:
        return ""
    return f"{n} of {n_ctx} tokens" if n_ctx else _count(n, "token")


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'s' if n != 1 else ''}"
