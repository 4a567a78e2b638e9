"""Files of other architectures, which llama.cpp runs: the same conversation, sampling, commands and refusals."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import pytest
from support import llama as oracle
from support import others
from support.cli import COMMAND, SECONDS, assert_fails, dsv2, environment, terminal, worked
from support.others import LLAMA, MIXTRAL, QWEN2, SHAPES, Other
from support.serving import USUAL, served
from support.tiny import add_key

from cext import ContextFullError, EngineError, OutOfMemoryError, Sampler
from cext.tokenizer import Message, Tokenizer, TokenizerError
from dsv2cli import anatomy, locate, runtime
from dsv2cli.chat.conversation import Conversation
from dsv2cli.engines import llamacpp
from dsv2cli.engines.cache import cache_of
from dsv2cli.engines.choice import not_ours
from dsv2cli.engines.llamacpp.library import library
from dsv2cli.runtime import Wishes
from dsv2cli.scheduler import Context, Lookup, Scheduler, Sequence, Text

LARGE = Other(n_embd=512, n_ff=2048, n_layer=24, n_head=8, n_head_kv=8, n_ctx=4096)
IDS = [1, 5, 200, 31, 77, 8, 9, 263, 260, 40, 41, 42]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``written(shape)``: the path of its file, made once."""
    folder = tmp_path_factory.mktemp("others")
    made: dict[Other, Path] = {}

    def path(shape: Other) -> Path:
        if shape not in made:
            made[shape] = others.write(folder / f"{shape.arch}-{len(made)}.gguf", shape)
        return made[shape]

    return path


@pytest.fixture(scope="module")
def model(written: Callable[..., Path]) -> Iterator[llamacpp.Model]:
    with llamacpp.Model(written(MIXTRAL), 1, n_seq=3) as opened:
        yield opened


# Logits and the cache.


@pytest.mark.parametrize("name", SHAPES)
def test_logits_are_llama_cpps_own(written: Callable[..., Path], name: str) -> None:
    path = written(SHAPES[name])
    with llamacpp.Model(path, 1) as opened:
        session = opened.session(64, "f32")
        first = session.eval(IDS[:5], "all")
        rest = session.eval(IDS[5:], "all")
        assert session.n_past == len(IDS) and session.ids.tolist() == IDS
    expected = oracle.logits(path, IDS)
    assert np.ptp(expected) > 1
    np.testing.assert_allclose(np.concatenate([first, rest]), expected, atol=2e-4)


def test_rewound_and_gone_on_is_as_never_read(model: llamacpp.Model) -> None:
    session = model.session(64, "f32")
    session.eval(IDS)
    session.rewind(4)
    again = session.eval([50, 51], "all")
    fresh = model.session(64, "f32")
    assert fresh.room is session.room  # one context, several sequences
    np.testing.assert_allclose(again, fresh.eval([*IDS[:4], 50, 51], "all")[4:], atol=2e-4)
    assert session.ids.tolist() == [*IDS[:4], 50, 51]


def test_forks_share_the_past_and_go_on_alone(model: llamacpp.Model) -> None:
    first = model.session(96, "f32")
    first.eval(IDS)
    forks = [first.fork(8) for _ in range(3)]  # the third finds no sequence left and reads in another context
    assert [fork.room is first.room for fork in forks] == [True, True, False]
    assert [fork.n_cached for fork in forks] == [8, 8, 0]
    tails = [[60, 61], [70], [80, 81]]
    rows = model.evaluate(list(zip(forks, tails, strict=True)), [1, 1, 1])
    for row, tail in zip(rows, tails, strict=True):
        alone = model.session(64, "f32").eval([*IDS[:8], *tail])
        np.testing.assert_allclose(row, alone, atol=2e-4)
    assert first.ids.tolist() == IDS
    np.testing.assert_allclose(first.eval([3]), model.session(64, "f32").eval([*IDS, 3]), atol=2e-4)


def test_a_session_that_nobody_holds_gives_its_sequence_back(model: llamacpp.Model) -> None:
    sessions = [model.session(48, "f32") for _ in range(3)]
    room = sessions[0].room
    for session in sessions:
        session.eval(IDS)
    assert not room.free
    del sessions, session
    gc.collect()
    again = model.session(48, "f32")
    assert again.room is room and again.n_past == 0
    np.testing.assert_allclose(again.eval(IDS[:3]), model.session(48, "f32").eval(IDS[:3]), atol=2e-4)


