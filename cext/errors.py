"""What the engine raises. Each carries ``hint``: what to do about it, or "" where there is nothing to add."""


class EngineError(Exception):
    """The engine refused."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class FormatError(EngineError):
    """A file is not what it claims: truncated, overlapping, overflowing, a tensor of the wrong shape or type."""


class UnsupportedError(EngineError):
    """The file is well formed, but this build does not run it."""


class MismatchError(EngineError):
    """Two things that do not belong together: a saved session and another model, or another cache type."""


class ContextFullError(EngineError):
    """More tokens than the session's context holds; nothing was evaluated."""


class ArgumentError(EngineError, ValueError):
    """An argument out of its range."""


class FileError(EngineError, OSError):
    """A file could not be opened, mapped or read, or was changed while it was open."""

    def __str__(self) -> str:
        return str(self.args[0])


class OutOfMemoryError(EngineError, MemoryError):
    """The system refused memory."""


class StoppedError(EngineError):
    """A step was ended by ``Model.stop`` while it waited for the drive; nothing was evaluated."""


class DeviceError(EngineError):
    """A device that computes is not there, cannot be used, or failed."""


class NoEngineError(ImportError):
    """The source tree was imported, where the engine is not compiled."""

    hint = ""  # the message says it all: a script shows nothing else


class BusyError(EngineError):
    """Two threads in one session."""


class TokenizerError(EngineError):
    """The vocabulary in a file cannot be used, or a chat cannot be told to the model."""


class TemplateError(TokenizerError):
    """A chat template cannot be compiled, refused the conversation, failed on it, or ran too long."""
