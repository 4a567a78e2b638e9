"""The engine's Python face: GGUF files, models, sessions, single layers, sampling."""

from cext._engine import MAX_STEP, formats, isas
from cext.errors import (
    ArgumentError,
    BusyError,
    ContextFullError,
    EngineError,
    FileError,
    FormatError,
    OutOfMemoryError,
    UnsupportedError,
)
from cext.gguf import Gguf, Metadata, TensorInfo
from cext.layer import Encoded, Layer, Sublayer
from cext.model import Hparams, Model, Session, Tap, eval_batch
from cext.sampler import Sampler

__all__ = [
    "MAX_STEP",
    "ArgumentError",
    "BusyError",
    "ContextFullError",
    "Encoded",
    "EngineError",
    "FileError",
    "FormatError",
    "Gguf",
    "Hparams",
    "Layer",
    "Metadata",
    "Model",
    "OutOfMemoryError",
    "Sampler",
    "Session",
    "Sublayer",
    "Tap",
    "TensorInfo",
    "UnsupportedError",
    "eval_batch",
    "formats",
    "isas",
]