def test_what_does_not_fit_changes_nothing(model: llamacpp.Model) -> None:
    session = model.session(16)
    session.eval(IDS)
    with pytest.raises(ContextFullError, match="5 tokens do not fit: the context holds 16 and 12 are used"):
        session.eval([1] * 5)
    for wrong in ([], [-1], [10**6]):
        with pytest.raises(ValueError, match="token ids"):
            session.eval(wrong)
    assert session.ids.tolist() == IDS
    session.eval([1] * 4)


def test_a_step_that_is_stopped_leaves_nothing(written: Callable[..., Path]) -> None:
    """The byte that llama.cpp looks at is set while it computes."""
    with llamacpp.Model(written(LLAMA), 1) as opened:
        session = opened.session(512, "f32")
        session.eval(IDS)
        stopping = threading.Event()

        def stop() -> None:
            while not stopping.is_set():
                opened.interrupt()

        thread = threading.Thread(target=stop)
        thread.start()
        try:
            with pytest.raises(llamacpp.StoppedError):
                for _ in range(1000):  # the other thread may not have its turn within a step
                    session.eval([7] * 400)
                    session.rewind(len(IDS))
        finally:
            stopping.set()
            thread.join()
        assert session.ids.tolist() == IDS
        again = session.eval([9])
        np.testing.assert_allclose(again, opened.session(64, "f32").eval([*IDS, 9]), atol=2e-4)


def test_a_closed_model_says_so(written: Callable[..., Path]) -> None:
    opened = llamacpp.Model(written(LLAMA), 1)
    session = opened.session(32)
    opened.close()
    opened.close()
    with pytest.raises(EngineError, match="closed"):
        session.eval([1])


@pytest.mark.parametrize("kv_type", ["f16", "q8_0", "f32"])
def test_the_caches_memory_is_what_llama_cpp_keeps(kv_type: Any, tmp_path: Path) -> None:
    """By the size of a sequence's state; heads of 32, which q8_0's blocks need."""
    shape = Other(n_embd=128, n_head=4, n_head_kv=2, n_layer=3)
    with llamacpp.Model(others.write(tmp_path / "m.gguf", shape), 1) as opened:
        lib = library()
        session = opened.session(256, kv_type)
        sizes = []
        for n in (10, 110):
            session.eval([1] * (n - session.n_past))
            sizes.append(lib.llama_state_seq_get_size(session.room.context, session.seq))
        cell = 12  # position, number of sequences, sequence
        kept = (sizes[1] - sizes[0]) / 100 - cell
        assert kept == pytest.approx(opened.facts.cache.token_bytes(kv_type), abs=8)
        assert session.kv_bytes == 256 * opened.facts.cache.token_bytes(kv_type)


def test_the_cache_by_the_keys() -> None:
    assert (
        cache_of(
            {"block_count": 32, "embedding_length": 4096, "attention.head_count": 32, "attention.head_count_kv": 8}
        ).token_bytes("f16")
        == 131072
    )  # Llama 3 8B, Mixtral 8x7B
    mixed = {
        "block_count": 4,
        "embedding_length": 64,
        "attention.head_count": 4,
        "attention.head_count_kv": [0, 2, 0, 2],
        "ssm.state_size": 16,
    }
    assert cache_of(mixed).recurrent and cache_of(mixed).token_bytes("f32") == 2 * 2 * 2 * 16 * 4
    for hostile in (
        {"block_count": 2**62},
        {"block_count": -1},
        {"block_count": "x"},
        {"block_count": 3, "attention.head_count": ["a", None], "embedding_length": 5},
        {},
    ):
        assert cache_of(hostile).token_bytes("q8_0") >= 0


