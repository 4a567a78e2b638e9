"""lm-eval over the server against lm-eval over transformers, on the same weights: the same choices, and what they cost.

    pip install 'lm-eval[api]' torch transformers accelerate
    pytest -m heavy tests/program/test_server_lm_eval.py

The task is made here of a text that the model was not trained on: which of four continuations is the text's own.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.serving import USUAL, served

import quantize
from cext.tokenizer import Tokenizer

pytestmark = pytest.mark.heavy

N_ITEMS, N_CHOICES = 80, 4
CONTEXT_WORDS, CHOICE_WORDS = 60, 5
TASK = """\
task: continuations
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: "{{choices}}"
doc_to_target: label
target_delimiter: " "
metric_list: [{metric: acc}, {metric: acc_norm}]
"""


def write_task(folder: Path, text: str) -> None:
    """Items of a text: a context, and continuations from here and from elsewhere."""
    words, draw = text.split(), random.Random(1)
    lines = []
    for i in range(N_ITEMS):
        start = i * (CONTEXT_WORDS + CHOICE_WORDS)
        stop = start + CONTEXT_WORDS
        places = [stop, *(draw.randrange(len(words) - CHOICE_WORDS) for _ in range(N_CHOICES - 1))]
        draw.shuffle(places)
        choices = [" ".join(words[at : at + CHOICE_WORDS]) for at in places]
        lines.append({"context": " ".join(words[start:stop]), "choices": choices, "label": places.index(stop)})
    data = folder / "items.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (folder / "continuations.yaml").write_text(TASK % data, encoding="utf-8")


def evaluated(folder: Path, name: str, model: str, arguments: str) -> tuple[dict[str, float], list[Any]]:
    """(the figures, each item's (log-likelihood, is greedy) of each choice)."""
    command = [sys.executable, "-P", "-m", "lm_eval", "run", "--model", model, "--model_args", arguments]
    command += ["--tasks", "continuations", "--include_path", str(folder), "--log_samples"]
    command += ["--output_path", str(folder / name), "--batch_size", "1", "--device", "cpu"]
    alone = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "cache")}
    ran = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False, env=alone, cwd=folder)
    assert ran.returncode == 0, ran.stderr[-3000:]
    [results] = (folder / name).rglob("results_*.json")
    [samples] = (folder / name).rglob("samples_*.jsonl")
    figures = json.loads(results.read_text(encoding="utf-8"))["results"]["continuations"]
    lines = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
    lines.sort(key=lambda line: line["doc_id"])
    return figures, [[(float(a), str(b)) for a, b in line["filtered_resps"]] for line in lines]


def test_the_same_accuracy_as_transformers_and_a_context_is_read_once(shared: Path, tmp_path: Path) -> None:
    for needed in ("lm_eval", "tenacity", "torch", "transformers", "accelerate"):
        pytest.importorskip(needed)
    weights, path = shared / "models" / "fixture-12m", tmp_path / "same.gguf"
    quantize.quantize(weights, path, quantize.Options(type="f32", evaluate=False))
    write_task(tmp_path, (shared / "text" / "heldout.txt").read_text(encoding="utf-8"))
    wanted, likelihoods = evaluated(tmp_path, "transformers", "hf", f"pretrained={weights},dtype=float32")
    with served(path, dataclasses.replace(USUAL, n_ctx=1024, cache_bytes=512 << 20)) as server:
        url = f"{str(server.client.base_url).rstrip('/')}/v1/completions"
        arguments = f"base_url={url},model=tiny,tokenizer_backend=remote,num_concurrent=4,max_length=1024"
        found, told = evaluated(tmp_path, "server", "local-completions", arguments)
        n_read = server.engine.figures.prompt_tokens
    assert found["acc,none"] == wanted["acc,none"] > 0.5  # a quarter by chance
    assert found["acc_norm,none"] == wanted["acc_norm,none"]
    for mine, theirs in zip(told, likelihoods, strict=True):
        for (value, greedy), (other, is_greedy) in zip(mine, theirs, strict=True):
            assert abs(value - other) < 1e-3 * max(1.0, abs(other)) and greedy == is_greedy
    items = [json.loads(line) for line in (tmp_path / "items.jsonl").read_text(encoding="utf-8").splitlines()]
    tokenizer = Tokenizer(path)
    one = sum(len(tokenizer.encode(f"{item['context']} {item['choices'][0]}")) for item in items)
    assert n_read < 1.5 * one, (n_read, one)
    print(f"accuracy {found['acc,none']:.4f}; {n_read} tokens read for {N_CHOICES} choices, {one} of one")
