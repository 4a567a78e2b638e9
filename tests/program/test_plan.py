"""dsv2 plan: what headers tell of a model that is not here, against truth reckoned by hand, and hubs that lie."""

from __future__ import annotations

import csv
import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from support import gguf_bytes as gb
from support import published
from support.cli import assert_fails, dsv2, dsv2_after, environment
from support.hub import Hub
from support.inprocess import run
from support.page_cache import read_in_small_pages
from support.tiny import spec_named, variant
from support.vocab import write_model

import cext
from cext import Gguf, system
from cext.tokenizer import Tokenizer
from dsv2cli import anatomy, benchmark
from dsv2cli.commands.plan import check_lines
from dsv2cli.hub import cache
from dsv2cli.planner import paging, probe, quality, subject, trial, warning
from dsv2cli.planner.forecast import forecast, longest_context
from dsv2cli.planner.hollow import PROMPT, Small, Work
from dsv2cli.planner.probe import Rates
from quantize import recipe
from quantize.source.arch import parse
from quantize.source.tensors import model_tensors
from quantize.write.writer import write_hollow

QUALITY = Path(__file__).parents[1] / "bench" / "bench_quality.csv"

# repository: bytes a token by hand (n_layer x (kv_lora_rank + rope) x 2) and our scales (4 a layer), weights in all,
# and of these what a token multiplies: layers, chosen experts alone, without embeddings and head.
TRUTH = {
    "deepseek-ai/DeepSeek-V2-Lite": (31_104, 27 * 4, 15_706_484_224),
    "deepseek-ai/DeepSeek-V2": (69_120, 60 * 4, 235_741_434_880),
    "deepseek-ai/DeepSeek-V3": (70_272, 61 * 4, 671_026_419_200),
    "moonshotai/Moonlight-16B-A3B-Instruct": (27 * 576 * 2, 27 * 4, 15_960_110_208),
    "zai-org/GLM-4.7-Flash": (47 * 576 * 2, 47 * 4, 29_943_393_920),
}
STILL = ("plan", "--no-speed", "--json")
FAST = Rates(4, "avx2", 40e9, 500e9, 1e-8, 0.05, 1.0, 100 << 20)


def planned(env: dict[str, str], *args: str) -> dict[str, Any]:
    result = dsv2(*STILL, *args, **env)
    assert result.returncode == 0, result.stderr
    made: dict[str, Any] = json.loads(result.stdout)
    return made


def by_hand(c: dict[str, Any]) -> int:
    """Weights of a published configuration, part by part."""
    d, h, kv = c["hidden_size"], c["num_attention_heads"], c["kv_lora_rank"]
    nope, rope, v = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]
    rank = c["q_lora_rank"]
    queries = d * rank + rank + rank * h * (nope + rope) if rank else d * h * (nope + rope)
    attention = queries + d * (kv + rope) + kv + kv * h * (nope + v) + h * v * d + 2 * d
    expert, n = 3 * d * c["moe_intermediate_size"], c["n_routed_experts"]
    bias = n if c["topk_method"] == "noaux_tc" else 0
    sparse = attention + n * expert + c["n_shared_experts"] * expert + d * n + bias
    dense = attention + 3 * d * c["intermediate_size"]
    k, n_layer = c["first_k_dense_replace"], c["num_hidden_layers"]
    return 2 * c["vocab_size"] * d + d + k * dense + (n_layer - k) * sparse


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("repo", TRUTH)
def test_published_models_against_truth_by_hand(hub: Hub, env: dict[str, str], repo: str, ranges: bool) -> None:
    cache, scales, n_values = TRUTH[repo]
    assert by_hand(published.CONFIGS[repo]) == n_values
    published.add(hub, repo, 2 * n_values)
    hub.ignore_ranges = not ranges
    made = planned({**env, "HF_TOKEN": "hf_secret"}, repo)
    assert made["memory"]["cache_bytes_per_token"]["f16"] == cache + scales
    assert made["memory"]["cache_bytes_per_token"]["f32"] == 2 * cache
    assert made["memory"]["cache"] == 4096 * (cache + scales)
    listed = 2 * n_values + len(published.shard(2 * n_values))
    assert made["steps"][0]["fetch_bytes"] == listed + len(json.dumps(published.CONFIGS[repo]))
    bf16 = next(r for r in made["ladder"] if r["type"] == "bf16")
    # Norms and routers are float32 there; a vocabulary comes on top, which no header of the checkpoint tells.
    assert bf16["bytes"] == pytest.approx(2 * n_values, rel=0.002)
    assert made["bytes_looked_at"] < 0.01 * made["bytes_there"]
    asked = [r for r in hub.requests if r.authorization]
    assert asked and not [r for r in asked if r.path.startswith("/cdn/")]
    assert [r for r in hub.requests if r.path.startswith("/cdn/")]  # the shard's header came from there


