"""llama.cpp as an oracle, through llama-cpp-python: its quantiser, and its logits on the CPU."""

import contextlib
import ctypes
from pathlib import Path
from typing import Any
from unittest import mock

import llama_cpp
import numpy as np
from numpy.typing import ArrayLike, NDArray

# GGUF type name -> llama.cpp's file type whose default tensor type it is
FILE_TYPES = {
    "f32": llama_cpp.LLAMA_FTYPE_ALL_F32,
    "f16": llama_cpp.LLAMA_FTYPE_MOSTLY_F16,
    "bf16": llama_cpp.LLAMA_FTYPE_MOSTLY_BF16,
    "q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
    "q4_1": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_1,
    "q5_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q5_0,
    "q5_1": llama_cpp.LLAMA_FTYPE_MOSTLY_Q5_1,
    "q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    "q2_k": llama_cpp.LLAMA_FTYPE_MOSTLY_Q2_K,
    "q3_k": llama_cpp.LLAMA_FTYPE_MOSTLY_Q3_K_S,
    "q4_k": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_S,
    "q5_k": llama_cpp.LLAMA_FTYPE_MOSTLY_Q5_K_S,
    "q6_k": llama_cpp.LLAMA_FTYPE_MOSTLY_Q6_K,
    "iq4_nl": llama_cpp.LLAMA_FTYPE_MOSTLY_IQ4_NL,
    "iq4_xs": llama_cpp.LLAMA_FTYPE_MOSTLY_IQ4_XS,
}


@llama_cpp.llama_log_callback
def _discard(_level: int, _text: bytes, _data: ctypes.c_void_p) -> None:
    """llama.cpp logs every tensor to stderr."""


def silence() -> None:
    llama_cpp.llama_log_set(_discard, ctypes.c_void_p())


def quantize(source: Path, target: Path, file_type: int, *, pure: bool = False) -> Path:
    """Run llama.cpp's own quantiser; pure gives every matrix the file type's default type where its rows allow."""
    silence()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread, params.pure = file_type, 1, pure
    status = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params))
    if status:
        raise RuntimeError(f"llama.cpp did not quantise {source} to file type {file_type}")
    return target


def _plain_weights() -> Any:
    """A model's parameters, weights as the file has them: where a CPU has AMX, llama.cpp would put f16 experts into a
    layout that it then cannot run, and end the process.
    """
    params = llama_cpp.llama_model_default_params()
    params.use_extra_bufts = False
    return params


def logits(path: Path, ids: ArrayLike, *, kv_type: str = "f32", threads: int = 1) -> NDArray[np.float32]:
    """Logits after each token, (n, n_vocab), in one batch."""
    silence()
    ids = [int(i) for i in np.asarray(ids)]
    cache = {"f32": llama_cpp.GGML_TYPE_F32, "f16": llama_cpp.GGML_TYPE_F16}[kv_type]
    with mock.patch.object(llama_cpp.llama_cpp, "llama_model_default_params", _plain_weights):
        llama = llama_cpp.Llama(
            str(path),
            n_gpu_layers=0,
            n_ctx=len(ids),
            n_batch=len(ids),
            n_threads=threads,
            n_threads_batch=threads,
            logits_all=True,
            type_k=cache,
            type_v=cache,
            verbose=False,
        )
    with contextlib.closing(llama):
        llama.eval(ids)
        scores: NDArray[np.float32] = llama.scores[: len(ids)].copy()
    return scores
