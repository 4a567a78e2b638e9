"""--gpu: what each command says and does with a device, a software one where there is no other, and without any."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.cli import assert_fails, dsv2, dsv2_after
from support.gpu import device, number, usable
from support.tiny import SPECS, Spec, spec_named, variant, write_gguf

import cext
from cext import Device, Gguf, Gpu, Model, Place
from dsv2cli import gpu, locate, reading

PACKAGED = locate.model(None)
ASK = ("chat", "-p", "Tell me a story about a ship.", "-n", "4", "--temp", "0")


GONE = "import cext; cext.gpus = lambda: (_ for _ in ()).throw(cext.DeviceError('no Vulkan loader', 'get one'))"
THERE = (
    "import cext, cext.system; cext.system.has_graphics = lambda: True;"
    " card = cext.Gpu({number}, 'A Card', '', '1.3.0', '{kind}', '', 8 << 30, 8 << 30, 32, True, True, '');"
    " cext.gpus = lambda: [card]"
)


READS = "; import dsv2cli.reading as r; r.card_rate = lambda gpu: {card}e9; r.processor_rate = lambda n: 20e9"


def card(**given: Any) -> Gpu:
    told: dict[str, Any] = {
        "number": 0, "name": "A Card", "driver": "", "api": "1.3.0", "kind": "discrete", "missing": "",
        "memory": 8 << 30, "free": 8 << 30, "subgroup": 32, "int_dot": True, "float16": True, "coop": "",
    }  # fmt: skip
    return Gpu(**told | given)


def laid_out(free: int, wish: gpu.Wish | None = None, **more: Any) -> gpu.Layout | None:
    with Gguf(PACKAGED) as gguf, Model(PACKAGED) as model:
        return gpu.lay_out(gguf, model.hparams, card(free=free), wish or gpu.Wish("auto"), cache_bytes=8 << 20, **more)


def longest_steps(shape: Any, n_tok: int = gpu.STEP) -> int:
    """Bytes of the device that is there."""
    told = device()
    return gpu.step_bytes(shape, n_tok, shares=told["kind"] != gpu.TAKEN, memory=told["memory"] if told["coop"] else 0)


def parts(layout: gpu.Layout | None) -> dict[tuple[str, int], int]:
    """Layers by (part, device)."""
    assert layout is not None
    return {(place.part, place.device): len(place.layers) for place in layout.placement}


def test_a_card_is_filled_in_the_order_of_what_a_token_reads() -> None:
    with Model(PACKAGED) as model:
        n, dense, step = model.hparams["n_layer"], model.hparams["n_layer_dense"], gpu.step_bytes(model.hparams)
    everything = parts(laid_out(8 << 30))
    assert everything == {("attention", 1): n, ("feed_forward", 1): n, ("ends", 1): 0}
    budgets = [step + gpu.CACHE_CHUNK + size for size in range(10 << 20, 60 << 20, 1 << 20)]
    seen, held = [], {"never": [-n], "auto": [-n]}  # whether there is room for what prompts have copied, too
    for budget in budgets:
        layout = laid_out(8 << 30, gpu.Wish("auto", budget), steady=True)
        seen.append(found := parts(layout))
        assert layout is not None
        held[layout.device.copies] += [found.get(("feed_forward", 1), 0) - found.get(("experts", 0), 0) - dense]
    assert all(layers == sorted(layers) and len(layers) > 2 for layers in held.values())
    assert held["never"][-1] == n - dense
    assert all(found[("attention", 1)] == n for found in seen if ("feed_forward", 1) in found)
    assert parts(laid_out(8 << 30, with_experts=False))[("experts", 0)] == n - dense
    assert laid_out(step // 2) is None


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_keys_that_are_transposed_are_counted(tmp_path: Path, dtype: Any) -> None:
    """A file with attn_kv_b in one piece takes more of a device than its bytes: the keys' part lies there twice."""
    spec = SPECS[1]
    path = write_gguf(tmp_path / "m.gguf", spec, legacy=True, dtype=dtype)
    with Gguf(path) as gguf, Model(path) as model:
        found = gpu.sizes_of(gguf, model.hparams).attention
        bare = [
            sum(tensor.nbytes for tensor in gguf.tensors if tensor.name.startswith(f"blk.{il}.attn"))
            for il in range(spec.n_layer)
        ]
    keys = spec.n_head * spec.kv_lora_rank * spec.nope * np.dtype(dtype).itemsize
    assert [held - nbytes for held, nbytes in zip(found, bare, strict=True)] == [keys] * spec.n_layer


