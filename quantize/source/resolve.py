"""resolve.py: from the tensors of a checkpoint's headers to a weight in a form that can be read. Checks all shapes.

What config.json says (scheme.py) and what stands in the files must agree: either alone could be taken for another
model's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from quantize.base.errors import CheckpointError, UnsupportedError
from quantize.source.forms import FORMS, SCALES, Form, Weight
from quantize.source.found import Found
from quantize.source.safetensors import DTYPE_BYTES
from quantize.source.scheme import PACKED_BITS, START_HINT, Kind
from quantize.source.stored import StoredTensor

OTHER_MODEL_HINT = "config.json and the weights are not of the same model"
DTYPES_HINT = "weights must be F32, F16, BF16, F8_E4M3 with scales, or compressed-tensors' packed int4"
SCALES_HINT = (
    "scales must be those that config.json's quantization_config tells of (weight_block_size, config_groups): start"
    " from bf16 otherwise"
)


def weight_of(
    name: str,
    found: Found,
    tensors: Mapping[str, StoredTensor],
    kinds: Sequence[Kind],
    shape: tuple[int, ...] | None = None,
) -> Weight:
    """The weight of a name that was found. shape: that it must have; None: whatever the files say.

    Raises CheckpointError for one that is not what it should be, UnsupportedError for one that is stored otherwise.
    """
    stored = tensors[found.values]
    if not found.is_packed and stored.dtype not in FORMS:
        new = "" if stored.dtype in DTYPE_BYTES else ", a dtype newer than this program"
        raise UnsupportedError(f"tensor `{stored.name}` is {stored.dtype}{new}", DTYPES_HINT)
    values = _part(stored, found)
    if not found.is_packed:
        _check_shape(stored, values.shape, shape)
    form = FORMS["int4" if found.is_packed else stored.dtype]
    if not form.is_scaled:
        if found.scale is not None:
            raise UnsupportedError(f"tensor `{stored.name}` is {stored.dtype}, and has scales (`{found.scale}`)")
        return Weight(name, values.shape, form, values)
    if len(values.shape) != 2:
        raise CheckpointError(f"tensor `{stored.name}` is {stored.dtype} {stored.shape}, expected a matrix")
    if found.scale is None:
        raise UnsupportedError(
            f"tensor `{stored.name}` is {'packed' if found.is_packed else 'fp8'} and has no scales that are"
            f" read (`{found.values.removesuffix('_packed')}_scale` or `_scale_inv`)",
            START_HINT,
        )
    scale = tensors[found.scale]
    if scale.dtype not in SCALES:
        raise UnsupportedError(f"tensor `{scale.name}` is {scale.dtype}, scales are read in {', '.join(SCALES)}")
    return _scaled(name, found, values, tensors, kinds, shape)


def _check_shape(stored: StoredTensor, is_: tuple[int, ...], expected: tuple[int, ...] | None) -> None:
    if expected is not None and is_ != expected:
        what = f"{stored.shape}" if is_ == stored.shape else f"{stored.shape}, {is_} a part"
        raise CheckpointError(f"tensor `{stored.name}` is {what}, config.json makes it {expected}", OTHER_MODEL_HINT)


def _part(stored: StoredTensor, found: Found) -> StoredTensor:
    """An expert of a stack, and of gate and up the one; or the whole."""
    if found.expert is None:
        return stored
    halves = 1 if found.half is None else 2
    if len(stored.shape) != 3 or stored.shape[0] <= found.expert or stored.shape[1] % halves:
        raise CheckpointError(
            f"tensor `{stored.name}` is {stored.shape}, expected a stack of {found.expert + 1} or more experts"
            + (", each its gate's rows and its up's" if found.half is not None else ""),
            OTHER_MODEL_HINT,
        )
    one, rows = stored.item(found.expert), stored.shape[1] // halves
    first = rows * (found.half or 0)
    return one.rows(first, first + rows) if rows else one


def _scaled(
    name: str,
    found: Found,
    values: StoredTensor,
    tensors: Mapping[str, StoredTensor],
    kinds: Sequence[Kind],
    shape: tuple[int, ...] | None,
) -> Weight:
    """The first of the kinds that the tensors are of; what the last lacked is told."""
    mine = [kind for kind in kinds if (kind.form in PACKED_BITS.values()) == found.is_packed]
    if not mine:
        raise UnsupportedError(
            f"tensor `{found.values}` is {values.dtype}, and config.json's quantization_config says nothing of such"
            " weights",
            SCALES_HINT,
        )
    error: CheckpointError | None = None
    for kind in mine:
        try:
            return _of_kind(name, found, values, tensors, kind, shape)
        except CheckpointError as other:
            error = error or other
    assert error is not None
    raise error


def _of_kind(
    name: str,
    found: Found,
    values: StoredTensor,
    tensors: Mapping[str, StoredTensor],
    kind: Kind,
    shape: tuple[int, ...] | None,
) -> Weight:
    form = FORMS[kind.form]
    assert found.scale is not None
    scale = tensors[found.scale]
    n = _row_length(values, scale, kind, form, shape)
    expected = (values.shape[0], n) if shape is None else shape
    if values.shape[0] != expected[0] or (found.is_packed and values.dtype != "I32"):
        raise CheckpointError(
            f"tensor `{values.name}` is {values.dtype} {values.shape}, config.json makes the weight {expected}",
            OTHER_MODEL_HINT,
        )
    if form.width(n) != values.shape[1]:
        raise CheckpointError(
            f"tensor `{values.name}` is {values.shape}, a row of {n} values takes {form.width(n)} words of {form.name}",
            OTHER_MODEL_HINT,
        )
    if found.is_packed and found.told_shape is None:
        raise CheckpointError(f"tensor `{values.name}` is packed and its shape is missing (`{name}_shape`)")
    own, block, offset = _scales(scale, found, kind, expected)
    zero = _zero(found, tensors, kind, form, expected, block)
    return Weight(name, expected, form, values, own, zero, block, offset)


def _row_length(
    values: StoredTensor, scale: StoredTensor, kind: Kind, form: Form, shape: tuple[int, ...] | None
) -> int:
    """Values of a row: what the model says, else what the files do."""
    if shape is not None:
        if len(shape) != 2:
            raise CheckpointError(f"tensor `{values.name}` is {values.dtype}, config.json makes it {shape}")
        return shape[1]
    if form.width(values.shape[1]) == values.shape[1]:
        return values.shape[1]
    per_word = 64 // form.width(64)
    return scale.shape[-1] * kind.block[1] if kind.share == "group" and scale.shape else values.shape[1] * per_word


def _scales(
    stored: StoredTensor, found: Found, kind: Kind, shape: tuple[int, ...]
) -> tuple[StoredTensor, tuple[int, int], int]:
    """A weight's own scales, the rows and columns that share one, and how many rows of the first come before it."""
    rows, n = shape
    if kind.share == "group" and n % kind.block[1]:
        raise CheckpointError(f"tensor `{stored.name}`: groups of {kind.block[1]} do not divide a row of {n} values")
    scale = stored
    if found.expert is not None:
        if not stored.shape or stored.shape[0] <= found.expert:
            raise _no_grid(stored, kind, shape)
        scale = stored.item(found.expert)
    if found.half is not None:
        high = _grid(kind, shape)[0]
        if scale.shape[:1] == (2 * high,):  # each has its own
            scale = scale.rows(found.half * high, (found.half + 1) * high)
        elif (block := _shared(kind, (2 * rows, n), scale.shape)) is not None:
            return scale, block, found.half * rows
    block = _shared(kind, shape, scale.shape)
    if block is None:
        raise _no_grid(stored, kind, shape)
    return scale, block, 0


