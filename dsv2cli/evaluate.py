"""How well a model predicts a text, and how far it is from a reference: perplexity, KL divergence, agreement.

Method: the text is cut into windows of n_ctx tokens, each beginning with BOS where the vocabulary asks for one; the
rest of the text that fills no window is left out. The first ``skip`` positions of a window predict from little context
and are not scored. quantize.measure.score does the arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cext import MAX_STEP, Session, Tap, eval_batch
from dsv2cli import memory
from dsv2cli.errors import CliError, UsageError
from dsv2cli.residency import Beside, shared_out
from dsv2cli.runtime import Runtime
from quantize.measure import score
from quantize.measure.score import SKIPPED_SHARE, Distance, Score

if TYPE_CHECKING:
    from cext.model import KvType
    from dsv2cli.engines import protocol

F32 = NDArray[np.float32]
WIDTHS = ("q8_0", "f16", "f32")  # caches, the smallest first
PIECE = MAX_STEP  # positions whose logits are held at once: 420 MB for a vocabulary of 102,400


@dataclass(frozen=True)
class Evaluation:
    """The result. Errors are standard errors over windows; None for a single window."""

    n_windows: int
    n_ctx: int
    skip: int
    n_scored: int
    nll: float  # nats a token
    perplexity: float
    perplexity_error: float | None
    reference: Distance | None


def evaluate(
    runtime: Runtime,
    text: str,
    n_ctx: int = 512,
    *,
    skip: int | None = None,
    max_windows: int | None = None,
    kv_type: KvType = "f16",
    reference: Runtime | None = None,
    reference_kv: KvType = "f16",
    told: Callable[[int, int, float], None] = lambda done, n, perplexity: None,
) -> Evaluation:
    """Score ``text``; ``told(windows done, windows, perplexity so far)`` after each window. UsageError, CliError."""
    skip = n_ctx // SKIPPED_SHARE if skip is None else skip
    if not 0 <= skip < n_ctx - 1:
        raise UsageError(
            f"{skip} unscored positions leave nothing to score in a window of {n_ctx}", "--skip takes fewer"
        )
    if reference is not None and reference is not runtime:
        _check_same_vocabulary(runtime, reference)
    windows = cut(runtime, text, n_ctx)[:max_windows]
    session = runtime.model.session(n_ctx, kv_type)
    other = reference.model.session(n_ctx, reference_kv) if reference is not None else None
    sessions = [session] if other is None else [session, other]
    memory.refuse(sessions, min(PIECE, n_ctx), sum(_piece_bytes(s) for s in sessions))
    scores = []
    for window in windows:
        scores.append(_score(session, other, window, skip))
        told(len(scores), len(windows), math.exp(sum(s.nll for s in scores) / sum(s.n for s in scores)))
    return _summary(scores, n_ctx, skip, has_reference=other is not None)


def beside_each(paths: Sequence[Path], n_ctx: int, kv_type: KvType, reference_kv: KvType | None) -> list[Beside]:
    """What each model has beside its weights where they are evaluated together: a model, and perhaps a reference."""
    kinds: list[list[KvType]] = [[kv_type], [reference_kv or "f16"]]
    if len(paths) == 1:
        kinds = [[kv_type, *([reference_kv] if reference_kv else [])]]
    widest = [max(kinds_, key=WIDTHS.index) for kinds_ in kinds]
    each = [Beside(n_ctx, kv, len(k), n_step=PIECE, rows=PIECE * len(k)) for kv, k in zip(widest, kinds, strict=True)]
    return shared_out(paths, each)


def cut(runtime: Runtime, text: str, n_ctx: int) -> list[NDArray[np.int32]]:
    """The text's windows of n_ctx tokens. UsageError where it fills none."""
    tokenizer = runtime.tokenizer
    ids = np.array(tokenizer.encode(text), np.int32)
    start = [tokenizer.bos] if tokenizer.add_bos and tokenizer.bos is not None else []
    step = n_ctx - len(start)
    if len(ids) < step:
        raise UsageError(
            f"the text has {len(ids)} tokens, and a window takes {step}", "a longer text, or a smaller --ctx"
        )
    begin = np.array(start, np.int32)
    return [np.concatenate([begin, ids[i : i + step]]) for i in range(0, len(ids) - step + 1, step)]


