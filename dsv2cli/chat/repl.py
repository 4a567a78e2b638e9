"""A conversation in a terminal, with commands. Ctrl-C stops the answer and not the program."""

from __future__ import annotations

import re
from collections.abc import Callable

from dsv2cli import console
from dsv2cli.chat.answering import Chat
from dsv2cli.chat.terminal import LineReader, terminating_in_order
from dsv2cli.errors import UsageError

COMMAND = re.compile(r"/([A-Za-z]+)(?:[ \t]*\n|[ \t]+|$)(.*)", re.DOTALL)
HELP = {
    "/help": "this list",
    "/system TEXT": "set the system message (/system alone shows it, /system none removes it)",
    "/think on|off|auto": "whether the model reasons before it answers",
    "/think show|hide": "its reasoning, or a line in place of it",
    "/clear": "forget the conversation; the system message stays",
    "/retry": "answer the last message again",
    "/stats": "speed, context and memory",
    "/exit": "leave (so does Ctrl-D)",
}


class Repl:
    """The conversation in a terminal."""

    def __init__(self, chat: Chat) -> None:
        self.chat = chat
        self.commands: dict[str, Callable[[str], bool]] = {
            "help": self.help,
            "system": self.system,
            "think": self.think,
            "clear": self.clear,
            "retry": self.retry,
            "stats": self.stats,
            "exit": self.leave,
            "quit": self.leave,
        }

    def run(self) -> None:
        """Read and answer until /exit or the end of input."""
        if not self.chat.quiet:
            runtime, session = self.chat.runtime, self.chat.session
            cache = f"{console.format_bytes(session.kv_bytes)} of {session.kv_type}"
            console.note(
                f"{runtime.name}, {session.n_ctx} tokens of context in {cache}, {runtime.model.isa}."
                " /help lists the commands.",
                "dim",
            )
        with terminating_in_order(), LineReader("> ", [f"/{name}" for name in self.commands]) as reader:
            while True:
                try:
                    text = reader.read()
                    if text is None:
                        break
                    with reader.away():
                        if not self.take(text):
                            break
                except KeyboardInterrupt:
                    console.note("")
                    console.note("(/exit or Ctrl-D leaves)", "dim")
                except UsageError as error:  # what was typed is no text
                    console.print_error(str(error), error.hint)
        if not self.chat.quiet and self.chat.last.n_answer:
            self.chat.tell_stats()

    def take(self, text: str) -> bool:
        """Run a command or answer a message; False to leave."""
        if not text.strip():
            return True
        command = COMMAND.fullmatch(text)
        if command is None:
            self.answer(text)
            return True
        run = self.commands.get(command[1].lower())
        if run is None:
            console.note(f"no command /{command[1]}: /help lists them; a space before it says it to the model")
            return True
        return run(command[2])

    def answer(self, text: str) -> None:
        """Stream an answer; Ctrl-C ends it, and what was written of it stays in the conversation."""
        from cext import ContextFullError
        from cext.tokenizer import TokenizerError

        try:
            self.chat.answer(text)
        except KeyboardInterrupt:
            console.note("(stopped)", "dim")
        except (ContextFullError, TokenizerError) as error:  # a template may refuse one message and take the next
            console.print_error(str(error), error.hint)

    def help(self, _: str) -> bool:
        width = max(map(len, HELP))
        for name, what in HELP.items():
            console.note(f"  {name:<{width}}  {what}")
        console.note("  A line that ends in \\ goes on in the next. Ctrl-C stops an answer.")
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

    def clear(self, _: str) -> bool:
        self.chat.conversation.clear()
        return True

    def retry(self, _: str) -> bool:
        with self.chat.conversation.take_back() as text:
            if text is None:
                console.note("nothing to answer again yet")
            else:
                self.answer(text)
        return True

    def stats(self, _: str) -> bool:
        conversation = self.chat.conversation
        n = len(conversation.turns)
        n_used = conversation.n_used if n else 0  # the cache may still hold what is forgotten
        self.chat.tell_stats()
        console.note(f"{n} turn{'s' if n != 1 else ''}, {n_used} of {conversation.n_ctx} tokens of context", "dim")
        return True

    def leave(self, _: str) -> bool:
        return False
