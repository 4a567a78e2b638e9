"""Load on a server: how long clients wait for the first token and between tokens, and what disturbs them.

    dsv2 serve MODEL.gguf --ctx 16384 --parallel 16 --port 8080 &
    python tests/bench/bench_serve.py http://127.0.0.1:8080 -o serve.csv --plot serve.svg
    python tests/bench/bench_serve.py http://127.0.0.1:8080 --only gaps --prompt 8000
    python tests/bench/bench_serve.py http://127.0.0.1:8080 --minutes 60 --pid $(pgrep -f 'dsv2 serve')    # a soak

Scenes, one after another, each a few lines of the CSV: ``one`` and ``many``: a stream alone, and --clients of them at
once (tokens a second of all, and their ratio); ``form``: a stream alone whose answer is JSON of a schema (its ratio to
one); ``gaps``: a stream while a prompt of --prompt tokens arrives; ``gone``: of two streams one goes away, again and
again (how long, and how many steps, until the server counts it no more); ``mixed``: --clients that stream, ask for
long prompts, go away in the middle and send what is refused, for --seconds. A time is from the request's first byte, or
the token before, to a token's event; /health is asked every 20 ms throughout, from a process of its own: that of the
clients is busy with their events.
Prompts are token ids drawn anew, so that nothing is found in a cache, and answers do not stop at an end token. The
latency of a model varies with the experts that tokens take: --seed draws other prompts.

--minutes: ``mixed`` for so long. Ends with 1 where an answer was a 5xx or broke off, or where the memory of --pid grew
by more than --grown percent from the first fifth of the time, which fills the caches, to the last.
The plot needs matplotlib: pip install 'dsv2[bench]'.
"""

import argparse
import asyncio
import csv
import json
import multiprocessing
import random
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from http.client import HTTPConnection, HTTPException
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import urlsplit

import httpx

try:
    from matplotlib import pyplot
except ImportError:
    pyplot = None

SCENES = ("one", "many", "form", "gaps", "gone", "mixed")
WHATS = ("first", "between", "gone", "health")
N_GONE = 10
# An answer that goes on for as long as it may.
FORM = {
    "type": "array",
    "minItems": 10_000,
    "items": {
        "type": "object",
        "properties": {"name": {"type": "string"}, "size": {"type": "integer"}},
        "required": ["name", "size"],
        "additionalProperties": False,
    },
}
SHARES = (50.0, 99.0, 99.9)
HEALTH_SECONDS = 0.02
BAD: tuple[Any, ...] = (
    {"n_predict": -9},
    {"prompt": [-1]},
    {"prompt": {}},
    {"grammar": "root ::= ("},
    {"n_probs": 1e9},
)


@dataclass
class Heard:
    """What the clients of a scene measured: seconds; statuses counts the answers, those that broke off as 0."""

    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    gone: list[float] = field(default_factory=list)
    gone_steps: list[int] = field(default_factory=list)  # that ended meanwhile
    health: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    n_tokens: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Row:
    """A line of the CSV. Times in milliseconds."""

    scene: str
    clients: int
    what: str
    n: int
    p50: float
    p99: float
    p99_9: float
    longest: float
    tok_s: float


