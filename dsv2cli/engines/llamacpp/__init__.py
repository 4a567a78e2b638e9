"""llama.cpp as an engine, through llama-cpp-python: its logits and its cache; sampling, templates and text are ours."""

from dsv2cli.engines.llamacpp.model import Model, StoppedError, study
from dsv2cli.engines.llamacpp.session import Session

__all__ = ["Model", "Session", "StoppedError", "study"]