def test_memory_that_is_not_there_is_refused_before_it_is_taken(
    model: llamacpp.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dsv2cli.engines.llamacpp.model.free_bytes", lambda: 10_000_000)
    with pytest.raises(OutOfMemoryError, match="a context of 1000000 tokens for 3 sequences takes 768") as caught:
        model.session(1_000_000)
    assert "a context of" in caught.value.hint and "fits" in caught.value.hint


# The conversation.


def opened(path: Path, **wishes: Any) -> Any:
    return runtime.open_model(path, 1, runtime.Wishes(told=False, **wishes))


def answer(path: Path, n: int, *texts: str, lookup: int = 0, context: int = 256) -> list[list[int]]:
    with opened(path) as run:
        talk = Conversation(
            run.session(context, "f32"), run.tokenizer, n_draft=lookup, scheduler=Scheduler(run.evaluate)
        )
        for text in texts:
            list(talk.reply(text, Sampler(temperature=0), n))
        return [turn.answer for turn in talk.turns]


@pytest.mark.parametrize("name", SHAPES)
def test_turns_go_on_in_the_cache(written: Callable[..., Path], name: str) -> None:
    """The second answer is the one to the whole prompt read afresh."""
    path = written(SHAPES[name])
    first, second = answer(path, 12, "hi the", "and the b?")
    with opened(path) as run:
        messages = [Message("user", "hi the"), Message("assistant", first), Message("user", "and the b?")]
        session = run.session(256, "f32")
        token = Sampler(temperature=0).sample(session.eval(run.tokenizer.chat(messages)))
    assert second[0] == token


def test_drafts_are_taken_and_change_nothing(written: Callable[..., Path]) -> None:
    """The greedy answer repeats itself: lookup's drafts are evaluated, taken, and rolled back where wrong."""
    with opened(written(LLAMA)) as run:
        session = run.session(512, "f32")
        prompt = [1, *[30, 40, 50, 60, 70, 80, 90, 100, 110] * 12]
        answers = []
        for drafter in (None, Lookup(3)):
            scheduler = Scheduler(run.evaluate)
            text = Text(run.tokenizer.stream())
            context = Context(session)
            sequence = Sequence(
                context, prompt, Sampler(temperature=0), text, lambda token: False, limit=60, drafter=drafter
            )
            scheduler.add(sequence)
            list(scheduler.run())
            answers.append((sequence.answer, sequence.stats))
        (plain, _), (drafted, stats) = answers
    assert plain == drafted and len(plain) == 60
    assert stats.n_drafted > 0


def test_sequences_are_stepped_together(written: Callable[..., Path]) -> None:
    path = written(MIXTRAL)
    prompts = [[1, 20 + i, 30, 40 + i] for i in range(3)]
    with opened(path, engine="llama.cpp", n_seq=3) as run:

        def sequence(prompt: list[int]) -> Sequence:
            context = Context(run.session(64, "f32"))
            return Sequence(
                context, prompt, Sampler(temperature=0), Text(run.tokenizer.stream()), lambda t: False, limit=10
            )

        alone = []
        for prompt in prompts:
            scheduler = Scheduler(run.evaluate)
            scheduler.add(one := sequence(prompt))
            list(scheduler.run())
            alone.append(one.answer)
        scheduler = Scheduler(run.evaluate)
        together = [sequence(prompt) for prompt in prompts]
        for one in together:
            scheduler.add(one)
        list(scheduler.run())
    assert [one.answer for one in together] == alone
    assert len({one.context.session.room for one in together}) <= 2


def test_a_full_context_drops_turns(written: Callable[..., Path]) -> None:
    answers = answer(written(QWEN2), 30, "hi the a", "b", "c", context=64)
    assert len(answers) < 3 and len(answers[-1]) > 0


# Text and control tokens.


@pytest.fixture(scope="module")
def pieces(written: Callable[..., Path]) -> Tokenizer:
    return Tokenizer(written(MIXTRAL))


def marked(path: Path, text: str) -> list[int]:
    """llama.cpp's own tokens of a text in which control tokens are spelt."""
    lib = library()
    params = llama_cpp.llama_model_default_params()
    params.vocab_only = True
    model = lib.llama_model_load_from_file(os.fsencode(path), params)
    data = text.encode()
    ids = (llama_cpp.llama_token * (len(data) + 8))()
    n = lib.llama_tokenize(lib.llama_model_get_vocab(model), data, len(data), ids, len(ids), False, True)
    lib.llama_model_free(model)
    return list(ids[:n])


@pytest.mark.parametrize("text", ["hi", "the hi", " hi", "", "\n", "hi\nthe 🦙 é", "▁hi", "a" * 5000, "<0x41>"])
def test_pieces_are_llama_cpps(pieces: Tokenizer, written: Callable[..., Path], text: str) -> None:
    assert pieces.encode(text) == marked(written(MIXTRAL), text)
    assert pieces.decode(pieces.encode(text)) == (" " + text.replace("▁", " ") if text else "")


def test_prompts_of_pieces(pieces: Tokenizer, written: Callable[..., Path]) -> None:
    """What llama.cpp makes of the template's text, where the answer before is text; as sampled, it stays as it was."""
    hi, then = Message("user", "hi"), Message("user", "the b")
    ids = pieces.chat([hi, Message("assistant", "he"), then])
    assert ids == marked(written(MIXTRAL), "<s> [INST] hi [/INST] he</s> [INST] the b [/INST]")
    sampled = pieces.encode("he llo")
    kept = pieces.chat([hi, Message("assistant", sampled), then])
    begin = len(pieces.chat([hi]))
    assert kept[begin : begin + len(sampled) + 1] == [*sampled, pieces.eos]


def test_text_after_a_sampled_answer_begins_with_no_space_of_its_own(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m['content'] }}{{ 'the' }}{% endfor %}"
    with Tokenizer(others.write(tmp_path / "m.gguf", LLAMA, others.pieces(template))) as made:
        sampled = made.encode("hi")
        assert made.decode(made.chat([Message("assistant", sampled)], answer=False)) == " hithe"


