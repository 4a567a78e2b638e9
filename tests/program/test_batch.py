"""dsv2 batch: what is asked, in which order, and what comes of it."""

from __future__ import annotations

import asyncio
import json
import resource
import signal
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.batches import TEXT, answers, line, results, save, short
from support.cli import COMMAND, SECONDS, environment
from support.inprocess import run
from support.tiny import spec_named, variant
from support.vocab import EOS, V25_TEMPLATE, write_model

from dsv2cli.batch import runner
from dsv2cli.batch.ledger import Ledger, LedgerError
from dsv2cli.batch.lines import Line, check, numbered
from dsv2cli.batch.shards import Shard
from dsv2cli.batch.table import Template
from dsv2cli.server.desk import Desk

SMALL = ("-c", "512", "--kv", "f32", "-t", "2", "-q")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = variant(spec_named("lite"), n_ctx=4096)
    return write_model(tmp_path_factory.mktemp("batch") / "tiny.gguf", spec, V25_TEMPLATE, endless=True)


def batch(path: Path, given: Path | str, out: Path, *more: str, stdin: bytes = b"") -> tuple[int, str]:
    ran = run("batch", given, path, "-o", out, *SMALL, *more, stdin=stdin)
    return ran.code, ran.told


# The whole way.


def test_every_line_is_answered_once(path: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    given = save(tmp_path / "in.jsonl", short(30))
    assert batch(path, given, out) == (0, "")
    found = results(out)
    assert sorted(r["custom_id"] for r in found) == sorted(f"r{i}" for i in range(30))
    for result in found:
        assert result["error"] is None and result["response"]["status_code"] == 200
        assert result["response"]["body"]["usage"]["completion_tokens"] == 6
    assert not (tmp_path / "out.errors.jsonl").exists()
    before = out.read_bytes()
    assert batch(path, given, out) == (0, "") and out.read_bytes() == before


def test_answers_do_not_depend_on_order_or_part(path: Path, tmp_path: Path) -> None:
    """Seeds are the lines' own: drawn, not greedy, and the same in any company."""
    lines = short(20, temperature=1.0)
    save(tmp_path / "a.jsonl", lines)
    save(tmp_path / "b.jsonl", lines[::-1])
    batch(path, tmp_path / "a.jsonl", tmp_path / "a.out", "--deterministic")
    batch(path, tmp_path / "b.jsonl", tmp_path / "b.out", "--deterministic", "--parallel", "3")
    for i in (1, 2, 3):
        batch(path, tmp_path / "a.jsonl", tmp_path / f"{i}.out", "--deterministic", "--shard", f"{i}/3")
    whole = answers(tmp_path / "a.out")
    assert len({json.dumps(choices) for choices in whole.values()}) > 10
    assert answers(tmp_path / "b.out") == whole
    parts = [answers(tmp_path / f"{i}.out") for i in (1, 2, 3)]
    assert sum(map(len, parts)) == 20 and parts[0] | parts[1] | parts[2] == whole
    batch(path, tmp_path / "a.jsonl", tmp_path / "c.out", "--deterministic", "--seed", "1")
    assert answers(tmp_path / "c.out") != whole


def test_from_a_pipe_and_with_what_the_command_says(path: Path, tmp_path: Path) -> None:
    data = "\n".join(json.dumps(one) for one in (line(0), line(1, max_tokens=2))).encode()
    assert batch(path, "-", tmp_path / "out", "-n", "4", stdin=b"\xef\xbb\xbf" + data)[0] == 0
    used = {r["custom_id"]: r["response"]["body"]["usage"]["completion_tokens"] for r in results(tmp_path / "out")}
    assert used == {"r0": 4, "r1": 2}


def test_every_dialect_has_its_answer(path: Path, tmp_path: Path) -> None:
    asked = {"input": "Hi the ant", "max_output_tokens": 5, "temperature": 0}
    lines = [line(0, "/v1/responses", **asked), line(1, max_tokens=5, temperature=0), line(2, TEXT, prompt="Hi")]
    assert batch(path, save(tmp_path / "in", lines), tmp_path / "out")[0] == 0
    found = {r["custom_id"]: r["response"]["body"] for r in results(tmp_path / "out")}
    assert [found[f"r{i}"]["object"] for i in range(3)] == ["response", "chat.completion", "text_completion"]
    text = found["r0"]["output"][-1]["content"][0]["text"]
    assert text == found["r1"]["choices"][0]["message"]["content"] and found["r0"]["store"] is False


# Lines that cannot be answered.

BAD = [
    ("{", "no JSON"),
    ("[1]", "object"),
    (line(1) | {"custom_id": ""}, "custom_id"),
    ({k: v for k, v in line(1).items() if k != "custom_id"}, "custom_id"),
    (line(1) | {"method": "GET"}, "method"),
    (line(1) | {"url": "/v1/embeddings"}, "url"),
    (line(1) | {"url": "/etc/passwd"}, "url"),
    (line(1) | {"body": []}, "body"),
    (line(0), "custom_id: is that of line 1 too"),
    (line(1, stream=True), "stream"),
    (line(1, messages=[]), "messages"),
    (line(1, n=10**9), "n:"),
    (line(1, tools=3), "tools"),
    (line(1, messages=[{"role": "user", "content": "Hi " * 600}]), "tokens"),
    (line(1, response_format={"type": "poem"}), "response_format"),
    (line(1, "/v1/responses", input="Hi", previous_response_id="resp_1"), "previous_response_id"),
    ('{"custom_id": "\\ud800", "url": "/v1/completions", "body": {}}', "surrogate"),
    ('{"a":' * 200 + "1" + "}" * 200, "deep"),
    ("[" * 100_000, "deep"),
]


@pytest.mark.parametrize(("wrong", "says"), BAD)
def test_a_bad_line_is_named_before_anything_is_asked(path: Path, tmp_path: Path, wrong: Any, says: str) -> None:
    given = save(tmp_path / "in.jsonl", [line(0), wrong, line(2)])
    code, told = batch(path, given, tmp_path / "out.jsonl")
    assert code == 1 and "line 2" in told and says in told and "--skip-bad" in told
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]