def test_the_mix_of_v2_lite_has_the_size_that_its_file_has(hub: Hub, env: dict[str, str]) -> None:
    """llama.cpp's Q4_K_M of V2-Lite's shape takes 10.36 GB; dsv2 bench reads 1.61 GB a token of it."""
    published.add(hub, "deepseek-ai/DeepSeek-V2-Lite", 31_412_968_448)
    made = planned(env, "lite", "--type", "q4_k_m")
    assert made["memory"]["weights"] == pytest.approx(10.36e9, rel=0.01)
    assert made["read_per_token"]["weights"] == pytest.approx(1.61e9, rel=0.01)


def test_what_a_type_loses_is_told_as_it_was_measured(hub: Hub, env: dict[str, str]) -> None:
    """And by its model's name; of types and files that were not measured nothing is told."""
    rows = csv.DictReader(QUALITY.read_text(encoding="utf-8").splitlines())
    measured = {r["type"]: float(r["kld"]) for r in rows if (r["model"], r["variant"]) == (quality.MODEL, "all")}
    assert measured == quality.KLD
    published.add(hub, "deepseek-ai/DeepSeek-V2-Lite", 31_412_968_448)
    ladder = {r["type"]: r for r in planned(env, "lite")["ladder"]}
    assert {name: r["kld"] for name, r in ladder.items() if r["kld"] is not None} == measured
    assert {r["kld_of"] for r in ladder.values()} == {quality.MODEL, None} and ladder["q6_k"]["kld"] is None
    shown = dsv2("plan", "--no-speed", "lite", **env).stdout
    assert f"KLD of {quality.MODEL}" in shown and "0.109" in shown


def test_a_size_is_what_the_file_will_have(hub: Hub, env: dict[str, str]) -> None:
    published.add(hub, "deepseek-ai/DeepSeek-V2-Lite", 31_412_968_448)
    made = planned(env, "lite", "--size", "9.5G")
    step = made["steps"][1]
    assert step["step"] == "quantise" and step["disk_bytes"] == pytest.approx(9.5e9, rel=1e-6)
    assert sum(made["memory"]["parts"].values()) == pytest.approx(made["memory"]["weights"], rel=1e-6)
    assert_fails(dsv2(*STILL, "lite", "--size", "1G", **env), 1, "--size 1G", "smallest types")
    assert_fails(dsv2(*STILL, "lite", "--size", "100G", **env), 1, "16 bits")


def test_context_kv_and_ram_change_what_they_name(hub: Hub, env: dict[str, str]) -> None:
    published.add(hub, "deepseek-ai/DeepSeek-V2-Lite", 31_412_968_448)
    made = planned(env, "lite", "--ctx", "0", "--kv", "q8_0", "--ram", "6G")
    assert made["memory"]["context"] == 163_840 and made["memory"]["cache"] == 163_840 * 17_604
    drive = made["drive"]
    routed = made["memory"]["parts"]["routed experts"]
    always = made["memory"]["weights"] - routed
    assert drive["runs"] and drive["held"] == pytest.approx((6e9 - always) / routed, rel=0.02)
    token = made["read_per_token"]["parts"]["routed experts"]
    assert drive["read_per_token"] == pytest.approx(token * (1 - drive["held"]), rel=0.01)
    memory = made["memory"]
    beside = memory["cache"] + memory["scratch"] + memory["program"]
    assert drive["long_step"] > 0 and drive["total"] == drive["ram"] + drive["long_step"] + beside
    shown = dsv2("plan", "--no-speed", "lite", "--ram", "6G", **env).stdout
    assert re.search(r"longer steps then, at most +\d", shown) and "weights held" in shown
    assert "longer steps" not in dsv2("plan", "--no-speed", "lite", "--ram", "500M", **env).stdout
    assert not planned(env, "lite", "--ram", "500M")["drive"]["runs"]
    assert planned(env, "lite", "--ram", "900G")["drive"] is None


def test_what_cannot_be_quantised_is_not_planned_for(env: dict[str, str]) -> None:
    """The packaged model is quantised already."""
    from dsv2cli import locate  # noqa: PLC0415

    packaged = str(locate.model(None))
    refused = dsv2("quantize", packaged, "-o", "/dev/null/x.gguf", "--type", "q2_k", **env)
    planned_for = dsv2(*STILL, packaged, "--type", "q2_k", **env)
    assert refused.returncode and planned_for.returncode and planned_for.stdout == ""
    assert "tensor" in planned_for.stderr or "quantised" in planned_for.stderr, planned_for.stderr


