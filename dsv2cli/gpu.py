"""What of a model a GPU computes: the device that is wished for, and its memory filled in the order of bytes that each
token reads: attention and its cache, what every token needs of the feed-forward, the head, then routed experts, layer
by layer. The rest stays on the processor, which computes beside it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dsv2cli import console

if TYPE_CHECKING:
    from cext import Device, Gguf, Gpu, Place
    from cext.model import Hparams
    from cext.placement import Copies, Part

LEFT_SHARE, LEAST_LEFT = 16, 256 << 20  # of a device's free memory: for the display, and what other programs take
LARGEST = 1 << 30  # bytes of a matrix: the engine's allocations
STEP, LONG_STEP = 1024, 2048  # tokens of the longest step, and where it has room for more
LONG_SHARE = 16  # of a device's memory one part in so many at most is for steps to be long rather than for experts
WIDEST_ROW, MOST_EXPERTS = 4608, 1024  # the shaders'
# The engine's, of cext/backend/vulkan: what a piece of a buffer is rounded up to; what copies of caches grow by; what
# goes through to memory that the host does not reach; tables, blocks' addresses and rounding of allocations.
ALIGN, CACHE_CHUNK, STAGING, SUNDRY = 256, 64 << 20, 32 << 20, 4 << 20
HALVES, HALVES_SHARE = 256 << 20, 32  # of weights in halves: bytes, or of its memory one part in so many
PARTS = 8192  # rows that positions of few tokens are shared out among at most
SLOT_ROUNDING, HOT_STAGED = 3 * 8192, 4  # of an expert that comes and goes; of these, how many are on their way at most
TAKEN = "discrete"  # the kind of device that is taken where none is named: no other has been measured to pay


@dataclass(frozen=True)
class Wish:
    """Which GPU: "off", "auto" (a card with memory of its own, where one is there), a number or letters of a name; and
    the bytes of its memory that may be taken, None for what is free. is_asked: somebody typed that, and is told where
    there is none. steady: what is computed there follows from its memory alone, so that the same steps give the same
    bits at any time."""

    which: str = "off"
    memory: int | None = None
    is_asked: bool = True
    steady: bool = False

    @property
    def is_named(self) -> bool:
        """Whether it is one device, or else an error."""
        return self.which not in ("off", "auto")


@dataclass(frozen=True)
class Layout:
    """A device and what lies on it. sentence: the same in words; weights: their bytes; experts: some routed ones are
    among them."""

    device: Device
    placement: tuple[Place, ...]
    sentence: str
    weights: int = 0
    experts: bool = False


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
    from cext import DeviceError, gpus, system

    if wish.which == "auto" and not wish.is_asked and not system.has_graphics():
        raise DeviceError("there is no GPU here")  # before a loader and drivers are loaded for nothing
    devices = gpus()
    if wish.which == "auto":
        able = [gpu for gpu in devices if not gpu.missing and gpu.kind == TAKEN]
        if able:
            return max(able, key=lambda gpu: gpu.free)
        raise DeviceError("there is no card with memory of its own here that can be used", _listed(devices))
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
    from dsv2cli.anatomy import BLOCK

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
        block = BLOCK.match(tensor.name)
        if block is None or (il := int(block[1])) >= layers:
            continue
        name = tensor.name[block.end() :].partition(".")[0]
        part = found.attention if name.startswith("attn") else found.shared
        if name.endswith("_exps"):
            part = found.experts
        part[il] += tensor.nbytes
        if name == "attn_kv_b" and f"{block[0]}attn_k_b.weight" not in named:
            # Its keys' part is held transposed beside it.
            part[il] += keys * (4 if tensor.type_name in ("f32", "bf16") else 2)
    return Sizes(found.attention, found.shared, found.experts, head if "output.weight" in named else head + tied)


def step_bytes(shape: Hparams, n_tok: int = STEP, *, shares: bool = False, memory: int = 0) -> int:
    """What a device takes for steps of n_tok tokens at most, beside weights and caches (cext/backend/vulkan/room.c).
    shares: its memory is the host's, and what lies there for the host counts; memory: what one with matrix units
    has, or may take."""
    d, heads, used, experts = shape["n_embd"], shape["n_head"], shape["n_expert_used"], shape["n_expert"]
    rank, rope = shape["kv_lora_rank"], shape["qk_rope_head_dim"]
    row = -(-rank // 64) * 64 + -(-rope // 64) * 64
    query, slots = shape["qk_nope_head_dim"] + rope, n_tok * used
    together = heads * min(n_tok, max(128, 8192 // heads))
    wide = max(shape["n_ff_dense"], shape["n_expert_shared"] * shape["n_ff_expert"])
    attention = n_tok * (rank + rope + shape["q_lora_rank"] + heads * (query + shape["v_head_dim"]))
    attention += 2 * together * (rank + row) + max(0, PARTS - together) * row + 2 * max(together, PARTS)
    feed = n_tok * (experts + wide + d) + slots * (4 + shape["n_ff_expert"] + d) + 12 * max(slots, experts)
    host = n_tok * (2 * d + 2 * rope + 10) + 12 * experts + slots * (d + 2)
    if shares:
        host += (shape["n_layer"] + 1) * n_tok * (row + 4) + shape["n_layer"] * slots + n_tok * 2 * d + slots * d
        host += min(n_tok, 64) * shape["n_vocab"]
    others = 4 * (3 * n_tok * d + attention + feed + host) + SUNDRY + (STAGING if shares else 0)
    return others + (_halves_bytes(shape, n_tok, 4 * together * 2 * (rank + row), memory) if memory else 0)


def _halves_bytes(shape: Hparams, n_tok: int, attend: int, memory: int) -> int:
    """Of that, what matrix units read in halves at most: a product's rows and twice its weights, or as much as a share
    of the memory. attend: bytes between attention's queries and its heads' values."""
    d, heads, wide = shape["n_embd"], shape["n_head"], shape["n_expert_shared"] * shape["n_ff_expert"]
    head, rank = shape["qk_nope_head_dim"] + shape["qk_rope_head_dim"], shape["kv_lora_rank"]
    wide = max(wide, shape["n_ff_dense"])
    values = [2 * shape["n_expert"] * shape["n_ff_expert"], shape["n_vocab"], 2 * wide, heads * head]
    expanded = attend * rank // max(1, head + shape["v_head_dim"])
    rows = max(2 * n_tok * shape["n_expert_used"] * d, 2 * n_tok * wide, expanded)
    return min(4 * max(values) * d, max(HALVES, memory // HALVES_SHARE), LARGEST) + rows * 9 // 8


class _Room:
    """What is left of a device's memory, in bytes; where something does not fit, what comes later is left out too."""

    def __init__(self, left: int) -> None:
        self.left, self.taken = left, 0

    def fill(self, parts: list[int]) -> int:
        """How many of the first parts fit."""
        for i, nbytes in enumerate(parts):
            if nbytes > self.left:
                self.left = 0
                return i
            self.left -= nbytes
            self.taken += nbytes
        return len(parts)


