"""Turns a Hugging Face checkpoint of the DeepSeek-V2 family into a calibrated, low-bit GGUF, one layer at a time."""

from quantize.allocate import parse_size
from quantize.errors import CalibrationError, CheckpointError, OutputError, QuantizeError, UnsupportedError
from quantize.job import Options
from quantize.journal import is_finished, work_folder
from quantize.meter import OnProgress, Progress
from quantize.pipeline import quantize
from quantize.recipe import RECIPES
from quantize.report import Report

__all__ = [
    "RECIPES",
    "CalibrationError",
    "CheckpointError",
    "OnProgress",
    "Options",
    "OutputError",
    "Progress",
    "QuantizeError",
    "Report",
    "UnsupportedError",
    "is_finished",
    "parse_size",
    "quantize",
    "work_folder",
]