@pytest.mark.parametrize(("free", "told"), [(1 << 20, True), (1 << 50, False)])
def test_a_download_that_will_not_fit_is_warned_of(
    hub: Hub, env: dict[str, str], model: Path, free: int, told: bool
) -> None:
    hub.add("owner/name", {"M-F32.gguf": model.read_bytes()})
    script = f"import cext.system; cext.system.free_bytes = lambda *a, **k: {free}"
    result = dsv2_after(script, "download", "owner/name", **env)
    assert result.returncode == 0 and ("dsv2 plan tells" in result.stderr) is told, result.stderr
    assert result.stderr.count("warning:") == told


def test_a_checkpoint_that_will_not_fit_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(published.CONFIGS["deepseek-ai/DeepSeek-V3"]), encoding="utf-8")
    monkeypatch.setattr(system, "free_bytes", lambda *a, **k: 10**9)
    monkeypatch.setattr(cache, "free_bytes", lambda path: 10**15)
    assert "404.49 GB of memory" in str(warning.of_checkpoint(config, "q4_k_m", tmp_path))
    monkeypatch.setattr(cache, "free_bytes", lambda path: 10**11)
    assert "of the disk" in str(warning.of_checkpoint(config, "q4_k_m", tmp_path))
    monkeypatch.setattr(cache, "free_bytes", lambda path: 10**15)
    monkeypatch.setattr(system, "free_bytes", lambda *a, **k: None)
    assert warning.of_checkpoint(config, "q4_k_m", tmp_path) is None
    config.write_text("[", encoding="utf-8")
    assert warning.of_checkpoint(config, "q4_k_m", tmp_path) is None  # others say what is wrong with it


# GGUFs on the hub.


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("plan") / "M-F32.gguf", variant(spec_named("lite"), n_ctx=4096))


@pytest.mark.parametrize("ranges", [True, False])
def test_a_remote_gguf_is_studied_as_if_it_were_here(hub: Hub, env: dict[str, str], model: Path, ranges: bool) -> None:
    hub.ignore_ranges = not ranges
    data = model.read_bytes()
    hub.add("owner/name", {"M-F32.gguf": data, "M-Q8_0.gguf": data[:100_000]})
    far, near = planned(env, "owner/name:F32"), planned(env, str(model))
    for key in ("memory", "read_per_token", "architecture", "engine", "longest_context"):
        mine, theirs = far[key], near[key]
        if key == "memory":
            mine, theirs = ({k: v for k, v in m.items() if k not in ("free", "fits")} for m in (mine, theirs))
        if key != "longest_context":
            assert mine == theirs, key
    assert far["steps"][0]["fetch_bytes"] == len(data)
    assert {r["type"]: r["bytes"] for r in far["ladder"]} == {"F32": len(data), "Q8_0": 100_000}
    if ranges:
        assert all(r.range for r in hub.downloads("M-F32.gguf"))


def test_what_is_fetched_already_is_not_to_be_fetched(hub: Hub, env: dict[str, str], model: Path) -> None:
    hub.add("owner/name", {"M-F32.gguf": model.read_bytes()})
    assert dsv2("download", "owner/name", "-q", **env).returncode == 0
    hub.requests.clear()
    made = planned(env, "owner/name")
    assert made["steps"][0]["fetch_bytes"] == 0 and made["bytes_looked_at"] == 0
    assert not hub.downloads("M-F32.gguf")
    offline = planned({**env, "HF_HUB_OFFLINE": "1"}, "owner/name")
    assert offline["memory"]["weights"] == made["memory"]["weights"]


# Hubs that lie.


@pytest.mark.parametrize(
    ("listed", "words"),
    [
        (10, ["lists 10 bytes"]),
        (200_000, ["lists 200000 bytes"]),
        (20_000_000_000, ["owner/name"]),
        (1 << 50, ["1125899906842624 bytes"]),
        (0, ["0 bytes"]),
    ],
)
def test_a_hub_that_lies_about_a_gguf_is_found_out(
    hub: Hub, env: dict[str, str], model: Path, listed: int, words: list[str]
) -> None:
    hub.add("owner/name", {"M-F32.gguf": model.read_bytes()})
    hub.listed_size["M-F32.gguf"] = listed
    result = dsv2(*STILL, "owner/name", **env)
    assert_fails(result, 1, *words)
    assert "dsv2-plan-" not in result.stderr  # our own folder is nobody's business