def test_bad_lines_are_left_out_if_so_asked(path: Path, tmp_path: Path) -> None:
    given = save(tmp_path / "in.jsonl", [line(0), "nonsense", line(2, messages=[]), line(3), "", line(3)])
    out, errors = tmp_path / "out.jsonl", tmp_path / "out.errors.jsonl"
    for _ in range(2):
        code, told = batch(path, given, out, "--skip-bad")
        assert code == 1 and "3 lines of 5 failed" in told
        assert answers(out).keys() == {"r0", "r3"}
        nothing, twice, empty = results(errors)
        assert (
            nothing["custom_id"] is None and nothing["error"]["line"] == 2 and "no JSON" in nothing["error"]["message"]
        )
        assert twice["custom_id"] == "r3" and twice["error"]["line"] == 6
        assert empty["custom_id"] == "r2" and empty["response"]["status_code"] == 400
        assert "messages" in empty["response"]["body"]["error"]["message"]


def test_what_failed_is_asked_again(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = save(tmp_path / "in.jsonl", short(6))
    usual = Desk.answer

    async def out_of_memory(self: Desk, url: str, body: bytes, seed: int) -> Any:
        if b" 3" in body:
            raise runner.ApiError(500, "out of memory", "server_error")
        return await usual(self, url, body, seed)

    with monkeypatch.context() as broken:
        broken.setattr(Desk, "answer", out_of_memory)
        code, told = batch(path, given, tmp_path / "out")
    assert code == 1 and "1 line of 6 failed" in told
    [failed] = results(tmp_path / "out.errors.jsonl")
    assert failed["custom_id"] == "r3" and failed["response"]["status_code"] == 500
    assert batch(path, given, tmp_path / "out")[0] == 1  # as it was
    assert batch(path, given, tmp_path / "out", "--retry") == (0, "")
    assert len(answers(tmp_path / "out")) == 6 and not (tmp_path / "out.errors.jsonl").exists()


def test_what_answers_stops_before_anything_is_asked(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def stopped(*_: Any) -> Any:
        raise runner.StoppedError

    given = save(tmp_path / "in.jsonl", short(6))
    monkeypatch.setattr(Desk, "_job", stopped)
    code, told = batch(path, given, tmp_path / "out")
    assert code == 1 and "has stopped: 0 of 6 lines are done" in told
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]


@pytest.mark.parametrize("kind", [TypeError, MemoryError])
def test_a_fault_is_one_line_s_affair(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    given = save(tmp_path / "in.jsonl", short(6))
    usual = Desk._job

    async def broken(self: Desk, url: str, body: bytes) -> Any:
        if b" 3" in body:
            raise kind("of ours")
        return await usual(self, url, body)

    monkeypatch.setattr(Desk, "_job", broken)
    code, told = batch(path, given, tmp_path / "out", "--skip-bad")
    assert code == 1 and f"{kind.__name__}: of ours" in told and "1 line of 6 failed" in told
    assert len(answers(tmp_path / "out")) == 5
    [failed] = results(tmp_path / "out.errors.jsonl")
    assert failed["custom_id"] == "r3" and failed["response"]["status_code"] == 500


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (["in.jsonl"], 2, "-o is missing"),
        (["in.jsonl", "-o", "out.jsonl", "--ray-actors", "2"], 2, "--ray names one"),
        (["in.jsonl", "-o", "in.jsonl"], 2, "reads"),
        (["in.jsonl", "-o", "out", "--errors", "out"], 2, "files of their own"),
        (["in.jsonl", "-o", "out", "--errors", "in.jsonl"], 2, "reads"),
        (["in.jsonl", "-o", "."], 2, "folder"),
        (["in.jsonl", "-o", "no/such/out"], 1, "No such file"),
        (["in.jsonl", "-o", "out", "--shard", "3/2"], 2, "no part"),
        (["in.jsonl", "-o", "out", "--shard", "0/2"], 2, "no part"),
        (["nothing.jsonl", "-o", "out"], 1, "nothing.jsonl"),
        (["empty.jsonl", "-o", "out"], 1, "holds no line"),
        (["t.csv", "-o", "out"], 2, "--template"),
        (["t.csv", "-o", "out", "--template", "Say {wrod}"], 2, "'wrod'"),
        (["t.csv", "-o", "out", "--template", "Say it"], 2, "no place"),
        (["t.csv", "-o", "out", "--template", "nothing.json"], 1, "nothing.json"),
        (["twice.csv", "-o", "out", "--template", "Say {a}"], 1, "each once"),
        (["ragged.csv", "-o", "out", "--template", "Say {a}"], 1, "line 3 has 3 fields"),
        (["latin.txt", "-o", "out", "--template", "Say {text}"], 1, "line 2 is no UTF-8"),
    ],
)
def test_what_is_not_begun(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], code: int, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "in.jsonl", short(2))
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "t.csv").write_text("id,word\n1,ant\n")
    (tmp_path / "twice.csv").write_text("a,a\n1,2\n")
    (tmp_path / "ragged.csv").write_text("a,b\n1,2\n3,4,5\n")
    (tmp_path / "latin.txt").write_bytes(b"a\n\xff\n")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    ran = run("batch", args[0], path, *args[1:], *SMALL)
    assert ran.code == code and says in ran.told, ran.told
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