def attends(shape: Hparams) -> bool:
    """Whether a GPU computes the attention of such a model."""
    return shape["attention"] == "latent" and shape["kv_lora_rank"] + shape["qk_rope_head_dim"] + 128 <= WIDEST_ROW


def lay_out(
    gguf: Gguf,
    shape: Hparams,
    gpu: Gpu,
    wish: Wish,
    *,
    cache_bytes: int,
    share: float = 1.0,
    with_experts: bool = True,
    steady: bool = False,
) -> Layout | None:
    """Fill a device; None where it holds nothing of use. cache_bytes: what the contexts take, full; share: of the
    device, or of what may be taken of it, this model's part. steady: routed experts that do not all fit are those of
    the first layers, and stay; else those that are used most come and go."""
    from cext import Device, Place

    sizes = sizes_of(gguf, shape)
    most = gpu.free - max(gpu.free // LEFT_SHARE, min(LEAST_LEFT, gpu.free // 4))
    shares = gpu.kind != TAKEN
    n, dense = shape["n_layer"], shape["n_layer_dense"]
    given = None if wish.memory is None else int(wish.memory * share)
    most = min(most, int(gpu.memory * share) if given is None else given)
    halves = (given or gpu.memory) if gpu.coop else 0
    steps, long_steps = (step_bytes(shape, n_tok, shares=shares, memory=halves) for n_tok in (STEP, LONG_STEP))
    room = _Room(most - steps)
    if shape["n_expert"] > MOST_EXPERTS or room.left <= CACHE_CHUNK:
        return None
    pays = _pays_for_long_steps(sizes, room.left - cache_bytes, long_steps - steps)
    longer = with_experts and attends(shape) and pays
    if longer:
        room.left -= long_steps - steps
    cached = -(-cache_bytes // n)
    rounded = 16 * ALIGN + 3 * shape["n_expert"] * (ALIGN + 8)  # of a layer's matrices, and its table of experts
    attention = 0
    if attends(shape):
        room.left -= CACHE_CHUNK
        attention = room.fill([nbytes + cached + rounded for nbytes in sizes.attention])
    shared = room.fill(sizes.shared)
    head = sizes.head <= LARGEST and bool(room.fill([sizes.head]))
    hot = copies = 0
    if with_experts and shared == n and sum(sizes.experts[dense:]) > room.left:
        copies = 0 if shares or wish.steady else room_for_copies(sizes.experts[dense:], shape["n_expert"], room.left)
        room.left -= copies
        if not (steady or wish.steady):
            hot = room_for_hot(sizes.experts[dense:], shape["n_expert"], room.left, shares=shares)
    room.taken += hot
    expert = room.fill(sizes.experts[dense:shared]) if with_experts and not hot else 0
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
    copying: Copies = "auto" if copies else "never"
    device = Device(
        "vulkan", name=str(gpu.number), memory=given, copies=copying, hot=hot or None, short_steps=not longer
    )
    weights = room.taken - attention * (cached + rounded)
    hot_share = hot / sum(sizes.experts[dense:]) if hot else 0.0
    sentence = _sentence(gpu, n, attention, shared, routed, expert, room.taken, head=head, hot=hot_share)
    return Layout(device, tuple(places), sentence, weights, bool(expert or hot))


def _pays_for_long_steps(sizes: Sizes, left: int, extra: int) -> bool:
    """Whether of so many bytes, beside caches and short steps, these are better spent on long steps: few of them, and
    not those that make the difference between all of a model and a part."""
    everything = sum(sizes.attention) + sum(sizes.shared) + sum(sizes.experts) + sizes.head + CACHE_CHUNK
    return extra * LONG_SHARE <= left and not left - extra < everything <= left


def room_for_copies(experts: list[int], n_expert: int, left: int) -> int:
    """Bytes for those routed experts of two layers that prompts have copied (cext/backend/vulkan/ahead.c), of so many
    that are left; 0 where they do not fit. experts: bytes of them all, by layer."""
    each = max(experts) // n_expert + 3 * ALIGN
    together = min(n_expert, max(1, LARGEST // each))
    room = 2 * each * together * -(-n_expert // together)
    return room if room <= left else 0


def room_for_hot(experts: list[int], n_expert: int, left: int, *, shares: bool) -> int:
    """Bytes for routed experts that come and go, of so many that are left; 0 where few would fit.

    experts: bytes of them all, by layer."""
    each = {nbytes // n_expert + SLOT_ROUNDING for nbytes in experts}
    room = left - (HOT_STAGED * max(each) if shares else 0)
    return room if room >= 2 * sum(each) else 0


def offers(path: Path, kv_bytes: float, n_ctx: int) -> list[tuple[str, str]]:
    """What each GPU here would hold of a model: (its --gpu, in words). kv_bytes: of the cache, a token. Software is no
    offer. EngineError where the file is not one."""
    from cext import DeviceError, Gguf, gpus, system
    from cext.model import shape_of

    if not system.has_graphics():
        return []
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
        (f"--gpu {one.number}", (layout.sentence if layout else f"nothing fits on {one.name}") + unless_named(one))
        for one, layout in zip(able, layouts, strict=True)
    ]


def unless_named(gpu: Gpu) -> str:
    """What to say of a device that is not taken where none is named."""
    return "" if gpu.kind == TAKEN else f" ({gpu.kind}: used where --gpu {gpu.number} names it alone)"


def _sentence(
    gpu: Gpu, n: int, attention: int, shared: int, routed: int, expert: int, taken: int, *, head: bool, hot: float
) -> str:
    def of(what: str, some: int, all_: int) -> list[str]:
        return [] if not some else [what if some == all_ else f"{what} of {some} of {all_} layers"]

    held = [
        *of("attention", attention, n),
        *of("dense and shared feed-forward", shared, n),
        *(["head"] if head else []),
    ]
    held += of("routed experts", expert, routed)
    held += [f"{100 * hot:.0f} % of the routed experts, those used most of late"] if hot else []
    is_all = len(held) == 4 and not hot and attention == shared == n and expert == routed
    rest = "" if is_all else "; the rest on the processor"
    return f"on {gpu.name}: {', '.join(held)}, {console.format_bytes(taken)}{rest}"