@pytest.mark.parametrize("by", [-5_000_000_000, 5_000_000_000])
def test_a_hub_that_lies_about_a_shard_is_found_out(hub: Hub, env: dict[str, str], by: int) -> None:
    published.add(hub, "deepseek-ai/DeepSeek-V2-Lite", 31_412_968_448)
    hub.listed_size[published.SHARD] += by
    assert_fails(dsv2(*STILL, "lite", **env), 1, published.SHARD)


def test_a_header_of_a_terabyte_is_not_waited_for(hub: Hub, env: dict[str, str]) -> None:
    published.add(hub, "deepseek-ai/DeepSeek-V2-Lite", 31_412_968_448)
    files = hub.repos["deepseek-ai/DeepSeek-V2-Lite"].revisions["main"]
    files[published.SHARD] = (1 << 40).to_bytes(8, "little") + bytes(200)
    assert_fails(dsv2(*STILL, "lite", **env), 1, "header length 1099511627776")


def test_a_config_longer_or_shorter_than_listed_is_refused(hub: Hub, env: dict[str, str]) -> None:
    published.add(hub, "deepseek-ai/DeepSeek-V2-Lite", 31_412_968_448)
    hub.listed_size["config.json"] = 40
    assert_fails(dsv2(*STILL, "lite", **env), 1, "config.json")
    hub.listed_size["config.json"] = 4000
    assert_fails(dsv2(*STILL, "lite", **env), 1, "config.json")


def test_weights_of_another_model_are_remarked(hub: Hub, env: dict[str, str]) -> None:
    published.add(hub, "deepseek-ai/DeepSeek-V3", 31_412_968_448)
    made = planned(env, "v3")
    assert any("another model" in remark for remark in made["remarks"])


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["no-such"], 2, ["no-such"]),
        (["lite", "--type", "q4_k_m", "--size", "9G"], 2, ["--type and --size"]),
        (["lite", "--check"], 2, ["--check"]),
        (["lite", "--type", "q9_z"], 2, ["q9_z", "q4_k_m"]),
        (["--ram", "much"], 2, ["--ram"]),
    ],
)
def test_what_cannot_be_planned(hub: Hub, env: dict[str, str], args: list[str], code: int, words: list[str]) -> None:
    published.add(hub, "deepseek-ai/DeepSeek-V2-Lite", 31_412_968_448)
    args = ["plan", *args] if "--check" in args else [*STILL, *args]
    assert_fails(dsv2(*args, **env), code, *words)


def test_what_llama_cpp_runs_has_memory_and_no_speed(hub: Hub, env: dict[str, str]) -> None:
    kvs = [
        gb.kv("general.architecture", gb.STRING, "llama"),
        gb.kv("llama.block_count", gb.U32, 2),
        gb.kv("llama.attention.head_count", gb.U32, 4),
        gb.kv("llama.attention.head_count_kv", gb.U32, 2),
        gb.kv("llama.embedding_length", gb.U32, 256),
    ]
    tensors, nbytes = gb.place([gb.Tensor("token_embd.weight", (256, 64), 8), gb.Tensor("output.weight", (256, 64), 8)])
    hub.add("owner/name", {"M-Q8_0.gguf": gb.gguf(kvs, tensors, bytes(nbytes))})
    result = dsv2("plan", "--json", "owner/name", **env)
    assert result.returncode == 0, result.stderr
    made = json.loads(result.stdout)
    assert made["engine"] == "llama.cpp" and made["decode"] == [] and "llama.cpp" in made["why_no_speed"]
    assert made["memory"]["cache_bytes_per_token"]["f16"] == 2 * 2 * 2 * 64 * 2


# Measuring, and the arithmetic.


def test_a_probe_is_the_model_in_small() -> None:
    """The packaged model is small enough to be run whole: nothing is left to scale."""
    with subject.opened(subject.Asked(None)) as found, Gguf(found.found.path) as gguf:
        small = Small(list(gguf.tensors), found.found)
        part = small.all.work
        assert part.n_layer == small.whole.n_layer and part.layer_products == small.whole.layer_products


def test_a_machine_is_measured(model: Path) -> None:
    found = anatomy.study(model)
    rates = probe.measure(found, "f16", 1, None)
    assert isinstance(rates, Rates), rates
    assert rates.threads == 1 and rates.bandwidth > 0 and rates.products > 0 and rates.attention >= 0
    assert probe.measure(found, "f16", 1, 1000) == "too little memory is free to measure in"


