"""Going on with a conversation: the time to read its tokens against that to take its cache from the disk, as CSV.

    python tests/bench/bench_reopen.py MODEL.gguf [-n 4096] [--kv f16,q8_0] [--threads N] [--rounds N] [--folder DIR]
        [-o FILE]

Reads as chat does, 512 tokens a step; writes the cache as chat does beside a conversation; lets the system forget the
file's pages, and takes it from the drive into a session of the same size, and once more from the pages. What is
reopened must give the logits of what was read, bit for bit. The kinds of cache take turns, round by round.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import bench_rows
import numpy as np

import cext
from cext.model import KvType

STEP = 512  # tokens, as dsv2cli.scheduler.Budget reads a prompt alone
SEED = 20240507


@dataclass(frozen=True)
class Row:
    """One round. ratio: of reading to reopening from the drive; warm_seconds: reopening from the system's pages."""

    model: str
    isa: str
    threads: int
    kv: str
    tokens: int
    round: int
    read_seconds: float
    save_seconds: float
    reopen_seconds: float
    warm_seconds: float
    file_bytes: int
    ratio: float


def forget(path: Path) -> None:
    """The file's pages, which are on the drive already, leave the memory."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def timed(model: cext.Model, path: Path, n_ctx: int, kv: KvType) -> tuple[float, cext.Session]:
    begun = time.perf_counter()
    session = model.load_session(path, n_ctx, kv)
    return time.perf_counter() - begun, session


def measure(model: cext.Model, name: str, path: Path, kv: KvType, n: int, round_: int) -> Row:
    ids = np.random.default_rng(SEED).integers(0, model.hparams["n_vocab"], n + 1, np.int32)
    n_ctx = n + STEP
    session = model.session(n_ctx, kv)
    begun = time.perf_counter()
    for start in range(0, n, STEP):
        session.eval(ids[start : min(start + STEP, n)])
    read = time.perf_counter() - begun
    begun = time.perf_counter()
    session.save(path)
    saved = time.perf_counter() - begun
    forget(path)
    cold, again = timed(model, path, n_ctx, kv)
    warm, _ = timed(model, path, n_ctx, kv)
    if not np.array_equal(session.eval(ids[n:]), again.eval(ids[n:])):
        raise SystemExit(f"{kv}: what was reopened answers otherwise than what was read")
    seconds = (round(s, 4) for s in (read, saved, cold, warm))
    return Row(name, model.isa, model.threads, kv, n, round_, *seconds, path.stat().st_size, round(read / cold, 1))


def rows(options: argparse.Namespace) -> Iterator[Row]:
    with cext.Model(options.model, options.threads) as model, tempfile.TemporaryDirectory(dir=options.folder) as folder:
        model.session(STEP, "f16").eval(np.arange(STEP) % model.hparams["n_vocab"])  # touches the weights
        for round_ in range(options.rounds):
            for kv in options.kv:
                path = Path(folder) / f"{kv}.cache"
                yield measure(model, options.model.name, path, kv, options.tokens, round_)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("-n", "--tokens", type=int, default=4096)
    parser.add_argument("--kv", type=lambda s: s.split(","), default=["f16", "q8_0"])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="on the drive that is measured; the temporary folder if left out")
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    bench_rows.write(Row, rows(options), options.output)


if __name__ == "__main__":
    main()