class Client:
    """Asks one server. n_vocab: prompts are drawn from ids below it."""

    def __init__(self, http: httpx.AsyncClient, n_vocab: int, seed: int) -> None:
        self._http, self._n_vocab, self._random = http, n_vocab, random.Random(seed)

    def prompt(self, n: int) -> list[int]:
        return [self._random.randrange(self._n_vocab) for _ in range(n)]

    async def tokens(self, heard: Heard, n_prompt: int, n_predict: int, **more: Any) -> AsyncIterator[float]:
        """Stream an answer; the seconds before each of its tokens, which are noted."""
        body = {"prompt": self.prompt(n_prompt), "n_predict": n_predict, "stream": True, "ignore_eos": True, **more}
        before, is_first = time.perf_counter(), True
        async with self._http.stream("POST", "/completion", json=body) as response:
            heard.statuses[response.status_code] += 1
            async for line in response.aiter_lines():
                if not line.startswith("data: {") or json.loads(line[6:]).get("stop") is not False:
                    continue
                now = time.perf_counter()
                (heard.first if is_first else heard.between).append(now - before)
                heard.n_tokens += 1
                yield now - before
                before, is_first = now, False

    async def stream(self, heard: Heard, n_prompt: int, n_predict: int, leave_after: int | None = None) -> None:
        """leave_after: go away behind so many tokens."""
        n = 0
        async for _ in self.tokens(heard, n_prompt, n_predict):
            n += 1
            if n == leave_after:
                break

    async def running(self) -> tuple[int, int]:
        """(answers that the server steps now, steps until now)."""
        lines = (await self._http.get("/metrics")).text.splitlines()
        told = dict(line.split() for line in lines if line.startswith("llamacpp:"))
        return int(float(told["llamacpp:requests_processing"])), int(float(told["llamacpp:n_decode_total"]))

    async def refused(self, heard: Heard) -> None:
        """Ask for what is no request: of the wrong type, out of range, no JSON."""
        if self._random.random() < 0.2:
            response = await self._http.post("/completion", content=b"{", headers={"content-type": "application/json"})
        else:
            response = await self._http.post("/completion", json=self._random.choice(BAD))
        heard.statuses[response.status_code] += 1

    async def mixed(self, heard: Heard, until: float, most: int) -> None:
        """Whatever clients do, until then. most: tokens of the longest prompt."""
        while time.perf_counter() < until:
            try:
                await self.one_of_many(heard, most)
            except httpx.TransportError:
                heard.statuses[0] += 1

    async def one_of_many(self, heard: Heard, most: int) -> None:
        dice = self._random.random()
        if dice < 0.1:
            await self.refused(heard)
        elif dice < 0.25:
            await self.stream(heard, self._random.randrange(8, 200), 200, leave_after=self._random.randrange(1, 20))
        elif dice < 0.35:
            await self.stream(heard, self._random.randrange(most // 2, most), 16)
        else:
            await self.stream(heard, self._random.randrange(8, 200), self._random.randrange(8, 100))


def ask_health(url: str, wanted: Connection) -> None:
    """Ask without end, and hand out (status, seconds) of what was asked since, whenever that is wanted."""
    parts = urlsplit(url)
    http = HTTPConnection(parts.hostname or "", parts.port)
    asked: list[tuple[int, float]] = []
    due = time.perf_counter()
    while True:
        due = max(due + HEALTH_SECONDS, time.perf_counter() - HEALTH_SECONDS)
        if wanted.poll(max(0.0, due - time.perf_counter())):
            if wanted.recv() is None:
                return
            wanted.send(asked)
            asked = []
        begun, status = time.perf_counter(), 0
        try:
            http.request("GET", "/health")
            response = http.getresponse()
            response.read()
            status = response.status
        except (OSError, HTTPException):
            http.close()
        asked.append((status, time.perf_counter() - begun))


@contextmanager
def health_of(url: str) -> Iterator[Callable[[], list[tuple[int, float]]]]:
    """What gives the (status, seconds) since it was called last."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=ask_health, args=(url, theirs), daemon=True)
    process.start()

    def asked() -> list[tuple[int, float]]:
        ours.send("all")
        return list(ours.recv())

    try:
        yield asked
    finally:
        ours.send(None)
        process.join()


async def scene(name: str, http: httpx.AsyncClient, options: argparse.Namespace, n_vocab: int) -> Heard:
    heard = Heard()
    clients = [Client(http, n_vocab, options.seed * 1000 + i) for i in range(options.clients)]
    begun = time.perf_counter()
    if name == "one":
        await clients[0].stream(heard, 32, options.tokens)
    elif name == "many":
        await asyncio.gather(*(client.stream(heard, 32, options.tokens) for client in clients))
    elif name == "form":
        async for _ in clients[0].tokens(heard, 32, options.tokens, json_schema=FORM):
            pass
    elif name == "gone":
        await gone(clients[0], clients[-1], heard)
    elif name == "gaps":
        await gaps(clients[0], clients[-1], heard, options)
    else:
        until = begun + (60 * options.minutes or options.seconds)
        await asyncio.gather(
            *(client.mixed(heard, until, options.mixed_prompt or options.prompt) for client in clients)
        )
    heard.seconds = time.perf_counter() - begun
    return heard


async def gaps(one: Client, other: Client, heard: Heard, options: argparse.Namespace) -> None:
    """One stream goes on until the other's long prompt has been read, or --reading seconds; only its tokens count."""
    apart, begun = Heard(), time.perf_counter()
    reading: asyncio.Task[None] | None = None
    async for _ in one.tokens(heard, 32, 1_000_000):
        if heard.n_tokens == 10:
            reading = asyncio.create_task(other.stream(apart, options.prompt, 1))
        if reading is not None and reading.done():
            reading.result()
            break
        if reading is not None and time.perf_counter() - begun > options.reading:
            reading.cancel()
            break
    heard.statuses += apart.statuses


async def gone(one: Client, other: Client, heard: Heard) -> None:
    """While one stream goes on the other's client goes away N_GONE times, without a word."""
    on = asyncio.Event()

    async def goes_on() -> None:
        async for _ in one.tokens(heard, 32, 1_000_000):
            if on.is_set():
                break

    going = asyncio.create_task(goes_on())
    for _ in range(N_GONE):
        await other.stream(Heard(), 8, 1_000_000, leave_after=4)
        left = time.perf_counter()
        _, before = await other.running()
        while (told := await other.running())[0] > 1:
            await asyncio.sleep(0.01)  # not oftener: the server has better to do
        heard.gone.append(time.perf_counter() - left)
        heard.gone_steps.append(told[1] - before)
    on.set()
    await going


def share(values: Sequence[float], percent: float) -> float:
    """The value that so many percent do not exceed; 0 of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))] if ordered else 0.0


def rows_of(name: str, heard: Heard, clients: int) -> list[Row]:
    rows = []
    for what in WHATS:
        values = getattr(heard, what)
        if not values:
            continue
        shares = [1e3 * share(values, percent) for percent in SHARES]
        rate = heard.n_tokens / heard.seconds
        rows.append(Row(name, clients, what, len(values), *shares, 1e3 * max(values, default=0.0), rate))
    return rows


def resident(pid: int) -> int:
    """Bytes of memory that belong to a process alone: mapped weights aside. OSError where it has ended."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


async def watch_memory(pid: int, seen: list[int]) -> None:
    while True:
        seen.append(resident(pid))
        await asyncio.sleep(5)


def growth(seen: Sequence[int]) -> float:
    """Percent, from the second fifth of the time to the last: the middle of each, since caches fill and are let go."""
    fifth = max(1, len(seen) // 5)
    early, late = median(seen[fifth : 2 * fifth] or seen), median(seen[-fifth:])
    return 100 * (late / early - 1) if early else 0.0


def plot(heard: dict[str, Heard], file: Path) -> None:
    """For each scene what share of the tokens waited longer than a time."""
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True)
    for axis, what, title in zip(axes, ("first", "between"), ("first token", "between tokens"), strict=True):
        for name, one in heard.items():
            values = sorted(getattr(one, what))
            if values:
                axis.step([1e3 * v for v in values], [1 - i / len(values) for i in range(len(values))], label=name)
        axis.set(xscale="log", yscale="log", xlabel=f"{title}, ms", ylabel="share that waited longer")
        axis.grid(alpha=0.3)
    axes[1].legend()
    figure.tight_layout()
    figure.savefig(file)


async def measure(options: argparse.Namespace) -> int:
    heard: dict[str, Heard] = {}
    rows: list[Row] = []
    sizes: list[int] = []
    limits = httpx.Limits(max_connections=None)
    headers = {"authorization": f"Bearer {options.key}"} if options.key else {}
    async with httpx.AsyncClient(base_url=options.url, timeout=None, limits=limits, headers=headers) as http:
        meta = (await http.get("/v1/models")).raise_for_status().json()["data"][0]["meta"]
        if options.prompt >= meta["n_ctx"]:
            raise SystemExit(
                f"a prompt of {options.prompt} tokens, and the server's context is {meta['n_ctx']}: --prompt"
            )
        memory = asyncio.create_task(watch_memory(options.pid, sizes)) if options.pid else None
        await Client(http, meta["n_vocab"], options.seed).stream(Heard(), 32, 8)  # warms up
        with health_of(options.url) as health:
            for name in ("mixed",) if options.minutes else options.only.split(","):
                await asyncio.to_thread(health)
                heard[name] = await scene(name, http, options, meta["n_vocab"])
                for status, seconds in await asyncio.to_thread(health):
                    heard[name].statuses[status] += 1
                    heard[name].health.append(seconds)
                rows += rows_of(name, heard[name], options.clients if name in ("many", "mixed") else 1)
                tell(rows, name)
                if options.output:
                    write(rows, options.output)
        if memory is not None:
            memory.cancel()
    compare(heard)
    if options.plot:
        plot(heard, options.plot)
    failed = sum(n for one in heard.values() for status, n in one.statuses.items() if status >= 500 or not status)
    grown = growth(sizes) if sizes else 0.0
    if sizes:
        print(f"memory: {sizes[-1] / 1e6:.0f} MB at the end, {grown:+.2f} % since the caches filled")
    return 1 if failed or (options.minutes and grown > options.grown) else 0


def write(rows: Sequence[Row], file: Path) -> None:
    with file.open("w", newline="", encoding="utf-8") as opened:
        writer = csv.DictWriter(opened, list(asdict(rows[0])))
        writer.writeheader()
        for row in rows:
            writer.writerow({k: round(v, 3) if isinstance(v, float) else v for k, v in asdict(row).items()})


def tell(rows: Sequence[Row], name: str) -> None:
    """Those of a scene, as soon as it is over."""
    if rows[0].scene == name:
        print(f"{'scene':8}{'what':10}{'n':>8}{'p50 ms':>10}{'p99':>10}{'p99.9':>10}{'longest':>10}{'tok/s':>9}")
    for row in rows:
        if row.scene == name:
            times = "".join(f"{value:10.1f}" for value in (row.p50, row.p99, row.p99_9, row.longest))
            print(f"{row.scene:8}{row.what:10}{row.n:8}{times}{row.tok_s:9.1f}", flush=True)


def compare(heard: dict[str, Heard]) -> None:
    if {"one", "many"} <= heard.keys():
        one, many = (heard[name].n_tokens / heard[name].seconds for name in ("one", "many"))
        print(f"many: {many / one:.2f} times the tokens of one")
    if {"one", "form"} <= heard.keys():  # between tokens: what is prepared once, before the first, is told apart
        one, form = (sum(heard[name].between) / len(heard[name].between) for name in ("one", "form"))
        print(
            f"form: {one / form:.3f} of the speed of one; its first token after {1e3 * heard['form'].first[0]:.0f} ms"
        )
    if "gone" in heard:
        print(f"gone: counted no more after {sorted(Counter(heard['gone'].gone_steps).items())} (steps, times)")
    for name, one in heard.items():
        print(f"{name}: answers by status {dict(sorted(one.statuses.items()))}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="the server, as http://127.0.0.1:8080")
    parser.add_argument("--key", help="its API key")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128, help="of each answer of one and many")
    parser.add_argument("--prompt", type=int, default=8000, help="tokens of a long prompt")
    parser.add_argument("--mixed-prompt", type=int, help="tokens of mixed's longest prompt, if not as --prompt")
    parser.add_argument("--reading", type=float, default=1e9, help="seconds of gaps at most, the prompt read or not")
    parser.add_argument("--seconds", type=float, default=60, help="of mixed")
    parser.add_argument("--minutes", type=float, default=0, help="of a soak: mixed alone")
    parser.add_argument("--pid", type=int, help="the server's process, whose memory is watched")
    parser.add_argument("--grown", type=float, default=1.0, help="percent that its memory may grow")
    parser.add_argument("--only", default=",".join(SCENES), help="scenes, with commas between")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("-o", "--output", type=Path, help="a CSV file")
    parser.add_argument("--plot", type=Path, help="an SVG or PNG file")
    options = parser.parse_args()
    if unknown := set(options.only.split(",")) - set(SCENES):
        parser.error(f"no such scene: {', '.join(sorted(unknown))}; there are {', '.join(SCENES)}")
    if options.plot and pyplot is None:
        parser.error("--plot needs matplotlib: pip install 'dsv2[bench]'")
    return asyncio.run(measure(options))


if __name__ == "__main__":
    sys.exit(main())