def test_a_small_tmpfs_is_not_measured_in(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hole's pages are allotted as they are read: past its end that is SIGBUS."""
    monkeypatch.setattr(system, "free_disk", lambda folder: 1 << 20)
    rates = probe.measure(anatomy.study(model), "f16", 1, None)
    assert isinstance(rates, str) and "TMPDIR" in rates


def test_swap_is_not_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "free_bytes", lambda *a, swap=True, **k: 10**15 if swap else 10**9)
    assert "1.00 GB are free" in str(warning.of_weights("it", 2 * 10**9))
    ran = run("plan", "--json", "--no-speed")
    assert ran.code == 0 and json.loads(ran.out)["memory"]["free"] == 10**9, ran.out


def test_speeds_follow_the_figures(model: Path) -> None:
    with subject.opened(subject.Asked(str(model))) as found:
        made = forecast(found, free=10**12, rates=FAST)
        token = found.found.token_bytes
        assert made.decode[0].rate == pytest.approx(FAST.bandwidth / token)
        assert made.decode[0].low < made.decode[0].rate < made.decode[0].high
        assert [s.depth for s in made.decode] == [0]  # trained for 4096: no more is promised
        assert made.memory.scratch == FAST.scratch
        assert made.memory.total == token_total(made)


def token_total(made: Any) -> int:
    m = made.memory
    return int(m.weights + m.cache + m.scratch + m.program)


@pytest.mark.parametrize("missing", [1, 10_000_000])
def test_the_longest_context_is_the_longest(model: Path, missing: int) -> None:
    with subject.opened(subject.Asked(str(model))) as found:
        whole = forecast(found, n_ctx=4096, free=10**12, rates="no").memory
        free = whole.total - whole.cache + found.found.kv_bytes["f16"] * 1000
        made = forecast(found, n_ctx=4096, free=free, rates="no")
        assert made.longest == 768  # 1000, in steps of 256
        assert not made.memory.fits
        none = forecast(found, n_ctx=4096, free=whole.total - whole.cache - missing, rates="no")
        assert longest_context(found.found, none.memory, "f16") == 0 and none.advice


def test_the_advice_is_one_that_helps(hub: Hub, env: dict[str, str]) -> None:
    published.add(hub, "deepseek-ai/DeepSeek-V2-Lite", 31_412_968_448)
    asked = planned(env, "lite", "--ctx", "163840")
    fixed = asked["memory"]["total"] - asked["memory"]["cache"]
    code = (
        "import sys, json\n"
        "from dsv2cli.planner import subject\nfrom dsv2cli.planner.forecast import forecast\n"
        "with subject.opened(subject.Asked('lite')) as s:\n"
        "    print(json.dumps([forecast(s, n_ctx=int(c), free=int(f)).advice for c, f in json.loads(sys.argv[1])]))"
    )
    cases = [
        [163840, fixed + 17_604 * 163840],  # q8_0 fits exactly
        [163840, fixed + 31_212 * 100_000 // 2],  # neither: a shorter one
        [4096, 9_000_000_000],  # a smaller type
        [4096, 1_000_000],
    ]
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, json.dumps(cases)],
        env=environment(**env), capture_output=True, text=True, check=True,
    )  # fmt: skip
    told = json.loads(done.stdout)
    assert "--kv q8_0" in told[0] and "--ctx " in told[1] and "--type q3_k_m" in told[2] and "more memory" in told[3]


def test_what_runs_from_the_drive_fits_with_its_longer_steps(hub: Hub, env: dict[str, str]) -> None:
    """The engine then reads prompts in longer steps: what is free holds them too."""
    published.add(hub, "deepseek-ai/DeepSeek-V2-Lite", 31_412_968_448)
    code = (
        "import sys, json\n"
        "from dsv2cli.planner import subject\nfrom dsv2cli.planner.forecast import forecast\n"
        "with subject.opened(subject.Asked('lite')) as s:\n"
        "    drives = [forecast(s, free=int(free)).drive for free in json.loads(sys.argv[1])]\n"
        "    print(json.dumps([d and [d.runs, d.long_step, d.total] for d in drives]))"
    )
    free = [4_000_000_000, 9_000_000_000, 20_000_000_000]
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, json.dumps(free)],
        env=environment(**env), capture_output=True, text=True, check=True,
    )  # fmt: skip
    *within, all_fits = json.loads(done.stdout)
    assert all_fits is None
    for most, (runs, long_step, total) in zip(free, within, strict=False):
        assert runs and long_step > 0 and 0.8 * most < total <= most


# What was measured, scaled to the model.


