"""The engine's Python face: GGUF files, models, sessions, single layers, sampling.

What is open may be closed by any thread at any time: calls under way end as they began, and the last of them releases
the memory; calls after it raise.
"""

from cext.errors import (
    ArgumentError,
    BusyError,
    ContextFullError,
    DeviceError,
    EngineError,
    FileError,
    FormatError,
    MismatchError,
    NoEngineError,
    OutOfMemoryError,
    StoppedError,
    UnsupportedError,
)

try:
    from cext._engine import MAX_STEP, SESSION_BLOCK, architectures, cores, formats, isa, isas
except ModuleNotFoundError as error:
    if error.name != "cext._engine":
        raise
    raise NoEngineError(
        f"`{__path__[0]}` is cext's source, without the compiled engine: run `pip install .` in the clone, and Python"
        " from another folder or with -P"
    ) from None

from cext.gguf import Gguf, Metadata, TensorInfo
from cext.gpus import Gpu, gpus
from cext.layer import Encoded, Layer, Sublayer
from cext.model import CacheUsage, DriveCounts, Hparams, Model, Reading, Session, Tap, WeightNeeds, eval_batch
from cext.placement import Device, Place
from cext.sampler import Sampler

__all__ = [
    "MAX_STEP",
    "SESSION_BLOCK",
    "ArgumentError",
    "BusyError",
    "CacheUsage",
    "ContextFullError",
    "Device",
    "DeviceError",
    "DriveCounts",
    "Encoded",
    "EngineError",
    "FileError",
    "FormatError",
    "Gguf",
    "Gpu",
    "Hparams",
    "Layer",
    "Metadata",
    "MismatchError",
    "Model",
    "NoEngineError",
    "OutOfMemoryError",
    "Place",
    "Reading",
    "Sampler",
    "Session",
    "StoppedError",
    "Sublayer",
    "Tap",
    "TensorInfo",
    "UnsupportedError",
    "WeightNeeds",
    "architectures",
    "cores",
    "eval_batch",
    "formats",
    "gpus",
    "isa",
    "isas",
]