@pytest.mark.parametrize("spelt", ["<s>", "</s>", "<unk>", "a</s>b", "<s></s>"])
def test_control_pieces_cannot_be_typed(pieces: Tokenizer, spelt: str) -> None:
    assert not {0, 1, 2} & set(pieces.encode(spelt))
    ids = pieces.chat([Message("user", spelt)])
    assert ids.count(1) == 1 and 2 not in ids and 0 not in ids


def test_control_pieces_that_the_file_calls_text_cannot_be_typed(tmp_path: Path) -> None:
    """A user-defined <|im_end|>, which llama.cpp finds in any text."""
    keys = others.pieces(None)
    keys["tokenizer.ggml.tokens"] = [*keys["tokenizer.ggml.tokens"], "<|im_end|>"]
    keys["tokenizer.ggml.scores"] = [*keys["tokenizer.ggml.scores"], 0.0]
    keys["tokenizer.ggml.token_type"] = [*keys["tokenizer.ggml.token_type"], 4]
    with Tokenizer(others.write(tmp_path / "m.gguf", LLAMA, keys)) as made:
        n = made.n_vocab - 1
        ids = made.encode("hi<|im_end|>the")
        assert n not in ids and made.decode(ids) == " hi<|im_end|>the"
        assert n in made.encode("hi<|im_end|>", special=True)


def test_a_vocabulary_without_bytes_is_refused(tmp_path: Path) -> None:
    """llama.cpp ends the process at the first character that such a vocabulary cannot spell."""
    keys = others.pieces(None)
    keep = [i for i in range(len(keys["tokenizer.ggml.tokens"])) if i != 3 + 0xF0]
    for name in ("tokens", "scores", "token_type"):
        keys[f"tokenizer.ggml.{name}"] = [keys[f"tokenizer.ggml.{name}"][i] for i in keep]
    with pytest.raises(TokenizerError, match="no token for the byte 0xf0"):
        Tokenizer(others.write(tmp_path / "m.gguf", LLAMA, keys))


# The commands.


@pytest.mark.parametrize("name", SHAPES)
def test_chat_answers_and_says_who_runs_it(written: Callable[..., Path], name: str) -> None:
    path = written(SHAPES[name])
    shown = dsv2("chat", path, "-p", "hi the", "-n", "8", "--temp", "0", "-t", "1", "--kv", "f32")
    assert shown.returncode == 0, shown.stderr
    assert f"(architecture `{SHAPES[name].arch}`: llama.cpp runs this file)" in shown.stderr
    again = json.loads(
        dsv2("chat", path, "-p", "hi the", "-n", "8", "--temp", "0", "-t", "1", "--kv", "f32", "--json", "-q").stdout
    )
    assert f" wrote {again['answer_tokens']} at " in shown.stderr and 0 < again["answer_tokens"] <= 8
    told = json.loads(dsv2("chat", path, "-p", "hi the", "-n", "8", "--temp", "0", "-t", "1", "--json", "-q").stdout)
    assert told["engine"] == "llama.cpp" and told["kv_type"] == "f16"
    quiet = dsv2("chat", path, "-p", "hi the", "-n", "8", "--temp", "0", "-t", "1", "-q")
    assert quiet.stderr == ""