class Mixed:
    """Three dense layers, a model's other six with experts; of these the first of each and another were run."""

    def __init__(self, n_prompt: int) -> None:
        self.chosen, self.like_first, self.like_others, self.begins_dense = (
            [0, 3, 5],
            [0, 1, 2],
            [3, 4, 5, 6, 7, 8],
            True,
        )
        self.first, self.n_prompt = object(), n_prompt
        self.whole = self.part(range(9))

    def part(self, layers: Iterable[int]) -> Work:
        dense, sparse = sum(il < 3 for il in layers), sum(il >= 3 for il in layers)
        bytes_, fixed, routed = dense * 100 + sparse * 50, dense * 1000 + sparse * 500, sparse * 2000
        return Work(bytes_, fixed + routed, fixed, 0, len(list(layers)))


def of_layers(dense: float, sparse: float, prompt: tuple[float, float, float], longer: float = 1.0) -> probe.Times:
    """What layers of such seconds would be measured to take: a dense one, one with experts, the last."""
    first, between, last = prompt
    return probe.Times(dense, dense + 2 * sparse, 0.0, probe.Prompt(first, between, last), first * longer)


@pytest.mark.parametrize(("dense", "sparse"), [(1.0, 1.0), (0.1, 2.0), (3.0, 0.5)])
def test_each_kind_of_layer_is_scaled_by_itself(dense: float, sparse: float) -> None:
    """A model has few dense layers, and the probe one of three: products alone would foretell the wrong mixture. The
    last, which computes little of a prompt, is the last of the model's too, and stands for no other."""
    small, times = Mixed(512), of_layers(dense, sparse, (dense, sparse, 0.25))
    assert probe.step_of_whole(cast("Small", small), times) == pytest.approx(3 * dense + 6 * sparse)
    assert probe.prompt_of_whole(cast("Small", small), times) == pytest.approx(3 * dense + 5 * sparse + 0.25)


def test_a_shorter_prompt_of_fewer_experts_is_scaled_up() -> None:
    """Of 128 tokens: experts take four times as long, there being four times as many of them; the rest of the layer as
    much longer as the dense layer was measured to take."""
    dense, experts, longer = 1.0, 2.0, 3.0
    fixed = 0.5  # of half the dense layer's products
    times = of_layers(dense, 1.0, (dense, fixed + experts, 0.25), longer)
    foretold = probe.prompt_of_whole(cast("Small", Mixed(128)), times)
    assert foretold == pytest.approx(3 * dense * longer + 5 * (experts * 4 + fixed * longer) + 0.25)


@pytest.mark.parametrize("repo", TRUTH)
def test_of_what_is_run_a_layer_with_experts_is_computed_whole(repo: str, tmp_path: Path) -> None:
    """The last is not, of a prompt."""
    arch = parse(published.CONFIGS[repo])
    tensors = model_tensors(arch)
    path, mix = tmp_path / "hollow.gguf", recipe.find("q4_k_m")
    keys: dict[str, object] = {"general.architecture": arch.family.architecture, **arch.keys()}
    write_hollow(path, keys, [(t.name, t.shape, recipe.type_of(mix, arch, t, weighted=False)) for t in tensors])
    with Gguf(path) as gguf:
        small = Small(list(gguf.tensors), anatomy.study(path), None)
    assert any(il >= small.n_dense for il in small.chosen[1:-1]) and small.like_others[-1] == arch.n_layer - 1


def test_the_context_is_as_long_as_memory_lets_it_be() -> None:
    """Attention that is not latent takes 25 times as much for a token."""
    assert probe.depth_of(3_468, probe.CACHE_BYTES) == probe.DEPTH
    for token_bytes, most in ((25_000, probe.CACHE_BYTES), (8_000, 100 << 20)):
        depth = probe.depth_of(token_bytes, most)
        assert probe.LEAST_DEPTH < depth < probe.DEPTH and depth * token_bytes <= most < 2 * depth * token_bytes
    assert probe.depth_of(10**9, 1) == probe.LEAST_DEPTH


def test_a_context_that_does_not_fit_is_not_measured_in(model: Path) -> None:
    found = anatomy.study(model)
    wide = replace(found, kv_bytes={"f16": 10**6})
    assert isinstance(probe.measure(found, "f16", 1, 1 << 30), Rates)
    assert probe.measure(wide, "f16", 1, 1 << 30) == "too little memory is free to measure in"


# Pages.


def test_pages_of_a_file_are_told_and_not_read(tmp_path: Path) -> None:
    """Reading what is looked at would make of a cold file one that lies in small pages."""
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.truncate(8 * system.HUGE_PAGE)
    before = system.cached_pages(path)
    if before is None or before[0]:
        pytest.skip("the system does not tell")
    assert system.cached_pages(path) == (0.0, 0.0)
    read_in_small_pages(path)
    held, huge = system.cached_pages(path) or (0.0, 0.0)
    assert huge == 0 and held in (0.0, 1.0)  # tmpfs holds nothing for a hole