def _grid(kind: Kind, shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of blocks."""
    rows, n = shape
    match kind.share:
        case "tensor":
            return 1, 1
        case "channel":
            return rows, 1
    return -(-rows // kind.block[0]), -(-n // kind.block[1])


def _shared(kind: Kind, shape: tuple[int, ...], scales: tuple[int, ...]) -> tuple[int, int] | None:
    """Rows and columns that share a scale; None where scales of that shape are none of this kind."""
    grid = _grid(kind, shape)
    if kind.share in ("tensor", "block") and math.prod(scales) == 1:
        return (max(1, shape[0]), max(1, shape[1]))  # fp8 without blocks has one for all, whatever config.json says
    if scales != grid and not (kind.share == "channel" and scales == grid[:1]):
        return None
    return (1, max(1, shape[1])) if kind.share == "channel" else kind.block


def _no_grid(scale: StoredTensor, kind: Kind, shape: tuple[int, ...]) -> CheckpointError:
    blocks = {
        "tensor": "one for all takes",
        "channel": "one a row takes",
        "block": f"{kind.block[0]}x{kind.block[1]} blocks take",
        "group": f"groups of {kind.block[1]} take",
    }[kind.share]
    return CheckpointError(
        f"tensor `{scale.name}` is {scale.dtype} {scale.shape}, {blocks} {_grid(kind, shape)} of a weight of {shape}",
        SCALES_HINT,
    )


def _zero(
    found: Found,
    tensors: Mapping[str, StoredTensor],
    kind: Kind,
    form: Form,
    shape: tuple[int, ...],
    block: tuple[int, int],
) -> StoredTensor | None:
    if not kind.has_zero:
        if found.zero is not None:
            raise UnsupportedError(f"tensor `{found.zero}`: config.json says that such weights have no zero points")
        return None
    if found.zero is None:
        raise CheckpointError(f"tensor `{found.values}` has no zero points (`..._zero_point`), config.json says it has")
    zero, expected = tensors[found.zero], (form.width(shape[0]), -(-shape[1] // block[1]))
    if zero.dtype != "I32" or zero.shape != expected:
        raise CheckpointError(
            f"tensor `{zero.name}` is {zero.dtype} {zero.shape}, expected I32 {expected}: packed as the weights are"
        )
    return zero
