"""--gpu: what each command says and does with a device, a software one where there is no other, and without any."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.cli import assert_fails, dsv2, dsv2_after
from support.gpu import number, usable
from support.tiny import SPECS, write_gguf

from cext import Gguf, Gpu, Model
from dsv2cli import gpu, locate

PACKAGED = locate.model(None)
ASK = ("chat", "-p", "Tell me a story about a ship.", "-n", "4", "--temp", "0")


def card(**given: Any) -> Gpu:
    told: dict[str, Any] = {
        "number": 0, "name": "A Card", "driver": "", "api": "1.3.0", "kind": "discrete", "missing": "",
        "memory": 8 << 30, "free": 8 << 30, "subgroup": 32, "int_dot": True, "float16": True,
    }  # fmt: skip
    return Gpu(**told | given)


def laid_out(free: int, wish: gpu.Wish | None = None, **more: Any) -> gpu.Layout | None:
    with Gguf(PACKAGED) as gguf, Model(PACKAGED) as model:
        return gpu.lay_out(gguf, model.hparams, card(free=free), wish or gpu.Wish("auto"), cache_bytes=8 << 20, **more)


def parts(layout: gpu.Layout | None) -> dict[tuple[str, int], int]:
    """Layers by (part, device)."""
    assert layout is not None
    return {(place.part, place.device): len(place.layers) for place in layout.placement}


def test_a_card_is_filled_in_the_order_of_what_a_token_reads() -> None:
    with Model(PACKAGED) as model:
        n, dense, step = model.hparams["n_layer"], model.hparams["n_layer_dense"], gpu.step_bytes(model.hparams)
    everything = parts(laid_out(8 << 30))
    assert everything == {("attention", 1): n, ("feed_forward", 1): n, ("ends", 1): 0}
    seen = [parts(laid_out(8 << 30, gpu.Wish("auto", step + size))) for size in range(10 << 20, 60 << 20, 1 << 20)]
    held = [found.get(("feed_forward", 1), 0) - found.get(("experts", 0), 0) - dense for found in seen]
    assert held == sorted(held) and held[-1] == n - dense
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
    more = ("--gpu", which) if where == "all of it" else ("--gpu", which, "--vram", "400M")
    placed = dsv2(*ASK, *more, "--json")
    assert json.loads(placed.stdout)["answer"] == json.loads(dsv2(*ASK, "--json").stdout)["answer"]
    assert len([line for line in placed.stderr.splitlines() if line.startswith("(on ")]) == 1


def test_inspect_tells_what_a_card_would_hold() -> None:
    made = "Gpu(0, 'A Card', '', '1.3.0', 'discrete', '', 8 << 30, 8 << 30, 32, True, True)"
    there = f"import cext; from cext import Gpu; cext.gpus = lambda: [{made}]"
    assert "--gpu 0       on A Card: attention, " in dsv2_after(there, "inspect").stdout
    assert json.loads(dsv2_after(there, "inspect", "--json").stdout)["gpu"][0].startswith("on A Card: ")
    gone = "import cext; cext.gpus = lambda: (_ for _ in ()).throw(cext.DeviceError('none'))"
    assert json.loads(dsv2_after(gone, "inspect", "--json").stdout)["gpu"] == []


def test_doctor_lists_the_devices() -> None:
    findings = json.loads(dsv2("doctor", "--json").stdout)["findings"]
    told = [one["text"] for one in findings if one["name"] == "GPU"]
    assert told
    for device in usable():
        assert any(device["name"] in text for text in told)


@pytest.mark.parametrize("which", ["99", "no such card"])
def test_a_device_that_is_not_there_is_one_line_and_the_processor(which: str) -> None:
    found = dsv2(*ASK, "--gpu", which)
    said = [line for line in found.stderr.splitlines() if "no GPU is used" in line]
    assert len(said) == 1 and found.stdout == dsv2(*ASK).stdout


def test_without_a_loader_the_processor_computes() -> None:
    gone = "import cext; cext.gpus = lambda: (_ for _ in ()).throw(cext.DeviceError('no Vulkan loader', 'get one'))"
    found = dsv2_after(gone, *ASK, "--gpu", "auto")
    assert "no GPU is used: no Vulkan loader (get one)" in found.stderr
    assert found.stdout == dsv2(*ASK).stdout


def test_what_cannot_be_meant_is_refused() -> None:
    assert_fails(dsv2("chat", "-p", "x", "--vram", "6G"), 2, "--vram without a GPU")
    assert_fails(dsv2("chat", "-p", "x", "--gpu", "auto", "--vram", "lots"), 2, "--vram 'lots' is no size")
    assert_fails(dsv2("chat", "-p", "x", "--gpu", "auto", "--gpu-layers", "3"), 2, "--gpu is of dsv2's own engine")
