"""The place to type in a terminal that obeys: several lines, history with search, completion, the editor, a meter.

prompt-toolkit draws it, and nothing but it: what a message or a command means does not depend on how it was typed.
It is asked for no cursor positions, which a terminal may not answer, or answer into the next program's input.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TextIO

from prompt_toolkit import PromptSession
from prompt_toolkit.buffer import Buffer
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.data_structures import Size
from prompt_toolkit.document import Document
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import has_focus, is_searching
from prompt_toolkit.formatted_text import StyleAndTextTuples
from prompt_toolkit.history import History
from prompt_toolkit.input.ansi_escape_sequences import ANSI_SEQUENCES
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.keys import Keys
from prompt_toolkit.layout.processors import TabsProcessor
from prompt_toolkit.output import ColorDepth
from prompt_toolkit.output.vt100 import Vt100_Output
from prompt_toolkit.shortcuts import CompleteStyle
from prompt_toolkit.styles import Style

from dsv2cli import console
from dsv2cli.chat import history
from dsv2cli.chat.terminal import CONTINUED, keys_waiting
from dsv2cli.text import typed

PASTE_ON, PASTE_OFF = "\x1b[?2004h", "\x1b[?2004l"
MENU_ROWS = 6
SHIFT_ENTER = ("\x1b[13;2u", "\x1b[27;2;13~")  # as terminals send it that tell it from Enter
COLOURS = {"prompt": "bold ansigreen", "bottom-toolbar": "noreverse ansibrightblack"}
PLAIN = {"prompt": "", "bottom-toolbar": "noreverse"}

# text -> (what may follow it, characters that this takes the place of, what to say of it)
Complete = Callable[[str], Iterable[tuple[str, int, str]]]


class Prompt:
    """Asks for messages; see ``terminal.Reader``. complete: what may stand before the cursor; meter: a line below;
    remembers: whether messages go into the history's file."""

    def __init__(self, prompt: str, complete: Complete, meter: Callable[[str], str], *, remembers: bool = True) -> None:
        self._remembers = remembers
        colours = console.wants_colour(sys.stdout)
        self._session: PromptSession[str] = PromptSession(
            [("class:prompt", prompt)],
            multiline=True,
            prompt_continuation=_continuation,
            key_bindings=_bindings(),
            history=_History(),
            completer=_Completer(complete),
            complete_while_typing=False,
            complete_style=CompleteStyle.COLUMN,
            reserve_space_for_menu=MENU_ROWS,
            search_ignore_case=True,
            input_processors=[TabsProcessor(char1=" ", char2=" ")],
            enable_suspend=True,
            enable_open_in_editor=True,
            tempfile_suffix=".md",
            bottom_toolbar=lambda: meter(self._session.default_buffer.text),
            style=Style.from_dict(COLOURS if colours else PLAIN),
            include_default_pygments_style=False,
            color_depth=ColorDepth.DEPTH_4_BIT if colours else ColorDepth.DEPTH_1_BIT,
            output=_output(sys.stdout),
        )

    def read(self) -> str | None:
        """One message; None at the end of input. KeyboardInterrupt at Ctrl-C, UsageError where it is no text."""
        text = self._ask("")
        if self._remembers and text is not None and text.strip():
            history.add(text)
        return text if text is None else typed(text, "what was typed")

    def edit(self, text: str) -> str | None:
        """``text`` as it is after a person has changed it; None where that was given up with Ctrl-C or Ctrl-D."""
        try:
            changed = self._ask(text)
        except KeyboardInterrupt:
            return None
        return changed if changed is None else typed(changed, "what was typed")

    def _ask(self, default: str) -> str | None:
        try:
            return self._session.prompt(default=default)
        except EOFError:
            return None

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """While nothing is read: what is typed ahead waits unseen and whole, pastes marked, for the next prompt."""
        with keys_waiting(sys.stdin.fileno()):
            console.send(PASTE_ON)
            yield

    def __enter__(self) -> Prompt:
        return self

    def __exit__(self, *exc: object) -> None:
        """Leave the terminal as it was."""
        console.send(PASTE_OFF)


class _Output(Vt100_Output):
    """A terminal that says how large it is and is asked nothing else."""

    def get_rows_below_cursor_position(self) -> int:
        """A row, so that the meter stands below what is typed and not at the bottom of the screen."""
        return 1


def _output(stream: TextIO) -> Vt100_Output:
    def size() -> Size:
        found = shutil.get_terminal_size()
        with contextlib.suppress(OSError, ValueError):
            found = os.get_terminal_size(stream.fileno())
        return Size(rows=found.lines or 24, columns=found.columns or 80)

    return _Output(stream, size, term=os.environ.get("TERM"), enable_cpr=False)


class _History(History):
    """The lines that all conversations remember; what is added to the file is ``Prompt``'s to say."""

    def load_history_strings(self) -> Iterable[str]:
        return reversed(history.read())

    def store_string(self, string: str) -> None:
        """See ``Prompt.read``."""


class _Completer(Completer):
    def __init__(self, complete: Complete) -> None:
        self._complete = complete

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        for text, n, about in self._complete(document.text_before_cursor):
            yield Completion(text, -n, display=console.printable(text), display_meta=console.printable(about))


def _continuation(width: int, number: int, is_soft_wrap: int) -> StyleAndTextTuples:
    """What stands before every line but the first."""
    return [("", " " * width)]


def _bindings() -> KeyBindings:
    """Enter sends; Alt+Enter, Shift+Enter and a backslash before Enter begin a line; Ctrl+G opens the editor."""
    for sequence in SHIFT_ENTER:
        ANSI_SEQUENCES[sequence] = (Keys.Escape, Keys.ControlM)
    bindings = KeyBindings()
    typing = has_focus(DEFAULT_BUFFER) & ~is_searching

    @bindings.add("enter", filter=typing)
    @bindings.add("c-j", filter=typing)
    def send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith(CONTINUED):
            buffer.delete_before_cursor(len(CONTINUED))
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    @bindings.add("escape", "enter", filter=typing)
    @bindings.add("escape", "c-j", filter=typing)
    def begin_line(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    @bindings.add("c-g", filter=typing)
    def open_editor(event: KeyPressEvent) -> None:
        buffer: Buffer = event.current_buffer
        buffer.open_in_editor()

    return bindings