def test_a_layout_tells_what_lies_where() -> None:
    layout = laid_out(8 << 30)
    assert layout is not None
    assert layout.sentence.startswith("on A Card: attention, dense and shared feed-forward, head, routed experts, ")
    part = laid_out(8 << 30, with_experts=False)
    assert part is not None and part.sentence.endswith("; the rest on the processor")


@pytest.mark.parametrize("where", ["all of it", "a part"])
def test_a_gpu_answers_as_the_processor(where: str) -> None:
    """Of the packaged model, whose likeliest tokens are clear; both arithmetics differ in their last bits."""
    which = number()
    with Model(PACKAGED) as model:
        most = longest_steps(model.hparams) + gpu.CACHE_CHUNK + (33 << 20)
    more = ("--gpu", which) if where == "all of it" else ("--gpu", which, "--vram", str(most))
    placed = dsv2(*ASK, *more, "--json")
    told = json.loads(placed.stdout)
    assert told["answer"] == json.loads(dsv2(*ASK, "--gpu", "off", "--json").stdout)["answer"]
    assert len([line for line in placed.stderr.splitlines() if line.startswith("(on ")]) == 1
    if where == "a part":
        hot = told["gpu"]["experts"]
        assert hot["slots"] > 0 and 0 < hot["held"] <= hot["chosen"] and 0 < hot["held_share"] <= 1
        assert told["gpu"]["bytes"] <= told["gpu"]["most_bytes"] <= most
        assert "of experts that were on the GPU" in dsv2(*ASK, *more).stderr


def test_experts_come_and_go_where_all_do_not_fit() -> None:
    """On the part of a card that is left when what every token needs is there; unless they are to stay."""
    with Model(PACKAGED) as model:
        n, dense, step = model.hparams["n_layer"], model.hparams["n_layer_dense"], gpu.step_bytes(model.hparams)
    hot, copies = [], []
    for size in range(10 << 20, 60 << 20, 1 << 20):
        layout = laid_out(8 << 30, gpu.Wish("auto", step + gpu.CACHE_CHUNK + size))
        found = parts(layout)
        assert layout is not None and layout.device.memory == step + gpu.CACHE_CHUNK + size
        if layout.device.hot:
            assert found == {("attention", 1): n, ("feed_forward", 1): n, ("experts", 0): n - dense, ("ends", 1): 0}
            assert "% of the routed experts, those used most of late, " in layout.sentence
            assert layout.sentence.endswith("; the rest on the processor")
        hot.append(layout.device.hot or 0)
        copies.append(layout.device.copies == "auto")
    grown = [b - a for a, b in pairwise(hot) if a and b]
    assert grown.count(1 << 20) >= len(grown) - 1 and len(grown) > 5
    assert any(copies) and not copies[0] and not (copies[-1] or hot[-1])  # at last all fit
    assert all(a or not b for a, b in zip(copies[copies.index(True) :], hot[copies.index(True) :], strict=True))


TIERS = ("--gpu", "{}", "--ram", "20M", "--json")


def test_experts_from_the_drive_beside_a_gpu() -> None:
    """Three tiers: what every token needs on the device, experts in memory and in the file."""
    placed = dsv2(*ASK, *(word.format(number()) for word in TIERS))
    told = json.loads(placed.stdout)
    assert told["answer"] == json.loads(dsv2(*ASK, "--gpu", "off", "--json").stdout)["answer"]
    assert told["drive"]["ram"] == 20_000_000 and told["drive"]["decoding"]["needed"] > 0
    assert told["gpu"]["experts"] is None and 0 < told["gpu"]["bytes"] <= told["gpu"]["most_bytes"]
    assert "head, " in told["gpu"]["placed"] and "routed experts" not in told["gpu"]["placed"]