# Tables.


def prompts(path: Path, tmp_path: Path, name: str, data: bytes, template: str, *more: str) -> dict[str, int]:
    """custom_id -> tokens of the prompt."""
    (tmp_path / name).write_bytes(data)
    code, told = batch(path, tmp_path / name, tmp_path / f"{name}.out", "--template", template, "-n", "1", *more)
    assert code == 0, told
    found = results(tmp_path / f"{name}.out")
    return {r["custom_id"]: r["response"]["body"]["usage"]["prompt_tokens"] for r in found}


def test_rows_of_a_table_and_lines_of_a_text(path: Path, tmp_path: Path) -> None:
    table = b'id,word,much more\r\nx,ant,"{word}\nof"\r\n\r\ny,the ant,b\r\n'
    template = 'Say {word} and {much more} as {"word": "..."}'
    assert prompts(path, tmp_path, "t.csv", table, template).keys() == {"x", "y"}
    assert prompts(path, tmp_path, "t.tsv", b"a\tb\n1\t2\n", "{a}").keys() == {"line-2"}
    assert prompts(path, tmp_path, "t.txt", b"the ant\r\n\r\nHi\n", "Say {text}").keys() == {"line-1", "line-3"}


@pytest.mark.parametrize("end", ["", ".json"])
def test_a_long_template_is_gone_on_with(path: Path, tmp_path: Path, end: str) -> None:
    given = save(tmp_path / "a.txt", ["ant"])
    told = [batch(path, given, tmp_path / "out", "--template", "{text} " + "the " * 99 + end, "-n", "1")
            for _ in range(2)]  # fmt: skip
    if end:  # the name of a file that no file can have
        assert all(code == 1 and "File name too long" in text for code, text in told)
    else:
        assert told == [(0, "")] * 2


def test_a_template_is_filled_once() -> None:
    made = Template.parse('{a} {b} {c}, {"a": {b}}')
    filled = made.fill({"a": "{b}", "b": r"\1", "b c": ""})
    assert filled["messages"] == [{"role": "user", "content": r'{b} \1 {c}, {"a": \1}'}]


