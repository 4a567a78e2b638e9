"""Models and sessions: tokens in, logits out."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from os import PathLike, fspath
from typing import Any, Literal, TypedDict, cast
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cext import _engine, saved
from cext.arguments import whole
from cext.errors import ArgumentError, BusyError, ContextFullError
from cext.gguf import Gguf
from cext.placement import Device, Place

KvType = Literal["f16", "q8_0", "f32"]
MAX_ID = np.iinfo(np.int32).max
MAX_RAM = 2**63 - 1
SETTLED = 64 << 20  # bytes that are moved to huge pages at a time


class Hparams(TypedDict):
    """A model's shape. Widths in values; 0 where a part is absent."""

    arch: str
    name: str
    attention: Literal["latent", "plain"]
    n_layer: int
    n_ctx_train: int
    n_embd: int
    n_vocab: int
    n_head: int
    n_head_kv: int  # heads that keys and values are cached for; 1 where a latent serves all
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    n_ff_dense: int
    n_layer_dense: int
    n_expert: int
    n_expert_used: int
    n_expert_shared: int
    n_ff_expert: int
    n_expert_group: int
    n_expert_group_used: int
    expert_weights_scale: float
    expert_weights_norm: bool
    expert_gating: Literal["softmax", "sigmoid"]
    rms_norm_eps: float
    rope_freq_base: float
    rope_scaling_factor: float  # 1.0 without YaRN
    rope_orig_ctx: int
    rope_beta_fast: float
    rope_beta_slow: float
    attention_scale: float
    attention_temperature_scale: float  # 0.0: queries are scaled alike wherever they stand
    attention_temperature_length: int


class Tap(dict[str, Any]):
    """Names of intermediates to record: ``Tap({"l_out-3": None})``; eval, when it succeeds, replaces the values with
    arrays.

    Names are llama.cpp's: "inp_embd", and per layer il "attn_norm-il", "q_a_norm-il" (n, q_lora_rank), "kv_a_norm-il"
    (n, kv_lora_rank), "attn_heads-il" (n, n_head * v_head_dim: the input of the output projection), "attn_out-il",
    "ffn_inp-il" (the residual stream after attention), "ffn_norm-il" (n, n_embd), "router_logits-il" (n, n_expert),
    "experts-il" (n, n_expert_used) int32, "expert_weights-il" (n, n_expert_used), "expert_hidden-il"
    (n, n_expert_used, n_ff_expert: the input of each chosen expert's down projection), "shared_hidden-il"
    (n, n_expert_shared * n_ff_expert), "dense_hidden-il" (n, n_ff_dense), "l_out-il" (n, n_embd), and "result_norm".
    All are float32 but "experts".
    """


def tap_array(name: str, shape: tuple[int, bool], n: int, hparams: Hparams) -> NDArray[Any]:
    """Room for n rows of an intermediate of that (width, is int32)."""
    width, is_int = shape
    rows = (n, hparams["n_expert_used"], hparams["n_ff_expert"]) if name.startswith("expert_hidden") else (n, width)
    return np.empty(rows, np.int32 if is_int else np.float32)


def shape_of(gguf: Gguf) -> tuple[Hparams, tuple[str, ...]]:
    """Shape and notes (see ``Model``) of the model in a file, without its weights. FormatError, UnsupportedError."""
    hparams, notes = _engine.gguf_shape(gguf._handle)
    return cast(Hparams, hparams), notes


@dataclass(frozen=True)
class CacheUsage:
    """Memory of the caches of a model's sessions, in blocks of SESSION_BLOCK tokens."""

    blocks: int
    shared: int  # of these, held by more than one session
    nbytes: int


@dataclass(frozen=True)
class DriveCounts:
    """What became of the routed experts that steps needed, where not all stay in memory."""

    tokens: int
    needed: int  # experts, once a layer and step
    ready: int  # of these, in memory when they were asked for
    late: int  # of these, being read by then
    told: int  # experts that forecasts named
    right: int  # of these, needed
    needed_told: int  # all that were needed in layers that a forecast was made for
    bytes_read: int
    wait_ns: int  # what steps waited for the drive

    def __sub__(self, earlier: DriveCounts) -> DriveCounts:
        """What came since."""
        return DriveCounts(*(getattr(self, f.name) - getattr(earlier, f.name) for f in fields(self)))


