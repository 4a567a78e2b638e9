"""The engine's Python face: GGUF files, models, sessions, sampling.

The work is done in the C extension ``cext._engine``; this package gives it types and names.
"""

from cext._engine import (
    ContextFullError,
    EngineError,
    FormatError,
    Gguf,
    Layer,
    Model,
    Sampler,
    Session,
    UnsupportedError,
    eval_batch,
    formats,
    isas,
)

__all__ = [
    "ContextFullError",
    "EngineError",
    "FormatError",
    "Gguf",
    "Layer",
    "Model",
    "Sampler",
    "Session",
    "UnsupportedError",
    "eval_batch",
    "formats",
    "isas",
]