def test_a_file_smaller_than_a_huge_page_has_none(tmp_path: Path) -> None:
    (tmp_path / "small").write_bytes(bytes(1000))
    assert system.cached_pages(tmp_path / "small") is None


@pytest.mark.parametrize(
    ("of_model", "of_probe", "small"),
    [
        ((1.0, 0.25), (1.0, 0.9), 0.75),
        ((1.0, 0.25), (1.0, 0.1), None),  # the probe's lies as the model does
        ((0.5, 0.0), (1.0, 1.0), None),  # half of it would come from the drive
        ((1.0, 0.98), (0.7, 0.7), None),
        (None, (1.0, 1.0), None),
        ((1.0, 0.0), None, None),
        ((1.0, 0.0), (0.0, 0.0), None),
    ],
)
def test_a_file_is_read_where_its_pages_are_not_the_probes(
    monkeypatch: pytest.MonkeyPatch,
    of_model: tuple[float, float] | None,
    of_probe: tuple[float, float] | None,
    small: float | None,
) -> None:
    monkeypatch.setattr(system, "cached_pages", lambda path: of_model if path == Path("model") else of_probe)
    pages = paging.cached(Path("model"), Path("probe"))
    assert (pages.small if pages is not None and pages.matters else None) == small


@pytest.mark.parametrize(("own", "expected"), [(3.0, 1.5), (1.0, 1.0)])
def test_small_pages_are_measured_and_their_remedy_is_told(
    model: Path, monkeypatch: pytest.MonkeyPatch, own: float, expected: float
) -> None:
    """In turns with the probe's file, by bytes; what is faster by chance is none of their doing."""
    paces = itertools.cycle([2.0, own])
    monkeypatch.setattr(paging, "cached", lambda *_: paging.Cached(1.0, 0.75))
    monkeypatch.setattr(paging, "decode_seconds", lambda session, ids: next(paces))
    rates = probe.measure(anatomy.study(model), "f16", 1, None)
    assert isinstance(rates, Rates) and (rates.slowed, rates.small_pages) == (pytest.approx(expected, rel=0.01), 0.75)
    with subject.opened(subject.Asked(str(model))) as asked:
        advice = forecast(asked, free=10**12, rates=rates).advice
    assert ("75% of the file" in advice and "1.50 times as fast" in advice and str(model) in advice) is (expected > 1)


def test_decoding_from_the_file_itself_is_timed(model: Path) -> None:
    with cext.Model(model, 1) as opened:
        assert paging.slowdown(model, 10**9, opened, 1) == 1.0  # of bytes that cost nothing
        assert paging.slowdown(model, 1, opened, 10**9) > 1e6


def compared(predicted: tuple[float, ...], measured: tuple[float, ...]) -> trial.Compared:
    return trial.Compared("decode at 0", predicted, measured, 0.15)


def test_a_verdict_is_of_rounds_and_not_of_medians() -> None:
    """A machine that is twice as slow for a while is so for both."""
    drifting = compared((10.0, 5.0, 10.0), (10.5, 5.2, 9.8))
    assert drifting.holds and drifting.spread == pytest.approx(5.3 / 9.8)
    swapped = compared((10.0, 5.0, 7.5), (5.0, 10.0, 5.0))  # like medians, unlike rounds
    assert not swapped.holds and swapped.error == pytest.approx(0.5)