@dataclass(frozen=True)
class HotExperts:
    """Routed experts that come and go on a device: how many it has room for, and what became of them since it was
    watched. chosen, held: choices of decoded tokens, and those of experts that were there; nbytes: of uploads."""

    slots: int
    tokens: int
    chosen: int
    held: int
    uploads: int
    nbytes: int

    @property
    def rate(self) -> float | None:
        """The share of choices that were there; None where there were none."""
        return self.held / self.chosen if self.chosen else None


@dataclass(frozen=True)
class DeviceWork:
    """What a device did since it was watched. record_ns, wait_ns: of the host. memory, memory_most: bytes of its own
    that weights, copies, caches and steps take, now and at most since then. times: of each shader, how often it ran
    and the nanoseconds that it took from the end of what ran before.

    Of prompts' routed experts that lie in the host's memory: copied_bytes, copy_ns: what went to the device, and how
    long something was under way. copied_experts, kept_experts: how many the device and the processor computed, counted
    once a layer and step. slot_bytes: the device's memory held for copies, 0 where nothing is copied. crossing: tokens
    of an expert from which on copying it takes less than computing it where it lies, as measured so far; 0: not yet."""

    dispatches: int
    barriers: int
    recordings: int
    submissions: int
    waits: int
    record_ns: int
    wait_ns: int
    copied_bytes: int
    copy_ns: int
    copied_experts: int
    kept_experts: int
    slot_bytes: int
    crossing: float
    memory: int
    memory_most: int
    times: dict[str, tuple[int, int]]
    hot: HotExperts


@dataclass(frozen=True)
class WeightNeeds:
    """What a model's weights take of memory, in bytes."""

    all: int  # every tensor of the file, as it has them
    shared: int  # within a budget: what every token needs, but for what GPUs have copies of,
    slots: int  # and room for all routed experts
    experts: int  # these alone
    least: int  # the smallest budget
    long_step: int  # what the longest step takes then, beside a shorter one's


