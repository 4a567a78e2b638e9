"""What of a model a GPU computes: the device that is wished for, and its memory filled in the order of bytes that each
token reads: attention and its cache, what every token needs of the feed-forward, the head, then routed experts, layer
by layer. The rest stays on the processor, which computes beside it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dsv2cli import console

if TYPE_CHECKING:
    from cext import Device, Gguf, Gpu, Place
    from cext.model import Hparams
    from cext.placement import Part

LEFT_SHARE, LEAST_LEFT = 16, 256 << 20  # of a device's free memory: for the display, and what other programs take
LARGEST = 1 << 30  # bytes of a matrix: the engine's allocations
STEP = 1024  # tokens of the longest step
WIDEST_ROW, MOST_EXPERTS = 4608, 1024  # the shaders'


@dataclass(frozen=True)
class Wish:
    """Which GPU: "off", "auto" (the best that is no software), a number or letters of a name; and the bytes of its
    memory that may be taken, None for what is free."""

    which: str = "off"
    memory: int | None = None


@dataclass(frozen=True)
class Layout:
    """A device and what lies on it. sentence: the same in words."""

    device: Device
    placement: tuple[Place, ...]
    sentence: str


@dataclass(frozen=True)
class Sizes:
    """Bytes of a model's parts. attention, shared, experts: a layer each; shared: the feed-forward but for routed
    experts; expert: the largest of a layer's, by layer; head: final norm and output."""

    attention: list[int]
    shared: list[int]
    experts: list[int]
    head: int


def find(wish: Wish) -> Gpu:
    """The device that is wished for. DeviceError."""
    from cext import DeviceError, gpus

    devices = gpus()
    if wish.which == "auto":
        order = {"discrete": 0, "integrated": 1, "virtual": 2}
        able = [gpu for gpu in devices if not gpu.missing and gpu.kind in order]
        if able:
            return min(able, key=lambda gpu: order[gpu.kind])
        raise DeviceError("there is no GPU here that can be used", _listed(devices))
    named = [
        gpu
        for gpu in devices
        if (wish.which == str(gpu.number) if wish.which.isdecimal() else wish.which.lower() in gpu.name.lower())
    ]
    if not named:
        raise DeviceError(f"no GPU here is called `{wish.which}`", _listed(devices))
    if named[0].missing:
        raise DeviceError(f"{named[0].name}: {named[0].missing}")
    return named[0]


def _listed(devices: Iterable[Gpu]) -> str:
    listed = ", ".join(f"{gpu.number}: {gpu.name}{f' ({gpu.missing})' if gpu.missing else ''}" for gpu in devices)
    return f"there are: {listed}" if listed else "Vulkan knows none"


def sizes_of(gguf: Gguf, shape: Hparams) -> Sizes:
    """From a file's header."""
    layers = shape["n_layer"]
    found = Sizes([0] * layers, [0] * layers, [0] * layers, 0)
    keys = shape["n_head"] * shape["kv_lora_rank"] * shape["qk_nope_head_dim"]
    named = {tensor.name for tensor in gguf.tensors}
    head = tied = 0
    for tensor in gguf.tensors:
        if tensor.name in ("output.weight", "output_norm.weight"):
            head += tensor.nbytes
        if tensor.name == "token_embd.weight":
            tied = tensor.nbytes
        match = re.fullmatch(r"blk\.(\d+)\.(\w+?)(?:\.\w+)?", tensor.name)
        if match is None or int(match[1]) >= layers:
            continue
        part = found.attention if match[2].startswith("attn") else found.shared
        if match[2].endswith("_exps"):
            part = found.experts
        part[int(match[1])] += tensor.nbytes
        if match[2] == "attn_kv_b" and f"blk.{match[1]}.attn_k_b.weight" not in named:
            # Its keys' part is held transposed beside it.
            part[int(match[1])] += keys * (4 if tensor.type_name in ("f32", "bf16") else 2)
    return Sizes(found.attention, found.shared, found.experts, head if "output.weight" in named else head + tied)


