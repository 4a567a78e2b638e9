"""Turns a Hugging Face checkpoint of the DeepSeek-V2 family into a calibrated, low-bit GGUF, one layer at a time.

pipeline.py is the run; read it first. Its stages stand beside it: budget.py (allocate.py) chooses types by what
survey.py measured, layers.py writes layer by layer, evaluate.py compares the file with the original; job.py is what
they share. exporter.py runs it for a checkpoint of 4-bit integers. Below them are floors, each of which imports only
those after it: measure, encode, source, write, base.
Terms and the papers' symbols: GLOSSARY.md.
"""

from quantize.allocate import parse_size
from quantize.base.errors import (
    ArgumentError,
    CalibrationError,
    CheckpointError,
    OtherRunError,
    OutputError,
    QuantizeError,
    UnsupportedError,
)
from quantize.encode.grouped import GROUPS
from quantize.exporter import export
from quantize.job import Options
from quantize.meter import OnProgress, Progress
from quantize.pipeline import quantize
from quantize.recipe import RECIPES
from quantize.report import Report
from quantize.write.journal import check_output, is_finished, work_folder

__all__ = [
    "GROUPS",
    "RECIPES",
    "ArgumentError",
    "CalibrationError",
    "CheckpointError",
    "OnProgress",
    "Options",
    "OtherRunError",
    "OutputError",
    "Progress",
    "QuantizeError",
    "Report",
    "UnsupportedError",
    "check_output",
    "export",
    "is_finished",
    "parse_size",
    "quantize",
    "work_folder",
]