class Model:
    """A model ready to run: weights mapped from the GGUF, not copied, unless ``ram`` is less than they take.

    ram: bytes of memory for weights; caches and steps take theirs beside it. Where it does not hold all, what every
    token needs is read into memory, and routed experts into slots as layers ask for them, past the system's cache. The
    logits are the same. uses: (n_layer, n_expert) how often each expert was used so far, to tell which ones to keep.
    ArgumentError where ram does not hold what every token needs and a slot of each size.

    threads: workers in the pool; None takes the fastest number for this machine. isa: a name from ``isas()``; None
    takes DSV2_ISA or the best. Raises FileError, FormatError, UnsupportedError, ArgumentError.

    devices: what to compute on beside the processor, which is device 0 (of ``threads`` and ``isa``); they are devices
    1, 2, ... placement: what goes to them; of two places of the same part, the last counts, and what none names stays
    on the processor. Devices work at the same time where the model allows it: the routed experts of a layer that
    are placed apart. Where their arithmetic is the same, so are the logits.

    A forked process opens its own: evaluating this one there raises ArgumentError. When the file is written to or cut
    short while it is open, evaluating raises FileError.

    notes: sentences to tell the person who runs it: what the file leaves unsaid and what was assumed. together: most
    tokens that are computed together: MAX_STEP, or twice as many where a GPU routes every layer and has room for them.
    max_step: most tokens in one step: as many, or more where experts come from the drive: each is read once a step.
    """

    def __init__(
        self,
        path: str | PathLike[str],
        threads: int | None = None,
        isa: str | None = None,
        *,
        devices: Sequence[Device] = (),
        placement: Sequence[Place] = (),
        ram: int | None = None,
        uses: NDArray[np.uint64] | None = None,
    ) -> None:
        self.path = fspath(path)
        n_threads = 0 if threads is None else whole("threads", threads, low=1)
        self._handle = _engine.model_open(
            path,
            n_threads,
            isa,
            tuple(d.record() for d in devices),
            tuple(p.record() for p in placement),
            0 if ram is None else whole("ram", ram, low=1, high=MAX_RAM),
            None if uses is None else np.ascontiguousarray(uses, np.uint64),
        )
        info = _engine.model_info(self._handle)
        hparams, self.threads, self.isa, self.nbytes, self.notes, self.max_step, self.together = info
        self.hparams = cast(Hparams, hparams)
        # By address. No lock: a forked process could inherit it held; valuerefs lists them in one step.
        self._sessions: WeakValueDictionary[int, Session] = WeakValueDictionary()

    def session(self, n_ctx: int = 4096, kv_type: KvType = "f16") -> Session:
        """A fresh sequence with room for n_ctx tokens of cache. ArgumentError, OutOfMemoryError.

        kv_type: how a token's rows are kept: in each layer a latent (kv_lora_rank + rope values), or a key and a value
        of every head. "f16": two bytes a value, as int16 with a scale a row: as fine as halves, and fit for integer
        products. "q8_0": a byte a value, a latent's rotary key in two, with scales; attention over it runs on integers.
        "f32": exact, for comparisons.
        """
        return self._hold(_engine.session_open(self._handle, whole("n_ctx", n_ctx), kv_type))

    def load_session(
        self, path: str | PathLike[str], n_ctx: int | None = None, kv_type: KvType | None = None
    ) -> Session:
        """A session as ``Session.save`` left it: no token is evaluated again.

        n_ctx: None takes the one it was saved with. kv_type: if given, what it must have been. FormatError for a file
        that is cut short or damaged or holds no session, UnsupportedError for another version's, MismatchError for
        another model's or another cache type's, ContextFullError where n_ctx does not hold it, FileError.
        """
        return saved.load(self, path, None if n_ctx is None else whole("n_ctx", n_ctx), kv_type)

    def identity(self) -> bytes:
        """32 bytes that tell from others what the numbers of its caches depend on: the model, and this engine's form of
        them. ArgumentError where it is closed, FileError where its file has changed."""
        return saved.family(self)

    def cache_usage(self) -> CacheUsage:
        """What the caches of all its sessions take now."""
        return CacheUsage(*_engine.model_cache(self._handle))

    def n_left(self) -> None:
        """None: sessions are not counted, each takes the blocks that it holds."""

    def excess(self, budget: int) -> int:
        """Bytes that the caches take beyond a budget."""
        return max(0, self.cache_usage().nbytes - budget)

    def _hold(self, handle: _engine.Handle) -> Session:
        session = Session(self, handle)
        self._sessions[id(session)] = session
        return session

    def expert_uses(self) -> NDArray[np.uint64]:
        """How many tokens chose each routed expert since the model was opened, (n_layer, n_expert); 0 in dense layers.

        Waits for a step under way.
        """
        uses = np.zeros((self.hparams["n_layer"], self.hparams["n_expert"]), np.uint64)
        _engine.model_expert_uses(self._handle, uses)
        return uses

    def drive_counts(self) -> tuple[DriveCounts, DriveCounts] | None:
        """Since the model was opened: of steps of up to 16 tokens, and of longer ones, which read prompts.

        None where all weights stay in memory, and nothing is counted.
        """
        counts = _engine.model_counts(self._handle)
        return None if counts is None else (DriveCounts(*counts[0]), DriveCounts(*counts[1]))

    def watch(self, device: int, *, times: bool) -> None:
        """Count what a GPU (``devices[device - 1]``) does from now on; with times its shaders too, which makes steps a
        little slower. ArgumentError for a device that counts nothing, UnsupportedError for one without a clock."""
        _engine.model_watch(self._handle, device, times)

    def watched(self, device: int) -> DeviceWork:
        """What it did since ``watch``."""
        work = _engine.model_watched(self._handle, device)
        *_, times, hot = work
        return DeviceWork(*work[:-2], {name: (n, ns) for name, n, ns in times}, HotExperts(*hot))

    def needs(self) -> WeightNeeds:
        """What the weights take, mapped or within a budget."""
        return WeightNeeds(*_engine.model_needs(self._handle))

    def settle(self, stop: Callable[[], bool] = lambda: False) -> int:
        """Have the weights lie in huge pages of memory in place of the file's, which may be small ones: the same bytes
        at the same addresses, for whoever computes meanwhile. Piece by piece, before each of which ``stop`` is asked;
        the bytes that were gone through. The memory is taken beside the system's cache of the file, and not shared with
        others who have it open.

        UnsupportedError where not all are mapped or the system has no way to, OutOfMemoryError, FileError.
        """
        begin, end = 0, -1
        while begin != end and not stop():
            begin, end = _engine.model_settle(self._handle, begin, SETTLED), begin
        return begin

    def stop(self) -> None:
        """Let a step under way raise StoppedError where it waits for the drive; for other threads and handlers."""
        _engine.model_stop(self._handle)

    def step_share(self) -> float:
        """How much of a step under way is computed, 0 to 1, where it is longer than its pieces (``eval_batch``), which
        all go through a layer before the next; else 0. For other threads, which do not wait for it."""
        return _engine.model_step_share(self._handle)

    def step_bytes(self, n_tok: int, piece: int | None = None) -> int:
        """Memory that steps of n_tok tokens (at most max_step) take, beside weights and caches. ValueError.

        piece: see ``eval_batch``.
        """
        return _engine.model_step_bytes(self._handle, whole("n_tok", n_tok), 0 if piece is None else _piece(piece))

    def close(self) -> None:
        """Release the file and the threads, after the steps that are under way; its sessions raise from then on."""
        for reference in self._sessions.valuerefs():
            if (session := reference()) is not None:
                _engine.session_close(session._handle)
        _engine.model_close(self._handle)

    def __enter__(self) -> Model:
        _engine.model_info(self._handle)  # ArgumentError where it is closed
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class _Alone:
    """Holds sessions for one thread, or raises BusyError. Ctrl-C can come when a lock is taken and the with block not
    yet begun, or over and the lock not yet free: it is one that its thread can take again.
    """

    def __init__(self, locks: list[threading.RLock]) -> None:
        self._locks = locks

    def __enter__(self) -> None:
        for n, lock in enumerate(self._locks):
            if not lock.acquire(blocking=False):
                del self._locks[n:]
                self.__exit__()
                raise BusyError("the session is in use by another thread", "give each thread a session of its own")

    def __exit__(self, *exc: object) -> None:
        for lock in self._locks:
            lock.release()