def step_bytes(shape: Hparams, n_tok: int = STEP) -> int:
    """About what a device takes for steps of n_tok tokens, beside weights and caches."""
    d, heads, used = shape["n_embd"], shape["n_head"], shape["n_expert_used"]
    row = shape["kv_lora_rank"] + shape["qk_rope_head_dim"]
    query = shape["qk_nope_head_dim"] + shape["qk_rope_head_dim"]
    wide = max(shape["n_ff_dense"], shape["n_expert_shared"] * shape["n_ff_expert"])
    each = 4 * d + row + shape["q_lora_rank"] + heads * (query + shape["v_head_dim"])
    each += shape["n_expert"] + used * (4 + shape["n_ff_expert"] + d) + wide
    return 4 * (n_tok * each + min(n_tok, 128) * heads * 5 * (row + 64))


def lay_out(
    gguf: Gguf, shape: Hparams, gpu: Gpu, wish: Wish, *, cache_bytes: int, with_experts: bool = True
) -> Layout | None:
    """Fill a device; None where it holds nothing of use. cache_bytes: what the contexts take, full."""
    from cext import Device, Place

    sizes = sizes_of(gguf, shape)
    most = gpu.free - max(gpu.free // LEFT_SHARE, min(LEAST_LEFT, gpu.free // 4))
    left = (min(most, wish.memory) if wish.memory is not None else most) - step_bytes(shape)
    n, dense = shape["n_layer"], shape["n_layer_dense"]
    latent = shape["attention"] == "latent" and shape["kv_lora_rank"] + shape["qk_rope_head_dim"] + 128 <= WIDEST_ROW
    if shape["n_expert"] > MOST_EXPERTS or left <= 0:
        return None
    taken = 0

    def fill(parts: list[int]) -> int:
        """How many of the first layers fit: their bytes are taken, and where one does not, what comes later is left."""
        nonlocal left, taken
        for i, nbytes in enumerate(parts):
            if nbytes > left:
                left = 0
                return i
            left -= nbytes
            taken += nbytes
        return len(parts)

    attention = fill([nbytes + cache_bytes // n for nbytes in sizes.attention]) if latent else 0
    shared = fill(sizes.shared)
    head = sizes.head <= LARGEST and bool(fill([sizes.head]))
    expert = fill(sizes.experts[dense:shared]) if with_experts else 0
    places: list[Place] = []

    def place(part: Part, device: int, layers: range) -> None:
        experts = range(shape["n_expert"]) if part == "experts" else range(0)
        if layers:
            places.append(Place(part, device, layers, experts))

    place("attention", 1, range(attention))
    place("feed_forward", 1, range(shared))
    place("experts", 0, range(dense + expert, shared))
    if head:
        places.append(Place("ends", 1))
    if not places:
        return None
    routed = max(0, n - dense)
    device = Device("vulkan", name=str(gpu.number), memory=None)
    return Layout(device, tuple(places), _sentence(gpu, n, attention, shared, routed, expert, taken, head=head))


def offers(path: Path, kv_bytes: float, n_ctx: int) -> list[tuple[str, str]]:
    """What each GPU here would hold of a model: (its --gpu, in words). kv_bytes: of the cache, a token. Software is no
    offer. EngineError where the file is not one."""
    from cext import DeviceError, Gguf, gpus
    from cext.model import shape_of

    try:
        able = [gpu for gpu in gpus() if not gpu.missing and not gpu.software]
    except DeviceError:
        return []
    if not able:
        return []
    with Gguf(path) as gguf:
        shape, _ = shape_of(gguf)
        layouts = [lay_out(gguf, shape, one, Wish(), cache_bytes=int(kv_bytes * n_ctx)) for one in able]
    return [
        (f"--gpu {one.number}", layout.sentence if layout else f"nothing fits on {one.name}")
        for one, layout in zip(able, layouts, strict=True)
    ]


def _sentence(
    gpu: Gpu, n: int, attention: int, shared: int, routed: int, expert: int, taken: int, *, head: bool
) -> str:
    def of(what: str, some: int, all_: int) -> list[str]:
        return [] if not some else [what if some == all_ else f"{what} of {some} of {all_} layers"]

    held = [
        *of("attention", attention, n),
        *of("dense and shared feed-forward", shared, n),
        *(["head"] if head else []),
    ]
    held += of("routed experts", expert, routed)
    rest = "" if len(held) == 4 and attention == shared == n and expert == routed else "; the rest on the processor"
    return f"on {gpu.name}: {', '.join(held)}, {console.format_bytes(taken)}{rest}"