def test_a_device_that_holds_experts_spares_the_drive() -> None:
    """Where memory does not hold all weights, and does what is not on the device: the file is mapped."""
    here = json.loads(dsv2("inspect", "--json").stdout)["ram"]
    free = (here["auto"]["beside"] + 22_000_000) * 4 // 3
    scarce = f"import cext.system; cext.system.free_bytes = lambda *root, swap=True: {free}"
    told = json.loads(dsv2_after(scarce, *ASK, "--gpu", number(), "--json").stdout)
    assert told["drive"] is None and "routed experts" in told["gpu"]["placed"]
    asked = json.loads(dsv2_after(scarce, *ASK, "--gpu", number(), "--ram", "20M", "--json").stdout)
    assert asked["drive"]["ram"] == 20_000_000


def test_inspect_tells_what_a_card_would_hold() -> None:
    there = THERE.format(number=0, kind="discrete")
    told = dsv2_after(there, "inspect").stdout
    assert "--gpu 0       on A Card: attention, " in told and "names it alone" not in told
    assert json.loads(dsv2_after(there, "inspect", "--json").stdout)["gpu"][0].startswith("on A Card: ")
    other = json.loads(dsv2_after(THERE.format(number=1, kind="integrated"), "inspect", "--json").stdout)["gpu"]
    assert other[0].endswith("(integrated: used where --gpu 1 names it alone)")
    assert json.loads(dsv2_after(GONE, "inspect", "--json").stdout)["gpu"] == []


def test_doctor_lists_the_devices() -> None:
    findings = json.loads(dsv2("doctor", "--json").stdout)["findings"]
    told = [one["text"] for one in findings if one["name"] == "GPU"]
    assert told
    for there in usable():
        assert any(there["name"] in text for text in told)


@pytest.mark.parametrize("which", ["99", "no such card"])
def test_a_device_that_is_named_and_not_there_is_an_error(which: str) -> None:
    """Whether Vulkan has other devices, or there is no loader at all."""
    found = dsv2(*ASK, "--gpu", which)
    assert found.returncode == 1 and found.stderr.startswith("error: ") and "hint: " in found.stderr
    assert_fails(dsv2_after(GONE, *ASK, "--gpu", which), 1, "no Vulkan loader")


def test_a_device_that_is_named_and_has_no_room_is_an_error() -> None:
    assert_fails(dsv2(*ASK, "--gpu", number(), "--vram", "1M"), 1, "no part of the model fits on ")


def test_without_a_loader_the_processor_computes() -> None:
    expected = dsv2(*ASK, "--gpu", "off")
    found = dsv2_after(GONE, *ASK, "--gpu", "auto")
    assert "no GPU is used: no Vulkan loader (get one)" in found.stderr
    assert found.stdout == expected.stdout
    unasked = dsv2_after(GONE + "; import cext.system; cext.system.has_graphics = lambda: True", *ASK)
    assert unasked.stdout == expected.stdout and "GPU" not in unasked.stderr


def test_where_there_is_no_device_vulkan_is_not_asked() -> None:
    """It takes longer than all else that goes before the first answer."""
    never = "import cext, cext.system; cext.system.has_graphics = lambda: False; cext.gpus = lambda: 1 / 0"
    found = dsv2_after(never, *ASK)
    assert found.returncode == 0 and "GPU" not in found.stderr
    assert json.loads(dsv2_after(never, "inspect", "--json").stdout)["gpu"] == []


def test_a_card_that_cannot_be_opened_is_one_line_and_the_processor() -> None:
    """Found where nobody named it, and gone when it is opened: a driver that is broken."""
    found = dsv2_after(THERE.format(number=77, kind="discrete"), *ASK)
    assert found.stderr.count("no GPU is used: ") == 1
    assert found.stdout == dsv2(*ASK, "--gpu", "off").stdout


