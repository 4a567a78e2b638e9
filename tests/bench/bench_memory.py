"""Peak memory and speed of dsv2 quantize on a synthetic checkpoint of real width.

    python tests/bench/bench_memory.py --model lite --layers 27 --folder /big/disk

Writes a bf16 checkpoint of the model's shapes (V2-Lite's 27 layers: 31 GB) into the folder, quantises it in a process
of its own, prints one line, and removes what it wrote. Weights are random, drawn from a pool that repeats: the pages
are read all the same. The bound that the line names: the largest layer in bf16, the calibration tokens' activations,
1 GB. --encode-seconds ends the run that long after the encoding of the last layer's experts, or dense matrices, began:
what follows only repeats it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
from contextlib import suppress
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from typing import Any

import numpy as np
from support.checkpoints import V2, V2_GROUPED, bf16_bits, tensor_shapes, write_tokenizer

WIDE = {"hidden_size": 5120, "num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536,
        "intermediate_size": 12288, "moe_intermediate_size": 1536, "n_routed_experts": 160, "n_group": 8,
        "topk_group": 3}  # fmt: skip
LITE = {"hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 16, "q_lora_rank": None,
        "intermediate_size": 10944, "moe_intermediate_size": 1408, "n_routed_experts": 64}  # fmt: skip
BOTH = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "num_experts_per_tok": 6, "n_shared_experts": 2, "vocab_size": 102_400,
        "max_position_embeddings": 163_840}  # fmt: skip
MODELS = {"lite": {**V2, **LITE, **BOTH}, "236b": {**V2_GROUPED, **WIDE, **BOTH}}
POOL = 1 << 24  # values


def write(folder: Path, config: dict[str, Any]) -> int:
    """The checkpoint, a shard a layer and one for what is outside them; returns its bytes."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    pool = rng.standard_normal(POOL, np.float32)
    scaled = cache(lambda width: bf16_bits(pool * width**-0.5 if width else np.ones(POOL, np.float32)))
    shards: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in tensor_shapes(config).items():
        layer = name.split(".")[2] if ".layers." in name else "outside"
        shards.setdefault(f"model-{layer}.safetensors", {})[name] = shape
    weight_map, total = {}, 0
    for shard, shapes in shards.items():
        header, at = {}, 0
        for name, shape in shapes.items():
            nbytes = 2 * int(np.prod(shape))
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + nbytes]}
            at, weight_map[name] = at + nbytes, shard
        text = json.dumps(header).encode()
        with (folder / shard).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for shape in shapes.values():
                left = int(np.prod(shape))
                bits = scaled(shape[-1] if len(shape) > 1 else 0)
                while left:
                    start = int(rng.integers(0, POOL // 2)) if left < POOL // 2 else 0
                    left -= file.write(bits[start : start + left].data) // 2
        total += at
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)
    return total


def anonymous_bytes() -> int:
    """Memory of this process that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssShmem")))


class Enough(Exception):
    """What was to be seen was seen."""


def quantise(args: argparse.Namespace) -> None:
    """In the child: quantise, and print what it took as JSON."""
    import quantize  # noqa: PLC0415  (the parent has no use for it)

    peak: list[Any] = [0, ""]
    done, where = threading.Event(), ""
    last: quantize.Progress | None = None
    rate = cores = 0.0
    turns = 0  # sublayers of the last layer that encoding has begun of
    began: tuple[float, float] | None = None  # of the second's: seconds of the run, of all cores

    def watch() -> None:
        while not done.wait(0.02):
            if (now := anonymous_bytes()) > peak[0]:
                peak[:] = [now, where]

    def progress(step: quantize.Progress) -> None:
        nonlocal where, last, rate, cores, turns, began
        encodes = step.stage == "encode" and step.layer == step.n_layer - 1
        if where != (where := f"{step.stage} layer {step.layer}"):
            print(f"{step.seconds:8.1f} s {where}, peak so far {peak[0] / 1e9:.2f} GB", file=sys.stderr)
            turns += encodes

        last, rate = step, step.values_per_second if step.stage == "encode" else rate
        if encodes and turns == 2:
            used = resource.getrusage(resource.RUSAGE_SELF)
            now = step.seconds, used.ru_utime + used.ru_stime
            began = began or now
            took = now[0] - began[0]
            cores = (now[1] - began[1]) / took if took else 0.0
            if args.encode_seconds is not None and took > args.encode_seconds:
                raise Enough

    threading.Thread(target=watch, daemon=True).start()
    options = quantize.Options(
        type=args.type, max_tokens=args.tokens, awq=args.awq, plain_mix=args.plain_mix, threads=args.threads
    )
    with suppress(Enough):
        quantize.quantize(args.folder / "hf", args.folder / "m.gguf", options, progress)
    done.set()
    assert last is not None
    print(json.dumps({
        "rss": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, "anonymous": peak[0], "at": peak[1],
        "seconds": last.seconds, "fraction": last.bytes_written / last.bytes_total, "rate": rate,
        "cores": cores,
    }))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="lite")
    parser.add_argument("--layers", type=int, default=27)
    parser.add_argument("--dense", type=int, default=1, help="of the layers, the first ones")
    parser.add_argument("--vocab", type=int, default=102_400)
    parser.add_argument("--type", default="q4_k_m")
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--awq", action="store_true")
    parser.add_argument("--plain-mix", action="store_true", help="llama.cpp's types: no survey of what tensors cost")
    parser.add_argument("--encode-seconds", type=float)
    parser.add_argument("--folder", type=Path, required=True, help="made here, and removed afterwards")
    parser.add_argument("--run", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        quantise(args)
        return
    config = {
        **MODELS[args.model],
        "num_hidden_layers": args.layers,
        "first_k_dense_replace": args.dense,
        "vocab_size": args.vocab,
    }
    try:
        n_bytes = write(args.folder / "hf", config)
        environment = {**os.environ, **({"OPENBLAS_NUM_THREADS": str(args.threads)} if args.threads else {})}
        command = [sys.executable, __file__, "--run", *sys.argv[1:]]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    finally:
        shutil.rmtree(args.folder, ignore_errors=True)
    found = json.loads(done.stdout)
    layers: dict[str, int] = {}
    for name, shape in tensor_shapes(config).items():
        if ".layers." in name:
            layer = name.split(".")[2]
            layers[layer] = layers.get(layer, 0) + 2 * int(np.prod(shape))
    d, used = config["hidden_size"], config["num_experts_per_tok"] * config["moe_intermediate_size"]
    # float32 hidden states, and in bf16 what experts and their downs were fed.
    activations = args.tokens * (4 * d + 2 * d + 2 * used)
    bound = max(layers.values()) + activations + 1e9
    print(
        f"{args.model} {args.layers} layers, {n_bytes / 1e9:.2f} GB, {args.type}, {args.tokens} tokens: "
        f"peak {found['anonymous'] / 1e9:.2f} GB anonymous ({found['at']}), {found['rss'] / 1e9:.2f} GB with mapped "
        f"files; bound {bound / 1e9:.2f} GB (layer {max(layers.values()) / 1e9:.2f}, activations "
        f"{activations / 1e9:.2f}); {100 * found['fraction']:.0f} % written in {found['seconds']:.0f} s, "
        f"{found['rate'] / 1e6:.1f} M weights/s; {found['cores']:.1f} cores busy while the last experts are encoded"
    )


if __name__ == "__main__":
    main()