def token_ids(ids: ArrayLike) -> NDArray[np.int32]:
    """Token ids as contiguous int32 (n,); ValueError where they are not integers that fit."""
    try:
        array = np.asarray(ids)
    except ValueError:
        raise ValueError("token ids are rows of several lengths, expected one dimension of integers") from None
    if array.size == 0:
        raise ValueError("no tokens to evaluate")
    if array.dtype.kind not in "iu" or array.ndim != 1:
        what = "no integers, or too large" if array.dtype.kind == "O" else str(array.dtype)
        raise ValueError(f"token ids are {what}, of {array.ndim} dimensions, expected one dimension of integers")
    if array.min() < 0 or array.max() > MAX_ID:
        raise ValueError(f"token ids run from {array.min()} to {array.max()}, expected 0 to n_vocab - 1")
    return np.ascontiguousarray(array, np.int32)


class Session:
    """One sequence: its cache and position. Two threads in one raise BusyError.

    Made by ``Model.session``, ``Model.load_session`` and ``fork``.
    """

    def __init__(self, model: Model, handle: _engine.Handle) -> None:
        self.model = model
        self._handle = handle
        self._lock = threading.RLock()
        self.n_ctx, _, self.kv_bytes, self.kv_type = _engine.session_info(self._handle)

    @property
    def n_past(self) -> int:
        """Tokens in the cache."""
        return _engine.session_info(self._handle)[1]

    @property
    def growth(self) -> int:
        """Most bytes that its cache may still take from the system, which it does block by block."""
        return self.kv_bytes

    @property
    def ids(self) -> NDArray[np.int32]:
        """The tokens in the cache, (n_past,)."""
        with self._alone():
            out = np.empty(self.n_past, np.int32)
            _engine.session_ids(self._handle, out)
        return out

    def _alone(self) -> _Alone:
        return _Alone([self._lock])

    def eval(
        self,
        ids: Sequence[int] | NDArray[np.integer[Any]],
        logits: Literal["last", "all"] = "last",
        *,
        tap: Tap | None = None,
    ) -> NDArray[np.float32]:
        """Append tokens; the logits after the last, (n_vocab,), or after each, (n, n_vocab).

        Runs in chunks of at most the model's max_step tokens (together with a tap) with the GIL released, and answers
        Ctrl-C between chunks (the chunks before it stay evaluated: see n_past). ValueError for an id out of range or no
        ids; ContextFullError past n_ctx.
        """
        array = token_ids(ids)
        hparams = self.model.hparams
        if logits not in ("last", "all"):
            raise ValueError(f"logits is {logits!r}, expected 'last' or 'all'")
        if array.max() >= hparams["n_vocab"]:
            raise ValueError(f"token id {array.max()} is not in the vocabulary of {hparams['n_vocab']}")
        with self._alone():
            room = self.n_ctx - self.n_past
            if len(array) > room:
                raise ContextFullError(
                    f"{len(array)} tokens do not fit: the context holds {self.n_ctx} and {self.n_ctx - room} are used",
                    "open the session with a larger n_ctx, or rewind it",
                )
            out = np.empty((len(array) if logits == "all" else 1, hparams["n_vocab"]), np.float32)
            shapes = {name: _engine.tap_shape(self.model._handle, name) for name in tap or ()}
            arrays = {name: tap_array(name, shape, len(array), hparams) for name, shape in shapes.items()}
            self._eval_chunks(array, logits == "all", out, list(arrays.items()))
            if tap is not None:
                tap.update(arrays)
        return out if logits == "all" else out[0]

    def _eval_chunks(
        self, ids: NDArray[np.int32], every: bool, out: NDArray[np.float32], taps: list[tuple[str, Any]]
    ) -> None:
        step = self.model.together if taps else self.model.max_step
        for start in range(0, len(ids), step):
            chunk = ids[start : start + step]
            last = start + len(chunk) == len(ids)
            n, rows = (len(chunk), out[start : start + len(chunk)]) if every else (1, out) if last else (0, None)
            _engine.eval(self.model._handle, [(self._handle, chunk, n)], 0, rows, taps, start)

    def fork(self, n: int | None = None) -> Session:
        """A session that begins with the first n tokens of this one (None: all), at no cost: they share that past.

        Neither sees what the other appends or forgets later. ArgumentError unless 0 <= n <= n_past.
        """
        with self._alone():
            return self.model._hold(_engine.session_fork(self._handle, self.n_past if n is None else whole("n", n)))

    def save(self, path: str | PathLike[str]) -> None:
        """Write tokens and cache to a file for ``Model.load_session``; an older file stays whole until this one is.

        The file holds the text and is readable by its owner alone. FileError.
        """
        saved.save(self, path)

    @property
    def block_bytes(self) -> int:
        """Of a block: SESSION_BLOCK tokens with their rows in all layers."""
        return _engine.session_block_bytes(self._handle)

    def block(self, i: int) -> bytearray:
        """The bytes of block number i, for ``append_block`` of a session of the same model (see ``Model.identity``) and
        cache type. ArgumentError where it is not held, or not full."""
        with self._alone():
            if not 0 <= whole("i", i) < self.n_past // _engine.SESSION_BLOCK:
                raise ArgumentError(f"block {i} of a session of {self.n_past} tokens")
            content = bytearray(self.block_bytes)
            _engine.session_block_save(self._handle, i, content)
        return content

    def append_block(self, content: bytes | bytearray | memoryview) -> None:
        """Append SESSION_BLOCK tokens and their rows, as ``block`` gave them. They are taken as they are: whoever kept
        them checks that they are whole. ArgumentError unless they follow a whole number of blocks and fit; ValueError
        for another length, FormatError for ids that are none."""
        with self._alone():
            if len(content) != self.block_bytes:
                raise ValueError(f"a block of {len(content)} bytes, expected {self.block_bytes}")
            _engine.session_block_load(self._handle, content, _engine.SESSION_BLOCK)

    def repeat(self, n: int) -> None:
        """Go on to n tokens by repeating those held: for measuring at depth, where filling takes longer than measuring.

        What such a context predicts means nothing. ArgumentError unless 1 <= n_past <= n <= n_ctx.
        """
        with self._alone():
            _engine.session_repeat(self._handle, whole("n", n))

    def rewind(self, n: int) -> None:
        """Forget all but the first n tokens; ArgumentError unless 0 <= n <= n_past."""
        with self._alone():
            _engine.session_rewind(self._handle, whole("n", n))


