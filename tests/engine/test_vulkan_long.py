"""Steps of more tokens than the processor computes together, where a GPU routes every layer."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.gpu import number
from support.logits import assert_close
from support.tiny import SPECS, Spec, tokens, variant

import cext
from cext import MAX_STEP, Device, Model, Place

LITE = SPECS[0]
DEEP = variant(LITE, name="long_deep", n_layer=4, n_head=1)  # more layers with experts than slots for copies
THIN = variant(LITE, name="long_thin", n_layer=2, n_head=1)  # a software device takes minutes for more attention
LENGTHS = (2 * MAX_STEP - 1, 2 * MAX_STEP + 1)
HALF = (1, 183, 24, *(48,) * 17)  # tokens of sequences in a step: little attention
SEVERAL = 2 * HALF
BAR = 1e-4  # of the logits' range

Open = Callable[..., Model]


def places(spec: Spec, where: str) -> list[Place]:
    """card: all on the device; ram: all but routed experts; split: all but half of these."""
    layers, n = range(spec.n_layer), spec.n_expert
    on = [Place("ends", 1), Place("attention", 1, layers), Place("feed_forward", 1, layers)]
    moe = range(spec.n_layer_dense, spec.n_layer)
    away = {"card": 0, "ram": n, "split": n // 2}[where]
    return on + ([Place("experts", 0, moe, range(away))] if away else [])


@pytest.fixture
def open_model(tiny_gguf: Callable[[Spec], Path]) -> Iterator[Open]:
    opened: list[Model] = []

    def open_one(spec: Spec, where: str, **more: Any) -> Model:
        gpu = Device("vulkan", name=number(), **more)
        opened.append(Model(tiny_gguf(spec), threads=2, devices=[gpu], placement=places(spec, where)))
        opened[-1].watch(1, times=False)
        return opened[-1]

    yield open_one
    for model in opened:
        model.close()


def together(model: Model) -> Any:
    """The logits after each of several sequences, in one step."""
    prompts = [tokens(DEEP, n, seed) for seed, n in enumerate(SEVERAL)]
    sessions = [model.session(max(SEVERAL) + 8, "f32") for _ in prompts]
    return cext.eval_batch(list(zip(sessions, prompts, strict=True)))


def one_by_one(processor: Model) -> Any:
    prompts = [tokens(DEEP, n, seed) for seed, n in enumerate(SEVERAL)]
    return np.stack([processor.session(max(SEVERAL) + 8, "f32").eval(prompt) for prompt in prompts])


def test_a_long_prompt_answers_as_the_processor(open_model: Open, tiny_gguf: Callable[[Spec], Path]) -> None:
    """In one step, and in two."""
    ids = tokens(THIN, max(LENGTHS))
    with Model(tiny_gguf(THIN), threads=2) as processor:
        assert processor.max_step == processor.together == MAX_STEP
        expected = processor.session(max(LENGTHS), "f32").eval(ids[: max(LENGTHS)], "all")
    model = open_model(THIN, "ram", copies="always")
    assert model.max_step == model.together == 2 * MAX_STEP
    for n in LENGTHS:
        assert_close(model.session(n, "f32").eval(ids[:n]), expected[n - 1], BAR)


@pytest.mark.parametrize(("where", "copies"), [("card", "auto"), ("ram", "always"), ("ram", "auto"), ("split", "auto")])
def test_a_long_step_of_several_sequences(
    open_model: Open, tiny_gguf: Callable[[Spec], Path], where: str, copies: Any
) -> None:
    with Model(tiny_gguf(DEEP), threads=2) as processor:
        expected = one_by_one(processor)
    model = open_model(DEEP, where, copies=copies)
    assert sum(SEVERAL) == 2 * sum(HALF) == model.together == 2 * MAX_STEP
    for _ in range(2):  # calibrated from nothing, and by what was measured
        assert_close(together(model), expected, BAR)
    with pytest.raises(ValueError, match="more than 2048 tokens"):
        cext.eval_batch([(model.session(2 * MAX_STEP, "f32"), tokens(DEEP, 2 * MAX_STEP)), (model.session(8), [1])])


def test_experts_are_copied_once_for_a_long_step(open_model: Open) -> None:
    copied = []
    for short in (True, False):
        model = open_model(DEEP, "ram", copies="always", short_steps=short)
        assert model.together == (MAX_STEP if short else 2 * MAX_STEP)
        prompts = [tokens(DEEP, n, seed) for seed, n in enumerate(SEVERAL)]
        pairs = [(model.session(max(SEVERAL), "f32"), prompt) for prompt in prompts]
        for step in [pairs[: len(HALF)], pairs[len(HALF) :]] if short else [pairs]:
            cext.eval_batch(step)
        copied.append(model.watched(1).copied_experts)
    assert copied[0] == 2 * copied[1] > 0


def test_steps_are_short_where_memory_is(open_model: Open) -> None:
    """What long steps take is in the forecast; where there is no room for them beside copies, it is the copies'."""
    model = open_model(DEEP, "ram", copies="always")
    assert model.step_bytes(2 * MAX_STEP) > 1.8 * model.step_bytes(MAX_STEP)
    slots, low, least = model.watched(1).slot_bytes, 1 << 20, 1 << 28
    while least - low > 1 << 16:
        middle = (low + least) // 2
        try:
            enough = open_model(DEEP, "ram", copies="always", memory=middle).together > MAX_STEP
        except cext.OutOfMemoryError:  # not even for the weights
            enough = False
        low, least = (low, middle) if enough else (middle, least)
    short = open_model(DEEP, "ram", copies="always", memory=low)
    assert (short.together, short.watched(1).slot_bytes) == (MAX_STEP, slots)
    long = open_model(DEEP, "ram", copies="always", memory=least)
    assert (long.together, long.watched(1).slot_bytes) == (2 * MAX_STEP, slots)


def test_the_processor_s_layers_keep_steps_short(tiny_gguf: Callable[[Spec], Path]) -> None:
    layers = range(1, DEEP.n_layer)
    placement = [Place("attention", 1, layers), Place("feed_forward", 1, layers)]
    with Model(tiny_gguf(DEEP), threads=2, devices=[Device("vulkan", name=number())], placement=placement) as model:
        assert model.max_step == model.together == MAX_STEP