def test_a_check_measures_machine_and_model_in_turns(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    paces = iter([40e9, 10e9, 40e9])

    def measured(*_: object) -> Rates:
        order.append("machine")
        return replace(FAST, bandwidth=next(paces))

    rate = benchmark.Contender.rate
    monkeypatch.setattr(probe, "measure", measured)
    monkeypatch.setattr(trial, "_memory", lambda *_: trial.Compared("memory", (1.0,), (1.0,), 0.05))
    monkeypatch.setattr(
        benchmark.Contender, "rate", lambda self, test, variant: order.append(test.kind) or rate(self, test, variant)
    )
    with subject.opened(subject.Asked(str(model))) as found:
        made = forecast(found, free=10**12, rates=FAST)
        rows = trial.run(made, 1, 2, lambda what, done, n: None)
    assert [what for what, _ in itertools.groupby(order)] == ["prefill", "decode", "machine"] * 3
    token = found.found.token_bytes
    assert [row.name for row in rows] == [f"prefill {PROMPT}", "decode at 0", "memory"]
    assert rows[1].predicted == pytest.approx((20e9 / token, 20e9 / token))  # between the two beside it
    assert len(rows[1].measured) == 2 and all(n > 0 for n in rows[1].measured)


@pytest.mark.parametrize(
    ("seconds", "n", "found"),
    [((0.9, 0.1), 1, 0.9), ((0.3, 0.1, 0.2, 0.1), 3, 0.2), ((0.01, 0.05, 0.02, 0.03, 0.04, 9.0), 5, 0.03)],
)
def test_what_is_short_is_run_several_times_in_a_round(seconds: tuple[float, ...], n: int, found: float) -> None:
    left = list(seconds)

    class Runs:
        def rate(self, test: benchmark.Test, variant: str) -> float:
            return test.n / left.pop(0)

    rate = trial._rate(cast("benchmark.Contender", Runs()), benchmark.Test("decode", 24), "kv=f16")
    assert rate == pytest.approx(24 / found) and len(seconds) - len(left) == n


def test_drift_is_told_from_a_wrong_forecast() -> None:
    """One round beside a machine that is half as fast afterwards tells nothing of a forecast; a steady one does."""
    steady = replace(compared((14.0,), (10.0,)), steps=(0.02,))
    drifted = replace(compared((14.0,), (10.0,)), steps=(0.9,))
    assert (steady.verdict, drifted.verdict) == ("fails", "unsettled")
    assert replace(compared((10.5,), (10.0,)), steps=(0.9,)).verdict == "holds"
    told = dict(check_lines([steady, drifted]))
    assert "90%" in told["drift"] and "0 of 2 forecasts hold, 1 cannot be told" in told["verdict"]


def test_a_check_without_a_forecast_ends_before_anything_is_run(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "measure", lambda *_: "too little memory is free to measure in")
    monkeypatch.setattr(trial, "run", lambda *_: pytest.fail("the model was run"))
    ran = run("plan", str(model), "--check")
    assert ran.code == 1 and b"too little memory" in ran.err and b"--check" in ran.err


@pytest.mark.parametrize("n_ctx", [48, 300, 4096])
def test_the_answer_whose_memory_is_checked_fits_the_context(tmp_path: Path, n_ctx: int) -> None:
    """Text and answer, of a vocabulary whose tokens are letters too."""
    path = write_model(tmp_path / "m.gguf", variant(spec_named("lite"), n_ctx=n_ctx))
    with subject.opened(subject.Asked(str(path))) as found:
        made = forecast(found, n_ctx=n_ctx, free=10**12, rates=FAST)
        row = trial._memory(made, 1)
    assert row.name == "memory" and row.measured[0] > 1e6


def test_of_the_embeddings_pages_are_touched_and_not_rows(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row brings in the page around it: in huge pages most of them at once."""
    found = anatomy.study(model)
    with Gguf(model) as gguf:
        rows = next(t for t in gguf.tensors if t.name == "token_embd.weight")
    with Tokenizer(model) as tokenizer:
        n = len(set(tokenizer.prompt("a fox and a fox")))
    row = rows.nbytes // rows.shape[-1]
    assert 1 < n < rows.shape[-1] / 4
    monkeypatch.setattr(trial, "AROUND", row)
    for pages, least, most in (((1.0, 1.0), 0, 0), ((1.0, 0.2), 2 * n, n), (None, 2 * n, n)):
        monkeypatch.setattr(trial, "cached_pages", lambda path, pages=pages: pages)
        left = trial._untouched(found, "a fox and a fox")
        assert (rows.nbytes - least * row if least else 0) <= left <= (rows.nbytes - most * row if most else 0)


def test_a_hollow_file_takes_no_disk(tmp_path: Path, hub: Hub, env: dict[str, str]) -> None:
    """A hole is what makes it possible to plan for 671 billion weights; TMPDIR is left as it was."""
    published.add(hub, "deepseek-ai/DeepSeek-V3", 2 * TRUTH["deepseek-ai/DeepSeek-V3"][2])
    (tmp_path / "tmp").mkdir()
    code = (
        "from dsv2cli.planner import subject\n"
        "with subject.opened(subject.Asked('v3')) as s:\n"
        "    stat = s.found.path.stat()\n"
        "    print(s.found.path, stat.st_size, 512 * stat.st_blocks)"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env=environment(**env, TMPDIR=str(tmp_path / "tmp")), capture_output=True, text=True, check=True,
    )  # fmt: skip
    path, nbytes, taken = done.stdout.split()
    assert Path(path).is_relative_to(tmp_path / "tmp")
    assert int(nbytes) > 3.5e11 and int(taken) < 1 << 20
    assert os.listdir(tmp_path / "tmp") == []  # noqa: PTH208
