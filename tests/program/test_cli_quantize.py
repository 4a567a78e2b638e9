"""dsv2 quantize as a person meets it: progress, Ctrl-C and going on, the table, the report; and inspect of the file."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from support.checkpoints import V2, write_checkpoint, write_text
from support.cli import assert_fails, dsv2, terminal

import quantize
from dsv2cli import console
from dsv2cli.commands.quantize import bpw_name, default_name, pace, where
from quantize import Progress
from quantize.write.writer import write_vocab_only


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "Tiny-Model"
    write_checkpoint(folder, {**V2, "num_hidden_layers": 3})
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt", 2400)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, source: Path, text: Path) -> tuple[Path, str]:
    """A quantised file, and what was said while it was made."""
    out = tmp_path_factory.mktemp("made") / "m.gguf"
    result = dsv2("quantize", source, "-o", out, "--calibration", text, "-t", "2")
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{out}\n"
    return out, result.stderr


def test_the_table(made: tuple[Path, str]) -> None:
    for words in (
        "bits/weight", "perplexity ratio", "KL divergence", "p99", "same top token", "same experts", "held back",
        "types: ", "predicted KL divergence", "  attn_kv_a_mqa ",
        "expert coverage", "text.txt (sha256 ", "layer errors", "M weights/s",
    ):  # fmt: skip
        assert words in made[1], words


def test_inspect_shows_what_was_measured(made: tuple[Path, str]) -> None:
    report = json.loads(made[0].with_name("m.gguf.report.json").read_text(encoding="utf-8"))
    shown = dsv2("inspect", made[0]).stdout
    assert f"{report['evaluation']['kld_mean']:.4f}" in shown
    assert f"{report['evaluation']['routing']:.1%}" in shown
    assert report["calibration"]["sha256"][:12] in shown
    rows = [line for line in shown.splitlines() if line.startswith(("   2 ", "   3 "))]
    assert len(rows) == 2 and all(len(row) == 5 + 8 for row in rows)  # two layers with experts, eight of them
    assert "\x1b" not in shown and "dsv2.expert_usage" not in shown
    told = json.loads(dsv2("inspect", made[0], "--json").stdout)
    assert told["metadata"]["dsv2.evaluation.kld_mean"] == pytest.approx(report["evaluation"]["kld_mean"], rel=1e-6)


def test_less_calibration(tmp_path: Path, source: Path, text: Path) -> None:
    """Fewer tokens, and one stream through the layers in place of two."""
    asked = ("--calibration", text, "--calibration-tokens", "1024", "--plain-mix", "--no-evaluate", "--json", "-q")
    files = []
    for flag in ("--sequential", "--no-sequential"):
        result = dsv2("quantize", source, "-o", tmp_path / f"{flag}.gguf", flag, *asked)
        assert result.returncode == 0, result.stderr
        assert json.loads(result.stdout)["calibration"]["tokens"] == 1024
        files.append((tmp_path / f"{flag}.gguf").read_bytes())
    assert files[0] != files[1]
    assert_fails(dsv2("quantize", source, "--calibration-tokens", "100"), 2, "--calibration-tokens", "1024")


def test_heatmap(tmp_path: Path, made: tuple[Path, str], source: Path) -> None:
    result = dsv2("inspect", made[0], "--heatmap", tmp_path / "u.png")
    assert result.returncode == 0 and "u.png" in result.stderr
    assert (tmp_path / "u.png").read_bytes().startswith(b"\x89PNG")
    plain = tmp_path / "plain.gguf"
    assert dsv2("quantize", source, "-o", plain, "--type", "f16", "--no-evaluate", "-q").returncode == 0
    assert_fails(dsv2("inspect", plain, "--heatmap", tmp_path / "v.png"), 2, "does not say", "dsv2.expert_usage")
    assert_fails(dsv2("inspect", made[0], "--heatmap", tmp_path / "no" / "v.png"), 1, "No such file")
    forgotten = tmp_path / "m.gguf"
    forgotten.write_bytes(b"a model")
    assert_fails(dsv2("inspect", made[0], "--heatmap", forgotten), 2, "is no PNG", "--heatmap usage.png")
    assert forgotten.read_bytes() == b"a model"
    with terminal("inspect", made[0], COLORTERM="truecolor") as screen:
        screen.wait_for("▀{8}")
        assert screen.exit_code() == 0


def test_another_run_s_work_is_left_alone(tmp_path: Path, source: Path) -> None:
    """What differs is told, with two ways out; nobody is told that the same command would go on."""
    out = tmp_path / "m.gguf"

    def stop(step: Progress) -> None:
        if step.layer == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize.quantize(source, out, quantize.Options(type="f16", threads=1, evaluate=False), stop)
    refused = dsv2("quantize", source, "-o", out, "--type", "bf16", "--no-evaluate", "-t", "1")
    assert_fails(refused, 1, "m.gguf.work", "--type was f16, is bf16", "--restart", "-o")
    assert "goes on" not in refused.stderr
    result = dsv2("quantize", source, "-o", out, "--type", "bf16", "--no-evaluate", "-t", "1", "--restart", "-q")
    assert result.returncode == 0 and result.stdout == f"{out}\n"


LIES: dict[str, dict[str, object]] = {
    "not numbers": {"dsv2.expert_usage": ["a"] * 24, "dsv2.layer_error": ["b"], "dsv2.evaluation.kld_mean": "much"},
    "not finite": {"dsv2.layer_error": np.array([np.nan, np.inf], np.float32), "dsv2.evaluation.top1": float("nan")},
    "too few": {"dsv2.expert_usage": np.arange(23, dtype=np.uint32), "dsv2.calibration.sources": 7},
    "too many dense layers": {
        "dsv2.expert_usage": np.arange(24, dtype=np.uint32), "deepseek2.leading_dense_block_count": 3,
    },
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_inspect_believes_no_file(tmp_path: Path, lie: str) -> None:
    shape = {"deepseek2.block_count": 3, "deepseek2.expert_count": 8, "deepseek2.leading_dense_block_count": 1}
    write_vocab_only(tmp_path / "m.gguf", {"general.architecture": "deepseek2", **shape, **LIES[lie]})
    for options in ((), ("--json",)):
        result = dsv2("inspect", tmp_path / "m.gguf", *options)
        assert result.returncode == 0, result.stderr
    assert_fails(dsv2("inspect", tmp_path / "m.gguf", "--heatmap", tmp_path / "u.png"), 2, "does not say")


def test_inspect_of_a_shape_in_words(tmp_path: Path) -> None:
    keys = {"general.architecture": "deepseek2", "deepseek2.block_count": "three"}
    write_vocab_only(tmp_path / "m.gguf", keys)
    assert_fails(dsv2("inspect", tmp_path / "m.gguf"), 1, "block_count", "'three'")


def test_json_is_the_report(tmp_path: Path, source: Path, text: Path) -> None:
    out = tmp_path / "m.gguf"
    result = dsv2("quantize", source, "-o", out, "--type", "q4_0", "--calibration", text, "--no-awq", "--json")
    assert json.loads(result.stdout) == json.loads(out.with_name("m.gguf.report.json").read_text(encoding="utf-8"))


def test_the_checkpoint_is_not_written_over(tmp_path: Path, source: Path) -> None:
    folder = Path(shutil.copytree(source, tmp_path / "checkpoint"))
    weights = next(folder.glob("*.safetensors"))
    before = weights.read_bytes()
    command = ("quantize", folder, "--type", "q8_0", "--no-evaluate", "--force", "-o")
    assert_fails(dsv2(*command, weights), 2, "is a file that this run reads", "-o")
    assert weights.read_bytes() == before
    for _ in range(2):
        assert dsv2(*command, folder / "m.gguf").returncode == 0


# At the second layer it waits: a run of a model so small might be through before it is ended.
HELD = """
import threading
from dsv2cli.commands.quantize import Display
shown = Display.progress
def held(display, step):
    shown(display, step)
    if step.layer == 1:
        display._bar.refresh()
        threading.Event().wait()