def test_a_card_that_reads_no_faster_than_the_processor_is_taken_by_its_name_alone(tmp_path: Path) -> None:
    which = int(number())
    slow, fast = (THERE.format(number=which, kind="discrete") + READS.format(card=n) for n in (20, 21))
    plain, line = dsv2(*ASK, "--gpu", "off").stdout, "A Card reads its memory at 20.0 GB/s, the processor at 20.0"
    found = dsv2_after(slow, *ASK, XDG_STATE_HOME=str(tmp_path / "slow"))
    assert found.stdout == plain and found.stderr.count(line) == 1 and f"--gpu {which} takes it" in found.stderr
    named = dsv2_after(slow, *ASK, "--gpu", str(which), XDG_STATE_HOME=str(tmp_path / "slow"))
    assert "on A Card: " in named.stderr and line not in named.stderr
    taken = dsv2_after(fast, *ASK, XDG_STATE_HOME=str(tmp_path / "fast"))
    assert "on A Card: " in taken.stderr and "reads its memory" not in taken.stderr


def test_what_was_measured_of_a_card_and_the_processor_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[object] = []

    def card_rate(gpu: Gpu) -> float:
        asked.append(gpu.driver)
        return 3e9

    def processor_rate(threads: int) -> float:
        asked.append(threads)
        return 2e9

    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr(reading, "card_rate", card_rate)
    monkeypatch.setattr(reading, "processor_rate", processor_rate)
    for _ in range(2):
        assert reading.measured(card(driver="a"), 2) == reading.Reading(3e9, 2e9)
    assert asked == ["a", 2]
    reading.measured(card(driver="b"), 2)
    reading.measured(card(driver="a"), 3)
    assert asked == ["a", 2, "b", 3]
    file = tmp_path / "dsv2" / reading.FILE
    for broken in (b"", b"[1]", b"\xff", b'{"A Card; a": -1}', b'{"A Card; a": NaN}', b'{"A Card; a": "3"}'):
        file.write_bytes(broken)
        asked.clear()
        assert reading.measured(card(driver="a"), 2) == reading.Reading(3e9, 2e9) and asked == ["a", 2]
    file.unlink()
    file.parent.rmdir()
    file.parent.write_text("no folder")
    assert reading.measured(card(), 2) == reading.Reading(3e9, 2e9)


def test_readings_are_of_the_device_and_of_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cext.system, "cache_bytes", lambda: 1 << 40)
    monkeypatch.setattr(cext.system, "free_bytes", lambda *, swap: 64 << 20)
    assert reading.processor_rate(3) > 0
    assert reading.card_rate(card(number=int(number()))) > 0


def test_a_card_that_cannot_be_read_is_no_slow_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert reading.measured(card(number=77), 2) is None


@pytest.mark.parametrize("asked", [False, True])
def test_only_cards_of_their_own_memory_are_taken_where_none_is_named(
    monkeypatch: pytest.MonkeyPatch, *, asked: bool
) -> None:
    kinds = ("software", "integrated", "virtual", "other")
    there = [card(number=i, kind=kind) for i, kind in enumerate(kinds)]
    monkeypatch.setattr(cext.system, "has_graphics", lambda: True)
    monkeypatch.setattr(cext, "gpus", lambda: there)
    with pytest.raises(cext.DeviceError):
        gpu.find(gpu.Wish("auto", is_asked=asked))
    for i in range(len(kinds)):
        assert gpu.find(gpu.Wish(str(i))) is there[i]
    there += [card(number=4, free=2 << 30), card(number=5), card(number=6, free=9 << 30, missing="something")]
    assert gpu.find(gpu.Wish("auto", is_asked=asked)).number == 5