def _piece(piece: int) -> int:
    return whole("piece", piece, low=1, high=_engine.MAX_STEP)


def eval_batch(
    batch: Sequence[tuple[Session, Sequence[int] | NDArray[np.integer[Any]]]],
    n_logits: Sequence[int] | None = None,
    piece: int | None = None,
) -> NDArray[np.float32]:
    """Append to several sessions of one model in one step of at most its max_step tokens in all.

    Returns the logits after the last n_logits[i] tokens (0 to all) of each sequence, (sum(n_logits), n_vocab), sequence
    by sequence; by default after each one's last token. piece: most tokens computed together, at most MAX_STEP, by
    default the model's ``together``: of more the logits are those of steps of so many one after another, and the
    memory is that of one, but experts that come from the drive are read once for all. Nothing changes on failure.
    ValueError, TypeError, ContextFullError, BusyError.
    """
    inputs, locks, n_rows = _inputs(batch := list(batch), n_logits)
    model = batch[0][0].model
    out = np.empty((n_rows, model.hparams["n_vocab"]), np.float32)
    with _Alone(locks):
        _engine.eval(model._handle, inputs, 0 if piece is None else _piece(piece), out, [], 0)
    return out


def _inputs(
    batch: Sequence[tuple[Session, Sequence[int] | NDArray[np.integer[Any]]]], n_logits: Sequence[int] | None
) -> tuple[list[tuple[_engine.Handle, NDArray[np.int32], int]], list[threading.RLock], int]:
    """(a step as the engine takes it, the sessions' locks, rows of logits). ValueError, TypeError."""
    if not batch:
        raise ValueError("no sequences to evaluate")
    for entry in batch:
        if not (isinstance(entry, tuple | list) and len(entry) == 2 and isinstance(entry[0], Session)):
            raise TypeError(f"a sequence of a batch is a pair of a session and its tokens, got {type(entry).__name__}")
    if n_logits is None:
        n_logits = [1] * len(batch)
    if len(n_logits) != len(batch):
        raise ValueError(f"n_logits holds {len(n_logits)} numbers for {len(batch)} sequences, expected one for each")
    inputs, locks, n_rows = [], [], 0
    for (session, ids), wanted in zip(batch, n_logits, strict=True):
        array, n = token_ids(ids), whole("the number of logits", wanted, low=0)
        if n > array.size:
            raise ValueError(f"the logits of {n} tokens, where {array.size} are evaluated")
        inputs.append((session._handle, array, n))
        locks.append(session._lock)
        n_rows += n
    return inputs, locks, n_rows