def _check_same_vocabulary(runtime: Runtime, reference: Runtime) -> None:
    from cext import Gguf

    lists = []
    for path in (runtime.path, reference.path):
        with Gguf(path) as gguf:
            lists.append(gguf.metadata.get("tokenizer.ggml.tokens"))
    same_rows = runtime.model.hparams["n_vocab"] == reference.model.hparams["n_vocab"]
    if lists[0] != lists[1] or not same_rows:
        raise UsageError(
            f"`{runtime.path}` and `{reference.path}` have different vocabularies",
            "--reference takes the same model in a finer type, f16 or q8_0 say",
        )


def _score(session: protocol.Session, other: protocol.Session | None, window: NDArray[np.int32], skip: int) -> Score:
    """Evaluate a window piece by piece: of its logits only a piece's are ever held. Without other, the reference's
    figures are the model's own.
    """
    parts = []
    n_routed = n_alike = 0
    session.rewind(0)
    if other is not None:
        other.rewind(0)
    for start in range(0, len(window), PIECE):
        piece = window[start : start + PIECE]
        scored = slice(max(skip - start, 0), min(len(piece), len(window) - 1 - start))  # the last one predicts nothing
        targets = window[start + 1 :][scored]
        if other is None:
            logs = score.target_logs(_logits(session, piece, scored), targets)
            parts.append(score.Compared(logs, logs, np.empty(0), np.ones(len(logs), bool)))
            continue
        mine, theirs = _router_tap(session), _router_tap(other)
        logits = _logits(session, piece, scored, mine)
        parts.append(score.compare(logits, _logits(other, piece, scored, theirs), targets))
        routed, alike = _routed_alike(mine, theirs, scored)
        n_routed, n_alike = n_routed + routed, n_alike + alike
    return score.window(parts, n_routed, n_alike)


def _logits(session: protocol.Session, piece: NDArray[np.int32], scored: slice, tap: Tap | None = None) -> F32:
    """Evaluate a piece; the logits of its scored positions, (n, n_vocab): each predicts the token after it."""
    if scored.start >= scored.stop:
        eval_batch([(session, piece)], [0]) if isinstance(session, Session) else session.eval(piece)
        return np.empty((0, session.model.hparams["n_vocab"]), np.float32)
    logits = session.eval(piece, "all", tap=tap) if isinstance(session, Session) else session.eval(piece, "all")
    logits = logits[scored]
    if not np.isfinite(logits).all():
        raise CliError(
            f"`{session.model.path}` computes values that are not numbers", "the file is damaged: make it again"
        )
    return logits


def _piece_bytes(session: protocol.Session) -> int:
    """What the logits of a piece take, and some rows of them in float64: themselves and what is made of them."""
    n_vocab = session.model.hparams["n_vocab"]
    return n_vocab * (4 * min(PIECE, session.n_ctx) + 4 * 8 * score.ROWS)


def _router_tap(session: protocol.Session) -> Tap:
    """For the experts that each layer chose, which llama.cpp does not tell."""
    if not isinstance(session, Session):
        return Tap()
    hparams = session.model.hparams
    return Tap({f"experts-{il}": None for il in range(hparams["n_layer_dense"], hparams["n_layer"])})


def _routed_alike(mine: dict[str, Any], theirs: dict[str, Any], scored: slice) -> tuple[int, int]:
    """(the reference's choices, those of them that are mine too); (0, 0) where layers or numbers differ."""
    total = alike = 0
    if mine.keys() != theirs.keys() or scored.start >= scored.stop:
        return 0, 0
    for name, reference in theirs.items():
        a, b = mine[name][scored], reference[scored]  # (n, n_expert_used)
        if a.shape != b.shape:
            return 0, 0
        total += b.size
        alike += score.alike(a, b)
    return total, alike


def _summary(scores: list[Score], n_ctx: int, skip: int, *, has_reference: bool) -> Evaluation:
    n = sum(s.n for s in scores)
    nll = sum(s.nll for s in scores) / n
    error = score.standard_error([s.nll / s.n for s in scores])
    perplexity = math.exp(nll)
    return Evaluation(
        n_windows=len(scores),
        n_ctx=n_ctx,
        skip=skip,
        n_scored=n,
        nll=nll,
        perplexity=perplexity,
        perplexity_error=perplexity * error if error is not None else None,
        reference=score.summary(scores) if has_reference else None,
    )