def test_a_body_as_the_template(path: Path, tmp_path: Path) -> None:
    body = {"prompt": "the {text}", "max_tokens": 1}
    (tmp_path / "body.json").write_text(json.dumps(body))
    plain = prompts(path, tmp_path, "a.txt", b"ant\n", str(tmp_path / "body.json"))
    spelt = prompts(path, tmp_path, "b.txt", EOS.encode(), str(tmp_path / "body.json"))
    assert plain["line-1"] < 6 < spelt["line-1"]  # a row's control token is letters
    (tmp_path / "body.json").write_text(json.dumps(body | {"parse_special": True}))
    assert prompts(path, tmp_path, "c.txt", EOS.encode(), str(tmp_path / "body.json"))["line-1"] < 6


# What OUT is.

ORIGIN = {"the input": "a", "--temp": 0.7}


def entry(i: int) -> dict[str, Any]:
    return {"id": f"batch_req_{i}", "custom_id": f"r{i}", "text": "ü" * 40}


def opened(folder: Path, origin: dict[str, Any] = ORIGIN, **named: Any) -> Ledger:
    return Ledger(folder / "out", folder / "errors", origin, **named)


def written(folder: Path, n: int) -> bytes:
    with opened(folder) as ledger:
        ledger.begin()
        for i in range(n):
            ledger.put(entry(i), failed=i == 0)
    return (folder / "out").read_bytes()


def test_a_torn_line_is_cut_wherever_it_is_torn(tmp_path: Path) -> None:
    whole = written(tmp_path, 3)
    last = whole.index(b"\n") + 1
    for n in range(len(whole) + 1):
        (tmp_path / "out").write_bytes(whole[:n])
        with opened(tmp_path) as ledger:
            kept = len(whole) if n == len(whole) else last if n >= last else 0
            assert ledger.done == {f"batch_req_{i}" for i in range(3) if i == 0 or n >= (last, len(whole))[i - 1]}
            ledger.begin()
            ledger.put(entry(9), failed=False)
        assert (tmp_path / "out").read_bytes()[:kept] == whole[:kept]
        assert [r["id"][-1] for r in results(tmp_path / "out")][-1] == "9"


def test_what_a_power_cut_leaves_at_the_end_is_cut(tmp_path: Path) -> None:
    whole = written(tmp_path, 3)
    (tmp_path / "out").write_bytes(whole + bytes(100) + b"\n" + bytes(50))
    with opened(tmp_path) as ledger:
        assert len(ledger.done) == 3
        ledger.begin()
    assert (tmp_path / "out").read_bytes() == whole
    (tmp_path / "out").write_bytes(b"{}\n" + whole)
    with pytest.raises(LedgerError, match="line 1 is no result"):
        opened(tmp_path)


def test_another_run_s_results_are_not_gone_on_with(tmp_path: Path) -> None:
    whole = written(tmp_path, 3)
    with pytest.raises(LedgerError, match=r"--temp was 0\.7, is 1\.0") as refused:
        opened(tmp_path, ORIGIN | {"--temp": 1.0})
    assert "the input" not in str(refused.value) and "--restart" in refused.value.hint
    with pytest.raises(LedgerError, match="the input was a, is b"):
        opened(tmp_path, ORIGIN | {"the input": "b"})
    assert (tmp_path / "out").read_bytes() == whole
    with opened(tmp_path, ORIGIN | {"--temp": 1.0}, restart=True) as ledger:
        assert not ledger.done and (tmp_path / "out").read_bytes() == whole  # until it begins
        ledger.begin()
    assert (tmp_path / "out").read_bytes() == b"" and not (tmp_path / "errors").exists()
    with opened(tmp_path, ORIGIN | {"--temp": 1.0}):
        pass