Display.progress = held
"""


def test_ctrl_c_and_on(tmp_path: Path, source: Path, text: Path) -> None:
    out = tmp_path / "m.gguf"
    command = ("quantize", source, "-o", out, "--calibration", text, "--plain-mix", "--type", "q3_k_m")
    with terminal(*command, before=HELD) as screen:
        screen.wait_for("layer 2 of 3")
        screen.type("\x03")
        screen.wait_for(r"what was done is kept in\s\S*m\.gguf\.work")  # a long path stands on a line of its own
        assert screen.exit_code() == 128 + signal.SIGINT
    assert not out.exists()
    other = dsv2(*command[:-1], "q2_k")
    assert other.returncode == 1 and "holds the work of another run: --type was q3_k_m, is q2_k" in other.stderr
    assert "--restart" in other.stderr and not out.exists()
    result = dsv2(*command)
    assert result.returncode == 0 and "continuing at layer" in result.stderr and out.exists()


def test_going_on_says_so(tmp_path: Path, source: Path, text: Path) -> None:
    out = tmp_path / "m.gguf"
    command = ("quantize", source, "-o", out, "--calibration", text, "--plain-mix")
    for restart in (False, True):
        with terminal(*command, before=HELD) as screen:
            screen.wait_for("layer 2 of 3")
            screen.process.send_signal(signal.SIGKILL)
            screen.process.wait()
        result = dsv2(*command, "--force", *(["--restart"] if restart else []))
        assert result.returncode == 0
        assert ("continuing at layer 2 of 3" in result.stderr) != restart
        out.unlink()
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf.report.json"]


@pytest.mark.parametrize(("layer", "shown"), [
    (6, ("layer 7 of 27", ["encoding", "1 min 40 s left (layer 7.00 s)", "2.0 M weights/s", "1.00 MB/s"])),
    (-1, ("all layers", ["encoding", "1 min 40 s left", "2.0 M weights/s", "1.00 MB/s"])),
])  # fmt: skip
def test_pace(layer: int, shown: tuple[str, list[str]]) -> None:
    step = Progress("encode", layer, 27, 0.5, 50, 100, 200, 9.0, 100.0, 7.0, 2e6)
    assert (where(step), pace(step)) == shown


def test_pace_before_there_is_one() -> None:
    assert pace(Progress("read", -1, 27, 0.0, 0, 0, 200, 0.0, float("inf"), float("inf"), 0.0)) == ["reading"]
    assert console.format_seconds(7) == "7.00 s"


@pytest.mark.parametrize(
    ("options", "status", "said"),
    [
        (["--bpw", "four"], 2, ["--bpw", "`four` is not a number"]),
        (["--bpw", "nan"], 2, ["`nan` is not a number"]),
        (["--bpw", "4", "--size", "1G"], 2, ["--bpw and --size both say how small"]),
        (["--type", "q2_k", "--bpw", "4"], 2, ["--type and --bpw both say how small"]),
        (["--plain-mix", "--size", "1G"], 2, ["--plain-mix has the size of its --type"]),
        (["--size", "9,5G"], 2, ["`9,5G` is not a size", "9.5GiB"]),
        (["--bpw", "0"], 2, ["bits a weight are 0.0"]),
        (["--bpw", "1.5"], 1, ["--bpw 1.5: the smallest types take", "bits a weight"]),
        (["--size", "900G"], 1, ["16 bits for every weight take only", "--type bf16"]),
    ],
)
def test_budgets_that_cannot_be(
    tmp_path: Path, source: Path, text: Path, options: list[str], status: int, said: list[str]
) -> None:
    assert_fails(dsv2("quantize", source, "-o", tmp_path / "m.gguf", "--calibration", text, *options), status, *said)
    assert not list(tmp_path.iterdir())


def test_a_budget_in_bits(tmp_path: Path, source: Path, text: Path) -> None:
    assert default_name(str(source), source, bpw_name("6.5")) == "Tiny-Model-6.5BPW.gguf"
    options = ("--bpw", "6.5", "--calibration", text, "--no-awq", "--no-evaluate", "--json")
    report = json.loads(dsv2("quantize", source, "-o", tmp_path / "m.gguf", *options).stdout)
    assert report["type"] == "6.5 bpw"
    assert 8 * sum(role["nbytes"] for role in report["roles"]) <= 6.5 * report["n_values"]