def test_dsv2s_own_file_runs_through_either(tmp_path: Path) -> None:
    """The packaged model through both engines, greedily; grouped routers differ, so only that both answer."""
    path = locate.model(None)
    ours = dsv2("chat", path, "-p", "A ship", "-n", "4", "--temp", "0", "--json", "-q", "-t", "1")
    assert json.loads(ours.stdout)["engine"] == "dsv2"
    theirs = dsv2("chat", path, "-p", "A ship", "-n", "4", "--temp", "0", "--json", "-q", "--engine", "llama.cpp")
    assert theirs.returncode == 1 or json.loads(theirs.stdout)["engine"] == "llama.cpp"


def test_the_engine_that_is_asked_for_and_cannot(written: Callable[..., Path]) -> None:
    path = written(QWEN2)
    assert_fails(dsv2("chat", path, "-p", "x", "--engine", "dsv2"), 1, "architecture is `qwen2`", "deepseek2")
    assert_fails(dsv2("chat", path, "-p", "x", "--engine", "dsv2", "--rpc", "a:1"), 2, "--rpc is llama.cpp's")
    assert_fails(dsv2("chat", path, "-p", "x", "--gpu-layers", "4"), 1, "built for the processor alone")


def test_memory_that_is_set_for_every_model_is_not_refused(written: Callable[..., Path]) -> None:
    ask = ("chat", written(QWEN2), "-p", "x", "-n", "1", "-t", "1")
    assert dsv2(*ask, DSV2_RAM="12G").returncode == 0
    assert_fails(dsv2(*ask, "--ram", "12G"), 2, "--ram is of dsv2's own engine")


@pytest.mark.parametrize("command", [("chat", "-p", "x"), ("bench", "-p", "8", "-n", "0")])
def test_a_gpu_beside_the_processor_is_refused(written: Callable[..., Path], command: tuple[str, ...]) -> None:
    assert_fails(dsv2(command[0], written(QWEN2), *command[1:], "--gpu", "auto"), 2, "--gpu is of dsv2's own engine")


def test_perplexity_of_both_is_the_oracles(written: Callable[..., Path], tmp_path: Path) -> None:
    path = written(QWEN2)
    text = tmp_path / "t.txt"
    text.write_text("the hi a User Assistant " * 60, encoding="utf-8")
    result = dsv2("perplexity", path, "--text", text, "-c", "64", "--windows", "2", "--kv", "f32", "-t", "1", "--json")
    assert result.returncode == 0, result.stderr
    told = json.loads(result.stdout)
    with Tokenizer(path) as tokenizer:
        ids = tokenizer.encode(text.read_text(encoding="utf-8"))
    losses = []
    for start in (0, 64):
        window = ids[start : start + 64]
        logits = oracle.logits(path, window).astype(np.float64)
        logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        losses += [-logs[i, window[i + 1]] for i in range(16, 63)]
    assert told["nll"] == pytest.approx(np.mean(losses), rel=1e-4)
    against = dsv2(
        "perplexity", path, "--text", text, "-c", "64", "--windows", "2", "--reference-kv", "f32", "-t", "1", "--json"
    )
    assert 0 <= json.loads(against.stdout)["reference"]["kld_mean"] < 0.01
    assert json.loads(against.stdout)["reference"]["routing"] is None


def test_inspect_of_a_mixture(written: Callable[..., Path]) -> None:
    path = written(MIXTRAL)
    shown = dsv2("inspect", path)
    assert shown.returncode == 0 and "(architecture `llama`: llama.cpp runs this file)" in shown.stderr
    for words in ("engine        llama.cpp", "experts       2 of 4", "4 heads, 2 of keys and values", "routed experts"):
        assert words in shown.stdout
    told = json.loads(dsv2("inspect", path, "--json").stdout)
    assert told["engine"] == "llama.cpp" and told["kv_bytes_per_token"]["f16"] == 2 * 2 * 2 * 16 * 2
    assert told["memory"][0]["nbytes"]["f16"] == told["tensor_bytes"] + 512 * 256