@pytest.mark.parametrize("name", ["out", "errors"])
def test_a_file_that_no_batch_began(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("my diary\n")
    with pytest.raises(LedgerError, match="no batch has begun it"):
        opened(tmp_path)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [(name, "my diary\n")]


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    with opened(tmp_path) as ledger:
        ledger.begin()
        ledger.put(entry(1), failed=False)
        for restart in (False, True):
            with pytest.raises(LedgerError, match="another process"):
                opened(tmp_path, restart=restart)
        ledger.put(entry(2), failed=False)
    assert len(results(tmp_path / "out")) == 2


def test_files_of_errors_have_one_writer_too(tmp_path: Path) -> None:
    with opened(tmp_path) as ledger:
        ledger.begin()
        ledger.put(entry(1), failed=True)
        for out, errors in (("other", "errors"), ("errors", "other"), ("other", "out")):
            with pytest.raises(LedgerError, match="another process"):
                Ledger(tmp_path / out, tmp_path / errors, ORIGIN)
        ledger.put(entry(2), failed=True)
    assert {p.name for p in tmp_path.iterdir()} == {"out", "out.batch.json", "errors"}
    assert len(results(tmp_path / "errors")) == 2


def test_a_disk_that_is_full(path: Path, tmp_path: Path) -> None:
    """Of a file's size limit, here: whole lines alone are kept, and with room the run goes on."""
    given, out = save(tmp_path / "in.jsonl", short(12)), tmp_path / "out"
    command = [*COMMAND, "batch", str(given), str(path), "-o", str(out), *SMALL]

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, resource.RLIM_INFINITY))

    ended = subprocess.run(
        command, env=environment(), preexec_fn=limit, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert ended.returncode == 1 and "File too large" in ended.stderr and "goes on" in ended.stderr
    n = len(results(out))
    assert 0 < n < 12 and out.read_bytes().endswith(b"\n")
    assert batch(path, given, out)[0] == 0 and len(answers(out)) == 12 == len(results(out))


# The order.


class FakeDesk:
    """Prompts are the bodies' bytes as ids."""

    def __init__(self, stops_at: int = 10**9) -> None:
        self.asked: list[str] = []
        self.stops_at = stops_at
        self.most = self.running = 0

    async def look(self, url: str, body: bytes) -> Any:
        await asyncio.sleep(0)
        return np.frombuffer(json.loads(body)["prompt"].encode(), np.uint8).astype(np.int32)

    async def answer(self, url: str, body: bytes, seed: int) -> dict[str, Any]:
        if len(self.asked) >= self.stops_at:
            raise runner.StoppedError
        self.asked.append(json.loads(body)["prompt"])
        self.running += 1
        self.most = max(self.most, self.running)
        for _ in range(50):  # long enough for all the others to have their turn
            await asyncio.sleep(0)
        self.running -= 1
        return {"seed": seed}


def parsed(given: Iterable[str]) -> list[Line]:
    data = "\n".join(json.dumps(line(i, TEXT, prompt=p)) for i, p in enumerate(given))
    lines, bad = check(numbered(data.encode()), [TEXT])
    assert not bad
    return lines


def test_prompts_that_begin_alike_come_together() -> None:
    given = ["a" * 40 + "1", "b" * 40 + "1", "short", "a" * 70, "b" * 40 + "2", "a" * 40 + "2", "a" * 70 + "x"]
    ordered, bad = asyncio.run(runner.look_over(FakeDesk(), parsed(given)))
    assert not bad and [line.number - 1 for line in ordered] == [2, 0, 5, 3, 6, 1, 4]


def test_beginnings_are_compared_up_to_a_bound() -> None:
    same = "a" * runner.COMPARED
    ordered, _ = asyncio.run(runner.look_over(FakeDesk(), parsed(same + rest * 100 for rest in "bcb")))
    assert [line.number for line in ordered] == [1, 2, 3]


def test_as_many_at_once_as_asked_and_none_after_the_end(tmp_path: Path) -> None:
    desk, lines = FakeDesk(stops_at=11), parsed(f"{i}" for i in range(20))
    with opened(tmp_path) as ledger:
        ledger.begin()
        asyncio.run(runner.run(desk, lines, ledger, at_once=4))
        assert desk.most == 4 and len(ledger.done) == 11  # what had no end is no result
        again = FakeDesk()
        left = [line for line in lines if line.id not in ledger.done]
        asyncio.run(runner.run(again, left, ledger, at_once=4))
    assert sorted([*desk.asked, *again.asked], key=int) == [f"{i}" for i in range(20)]


@pytest.mark.parametrize(("n", "count"), [(1, 1), (7, 3), (1000, 4), (5, 9)])
def test_shards_are_the_whole_and_alike(n: int, count: int) -> None:
    lines = parsed("x" for _ in range(n))
    parts = [Shard(i + 1, count).numbers(lines, []) for i in range(count)]
    assert sum(map(len, parts)) == n == len(set().union(*parts))
    assert max(map(len, parts)) - min(map(len, parts)) <= max(1, n // (8 * count))
