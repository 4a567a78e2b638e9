"""identity.py: what the bytes of a run's file depend on, by name, and which of its work still holds when some of it
changes.

Nothing else is in it: a comment edited, a checkpoint moved, another number of threads give the same bytes. The code's
part is a number, NUMERICS, which whoever changes what is computed raises: tests/quantiser/test_numerics.py tells when.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType as Type
from numpy.typing import NDArray

import cext
from quantize.base.blas import kernel
from quantize.encode.encoder import ggml_version
from quantize.job import Plan

NUMERICS = 1  # of quantize/ and the engine's encoders, kernels and layers
RECORDS = 2  # the version of what stands in the journal

SURVEY = "survey"  # the stage, by its folder in the journal
SURVEYED_TYPES = "the types surveyed"


@dataclass(frozen=True)
class RunIdentity:
    """Of one run. shared: what all stages depend on; surveyed: what the survey does beside; file: what the file does.

    types: the names of those that the survey measures. A survey of more types holds too.
    """

    shared: Mapping[str, Any]
    surveyed: Mapping[str, Any]
    file: Mapping[str, Any]
    types: tuple[str, ...] = ()

    def record(self) -> dict[str, Any]:
        """name -> JSON value."""
        return {**self.shared, **self.surveyed, **self.file, SURVEYED_TYPES: sorted(self.types)}

    def kept(self, before: Mapping[str, Any]) -> Sequence[str]:
        """The survey, where no more than the budget changed or what the written layers alone depend on."""
        now = {**self.shared, **self.surveyed}
        same = all(before.get(name) == value for name, value in json.loads(json.dumps(now)).items())
        return (SURVEY,) if same and self.types and {*self.types} <= {*before.get(SURVEYED_TYPES, ())} else ()

    def adopted(self, before: Mapping[str, Any]) -> RunIdentity:
        """With the types of the survey that is gone on from."""
        return replace(self, types=tuple(before[SURVEYED_TYPES]))


def identity(plan: Plan, types: Sequence[Type]) -> RunIdentity:
    """Of a run of this plan. types: that a survey would measure."""
    options, text = plan.options, plan.corpus
    names = {source for tensor in plan.tensors for source in tensor.sources}
    shared = {
        "the work folder's version": RECORDS,
        **numerics(),
        "the model's shape": _digest(asdict(plan.arch)),
        "the tensors": _digest(plan.store.record(names)),
    }
    surveyed = {
        "the surveyed tokens": _ids(plan.survey_windows) if plan.allocates else "",
        "--feedback": options.feedback,
        "following outputs": plan.follows_outputs,
    }
    file = {
        "the model's name": plan.source.name,
        "the keys of the file": _digest([plan.keys, plan.tokenizer, plan.provenance]),
        "--type": plan.recipe.name,
        "--plain-mix": options.plain_mix,
        "--size": options.size,
        "--bpw": options.bpw,
        "importance": options.importance,
        "--awq": options.awq,
        "--sequential": plan.sequential,
        "--evaluate": options.evaluate,
        "the calibration text": [list(text.sources), text.sha256] if text else "",
        "the calibration tokens": _ids(text.windows) if text and plan.calibrated else "",
        "the tokens held back": _ids(text.held) if text and plan.evaluated else "",
    }
    return RunIdentity(shared, surveyed, file, tuple(type_.name for type_ in types))


@cache
def numerics() -> dict[str, str]:
    """What arithmetic depends on beside its inputs, by name."""
    config: Any = np.show_config(mode="dicts")
    blas = config["Build Dependencies"]["blas"]
    return {
        "the numerics version": str(NUMERICS),
        "the instruction set": f"{platform.machine()} {cext.isa()}",
        "numpy": np.__version__,
        "numpy's instruction sets": " ".join(config["SIMD Extensions"].get("found", [])),
        "the BLAS": f"{blas.get('name')} {blas.get('version')} {kernel()}".rstrip(),
        "ggml's encoders": ggml_version(),
        "the C library": " ".join(platform.libc_ver()),
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=_plain).encode()).hexdigest()


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else str(value)


def _ids(windows: NDArray[np.int32]) -> str:
    return f"{windows.size} {hashlib.sha256(windows.astype('<i4').tobytes()).hexdigest()}"