def test_inspect_does_not_open_llama_cpp(written: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama_cpp.llama_model_load_from_file", None)
    assert anatomy.study(written(LLAMA)).engine == "llama.cpp"


NO_MODELS = {
    "mmproj": ("clip", {"general.type": "mmproj"}, "a multimodal projector"),
    "clip": ("clip", {}, "a multimodal projector"),
    "bert": ("bert", {}, "an encoder"),
    "causal": ("llama", {"llama.attention.causal": False}, "an encoder"),
    "pooled": ("qwen3", {"qwen3.pooling_type": 3}, "an embedding model"),
    "reranker": ("qwen3", {"qwen3.pooling_type": 4}, "a reranker"),
    "adapter": ("llama", {"general.type": "adapter"}, "an adapter (LoRA)"),
    "imatrix": ("imatrix", {"general.type": "imatrix"}, "an importance matrix"),
    "t5": ("t5", {}, "an encoder with a decoder"),
    "draft": ("eagle3", {}, "a draft head"),
    "diffusion": ("llada", {}, "a diffusion model"),
}


@pytest.mark.parametrize("name", NO_MODELS)
def test_what_is_no_model_is_called_by_its_name(tmp_path: Path, name: str) -> None:
    arch, keys, words = NO_MODELS[name]
    path = tmp_path / "m.gguf"
    others.write_raw(path, arch, keys_of_a_name() | keys, {"v.weight": np.zeros((4, 32), np.float32)})
    for engine in ("auto", "llama.cpp"):
        assert_fails(dsv2("chat", path, "-p", "x", "--engine", engine), 1, words)
    shown = dsv2("inspect", path)
    assert shown.returncode == 0 and f"none: it is {words}" in shown.stdout


def keys_of_a_name() -> dict[str, Any]:
    return {"general.name": "x"}


def test_a_vocabulary_alone(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    others.write_raw(path, "llama", others.keys_of(LLAMA) | others.pieces(), {})
    assert_fails(dsv2("chat", path, "-p", "x"), 1, "a vocabulary, without the model")


def test_llama_cpps_reason_in_a_line(tmp_path: Path) -> None:
    path = others.write(tmp_path / "m.gguf", LLAMA)
    strange = others.write_raw(
        tmp_path / "s.gguf", "runes", {"runes.block_count": 1} | others.byte_pairs(), {"a": np.zeros(32, np.float32)}
    )
    assert_fails(dsv2("chat", strange, "-p", "x"), 1, "unknown model architecture: 'runes'", "pip install -U")
    short = others.tensors_of(LLAMA, len(others.pieces()["tokenizer.ggml.tokens"]))
    del short["blk.1.ffn_up.weight"]
    others.write_raw(path, "llama", others.keys_of(LLAMA) | others.pieces(), short)
    assert_fails(dsv2("chat", path, "-p", "x"), 1, "tensor 'blk.1.ffn_up.weight' not found")
    path.write_bytes(path.read_bytes()[:-1000])
    assert_fails(dsv2("chat", path, "-p", "x"), 1, "m.gguf")


def test_bench_measures_llama_cpp_alone(written: Callable[..., Path]) -> None:
    path = written(MIXTRAL)
    result = dsv2("bench", path, "-p", "16", "-n", "2", "-r", "1", "-t", "1", "--json")
    assert result.returncode == 0 and "(architecture `llama`: llama.cpp runs this file)" in result.stderr
    told = json.loads(result.stdout)
    assert set(told["engines"]) == {"llama.cpp"} and told["isa"].startswith("llama.cpp ")
    assert all(test["tokens_per_second"]["llama.cpp"][0] > 0 and not test["ratios"] for test in told["tests"])
    assert_fails(dsv2("bench", path, "--against", "llama.cpp"), 2, "nothing to compare it with")


def test_a_split_file_is_opened_by_its_first_part(tmp_path: Path) -> None:
    whole = others.write(tmp_path / "m.gguf", LLAMA)
    keys = {"general.name": "m"} | others.keys_of(LLAMA) | others.pieces()
    writer = gguf.GGUFWriter(tmp_path / "s.gguf", "llama", split_max_tensors=8)
    for key, value in keys.items():
        add_key(writer, key, value)
    for name, value in others.tensors_of(LLAMA, 279).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    parts = sorted(tmp_path.glob("s-*.gguf"))
    assert len(parts) == 3
    assert answer(parts[0], 8, "hi the") == answer(whole, 8, "hi the")
    assert_fails(dsv2("chat", parts[1], "-p", "x"), 1, parts[1].name)
    parts[2].unlink()
    assert_fails(dsv2("chat", parts[0], "-p", "x"), 1, parts[2].name)


def test_ctrl_c_while_a_text_is_scored(written: Callable[..., Path], tmp_path: Path) -> None:
    """Nothing of ours is between llama.cpp's operations there: the exception comes at once all the same."""
    text = tmp_path / "t.txt"
    text.write_text("the hi " * 80_000, encoding="utf-8")  # of many minutes, which are not waited for
    command = [*COMMAND, "perplexity", str(written(LARGE)), "--text", str(text), "-c", "1024", "-t", "1"]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stderr is not None
    process.stderr.readline()  # that llama.cpp runs it
    worked(process, 3)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=SECONDS)
    assert process.returncode == 130 and b"Traceback" not in told


HOSTILE: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "integers": ({}, {"output.weight": np.int32}, "`output.weight` is I32"),
    "doubles": ({}, {"blk.1.attn_v.weight": np.float64}, "`blk.1.attn_v.weight` is F64"),
    "a norm of halves": ({}, {"blk.1.attn_norm.weight": np.float16}, "llama.cpp"),
    "a check of its own": ({"llama.attention.layer_norm_rms_epsilon": -1.0}, {}, "llama.cpp ended"),
    "layers without number": ({"llama.block_count": 2**32 - 1}, {}, "llama.cpp ended"),
    "heads of no width": ({"llama.attention.head_count": 0}, {}, "llama.cpp"),
    "short scores": ({"tokenizer.ggml.scores": [0.0]}, {}, "out of array bounds for scores"),
    "no bytes": ({"tokenizer.ggml.tokens": [f"t{i}" for i in range(279)]}, {}, "no token for the byte"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_end_in_a_line(tmp_path: Path, name: str) -> None:
    """llama.cpp ends the process where it finds itself wrong: a line and exit code 1 come of it, never a signal."""
    changed, types, words = HOSTILE[name]
    tensors = others.tensors_of(LLAMA, 279)
    tensors |= {key: tensors[key].astype(dtype) for key, dtype in types.items()}
    path = tmp_path / "m.gguf"
    others.write_raw(path, "llama", others.keys_of(LLAMA) | others.pieces() | changed, tensors)
    assert_fails(dsv2("chat", path, "-p", "hi", "-n", "4", "-t", "1"), 1, words)


def test_serve_answers_with_it(written: Callable[..., Path]) -> None:
    """Several at once, several answers of one prompt, and the same prompt again."""
    path = written(QWEN2)
    with Tokenizer(path) as tokenizer:
        text = tokenizer.decode(answer(path, 8, "hi the")[0])
    with served(path, threads=1) as server:
        asked = {"messages": [{"role": "user", "content": "hi the"}], "max_tokens": 8, "temperature": 0}
        with ThreadPoolExecutor(3) as pool:
            bodies = list(pool.map(lambda _: server.asked("/v1/chat/completions", n=2, **asked), range(3)))
        said = [choice["message"]["content"] for body in bodies for choice in body["choices"]]
    assert said == [text] * 6


TWO = replace(USUAL, n_ctx=256, parallel=2, cache_bytes=1)  # a cache that one context is more than


def words(*numbers: int) -> str:
    """A prompt that begins as no other does, and goes on for 30 tokens and more."""
    return " ".join(f"{n} the hi a" for n in numbers for _ in range(8))


@pytest.mark.parametrize("cache_bytes", [1, 64 << 20])
def test_kept_prefixes_go_before_a_context_is_added(written: Callable[..., Path], cache_bytes: int) -> None:
    with served(written(QWEN2), replace(TWO, cache_bytes=cache_bytes), threads=1, wishes=Wishes(n_seq=2)) as server:
        model, ask = server.engine.runtime.model, {"max_tokens": 4, "temperature": 0}
        took = []
        for n in range(8):
            server.asked("/v1/completions", prompt=words(n), **ask)
            server.settle()
            took.append(model.cache_usage().nbytes)
        assert set(took) == {took[0]} and len(server.engine.prefixes) == 2

        def cached(prompt: str) -> int:
            usage = server.asked("/v1/completions", prompt=prompt, **ask)["usage"]
            return int(usage["prompt_tokens_details"]["cached_tokens"])

        assert cached(words(7)) > 16 and cached(words(6)) > 16  # the two latest
        assert cached(words(0)) < 16
        assert cached(words(0)) > 16
        server.settle()
        assert model.cache_usage().nbytes == took[0]


@pytest.mark.parametrize("more", [{}, {"cache_prompt": False}])
@pytest.mark.parametrize("parallel", [1, 2])
def test_answers_of_one_prompt_share_one_context(
    written: Callable[..., Path], parallel: int, more: dict[str, Any]
) -> None:
    settings = replace(TWO, parallel=parallel)
    with served(written(QWEN2), settings, threads=1, wishes=Wishes(n_seq=parallel)) as server:
        ask = {"prompt": words(1), "max_tokens": 6, "temperature": 0, **more}
        text = server.asked("/v1/completions", **ask)["choices"][0]["text"]
        server.settle()
        one = server.engine.runtime.model.cache_usage().nbytes
        with ThreadPoolExecutor(3) as pool:
            bodies = list(pool.map(lambda _: server.asked("/v1/completions", **ask, n=4), range(3)))
        assert [c["text"] for body in bodies for c in body["choices"]] == [text] * 12
        server.asked("/v1/completions", **ask)
        server.settle()
        most = parallel * one  # requests that met take a context each
        assert server.engine.runtime.model.cache_usage().nbytes in {one, most}


def test_contexts_without_sessions_are_given_back(written: Callable[..., Path]) -> None:
    with llamacpp.Model(written(QWEN2), 1, n_seq=2) as made:
        assert made.n_left() == 2
        sessions = [made.session(64) for _ in range(3)]
        one = made.cache_usage().nbytes // 2
        assert made.n_left() == 1
        assert made.excess(2 * one) == 0 and made.excess(one) == one and made.excess(0) == one
        del sessions[0]
        assert made.n_left() == 2 and made.excess(one) == one
        del sessions[1]  # the only one of the second context
        assert made.excess(2 * one) == 0 and made.cache_usage().nbytes == 2 * one
        assert made.excess(one) == 0 and made.cache_usage().nbytes == one
        np.testing.assert_array_equal(sessions[0].eval(IDS), made.session(64).eval(IDS))
        sessions.clear()
        made.session(32)
        assert made.cache_usage().nbytes == one // 2  # one of another size takes its place


def test_a_type_that_dsv2_lacks_is_llama_cpps() -> None:
    assert not_ours("deepseek2", ["f32", "iq1_s", "tq1_0"]) == "tensors in IQ1_S, TQ1_0"
    assert not_ours("deepseek2", ["f32", "q4_k"]) is None
    assert not_ours("llama", []) == "architecture `llama`"


def test_a_talk_in_a_terminal(written: Callable[..., Path]) -> None:
    with terminal("chat", written(QWEN2), "-n", "6", "--temp", "0", "-t", "1", "-s", "the") as screen:
        at = screen.wait_for(r"llama\.cpp runs this file")
        at = screen.wait_for(r"tiny qwen2, 512 tokens of context in [\d.]+ kB of f16, llama\.cpp [\d.]+\.", at)
        at = screen.wait_for("> ", at)
        screen.type("hi the\n")
        at = screen.wait_for(r"\n> ", at)
        screen.type("/stats\n")
        at = screen.wait_for(r"wrote \d+ at", at)
        at = screen.wait_for(r"1 turn, \d+ of 512 tokens", at)
        screen.type("/retry\n")
        at = screen.wait_for(r"\n> ", at)
        screen.type("/system a\n/clear\n/exit\n")
        assert screen.exit_code() == 0
    assert "Traceback" not in screen.text


IN_A_STEP = """
import os, signal, threading
from dsv2cli.engines.llamacpp import Model
evaluate, met = Model.evaluate, []
def interrupted(*given):
    if not met:
        met.append(threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)))
        met[0].start()
    return evaluate(*given)
Model.evaluate = interrupted
"""


def test_ctrl_c_within_a_step(written: Callable[..., Path]) -> None:
    """A step of 512 tokens takes seconds here; Ctrl-C ends it, so that nothing of it is kept, and the talk goes on."""
    options = ("-n", "4", "--temp", "0", "-t", "1", "-c", "4096")
    with terminal("chat", written(LARGE), *options, before=IN_A_STEP) as screen:
        at = screen.wait_for(r"/help lists the commands")
        at = screen.wait_for("> ", at)
        screen.type("the " * 900 + "\n")
        at = screen.wait_for(r"\(stopped\)\n> $", at)
        screen.type("hi\n")
        at = screen.wait_for(r"-n\)\n> $", at)
        screen.type("/stats\n")
        screen.wait_for(r"; read \d+ tokens at", at)  # and none kept
        screen.type("/exit\n")
        assert screen.exit_code() == 0