def test_attention_that_a_gpu_does_not_compute_leaves_it_alone(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", spec_named("moe_shared"))
    there = THERE.format(number=0, kind="discrete")
    (tmp_path / "text").write_text("a b c d e f g h i j k l m n o p q r s t u v w x y z" * 4)
    more = ("perplexity", str(path), "--text", str(tmp_path / "text"), "-c", "16")
    unasked = dsv2_after(there, *more)
    assert unasked.returncode == 0 and "GPU" not in unasked.stderr
    asked = dsv2_after(there, *more, "--gpu", "auto")
    assert "no GPU is used: this model's attention is not computed on one (--gpu 0 has the rest)" in asked.stderr
    assert asked.stdout == unasked.stdout


def test_settings_choose_a_gpu_where_no_line_does(tmp_path: Path) -> None:
    (tmp_path / "dsv2").mkdir()
    (tmp_path / "dsv2" / "config.toml").write_text('gpu = "off"\nvram = "6G"\n')
    home = {"XDG_CONFIG_HOME": str(tmp_path)}
    there = THERE.format(number=77, kind="discrete")
    assert "GPU" not in dsv2_after(there, *ASK, **home).stderr
    assert "no GPU is used: " in dsv2_after(there, *ASK, "--gpu", "auto", **home).stderr
    (tmp_path / "dsv2" / "config.toml").write_text('gpu = "no such card"\n')
    assert_fails(dsv2_after(GONE, *ASK, **home), 1, "no Vulkan loader")
    assert dsv2(*ASK, "--gpu", "off", **home).returncode == 0


WIDE = variant(SPECS[0], n_layer=4, n_embd=128, n_ff_expert=128, n_expert=128, n_head=2)


@pytest.mark.parametrize("size", [130 << 20, 160 << 20, 180 << 20, 1 << 30])
def test_a_budget_is_kept(tiny_gguf: Callable[[Spec], Path], size: int) -> None:
    """Of all that the engine takes: weights, caches that are full, the longest steps, and what matrix units read."""
    path = tiny_gguf(WIDE)
    with Model(path) as model, Gguf(path) as gguf:
        shares = device()["kind"] != gpu.TAKEN
        vram = size + longest_steps(model.hparams) - gpu.step_bytes(model.hparams, shares=shares)
        wish = gpu.Wish(number(), vram)
        kv_bytes = model.session(1100).kv_bytes
        layout = gpu.lay_out(gguf, model.hparams, gpu.find(wish), wish, cache_bytes=kv_bytes)
        most = gguf.nbytes
    assert layout is not None and layout.device.memory == vram
    assert layout.weights <= most + (layout.device.hot or 0)
    assert size not in (130 << 20, 1 << 30) or bool(layout.device.hot) == (size < 1 << 30)  # between, devices differ
    with Model(path, threads=2, devices=[layout.device], placement=layout.placement) as model:
        session = model.session(1100)
        session.eval(np.arange(1024) % WIDE.n_vocab)
        session.eval(np.arange(40))
        for i in range(4):
            session.eval([i])
        taken = model.watched(1)
    assert 0 < taken.memory <= taken.memory_most <= vram


@pytest.mark.parametrize("spec", [SPECS[0], SPECS[1], spec_named("v3")], ids=lambda s: s.name)
def test_steps_take_no_more_than_is_reckoned(tmp_path: Path, spec: Spec) -> None:
    path, layers = write_gguf(tmp_path / "m.gguf", spec), range(spec.n_layer)
    split = Place("experts", 0, range(spec.n_layer_dense, spec.n_layer), range(spec.n_expert))
    placement = [Place("ends", 1), Place("attention", 1, layers), Place("feed_forward", 1, layers), split]
    with Model(path, threads=2, devices=[Device("vulkan", name=number())], placement=placement) as model:
        held = model.watched(1).memory
        for n in (1, 64, 1024):
            session = model.session(1024)
            session.eval(np.zeros(n, np.int32))
            grown = model.watched(1).memory_most - held
            assert grown <= longest_steps(model.hparams, n) + gpu.CACHE_CHUNK


def test_what_cannot_be_meant_is_refused() -> None:
    assert_fails(dsv2("chat", "-p", "x", "--gpu", "off", "--vram", "6G"), 2, "--vram without a GPU")
    assert_fails(dsv2("chat", "-p", "x", "--gpu", "auto", "--vram", "lots"), 2, "--vram 'lots' is no size")
    assert_fails(dsv2("chat", "-p", "x", "--gpu", "auto", "--gpu-layers", "3"), 2, "--gpu is of dsv2's own engine")