class Reading:
    """A step as ``eval_batch``'s, of at most MAX_STEP tokens, that is computed some layers at a time: other steps may
    come between. The numbers are the same.

    Its sessions hold what they held until all layers are computed; meanwhile they may be forked, and whatever changes
    them raises ArgumentError. UnsupportedError where experts come from a drive.
    """

    def __init__(
        self,
        batch: Sequence[tuple[Session, Sequence[int] | NDArray[np.integer[Any]]]],
        n_logits: Sequence[int] | None = None,
    ) -> None:
        inputs, locks, n_rows = _inputs(batch := list(batch), n_logits)
        model, self._locks = batch[0][0].model, locks
        self._out = np.empty((n_rows, model.hparams["n_vocab"]), np.float32)
        with _Alone(locks):
            self._handle, self.left = _engine.reading_begin(model._handle, inputs)  # left: layers

    def run(self, n_layers: int) -> NDArray[np.float32] | None:
        """Compute the next layers, or as many as are left, one at least; with the last the logits, as ``eval_batch``
        gives them. After an exception nothing more can be computed. BusyError, ValueError."""
        with _Alone(self._locks):
            self.left = _engine.reading_run(self._handle, whole("n_layers", n_layers, low=1), self._out)
        return None if self.left else self._out

    def close(self) -> None:
        """Leave the sessions as they are: what was not computed to the end was never begun."""
        _engine.reading_end(self._handle)
